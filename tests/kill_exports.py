"""Kill what writes model folders and packs, at random moments, with a signal that no program can catch.

    python tests/kill_exports.py [--kills 200] [WRITER ...]

Each writer runs in a fork of this process, which has everything imported, and is killed at moments that are spread
evenly over the time that it takes. After each kill there must be nothing at the place, or exactly what an undisturbed
run makes; and the next run to the same place must make that, and leave nothing else. The exit status is 1 if something
was half made.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Final

from tiny_model import warm_writers

from gpt2_edge.errors import Gpt2EdgeError
from gpt2_edge.folder import open_folder
from gpt2_edge.pack import pack_folder, unpack_folder
from gpt2_edge.seal import new_file, new_folder, write_manifest

_FAILED: Final = 3
_PARTS: Final = 10
_LATEST: Final = 9
_PATIENCE_SECONDS: Final = 120

Writer = Callable[[Path], object]


def seal(destination: Path) -> None:
    """Write a folder as `export` does: its files, then its manifest."""
    source = open_folder("storyteller")
    with new_folder(destination) as folder:
        for entry in source.manifest.files:
            (folder / entry.name).write_bytes(source.content(entry.name).read())
        write_manifest(folder, source.manifest)


def pack(destination: Path) -> None:
    """Write a pack."""
    pack_folder(open_folder("storyteller"), destination, None)


def unpack(destination: Path) -> None:
    """Write a folder from what is opened."""
    unpack_folder(open_folder("storyteller"), destination)


def replace_a_file(destination: Path) -> None:
    """Write a file in the place of one that is there, as `sign` does."""
    with new_file(destination) as file:
        for _ in range(64):
            file.write(bytes(1 << 16))


# What is written, and the name that it gets; `export` and `quantize` come from `warm_writers`.
WRITERS: Final[dict[str, tuple[Writer, str]]] = {
    "seal": (seal, "model"),
    "pack": (pack, "model.gpt2"),
    "unpack": (unpack, "model"),
    "replace": (replace_a_file, "file"),
}
_WARM_WRITERS: Final = ("export", "quantize")


def content_of(destination: Path) -> str | None:
    """Tell what lies there from anything else of its kind; None if there is nothing.

    Raises:
        Gpt2EdgeError: It is not whole.
    """
    if not destination.exists():
        return None
    if not destination.is_dir() and destination.suffix != ".gpt2":
        return f"{destination.stat().st_size} bytes"
    opened = open_folder(destination)
    opened.check_hashes()
    if not opened.manifest.measured:
        raise Gpt2EdgeError("the manifest is a draft")
    return opened.manifest.content_sha256


def remove(destination: Path) -> None:
    """Remove a folder or a file, if there is one."""
    if destination.is_dir():
        shutil.rmtree(destination)
    else:
        destination.unlink(missing_ok=True)


def _start(write: Writer, destination: Path) -> int:
    """Run a writer in a process of its own, and return its id."""
    process = os.fork()
    if process == 0:
        try:
            with Path(os.devnull).open("w") as nowhere, redirect_stderr(nowhere):
                write(destination)
        except BaseException:  # noqa: BLE001 - the parent sees the status
            os._exit(_FAILED)
        os._exit(0)
    return process


def _run(write: Writer, destination: Path) -> float:
    """Run a writer that is not killed, and return how many seconds it took.

    Raises:
        Gpt2EdgeError: It failed, or does not end.
    """
    start = time.perf_counter()
    process = _start(write, destination)
    give_up_at = time.monotonic() + _PATIENCE_SECONDS
    while (ended := os.waitpid(process, os.WNOHANG)) == (0, 0):
        if time.monotonic() > give_up_at:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise Gpt2EdgeError("the writer does not end")
        time.sleep(0.001)
    if ended[1]:
        raise Gpt2EdgeError("the writer failed")
    return time.perf_counter() - start


def _kill_once(write: Writer, destination: Path, after_seconds: float, expected: str) -> tuple[str, float]:
    """Start a writer, kill it, look at what it left, and run it again.

    Returns:
        "killed before it was there", "killed when it was there" or "ended before"; and how long the next run took.

    Raises:
        Gpt2EdgeError: Something was half made, or was left behind.
    """
    process = _start(write, destination)
    time.sleep(after_seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    has_ended = os.WIFEXITED(status)
    if has_ended and os.WEXITSTATUS(status):
        raise Gpt2EdgeError("the writer failed")
    found = content_of(destination)
    if found != expected and (found is not None or has_ended):
        raise Gpt2EdgeError(f"it left {found}")
    outcome = "ended before" if has_ended else f"killed {'when' if found else 'before'} it was there"
    remove(destination)
    seconds = _run(write, destination)
    if content_of(destination) != expected:
        raise Gpt2EdgeError("the next run made something else")
    left = [path.name for path in destination.parent.iterdir() if path != destination]
    if left:
        raise Gpt2EdgeError(f"the next run left {left}")
    remove(destination)
    return outcome, seconds


def kill_many(write: Writer, destination: Path, kills: int, seed: int) -> tuple[Counter[str], list[int], list[str]]:
    """Kill a writer until so many kills have met it at work.

    Returns:
        How often each outcome was seen, how many of the kills fell into each tenth of the writer's time, and what
        went wrong.
    """
    random_numbers = random.Random(seed)
    seconds = []
    for _ in range(3):
        remove(destination)
        seconds.append(_run(write, destination))
    expected = content_of(destination)
    if expected is None:
        raise Gpt2EdgeError("the writer made nothing")
    remove(destination)
    outcomes: Counter[str] = Counter()
    parts = [0] * _PARTS
    findings: list[str] = []
    while sum(parts) + len(findings) < kills:
        share = random_numbers.random()
        # A machine is not equally fast all the time.
        after_seconds = share * statistics.median(seconds[-_LATEST:])
        try:
            outcome, next_seconds = _kill_once(write, destination, after_seconds, expected)
        except Gpt2EdgeError as error:
            findings.append(f"killed after {after_seconds:.3f} s: {error}")
            shutil.rmtree(destination.parent)
            destination.parent.mkdir()
            continue
        seconds.append(next_seconds)
        outcomes[outcome] += 1
        parts[int(share * _PARTS)] += outcome.startswith("killed")
    return outcomes, parts, findings


def main() -> int:
    """Kill the writers and print a line for each."""
    names = [*_WARM_WRITERS, *WRITERS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("writers", nargs="*", metavar="WRITER", help=f"of {', '.join(names)}; all if none is given")
    parser.add_argument("--kills", type=int, default=200, help="of each writer (default: 200)")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    if unknown := set(arguments.writers).difference(names):
        parser.error(f"there is no writer {' or '.join(sorted(unknown))}: give some of {', '.join(names)}")
    chosen = arguments.writers or names
    all_findings = []
    with tempfile.TemporaryDirectory() as parent:
        writers = dict(WRITERS)
        if set(chosen).intersection(_WARM_WRITERS):
            writers |= {name: (write, "model") for name, write in warm_writers(Path(parent)).items()}
        for name in chosen:
            write, file_name = writers[name]
            place = Path(parent, f"place-{name}")
            place.mkdir()
            outcomes, parts, findings = kill_many(write, place / file_name, arguments.kills, arguments.seed)
            print(f"{name}: {sum(parts)} kills, {parts} by tenths of its time; {dict(outcomes)}; ", end="")
            print(f"{len(findings)} findings", flush=True)
            all_findings += [f"{name} {finding}" for finding in findings]
    print("\n".join(all_findings))
    return 1 if all_findings else 0


if __name__ == "__main__":
    sys.exit(main())
