"""Choose a token from logits: the last step of `docs/sampling.md`.

The order is temperature, top-k, top-p, min-p, typical-p, draw. Pure functions; where equal tokens straddle a border the
lower ids are kept. Nothing here sorts the vocabulary: top-k finds its border by the maxima of blocks, min-p and most
often top-p look only at logits above a threshold, and typical-p finds its border by histograms.

This is for all options and all logits. `peaked.py` draws the same from logits that are peaked, as those of a language
model mostly are, in less time.
"""

import math
from typing import Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.errors import LogitsError
from gpt2_edge.options import GenerationOptions
from gpt2_edge.random_uniform import RandomUniform

Logits = npt.NDArray[np.float32]  # [vocabulary]
TokenIds = npt.NDArray[np.int64]  # [kept], ascending
Weights = npt.NDArray[np.float32]  # [kept], proportional to the probabilities
Keys = npt.NDArray[np.int32]  # [kept], the smaller the sooner a token is taken

_BLOCK: Final = 64  # values that are summed up, or whose maximum is taken, at once
_LIKELY: Final = 8  # times the bound below which weights are surely not in the nucleus: a good guess of its border
_BIN_BITS: Final = 10  # of a histogram's index
_PIECE: Final = 16384  # values that are counted at once
_SORTED_AT_MOST: Final = 256  # so few keys are sorted, with their indices, sooner than counted
_VALUES_SORTED_AT_MOST: Final = 8192  # the same for weights alone, for which numpy has vector instructions
_CACHED: Final = 8192  # numbers that the first cache holds
_SLACK: Final = 1e-4  # relative, by which a threshold of logits is lower than the weight that it stands for
_LARGEST_FLOAT32: Final = float(np.finfo(np.float32).max)
# What float32 can still divide by; beyond these the likeliest token wins, or all are alike, anyway.
_SMALLEST_TEMPERATURE: Final = 1e-30
_LARGEST_TEMPERATURE: Final = 1e30
_SMALLEST_WEIGHT: Final = np.finfo(np.float32).tiny  # whose logarithm is taken


def choose_token(logits: Logits, options: GenerationOptions, uniform: RandomUniform) -> int:
    """Choose one token.

    Args:
        logits: Shape [vocabulary], after every step that changes them.
        options: Temperature, top-k, top-p, min-p and typical-p.
        uniform: Used once, unless the choice is greedy.

    Raises:
        LogitsError: A logit is NaN or +inf, or all are -inf.
    """
    temperature = options.effective_temperature
    if temperature == 0:
        return greedy(logits)
    token_ids, weights = keep(logits, temperature, options.top_k, options.top_p, options.min_p, options.typical_p)
    index = draw_index(weights, uniform.draw())
    return index if token_ids is None else int(token_ids[index])


def greedy(logits: Logits) -> int:
    """Return the token with the largest logit; of equal ones the lowest id.

    Raises:
        LogitsError: A logit is NaN or +inf, or all are -inf.
    """
    token = int(np.argmax(logits))  # the first NaN, if there is one
    fault = _fault(float(logits[token]))
    if fault is not None:
        raise LogitsError(
            f"the model computed {fault}, so no token can be chosen: "
            "check the folder with `gpt2-edge verify`, and whether its weights are finite"
        )
    return token


def find_fault(logits: Logits) -> str | None:
    """Say why no token can be chosen from logits; None if one can."""
    return _fault(float(logits[np.argmax(logits)]))


