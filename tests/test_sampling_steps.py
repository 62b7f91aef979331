"""Every step of docs/sampling.md: worked out by hand, against plain float64, and against transformers' processors."""

import math
import re
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers.generation import logits_process as hf

from gpt2_edge import GenerationOptions, LogitsError, OptionError
from gpt2_edge.benchmarks import sampling_speed
from gpt2_edge.choosing import TokenChooser
from gpt2_edge.sampling import RandomUniform, draw_index, keep, keep_min_p, keep_typical_p

Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]
Options = dict[str, Any]

INFINITY: Final = math.inf
# Sums in float32 and float64 differ by less than this; closer to a border either side of it would be right.
SLACK: Final = 1e-5


# The specification once more, as plainly as it can be written down.


def reference_logits(
    logits: Float32s, options: Options, prompt: Sequence[int], continuation: Sequence[int], final: Sequence[int]
) -> Float64s:
    """Steps 1 to 4."""
    changed = logits.astype(np.float64)
    said = [*prompt, *continuation]
    for token, bias in options.get("logit_bias", {}).items():
        changed[token] += bias
    penalty = options.get("repetition_penalty", 1.0)
    for token in set(said):
        changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
    for token, times in Counter(continuation).items():
        changed[token] -= options.get("presence_penalty", 0.0) + times * options.get("frequency_penalty", 0.0)
    size = options.get("no_repeat_ngram_size", 0)
    ngrams = {tuple(said[start : start + size]) for start in range(len(said) - size + 1)} if size else set()
    for token in range(logits.size if ngrams else 0):
        if (*said[len(said) - size + 1 :], token) in ngrams:
            changed[token] = -INFINITY
    for token in options.get("banned_tokens", ()):
        changed[token] = -INFINITY
    if len(continuation) < options.get("min_new_tokens", 0):
        for token in final:
            changed[token] = -INFINITY
    return changed


@dataclass
class Drawn:
    """What step 6 draws from.

    Attributes:
        probabilities: Of all tokens; 0 for those that were dropped.
        margin: How far the nearest border was from where it would have dropped other tokens.
    """

    probabilities: Float64s
    margin: float = INFINITY

    def retain(self, tokens: npt.NDArray[np.int64]) -> None:
        kept = np.zeros_like(self.probabilities)
        kept[tokens] = self.probabilities[tokens]
        self.probabilities = kept / kept.sum()

    def retain_share(self, keys: Float64s, share: float) -> None:
        """Retain the fewest smallest keys whose probabilities reach a share."""
        order = np.argsort(keys, kind="stable")
        reached = np.cumsum(self.probabilities[order])
        count = min(1 + int(np.count_nonzero(reached < share)), order.size)
        around = keys[order[max(0, count - 2) : count + 1]]
        gaps = np.diff(around[np.isfinite(around)])
        self.margin = min(self.margin, np.abs(reached - share).min(), *gaps[gaps > 0])
        self.retain(order[:count])


def reference_drawn(logits: Float64s, options: Options) -> Drawn:
    """Step 6 without the draw."""
    scaled = logits / options.get("temperature", 1.0)
    weights = np.exp(scaled - scaled.max())
    drawn = Drawn(weights / weights.sum())
    if top_k := options.get("top_k"):
        order = np.argsort(-logits, kind="stable")
        drawn.retain(order[:top_k])
        if top_k < order.size and np.isfinite(logits[order[top_k]]):
            drawn.margin = logits[order[top_k - 1]] - logits[order[top_k]]
    if (top_p := options.get("top_p", 1.0)) < 1:
        drawn.retain_share(-drawn.probabilities, top_p)
    if min_p := options.get("min_p"):
        relative = drawn.probabilities / drawn.probabilities.max()
        drawn.margin = min(drawn.margin, np.abs(relative / min_p - 1).min())
        drawn.retain(np.flatnonzero(relative >= min_p))
    if (typical_p := options.get("typical_p", 1.0)) < 1:
        with np.errstate(divide="ignore"):
            information = -np.log(drawn.probabilities)
        possible = drawn.probabilities > 0
        entropy = (drawn.probabilities[possible] * information[possible]).sum()
        drawn.retain_share(np.abs(information - entropy), typical_p)
    return drawn


