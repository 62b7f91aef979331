"""A graph that computes a few new tokens in one way and many in another: two branches of an `If`."""

from collections.abc import Sequence
from typing import Final

import numpy as np
import onnx_ir
from onnx import ModelProto, numpy_helper
from onnx_ir import Graph, Node, Value

from gpt2_edge.graph_names import MOST_FEW_TOKENS
from gpt2_edge.quantize.graph_edit import NewNodes, constant, graph_input

_MOST_FEW_TOKENS: Final = 8
_CONDITION_NAME: Final = "branches.many_tokens"


def replace_by_branches(
    graph: Graph,
    old: Node,
    few: tuple[NewNodes, Sequence[Value]],
    many: tuple[NewNodes, Sequence[Value]],
) -> None:
    """Put an `If` in the place of a node.

    Args:
        graph: Where.
        old: Its outputs keep their names, types and shapes.
        few: What computes up to 8 new tokens of a row, and the values for the outputs.
        many: What computes more.
    """
    attributes = {
        "then_branch": _subgraph(f"{old.name}.many", *many, old),
        "else_branch": _subgraph(f"{old.name}.few", *few, old),
    }
    made = onnx_ir.node("If", [_many_tokens(graph)], attributes, num_outputs=len(old.outputs), name=f"{old.name}.If")
    onnx_ir.convenience.replace_nodes_and_values(graph, old, [old], [made], old.outputs, made.outputs)


def has_branches(model: ModelProto) -> bool:
    """Tell whether a graph computes a few new tokens in another way than many."""
    return any(tensor.name == MOST_FEW_TOKENS for tensor in model.graph.initializer)


def always_few(model: ModelProto) -> ModelProto:
    """Return the same model, which takes any number of new tokens for a few."""
    changed = ModelProto()
    changed.CopyFrom(model)
    for tensor in changed.graph.initializer:
        if tensor.name == MOST_FEW_TOKENS:
            tensor.CopyFrom(numpy_helper.from_array(np.array(2**62, np.int64), MOST_FEW_TOKENS))
    return changed


def _subgraph(name: str, branch: NewNodes, outputs: Sequence[Value], old: Node) -> Graph:
    for output, replaced in zip(outputs, old.outputs, strict=True):
        output.type, output.shape = replaced.type, replaced.shape
    return Graph([], outputs, nodes=branch.nodes, name=name)


def _many_tokens(graph: Graph) -> Value:
    """Return what tells whether there are many new tokens of a row; it is computed at the graph's beginning."""
    for node in graph:
        if node.outputs[0].name == _CONDITION_NAME:
            return node.outputs[0]
    shape = onnx_ir.node("Shape", [graph_input(graph, "input_ids")], name="branches.Shape")
    axis = constant(graph, "branches.sequence_axis", np.array(1, np.int64))
    count = onnx_ir.node("Gather", [shape.outputs[0], axis], name="branches.Gather")
    limit = constant(graph, MOST_FEW_TOKENS, np.array(_MOST_FEW_TOKENS, np.int64))
    many = onnx_ir.node("Greater", [count.outputs[0], limit], name="branches.Greater")
    many.outputs[0].name = _CONDITION_NAME
    first = next(iter(graph))
    graph.insert_before(first, [shape, count, many])
    return many.outputs[0]
