"""Break lines between words while a text is still being written."""

import re
import unicodedata
from collections.abc import Callable
from typing import Final

_PARTS: Final = re.compile(r"\n|[^\S\n]+|\S+")


class WordWrapper:
    """Turns pieces of a text into what a terminal is to be sent, a word at a time.

    The last word of a piece is held back until it is known to be whole. Where a line is broken the break takes the
    place of the spaces.

    Args:
        width: Tells how many columns there are now.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        self._width = width
        self._held = ""
        self._spaces = ""
        self._column = 0

    def add(self, text: str) -> str:
        """Return what can be written now."""
        parts: list[str] = _PARTS.findall(self._held + text)
        self._held = parts.pop() if parts and not parts[-1].isspace() else ""
        return "".join(map(self._place, parts))

    def finish(self) -> str:
        """Return what is left, and begin anew."""
        rest = self._place(self._held) + self._spaces
        self._held, self._spaces, self._column = "", "", 0
        return rest

    def _place(self, part: str) -> str:
        if part == "\n":
            self._spaces, self._column = "", 0
            return part
        if part.isspace():
            self._spaces += part
            return ""
        spaces, self._spaces = self._spaces, ""
        columns = _columns(part)
        if self._column and self._column + len(spaces) + columns > self._width():
            self._column = columns
            return "\n" + part
        self._column += len(spaces) + columns
        return spaces + part


def _columns(word: str) -> int:
    """Return how wide a terminal shows a word."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in word)
    return len(word) + wide - sum(map(bool, map(unicodedata.combining, word)))
