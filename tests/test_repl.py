"""`gpt2-edge repl`, driven as people and scripts do: through a pseudo-terminal and through pipes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

import gpt2_edge
from gpt2_edge.commands.repl_settings import OPTION_NAMES, STORY_OPTIONS, Settings
from gpt2_edge.commands.repl_wrap import WordWrapper

BEGINNING = "Once upon a time there was a king"
Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]
needs_terminal = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")

# Ctrl-C is a signal only for the process whose controlling terminal it is.
IN_TERMINAL = (
    "import fcntl, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "if sys.argv.pop(1) == 'without-readline': sys.modules['readline'] = None\n"
    "from gpt2_edge.cli import main\n"
    "sys.exit(main(sys.argv[1:]))\n"
)


@pytest.fixture(scope="module")
def model() -> Iterator[gpt2_edge.Model]:
    with gpt2_edge.load("storyteller") as loaded:
        yield loaded


@pytest.fixture
def run_here(
    model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Run a script in this process and with the loaded model, which saves the time to start one."""
    from gpt2_edge.cli import main

    script = tmp_path / "script.txt"

    def run(*lines: str | bytes) -> Done:
        script.write_bytes(as_script(lines))
        with script.open(encoding="utf-8") as stream:
            monkeypatch.setattr(sys, "stdin", stream)
            status = main(["repl"])
        printed = capfd.readouterr()
        return Done("", status, printed.out, printed.err)

    monkeypatch.setattr("gpt2_edge.model.load", lambda *arguments, **options: nullcontext(model))
    monkeypatch.chdir(tmp_path)
    return run


def as_script(lines: Iterable[str | bytes]) -> bytes:
    return b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)


