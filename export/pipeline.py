"""From a checkpoint to a sealed model folder: read, trace, write, check, seal."""

from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Final

from gpt2_edge.errors import MissingDependencyError
from gpt2_edge.export.config import CheckpointConfig, read_config
from gpt2_edge.folder import TOKENIZER_NAME, file_sha256
from gpt2_edge.manifest import Architecture, Manifest
from gpt2_edge.progress import Progress
from gpt2_edge.seal import check_destination, new_folder, write_manifest
from gpt2_edge.version import VERSION

try:
    from gpt2_edge.export.parity import CASES, check_parity
    from gpt2_edge.export.tokenizer_files import read_tokenizer
    from gpt2_edge.export.tracing import save, trace
    from gpt2_edge.export.weights import read_weights, weight_files
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"exporting needs {error.name}, which is not installed: run pip install 'gpt2-edge[cpu,export]' "
        "--extra-index-url https://download.pytorch.org/whl/cpu (the index has torch without CUDA)"
    ) from error

GRAPH_NAME: Final = "model.onnx"
MINIMUM_ONNXRUNTIME: Final = "1.22"  # the first whose MatMulNBits takes 8 bits


def export_checkpoint(checkpoint: Path, destination: Path) -> Manifest:
    """Export a checkpoint to an fp32 model folder, which appears whole or not at all.

    Args:
        checkpoint: Folder of a Hugging Face GPT-2 checkpoint.
        destination: The model folder to make; must not exist.

    Returns:
        The manifest of the new folder.

    Raises:
        CheckpointError: The checkpoint cannot be read or cannot be exported exactly.
        ParityError: The graph does not compute what the checkpoint computes.
        ModelFolderError: The destination exists or cannot be written.
    """
    check_destination(destination)
    with Progress("export", total=4 + len(CASES)) as progress:
        progress.start("reading the checkpoint")
        config = read_config(checkpoint)
        tokenizer = read_tokenizer(checkpoint, config.vocab_size)
        weights = read_weights(checkpoint, config)
        progress.advance()
        progress.start("tracing the graph")
        model = trace(weights, config)
        progress.advance()
        with new_folder(destination) as folder:
            progress.start("writing the graph and the weights")
            save(model, folder / GRAPH_NAME)
            # Not `tokenizer.save`, which raises a plain Exception when the disk is full.
            (folder / TOKENIZER_NAME).write_text(tokenizer.to_str(), encoding="utf-8", newline="\n")
            progress.advance()
            progress.start("comparing with the checkpoint")
            parity = check_parity(folder / GRAPH_NAME, weights, config, progress.advance)
            progress.start("sealing")
            manifest = write_manifest(
                folder,
                Manifest(
                    architecture=_architecture(config),
                    flavour="fused",
                    precision="fp32",
                    recipe=None,
                    graphs={"decoder": GRAPH_NAME},
                    end_of_text=config.eos_token_id,
                    source={
                        "name": checkpoint.resolve().name,
                        "revision": None,
                        "sha256": {path.name: file_sha256(path) for path in weight_files(checkpoint)},
                    },
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


def _architecture(config: CheckpointConfig) -> Architecture:
    return Architecture(
        layers=config.n_layer,
        heads=config.n_head,
        head_size=config.padded_head_size,
        width=config.n_embd,
        inner_width=config.n_inner,
        context_length=config.n_positions,
        vocabulary_size=config.vocab_size,
        activation=config.activation_function,
        tied_head=config.tie_word_embeddings,
    )
