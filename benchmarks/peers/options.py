"""The options of `gpt2-edge bench` that are about peers."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt2_edge.benchmarks.peers.catalog import PEERS, Peer, peers_named
from gpt2_edge.errors import OptionError

if TYPE_CHECKING:
    from gpt2_edge.benchmarks.peers.preparation import PeerModel


def add_peer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--peers` and what belongs to it."""
    group = parser.add_argument_group("other programs beside them, with the same weights, threads and tests")
    names = ",".join(peer.name for peer in PEERS)
    group.add_argument("--peers", metavar="NAME,...", help=f"some or all of {names}")
    group.add_argument(
        "--checkpoint", metavar="FOLDER", type=Path, help="the one that the model folders were exported from"
    )
    group.add_argument("--yes", action="store_true", help="install peers that are missing, without asking")


def peer_models_from(arguments: argparse.Namespace) -> "list[PeerModel]":
    """Return the models of the peers that are asked for, installed and converted as far as they can be.

    Raises:
        OptionError: The options do not go together, or a peer is not known.
        CheckpointError: The checkpoint cannot be read.
    """
    if arguments.peers is None:
        if arguments.checkpoint is not None or arguments.yes:
            raise OptionError("--checkpoint and --yes say how peers are measured: give --peers as well")
        return []
    if arguments.checkpoint is None:
        raise OptionError("--peers needs --checkpoint FOLDER, the checkpoint that peers are converted from")
    from gpt2_edge.benchmarks.peers.preparation import prepare_peers, read_checkpoint

    peers, checkpoint = peers_named(arguments.peers.split(",")), read_checkpoint(arguments.checkpoint)
    return prepare_peers(peers, checkpoint, lambda missing: _may_install(missing, arguments.yes), _say)


def _may_install(missing: Sequence[Peer], agreed: bool) -> bool:
    """Say what would be installed; ask, unless that is agreed to or nobody can answer."""
    from gpt2_edge.benchmarks.peers.installation import environment_of

    for peer in missing:
        _say(
            f"{peer.title} is not installed. pip would install {', '.join(peer.all_requirements())} into a virtual "
            f"environment of its own, {environment_of(peer)}: about {peer.installed_megabytes:,} MB"
            f"{', with the CPU build of torch' if peer.needs_torch else ', compiled here, in some minutes'}"
        )
    if agreed or not sys.stdin.isatty():
        return agreed
    print("Install? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _say(text: str) -> None:
    print(f"bench: {text}", file=sys.stderr, flush=True)