def piped(*lines: str | bytes, arguments: tuple[str, ...] = (), **options: Any) -> Done:
    done = subprocess.run(
        [sys.executable, "-m", "gpt2_edge", "repl", *arguments],
        input=as_script(lines),
        capture_output=True,
        check=False,
        timeout=120,
        **options,
    )
    return Done(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def replies(model: gpt2_edge.Model, *typed: str, seed: int = 7, **options: Any) -> list[str]:
    """What the REPL has to reply to texts that are typed one after another."""
    session = model.session()
    written = []
    for turn, text in enumerate(typed):
        session.append(text)
        seeded = {"seed": seed} if turn == 0 else {}
        written.append(session.generate(**{**STORY_OPTIONS, **options, **seeded}).text)
    return written


class Terminal:
    """A REPL in a pseudo-terminal of its own."""

    def __init__(
        self, *arguments: str, columns: int = 80, output: Any = None, readline: bool = True, **environment: str
    ) -> None:
        import fcntl
        import pty
        import struct
        import termios

        self.master, follower = pty.openpty()
        fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_TERMINAL, "with" if readline else "without-readline", "repl", *arguments],
            stdin=follower,
            stdout=follower if output is None else output,
            stderr=follower,
            start_new_session=True,
            # Bracketed paste would only put more codes between what is looked for.
            env={**inherited, "TERM": "xterm", "INPUTRC": os.devnull, **environment},
        )
        os.close(follower)
        self.unread = ""

    def expect(self, pattern: str, timeout: float = 60) -> str:
        """Read until a pattern appears; return everything up to its end, without carriage returns."""
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.unread, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern!r} did not appear in {self.unread!r}"
            self._read(0.1)
        seen, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return seen

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def line(self, text: str = "", then: str = r"\n> ") -> str:
        """Type a line; return what appears up to the next prompt."""
        self.send(text + "\n")
        self.expect(re.escape(text) + r"\n")
        return self.expect(then)

    def interrupt_prompt(self, then: str) -> None:
        """Press Ctrl-C at a prompt until it is noticed.

        CPython notices one between the prompt and the wait for a key only at the next key.
        """
        for _ in range(60):
            self.send("\x03")
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline and not re.search(then, self.unread):
                self._read(0.1)
            if re.search(then, self.unread):
                break
        self.expect(then)

    def wait(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running after {self.unread!r}"
            self._read(0.1)
        return self.process.returncode

    def _read(self, seconds: float) -> None:
        import select

        if select.select([self.master], [], [], seconds)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:  # how Linux says that nobody has the other end open any more
                return
            self.unread += data.decode(errors="replace").replace("\r", "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


# Through pipes.


def test_a_script_gets_replies_and_nothing_else(model: gpt2_edge.Model) -> None:
    done = piped(":set seed 7", BEGINNING, "", " The queen")
    # What is typed is appended, Enter alone appends nothing, and the random numbers go on.
    assert done.stdout == "".join(f"{reply}\n" for reply in replies(model, BEGINNING, "", " The queen"))
    assert done.stderr == ""
    assert done.returncode == 0


def test_the_same_seed_and_commands_write_the_same_story() -> None:
    script = (":set seed 3", BEGINNING, ":retry", ":undo", "The wolf", ":text")
    first, second = piped(*script), piped(*script)
    assert first.stdout == second.stdout
    assert first.stdout.splitlines()[-1]


def test_text_shows_what_was_typed_and_what_was_replied(run_here: Run) -> None:
    done = run_here(":set max_new_tokens 0", "One  ", "two", ", three", " four", "(five", ")", ":text")
    assert done.stdout == "\n" * 6 + "One two, three four (five)\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of this kind")
def test_a_text_that_cannot_be_written_leaves_no_file(tmp_path: Path) -> None:
    import resource

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    script = [":set max_new_tokens 0", "A text that is longer than that", ":text story.txt"]
    done = piped(*script, cwd=tmp_path, preexec_fn=limit_files)
    assert (done.returncode, done.stderr) == (1, "gpt2-edge: cannot write story.txt: File too large\n")
    assert list(tmp_path.iterdir()) == []


def test_undo_takes_turns_back_one_by_one(run_here: Run) -> None:
    script = [
        ':set stop "\\n"',
        ":set temperature 0",
        "One king",
        "and a queen",
        ":undo",
        ":text",
        ":undo",
        ":text",
        ":undo",
    ]
    done = run_here(*script)
    assert done.returncode == 1
    first, _, after_one, after_two = done.stdout.splitlines()
    assert after_one == f"One king{first}"
    assert after_two == ""
    assert done.stderr == "gpt2-edge: there is nothing to take back\n"


def test_retry_writes_another_reply_and_undo_then_takes_the_turn_back(run_here: Run) -> None:
    done = run_here(":set seed 7", ":set stop .", "A", BEGINNING, ":retry", ":text", ":undo", ":text")
    first, second, third, whole, before = re.fullmatch(
        r"(.*)\n(.*)\n(.*)\n(A.*)\n(A.*)\n", done.stdout, re.DOTALL
    ).groups()  # type: ignore[union-attr]
    assert second != third
    assert whole == f"A{first} {BEGINNING}{third}"
    assert before == f"A{first}"


def test_retry_of_a_greedy_reply_is_the_same(run_here: Run) -> None:
    done = run_here(":retry", ":set temperature 0", ":set max_new_tokens 8", BEGINNING, ":retry")
    assert done.returncode == 1
    first, second = done.stdout.splitlines()
    assert first == second
    assert done.stderr.startswith("gpt2-edge: there is no reply yet")


def test_next_lists_tokens_and_a_number_picks_one(model: gpt2_edge.Model, run_here: Run) -> None:
    expected = model.next_tokens("Once upon a", 4)
    done = run_here(
        ":set max_new_tokens 0", "Once upon a", ":next 4", "2", ":text", ":next 4", ":pick 1", ":text", "2", ":text"
    )
    lines = done.stdout.splitlines()[1:]
    for number, (line, token) in enumerate(zip(lines[:4], expected, strict=True), start=1):
        assert re.match(rf'{number} +{100 * token.probability:.2f} %  "{token.text}" *', line)
    bars = [line.count("█") for line in lines[:4]]
    assert bars == sorted(bars, reverse=True)
    assert bars[0] == 40
    picked = f"Once upon a{expected[1].text}"
    after = picked + model.next_tokens(picked, 1)[0].text
    # A number is text again once what was listed is no longer what comes next.
    assert [lines[4], *lines[9:]] == [picked, after, "", f"{after} 2"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (":set temperature hot", "temperature is 'hot': give 0 (greedy) or any number above it"),
        (":set top_p 1.5", "top_p is 1.5: give a number from 0 to 1"),
        (":set seed 1.5", "seed is 1.5: give an integer from 0 to 18446744073709551615"),
        (":set ignore_eos 3", "ignore_eos is 3: give True or False"),
        (":set overflow wrap", "overflow is 'wrap': give 'stop' or 'slide'"),
        (':set stop "', 'stop is ": give a text, or JSON such as "\\n\\n" or ["\\n", "The end"]'),
        (":set temprature 1", "there is no option temprature: did you mean temperature? :set alone shows all"),
        (":set logits_processor 1", "there is no option logits_processor: :set alone shows all"),
        (":retrx", "there is no command :retrx: did you mean :retry? :help shows all; for text, begin with a space"),
        (":s", "there is no command :s: did you mean :set or :save? :help shows all; for text, begin with a space"),
        (":save", ":save needs FILE after it"),
        (":undo 3", ":undo takes nothing after it, but '3' was given"),
        (":pick 1", "there is nothing to pick from: :next shows the next tokens of the text as it is now"),
        (":next 0", "k is 0: give an integer from 1 to 8192"),
        (":next many", "K is many: give a number"),
        (":load nowhere", "cannot read nowhere: No such file or directory"),
        (":save ~nobody-of-this-name/x", "~nobody-of-this-name/x is no path here: "),
        (":text a\0b", "a path cannot have the character NUL in it"),
        (f":save {'x' * 5000}", f"cannot write {'x' * 5000}: "),
        (":save .", "cannot write .: "),
        (b"\xff", "standard input is not UTF-8: byte 0xff at offset 0; convert it, for example with "),
        ('"""\nno end', 'the input ended inside a block: end it with """'),
    ],
)
def test_what_cannot_be_done_is_one_line(line: str | bytes, message: str, run_here: Run) -> None:
    done = run_here(line)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"gpt2-edge: {message}")
    assert done.stderr.count("\n") == 1


