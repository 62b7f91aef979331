"""Keep floats as float16 in a folder: half the size, and as fast, since ONNX Runtime makes float32 of them as it loads.

A scale in float16 is off by a two-thousandth at most; half a step of 4 bits is a sixteenth of the largest weight.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

_LARGEST_ERROR: Final = 2.0**-10  # float16's own, 2**-11, unless numbers are too small or too large for it


def as_half(array: FloatArray) -> npt.NDArray[np.float16] | None:
    """Return float16 numbers that are as good, or None if the array has a row whose numbers float16 cannot hold.

    Args:
        array: Shape [rows, columns]. Errors are compared with the largest number of their row.
    """
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    largest = np.abs(array).max(axis=1, keepdims=True)
    # Written so that what became infinite is no good.
    good = np.abs(half.astype(np.float32) - array) <= _LARGEST_ERROR * largest
    return half if good.all() else None


def through_half(array: FloatArray) -> FloatArray:
    """Return the numbers that are left of an array in float16; those of one that float16 cannot hold as they are."""
    half = as_half(array)
    return array if half is None else half.astype(np.float32)
