"""One ONNX Runtime session over a standard graph, as optimum makes it: keys and values go in, and come out longer.

Each run concatenates the new keys and values to those of all tokens before, so what a run left is what the next one
is given; it is never changed, and slots only refer to it. Rows that hold equally many tokens run as one batch. Others
run one after another: padding would make them a batch too, but would change their logits in the last bits, and a row
gets the same tokens alone and in company.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.graph_reader import read_graph
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.row_limit import ROWS_OF_ANY_MACHINE
from gpt2_edge.session import Logits, check_onnxruntime_version, create_session, first_line

# `past_key_values.0.key` and `present.0.key`; the names before the number have changed over the years.
_CACHE_NAME: Final = re.compile(r"[a-z_]+\.(\d{1,5})\.(key|value)")
_BATCH_WIDE_OPERATORS: Final = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
_CHECKED_TOKENS: Final = 8
# Of the standard deviation of the logits. The storyteller has 0 at fp32 and 0.05 with optimum's dynamic INT8, whose
# rounding depends on the tokens that go together; without regard to the past it has 0.4.
_ALLOWED_DIFFERENCE: Final = 1e-3
_ALLOWED_DIFFERENCE_OF_INTEGERS: Final = 0.25
_OPTIONAL_INPUTS: Final = {
    "attention_mask": ("tensor(int64)", 2),
    "position_ids": ("tensor(int64)", 2),
    "use_cache_branch": ("tensor(bool)", 1),
}

_Signature = tuple[str, list[int | None]]  # element type and dimensions, None for free ones


@dataclass(frozen=True, slots=True)
class _Batch:
    """Keys and values as a run left them.

    Attributes:
        values: Key and value of layer 0, of layer 1, ..., each of shape [rows, heads, tokens, head_size].
        memory: What they lie in, if it is not ONNX Runtime's; not every version of it keeps what it was given.
    """

    values: list[Any]
    memory: Sequence[npt.NDArray[np.float32]] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and tokens."""
        rows, _, tokens, _ = self.values[0].shape()
        return rows, tokens


@dataclass(frozen=True, slots=True)
class _Place:
    """A slot's row of a batch."""

    batch: _Batch
    row: int


