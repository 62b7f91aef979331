"""Read a checkpoint's weights under one set of names, and check that they are complete and fit the config."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.config import CheckpointConfig

_SINGLE_FILE: Final = "model.safetensors"
_SHARD_INDEX: Final = "model.safetensors.index.json"
# Causal masks that old checkpoints carry along; they are constants, not weights.
_MASK_BUFFER: Final = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

Weights = Mapping[str, Tensor]


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    Raises:
        CheckpointError: There are none, or a shard is missing.
    """
    if (checkpoint / _SINGLE_FILE).is_file():
        return [checkpoint / _SINGLE_FILE]
    index_path = checkpoint / _SHARD_INDEX
    if not index_path.is_file():
        others = sorted(path.name for path in checkpoint.glob("*.bin"))
        found = (
            f"; it has {', '.join(others)}: convert it with save_pretrained(safe_serialization=True)" if others else ""
        )
        raise CheckpointError(f"{checkpoint} has neither {_SINGLE_FILE} nor {_SHARD_INDEX}{found}")
    try:
        shard_of = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in shard_of.values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index_path} is not an index of shards: {error!r}") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index_path} names a shard outside of the checkpoint: {name}")
        if not (checkpoint / name).is_file():
            raise CheckpointError(f"{checkpoint} is incomplete: the shard {name} is missing")
    return [checkpoint / name for name in names]


def read_weights(checkpoint: Path, config: CheckpointConfig) -> dict[str, Tensor]:
    """Read all weights as float32, under the names of `GPT2LMHeadModel` without the `transformer.` prefix.

    A tied head is not returned: the embedding `wte.weight` is the head then, whatever the file has beside it.

    Raises:
        CheckpointError: A file cannot be read, a tensor is missing, unknown, not finite or of another shape.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(checkpoint):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    weights[name.removeprefix("transformer.")] = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; copy the file again") from error
    weights = {name: tensor for name, tensor in weights.items() if _MASK_BUFFER.fullmatch(name) is None}
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    expected = _expected_shapes(config)
    if missing := sorted(expected.keys() - weights.keys()):
        raise CheckpointError(f"{checkpoint} is incomplete: {_list(missing)} missing")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(
            f"{checkpoint} has weights that a GPT-2 of this config has no place for: {_list(unknown)}"
        )
    for name, shape in expected.items():
        weights[name] = _checked(checkpoint, name, weights[name], shape)
    return weights


def _checked(checkpoint: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{checkpoint}: {name} has the shape {tuple(tensor.shape)}, config.json asks for {shape}")
    if not tensor.is_floating_point():
        raise CheckpointError(f"{checkpoint}: {name} is {tensor.dtype}, expected floating point")
    tensor = tensor.to(torch.float32).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{checkpoint}: {name} holds NaN or infinity")
    return tensor


def _expected_shapes(config: CheckpointConfig) -> dict[str, tuple[int, ...]]:
    width, inner = config.n_embd, config.n_inner
    # GPT-2's "Conv1D" keeps matrices as [inputs, outputs].
    block = {
        "ln_1.weight": (width,),
        "ln_1.bias": (width,),
        "attn.c_attn.weight": (width, 3 * width),
        "attn.c_attn.bias": (3 * width,),
        "attn.c_proj.weight": (width, width),
        "attn.c_proj.bias": (width,),
        "ln_2.weight": (width,),
        "ln_2.bias": (width,),
        "mlp.c_fc.weight": (width, inner),
        "mlp.c_fc.bias": (inner,),
        "mlp.c_proj.weight": (inner, width),
        "mlp.c_proj.bias": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for layer in range(config.n_layer):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
