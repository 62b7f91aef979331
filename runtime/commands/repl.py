"""`gpt2-edge repl`: write a story together with the model, at a terminal or from a script."""

import argparse
import difflib
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from gpt2_edge.commands.repl_input import Entry, Reader
from gpt2_edge.commands.repl_screen import Screen, terminal_width
from gpt2_edge.commands.repl_settings import OPTION_NAMES, Settings
from gpt2_edge.errors import ContextLengthError, Gpt2EdgeError, OptionError, SessionError
from gpt2_edge.results import NextToken

if TYPE_CHECKING:
    from gpt2_edge.commands.repl_story import Story
    from gpt2_edge.model import Model
    from gpt2_edge.text_session import Session

# Name, what follows it (in brackets if it may be left out), what it does.
_COMMANDS: Final = (
    ("help", "", "show this"),
    ("undo", "", "take back the last turn: what was typed, and the reply"),
    ("retry", "", "take back the last reply and write another"),
    ("next", "[K]", "show the K likeliest next tokens (10); a number then picks one"),
    ("pick", "N", "append the Nth of them"),
    ("set", "[NAME [VALUE]]", "show or change the options of replies; the value off takes one out"),
    ("text", "[FILE]", "show the whole text, or write it to a new file"),
    ("save", "FILE", "write the session to a file"),
    ("load", "FILE", "go on with a session that was saved"),
    ("new", "", "begin a new text; :undo brings the old one back"),
    ("quit", "", "leave, as Ctrl-D does"),
)
_HELP: Final = (
    ("text", "is appended, and continued by the model"),
    ("Enter", "alone lets the model go on"),
    ("\\", "at the end of a line: the text goes on in the next"),
    ('"""', "begins and ends a block of lines, appended exactly as it stands"),
    ("Ctrl-C", "stops a reply; what was written stays"),
)
_NUMBER_OF_NEXT_TOKENS: Final = 10
_SESSION_FILE_BEGINNING: Final = b"gpt2-edge session "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repl`."""
    parser.add_argument(
        "folder", metavar="FOLDER", nargs="?", default="storyteller", help="a model folder (default: storyteller)"
    )
    parser.add_argument("--device", default="auto", help="cpu, or auto (the default)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute (default: the cores allowed)")
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="keep typed lines in this file (default: in memory only)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read and reply until the input ends."""
    from gpt2_edge.model import load

    words = [*(f":{name}" for name, _, _ in _COMMANDS), *OPTION_NAMES]
    reader = Reader(arguments.history, words)
    with load(arguments.folder, device=arguments.device, threads=arguments.threads) as model:
        repl = Repl(model, reader, Screen())
        repl.greet(arguments.folder)
        repl.run()
    reader.close()
    # Someone at a terminal has seen what failed; a script's caller has not.
    return 1 if repl.failed and not reader.interactive else 0


class Repl:
    """Reads an entry, does what it says, and reads the next.

    Args:
        model: Writes the replies.
        reader: Gives the entries.
        screen: Shows what comes of them.

    Attributes:
        failed: Whether anything could not be done.
    """

    def __init__(self, model: "Model", reader: Reader, screen: Screen) -> None:
        self.failed = False
        self._model = model
        self._reader = reader
        self._screen = screen
        self._settings = Settings()
        self._leaves = False
        self._story = self._make_story(model.session())
        self._old_story: Story | None = None  # which `:undo` brings back
        self._next_tokens: list[NextToken] = []  # that were shown, as long as they are what comes next
        self._seed_is_due = False

    def greet(self, folder: str) -> None:
        """Tell someone at a terminal what this is."""
        if self._reader.interactive:
            length = self._model.context_length
            self._screen.note(f"{folder}, {length} tokens of context. Type the beginning of a story, or :help.")
            self._screen.note(self._settings.summary())

    def run(self) -> None:
        """Go on until the input ends or `:quit`."""
        while not self._leaves:
            try:
                self._handle(self._reader.read())
            except EOFError:
                self._leaves = True
                if self._reader.interactive:
                    self._screen.note("")  # after the prompt
            except KeyboardInterrupt:
                if not self._reader.interactive:
                    raise
                self._screen.note("\n(Ctrl-D or :quit leaves)")
            except ContextLengthError as error:
                self._report(f"{error}, or :undo, or :set overflow slide")
            except Gpt2EdgeError as error:
                self._report(str(error))

    def _report(self, message: str) -> None:
        self.failed = True
        self._screen.error(message)

    def _handle(self, entry: Entry) -> None:
        if entry.command is not None:
            _find_command(entry.command, entry.text)(self, entry.text)
        elif self._next_tokens and entry.text.isdecimal():
            self._pick(entry.text)
        else:
            self._write_turn(entry)

    def _write_turn(self, entry: Entry) -> None:
        self._story.begin_turn(entry.text, entry.exactly, self._settings.keywords())
        try:
            self._write_reply()
        except BaseException:
            self._story.undo()
            raise

    def _write_reply(self) -> None:
        self._next_tokens = []
        options = self._settings.keywords()
        seed = options.pop("seed", None)
        if self._seed_is_due:
            # Once: from then on the session's random numbers go on, or every reply would draw the same ones.
            options["seed"] = seed
        with self._ctrl_c_sets() as cancel, self._story.reply({**options, "cancel": cancel}) as stream:
            self._screen.begin_reply()
            try:
                for piece in stream:
                    self._screen.write(piece.text)
            except BaseException:
                self._screen.break_off()
                raise
        self._seed_is_due = False
        self._screen.end_text()
        self._story.end_reply(stream.result)
        self._screen.status(stream.result)

    @contextmanager
    def _ctrl_c_sets(self) -> Iterator[threading.Event]:
        """Make Ctrl-C set an event: an exception could come at any place in the engine, and leave it in disorder."""
        pressed = threading.Event()

        def press(number: int, frame: FrameType | None) -> None:
            pressed.set()

        if not self._reader.interactive or threading.current_thread() is not threading.main_thread():
            yield pressed
            return
        before = signal.signal(signal.SIGINT, press)
        try:
            yield pressed
        finally:
            signal.signal(signal.SIGINT, before)

    def _help(self, argument: str) -> None:
        commands = [(f":{name} {follows}".rstrip(), what) for name, follows, what in _COMMANDS]
        self._screen.table([*_HELP, *commands])

    def _undo(self, argument: str) -> None:
        if self._story.has_turns:
            self._story.undo()
        elif self._old_story is not None:
            self._story, self._old_story = self._old_story, None
        else:
            raise SessionError("there is nothing to take back")
        self._next_tokens = []
        self._note_end_of_text()

    def _retry(self, argument: str) -> None:
        if not self._story.has_turns:
            raise SessionError("there is no reply yet: type the beginning of a story, or press Enter")
        self._story.undo_reply()
        if self._settings.are_greedy:
            self._screen.note("(without a temperature above 0 it is the same again)")
        self._write_reply()

    def _next(self, argument: str) -> None:
        count = _NUMBER_OF_NEXT_TOKENS if not argument else _integer("K", argument)
        with self._ctrl_c_sets():
            self._next_tokens = self._story.next_tokens(count, self._settings.keywords())
        self._screen.next_tokens(self._next_tokens)

    def _pick(self, argument: str) -> None:
        if not self._next_tokens:
            raise OptionError("there is nothing to pick from: :next shows the next tokens of the text as it is now")
        number = _integer("N", argument)
        if not 1 <= number <= len(self._next_tokens):
            raise OptionError(f"N is {number}: give a number from 1 to {len(self._next_tokens)}")
        token = self._next_tokens[number - 1]
        self._story.pick(token, self._settings.keywords())
        self._next_tokens = []
        self._note_end_of_text()

    def _set(self, argument: str) -> None:
        name, _, value = argument.partition(" ")
        if not name:
            self._screen.table((name, self._settings.show(name)) for name in OPTION_NAMES)
            return
        if not value:
            self._screen.lines([f"{name} {self._settings.show(name)}"])
            return
        self._settings.set(name, value.strip())
        if name == "seed":
            self._seed_is_due = self._settings.show("seed") != "off"
        self._screen.note(f"{name} {self._settings.show(name)}")

    def _text(self, argument: str) -> None:
        if not argument:
            self._screen.write(self._story.text)
            self._screen.end_text()
            return
        path = Path(argument).expanduser()
        try:
            with path.open("x", encoding="utf-8", newline="\n") as file:
                file.write(self._story.text + "\n")
        except FileExistsError as error:
            raise SessionError(f"{path} exists: give another name") from error
        except OSError as error:
            raise SessionError(f"cannot write {path}: {error.strerror or error}") from error
        self._screen.note(f"wrote the text to {path}")

    def _save(self, argument: str) -> None:
        path = Path(argument).expanduser()
        if path.exists() and not _is_session_file(path):
            raise SessionError(f"{path} exists and is not a saved session: give another name")
        self._story.save(str(path))
        forgotten = self._story.forgotten_tokens
        without = f", without the first {forgotten} tokens, which the model no longer sees" if forgotten else ""
        self._screen.note(f"saved the session to {path}{without}")

    def _load(self, argument: str) -> None:
        self._begin(self._model.load_session(Path(argument).expanduser()))
        self._note_end_of_text()

    def _new(self, argument: str) -> None:
        self._begin(self._model.session())
        self._seed_is_due = self._settings.show("seed") != "off"

    def _quit(self, argument: str) -> None:
        self._leaves = True

    def _begin(self, session: "Session") -> None:
        self._old_story, self._story = self._story, self._make_story(session)
        self._next_tokens = []

    def _make_story(self, session: "Session") -> "Story":
        from gpt2_edge.commands.repl_story import Story  # which needs onnxruntime

        return Story(self._model, session)

    def _note_end_of_text(self) -> None:
        """Show where the text is now, on one line."""
        text = " ".join(self._story.text[-terminal_width() :].split())
        room = terminal_width() - 2
        self._screen.note("(the text is empty)" if not text else text if len(text) <= room else f"… {text[2 - room :]}")


_ACTIONS: Final[dict[str, Callable[[Repl, str], None]]] = {name: getattr(Repl, f"_{name}") for name, _, _ in _COMMANDS}


def _find_command(typed: str, argument: str) -> Callable[[Repl, str], None]:
    """Return what to do for a command, which may be shortened as long as it means one only.

    Raises:
        OptionError: There is none, or what has to follow it is missing.
    """
    fitting = [command for command in _COMMANDS if command[0].startswith(typed)]
    exact = [command for command in fitting if command[0] == typed]
    if len(exact or fitting) != 1:
        names = [name for name, _, _ in fitting] or difflib.get_close_matches(typed, _ACTIONS, n=1)
        meant = f"did you mean {' or '.join(f':{name}' for name in names)}? " if names else ""
        raise OptionError(f"there is no command :{typed}: {meant}:help shows all; for text, begin with a space")
    name, follows, _ = (exact or fitting)[0]
    if argument and not follows:
        raise OptionError(f":{name} takes nothing after it, but {argument!r} was given")
    if not argument and follows and not follows.startswith("["):
        raise OptionError(f":{name} needs {follows} after it")
    return _ACTIONS[name]


def _integer(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise OptionError(f"{name} is {text}: give a number")
    return int(text)


def _is_session_file(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_SESSION_FILE_BEGINNING)) == _SESSION_FILE_BEGINNING
    except OSError as error:
        raise SessionError(f"cannot write {path}: {error.strerror or error}") from error
