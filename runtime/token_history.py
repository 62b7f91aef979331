"""What has been said so far, kept up token by token for the options that look back."""

import sys
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_FIRST_CAPACITY: Final = 256


class TokenHistory:
    """Which tokens a prompt and its continuation hold, how often the continuation does, and what followed what.

    Args:
        prompt: Tokens of the prompt.
        ngram_size: Length of the sequences that must not occur twice; 0 if they may.
    """

    def __init__(self, prompt: Sequence[int], ngram_size: int) -> None:
        self._prompt = list(prompt)
        self._continuation: list[int] = []
        self._ngram_size = ngram_size
        self._slots: dict[int, int] = {}  # where in the two arrays a token is
        self._tokens = np.empty(_FIRST_CAPACITY, np.int64)
        self._times = np.zeros(_FIRST_CAPACITY)
        self._followers: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._latest: deque[int] = deque(maxlen=min(max(0, ngram_size - 1), sys.maxsize))
        for token in self._prompt:
            self._add(token, times=0)

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        """Every token of prompt and continuation once."""
        return self._tokens[: len(self._slots)]

    @property
    def times(self) -> npt.NDArray[np.float64]:
        """How often each of `tokens` occurs in the continuation."""
        return self._times[: len(self._slots)]

    @property
    def completions(self) -> list[int]:
        """The tokens that would complete a sequence of `ngram_size` tokens that has occurred before."""
        return self._followers.get(tuple(self._latest), [])

    def grows_to(self, prompt: Sequence[int], continuation: Sequence[int]) -> bool:
        """Tell whether the prompt is the same, and the continuation begins with the tokens known so far.

        All of them are compared, which takes less time than a step of numpy: a thousand in a microsecond or two.
        """
        return list(prompt) == self._prompt and list(continuation[: len(self._continuation)]) == self._continuation

    def grow_to(self, continuation: Sequence[int]) -> None:
        """Add the new tokens of a continuation that begins with those known so far."""
        for token in continuation[len(self._continuation) :]:
            self._continuation.append(token)
            self._add(token, times=1)

    def _add(self, token: int, times: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
            self._times = np.concatenate([self._times, np.zeros_like(self._times)])
        self._tokens[slot] = token
        self._times[slot] += times
        if self._ngram_size:
            # At the start the key is shorter; such a one is never looked up again.
            self._followers[tuple(self._latest)].append(token)
            self._latest.append(token)
