"""Check model folders under an emulated Haswell: AVX2, whose 8-bit integer products saturate, and no VNNI.

python tests/emulated_haswell.py FOLDER [FOLDER ...] [--processor NAME]

Runs `gpt2-edge verify --machine` under qemu-user (Debian and Ubuntu: apt-get install qemu-user). No part of the test
suite: emulation takes a minute or more for a folder as small as the storyteller.
"""

import argparse
import sys

from emulation import check_folders, find_program, run

PROBE = "from gpt2_edge.saturation import products_saturate; print(products_saturate())"


def main() -> int:
    """Check each folder; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="a quantized model folder, or storyteller")
    parser.add_argument("--processor", default="Haswell", help="as `qemu-x86_64 -cpu help` names it (default: Haswell)")
    arguments = parser.parse_args()
    emulated = [find_program("qemu-x86_64", "qemu-user"), "-cpu", arguments.processor, sys.executable]
    print("8-bit products saturate:", run([*emulated, "-c", PROBE]).stdout.strip(), flush=True)
    return check_folders(emulated, arguments.folders)


if __name__ == "__main__":
    sys.exit(main())
