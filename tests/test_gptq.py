"""GPTQ against its derivation, step by step in float64, and against what it promises: products that change little."""

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from gpt2_edge import QuantizationError
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.quantize import gptq as gptq_module
from gpt2_edge.quantize.blockwise import pack
from gpt2_edge.quantize.calibration import CalibrationRun
from gpt2_edge.quantize.gptq import DAMPING, gptq, step_range

FloatArray = npt.NDArray[np.float32]

FORMATS: Final = [(4, 32), (4, 128), (8, 64), (8, 200), (4, 16)]


def matrix_and_inputs(rows: int = 24, columns: int = 200, tokens: int = 600) -> tuple[FloatArray, FloatArray]:
    """Return weights [rows, columns] and inputs [tokens, columns] that are correlated and differ in size."""
    random = np.random.default_rng(columns + tokens)
    mixing = random.normal(size=(columns, columns)) / math.sqrt(columns) + np.diag(random.uniform(0.1, 2, columns))
    inputs = (random.normal(size=(tokens, columns)) @ mixing).astype(np.float32)
    return random.normal(size=(rows, columns)).astype(np.float32), inputs


def hessian_of(inputs: FloatArray) -> npt.NDArray[np.float64]:
    return inputs.T.astype(np.float64) @ inputs


def dequantized(steps: npt.NDArray[np.int8], scales: FloatArray, block_size: int) -> FloatArray:
    return steps * np.repeat(scales, block_size, axis=1)[:, : steps.shape[1]]


def product_error(matrix: FloatArray, rounded: FloatArray, inputs: FloatArray) -> float:
    """Mean squared error of the products, relative to their mean square."""
    exact = inputs.astype(np.float64) @ matrix.T
    return float(np.square(inputs.astype(np.float64) @ rounded.T - exact).mean() / np.square(exact).mean())


@pytest.fixture
def no_descent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what the paper does alone."""
    monkeypatch.setattr(gptq_module, "_DESCENTS", 0)


@pytest.mark.usefixtures("no_descent")
def test_two_columns_by_hand() -> None:
    """The second weight makes up for the first one's error.

    H = ((2, 1), (1, 2)), so the best second weight for a first one that is too small by e is larger by e / 2: the
    derivative of 2 e^2 - 2 e d + 2 d^2 by d is zero there. Whole numbers follow, whose inputs are independent; they
    make 1 the best scale.
    """
    anchors = [127, 113, 97, 89, 83, 71, 61, 53, 43, 37, 29, 23]
    hessian = np.eye(14)
    hessian[:2, :2] = [[2, 1], [1, 2]]
    matrix = np.array([[*pair, *anchors] for pair in ((10.4, 20.35), (10.4, 20.25), (-3.4, 0.6))], np.float32)
    steps, scales = gptq(matrix, hessian, bits=8, block_size=14, damping=0)
    np.testing.assert_allclose(scales, np.ones((3, 1)), rtol=1e-6)
    # 0.4 too small: 20.35 becomes 20.55, 20.25 becomes 20.45. 0.4 too large: 0.6 becomes 0.4.
    assert steps[:, :2].tolist() == [[10, 21], [10, 20], [-3, 0]]
    assert (steps[:, 2:] == anchors).all()
    independent, _ = gptq(matrix, np.eye(14), bits=8, block_size=14, damping=0)
    assert independent[:, :2].tolist() == [[10, 20], [10, 20], [-3, 1]]


def rounded_by_elimination(
    matrix: FloatArray, hessian: npt.NDArray[np.float64], scales: FloatArray, bits: int, block_size: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Round with given scales as the paper derives it, with no Cholesky factor and nothing put off.

    Optimal brain surgery: a column that is rounded changes the others by its row of the inverse Hessian, and is then
    eliminated from the inverse.

    Returns:
        Integers, and how far each quotient was from the middle between two of them.
    """
    inverse = np.linalg.inv(hessian)
    weights = matrix.astype(np.float64)
    steps, margins = np.zeros_like(weights), np.zeros_like(weights)
    lowest, highest = step_range(bits)
    for column in range(matrix.shape[1]):
        scale = scales[:, column // block_size].astype(np.float64)
        quotient = weights[:, column] / scale
        steps[:, column] = np.clip(np.rint(quotient), lowest, highest)
        margins[:, column] = np.abs(quotient - np.floor(quotient) - 0.5)
        error = weights[:, column] - steps[:, column] * scale
        weights -= np.outer(error / inverse[column, column], inverse[column])
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return steps, margins


@pytest.mark.usefixtures("no_descent")
@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
def test_integers_are_those_of_the_derivation(bits: int, block_size: int) -> None:
    matrix, inputs = matrix_and_inputs()
    hessian = hessian_of(inputs)
    steps, scales = gptq(matrix, hessian, bits, block_size)
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(hessian))
    expected, margins = rounded_by_elimination(matrix, damped, scales, bits, block_size)
    # Float32 may decide otherwise where a quotient lies between two integers, and the rest of the row follows.
    clear = margins.min(axis=1) > (1e-3 if bits == 8 else 1e-4)
    assert clear.mean() > 0.3
    np.testing.assert_array_equal(steps[clear], expected[clear])


