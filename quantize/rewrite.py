"""Rewrite a fused fp32 graph so that its matrices are integers, the tied embedding stored once.

A linear layer `x @ weight + bias` becomes one `MatMulNBits`, whose kernel also rounds the activations, block by block
and row by row, and multiplies integers; or, with one scale for each output, a few nodes around a product of integers.
The embedding's lookup gathers rows of the same integers that the head multiplies with.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Graph, Model, Node, Value

from gpt2_edge.errors import QuantizationError
from gpt2_edge.quantize.blockwise import BlockwiseMatrix, pack
from gpt2_edge.quantize.blockwise_product import StoredMatrix, blockwise_lookup, blockwise_product, store
from gpt2_edge.quantize.branches import replace_by_branches
from gpt2_edge.quantize.calibration import CalibrationRun, Hessian
from gpt2_edge.quantize.centring import LinearLayer, centre
from gpt2_edge.quantize.compensation import compensate
from gpt2_edge.quantize.fixed_rounding import FixedRounding, fix_rounding
from gpt2_edge.quantize.gptq import FloatArray
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
from gpt2_edge.quantize.half_floats import as_half, through_half
from gpt2_edge.quantize.integer_product import fixed_integer_product, integer_product, row_steps
from gpt2_edge.quantize.recipes import MatrixFormat, Recipe
from gpt2_edge.quantize.rounding import round_matrix
from gpt2_edge.quantize.row_table import RowTable, row_lookup, store_rows, transposed

_BIAS_INPUT: Final = 5  # of MatMulNBits


@dataclass(frozen=True, slots=True)
class Replaced:
    """What became of the matrices of a graph.

    Attributes:
        places: In how many products and lookups one was replaced.
        formats: How each is stored now, in words.
    """

    places: int
    formats: Mapping[str, str]


def quantize_matrices(
    model: Model, recipe: Recipe, calibration: CalibrationRun, on_matrix: Callable[[], object] = lambda: None
) -> Replaced:
    """Replace every matrix of a fused graph, in place.

    Args:
        model: The graph, as `gpt2-edge export` writes it.
        recipe: Says how each matrix is stored and rounded.
        calibration: Over the same graph.
        on_matrix: Called after each matrix.

    Returns:
        What was replaced.

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
        elif node.op_type == "Gather" and node.inputs[1] is graph_input(model.graph, "position_ids"):
            rewriter.shrink_positions(node)
    rewriter.drop_unused()
    model.opset_imports["com.microsoft"] = 1
    return Replaced(rewriter.places, rewriter.formats)


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
        rounding: Of what is multiplied; None gives each row a step of its own.
        bias_difference: To the bias of the node that computes a few tokens, shape [outputs]. That one may still change,
            when what comes behind is centred.
    """

    output: Value
    name: str
    x: Value
    steps: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    rounding: FixedRounding | None
    bias_difference: npt.NDArray[np.float32]


def _rows_of(matrix: FloatArray, formats: Sequence[tuple[int, MatrixFormat]]) -> list[tuple[FloatArray, MatrixFormat]]:
    """Return consecutive rows of a matrix, each with its format."""
    starts = np.cumsum([rows for rows, _ in formats])[:-1]
    return list(zip(np.split(matrix, starts), [matrix_format for _, matrix_format in formats], strict=True))


class _Rewriter:
    def __init__(
        self, graph: Graph, recipe: Recipe, calibration: CalibrationRun, on_matrix: Callable[[], object]
    ) -> None:
        self._graph = graph
        self._recipe = recipe
        self._calibration = calibration
        self._original = calibration.of_a_copy()
        self._on_matrix = on_matrix
        self._stored: dict[str, list[StoredMatrix]] = {}
        self._row_tables: dict[str, RowTable] = {}
        self._uses: Counter[str] = Counter()
        self._prompt_layers: list[_PromptLayer] = []
        self._rounded_alike: set[str] = set()
        self.places = 0
        self.formats: dict[str, str] = {}

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
        self._uses[name_of(weight)] += 1
        count = self._uses[name_of(weight)]  # the tracer keeps matrices that are equal as one
        name = name_of(weight) if count == 1 else f"{name_of(weight)}.{count - 1}"
        formats = [(len(layer.matrix), self._recipe.linear_format(name_of(weight)))]
        output = self._insert_layer(add, name, layer, formats, self._recipe.prompt)
        replace_nodes(self._graph, [add, matmul], add.outputs[0], output)
        self._done(weight, formats)

    def replace_head(self, gemm: Node) -> None:
        """`Gemm(x, weight [vocabulary, width], transB=1)` without a bias."""
        x, weight = gemm.inputs[:2]
        transposed = gemm.attributes["transB"].as_int() if "transB" in gemm.attributes else 0
        if x is None or transposed != 1 or (len(gemm.inputs) > 2 and gemm.inputs[2] is not None):
            raise QuantizationError(f"the head {name_of(weight)} is not of the expected form: export the model again")
        matrix = array_of(weight)
        layer = LinearLayer(x, matrix, np.zeros(len(matrix), np.float32))
        formats = self._recipe.head_formats(len(matrix))
        tied = weight is not None and len(weight.uses()) > 1
        output = self._insert_layer(gemm, name_of(weight), layer, formats, None, is_head=True, is_table=tied)
        replace_nodes(self._graph, [gemm], gemm.outputs[0], output)
        self._done(weight, formats)

    def _insert_layer(
        self,
        before: Node,
        name: str,
        layer: LinearLayer,
        formats: Sequence[tuple[int, MatrixFormat]],
        prompt_format: MatrixFormat | None,
        is_head: bool = False,
        is_table: bool = False,
    ) -> Value:
        """Round a layer and insert what computes it.

        Args:
            before: Where to insert it.
            name: Of the matrix.
            layer: Not centred yet.
            formats: Each of so many outputs, from the first on.
            prompt_format: How the matrix is stored once more.
            is_head: Whether the outputs are logits, whose rows have steps of their own in any case: fixed ones cost the
                storyteller 0.0008 nats a token there, and little time is to be won with a few rows.
            is_table: Whether rows of the matrix are looked up as well.
        """
        _, first_format = formats[0]
        exact = replace(layer) if prompt_format is not None else None
        # Blocks of weights share scales with few others; and a table of blocks is looked up as it is.
        equalize = first_format.block_size is None or prompt_format is not None
        if first_format.rounding == "gptq":
            layer.hessian = self._calibration.hessian(layer.x, self._calibration.mean(layer.x))
            if not is_table:
                compensate(layer, layer.hessian, self._calibration, self._original)
        column_scales = centre(self._graph, layer, self._calibration, equalize, exact, is_table=is_table)
        nodes = NewNodes(name)
        if first_format.block_size is None:
            steps, scales = round_matrix(layer.matrix, first_format, None)
            rounding = None if is_head else self._fixed_rounding(layer)
            if rounding is not None:
                self._rounded_alike.add(name)
            bias = layer.bias_beside(steps * scales)
            if is_table:
                table = self._row_tables[name] = store_rows(self._graph, name, steps, scales, column_scales)
                weights = transposed(nodes, table)
                output = integer_product(self._graph, nodes, layer.x, steps, scales, bias, weights)
            else:
                output = self._integer_product(nodes, layer.x, rounding, steps, scales, bias)
            self._graph.insert_before(before, nodes.nodes)
            return output
        tables = [self._rounded(*part, layer.hessian) for part in _rows_of(layer.matrix, formats)]
        bias = layer.bias_beside(np.concatenate([table.dequantized() for table in tables]))
        starts = np.cumsum([rows for rows, _ in formats])[:-1]
        products = [
            blockwise_product(self._graph, nodes, layer.x, stored, part)
            for stored, part in zip(self._store(name, tables), np.split(bias, starts), strict=True)
        ]
        output = products[0] if len(products) == 1 else nodes.value("Concat", products, axis=-1)
        self._graph.insert_before(before, nodes.nodes)
        if exact is not None and prompt_format is not None:
            steps, scales = round_matrix(exact.matrix, prompt_format, None)
            difference = exact.bias_beside(steps * scales) - bias
            rounding = self._fixed_rounding(exact)
            self._prompt_layers.append(_PromptLayer(output, name, layer.x, steps, scales, rounding, difference))
        return output

    def _fixed_rounding(self, layer: LinearLayer) -> FixedRounding | None:
        if not self._recipe.fixed_rounding:
            return None
        vectors = self._calibration.vectors(layer.x)
        return fix_rounding(vectors, layer.matrix, [row_steps(layer.x, part) for part in vectors])

    def _integer_product(
        self,
        nodes: NewNodes,
        x: Value,
        rounding: FixedRounding | None,
        steps: npt.NDArray[np.int8],
        scales: npt.NDArray[np.float32],
        bias: npt.NDArray[np.float32],
    ) -> Value:
        if rounding is None:
            return integer_product(self._graph, nodes, x, steps, scales, bias)
        return fixed_integer_product(self._graph, nodes, x, rounding, steps, scales, bias)

    def _rounded(self, matrix: FloatArray, matrix_format: MatrixFormat, hessian: Hessian | None) -> BlockwiseMatrix:
        if matrix_format.block_size is None:
            raise QuantizationError(f"the recipe {self._recipe.name} has no blocks where it needs some")
        steps, scales = round_matrix(matrix, matrix_format, hessian)
        if self._recipe.float_bits == 16:
            scales = through_half(scales)
        return pack(steps, scales, matrix_format.bits, matrix_format.block_size)

    def _store(self, name: str, tables: Sequence[BlockwiseMatrix]) -> list[StoredMatrix]:
        names = [name] if len(tables) == 1 else [f"{name}.{index}" for index in range(len(tables))]
        self._stored[name] = [
            store(self._graph, part, table, self._recipe.float_bits) for part, table in zip(names, tables, strict=True)
        ]
        return self._stored[name]

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
            product = self._integer_product(many, layer.x, layer.rounding, layer.steps, layer.scales, bias)
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            outputs = few.node(node.op_type, node.inputs, domain=node.domain, **attributes)
            replace_by_branches(self._graph, node, (few, outputs), (many, [product]))

    def _done(self, weight: Value | None, formats: Sequence[tuple[int, MatrixFormat]]) -> None:
        (_, first), *rest = formats
        parts = [f"{rows} rows with {matrix_format}" for rows, matrix_format in formats] if rest else [str(first)]
        if name_of(weight) in self._rounded_alike:
            parts.append("all inputs rounded alike")
        self.formats[name_of(weight)] = "; ".join(parts)
        self.places += 1
        self._on_matrix()

    def replace_embedding(self, gather: Node) -> None:
        """`Gather(weight [vocabulary, width], input_ids)`: look rows of integers up."""
        weight, input_ids = gather.inputs
        name = name_of(weight)
        if input_ids is None:
            raise QuantizationError(f"the lookup of {name} has no ids: export the model again")
        if name in self._stored or name in self._row_tables:
            self.places += 1
        else:
            matrix = array_of(weight)
            formats = self._recipe.head_formats(len(matrix))
            if self._recipe.head.block_size is None:
                self._row_tables[name] = store_rows(self._graph, name, *round_matrix(matrix, self._recipe.head, None))
            else:
                self._store(name, [self._rounded(*part, None) for part in _rows_of(matrix, formats)])
            self._done(weight, formats)
        nodes = NewNodes(f"{name}.lookup")
        if name in self._row_tables:
            rows = row_lookup(self._graph, nodes, self._row_tables[name], input_ids)
        else:
            rows = blockwise_lookup(self._graph, nodes, self._stored[name], input_ids)
        self._graph.insert_before(gather, nodes.nodes)
        replace_nodes(self._graph, [gather], gather.outputs[0], rows)

    def shrink_positions(self, gather: Node) -> None:
        """`Gather(weight [context, width], position_ids)`: look rows of float16 up."""
        half = as_half(array_of(gather.inputs[0])) if self._recipe.float_bits == 16 else None
        if half is None:
            return
        name = name_of(gather.inputs[0])
        nodes = NewNodes(f"{name}.lookup")
        table = constant(self._graph, f"{name}.half", half)
        rows = nodes.value("Cast", [nodes.value("Gather", [table, gather.inputs[1]])], to=onnx_ir.DataType.FLOAT)
        self._graph.insert_before(gather, nodes.nodes)
        replace_nodes(self._graph, [gather], gather.outputs[0], rows)

    def drop_unused(self) -> None:
        """Forget the fp32 matrices, which nothing uses any more."""
        for name in [name for name, value in self._graph.initializers.items() if not value.uses()]:
            del self._graph.initializers[name]
