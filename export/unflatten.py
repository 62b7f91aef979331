"""Let the hidden state keep its shape [batch, sequence, width] from the embeddings to the head.

The traced graph flattens it to [batch x sequence, width], which suits 8-bit layers on the CPU, and reshapes it around
attention to sizes that it takes from the inputs. On a GPU nothing wants it flat, and such sizes are computed on the
host.
"""

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from gpt2_edge.graph_names import key_value_names


def unflatten(model: onnx_ir.Model) -> None:
    """Remove all reshaping from a fused graph, in place, but before rows are taken whose logits are wanted."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "Reshape":
            kept = node.inputs[0]
            if kept is not None:
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], kept)
                graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)
    for node in graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    for index, wanted in enumerate([node for node in graph if node.op_type == "Gather" and _picks_rows(node)]):
        _flatten_before(graph, wanted, f"flatten.{index}")


def _flatten_before(graph: onnx_ir.Graph, wanted: onnx_ir.Node, name: str) -> None:
    rows = wanted.inputs[0]
    producer = None if rows is None else rows.producer()
    shape = onnx_ir.Value(
        name=f"{name}.shape",
        shape=onnx_ir.Shape([2]),
        type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
        const_value=onnx_ir.Tensor(np.array([-1, _width_of(graph, producer)]), name=f"{name}.shape"),
    )
    graph.register_initializer(shape)
    flat = onnx_ir.node("Reshape", [rows, shape], name=name)
    if rows is not None:
        flat.outputs[0].type = rows.type
    graph.insert_before(wanted, flat)
    wanted.replace_input_with(0, flat.outputs[0])


def _width_of(graph: onnx_ir.Graph, producer: onnx_ir.Node | None) -> int:
    """Return how wide what a node returns is: what attention gathers may be padded."""
    if producer is None or producer.op_type != "GroupQueryAttention":
        return int(np.asarray(graph.initializers["wpe.weight"].shape)[1])
    cache = next(value for value in graph.inputs if value.name == key_value_names(1)[0][0])
    return producer.attributes["num_heads"].as_int() * int(np.asarray(cache.shape)[3])


def _picks_rows(gather: onnx_ir.Node) -> bool:
    return _name(gather.inputs[1]) == "logit_positions"


def _name(value: onnx_ir.Value | None) -> str | None:
    return None if value is None else value.name
