"""Check model folders under emulated ARM processors, whose kernels are others than those of x86.

python tests/emulated_arm.py FOLDER [FOLDER ...] [--processor NAME ...]

Runs `gpt2-edge verify --machine` under qemu-user (Debian and Ubuntu, as root: apt-get install qemu-user debootstrap).
The first run makes a folder of 330 MB under the user's cache folder: Debian's Python for arm64, and the wheels that
the runtime needs. No part of the test suite: emulation takes a minute or more for a folder as small as the storyteller.
"""

import argparse
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

from emulation import check_folders, find_program

from gpt2_edge.known_hashes import cache_folder

PROCESSORS: Final = {
    "cortex-a72": "no dot products, as in a Raspberry Pi 4",
    "cortex-a76": "dot products, as in a Raspberry Pi 5",
    "max": "8-bit matrix products too, as in newer servers and Apple's processors",
}
_REPOSITORY: Final = Path(__file__).resolve().parent.parent
_DEBIAN: Final = "bookworm"
_PYTHON: Final = "3.11"  # of that Debian
_PACKAGES: Final = ("libc6", "libgcc-s1", "libstdc++6", "libexpat1", "libffi8", "libssl3", "zlib1g", "python3.11")
# Without it, ONNX Runtime reads that of this machine and crashes.
_PROCESSOR_FACTS: Final = """processor\t: 0
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: 0xd08
CPU revision\t: 3
"""


def main() -> int:
    """Check each folder on each processor; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", metavar="FOLDER", nargs="+", help="a quantized model folder, or storyteller")
    parser.add_argument(
        "--processor", action="append", help=f"as `qemu-aarch64 -cpu help` names it (default: {', '.join(PROCESSORS)})"
    )
    arguments = parser.parse_args()
    qemu = find_program("qemu-aarch64", "qemu-user")
    system = cache_folder() / f"emulated-arm-{_DEBIAN}"
    if not system.exists():
        make_system(system)
    packages = system / "packages"
    install(packages)
    failed = 0
    for processor in arguments.processor or PROCESSORS:
        print(f"{processor}: {PROCESSORS.get(processor, 'as qemu has it')}", flush=True)
        python = [qemu, "-cpu", processor, "-L", str(system), str(system / "usr" / "bin" / f"python{_PYTHON}")]
        failed += check_folders(python, arguments.folders, os.environ | {"PYTHONPATH": str(packages)})
    return failed


def make_system(system: Path) -> None:
    """Unpack Debian's Python for arm64; nothing of it is run here."""
    print("downloading Debian's Python for arm64", flush=True)
    debootstrap = find_program("debootstrap", "debootstrap")
    temporary = system.with_name(f"{system.name}.{os.getpid()}")
    temporary.mkdir(parents=True)
    try:
        root = temporary / "root"
        wanted = f"--include={','.join(_PACKAGES)}"
        command(debootstrap, "--foreign", "--arch=arm64", "--variant=minbase", wanted, _DEBIAN, str(root))
        for package in sorted((root / "var" / "cache" / "apt" / "archives").glob("*.deb")):
            command("dpkg-deb", "--extract", str(package), str(temporary / "system"))
        (temporary / "system" / "proc").mkdir(exist_ok=True)
        (temporary / "system" / "proc" / "cpuinfo").write_text(_PROCESSOR_FACTS, encoding="ascii")
        (temporary / "system").rename(system)
    finally:
        shutil.rmtree(temporary)


def install(packages: Path) -> None:
    """Install this package, and the wheels for ARM of what it needs."""
    for_arm = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 27, 28)]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(packages), "--no-deps"]
    needed = [f"onnxruntime=={version('onnxruntime')}", "numpy", f"tokenizers=={version('tokenizers')}"]
    command(*pip, "--only-binary=:all:", f"--python-version={_PYTHON}", *for_arm, *needed)
    command(*pip, str(_REPOSITORY))


def command(*words: str) -> None:
    """Run a command, or end with what it said."""
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed:\n{done.stdout[-2000:]}")


if __name__ == "__main__":
    sys.exit(main())