@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
def test_products_change_less_than_with_the_nearest_integers(bits: int, block_size: int) -> None:
    matrix, inputs = matrix_and_inputs()
    ours = dequantized(*gptq(matrix, hessian_of(inputs), bits, block_size), block_size)
    nearest = dequantized(*gptq(matrix, np.eye(200), bits, block_size), block_size)
    assert product_error(matrix, ours, inputs) < 0.6 * product_error(matrix, nearest, inputs)
    # On inputs of the same kind that it has not seen as well, though not by as much.
    _, others = matrix_and_inputs()
    others = others[::-1] * np.random.default_rng(0).choice([-1, 1], (len(others), 1))
    assert product_error(matrix, ours, others.astype(np.float32)) < 0.8 * product_error(matrix, nearest, inputs)


@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
def test_each_descent_gets_closer(bits: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, inputs = matrix_and_inputs()
    hessian = hessian_of(inputs)
    damped = hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(hessian))
    costs = []
    for descents in range(4):
        monkeypatch.setattr(gptq_module, "_DESCENTS", descents)
        error = dequantized(*gptq(matrix, hessian, bits, block_size), block_size) - matrix
        costs.append(np.einsum("ri,ij,rj->r", error, damped, error))
    for before, after in pairwise(costs):
        assert (after <= before * (1 + 1e-3)).all()  # for each row
    assert costs[1].sum() < 0.97 * costs[0].sum()


@pytest.mark.parametrize(("bits", "block_size"), FORMATS)
def test_independent_inputs_of_one_size_give_the_nearest_integers(bits: int, block_size: int) -> None:
    """And a scale that is at least as good as that of the largest magnitude."""
    matrix, _ = matrix_and_inputs()
    steps, scales = gptq(matrix, np.eye(200), bits, block_size)
    wide = np.repeat(scales, block_size, axis=1)[:, :200]
    lowest, highest = step_range(bits)
    np.testing.assert_array_equal(steps, np.clip(np.rint(matrix / wide), lowest, highest))
    error = np.square(steps * wide - matrix).sum(axis=1)
    blocks = [matrix[:, start : start + block_size] for start in range(0, 200, block_size)]
    plain = np.repeat([np.abs(block).max(axis=1) / highest for block in blocks], block_size, axis=0)[:200].T
    plain_error = np.square(np.rint(matrix / plain) * plain - matrix).sum(axis=1)
    assert (error < plain_error).all()
    assert error.sum() < (0.97 if bits == 8 else 0.85) * plain_error.sum()


def test_integers_have_the_range_of_their_bits() -> None:
    matrix, inputs = matrix_and_inputs(rows=200)
    for bits, least, largest in ((4, -8, 7), (8, -127, 127)):
        steps, scales = gptq(matrix, hessian_of(inputs), bits, 32)
        assert (steps.min(), steps.max()) == (least, largest)
        assert (scales > 0).all() if bits == 8 else (scales < 0).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_hessian_of_a_text_that_is_shorter_than_the_matrix_is_wide(bits: int) -> None:
    matrix, inputs = matrix_and_inputs(tokens=30)
    steps, scales = gptq(matrix, hessian_of(inputs), bits, 32)
    ours = dequantized(steps, scales, 32)
    nearest = dequantized(*gptq(matrix, np.eye(200), bits, 32), 32)
    assert product_error(matrix, ours, inputs) < 0.2 * product_error(matrix, nearest, inputs)
    # What the text says nothing about stays about as near as it would be without one.
    assert np.square(ours - matrix).mean() < 3 * np.square(nearest - matrix).mean()