class StandardStepSession:
    """Runs prefill and decode steps; has the same methods as `StepSession`.

    Not thread-safe: one step at a time.

    Args:
        folder: An opened model folder of the standard flavour.
        threads: Threads that compute a step, the calling one among them.

    Raises:
        ModelFolderError: ONNX Runtime cannot load the graph, or it is not a graph that this class drives.
    """

    most_slots: Final = ROWS_OF_ANY_MACHINE  # each step copies the keys and values of all rows

    def __init__(self, folder: ModelFolder, threads: int) -> None:
        check_onnxruntime_version(folder)
        self.architecture = folder.manifest.architecture
        self._graph_path = folder.graph_path
        self._session = create_session(folder, threads)
        self._inputs = {node.name for node in self._session.get_inputs()}
        self._past_names, self._present_names = _check_signature(folder, self._session)
        self._rows_are_independent = not _has_batch_wide_scales(folder)
        self._empty = self._empty_batch()
        self._places = [_Place(self._empty, 0)]
        self._options = onnxruntime.RunOptions()
        self._check_past()

    @property
    def slots(self) -> int:
        """How many sequences there is room for."""
        return len(self._places)

    @property
    def spare_slots(self) -> int:
        """How many slots `release_spare_slots` would give back."""
        return self.slots - 1

    def reserve_slots(self, slots: int, lengths: Mapping[int, int]) -> None:
        """Make room for at least this many sequences; all that are there are kept."""
        self._places += [_Place(self._empty, 0)] * (slots - len(self._places))

    def release_spare_slots(self) -> None:
        """Give all memory back; what the slots held is lost."""
        self._places = [_Place(self._empty, 0)]

    def prefill(self, slot: int, tokens: Sequence[int], start: int, logit_positions: npt.NDArray[np.int64]) -> Logits:
        """Compute some consecutive tokens of one sequence; see `StepSession.prefill`."""
        logits: Logits = self._step([slot], np.array([tokens], np.int64), start)[0, logit_positions]
        return logits

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """Compute one more token for each of the first slots; see `StepSession.decode`."""
        groups = self._groups(lengths)
        if len(groups) == 1:
            return self._step(groups[0], np.array(tokens, np.int64)[:, np.newaxis], lengths[0])[:, 0]
        logits = np.empty((len(tokens), self.architecture.vocabulary_size), np.float32)
        for slots in groups:
            chosen = np.array([[tokens[slot]] for slot in slots], np.int64)
            logits[slots] = self._step(slots, chosen, lengths[slots[0]])[:, 0]
        return logits

    def terminate_prefill(self) -> None:
        """Make the step that runs in another thread fail soon; no effect on any other."""
        self._options.terminate = True

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Let a slot hold what another one holds."""
        self._places[target] = self._places[source]

    def save(self, slot: int, length: int) -> SequenceCache:
        """Return a copy of the first `length` tokens of a slot."""
        place = self._places[slot]
        return SequenceCache([value.numpy()[place.row, :, :length].copy() for value in place.batch.values])

    def restore(self, slot: int, sequence: SequenceCache, length: int) -> None:
        """Put the first `length` tokens of a saved sequence into a slot."""
        self._places[slot] = _Place(_batch_over([array[np.newaxis, :, :length] for array in sequence.arrays]), 0)

    def close(self) -> None:
        """Free the graph, the weights and the cache; nothing else may be called after."""
        self._places.clear()
        del self._session

    def _groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Return the slots that run together."""
        if not self._rows_are_independent:
            return [[slot] for slot in range(len(lengths))]
        slots_of_length = defaultdict(list)
        for slot, length in enumerate(lengths):
            slots_of_length[length].append(slot)
        return list(slots_of_length.values())

    def _step(self, slots: Sequence[int], tokens: npt.NDArray[np.int64], past_tokens: int) -> Logits:
        """Run slots that hold `past_tokens` tokens each.

        Args:
            slots: Which.
            tokens: New token ids, shape [slots, new].
            past_tokens: How many are before them.

        Returns:
            Logits, shape [slots, new, vocabulary].
        """
        past = self._past(slots, past_tokens)
        rows, new = tokens.shape
        whole = past_tokens + new
        inputs = {
            "input_ids": tokens,
            "attention_mask": np.ones((rows, whole), np.int64),
            "position_ids": np.tile(np.arange(past_tokens, whole, dtype=np.int64), (rows, 1)),
            "use_cache_branch": np.array([past_tokens > 0]),
        }
        binding = self._session.io_binding()
        for name, array in inputs.items():
            if name in self._inputs:
                binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
        for name, value in zip(self._past_names, past.values, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *self._present_names):
            binding.bind_output(name, "cpu")
        self._options = onnxruntime.RunOptions()
        self._session.run_with_iobinding(binding, self._options)
        logits, *present = binding.get_outputs()
        self._check_shapes(logits, present, rows, new, whole)
        batch = _Batch(present)
        for row, slot in enumerate(slots):
            self._places[slot] = _Place(batch, row)
        result: Logits = logits.numpy()
        return result

    def _past(self, slots: Sequence[int], tokens: int) -> _Batch:
        """Return the first tokens of some slots as one batch, which mostly is the one that the last step left."""
        places = [self._places[slot] for slot in slots]
        batch = places[0].batch
        if batch.shape == (len(slots), tokens) and all(
            place.batch is batch and place.row == row for row, place in enumerate(places)
        ):
            return batch
        rows = [(place.batch.values, slice(place.row, place.row + 1)) for place in places]
        return _batch_over(
            [
                np.concatenate([values[index].numpy()[row, :, :tokens] for values, row in rows])
                for index in range(2 * self.architecture.layers)
            ]
        )

    def _check_past(self) -> None:
        """Compute a few tokens at once and in two parts: a graph that uses its past otherwise is refused.

        Raises:
            ModelFolderError: The results differ, or the graph cannot be run.
        """
        count = min(_CHECKED_TOKENS, self.architecture.context_length)
        if count < 2:
            return
        tokens = [7919 * position % self.architecture.vocabulary_size for position in range(count)]
        first = count // 2
        try:
            expected = self.prefill(0, tokens, 0, np.arange(first, count))
            self._places[0] = _Place(self._empty, 0)
            self.prefill(0, tokens[:first], 0, np.arange(0))
            found = self.prefill(0, tokens[first:], first, np.arange(count - first))
        except ModelFolderError:
            raise
        except Exception as error:
            raise ModelFolderError(f"ONNX Runtime cannot run {self._graph_path}: {first_line(error)}") from error
        finally:
            self.release_spare_slots()
        difference = float(np.sqrt(np.square(found - expected).mean()) / expected.std())
        allowed = _ALLOWED_DIFFERENCE if self._rows_are_independent else _ALLOWED_DIFFERENCE_OF_INTEGERS
        # Written so that NaN fails as well.
        if not difference <= allowed:
            raise ModelFolderError(
                f"{self._graph_path} computes other logits with a past than without: they differ by {difference:.2g} "
                f"of their spread, allowed is {allowed:g}; export the model again"
            )

    def _empty_batch(self) -> _Batch:
        shape = (1, self.architecture.heads, 0, self.architecture.head_size)
        return _batch_over([np.empty(shape, np.float32) for _ in range(2 * self.architecture.layers)])

    def _check_shapes(self, logits: Any, present: Sequence[Any], rows: int, new: int, whole: int) -> None:
        """Refuse results that the declared, free dimensions allowed and that are not what the graph is taken for."""
        expected_logits = [rows, new, self.architecture.vocabulary_size]
        expected = [rows, self.architecture.heads, whole, self.architecture.head_size]
        found = [value.shape() for value in present]
        if logits.shape() != expected_logits or any(shape != expected for shape in found):
            wrong = next((shape for shape in found if shape != expected), expected)
            raise ModelFolderError(
                f"{self._graph_path} computed logits of shape {logits.shape()} and keys and values of {wrong}, "
                f"expected {expected_logits} and {expected}: export the model again"
            )


