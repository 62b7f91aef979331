"""What tests of quantization read out of graphs, and graphs that they write to compare with."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir
import onnxruntime

import gpt2_edge
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.quantize.blockwise import BlockwiseMatrix
from gpt2_edge.quantize.recipes import RECIPES
from gpt2_edge.seal import write_manifest

FloatArray = npt.NDArray[np.float32]

STORYTELLER: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"
# What the kernel's rounding of activations does to logits, relative to their spread; measured were 0.011 to 0.022.
LARGEST_ACTIVATION_ROUNDING: Final = 0.03
# The same where the calibration text decides, which random tokens are far from; measured were 0.014 to 0.044.
LARGEST_FIXED_ROUNDING: Final = 0.06
# Of the kernel's accuracy levels: with the first, activations are not rounded.
FLOAT32_PRODUCTS: Final = 1
INTEGER_PRODUCTS: Final = 4


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


def integers_of(product: onnx_ir.Node) -> npt.NDArray[Any]:
    """Return the matrix of a product, shape [inputs, outputs]; that of a tied head is stored the other way round."""
    value = product.inputs[1]
    assert value is not None
    transposition = value.producer()
    return array_of(value) if transposition is None else array_of(transposition.inputs[0]).T


def has_own_bias(node: onnx_ir.Node) -> bool:
    """Tell whether a product of integers adds the bias itself: with one rounding of all rows."""
    return len(node.inputs) > 6


def scaling_of(node: onnx_ir.Node) -> onnx_ir.Node:
    """Return what multiplies each row of a product with its scale."""
    return only_consumer(node.outputs[0])


def scales_of(value: onnx_ir.Value | None) -> FloatArray:
    """Return the scales of a product, which may be stored as float16."""
    assert value is not None
    cast = value.producer()
    return array_of(value) if cast is None else array_of(cast.inputs[0]).astype(np.float32)


def is_second_part(node: onnx_ir.Node) -> bool:
    """Tell whether a product gives the outputs that come behind those of another."""
    consumers = node.outputs[0].consumers()
    return [each.op_type for each in consumers] == ["Concat"] and consumers[0].inputs[1] is node.outputs[0]


def joined(first: Product, second: Product) -> Product:
    assert first.bias is not None
    assert second.bias is not None
    return Product(np.concatenate([first.matrix, second.matrix]), np.concatenate([first.bias, second.bias]))


def products_of(folder: Path) -> list[Product]:
    """Read all products of a quantized graph, in its order."""
    products = []
    for node in onnx_ir.load(folder / "model.onnx").graph:
        if node.op_type == "MatMulNBits":
            columns, bits = (node.attributes[name].as_int() for name in ("K", "bits"))
            packed = BlockwiseMatrix(array_of(node.inputs[1]), scales_of(node.inputs[2]), columns, bits)
            product = Product(packed.dequantized(), array_of(node.inputs[5]) if len(node.inputs) > 5 else None)
            if is_second_part(node):
                product = joined(products.pop(), product)
            products.append(product)
        elif node.op_type == "MatMulIntegerToFloat":
            steps, scales = integers_of(node), array_of(node.inputs[3])
            assert steps.dtype == np.int8
            bias = node.inputs[6] if has_own_bias(node) else only_consumer(scaling_of(node).outputs[0]).inputs[1]
            products.append(Product((steps * scales).T.copy(), array_of(bias)))
    return products


def embedding_of(folder: Path) -> FloatArray:
    """Read the integers that tokens are looked up in, shape [vocabulary, width]."""
    initializers = onnx_ir.load(folder / "model.onnx").graph.initializers
    manifest = open_folder(folder).manifest
    assert manifest.recipe is not None
    recipe = RECIPES[manifest.recipe["name"]]
    if recipe.head.block_size is None:
        rows = (
            array_of(initializers["wte.weight.quantized"]) * array_of(initializers["wte.weight.scales"])[:, np.newaxis]
        )
        factors = initializers.get("wte.weight.column_factors")
        return rows.astype(np.float32) if factors is None else (rows * array_of(factors)).astype(np.float32)
    formats = recipe.head_formats(manifest.architecture.vocabulary_size)
    names = [f"wte.weight.{index}" for index in range(len(formats))] if len(formats) > 1 else ["wte.weight"]
    parts = [
        BlockwiseMatrix(
            array_of(initializers[f"{name}.quantized"]),
            array_of(initializers[f"{name}.scales"]).astype(np.float32),
            manifest.architecture.width,
            matrix_format.bits,
        ).dequantized()
        for name, (_, matrix_format) in zip(names, formats, strict=True)
    ]
    assert [len(part) for part in parts] == [rows for rows, _ in formats]
    return np.concatenate(parts)


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
        if "wpe.weight.half" in theirs.graph.initializers:
            set_weight(model, "wpe.weight", weight(theirs, "wpe.weight.half").astype(np.float32))
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
            matrix = (integers_of(node) * array_of(node.inputs[3])).astype(np.float32)
            value = onnx_ir.val(f"exact.{index}", const_value=onnx_ir.tensor(matrix, name=f"exact.{index}"))
            model.graph.register_initializer(value)
            product = onnx_ir.node("MatMul", [quantization.inputs[0], value])
            model.graph.insert_before(node, product)
            if has_own_bias(node):
                addition = onnx_ir.node("Add", [product.outputs[0], node.inputs[6]])
                model.graph.insert_before(node, addition)
                onnx_ir.convenience.replace_all_uses_with(node.outputs[0], addition.outputs[0])
            else:
                only_consumer(scaling_of(node).outputs[0]).replace_input_with(0, product.outputs[0])

    return altered(folder, new, change)


def logits(folder: Path, tokens: list[int]) -> FloatArray:
    with gpt2_edge.load(folder, threads=1) as model:
        return model.logits(tokens)


def random_tokens(count: int) -> list[int]:
    return np.random.default_rng(count).integers(0, 8192, count).tolist()


def check_graph(
    fp32: Path, quantized: Path, place: Path, tokens: list[int], largest_rounding: float = LARGEST_ACTIVATION_ROUNDING
) -> None:
    """Compare a quantized graph with the fp32 graph that has the same numbers."""
    expected = logits(with_numbers_of(quantized, fp32, place / "dequantized"), tokens)
    np.testing.assert_allclose(logits(with_exact_activations(quantized, place / "exact"), tokens), expected, atol=1e-4)
    rounding = logits(quantized, tokens) - expected
    assert rounding.std() < largest_rounding * expected.std()
    # The comparison would notice matrices that were not rounded at all.
    assert np.abs(logits(fp32, tokens) - expected).max() > 1e-3


def storyteller_tokens(count: int) -> list[int]:
    from tokenizers import Tokenizer

    text = (STORYTELLER / "held_out.txt").read_text(encoding="utf-8")[: 10 * count]
    return Tokenizer.from_file(str(STORYTELLER / "tokenizer.json")).encode(text).ids[:count]


def looked_up_rows(folder: Path, tokens: list[int]) -> FloatArray:
    """Return what is added to the position embeddings, shape [tokens, width]."""
    model = onnx.load(folder / "model.onnx")
    rows_of_positions = {
        output
        for node in model.graph.node
        if node.op_type in ("Gather", "Cast") and {"wpe.weight", "wpe.weight.half"} & set(node.input)
        for output in node.output
    }
    casts = [node for node in model.graph.node if rows_of_positions & set(node.input) and node.op_type == "Cast"]
    positions = casts[0].output[0] if casts else next(iter(rows_of_positions))
    (add,) = [node for node in model.graph.node if node.op_type == "Add" and positions in node.input]
    (embedding,) = [name for name in add.input if name != positions]
    inputs = [value for value in model.graph.input if value.name == "input_ids"]
    extractor = onnx.utils.Extractor(model)
    extracted = extractor.extract_model([value.name for value in inputs], [embedding])
    session = onnxruntime.InferenceSession(extracted.SerializeToString(), providers=["CPUExecutionProvider"])
    rows: FloatArray = session.run(None, {"input_ids": np.array([tokens], np.int64)})[0][0]
    return rows
