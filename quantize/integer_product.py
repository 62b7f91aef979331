"""A linear layer as a product of 8-bit integers: one scale for each output, and one for each row of activations.

`ONNX Runtime`'s `DynamicQuantizeMatMul` has one scale for all rows of a run, so what one sequence of a batch computes
depends on the others. Here a row is rounded on its own: whatever is computed beside it, it gives the same bits.
"""

from itertools import count
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Graph, Node, Value

from gpt2_edge.quantize.graph_edit import constant

# What a Gelu returns is never below -0.17. With 32 as the zero of its 8-bit integers, 32 steps reach that far down as
# long as the row's largest value is 1.2 or more, and 223 steps are left for the positive values, which matter.
_GELU_LOWEST: Final = -0.17
_GELU_ZERO: Final = 32
_SYMMETRIC_ZERO: Final = 128
_SYMMETRIC_STEPS: Final = 127
_ROUNDED_LARGEST: Final = 255


def insert_integer_product(
    graph: Graph,
    before: Node,
    name: str,
    x: Value,
    steps: npt.NDArray[np.int8],
    scales: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32],
) -> Value:
    """Insert the nodes that compute `x @ (steps * scales).T + bias`.

    The activations of a row are rounded to 255 steps between plus and minus the largest magnitude, or to 256 unevenly
    split ones where they come from a Gelu. A row of zeros gets the scale 0, with which any integers give 0.

    Args:
        graph: Where.
        before: The new nodes come before this one.
        name: What the names of the new nodes and constants begin with.
        x: Shape [rows, inputs], as many rows as `input_ids` has elements.
        steps: Shape [outputs, inputs].
        scales: Of the outputs, shape [outputs, 1].
        bias: Shape [outputs].

    Returns:
        Shape [rows, outputs].
    """
    numbers = count()

    def node(operator: str, inputs: list[Value | None], domain: str = "", **attributes: int) -> Value:
        node_name = f"{name}.{next(numbers)}.{operator}"
        made = onnx_ir.node(operator, inputs, attributes, domain=domain, name=node_name)
        made.outputs[0].name = f"{node_name}.output"
        graph.insert_before(before, made)
        return made.outputs[0]

    def single(value: np.generic, what: str) -> Value:
        return constant(graph, f"integer_product.{what}", np.asarray(value))

    columns = constant(graph, "integer_product.last_axis", np.array([-1], np.int64))
    if _is_gelu(x):
        largest = node("ReduceMax", [x, columns], keepdims=0)
        step = node("Mul", [largest, single(np.float32(1 / (_ROUNDED_LARGEST - _GELU_ZERO)), "gelu_step")])
        row_scales = node("Max", [step, single(np.float32(-_GELU_LOWEST / _GELU_ZERO), "gelu_least_step")])
        zero = _GELU_ZERO
    else:
        largest = node("ReduceMax", [node("Abs", [x]), columns], keepdims=0)
        row_scales = node("Mul", [largest, single(np.float32(1 / _SYMMETRIC_STEPS), "step")])
        zero = _SYMMETRIC_ZERO
    zero_point = single(np.uint8(zero), f"zero_{zero}")
    input_ids = next(value for value in graph.inputs if value.name == "input_ids")
    # Equal for all layers, which ONNX Runtime sees: it computes them once.
    rows = node("ReduceProd", [node("Shape", [input_ids])], keepdims=1)
    rounded = node("QuantizeLinear", [x, row_scales, node("Expand", [zero_point, rows])], axis=0)
    product = node(
        "MatMulIntegerToFloat",
        [
            rounded,
            constant(graph, f"{name}.quantized", np.ascontiguousarray(steps.T)),
            single(np.float32(1), "one"),
            constant(graph, f"{name}.scales", scales[:, 0]),
            zero_point,
        ],
        domain="com.microsoft",
    )
    column = constant(graph, "integer_product.column", np.array([-1, 1], np.int64))
    scaled = node("Mul", [product, node("Reshape", [row_scales, column])])
    return node("Add", [scaled, constant(graph, f"{name}.bias", bias)])


def _is_gelu(x: Value) -> bool:
    producer = x.producer()
    return producer is not None and producer.op_type == "Gelu"
