"""What the REPL reads: lines, continued lines and blocks, from a terminal or a pipe."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from gpt2_edge.commands.arguments import decode_utf8
from gpt2_edge.errors import OptionError, PromptError

_PROMPT: Final = "> "
_PROMPT_INSIDE: Final = "| "
_BLOCK_MARK: Final = '"""'
_COMMAND: Final = re.compile(r":([a-z]\S*)(?:\s+(.*))?$")
_HISTORY_LINES: Final = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """What was typed.

    Attributes:
        text: Of the story, or after the command.
        command: The command's name; None if it is text.
        exactly: Whether the text was in a block, which is appended as it stands.
    """

    text: str
    command: str | None = None
    exactly: bool = False


class Reader:
    """Reads entries until the input ends.

    Args:
        history: A file that keeps lines from one session to the next; None keeps them in memory.
        words: What the Tab key completes after a colon or in a command.

    Attributes:
        interactive: Whether a person types at a terminal.

    Raises:
        OptionError: The history file cannot be used.
    """

    def __init__(self, history: Path | None, words: Sequence[str]) -> None:
        self.interactive = sys.stdin.isatty()
        self._history = history
        # Editing needs both ends of the terminal. It is imported here, because importing it is felt by terminals.
        self._readline = _import_readline() if self.interactive and sys.stdout.isatty() else None
        if self._readline is not None:
            _set_up_completion(self._readline, words)
        if history is not None and self.interactive:
            self._read_history(history)

    def read(self) -> Entry:
        """Read one entry.

        Raises:
            EOFError: The input has ended.
            KeyboardInterrupt: Ctrl-C was pressed; what was typed so far is dropped.
            PromptError: It is not UTF-8, or a block has no end.
        """
        line = self._read_line(_PROMPT)
        if found := _COMMAND.match(line):
            return Entry((found[2] or "").strip(), command=found[1])
        if line.startswith(_BLOCK_MARK):
            return Entry(self._read_block(line.removeprefix(_BLOCK_MARK)), exactly=True)
        while line.endswith("\\"):
            line = line[:-1] + "\n" + self._read_line(_PROMPT_INSIDE)
        return Entry(line)

    def close(self) -> None:
        """Write the history file.

        Raises:
            OptionError: It cannot be written.
        """
        if self._history is None or self._readline is None:
            return
        try:
            self._readline.write_history_file(str(self._history))
        except OSError as error:
            raise OptionError(f"cannot write the history to {self._history}: {error.strerror or error}") from error

    def _read_block(self, text: str) -> str:
        while not text.rstrip().endswith(_BLOCK_MARK):
            try:
                text += "\n" + self._read_line(_PROMPT_INSIDE)
            except EOFError as error:
                if self.interactive:
                    print(file=sys.stderr)  # after the prompt
                raise PromptError(f"the input ended inside a block: end it with {_BLOCK_MARK}") from error
        # The newlines beside the marks end lines, and are not part of the block.
        return text.rstrip().removesuffix(_BLOCK_MARK).removeprefix("\n").removesuffix("\n")

    def _read_line(self, prompt: str) -> str:
        if not self.interactive:
            return _read_piped_line()
        try:
            if self._readline is not None or sys.stdout.isatty():
                return input(prompt)
            # The story goes somewhere else: the prompt does not belong to it.
            print(prompt, end="", file=sys.stderr, flush=True)
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise PromptError(f"what was typed is not {error.encoding}: {error.reason}") from error
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _read_history(self, path: Path) -> None:
        if self._readline is None:
            raise OptionError("--history needs Python's readline module and a terminal: leave it out")
        self._readline.set_history_length(_HISTORY_LINES)
        try:
            if path.exists():
                self._readline.read_history_file(str(path))
        except OSError as error:
            raise OptionError(f"cannot read the history in {path}: {error.strerror or error}") from error


def _read_piped_line() -> str:
    data = sys.stdin.buffer.readline()
    if not data:
        raise EOFError
    return decode_utf8(data, "standard input").rstrip("\r\n")


def _import_readline() -> Any:
    try:
        return import_module("readline")
    except ImportError:  # there is none on Windows
        return None


def _set_up_completion(readline: Any, words: Sequence[str]) -> None:
    def complete(start: str, number: int) -> str | None:
        in_command = readline.get_line_buffer().startswith(":") and start
        fitting = [f"{word} " for word in words if word.startswith(start)] if in_command else []
        return fitting[number] if number < len(fitting) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
