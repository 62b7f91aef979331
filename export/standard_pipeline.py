"""From a checkpoint to a sealed model folder of the standard flavour, which optimum loads as well."""

import shutil
import tempfile
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Final

import numpy as np

from gpt2_edge.export.checkpoint import Checkpoint, read_checkpoint
from gpt2_edge.export.parity import CASES, Case, FloatArray, IntArray, compare, expected_logits
from gpt2_edge.export.pipeline import GRAPH_NAME
from gpt2_edge.export.source import find_checkpoint
from gpt2_edge.export.standard_graph import export_graph
from gpt2_edge.export.tracing import save
from gpt2_edge.folder import TOKENIZER_NAME, open_folder
from gpt2_edge.manifest import Architecture, Manifest
from gpt2_edge.progress import Progress
from gpt2_edge.seal import check_destination, new_folder, write_manifest
from gpt2_edge.standard_folder import COMPANIONS, CONFIG_NAME, MINIMUM_ONNXRUNTIME
from gpt2_edge.standard_session import StandardStepSession
from gpt2_edge.version import VERSION

_PACKAGES: Final = ("optimum-onnx", "transformers", "torch", "onnx-ir", "onnxruntime")


def export_standard(
    checkpoint: str | Path,
    destination: Path,
    *,
    revision: str | None = None,
    offline: bool = False,
    max_context: int | None = None,
) -> Manifest:
    """Export a checkpoint through optimum, as float32; the folder appears whole or not at all.

    Args and errors are those of `export_checkpoint`.

    Returns:
        The manifest of the new folder.
    """
    check_destination(destination)
    source = find_checkpoint(checkpoint, revision, offline)
    with Progress("export", total=4 + 2 * len(CASES)) as progress:
        progress.start("reading the checkpoint")
        read = read_checkpoint(source, max_context)
        progress.advance()
        progress.start("computing its logits")
        expected = expected_logits(read.weights, read.config, progress.advance)
        with new_folder(destination) as folder:
            progress.start("tracing the graph through optimum")
            _write_files(read, folder)
            progress.advance()
            progress.start("comparing with the checkpoint")
            draft = _manifest(read)
            write_manifest(folder, draft)
            graph = _Graph(StandardStepSession(open_folder(folder), threads=1))
            parity = compare(graph, expected, progress.advance)
            progress.start("sealing")
            manifest = write_manifest(folder, replace(draft, measured={"parity": asdict(parity)}))
        progress.advance()
    return manifest


def _write_files(read: Checkpoint, folder: Path) -> None:
    # Inside of the new folder, because the graph is as large as the model, and what is left behind goes with it.
    with tempfile.TemporaryDirectory(prefix=".optimum-", dir=folder) as temporary:
        model = export_graph(read, Path(temporary))
        save(model, folder / GRAPH_NAME)
        # What the checkpoint has beside its weights is as its makers want it; config.json is the one that optimum uses.
        for source in (Path(temporary), read.path):
            for name in COMPANIONS:
                if (source / name).is_file() and not (source == read.path and name == CONFIG_NAME):
                    shutil.copyfile(source / name, folder / name)
    (folder / TOKENIZER_NAME).write_text(read.tokenizer.to_str(), encoding="utf-8", newline="\n")


def _manifest(read: Checkpoint) -> Manifest:
    config = read.config
    return Manifest(
        architecture=Architecture(
            layers=config.n_layer,
            heads=config.n_head,
            head_size=config.head_size,
            width=config.n_embd,
            inner_width=config.n_inner,
            context_length=config.n_positions,
            vocabulary_size=config.vocab_size,
            activation=config.activation_function,
            tied_head=read.has_tied_head,
        ),
        flavour="standard",
        precision="fp32",
        cache_precision="fp32",
        recipe=None,
        graphs={"decoder": GRAPH_NAME},
        end_of_text=config.eos_token_id,
        source=read.source,
        tools={"gpt2-edge": VERSION, **{name: metadata.version(name) for name in _PACKAGES}},
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
    )


class _Graph:
    """Runs the cases of the parity check the way the runtime runs this flavour."""

    def __init__(self, session: StandardStepSession) -> None:
        self._session = session

    def logits(self, rows: list[IntArray], case: Case) -> FloatArray:
        """Return the logits after each row's new tokens, row after row, shape [sum of new, vocabulary]."""
        self._session.release_spare_slots()
        self._session.reserve_slots(len(rows), {})
        for slot, (row, past) in enumerate(zip(rows, case.past, strict=True)):
            if past:
                self._session.prefill(slot, row[:past].tolist(), 0, np.arange(0))
        if len(rows) > 1 and set(case.new) == {1}:
            return self._session.decode([int(row[-1]) for row in rows], case.past)
        return np.concatenate(
            [
                self._session.prefill(slot, row[past:].tolist(), past, np.arange(new))
                for slot, (row, past, new) in enumerate(zip(rows, case.past, case.new, strict=True))
            ]
        )
