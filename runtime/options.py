"""The options of a generation: one frozen, validated object that travels along unchanged."""

import difflib
import math
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from gpt2_edge.errors import OptionError

MAXIMUM_SEED = 2**64 - 1


class OptionKeywords(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`; `GenerationOptions` explains them."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    seed: int | None
    ignore_eos: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt.

    Attributes:
        max_new_tokens: Stop after this many tokens; 0 generates nothing.
        temperature: 0 takes the likeliest token (greedy); above 0 the logits are divided by it and a token is
            drawn. None means 1 if another sampling option is given, and greedy if none is.
        top_k: Draw from the k likeliest tokens only; None or 0 from all.
        top_p: Draw from the smallest set of likeliest tokens whose probabilities add up to at least this; the
            token that crosses the border is in the set, so at least one always is. None or 1 means all.
        seed: Makes the drawing repeatable, 0 to 2**64 - 1; None draws a seed, which the result reports.
        ignore_eos: Go on after an end-of-text token, as if it were any other.
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_integer("max_new_tokens", self.max_new_tokens, 0, None)
        if self.temperature is not None:
            _check_number("temperature", self.temperature, 0.0, math.inf, "0 (greedy) or any number above it")
        if self.top_k is not None:
            _check_integer("top_k", self.top_k, 0, None)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, 0.0, 1.0, "a number from 0 to 1")
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, MAXIMUM_SEED)
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos is {self.ignore_eos!r}: give True or False")

    @property
    def effective_temperature(self) -> float:
        """The temperature that is used: see `temperature`."""
        if self.temperature is not None:
            return float(self.temperature)
        return 1.0 if self.top_k or self.top_p is not None else 0.0


def make_options(keywords: OptionKeywords) -> GenerationOptions:
    """Make validated options from keyword arguments.

    Raises:
        OptionError: A name is unknown or a value is not allowed.
    """
    known = [field.name for field in fields(GenerationOptions)]
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f": did you mean {close[0]}?" if close else ""
            raise OptionError(f"unknown option {name}{meant} The options are {', '.join(known)}")
    return GenerationOptions(**keywords)


def _check_integer(name: str, value: Any, minimum: int, maximum: int | None) -> None:
    allowed = f"an integer, {minimum} or more" if maximum is None else f"an integer from {minimum} to {maximum}"
    # bool is an int in Python, and True tokens is surely a mistake
    if not isinstance(value, int) or isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}: give {allowed}")
    if value < minimum or (maximum is not None and value > maximum):
        raise OptionError(f"{name} is {value}: give {allowed}")


def _check_number(name: str, value: Any, minimum: float, maximum: float, allowed: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise OptionError(f"{name} is {value!r}: give {allowed}")
    if not (minimum <= value <= maximum and math.isfinite(value)):
        raise OptionError(f"{name} is {value}: give {allowed}")
