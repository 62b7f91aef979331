"""Quantized folders compute with the integers they were rounded to, and what cannot be quantized is refused."""

import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from safetensors.torch import load_file, save_file

import gpt2_edge
from gpt2_edge import ModelFolderError, OptionError, QuantizationError
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.quantize import pipeline, quantize_folder, rounding
from gpt2_edge.quantize.blockwise import BlockwiseMatrix, pack, round_to_nearest
from gpt2_edge.quantize.gptq import gptq
from gpt2_edge.quantize.quality import measure_quality
from gpt2_edge.quantize.recipes import RECIPES, default_recipe, recipe_named
from gpt2_edge.quantize.rewrite import quantize_matrices
from gpt2_edge.seal import write_manifest

FloatArray = npt.NDArray[np.float32]

STORYTELLER: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"
# What the kernel's rounding of activations does to logits, relative to their spread; measured were 0.011 to 0.022.
LARGEST_ACTIVATION_ROUNDING: Final = 0.03
# Of the kernel's accuracy levels: with the first, activations are not rounded.
FLOAT32_PRODUCTS: Final = 1
INTEGER_PRODUCTS: Final = 4

# ---- rounding a matrix ----


def test_rounding_by_hand() -> None:
    """Two rows, two blocks of 4; the scale of a block is its largest magnitude divided by 127."""
    matrix = np.array(
        [
            [127, -127, 63.4, 0.6, 0, 0, 0, 0],  # scale 1; and a block of zeros
            [0.5, 1.5, -2.5, 254, 12.7, -0.04, 0.06, -6.35],  # scale 2; scale 0.1
        ],
        np.float32,
    )
    steps, scales = round_to_nearest(matrix, 4)
    np.testing.assert_allclose(scales, [[1, 0], [2, 0.1]], rtol=1e-6)
    np.testing.assert_array_equal(
        steps,
        [
            [127, -127, 63, 1, 0, 0, 0, 0],
            [0, 1, -1, 127, 127, 0, 1, -64],  # 0.25, 0.75, -1.25, 127; 127, -0.4, 0.6, -63.5
        ],
    )
    np.testing.assert_allclose(
        pack(steps, scales, 8, 4).dequantized(),
        [[127, -127, 63, 1, 0, 0, 0, 0], [0, 2, -2, 254, 12.7, 0, 0.1, -6.4]],
        rtol=1e-6,
    )


def test_rounding_a_row_that_ends_within_a_block() -> None:
    rounded = nearest(np.array([[1, 2, 3, 4, -5]], np.float32), 4)
    assert rounded.values.shape == (1, 2, 4)
    assert rounded.columns == 5
    assert rounded.values[0, 1].tolist() == [1, 128, 128, 128]  # what lies beyond the row is 0
    np.testing.assert_allclose(rounded.scales, [[4 / 127, 5 / 127]], rtol=1e-6)
    assert rounded.dequantized().shape == (1, 5)
    assert rounded.dequantized()[0, 4] == np.float32(-5)


def test_rounding_zeros_gives_zeros() -> None:
    rounded = nearest(np.zeros((3, 10), np.float32), 4)
    assert (rounded.values == 128).all()
    assert (rounded.scales == 0).all()
    assert (rounded.dequantized() == 0).all()


def nearest(matrix: FloatArray, block_size: int) -> BlockwiseMatrix:
    return pack(*round_to_nearest(matrix, block_size), 8, block_size)


def test_an_outlier_only_costs_its_own_block() -> None:
    matrix = np.tile(np.linspace(-1, 1, 64, dtype=np.float32), 2)[np.newaxis].copy()
    matrix[0, 10] = 1e6
    rounded = nearest(matrix, 64)
    assert rounded.dequantized()[0, 10] == pytest.approx(1e6)
    assert (rounded.dequantized()[0, :10] == 0).all()  # half a step is 3937
    np.testing.assert_allclose(rounded.dequantized()[0, 64:], matrix[0, 64:], rtol=0, atol=0.5 / 127)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    block_size=st.sampled_from([1, 16, 32, 64]),
    exponent=st.integers(-44, 38),
    seed=st.integers(0, 2**32 - 1),
)
def test_rounding_error_is_at_most_half_a_step(
    rows: int, columns: int, block_size: int, exponent: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    matrix = (random.uniform(-1, 1, (rows, columns)) * 10.0**exponent).astype(np.float32)
    rounded = nearest(matrix, block_size)
    assert rounded.values.min() >= 1  # -127
    error = np.abs(rounded.dequantized().astype(np.float64) - matrix)
    steps = np.repeat(rounded.scales, block_size, axis=1)[:, :columns].astype(np.float64)
    # Numbers that float32 itself holds with few digits only lose as many more.
    smallest = np.finfo(np.float32).smallest_subnormal
    assert (error <= steps * (0.5 + 1e-4) + 128 * smallest).all()


def test_rounding_is_as_close_as_onnxruntimes_own() -> None:
    """It takes steps of 1/128 of the largest magnitude where ours are 1/127, and lets scales be negative."""
    matrix = np.random.default_rng(0).normal(size=(256, 400)).astype(np.float32)
    settings = DefaultWeightOnlyQuantConfig(block_size=64, is_symmetric=True, bits=8)
    values, scales, _ = DefaultWeightOnlyQuantizer(settings).qbits_block_quant(np.ascontiguousarray(matrix.T))
    theirs = BlockwiseMatrix(values, scales.reshape(256, -1), 400)
    ours = nearest(matrix, 64)
    assert ours.values.shape == theirs.values.shape
    np.testing.assert_allclose(np.abs(theirs.scales) * 128, ours.scales * 127, rtol=1e-5)
    their_error, our_error = ((each.dequantized() - matrix).std() for each in (theirs, ours))
    assert our_error / their_error == pytest.approx(128 / 127, rel=0.01)


# ---- the kernel and the matrices ----


def multiply_in_onnxruntime(
    matrix: BlockwiseMatrix, x: FloatArray, bias: FloatArray, accuracy_level: int
) -> FloatArray:
    initializers = {"values": matrix.values, "scales": matrix.scales, "bias": bias}
    node = helper.make_node(
        "MatMulNBits",
        ["x", "values", "scales", "", "", "bias"],
        ["y"],
        domain="com.microsoft",
        K=matrix.columns,
        N=len(matrix.values),
        bits=matrix.bits,
        block_size=matrix.block_size,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "one matrix",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (len(x), len(matrix.values)))],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: FloatArray = session.run(None, {"x": x})[0]
    return result


