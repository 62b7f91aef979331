"""Which matrices and which rows get more bits, how floats are stored, and that the graph puts the parts together."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from quantized_graphs import array_of

from gpt2_edge.cli import main
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.quantize.blockwise import BlockwiseMatrix, pack, round_to_nearest
from gpt2_edge.quantize.blockwise_product import blockwise_lookup, store
from gpt2_edge.quantize.graph_edit import NewNodes
from gpt2_edge.quantize.half_floats import as_half, through_half
from gpt2_edge.quantize.pipeline import quantize_folder
from gpt2_edge.quantize.recipes import RECIPES, MatrixFormat, Promotion, Recipe

COARSE = MatrixFormat(4, 32, "gptq")
FINE = MatrixFormat(8, 64, "gptq")


def recipe(first_tokens: float, layers: tuple[str, ...] = ()) -> Recipe:
    return Recipe("some", "int4", COARSE, COARSE, "", Promotion(FINE, first_tokens, layers))


def test_first_tokens_get_more_bits() -> None:
    assert recipe(0.5).head_formats(8192) == [(4096, FINE), (4096, COARSE)]
    assert recipe(0.1).head_formats(8192) == [(832, FINE), (7360, COARSE)]
    assert recipe(0.25).head_formats(50257) == [(12544, FINE), (37713, COARSE)]


def test_vocabulary_that_one_part_holds() -> None:
    assert recipe(1.0).head_formats(8192) == [(8192, FINE)]
    assert recipe(0.1).head_formats(50) == [(50, FINE)]
    assert recipe(0.1).head_formats(100) == [(64, FINE), (36, COARSE)]
    assert replace(recipe(0.1), promotion=None).head_formats(100) == [(100, COARSE)]


def test_layers_that_get_more_bits() -> None:
    chosen = recipe(0.5, ("attn.c_proj.weight",))
    assert chosen.linear_format("h.11.attn.c_proj.weight") == FINE
    assert chosen.linear_format("h.11.mlp.c_proj.weight") == COARSE
    assert recipe(0.5).linear_format("h.11.attn.c_proj.weight") == COARSE


def test_names_of_the_recipe_are_those_of_the_graph(
    tmp_path: Path, write_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A name that no matrix has would promote none, and nothing else would show it."""
    export_checkpoint(write_checkpoint(tmp_path / "checkpoint", n_layer=2, n_embd=16, n_head=2), tmp_path / "fp32")
    manifest = quantize_folder(tmp_path / "fp32", tmp_path / "int4", RECIPES["int4-close"])
    assert manifest.recipe is not None
    found = manifest.recipe["matrices"]
    assert Counter(found.values()) == {
        "8 bits, blocks of 64": 4,
        "4 bits, blocks of 32": 4,
        "6144 rows with 8 bits, blocks of 64; 2048 rows with 4 bits, blocks of 32": 1,
    }
    promoted = {name for name, stored in found.items() if stored.startswith("8 bits")}
    assert promoted == {f"h.{layer}.{name}.weight" for layer in (0, 1) for name in ("attn.c_proj", "mlp.c_fc")}
    assert open_folder(tmp_path / "int4").manifest.recipe == manifest.recipe
    assert main(["info", str(tmp_path / "int4")]) == 0
    shown = capsys.readouterr().out
    assert "4: 8 bits, blocks of 64\n" in shown
    assert "1: 6144 rows with 8 bits, blocks of 64; 2048 rows with 4 bits, blocks of 32\n" in shown


# ---- floats ----


@settings(max_examples=60, deadline=None, derandomize=True)
@given(exponent=st.integers(-30, 30), seed=st.integers(0, 2**32 - 1))
def test_floats_are_halved_only_if_that_changes_little(exponent: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    array = (random.normal(size=(4, 9)) * 10.0**exponent).astype(np.float32)
    half = as_half(array)
    if half is None:
        # float16 holds numbers of 6e-5 to 65504 with all its digits.
        assert np.abs(array).max() > 60000 or np.abs(array).max(axis=1).min() < 7e-5
        np.testing.assert_array_equal(through_half(array), array)
    else:
        assert (np.abs(half.astype(np.float32) - array) <= np.abs(array).max(axis=1, keepdims=True) / 1024).all()
        np.testing.assert_array_equal(through_half(array), half.astype(np.float32))


def test_rows_of_zeros_and_small_numbers_beside_large_ones_can_be_halved() -> None:
    array = np.array([[0, 0], [1, 1e-9], [-3, 2]], np.float32)
    half = as_half(array)
    assert half is not None
    assert (half[0] == 0).all()
    assert as_half(np.array([[1, 2], [1e-9, 1e-9]], np.float32)) is None
    assert as_half(np.array([[1, 2], [1e5, 1]], np.float32)) is None


def empty_graph() -> tuple[onnx_ir.Graph, onnx_ir.Value]:
    ids = onnx_ir.val("input_ids", onnx_ir.DataType.INT64, ["batch", "sequence"])
    identity = onnx_ir.node("Identity", [ids])
    graph = onnx_ir.Graph([ids], [identity.outputs[0]], nodes=[identity], opset_imports={"": 21}, name="lookup")
    return graph, ids


def test_scales_that_float16_cannot_hold_stay_float32() -> None:
    matrix = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    for factor, dtype in ((1, np.float16), (1e9, np.float32)):
        graph, _ = empty_graph()
        steps, scales = round_to_nearest(matrix * np.float32(factor), 32, 4)
        stored = store(graph, "wte.weight", pack(steps, through_half(scales), 4, 32), 16)
        assert array_of(graph.initializers["wte.weight.scales"]).dtype == dtype
        assert (stored.scales.producer() is None) == (dtype == np.float32)
        assert [node.op_type for node in graph] == (["Cast", "Identity"] if dtype == np.float16 else ["Identity"])
    graph, _ = empty_graph()
    assert store(graph, "wte.weight", pack(*round_to_nearest(matrix, 32, 4), 4, 32), 32).scales.producer() is None


# ---- looking rows up ----


def tables(columns: int) -> list[BlockwiseMatrix]:
    random = np.random.default_rng(columns)
    first, second = (random.normal(size=(rows, columns)).astype(np.float32) for rows in (5, 7))
    return [
        pack(*round_to_nearest(first, 64, 8), 8, 64),
        pack(*round_to_nearest(second, 32, 4), 4, 32),
    ]


@pytest.mark.parametrize("columns", [64, 40])
@pytest.mark.parametrize("parts", [1, 2])
def test_rows_come_from_the_part_that_has_them(parts: int, columns: int) -> None:
    graph, ids = empty_graph()
    chosen = tables(columns)[:parts]
    stored = [store(graph, f"wte.weight.{index}", table, 32) for index, table in enumerate(chosen)]
    nodes = NewNodes("lookup")
    rows = blockwise_lookup(graph, nodes, stored, ids)
    graph.extend(nodes.nodes)
    rows.type, rows.shape = onnx_ir.TensorType(onnx_ir.DataType.FLOAT), onnx_ir.Shape(["batch", "sequence", columns])
    graph.outputs[0] = rows
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10))
    every: npt.NDArray[np.float32] = np.concatenate([table.dequantized() for table in chosen])
    asked = np.array([np.arange(len(every)), np.arange(len(every))[::-1]], np.int64)
    (found,) = ReferenceEvaluator(proto).run(None, {"input_ids": asked})
    np.testing.assert_array_equal(found, every[asked])
