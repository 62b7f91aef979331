"""Drawing from peaked logits, the way that avoids looking at most of them, against plain float64.

Where it is not the way it must say so, and the other one must be taken.
"""

import math
from typing import Final

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_reference import INFINITY, SLACK, Float32s, Float64s, Options, reference_drawn

from gpt2_edge import GenerationOptions, LogitsError, choosing
from gpt2_edge.choosing import TokenChooser
from gpt2_edge.peaked import PeakedDraw, can_draw
from gpt2_edge.random_uniform import RandomUniform

VOCABULARY: Final = 50_257
JUST_BELOW_ONE: Final = 1 - 2.0**-53
NARROWINGS: Final[list[Options]] = [
    {"top_k": 40},
    {"top_k": 1},
    {"top_k": 128, "temperature": 1.3},
    {"top_p": 0.95},
    {"top_p": 0.5, "temperature": 0.7},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
    {"top_k": 20, "top_p": 0.3},
    {"top_k": 60, "min_p": 0.2},
    {"top_p": 0.95, "min_p": 0.05},  # min-p is the stricter one of these
    {"top_p": 0.4, "min_p": 0.001},  # top-p is
    {"top_p": 0.9, "min_p": 0.1, "temperature": 1.5},
]


class Numbers(RandomUniform):
    """Gives a number that is set."""

    def __init__(self) -> None:
        super().__init__(0)
        self.number = 0.5
        self.drawn = 0

    def draw(self) -> float:
        self.drawn += 1
        return self.number


def drawer(options: Options) -> tuple[PeakedDraw, Numbers]:
    numbers = Numbers()
    assert can_draw(GenerationOptions(**options))
    return PeakedDraw(GenerationOptions(**options), numbers), numbers


def peaked_logits(seed: int, size: int = VOCABULARY, deviation: float = 4.5, mean: float = -60.0) -> Float32s:
    """With a deviation of 4.5 the entropy is 3.4 nats, with 6 it is 2.2."""
    return np.random.default_rng(seed).normal(mean, deviation, size).astype(np.float32)


def expected_tokens(logits: Float32s, options: Options, numbers: Float64s) -> list[int | None]:
    """The token whose share holds each number; None if rounding could make it another."""
    variants = []
    for sign in (-1, 0, 1):
        changed = dict(options)
        if "top_p" in options:
            changed["top_p"] = max(0.0, options["top_p"] + sign * 3e-6)
        if "min_p" in options:
            changed["min_p"] = min(1.0, options["min_p"] * (1 + sign * 1e-5))
        ends = np.cumsum(reference_drawn(logits.astype(np.float64), changed).probabilities)
        variants += [np.searchsorted(ends, numbers + shift, side="right") for shift in (-SLACK, SLACK)]
    return [found[0] if len(set(found)) == 1 else None for found in np.array(variants).T.tolist()]


def assert_draws(options: Options, logits: Float32s, *, may_pass: bool = False) -> bool:
    """Compare the tokens for some numbers with the reference; tell whether it was the way."""
    before = logits.copy()
    draw, numbers = drawer(options)
    given = np.random.default_rng(1).uniform(SLACK, 1 - SLACK, 40)
    compared = 0
    for numbers.number, expected in zip(given, expected_tokens(logits, options, given), strict=True):
        token = draw.draw(logits)
        if token is None:
            assert may_pass
            assert numbers.drawn == 0
            return False
        if expected is not None:
            compared += 1
            assert token == expected
    np.testing.assert_array_equal(logits, before, err_msg="the logits were written to")
    assert compared > 30 or may_pass
    return True


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
@pytest.mark.parametrize("deviation", [3.8, 4.5, 6.0])
def test_peaked_logits_are_drawn_this_way_and_right(options: Options, deviation: float) -> None:
    for seed in range(3):
        assert_draws(options, peaked_logits(seed, deviation=deviation))


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
@pytest.mark.parametrize("size", [300, 8192, 8193, 16_384, 20_000])
def test_other_vocabularies(options: Options, size: int) -> None:
    """Among them such as fill the pieces of the sum exactly."""
    if not (options.get("top_p") and size == 300):  # as few are drawn from otherwise
        assert_draws(options, peaked_logits(size, size=size))