def test_inputs_that_are_always_zero() -> None:
    matrix, inputs = matrix_and_inputs()
    inputs[:, [0, 50, 199]] = 0
    steps, scales = gptq(matrix, hessian_of(inputs), 4, 32)
    error = np.abs(dequantized(steps, scales, 32) - matrix)
    largest = np.abs(np.repeat(scales, 32, axis=1))[:, :200]
    unclipped = (steps > -8) & (steps < 7)
    assert (error[:, [0, 50, 199]] <= 0.501 * largest[:, [0, 50, 199]])[unclipped[:, [0, 50, 199]]].all()
    for zeros in (np.zeros((200, 200)), np.zeros((200, 200), np.float32)):
        np.testing.assert_array_equal(gptq(matrix, zeros, 4, 32)[0], gptq(matrix, np.eye(200), 4, 32)[0])


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_and_blocks_of_zeros(bits: int) -> None:
    matrix, inputs = matrix_and_inputs()
    matrix[[0, 7]] = 0
    matrix[3, 32:64] = 0
    steps, scales = gptq(matrix, hessian_of(inputs), bits, 32)
    assert (steps[[0, 7]] == 0).all()
    assert (scales[[0, 7]] == 0).all()
    assert np.isfinite(scales).all()
    all_zero, no_scales = gptq(np.zeros((3, 10), np.float32), np.eye(10), bits, 32)
    assert not all_zero.any()
    assert not no_scales.any()


@pytest.mark.parametrize("bits", [4, 8])
def test_one_huge_outlier(bits: int) -> None:
    matrix, inputs = matrix_and_inputs()
    damaged = matrix.copy()
    damaged[5, 70] = 1e6
    before, after = (gptq(each, hessian_of(inputs), bits, 32) for each in (matrix, damaged))
    others = np.arange(len(matrix)) != 5
    np.testing.assert_array_equal(before[0][others], after[0][others])
    assert dequantized(*after, 32)[5, 70] == pytest.approx(1e6, rel=0.08 if bits == 4 else 0.005)
    assert np.isfinite(after[1]).all()


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100, -1.0])
def test_size_of_the_weights_does_not_matter(factor: float) -> None:
    matrix, inputs = matrix_and_inputs()
    hessian = hessian_of(inputs)
    steps, scales = gptq(matrix, hessian, 8, 32)
    other_steps, other_scales = gptq(matrix * np.float32(factor), 2.0**20 * hessian, 8, 32)
    np.testing.assert_array_equal(other_steps, np.sign(factor) * steps)
    np.testing.assert_array_equal(other_scales, np.float32(abs(factor)) * scales)


def test_a_matrix_of_many_rows_is_rounded_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, inputs = matrix_and_inputs()
    whole, _ = gptq(matrix, hessian_of(inputs), 4, 32)
    monkeypatch.setattr(gptq_module, "_ROWS_AT_ONCE", 7)
    parts, _ = gptq(matrix, hessian_of(inputs), 4, 32)
    # Products of other shapes may be summed in another order, so a tie here and there may fall differently.
    assert (parts == whole).all(axis=1).mean() > 0.9


# ---- the layout ----


def test_two_integers_in_a_byte_by_hand() -> None:
    steps = np.array([[-8, 7, 0, 1, -1]], np.int8)
    scales = np.array([[0.5, -2.0]], np.float32)
    packed = pack(steps, scales, 4, 4)
    # 0 and 15, 8 and 9; then 7 and what lies beyond the row: 8 is 0.
    assert packed.values.tolist() == [[[0xF0, 0x98], [0x87, 0x88]]]
    assert (packed.block_size, packed.columns, packed.bits) == (4, 5, 4)
    np.testing.assert_array_equal(packed.dequantized(), [[-4, 3.5, 0, 0.5, 2]])


