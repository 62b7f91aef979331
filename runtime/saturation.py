"""Whether this processor's products of unsigned and signed 8-bit integers saturate.

x86 processors with AVX2 but without VNNI add two such products in 16 bits, and ONNX Runtime lets them.
"""

from functools import cache
from typing import Final

import numpy as np

from gpt2_edge.onnxruntime_import import onnxruntime

# One MatMulInteger of `a` uint8 [1, 32] and `w` int8 [32, 16].
_GRAPH: Final = (
    b'\x08\n:\\\n\x18\n\x01a\n\x01w\x12\x01y"\rMatMulInteger\x12\x01gZ\x13\n\x01a\x12\x0e\n\x0c\x08\x02\x12\x08\n\x02'
    b"\x08\x01\n\x02\x08 Z\x13\n\x01w\x12\x0e\n\x0c\x08\x03\x12\x08\n\x02\x08 \n\x02\x08\x10b\x13\n\x01y\x12\x0e\n\x0c"
    b"\x08\x06\x12\x08\n\x02\x08\x01\n\x02\x08\x10B\x04\n\x00\x10\x15"
)
_ROWS: Final = 32


@cache
def products_saturate() -> bool:
    """Multiply the largest integers, and see whether the sum is right; takes a few milliseconds, once a process."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_GRAPH, options, providers=["CPUExecutionProvider"])
    inputs = {"a": np.full((1, _ROWS), 255, np.uint8), "w": np.full((_ROWS, 16), 127, np.int8)}
    return bool((session.run(None, inputs)[0] != 255 * 127 * _ROWS).any())
