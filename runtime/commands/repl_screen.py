"""What the REPL shows: the story on standard output, everything else on standard error."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from typing import Final, TextIO

from gpt2_edge.commands.repl_wrap import WordWrapper
from gpt2_edge.results import Generation, NextToken

_FAINT: Final = "\x1b[2m"
_RED: Final = "\x1b[31m"
_PLAIN: Final = "\x1b[0m"

# A model may write any character: those that would steer the terminal are shown as pictures of themselves.
_PICTURES: Final = {
    **{code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0xFFFD),
}
_ENDINGS: Final = {
    "length": "max_new_tokens reached",
    "eos": "the model ended the text",
    "stop": "stopped by {stop!r}",
    "context": "the context is full: `:set overflow slide` goes on",
    "cancelled": "interrupted",
    "deadline": "deadline_seconds reached",
}
_NARROWEST_TERMINAL: Final = 20
_NARROWEST_COLUMN: Final = 24
_WIDEST_BAR: Final = 40


class Screen:
    """Writes to the standard streams, with colours and notes for people only."""

    def __init__(self) -> None:
        self._output_is_terminal = sys.stdout.isatty()
        self._notes_are_read = sys.stderr.isatty()
        self._at_line_start = True
        self._skips_spaces = False
        self._wrapper = WordWrapper(terminal_width)

    def begin_reply(self) -> None:
        """Say that a reply follows."""
        # On a terminal it stands in a line of its own, where the space that separates it looks like a mistake.
        self._skips_spaces = self._output_is_terminal

    def write(self, text: str) -> None:
        """Write text of the story."""
        if self._skips_spaces:
            text = text.lstrip(" ")
            self._skips_spaces = not text
        if self._output_is_terminal:
            text = self._wrapper.add(text.translate(_PICTURES))
        self._print(text)

    def end_text(self, interrupted: bool = False) -> None:
        """End a text with a newline, in a pipe also where the text itself ends with one.

        Args:
            interrupted: By Ctrl-C, which the terminal shows after the text.
        """
        self._print(self._wrapper.finish())
        if interrupted or not self._at_line_start or not self._output_is_terminal:
            self._print("\n")

    def break_off(self) -> None:
        """Write what is held back of a text, so that something else can follow."""
        self._print(self._wrapper.finish())
        if self._output_is_terminal and not self._at_line_start:
            self._print("\n")

    def lines(self, lines: Iterable[str]) -> None:
        """Write lines that are results."""
        for line in lines:
            print(line)
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something that only a person at a terminal wants to know."""
        if self._notes_are_read:
            lines = [textwrap.fill(line, terminal_width()) for line in text.translate(_PICTURES).split("\n")]
            print(_coloured("\n".join(lines), _FAINT, sys.stderr), file=sys.stderr, flush=True)

    def error(self, error: object) -> None:
        """Say what was wrong, in one line."""
        text = " ".join(str(error).split("\n"))
        print(_coloured(f"gpt2-edge: {text.translate(_PICTURES)}", _RED, sys.stderr), file=sys.stderr, flush=True)

    def status(self, reply: Generation) -> None:
        """Note how a reply went."""
        count = len(reply.tokens)
        parts = [f"{count} token{'' if count == 1 else 's'}"]
        if reply.timings.decoded_tokens:
            parts.append(f"{reply.timings.decode_tokens_per_second:.0f} tokens/s")
        parts.append(_ENDINGS[reply.finish_reason].format(stop=reply.stop))
        self.note(f"[{', '.join(parts)}]")

    def next_tokens(self, tokens: list[NextToken]) -> None:
        """Write a numbered list of tokens with bars."""
        texts = [_quoted(token.text) for token in tokens]
        text_width = max(map(len, texts))
        number_width = len(str(len(tokens)))
        room = terminal_width() - number_width - text_width - len("  000.00 %    ")
        bar_width = min(_WIDEST_BAR, max(0, room))
        for number, (token, text) in enumerate(zip(tokens, texts, strict=True), start=1):
            bar = _bar(token.probability / max(tokens[0].probability, 1e-9), bar_width)
            line = f"{number:{number_width}}  {100 * token.probability:6.2f} %  {text:<{text_width}}  {bar}"
            self.lines([line.rstrip()])

    def _print(self, text: str) -> None:
        if text:
            print(text, end="", flush=True)
            self._at_line_start = text.endswith("\n")

    def table(self, rows: Iterable[tuple[str, str]]) -> None:
        """Write two columns, the second wrapped to the terminal's width."""
        rows = list(rows)
        indent = max(len(left) for left, _ in rows) + 2
        if terminal_width() - indent < _NARROWEST_COLUMN:
            indent = 2  # the second goes below the first
        for left, right in rows:
            wrapped = textwrap.wrap(right, terminal_width() - indent, break_on_hyphens=False)
            if len(left) + 2 <= indent and wrapped:
                self.lines([f"{left:<{indent}}{wrapped.pop(0)}"])
            else:
                self.lines([left])
            self.lines(" " * indent + line for line in wrapped)


def terminal_width() -> int:
    """Return how many columns there are; 80 if that is unknown."""
    return max(_NARROWEST_TERMINAL, shutil.get_terminal_size().columns)


def _quoted(text: str) -> str:
    """Return a token's text on one line, with its spaces to be seen."""
    escaped = (
        text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    )
    return f'"{escaped.translate(_PICTURES)}"'


def _bar(fraction: float, width: int) -> str:
    try:
        "█".encode(sys.stdout.encoding)
    except (UnicodeEncodeError, LookupError):
        return "#" * round(width * fraction)
    return "█" * round(width * fraction)


def _coloured(text: str, colour: str, stream: TextIO) -> str:
    return f"{colour}{text}{_PLAIN}" if _takes_colours(stream) else text


def _takes_colours(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return False
    # The old console of Windows shows the codes themselves.
    return sys.platform != "win32" or "WT_SESSION" in os.environ
