"""Write the few parts of an ONNX graph that this package adds to one, without the onnx package.

Field numbers are those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto. What is written here is a message of
its own; appended to the bytes of a model, it adds to the model's graph: of two messages of one kind in a row, a reader
of protocol buffers merges the fields and lists what is repeated of both.
Source: https://protobuf.dev/programming-guides/encoding/#last-one-wins.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

_FLOAT: Final = 1  # of TensorProto.DataType
_DATA_TYPES: Final = {np.dtype(np.float32): _FLOAT, np.dtype(np.int64): 7}
_INT: Final = 2  # of AttributeProto.AttributeType


def model_part(nodes: Sequence[bytes], initializers: Sequence[bytes], outputs: Sequence[bytes]) -> bytes:
    """Return what adds nodes, initializers and outputs to a model's graph when it is appended to the model.

    Args:
        nodes: As `node` returns them, each after those whose outputs it takes.
        initializers: As `initializer` returns them.
        outputs: As `float_output` returns them.
    """
    graph = [_field(1, each) for each in nodes]
    graph += [_field(5, each) for each in initializers]
    graph += [_field(12, each) for each in outputs]
    return _field(7, b"".join(graph))


def node(operator: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    """Return a node of ONNX's own domain, named as its output."""
    parts = [_field(1, name.encode()) for name in inputs]
    parts += [_field(2, output.encode()), _field(3, output.encode()), _field(4, operator.encode())]
    parts += [
        _field(5, _field(1, name.encode()) + _number(3, value) + _number(20, _INT))
        for name, value in attributes.items()
    ]
    return b"".join(parts)


def initializer(name: str, values: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> bytes:
    """Return a constant."""
    little_endian = values.astype(values.dtype.newbyteorder("<"))
    dimensions = b"".join(_number(1, size) for size in values.shape)
    return (
        dimensions
        + _number(2, _DATA_TYPES[values.dtype])
        + _field(8, name.encode())
        + _field(9, little_endian.tobytes())
    )


def float_output(name: str, shape: Sequence[int | str]) -> bytes:
    """Return a float32 output of the graph; a dimension is a size or the name of one that is not fixed."""
    dimensions = [_number(1, size) if isinstance(size, int) else _field(2, size.encode()) for size in shape]
    tensor_type = _number(1, _FLOAT) + _field(2, b"".join(_field(1, each) for each in dimensions))
    return _field(1, name.encode()) + _field(2, _field(1, tensor_type))


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