@settings(deadline=None, derandomize=True, max_examples=250)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from((1, 2, 65, 785, 9000)),
    shape=st.sampled_from(("peaked", "flat", "coarse", "two values", "all equal", "one peak")),
    masked_share=st.sampled_from((0.0, 0.0, 0.5, 0.99)),
    options=st.sampled_from(NARROWINGS),
)
def test_whatever_the_shape_it_is_right_or_not_the_way(
    seed: int, size: int, shape: str, masked_share: float, options: Options
) -> None:
    rng = np.random.default_rng(seed)
    logits = {
        "peaked": lambda: rng.normal(-30, 5, size),
        "flat": lambda: rng.normal(0, 0.1, size),
        "coarse": lambda: np.round(rng.normal(0, 4, size)),
        "two values": lambda: rng.integers(0, 2, size) * 3.0,
        "all equal": lambda: np.full(size, -7.25),
        "one peak": lambda: np.where(np.arange(size) == rng.integers(size), 60.0, rng.normal(0, 1, size)),
    }[shape]().astype(np.float32)
    masked = rng.random(size) < masked_share
    masked[rng.integers(size)] = False
    logits[masked] = -np.inf
    assert_draws(options, logits, may_pass=True)


# Guesses that fail.


@pytest.mark.parametrize(("gap", "is_the_way"), [(5, True), (10, True), (20, True), (26, True), (30, False)])
def test_top_k_widens_its_gap_until_enough_are_found(gap: float, is_the_way: bool) -> None:
    logits = np.full(VOCABULARY, -200, np.float32)
    logits[[7, 9, 40_000]] = [0, 0.5 - gap, -gap]
    draw, numbers = drawer({"top_k": 3})
    numbers.number = JUST_BELOW_ONE
    assert draw.draw(logits) == ((40_000 if gap < 30 else 7) if is_the_way else None)
    chooser = TokenChooser(GenerationOptions(top_k=3), 1, [])
    assert {chooser.choose(logits, [0], []) for _ in range(20)} <= {7, 9}


@pytest.mark.parametrize(("deviation", "is_the_way"), [(4.0, True), (2.2, True), (1.0, False)])
def test_top_k_narrows_its_gap_until_not_too_many_are_found(deviation: float, is_the_way: bool) -> None:
    logits = peaked_logits(2, deviation=deviation)
    assert assert_draws({"top_k": 40}, logits, may_pass=True) == is_the_way


def test_top_p_lowers_its_guess_of_the_border() -> None:
    """The flatter, the more tokens are in the nucleus; at last too many for this way."""
    found = [assert_draws({"top_p": 0.95}, peaked_logits(5, deviation=d), may_pass=True) for d in (8, 6, 4.5, 4, 3)]
    assert found == [True, True, True, True, False]


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
def test_flat_logits_are_drawn_the_other_way(options: Options) -> None:
    logits = np.random.default_rng(3).normal(0, 0.01, VOCABULARY).astype(np.float32)
    exact = reference_drawn(logits.astype(np.float64), options)
    chooser = TokenChooser(GenerationOptions(**options), 4, [])
    if options.get("min_p") == 1.0 or options.get("top_k") == 1 or options.get("top_p") == 0.0:
        assert chooser.choose(logits, [0], []) == np.argmax(logits)
        return
    tokens = {chooser.choose(logits, [0], []) for _ in range(30)}
    # Where so many are alike, rounding decides which of those on the border are kept.
    near = logits > logits[exact.probabilities > 0].min() - 1e-3
    assert all(near[token] for token in tokens)
    assert len(tokens) > 5


# Borders, by hand: probabilities of a few tokens, all others impossible.


