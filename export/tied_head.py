"""Store the embedding of a standard graph once, where the tracer stored it again, transposed, for the head."""

from typing import Any, Final

import numpy as np
import onnx_ir

from gpt2_edge.errors import CheckpointError

_EMBEDDING: Final = "transformer.wte.weight"


def tie_head(model: onnx_ir.Model) -> None:
    """Let the head's product use the embedding, of which the tracer stored a transposed copy.

    A `Transpose` before the product would be computed when the file is loaded, and take the memory again; `Gemm`
    transposes as it goes.

    Raises:
        CheckpointError: The last product is not one with the transposed embedding.
    """
    graph = model.graph
    logits = graph.outputs[0]
    product = logits.producer()
    embedding = graph.initializers.get(_EMBEDDING)
    head = product.inputs[1] if product is not None and product.op_type == "MatMul" else None
    if (
        product is None
        or embedding is None
        or embedding.const_value is None
        or head is None
        or head.const_value is None
        or not np.array_equal(head.const_value.numpy(), embedding.const_value.numpy().T)
    ):
        raise CheckpointError(
            "optimum made a graph whose head is not the transposed embedding: export with optimum-onnx 0.1"
        )
    vocabulary, width = embedding.const_value.shape.numpy()
    hidden = product.inputs[0]
    nodes: list[onnx_ir.Node] = []

    def add(operator: str, *inputs: onnx_ir.Value | None, **attributes: Any) -> onnx_ir.Value:
        nodes.append(onnx_ir.node(operator, inputs, attributes))
        return nodes[-1].outputs[0]

    rows = add("Reshape", hidden, _integers(graph, "head.rows_shape", [-1, width]))  # [batch x sequence, width]
    scores = add("Gemm", rows, embedding, transB=1)
    leading = add("Shape", hidden, start=0, end=2)
    shape = add("Concat", leading, _integers(graph, "head.vocabulary", [vocabulary]), axis=0)
    result = add("Reshape", scores, shape)
    result.name, result.shape, result.type = logits.name, logits.shape, logits.type
    onnx_ir.convenience.replace_nodes_and_values(graph, product, [product], nodes, [logits], [result])
    graph.initializers.pop(str(head.name))


def _integers(graph: onnx_ir.Graph, name: str, values: list[int]) -> onnx_ir.Value:
    tensor = onnx_ir.Tensor(np.array(values, np.int64), name=name)
    value = onnx_ir.Value(name=name, const_value=tensor, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
