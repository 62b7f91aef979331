"""Give the readers of manifests, graphs and packs damaged files, and count what they do with them.

    python tests/fuzz.py --inputs 100000 --seed 1

Each input is a good file with a few random changes. A reader may accept it or refuse it with one line; anything else,
or more than a second, is a finding: it is printed, and the exit status is 1. The test-suite runs a few hundred.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import ModelFolder, open_folder
from gpt2_edge.graph_check import check_graph
from gpt2_edge.graph_reader import read_graph
from gpt2_edge.manifest import parse_manifest
from gpt2_edge.pack import pack_folder
from gpt2_edge.protobuf import ProtobufError
from gpt2_edge.seal import write_manifest

_LONGEST_SECONDS: Final = 1.0
_NUMBERS: Final = (0, 1, 2, 0x7F, 0x80, 0xFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_WORDS: Final = (b"[" * 50, b'{"a":' * 20, b"null", b"-1", b"1e999", b"NaN", b'"\\ud800"', b"../x", b"\xff\xfe", b"\0")

Reader = Callable[[bytes], object]


def mutate(data: bytes, random_numbers: random.Random) -> bytes:
    """Return a copy with some changes: bytes flipped, cut out, repeated, or replaced by what readers trip over."""
    changed = bytearray(data)
    for _ in range(random_numbers.randint(1, 8)):
        place = random_numbers.randrange(len(changed) + 1)
        length = min(random_numbers.choice((1, 2, 4, 16, 200)), len(changed) - place)
        action = random_numbers.randrange(6)
        if action == 0 and place < len(changed):
            changed[place] ^= 1 << random_numbers.randrange(8)
        elif action == 1:
            del changed[place : place + length]
        elif action == 2:
            changed[place:place] = changed[place : place + length]
        elif action == 3:
            changed[place : place + length] = random_numbers.choice(_WORDS)
        elif action == 4:
            changed[place : place + length] = _varint(random_numbers.choice(_NUMBERS))
        elif random_numbers.random() < 0.1:
            del changed[place:]
    return bytes(changed)


def try_inputs(name: str, good: bytes, reader: Reader, inputs: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Give a reader many inputs.

    Returns:
        How many were accepted and refused, and what else happened.
    """
    random_numbers = random.Random(f"{name} {seed}")
    outcomes: Counter[str] = Counter()
    findings = []
    for number in range(inputs):
        data = mutate(good, random_numbers)
        start = time.process_time()  # a disk may keep a test waiting
        try:
            reader(data)
            outcomes["accepted"] += 1
        except (ModelFolderError, ProtobufError) as error:
            outcomes["refused"] += 1
            if "\n" in str(error) or len(str(error)) > 1000:
                findings.append(f"{name} {number}: not one short line: {str(error)[:200]!r}")
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            findings.append(f"{name} {number}: {type(error).__name__}: {str(error)[:200]}")
        if (seconds := time.process_time() - start) > _LONGEST_SECONDS:
            findings.append(f"{name} {number}: took {seconds:.1f} s")
    return outcomes, findings


def readers(place: Path) -> dict[str, tuple[bytes, Reader]]:
    """Return each reader with a good input."""
    folder = open_folder("storyteller")
    graph = folder.content("model.onnx").read()
    # The bytes of a pack's files mean nothing to its reader, so few will do.
    small = place / "small"
    small.mkdir()
    for entry in folder.manifest.files:
        (small / entry.name).write_bytes(b"{}")
    write_manifest(small, folder.manifest)
    pack = place / "small.gpt2"
    pack_folder(open_folder(small), pack, b"s" * 96)
    damaged = place / "damaged.gpt2"

    def read_pack(data: bytes) -> None:
        damaged.write_bytes(data)
        open_folder(damaged)

    def check(data: bytes) -> None:
        check_graph(_with_graph(folder, data, place / "model.onnx"), "model.onnx")

    return {
        "manifest": (folder.manifest_bytes, lambda data: parse_manifest(data.decode("utf-8", errors="replace"))),
        "graph reader": (graph, lambda data: read_graph(memoryview(data))),
        "graph check": (graph, check),
        "pack": (pack.read_bytes(), read_pack),
    }


def main() -> int:
    """Run all readers and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="for each reader")
    parser.add_argument("--only", metavar="READER", help="manifest, graph reader, graph check or pack")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    all_findings = []
    with tempfile.TemporaryDirectory() as place:
        for name, (good, reader) in readers(Path(place)).items():
            if arguments.only not in (None, name):
                continue
            outcomes, findings = try_inputs(name, good, reader, arguments.inputs, arguments.seed)
            print(f"{name}: {json.dumps(outcomes)}, {len(findings)} findings", flush=True)
            all_findings += findings
    for finding in all_findings[:50]:
        print(finding)
    return 1 if all_findings else 0


def _with_graph(folder: ModelFolder, graph: bytes, path: Path) -> ModelFolder:
    from gpt2_edge.file_content import whole_file

    path.write_bytes(graph)
    contents = {entry.name: folder.content(entry.name) for entry in folder.manifest.files}
    contents["model.onnx"] = whole_file(path)
    return ModelFolder(folder.path, folder.manifest_bytes, folder.manifest, contents, None)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


if __name__ == "__main__":
    sys.exit(main())
