"""What the scripts that emulate a processor share: folders are checked by a Python that runs under qemu-user."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence


def find_program(name: str, package: str) -> str:
    """Return where a program is.

    Raises:
        SystemExit: It is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not installed: on Debian and Ubuntu, run apt-get install {package}")
    return found


def check_folders(python: Sequence[str], folders: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run `gpt2-edge verify --machine` for each folder, print what it says, and return how many failed.

    Args:
        python: The command of the emulated Python.
        folders: Quantized model folders, or names of bundled models.
        environment: Of that Python; None for this one's.
    """
    failed = 0
    for folder in folders:
        done = run([*python, "-m", "gpt2_edge", "verify", folder, "--machine", "--threads", "1"], environment)
        # The emulator warns of what it cannot emulate.
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "TCG doesn't support" not in line]
        print(f"{folder}: {lines[-1] if lines else 'nothing was said'}", flush=True)
        failed += done.returncode != 0
    return failed


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command and keep what it prints."""
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=False, env=environment)