def activation_rounding_bound(matrix: BlockwiseMatrix, x: FloatArray) -> npt.NDArray[np.float64]:
    """How far a product can be off when each block of x is rounded to 255 steps, shape [rows of x, outputs]."""
    starts = range(0, matrix.columns, matrix.block_size)
    half_steps = np.maximum.reduceat(np.abs(x), starts, axis=1).astype(np.float64) / 127 / 2
    magnitudes = np.add.reduceat(np.abs(matrix.dequantized()), starts, axis=1)
    bound: npt.NDArray[np.float64] = half_steps @ magnitudes.T
    return bound


def rounded(matrix: FloatArray, bits: int, block_size: int) -> BlockwiseMatrix:
    if bits == 8:
        return nearest(matrix, block_size)
    return pack(*gptq(matrix, np.eye(matrix.shape[1]), bits, block_size), bits, block_size)


@pytest.mark.parametrize(("bits", "block_size"), [(8, 32), (8, 64), (4, 32), (4, 128)])
@pytest.mark.parametrize("columns", [20, 64, 100, 192])
def test_kernel_multiplies_with_the_dequantized_matrix(columns: int, bits: int, block_size: int) -> None:
    random = np.random.default_rng(columns)
    matrix = rounded(random.normal(size=(24, columns)).astype(np.float32), bits, block_size)
    x = random.normal(size=(5, columns)).astype(np.float32)
    bias = random.normal(size=24).astype(np.float32)
    expected = x.astype(np.float64) @ matrix.dequantized().T + bias
    np.testing.assert_allclose(
        multiply_in_onnxruntime(matrix, x, bias, FLOAT32_PRODUCTS), expected, rtol=1e-5, atol=1e-4
    )
    difference = np.abs(multiply_in_onnxruntime(matrix, x, bias, INTEGER_PRODUCTS) - expected)
    assert (difference <= activation_rounding_bound(matrix, x) * 1.01 + 1e-4).all()


# ---- whole folders ----

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "width below a block": {"n_embd": 32, "n_head": 4},
    "width within a block, untied head": {"n_embd": 40, "n_head": 5, "tie_word_embeddings": False},
    "heads of 5": {"n_embd": 20, "n_head": 4, "n_inner": 70},
    "whole blocks": {"n_embd": 128, "n_head": 2, "n_layer": 1},
}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def fp32_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]
) -> Path:
    place = tmp_path_factory.mktemp("fp32")
    export_checkpoint(write_checkpoint(place / "checkpoint", **SHAPES[request.param]), place / "fp32")
    return place / "fp32"


