"""One rounding for all rows: the range with the least error, the product, and where rows keep steps of their own."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import pytest
from quantized_graphs import LARGEST_FIXED_ROUNDING, STORYTELLER, check_graph, nodes, random_tokens

from gpt2_edge.errors import QuantizationError
from gpt2_edge.export.pipeline import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.quantize import rewrite
from gpt2_edge.quantize.fixed_rounding import FixedRounding, fix_rounding
from gpt2_edge.quantize.graph_edit import NewNodes
from gpt2_edge.quantize.integer_product import fixed_integer_product, row_steps
from gpt2_edge.quantize.pipeline import quantize_folder
from gpt2_edge.quantize.recipes import RECIPES

FloatArray = npt.NDArray[np.float32]

RANDOM: Final = np.random.default_rng(3)
HEADROOM: Final = 1.15  # beyond the best range


def symmetric_steps(x: FloatArray) -> FloatArray:
    largest: FloatArray = np.abs(x).max(axis=1)
    return largest / np.float32(127)


def fixed(x: FloatArray, matrix: FloatArray) -> FixedRounding | None:
    parts = np.array_split(x, 3)
    return fix_rounding(parts, matrix, [symmetric_steps(part) for part in parts])


def of_any_error(x: FloatArray, matrix: FloatArray) -> FixedRounding:
    """Compare with rows of steps so coarse that the fixed ones are taken in any case."""
    rounding = fix_rounding([x], matrix, [np.full(len(x), 1e6, np.float32)])
    assert rounding is not None
    return rounding


def bounds(rounding: FixedRounding | None) -> tuple[float, float]:
    """Return the lowest and the highest number that is not cut off."""
    assert rounding is not None
    zero, step = int(rounding.zero), float(rounding.step)
    return -zero * step, (255 - zero) * step


def rounded(x: FloatArray, step: float, zero: int) -> npt.NDArray[np.float64]:
    result: npt.NDArray[np.float64] = (np.clip(np.rint(x.astype(np.float64) / step) + zero, 0, 255) - zero) * step
    return result


def normal(rows: int, columns: int) -> FloatArray:
    return RANDOM.normal(size=(rows, columns)).astype(np.float32)


# Where to cut.


def test_even_inputs_get_their_whole_range() -> None:
    x = RANDOM.uniform(-1, 3, (900, 8)).astype(np.float32)
    rounding = fixed(x, np.ones((4, 8), np.float32))
    assert bounds(rounding) == pytest.approx((-HEADROOM, 3 * HEADROOM), abs=0.02)
    assert rounding is not None
    assert rounding.step == pytest.approx(4 / 255 * HEADROOM, rel=1e-2)
    assert rounding.zero in (63, 64)


@pytest.mark.parametrize("shape", ["normal", "skewed", "heavy tails", "one side"])
def test_no_other_range_makes_products_much_closer(shape: str) -> None:
    """Of the products themselves, computed with float64, with matrices whose columns differ."""
    x = normal(600, 16)
    x = {"normal": x, "skewed": np.exp(x) - 1, "heavy tails": x**3, "one side": np.maximum(x, -0.17)}[shape]
    matrix = normal(24, 16) * np.geomspace(0.1, 10, 16, dtype=np.float32)

    def error(step: float, zero: int) -> float:
        return float(np.square((rounded(x, step, zero) - x) @ matrix.T.astype(np.float64)).sum())

    rounding = of_any_error(x, matrix)
    ours = error(float(rounding.step) / HEADROOM, int(rounding.zero))
    others = []
    for low in np.linspace(0.1, 1, 19) * x.min():
        for high in np.linspace(0.1, 1, 19) * x.max():
            step = (high - low) / 255
            others.append(error(step, round(-low / step)))
    assert ours < 1.1 * min(others)
    assert max(others) > 2 * ours


def test_a_rare_large_input_is_cut_off_unless_the_matrix_makes_much_of_it() -> None:
    x = normal(20_000, 64)
    x[1000, 5] = 40
    even, heavy, without = np.ones((3, 4, 64), np.float32)
    heavy[:, 5], without[:, 5] = 30, 0
    assert bounds(of_any_error(x, even))[1] < 20
    assert bounds(of_any_error(x, heavy))[1] > 30
    assert bounds(of_any_error(x, without))[1] < 10


def test_rows_far_from_all_others_keep_steps_of_their_own() -> None:
    """As the first tokens of texts are: to cut them off costs much, and not to cut them off too."""
    x = normal(1500, 8)
    x[::500] *= 1000
    assert fixed(x, np.ones((4, 8), np.float32)) is None


def test_nothing_to_round() -> None:
    zeros = np.zeros((9, 4), np.float32)
    assert fixed(zeros, np.ones((3, 4), np.float32)) == FixedRounding(np.float32(1), np.uint8(0))
    assert fixed(normal(9, 4), np.zeros((3, 4), np.float32)) == FixedRounding(np.float32(1), np.uint8(0))


@pytest.mark.parametrize("sign", [1, -1])
def test_inputs_of_one_sign_and_zero_is_exact(sign: int) -> None:
    x = np.asarray(sign * RANDOM.uniform(2, 3, (300, 4)), np.float32)
    low, high = bounds(fixed(x, np.ones((3, 4), np.float32)))
    assert min(low, high, key=abs) == 0
    assert max(abs(low), abs(high)) == pytest.approx(3 * HEADROOM, abs=0.03)


# The product.


def session_of(rounding: FixedRounding, steps: npt.NDArray[np.int8], scales: FloatArray, bias: FloatArray) -> Any:
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["rows", steps.shape[1]])
    last = onnx_ir.node("Identity", [x])
    last.outputs[0].name = "y"
    last.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    last.outputs[0].shape = onnx_ir.Shape(["rows", len(steps)])
    imports = {"": 21, "com.microsoft": 1}
    graph = onnx_ir.Graph([x], [last.outputs[0]], nodes=[last], opset_imports=imports, name="one layer")
    made = NewNodes("layer")
    product = fixed_integer_product(graph, made, x, rounding, steps, scales, bias)
    graph.insert_before(last, made.nodes)
    last.replace_input_with(0, product)
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (5, 3), (24, 33), (96, 100), (64, 256)])
@pytest.mark.parametrize("zero", [0, 3, 128, 255])
def test_product_is_that_of_the_integers(outputs: int, inputs: int, zero: int) -> None:
    """With 7 bits, which no processor's products saturate with."""
    steps = RANDOM.integers(-63, 64, (outputs, inputs), dtype=np.int8)
    scales = RANDOM.uniform(0.01, 0.02, (outputs, 1)).astype(np.float32)
    bias = RANDOM.normal(size=outputs).astype(np.float32)
    rounding = FixedRounding(np.float32(0.125), np.uint8(zero))
    x = 12 * normal(9, inputs)  # most within 96 steps to either side
    x[0], x[1], x[2] = 0, 1e30, -1e30
    integers = np.clip(np.rint(x.astype(np.float64) / 0.125), -zero, 255 - zero).astype(np.int64)
    expected = (integers @ steps.T.astype(np.int64)) * (0.125 * scales[:, 0].astype(np.float64)) + bias
    session = session_of(rounding, steps, scales, bias)
    found = session.run(None, {"x": x})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
    for row in range(len(x)):
        np.testing.assert_array_equal(session.run(None, {"x": x[row : row + 1]})[0][0], found[row])


