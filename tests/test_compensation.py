"""A matrix makes up for what became of its inputs: by ridge regression, which NumPy's least squares confirms."""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import onnx_ir
import pytest
from quantized_graphs import array_of, set_weight

from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.quantize.calibration import CalibrationRun
from gpt2_edge.quantize.centring import LinearLayer
from gpt2_edge.quantize.compensation import compensate

FloatArray = npt.NDArray[np.float32]

SHARE = 0.7
DAMPING = 0.01


class Vectors:
    """Stands for a run whose vectors are known; `now` and `before` have shape [tokens, width]."""

    def __init__(self, now: FloatArray, before: FloatArray) -> None:
        self.now, self.before, self.tokens = now, before, len(now)

    def mean(self, value: object) -> FloatArray:
        return self.now.mean(axis=0)

    def hessian(self, value: object, mean: FloatArray) -> npt.NDArray[np.float64]:
        return (self.now - mean).astype(np.float64).T @ (self.now - mean)

    def compare(self, value: object, mean: FloatArray, original: object) -> tuple[FloatArray, npt.NDArray[np.float64]]:
        difference = (self.before - self.now).astype(np.float64)
        return difference.mean(axis=0).astype(np.float32), (self.now - mean).T @ difference


def vectors(tokens: int, width: int) -> Vectors:
    """Inputs that were multiplied with something and shifted, and got noise: the former can be undone."""
    random = np.random.default_rng(tokens)
    before = random.normal(size=(tokens, width)) @ random.normal(size=(width, width)) + random.normal(size=width)
    distortion = np.eye(width) + 0.1 * random.normal(size=(width, width))
    now = before @ distortion + 0.3 + 0.05 * random.normal(size=before.shape)
    return Vectors(now.astype(np.float32), before.astype(np.float32))


def compensated(run: Vectors, outputs: int = 5) -> tuple[LinearLayer, LinearLayer]:
    """Return a layer as it was, and as it is after compensation."""
    random = np.random.default_rng(outputs)
    matrix = random.normal(size=(outputs, run.now.shape[1])).astype(np.float32)
    bias = random.normal(size=outputs).astype(np.float32)
    before, after = (LinearLayer(onnx_ir.val("x"), matrix.copy(), bias.copy()) for _ in range(2))
    calibration = cast(CalibrationRun, run)
    compensate(after, run.hessian(None, run.mean(None)), calibration, calibration)
    return before, after


def test_outputs_move_towards_those_of_the_original_inputs() -> None:
    run = vectors(4000, 12)
    layer, changed = compensated(run)
    wanted = run.before @ layer.matrix.T + layer.bias
    was = run.now @ layer.matrix.T + layer.bias - wanted
    found = run.now @ changed.matrix.T + changed.bias - wanted
    # What can be predicted, nearly all here, is taken off by the share that is meant to be.
    assert np.square(found).mean() < ((1 - SHARE) ** 2 + 0.02) * np.square(was).mean()


def test_it_is_ridge_regression_of_the_difference() -> None:
    run = vectors(300, 20)
    layer, changed = compensated(run)
    mean = run.now.mean(axis=0)
    centred, difference = run.now - mean, run.before - run.now
    penalty = np.sqrt(DAMPING * np.square(centred).sum() / centred.shape[1]) * np.eye(centred.shape[1])
    predictor, *_ = np.linalg.lstsq(
        np.concatenate([centred, penalty]), np.concatenate([difference, 0 * penalty]), rcond=None
    )
    share = SHARE * (1 - 20 / 300)
    other = np.random.default_rng(0).normal(size=(7, 20)).astype(np.float32)
    inputs = other + share * (difference.mean(axis=0) + (other - mean) @ predictor)
    np.testing.assert_allclose(
        other @ changed.matrix.T + changed.bias, inputs @ layer.matrix.T + layer.bias, rtol=1e-3, atol=1e-3
    )


def test_too_short_a_text_changes_nothing() -> None:
    layer, changed = compensated(vectors(10, 12))
    np.testing.assert_array_equal(changed.matrix, layer.matrix)
    np.testing.assert_array_equal(changed.bias, layer.bias)


def test_inputs_that_are_what_they_were_change_nothing() -> None:
    same = vectors(100, 8).now
    layer, changed = compensated(Vectors(same, same))
    np.testing.assert_array_equal(changed.matrix, layer.matrix)
    np.testing.assert_array_equal(changed.bias, layer.bias)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    place = tmp_path_factory.mktemp("compensation")
    export_checkpoint(write_checkpoint(place / "checkpoint", n_layer=2, n_embd=24, n_head=3), place / "fp32")
    return place / "fp32"


def test_a_graph_is_compared_with_what_it_was(folder: Path) -> None:
    """The copy keeps the weights that the graph had, and gives the vectors that an unchanged graph gives."""
    model = onnx_ir.load(folder / "model.onnx")
    onnx_ir.external_data.load_to_model(model)
    architecture = open_folder(folder).manifest.architecture
    windows = np.random.default_rng(3).integers(0, 8192, (4, 24)).tolist()
    run = CalibrationRun(model, architecture, windows)
    original = run.of_a_copy()
    assert run.tokens == 96
    first, *_, last = (node for node in model.graph if node.op_type == "MatMul")
    first_input, last_input = first.inputs[0], last.inputs[0]
    assert first_input is not None
    assert last_input is not None
    mean = run.mean(first_input)
    difference, products = run.compare(first_input, mean, original)
    assert not difference.any()
    assert not products.any()
    set_weight(model, "h.0.attn.c_attn.weight", 0.5 * array_of(first.inputs[1]))
    mean = run.mean(last_input)
    difference, products = run.compare(last_input, mean, original)
    untouched = onnx_ir.load(folder / "model.onnx")
    *_, node = (node for node in untouched.graph if node.op_type == "MatMul")
    assert node.inputs[0] is not None
    was = CalibrationRun(untouched, architecture, windows)
    np.testing.assert_allclose(difference, was.mean(node.inputs[0]) - mean, rtol=0, atol=1e-5)
    assert np.abs(difference).max() > 1e-3
    vectors_now = np.concatenate([live[last_input].reshape(-1, 96) for live in run._live]) - mean
    vectors_then = np.concatenate([live[node.inputs[0]].reshape(-1, 96) for live in was._live]) - mean
    expected = vectors_now.T @ (vectors_then - vectors_now)
    np.testing.assert_allclose(products, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(expected).max() > 0.1
