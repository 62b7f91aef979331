"""Every step of docs/sampling.md: worked out by hand, against plain float64, and against transformers' processors."""

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from sampling_reference import (
    CHANGING,
    INFINITY,
    LOGITS,
    NARROWING,
    SLACK,
    UNKNOWN_TO_TRANSFORMERS,
    Float32s,
    Options,
    assert_same_distribution,
    changed_logits,
    drawn_from,
    logits_of,
    random_cases,
    reference_drawn,
    reference_logits,
    softmax,
    transformers_scores,
)

from gpt2_edge import GenerationOptions
from gpt2_edge.choosing import TokenChooser
from gpt2_edge.random_uniform import RandomUniform
from gpt2_edge.sampling import keep_min_p, keep_typical_p


@pytest.mark.parametrize("name", [name for name in CHANGING if name not in UNKNOWN_TO_TRANSFORMERS])
def test_each_change_of_logits_equals_transformers(name: str) -> None:
    for case in random_cases(1, 30, [name]):
        ours = changed_logits(case.logits, case.options, case.prompt, case.continuation, case.final)
        np.testing.assert_allclose(ours, transformers_scores(case), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NARROWING)
def test_each_narrowing_equals_transformers(name: str) -> None:
    for case in random_cases(2, 40, [name]):
        assert_same_distribution(drawn_from(case.logits, case.options), softmax(transformers_scores(case)))


def test_combinations_equal_transformers() -> None:
    names = [name for name in CHANGING | NARROWING if name not in UNKNOWN_TO_TRANSFORMERS]
    for case in random_cases(3, 200, names, share=0.5):
        changing = {name: value for name, value in case.options.items() if name in CHANGING}
        changed = changed_logits(case.logits, changing, case.prompt, case.continuation, case.final)
        assert_same_distribution(drawn_from(changed, case.options), softmax(transformers_scores(case)))


@pytest.mark.parametrize("name", CHANGING)
def test_each_change_of_logits_equals_the_reference(name: str) -> None:
    for case in random_cases(4, 30, [name]):
        ours = changed_logits(case.logits, case.options, case.prompt, case.continuation, case.final)
        exact = reference_logits(case.logits, case.options, case.prompt, case.continuation, case.final)
        np.testing.assert_allclose(ours, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NARROWING)
def test_each_narrowing_equals_the_reference(name: str) -> None:
    for case in random_cases(5, 40, [name]):
        exact = reference_drawn(case.logits.astype(np.float64), case.options)
        assert_same_distribution(drawn_from(case.logits, case.options), exact.probabilities)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("options", [{"typical_p": 0.2}, {"typical_p": 0.95}, {"top_p": 0.95, "min_p": 0.01}], ids=str)
def test_a_whole_vocabulary_equals_the_reference(spread: float, options: Options) -> None:
    logits = (spread * np.random.default_rng(12).standard_normal(50_257)).astype(np.float32)
    exact = reference_drawn(logits.astype(np.float64), options)
    ours = drawn_from(logits, options)
    # So many tokens leave no room between borders: the kept sets may differ by what lies on them.
    differ = (ours > 0) != (exact.probabilities > 0)
    assert exact.probabilities[differ].sum() + ours[differ].sum() < 2e-4
    assert np.abs(ours - exact.probabilities).sum() < 1e-3


def test_combinations_equal_the_reference_to_the_drawn_token() -> None:
    for seed, case in enumerate(random_cases(6, 300, [*CHANGING, *NARROWING], share=0.4)):
        changed = reference_logits(case.logits, case.options, case.prompt, case.continuation, case.final)
        options = GenerationOptions(**case.options)
        token = TokenChooser(options, seed, case.final).choose(case.logits, case.prompt, case.continuation)
        if options.effective_temperature == 0:
            assert token == np.argmax(changed)
            continue
        ends = np.cumsum(reference_drawn(changed, case.options).probabilities)
        uniform = RandomUniform(seed).draw()
        if np.abs(ends - uniform).min() > SLACK:
            assert token == np.searchsorted(ends, uniform, side="right")


