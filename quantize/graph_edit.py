"""What every rewriting of a graph needs: constants, and putting one value in the place of another."""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Graph, Node, Value

from gpt2_edge.errors import QuantizationError


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
