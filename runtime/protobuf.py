"""The wire format of protocol buffers, read strictly and without the protobuf package.

Source: https://protobuf.dev/programming-guides/encoding/. Only what a writer of ONNX files writes is accepted: no
groups, no field numbers or lengths that do not fit.
"""

from collections.abc import Iterator

Value = int | memoryview


class ProtobufError(ValueError):
    """The bytes are not a message."""


def fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Yield the number and the value of each field: an integer, or bytes (strings and messages; 4- and 8-byte numbers).

    Raises:
        ProtobufError: The bytes are not a message.
    """
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if not 1 <= number < 1 << 29:
            raise ProtobufError(f"field number {number}")
        if wire_type == 0:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ProtobufError(f"wire type {wire_type}")
        if size > end - position:
            raise ProtobufError("a field is longer than its message")
        yield number, message[position : position + size]
        position += size


def varints(packed: memoryview) -> Iterator[int]:
    """Yield the integers of a packed field."""
    position = 0
    while position < len(packed):
        value, position = _varint(packed, position)
        yield value


def text(value: Value) -> str:
    """Return a string field.

    Raises:
        ProtobufError: It is not one.
    """
    try:
        return bytes(submessage(value)).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ProtobufError("a string is not UTF-8") from error


def submessage(value: Value) -> memoryview:
    """Return a field that must be bytes.

    Raises:
        ProtobufError: It is an integer.
    """
    if isinstance(value, int):
        raise ProtobufError("a number where bytes belong")
    return value


def integer(value: Value) -> int:
    """Return a field that must be an integer, as int64.

    Raises:
        ProtobufError: It is bytes.
    """
    if not isinstance(value, int):
        raise ProtobufError("bytes where a number belongs")
    return value - (1 << 64) if value >= 1 << 63 else value


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 1 << 64:
                raise ProtobufError("a number of more than 64 bits")
            return value, position
        shift += 7
    raise ProtobufError("a number does not end")
