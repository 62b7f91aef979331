"""Compute a graph with NumPy alone: onnx's reference operators, and those of ONNX Runtime's own that our graphs use.

Slow and plain, and independent of every kernel: what a machine computes is compared with it. Integer products are
summed exactly, whatever the processor would do.
"""

from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, TensorProto
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from gpt2_edge.graph_names import key_value_names
from gpt2_edge.manifest import Architecture

FloatArray = npt.NDArray[np.float32]

_INTEGER_PRODUCTS: Final = 4
_DOMAIN: Final = "com.microsoft"


def reference_logits(
    model: ModelProto,
    architecture: Architecture,
    tokens: list[int],
    round_activations: bool = True,
) -> FloatArray:
    """Return the logits after each token, shape [tokens, vocabulary].

    Args:
        model: A fused graph with its weights.
        architecture: Its shape.
        tokens: Computed in one pass over an empty cache.
        round_activations: Whether what is multiplied with the weights, and what attention reads from the cache, is
            rounded as the graph says; else it keeps its fraction.
    """
    count = len(tokens)
    past, _ = key_value_names(architecture.layers)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    cache_type = np.int8 if types[past[0]] == TensorProto.INT8 else np.float32
    cache = np.zeros((1, architecture.heads, count, architecture.head_size), cache_type)
    inputs = {
        "input_ids": np.array([tokens], np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[np.newaxis],
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
        "logit_positions": np.arange(count, dtype=np.int64),
        **dict.fromkeys(past, cache),
    }
    rounding: list[Any] = [MatMulNBits, GroupQueryAttention]
    if not round_activations:
        rounding = [type(each.__name__, (each,), {"rounds_activations": False}) for each in rounding]
        rounding.append(QuantizeLinear)
    operators: list[Any] = [*rounding, MatMulIntegerToFloat]
    evaluator = ReferenceEvaluator(model, new_ops=operators)
    # A row of zeros has the scale 0: 0 / 0 gives some integer, which the scale makes 0 again.
    with np.errstate(divide="ignore", invalid="ignore"):
        (logits,) = cast(list[FloatArray], evaluator.run(["logits"], inputs))
    return logits


class MatMulNBits(OpRun):
    """x [..., K] times integers with a scale for each block of a row; activations are rounded block by block."""

    op_domain = _DOMAIN
    rounds_activations = True

    def _run(
        self,
        x: FloatArray,
        packed: npt.NDArray[np.uint8],
        scales: FloatArray,
        *more: npt.NDArray[Any] | None,
        K: int,  # noqa: N803
        N: int,  # noqa: N803
        bits: int,
        block_size: int,
        accuracy_level: int = 0,
        **_: Any,
    ) -> tuple[FloatArray]:
        zero_points, group_index, bias = (*more, None, None, None)[:3]
        if zero_points is not None or group_index is not None or bits not in (4, 8):
            raise NotImplementedError(f"MatMulNBits of {bits} bits with zero points or permuted columns")
        blocks = packed.shape[1]
        values = packed.reshape(N, blocks, -1)
        if bits == 4:
            values = np.stack([values & 15, values >> 4], axis=-1).reshape(N, blocks, -1)
        centred = values.astype(np.float32) - np.float32(2 ** (bits - 1))
        weights = (centred * scales.reshape(N, blocks, 1)).reshape(N, -1)[:, :K]
        if accuracy_level == _INTEGER_PRODUCTS and self.rounds_activations:
            x = _rounded_in_blocks(x, block_size)
        product = x @ weights.T
        return (product if bias is None else product + bias,)


class QuantizeLinear(OpRun):
    """In place of ONNX's own: what becomes an activation of 8 bits without a sign keeps its fraction."""

    op_domain = ""

    def _run(self, x: FloatArray, scale: FloatArray, zero: npt.NDArray[Any], **_: Any) -> tuple[npt.NDArray[Any]]:
        limits = np.iinfo(zero.dtype)
        steps = np.nan_to_num(np.clip(x / scale + zero, limits.min, limits.max))  # of a row of zeros any are right
        return (steps if zero.dtype == np.uint8 else np.rint(steps).astype(zero.dtype),)


class MatMulIntegerToFloat(OpRun):
    """Integers times integers, summed exactly, times both scales."""

    op_domain = _DOMAIN

    def _run(
        self,
        a: npt.NDArray[Any],
        b: npt.NDArray[Any],
        a_scale: FloatArray,
        b_scale: FloatArray,
        a_zero: npt.NDArray[Any] | None = None,
        b_zero: npt.NDArray[Any] | None = None,
        bias: FloatArray | None = None,
        **_: Any,
    ) -> tuple[FloatArray]:
        # Products of 8-bit integers, of which float64 sums 2**37 exactly.
        left = a.astype(np.float64) - (0 if a_zero is None else a_zero.astype(np.float64))
        right = b.astype(np.float64) - (0 if b_zero is None else b_zero.astype(np.float64))
        product = (left @ right).astype(np.float32) * (a_scale * b_scale)
        return (product if bias is None else product + bias,)


class GroupQueryAttention(OpRun):
    """Causal attention over packed queries, keys and values [batch, sequence, 3 * heads * size], without a past.

    Integers in the cache have a step of 1.
    """

    op_domain = _DOMAIN
    rounds_activations = True

    def _run(
        self,
        qkv: FloatArray,
        *others: npt.NDArray[Any] | None,
        num_heads: int,
        scale: float = 0.0,
        kv_cache_bit_width: int = 0,
        **_: Any,
    ) -> tuple[npt.NDArray[Any], ...]:
        batch, count, width = qkv.shape
        size = width // 3 // num_heads
        query, key, value = qkv.reshape(batch, count, 3, num_heads, size).transpose(2, 0, 3, 1, 4)
        if kv_cache_bit_width:
            steps = [np.rint(each) if self.rounds_activations else each for each in (key, value)]
            key, value = (np.clip(each, -128, 127) for each in steps)
        scores = query @ key.swapaxes(-1, -2) * np.float32(scale or size**-0.5)
        scores = np.where(np.tri(count, dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = (weights / weights.sum(axis=-1, keepdims=True)) @ value
        cached = [each.astype(np.int8) if kv_cache_bit_width else each for each in (key, value)]
        return mixed.transpose(0, 2, 1, 3).reshape(batch, count, -1), *cached


def _rounded_in_blocks(x: FloatArray, block_size: int) -> FloatArray:
    """Round each block of a row to 255 steps between plus and minus its largest magnitude, as the kernels do."""
    columns = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -columns % block_size)])
    blocked = padded.reshape(*x.shape[:-1], -1, block_size)
    scales = np.abs(blocked).max(axis=-1, keepdims=True) / np.float32(127)
    steps = np.rint(blocked / np.where(scales > 0, scales, np.float32(1)))
    return cast(FloatArray, (steps * scales).reshape(padded.shape)[..., :columns])
