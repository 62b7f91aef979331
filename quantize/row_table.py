"""A table of integers with a scale for each row, of which rows are looked up: an embedding, and the head tied to it."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Graph, Value

from gpt2_edge.quantize.gptq import FloatArray
from gpt2_edge.quantize.graph_edit import NewNodes, constant


@dataclass(frozen=True, slots=True)
class RowTable:
    """A table in a graph.

    Attributes:
        name: What the names of its constants begin with.
        integers: Shape [rows, columns].
        scales: Shape [rows].
        column_scales: What the columns were multiplied with before they were rounded, shape [columns]; None if nothing.
    """

    name: str
    integers: Value
    scales: Value
    column_scales: FloatArray | None


def store_rows(
    graph: Graph,
    name: str,
    integers: npt.NDArray[np.int8],
    scales: FloatArray,
    column_scales: FloatArray | None = None,
) -> RowTable:
    """Make the constants of a table.

    Args:
        graph: Where.
        name: Of the table.
        integers: Shape [rows, columns].
        scales: Shape [rows, 1].
        column_scales: As `RowTable` has them.
    """
    values = constant(graph, f"{name}.quantized", integers)
    return RowTable(name, values, constant(graph, f"{name}.scales", scales[:, 0]), column_scales)


def transposed(nodes: NewNodes, table: RowTable) -> Value:
    """Return the integers as a product takes them, shape [columns, rows].

    ONNX Runtime transposes them once, as it loads the graph. Stored the other way round, a looked up row would be
    gathered from as many places as it has columns: 4 ms for each 256 tokens at the 124M shape.
    """
    return nodes.value("Transpose", [table.integers], perm=[1, 0])


def row_lookup(graph: Graph, nodes: NewNodes, table: RowTable, ids: Value) -> Value:
    """Return rows of a table, shape [batch, sequence, columns].

    Args:
        graph: Where.
        nodes: Get what is made.
        table: Whose rows.
        ids: Which rows, int64 [batch, sequence].
    """
    values = nodes.value("Cast", [nodes.value("Gather", [table.integers, ids])], to=onnx_ir.DataType.FLOAT)
    axis = constant(graph, f"{nodes.name}.column_axis", np.array([2], np.int64))
    scales = nodes.value("Unsqueeze", [nodes.value("Gather", [table.scales, ids]), axis])
    rows = nodes.value("Mul", [values, scales])
    if table.column_scales is None:
        return rows
    factors = constant(graph, f"{table.name}.column_factors", 1 / table.column_scales)
    return nodes.value("Mul", [rows, factors])
