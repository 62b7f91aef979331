"""Rewrite a fused fp32 graph so that its matrices are 8-bit integers, the tied embedding stored once.

A linear layer `x @ weight + bias` becomes one `MatMulNBits`, whose kernel also rounds the activations, block by block
and row by row, and multiplies integers. The embedding's lookup gathers rows of the same integers that the head
multiplies with.
"""

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Graph, Model, Node, Value

from gpt2_edge.errors import QuantizationError
from gpt2_edge.quantize.blockwise import BlockwiseMatrix
from gpt2_edge.quantize.recipes import Recipe

# 4 of the kernel's accuracy levels: integer products. The others dequantize the weights in every run.
_INTEGER_PRODUCTS: Final = 4
_ZERO_POINT: Final = 128.0

Quantizer = Callable[[npt.NDArray[np.float32]], BlockwiseMatrix]


def quantize_matrices(
    model: Model, recipe: Recipe, quantizer: Quantizer, on_matrix: Callable[[], object] = lambda: None
) -> list[str]:
    """Replace every matrix of a fused graph, in place.

    Args:
        model: The graph, as `gpt2-edge export` writes it.
        recipe: Its block size is used.
        quantizer: Rounds a matrix [outputs, inputs].
        on_matrix: Called after each matrix.

    Returns:
        The name of the quantized matrix for each product and each lookup that was replaced: that of a tied embedding
        comes twice.

    Raises:
        QuantizationError: A weight is not finite, or the graph is not of the expected form.
    """
    rewriter = _Rewriter(model.graph, recipe, quantizer, on_matrix)
    for node in tuple(model.graph):
        if node.op_type == "MatMul" and _is_initializer(node.inputs[1]):
            rewriter.replace_linear(node)
        elif node.op_type == "Gemm":
            rewriter.replace_head(node)
        elif node.op_type == "Gather" and node.inputs[1] is _graph_input(model.graph, "input_ids"):
            rewriter.replace_embedding(node)
    rewriter.drop_unused()
    model.opset_imports["com.microsoft"] = 1
    return rewriter.replaced