def keep(
    logits: Logits,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    typical_p: float | None = None,
) -> tuple[TokenIds | None, Weights]:
    """Return the tokens that may be drawn (None: all), and weights proportional to their probabilities.

    Each of the four narrows what the one before it has kept.

    Args:
        logits: Shape [vocabulary].
        temperature: Above 0.
        top_k: Keep the k likeliest; None or 0 keeps all.
        top_p: Keep the fewest likeliest whose probabilities reach this; None or 1 keeps all.
        min_p: Keep those that are at least this fraction as likely as the likeliest; None or 0 keeps all.
        typical_p: Keep the fewest whose information is closest to the entropy and whose probabilities reach this;
            None or 1 keeps all.

    Raises:
        LogitsError: A logit is NaN or +inf, or all are -inf.
    """
    largest = logits[greedy(logits)]
    if top_k and top_k < logits.size:
        token_ids: TokenIds | None = keep_top_k(logits, top_k)
        weights = _weights(logits[token_ids], largest, temperature)
        if top_p is not None and top_p < 1:
            token_ids, weights = _narrow(token_ids, weights, keep_top_p(weights, top_p))
    elif top_p is not None and top_p < 1:
        token_ids, weights = _nucleus_of_logits(logits, largest, temperature, top_p, min_p or 0.0)
    elif min_p:
        token_ids, weights = _likely(logits, largest, temperature, min_p)
    else:
        token_ids, weights = None, _weights(logits, largest, temperature)
    if min_p:
        token_ids, weights = _narrow(token_ids, weights, keep_min_p(weights, min_p))
    if typical_p is not None and typical_p < 1:
        token_ids, weights = _narrow(token_ids, weights, keep_typical_p(weights, typical_p))
    return token_ids, weights


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
    Weights below (1 - top_p) / count of the sum are less than 1 - top_p of it together, so they need not be looked at;
    most often not even those below a multiple of that, which is tried first.
    """
    total = _sum(weights)
    target = top_p * total
    bound = 0.99 * (1 - top_p) * total / weights.size  # a little less, because sums are rounded
    candidates = np.flatnonzero(weights >= _LIKELY * bound)
    values = weights[candidates]
    if _sum(values) <= target:
        candidates = np.flatnonzero(weights >= bound)
        values = weights[candidates]
    return candidates[_nucleus(values, target)]


def keep_min_p(weights: Weights, min_p: float) -> TokenIds:
    """Return the indices of the weights that are at least `min_p` of the largest, in ascending order."""
    return np.flatnonzero(weights >= np.float32(min_p) * weights.max())


def keep_typical_p(weights: Weights, typical_p: float) -> TokenIds:
    """Return the indices of the fewest most typical weights whose share reaches `typical_p`, in ascending order.

    A token is typical if its information is close to the entropy (Meister et al. 2022, "Locally Typical Sampling").
    With p = weight / sum, |-log p - entropy| is |log weight - mean of log weight|, the mean being taken over p.
    The token that crosses the border is kept, so at least one is; of equally typical ones the lowest indices are kept.
    """
    distances = np.maximum(weights, _SMALLEST_WEIGHT)
    np.log(distances, out=distances)
    total = _sum(weights)
    distances -= np.float32(float((weights * distances).sum(dtype=np.float64)) / total)
    return _fewest(_bits(np.abs(distances, out=distances)), weights, typical_p * total)


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
    if index < ends.size:
        return index
    # Rounding has lifted the target to the very end; what has weight 0 must not be drawn there.
    return int(np.searchsorted(ends, ends[-1], side="left"))


def _weights(logits: Logits, largest: np.float32, temperature: float) -> Weights:
    # In place: fresh pages for arrays as long as the vocabulary cost more than the arithmetic.
    with np.errstate(over="ignore"):  # a gap beyond float32 is -inf, and its weight 0
        weights: Weights = logits - largest
        if temperature != 1:
            weights /= _divisor(temperature)
    np.exp(weights, out=weights)
    return weights


def _divisor(temperature: float) -> np.float32:
    return np.float32(min(max(temperature, _SMALLEST_TEMPERATURE), _LARGEST_TEMPERATURE))


def _likely(logits: Logits, largest: np.float32, temperature: float, weight: float) -> tuple[TokenIds, Weights]:
    """Return the tokens that have at least this weight, perhaps a few more, and their weights."""
    temperature = float(_divisor(temperature))
    # A weight is rounded to 1e-7 of it, and its logit to 1e-7 of the largest: both are less than the slack.
    threshold = float(largest) * (1 - math.copysign(_SLACK, largest)) + temperature * (math.log(weight) - _SLACK)
    token_ids = (logits >= max(threshold, -_LARGEST_FLOAT32)).nonzero()[0]
    return token_ids, _weights(logits[token_ids], largest, temperature)


def _nucleus_of_logits(
    logits: Logits, largest: np.float32, temperature: float, top_p: float, min_p: float
) -> tuple[TokenIds, Weights]:
    """Return what top-p keeps, but perhaps not what min-p drops of it anyway, and the weights.

    As in `keep_top_p`; but where min-p looks at fewer tokens, those are enough: the rest of the nucleus is less likely.
    """
    total = _sum_of_weights(logits, largest, temperature)
    target = top_p * total
    bound = 0.99 * (1 - top_p) * total / logits.size
    for lowest in (_LIKELY * bound, bound):
        is_enough = lowest < min_p
        token_ids, weights = _likely(
            logits, largest, temperature, min(max(lowest, min_p, float(_SMALLEST_WEIGHT)), 1.0)
        )
        if is_enough or _sum(weights) > target:
            break
    return _narrow(token_ids, weights, _nucleus(weights, target))


def _narrow(token_ids: TokenIds | None, weights: Weights, kept: TokenIds) -> tuple[TokenIds, Weights]:
    return (kept if token_ids is None else token_ids[kept]), weights[kept]


def _nth_largest(values: npt.NDArray[np.float32], n: int) -> np.float32:
    return np.float32(np.partition(values, values.size - n)[values.size - n])


def _largest(values: npt.NDArray[np.float32], count: int, smallest_kept: np.float32) -> TokenIds:
    """Return the indices of the `count` largest values, given the smallest of them."""
    kept = values >= smallest_kept
    return _without_surplus(kept, int(np.count_nonzero(kept)) - count, values, smallest_kept)


def _without_surplus(
    kept: npt.NDArray[np.bool_], surplus: int, values: npt.NDArray[np.generic], border: np.generic
) -> TokenIds:
    """Return the kept indices in ascending order without the `surplus` highest of those on the border."""
    if surplus:
        kept[np.flatnonzero(values == border)[-surplus:]] = False
    return np.flatnonzero(kept)


def _nucleus(weights: Weights, target: float) -> TokenIds:
    """Return the indices of the fewest largest weights that add up to `target`, or of all, in ascending order."""
    if weights.size > _VALUES_SORTED_AT_MOST:
        return _fewest(-_bits(weights), weights, target)
    descending = np.sort(weights)[::-1]
    last = _first_reaching(descending.cumsum(dtype=np.float64), target)
    border = descending[last]
    kept = weights >= border
    return _without_surplus(kept, int(np.count_nonzero(kept)) - (last + 1), weights, border)


def _fewest(keys: Keys, weights: Weights, target: float) -> TokenIds:
    """Return the indices of the fewest smallest keys whose weights add up to `target`, in ascending order.

    At least one is taken, and of equal keys the lowest indices. The key on the border is found by a histogram of the
    weights, then by one within the bin that holds the border, and so on: only the last few keys are sorted.
    """
    reached = 0.0
    near, near_weights = keys, weights
    while (lowest := int(near.min())) < (highest := int(near.max())) and near.size > _SORTED_AT_MOST:
        bins = (near - lowest) >> max(0, (highest - lowest).bit_length() - _BIN_BITS)
        ends = reached + np.cumsum(_histogram(bins, near_weights))
        border = _first_reaching(ends, target)
        reached = float(ends[border - 1]) if border else reached
        within = np.flatnonzero(bins == border)
        near, near_weights = near[within], near_weights[within]
    if lowest < highest:
        order = np.argsort(near, kind="stable")
        near, near_weights = near[order], near_weights[order]
    last = _first_reaching(reached + np.cumsum(near_weights, dtype=np.float64), target)
    border_key = near[last]
    surplus = int(np.searchsorted(near, border_key, side="right")) - (last + 1)
    return _without_surplus(keys <= border_key, surplus, keys, border_key)


def _sum_of_weights(logits: Logits, largest: np.float32, temperature: float) -> float:
    """Return the sum of all weights without keeping them, piece by piece."""
    total, buffer = 0.0, np.empty(_CACHED, np.float32)
    divisor = _divisor(temperature)
    with np.errstate(over="ignore"):
        for start in range(0, logits.size, _CACHED):
            piece = logits[start : start + _CACHED]
            weights = np.subtract(piece, largest, out=buffer[: piece.size])
            if divisor != 1:
                weights /= divisor
            total += float(np.exp(weights, out=weights).sum())
    return total


def _sum(weights: Weights) -> float:
    """Return the sum, as exact as its float32 terms: short columns are added vector by vector, the rest in float64."""
    blocks = weights.size // _BLOCK
    columns = weights[: blocks * _BLOCK].reshape(_BLOCK, blocks).sum(axis=0)
    return float(columns.sum(dtype=np.float64) + weights[blocks * _BLOCK :].sum(dtype=np.float64))


def _histogram(bins: Keys, weights: Weights) -> npt.NDArray[np.float64]:
    """Return the sum of the weights in each bin."""
    sums = np.zeros(2**_BIN_BITS)
    # Piece by piece, because bincount converts what it is given: fresh pages for that cost more than the counting.
    for start in range(0, bins.size, _PIECE):
        piece = slice(start, start + _PIECE)
        sums += np.bincount(bins[piece], weights[piece], sums.size)
    return sums


def _bits(values: npt.NDArray[np.float32]) -> Keys:
    """Return integers in the order of numbers that are not negative."""
    return values.view(np.int32)


def _first_reaching(ends: npt.NDArray[np.float64], target: float) -> int:
    # Rounding can leave the very end below the target; what adds nothing to it must not be taken for it.
    return int(np.searchsorted(ends, min(target, ends[-1]), side="left"))


def _fault(largest: float) -> str | None:
    if math.isnan(largest):
        return "NaN among the logits"
    if math.isfinite(largest):
        return None
    return "+inf among the logits" if largest > 0 else "only -inf as logits"
