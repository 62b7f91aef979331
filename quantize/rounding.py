"""Choose and call what rounds a matrix, as its format says."""

import numpy as np
import numpy.typing as npt

from gpt2_edge.quantize.blockwise import round_to_nearest
from gpt2_edge.quantize.calibration import Hessian
from gpt2_edge.quantize.gptq import FloatArray, StepArray, gptq
from gpt2_edge.quantize.recipes import MatrixFormat


def round_matrix(
    matrix: FloatArray, matrix_format: MatrixFormat, hessian: Hessian | None
) -> tuple[StepArray, npt.NDArray[np.float32]]:
    """Round a matrix to integers with scales.

    Args:
        matrix: Shape [outputs, inputs].
        matrix_format: How.
        hessian: X^T X of what the matrix is multiplied with, shape [inputs, inputs]; None lets GPTQ take all inputs
            for equally large and independent, so that it rounds to the nearest with the best scales.

    Returns:
        Integers, shape [outputs, inputs], and scales, shape [outputs, blocks].
    """
    columns = matrix.shape[1]
    block_size = matrix_format.block_size or columns
    if matrix_format.rounding == "nearest":
        return round_to_nearest(matrix, block_size, matrix_format.bits)
    return gptq(matrix, np.eye(columns) if hessian is None else hessian, matrix_format.bits, block_size)
