"""Rewrite fused attention into plain operators, for a provider that has no kernel for the fused one.

ONNX Runtime's CUDA provider has `GroupQueryAttention` for half precision only. A float32 model folder therefore has a
second graph over the same weights, with the same inputs and outputs, in which attention runs over the whole KV cache
under a mask. It is as exact as float32 gets, all shapes but the batch's are fixed, and nothing of it runs on the CPU.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir

from gpt2_edge.export.unflatten import unflatten
from gpt2_edge.manifest import Architecture

_OPSET: Final = 24  # the first with TensorScatter, which updates a cache in place
# Not minus infinity, of which a row of nothing else would make NaN.
_MASKED_SCORE: Final = np.finfo(np.float32).min


def save_with_plain_attention(fused_graph: Path, path: Path, architecture: Architecture) -> None:
    """Write a second graph beside a fused float32 one, over the weights of the first."""
    model = onnx_ir.load(fused_graph)
    use_plain_attention(model, architecture)
    onnx_ir.save(model, path)


def use_plain_attention(model: onnx_ir.Model, architecture: Architecture) -> None:
    """Replace every `GroupQueryAttention` of a fused float32 graph, in place.

    The KV cache's capacity becomes the context length, where it was free before.
    """
    unflatten(model)
    model.opset_imports[""] = _OPSET
    graph = model.graph
    _fix_capacity(graph, architecture.context_length)
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    shared = _Builder()
    position_ids = next(value for value in graph.inputs if value.name == "position_ids")
    mask = shared.add(
        "LessOrEqual",
        shared.constant(graph, "cache_positions", np.arange(architecture.context_length).reshape(1, 1, 1, -1)),
        shared.add("Unsqueeze", position_ids, shared.constant(graph, "mask_axes", np.array([1, 3]))),
    )  # [batch, 1, sequence, capacity]: a token sees those before it and itself
    first_position = shared.add(
        "Gather", position_ids, shared.constant(graph, "first_column", np.array(0)), axis=1
    )  # [batch]
    heads_shape = shared.constant(graph, "heads_shape", np.array([0, 0, architecture.heads, architecture.head_size]))
    merged_shape = shared.constant(graph, "merged_shape", np.array([0, 0, architecture.heads * architecture.head_size]))
    masked_score = shared.constant(graph, "masked_score", np.array(_MASKED_SCORE))
    graph.insert_before(graph[0], shared.nodes)
    for layer, node in enumerate(attentions):
        query_key_value, _, _, past_key, past_value = node.inputs[:5]
        build = _Builder()
        split = onnx_ir.Node(
            "", "Split", [query_key_value], [onnx_ir.AttrInt64("axis", -1)], num_outputs=3, version=_OPSET
        )
        split.attributes["num_outputs"] = onnx_ir.AttrInt64("num_outputs", 3)
        build.nodes.append(split)
        query, key, value = (
            build.add("Transpose", build.add("Reshape", part, heads_shape), perm=(0, 2, 1, 3)) for part in split.outputs
        )  # [batch, heads, sequence, head_size]
        key_cache = build.add("TensorScatter", past_key, key, first_position, axis=2)
        value_cache = build.add("TensorScatter", past_value, value, first_position, axis=2)
        scale = build.constant(
            graph, f"attention_scale.{layer}", np.array(node.attributes["scale"].as_float(), np.float32)
        )
        scores = build.add(
            "Mul", build.add("MatMul", query, build.add("Transpose", key_cache, perm=(0, 1, 3, 2))), scale
        )  # [batch, heads, sequence, capacity]
        weights = build.add("Softmax", build.add("Where", mask, scores, masked_score), axis=-1)
        attended = build.add("Transpose", build.add("MatMul", weights, value_cache), perm=(0, 2, 1, 3))
        merged = build.add("Reshape", attended, merged_shape)
        for old, new in zip(node.outputs, (merged, key_cache, value_cache), strict=True):
            new.name, new.shape, new.type = old.name, old.shape, old.type
        onnx_ir.convenience.replace_nodes_and_values(
            graph, node, [node], build.nodes, node.outputs, (merged, key_cache, value_cache)
        )


def _fix_capacity(graph: onnx_ir.Graph, capacity: int) -> None:
    for value in (*graph.inputs, *graph.outputs):
        if value.name is not None and value.name.startswith(("past_key_values.", "present.")) and value.shape:
            value.shape = onnx_ir.Shape([*value.shape[:2], capacity, value.shape[3]])


class _Builder:
    """Nodes in the order in which they were added."""

    def __init__(self) -> None:
        self.nodes: list[onnx_ir.Node] = []

    def add(self, operator: str, *inputs: onnx_ir.Value | None, **attributes: int | Sequence[int]) -> onnx_ir.Value:
        node = onnx_ir.node(operator, inputs, attributes, version=_OPSET)
        self.nodes.append(node)
        return node.outputs[0]

    @staticmethod
    def constant(graph: onnx_ir.Graph, name: str, array: npt.ArrayLike) -> onnx_ir.Value:
        tensor = onnx_ir.Tensor(np.asarray(array), name=name)
        shape = onnx_ir.Shape(np.shape(array))
        value = onnx_ir.Value(name=name, shape=shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
        return value
