"""Make a GPT-2 checkpoint of a published shape with random weights: speed does not depend on their values.

python -m gpt2_edge.benchmarks.random_checkpoint small FOLDER
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Final

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

# layers, heads, width
SHAPES: Final = {
    "distil": (6, 12, 768),
    "small": (12, 12, 768),
    "medium": (24, 16, 1024),
    "large": (36, 20, 1280),
    "xl": (48, 25, 1600),
}
_VOCABULARY_SIZE: Final = 50257
_CONTEXT_LENGTH: Final = 1024
_STANDARD_DEVIATION: Final = 0.02


def write_random_checkpoint(shape: str, folder: Path) -> None:
    """Write `config.json`, `model.safetensors` and `tokenizer.json`.

    Args:
        shape: One of `SHAPES`.
        folder: Is made if it does not exist.
    """
    layers, heads, width = SHAPES[shape]
    random = np.random.default_rng(0)

    def matrix(*size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return random.standard_normal(size, np.float32) * np.float32(_STANDARD_DEVIATION)

    def layer_norm(name: str) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        return {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": matrix(width)}

    weights = {"wte.weight": matrix(_VOCABULARY_SIZE, width), "wpe.weight": matrix(_CONTEXT_LENGTH, width)}
    linear_layers = {
        "attn.c_attn": (width, 3 * width),
        "attn.c_proj": (width, width),
        "mlp.c_fc": (width, 4 * width),
        "mlp.c_proj": (4 * width, width),
    }
    for layer in range(layers):
        weights |= layer_norm(f"h.{layer}.ln_1") | layer_norm(f"h.{layer}.ln_2")
        for name, size in linear_layers.items():
            weights[f"h.{layer}.{name}.weight"] = matrix(*size)
            weights[f"h.{layer}.{name}.bias"] = matrix(size[1])
    weights |= layer_norm("ln_f")
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "activation_function": "gelu_new",
        "vocab_size": _VOCABULARY_SIZE,
        "n_positions": _CONTEXT_LENGTH,
        "n_embd": width,
        "n_layer": layers,
        "n_head": heads,
        "eos_token_id": _VOCABULARY_SIZE - 1,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _byte_tokenizer().save(str(folder / "tokenizer.json"))


def _byte_tokenizer() -> Tokenizer:
    """A token for each byte and one for the end of text: random weights write no words anyway."""
    alphabet = {character: token for token, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return tokenizer


def main() -> int:
    """Write a checkpoint."""
    parser = argparse.ArgumentParser(description="Make a GPT-2 checkpoint with random weights.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    write_random_checkpoint(arguments.shape, arguments.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
