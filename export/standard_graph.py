"""Make a standard graph through optimum, and clean what it leaves behind: the embedding is stored once."""

from pathlib import Path
from typing import Any, Final, cast

import onnx_ir

from gpt2_edge.errors import CheckpointError, MissingDependencyError
from gpt2_edge.export.checkpoint import Checkpoint
from gpt2_edge.export.json_files import read_object
from gpt2_edge.export.tied_head import tie_head
from gpt2_edge.export.tracing import quiet, strip_metadata

try:
    from optimum.exporters.onnx import onnx_export_from_model
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.modeling_utils import no_init_weights
except ImportError as error:  # also raised for versions that do not fit each other
    raise MissingDependencyError(
        f"the standard flavour is exported by optimum-onnx, which cannot be imported ({error}): "
        "run pip install 'gpt2-edge[cpu,export,optimum]'"
    ) from error

_TASK: Final = "text-generation-with-past"
_TRACED_TOKENS: Final = 2  # with as many before them


def export_graph(checkpoint: Checkpoint, folder: Path) -> onnx_ir.Model:
    """Let optimum export a checkpoint.

    Args:
        checkpoint: What to export.
        folder: Where optimum writes the graph and its config files, which belong to it.

    Returns:
        The graph, with a tied embedding stored once.

    Raises:
        CheckpointError: optimum made another graph than this project knows how to run.
    """
    if checkpoint.config.n_positions < 2 * _TRACED_TOKENS:
        raise CheckpointError(
            f"the context is {checkpoint.config.n_positions}: optimum exports one of {2 * _TRACED_TOKENS} or more"
        )
    with quiet():
        onnx_export_from_model(
            _transformers_model(checkpoint), folder, task=_TASK, do_validation=False, sequence_length=_TRACED_TOKENS
        )
    model = onnx_ir.load(folder / "model.onnx")
    if checkpoint.has_tied_head:
        tie_head(model)
    strip_metadata(model)
    return model


def _transformers_model(checkpoint: Checkpoint) -> Any:
    """Give transformers the weights that were read and checked, instead of letting it read the checkpoint itself."""
    fields = read_object(checkpoint.path / "config.json")
    config = GPT2Config.from_dict(
        fields
        | {
            "n_positions": checkpoint.config.n_positions,
            "tie_word_embeddings": checkpoint.has_tied_head,
            "dtype": "float32",
        }
    )
    with no_init_weights():
        model = cast(Any, GPT2LMHeadModel)(config).eval()
    if not checkpoint.config.scale_attn_weights or checkpoint.config.scale_attn_by_inverse_layer_idx:
        # The usual implementation leaves these out. This one makes a larger graph, with a mask for every layer.
        model.set_attn_implementation("eager")
    head = checkpoint.weights.get("lm_head.weight", checkpoint.weights["wte.weight"])
    body = {f"transformer.{name}": tensor for name, tensor in checkpoint.weights.items() if name != "lm_head.weight"}
    model.load_state_dict(body | {"lm_head.weight": head})
    return model