# What the product does, made visible.


class Probe:
    """A logits processor that changes nothing and keeps what it saw."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.logits: Float32s = np.empty(0, np.float32)

    def __call__(self, tokens: Sequence[int], logits: Float32s) -> None:
        self.tokens = list(tokens)
        self.logits = logits.copy()


def changed_logits(
    logits: Float32s, options: Options, prompt: Sequence[int], continuation: Sequence[int], final: Sequence[int] = ()
) -> Float32s:
    """Steps 1 to 4 of a new chooser."""
    probe = Probe()
    chooser = TokenChooser(GenerationOptions(**options, logits_processor=probe), 0, final)
    chooser.choose(logits, prompt, continuation)
    assert probe.tokens == [*prompt, *continuation]
    return probe.logits


def drawn_from(logits: Float32s, options: Options) -> Float64s:
    """Probabilities of all tokens in step 6."""
    names = ("top_k", "top_p", "min_p", "typical_p")
    token_ids, weights = keep(
        logits, options.get("temperature", 1.0), **{name: options[name] for name in names if name in options}
    )
    probabilities = np.zeros(logits.size)
    probabilities[slice(None) if token_ids is None else token_ids] = weights / weights.sum(dtype=np.float64)
    return probabilities


def logits_of(*probabilities: float) -> Float32s:
    with np.errstate(divide="ignore"):
        return np.log(np.array(probabilities)).astype(np.float32)


# Random cases.


@dataclass
class Case:
    logits: Float32s
    prompt: list[int]
    continuation: list[int]
    final: list[int]
    options: Options


CHANGING: Final[dict[str, Callable[[np.random.Generator, int], Any]]] = {
    "logit_bias": lambda rng, size: {int(token): float(rng.normal(0, 3)) for token in rng.integers(0, size, 9)},
    "repetition_penalty": lambda rng, size: float(rng.uniform(0.6, 2)),
    "presence_penalty": lambda rng, size: float(rng.normal()),
    "frequency_penalty": lambda rng, size: float(rng.normal()),
    "no_repeat_ngram_size": lambda rng, size: int(rng.integers(1, 5)),
    "banned_tokens": lambda rng, size: rng.integers(0, size, 20).tolist(),
    "min_new_tokens": lambda rng, size: int(rng.integers(1, 20)),
}
NARROWING: Final[dict[str, Callable[[np.random.Generator, int], Any]]] = {
    "temperature": lambda rng, size: float(rng.uniform(0.3, 2.5)),
    "top_k": lambda rng, size: int(rng.integers(1, size + 1)),
    "top_p": lambda rng, size: float(rng.uniform(0.02, 0.999)),
    "min_p": lambda rng, size: float(10 ** rng.uniform(-4, 0)),
    "typical_p": lambda rng, size: float(rng.uniform(0.02, 0.999)),
}
UNKNOWN_TO_TRANSFORMERS: Final = ("presence_penalty", "frequency_penalty")


def random_cases(seed: int, count: int, names: Sequence[str], share: float = 1.0) -> Iterator[Case]:
    """Logits without ties, a history that repeats itself, and each of the options with a probability of `share`."""
    rng = np.random.default_rng(seed)
    recipes = CHANGING | NARROWING
    while count:
        size = int(rng.choice([40, 300, 1500]))
        said = rng.integers(0, size, int(rng.integers(2, 12)))
        options = {name: recipes[name](rng, size) for name in names if rng.random() < share}
        case = Case(
            logits=rng.normal(0, rng.choice([0.3, 2, 4]), size).astype(np.float32),
            prompt=rng.choice(said, int(rng.integers(1, 30))).tolist(),
            continuation=rng.choice(said, int(rng.integers(0, 30))).tolist(),
            final=rng.integers(0, size, 3).tolist(),
            options=options,
        )
        changed = reference_logits(case.logits, options, case.prompt, case.continuation, case.final)
        if reference_drawn(changed, options).margin > SLACK:
            count -= 1
            yield case


def transformers_scores(case: Case) -> Float32s:
    """The same options through transformers, in its order."""
    options, processors = case.options, hf.LogitsProcessorList()
    if bias := options.get("logit_bias"):
        processors.append(hf.SequenceBiasLogitsProcessor({(token,): value for token, value in bias.items()}))
    if penalty := options.get("repetition_penalty"):
        processors.append(hf.RepetitionPenaltyLogitsProcessor(penalty))
    if size := options.get("no_repeat_ngram_size"):
        processors.append(hf.NoRepeatNGramLogitsProcessor(size))
    if minimum := options.get("min_new_tokens"):
        processors.append(hf.MinNewTokensLengthLogitsProcessor(len(case.prompt), minimum, case.final))
    if banned := options.get("banned_tokens"):
        processors.append(hf.SuppressTokensLogitsProcessor(banned))
    if temperature := options.get("temperature"):
        processors.append(hf.TemperatureLogitsWarper(temperature))
    if top_k := options.get("top_k"):
        processors.append(hf.TopKLogitsWarper(top_k))
    if top_p := options.get("top_p"):
        processors.append(hf.TopPLogitsWarper(top_p))
    if min_p := options.get("min_p"):
        processors.append(hf.MinPLogitsWarper(min_p))
    if typical_p := options.get("typical_p"):
        processors.append(hf.TypicalLogitsWarper(typical_p))
    tokens = torch.tensor([case.prompt + case.continuation])
    scores: Float32s = processors(tokens, torch.from_numpy(case.logits[None].copy()))[0].numpy()
    return scores


def softmax(scores: Float32s) -> Float64s:
    weights = np.exp(scores.astype(np.float64) - scores.max())
    return weights / weights.sum()


def assert_same_distribution(ours: Float64s, theirs: Float64s) -> None:
    assert np.flatnonzero(ours).tolist() == np.flatnonzero(theirs).tolist()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-12)


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
        choice = TokenChooser(options, seed, case.final).choose(case.logits, case.prompt, case.continuation)
        if options.effective_temperature == 0:
            assert choice.token == np.argmax(changed)
            continue
        ends = np.cumsum(reference_drawn(changed, case.options).probabilities)
        uniform = RandomUniform(seed).draw()
        if np.abs(ends - uniform).min() > SLACK:
            assert choice.token == np.searchsorted(ends, uniform, side="right")


# By hand: the steps that change logits. The model's logits are 2, -2, 0, 1.


LOGITS: Final = np.array([2, -2, 0, 1], np.float32)


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
        assert chooser.choose(padded, [5, 0], [3]).token == 3


def test_the_temperature_comes_after_the_penalties() -> None:
    """Probabilities 4 : 1, the first token said once: a frequency penalty of log 4 makes them even."""
    options: Options = {"temperature": 0.5, "frequency_penalty": math.log(4), "min_p": 0.9}
    chooser = TokenChooser(GenerationOptions(**options), 3, [])
    tokens = {chooser.choose(logits_of(0.8, 0.2), [1], [0]).token for _ in range(50)}
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
        said.append(chooser.choose(LOGITS, [0], said).token)
    assert said == [0, 3, 0, 2, 3]  # 2 1 0 -> .5 1 0 -> .5 -.5 0 -> -1 -.5 0 -> -1 -.5 -1.5
    assert chooser.position == 0


def test_equals_go_to_the_lowest_id_after_the_changes() -> None:
    chooser = TokenChooser(GenerationOptions(logit_bias={3: 1.0, 2: 2.0}, banned_tokens=[0]), 1, [])
    assert chooser.choose(LOGITS, [0], []).token == 2


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
        said.append(chooser.choose(LOGITS, prompt, said).token)
    assert (prompt, said) == ([3], [1, 0, 0, 0])


# State.


def test_a_growing_continuation_equals_a_new_chooser_each_time() -> None:
    """Tokens are appended, taken back and replaced, in the lists that the chooser was given and in new ones."""
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "no_repeat_ngram_size": 2}
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 2, 40).astype(np.float32)
    probe = Probe()
    chooser = TokenChooser(GenerationOptions(**options, logits_processor=probe), 1, [])
    prompt, said = [1, 2, 3], [4]
    for _ in range(400):
        match int(rng.integers(0, 10)):
            case 0:
                del said[len(said) - int(rng.integers(0, len(said) + 1)) :]
            case 1:
                said = rng.integers(0, 15, len(said)).tolist()
            case 2:
                prompt[int(rng.integers(0, 3))] = int(rng.integers(0, 15))
            case 3 if len(said) > 2:
                said[int(rng.integers(0, len(said) - 1))] = int(rng.integers(0, 15))  # same length, same last token
            case 4:
                prompt, said = (prompt + said)[-3:], []
            case _:
                said.append(int(rng.integers(0, 15)))
        chooser.choose(logits, prompt, tuple(said) if rng.random() < 0.2 else said)
        exact = reference_logits(logits, options, prompt, said, [])
        np.testing.assert_allclose(probe.logits, exact, rtol=1e-5, atol=1e-5)


def test_a_long_history() -> None:
    """More different tokens than the history has room for at first."""
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 2, 5_000).astype(np.float32)
    prompt, said = rng.permutation(5_000)[:700].tolist(), rng.integers(0, 5_000, 900).tolist()
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "no_repeat_ngram_size": 2}
    exact = reference_logits(logits, options, prompt, said, [])
    np.testing.assert_allclose(changed_logits(logits, options, prompt, said), exact, rtol=1e-5, atol=1e-5)


# Random numbers.


SAMPLED: Final = GenerationOptions(temperature=1.1, top_p=0.97, frequency_penalty=0.2)


def arithmetic_logits(size: int, step: int) -> Float32s:
    """Logits that are the same numbers everywhere: whole numbers divided by 64."""
    return ((np.arange(size) * (7919 + 2 * step) + 31 * step) % 509 / 64).astype(np.float32)


def continue_with(chooser: TokenChooser, said: list[int], count: int) -> list[int]:
    """Choose `count` more tokens."""
    said = list(said)
    for step in range(len(said), len(said) + count):
        said.append(chooser.choose(arithmetic_logits(600, step), [1, 2, 3], said).token)
    return said


@pytest.mark.parametrize("drawn_before", range(10))
def test_a_chooser_goes_on_from_a_position(drawn_before: int) -> None:
    whole = continue_with(TokenChooser(SAMPLED, 5, []), [], 20)
    first = TokenChooser(SAMPLED, 5, [])
    said = continue_with(first, [], drawn_before)
    assert first.position == drawn_before
    second = TokenChooser(SAMPLED, 5, [], position=first.position)
    assert second.position == drawn_before
    assert continue_with(second, said, 20 - drawn_before) == whole
    assert second.position == 20


def test_positions_far_ahead() -> None:
    uniform = RandomUniform(3)
    numbers = [uniform.draw() for _ in range(1_000)]
    assert [RandomUniform(3, position).draw() for position in range(0, 1_000, 37)] == numbers[::37]
    assert RandomUniform(3, 2**70).position == 2**70


def test_a_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    alone = {seed: continue_with(TokenChooser(SAMPLED, seed, []), [], 40) for seed in range(8)}
    assert len({tuple(tokens) for tokens in alone.values()}) == 8

    taking_turns: dict[int, list[int]] = {seed: [] for seed in range(8)}
    choosers = {seed: TokenChooser(SAMPLED, seed, []) for seed in range(8)}
    for _ in range(40):
        for seed, chooser in choosers.items():
            taking_turns[seed] = continue_with(chooser, taking_turns[seed], 1)
    assert taking_turns == alone

    together: dict[int, list[int]] = {}

    def run(seed: int) -> None:
        np.random.seed(seed)  # numpy's global generator must not matter
        together[seed] = continue_with(TokenChooser(SAMPLED, seed, []), [], 40)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


ALL_AT_ONCE: Final[Options] = {
    "temperature": 0.9,
    "top_k": 200,
    "top_p": 0.95,
    "min_p": 0.02,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "no_repeat_ngram_size": 2,
    "logit_bias": {7: 4.0},
    "banned_tokens": [0, 1],
}
GOLDEN: Final[list[tuple[Options, list[int]]]] = [
    ({}, [138, 306, 302, 449, 336, 228, 204, 112, 442, 262, 4, 448]),
    ({"temperature": 1.0}, [451, 393, 499, 496, 315, 447, 271, 209, 84, 358, 189, 443]),
    ({"top_k": 20}, [457, 411, 484, 463, 329, 434, 302, 182, 67, 353, 158, 438]),
    ({"top_p": 0.9, "temperature": 0.8}, [448, 393, 505, 491, 315, 446, 271, 209, 84, 358, 188, 443]),
    ({"min_p": 0.3}, [455, 393, 505, 491, 315, 446, 271, 204, 84, 358, 183, 443]),
    ({"typical_p": 0.5}, [446, 386, 498, 498, 313, 446, 276, 204, 89, 351, 193, 471]),
    (ALL_AT_ONCE, [43, 7, 505, 491, 315, 434, 271, 204, 84, 358, 183, 443]),
]


@pytest.mark.parametrize(("options", "expected"), GOLDEN, ids=[", ".join(options) for options, _ in GOLDEN])
def test_golden_tokens(options: Options, expected: list[int]) -> None:
    """A stored seed must give the same tokens in every release and on every machine."""
    assert continue_with(TokenChooser(GenerationOptions(**options), 2024, []), [], 12) == expected


# Quantiles of the chi-squared distribution at 0.1 %: a right sampler fails once in a thousand seeds.
CRITICAL: Final = {22: 48.268, 49: 85.351}


def assert_fits(tokens: list[int], probabilities: Float64s) -> None:
    possible = probabilities > 0
    counts = np.bincount(tokens, minlength=probabilities.size)
    assert counts[~possible].sum() == 0
    expected = len(tokens) * probabilities[possible]
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert statistic < CRITICAL[int(possible.sum()) - 1]


def test_100_000_chosen_tokens_follow_the_distribution() -> None:
    logits = np.random.default_rng(10).normal(0, 1, 50).astype(np.float32)
    chooser = TokenChooser(GenerationOptions(temperature=1.3), 77, [])
    tokens = [chooser.choose(logits, [0], ()).token for _ in range(100_000)]
    assert_fits(tokens, reference_drawn(logits.astype(np.float64), {"temperature": 1.3}).probabilities)


def test_100_000_draws_follow_the_narrowed_distribution() -> None:
    logits = np.random.default_rng(11).normal(0, 1.2, 50_257).astype(np.float32)
    options = {"temperature": 0.7, "top_k": 60, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.62}
    token_ids, weights = keep(logits, **options)
    assert token_ids is not None
    uniform = RandomUniform(78)
    tokens = [int(token_ids[draw_index(weights, uniform.draw())]) for _ in range(100_000)]
    exact = reference_drawn(logits.astype(np.float64), options)
    assert exact.margin > SLACK
    assert_fits(tokens, exact.probabilities)


# Log-probabilities.


@pytest.mark.parametrize("more", [{}, {"temperature": 2.0, "top_k": 3}, {"banned_tokens": [1], "logit_bias": {2: 5}}])
def test_logprobs_are_those_of_the_model(more: Options) -> None:
    for case in random_cases(13, 10, []):
        options = GenerationOptions(**more, logprobs=7)
        choice = TokenChooser(options, 1, []).choose(case.logits, case.prompt, case.continuation)
        exact = torch.log_softmax(torch.from_numpy(case.logits).double(), 0)
        values, tokens = exact.topk(7)
        assert choice.logprobs is not None
        assert choice.logprobs.token == choice.token
        assert choice.logprobs.logprob == pytest.approx(exact[choice.token].item(), abs=1e-12)
        assert [token for token, _ in choice.logprobs.likeliest] == tokens.tolist()
        assert [logprob for _, logprob in choice.logprobs.likeliest] == pytest.approx(values.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [(1, 0.5)]),
        (2, [(1, 0.5), (0, 0.125)]),
        (3, [(1, 0.5), (0, 0.125), (2, 0.125)]),
        (9, [(1, 0.5), (0, 0.125), (2, 0.125), (3, 0.125), (4, 0.125), (5, 0.0)]),
    ],
)
def test_logprobs_by_hand(count: int, expected: list[tuple[int, float]]) -> None:
    logits = logits_of(0.125, 0.5, 0.125, 0.125, 0.125, 0.0)
    choice = TokenChooser(GenerationOptions(logprobs=count, banned_tokens=[1]), 1, []).choose(logits, [0], [])
    assert choice.token == 0
    assert choice.logprobs is not None
    assert choice.logprobs.logprob == pytest.approx(math.log(0.125), abs=1e-7)
    found = [(token, math.exp(logprob)) for token, logprob in choice.logprobs.likeliest]
    assert found == [(token, pytest.approx(probability, abs=1e-7)) for token, probability in expected]


def test_logprobs_are_off_by_default() -> None:
    assert TokenChooser(GenerationOptions(), 1, []).choose(LOGITS, [0], []).logprobs is None


def test_the_logprob_of_a_token_that_the_model_excludes() -> None:
    def insist(tokens: Sequence[int], logits: Float32s) -> None:
        logits[0] = 9

    options = GenerationOptions(logprobs=1, logits_processor=insist)
    choice = TokenChooser(options, 1, []).choose(logits_of(0, 0.5, 0.5), [0], [])
    assert choice.token == 0
    assert choice.logprobs is not None
    assert choice.logprobs.logprob == -INFINITY


# Degenerate logits.


EVERYTHING: Final[Options] = {
    "temperature": 0.9,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 2,
    "logit_bias": {0: 1.0},
    "logprobs": 2,
}


@pytest.mark.parametrize("options", [{}, {"typical_p": 0.5}, {"banned_tokens": [2]}, EVERYTHING], ids=len)
@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ([1, 0, math.nan, 2], "model computed NaN"),
        ([1, 0, INFINITY, 2], r"model computed \+inf"),
        ([-INFINITY] * 4, "model computed only -inf"),
        ([-INFINITY, math.nan, INFINITY, 0], "model computed NaN"),
    ],
    ids=str,
)
def test_what_the_model_should_not_have_computed(options: Options, raw: list[float], found: str) -> None:
    """Even where the option would hide it."""

    def must_not_see_it(tokens: Sequence[int], logits: Float32s) -> None:
        raise AssertionError("the processor was called")

    for more in ({}, {"logits_processor": must_not_see_it}):
        chooser = TokenChooser(GenerationOptions(**options, **more), 1, [])
        with pytest.raises(LogitsError, match=found):
            chooser.choose(np.array(raw, np.float32), [0], [1])
        assert chooser.position == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"typical_p": 0.5}, EVERYTHING], ids=len)
def test_one_possible_token_is_chosen(options: Options) -> None:
    chooser = TokenChooser(GenerationOptions(**options), 1, [])
    logits = np.array([-INFINITY, -INFINITY, -70, -INFINITY], np.float32)
    assert [chooser.choose(logits, [0], [1] * n).token for n in range(5)] == [2] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"banned_tokens": [0, 1, 2, 3]}, "^all tokens are forbidden by banned_tokens: allow"),
        ({"no_repeat_ngram_size": 1}, "^all tokens are forbidden by no_repeat_ngram_size: allow"),
        ({"no_repeat_ngram_size": 2, "banned_tokens": [0, 1, 2, 3]}, "no_repeat_ngram_size and banned_tokens:"),
        ({"min_new_tokens": 3, "banned_tokens": [1, 2, 3]}, "banned_tokens and min_new_tokens:"),
        ({"min_new_tokens": 2, "banned_tokens": [0, 1, 2, 3]}, "by banned_tokens: allow"),
        ({"logit_bias": dict.fromkeys(range(4), -1e300)}, "forbidden by logit_bias:"),
        ({"logit_bias": {2: 1e300}}, r"^logit_bias led to \+inf"),
        ({"presence_penalty": -1e39}, r"^presence_penalty led to \+inf"),
        ({"frequency_penalty": -1e39, "repetition_penalty": 1.5}, r"repetition_penalty and frequency_penalty led to"),
    ],
    ids=str,
)
def test_options_that_leave_nothing_are_named(options: Options, message: str) -> None:
    for more in ({}, {"top_p": 0.5}, {"logits_processor": lambda tokens, logits: None}):
        chooser = TokenChooser(GenerationOptions(**options, **more), 1, [0])
        with pytest.raises(LogitsError, match=message):
            chooser.choose(LOGITS, [3, 2], [1, 0])
        assert chooser.position == 0


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (math.nan, "logits_processor left NaN"),
        (INFINITY, r"logits_processor left \+inf"),
        (-INFINITY, "logits_processor left only -inf"),
    ],
)
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"banned_tokens": [3]}], ids=len)
def test_a_processor_that_leaves_nothing_is_named(left: float, message: str, options: Options) -> None:
    def spoil(tokens: Sequence[int], logits: Float32s) -> None:
        logits[:] = left

    with pytest.raises(LogitsError, match=message):
        TokenChooser(GenerationOptions(**options, logits_processor=spoil), 1, []).choose(LOGITS, [0], [1])


def test_what_a_processor_raises_is_not_changed() -> None:
    error = KeyError("mine")
    fails = [False, True, False]

    def process(tokens: Sequence[int], logits: Float32s) -> None:
        if fails.pop(0):
            raise error

    chooser = TokenChooser(GenerationOptions(temperature=1.0, logits_processor=process), 3, [])
    undisturbed = TokenChooser(GenerationOptions(temperature=1.0), 3, [])
    first = chooser.choose(LOGITS, [0], [])
    with pytest.raises(KeyError) as caught:
        chooser.choose(LOGITS, [0], [])
    assert caught.value is error
    second = chooser.choose(LOGITS, [0], [])
    assert [first, second] == [undisturbed.choose(LOGITS, [0], []) for _ in range(2)]


def test_a_processor_that_returns_new_logits_is_told() -> None:
    new = GenerationOptions(logits_processor=lambda tokens, logits: logits * 2)
    with pytest.raises(OptionError, match="logits_processor returned ndarray: change"):
        TokenChooser(new, 1, []).choose(LOGITS, [0], [])
    same = GenerationOptions(logits_processor=lambda tokens, logits: np.negative(logits, out=logits))
    assert TokenChooser(same, 1, []).choose(LOGITS, [0], []).token == 1


@pytest.mark.parametrize("options", [{"typical_p": 0.9}, {"min_p": 0.1, "top_p": 0.9}, {"temperature": 1e300}], ids=str)
def test_logits_as_large_as_float32_holds(options: Options) -> None:
    largest = np.finfo(np.float32).max
    logits = np.array([-largest, largest, -INFINITY, largest], np.float32)
    chooser = TokenChooser(GenerationOptions(**options), 1, [])
    tokens = {chooser.choose(logits, [0], []).token for _ in range(60)}
    assert tokens - {0} == {1, 3}


def test_the_benchmark_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sampling_speed", "--vocabulary", "600", "--repetitions", "1"])
    assert sampling_speed.main() == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert rows[0].startswith("greedy ")
    assert all(len(re.findall(r" \d+\.\d{3}(?= |$)", row)) == 4 for row in rows)


# The specification itself.


SPECIFICATION: Final = (Path(__file__).parent.parent / "docs" / "sampling.md").read_text(encoding="utf-8")


def test_the_programs_in_the_specification_run() -> None:
    programs = re.findall(r"```python\n(.*?)```", SPECIFICATION, re.DOTALL)
    assert len(programs) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200


def examples(header: str) -> list[list[str]]:
    """The rows of a table in the specification; options come first."""
    table = SPECIFICATION.split(header)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) > 3
    return rows


@pytest.mark.parametrize("row", examples("| options | kept | drawn with |"), ids=lambda row: row[0])
def test_examples_of_what_is_kept(row: list[str]) -> None:
    options = eval(f"dict({row[0].strip('`')})")
    kept = [int(token) for token in row[1].split(",")]
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    if options.get("temperature") == 0:
        assert kept == [TokenChooser(GenerationOptions(**options), 1, []).choose(logits, [0], []).token]
        return
    drawn = drawn_from(logits, options)
    assert np.flatnonzero(drawn).tolist() == kept
    shares = [float(over) / float(under) for over, under in re.findall(r"(\d+)/(\d+)", row[2])]
    assert drawn[kept].tolist() == pytest.approx(shares if len(kept) > 1 else [1.0], rel=1e-6)


@pytest.mark.parametrize("row", examples("| options | logits after step 4 |"), ids=lambda row: row[0])
def test_examples_of_changed_logits(row: list[str]) -> None:
    options = eval(f"dict({row[0].strip('`')})")
    expected = [float(number) for number in row[1].split(":")[0].split(",")]
    assert changed_logits(LOGITS, options, [0, 3], [1, 2, 1]).tolist() == expected