@pytest.fixture(scope="module")
def tiny_fp32(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """The folder that tests damage copies of."""
    place = tmp_path_factory.mktemp("tiny")
    export_checkpoint(write_checkpoint(place / "checkpoint", n_layer=1, n_embd=16, n_head=2), place / "fp32")
    return place / "fp32"


def altered(
    folder: Path,
    new: Path,
    model: Callable[[onnx_ir.Model], object] = lambda model: None,
    manifest: Callable[[Manifest], Manifest] = lambda manifest: manifest,
) -> Path:
    """Write a copy of a model folder with another graph or manifest, its hashes being right."""
    opened = open_folder(folder)
    graph = onnx_ir.load(opened.graph_path)
    model(graph)
    new.mkdir()
    onnx_ir.save(graph, new / "model.onnx", external_data="model.onnx.data")
    shutil.copy(opened.tokenizer_path, new)
    write_manifest(new, manifest(replace(opened.manifest, graphs={"decoder": "model.onnx"})))
    return new


def set_weight(model: onnx_ir.Model, name: str, array: npt.NDArray[Any]) -> None:
    model.graph.initializers[name].const_value = onnx_ir.tensor(np.ascontiguousarray(array), name=name)


def weight(model: onnx_ir.Model, name: str) -> npt.NDArray[Any]:
    value = model.graph.initializers[name].const_value
    assert value is not None
    return value.numpy()


def nodes(model: onnx_ir.Model, operator: str) -> list[onnx_ir.Node]:
    return [node for node in model.graph if node.op_type == operator]


def matrices_of(folder: Path) -> dict[str, bool]:
    """Name each matrix of an fp32 graph, and say whether it is stored as [outputs, inputs]."""
    model = onnx_ir.load(folder / "model.onnx")
    names = {name_of(node.inputs[1]): False for node in nodes(model, "MatMul")}
    names |= {name_of(node.inputs[1]): True for node in nodes(model, "Gemm")}
    return names | {"wte.weight": True}


def name_of(value: onnx_ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


@dataclass
class Product:
    """A product of a quantized graph, as numbers: `x @ matrix.T + bias`."""

    matrix: FloatArray
    bias: FloatArray | None


def array_of(value: onnx_ir.Value | None) -> npt.NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def only_consumer(value: onnx_ir.Value) -> onnx_ir.Node:
    (node,) = value.consumers()
    return node


def is_product(node: onnx_ir.Node) -> bool:
    return node.op_type in ("MatMulNBits", "MatMulIntegerToFloat")


def products_of(folder: Path) -> list[Product]:
    """Read all products of a quantized graph, in its order."""
    products = []
    for node in onnx_ir.load(folder / "model.onnx").graph:
        if node.op_type == "MatMulNBits":
            columns, bits = (node.attributes[name].as_int() for name in ("K", "bits"))
            packed = BlockwiseMatrix(array_of(node.inputs[1]), array_of(node.inputs[2]), columns, bits)
            products.append(Product(packed.dequantized(), array_of(node.inputs[5]) if len(node.inputs) > 5 else None))
        elif node.op_type == "MatMulIntegerToFloat":
            steps, scales = array_of(node.inputs[1]), array_of(node.inputs[3])
            assert steps.dtype == np.int8
            addition = only_consumer(only_consumer(node.outputs[0]).outputs[0])
            products.append(Product((steps * scales).T.copy(), array_of(addition.inputs[1])))
    return products


def embedding_of(folder: Path) -> FloatArray:
    """Read the integers that tokens are looked up in, shape [vocabulary, width]."""
    model = onnx_ir.load(folder / "model.onnx")
    manifest = open_folder(folder).manifest
    assert manifest.recipe is not None
    return BlockwiseMatrix(
        weight(model, "wte.weight.quantized"),
        weight(model, "wte.weight.scales"),
        manifest.architecture.width,
        manifest.recipe["head"]["bits"],
    ).dequantized()


def with_numbers_of(quantized: Path, folder: Path, new: Path) -> Path:
    """Write an fp32 graph over again with the numbers of a quantized one: what that should compute."""

    def substitute(model: onnx_ir.Model) -> None:
        def number(name: str, array: npt.NDArray[Any]) -> onnx_ir.Value:
            value = onnx_ir.val(name, const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=name))
            model.graph.register_initializer(value)
            return value

        theirs = onnx_ir.load(quantized / "model.onnx")
        ours = [node for node in model.graph if node.op_type in ("MatMul", "Gemm")]
        for index, (node, product) in enumerate(zip(ours, products_of(quantized), strict=True)):
            if node.op_type == "Gemm":
                node.replace_input_with(1, number(f"matrix.{index}", product.matrix))
                if product.bias is not None:
                    bias = number(f"bias.{index}", product.bias)
                    node.resize_inputs(3)
                    node.replace_input_with(2, bias)
                continue
            node.replace_input_with(1, number(f"matrix.{index}", product.matrix.T))
            addition = only_consumer(node.outputs[0])
            assert product.bias is not None
            place = 1 - addition.inputs.index(node.outputs[0])
            addition.replace_input_with(place, number(f"bias.{index}", product.bias))
        set_weight(model, "wte.weight", embedding_of(quantized))
        normalizations = (nodes(each, "LayerNormalization") for each in (model, theirs))
        for index, (our, their) in enumerate(zip(*normalizations, strict=True)):
            for place in (1, 2):
                our.replace_input_with(place, number(f"normalization.{index}.{place}", array_of(their.inputs[place])))

    return altered(folder, new, substitute)


def with_exact_activations(folder: Path, new: Path) -> Path:
    """Write a quantized folder over again without the rounding of what the weights are multiplied with."""

    def change(model: onnx_ir.Model) -> None:
        for node in nodes(model, "MatMulNBits"):
            node.attributes["accuracy_level"] = onnx_ir.AttrInt64("accuracy_level", FLOAT32_PRODUCTS)
        for index, node in enumerate(nodes(model, "MatMulIntegerToFloat")):
            assert node.inputs[0] is not None
            quantization = node.inputs[0].producer()
            assert quantization is not None
            matrix = (array_of(node.inputs[1]) * array_of(node.inputs[3])).astype(np.float32)
            value = onnx_ir.val(f"exact.{index}", const_value=onnx_ir.tensor(matrix, name=f"exact.{index}"))
            model.graph.register_initializer(value)
            product = onnx_ir.node("MatMul", [quantization.inputs[0], value])
            model.graph.insert_before(node, product)
            scaling = only_consumer(node.outputs[0])
            only_consumer(scaling.outputs[0]).replace_input_with(0, product.outputs[0])

    return altered(folder, new, change)


def logits(folder: Path, tokens: list[int]) -> FloatArray:
    with gpt2_edge.load(folder, threads=1) as model:
        return model.logits(tokens)


def random_tokens(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, 8192, count).tolist()


def check_graph(fp32: Path, quantized: Path, place: Path, tokens: list[int]) -> None:
    """Compare a quantized graph with the fp32 graph that has the same numbers."""
    expected = logits(with_numbers_of(quantized, fp32, place / "dequantized"), tokens)
    np.testing.assert_allclose(logits(with_exact_activations(quantized, place / "exact"), tokens), expected, atol=1e-4)
    rounding = logits(quantized, tokens) - expected
    assert rounding.std() < LARGEST_ACTIVATION_ROUNDING * expected.std()
    # The comparison would notice matrices that were not rounded at all.
    assert np.abs(logits(fp32, tokens) - expected).max() > 1e-3


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.prompt is None])
def test_graph_computes_with_the_rounded_matrices(recipe: str, fp32_folder: Path, tmp_path: Path) -> None:
    manifest = pipeline.quantize_folder(fp32_folder, tmp_path / "quantized", RECIPES[recipe])
    assert manifest == open_folder(tmp_path / "quantized").manifest
    check_graph(fp32_folder, tmp_path / "quantized", tmp_path, random_tokens(32))


