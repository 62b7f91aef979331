"""The random numbers of one continuation."""

from typing import Final

import numpy as np

_NUMBERS_PER_COUNT: Final = 4  # of Philox 4x64
_NUMBERS_AT_ONCE: Final = 64  # because numpy's generator has to come back into the caches for each call


class RandomUniform:
    """A stream of numbers in [0, 1) that depends on nothing but the seed and the position in the stream.

    Philox 4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), whose raw output numpy keeps the
    same in all versions and on all platforms.

    Args:
        seed: Which stream.
        position: How many of its numbers to skip.

    Attributes:
        position: How many numbers of the stream came before the next one.
    """

    def __init__(self, seed: int, position: int = 0) -> None:
        self._philox = np.random.Philox(key=seed)
        self.position = position
        counts, numbers = divmod(position, _NUMBERS_PER_COUNT)
        self._philox.advance(counts)
        self._ahead: list[int] = []  # the next one is the last
        for _ in range(numbers):
            self.draw()
        self.position = position

    def draw(self) -> float:
        """Return the next number, a multiple of 2**-53."""
        if not self._ahead:
            self._ahead = self._philox.random_raw(_NUMBERS_AT_ONCE)[::-1].tolist()
        self.position += 1
        return (self._ahead.pop() >> 11) * 2.0**-53
