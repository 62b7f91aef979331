"""Let the hidden state keep its shape [batch, sequence, width] from the embeddings to the head.

The traced graph flattens it to [batch x sequence, width], which suits 8-bit layers on the CPU, and reshapes it around
attention to sizes that it takes from the inputs. On a GPU nothing wants it flat, and such sizes are computed on the
host.
"""

import numpy as np
import onnx_ir
from onnx_ir.passes.common import RemoveUnusedNodesPass


def unflatten(model: onnx_ir.Model) -> None:
    """Remove all reshaping from a fused graph, in place, but before the rows are taken whose logits are wanted."""
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
    (wanted,) = (node for node in graph if node.op_type == "Gather" and _name(node.inputs[1]) == "logit_positions")
    hidden = wanted.inputs[0]
    width = int(np.asarray(graph.initializers["wpe.weight"].shape)[1])
    shape = onnx_ir.Value(
        name="flat_shape",
        shape=onnx_ir.Shape([2]),
        type=onnx_ir.TensorType(onnx_ir.DataType.INT64),
        const_value=onnx_ir.Tensor(np.array([-1, width]), name="flat_shape"),
    )
    graph.register_initializer(shape)
    flat = onnx_ir.node("Reshape", [hidden, shape], name="flatten")
    if hidden is not None:
        flat.outputs[0].type = hidden.type
    graph.insert_before(wanted, flat)
    wanted.replace_input_with(0, flat.outputs[0])


def _name(value: onnx_ir.Value | None) -> str | None:
    return None if value is None else value.name
