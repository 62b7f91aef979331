"""Products of integers with a scale for each row: against exact integer arithmetic, and row by row."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import pytest

from gpt2_edge.quantize.blockwise import round_to_nearest
from gpt2_edge.quantize.graph_edit import NewNodes
from gpt2_edge.quantize.integer_product import integer_product
from gpt2_edge.saturation import products_saturate

FloatArray = npt.NDArray[np.float32]

GELU_STEP: Final = 0.17 / 32


def session_of(steps: npt.NDArray[np.int8], scales: FloatArray, bias: FloatArray, gelu: bool) -> Any:
    """Make a graph of one layer: `x` [rows, inputs], behind a Gelu or not, of tokens [batch, sequence]."""
    x = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["rows", steps.shape[1]])
    input_ids = onnx_ir.val("input_ids", onnx_ir.DataType.INT64, ["batch", "sequence"])
    first = onnx_ir.node("Gelu" if gelu else "Identity", [x])
    first.outputs[0].name = "activations"
    last = onnx_ir.node("Identity", [first.outputs[0]])
    last.outputs[0].name = "y"
    last.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    first.outputs[0].shape = onnx_ir.Shape(["rows", steps.shape[1]])
    last.outputs[0].shape = onnx_ir.Shape(["rows", len(steps)])
    graph = onnx_ir.Graph(
        [input_ids, x],
        [last.outputs[0]],
        nodes=[first, last],
        opset_imports={"": 21, "com.microsoft": 1},
        name="one layer",
    )
    nodes = NewNodes("layer")
    product = integer_product(graph, nodes, first.outputs[0], steps, scales, bias)
    graph.insert_before(last, nodes.nodes)
    last.replace_input_with(0, product)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if products_saturate():
        options.add_session_config_entry("session.x64quantprecision", "1")
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])


def computed(session: Any, x: FloatArray) -> FloatArray:
    result: FloatArray = session.run(["y"], {"x": x, "input_ids": np.zeros((1, len(x)), np.int64)})[0]
    return result


def gelu(x: FloatArray) -> FloatArray:
    """Compute it with ONNX Runtime's own operator: what is tested is what comes behind."""
    value = onnx_ir.val("x", onnx_ir.DataType.FLOAT, ["rows", "inputs"])
    node = onnx_ir.node("Gelu", [value])
    node.outputs[0].name = "y"
    node.outputs[0].type = onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph = onnx_ir.Graph([value], [node.outputs[0]], nodes=[node], opset_imports={"": 21}, name="gelu")
    proto = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    result: FloatArray = session.run(None, {"x": x})[0]
    return result


def rounded_rows(activations: FloatArray, behind_gelu: bool) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Round each row as documented; return signed integers and the scale of each row."""
    if behind_gelu:
        scales = np.maximum(activations.max(axis=1) * np.float32(1 / 223), np.float32(GELU_STEP))
        lowest, highest = -32, 223
    else:
        scales = np.abs(activations).max(axis=1) * np.float32(1 / 127)
        lowest, highest = -128, 127
    divisors = np.where(scales > 0, scales, np.float32(1))[:, np.newaxis]
    return np.clip(np.rint(activations / divisors), lowest, highest).astype(np.int64), scales


def layer(outputs: int, inputs: int, seed: int = 0) -> tuple[npt.NDArray[np.int8], FloatArray, FloatArray]:
    random = np.random.default_rng(seed)
    matrix = random.normal(size=(outputs, inputs)).astype(np.float32) * 0.1
    return *round_to_nearest(matrix, inputs), random.normal(size=outputs).astype(np.float32)


def odd_rows(inputs: int) -> FloatArray:
    """Rows of zeros, with one huge outlier, tiny, huge, constant, and of one sign only."""
    random = np.random.default_rng(inputs)
    x = random.normal(size=(12, inputs)).astype(np.float32)
    x[1] = 0
    x[2, inputs // 2] = 1e6
    x[3] *= 1e-20
    x[4] *= 1e20
    x[5] = np.abs(x[5])
    x[6] = -np.abs(x[6])
    x[7] = 1
    x[8] = -1
    x[9] = 0
    x[9, -1] = -3
    x[10] *= 1e-3
    return x


# 1, 3, 7, 33, 65 and 100 are multiples of no block that a kernel works in.
SHAPES: Final = [(1, 1), (5, 3), (16, 7), (24, 33), (7, 65), (96, 100), (64, 256), (256, 1024)]


@pytest.mark.parametrize("behind_gelu", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_product_is_that_of_the_integers(outputs: int, inputs: int, behind_gelu: bool) -> None:
    """Up to float32's rounding of the scales; a quotient that float32 puts on the other side of a half is 1 off."""
    steps, scales, bias = layer(outputs, inputs)
    x = odd_rows(inputs)
    if behind_gelu:
        x[4] *= np.float32(1e-18)  # a Gelu of 1e20 is no activation of any model
    integers, row_scales = rounded_rows(gelu(x) if behind_gelu else x, behind_gelu)
    exact = integers @ steps.astype(np.int64).T  # no rounding
    units = row_scales.astype(np.float64)[:, np.newaxis] * scales[:, 0].astype(np.float64)
    found = computed(session_of(steps, scales, bias, behind_gelu), x)
    assert np.isfinite(found).all()
    # In steps of the integer product; a bias that is larger costs digits.
    error = np.abs(found - (exact * units + bias))
    digits = np.finfo(np.float32).eps * (np.abs(exact) * units + np.abs(bias)) * 4
    assert (error <= digits).all(axis=1).mean() > 0.8
    assert (error <= digits + 127 * units).all()


