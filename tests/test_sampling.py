"""Sampling against distributions worked out by hand and against a plain float64 reference that sorts everything."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_edge import GenerationOptions, LogitsError
from gpt2_edge.random_uniform import RandomUniform
from gpt2_edge.sampling import choose_token, draw_index, greedy, keep, keep_top_k, keep_top_p

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

VOCABULARY_SIZES: Final = (1, 5, 63, 64, 65, 785, 8192, 50257)
JUST_BELOW_ONE: Final = 1 - 2.0**-53


# By hand: probabilities of four tokens, what is asked for, what must be left of them.


@dataclass(frozen=True)
class Case:
    name: str
    probabilities: list[float]
    expected: dict[int, float]
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None


FALLING: Final = [0.4, 0.3, 0.2, 0.1]
MIXED: Final = [0.1, 0.4, 0.2, 0.3]
TIED: Final = [0.125, 0.5, 0.125, 0.25]

CASES: Final = [
    Case("as it is", FALLING, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}),
    Case("an impossible token", [0.0, 0.5, 0.25, 0.25], {1: 0.5, 2: 0.25, 3: 0.25}),
    Case("temperature 1/2 squares", FALLING, {0: 16 / 30, 1: 9 / 30, 2: 4 / 30, 3: 1 / 30}, temperature=0.5),
    Case(
        "temperature 2 takes the square root",
        [0.64, 0.16, 0.16, 0.04],
        {0: 0.8 / 1.8, 1: 0.4 / 1.8, 2: 0.4 / 1.8, 3: 0.2 / 1.8},
        temperature=2.0,
    ),
    Case("tiny temperature leaves the likeliest", MIXED, {1: 1.0}, temperature=1e-10),
    Case("temperature beyond float32 leaves the likeliest", MIXED, {1: 1.0}, temperature=1e-300),
    Case("tiny temperature leaves equals", [0.4, 0.1, 0.4, 0.1], {0: 0.5, 2: 0.5}, temperature=1e-30),
    Case("huge temperature is even", FALLING, dict.fromkeys(range(4), 0.25), temperature=1e30),
    Case("huge temperature spares impossible tokens", [0.0, 0.5, 0.0, 0.5], {1: 0.5, 3: 0.5}, temperature=1e30),
    Case("top-k 1", MIXED, {1: 1.0}, top_k=1),
    Case("top-k 2", MIXED, {1: 4 / 7, 3: 3 / 7}, top_k=2),
    Case("top-k 3", MIXED, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}, top_k=3),
    Case("top-k 3 with a tie keeps the lower id", TIED, {0: 1 / 7, 1: 4 / 7, 3: 2 / 7}, top_k=3),
    Case("top-k 2 of four equals keeps the lower ids", [0.25] * 4, {0: 0.5, 1: 0.5}, top_k=2),
    Case("top-k reaches impossible tokens", [0.0, 0.5, 0.0, 0.5], {1: 0.5, 3: 0.5}, top_k=3),
    Case("top-k 0 keeps all", FALLING, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, top_k=0),
    Case("top-k of the vocabulary keeps all", FALLING, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, top_k=4),
    Case("top-k beyond the vocabulary keeps all", FALLING, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, top_k=10**9),
    Case("top-p 0 keeps one", MIXED, {1: 1.0}, top_p=0.0),
    Case("top-p 1e-8 keeps one", MIXED, {1: 1.0}, top_p=1e-8),
    Case("top-p 0.39 is reached by the first", MIXED, {1: 1.0}, top_p=0.39),
    Case("top-p 0.41 keeps the token that crosses it", MIXED, {1: 4 / 7, 3: 3 / 7}, top_p=0.41),
    Case("top-p 0.69 is reached by two", MIXED, {1: 4 / 7, 3: 3 / 7}, top_p=0.69),
    Case("top-p 0.71 takes three", MIXED, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}, top_p=0.71),
    Case("top-p 0.95 takes all four", MIXED, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, top_p=0.95),
    Case("top-p 1 keeps all", MIXED, {0: 0.1, 1: 0.4, 2: 0.2, 3: 0.3}, top_p=1.0),
    Case("top-p with a tie keeps the lower id", TIED, {0: 1 / 7, 1: 4 / 7, 3: 2 / 7}, top_p=0.8),
    Case("top-p of four equals keeps the lower ids", [0.25] * 4, {0: 0.5, 1: 0.5}, top_p=0.3),
    Case("top-p spares impossible tokens", [0.0, 0.5, 0.0, 0.5], {1: 0.5, 3: 0.5}, top_p=0.99),
    Case("top-p of what top-k left", FALLING, {0: 1.0}, top_k=2, top_p=0.5),
    Case("top-k stricter than top-p", FALLING, {0: 4 / 7, 1: 3 / 7}, top_k=2, top_p=0.9),
    Case("top-p stricter than top-k", FALLING, {0: 1.0}, top_k=3, top_p=0.3),
    Case("temperature comes before top-p", FALLING, {0: 1.0}, temperature=0.5, top_p=0.5),
    Case("all three", FALLING, {0: 16 / 25, 1: 9 / 25}, temperature=0.5, top_k=3, top_p=0.6),
    Case("min-p 0 keeps all", FALLING, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, min_p=0.0),
    Case("min-p 0.45 of the likeliest", MIXED, {1: 4 / 9, 2: 2 / 9, 3: 3 / 9}, min_p=0.45),
    Case("min-p 0.55 of the likeliest", MIXED, {1: 4 / 7, 3: 3 / 7}, min_p=0.55),
    Case("min-p 1 keeps the likeliest", MIXED, {1: 1.0}, min_p=1.0),
    Case("min-p 1 keeps all equals", [0.4, 0.1, 0.4, 0.1], {0: 0.5, 2: 0.5}, min_p=1.0),
    Case("temperature comes before min-p", FALLING, {0: 16 / 25, 1: 9 / 25}, temperature=0.5, min_p=0.45),
    # The information of 0.4, 0.3, 0.2, 0.1 is 0.92, 1.20, 1.61, 2.30; the entropy is 1.28.
    Case("typical-p 0 keeps the most typical", FALLING, {1: 1.0}, typical_p=0.0),
    Case("typical-p 0.29 is reached by one", FALLING, {1: 1.0}, typical_p=0.29),
    Case("typical-p 0.4 takes the next", FALLING, {1: 0.6, 2: 0.4}, typical_p=0.4),
    Case("typical-p 0.6 takes the likeliest third", FALLING, {0: 4 / 9, 1: 3 / 9, 2: 2 / 9}, typical_p=0.6),
    Case("typical-p 0.95 takes all", FALLING, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, typical_p=0.95),
    Case("typical-p 1 keeps all", FALLING, {0: 0.4, 1: 0.3, 2: 0.2, 3: 0.1}, typical_p=1.0),
    Case("typical-p of equals keeps the lower ids", [0.25] * 4, {0: 0.5, 1: 0.5}, typical_p=0.3),
    Case("typical-p spares impossible tokens", [0.0, 0.5, 0.0, 0.5], {1: 0.5, 3: 0.5}, typical_p=0.9),
    Case("top-p, then min-p", MIXED, {1: 4 / 7, 3: 3 / 7}, top_p=0.95, min_p=0.6),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_distributions_by_hand(case: Case) -> None:
    with np.errstate(divide="ignore"):
        logits = np.log(np.array(case.probabilities)).astype(np.float32)
    token_ids, weights = keep(logits, case.temperature, case.top_k, case.top_p, case.min_p, case.typical_p)
    found = drawable(token_ids, weights)
    assert found == pytest.approx(case.expected, rel=1e-6)


def drawable(token_ids: Integers | None, weights: Float32s) -> dict[int, float]:
    """Token ids that can be drawn, with their probabilities."""
    ids = range(weights.size) if token_ids is None else token_ids.tolist()
    total = float(weights.sum(dtype=np.float64))
    return {token: weight / total for token, weight in zip(ids, weights.tolist(), strict=True) if weight > 0}


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [(0.0, [1]), (0.5, [1]), (0.501, [1, 3]), (0.75, [1, 3]), (0.875, [0, 1, 3]), (0.876, [0, 1, 2, 3]), (1.0, None)],
)
def test_the_border_of_top_p_is_inclusive(top_p: float, expected: list[int] | None) -> None:
    """Weights that float32 holds exactly, so that the sum is exactly on the border."""
    weights = np.array([1, 4, 1, 2], np.float32)
    assert keep_top_p(weights, top_p).tolist() == (expected or [0, 1, 2, 3])


# Against a reference that is as plain as can be.


@dataclass(frozen=True)
class Reference:
    """The distribution by sorting everything in float64.

    Attributes:
        order: Token ids from the likeliest on, equal ones by id, as many as top-k keeps.
        probabilities: Theirs, after temperature and top-k.
    """

    order: Integers
    probabilities: Float64s

    @property
    def of_token(self) -> dict[int, float]:
        return dict(zip(self.order.tolist(), self.probabilities.tolist(), strict=True))


def reference(logits: Float32s, temperature: float, top_k: int | None) -> Reference:
    exact = logits.astype(np.float64)
    order = np.argsort(-exact, kind="stable")[: top_k or None]
    kept = (exact[order] - exact[order[0]]) / max(temperature, 1e-30)
    weights = np.exp(kept)
    return Reference(order, weights / weights.sum())


@st.composite
def seeded_logits(draw: st.DrawFn, sizes: tuple[int, ...] = VOCABULARY_SIZES) -> Float32s:
    size = draw(st.sampled_from(sizes))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from(("flat", "usual", "peaked", "coarse ties", "two values", "all equal", "one peak")))
    values = {
        "flat": lambda: rng.normal(0, 0.01, size),
        "usual": lambda: rng.normal(-30, 3, size),
        "peaked": lambda: rng.normal(0, 3, size) ** 3,
        "coarse ties": lambda: np.round(rng.normal(0, 2, size)),
        "two values": lambda: rng.integers(0, 2, size) * 0.5,
        "all equal": lambda: np.full(size, -7.25),
        "one peak": lambda: np.where(np.arange(size) == rng.integers(size), 60.0, 0.0),
    }[shape]()
    logits = values.astype(np.float32)
    masked_share = draw(st.sampled_from((0.0, 0.0, 0.1, 0.99)))
    masked = rng.random(size) < masked_share
    masked[rng.integers(size)] = False  # something must be left
    logits[masked] = -np.inf
    return logits


TEMPERATURES: Final = st.sampled_from((1e-30, 1e-10, 0.1, 0.7, 1.0, 1.5, 1e4, 1e30))
TOP_KS: Final = st.sampled_from((None, 0, 1, 2, 5, 12, 40, 63, 64, 65, 500, 8191, 8192, 50256, 50257, 10**9))
TOP_PS: Final = st.sampled_from((None, 0.0, 1e-8, 0.1, 0.5, 0.9, 0.95, 0.999999, 1.0))
FULL_CHECK: Final = settings(deadline=None, derandomize=True, max_examples=150)
LIGHT_CHECK: Final = settings(deadline=None, derandomize=True, max_examples=60)


@FULL_CHECK
@given(logits=seeded_logits(), temperature=TEMPERATURES, top_k=TOP_KS)
def test_temperature_and_top_k_equal_the_reference(logits: Float32s, temperature: float, top_k: int | None) -> None:
    before = logits.copy()
    token_ids, weights = keep(logits, temperature, top_k)
    expected = reference(logits, temperature, top_k)
    kept = np.arange(logits.size) if token_ids is None else token_ids
    assert kept.tolist() == sorted(expected.order.tolist())
    in_id_order = np.argsort(expected.order)
    probabilities = weights / weights.sum(dtype=np.float64)
    np.testing.assert_allclose(probabilities, expected.probabilities[in_id_order], rtol=1e-4, atol=1e-9)
    assert weights.max() == 1
    np.testing.assert_array_equal(logits, before, err_msg="the logits were written to")


@FULL_CHECK
@given(logits=seeded_logits(), temperature=TEMPERATURES, top_k=TOP_KS, top_p=TOP_PS)
def test_top_p_keeps_the_smallest_nucleus(
    logits: Float32s, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    token_ids, weights = keep(logits, temperature, top_k, top_p)
    expected = reference(logits, temperature, top_k)
    if top_p is None or top_p == 1:
        assert weights.size == expected.order.size
        return
    assert token_ids is not None
    assert token_ids.size == weights.size >= 1
    assert (np.diff(token_ids) > 0).all()
    # The product adds up in float32, so what is that close to the border may fall on either side of it.
    slack = 1e-5
    is_kept = np.isin(expected.order, token_ids)
    kept, dropped = expected.probabilities[is_kept], expected.probabilities[~is_kept]
    assert kept.size == token_ids.size, "a token that top-k removed came back"
    assert kept.sum() >= top_p - slack, "the nucleus does not reach top_p"
    assert kept.size == 1 or kept.sum() - kept.min() < top_p + slack, "the nucleus is larger than needed"
    assert dropped.size == 0 or dropped.max() <= kept.min() * (1 + slack), "a likelier token was dropped"
    np.testing.assert_allclose(
        weights / weights.sum(dtype=np.float64), kept_in_id_order(expected, token_ids), rtol=1e-4
    )
    assert_lower_ids_of_equals_are_kept(logits, expected.order, token_ids)


def kept_in_id_order(expected: Reference, token_ids: Integers) -> Float64s:
    of_token = expected.of_token
    probabilities = np.array([of_token[token] for token in token_ids.tolist()])
    return probabilities / probabilities.sum()


def assert_lower_ids_of_equals_are_kept(logits: Float32s, candidates: Integers, kept: Integers) -> None:
    smallest = logits[kept].min()
    equals = np.sort(candidates[logits[candidates] == smallest])
    kept_equals = np.intersect1d(equals, kept)
    assert kept_equals.tolist() == equals[: kept_equals.size].tolist()


@FULL_CHECK
@given(logits=seeded_logits(), temperature=TEMPERATURES, top_k=TOP_KS, min_p=TOP_PS)
def test_min_p_keeps_what_is_likely_enough(
    logits: Float32s, temperature: float, top_k: int | None, min_p: float | None
) -> None:
    token_ids, _ = keep(logits, temperature, top_k, min_p=min_p)
    expected = reference(logits, temperature, top_k)
    kept = expected.order if token_ids is None else token_ids
    share = expected.probabilities / expected.probabilities[0]
    is_kept = np.isin(expected.order, kept)
    assert np.count_nonzero(is_kept) == kept.size >= 1
    assert (share[is_kept] >= (min_p or 0) * (1 - 1e-4)).all()
    assert (share[~is_kept] <= (min_p or 0) * (1 + 1e-4)).all()


@FULL_CHECK
@given(logits=seeded_logits(), temperature=TEMPERATURES, top_k=TOP_KS, typical_p=TOP_PS)
def test_typical_p_keeps_the_fewest_that_are_typical(
    logits: Float32s, temperature: float, top_k: int | None, typical_p: float | None
) -> None:
    token_ids, weights = keep(logits, temperature, top_k, typical_p=typical_p)
    expected = reference(logits, temperature, top_k)
    if typical_p is None or typical_p == 1:
        assert weights.size == expected.order.size
        return
    assert token_ids is not None
    probabilities = expected.probabilities
    with np.errstate(divide="ignore"):
        information = -np.log(probabilities)
    entropy = (probabilities[probabilities > 0] * information[probabilities > 0]).sum()
    distance = np.abs(information - entropy)
    is_kept = np.isin(expected.order, token_ids)
    farthest, slack = distance[is_kept].max(), 1e-4
    assert np.count_nonzero(is_kept) == token_ids.size == weights.size >= 1
    assert probabilities[is_kept].sum() >= typical_p - slack, "what is kept does not reach typical_p"
    assert is_kept.all() or distance[~is_kept].min() >= farthest - slack, "a more typical token was dropped"
    assert probabilities[distance < farthest - slack].sum() < typical_p + slack, "more is kept than needed"


@FULL_CHECK
@given(logits=seeded_logits(), count=st.integers(1, 60_000))
def test_keep_top_k_alone_equals_a_full_sort(logits: Float32s, count: int) -> None:
    count = min(count, 2 * logits.size)
    assert keep_top_k(logits, count).tolist() == sorted(np.argsort(-logits, kind="stable")[:count].tolist())


@FULL_CHECK
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from(VOCABULARY_SIZES),
    largest=st.sampled_from((1, 3, 1000)),
    top_p=st.sampled_from((0.0, 1e-8, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 1.0)),
)
def test_keep_top_p_alone_equals_a_full_sort(seed: int, size: int, largest: int, top_p: float) -> None:
    """Whole numbers add up without rounding, so here the kept set must be the same to the last token."""
    weights = np.random.default_rng(seed).integers(0, largest + 1, size).astype(np.float32)
    weights[size // 2] = largest
    order = np.argsort(-weights, kind="stable")
    reached = np.cumsum(weights[order], dtype=np.float64)
    count = 1 + int(np.count_nonzero(reached < top_p * reached[-1]))
    assert keep_top_p(weights, top_p).tolist() == sorted(order[:count].tolist())


# What cannot be sampled from.


@pytest.mark.parametrize("size", [1, 5, 785])
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        pytest.param(lambda logits, at: logits.__setitem__(at, np.nan), "NaN", id="NaN"),
        pytest.param(lambda logits, at: logits.__setitem__(at, np.inf), "[+]inf", id="+inf"),
        pytest.param(lambda logits, at: logits.fill(-np.inf), "only -inf", id="all -inf"),
        pytest.param(lambda logits, at: logits.fill(np.nan), "NaN", id="all NaN"),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"top_k": 1}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.9}], ids=str
)
def test_unusable_logits_are_refused(
    size: int, spoil: Callable[[Float32s, int], None], found: str, options: dict[str, float]
) -> None:
    for at in {0, size // 2, size - 1}:
        logits = np.linspace(-1, 1, size, dtype=np.float32)
        spoil(logits, at)
        with pytest.raises(LogitsError, match=found):
            choose_token(logits, GenerationOptions(**options), RandomUniform(1))


@pytest.mark.parametrize("temperature", [1e-30, 1.0, 1e30])
def test_logits_as_large_as_float32_holds(temperature: float) -> None:
    largest = np.finfo(np.float32).max
    logits = np.array([-largest, largest, -largest, largest], np.float32)
    token_ids, weights = keep(logits, temperature, top_p=0.9)
    assert drawable(token_ids, weights) == pytest.approx({1: 0.5, 3: 0.5})


# Greedy.


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0}, {"temperature": 0.0, "top_k": 2, "top_p": 0.9}, {"top_k": 0}],
    ids=str,
)
def test_greedy_takes_the_lowest_of_the_largest_and_draws_nothing(options: dict[str, float]) -> None:
    uniform = RandomUniform(3)
    logits = np.array([0, 2, -1, 2, 1], np.float32)
    assert choose_token(logits, GenerationOptions(**options), uniform) == 1
    assert greedy(logits) == 1
    assert uniform.draw() == RandomUniform(3).draw()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.0),
        ({"top_k": 5}, 1.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_p": 0.0}, 1.0),
        ({"top_k": 5, "temperature": 0}, 0.0),
        ({"temperature": 0.3}, 0.3),
        ({"seed": 5}, 0.0),
    ],
    ids=str,
)
def test_which_temperature_is_meant(options: dict[str, float], expected: float) -> None:
    assert GenerationOptions(**options).effective_temperature == expected


@LIGHT_CHECK
@given(logits=seeded_logits(), seed=st.integers(0, 2**64 - 1))
def test_the_strictest_filters_are_greedy(logits: Float32s, seed: int) -> None:
    likeliest = int(np.argmax(logits))
    for options in ({"top_k": 1}, {"top_p": 0.0}, {"top_k": 1, "top_p": 0.0, "temperature": 5.0}):
        assert choose_token(logits, GenerationOptions(**options), RandomUniform(seed)) == likeliest


# Drawing.


@pytest.mark.parametrize("size", [1, 4, 63, 64, 65, 128, 785])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_draw_index_is_the_inverse_of_the_cumulative_sum(size: int, zeros: float) -> None:
    """Whole weights that add up to a power of two: every border between two indices is met exactly."""
    total = 2048
    rng = np.random.default_rng(size)
    weights = np.zeros(size, np.float32)
    usable = rng.choice(size, max(1, round(size * (1 - zeros))), replace=False)
    np.add.at(weights, rng.choice(usable, total), 1)
    ends = np.cumsum(weights, dtype=np.float64)
    for numerator in range(total):
        assert draw_index(weights, numerator / total) == np.searchsorted(ends, numerator, side="right")


@LIGHT_CHECK
@given(logits=seeded_logits(), draws=st.integers(0, 2**32 - 1))
def test_draw_index_equals_the_cumulative_sum_of_any_weights(logits: Float32s, draws: int) -> None:
    _, weights = keep(logits, 1.0)
    ends = np.cumsum(weights, dtype=np.float64)
    for uniform in np.random.default_rng(draws).random(50):
        assert draw_index(weights, uniform) == np.searchsorted(ends, uniform * ends[-1], side="right")


@LIGHT_CHECK
@given(
    size=st.sampled_from((1, 2, 63, 64, 65, 129, 785)),
    seed=st.integers(0, 2**32 - 1),
    share=st.sampled_from((0.0, 0.02, 0.5)),
)
def test_weight_zero_is_never_drawn(size: int, seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    weights = np.where(rng.random(size) < share, rng.random(size), 0).astype(np.float32)
    weights[rng.integers(size)] = 1
    for uniform in (0.0, 2.0**-53, 0.5, *rng.random(10), 1 - 2.0**-20, JUST_BELOW_ONE):
        assert weights[draw_index(weights, uniform)] > 0


@pytest.mark.parametrize("size", [1, 3, 64, 65, 200])
def test_the_ends_of_the_draw(size: int) -> None:
    weights = np.zeros(size + 200, np.float32)
    weights[100 : 100 + size] = 0.1
    assert draw_index(weights, 0.0) == 100
    assert draw_index(weights, JUST_BELOW_ONE) == 100 + size - 1


# Random numbers.


def philox(counter: int, key: int) -> list[int]:
    """Philox4x64-10, written down from the paper: four numbers of 64 bits."""
    mask = 2**64 - 1
    words = [counter >> shift & mask for shift in (0, 64, 128, 192)]
    low_key, high_key = key & mask, key >> 64
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * words[0], 0xCA5A826395121157 * words[2]
        words = [(second >> 64) ^ words[1] ^ low_key, second & mask, (first >> 64) ^ words[3] ^ high_key, first & mask]
        low_key, high_key = (low_key + 0x9E3779B97F4A7C15) & mask, (high_key + 0xBB67AE8584CAA73B) & mask
    return words


def test_the_reference_philox_gives_the_published_numbers() -> None:
    """The known answer for counter 0 and key 0 that comes with Random123."""
    assert philox(0, 0) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
def test_random_uniform_is_philox_from_counter_one(seed: int) -> None:
    uniform = RandomUniform(seed)
    expected = [word for counter in (1, 2, 3) for word in philox(counter, seed)]
    assert [uniform.draw() for _ in expected] == [(word >> 11) / 2**53 for word in expected]


def test_random_uniform_golden_values() -> None:
    """A stored seed must give the same text in every release."""
    uniform = RandomUniform(7)
    assert [uniform.draw() for _ in range(6)] == [
        0.8720734548204873,
        0.29536538151378355,
        0.4200976785072422,
        0.4053922457839946,
        0.0828426870273763,
        0.6966328926282271,
    ]


def test_random_uniform_statistics() -> None:
    uniform = RandomUniform(2024)
    drawn = np.array([uniform.draw() for _ in range(20_000)])
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert drawn.mean() == pytest.approx(1 / 2, abs=0.01)
    assert drawn.var() == pytest.approx(1 / 12, abs=0.002)
    assert np.corrcoef(drawn[:-1], drawn[1:])[0, 1] == pytest.approx(0, abs=0.03)
    counts, _ = np.histogram(drawn, bins=50, range=(0, 1))
    assert_fits(counts, np.full(50, 1 / 50))


def test_neighbouring_seeds_share_nothing() -> None:
    streams = [RandomUniform(seed) for seed in range(100)]
    firsts = np.array([stream.draw() for stream in streams])
    assert np.unique(firsts).size == 100
    assert firsts.mean() == pytest.approx(1 / 2, abs=0.1)


def assert_fits(counts: npt.NDArray[np.int_], probabilities: Float64s) -> None:
    """Chi-squared test at 0.1 %; the quantile is Wilson and Hilferty's approximation."""
    expected = counts.sum() * probabilities
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = counts.size - 1
    spread = 2 / (9 * freedom)
    assert statistic < freedom * (1 - spread + 3.09 * math.sqrt(spread)) ** 3


