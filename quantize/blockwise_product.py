"""Put matrices of integers with a scale for each block into a graph: as a product, `MatMulNBits`, and as a lookup."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir
from onnx_ir import Graph, Value

from gpt2_edge.quantize.blockwise import BlockwiseMatrix
from gpt2_edge.quantize.gptq import FloatArray
from gpt2_edge.quantize.graph_edit import NewNodes, constant
from gpt2_edge.quantize.half_floats import as_half

# 4 of the kernel's accuracy levels: integer products. The others dequantize the weights in every run.
_INTEGER_PRODUCTS: Final = 4


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix, or some rows of it, in a graph.

    Attributes:
        name: What the names of its constants begin with.
        table: Its numbers.
        packed: Its integers.
        scales: Its scales as float32, whatever they are stored as.
    """

    name: str
    table: BlockwiseMatrix
    packed: Value
    scales: Value

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.table.values)


def store(graph: Graph, name: str, table: BlockwiseMatrix, float_bits: int) -> StoredMatrix:
    """Make the constants of a matrix.

    Args:
        graph: Where.
        name: Of the matrix.
        table: Its numbers; the scales are such as `float_bits` can hold.
        float_bits: Of a scale, 16 or 32; where float16 cannot hold the scales, they stay float32.
    """
    packed = constant(graph, f"{name}.quantized", table.values)
    half = as_half(table.scales) if float_bits == 16 else None
    if half is None:
        return StoredMatrix(name, table, packed, constant(graph, f"{name}.scales", table.scales))
    made = NewNodes(f"{name}.scales")
    # First in the graph, since an embedding is used before the head that it is tied to.
    scales = made.value("Cast", [constant(graph, f"{name}.scales", half)], to=onnx_ir.DataType.FLOAT)
    scales.dtype, scales.shape = onnx_ir.DataType.FLOAT, onnx_ir.Shape(half.shape)
    graph.insert_before(next(iter(graph)), made.nodes)
    return StoredMatrix(name, table, packed, scales)


def blockwise_product(graph: Graph, nodes: NewNodes, x: Value, matrix: StoredMatrix, bias: FloatArray) -> Value:
    """Return x [..., inputs] times a matrix [outputs, inputs], plus a bias [outputs]."""
    inputs: list[Value | None] = [x, matrix.packed, matrix.scales]
    if bias.any():
        # No zero points, no permutation of the columns.
        inputs += [None, None, constant(graph, f"{matrix.name}.bias", bias)]
    (product,) = nodes.node(
        "MatMulNBits",
        inputs,
        domain="com.microsoft",
        K=matrix.table.columns,
        N=matrix.rows,
        bits=matrix.table.bits,
        block_size=matrix.table.block_size,
        accuracy_level=_INTEGER_PRODUCTS,
    )
    return product


def blockwise_lookup(graph: Graph, nodes: NewNodes, parts: Sequence[StoredMatrix], ids: Value) -> Value:
    """Return rows of a matrix, shape [batch, sequence, columns].

    Args:
        graph: Where.
        nodes: Get what is made.
        parts: The rows of the matrix, one or two of them together.
        ids: Which rows, int64 [batch, sequence].
    """
    first, *rest = parts
    if not rest:
        return _rows(graph, nodes, first, ids)
    (second,) = rest
    limit, last, zero = (
        constant(graph, f"{nodes.name}.{name}", np.array(number, np.int64))
        for name, number in (("first_rows", first.rows), ("last_of_first_rows", first.rows - 1), ("zero", 0))
    )
    axis = constant(graph, f"{nodes.name}.column_axis", np.array([2], np.int64))
    is_first = nodes.value("Unsqueeze", [nodes.value("Less", [ids, limit]), axis])
    # Both are looked up; a row that the other part has counts as the nearest here.
    of_first = _rows(graph, nodes, first, nodes.value("Min", [ids, last]))
    of_second = _rows(graph, nodes, second, nodes.value("Max", [nodes.value("Sub", [ids, limit]), zero]))
    return nodes.value("Where", [is_first, of_first, of_second])


def _rows(graph: Graph, nodes: NewNodes, matrix: StoredMatrix, ids: Value) -> Value:
    """Look rows of integers up, and dequantize only those."""
    name, table = nodes.name, matrix.table
    integers = nodes.value("Gather", [matrix.packed, ids])
    scales = nodes.value("Gather", [matrix.scales, ids])
    if table.bits == 8:
        values = nodes.value("Cast", [integers], to=onnx_ir.DataType.FLOAT)  # [batch, sequence, blocks, block]
        signed = nodes.value("Sub", [values, constant(graph, f"{name}.zero_point", np.float32(128))])
    else:
        pairs = np.stack(np.divmod(np.arange(256, dtype=np.float32), 16)[::-1], axis=1) - 8  # low half, high half
        indices = nodes.value("Cast", [integers], to=onnx_ir.DataType.INT32)
        # [batch, sequence, blocks, block / 2, 2]
        halves = nodes.value("Gather", [constant(graph, f"{name}.pairs", pairs), indices])
        blocked = constant(graph, f"{name}.block_shape", np.array([0, 0, 0, -1], np.int64))
        signed = nodes.value("Reshape", [halves, blocked])
    axis = constant(graph, f"{name}.block_axis", np.array([3], np.int64))
    scaled = nodes.value("Mul", [signed, nodes.value("Unsqueeze", [scales, axis])])
    flat = constant(graph, f"{name}.row_shape", np.array([0, 0, -1], np.int64))
    rows = nodes.value("Reshape", [scaled, flat])
    if table.columns % table.block_size:
        bounds = [
            constant(graph, f"{name}.{bound}", np.array([value], np.int64))
            for bound, value in (("start", 0), ("end", table.columns), ("axis", 2))
        ]
        rows = nodes.value("Slice", [rows, *bounds])
    return rows