# By hand: the steps that change logits. The model's logits are 2, -2, 0, 1.


@pytest.mark.parametrize(
    ("options", "prompt", "continuation", "expected"),
    [
        pytest.param({}, [0], [1], [2, -2, 0, 1], id="nothing is on by default"),
        pytest.param({"logit_bias": {0: -1.5, 2: 0.25}}, [0], [], [0.5, -2, 0.25, 1], id="bias"),
        pytest.param({"repetition_penalty": 2.0}, [0, 1, 2], [], [1, -4, 0, 1], id="repetition, prompt"),
        pytest.param({"repetition_penalty": 2.0}, [2], [0, 1], [1, -4, 0, 1], id="repetition, continuation"),
        pytest.param({"repetition_penalty": 2.0}, [0, 0, 1], [0, 1, 1], [1, -4, 0, 1], id="repetition counts once"),
        pytest.param({"repetition_penalty": 0.5}, [0, 1], [], [4, -1, 0, 1], id="repetition rewarded"),
        pytest.param({"presence_penalty": 0.5}, [0, 3], [1, 2, 1], [2, -2.5, -0.5, 1], id="presence, no prompt"),
        pytest.param({"frequency_penalty": 0.5}, [0, 3], [1, 2, 1], [2, -3, -0.5, 1], id="frequency, no prompt"),
        pytest.param({"presence_penalty": -1.0}, [0], [0], [3, -2, 0, 1], id="presence rewarded"),
        pytest.param(
            {"presence_penalty": 1.0, "frequency_penalty": 0.25}, [0], [3, 3, 3], [2, -2, 0, -0.75], id="both penalties"
        ),
        pytest.param({"no_repeat_ngram_size": 1}, [0], [3], [-INFINITY, -2, 0, -INFINITY], id="1-grams"),
        pytest.param({"no_repeat_ngram_size": 2}, [1, 3, 1, 0, 1], [], [-INFINITY, -2, 0, -INFINITY], id="2-grams"),
        pytest.param({"no_repeat_ngram_size": 2}, [1, 3], [2, 1], [2, -2, 0, -INFINITY], id="2-gram of the prompt"),
        pytest.param(
            {"no_repeat_ngram_size": 3}, [1, 3], [0, 1, 3], [-INFINITY, -2, 0, 1], id="3-gram over the border"
        ),
        pytest.param({"no_repeat_ngram_size": 3}, [1, 3], [], [2, -2, 0, 1], id="3-grams need three tokens"),
        pytest.param({"no_repeat_ngram_size": 9}, [1, 1], [1, 1], [2, -2, 0, 1], id="n-gram longer than all tokens"),
        pytest.param({"banned_tokens": [0, 0, 3]}, [1], [], [-INFINITY, -2, 0, -INFINITY], id="banned"),
        pytest.param({"min_new_tokens": 2}, [1], [1], [-INFINITY, -2, 0, -INFINITY], id="too early to end"),
        pytest.param({"min_new_tokens": 2}, [1, 1, 1], [1, 1], [2, -2, 0, 1], id="may end; the prompt does not count"),
        # The order of the steps
        pytest.param(
            {"logit_bias": {1: 3}, "repetition_penalty": 2.0}, [1], [], [2, 0.5, 0, 1], id="bias before repetition"
        ),
        pytest.param(
            {"repetition_penalty": 2.0, "presence_penalty": 3.0},
            [3],
            [0],
            [-2, -2, 0, 0.5],
            id="repetition before presence",
        ),
        pytest.param(
            {"logit_bias": {0: 1e9}, "banned_tokens": [0]}, [1], [], [-INFINITY, -2, 0, 1], id="bans are last"
        ),
    ],
)
def test_changes_by_hand(options: Options, prompt: list[int], continuation: list[int], expected: list[float]) -> None:
    final = [0, 3] if "min_new_tokens" in options else []
    assert changed_logits(LOGITS, options, prompt, continuation, final).tolist() == expected