@pytest.mark.parametrize("recipe", ["int8", "int8-block64"])
def test_without_a_calibration_text_matrices_are_rounded_to_the_nearest_and_the_rest_stays(
    recipe: str, fp32_folder: Path, tmp_path: Path
) -> None:
    pipeline.quantize_folder(fp32_folder, tmp_path / "quantized", replace(RECIPES[recipe], centred=False))
    before = onnx_ir.load(fp32_folder / "model.onnx")
    after = onnx_ir.load(tmp_path / "quantized" / "model.onnx")
    ours = [node for node in before.graph if node.op_type in ("MatMul", "Gemm")]
    for node, product in zip(ours, products_of(tmp_path / "quantized"), strict=True):
        matrix = array_of(node.inputs[1])
        if node.op_type == "Gemm":
            assert product.bias is None
            np.testing.assert_array_equal(product.matrix, nearest(matrix, 64).dequantized())
            continue
        addition = only_consumer(node.outputs[0])
        np.testing.assert_array_equal(
            product.bias, array_of(addition.inputs[1 - addition.inputs.index(node.outputs[0])])
        )
        block_size = len(matrix) if recipe == "int8" else 64
        expected = nearest(np.ascontiguousarray(matrix.T), block_size).dequantized()
        np.testing.assert_array_equal(product.matrix, expected)
    for name, value in before.graph.initializers.items():
        if name not in matrices_of(fp32_folder) and name in after.graph.initializers:
            np.testing.assert_array_equal(array_of(value), weight(after, name))
    for our, their in zip(nodes(before, "LayerNormalization"), nodes(after, "LayerNormalization"), strict=True):
        assert [name_of(value) for value in our.inputs[1:]] == [name_of(value) for value in their.inputs[1:]]


def test_storyteller_computes_with_its_integers(storyteller_fp32: Path, storyteller_int8: Path, tmp_path: Path) -> None:
    check_graph(storyteller_fp32, storyteller_int8, tmp_path, storyteller_tokens(200))


