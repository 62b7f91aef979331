"""The physical limit of decoding: how fast memory can be read, and how much of it a token touches.

A decoded token reads every weight once and the keys and values of all tokens before it. So no decoder that computes
one token at a time is faster than `read bandwidth / bytes touched a token`.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.manifest import Architecture, Manifest

_PASSES: Final = 5
_BYTES_OF_FLOAT: Final = 4


def read_bandwidth(buffer_bytes: int, threads: int) -> float:
    """Read a buffer with several threads, and return bytes a second.

    The best of a few passes, since what is asked for is a limit.

    Args:
        buffer_bytes: As large as the weights, so that as much of it fits the caches.
        threads: Each reads a part of its own.
    """
    # Ones, because pages of zeros that were never written would all be the same page of memory.
    buffer: npt.NDArray[np.float32] = np.ones(max(threads, buffer_bytes // _BYTES_OF_FLOAT), np.float32)
    parts = np.array_split(buffer, threads)
    with ThreadPoolExecutor(threads) as pool:
        return buffer.nbytes / min(_pass_seconds(pool, parts) for _ in range(_PASSES))


def _pass_seconds(pool: ThreadPoolExecutor, parts: list[npt.NDArray[np.float32]]) -> float:
    started_at = time.perf_counter()
    # numpy gives the interpreter up during a large reduction. The maximum keeps up with memory on one core; a sum of
    # floats, each of which waits for the one before, does not.
    for _ in pool.map(np.maximum.reduce, parts):
        pass
    return time.perf_counter() - started_at


def weights_bytes(manifest: Manifest) -> int:
    """Return the size of the graphs and their weights, without the tokenizer."""
    graphs = tuple(manifest.graphs.values())
    return sum(entry.size_bytes for entry in manifest.files if entry.name.startswith(graphs))


def parameters(manifest: Manifest) -> int:
    """Return how many weights the model has; a tied embedding counts once."""
    shape = manifest.architecture
    width, inner = shape.width, shape.inner_width
    biases = 4 * width + inner + width
    layer_norms = 4 * width
    embeddings = (shape.vocabulary_size + shape.context_length) * width
    head = 0 if shape.tied_head else shape.vocabulary_size * width
    return _block_matrices(shape) + shape.layers * (biases + layer_norms) + embeddings + 2 * width + head


def _block_matrices(shape: Architecture) -> int:
    return shape.layers * (4 * shape.width**2 + 2 * shape.width * shape.inner_width)


def bytes_touched_per_token(manifest: Manifest, depth: float) -> int:
    """Return how much memory a decoded token reads.

    Args:
        manifest: Of the model folder.
        depth: How many tokens come before it.
    """
    shape = manifest.architecture
    # Of the position table, and of a token embedding that is not the head as well, a token reads one row. How a
    # quantized embedding is stored, the manifest does not say; as for the other matrices, its share is that of its
    # parameters.
    recipe = manifest.recipe or {}
    stored_bytes_of_float = int(recipe.get("float_bits", 32)) // 8
    unread = stored_bytes_of_float * shape.context_length * shape.width
    # A byte for each weight of those that are for prompts.
    for_prompts = _block_matrices(shape) if manifest.has_prompt_matrices else 0
    if not shape.tied_head:
        share = shape.vocabulary_size * shape.width / parameters(manifest)
        unread += int(share * (weights_bytes(manifest) - for_prompts))
    unread += for_prompts
    # ONNX Runtime makes float32 of the scales as it loads them.
    widened = (_BYTES_OF_FLOAT - stored_bytes_of_float) * _scales(recipe, shape) if stored_bytes_of_float < 4 else 0
    return max(1, weights_bytes(manifest) - unread + widened) + int(manifest.cache_bytes_per_token * depth)


def _scales(recipe: Mapping[str, Any], shape: Architecture) -> int:
    """Return how many scales of blocks a token reads."""
    promotion = recipe.get("promotion") or {"matrix_format": recipe["head"], "first_tokens": 0.0, "layers": ()}
    promoted = promotion["matrix_format"]["block_size"]
    weights = {
        "attn.c_attn.weight": 3 * shape.width**2,
        "attn.c_proj.weight": shape.width**2,
        "mlp.c_fc.weight": shape.width * shape.inner_width,
        "mlp.c_proj.weight": shape.inner_width * shape.width,
    }
    a_layer: float = sum(
        count / (promoted if name.endswith(tuple(promotion["layers"])) else recipe["linear"]["block_size"])
        for name, count in weights.items()
    )
    share = promotion["first_tokens"]
    head: float = share / promoted + (1 - share) / recipe["head"]["block_size"]
    return round(shape.layers * a_layer + shape.vocabulary_size * shape.width * head)
