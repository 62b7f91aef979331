"""From a checkpoint to a sealed model folder: read, trace, write, check, seal."""

from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from gpt2_edge.errors import MissingDependencyError
from gpt2_edge.folder import TOKENIZER_NAME
from gpt2_edge.manifest import Architecture, Manifest
from gpt2_edge.progress import Progress
from gpt2_edge.seal import check_destination, new_folder, write_manifest
from gpt2_edge.version import VERSION

try:
    from gpt2_edge.export.checkpoint import Checkpoint, read_checkpoint
    from gpt2_edge.export.config import CheckpointConfig
    from gpt2_edge.export.half_precision import to_half_precision
    from gpt2_edge.export.parity import CASES, Expectation, check_parity, expected_logits
    from gpt2_edge.export.plain_attention import save_with_plain_attention
    from gpt2_edge.export.source import find_checkpoint, is_hub_name
    from gpt2_edge.export.tracing import save, traced
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"exporting needs {error.name}, which is not installed: run pip install 'gpt2-edge[cpu,export]' "
        "--extra-index-url https://download.pytorch.org/whl/cpu (the index has torch without CUDA)"
    ) from error

GRAPH_NAME: Final = "model.onnx"
CUDA_GRAPH_NAME: Final = "model_cuda.onnx"
MINIMUM_ONNXRUNTIME: Final = "1.22"  # the first whose MatMulNBits takes 8 bits


def export_checkpoint(
    checkpoint: str | Path,
    destination: Path,
    *,
    precision: str = "fp32",
    revision: str | None = None,
    offline: bool = False,
    max_context: int | None = None,
) -> Manifest:
    """Export a checkpoint to a model folder, which appears whole or not at all.

    Args:
        checkpoint: Folder of a Hugging Face GPT-2 checkpoint; or, as a `str`, the name of a hub's repository, which
            is downloaded unless there is a folder of that name.
        destination: The model folder to make; must not exist.
        precision: "fp32", for the CPU, CUDA and quantizing; or "fp16", for CUDA alone.
        revision: Branch, tag or commit of the repository.
        offline: Take what was downloaded before, and open no connection.
        max_context: Keep this many positions only, which makes a smaller KV cache.

    Returns:
        The manifest of the new folder.

    Raises:
        CheckpointError: The checkpoint cannot be read or cannot be exported exactly.
        ParityError: The graph does not compute what the checkpoint computes.
        ModelFolderError: The destination exists or cannot be written.
        OptionError: `max_context` is more than the checkpoint has.
    """
    check_destination(destination)
    source = find_checkpoint(checkpoint, revision, offline)
    graphs = {"decoder": GRAPH_NAME}
    if precision == "fp32":
        graphs["decoder_cuda"] = CUDA_GRAPH_NAME
    with Progress("export", total=4 + (1 + len(graphs)) * len(CASES)) as progress:
        is_ambiguous = is_hub_name(checkpoint) and source == Path(checkpoint)
        progress.start(
            f"reading the folder {source}, no hub's repository" if is_ambiguous else "reading the checkpoint"
        )
        with new_folder(destination) as folder:
            # What it returns holds no weights: those of the checkpoint would double what the check takes.
            written = _write(source, max_context, precision, folder, progress)
            config = written.config
            progress.start("comparing with the checkpoint")
            parity = check_parity(folder / GRAPH_NAME, config, written.expected, progress.advance, precision)
            if "decoder_cuda" in graphs:
                check_parity(folder / CUDA_GRAPH_NAME, config, written.expected, progress.advance)
            progress.start("sealing")
            manifest = write_manifest(
                folder,
                Manifest(
                    architecture=written.architecture,
                    flavour="fused",
                    precision=precision,
                    cache_precision=precision,
                    recipe=None,
                    graphs=graphs,
                    end_of_text=config.eos_token_id,
                    source=written.source,
                    tools={
                        "gpt2-edge": VERSION,
                        **{name: metadata.version(name) for name in ("torch", "onnxscript", "onnx-ir", "onnxruntime")},
                    },
                    minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
                    measured={"parity": asdict(parity)},
                ),
            )
        progress.advance()
    return manifest


@dataclass(frozen=True, slots=True)
class _Written:
    """What is known of a checkpoint after its graph was written."""

    config: CheckpointConfig
    architecture: Architecture
    source: dict[str, Any]
    expected: list[Expectation]


def _write(source: Path, max_context: int | None, precision: str, folder: Path, progress: Progress) -> _Written:
    """Read a checkpoint, and write all of a model folder but its manifest."""
    read = read_checkpoint(source, max_context)
    architecture = _architecture(read)
    progress.advance()
    progress.start("computing its logits")
    expected = expected_logits(read.weights, read.config, progress.advance)
    progress.start("tracing the graph")
    with traced(read.weights, read.config) as model:
        if precision == "fp16":
            to_half_precision(model)
        progress.advance()
        progress.start("writing the graph and the weights")
        save(model, folder / GRAPH_NAME)
    if precision == "fp32":
        save_with_plain_attention(folder / GRAPH_NAME, folder / CUDA_GRAPH_NAME, architecture)
    # Not `tokenizer.save`, which raises a plain Exception when the disk is full.
    (folder / TOKENIZER_NAME).write_text(read.tokenizer.to_str(), encoding="utf-8", newline="\n")
    progress.advance()
    return _Written(read.config, architecture, read.source, expected)


def _architecture(read: Checkpoint) -> Architecture:
    config = read.config
    return Architecture(
        layers=config.n_layer,
        heads=config.n_head,
        head_size=config.padded_head_size,
        width=config.n_embd,
        inner_width=config.n_inner,
        context_length=config.n_positions,
        vocabulary_size=config.vocab_size,
        activation=config.activation_function,
        tied_head=read.has_tied_head,
    )