def _has_batch_wide_scales(folder: ModelFolder) -> bool:
    """Tell whether a graph rounds activations by one scale for a whole batch, so that rows change each other."""
    graph = read_graph(folder.content(folder.manifest.graphs["decoder"]).view())
    return any(node.operator in _BATCH_WIDE_OPERATORS for node in graph.all_nodes())


def _batch_over(arrays: Sequence[npt.NDArray[np.float32]]) -> _Batch:
    memory = [np.ascontiguousarray(array) for array in arrays]
    return _Batch([onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in memory], memory)


def _check_signature(folder: ModelFolder, session: Any) -> tuple[list[str], list[str]]:
    """Compare the graph's inputs and outputs with what this class gives and takes.

    Returns:
        The names of the cache's inputs and of its outputs: key and value of layer 0, of layer 1, ...

    Raises:
        ModelFolderError: They differ.
    """
    architecture = folder.manifest.architecture
    problems: list[str] = []
    inputs = {node.name: node for node in session.get_inputs()}
    outputs = {node.name: node for node in session.get_outputs()}
    past, present = _cache_names(inputs), _cache_names(outputs)
    if not past:
        problems.append(
            "it takes no keys and values of earlier tokens, such as past_key_values.0.key: "
            "export it with optimum's task text-generation-with-past"
        )
    for kind, names in (("inputs", past), ("outputs", present)):
        if past and len(names) != 2 * architecture.layers:
            problems.append(f"its {kind} have {len(names)} keys and values, {architecture.layers} layers need 2 each")
    cache: _Signature = ("tensor(float)", [None, architecture.heads, None, architecture.head_size])
    expected: dict[str, _Signature] = {
        "input_ids": ("tensor(int64)", [None, None]),
        **{name: (kind, [None] * rank) for name, (kind, rank) in _OPTIONAL_INPUTS.items() if name in inputs},
        **dict.fromkeys(past, cache),
    }
    problems += _differences("input", expected, inputs)
    logits: _Signature = ("tensor(float)", [None, None, architecture.vocabulary_size])
    problems += _differences("output", {"logits": logits, **dict.fromkeys(present, cache)}, outputs)
    if problems:
        raise ModelFolderError(f"{folder.graph_path} is not a GPT-2 that can be run: {'; '.join(problems[:3])}")
    return past, present


def _cache_names(names: Mapping[str, Any]) -> list[str]:
    found = [(int(match[1]), match[2], match[0]) for match in map(_CACHE_NAME.fullmatch, names) if match]
    return [name for _, _, name in sorted(found)]


def _differences(kind: str, expected: Mapping[str, _Signature], found: Mapping[str, Any]) -> list[str]:
    """Say which are missing, unknown or of another type; free dimensions agree with every size."""
    problems = [f"the {kind} {name} is missing" for name in expected if name not in found]
    if kind == "input":
        problems += [f"the input {name} is unknown" for name in found if name not in expected]
    for name, (element_type, shape) in expected.items():
        if name in found:
            actual = [size if isinstance(size, int) else None for size in found[name].shape]
            agrees = len(actual) == len(shape) and all(
                None in (size, other) or size == other for size, other in zip(actual, shape, strict=True)
            )
            if found[name].type != element_type or not agrees:
                problems.append(f"the {kind} {name} is {found[name].type} {actual}, expected {element_type} {shape}")
    return problems