# ---- what the matrices of a graph are multiplied with ----


def windows() -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 8192, (5, 20)).tolist()


def exposed(model: onnx_ir.Model, values: list[onnx_ir.Value], window: list[int]) -> list[npt.NDArray[Any]]:
    """Run the whole graph over a window and return some of its values."""
    proto = onnx_ir.to_proto(onnx_ir.Model(model.graph.clone(), ir_version=model.ir_version))
    for value in values:
        proto.graph.output.append(helper.make_tensor_value_info(value.name or "", TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds: dict[str, npt.NDArray[Any]] = {
        each.name: np.zeros((1, each.shape[1], len(window), each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values")
    }
    feeds |= {
        "input_ids": np.array([window], np.int64),
        "position_ids": np.arange(len(window), dtype=np.int64)[np.newaxis],
        "seqlens_k": np.array([len(window) - 1], np.int32),
        "total_sequence_length": np.array(len(window), np.int32),
        "logit_positions": np.arange(len(window), dtype=np.int64),
    }
    results: list[npt.NDArray[Any]] = session.run([value.name for value in values], feeds)
    return results


@pytest.fixture(scope="module")
def fp32_folder(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    place = tmp_path_factory.mktemp("calibration")
    export_checkpoint(write_checkpoint(place / "checkpoint", n_embd=24, n_head=3), place / "fp32")
    return place / "fp32"


def loaded(folder: Path) -> onnx_ir.Model:
    model = onnx_ir.load(folder / "model.onnx")
    onnx_ir.external_data.load_to_model(model)
    return model


def test_hessians_are_of_what_the_changed_matrices_give(fp32_folder: Path) -> None:
    """Each matrix is changed as soon as its Hessian is known, as quantizing does; those after it must see that."""
    model = loaded(fp32_folder)
    run = CalibrationRun(model, open_folder(fp32_folder).manifest.architecture, windows())
    random = np.random.default_rng(0)
    hessians, inputs = [], []
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            x, weight = node.inputs
            assert x is not None
            assert weight is not None
            assert weight.const_value is not None
            hessians.append(run.hessian(x))
            inputs.append(x)
            if node.op_type == "MatMul":
                array = weight.const_value.numpy()
                changed = array + 0.3 * random.normal(size=array.shape).astype(np.float32)
                weight.const_value = onnx_ir.tensor(changed.astype(np.float32), name=weight.name)
    assert len(hessians) == 9
    vectors = [
        np.concatenate([array.reshape(-1, array.shape[-1]) for array in each])
        for each in zip(*(exposed(model, inputs, window) for window in windows()), strict=True)
    ]
    for hessian, array in zip(hessians, vectors, strict=True):
        np.testing.assert_allclose(hessian, hessian_of(array), rtol=1e-4, atol=1e-3)


def test_nothing_is_kept_that_no_later_piece_needs(fp32_folder: Path) -> None:
    model = loaded(fp32_folder)
    run = CalibrationRun(model, open_folder(fp32_folder).manifest.architecture, windows())
    for node in model.graph:
        if node.op_type == "MatMul":
            x = node.inputs[0]
            assert x is not None
            run.hessian(x)
            for live in run._live:
                tensors = [array for array in live.values() if array.dtype == np.float32]
                assert len(tensors) <= 2  # the input, and the sum that goes past the matrix
                assert x in live


def test_model_that_overflows_is_refused(fp32_folder: Path) -> None:
    model = loaded(fp32_folder)
    model.graph.initializers["h.1.ln_1.bias"].const_value = onnx_ir.tensor(
        np.full(24, np.inf, np.float32), name="h.1.ln_1.bias"
    )
    run = CalibrationRun(model, open_folder(fp32_folder).manifest.architecture, windows())
    products = [node for node in model.graph if node.op_type == "MatMul"]
    first, bad = products[0].inputs[0], products[4].inputs[0]
    assert first is not None
    assert bad is not None
    run.hessian(first)
    with pytest.raises(QuantizationError, match="computes numbers that are not finite"):
        run.hessian(bad)
