"""The REPL's commands: what they are called, what follows them, what they are for."""

import difflib
from dataclasses import dataclass
from typing import Final

from gpt2_edge.errors import OptionError


@dataclass(frozen=True, slots=True)
class Command:
    """A command, without what it does.

    Attributes:
        name: Typed after a colon.
        follows: What is typed after it; in brackets if it may be left out.
        purpose: What it is for, in a few words.
    """

    name: str
    follows: str
    purpose: str


COMMANDS: Final = (
    Command("help", "", "show this"),
    Command("undo", "", "take back the last turn: what was typed, and the reply"),
    Command("retry", "", "take back the last reply and write another"),
    Command("next", "[K]", "show the K likeliest next tokens (10); a number then picks one"),
    Command("pick", "N", "append the Nth of them"),
    Command("set", "[NAME [VALUE]]", "show or change the options of replies; the value off takes one out"),
    Command("text", "[FILE]", "show the whole text, or write it to a new file"),
    Command("save", "FILE", "write the session to a file"),
    Command("load", "FILE", "go on with a session that was saved"),
    Command("new", "", "begin a new text; :undo brings the old one back"),
    Command("quit", "", "leave, as Ctrl-D does"),
)
_TYPING: Final = (
    ("text", "is appended, and continued by the model"),
    ("Enter", "alone lets the model go on"),
    ("\\", "at the end of a line: the text goes on in the next"),
    ('"""', "begins and ends a block of lines, appended exactly as it stands"),
    ("Ctrl-C", "stops a reply; what was written stays"),
)


def help_rows() -> list[tuple[str, str]]:
    """Return everything that can be typed, and what it is for."""
    return [*_TYPING, *((f":{command.name} {command.follows}".rstrip(), command.purpose) for command in COMMANDS)]


def find_command(typed: str, argument: str) -> Command:
    """Return the command that a name means, which may be shortened as long as it means one only.

    Args:
        typed: The name, without the colon.
        argument: What follows it.

    Raises:
        OptionError: There is no such command, or it cannot be followed by that.
    """
    fitting = [command for command in COMMANDS if command.name.startswith(typed)]
    exact = [command for command in fitting if command.name == typed]
    if len(exact or fitting) != 1:
        names = [command.name for command in fitting or COMMANDS]
        close = names if fitting else difflib.get_close_matches(typed, names, n=1)
        meant = f"did you mean {' or '.join(f':{name}' for name in close)}? " if close else ""
        raise OptionError(f"there is no command :{typed}: {meant}:help shows all; for text, begin with a space")
    command = (exact or fitting)[0]
    if argument and not command.follows:
        raise OptionError(f":{command.name} takes nothing after it, but {argument!r} was given")
    if not argument and command.follows and not command.follows.startswith("["):
        raise OptionError(f":{command.name} needs {command.follows} after it")
    return command
