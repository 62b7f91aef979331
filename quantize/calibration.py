"""The inputs of each matrix over a calibration text, as the matrices before it give them: rounded ones, once they are.

The graph is run piece by piece, from one matrix's input to the next one's, over all windows of the text. So the model
is computed once, however many matrices it has, and a piece begins with what the pieces before it really gave.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
from onnx_ir import Model, Node, Value

from gpt2_edge.errors import QuantizationError
from gpt2_edge.graph_names import key_value_names
from gpt2_edge.manifest import Architecture
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.threads import usable_cores

Hessian = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.float32]

_Array = npt.NDArray[Any]


class CalibrationRun:
    """One run of a fused graph over windows of tokens, each predicted on its own.

    What later pieces need is kept for all windows: at most 4 * (width + inner_width) bytes a token, which are 15 kB at
    the 124M shape.

    Args:
        model: The graph. A matrix may be replaced once its input was asked for.
        architecture: Its shape.
        windows: Token ids, at least one window, none longer than the context.
    """

    def __init__(self, model: Model, architecture: Architecture, windows: Sequence[Sequence[int]]) -> None:
        self._model = model
        self._architecture = architecture
        self._windows = windows
        self._inputs = [_graph_inputs(architecture, window) for window in windows]
        self._live: list[dict[Value, _Array]] = [{} for _ in windows]
        self._computed: set[Node] = set()

    @property
    def tokens(self) -> int:
        """How many vectors every value has, in all windows together."""
        return sum(map(len, self._windows))

    def of_a_copy(self) -> "CalibrationRun":
        """Return a run of the graph as it is now, whatever is changed afterwards."""
        copy = Model(self._model.graph.clone(), ir_version=self._model.ir_version)
        return CalibrationRun(copy, self._architecture, self._windows)

    def vectors(self, value: Value) -> list[FloatArray]:
        """Return what a value is, for each window of shape [tokens, width].

        Args:
            value: What a matrix is multiplied with. Ask in the order of the graph.
        """
        self.advance_to(value)
        return [_vectors(live[value]) for live in self._live]

    def mean(self, value: Value) -> FloatArray:
        """Return the mean of the vectors that a value has in all windows, shape [width].

        Args:
            value: What a matrix is multiplied with. Ask in the order of the graph.

        Raises:
            QuantizationError: The model computes numbers that are not finite.
        """
        self.advance_to(value)
        total = np.zeros(self._live[0][value].shape[-1], np.float64)
        count = 0
        for live in self._live:
            vectors = _vectors(live[value])
            total += vectors.sum(axis=0, dtype=np.float64)
            count += len(vectors)
        if not np.isfinite(total).all():
            raise QuantizationError(f"the model computes numbers that are not finite before {value.name}")
        return (total / count).astype(np.float32)

    def largest_distances(self, value: Value, mean: FloatArray) -> FloatArray:
        """Return how far each element of the vectors gets from a mean, shape [width]."""
        self.advance_to(value)
        largest: FloatArray = np.max([np.abs(_vectors(live[value]) - mean).max(axis=0) for live in self._live], axis=0)
        return largest

    def hessian(self, value: Value, mean: FloatArray | None = None) -> Hessian:
        """Return X^T X of the vectors X [tokens, width] that a value has in all windows.

        Args:
            value: What a matrix is multiplied with. Ask in the order of the graph.
            mean: Subtracted from each vector; None for none.

        Returns:
            Shape [width, width]: products of each window in float32, summed in float64.

        Raises:
            QuantizationError: The model computes numbers that are not finite.
        """
        self.advance_to(value)
        total = np.zeros(2 * self._live[0][value].shape[-1:], np.float64)
        for live in self._live:
            vectors = _vectors(live[value]) if mean is None else _vectors(live[value]) - mean
            total += vectors.T @ vectors
        if not np.isfinite(total).all():
            raise QuantizationError(f"the model computes numbers that are not finite before {value.name}")
        return total

    def compare(self, value: Value, mean: FloatArray, original: "CalibrationRun") -> tuple[FloatArray, Hessian]:
        """Return how the vectors X [tokens, width] of a value differ from those it has in another graph.

        Args:
            value: As in `hessian`.
            mean: Of the vectors.
            original: Over the same text, and a graph that has a value of the same name. Ask in its order.

        Returns:
            The mean of the differences D, those of the other graph less these, shape [width]; and (X - mean)^T D,
            shape [width, width].
        """
        theirs = original.value_named(_name(value))
        self.advance_to(value)
        original.advance_to(theirs)
        total = np.zeros(len(mean), np.float64)
        products = np.zeros((len(mean), len(mean)), np.float64)
        for live, original_live in zip(self._live, original._live, strict=True):
            vectors = _vectors(live[value])
            difference = _vectors(original_live[theirs]) - vectors
            total += difference.sum(axis=0, dtype=np.float64)
            products += (vectors - mean).T @ difference
        return (total / self.tokens).astype(np.float32), products

    def value_named(self, name: str) -> Value:
        """Return the value of the graph that has a name."""
        found = next((each for node in self._model.graph for each in node.outputs if each.name == name), None)
        if found is None:
            raise ValueError(f"the graph computes no {name}")
        return found

    def transform(self, value: Value, mean: FloatArray, scales: FloatArray) -> None:
        """Let a computed value be `(value - mean) / scales`, as the graph that was changed since gives it."""
        for live in self._live:
            live[value] = (live[value] - mean) / scales

    def advance_to(self, value: Value) -> None:
        """Compute the pieces up to a value, for all windows."""
        if value in self._live[0]:
            return
        new: list[Node] = []
        for node in self._model.graph:
            if node not in self._computed:
                new.append(node)
            if node is value.producer():
                break
        known = set(self._live[0])
        used = dict.fromkeys(each for node in new for each in node.inputs if each is not None)
        given = [each for each in used if each in known or each.is_graph_input()]
        self._computed.update(new)
        made = [each for node in new for each in node.outputs if each is value or self._is_needed(each)]
        session = _session(self._model, given, made)
        for inputs, live in zip(self._inputs, self._live, strict=True):
            feeds = {_name(each): live[each] if each in known else inputs[_name(each)] for each in given}
            results = session.run([_name(each) for each in made], feeds)
            for each in [each for each in live if not self._is_needed(each)]:
                del live[each]
            live.update(zip(made, results, strict=True))

    def _is_needed(self, value: Value) -> bool:
        return any(node not in self._computed for node in value.consumers())


def _vectors(array: FloatArray) -> FloatArray:
    return array.reshape(-1, array.shape[-1])


def _graph_inputs(architecture: Architecture, window: Sequence[int]) -> dict[str, _Array]:
    count = len(window)
    cache = np.zeros((1, architecture.heads, count, architecture.head_size), np.float32)
    past, _ = key_value_names(architecture.layers)
    return {
        "input_ids": np.array([window], np.int64),
        "position_ids": np.arange(count, dtype=np.int64)[np.newaxis],
        "seqlens_k": np.array([count - 1], np.int32),
        "total_sequence_length": np.array(count, np.int32),
        "logit_positions": np.arange(count, dtype=np.int64),
        **dict.fromkeys(past, cache),
    }


def _session(model: Model, given: Iterable[Value], made: Iterable[Value]) -> Any:
    """Return a session over the part of a graph between some values and others."""
    graph = onnx_ir.convenience.extract(model.graph, list(given), list(made))
    for value in graph.initializers.values():
        if isinstance(value.const_value, onnx_ir.ExternalTensor):
            value.const_value = onnx_ir.tensor(value.const_value.numpy(), name=value.name)
    part = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=model.ir_version))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        part.SerializeToString(), options, ["CPUExecutionProvider"], disabled_optimizers=["SkipLayerNormFusion"]
    )


def _name(value: Value) -> str:
    if value.name is None:
        raise QuantizationError("the graph has a value without a name: export the model again")
    return value.name
