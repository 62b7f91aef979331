"""Choose a token from logits.

The order is temperature, top-k, top-p, draw. Pure functions; where equal tokens straddle a border the lower ids are
kept. Nothing here sorts the vocabulary: top-k finds its border by the maxima of blocks, top-p sorts only the weights
that can be part of the nucleus.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.errors import LogitsError
from gpt2_edge.options import GenerationOptions

Logits = npt.NDArray[np.float32]  # [vocabulary]
TokenIds = npt.NDArray[np.int64]  # [kept], ascending
Weights = npt.NDArray[np.float32]  # [kept], proportional to the probabilities, the largest is 1

_BLOCK: Final = 64
_SMALLEST_TEMPERATURE: Final = 1e-30  # what float32 can still divide by; the likeliest token wins long before


class RandomUniform:
    """A stream of numbers in [0, 1) that depends on nothing but the seed and the position in the stream.

    Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose raw output numpy keeps the
    same in all versions and on all platforms.
    """

    def __init__(self, seed: int) -> None:
        self._philox = np.random.Philox(key=seed)

    def draw(self) -> float:
        """Return the next number, a multiple of 2**-53."""
        return float(int(self._philox.random_raw()) >> 11) * 2.0**-53


def choose_token(logits: Logits, options: GenerationOptions, uniform: RandomUniform) -> int:
    """Choose one token.

    Args:
        logits: Raw logits, shape [vocabulary].
        options: Temperature, top-k and top-p.
        uniform: Used once, unless the choice is greedy.

    Raises:
        LogitsError: A logit is NaN or +inf, or all are -inf.
    """
    temperature = options.effective_temperature
    if temperature == 0:
        return greedy(logits)
    token_ids, weights = keep(logits, temperature, options.top_k, options.top_p)
    index = draw_index(weights, uniform.draw())
    return index if token_ids is None else int(token_ids[index])


def greedy(logits: Logits) -> int:
    """Return the token with the largest logit; of equal ones the lowest id.

    Raises:
        LogitsError: A logit is NaN or +inf, or all are -inf.
    """
    token = int(np.argmax(logits))  # the first NaN, if there is one
    if not np.isfinite(logits[token]):
        raise _unusable(logits[token])
    return token


def keep(
    logits: Logits, temperature: float, top_k: int | None = None, top_p: float | None = None
) -> tuple[TokenIds | None, Weights]:
    """Return the tokens that may be drawn (None: all), and weights proportional to their probabilities.

    Args:
        logits: Raw logits, shape [vocabulary].
        temperature: Above 0.
        top_k: Keep the k likeliest; None or 0 keeps all.
        top_p: Of those, keep the fewest likeliest whose probabilities reach this; None or 1 keeps all.

    Raises:
        LogitsError: A logit is NaN or +inf, or all are -inf.
    """
    largest = logits[greedy(logits)]
    token_ids = keep_top_k(logits, top_k) if top_k and top_k < logits.size else None
    # In place: fresh pages for arrays as long as the vocabulary cost more than the arithmetic.
    weights = (logits if token_ids is None else logits[token_ids]) - largest
    with np.errstate(over="ignore"):  # a gap beyond float32 is -inf, and its weight 0
        weights /= np.float32(max(temperature, _SMALLEST_TEMPERATURE))
    np.exp(weights, out=weights)
    if top_p is None or top_p >= 1:
        return token_ids, weights
    kept = keep_top_p(weights, top_p)
    return (kept if token_ids is None else token_ids[kept]), weights[kept]


def keep_top_k(logits: Logits, count: int) -> TokenIds:
    """Return the indices of the `count` largest values in ascending order; of equal ones the lowest indices.

    The count-th largest maximum of blocks of 64 values is a lower bound of the count-th largest value, so few values
    remain to be looked at.
    """
    if count >= logits.size:
        return np.arange(logits.size)
    blocks = logits.size // _BLOCK
    if count >= blocks:
        return _largest(logits, count, _nth_largest(logits, count))
    # A block is every `blocks`-th value, not consecutive ones: that way the maxima are taken vector by vector.
    bound = _nth_largest(logits[: blocks * _BLOCK].reshape(_BLOCK, blocks).max(axis=0), count)
    candidates = np.flatnonzero(logits >= bound)
    values = logits[candidates]
    return candidates[_largest(values, count, _nth_largest(values, count))]


def keep_top_p(weights: Weights, top_p: float) -> TokenIds:
    """Return the indices of the fewest largest weights whose share reaches `top_p`, in ascending order.

    The weight that crosses the border is kept, so at least one is; of equal weights the lowest indices are kept.
    Weights below (1 - top_p) / count of the sum are less than 1 - top_p of it together: they need not be sorted.
    """
    total = float(weights.sum(dtype=np.float64))
    candidates = np.flatnonzero(weights >= (1 - top_p) * total / weights.size)
    values = weights[candidates]
    descending = np.sort(values)[::-1]
    reached = np.cumsum(descending, dtype=np.float64)
    count = min(int(np.searchsorted(reached, top_p * total, side="left")) + 1, values.size)
    return candidates[_largest(values, count, descending[count - 1])]


def draw_index(weights: Weights, uniform: float) -> int:
    """Return the index whose share of the cumulative weights holds `uniform`, a number in [0, 1).

    The block is found by the sums of blocks, the index within it: adding up the whole vocabulary one by one would
    take longer than everything else.
    """
    starts = np.arange(0, weights.size, _BLOCK)
    block_ends = np.cumsum(np.add.reduceat(weights, starts, dtype=np.float64))
    target = uniform * block_ends[-1]
    block = _first_above(block_ends, target)
    start = block * _BLOCK
    before = block_ends[block - 1] if block else 0.0
    ends = before + np.cumsum(weights[start : start + _BLOCK], dtype=np.float64)
    return start + _first_above(ends, target)


def _first_above(ends: npt.NDArray[np.float64], target: float) -> int:
    index = int(np.searchsorted(ends, target, side="right"))
    # Rounding can lift the target to the very end; what has weight 0 must not be drawn there.
    return min(index, int(np.searchsorted(ends, ends[-1], side="left")))


def _nth_largest(values: npt.NDArray[np.float32], n: int) -> np.float32:
    return np.float32(np.partition(values, values.size - n)[values.size - n])


def _largest(values: npt.NDArray[np.float32], count: int, smallest_kept: np.float32) -> npt.NDArray[np.int64]:
    """Return the indices of the `count` largest values, given the smallest of them."""
    above = values > smallest_kept
    kept = above | (values == smallest_kept)
    surplus = int(np.count_nonzero(kept)) - count
    if surplus:
        kept[np.flatnonzero(kept & ~above)[-surplus:]] = False
    return np.flatnonzero(kept)


def _unusable(logit: np.float32) -> LogitsError:
    if np.isnan(logit):
        found = "NaN among the logits"
    else:
        found = "+inf among the logits" if logit > 0 else "only -inf as logits"
    return LogitsError(
        f"the model computed {found}, so no token can be chosen: "
        "check the folder with `gpt2-edge verify`, and whether its weights are finite"
    )
