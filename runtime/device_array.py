"""Arrays in a device's memory, and views of some of their rows."""

import ctypes
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.onnxruntime_import import onnxruntime

_CAPSULE_NAME: Final = b"dltensor"
_LARGEST_UPLOAD_BYTES: Final = 1 << 26


class DeviceArray:
    """An array that ONNX Runtime allocates on a device; nothing of it is set until it is written.

    Args:
        shape: Its shape; what can be viewed are rows of the first dimension.
        dtype: Its type.
        device: ONNX Runtime's name of the device type, "cuda" or "cpu".
        device_index: Which of them.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike, device: str, device_index: int) -> None:
        self.value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(
            shape, np.dtype(dtype).type, device, device_index
        )
        self._shape, self._dtype = shape, np.dtype(dtype)
        self._row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * self._dtype.itemsize

    def rows(self, first: int, count: int) -> Any:
        """Return an ONNX Runtime value over the memory of some consecutive rows.

        ONNX Runtime hands memory on in DLPack's form; what that says is narrowed before it is taken back. The new
        value keeps the whole array's memory alive.
        """
        capsule = self.value.__dlpack__()
        tensor = _DLTensor.from_address(_capsule_pointer(capsule, _CAPSULE_NAME))
        tensor.data += first * self._row_bytes
        # The shape is the array's own, which must not change; it is copied while the capsule is taken back.
        own_shape, shape = tensor.shape, (ctypes.c_int64 * len(self._shape))(count, *self._shape[1:])
        tensor.shape = ctypes.cast(shape, ctypes.POINTER(ctypes.c_int64))
        value = onnxruntime.OrtValue.from_dlpack(capsule)
        tensor.shape = own_shape
        return value

    def clear(self) -> None:
        """Set everything to zero."""
        at_once = max(1, _LARGEST_UPLOAD_BYTES // max(1, self._row_bytes))
        for first in range(0, self._shape[0], at_once):
            count = min(at_once, self._shape[0] - first)
            self.rows(first, count).update_inplace(np.zeros((count, *self._shape[1:]), self._dtype))


class _DLTensor(ctypes.Structure):
    """DLPack's description of a tensor: https://dmlc.github.io/dlpack/latest/c_api.html."""

    _fields_ = (
        ("data", ctypes.c_uint64),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype", ctypes.c_uint32),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
    )


_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
