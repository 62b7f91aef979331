"""What every rewriting of a graph needs: constants, and putting one value in the place of another."""

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Graph, Node, Value

from gpt2_edge.errors import QuantizationError

MOVING: Final = ("Reshape", "Gather")  # operators that give the numbers they get


class NewNodes:
    """Nodes that are made one after another, to be put into a graph or into a branch of it together.

    Args:
        name: What the names of the nodes and of their outputs begin with.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[Node] = []

    def node(
        self,
        operator: str,
        inputs: Sequence[Value | None],
        *,
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> Sequence[Value]:
        """Add a node and return its outputs."""
        name = f"{self.name}.{len(self.nodes)}.{operator}"
        made = onnx_ir.node(operator, inputs, attributes, domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(made.outputs):
            output.name = f"{name}.{index}"
        self.nodes.append(made)
        return made.outputs

    def value(self, operator: str, inputs: Sequence[Value | None], **attributes: Any) -> Value:
        """Add a node of one output, of ONNX's own operators, and return that."""
        return self.node(operator, inputs, **attributes)[0]


def constant(graph: Graph, name: str, array: npt.NDArray[np.generic] | np.generic) -> Value:
    """Return the constant of that name, which is made if there is none yet."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = onnx_ir.val(name, const_value=onnx_ir.tensor(np.asarray(array), name=name))
    graph.register_initializer(value)
    return value


def array_of(value: Value | None) -> npt.NDArray[np.float32]:
    """Return the numbers of a weight.

    Raises:
        QuantizationError: The value is not a weight.
    """
    if value is None or value.const_value is None:
        raise QuantizationError(f"{name_of(value)} is not a weight: export the model again")
    return np.asarray(value.const_value.numpy(), np.float32)


def replace_nodes(graph: Graph, old: Iterable[Node], output: Value, new: Value) -> None:
    """Let `new` take the place, name and type of `output`, and remove the nodes that computed that."""
    new.name, new.type, new.shape = output.name, output.type, output.shape
    output.name = None
    onnx_ir.convenience.replace_all_uses_with(output, new, replace_graph_outputs=True)
    graph.remove(old, safe=True)


def replace_weight(graph: Graph, node: Node, index: int, array: npt.NDArray[np.float32]) -> None:
    """Give one node another weight; other nodes keep the old one."""
    old = node.inputs[index]
    name = name_of(old)
    if old is None or len(old.uses()) > 1:
        name = next(new for number in count(1) if (new := f"{name}.{number}") not in graph.initializers)
    else:
        del graph.initializers[name]
    node.replace_input_with(index, constant(graph, name, array.astype(np.float32)))


def source_of(value: Value) -> Node:
    """Return the node that computes the numbers of a value, whatever reshaped them or picked rows out.

    Raises:
        ValueError: The graph does not compute it.
    """
    producer = value.producer()
    while producer is not None and producer.op_type in MOVING and (inner := producer.inputs[0]) is not None:
        value, producer = inner, inner.producer()
    if producer is None:
        raise ValueError(f"{name_of(value)} is not computed by the graph")
    return producer


def only_consumer(value: Value) -> Node | None:
    """Return the node that uses a value, if there is just one."""
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and not value.is_graph_output() else None


def is_weight(value: Value | None) -> bool:
    """Tell whether a value is a constant of the graph."""
    return value is not None and value.is_initializer()


def graph_input(graph: Graph, name: str) -> Value | None:
    """Return the input of that name, if there is one."""
    return next((value for value in graph.inputs if value.name == name), None)


def name_of(value: Value | None) -> str:
    """Return the name of a value, for messages and for names of what is made of it."""
    return "(no value)" if value is None or value.name is None else value.name
