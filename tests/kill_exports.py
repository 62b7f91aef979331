"""Kill what writes model folders and packs, at random moments, with a signal that no program can catch.

    python tests/kill_exports.py --kills 200 [--fp32-folder FOLDER]

After each kill the place must be empty or hold something whole, and the next run to the same place must succeed and
leave nothing but its result. With an fp32 folder `quantize` is killed too. The exit status is 1 if something was half
made.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gpt2_edge.errors import Gpt2EdgeError
from gpt2_edge.folder import open_folder
from gpt2_edge.pack import pack_folder, unpack_folder
from gpt2_edge.seal import new_file, new_folder, write_manifest

_FAILED: Final = 3

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


def is_whole(destination: Path) -> bool:
    """Whether what lies there is a whole folder, pack or file.

    Raises:
        Gpt2EdgeError: It is not.
    """
    if not destination.exists():
        return False
    if destination.is_dir() or destination.suffix == ".gpt2":
        open_folder(destination).check_hashes()
    elif destination.stat().st_size != 64 << 16:
        raise Gpt2EdgeError(f"{destination} has {destination.stat().st_size} bytes")
    return True


def kill_once(write: Writer, destination: Path, after_seconds: float) -> str:
    """Start a writer in a process of its own, kill it, look at what it left, and run it again.

    Returns:
        "killed before it was there", "killed when it was there" or "ended before".

    Raises:
        Gpt2EdgeError: Something was half made, or was left behind.
    """
    process = os.fork()
    if process == 0:
        try:
            write(destination)
        except BaseException:  # noqa: BLE001 - the parent sees the status
            os._exit(_FAILED)
        os._exit(0)
    time.sleep(after_seconds)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) == _FAILED:
        raise Gpt2EdgeError("the writer failed")
    there = is_whole(destination)
    outcome = "ended before" if os.WIFEXITED(status) else f"killed {'when' if there else 'before'} it was there"
    _remove(destination)
    process = os.fork()  # in a process of its own as well: not everything survives a fork that was used before it
    if process == 0:
        write(destination)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    if status or not is_whole(destination):
        raise Gpt2EdgeError("the next run failed")
    left = [path.name for path in destination.parent.iterdir() if path != destination]
    if left:
        raise Gpt2EdgeError(f"the next run left {left}")
    _remove(destination)
    return outcome


def kill_many(write: Writer, destination: Path, kills: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Kill a writer at moments between its start and a little after its end.

    Returns:
        How often each outcome was seen, and what went wrong.
    """
    random_numbers = random.Random(seed)
    start = time.perf_counter()
    write_in_child = os.fork()
    if write_in_child == 0:
        write(destination)
        os._exit(0)
    os.waitpid(write_in_child, 0)
    seconds = time.perf_counter() - start
    _remove(destination)
    outcomes: Counter[str] = Counter()
    findings = []
    for number in range(kills):
        after_seconds = random_numbers.uniform(0, 1.1 * seconds)
        try:
            outcomes[kill_once(write, destination, after_seconds)] += 1
        except Gpt2EdgeError as error:
            findings.append(f"kill {number} after {after_seconds:.3f} s: {error}")
            shutil.rmtree(destination.parent)
            destination.parent.mkdir()
    return outcomes, findings


def main() -> int:
    """Kill all writers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of all writers together")
    parser.add_argument("--fp32-folder", type=Path, help="quantize this folder too, a tenth as often as the others")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    writers: dict[str, tuple[Writer, str]] = {
        "seal": (seal, "model"),
        "pack": (pack, "model.gpt2"),
        "unpack": (unpack, "model"),
        "replace": (replace_a_file, "manifest.sig"),
    }
    plan = dict.fromkeys(writers, -(-arguments.kills // len(writers)))
    if arguments.fp32_folder is not None:
        from gpt2_edge.quantize.pipeline import quantize_folder
        from gpt2_edge.quantize.recipes import default_recipe

        writers["quantize"] = (
            lambda place: quantize_folder(arguments.fp32_folder, place, default_recipe("int8")),
            "model",
        )
        plan["quantize"] = -(-arguments.kills // 40)
    all_findings = []
    for name, (write, file_name) in writers.items():
        with tempfile.TemporaryDirectory() as parent:
            place = Path(parent, "place")
            place.mkdir()
            outcomes, findings = kill_many(write, place / file_name, plan[name], arguments.seed)
        print(f"{name}: {plan[name]} kills: {dict(outcomes)}, {len(findings)} findings", flush=True)
        all_findings += [f"{name}: {finding}" for finding in findings]
    print("\n".join(all_findings))
    return 1 if all_findings else 0


def _remove(destination: Path) -> None:
    if destination.is_dir():
        shutil.rmtree(destination)
    else:
        destination.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
