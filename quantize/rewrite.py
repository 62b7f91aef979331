"""Rewrite a fused fp32 graph so that its matrices are integers, the tied embedding stored once.

A linear layer `x @ weight + bias` becomes one `MatMulNBits`, whose kernel also rounds the activations, block by block
and row by row, and multiplies integers; or, with one scale for each output, a few nodes around a product of integers.
The embedding's lookup gathers rows of the same integers that the head multiplies with.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Graph, Model, Node, Value

from gpt2_edge.errors import QuantizationError
from gpt2_edge.quantize.blockwise import BlockwiseMatrix, pack
from gpt2_edge.quantize.branches import replace_by_branches
from gpt2_edge.quantize.calibration import CalibrationRun
from gpt2_edge.quantize.centring import LinearLayer, centre
from gpt2_edge.quantize.graph_edit import (
    NewNodes,
    array_of,
    constant,
    graph_input,
    is_weight,
    name_of,
    only_consumer,
    replace_nodes,
)
from gpt2_edge.quantize.integer_product import integer_product
from gpt2_edge.quantize.recipes import MatrixFormat, Recipe
from gpt2_edge.quantize.rounding import round_matrix

# 4 of the kernel's accuracy levels: integer products. The others dequantize the weights in every run.
_INTEGER_PRODUCTS: Final = 4
_BIAS_INPUT: Final = 5  # of MatMulNBits


def quantize_matrices(
    model: Model, recipe: Recipe, calibration: CalibrationRun | None, on_matrix: Callable[[], object] = lambda: None
) -> list[str]:
    """Replace every matrix of a fused graph, in place.

    Args:
        model: The graph, as `gpt2-edge export` writes it.
        recipe: Says how each matrix is stored and rounded.
        calibration: Over the same graph; None takes all inputs for equally large and independent.
        on_matrix: Called after each matrix.

    Returns:
        The name of the quantized matrix for each product and each lookup that was replaced: that of a tied embedding
        comes twice.

    Raises:
        QuantizationError: The graph is not of the expected form.
    """
    rewriter = _Rewriter(model.graph, recipe, calibration, on_matrix)
    for node in tuple(model.graph):
        if node.op_type == "MatMul" and is_weight(node.inputs[1]):
            rewriter.replace_linear(node)
        elif node.op_type == "Gemm":
            rewriter.replace_head(node)
    rewriter.insert_prompt_products()
    for node in tuple(model.graph):
        if node.op_type == "Gather" and node.inputs[1] is graph_input(model.graph, "input_ids"):
            rewriter.replace_embedding(node)
    rewriter.drop_unused()
    model.opset_imports["com.microsoft"] = 1
    return rewriter.replaced


def check_finite(model: Model) -> None:
    """Refuse a model with weights that are not numbers, before anything is computed with them.

    Raises:
        QuantizationError: It names the weight.
    """
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype.is_floating_point() and not np.isfinite(tensor.numpy()).all():
            raise QuantizationError(f"{name} holds NaN or infinity: the checkpoint is damaged")


@dataclass(frozen=True, slots=True)
class _PromptLayer:
    """A layer that is stored once more, for many tokens.

    Attributes:
        output: Of the node that computes a few tokens.
        name: Of the layer.
        x: What is multiplied.
        steps: Shape [outputs, inputs].
        scales: Shape [outputs, 1].
        bias_difference: To the bias of the node that computes a few tokens, shape [outputs]. That one may still change,
            when what comes behind is centred.
    """

    output: Value
    name: str
    x: Value
    steps: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    bias_difference: npt.NDArray[np.float32]


class _Rewriter:
    def __init__(
        self, graph: Graph, recipe: Recipe, calibration: CalibrationRun | None, on_matrix: Callable[[], object]
    ) -> None:
        self._graph = graph
        self._recipe = recipe
        self._calibration = calibration
        self._on_matrix = on_matrix
        self._tables: dict[str, BlockwiseMatrix] = {}
        self._prompt_layers: list[_PromptLayer] = []
        self.replaced: list[str] = []

    def replace_linear(self, matmul: Node) -> None:
        """`MatMul(x, weight [inputs, outputs])` and the `Add` of its bias."""
        x, weight = matmul.inputs
        add = only_consumer(matmul.outputs[0])
        if x is None or add is None or add.op_type != "Add":
            raise QuantizationError(f"the matrix {name_of(weight)} is not followed by its bias: export the model again")
        bias = next(value for value in add.inputs if value is not matmul.outputs[0])
        if not is_weight(bias):
            raise QuantizationError(f"the bias of {name_of(weight)} is not a weight: export the model again")
        layer = LinearLayer(x, np.ascontiguousarray(array_of(weight).T), array_of(bias))
        count = self.replaced.count(name_of(weight))  # the tracer keeps matrices that are equal as one
        name = f"{name_of(weight)}.{count}" if count else name_of(weight)
        output = self._insert_layer(add, name, layer, self._recipe.linear)
        replace_nodes(self._graph, [add, matmul], add.outputs[0], output)
        self._done(weight)

    def replace_head(self, gemm: Node) -> None:
        """`Gemm(x, weight [vocabulary, width], transB=1)` without a bias."""
        x, weight = gemm.inputs[:2]
        transposed = gemm.attributes["transB"].as_int() if "transB" in gemm.attributes else 0
        if x is None or transposed != 1 or (len(gemm.inputs) > 2 and gemm.inputs[2] is not None):
            raise QuantizationError(f"the head {name_of(weight)} is not of the expected form: export the model again")
        matrix = array_of(weight)
        layer = LinearLayer(x, matrix, np.zeros(len(matrix), np.float32))
        output = self._insert_layer(gemm, name_of(weight), layer, self._recipe.head)
        replace_nodes(self._graph, [gemm], gemm.outputs[0], output)
        self._done(weight)

    def _insert_layer(self, before: Node, name: str, layer: LinearLayer, matrix_format: MatrixFormat) -> Value:
        """Round a layer and insert what computes it."""
        prompt_format = self._recipe.prompt if matrix_format is self._recipe.linear else None
        # The table of the embedding is the head's matrix, so its columns stay as they are.
        equalize = matrix_format.block_size is None or prompt_format is not None
        if self._calibration is not None:
            if self._recipe.centred:
                centre(self._graph, layer, self._calibration, equalize)
            if matrix_format.rounding == "gptq":
                layer.hessian = self._calibration.hessian(layer.x, layer.mean)
        steps, scales = round_matrix(layer.matrix, matrix_format, layer.hessian)
        if matrix_format.block_size is None:
            nodes = NewNodes(name)
            output = self._integer_product(nodes, layer.x, steps, scales, layer.bias_beside(steps * scales))
            self._graph.insert_before(before, nodes.nodes)
            return output
        table = pack(steps, scales, matrix_format.bits, matrix_format.block_size)
        self._tables[name] = table
        output = self._insert_blockwise_product(before, name, layer, table)
        if prompt_format is not None:
            steps, scales = round_matrix(layer.matrix, prompt_format, None)
            difference = layer.bias_beside(steps * scales) - layer.bias_beside(table.dequantized())
            self._prompt_layers.append(_PromptLayer(output, name, layer.x, steps, scales, difference))
        return output

    def _integer_product(
        self,
        nodes: NewNodes,
        x: Value,
        steps: npt.NDArray[np.int8],
        scales: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
    ) -> Value:
        if x.shape is None or len(x.shape) != 2:
            raise QuantizationError(f"the graph was made by an older release ({nodes.name}): export the model again")
        return integer_product(self._graph, nodes, x, steps, scales, bias)

    def insert_prompt_products(self) -> None:
        """Let the other matrices compute many tokens: only now, because what was calibrated is what decodes."""
        for layer in self._prompt_layers:
            node = layer.output.producer()
            if node is None:
                raise ValueError(f"{layer.name} was taken out of the graph")
            many, few = NewNodes(f"{layer.name}.prompt"), NewNodes(f"{layer.name}.decode")
            bias = layer.bias_difference
            if len(node.inputs) > _BIAS_INPUT:
                bias = bias + array_of(node.inputs[_BIAS_INPUT])
            product = self._integer_product(many, layer.x, layer.steps, layer.scales, bias)
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            outputs = few.node(node.op_type, node.inputs, domain=node.domain, **attributes)
            replace_by_branches(self._graph, node, (few, outputs), (many, [product]))

    def _insert_blockwise_product(self, before: Node, name: str, layer: LinearLayer, table: BlockwiseMatrix) -> Value:
        bias = layer.bias_beside(table.dequantized())
        packed, scales = self._table(name)
        inputs: list[Value | None] = [layer.x, packed, scales]
        if bias.any():
            # No zero points, no permutation of the columns.
            inputs += [None, None, constant(self._graph, f"{name}.bias", bias)]
        node = onnx_ir.node(
            "MatMulNBits",
            inputs,
            {
                "K": table.columns,
                "N": len(table.values),
                "bits": table.bits,
                "block_size": table.block_size,
                "accuracy_level": _INTEGER_PRODUCTS,
            },
            domain="com.microsoft",
            name=f"{name}.MatMulNBits",
        )
        self._graph.insert_before(before, node)
        node.outputs[0].name = f"{name}.MatMulNBits.output"
        return node.outputs[0]

    def _table(self, name: str) -> tuple[Value, Value]:
        table = self._tables[name]
        return (
            constant(self._graph, f"{name}.quantized", table.values),
            constant(self._graph, f"{name}.scales", table.scales),
        )

    def _done(self, weight: Value | None) -> None:
        self.replaced.append(name_of(weight))
        self._on_matrix()

    def replace_embedding(self, gather: Node) -> None:
        """`Gather(weight [vocabulary, width], input_ids)`: look rows of integers up and dequantize only those."""
        weight, input_ids = gather.inputs
        prefix = name_of(weight)
        if prefix in self._tables:
            self.replaced.append(prefix)
        else:
            head = self._recipe.head
            if head.block_size is None:
                raise QuantizationError(f"the recipe {self._recipe.name} has no format for an embedding")
            steps, row_scales_array = round_matrix(array_of(weight), head, None)
            self._tables[prefix] = pack(steps, row_scales_array, head.bits, head.block_size)
            self._done(weight)
        matrix = self._tables[prefix]
        packed, scales = self._table(prefix)

        def node(operator: str, inputs: list[Value | None], suffix: str = "", **attributes: int) -> Value:
            made = onnx_ir.node(operator, inputs, attributes, name=f"{prefix}.{operator}{suffix}")
            self._graph.insert_before(gather, made)
            return made.outputs[0]

        integers = node("Gather", [packed, input_ids], ".values")
        row_scales = node("Gather", [scales, input_ids], ".scales")
        if matrix.bits == 8:
            values = node("Cast", [integers], to=onnx_ir.DataType.FLOAT)  # [batch, sequence, blocks, block]
            centred = node("Sub", [values, constant(self._graph, f"{prefix}.zero_point", np.float32(128))])
        else:
            pairs = np.stack(np.divmod(np.arange(256, dtype=np.float32), 16)[::-1], axis=1) - 8  # low half, high half
            indices = node("Cast", [integers], to=onnx_ir.DataType.INT32)
            # [batch, sequence, blocks, block / 2, 2]
            halves = node("Gather", [constant(self._graph, f"{prefix}.pairs", pairs), indices], ".pairs")
            blocked = constant(self._graph, f"{prefix}.block_shape", np.array([0, 0, 0, -1], np.int64))
            centred = node("Reshape", [halves, blocked], ".pairs")
        axis = constant(self._graph, f"{prefix}.block_axis", np.array([3], np.int64))
        scaled = node("Mul", [centred, node("Unsqueeze", [row_scales, axis])])
        flat = constant(self._graph, f"{prefix}.row_shape", np.array([0, 0, -1], np.int64))
        rows = node("Reshape", [scaled, flat])
        if matrix.columns % matrix.block_size:
            bounds = [
                constant(self._graph, f"{prefix}.{name}", np.array([value], np.int64))
                for name, value in (("start", 0), ("end", matrix.columns), ("axis", 2))
            ]
            rows = node("Slice", [rows, *bounds])
        replace_nodes(self._graph, [gather], gather.outputs[0], rows)

    def drop_unused(self) -> None:
        """Forget the fp32 matrices, which nothing uses any more."""
        for name in [name for name, value in self._graph.initializers.items() if not value.uses()]:
            del self._graph.initializers[name]
