"""Environments of peers: each a virtual environment of its own under the user's cache folder."""

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from gpt2_edge.benchmarks.peers.catalog import TORCH_VERSION, Peer, build_options
from gpt2_edge.errors import MissingDependencyError
from gpt2_edge.known_hashes import cache_folder

_COMPLETE: Final = "complete"  # written last
_LOG: Final = "install.log"
_NAME_DIGITS: Final = 12
_SHOWN_LINES: Final = 3


def environment_of(peer: Peer) -> Path:
    """Return the folder of a peer's environment, whether it exists or not: other requirements are another folder."""
    wanted = repr((peer.all_requirements(), build_options(), platform.python_version_tuple()[:2]))
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:_NAME_DIGITS]
    return cache_folder() / "peers" / f"{peer.name}-{digest}"


def is_installed(peer: Peer) -> bool:
    """Tell whether a peer's environment is complete."""
    return (environment_of(peer) / _COMPLETE).exists()


def python_of(peer: Peer) -> Path:
    """Return the Python of a peer's environment."""
    return environment_of(peer) / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def install(peer: Peer) -> None:
    """Make a peer's environment; what an earlier attempt left behind is removed.

    Raises:
        MissingDependencyError: Something cannot be installed.
    """
    folder = environment_of(peer)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log = folder / _LOG
        for command in _commands(peer):
            with log.open("ab") as output:
                environment = {**os.environ, **build_options()}
                status = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
            if status:
                raise MissingDependencyError(f"{peer.title} cannot be installed: {_last_lines(log)}; see {log}")
        (folder / _COMPLETE).touch()
    except OSError as error:
        raise MissingDependencyError(f"{peer.title} cannot be installed into {folder}: {error}") from error


def _commands(peer: Peer) -> list[list[str]]:
    folder, python = environment_of(peer), str(python_of(peer))
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install"]
    commands: list[list[str]] = [[sys.executable, "-m", "venv", str(folder)]]
    pinned: Sequence[str] = ()
    if peer.needs_torch:
        # The same as for exporting: a plain request for torch brings gigabytes of CUDA on Linux.
        spec = importlib.util.find_spec("gpt2_edge.export.install_torch")
        script = "" if spec is None or spec.origin is None else spec.origin
        commands.append([python, script, TORCH_VERSION, "--quiet"])
        pinned = (f"torch=={TORCH_VERSION}",)
    commands.append([*pip, *pinned, *peer.requirements])
    if peer.without_dependencies:
        commands.append([*pip, "--no-deps", *peer.without_dependencies])
    return commands


def _last_lines(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")]
    return " / ".join((errors or lines)[-_SHOWN_LINES:])
