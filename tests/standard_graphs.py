"""Writes GPT-2 as graphs of the standard flavour, operator by operator, as optimum's look from outside."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from transformers import GPT2LMHeadModel

PAST: Final = "past_key_values.{}.{}"
PRESENT: Final = "present.{}.{}"
_OPSET: Final = 20
_TYPES: Final = {"f": TensorProto.FLOAT, "h": TensorProto.FLOAT16, "i": TensorProto.INT64, "b": TensorProto.BOOL}


def build(
    checkpoint: Path,
    *,
    attention_mask: bool = True,
    position_ids: bool = True,
    merged: bool = False,
    takes_past: bool = True,
    sees_past: bool = True,
    past: str = PAST,
    present: str = PRESENT,
    extra_input: str | None = None,
    drop_last_present: bool = False,
    repeats_present: bool = False,
) -> onnx.ModelProto:
    """Write a checkpoint's computation as one graph.

    Args:
        checkpoint: A checkpoint that transformers reads.
        attention_mask: Whether the graph has that input.
        position_ids: Whether the graph has that input; without it positions follow from the length of the past.
        merged: Two branches, one of which does without the past, and the input `use_cache_branch`.
        takes_past: Whether there are inputs for keys and values.
        sees_past: False returns the past with the new keys and values, but attends to the new ones only.
        past: How the inputs for layer and part are called.
        present: How the outputs are called.
        extra_input: One more input, which nothing uses.
        drop_last_present: Leave an output out.
        repeats_present: Return keys that are twice as long, which free dimensions allow.
    """
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    config = model.config
    weights = {name.removeprefix("transformer."): value.numpy() for name, value in model.state_dict().items()}
    graph = _Graph(weights, config, attention_mask, position_ids, past, sees_past, repeats_present)
    cache_shape = ["batch", config.n_head, "past", config.n_embd // config.n_head]
    cache = [(layer, part) for layer in range(config.n_layer) for part in ("key", "value")]
    inputs = [_value("input_ids", "i", ["batch", "sequence"])]
    if attention_mask:
        inputs.append(_value("attention_mask", "i", ["batch", "whole"]))
    if position_ids:
        inputs.append(_value("position_ids", "i", ["batch", "sequence"]))
    if takes_past:
        inputs += [_value(past.format(*each), "f", cache_shape) for each in cache]
    if merged:
        inputs.append(_value("use_cache_branch", "b", [1]))
    if extra_input:
        inputs.append(_value(extra_input, "i", ["batch"]))
    shape = [*cache_shape[:2], "whole", cache_shape[3]]
    outputs = [_value("logits", "f", ["batch", "sequence", config.vocab_size])]
    outputs += [_value(present.format(*each), "f", shape) for each in cache]
    if drop_last_present:
        outputs.pop()
    names = [output.name for output in outputs]
    if merged:
        branches = []
        for prefix, with_past in (("then", True), ("else", False)):
            nodes = graph.body([f"{prefix}/{name}" for name in names], f"{prefix}/", with_past)
            branch_outputs = [_value(f"{prefix}/{name}", "f", None) for name in names]
            branches.append(helper.make_graph(nodes, prefix, [], branch_outputs))
        nodes = [helper.make_node("If", ["use_cache_branch"], names, then_branch=branches[0], else_branch=branches[1])]
    else:
        nodes = graph.body(names, "", takes_past)
    whole = helper.make_graph(nodes, "gpt2", inputs, outputs, graph.initializers)
    return helper.make_model(whole, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)


def write_folder(folder: Path, checkpoint: Path, name: str = "model.onnx", **options: Any) -> Path:
    """Make a folder as optimum does: a graph, `config.json` and the tokenizer, and no manifest."""
    folder.mkdir()
    onnx.save(build(checkpoint, **options), folder / name)
    for file in ("config.json", "generation_config.json", "tokenizer.json"):
        shutil.copy(checkpoint / file, folder)
    return folder


def _value(name: str, kind: str, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, _TYPES[kind], shape)


class _Graph:
    """The body of a graph; weights are shared by all bodies."""

    def __init__(
        self,
        weights: dict[str, Any],
        config: Any,
        attention_mask: bool,
        position_ids: bool,
        past: str,
        sees_past: bool,
        repeats_present: bool,
    ) -> None:
        self._config = config
        self._attention_mask = attention_mask
        self._position_ids = position_ids
        self._past = past
        self._sees_past = sees_past
        self._repeats_present = repeats_present
        self.initializers: list[onnx.TensorProto] = []
        self._constants: set[str] = set()
        weights["head"] = np.ascontiguousarray(weights["lm_head.weight"].T)
        for name, array in weights.items():
            if name != "lm_head.weight":
                self._constant(name, array)

    def _constant(self, name: str, value: Any) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self.initializers.append(numpy_helper.from_array(np.array(value), name))
        return name

    def body(self, results: Sequence[str], prefix: str, with_past: bool) -> list[onnx.NodeProto]:
        self._nodes: list[onnx.NodeProto] = []
        self._prefix = prefix
        heads = self._config.n_head
        head_size = self._config.n_embd // heads
        zero, one, two = (self._constant(f"number.{n}", [n]) for n in (0, 1, 2))
        new = self._add("Slice", self._add("Shape", "input_ids"), one, two)
        if with_past and self._sees_past:
            past = self._add("Slice", self._add("Shape", self._past.format(0, "key")), two, self._constant("n3", [3]))
        else:
            past = zero
        scalar = self._constant("scalar_shape", np.array([], np.int64))
        start, stop = (self._add("Reshape", value, scalar) for value in (past, self._add("Add", past, new)))
        step = self._constant("step", np.array(1))
        queries = self._add("Range", start, stop, step)
        keys = self._add("Range", self._constant("begin", np.array(0)), stop, step)
        axes = self._constant("query_axis", [1])
        seen = self._add("LessOrEqual", keys, self._add("Unsqueeze", queries, axes))  # [new, whole]
        if self._attention_mask and self._sees_past:
            mask = self._add("Cast", "attention_mask", to=TensorProto.BOOL)
            seen = self._add("And", seen, self._add("Unsqueeze", mask, self._constant("mask_axes", [1, 2])))
        positions = "position_ids" if self._position_ids else self._add("Unsqueeze", queries, zero)
        tokens = self._add("Gather", "wte.weight", "input_ids")
        hidden = self._add("Add", tokens, self._add("Gather", "wpe.weight", positions))
        presents = list(results[1:])
        for layer in range(self._config.n_layer):
            block = f"h.{layer}"
            projected = self._linear(self._normalize(hidden, f"{block}.ln_1"), f"{block}.attn.c_attn")
            parts = [f"{prefix}{block}.{part}" for part in ("query", "key", "value")]
            self._nodes.append(helper.make_node("Split", [projected], parts, axis=-1, num_outputs=3))
            shape = self._constant("heads", [0, 0, heads, head_size])
            query, key, value = (
                self._add("Transpose", self._add("Reshape", part, shape), perm=(0, 2, 1, 3)) for part in parts
            )
            whole = []
            for part, tensor in (("key", key), ("value", value)):
                earlier = [self._past.format(layer, part)] if with_past else []
                name = presents.pop(0) if presents else None
                together = self._add("Concat", *earlier, tensor, axis=2, output=None if self._repeats_present else name)
                if self._repeats_present:
                    self._add("Concat", together, together, axis=2, output=name)
                whole.append(together if self._sees_past else tensor)
            scores = self._add("MatMul", query, self._add("Transpose", whole[0], perm=(0, 1, 3, 2)))
            scaled = self._add("Mul", scores, self._constant("scale", np.float32(head_size**-0.5)))
            masked = self._add("Where", seen, scaled, self._constant("minimum", np.finfo(np.float32).min))
            attended = self._add("MatMul", self._add("Softmax", masked, axis=-1), whole[1])
            merged = self._add(
                "Reshape", self._add("Transpose", attended, perm=(0, 2, 1, 3)), self._constant("w", [0, 0, -1])
            )
            hidden = self._add("Add", hidden, self._linear(merged, f"{block}.attn.c_proj"))
            inner = self._linear(self._normalize(hidden, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            inner = self._add("Gelu", inner, approximate="tanh")
            hidden = self._add("Add", hidden, self._linear(inner, f"{block}.mlp.c_proj"))
        self._add("MatMul", self._normalize(hidden, "ln_f"), "head", output=results[0])
        return self._nodes

    def _add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        name = output or f"{self._prefix}{operator}.{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def _linear(self, hidden: str, name: str) -> str:
        return self._add("Add", self._add("MatMul", hidden, f"{name}.weight"), f"{name}.bias")

    def _normalize(self, hidden: str, name: str) -> str:
        epsilon = self._config.layer_norm_epsilon
        return self._add("LayerNormalization", hidden, f"{name}.weight", f"{name}.bias", axis=-1, epsilon=epsilon)
