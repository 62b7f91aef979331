"""The options that the REPL's replies are written with: shown, and changed from what a user types."""

import difflib
import json
from typing import Any, Final, cast

from gpt2_edge.errors import OptionError
from gpt2_edge.options import OptionKeywords, make_options

# Varied but not wild, a paragraph at a time, and a story may be longer than the context.
STORY_OPTIONS: Final[OptionKeywords] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.95,
    "max_new_tokens": 60,
    "overflow": "slide",
}

# All that are a number, a switch or a text; the others are for programs.
OPTION_NAMES: Final = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "seed",
    "max_new_tokens",
    "min_new_tokens",
    "stop",
    "ignore_eos",
    "overflow",
    "keep_tokens",
    "deadline_seconds",
)

_AS_IF_NOT_GIVEN: Final = ("off", "none", "null", "default", "false", "no")
_SWITCHED_ON: Final = ("on", "true", "yes")


class Settings:
    """Options by name, always a valid set of them.

    They are typed one after another, so `keep_tokens` may come before the `overflow` that it belongs to, or outlast it.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = dict(STORY_OPTIONS)

    def set(self, name: str, text: str) -> None:
        """Change an option to what a user typed; "off" takes it out, as if it had never been given.

        Raises:
            OptionError: There is no such option, or the value is not allowed; nothing is changed.
        """
        _check_name(name)
        changed = {other: value for other, value in self._values.items() if other != name}
        if text.lower() not in _AS_IF_NOT_GIVEN:
            changed[name] = _stop_texts(text) if name == "stop" else _value(text)
        _checked(name, changed)
        self._values = changed

    def show(self, name: str) -> str:
        """Return an option's value as it would be typed.

        Raises:
            OptionError: There is no such option.
        """
        _check_name(name)
        return _shown(_checked(name, self._values))

    def keywords(self) -> OptionKeywords:
        """Return the options that were given and count, as arguments of `generate`."""
        given = dict(self._values)
        if self.keep_tokens_waits:
            del given["keep_tokens"]
        return cast(OptionKeywords, given)

    @property
    def keep_tokens_waits(self) -> bool:
        """Whether `keep_tokens` was given, and does not count as long as nothing is forgotten."""
        return "keep_tokens" in self._values and self._values.get("overflow") != "slide"

    @property
    def are_greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that nothing is drawn."""
        return make_options(self.keywords()).effective_temperature == 0

    def summary(self) -> str:
        """Return the options that were given in one line."""
        return ", ".join(f"{name} {self.show(name)}" for name in OPTION_NAMES if name in self._values)


def _check_name(name: str) -> None:
    if name not in OPTION_NAMES:
        close = difflib.get_close_matches(name, OPTION_NAMES, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise OptionError(f"there is no option {name}: {meant}:set alone shows all")


def _checked(name: str, values: dict[str, Any]) -> Any:
    """Return what an option is, given or not, or raise OptionError; it is checked by itself."""
    alone = {name: values[name]} if name in values else {}
    if name == "keep_tokens":
        alone["overflow"] = "slide"
    return getattr(make_options(cast(OptionKeywords, alone)), name)


def _value(text: str) -> Any:
    """Return the number or switch that a text stands for, or the text: whether it is allowed is checked later."""
    if text.lower() in _SWITCHED_ON:
        return True
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _stop_texts(text: str) -> Any:
    """Return a text as it is, or what it says in JSON, which can express newlines and several texts."""
    if not text.startswith(('"', "[")):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(f'stop is {text}: give a text, or JSON such as "\\n\\n" or ["\\n", "The end"]') from error


def _shown(value: Any) -> str:
    if value is None or value is False or value == ():
        return "off"
    if value is True:
        return "on"
    if isinstance(value, tuple):
        return json.dumps(value[0] if len(value) == 1 else value, ensure_ascii=False)
    return str(value)
