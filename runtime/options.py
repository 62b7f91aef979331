"""The options of a generation: one frozen, validated object that travels along unchanged."""

import difflib
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Final, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from gpt2_edge.errors import OptionError

MAXIMUM_SEED: Final = 2**64 - 1
_LONGEST_SHOWN: Final = 60  # characters of a value in a message

# Sees the prompt's and the continuation's tokens so far, and changes the logits, shape [vocabulary], in place.
LogitsProcessor = Callable[[Sequence[int], npt.NDArray[np.float32]], None]
Overflow = Literal["stop", "slide"]


class OptionKeywords(TypedDict, total=False):
    """The keyword arguments of `generate` and `stream`; `GenerationOptions` explains them."""

    max_new_tokens: int
    min_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    no_repeat_ngram_size: int
    logit_bias: Mapping[int, float]
    banned_tokens: Collection[int]
    logits_processor: LogitsProcessor | None
    seed: int | None
    stop: Collection[str]
    stop_tokens: Collection[int]
    ignore_eos: bool
    logprobs: int | None
    overflow: Overflow
    keep_tokens: int
    deadline_seconds: float | None
    cancel: threading.Event | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """How to continue a prompt; `docs/sampling.md` is the specification of how a token is chosen.

    Attributes:
        max_new_tokens: Stop after this many tokens; 0 generates nothing.
        min_new_tokens: Neither end-of-text nor a stop token is chosen before so many tokens, and stop texts in them
            do not end the continuation.
        temperature: 0 takes the likeliest token (greedy); above 0 the logits are divided by it and a token is
            drawn. None means 1 if another option that narrows the draw is given, and greedy if none is.
        top_k: Draw from the k likeliest tokens only; None or 0 from all.
        top_p: Draw from the smallest set of likeliest tokens whose probabilities add up to at least this; the
            token that crosses the border is in the set, so at least one always is. None or 1 means all.
        min_p: Draw from the tokens that are at least this fraction as likely as the likeliest; one that is exactly
            as likely is kept. None or 0 means all.
        typical_p: Draw from the tokens whose information is closest to the distribution's entropy, as many as it
            takes to reach this probability. None or 1 means all.
        repetition_penalty: Divides positive and multiplies negative logits of tokens that occur in the prompt or
            the continuation, once for each token; above 0, 1 is off.
        presence_penalty: Subtracted from the logits of tokens that occur in the continuation.
        frequency_penalty: Subtracted from the logits of tokens for each time they occur in the continuation.
        no_repeat_ngram_size: No sequence of so many tokens occurs twice in prompt and continuation; 0 is off.
        logit_bias: Added to the logits of these tokens.
        banned_tokens: Are never chosen.
        logits_processor: Called with all tokens so far and the logits, which it may change in place; returns nothing.
        seed: Makes the drawing repeatable, 0 to 2**64 - 1; None draws a seed, which the result reports.
        stop: Texts that end the continuation; they are not part of it.
        stop_tokens: Tokens that end the continuation; they are not part of it.
        ignore_eos: Go on after an end-of-text token, as if it were any other.
        logprobs: Report for each token its log-probability and those of this many likeliest tokens, from the
            model's own distribution before any of these options; None reports none.
        overflow: When the context is full, "stop" ends the continuation; "slide" forgets the oldest tokens, computes
            the last half of the context again at fresh positions, and goes on.
        keep_tokens: With "slide", and only there: so many of the prompt's first tokens are never forgotten.
        deadline_seconds: Ends the continuation so long after the call; None never.
        cancel: Ends the continuation when another thread sets it.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_tokens: Collection[int] = ()
    logits_processor: LogitsProcessor | None = None
    seed: int | None = None
    stop: Collection[str] = ()
    stop_tokens: Collection[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    overflow: Overflow = "stop"
    keep_tokens: int = 0
    deadline_seconds: float | None = None
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens", "no_repeat_ngram_size", "keep_tokens"):
            self._keep(name, checked_integer(name, getattr(self, name), 0, None))
        for name in ("top_k", "logprobs"):
            if getattr(self, name) is not None:
                self._keep(name, checked_integer(name, getattr(self, name), 0, None))
        if self.temperature is not None:
            self._keep_number("temperature", 0.0, math.inf, "0 (greedy) or any number above it")
        for name in ("top_p", "min_p", "typical_p"):
            if getattr(self, name) is not None:
                self._keep_number(name, 0.0, 1.0, "a number from 0 to 1")
        self._keep_number("repetition_penalty", 1e-6, 1e6, "a number above 0; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            self._keep_number(name, -math.inf, math.inf, "a number; 0 is off")
        if self.deadline_seconds is not None:
            self._keep_number("deadline_seconds", 0.0, math.inf, "seconds, 0 or more")
        if self.seed is not None:
            self._keep("seed", checked_integer("seed", self.seed, 0, MAXIMUM_SEED))
        if not isinstance(self.ignore_eos, bool):
            raise OptionError(f"ignore_eos is {self.ignore_eos!r}: give True or False")
        if self.overflow not in ("stop", "slide"):
            raise OptionError(f"overflow is {self.overflow!r}: give 'stop' or 'slide'")
        if self.keep_tokens and self.overflow != "slide":
            raise OptionError(
                f"keep_tokens is {shown(self.keep_tokens)} and overflow is {self.overflow!r}, which forgets no tokens: "
                "give overflow 'slide' with it, or leave keep_tokens out"
            )
        if self.logits_processor is not None and not callable(self.logits_processor):
            raise OptionError(f"logits_processor is {self.logits_processor!r}: give a function of tokens and logits")
        if self.cancel is not None and not isinstance(self.cancel, threading.Event):
            raise OptionError(f"cancel is {self.cancel!r}: give a threading.Event")
        # Kept as what cannot be changed any more.
        self._keep("stop", _texts("stop", self.stop))
        for name in ("banned_tokens", "stop_tokens"):
            self._keep(name, _token_ids(name, getattr(self, name)))
        self._keep("logit_bias", _biases(self.logit_bias))

    def _keep_number(self, name: str, minimum: float, maximum: float, allowed: str) -> None:
        self._keep(name, _checked_number(name, getattr(self, name), minimum, maximum, allowed))

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    @property
    def effective_temperature(self) -> float:
        """The temperature that is used: see `temperature`."""
        if self.temperature is not None:
            return self.temperature
        narrows = self.top_k or any(value is not None for value in (self.top_p, self.min_p, self.typical_p))
        return 1.0 if narrows else 0.0


def make_options(keywords: OptionKeywords) -> GenerationOptions:
    """Make validated options from keyword arguments.

    Raises:
        OptionError: A name is unknown or a value is not allowed.
    """
    known = [field.name for field in fields(GenerationOptions)]
    for name in keywords:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            meant = f": did you mean {close[0]}?" if close else "."
            raise OptionError(f"unknown option {name}{meant} The options are {', '.join(known)}")
    return GenerationOptions(**keywords)


def checked_integer(name: str, value: Any, minimum: int, maximum: int | None) -> int:
    """Return an integer, also one of numpy's, as one of Python's: which neither overflows nor fails to become JSON.

    Args:
        name: Of the option.
        value: What was given for it.
        minimum: The smallest that is allowed.
        maximum: The largest; None if there is none.

    Raises:
        OptionError: It is no integer, or not allowed.
    """
    allowed = f"an integer, {minimum} or more" if maximum is None else f"an integer from {minimum} to {maximum}"
    # bool is an int in Python, and True tokens is surely a mistake
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise OptionError(f"{name} is {shown(value)}: give {allowed}")
    number = int(value)
    if number < minimum or (maximum is not None and number > maximum):
        raise OptionError(f"{name} is {shown(number)}: give {allowed}")
    return number


def shown(value: object) -> str:
    """Return a value as a message shows it, on one line that is not too long."""
    try:
        text = repr(value.item() if isinstance(value, np.generic) else value)
    except ValueError:  # Python does not write integers of thousands of digits
        return f"{type(value).__name__} of too many digits"
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 3] + "..."


def _checked_number(name: str, value: Any, minimum: float, maximum: float, allowed: str) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise OptionError(f"{name} is {shown(value)}: give {allowed}")
    try:
        number = float(value)
    except OverflowError:  # an integer can be too large for a float
        number = math.inf
    if not (minimum <= number <= maximum and math.isfinite(number)):
        raise OptionError(f"{name} is {shown(value)}: give {allowed}")
    return number


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else _elements(value)
    if texts is None or not all(isinstance(text, str) and text for text in texts):
        raise OptionError(f"{name} is {value!r}: give a text or a list of texts, none of them empty")
    if not all(map(_is_unicode, texts)):
        raise OptionError(f"{name} is {value!r}, which no text has in it: give valid Unicode, without a lone surrogate")
    return tuple(map(str, texts))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    tokens = _elements(value)
    if tokens is None:
        raise OptionError(f"{name} is {value!r}: give a list of token ids")
    return tuple(checked_integer(name, token, 0, None) for token in tokens)


def _elements(value: Any) -> list[Any] | None:
    """Return the elements of a list, a set or an array, in an order that does not change; None if it is none."""
    if isinstance(value, np.ndarray):
        return value.tolist() if value.ndim == 1 else None
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray) else None


def _biases(value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias is {value!r}: give a mapping from token ids to numbers")
    allowed = "a finite number; banned_tokens forbids"
    return {
        checked_integer("a token of logit_bias", token, 0, None): _checked_number(
            "a number of logit_bias", bias, -math.inf, math.inf, allowed
        )
        for token, bias in value.items()
    }