def test_a_number_that_was_not_listed_is_refused(run_here: Run) -> None:
    assert run_here(":next 3", "4").stderr == "gpt2-edge: N is 4: give a number from 1 to 3\n"


def test_a_failure_leaves_the_story_as_it_was(run_here: Run) -> None:
    done = run_here(":set max_new_tokens 2", ":set overflow stop", "A king", "word " * 600, ":text")
    reply, text = done.stdout.splitlines()
    assert text == f"A king{reply}"
    assert re.match(r"gpt2-edge: the prompt has \d+ tokens, .*, or :undo, or :set overflow slide\n$", done.stderr)


def test_blocks_and_continued_lines(run_here: Run) -> None:
    script = ["first\\", "second", '"""', "", "", ":set is text here ", '"""', '"""dom"""', " :text too", ":text"]
    done = run_here(":set max_new_tokens 0", *script)
    assert done.stdout == "\n" * 4 + "first\nsecond\n\n:set is text here dom :text too\n"


def test_the_whole_story_is_kept_when_the_context_slides(model: gpt2_edge.Model, tmp_path: Path, run_here: Run) -> None:
    nearly_full = "the" + " the" * (model.context_length - 5)
    assert len(model.tokenize(nearly_full)) == model.context_length - 4
    # The first slides while the model writes, the second when text is appended.
    script = [":set max_new_tokens 20", ":set ignore_eos on", nearly_full, ":text 1", ":next 3", "a" + " a" * 300]
    done = run_here(*script, ":text 2", ":undo", ":text 3", ":next 3", ":undo", ":text 4")
    before, after = re.findall(r"^1 .*\n2 .*\n3 .*\n", done.stdout, re.MULTILINE)
    # Not to the last digit: the keys and values come from single tokens before, and from a prompt after.
    before_percent, after_percent = (
        {token: float(percent) for percent, token in re.findall(r'^\d +([\d.]+) %  (".*")', shown, re.MULTILINE)}
        for shown in (before, after)
    )
    common = before_percent.keys() & after_percent.keys()
    assert len(common) >= 2, "the model goes on from where it was"
    assert all(abs(before_percent[token] - after_percent[token]) < 2 for token in common)
    one, two, undone, empty = [(tmp_path / name).read_text(encoding="utf-8")[:-1] for name in "1234"]
    assert one.startswith(nearly_full)
    assert len(model.tokenize(one)) > model.context_length
    assert two.startswith(one)
    assert two[len(one) :].lstrip().startswith("a a a")
    assert undone == one
    assert empty == ""


def test_a_stop_text_inside_a_token_keeps_what_was_shown(model: gpt2_edge.Model, run_here: Run) -> None:
    first = model.generate(BEGINNING, max_new_tokens=8).text
    inside = first.split()[2][1:]  # where no token begins
    reply, text = run_here(":set temperature 0", f":set stop {inside}", BEGINNING, ":text").stdout.splitlines()
    assert reply == first[: first.index(inside)]
    assert text == BEGINNING + reply