@pytest.mark.parametrize(
    ("options", "probabilities", "expected"),
    [
        ({"top_k": 2}, [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]),
        ({"top_k": 3}, [0.125, 0.5, 0.125, 0.25], [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"top_p": 0.49}, [0.125, 0.5, 0.125, 0.25], [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0.125, 0.5, 0.125, 0.25], [0, 2 / 3, 0, 1 / 3]),
        ({"top_p": 0.76}, [0.125, 0.5, 0.125, 0.25], [1 / 7, 4 / 7, 0, 2 / 7]),
        ({"top_p": 0.9}, [0.125, 0.5, 0.125, 0.25], [0.125, 0.5, 0.125, 0.25]),
        ({"top_p": 0.3}, [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0, 0]),
        ({"min_p": 0.49}, [0.2, 0.2, 0.2, 0.4], [0.2, 0.2, 0.2, 0.4]),
        ({"min_p": 0.51}, [0.2, 0.2, 0.2, 0.4], [0, 0, 0, 1]),
        ({"min_p": 1.0}, [0.4, 0.1, 0.4, 0.1], [0.5, 0, 0.5, 0]),
        ({"top_k": 2, "top_p": 0.5}, [0.4, 0.3, 0.2, 0.1], [1, 0, 0, 0]),  # of the two, the first has 4/7
        ({"top_k": 2, "top_p": 0.6}, [0.4, 0.3, 0.2, 0.1], [4 / 7, 3 / 7, 0, 0]),
        ({"top_p": 0.95, "min_p": 0.6}, [0.1, 0.4, 0.2, 0.3], [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 0.6, "min_p": 0.3}, [0.4, 0.3, 0.2, 0.1], [4 / 7, 3 / 7, 0, 0]),
        ({"top_k": 5, "temperature": 0.5}, [0.4, 0.3, 0.2, 0.1], [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"top_p": 0.9}, [1], [1]),
    ],
    ids=str,
)
@pytest.mark.parametrize("spread", [1, 12_000])
def test_borders_by_hand(options: Options, probabilities: list[float], expected: list[float], spread: int) -> None:
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    places = [100 + spread * index for index in range(len(probabilities))]
    logits[places] = np.log(probabilities) - 20
    chooser = TokenChooser(GenerationOptions(**options), 1, [])
    numbers = chooser._uniform = Numbers()
    if chooser._plain_draw is not None:
        chooser._plain_draw._uniform = numbers
    tokens = []
    for numbers.number in (np.arange(840) + 0.5) / 840:
        tokens.append(chooser.choose(logits, [0], []))
    assert tokens == sorted(tokens)
    shares = [tokens.count(place) / len(tokens) for place in places]
    assert shares == pytest.approx(expected, abs=1.5 / 840)
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("top_p", np.linspace(0.3, 0.97, 12))
def test_one_of_two_equal_ones_lies_across_the_border(top_p: float) -> None:
    """All are in pairs, whose second one is far behind; so many that the border is found by halving."""
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[:300] = logits[40_000:40_300] = -0.01 * np.random.default_rng(4).permutation(300) - 50
    exact = reference_drawn(logits.astype(np.float64), {"top_p": top_p})
    kept = np.flatnonzero(exact.probabilities).tolist()
    draw, numbers = drawer({"top_p": top_p})
    numbers.number = JUST_BELOW_ONE
    is_the_way = len(kept) % 2 == 0
    assert draw.draw(logits) == (kept[-1] if is_the_way else None)
    chooser = TokenChooser(GenerationOptions(top_p=top_p), 1, [])
    assert {chooser.choose(logits, [0], []) for _ in range(200)} <= set(kept)


def test_min_p_drops_what_top_p_keeps_where_many_are_nearly_as_likely() -> None:
    weights = np.array([1, *np.linspace(0.06, 0.09, 300), 0.05 * (1 - 5e-5)])
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[: weights.size] = np.log(weights) - 50
    draw, numbers = drawer({"top_p": 0.9999, "min_p": 0.05})
    numbers.number = JUST_BELOW_ONE
    assert draw.draw(logits) == weights.size - 2


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
def test_all_but_one_impossible(options: Options) -> None:
    logits = np.full(VOCABULARY, -np.inf, np.float32)
    logits[31_007] = -80
    chooser = TokenChooser(GenerationOptions(**options), 2, [])
    assert [chooser.choose(logits, [0], []) for _ in range(3)] == [31_007] * 3
    assert chooser.position == 3


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
@pytest.mark.parametrize("number", [0.0, JUST_BELOW_ONE])
def test_the_ends_of_the_draw(options: Options, number: float) -> None:
    logits = peaked_logits(6)
    kept = np.flatnonzero(reference_drawn(logits.astype(np.float64), options).probabilities)
    draw, numbers = drawer(options)
    numbers.number = number
    assert draw.draw(logits) == kept[0 if number == 0 else -1]


