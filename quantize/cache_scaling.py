"""Scale keys and values so that the 8-bit integers of a cache can hold them as they are, with a step of 1.

Nothing else changes: where a channel of the keys is divided by something, the same channel of the queries is multiplied
by it, and their products stay; what a channel of the values is divided by, the matrix after attention makes up for. So
each channel gets a scale of its own, and none is computed with at run time. What all keys have in common is taken out
first: it adds the same to a query's product with each key, which softmax does not see.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx_ir import Graph, Model, Node, Value

from gpt2_edge.errors import QuantizationError
from gpt2_edge.quantize.calibration import CalibrationRun
from gpt2_edge.quantize.graph_edit import MOVING, array_of, is_weight, only_consumer, replace_weight, source_of

FloatArray = npt.NDArray[np.float32]

_STEPS: Final = 127
# Other texts have larger keys and values than the calibration text, and one that the integers cut off costs more than
# coarser steps do.
_HEADROOM: Final = 1.25
_LEAST_SHARE: Final = 1e-3  # of the largest channel: what a channel that is always 0 is taken for


def scale_cache(model: Model, calibration: CalibrationRun) -> None:
    """Change the weights of a fused fp32 graph so that its keys and values fit 8-bit integers.

    Args:
        model: Not quantized yet.
        calibration: Over the same graph; no use afterwards, since the graph is another one.

    Raises:
        QuantizationError: The graph is not of the expected form, or computes numbers that are not finite.
    """
    attentions = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    ranges = [_range_of(node, calibration) for node in attentions]  # all, before the first weight changes
    for attention, found in zip(attentions, ranges, strict=True):
        _scale(model.graph, attention, found)


@dataclass(frozen=True, slots=True)
class _Range:
    """What the keys and values of a layer are like; all arrays have shape [heads * head_size].

    Attributes:
        key_mean: Of the keys.
        key_scale: The step of the integers that hold the keys less their mean.
        value_scale: The step of the integers that hold the values.
    """

    key_mean: FloatArray
    key_scale: FloatArray
    value_scale: FloatArray


def _range_of(attention: Node, calibration: CalibrationRun) -> _Range:
    packed = _input_of(attention)
    _, key_mean, _ = np.split(calibration.mean(packed), 3)
    zeros = np.zeros_like(key_mean)
    largest = calibration.largest_distances(packed, np.concatenate([zeros, key_mean, zeros]))
    _, key_scale, value_scale = (_HEADROOM / _STEPS * each for each in np.split(largest, 3))
    return _Range(key_mean, _without_zeros(key_scale), _without_zeros(value_scale))


def _scale(graph: Graph, attention: Node, found: _Range) -> None:
    before_product, before_bias = _linear_before(attention)
    factors = np.concatenate([found.key_scale, 1 / found.key_scale, 1 / found.value_scale])
    zeros = np.zeros_like(found.key_mean)
    shift = np.concatenate([zeros, found.key_mean, zeros])
    _change(graph, before_product, lambda matrix: matrix * factors)
    _change(graph, before_bias, lambda bias: (bias - shift) * factors)
    _change(graph, _matrix_after(attention), lambda matrix: matrix * found.value_scale[:, np.newaxis])


def _change(graph: Graph, place: tuple[Node, int], change: Callable[[FloatArray], FloatArray]) -> None:
    node, index = place
    replace_weight(graph, node, index, change(array_of(node.inputs[index])))


def _linear_before(attention: Node) -> tuple[tuple[Node, int], tuple[Node, int]]:
    """Return where the matrix and the bias of queries, keys and values are."""
    addition = source_of(_input_of(attention))
    products = [value.producer() for value in addition.inputs if value is not None]
    product = next((node for node in products if node is not None and node.op_type == "MatMul"), None)
    biases = [index for index, value in enumerate(addition.inputs) if is_weight(value)]
    if addition.op_type != "Add" or len(biases) != 1 or product is None or not is_weight(product.inputs[1]):
        raise QuantizationError(f"{attention.name} does not follow a linear layer: export the model again")
    return (product, 1), (addition, biases[0])


def _matrix_after(attention: Node) -> tuple[Node, int]:
    """Return where the matrix is that the attended values are multiplied with."""
    consumer = only_consumer(attention.outputs[0])
    while consumer is not None and consumer.op_type in MOVING:
        consumer = only_consumer(consumer.outputs[0])
    if consumer is None or consumer.op_type != "MatMul" or not is_weight(consumer.inputs[1]):
        raise QuantizationError(f"{attention.name} is not followed by a linear layer: export the model again")
    return consumer, 1


def _input_of(attention: Node) -> Value:
    packed = attention.inputs[0]
    if packed is None:
        raise QuantizationError(f"{attention.name} has no input: export the model again")
    return packed


def _without_zeros(scale: FloatArray) -> FloatArray:
    largest = scale.max()
    return np.maximum(scale, _LEAST_SHARE * largest) if largest > 0 else np.ones_like(scale)
