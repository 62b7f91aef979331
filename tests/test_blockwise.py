"""Rounding in blocks, by hand and against ONNX Runtime's own quantizer and kernel."""

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from quantized_graphs import FLOAT32_PRODUCTS, INTEGER_PRODUCTS, FloatArray

from gpt2_edge.quantize.blockwise import BlockwiseMatrix, pack, round_to_nearest
from gpt2_edge.quantize.gptq import gptq

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