@pytest.mark.parametrize(("outputs", "inputs"), SHAPES)
def test_product_is_close_to_that_of_the_numbers(outputs: int, inputs: int) -> None:
    """Each activation is at most half a step off."""
    steps, scales, bias = layer(outputs, inputs)
    matrix = steps * scales.astype(np.float64)
    x = odd_rows(inputs)
    expected = x.astype(np.float64) @ matrix.T + bias
    half_steps = np.abs(x).max(axis=1).astype(np.float64) / 127 / 2
    bound = half_steps[:, np.newaxis] * np.abs(matrix).sum(axis=1)
    found = computed(session_of(steps, scales, bias, gelu=False), x)
    assert (np.abs(found - expected) <= bound * (1 + 1e-4) + 1e-5 * (1 + np.abs(expected))).all()


def test_row_of_zeros_gives_the_bias() -> None:
    for behind_gelu in (False, True):
        steps, scales, bias = layer(40, 33)
        found = computed(session_of(steps, scales, bias, behind_gelu), np.zeros((3, 33), np.float32))
        np.testing.assert_array_equal(found, np.tile(bias, (3, 1)))


def test_output_of_zeros_gives_its_bias() -> None:
    steps, scales, bias = layer(8, 33)
    matrix = steps * scales
    matrix[[0, 5]] = 0
    steps, scales = round_to_nearest(matrix, 33)
    found = computed(session_of(steps, scales, bias, gelu=False), odd_rows(33))
    np.testing.assert_array_equal(found[:, [0, 5]], np.tile(bias[[0, 5]], (12, 1)))
    assert np.unique(found[:, 1]).size > 5


def test_largest_integers_do_not_saturate() -> None:
    """The sum of two neighbouring products of 255 and -127 does not fit 16 bits, in which AVX2 without VNNI adds."""
    inputs = 512
    steps = np.full((4, inputs), 127, np.int8)
    steps[1] = -127
    scales, bias = np.ones((4, 1), np.float32), np.zeros(4, np.float32)
    x = np.full((2, inputs), 127, np.float32)
    x[1] = -127
    expected = 127 * 127 * inputs * np.array([[1, -1, 1, 1], [-1, 1, -1, -1]])
    np.testing.assert_allclose(computed(session_of(steps, scales, bias, gelu=False), x), expected, rtol=1e-6)


@pytest.mark.parametrize("largest", [0.0, 1e-6, 0.01, 0.5, 1.18, 1.2, 5.0, 300.0])
def test_activations_of_a_gelu_are_never_clipped(largest: float) -> None:
    """From its lowest, -0.17 at an input of -0.75, to the largest of the row: each at most half a step off."""
    random = np.random.default_rng(1)
    x = random.uniform(-6, largest if largest > 0 else -1e-3, (6, 200)).astype(np.float32)
    x[:, 0] = -0.7518  # the lowest point of a Gelu
    x[:, 1] = largest
    activations = gelu(x)
    assert activations.min() == pytest.approx(-0.16997, abs=1e-4)
    step = np.maximum(activations.max(axis=1) / 223, GELU_STEP)[:, np.newaxis]
    identity = np.eye(200, dtype=np.int8) * np.int8(127)
    scales, bias = np.full((200, 1), 1 / 127, np.float32), np.zeros(200, np.float32)
    found = computed(session_of(identity, scales, bias, gelu=True), x)
    assert (np.abs(found - activations) <= 0.5 * step * (1 + 1e-4)).all()


@pytest.mark.parametrize("behind_gelu", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(768, 256), (256, 1024), (3072, 768), (35, 70)])
def test_row_of_a_batch_has_the_same_bits_as_alone(outputs: int, inputs: int, behind_gelu: bool) -> None:
    """Whatever rows are beside it: one that is a million times larger, one of zeros."""
    session = session_of(*layer(outputs, inputs), behind_gelu)
    x = odd_rows(inputs)
    x = np.concatenate([x, np.random.default_rng(5).normal(size=(21, inputs)).astype(np.float32)])
    together = computed(session, x)
    for row in range(len(x)):
        np.testing.assert_array_equal(computed(session, x[row : row + 1])[0], together[row])
    np.testing.assert_array_equal(computed(session, x[::-1].copy())[::-1], together)
    batch = {"x": x, "input_ids": np.zeros((11, 3), np.int64)}
    np.testing.assert_array_equal(session.run(["y"], batch)[0], together)
