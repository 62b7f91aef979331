"""Draw a token from peaked logits, as those of a language model are, with few different functions.

After each run of the model the code of numpy has to come back from memory, line by line: a function that is called for
the first time since then takes ten to forty microseconds, however short its array is, and the same again nearly
nothing. So what is drawn here is what `sampling.py` draws, but by a threshold that leaves some hundred candidates, and
by loops of Python over what remains of them. Where that is not the way, because logits are flat or equal ones lie on a
border, `draw` says so, and `sampling.py` does it.
"""

import math
from bisect import bisect_left, bisect_right
from itertools import accumulate
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.options import GenerationOptions
from gpt2_edge.random_uniform import RandomUniform

Logits = npt.NDArray[np.float32]  # [vocabulary]
TokenIds = npt.NDArray[np.int64]  # [candidates], ascending

# Together they keep differences of logits from being lost in rounding, and everything from overflowing.
_TEMPERATURES: Final = (1e-3, 1e3)
_LARGEST_LOGIT: Final = 1e4  # times the temperature
_LISTED_AT_MOST: Final = 256  # candidates; for more of them loops of Python take too long
_HALVED_AT_MOST: Final = 4096  # the same for what numpy loops over
_LISTED_AFTER_HALVING: Final = 128
_USUAL_GAP: Final = 8.0  # to the largest logit, over the temperature, within which top-k looks first
_WIDENING: Final = 1.5  # of the gap, if there are too few
_TRIES: Final = 4  # of gaps
_HALVINGS: Final = 8  # of the gap, until it holds not many more than top-k keeps
_GUESSES: Final = (128.0, 32.0)  # of the nucleus' border: times what all together weigh too little to be in it
_PEAKED_GUESS: Final = 512.0  # before them, if the likeliest token has a quarter of the sum or more
_SUM_OF_PEAKED: Final = 4.0  # of the weights, of which the likeliest is 1
_NEARLY_ENOUGH: Final = 0.9  # of the nucleus: with less, the next guess seldom holds either
_LESS_LIKELY: Final = 0.1  # times min-p: as likely are tokens that show what the rest weighs at least
_PIECE: Final = 8192  # weights that are computed and added up at once; from 10,000 on some libraries start threads
_WEIGHTLESS: Final = 120.0  # gap to the largest logit, over the temperature, whose weight is 0 in float32
_SMALLEST_WEIGHT: Final = 1e-30  # that is asked for, so that it has a logarithm and at least one token is taken
_SLACK: Final = 1e-4  # relative, by which a threshold of logits is lower than the weight that it stands for


def can_draw(options: GenerationOptions) -> bool:
    """Tell whether `PeakedDraw` is worth a try."""
    top_k = options.top_k or 0
    narrows = bool(top_k or options.min_p or (options.top_p is not None and options.top_p < 1))
    lowest, highest = _TEMPERATURES
    keeps_all_typical = options.typical_p is None or options.typical_p >= 1
    is_short = 2 * top_k <= _LISTED_AT_MOST
    has_logarithm = not options.min_p or options.min_p >= _SMALLEST_WEIGHT
    is_usual = is_short and has_logarithm and lowest <= options.effective_temperature <= highest
    return narrows and keeps_all_typical and is_usual


