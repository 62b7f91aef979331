"""What quantization cost: two models' predictions of the same text; `docs/quality.md` is the definition.

The names are llama-perplexity's. Everything is computed window by window and, within one, a few positions at a time,
so a vocabulary of 50,257 tokens needs the logits of one window for each of both models, and no more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.decoded_logits import decoded_logits
from gpt2_edge.errors import LogitsError, PromptError
from gpt2_edge.model import Model

Logits = npt.NDArray[np.float32]
FloatArray = npt.NDArray[np.float64]

WINDOW_TOKENS: Final = 512
MOST_WINDOWS: Final = 24
GREEDY_TOKENS: Final = 64
_GREEDY_PROMPTS: Final = 4
_GREEDY_PROMPT_TOKENS: Final = 32
_FEWEST_TOKENS: Final = 2
_BLOCK_NUMBERS: Final = 2**19  # computed at a time, 8 bytes each in a few temporary arrays
_LARGEST_EXPONENT: Final = 700.0  # what floats hold


@dataclass(frozen=True, slots=True)
class PositionStatistics:
    """What two models predict, position by position; all arrays have shape [positions].

    Attributes:
        full_precision_logprobs: Natural logarithm of the probability of the token that follows, at full precision.
        logprobs: The same of the quantized model.
        divergences: Kullback-Leibler divergence of the quantized from the full-precision distribution, in nats.
        same_top: Whether both find the same token the likeliest.
    """

    full_precision_logprobs: FloatArray
    logprobs: FloatArray
    divergences: FloatArray
    same_top: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How far a model is from its full-precision original, over all positions of a text.

    An error is a standard error over the positions, as llama-perplexity prints it behind its numbers.

    Attributes:
        tokens: Positions that were compared.
        full_precision_perplexity: `exp` of the mean negative log-probability, at full precision.
        perplexity: The same of the quantized model.
        perplexity_change_percent: From the mean of the differences, position by position.
        perplexity_change_error_percent: Of that.
        mean_kl_divergence: Of the quantized from the full-precision distribution, in nats a token.
        mean_kl_divergence_error: Of that.
        median_kl_divergence: Half of the positions have less.
        kl_divergence_90: 90 % of the positions have less; and so on.
        kl_divergence_95: 95 %.
        kl_divergence_99: 99 %.
        kl_divergence_99_9: 99.9 %.
        largest_kl_divergence: At the worst position.
        same_top_percent: Positions at which both find the same token the likeliest.
        same_top_error_percent: Of that.
        mean_probability_change_percent: Of the token that follows: positive if the quantized model finds it likelier.
        mean_probability_change_error_percent: Of that.
        rms_probability_change_percent: Root of the mean square of the same changes.
        rms_probability_change_error_percent: Of that.
    """

    tokens: int
    full_precision_perplexity: float
    perplexity: float
    perplexity_change_percent: float
    perplexity_change_error_percent: float
    mean_kl_divergence: float
    mean_kl_divergence_error: float
    median_kl_divergence: float
    kl_divergence_90: float
    kl_divergence_95: float
    kl_divergence_99: float
    kl_divergence_99_9: float
    largest_kl_divergence: float
    same_top_percent: float
    same_top_error_percent: float
    mean_probability_change_percent: float
    mean_probability_change_error_percent: float
    rms_probability_change_percent: float
    rms_probability_change_error_percent: float


@dataclass(frozen=True, slots=True)
class GreedyComparison:
    """Greedy continuations of both models, of the same prompts.

    Attributes:
        tokens: Of each continuation.
        first_divergent_tokens: For each prompt, how many tokens are the same before the first that differs; `tokens`
            if all are.
        first_divergent_in_batch: The same of the quantized model's continuations, alone and as rows of one batch.
    """

    tokens: int
    first_divergent_tokens: tuple[int, ...]
    first_divergent_in_batch: tuple[int, ...]


def windows_of(tokens: Sequence[int], length: int, most_windows: int = MOST_WINDOWS) -> list[list[int]]:
    """Cut windows out of a text, spread evenly over it and without overlap; each is predicted on its own.

    Args:
        tokens: The text, at least two tokens.
        length: Tokens of a window, at least 2; a text that is shorter gives one shorter window.
        most_windows: How many at most; a text that does not hold so many gives fewer.

    Raises:
        PromptError: The text has fewer than two tokens.
    """
    if len(tokens) < _FEWEST_TOKENS:
        raise PromptError(f"the text has {len(tokens)} token(s): quality is measured over at least {_FEWEST_TOKENS}")
    length = max(_FEWEST_TOKENS, min(length, len(tokens)))
    count = min(most_windows, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).astype(int).tolist()
    return [list(tokens[start : start + length]) for start in starts]


