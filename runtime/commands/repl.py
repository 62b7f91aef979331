"""`gpt2-edge repl`: write a story together with the model, at a terminal or from a script."""

import argparse
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Final

from gpt2_edge.commands.repl_commands import COMMANDS, find_command, help_rows
from gpt2_edge.commands.repl_input import Entry, Reader
from gpt2_edge.commands.repl_screen import Screen, terminal_width
from gpt2_edge.commands.repl_settings import OPTION_NAMES, Settings
from gpt2_edge.errors import ContextLengthError, Gpt2EdgeError, OptionError, SessionError
from gpt2_edge.interrupt import is_terminated
from gpt2_edge.results import NextToken
from gpt2_edge.seal import write_file

if TYPE_CHECKING:
    from gpt2_edge.commands.repl_story import Story
    from gpt2_edge.model import Model
    from gpt2_edge.text_session import Session

_NUMBER_OF_NEXT_TOKENS: Final = 10
_SESSION_FILE_BEGINNING: Final = b"gpt2-edge session "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `repl`."""
    parser.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        default="storyteller",
        help="a model folder or a pack (default: storyteller)",
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ..., or auto (the default)")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute (default: the cores allowed)")
    parser.add_argument(
        "--history", type=Path, metavar="FILE", help="keep typed lines in this file (default: in memory only)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Read and reply until the input ends."""
    from gpt2_edge.model import load

    words = [*(f":{command.name}" for command in COMMANDS), *OPTION_NAMES]
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
        self._cancel = threading.Event()  # set when Ctrl-C is pressed while an entry is handled
        self._actions: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "undo": self._undo,
            "retry": self._retry,
            "next": self._next,
            "pick": self._pick,
            "set": self._set,
            "text": self._text,
            "save": self._save,
            "load": self._load,
            "new": self._new,
            "quit": self._quit,
        }

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
                entry = self._reader.read()
                with self._ctrl_c_sets(threading.Event()) as self._cancel:
                    self._handle(entry)
            except EOFError:
                self._leaves = True
                if self._reader.interactive:
                    self._screen.note("")  # after the prompt
            except KeyboardInterrupt:
                if not self._reader.interactive or is_terminated():
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
            command = find_command(entry.command, entry.text)
            self._actions[command.name](entry.text)
        elif self._next_tokens and entry.text.isdecimal() and not entry.exactly:
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
        with self._story.reply({**options, "cancel": self._cancel}) as stream:
            self._screen.begin_reply()
            try:
                for piece in stream:
                    self._screen.write(piece.text)
            except BaseException:
                self._screen.break_off()
                raise
        self._seed_is_due = False
        self._screen.end_text(interrupted=self._cancel.is_set())
        self._story.end_reply(stream.result)
        self._screen.status(stream.result)

    @contextmanager
    def _ctrl_c_sets(self, event: threading.Event) -> Iterator[threading.Event]:
        """Make Ctrl-C set an event: an exception could come at any place, and leave engine or story in disorder.

        Raises:
            KeyboardInterrupt: Afterwards, if Ctrl-C was pressed and there is nobody to type anything else.
        """
        if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield event  # whoever started us does not want it to have an effect
            return

        def press(number: int, frame: FrameType | None) -> None:
            event.set()

        before = signal.signal(signal.SIGINT, press)
        try:
            yield event
        finally:
            signal.signal(signal.SIGINT, before)
        if event.is_set() and not self._reader.interactive:
            raise KeyboardInterrupt

    def _help(self, argument: str) -> None:
        self._screen.table(help_rows())

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
        waits = name in ("overflow", "keep_tokens") and self._settings.keep_tokens_waits
        remark = " (keep_tokens counts with overflow slide only)" if waits else ""
        self._screen.note(f"{name} {self._settings.show(name)}{remark}")

    def _text(self, argument: str) -> None:
        if not argument:
            self._screen.write(self._story.text)
            self._screen.end_text()
            return
        path = _path(argument)
        try:
            if path.exists():
                raise SessionError(f"{path} exists: give another name")
            write_file(path, [(self._story.text + "\n").encode()])
        except OSError as error:
            raise SessionError(f"cannot write {path}: {error.strerror or error}") from error
        self._screen.note(f"wrote the text to {path}")

    def _save(self, argument: str) -> None:
        path = _path(argument)
        _check_that_nothing_else_is_overwritten(path)
        self._story.save(str(path))
        forgotten = self._story.forgotten_tokens
        without = f", without the first {forgotten} tokens, which the model no longer sees" if forgotten else ""
        self._screen.note(f"saved the session to {path}{without}")

    def _load(self, argument: str) -> None:
        self._begin(self._model.load_session(_path(argument)))
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
        self._screen.note(
            "(the text is empty)" if not text else text if len(text) <= room else f"… {text[2 - room :].lstrip()}"
        )


def _integer(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise OptionError(f"{name} is {text}: give a number")
    return int(text)


def _path(text: str) -> Path:
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise SessionError(f"{text} is no path here: {error}") from error
    if "\0" in text:
        raise SessionError("a path cannot have the character NUL in it")
    return path


def _check_that_nothing_else_is_overwritten(path: Path) -> None:
    try:
        with path.open("rb") as file:
            beginning = file.read(len(_SESSION_FILE_BEGINNING))
    except FileNotFoundError:
        return
    except OSError as error:
        raise SessionError(f"cannot write {path}: {error.strerror or error}") from error
    if beginning != _SESSION_FILE_BEGINNING:
        raise SessionError(f"{path} exists and is not a saved session: give another name")
