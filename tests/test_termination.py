"""SIGTERM, as `kill`, `docker stop` and service managers send it, and Ctrl-C: commands end with all that they began."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from gpt2_edge.benchmarks.subject import Subject
from gpt2_edge.benchmarks.worker_process import WorkerProcess
from gpt2_edge.interrupt import deferred_interrupt, is_terminated, sigterm_interrupts

if sys.platform == "win32":
    pytest.skip("Windows has neither of these signals", allow_module_level=True)

FOREVER: Final = ("--max-new-tokens", "1000000", "--ignore-eos", "--overflow", "slide")
QUICK_BENCH: Final = ("-p", "8", "-n", "8", "-d", "0", "-b", "1", "--threads", "1", "--sample-seconds", "0")
PATIENCE_SECONDS: Final = 60  # for what should take no time at all


@contextmanager
def command(*arguments: str, **options: object) -> Iterator["subprocess.Popen[str]"]:
    """Run a command in a session of its own, of which nothing is left in the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2_edge", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
        **options,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def processes_of_session(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, session = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
        except OSError:  # it has ended meanwhile
            continue
        if int(session) == leader and state != "Z":
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("sigint", [signal.SIG_DFL, signal.SIG_IGN], ids=["foreground", "background"])
def test_sigterm_ends_a_continuation(sigint: signal.Handlers) -> None:
    """Also in the background of a script, where Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, sigint)  # what a process is started with
    try:
        with command("generate", "storyteller", "Once", *FOREVER) as process:
            signal.signal(signal.SIGINT, before)
            assert process.stdout is not None
            process.stdout.read(200)
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=PATIENCE_SECONDS)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.returncode == 143
    assert errors == "gpt2-edge: ended by SIGTERM\n"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "send"),
    [(signal.SIGTERM, os.kill), (signal.SIGINT, os.kill), (signal.SIGINT, os.killpg)],
    ids=["sigterm", "sigint", "sigint-to-all-as-a-terminal-does"],
)
@pytest.mark.parametrize("stage", ["loading", "repetition 3"])
def test_bench_ends_with_its_workers_and_leaves_a_whole_report_or_the_earlier_one(
    number: signal.Signals, send: Callable[[int, int], None], stage: str, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    path.write_text("the earlier one", encoding="utf-8")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    options = ("-r", "100000", "--format", "json", "-o", str(path))
    environment = {**os.environ, "TMPDIR": str(scratch)}
    with command("bench", "storyteller", *QUICK_BENCH, *options, env=environment) as process:
        assert process.stderr is not None
        while stage not in process.stderr.readline():
            assert process.poll() is None
        send(process.pid, number)
        output, errors = process.communicate(timeout=PATIENCE_SECONDS)
        assert process.returncode == 128 + number
        assert processes_of_session(process.pid) == []
    assert "Traceback" not in errors
    assert "bench: interrupted after" in errors
    if stage == "loading":
        assert output == ""
        assert errors.splitlines()[-1].startswith("gpt2-edge: ")
        assert path.read_text(encoding="utf-8") == "the earlier one"
    else:
        assert "Interrupted" in output
        assert json.loads(path.read_text(encoding="utf-8"))["interrupted"] is True
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "scratch"]
    assert list(scratch.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_end_without_a_word_when_bench_is_killed() -> None:
    """They notice when they answer, so they must be computing when it happens."""
    with command("bench", "storyteller", *QUICK_BENCH, "--sample-seconds", "0.5") as process:
        assert process.stderr is not None
        while "repetition 1" not in process.stderr.readline():
            assert process.poll() is None
        time.sleep(0.1)
        process.kill()
        _, errors = process.communicate(timeout=PATIENCE_SECONDS)  # until the workers close it, too
        deadline = time.monotonic() + PATIENCE_SECONDS
        while processes_of_session(process.pid):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "Traceback" not in errors
    assert "Broken" not in errors


def test_a_worker_that_has_just_begun_does_not_hear_ctrl_c() -> None:
    """A terminal sends it to all processes, and this one is still importing what would ignore it."""
    with WorkerProcess() as worker:
        os.kill(worker._process.pid, signal.SIGINT)
        assert worker.ask("load", folder="storyteller", device="cpu", threads=1)["threads"] == 1


def test_ctrl_c_while_a_worker_is_started_lets_it_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    start = Subject._start_process

    def start_interrupted(subject: Subject) -> WorkerProcess:
        process = start(subject)
        signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(Subject, "_start_process", start_interrupted)
    subject = Subject("one", "storyteller", 1)
    with pytest.raises(KeyboardInterrupt):
        subject.start("cpu")
    assert subject._process is not None
    worker = subject._process._process
    assert worker.poll() is None
    subject.close()
    assert worker.returncode == -signal.SIGTERM


def end_as_asked() -> None:
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # or it would end the tests
    signal.raise_signal(signal.SIGTERM)


def test_sigterm_waits_where_ctrl_c_does() -> None:
    heard = []

    def work() -> None:
        with deferred_interrupt() as pressed:
            end_as_asked()
            heard.append(pressed.is_set())

    with sigterm_interrupts():
        assert not is_terminated()
        with pytest.raises(KeyboardInterrupt):
            work()
        assert is_terminated()
        with pytest.raises(KeyboardInterrupt):
            end_as_asked()  # where nothing holds it back any more
    assert heard == [True]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with sigterm_interrupts():
        assert not is_terminated()


def test_a_program_that_handles_sigterm_itself_is_left_alone() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with sigterm_interrupts(), deferred_interrupt() as pressed:
            end_as_asked()
            assert not pressed.is_set()
        assert not is_terminated()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]
