"""Read a checkpoint's weights under one set of names, and check that they are complete and fit the config."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.config import CheckpointConfig
from gpt2_edge.export.weight_files import weight_files

_HEAD: Final = "lm_head.weight"
_EMBEDDING: Final = "wte.weight"
# Causal masks that old checkpoints carry along; they are constants, not weights.
_MASK_BUFFER: Final = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")

Weights = Mapping[str, Tensor]


def read_weights(checkpoint: Path, config: CheckpointConfig) -> dict[str, Tensor]:
    """Read all weights as float32, under the names of `GPT2LMHeadModel` without the `transformer.` prefix.

    A tied head is not returned: the embedding `wte.weight` is the head then, whatever the file has beside it. Nor is
    an untied head that equals the embedding: it computes the same.

    Tensors that are float32 in the file stay in it, mapped into memory, until they are used.

    Raises:
        CheckpointError: A file cannot be read, a tensor is missing, unknown, not finite or of another shape.
    """
    weights: dict[str, Tensor] = {}
    for path in weight_files(checkpoint):
        for full_name, tensor in _read_file(path):
            name = full_name.removeprefix("transformer.")
            if _MASK_BUFFER.fullmatch(name) is not None:
                continue
            if name in weights:
                raise CheckpointError(f"{path} has a second {name}: one checkpoint has each weight once")
            weights[name] = tensor
    if config.tie_word_embeddings and _HEAD in weights:
        # Of two names for one tensor a file may keep either.
        head = weights.pop(_HEAD)
        weights.setdefault(_EMBEDDING, head)
    expected = _expected_shapes(config)
    if missing := sorted(expected.keys() - weights.keys()):
        raise CheckpointError(f"{checkpoint} is incomplete: {_list(missing)} missing")
    if unknown := sorted(weights.keys() - expected.keys()):
        raise CheckpointError(
            f"{checkpoint} has weights that a GPT-2 of this config has no place for: {_list(unknown)}"
        )
    for name, shape in expected.items():
        weights[name] = _checked(checkpoint, name, weights[name], shape)
    if _HEAD in weights and torch.equal(weights[_HEAD], weights[_EMBEDDING]):
        del weights[_HEAD]
    return weights


def _read_file(path: Path) -> Iterator[tuple[str, Tensor]]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; copy the file again") from error


def _read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Read what `torch.save` wrote, by torch's own unpickler that knows tensors and containers and runs no code."""
    try:
        with warnings.catch_warnings():  # of pickles that torch did not write
            warnings.simplefilter("ignore")
            # Files of torch before 1.6, such as that of the first GPT-2, are no zip archives and cannot be mapped.
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged, or holds something else than tensors, which could run code when it is read: nothing "
            "of it was run; ask for the weights as safetensors"
        ) from error
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"cannot read {path}: {_first_line(error)}; copy the file again") from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path} holds a {type(tensors).__name__}, expected a mapping of names to tensors")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} is {type(tensor).__name__}, expected a tensor: it is not a file of weights alone"
            )
        yield name, tensor


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _checked(checkpoint: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{checkpoint}: {name} has the shape {tuple(tensor.shape)}, config.json asks for {shape}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CheckpointError(f"{checkpoint}: {name} is sparse or has no values, expected plain numbers")
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
        _EMBEDDING: (config.vocab_size, width),
        "wpe.weight": (config.n_positions, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for layer in range(config.n_layer):
        shapes |= {f"h.{layer}.{name}": shape for name, shape in block.items()}
    if not config.tie_word_embeddings:
        shapes[_HEAD] = (config.vocab_size, width)
    return shapes


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