def test_the_processor_comes_after_the_options_and_before_the_choice() -> None:
    def swap(tokens: Sequence[int], logits: Float32s) -> None:
        assert list(tokens) == [5, 0, 3]
        assert logits.tolist() == [2, -2, 0, -INFINITY]
        logits[:] = logits[::-1].copy()

    padded = np.append(LOGITS, [-INFINITY, -INFINITY]).astype(np.float32)[:4]
    for more in ({}, {"top_k": 1}, {"temperature": 1.0, "top_p": 0.1}):
        chooser = TokenChooser(GenerationOptions(banned_tokens=[3], logits_processor=swap, **more), 1, [])
        assert chooser.choose(padded, [5, 0], [3]) == 3


def test_the_temperature_comes_after_the_penalties() -> None:
    """Probabilities 4 : 1, the first token said once: a frequency penalty of log 4 makes them even."""
    options: Options = {"temperature": 0.5, "frequency_penalty": math.log(4), "min_p": 0.9}
    chooser = TokenChooser(GenerationOptions(**options), 3, [])
    tokens = {chooser.choose(logits_of(0.8, 0.2), [1], [0]) for _ in range(50)}
    assert tokens == {0, 1}


# By hand: min-p and typical-p.


@pytest.mark.parametrize(
    ("min_p", "expected"),
    [
        (1e-9, [0, 1, 2, 3]),
        (0.25, [0, 1, 2, 3]),
        (0.2501, [0, 1, 3]),
        (0.5, [0, 1, 3]),
        (0.51, [1, 3]),
        (1.0, [1, 3]),
    ],
)
def test_the_border_of_min_p_is_inclusive(min_p: float, expected: list[int]) -> None:
    assert keep_min_p(np.array([2, 4, 1, 4], np.float32), min_p).tolist() == expected


def test_min_p_keeps_equals_together() -> None:
    assert drawn_from(logits_of(0.2, 0.2, 0.2, 0.4), {"min_p": 0.5}).tolist() == pytest.approx([0.2, 0.2, 0.2, 0.4])
    assert drawn_from(logits_of(0.2, 0.2, 0.2, 0.4), {"min_p": 0.6}).tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("typical_p", "expected"),
    [
        # Information in bits: 2, 1, 2; entropy 1.5: all are equally typical, so the ids decide.
        (0.0, [0]),
        (0.25, [0]),
        (0.26, [0, 1]),
        (0.75, [0, 1]),
        (0.76, [0, 1, 2]),
    ],
)
def test_equally_typical_tokens_are_kept_from_the_lowest_id_on(typical_p: float, expected: list[int]) -> None:
    assert keep_typical_p(np.array([1, 2, 1], np.float32), typical_p).tolist() == expected


@pytest.mark.parametrize(
    ("typical_p", "expected"),
    [
        # Probabilities 1/2, 1/4 and 8 times 1/32: information 1, 2 and 5 bits, entropy 2.25 bits.
        # Distances 1.25, 0.25 and 2.75: the likeliest token is the second most typical one.
        (0.0, [1]),
        (0.25, [1]),
        (0.251, [0, 1]),
        (0.75, [0, 1]),
        (0.76, [0, 1, 2]),
        (0.79, [0, 1, 2, 3]),
        (0.999, list(range(10))),
    ],
)
def test_typical_p_by_hand(typical_p: float, expected: list[int]) -> None:
    weights = np.array([16, 8, *[1] * 8], np.float32)
    assert keep_typical_p(weights, typical_p).tolist() == expected
    logits = np.log(weights / 32).astype(np.float32)
    kept = np.flatnonzero(drawn_from(logits, {"typical_p": typical_p})).tolist()
    assert kept == expected


