"""A GPT-2 so small that it is exported, and quantized, in about a second once everything is imported."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_WIDTH: Final = 16
_VOCABULARY_SIZE: Final = 256
_CONTEXT_LENGTH: Final = 64
TEXT: Final = "Once upon a time there was a little kettle that sang. " * 6


def write_checkpoint(folder: Path) -> None:
    """Write a GPT-2 of one layer whose tokens are bytes."""
    random = np.random.default_rng(0)
    shapes = {
        "wte.weight": (_VOCABULARY_SIZE, _WIDTH),
        "wpe.weight": (_CONTEXT_LENGTH, _WIDTH),
        "h.0.ln_1.weight": (_WIDTH,),
        "h.0.ln_1.bias": (_WIDTH,),
        "h.0.attn.c_attn.weight": (_WIDTH, 3 * _WIDTH),
        "h.0.attn.c_attn.bias": (3 * _WIDTH,),
        "h.0.attn.c_proj.weight": (_WIDTH, _WIDTH),
        "h.0.attn.c_proj.bias": (_WIDTH,),
        "h.0.ln_2.weight": (_WIDTH,),
        "h.0.ln_2.bias": (_WIDTH,),
        "h.0.mlp.c_fc.weight": (_WIDTH, 4 * _WIDTH),
        "h.0.mlp.c_fc.bias": (4 * _WIDTH,),
        "h.0.mlp.c_proj.weight": (4 * _WIDTH, _WIDTH),
        "h.0.mlp.c_proj.bias": (_WIDTH,),
        "ln_f.weight": (_WIDTH,),
        "ln_f.bias": (_WIDTH,),
    }
    folder.mkdir()
    save_file(
        {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "gpt2",
        "n_layer": 1,
        "n_head": 2,
        "n_embd": _WIDTH,
        "n_positions": _CONTEXT_LENGTH,
        "vocab_size": _VOCABULARY_SIZE,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    alphabet = {character: token for token, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def warm_writers(place: Path) -> dict[str, Callable[[Path], object]]:
    """Export and quantize once, so that a fork of this process does both without importing anything.

    A fork has none of the threads of its parent, so torch is told to start none.

    Args:
        place: A folder for the checkpoint and what was made from it.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from gpt2_edge.export.pipeline import export_checkpoint
    from gpt2_edge.quantize.pipeline import quantize_folder
    from gpt2_edge.quantize.recipes import default_recipe

    checkpoint, source, text = place / "checkpoint", place / "fp32", place / "text.txt"
    write_checkpoint(checkpoint)
    text.write_text(TEXT, encoding="utf-8")

    def export(destination: Path) -> None:
        export_checkpoint(checkpoint, destination)

    def quantize(destination: Path) -> None:
        quantize_folder(source, destination, default_recipe("int8"), text=text, calibration=text)

    export(source)
    quantize(place / "int8")
    return {"export": export, "quantize": quantize}
