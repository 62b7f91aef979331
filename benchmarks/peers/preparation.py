"""Make peers ready to be measured: install those that are agreed to, and convert the checkpoint for each."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpt2_edge.benchmarks.peers.catalog import Peer
from gpt2_edge.benchmarks.peers.installation import environment_of, install, is_installed
from gpt2_edge.benchmarks.peers.process import start_peer
from gpt2_edge.errors import Gpt2EdgeError, MissingDependencyError
from gpt2_edge.folder import file_sha256
from gpt2_edge.known_hashes import cache_folder
from gpt2_edge.seal import new_folder

_NAME_DIGITS: Final = 12


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What all peers are converted from.

    Attributes:
        folder: `config.json` and the weights.
        source: SHA-256 of the files with weights, by name, as a manifest has them.
        digest: Tells this checkpoint from all others.
        context_length: Tokens that the model can hold.
        vocabulary_size: How many tokens there are.
    """

    folder: Path
    source: dict[str, str]
    digest: str
    context_length: int
    vocabulary_size: int


@dataclass(frozen=True, slots=True)
class PeerModel:
    """A checkpoint in one form of one peer: a row of the report.

    Attributes:
        peer: The program.
        variant: The form.
        checkpoint: What it is converted from.
        folder: What the peer loads; None if there is nothing to load.
        error: Why there is not.
    """

    peer: Peer
    variant: str
    checkpoint: Checkpoint
    folder: Path | None = None
    error: str | None = None

    @property
    def name(self) -> str:
        """Of the row."""
        return f"{self.peer.title} {self.variant}"


def read_checkpoint(given: str | Path) -> Checkpoint:
    """Read what of a checkpoint matters here.

    Raises:
        CheckpointError: It is no GPT-2 checkpoint.
    """
    # Only for peers: exporting is an optional part of gpt2-edge.
    from gpt2_edge.export.config import read_config
    from gpt2_edge.export.source import describe_source, find_checkpoint

    folder = find_checkpoint(given, offline=True)
    config = read_config(folder)
    hashes: dict[str, str] = describe_source(folder)["sha256"]
    whole = [file_sha256(folder / "config.json"), *(hashes[name] for name in sorted(hashes))]
    digest = hashlib.sha256("\n".join(whole).encode()).hexdigest()
    return Checkpoint(folder.resolve(), hashes, digest, config.n_positions, config.vocab_size)


def prepare_peers(
    peers: Sequence[Peer],
    checkpoint: Checkpoint,
    may_install: Callable[[Sequence[Peer]], bool],
    on_stage: Callable[[str], object],
) -> list[PeerModel]:
    """Install and convert what is missing.

    Args:
        peers: Which.
        checkpoint: What they are converted from.
        may_install: Asked once about those that are not installed, if there are any.
        on_stage: Called with a description when something else begins.

    Returns:
        A model for each peer and form, in order; one that is not available says why.
    """
    missing = [peer for peer in peers if not is_installed(peer)]
    agreed = bool(missing) and may_install(missing)
    models = []
    for peer in peers:
        error = None
        if peer in missing:
            try:
                if not agreed:
                    raise MissingDependencyError(f"{peer.title} is not installed: --yes installs it")
                on_stage(f"installing {peer.title}")
                install(peer)
            except MissingDependencyError as failure:
                error = str(failure)
        models += [
            PeerModel(peer, variant, checkpoint, error=error)
            if error
            else _converted(peer, variant, checkpoint, on_stage)
            for variant in peer.variants
        ]
    return models


def _converted(peer: Peer, variant: str, checkpoint: Checkpoint, on_stage: Callable[[str], object]) -> PeerModel:
    # A conversion belongs to the version that made it: other requirements are another environment's name.
    name = f"{environment_of(peer).name}-{variant}"
    folder = cache_folder() / "peer-models" / checkpoint.digest[:_NAME_DIGITS] / name
    try:
        if not folder.exists():
            on_stage(f"converting for {peer.title} {variant}")
            with new_folder(folder) as temporary, start_peer(peer) as process:
                process.ask("convert", checkpoint=str(checkpoint.folder), variant=variant, folder=str(temporary))
    except (Gpt2EdgeError, OSError) as error:
        return PeerModel(peer, variant, checkpoint, error=f"cannot be converted: {error}")
    return PeerModel(peer, variant, checkpoint, folder=folder)
