"""The other end of `peer_process.py`."""

import os
from importlib import resources
from typing import Final

from gpt2_edge.benchmarks.peers.catalog import Peer
from gpt2_edge.benchmarks.peers.installation import environment_of, python_of
from gpt2_edge.benchmarks.worker_process import WorkerProcess

_LOG_NAME: Final = "output.log"
# Nothing is fetched from a hub while something is converted or measured.
_OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}


def start_peer(peer: Peer) -> WorkerProcess:
    """Start a peer's process in its environment; what the libraries print goes into a file there."""
    driver = resources.files("gpt2_edge.benchmarks.peers") / "peer_process.py"
    log = environment_of(peer) / _LOG_NAME
    # -I: neither the working directory nor the variables of this environment add modules.
    command = [str(python_of(peer)), "-I", str(driver), str(peer.script_path)]
    return WorkerProcess(command, {**os.environ, **_OFFLINE}, log)