def test_save_and_load(run_here: Run) -> None:
    begin = [":set max_new_tokens 12", ":set seed 5", BEGINNING]
    uninterrupted = run_here(*begin, "", ":text").stdout.partition(BEGINNING)[2]
    assert run_here(*begin, ":save story.session", ":save story.session").returncode == 0
    resumed = run_here(":set max_new_tokens 12", ":load story.session", "", ":text").stdout.partition(BEGINNING)[2]
    assert resumed == uninterrupted


@pytest.mark.parametrize("command", [":new", ":load story.session"])
def test_undo_brings_back_the_text_before_another_was_begun(command: str, run_here: Run) -> None:
    script = [":set max_new_tokens 0", ":save story.session", "A king", command, "A queen", ":text"]
    assert run_here(*script, ":undo", ":undo", ":text").stdout == "\n\nA queen\nA king\n"


def test_files_of_others_are_not_overwritten(tmp_path: Path, run_here: Run) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("precious", encoding="utf-8")
    done = run_here(":set max_new_tokens 0", "A", ":save precious.txt", ":text precious.txt", ":text copy.txt")
    assert precious.read_text(encoding="utf-8") == "precious"
    assert (tmp_path / "copy.txt").read_text(encoding="utf-8") == "A\n"
    assert done.stderr.splitlines() == [
        "gpt2-edge: precious.txt exists and is not a saved session: give another name",
        "gpt2-edge: precious.txt exists: give another name",
    ]


def test_set_shows_all_options(run_here: Run) -> None:
    done = run_here(":set top_k off", ':set stop ["\\n", "The end"]', ":set ignore_eos on", ":set", ":set top_p")
    *lines, last = done.stdout.splitlines()
    shown = dict(line.split(None, 1) for line in lines)
    assert list(shown) == list(OPTION_NAMES)
    assert shown["temperature"] == "0.8"
    assert shown["top_k"] == "off"
    assert shown["stop"] == '["\\n", "The end"]'
    assert shown["ignore_eos"] == "on"
    assert shown["overflow"] == "slide"
    assert last == "top_p 0.95"


def test_help_names_every_command(run_here: Run) -> None:
    printed = run_here(":help", ":q", "never read").stdout
    for command in ("help", "undo", "retry", "next", "pick", "set", "text", "save", "load", "new", "quit"):
        assert f"\n:{command}" in printed
    document = (Path(__file__).resolve().parent.parent / "docs" / "repl.md").read_text(encoding="utf-8")
    for command in re.findall(r"^(:\w+)", printed, re.MULTILINE):
        assert f"| `{command}" in document
    for name in OPTION_NAMES:
        assert f"`{name}`" in document


def test_a_wrong_folder_is_one_line_and_status_1() -> None:
    done = piped(arguments=("nowhere",))
    assert done.returncode == 1
    assert re.fullmatch(r"gpt2-edge: .*nowhere.* does not exist.*\n", done.stderr)


# Parts by themselves.


def test_settings_are_changed_only_by_what_is_allowed() -> None:
    settings = Settings()
    assert settings.keywords() == STORY_OPTIONS
    with pytest.raises(gpt2_edge.OptionError):
        settings.set("top_p", "2")
    assert settings.keywords() == STORY_OPTIONS
    settings.set("temperature", "off")
    assert settings.summary() == "top_k 40, top_p 0.95, max_new_tokens 60, overflow slide"
    settings.set("seed", "7")
    settings.set("stop", "The end")
    assert settings.keywords()["seed"] == 7
    assert settings.show("stop") == '"The end"'
    settings.set("stop", '"\\n\\n"')
    assert settings.keywords()["stop"] == "\n\n"


def test_tokens_to_keep_are_set_before_or_after_the_overflow_they_belong_to() -> None:
    settings = Settings()
    settings.set("keep_tokens", "20")
    assert settings.keywords() == {**STORY_OPTIONS, "keep_tokens": 20}
    settings.set("overflow", "stop")
    assert settings.keywords() == {**STORY_OPTIONS, "overflow": "stop"}
    assert (settings.show("keep_tokens"), settings.show("overflow")) == ("20", "stop")
    settings.set("overflow", "off")
    assert "keep_tokens" not in settings.keywords()
    settings.set("keep_tokens", "30")
    with pytest.raises(gpt2_edge.OptionError, match="keep_tokens is -1: give an integer, 0 or more"):
        settings.set("keep_tokens", "-1")
    assert settings.show("keep_tokens") == "30"
    settings.set("overflow", "slide")
    assert settings.keywords() == {**STORY_OPTIONS, "keep_tokens": 30}
    settings.set("keep_tokens", "off")
    assert settings.keywords() == STORY_OPTIONS


