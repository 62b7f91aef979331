"""Round a matrix to integers with one scale for each block of a row, in the layout of `MatMulNBits`."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class BlockwiseMatrix:
    """A matrix [rows, columns] of 8-bit integers with a scale for each block of columns.

    Attributes:
        values: uint8, shape [rows, blocks, block_size]; 128 stands for 0. What lies beyond the last column is 128.
        scales: float32, shape [rows, blocks].
        columns: How many columns the matrix has.
    """

    values: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    columns: int

    @property
    def block_size(self) -> int:
        """Columns that share a scale."""
        return int(self.values.shape[2])

    def dequantized(self) -> npt.NDArray[np.float32]:
        """Return the matrix that the integers stand for, shape [rows, columns]."""
        centred = self.values.astype(np.float32) - 128
        return (centred * self.scales[:, :, np.newaxis]).reshape(len(centred), -1)[:, : self.columns]


def round_to_nearest(matrix: npt.NDArray[np.float32], block_size: int) -> BlockwiseMatrix:
    """Round each block to 255 evenly spaced values between plus and minus its largest magnitude.

    Args:
        matrix: Shape [rows, columns]; a row gives one output.
        block_size: Columns that share a scale; the last block may be shorter.

    Returns:
        The rounded matrix. A block of zeros has the scale 0 and stays exactly zero.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    blocked = padded.reshape(rows, blocks, block_size)
    scales = np.abs(blocked).max(axis=2) / np.float32(127)
    divisors = np.where(scales > 0, scales, np.float32(1))[:, :, np.newaxis]
    # A scale so small that it was rounded itself could push a quotient past 127.
    steps = np.clip(np.rint(blocked / divisors), -127, 127)
    return BlockwiseMatrix((steps + 128).astype(np.uint8), scales, columns)
