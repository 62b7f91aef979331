"""Quantized folders compute with the integers they were rounded to, and hold nothing else."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir
import pytest
from quantized_graphs import (
    INTEGER_PRODUCTS,
    LARGEST_ACTIVATION_ROUNDING,
    LARGEST_FIXED_ROUNDING,
    STORYTELLER,
    array_of,
    check_graph,
    embedding_of,
    is_product,
    looked_up_rows,
    matrices_of,
    name_of,
    nodes,
    random_tokens,
    storyteller_tokens,
    weight,
)
from safetensors.torch import load_file, save_file

import gpt2_edge
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.quantize import pipeline, quantize_folder
from gpt2_edge.quantize.blockwise import pack, round_to_nearest
from gpt2_edge.quantize.quality import measure_quality
from gpt2_edge.quantize.recipes import RECIPES, default_recipe

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


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.prompt is None])
def test_graph_computes_with_the_rounded_matrices(recipe: str, fp32_folder: Path, tmp_path: Path) -> None:
    manifest = pipeline.quantize_folder(fp32_folder, tmp_path / "quantized", RECIPES[recipe])
    assert manifest == open_folder(tmp_path / "quantized").manifest
    largest = LARGEST_FIXED_ROUNDING if RECIPES[recipe].fixed_rounding else LARGEST_ACTIVATION_ROUNDING
    check_graph(fp32_folder, tmp_path / "quantized", tmp_path, random_tokens(32), largest)


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
    assert quality["mean_kl_divergence"] < 0.013
    assert quality["same_top_percent"] > 91
    assert (storyteller_int4 / "model.onnx.data").stat().st_size < 4_750_000
    matrices = manifest.recipe["matrices"]
    assert matrices["h.0.attn.c_attn.weight"] == "4 bits, blocks of 32"
    assert matrices["wte.weight"] == "4096 rows with 8 bits, blocks of 64; 4096 rows with 4 bits, blocks of 32"


def test_int4_storyteller_computes_with_its_integers(
    storyteller_fp32: Path, storyteller_int4: Path, tmp_path: Path
) -> None:
    check_graph(storyteller_fp32, storyteller_int4, tmp_path, storyteller_tokens(200))


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
    assert len(blockwise) == (0 if recipe == "int8" else 4 * layers + 1)
    # Others dequantize all weights in every run, which is several times slower.
    assert all(node.attributes["accuracy_level"].as_int() == INTEGER_PRODUCTS for node in blockwise)
    assert nodes(after, "MatMul") == nodes(after, "Gemm") == []
    # What is left of float32 has a row a token or an output, never a matrix of weights.
    large = {name for name, value in after.graph.initializers.items() if array_of(value).dtype == np.float32}
    shapes = {name: array_of(after.graph.initializers[name]).shape for name in large}
    assert {name for name, shape in shapes.items() if len(shape) > 1 and not name.endswith(".scales")} == {"wpe.weight"}
    np.testing.assert_array_equal(weight(after, "wpe.weight"), weight(before, "wpe.weight"))
    assert {name.removesuffix(".quantized") for name in after.graph.initializers if name.endswith(".quantized")} == set(
        matrices
    )


def test_embedding_in_blocks_is_the_same_rows_as_the_head(fp32_folder: Path, tmp_path: Path) -> None:
    pipeline.quantize_folder(fp32_folder, tmp_path / "int8", RECIPES["int8-block64"])
    check_embedding(fp32_folder, tmp_path / "int8")
    original = weight(onnx_ir.load(fp32_folder / "model.onnx"), "wte.weight")
    nearest = pack(*round_to_nearest(original, 64), 8, 64).dequantized()
    np.testing.assert_array_equal(embedding_of(tmp_path / "int8"), nearest)


@pytest.mark.parametrize("recipe", ["int4", "int4-small"])
def test_embedding_in_two_parts_is_the_same_rows_as_the_head(recipe: str, fp32_folder: Path, tmp_path: Path) -> None:
    pipeline.quantize_folder(fp32_folder, tmp_path / "int4", RECIPES[recipe])
    check_embedding(fp32_folder, tmp_path / "int4")
    original = weight(onnx_ir.load(fp32_folder / "model.onnx"), "wte.weight")
    embedding = embedding_of(tmp_path / "int4")
    (first, _), _ = RECIPES[recipe].head_formats(8192)
    for part, least in ((slice(0, first), 0.9999), (slice(first, None), 0.99)):  # 8 bits, 4 bits
        assert np.corrcoef(original[part].ravel(), embedding[part].ravel())[0, 1] > least
    assert np.corrcoef(original[first:].ravel(), embedding[first:].ravel())[0, 1] < 0.9999


@pytest.mark.parametrize("recipe", ["int8", "int8-fast"])
def test_embedding_with_a_scale_for_each_row_is_stored_once_with_the_head(
    recipe: str, fp32_folder: Path, tmp_path: Path
) -> None:
    """Its columns are scaled for the head, and back when rows are looked up."""
    pipeline.quantize_folder(fp32_folder, tmp_path / recipe, RECIPES[recipe])
    tokens = [0, 1, 818, 8191, 1]
    found = looked_up_rows(tmp_path / recipe, tokens)
    np.testing.assert_allclose(found, embedding_of(tmp_path / recipe)[tokens], rtol=1e-6)
    original = weight(onnx_ir.load(fp32_folder / "model.onnx"), "wte.weight")[tokens]
    # Half a step of the scaled row, of which the largest has 127.
    initializers = onnx_ir.load(tmp_path / recipe / "model.onnx").graph.initializers
    factors = array_of(initializers["wte.weight.column_factors"]) if "wte.weight.column_factors" in initializers else 1
    half_steps = np.abs(original / factors).max(axis=1, keepdims=True) / 127 / 2 * factors
    assert (np.abs(found - original) <= half_steps * 1.001).all()
    transposed = [
        name_of(node.inputs[0]) for node in nodes(onnx_ir.load(tmp_path / recipe / "model.onnx"), "Transpose")
    ]
    assert transposed == (["wte.weight.quantized"] if open_folder(fp32_folder).manifest.architecture.tied_head else [])


def check_embedding(fp32: Path, quantized: Path) -> None:
    tokens = [0, 1, 818, 819, 4095, 4096, 831, 832, 8191, 1]
    np.testing.assert_array_equal(looked_up_rows(quantized, tokens), embedding_of(quantized)[tokens])
    model = onnx_ir.load(quantized / "model.onnx")
    used = {name_of(node.inputs[1]) for node in nodes(model, "MatMulNBits")}
    tied = open_folder(fp32).manifest.architecture.tied_head
    tables = [name for name in model.graph.initializers if name.startswith("wte.weight") and name.endswith("quantized")]
    assert tables
    assert all((name in used) == tied for name in tables)


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
            formats = [(outputs, recipe.linear_format(name))] if name.startswith("h.") else recipe.head_formats(outputs)
            for rows, stored in formats:
                block_size = stored.block_size or inputs
                blocks = math.ceil(inputs / block_size)
                expected += rows * blocks * (block_size * stored.bits // 8 + recipe.float_bits // 8)
            expected -= 4 * inputs * outputs
            if recipe.prompt is not None and name.startswith("h."):
                expected += outputs * (inputs + 4 + 4)  # integers, scales, and a bias of their own
        architecture = open_folder(fp32_folder).manifest.architecture
        expected -= (32 - recipe.float_bits) // 8 * architecture.context_length * architecture.width  # positions
        head_bias = 4 * architecture.vocabulary_size
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


def test_manifest_of_a_quantized_folder(storyteller_fp32: Path, storyteller_int8: Path) -> None:
    before, after = open_folder(storyteller_fp32).manifest, open_folder(storyteller_int8).manifest
    open_folder(storyteller_int8).check_hashes()
    assert (after.precision, after.architecture, after.end_of_text) == ("int8", before.architecture, before.end_of_text)
    assert after.source == before.source
    assert after.tools == before.tools
    assert after.recipe is not None
    assert after.recipe["name"] == "int8"
    assert after.recipe["linear"] == {"bits": 8, "block_size": None, "rounding": "nearest"}
    assert after.recipe["head"] == {"bits": 8, "block_size": None, "rounding": "nearest"}
    assert after.recipe["calibration"] == "calibration.txt"
    assert after.recipe["quantized_matrices"] == len(after.recipe["matrices"]) == 25
    assert after.recipe["matrices"]["h.5.mlp.c_proj.weight"] == "8 bits, a scale for each output"
    assert after.recipe["matrices"]["wte.weight"] == "8 bits, a scale for each output"
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


def test_equal_matrices_that_the_tracer_made_one(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint(n_layer=2, n_embd=16, n_head=2)
    weights = load_file(checkpoint / "model.safetensors")
    weights["transformer.h.1.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].clone()
    save_file(weights, checkpoint / "model.safetensors")
    export_checkpoint(checkpoint, tmp_path / "fp32")
    manifest = pipeline.quantize_folder(tmp_path / "fp32", tmp_path / "int8", default_recipe("int8"))
    assert manifest.recipe is not None
    assert manifest.recipe["quantized_matrices"] == 8
    check_graph(tmp_path / "fp32", tmp_path / "int8", tmp_path, random_tokens(32))


def test_recipe_is_recorded_as_data(tiny_fp32: Path, tmp_path: Path) -> None:
    quantize_folder(tiny_fp32, tmp_path / "int8")
    recorded = json.loads((tmp_path / "int8" / "manifest.json").read_text())["recipe"]
    recipe = RECIPES[recorded["name"]]
    assert asdict(recipe.linear) == recorded["linear"]
    assert asdict(recipe.head) == recorded["head"]
    assert recorded["calibration"] == "a text that the model wrote itself"