def test_replies_go_on_while_the_tokens_to_keep_wait(run_here: Run) -> None:
    done = run_here(":set keep_tokens 20", ":set overflow stop", ":set max_new_tokens 3", BEGINNING, ":next 2")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 3


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_are_broken_between_words_however_the_text_is_cut(size: int) -> None:
    text = "The  quick brown fox\njumps over\n\n  a wolf whose name is Unpronounceable, 魔法の森 and sits. "
    wrapper = WordWrapper(lambda: 12)
    written = "".join(wrapper.add(text[place : place + size]) for place in range(0, len(text), size)) + wrapper.finish()
    lines = ["The  quick", "brown fox", "jumps over", "", "  a wolf", "whose name", "is"]
    assert written.split("\n") == [*lines, "Unpronounceable,", "魔法の森 and", "sits. "]


# At a terminal.


@needs_terminal
def test_a_conversation_at_a_terminal(model: gpt2_edge.Model, tmp_path: Path) -> None:
    with Terminal(HOME=str(tmp_path)) as terminal:
        greeting = terminal.expect(r"\n> ")
        assert "Type the beginning of a story, or :help." in greeting
        assert "temperature 0.8, top_k 40, top_p 0.95, max_new_tokens 60, overflow slide\x1b[0m\n" in greeting
        assert "overflow stop\x1b[0m\n" in terminal.line(":set overflow stop")
        assert "keep_tokens 9 (keep_tokens counts with overflow slide only)" in terminal.line(":set keep_tokens 9")
        assert "overflow stop (keep_tokens counts with overflow slide only)" in terminal.line(":set overflow stop")
        assert "overflow slide\x1b[0m\n" in terminal.line(":set overflow slide")
        terminal.line(":set seed 7")
        shown = terminal.line(BEGINNING)
        (reply,) = replies(model, BEGINNING)
        # Broken between words, without the space that begins it.
        assert shown.split("\x1b[2m")[0].split() == reply.split()
        assert not shown.startswith(" ")
        assert all(len(line) <= 80 for line in shown.split("\n"))
        assert re.search(r"\x1b\[2m\[60 tokens, \d+ tokens/s, max_new_tokens reached\]\x1b\[0m\n> $", shown)
        terminal.send("\x04")
        assert terminal.wait() == 0
    assert list(tmp_path.iterdir()) == []  # nothing is written to the home folder


@needs_terminal
def test_ctrl_c_stops_a_long_reply_and_keeps_it() -> None:
    with Terminal(NO_COLOR="1") as terminal:
        terminal.expect(r"\n> ")
        terminal.line(":set max_new_tokens 100000")
        terminal.line(":set ignore_eos on")
        terminal.send(BEGINNING + "\n")
        terminal.expect(re.escape(BEGINNING) + r"\n.{200}")
        began = time.monotonic()
        terminal.send("\x03")
        status = terminal.expect(r"\[\d+ tokens, \d+ tokens/s, interrupted\]\n> ")
        assert time.monotonic() - began < 5  # 100 ms on a quiet machine
        count = int(re.findall(r"\[(\d+) tokens", status)[0])
        assert count > 20
        assert BEGINNING in terminal.line(":text")
        terminal.line(":set max_new_tokens 3")
        assert "[3 tokens, " in terminal.line()
        terminal.send("\x04")
        assert terminal.wait() == 0


@needs_terminal
def test_ctrl_c_at_the_prompt_says_how_to_leave_and_drops_what_was_typed() -> None:
    with Terminal(NO_COLOR="1") as terminal:
        terminal.expect(r"\n> ")
        terminal.interrupt_prompt(r"\n\(Ctrl-D or :quit leaves\)\n> ")
        terminal.line(":set max_new_tokens 0")
        terminal.line('"""', then=r"\| ")
        terminal.send("half a block")
        terminal.expect("half a block")
        terminal.interrupt_prompt(r"leaves\)\n> ")
        terminal.line("one")
        assert terminal.line(":text") == "one\n> "
        terminal.send(":quit\n")
        assert terminal.wait() == 0