@dataclass(frozen=True)
class Draws:
    size: int
    options: dict[str, float] = field(default_factory=dict)


@pytest.mark.parametrize(
    "draws",
    [
        Draws(40, {"temperature": 1.0}),
        Draws(40, {"temperature": 1.7}),
        Draws(785, {"top_k": 30}),
        Draws(785, {"top_p": 0.6, "temperature": 0.8}),
        Draws(785, {"top_k": 60, "top_p": 0.9, "temperature": 1.3}),
    ],
    ids=lambda draws: f"{draws.size}-{draws.options}",
)
def test_drawn_tokens_follow_the_exact_distribution(draws: Draws) -> None:
    logits = np.random.default_rng(11).normal(0, 1, draws.size).astype(np.float32)
    options = GenerationOptions(**draws.options)
    uniform = RandomUniform(99)
    drawn = np.array([choose_token(logits, options, uniform) for _ in range(20_000)])

    exact = reference(logits, options.effective_temperature, options.top_k)
    count = 1 + int(np.count_nonzero(np.cumsum(exact.probabilities) < (options.top_p or 1) - 1e-12))
    nucleus = exact.order[:count]
    probabilities = exact.probabilities[:count] / exact.probabilities[:count].sum()
    counts = np.array([np.count_nonzero(drawn == token) for token in nucleus])
    assert counts.sum() == drawn.size, "a token outside of the distribution was drawn"
    assert_fits(counts, probabilities)