@pytest.fixture(scope="module")
def storyteller_int4(storyteller_fp32: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storyteller at INT4, calibrated on a part of its calibration text."""
    place = tmp_path_factory.mktemp("int4")
    text = (STORYTELLER / "calibration.txt").read_text(encoding="utf-8")
    (place / "calibration.txt").write_text(text[:60_000], encoding="utf-8")
    folder = place / "storyteller-int4"
    pipeline.quantize_folder(storyteller_fp32, folder, default_recipe("int4"), calibration=place / "calibration.txt")
    return folder


def test_int4_storyteller_is_close_to_full_precision(storyteller_int4: Path) -> None:
    """Rounded to the nearest it would be 0.07 nats away."""
    manifest = open_folder(storyteller_int4).manifest
    assert manifest.precision == "int4"
    assert manifest.recipe is not None
    assert manifest.recipe["calibration"] == "calibration.txt"
    assert manifest.recipe["quantized_matrices"] == 25
    quality = manifest.measured["quality"]
    assert quality["mean_kl_divergence"] < 0.015
    assert quality["same_top_percent"] > 91
    assert (storyteller_int4 / "model.onnx.data").stat().st_size < 5_820_000


def test_int4_storyteller_computes_with_its_integers(
    storyteller_fp32: Path, storyteller_int4: Path, tmp_path: Path
) -> None:
    check_graph(storyteller_fp32, storyteller_int4, tmp_path, storyteller_tokens(200))


def storyteller_tokens(count: int) -> list[int]:
    from tokenizers import Tokenizer

    text = (STORYTELLER / "held_out.txt").read_text(encoding="utf-8")[: 10 * count]
    return Tokenizer.from_file(str(STORYTELLER / "tokenizer.json")).encode(text).ids[:count]


def test_int8_storyteller_is_close_to_full_precision(fp32_model: gpt2_edge.Model, int8_model: gpt2_edge.Model) -> None:
    tokens = storyteller_tokens(400)
    quality = measure_quality(fp32_model, int8_model, [tokens])
    assert quality.mean_kl_divergence < 0.0018
    assert quality.same_top_percent > 95.5
    losses = [-sum(model.score(tokens).logprobs) / 399 for model in (fp32_model, int8_model)]
    assert abs(losses[1] - losses[0]) < 0.01


@pytest.mark.parametrize("recipe", ["int8", "int8-block64"])
def test_every_matrix_is_quantized_and_nothing_else(recipe: str, fp32_folder: Path, tmp_path: Path) -> None:
    pipeline.quantize_folder(fp32_folder, tmp_path / "int8", RECIPES[recipe])
    manifest = open_folder(tmp_path / "int8").manifest
    before = onnx_ir.load(fp32_folder / "model.onnx")
    after = onnx_ir.load(tmp_path / "int8" / "model.onnx")
    matrices = matrices_of(fp32_folder)
    layers, tied = manifest.architecture.layers, manifest.architecture.tied_head
    assert len(matrices) == 4 * layers + (1 if tied else 2)
    assert manifest.recipe is not None
    assert manifest.recipe["quantized_matrices"] == len(matrices)
    blockwise = nodes(after, "MatMulNBits")
    assert len([node for node in after.graph if is_product(node)]) == 4 * layers + 1
    assert len(blockwise) == (1 if recipe == "int8" else 4 * layers + 1)
    # Others dequantize all weights in every run, which is several times slower.
    assert {node.attributes["accuracy_level"].as_int() for node in blockwise} == {INTEGER_PRODUCTS}
    assert nodes(after, "MatMul") == nodes(after, "Gemm") == []
    # What is left of float32 has a row a token or an output, never a matrix of weights.
    large = {name for name, value in after.graph.initializers.items() if array_of(value).dtype == np.float32}
    shapes = {name: array_of(after.graph.initializers[name]).shape for name in large}
    assert {name for name, shape in shapes.items() if len(shape) > 1 and not name.endswith(".scales")} == {"wpe.weight"}
    np.testing.assert_array_equal(weight(after, "wpe.weight"), weight(before, "wpe.weight"))
    assert {name.removesuffix(".quantized") for name in after.graph.initializers if name.endswith(".quantized")} == set(
        matrices
    )


def test_embedding_is_the_same_rows_as_the_head(fp32_folder: Path, tmp_path: Path) -> None:
    quantize_folder(fp32_folder, tmp_path / "int8")
    check_embedding(fp32_folder, tmp_path / "int8")
    original = weight(onnx_ir.load(fp32_folder / "model.onnx"), "wte.weight")
    np.testing.assert_array_equal(embedding_of(tmp_path / "int8"), nearest(original, 64).dequantized())


def test_4_bit_embedding_is_the_same_rows_as_the_head(fp32_folder: Path, tmp_path: Path) -> None:
    pipeline.quantize_folder(fp32_folder, tmp_path / "int4", RECIPES["int4-small"])
    check_embedding(fp32_folder, tmp_path / "int4")
    original = weight(onnx_ir.load(fp32_folder / "model.onnx"), "wte.weight")
    assert np.corrcoef(original.ravel(), embedding_of(tmp_path / "int4").ravel())[0, 1] > 0.99


def check_embedding(fp32: Path, quantized: Path) -> None:
    tokens = [0, 1, 4095, 8191, 1]
    np.testing.assert_array_equal(looked_up_rows(quantized, tokens), embedding_of(quantized)[tokens])
    model = onnx_ir.load(quantized / "model.onnx")
    (head,) = [node for node in nodes(model, "MatMulNBits") if node.outputs[0].name == "logits"]
    tied = open_folder(fp32).manifest.architecture.tied_head
    assert name_of(head.inputs[1]) == ("wte.weight.quantized" if tied else "lm_head.weight.quantized")


def looked_up_rows(folder: Path, tokens: list[int]) -> FloatArray:
    """Return what is added to the position embeddings, shape [tokens, width]."""
    model = onnx.load(folder / "model.onnx")
    (positions,) = [node.output[0] for node in model.graph.node if "wpe.weight" in node.input]
    (add,) = [node for node in model.graph.node if node.op_type == "Add" and positions in node.input]
    (embedding,) = [name for name in add.input if name != positions]
    inputs = [value for value in model.graph.input if value.name == "input_ids"]
    extractor = onnx.utils.Extractor(model)
    extracted = extractor.extract_model([value.name for value in inputs], [embedding])
    session = onnxruntime.InferenceSession(extracted.SerializeToString(), providers=["CPUExecutionProvider"])
    rows: FloatArray = session.run(None, {"input_ids": np.array([tokens], np.int64)})[0][0]
    return rows


def test_folder_is_as_small_as_its_recipe_says(fp32_folder: Path, tmp_path: Path) -> None:
    for recipe in RECIPES.values():
        pipeline.quantize_folder(fp32_folder, tmp_path / recipe.name, recipe)
        before = onnx_ir.load(fp32_folder / "model.onnx").graph.initializers
        after = onnx_ir.load(tmp_path / recipe.name / "model.onnx").graph.initializers
        expected = sum(value.const_value.nbytes for value in before.values() if value.const_value is not None)
        for name, outputs_first in matrices_of(fp32_folder).items():
            inputs, outputs = weight(onnx_ir.load(fp32_folder / "model.onnx"), name).shape
            if outputs_first:
                inputs, outputs = outputs, inputs
            stored = recipe.linear if name.startswith("h.") else recipe.head
            block_size = stored.block_size or inputs
            blocks = math.ceil(inputs / block_size)
            expected += outputs * (blocks * (block_size * stored.bits // 8 + 4)) - 4 * inputs * outputs
            if recipe.prompt is not None and name.startswith("h."):
                expected += outputs * (inputs + 4 + 4)  # integers, scales, and a bias of their own
        head_bias = 4 * open_folder(fp32_folder).manifest.architecture.vocabulary_size
        found = sum(value.const_value.nbytes for value in after.values() if value.const_value is not None)
        # A few shapes and bounds; parameters that were equal before they were centred; with a 4-bit embedding also a
        # table of the two numbers in a byte.
        more = found - expected - head_bias
        assert 0 <= more < (2000 if recipe.head.bits == 8 else 2000 + 256 * 2 * 4), recipe.name


def test_rows_of_a_ragged_batch_are_the_same_as_alone(int8_model: gpt2_edge.Model) -> None:
    """Token for token; prompts of 1 to 300 tokens."""
    long = storyteller_tokens(300)
    prompts = [long[:7], long[:1], long, long[40:50], long[:123]]
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 11}):
        together = int8_model.generate(prompts, max_new_tokens=40, ignore_eos=True, **options)
        for prompt, row in zip(prompts, together, strict=True):
            seed = {"seed": row.seed} if "seed" in options else {}
            alone = int8_model.generate(prompt, max_new_tokens=40, ignore_eos=True, **(options | seed))
            assert alone.tokens == row.tokens


def test_rows_of_an_int4_batch_are_the_same_as_alone(storyteller_int4: Path) -> None:
    prompts = ["Once upon a time", "The", "A little fox went to the market and", "It was a dark night. Nobody", "Why?"]
    with gpt2_edge.load(storyteller_int4) as model:
        together = model.generate(prompts, max_new_tokens=40, ignore_eos=True)
        for prompt, row in zip(prompts, together, strict=True):
            assert model.generate(prompt, max_new_tokens=40, ignore_eos=True).tokens == row.tokens


@pytest.mark.parametrize(("bits", "block_size"), [(4, 32), (8, 32), (8, 64)])
@pytest.mark.parametrize(("columns", "rows"), [(256, 768), (1024, 256), (768, 3072)])
def test_products_of_a_batch_have_the_same_bits_as_alone(columns: int, rows: int, bits: int, block_size: int) -> None:
    random = np.random.default_rng(rows)
    matrix = rounded(random.normal(size=(rows, columns)).astype(np.float32), bits, block_size)
    x = random.normal(size=(9, columns)).astype(np.float32)
    bias = random.normal(size=rows).astype(np.float32)
    together = multiply_in_onnxruntime(matrix, x, bias, INTEGER_PRODUCTS)
    for row in range(len(x)):
        alone = multiply_in_onnxruntime(matrix, x[row : row + 1], bias, INTEGER_PRODUCTS)
        np.testing.assert_array_equal(alone[0], together[row])


def test_manifest_of_a_quantized_folder(storyteller_fp32: Path, storyteller_int8: Path) -> None:
    before, after = open_folder(storyteller_fp32).manifest, open_folder(storyteller_int8).manifest
    open_folder(storyteller_int8).check_hashes()
    assert (after.precision, after.architecture, after.end_of_text) == ("int8", before.architecture, before.end_of_text)
    assert after.source == before.source
    assert after.tools == before.tools
    assert after.recipe is not None
    assert after.recipe["name"] == "int8"
    assert after.recipe["linear"] == {"bits": 8, "block_size": None, "rounding": "nearest"}
    assert after.recipe["head"] == {"bits": 8, "block_size": 64, "rounding": "nearest"}
    assert after.recipe["centred"] is True
    assert after.recipe["calibration"] == "calibration.txt"
    assert after.recipe["quantized_matrices"] == 25
    measured = after.measured["quality"]
    assert "held-out text" in measured["text"]
    assert (measured["windows"], measured["tokens"]) == (12, 12 * 511)
    assert 0 < measured["median_kl_divergence"] < measured["mean_kl_divergence"] < measured["kl_divergence_99"]
    assert measured["mean_kl_divergence"] < 0.0017
    assert 95 < measured["same_top_percent"] <= 100
    assert (storyteller_int8 / "tokenizer.json").read_bytes() == (storyteller_fp32 / "tokenizer.json").read_bytes()


def test_quantizing_twice_gives_the_same_bytes(tiny_fp32: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        quantize_folder(tiny_fp32, tmp_path / name)
    for file in sorted(path.name for path in (tmp_path / "first").iterdir()):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


# ---- refusals ----


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def refused(source: str | Path, outputs: Path, kind: type[Exception] = QuantizationError) -> str:
    """Quantize what must be refused; check that nothing is left, and return the message."""
    with pytest.raises(kind) as refusal:
        quantize_folder(source, outputs / "int8")
    assert list(outputs.iterdir()) == []
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight"])
def test_weight_that_is_not_finite(name: str, number: float, tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    def damage(model: onnx_ir.Model) -> None:
        array = weight(model, name).copy()
        array[2, 3] = number
        set_weight(model, name, array)

    message = refused(altered(tiny_fp32, tmp_path / "source", damage), outputs)
    assert f"{name} holds NaN or infinity" in message


def hide_matrix(model: onnx_ir.Model) -> None:
    """Let a matrix reach its product by way of another operator."""
    node = nodes(model, "MatMul")[2]
    copy = onnx_ir.node("Identity", [node.inputs[1]])
    model.graph.insert_before(node, copy)
    node.replace_input_with(1, copy.outputs[0])


def hide_embedding(model: onnx_ir.Model) -> None:
    """Let the lookup of the embedding look like another one."""
    (node,) = [node for node in nodes(model, "Gather") if name_of(node.inputs[0]) == "wte.weight"]
    copy = onnx_ir.node("Identity", [node.inputs[1]])
    model.graph.insert_before(node, copy)
    node.replace_input_with(1, copy.outputs[0])


def copy_head(model: onnx_ir.Model) -> None:
    (head,) = nodes(model, "Gemm")
    copy = onnx_ir.val("copy", const_value=onnx_ir.tensor(weight(model, "wte.weight"), name="copy"))
    model.graph.register_initializer(copy)
    head.replace_input_with(1, copy)


def subtract_bias(model: onnx_ir.Model) -> None:
    nodes(model, "MatMul")[0].outputs[0].consumers()[0].op_type = "Sub"


def scale_bias(model: onnx_ir.Model) -> None:
    add = nodes(model, "MatMul")[0].outputs[0].consumers()[0]
    copy = onnx_ir.node("Identity", [add.inputs[1]])
    model.graph.insert_before(add, copy)
    add.replace_input_with(1, copy.outputs[0])


def transpose_head(model: onnx_ir.Model) -> None:
    (head,) = nodes(model, "Gemm")
    head.attributes["transB"] = onnx_ir.AttrInt64("transB", 0)


ODD_GRAPHS: Final[dict[str, tuple[Callable[[onnx_ir.Model], None], str]]] = {
    "hidden matrix": (hide_matrix, "4 matrices were quantized in 5 places, where the model has 5 in 6"),
    "bias of another kind": (subtract_bias, "h.0.attn.c_attn.weight is not followed by its bias"),
    "bias that is computed": (scale_bias, "bias of h.0.attn.c_attn.weight is not a weight"),
}


@pytest.mark.parametrize("case", ODD_GRAPHS)
def test_graph_of_another_form(case: str, tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    change, said = ODD_GRAPHS[case]
    message = refused(altered(tiny_fp32, tmp_path / "source", change), outputs)
    assert said in message
    assert "export" in message


def test_head_the_other_way_round(tiny_fp32: Path) -> None:
    model = onnx_ir.load(tiny_fp32 / "model.onnx")
    transpose_head(model)
    with pytest.raises(QuantizationError, match=r"head wte\.weight is not of the expected form: export"):
        quantize_matrices(model, default_recipe("int8"), None)


def test_graph_of_an_older_release(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    """It has [batch, sequence, width] where it now has [batch x sequence, width]."""
    message = refused(altered(tiny_fp32, tmp_path / "source", three_dimensions), outputs)
    assert "the graph was made by an older release (h.0.attn.c_attn.weight)" in message
    assert "export the model again" in message
    # The other recipes do not mind.
    pipeline.quantize_folder(tmp_path / "source", outputs / "int8", RECIPES["int8-block64"])


def three_dimensions(model: onnx_ir.Model) -> None:
    """Give each product [1, rows, width], which computes the same."""
    axis = onnx_ir.val("axis", const_value=onnx_ir.tensor(np.array([0], np.int64), name="axis"))
    model.graph.register_initializer(axis)
    for node in nodes(model, "MatMul"):
        x, addition = node.inputs[0], only_consumer(node.outputs[0])
        assert x is not None
        assert x.shape is not None
        wide = onnx_ir.node("Unsqueeze", [x, axis])
        wide.outputs[0].shape = onnx_ir.Shape([1, *x.shape])
        wide.outputs[0].type = x.type
        model.graph.insert_before(node, wide)
        node.replace_input_with(0, wide.outputs[0])
        for output in (node.outputs[0], addition.outputs[0]):
            output.shape = None
        flat = onnx_ir.node("Squeeze", [addition.outputs[0], axis])
        model.graph.insert_after(addition, flat)
        for consumer in addition.outputs[0].consumers():
            if consumer is not flat:
                for index, value in enumerate(consumer.inputs):
                    if value is addition.outputs[0]:
                        consumer.replace_input_with(index, flat.outputs[0])


def test_manifest_of_another_graph(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    def one_layer_more(manifest: Manifest) -> Manifest:
        return replace(manifest, architecture=replace(manifest.architecture, layers=2))

    message = refused(altered(tiny_fp32, tmp_path / "source", manifest=one_layer_more), outputs, ModelFolderError)
    assert "is not the graph that the manifest describes" in message


def test_lookup_that_stays_in_float32_is_noticed(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    """A tied embedding that only the head was quantized of would be stored twice."""
    message = refused(altered(tiny_fp32, tmp_path / "source", hide_embedding), outputs)
    assert "5 matrices were quantized in 5 places, where the model has 5 in 6" in message


def test_tied_head_with_a_matrix_of_its_own_is_noticed(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    message = refused(altered(tiny_fp32, tmp_path / "source", copy_head), outputs)
    assert "6 matrices were quantized in 6 places, where the model has 5 in 6" in message


def test_equal_matrices_that_the_tracer_made_one(
    tmp_path: Path, make_checkpoint: Callable[..., Path], outputs: Path
) -> None:
    checkpoint = make_checkpoint(n_layer=2, n_embd=16, n_head=2)
    weights = load_file(checkpoint / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].clone()
    save_file(weights, checkpoint / "model.safetensors")
    export_checkpoint(checkpoint, tmp_path / "fp32")
    manifest = pipeline.quantize_folder(tmp_path / "fp32", outputs / "int8", default_recipe("int8"))
    assert manifest.recipe is not None
    assert manifest.recipe["quantized_matrices"] == 8
    check_graph(tmp_path / "fp32", outputs / "int8", tmp_path, random_tokens(32))


def test_source_that_is_quantized_already(storyteller_int8: Path, outputs: Path) -> None:
    assert "is int8: give the fp32 folder" in refused(storyteller_int8, outputs)


def test_the_bundled_model_is_found_by_its_name_and_quantized_already(outputs: Path) -> None:
    said = refused("storyteller", outputs)
    assert said.startswith("storyteller is the bundled model, which is int8 already: export its checkpoint, models/st")
    # A path is a path.
    assert "storyteller does not exist" in refused(Path("storyteller"), outputs, ModelFolderError)


def test_source_that_is_no_model_folder(outputs: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere", outputs, ModelFolderError)
    assert "is a checkpoint, not a model folder" in refused(STORYTELLER, outputs, ModelFolderError)


def test_source_that_is_damaged(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_fp32, tmp_path / "source")
    content = bytearray((source / "model.onnx.data").read_bytes())
    content[1000] ^= 1
    (source / "model.onnx.data").write_bytes(content)
    assert "model.onnx.data is damaged" in refused(source, outputs, ModelFolderError)


def test_output_that_exists(tiny_fp32: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "open_folder", lambda source: pytest.fail("the source was read"))
    for taken in (outputs, tiny_fp32):
        (outputs / "mine").write_text("mine")
        with pytest.raises(ModelFolderError, match="already exists"):
            quantize_folder(tiny_fp32, taken)
    assert [path.name for path in outputs.iterdir()] == ["mine"]


def test_output_that_is_an_empty_folder(tiny_fp32: Path, outputs: Path) -> None:
    quantize_folder(tiny_fp32, outputs)
    open_folder(outputs).check_hashes()
    assert [path.name for path in outputs.parent.iterdir()] == ["outputs"]


def test_full_disk(tiny_fp32: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half of the graph")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(pipeline.onnx_ir, "save", save)
    assert "No space left on device: free some space" in refused(tiny_fp32, outputs, ModelFolderError)


@pytest.mark.parametrize(
    ("factor", "said"), [(30.0, "nats a token away from full precision"), (np.nan, "numbers that are not finite")]
)
def test_rounding_that_loses_the_model(
    factor: float, said: str, tiny_fp32: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(matrix: FloatArray, block_size: int, bits: int) -> tuple[npt.NDArray[np.int8], FloatArray]:
        steps, scales = round_to_nearest(matrix, block_size, bits)
        return steps, scales * np.float32(factor)

    monkeypatch.setattr(rounding, "round_to_nearest", wrong)
    assert said in refused(tiny_fp32, outputs)


def test_precisions_and_recipes_by_name() -> None:
    assert default_recipe("int8").name == "int8"
    assert default_recipe("int4").name == "int4"
    assert recipe_named("int8-block64", "int8").linear.block_size == 64
    with pytest.raises(OptionError, match=r"'int3'.*int8"):
        default_recipe("int3")
    with pytest.raises(OptionError, match=r"'int8-block128': for int8 give int8 or int8-block64 or int8-block32"):
        recipe_named("int8-block128", "int8")
    with pytest.raises(OptionError, match=r"'int8-block64': for int4 give int4 or int4-small"):
        recipe_named("int8-block64", "int4")


def test_recipe_is_recorded_as_data(tiny_fp32: Path, tmp_path: Path) -> None:
    quantize_folder(tiny_fp32, tmp_path / "int8")
    recorded = json.loads((tmp_path / "int8" / "manifest.json").read_text())["recipe"]
    recipe = RECIPES[recorded["name"]]
    assert asdict(recipe.linear) == recorded["linear"]
    assert asdict(recipe.head) == recorded["head"]
    assert recorded["calibration"] == "a text that the model wrote itself"
