"""Check model folders under an emulated Haswell: AVX2, whose 8-bit integer products saturate, and no VNNI.

python tests/emulated_haswell.py FOLDER [FOLDER ...] [--processor NAME]

Runs `gpt2-edge verify --machine` under qemu-user (Debian and Ubuntu: apt-get install qemu-user). No part of the test
suite: emulation takes a minute or more for a folder as small as the storyteller.
"""

import argparse
import shutil
import subprocess
import sys

PROBE = "from gpt2_edge.saturation import products_saturate; print(products_saturate())"


def main() -> int:
    """Check each folder; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="a quantized model folder, or storyteller")
    parser.add_argument("--processor", default="Haswell", help="as `qemu-x86_64 -cpu help` names it (default: Haswell)")
    arguments = parser.parse_args()
    qemu = shutil.which("qemu-x86_64")
    if qemu is None:
        parser.error("qemu-x86_64 is not installed: run apt-get install qemu-user, say")
    emulated = [qemu, "-cpu", arguments.processor, sys.executable]
    print("8-bit products saturate:", run([*emulated, "-c", PROBE]).stdout.strip(), flush=True)
    failed = 0
    for folder in arguments.folders:
        done = run([*emulated, "-m", "gpt2_edge", "verify", folder, "--machine", "--threads", "1"])
        # The emulator warns of what it cannot emulate.
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "TCG doesn't support" not in line]
        print(f"{folder}: {lines[-1] if lines else 'nothing was said'}", flush=True)
        failed += done.returncode != 0
    return failed


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False)


if __name__ == "__main__":
    sys.exit(main())
