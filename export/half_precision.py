"""Turn a traced graph into half precision, out of the operators that ONNX Runtime's CUDA provider fuses best.

Weights, activations and the KV cache become float16; the logits leave the graph as float32. What is added to the
residual stream and normalized becomes one `SkipLayerNormalization`, which also hands the sum on, and a GELU takes its
bias along: at batch 1 a step is bound by the number of kernels as much as by the bytes of the weights.
"""

from typing import Final

import numpy as np
import onnx_ir

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.unflatten import unflatten

_LARGEST_HALF: Final = float(np.finfo(np.float16).max)
_CONTRIB_DOMAIN: Final = "com.microsoft"
_GELU_WITH_BIAS: Final = {"tanh": "FastGelu", "none": "BiasGelu"}


def to_half_precision(model: onnx_ir.Model) -> None:
    """Rewrite a fused float32 graph in place.

    Raises:
        CheckpointError: A weight is larger than float16 can hold.
    """
    unflatten(model)
    graph = model.graph
    _fuse_skip_layer_normalization(graph)
    _fuse_gelu_with_bias(graph)
    for value in graph.initializers.values():
        _halve_weight(value)
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.dtype == onnx_ir.DataType.FLOAT:
            value.dtype = onnx_ir.DataType.FLOAT16
    _cast_logits(graph)


def _halve_weight(value: onnx_ir.Value) -> None:
    single = value.const_value
    if single is None or single.dtype != onnx_ir.DataType.FLOAT:
        return
    largest = float(np.abs(single.numpy()).max(initial=0.0))
    if largest > _LARGEST_HALF:
        raise CheckpointError(
            f"{value.name} has a weight of magnitude {largest:.4g}, the largest number of fp16 is {_LARGEST_HALF:.0f}: "
            "export this checkpoint with --precision fp32"
        )
    # Rounded when it is written, one at a time: all at once would take half as much memory as the checkpoint again.
    value.const_value = onnx_ir.LazyTensor(
        lambda: onnx_ir.Tensor(single.numpy().astype(np.float16)),
        onnx_ir.DataType.FLOAT16,
        onnx_ir.Shape(single.shape.numpy()),
        name=value.name,
    )
    value.dtype = onnx_ir.DataType.FLOAT16


def _fuse_skip_layer_normalization(graph: onnx_ir.Graph) -> None:
    """Add (and the bias before it) ; LayerNormalization -> SkipLayerNormalization with the sum as its fourth output."""
    for node in list(graph):
        if node.op_type != "LayerNormalization":
            continue
        total, gamma, beta = node.inputs
        addition = total.producer() if total is not None else None
        if addition is None or addition.op_type != "Add" or total is None:
            continue
        residual, branch = addition.inputs
        removed, inputs = [addition, node], [branch, residual, gamma, beta]
        biased = _bias_addition(branch)
        if biased is not None:
            product, bias = biased.inputs
            removed.append(biased)
            inputs = [product, residual, gamma, beta, bias]
        epsilon = node.attributes["epsilon"]
        fused = onnx_ir.Node(
            _CONTRIB_DOMAIN, "SkipLayerNormalization", inputs, [epsilon], num_outputs=4, name=f"{node.name}_skip"
        )
        normalized, mean, inverse_deviation, summed = fused.outputs
        mean.name = inverse_deviation.name = ""  # optional outputs that no kernel needs to write
        # In the place of the addition, because its sum is used beside the normalized value.
        _replace(graph, removed, fused, {node.outputs[0]: normalized, total: summed})


def _fuse_gelu_with_bias(graph: onnx_ir.Graph) -> None:
    """Add of a bias ; Gelu -> FastGelu or BiasGelu."""
    for node in list(graph):
        if node.op_type != "Gelu":
            continue
        biased = _bias_addition(node.inputs[0])
        if biased is None:
            continue
        approximate = node.attributes.get("approximate")
        operator = _GELU_WITH_BIAS["none" if approximate is None else approximate.as_string()]
        fused = onnx_ir.Node(_CONTRIB_DOMAIN, operator, biased.inputs, num_outputs=1, name=f"{node.name}_biased")
        _replace(graph, [node, biased], fused, {node.outputs[0]: fused.outputs[0]})


def _bias_addition(value: onnx_ir.Value | None) -> onnx_ir.Node | None:
    """Return the node that adds a weight vector to a product to make a value that nothing else uses, or None."""
    node = None if value is None else value.producer()
    if node is None or value is None or node.op_type != "Add" or len(value.uses()) != 1:
        return None
    bias = node.inputs[1]
    return node if bias is not None and bias.const_value is not None and len(bias.const_value.shape) == 1 else None


def _replace(
    graph: onnx_ir.Graph,
    removed: list[onnx_ir.Node],
    added: onnx_ir.Node,
    values: dict[onnx_ir.Value, onnx_ir.Value],
) -> None:
    for old, new in values.items():
        new.name, new.shape, new.type = old.name, old.shape, old.type
    onnx_ir.convenience.replace_nodes_and_values(
        graph, removed[0], removed, [added], list(values), list(values.values())
    )


def _cast_logits(graph: onnx_ir.Graph) -> None:
    (position,) = (index for index, output in enumerate(graph.outputs) if output.name == "logits")
    half = graph.outputs[position]
    cast = onnx_ir.Node("", "Cast", [half], [onnx_ir.AttrInt64("to", onnx_ir.DataType.FLOAT)], name="logits_to_float32")
    single = cast.outputs[0]
    half.name, single.name = "half_precision_logits", "logits"
    single.shape, single.dtype = half.shape, onnx_ir.DataType.FLOAT
    graph.append(cast)
    graph.outputs[position] = single