class _Rewriter:
    def __init__(self, graph: Graph, recipe: Recipe, quantizer: Quantizer, on_matrix: Callable[[], object]) -> None:
        self._graph = graph
        self._recipe = recipe
        self._quantizer = quantizer
        self._on_matrix = on_matrix
        self._matrices: dict[str, tuple[BlockwiseMatrix, Value, Value]] = {}
        self.replaced: list[str] = []

    def replace_linear(self, matmul: Node) -> None:
        """`MatMul(x, weight [inputs, outputs])` and the `Add` of its bias."""
        x, weight = matmul.inputs
        add = _only_consumer(matmul.outputs[0])
        if add is None or add.op_type != "Add":
            raise QuantizationError(f"the matrix {_name(weight)} is not followed by its bias: export the model again")
        bias = next(value for value in add.inputs if value is not matmul.outputs[0])
        if not _is_initializer(bias):
            raise QuantizationError(f"the bias of {_name(weight)} is not a weight: export the model again")
        packed, scales = self._quantized(weight, transpose=True)
        self._put(add, self._matmul_n_bits(weight, x, packed, scales, bias))
        self._graph.remove(matmul, safe=True)

    def replace_head(self, gemm: Node) -> None:
        """`Gemm(x, weight [vocabulary, width], transB=1)` without a bias."""
        x, weight = gemm.inputs[:2]
        transposed = gemm.attributes["transB"].as_int() if "transB" in gemm.attributes else 0
        if transposed != 1 or (len(gemm.inputs) > 2 and gemm.inputs[2] is not None):
            raise QuantizationError(f"the head {_name(weight)} is not of the expected form: export the model again")
        packed, scales = self._quantized(weight, transpose=False)
        self._put(gemm, self._matmul_n_bits(weight, x, packed, scales, None))

    def replace_embedding(self, gather: Node) -> None:
        """`Gather(weight [vocabulary, width], input_ids)`: look rows of integers up and dequantize only those."""
        weight, input_ids = gather.inputs
        packed, scales = self._quantized(weight, transpose=False)
        matrix, _, _ = self._matrices[_name(weight)]
        prefix = _name(weight)

        def node(operator: str, inputs: list[Value | None], **attributes: int) -> Value:
            made = onnx_ir.node(operator, inputs, attributes, name=f"{prefix}.{operator}")
            self._graph.insert_before(gather, made)
            return made.outputs[0]

        integers = onnx_ir.node("Gather", [packed, input_ids], name=f"{prefix}.Gather.values")
        row_scales = onnx_ir.node("Gather", [scales, input_ids], name=f"{prefix}.Gather.scales")
        self._graph.insert_before(gather, [integers, row_scales])
        values = node("Cast", [integers.outputs[0]], to=onnx_ir.DataType.FLOAT)  # [batch, sequence, blocks, block]
        centred = node("Sub", [values, self._constant(f"{prefix}.zero_point", np.float32(_ZERO_POINT))])
        axis = self._constant(f"{prefix}.block_axis", np.array([3], np.int64))
        scaled = node("Mul", [centred, node("Unsqueeze", [row_scales.outputs[0], axis])])
        flat = self._constant(f"{prefix}.row_shape", np.array([0, 0, -1], np.int64))
        rows = node("Reshape", [scaled, flat])
        if matrix.columns % self._recipe.block_size:
            bounds = [
                self._constant(f"{prefix}.{name}", np.array([value], np.int64))
                for name, value in (("start", 0), ("end", matrix.columns), ("axis", 2))
            ]
            rows = node("Slice", [rows, *bounds])
        _replace(gather, rows)
        self._graph.remove(gather, safe=True)

    def drop_unused(self) -> None:
        """Forget the fp32 matrices, which nothing uses any more."""
        for name in [name for name, value in self._graph.initializers.items() if not value.uses()]:
            del self._graph.initializers[name]

    def _quantized(self, weight: Value | None, transpose: bool) -> tuple[Value, Value]:
        name = _name(weight)
        if name not in self._matrices:
            if weight is None or weight.const_value is None:
                raise QuantizationError(f"{name} is not a weight: export the model again")
            array = np.asarray(weight.const_value.numpy(), np.float32)
            if not np.isfinite(array).all():
                raise QuantizationError(f"{name} holds NaN or infinity: the checkpoint is damaged")
            matrix = self._quantizer(np.ascontiguousarray(array.T) if transpose else array)
            self._matrices[name] = (
                matrix,
                self._constant(f"{name}.quantized", matrix.values),
                self._constant(f"{name}.scales", matrix.scales),
            )
            self._on_matrix()
        self.replaced.append(name)
        _, packed, scales = self._matrices[name]
        return packed, scales

    def _matmul_n_bits(
        self, weight: Value | None, x: Value | None, packed: Value, scales: Value, bias: Value | None
    ) -> Node:
        prefix = _name(weight)
        matrix, _, _ = self._matrices[prefix]
        inputs = [x, packed, scales]
        if bias is not None:
            inputs += [None, None, bias]  # no zero points, no permutation of the columns
        return onnx_ir.node(
            "MatMulNBits",
            inputs,
            {
                "K": matrix.columns,
                "N": len(matrix.values),
                "bits": self._recipe.bits,
                "block_size": self._recipe.block_size,
                "accuracy_level": _INTEGER_PRODUCTS,
            },
            domain="com.microsoft",
            name=f"{prefix}.MatMulNBits.{self.replaced.count(prefix)}",
        )

    def _constant(self, name: str, array: npt.NDArray[np.generic] | np.generic) -> Value:
        if name in self._graph.initializers:
            return self._graph.initializers[name]
        value = onnx_ir.val(name, const_value=onnx_ir.tensor(np.asarray(array), name=name))
        self._graph.register_initializer(value)
        return value

    def _put(self, old: Node, new: Node) -> None:
        self._graph.insert_before(old, new)
        _replace(old, new.outputs[0])
        self._graph.remove(old, safe=True)


def _replace(old: Node, new: Value) -> None:
    """Let `new` take the place, name and type of the only output of `old`."""
    value = old.outputs[0]
    new.name, new.type, new.shape = value.name, value.type, value.shape
    value.name = None
    onnx_ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)


def _graph_input(graph: Graph, name: str) -> Value | None:
    return next((value for value in graph.inputs if value.name == name), None)


def _is_initializer(value: Value | None) -> bool:
    return value is not None and value.is_initializer()


def _only_consumer(value: Value) -> Node | None:
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 else None


def _name(value: Value | None) -> str:
    return "(no value)" if value is None or value.name is None else value.name
