"""Take the mean out of what a matrix is multiplied with, before anything is rounded.

`x @ weight + bias` equals `(x - mean) @ weight + (bias + mean @ weight)`. The means over a calibration text need no
arithmetic at run time where the node that makes `x` can make `x - mean` as well: a layer normalization has a bias of
its own, and attention, whose weights sum to 1, hands a change of the values' biases through. What is left of `x` is
smaller, so its rounding is finer; and the share of the mean is computed with the exact weights.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx_ir import Graph, Node, Value

from gpt2_edge.quantize.calibration import CalibrationRun, Hessian
from gpt2_edge.quantize.graph_edit import array_of, is_weight, only_consumer, replace_weight, source_of

FloatArray = npt.NDArray[np.float32]

_LEAST: Final = np.float32(1e-6)
# A channel that the last layer normalization hardly lets through needs few steps in the head, but the embedding is made
# of the same integers. With 8 of the storyteller's 256 channels held back entirely, its divergence as `int8` was 0.0135
# without a limit, and 0.0013 with this one, as with none held back.
_LEAST_SHARE_IN_TABLE: Final = np.float32(0.25)
_WITH_BIAS: Final = ("MatMulIntegerToFloat", "MatMulNBits")  # as their last input


@dataclass(slots=True)
class LinearLayer:
    """A layer `x @ matrix.T + bias` on its way from full precision to integers.

    Attributes:
        x: What the graph multiplies.
        matrix: Shape [outputs, inputs].
        bias: Shape [outputs].
        mean: Of `x` as the graph computes it, shape [inputs]; None without a calibration text.
        hessian: X^T X of `x` less its mean, shape [inputs, inputs]; None if nobody needs it.
    """

    x: Value
    matrix: FloatArray
    bias: FloatArray
    mean: FloatArray | None = None
    hessian: Hessian | None = None

    def subtract_from_inputs(self, mean: FloatArray, scales: FloatArray) -> None:
        """Let the layer be one of `(x - mean) / scales`, with the same outputs; `mean` is all of it that `x` has."""
        self.bias = self.bias + self.matrix @ mean
        self.matrix = self.matrix * scales
        if self.hessian is not None:
            self.hessian = self.hessian / np.outer(scales, scales)
        self.mean = np.zeros_like(mean)

    def bias_beside(self, rounded: FloatArray) -> FloatArray:
        """Return the bias with which a rounded matrix gives the same outputs for the mean input."""
        if self.mean is None:
            return self.bias
        return (self.bias + (self.matrix - rounded) @ self.mean).astype(np.float32, copy=False)


def centre(
    graph: Graph,
    layer: LinearLayer,
    calibration: CalibrationRun,
    equalize: bool,
    other: LinearLayer | None = None,
    *,
    is_table: bool = False,
) -> FloatArray:
    """Change the graph so that `x` has the mean 0 if that costs nothing at run time, and the layer to match.

    Args:
        graph: As far as the layer, it is rounded already.
        layer: Gets its mean, too.
        calibration: Asked for `layer.x` here.
        equalize: Whether to divide the channels of `x` by something, and to multiply the matrix with it, so that they
            share one scale better.
        other: A layer of the same inputs, which is changed along.
        is_table: Whether rows of the matrix are looked up as well, so that no column may be lost.

    Returns:
        What the columns of the matrix were multiplied with, shape [inputs].
    """
    layers = [layer] if other is None else [layer, other]
    mean = calibration.mean(layer.x)
    source = source_of(layer.x)
    scales = np.ones_like(mean)
    if source.op_type == "LayerNormalization" and only_consumer(source.outputs[0]) is not None:
        if equalize:
            scales = _channel_scales(calibration.largest_distances(layer.x, mean), layer.matrix, is_table)
        gain, bias = (array_of(value) for value in source.inputs[1:3])
        replace_weight(graph, source, 1, gain / scales)
        replace_weight(graph, source, 2, (bias - mean) / scales)
    elif source.op_type == "GroupQueryAttention" and (addition := _addition_of_bias(source)) is not None:
        node, index = addition
        bias = array_of(node.inputs[index]).copy()
        bias[-len(mean) :] -= mean  # queries, keys, values
        replace_weight(graph, node, index, bias)
    else:
        for each in layers:
            each.mean = mean
        return scales
    calibration.transform(layer.x, mean, scales)
    for each in layers:
        each.subtract_from_inputs(mean, scales)
    return scales


def _addition_of_bias(attention: Node) -> tuple[Node, int] | None:
    """Return the node that adds the bias of queries, keys and values, and which of its inputs the bias is."""
    packed = attention.inputs[0]
    if packed is None or only_consumer(packed) is None:
        return None
    node = source_of(packed)
    for index, value in enumerate(node.inputs):
        is_bias = node.op_type == "Add" or (node.op_type in _WITH_BIAS and index == len(node.inputs) - 1)
        if is_bias and value is not None and is_weight(value) and array_of(value).ndim == 1:
            return node, index
    return None


def _channel_scales(largest: FloatArray, matrix: FloatArray, is_table: bool) -> FloatArray:
    """Return what to divide the channels by: halfway between even ranges of the inputs and of the weights.

    Xiao et al. 2023, "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv
    2211.10438, with a migration strength of 0.5.
    """
    weights = np.abs(matrix).max(axis=0)
    scales: FloatArray = np.sqrt(np.maximum(largest, _LEAST) / np.maximum(weights, _LEAST))
    if is_table:
        scales = np.maximum(scales, _LEAST_SHARE_IN_TABLE * np.median(scales))
    scales /= scales.mean()
    return scales