def compare_logits(full_precision: Logits, quantized: Logits, following: Sequence[int]) -> PositionStatistics:
    """Compare distributions position by position.

    Args:
        full_precision: Shape [positions, vocabulary].
        quantized: The same shape.
        following: The token that really follows, for each position.

    Raises:
        LogitsError: Logits are not finite.
    """
    positions, vocabulary_size = full_precision.shape
    block = max(1, _BLOCK_NUMBERS // vocabulary_size)
    parts = [
        _compare_block(full_precision[start : start + block], quantized[start : start + block], start, following)
        for start in range(0, positions, block)
    ]
    logprobs, reference, divergences, same_top = (np.concatenate(each) for each in zip(*parts, strict=True))
    return PositionStatistics(reference, logprobs, divergences, same_top)


def summarize(parts: Sequence[PositionStatistics]) -> Quality:
    """Return the statistics of all positions of some windows, of which there must be one or more."""
    full = np.concatenate([part.full_precision_logprobs for part in parts])
    quantized = np.concatenate([part.logprobs for part in parts])
    divergences = np.concatenate([part.divergences for part in parts])
    same_top = np.concatenate([part.same_top for part in parts])
    change, change_error = _mean_and_error(full - quantized)
    mean_divergence, divergence_error = _mean_and_error(divergences)
    same, same_error = _mean_and_error(same_top.astype(np.float64))
    probability_changes = np.exp(quantized) - np.exp(full)
    mean_change, mean_change_error = _mean_and_error(probability_changes)
    square, square_error = _mean_and_error(probability_changes**2)
    rms = math.sqrt(square)
    percentiles = np.percentile(divergences, (50, 90, 95, 99, 99.9)).tolist()
    return Quality(
        tokens=len(divergences),
        full_precision_perplexity=perplexity_of(full),
        perplexity=perplexity_of(quantized),
        perplexity_change_percent=100 * math.expm1(min(change, _LARGEST_EXPONENT)),
        perplexity_change_error_percent=100 * math.exp(min(change, _LARGEST_EXPONENT)) * change_error,
        mean_kl_divergence=mean_divergence,
        mean_kl_divergence_error=divergence_error,
        median_kl_divergence=percentiles[0],
        kl_divergence_90=percentiles[1],
        kl_divergence_95=percentiles[2],
        kl_divergence_99=percentiles[3],
        kl_divergence_99_9=percentiles[4],
        largest_kl_divergence=float(divergences.max()),
        same_top_percent=100 * same,
        same_top_error_percent=100 * same_error,
        mean_probability_change_percent=100 * mean_change,
        mean_probability_change_error_percent=100 * mean_change_error,
        rms_probability_change_percent=100 * rms,
        rms_probability_change_error_percent=100 * square_error / (2 * rms) if rms else 0.0,
    )


def perplexity_of(logprobs: FloatArray) -> float:
    """Return `exp` of the mean negative log-probability."""
    return math.exp(min(-float(logprobs.mean()), _LARGEST_EXPONENT))


def measure_quality(
    full_precision: Model,
    quantized: Model,
    windows: Sequence[Sequence[int]],
    on_window: Callable[[], object] = lambda: None,
) -> Quality:
    """Let both models predict the same windows.

    Args:
        full_precision: The reference.
        quantized: Has the same tokenizer.
        windows: Tokens, each window at least two; the first of each is not predicted.
        on_window: Called after each.

    Raises:
        LogitsError: A model computes logits that are not finite.
    """
    parts = []
    for window in windows:
        reference = full_precision.logits(window)[:-1]
        parts.append(compare_logits(reference, window_logits(quantized, window)[:-1], window[1:]))
        on_window()
    return summarize(parts)


def window_logits(model: Model, window: Sequence[int]) -> Logits:
    """Return the logits after each token of a window, as a model that generates them has them.

    Where many tokens at once are computed in another way, more exactly, these are computed one by one.
    """
    if not model.manifest.decodes_as_it_prefills:
        (logits,) = decoded_logits(model, window, [1])
        return logits
    return model.logits(window)


def compare_greedy_texts(full_precision: Model, quantized: Model, windows: Sequence[Sequence[int]]) -> GreedyComparison:
    """Continue the beginnings of a few windows greedily with both models, and side by side with the quantized one."""
    prompt_tokens = min(_GREEDY_PROMPT_TOKENS, full_precision.context_length // 2 or 1)
    count = min(GREEDY_TOKENS, full_precision.context_length - prompt_tokens)
    step = max(1, len(windows) // _GREEDY_PROMPTS)
    prompts = [list(window[:prompt_tokens]) for window in windows[::step][:_GREEDY_PROMPTS]]
    options: dict[str, Any] = {"max_new_tokens": count, "ignore_eos": True}
    expected = [full_precision.generate(prompt, **options).tokens for prompt in prompts]
    alone = [quantized.generate(prompt, **options).tokens for prompt in prompts]
    together = [row.tokens for row in quantized.generate(prompts, **options)]
    return GreedyComparison(count, _first_divergent(expected, alone), _first_divergent(alone, together))


def _first_divergent(expected: Sequence[Sequence[int]], found: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return for each pair of texts of the same length where they part, or that length."""
    return tuple(
        next((index for index, (one, other) in enumerate(zip(*pair, strict=True)) if one != other), len(pair[0]))
        for pair in zip(expected, found, strict=True)
    )


def _compare_block(
    full_precision: Logits, quantized: Logits, start: int, following: Sequence[int]
) -> tuple[FloatArray, FloatArray, FloatArray, npt.NDArray[np.bool_]]:
    reference, candidate = _log_softmax(full_precision), _log_softmax(quantized)
    rows = np.arange(len(reference))
    tokens = np.asarray(following[start : start + len(rows)])
    same_top = reference.argmax(axis=1) == candidate.argmax(axis=1)
    logprobs, reference_logprobs = candidate[rows, tokens], reference[rows, tokens]
    np.subtract(reference, candidate, out=candidate)
    candidate *= np.exp(reference, out=reference)
    # A sum that is 0 may come out a little below.
    return logprobs, reference_logprobs, np.maximum(candidate.sum(axis=1), 0.0), same_top


def _log_softmax(logits: Logits) -> FloatArray:
    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all() or not np.isfinite(logits.min()):
        raise LogitsError("the model computed logits that are not finite: check it with `gpt2-edge verify`")
    shifted: FloatArray = np.subtract(logits, largest, dtype=np.float64)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _mean_and_error(values: FloatArray) -> tuple[float, float]:
    """Return the mean and its standard error; that of a single value is not known, and 0 here."""
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), error
