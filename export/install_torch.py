"""Install the CPU build of torch with pip, and say so where a plain `pip install torch` would bring CUDA.

On Linux the torch on the Python Package Index is the one with CUDA: several gigabytes that exporting never uses. This
asks pip what it would download. If that is the CPU build, it is installed; if not, PyTorch's own index of CPU builds is
taken, or, where it cannot be reached, the user is told before anything large starts.

    python export/install_torch.py 2.13.0

Runs before anything is installed, so it needs nothing but pip.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Final

CPU_INDEX: Final = "https://download.pytorch.org/whl/cpu"
_SECONDS_TO_INTERRUPT: Final = 10


def main() -> int:
    """Install one version of torch into the environment of this Python."""
    parser = argparse.ArgumentParser(description="Install the CPU build of torch.")
    parser.add_argument("version")
    parser.add_argument("--quiet", action="store_true", help="no progress bar of pip")
    arguments = parser.parse_args()
    if installed_version() == arguments.version:
        return 0
    requirement = f"torch=={arguments.version}"
    resolved = resolve(requirement)
    index: list[str] = []
    if resolved is not None and brings_cuda(resolved):
        print(f"A plain `pip install {requirement}` would bring CUDA here: several gigabytes that are not needed.")
        if resolve(requirement, "--index-url", CPU_INDEX) is not None:
            print(f"Installing the CPU build from {CPU_INDEX} instead.", flush=True)
            index = ["--index-url", CPU_INDEX]
        else:
            print(
                f"PyTorch's index of CPU builds, {CPU_INDEX}, cannot be reached from here. Either interrupt now "
                "(Ctrl-C), download the torch wheel for the CPU from there on another machine and install it into "
                f".venv; or wait {_SECONDS_TO_INTERRUPT} seconds for the large download.",
                flush=True,
            )
            time.sleep(_SECONDS_TO_INTERRUPT)
    return pip("install", *(["--quiet"] if arguments.quiet else []), requirement, *index).returncode


def installed_version() -> str | None:
    """Return the version of the installed torch without its build tag; None if there is none."""
    if importlib.util.find_spec("torch") is None:
        return None
    return metadata.version("torch").partition("+")[0]


def resolve(requirement: str, *options: str) -> dict[str, Any] | None:
    """Ask pip which file it would install for a requirement; None if it finds none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        arguments = ("install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps", "--report", str(report))
        if pip(*arguments, *options, requirement, capture=True).returncode != 0:
            return None
        chosen: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))["install"][0]
        return chosen


def brings_cuda(resolved: dict[str, Any]) -> bool:
    """Tell whether what pip would install needs NVIDIA's packages on this platform."""
    if not sys.platform.startswith("linux"):
        return False
    needs = resolved["metadata"].get("requires_dist", [])
    return any(need.startswith(("nvidia-", "cuda-")) for need in needs)


def pip(*arguments: str, capture: bool = False) -> subprocess.CompletedProcess[bytes]:
    """Run pip of this Python."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, check=False, capture_output=capture)


if __name__ == "__main__":
    sys.exit(main())
