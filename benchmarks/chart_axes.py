"""Where values lie on an axis, and which of them get a tick."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Scale:
    """A mapping of values to places.

    Attributes:
        first: The value at `start`.
        last: The value at `stop`.
        start: A place in the drawing.
        stop: Another one.
        ticks: Round values between the two.
        logarithmic: Whether equal ratios, and not equal differences, are equally long.
    """

    first: float
    last: float
    start: float
    stop: float
    ticks: tuple[float, ...]
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value."""
        if self.logarithmic:
            share = math.log(max(value, self.first) / self.first) / math.log(self.last / self.first)
        else:
            share = (value - self.first) / (self.last - self.first)
        return self.start + share * (self.stop - self.start)


def linear_scale(first: float, last: float, start: float, stop: float) -> Scale:
    """Return a scale that ends on a round value and has about five ticks."""
    last = max(last, first + 1e-9)
    step = round_step((last - first) / 5)
    top = first + step * math.ceil((last - first) / step - 1e-9)
    count = round((top - first) / step)
    return Scale(first, top, start, stop, tuple(first + step * index for index in range(count + 1)))


def logarithmic_scale(first: float, last: float, start: float, stop: float) -> Scale:
    """Return a scale from a round value to a round value, with ticks at 1, 2 and 5 times the powers of ten."""
    steps = [base * 10.0**power for power in range(-6, 10) for base in (1, 2, 5)]
    below = max((step for step in steps if step <= first), default=steps[0])
    above = min((step for step in steps if step >= last and step > below), default=steps[-1])
    ticks = tuple(step for step in steps if below <= step <= above)
    if len(ticks) > 8:
        ticks = tuple(tick for tick in ticks if f"{tick:e}".startswith("1"))
    return Scale(below, above, start, stop, ticks, logarithmic=True)


def round_step(roughly: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below a number."""
    power = 10.0 ** math.floor(math.log10(roughly))
    return next(base * power for base in (1, 2, 5, 10) if base * power >= roughly * (1 - 1e-9))


def tick_text(value: float) -> str:
    """Write a tick without needless digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"