# What it leaves to the other way.


@pytest.mark.parametrize("bad", [math.nan, INFINITY])
@pytest.mark.parametrize("options", NARROWINGS, ids=str)
def test_unusable_logits_draw_no_number(options: Options, bad: float) -> None:
    logits = peaked_logits(7)
    logits[33_000] = bad
    for unusable in (logits, np.full(VOCABULARY, -np.inf, np.float32)):
        draw, numbers = drawer(options)
        assert draw.draw(unusable) is None
        assert numbers.drawn == 0
        chooser = TokenChooser(GenerationOptions(**options), 1, [])
        with pytest.raises(LogitsError):
            chooser.choose(unusable, [0], [])
        assert chooser.position == 0


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
def test_logits_as_low_as_float32_holds_overflow_nowhere(options: Options) -> None:
    """Divided by a temperature below 1 they would, with a warning."""
    logits = peaked_logits(8)
    usual = logits.copy()
    logits[::7] = np.finfo(np.float32).min
    usual[::7] = -np.inf
    for temperature in (0.3, 1.0):
        two = [TokenChooser(GenerationOptions(**{**options, "temperature": temperature}), 5, []) for _ in range(2)]
        assert two[0].choose(logits, [0], []) == two[1].choose(usual, [0], [])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1.0},
        {"temperature": 0.0, "top_k": 5},
        {"top_k": 129},
        {"top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"typical_p": 0.9, "top_k": 5},
        {"top_k": 5, "temperature": 1e-30},
        {"top_k": 5, "temperature": 1e30},
        {"top_p": 0.9, "min_p": 5e-324},
    ],
    ids=str,
)
def test_options_that_it_is_not_for(options: Options) -> None:
    assert not can_draw(GenerationOptions(**options))
    assert TokenChooser(GenerationOptions(**options), 1, []).choose(peaked_logits(9), [0], []) < VOCABULARY


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
def test_nothing_is_remembered_but_the_random_numbers(options: Options) -> None:
    """Other logits, of another size too, and such as are not its way, change nothing for those that follow."""
    seen = [peaked_logits(9, deviation=3), np.zeros(VOCABULARY, np.float32), peaked_logits(10, size=700)]
    fresh = TokenChooser(GenerationOptions(**options), 11, [], position=3)
    used = TokenChooser(GenerationOptions(**options), 11, [])
    for logits in seen:
        used.choose(logits, [0], [])
    for seed in (20, 21):
        assert used.choose(peaked_logits(seed), [0], []) == fresh.choose(peaked_logits(seed), [0], [])


@pytest.mark.parametrize("options", NARROWINGS, ids=str)
def test_a_chooser_takes_this_way(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where other options change the logits before."""

    def must_not(*arguments: object) -> int:
        raise AssertionError("the other way was taken")

    monkeypatch.setattr(choosing, "choose_token", must_not)
    for more in ({}, {"banned_tokens": [3]}, {"logprobs": 2}):
        chooser = TokenChooser(GenerationOptions(**options, **more), 1, [])
        for seed in range(3):
            chooser.choose(peaked_logits(seed), [0], [])
        assert chooser.position == 3


def test_both_ways_draw_the_same() -> None:
    """Sums are rounded differently, but seldom does a number lie that close to a border."""
    different = 0
    for options in NARROWINGS:
        for seed in range(10):
            logits = peaked_logits(100 + seed)
            chooser = TokenChooser(GenerationOptions(**options), seed, [])
            other = choosing.choose_token(logits, GenerationOptions(**options), RandomUniform(seed))
            different += chooser.choose(logits, [0], []) != other
    assert different <= 1