@pytest.mark.parametrize("operator", ["Gelu", "Identity"])
def test_steps_of_rows_are_those_that_the_graph_would_find(operator: str) -> None:
    x = np.array([[-3, 1, 2], [0.25, -0.125, 0], [0, 0, 0]], np.float32)
    value = onnx_ir.node(operator, [onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["rows", 3])]).outputs[0]
    expected = np.maximum([2 / 223, 0.25 / 223, 0], 0.17 / 32) if operator == "Gelu" else [3 / 127, 0.25 / 127, 0]
    np.testing.assert_allclose(row_steps(value, x), expected, rtol=1e-6)


# The recipe.


def operators(folder: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx_ir.load(folder / "model.onnx").graph)


def test_storyteller_stays_close_with_half_of_the_operators(storyteller_fp32: Path, tmp_path: Path) -> None:
    text = (STORYTELLER / "calibration.txt").read_text(encoding="utf-8")
    (tmp_path / "calibration.txt").write_text(text[:60_000], encoding="utf-8")
    folder = tmp_path / "int8-fast"
    manifest = quantize_folder(storyteller_fp32, folder, RECIPES["int8-fast"], calibration=tmp_path / "calibration.txt")
    quality = manifest.measured["quality"]
    assert quality["mean_kl_divergence"] < 0.0035
    assert quality["same_top_percent"] > 95
    assert set(quality["first_divergent_in_batch"]) == {quality["greedy_tokens"]}
    assert manifest.recipe is not None
    assert manifest.recipe["matrices"]["h.5.mlp.c_proj.weight"].endswith("; all inputs rounded alike")
    assert manifest.recipe["matrices"]["wte.weight"] == "8 bits, a scale for each output"
    found, plain = operators(folder), operators(open_folder("storyteller").path)
    assert found["MatMulIntegerToFloat"] == found["QuantizeLinear"] == 24 + 1
    assert found["ReduceMax"] == found["Abs"] == 1  # of the head
    assert found.total() < 0.6 * plain.total()


@pytest.mark.parametrize("recipe", ["int8-fast", "int4-fast"])
def test_a_calibration_text_too_short_to_show_the_range_is_refused(
    recipe: str, tmp_path: Path, storyteller_fp32: Path
) -> None:
    """Of `int4-fast` only the decoding is measured, which would not notice."""
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time there was a king. " * 20, encoding="utf-8")
    message = rf"the calibration text short.txt has \d+ tokens, and {recipe} cuts off .*at least 1,000, or none"
    with pytest.raises(QuantizationError, match=message):
        quantize_folder(storyteller_fp32, tmp_path / "made", RECIPES[recipe], calibration=short)
    assert list(tmp_path.iterdir()) == [short]


def test_a_layer_whose_rows_differ_too_much_is_computed_as_with_int8(
    tmp_path: Path, write_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    export_checkpoint(write_checkpoint(tmp_path / "checkpoint", n_embd=32, n_head=4), tmp_path / "fp32")
    asked: list[int] = []

    def refuse_the_second(*arguments: Any) -> FixedRounding | None:
        asked.append(1)
        return None if len(asked) == 2 else fix_rounding(*arguments)

    monkeypatch.setattr(rewrite, "fix_rounding", refuse_the_second)
    manifest = quantize_folder(tmp_path / "fp32", tmp_path / "fast", RECIPES["int8-fast"])
    assert manifest.recipe is not None
    words = [text for name, text in manifest.recipe["matrices"].items() if name.startswith("h.")]
    assert Counter(words) == {
        "8 bits, a scale for each output; all inputs rounded alike": len(asked) - 1,
        "8 bits, a scale for each output": 1,
    }
    assert len(nodes(onnx_ir.load(tmp_path / "fast" / "model.onnx"), "ReduceMax")) == 1 + 1  # the head's
    check_graph(tmp_path / "fp32", tmp_path / "fast", tmp_path, random_tokens(32), LARGEST_FIXED_ROUNDING)
