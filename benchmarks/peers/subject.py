"""A peer under measurement: the same tests as a model folder, in a process of its own environment."""

from typing import Any

from gpt2_edge.benchmarks.peers.catalog import PRECISIONS
from gpt2_edge.benchmarks.peers.preparation import PeerModel
from gpt2_edge.benchmarks.peers.process import start_peer
from gpt2_edge.benchmarks.subject import Subject
from gpt2_edge.benchmarks.worker_process import WorkerProcess


class PeerSubject(Subject):
    """A peer's model with a number of threads.

    Args:
        name: Tells the rows apart.
        model: What the peer runs, or why it cannot.
        threads: How many compute.
    """

    def __init__(self, name: str, model: PeerModel, threads: int) -> None:
        self._model = model
        self._threads = threads
        super().__init__(name, str(model.folder or model.checkpoint.folder), threads)

    @property
    def context_length(self) -> int:
        """How many tokens the model can hold."""
        return self._model.checkpoint.context_length

    def _open(self) -> None:
        if self._model.error is not None:
            self.fail(self._model.error)
        else:
            self.alive = True

    def _start_process(self) -> WorkerProcess:
        return start_peer(self._model.peer)

    def _load_arguments(self, device: str) -> dict[str, Any]:
        return {
            "folder": self.folder,
            "variant": self._model.variant,
            "threads": self._threads,
            "vocabulary_size": self._model.checkpoint.vocabulary_size,
            "distribution": self._model.peer.distribution,
        }

    def _facts(self) -> dict[str, Any]:
        checkpoint, folder = self._model.checkpoint, self._model.folder
        facts = {
            "peer": " ".join(filter(None, (self._model.peer.distribution, self._loaded.get("version")))),
            "precision": PRECISIONS.get(self._model.variant),
            "context_length": checkpoint.context_length,
            "vocabulary_size": checkpoint.vocabulary_size,
            "content_sha256": checkpoint.digest,
        }
        if folder is not None:
            facts["size_bytes"] = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        return facts
