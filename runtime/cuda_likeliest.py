"""Find the likeliest token where the logits are, so that a greedy step moves two numbers a row and no more.

What is added to a graph is made of plain comparisons and not of `ArgMax`, because ONNX Runtime's CUDA kernel says
neither which of equal logits it takes, and in half precision the largest may well be equal, nor what it makes of NaN.
"""

import math
from typing import Final

import numpy as np

from gpt2_edge.errors import DeviceError
from gpt2_edge.graph_writer import float_output, initializer, model_part, node

LIKELIEST_TOKEN: Final = "likeliest_token"
LARGEST_LOGIT: Final = "largest_logit"
# What `check_signature` of a graph with this part has to know.
ADDED_OUTPUTS: Final = {name: ("tensor(float)", [None, 1]) for name in (LIKELIEST_TOKEN, LARGEST_LOGIT)}
# Token ids are compared as float32, which holds all integers up to here.
_LARGEST_EXACT_INTEGER: Final = 1 << 24


def likeliest_token_part(vocabulary_size: int) -> bytes:
    """Return what adds two outputs to a graph with the output `logits`, when it is appended to the model.

    `likeliest_token`, float32 [positions, 1]: the id of the largest logit, of equal ones the lowest.
    `largest_logit`, float32 [positions, 1]: that logit; +inf if any of the row is NaN or +inf. Where it is not finite,
    the token means nothing.

    Args:
        vocabulary_size: Logits of a row.

    Raises:
        DeviceError: The vocabulary is larger than float32 can count.
    """
    if vocabulary_size > _LARGEST_EXACT_INTEGER:
        raise DeviceError(
            f"the vocabulary has {vocabulary_size} tokens: on a GPU it may have {_LARGEST_EXACT_INTEGER}; use the CPU"
        )
    ids, beyond, infinity, axis = (f"likeliest.{name}" for name in ("ids", "beyond", "infinity", "axis"))
    valid, cleaned, is_largest, candidates = (
        f"likeliest.{name}" for name in ("valid", "cleaned", "is_largest", "candidates")
    )
    return model_part(
        nodes=[
            node("Less", ["logits", infinity], valid),  # NaN is not less than anything
            node("Where", [valid, "logits", infinity], cleaned),
            node("ReduceMax", [cleaned, axis], LARGEST_LOGIT, keepdims=1),
            node("Equal", [cleaned, LARGEST_LOGIT], is_largest),
            node("Where", [is_largest, ids, beyond], candidates),
            node("ReduceMin", [candidates, axis], LIKELIEST_TOKEN, keepdims=1),
        ],
        initializers=[
            initializer(ids, np.arange(vocabulary_size, dtype=np.float32)),
            initializer(beyond, np.array(vocabulary_size, np.float32)),
            initializer(infinity, np.array(math.inf, np.float32)),
            initializer(axis, np.array([1], np.int64)),
        ],
        outputs=[float_output(name, ["logits", 1]) for name in (LIKELIEST_TOKEN, LARGEST_LOGIT)],
    )