@needs_terminal
def test_blocks_at_a_terminal_show_a_prompt_of_their_own() -> None:
    with Terminal(NO_COLOR="1") as terminal:
        terminal.expect(r"\n> ")
        terminal.line(":set max_new_tokens 0")
        terminal.line('"""', then=r"\| ")
        terminal.line("one", then=r"\| ")
        terminal.line('two"""')
        terminal.line("and\\", then=r"\| ")
        terminal.line("three")
        assert terminal.line(":text") == "one\ntwo and\nthree\n> "


@needs_terminal
def test_a_narrow_terminal_is_kept_to(tmp_path: Path) -> None:
    with Terminal(columns=30, NO_COLOR="1") as terminal:
        terminal.expect(r"\n> ")
        for command in (":help", ":set", ":next"):
            assert max(map(len, terminal.line(command).split("\n"))) <= 30
        terminal.line("The wolf")
        terminal.line(":next")
        assert len(terminal.line("1").split("\n")[0]) <= 30  # the end of the text


@needs_terminal
@pytest.mark.parametrize("color", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_they_are_not_wanted(color: dict[str, str]) -> None:
    with Terminal(**color) as terminal:
        shown = terminal.expect(r"\n> ")
        shown += terminal.line(":set max_new_tokens 2") + terminal.line("A king") + terminal.line(":nonsense")
    assert "\x1b[2m" not in shown
    assert "\x1b[31m" not in shown


@needs_terminal
def test_history_is_kept_in_a_file_only_if_asked_for(tmp_path: Path) -> None:
    history = tmp_path / "history"
    with Terminal("--history", str(history), HOME=str(tmp_path)) as terminal:
        terminal.expect(r"\n> ")
        terminal.line(":set max_new_tokens 1")
        terminal.send("\x04")
        assert terminal.wait() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["history"]
    with Terminal("--history", str(history), HOME=str(tmp_path)) as terminal:
        terminal.expect(r"\n> ")
        terminal.send("\x1b[A")
        terminal.expect(r":set max_new_tokens 1")
        terminal.send("\n")
        terminal.expect(r"\n> ")
        terminal.send(":te\t\n")
        terminal.expect(r":text \n")


@needs_terminal
@pytest.mark.parametrize("typed", ["", f":set max_new_tokens 100000\n:set ignore_eos on\n{BEGINNING}\n"])
def test_sigterm_leaves_where_ctrl_c_does_not(typed: str) -> None:
    with Terminal(NO_COLOR="1") as terminal:
        terminal.expect(r"\n> ")
        terminal.send(typed)
        if typed:
            terminal.expect(re.escape(BEGINNING) + r"\n.{200}")
        else:
            time.sleep(0.1)  # CPython notices a signal between the prompt and the wait for a key at the next key only
        terminal.process.send_signal(signal.SIGTERM)
        assert terminal.wait() == 143


@needs_terminal
def test_it_works_without_readline(tmp_path: Path) -> None:
    with Terminal(readline=False, NO_COLOR="1") as terminal:
        terminal.expect(r"\n> ")
        terminal.line(":set max_new_tokens 2")
        assert re.search(r"\[2 tokens, .*\]\n> $", terminal.line(BEGINNING))
        terminal.line("one\\", then=r"\n?\| ")
        terminal.line("two")
        terminal.interrupt_prompt(r"\n\(Ctrl-D or :quit leaves\)\n> ")
        terminal.send("\x04")
        assert terminal.wait() == 0
    with Terminal("--history", str(tmp_path / "history"), readline=False, NO_COLOR="1") as terminal:
        terminal.expect("gpt2-edge: --history needs Python's readline module and a terminal: leave it out\n")
        assert terminal.wait() == 1


@needs_terminal
def test_output_to_a_file_is_the_story_alone(tmp_path: Path, model: gpt2_edge.Model) -> None:
    with (tmp_path / "out.txt").open("wb") as output, Terminal(output=output) as terminal:
        terminal.expect(r"> ")
        terminal.line(":set seed 7", then="> ")
        terminal.line(BEGINNING, then="> ")
        terminal.send("\x04")
        assert terminal.wait() == 0
    (reply,) = replies(model, BEGINNING)
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == reply + "\n"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_a_script() -> None:
    command = [sys.executable, "-m", "gpt2_edge", "repl"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f":set max_new_tokens 100000\n:set ignore_eos on\n{BEGINNING}\n:text\n".encode())
    process.stdin.flush()
    process.stdout.read(50)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == b"gpt2-edge: interrupted\n"
