"""A matrix of integers with one scale for each block of a row, in the layout of `MatMulNBits`."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class BlockwiseMatrix:
    """A matrix [rows, columns] of 4-bit or 8-bit integers with a scale for each block of columns.

    Attributes:
        values: uint8, shape [rows, blocks, block_size * bits / 8]; 2**(bits - 1) stands for 0. Of the two 4-bit
            integers in a byte, the low half is the first. What lies beyond the last column is 0.
        scales: float32, shape [rows, blocks].
        columns: How many columns the matrix has.
        bits: 4 or 8.
    """

    values: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    columns: int
    bits: int = 8

    @property
    def block_size(self) -> int:
        """Columns that share a scale."""
        return int(self.values.shape[2]) * 8 // self.bits

    def dequantized(self) -> npt.NDArray[np.float32]:
        """Return the matrix that the integers stand for, shape [rows, columns]."""
        values = self.values
        if self.bits == 4:
            values = np.stack([values & 15, values >> 4], axis=-1).reshape(*self.scales.shape, -1)
        centred = values.astype(np.float32) - 2 ** (self.bits - 1)
        matrix: npt.NDArray[np.float32] = (centred * self.scales[:, :, np.newaxis]).reshape(len(centred), -1)
        return matrix[:, : self.columns]


def pack(steps: npt.NDArray[np.int8], scales: npt.NDArray[np.float32], bits: int, block_size: int) -> BlockwiseMatrix:
    """Lay integers out as the kernel wants them.

    Args:
        steps: Signed integers, shape [rows, columns].
        scales: Shape [rows, blocks].
        bits: Of an integer, 4 or 8.
        block_size: Columns that share a scale; the last block may be shorter.
    """
    rows, columns = steps.shape
    blocks = scales.shape[1]
    zero = 2 ** (bits - 1)
    values = np.full((rows, blocks * block_size), zero, np.uint8)
    values[:, :columns] = steps + np.int16(zero)
    if bits == 4:
        values = values[:, 0::2] | values[:, 1::2] << 4
    return BlockwiseMatrix(values.reshape(rows, blocks, -1), scales, columns, bits)


def round_to_nearest(
    matrix: npt.NDArray[np.float32], block_size: int, bits: int = 8
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Round each block to evenly spaced values between plus and minus its largest magnitude: 255 at 8 bits.

    Args:
        matrix: Shape [rows, columns]; a row gives one output.
        block_size: Columns that share a scale; the last block may be shorter.
        bits: Of an integer; 0 is one of them, and there are as many below as above.

    Returns:
        Integers, shape [rows, columns], and scales, shape [rows, blocks]. A block of zeros has the scale 0 and stays
        exactly zero.
    """
    rows, columns = matrix.shape
    blocks = -(-columns // block_size)
    padded = np.zeros((rows, blocks * block_size), np.float32)
    padded[:, :columns] = matrix
    blocked = padded.reshape(rows, blocks, block_size)
    most = 2 ** (bits - 1) - 1
    scales = np.abs(blocked).max(axis=2) / np.float32(most)
    divisors = np.where(scales > 0, scales, np.float32(1))[:, :, np.newaxis]
    # A scale so small that it was rounded itself could push a quotient past the last step.
    steps = np.clip(np.rint(blocked / divisors), -most, most)
    return steps.reshape(rows, -1)[:, :columns].astype(np.int8), scales
