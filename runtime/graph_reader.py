"""Read what an ONNX file holds, without the onnx package and without running anything.

Reads more strictly than ONNX Runtime: what a writer of ONNX files never writes, such as a second graph that would be
merged into the first, is refused, so that both see the same model. Field numbers are those of `onnx.proto`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from gpt2_edge.protobuf import ProtobufError, Value, fields, integer, submessage, text, varints

_DEEPEST: Final = 16  # graphs inside of graphs
_MOST_FIELDS: Final = 4_000_000
_EXTERNAL: Final = 1


@dataclass(slots=True)
class Tensor:
    """A tensor that is stored in the file or beside it.

    Attributes:
        name: Its name; "" if it is the value of an attribute.
        dims: Its shape.
        data_type: `TensorProto.DataType`.
        raw: Its bytes, if they are in the file and raw.
        typed_bytes: Size of the fields that hold its elements one by one.
        strings: Number of its strings.
        location: Name of the file that holds its bytes; None if they are in this one.
        offset: Where they begin in that file.
        length: How many they are; None if the file does not say.
    """

    name: str = ""
    dims: list[int] = field(default_factory=list)
    data_type: int = 0
    raw: memoryview | None = None
    typed_bytes: int = 0
    strings: int = 0
    location: str | None = None
    offset: int = 0
    length: int | None = None


@dataclass(slots=True)
class Node:
    """An operator: its type, domain and connections.

    Attributes:
        operator: Its type.
        domain: "" for ONNX's own.
        inputs: Names of values.
        outputs: Names of values.
        integers: Attributes that are integers or lists of them.
        tensors: Attributes that are tensors.
        graphs: Graphs that it runs.
    """

    operator: str = ""
    domain: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    integers: dict[str, list[int]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    graphs: list["Graph"] = field(default_factory=list)


@dataclass(slots=True)
class Graph:
    """Nodes and the tensors they start from."""

    nodes: list[Node] = field(default_factory=list)
    initializers: list[Tensor] = field(default_factory=list)

    def all_nodes(self) -> Iterator[Node]:
        """Yield the nodes, and those of the graphs inside of them."""
        for node in self.nodes:
            yield node
            for graph in node.graphs:
                yield from graph.all_nodes()

    def all_tensors(self) -> Iterator[Tensor]:
        """Yield the initializers and the tensors of attributes, in graphs inside of nodes too."""
        yield from self.initializers
        for node in self.nodes:
            yield from node.tensors
            for graph in node.graphs:
                yield from graph.all_tensors()


def read_graph(model: memoryview) -> Graph:
    """Return the graph of a serialized ModelProto.

    Raises:
        ProtobufError: The bytes are not a model, or one with parts that no model of ours has: functions of its own,
            training information, sparse tensors.
    """
    return _Reader().model(model)


class _Reader:
    """Reads messages and counts their fields, so that a file of nothing but tiny fields does not take forever."""

    def __init__(self) -> None:
        self._fields_left = _MOST_FIELDS

    def model(self, message: memoryview) -> Graph:
        graph: Graph | None = None
        for number, value in self._fields(message, once=(7,)):
            if number == 7:
                graph = self._graph(submessage(value), depth=1)
            elif number == 20:
                raise ProtobufError("it has training information")
            elif number == 25:
                raise ProtobufError("it has functions of its own")
        if graph is None:
            raise ProtobufError("it has no graph")
        return graph

    def _graph(self, message: memoryview, depth: int) -> Graph:
        if depth > _DEEPEST:
            raise ProtobufError("graphs are nested too deeply")
        graph = Graph()
        for number, value in self._fields(message):
            if number == 1:
                graph.nodes.append(self._node(submessage(value), depth))
            elif number == 5:
                graph.initializers.append(self._tensor(submessage(value)))
            elif number == 15:
                raise ProtobufError("it has sparse tensors")
        return graph

    def _node(self, message: memoryview, depth: int) -> Node:
        node = Node()
        for number, value in self._fields(message, once=(4, 7)):
            if number == 1:
                node.inputs.append(text(value))
            elif number == 2:
                node.outputs.append(text(value))
            elif number == 4:
                node.operator = text(value)
            elif number == 5:
                self._attribute(submessage(value), node, depth)
            elif number == 7:
                node.domain = text(value)
        return node

    def _attribute(self, message: memoryview, node: Node, depth: int) -> None:
        name = ""
        integers: list[int] = []
        for number, value in self._fields(message, once=(1, 3, 5, 6)):
            if number == 1:
                name = text(value)
            elif number in (3, 8):
                integers += self._integers(value)
            elif number in (5, 10):
                node.tensors.append(self._tensor(submessage(value)))
            elif number in (6, 11):
                node.graphs.append(self._graph(submessage(value), depth + 1))
            elif number in (22, 23):
                raise ProtobufError("it has sparse tensors")
        if integers:
            node.integers[name] = integers

    def _tensor(self, message: memoryview) -> Tensor:
        tensor = Tensor()
        external: dict[str, str] = {}
        is_external = False
        for number, value in self._fields(message, once=(2, 8, 9, 14)):
            if number == 1:
                tensor.dims += self._integers(value)
            elif number == 2:
                tensor.data_type = integer(value)
            elif number == 3:
                raise ProtobufError("it has tensors in segments")
            elif number in (4, 5, 7, 10, 11):
                tensor.typed_bytes += len(value) if isinstance(value, memoryview) else 1
            elif number == 6:
                tensor.strings += 1
            elif number == 8:
                tensor.name = text(value)
            elif number == 9:
                tensor.raw = submessage(value)
            elif number == 13:
                self._external(submessage(value), external)
            elif number == 14:
                is_external = integer(value) == _EXTERNAL
        if external and not is_external:
            raise ProtobufError(f"{tensor.name} has a place in another file but is said to be in this one")
        if is_external:
            tensor.location = external.get("location", "")
            tensor.offset = _natural(external.get("offset", "0"))
            tensor.length = _natural(external["length"]) if "length" in external else None
        return tensor

    def _external(self, message: memoryview, external: dict[str, str]) -> None:
        entry = {number: text(value) for number, value in self._fields(message, once=(1, 2))}
        key = entry.get(1, "")
        if key in external:
            raise ProtobufError(f"a tensor has two places: {key} is there twice")
        external[key] = entry.get(2, "")

    def _integers(self, value: Value) -> list[int]:
        """Return an integer, or a packed list of them."""
        if isinstance(value, int):
            return [integer(value)]
        numbers = [integer(each) for each in varints(value)]
        self._count(len(numbers))
        return numbers

    def _fields(self, message: memoryview, once: tuple[int, ...] = ()) -> Iterator[tuple[int, Value]]:
        seen = set()
        for number, value in fields(message):
            self._count(1)
            if number in once:
                if number in seen:
                    raise ProtobufError(f"field {number} is there twice")
                seen.add(number)
            yield number, value

    def _count(self, count: int) -> None:
        self._fields_left -= count
        if self._fields_left < 0:
            raise ProtobufError(f"it has more than {_MOST_FIELDS:,} fields")


def _natural(digits: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        raise ProtobufError(f"a tensor's place is {digits[:40]!r}, not a number")
    return int(digits)
