"""Let a fused graph keep its keys and values as 8-bit integers, a quarter of what floats take.

A few new tokens go to the attention kernel that multiplies with integers, which reads a quarter of the memory. That
kernel computes many tokens at once several times more slowly than the one over floats. So these go to the latter: what
the cache holds is turned into floats for it, and what it adds to the cache into integers.
"""

from typing import Any, Final

import numpy as np
import onnx_ir
from onnx_ir import Graph, Model, Node, Value

from gpt2_edge.errors import QuantizationError
from gpt2_edge.graph_names import key_value_names
from gpt2_edge.quantize.branches import replace_by_branches
from gpt2_edge.quantize.graph_edit import NewNodes, constant, graph_input

MINIMUM_ONNXRUNTIME: Final = "1.27"  # whose attention knows an integer cache on the CPU

_OPSET: Final = 24  # has TensorScatter
_IR_VERSION: Final = 11
_INTEGERS: Final[dict[str, Any]] = {"kv_cache_bit_width": 8, "k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR"}


def use_integer_cache(model: Model) -> None:
    """Replace the attention of a fused graph, in place.

    Args:
        model: Its keys and values fit integers: see `cache_scaling.scale_cache`.

    Raises:
        QuantizationError: The graph is not of the expected form.
    """
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "GroupQueryAttention"]
    past, present = map(set, key_value_names(len(attentions)))
    caches = [value for value in graph.inputs if value.name in past]
    caches += [value for value in graph.outputs if value.name in present]
    if not attentions or len(caches) != 4 * len(attentions):
        raise QuantizationError("the graph has no cache that its attention updates: export the model again")
    for value in caches:
        value.dtype = onnx_ir.DataType.INT8
    for attention in attentions:
        replace_by_branches(graph, attention, _over_integers(graph, attention), _over_floats(graph, attention))
    graph.opset_imports[""] = model.opset_imports[""] = _OPSET
    model.ir_version = max(model.ir_version, _IR_VERSION)


def _over_integers(graph: Graph, attention: Node) -> tuple[NewNodes, list[Value]]:
    branch = NewNodes(f"{attention.name}.few")
    step = constant(graph, "integer_cache.step", np.ones(1, np.float32))
    return branch, _attention(branch, [*attention.inputs[:7], *5 * [None], step, step], attention, **_INTEGERS)


def _over_floats(graph: Graph, attention: Node) -> tuple[NewNodes, list[Value]]:
    branch = NewNodes(f"{attention.name}.many")
    packed, _, _, past_key, past_value, last_indices, longest = attention.inputs[:7]
    zero, one, token_axis = (
        constant(graph, f"integer_cache.{name}", np.array([number], np.int64))
        for name, number in (("zero", 0), ("one", 1), ("token_axis", 2))
    )
    unit = constant(graph, "integer_cache.unit", np.float32(1))
    zero_point = constant(graph, "integer_cache.zero_point", np.int8(0))
    shape = branch.value("Shape", [graph_input(graph, "input_ids")])
    rows = branch.value("Slice", [shape, zero, one])
    count = branch.value("Slice", [shape, one, token_axis])
    after = branch.value("Unsqueeze", [branch.value("Cast", [longest], to=onnx_ir.DataType.INT64), zero])
    before = branch.value("Sub", [after, count])
    floats = [
        branch.value("DequantizeLinear", [branch.value("Slice", [past, zero, before, token_axis]), unit, zero_point])
        for past in (past_key, past_value)
    ]
    attended, *grown = _attention(branch, [packed, None, None, *floats, last_indices, longest], attention)
    starts = branch.value("Expand", [before, rows])
    written = []
    for past, present in zip((past_key, past_value), grown, strict=True):
        new = branch.value("Slice", [present, before, after, token_axis])
        rounded = branch.value("QuantizeLinear", [new, unit, zero_point])
        written.append(branch.value("TensorScatter", [past, rounded, starts], axis=2))
    return branch, [attended, *written]


def _attention(branch: NewNodes, inputs: list[Value | None], like: Node, **more: Any) -> list[Value]:
    attributes: dict[str, Any] = {name: attribute.value for name, attribute in like.attributes.items()}
    return list(branch.node("GroupQueryAttention", inputs, domain="com.microsoft", outputs=3, **attributes | more))
