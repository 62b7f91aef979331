"""A measured number with its spread, and what may be said about two of them.

One rule decides everywhere whether a difference is real: there are three samples or more of each, and the intervals
mean ± sample standard deviation do not overlap. Without that, no ratio is printed and no verdict is given.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

DISTURBED_SPREAD: Final = 0.10
FEWEST_SAMPLES: Final = 3  # the deviation of two says next to nothing: they are near each other by chance often


@dataclass(frozen=True, slots=True)
class Measurement:
    """Samples of one quantity, one for each repetition.

    Attributes:
        mean: Arithmetic mean of the samples.
        stddev: Sample standard deviation (n - 1), as llama-bench prints it; None for a single sample.
        samples: In the order they were taken.
    """

    mean: float
    stddev: float | None
    samples: tuple[float, ...]

    @property
    def relative_spread(self) -> float | None:
        """Standard deviation as a fraction of the mean; None if there is none."""
        return None if self.stddev is None or not self.mean else self.stddev / abs(self.mean)

    @property
    def disturbed(self) -> bool:
        """Whether the spread is above 10 %: something else was using the machine, or it changed its clock."""
        return self.relative_spread is not None and self.relative_spread > DISTURBED_SPREAD


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as large one quantity is as another, and the range that their spreads allow."""

    value: float
    lowest: float
    highest: float

    def __str__(self) -> str:
        """Two digits if they are known; otherwise the range."""
        if self.highest - self.lowest <= 2 * DISTURBED_SPREAD * self.value:
            return f"{two_digits(self.value)} x"
        return f"{two_digits(self.lowest)} to {two_digits(self.highest)} x"


def measurement(samples: Sequence[float]) -> Measurement:
    """Summarize samples, of which there must be at least one."""
    stddev = statistics.stdev(samples) if len(samples) > 1 else None
    return Measurement(statistics.fmean(samples), stddev, tuple(samples))


def supported_ratio(one: Measurement | None, other: Measurement | None) -> Ratio | None:
    """Return `one / other` if the spreads support that they differ at all; None if not, or if one is missing."""
    if one is None or other is None or one.stddev is None or other.stddev is None:
        return None
    if min(len(one.samples), len(other.samples)) < FEWEST_SAMPLES:
        return None
    if abs(one.mean - other.mean) <= one.stddev + other.stddev:
        return None
    smallest_other = other.mean - other.stddev
    if min(one.mean - one.stddev, smallest_other) <= 0:
        return None
    return Ratio(
        one.mean / other.mean,
        (one.mean - one.stddev) / (other.mean + other.stddev),
        (one.mean + one.stddev) / smallest_other,
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """Return a percentile by linear interpolation between the two nearest samples, as numpy does by default."""
    ordered = sorted(samples)
    place = percent / 100 * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def two_digits(value: float) -> str:
    """Write a number with two significant digits: 5.1, 0.93, 24; from 100 on, as a whole number."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}" if value > 0 else "0"
