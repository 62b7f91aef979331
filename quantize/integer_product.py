"""A linear layer as a product of 8-bit integers: one scale for each output, and one for each row of activations.

`ONNX Runtime`'s `DynamicQuantizeMatMul` has one scale for all rows of a run, so what one sequence of a batch computes
depends on the others. Here a row is rounded on its own: whatever is computed beside it, it gives the same bits.
"""

from typing import Final

import numpy as np
import numpy.typing as npt
from onnx_ir import Graph, Value

from gpt2_edge.errors import QuantizationError
from gpt2_edge.quantize.fixed_rounding import FixedRounding
from gpt2_edge.quantize.graph_edit import NewNodes, constant, graph_input

# What a Gelu returns is never below -0.17. With 32 as the zero of its 8-bit integers, 32 steps reach that far down as
# long as the row's largest value is 1.2 or more, and 223 steps are left for the positive values, which matter.
_GELU_LOWEST: Final = -0.17
_GELU_ZERO: Final = 32
_SYMMETRIC_ZERO: Final = 128
_SYMMETRIC_STEPS: Final = 127
_ROUNDED_LARGEST: Final = 255


def integer_product(
    graph: Graph,
    nodes: NewNodes,
    x: Value,
    steps: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
    stored: Value | None = None,
) -> Value:
    """Make the nodes that compute `x @ (steps * scales).T + bias`.

    The activations of a row are rounded to 255 steps between plus and minus the largest magnitude, or to 256 unevenly
    split ones where they come from a Gelu. A row of zeros gets the scale 0, with which any integers give 0.

    Args:
        graph: Gets the constants.
        nodes: Get the nodes; their name begins those of the constants.
        x: Shape [rows, inputs], as many rows as `input_ids` has elements or, behind the last attention, as
            `logit_positions` has.
        steps: Shape [outputs, inputs].
        scales: Of the outputs, shape [outputs, 1].
        bias: Shape [outputs].
        stored: `steps.T`, if the graph has it.

    Returns:
        Shape [rows, outputs].

    Raises:
        QuantizationError: x has another shape.
    """
    if x.shape is None or len(x.shape) != 2:
        raise QuantizationError(f"the graph was made by an older release ({nodes.name}): export the model again")

    def single(value: np.generic, what: str) -> Value:
        return constant(graph, f"integer_product.{what}", np.asarray(value))

    columns = constant(graph, "integer_product.columns", np.array([1], np.int64))
    if _is_gelu(x):
        largest = nodes.value("ReduceMax", [x, columns], keepdims=1)
        step = nodes.value("Mul", [largest, single(np.float32(1 / (_ROUNDED_LARGEST - _GELU_ZERO)), "gelu_step")])
        row_scales = nodes.value("Max", [step, single(np.float32(-_GELU_LOWEST / _GELU_ZERO), "gelu_least_step")])
        zero = _GELU_ZERO
    else:
        largest = nodes.value("ReduceMax", [nodes.value("Abs", [x]), columns], keepdims=1)
        row_scales = nodes.value("Mul", [largest, single(np.float32(1 / _SYMMETRIC_STEPS), "step")])
        zero = _SYMMETRIC_ZERO
    zero_point = single(np.uint8(zero), f"zero_{zero}")
    # Equal for all layers, which ONNX Runtime sees: it computes them once.
    rows = nodes.value("ReduceProd", [nodes.value("Shape", [_elements_are_rows(graph, x)])], keepdims=1)
    zero_points = nodes.value("Unsqueeze", [nodes.value("Expand", [zero_point, rows]), columns])
    # A whole row as one block is rounded twice as fast as by a scale along axis 0.
    rounded = nodes.value("QuantizeLinear", [x, row_scales, zero_points], axis=1, block_size=steps.shape[1])
    (product,) = nodes.node(
        "MatMulIntegerToFloat",
        [
            rounded,
            stored or constant(graph, f"{nodes.name}.quantized", np.ascontiguousarray(steps.T)),
            single(np.float32(1), "one"),
            constant(graph, f"{nodes.name}.scales", scales[:, 0]),
            zero_point,
        ],
        domain="com.microsoft",
    )
    scaled = nodes.value("Mul", [product, row_scales])
    return nodes.value("Add", [scaled, constant(graph, f"{nodes.name}.bias", bias)])


def fixed_integer_product(
    graph: Graph,
    nodes: NewNodes,
    x: Value,
    rounding: FixedRounding,
    steps: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> Value:
    """Make the nodes that compute the same with one rounding for all rows.

    Args:
        graph: As in `integer_product`.
        nodes: As there.
        x: Shape [rows, inputs].
        rounding: Of `x`.
        steps: As in `integer_product`.
        scales: As there.
        bias: As there.

    Returns:
        Shape [rows, outputs].
    """
    step = constant(graph, f"{nodes.name}.input_step", np.asarray(rounding.step))
    zero = constant(graph, f"{nodes.name}.input_zero", np.asarray(rounding.zero))
    inputs = [
        nodes.value("QuantizeLinear", [x, step, zero]),
        constant(graph, f"{nodes.name}.quantized", np.ascontiguousarray(steps.T)),
        step,
        constant(graph, f"{nodes.name}.scales", scales[:, 0]),
        zero,
        None,
        constant(graph, f"{nodes.name}.bias", bias),
    ]
    (product,) = nodes.node("MatMulIntegerToFloat", inputs, domain="com.microsoft")
    return product


def row_steps(x: Value, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return the step that `integer_product` gives each row of what a value may be, shape [rows]."""
    if _is_gelu(x):
        least = np.float32(-_GELU_LOWEST / _GELU_ZERO)
        steps: npt.NDArray[np.float32] = np.maximum(
            vectors.max(axis=1) / np.float32(_ROUNDED_LARGEST - _GELU_ZERO), least
        )
    else:
        steps = np.abs(vectors).max(axis=1) / np.float32(_SYMMETRIC_STEPS)
    return steps


def _elements_are_rows(graph: Graph, x: Value) -> Value | None:
    """Return the input of the graph that has as many elements as x has rows."""
    wanted = graph_input(graph, "logit_positions")
    if wanted is not None and x.shape is not None and wanted.shape is not None and x.shape[0] == wanted.shape[0]:
        return wanted
    return graph_input(graph, "input_ids")


def _is_gelu(x: Value) -> bool:
    producer = x.producer()
    return producer is not None and producer.op_type == "Gelu"
