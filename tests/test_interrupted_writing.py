"""What a kill, a full disk or a folder that cannot be written to leaves behind: nothing that is half made.

`tests/kill_exports.py` kills at random moments, as often as one likes; here it is at each flush to the disk, and at a
few moments of a quantization.
"""

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from gpt2_edge.cli import main
from gpt2_edge.errors import ModelFolderError
from gpt2_edge.seal import new_file, write_file

if sys.platform == "win32":
    pytest.skip("Windows has neither fork nor these signals", allow_module_level=True)

import resource

import kill_exports
import tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

WRITERS: Final = kill_exports.WRITERS
REFUSED: Final = 5


def in_a_child(work: Callable[[], object]) -> int:
    """Run something in a process of its own and return its wait status; `REFUSED` if it raised `ModelFolderError`."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        except ModelFolderError as error:
            status = REFUSED if "\n" not in str(error) else 1
        finally:
            os._exit(status)
    return os.waitpid(process, 0)[1]


def killed_at_flush(write: Callable[[Path], object], destination: Path, number: int) -> Callable[[], None]:
    """Return a run of a writer that kills itself instead of the given flush."""

    def work() -> None:
        flush, flushes = os.fsync, iter(range(1000))

        def flush_or_die(descriptor: int) -> None:
            if next(flushes) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            flush(descriptor)

        os.fsync = flush_or_die
        write(destination)

    return work


@pytest.mark.parametrize("name", WRITERS)
def test_a_kill_at_each_flush(name: str, tmp_path: Path) -> None:
    write, file_name = WRITERS[name]
    destination = tmp_path / "place" / file_name
    destination.parent.mkdir()
    kills = 0
    while os.WIFSIGNALED(in_a_child(killed_at_flush(write, destination, kills))):
        left = [path.name for path in destination.parent.iterdir() if path != destination]
        assert all(path.startswith(f".{file_name}.making-") for path in left)
        kill_exports.content_of(destination)
        kill_exports.remove(destination)
        kills += 1
    assert kills >= 1
    assert kill_exports.content_of(destination)
    assert [path.name for path in destination.parent.iterdir()] == [file_name]


def test_kills_at_random_moments_of_a_quantization() -> None:
    script = [sys.executable, kill_exports.__file__, "quantize", "--kills", "5"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("quantize: 5 kills, ")


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, what was exported from it, and a text for both purposes of quantization."""
    from gpt2_edge.export import export_checkpoint

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.write_checkpoint(folder / "checkpoint")
    export_checkpoint(folder / "checkpoint", folder / "fp32")
    (folder / "text.txt").write_text(tiny_model.TEXT, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        ("export checkpoint", "gpt2_edge.export.pipeline.check_parity"),
        (
            "quantize fp32 --precision int8 --text text.txt --calibration text.txt",
            "gpt2_edge.quantize.pipeline.golden_logits",
        ),
    ],
)
def test_a_command_that_is_asked_to_end_leaves_nothing(
    arguments: str, last: str, tiny_models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the temporary folder nor those above it, where SIGTERM comes after the weights have been written."""

    def write() -> None:
        assert len(list(tmp_path.glob("new/.model.making-*/model.onnx.data"))) == 1
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(last, lambda *_, **__: write())
    monkeypatch.chdir(tiny_models)
    status = in_a_child(lambda: os._exit(main([*arguments.split(), "-o", str(tmp_path / "new" / "model")])))
    assert os.WIFEXITED(status)
    assert os.WEXITSTATUS(status) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("limit_bytes", [0, 1000, 3_000_000])
def test_no_room_for_a_file(name: str, limit_bytes: int, tmp_path: Path) -> None:
    write, file_name = WRITERS[name]

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
        write(tmp_path / file_name)

    assert os.WEXITSTATUS(in_a_child(work)) == REFUSED
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_mode_of_the_umask_and_a_replaced_one_keeps_its_own(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_file(tmp_path / "result", [b"first"])
        with new_file(tmp_path / "pack") as file:
            file.write(b"first")
    finally:
        os.umask(before)
    for name in ("result", "pack"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask
    (tmp_path / "result").chmod(0o640)
    write_file(tmp_path / "result", [b"second"])
    assert (tmp_path / "result").read_bytes() == b"second"
    assert stat.S_IMODE((tmp_path / "result").stat().st_mode) == 0o640


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    link, target = tmp_path / "link", tmp_path / "folder" / "target"
    link.symlink_to(target)
    for content in (b"first", b"second"):
        write_file(link, [content])
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert [path.name for path in target.parent.iterdir()] == ["target"]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, [b"one ", b"two"])
    assert os.read(reader, 100) == b"one two"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_file_that_may_not_be_written_to_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result"
    path.write_bytes(b"precious")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as it is for all but the superuser if the mode is 0o444
    with pytest.raises(PermissionError):
        write_file(path, [b"other"])
    assert path.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="the superuser writes anywhere")
@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_cannot_be_written_to(name: str, tmp_path: Path) -> None:
    write, file_name = WRITERS[name]
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(ModelFolderError, match="cannot write"):
            write(tmp_path / file_name)
        assert list(tmp_path.iterdir()) == []
    finally:
        tmp_path.chmod(stat.S_IRWXU)


@pytest.mark.parametrize("name", ["seal", "pack", "unpack"])
def test_two_processes_write_to_one_place(name: str, tmp_path: Path) -> None:
    """One of them wins, or both wrote the same."""
    write, file_name = WRITERS[name]
    processes = []
    for _ in range(2):
        process = os.fork()
        if process == 0:
            status = 1
            try:
                write(tmp_path / file_name)
                status = 0
            except ModelFolderError:
                status = REFUSED
            finally:
                os._exit(status)
        processes.append(process)
    statuses = [os.WEXITSTATUS(os.waitpid(process, 0)[1]) for process in processes]
    assert set(statuses) <= {0, REFUSED}
    assert 0 in statuses
    assert kill_exports.content_of(tmp_path / file_name)
    assert [path.name for path in tmp_path.iterdir()] == [file_name]
