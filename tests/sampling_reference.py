"""docs/sampling.md once more, as plainly as it can be written down, and random cases to compare it over."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from transformers.generation import logits_process as hf

from gpt2_edge import GenerationOptions
from gpt2_edge.choosing import TokenChooser
from gpt2_edge.sampling import keep

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


# Where nothing else is said, the model's logits are these.
LOGITS: Final = np.array([2, -2, 0, 1], np.float32)


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