def test_each_narrowing_works_on_what_the_one_before_kept() -> None:
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    # Of 4/7 and 3/7 the first alone reaches 0.5; of all four it would not.
    assert np.flatnonzero(drawn_from(logits, {"top_k": 2, "top_p": 0.5})).tolist() == [0]
    # Entropy of all four is 1.85 bits: 0.3 is the most typical. Of the first two it is 0.99 bits: 0.4 is.
    assert np.flatnonzero(drawn_from(logits, {"typical_p": 0.01})).tolist() == [1]
    assert np.flatnonzero(drawn_from(logits, {"top_k": 2, "typical_p": 0.01})).tolist() == [0]
    assert np.flatnonzero(drawn_from(logits, {"top_p": 0.69, "typical_p": 0.01})).tolist() == [0]
    assert np.flatnonzero(drawn_from(logits, {"min_p": 0.7, "typical_p": 0.01})).tolist() == [0]
    # Of all four 0.3 and 0.2 are the most typical, and min-p would keep both; of the first three, 0.3 and 0.4.
    assert np.flatnonzero(drawn_from(logits, {"typical_p": 0.4})).tolist() == [1, 2]
    assert np.flatnonzero(drawn_from(logits, {"min_p": 0.45, "typical_p": 0.4})).tolist() == [0, 1]


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 50_257])
def test_flat_logits_keep_the_lower_ids(size: int) -> None:
    for typical_p in (0.0, 0.25, 0.5, 0.999):
        kept = keep_typical_p(np.ones(size, np.float32), typical_p)
        assert kept.tolist() == list(range(max(1, math.ceil(typical_p * size))))


def test_impossible_tokens_are_never_typical() -> None:
    weights = np.array([0, 1, 0, 0.25, 1e-45, 0], np.float32)
    assert keep_typical_p(weights, 0.9999999).tolist() == [1, 3]


# Greedy.


def test_greedy_applies_the_steps_that_change_logits() -> None:
    options = GenerationOptions(frequency_penalty=1.5, temperature=0)
    chooser, said = TokenChooser(options, 1, []), []
    for _ in range(5):
        said.append(chooser.choose(LOGITS, [0], said))
    assert said == [0, 3, 0, 2, 3]  # 2 1 0 -> .5 1 0 -> .5 -.5 0 -> -1 -.5 0 -> -1 -.5 -1.5
    assert chooser.position == 0


def test_equals_go_to_the_lowest_id_after_the_changes() -> None:
    chooser = TokenChooser(GenerationOptions(logit_bias={3: 1.0, 2: 2.0}, banned_tokens=[0]), 1, [])
    assert chooser.choose(LOGITS, [0], []) == 2


# What is given is not changed.


@pytest.mark.parametrize("names", [[], ["top_p", "typical_p"], [*CHANGING], [*CHANGING, *NARROWING]], ids=len)
def test_given_logits_are_not_changed(names: list[str]) -> None:
    for case in random_cases(7, 10, names):
        before = case.logits.copy()
        case.logits.flags.writeable = False
        options = GenerationOptions(**case.options, logprobs=3, logits_processor=lambda tokens, logits: logits.sort())
        TokenChooser(options, 1, case.final).choose(case.logits, case.prompt, case.continuation)
        np.testing.assert_array_equal(case.logits, before)


def test_greedy_does_not_copy_the_logits() -> None:
    logits = np.zeros(50_257, np.float32)
    chooser = TokenChooser(GenerationOptions(min_new_tokens=1), 1, [0])
    chooser.choose(logits, [1], [2])
    tracemalloc.start()
    try:
        chooser.choose(logits, [1], [2])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < logits.nbytes / 10


def test_the_processor_cannot_disturb_the_history() -> None:
    def disturb(tokens: Sequence[int], logits: Float32s) -> None:
        assert isinstance(tokens, list)
        tokens.clear()
        logits.shape = (2, 2)

    options = GenerationOptions(repetition_penalty=2.0, logits_processor=disturb)
    chooser = TokenChooser(options, 1, [])
    prompt, said = [3], [1]
    for _ in range(3):
        said.append(chooser.choose(LOGITS, prompt, said))
    assert (prompt, said) == ([3], [1, 0, 0, 0])