class PeakedDraw:
    """Draws the tokens of one continuation by temperature, top-k, top-p and min-p.

    Args:
        options: How to choose; those that `can_draw` accepts.
        uniform: Gives a number for each drawn token.
    """

    def __init__(self, options: GenerationOptions, uniform: RandomUniform) -> None:
        self._uniform = uniform
        self._temperature = options.effective_temperature
        self._top_k = options.top_k or 0
        self._top_p = 1.0 if options.top_p is None else options.top_p
        self._min_p = options.min_p or 0.0
        # Numbers that are written through views reach numpy sooner than new ones.
        self._threshold, self._largest = np.zeros((), np.float32), np.zeros((), np.float32)
        self._threshold_view: Any = self._threshold.data
        self._largest_view: Any = self._largest.data
        self._likeliest = np.zeros((), np.intp)
        self._likeliest_view: Any = self._likeliest.data
        self._factor = np.array(1 / self._temperature, np.float32)
        self._is_above = np.empty(0, np.bool_)
        self._weights, self._ones = np.empty(0, np.float32), np.empty(0, np.float32)

    def draw(self, logits: Logits) -> int | None:
        """Return a token.

        Args:
            logits: Shape [vocabulary].

        Returns:
            None if this is not the way for these logits; no number was drawn then.
        """
        logits.argmax(0, self._likeliest)
        largest = logits.item(self._likeliest_view[()])
        if not abs(largest) < _LARGEST_LOGIT * self._temperature:  # NaN neither
            return None
        if self._is_above.size != logits.size:
            self._is_above = np.empty(logits.size, np.bool_)
        if self._top_k:
            return self._draw_of_top_k(logits, largest)
        if self._top_p < 1:
            return self._draw_of_top_p(logits, largest)
        token_ids = self._find(logits, self._logit_of(self._min_p, largest))
        if token_ids.size > _LISTED_AT_MOST:
            return None
        return self._draw_of_list(token_ids.tolist(), logits[token_ids].tolist(), largest, -math.inf, 0)

    def _find(self, logits: Logits, threshold: float) -> TokenIds:
        self._threshold_view[()] = threshold
        found: TokenIds = np.greater_equal(logits, self._threshold, self._is_above).nonzero()[0]
        return found

    def _draw_of_top_k(self, logits: Logits, largest: float) -> int | None:
        count = self._top_k
        gap, too_small = _USUAL_GAP * self._temperature, 0.0
        for _ in range(_TRIES):
            token_ids = self._find(logits, largest - gap)
            if token_ids.size < count:
                too_small, gap = gap, _WIDENING * gap
            elif token_ids.size > _HALVED_AT_MOST:
                if 2 * token_ids.size > logits.size:
                    return None  # flat
                gap = (too_small + gap) / 2
            else:
                break
        else:
            return None
        values = logits[token_ids]
        for _ in range(_HALVINGS):
            if token_ids.size <= 2 * count:
                break
            middle = (too_small + gap) / 2
            self._threshold_view[()] = largest - middle
            nearer = np.greater_equal(values, self._threshold).nonzero()[0]
            if nearer.size >= count:
                token_ids, values, gap = token_ids[nearer], values[nearer], middle
            else:
                too_small = middle
        if token_ids.size > _LISTED_AT_MOST:
            return None
        listed = values.tolist()
        ranked = sorted(listed, reverse=True)
        if self._top_p < 1:
            temperature = self._temperature
            ends = list(accumulate([math.exp((logit - largest) / temperature) for logit in ranked[:count]]))
            count = bisect_left(ends, self._top_p * ends[-1]) + 1
        border = ranked[count - 1]
        return self._draw_of_list(token_ids.tolist(), listed, largest, border, count - ranked.index(border))

    def _draw_of_list(self, tokens: list[int], logits: list[float], largest: float, border: float, equals: int) -> int:
        """Draw from tokens with logits above a border, and the first few on it, as far as min-p keeps them."""
        temperature, min_p, exp = self._temperature, self._min_p, math.exp
        total, ends, kept = 0.0, [], []
        for token, logit in zip(tokens, logits, strict=True):
            if logit < border:
                continue
            if logit == border:
                if not equals:
                    continue
                equals -= 1
            weight = exp((logit - largest) / temperature)
            if weight >= min_p:
                total += weight
                ends.append(total)
                kept.append(token)
        return kept[bisect_right(ends, self._uniform.draw() * total)]

    def _draw_of_top_p(self, logits: Logits, largest: float) -> int | None:
        """What weighs less than (1 - top_p) / count of the sum is less than 1 - top_p of it together.

        So it need not be looked at; most often not even what weighs less than a multiple of that.
        """
        if self._min_p:
            drawn = self._draw_if_min_p_is_stricter(logits, largest)
            if drawn is not None:
                return drawn
        total = self._sum_of_weights(logits, largest)
        target = max(self._top_p * total, _SMALLEST_WEIGHT)
        bound = 0.99 * (1 - self._top_p) * total / logits.size  # a little less, because sums are rounded
        guesses = _GUESSES if total > _SUM_OF_PEAKED else (_PEAKED_GUESS, *_GUESSES)
        for guess in guesses:
            lowest = min(max(guess * bound, self._min_p), 1.0)
            token_ids = self._find(logits, self._logit_of(lowest, largest))
            if token_ids.size > _HALVED_AT_MOST:
                return None
            weights = logits[token_ids]
            np.subtract(weights, self._largest, weights)
            np.multiply(weights, self._factor, weights)
            np.exp(weights, weights)
            mass = float(weights.dot(self._ones[: weights.size]))
            if lowest == self._min_p or mass > target:
                return self._draw_of_weights(token_ids, weights, lowest, target)
            if guess != _PEAKED_GUESS and mass < _NEARLY_ENOUGH * target:
                break
        return None

    def _draw_if_min_p_is_stricter(self, logits: Logits, largest: float) -> int | None:
        """Draw of what min-p keeps, if top-p surely keeps all of that; so most often the sum need not be known.

        It does if more than 1 - top_p of the sum are less likely. As many as weigh nearly enough are looked at.
        """
        token_ids = self._find(logits, self._logit_of(_LESS_LIKELY * self._min_p, largest))
        if token_ids.size > _LISTED_AT_MOST:
            return None
        listed = logits[token_ids].tolist()
        temperature, min_p, exp = self._temperature, self._min_p, math.exp
        found = kept = 0.0
        for logit in listed:
            weight = exp((logit - largest) / temperature)
            found += weight
            if weight >= min_p:
                kept += weight
        if self._top_p * found < kept * (1 + _SLACK):
            return None
        return self._draw_of_list(token_ids.tolist(), listed, largest, -math.inf, 0)

    def _sum_of_weights(self, logits: Logits, largest: float) -> float:
        if not self._weights.size:
            self._weights, self._ones = np.empty(_PIECE, np.float32), np.ones(_PIECE, np.float32)
        self._largest_view[()] = largest
        self._threshold_view[()] = largest - _WEIGHTLESS * self._temperature
        total = 0.0
        for start in range(0, logits.size, _PIECE):
            piece = logits[start : start + _PIECE]
            weights = self._weights[: piece.size]
            np.maximum(piece, self._threshold, out=weights)  # smaller ones have no weight, and could overflow
            np.subtract(weights, self._largest, weights)
            np.multiply(weights, self._factor, weights)
            np.exp(weights, weights)
            total += float(weights.dot(self._ones[: weights.size]))
        return total

    def _draw_of_weights(self, token_ids: TokenIds, weights: Logits, lowest: float, target: float) -> int | None:
        """Draw from the fewest largest weights that reach a target, as far as min-p keeps them.

        The border is found by halving the range that it lies in, on a logarithmic scale.
        """
        near, highest, count, reached = weights, 1.0, 0, 0.0
        while near.size > _LISTED_AFTER_HALVING:
            middle = math.sqrt(lowest * highest)
            if highest - middle < _SLACK * highest:
                return None  # too many are equal
            self._threshold_view[()] = middle
            larger = near[np.greater_equal(near, self._threshold).nonzero()[0]]
            mass = float(larger.dot(self._ones[: larger.size]))
            if reached + mass >= target:
                near, lowest = larger, middle
            else:
                near, highest = near[np.less(near, self._threshold).nonzero()[0]], middle
                count, reached = count + larger.size, reached + mass
        ranked = sorted(near.tolist(), reverse=True)
        last = bisect_left(list(accumulate(ranked, initial=reached)), target)
        border = ranked[min(last, len(ranked)) - 1]
        self._threshold_view[()] = max(border, self._min_p)
        kept = np.greater_equal(weights, self._threshold).nonzero()[0]
        if kept.size > count + last:
            return None  # equal ones lie across the border
        ends = list(accumulate(weights[kept].tolist()))
        return token_ids.item(kept.item(bisect_right(ends, self._uniform.draw() * ends[-1])))

    def _logit_of(self, weight: float, largest: float) -> float:
        """Return the logit of a weight, or a little less: weights and logits are rounded to 1e-7 of them."""
        return largest + self._temperature * (math.log(weight) - _SLACK) - _SLACK * abs(largest)
