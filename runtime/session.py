"""One ONNX Runtime session over a fused graph: token ids in, logits out, keys and values updated in place.

Knows the graph's inputs and outputs, threads and bindings; knows nothing about text, sampling or who asks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from gpt2_edge.attention_path import whole_matrix_attention
from gpt2_edge.batch_rule import BatchRule, batch_rule
from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.free_memory import free_memory_bytes
from gpt2_edge.graph_names import key_value_names
from gpt2_edge.graph_reader import Graph
from gpt2_edge.graph_session import open_graph
from gpt2_edge.kv_cache import KVCache, SequenceCache
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.row_limit import rows_that_fit
from gpt2_edge.saturation import products_saturate

Logits = npt.NDArray[np.float32]

_SPIN_MICROSECONDS: Final = "1000"


class _CacheType(NamedTuple):
    numpy: npt.DTypeLike
    onnxruntime: str


_CACHE_TYPES: Final = {
    "fp32": _CacheType(np.float32, "tensor(float)"),
    "fp16": _CacheType(np.float16, "tensor(float16)"),
    "int8": _CacheType(np.int8, "tensor(int8)"),
}


class StepSession:
    """Runs prefill and decode steps over a KV cache with slots.

    Not thread-safe: one step at a time.

    Args:
        folder: An opened model folder.
        threads: Threads that compute a step, the calling one among them.

    Attributes:
        most_slots: How many sequences there may be room for.

    Raises:
        ModelFolderError: ONNX Runtime cannot load the graph, or it is not a graph that this class drives.
    """

    def __init__(self, folder: ModelFolder, threads: int) -> None:
        check_onnxruntime_version(folder)
        self.architecture = folder.manifest.architecture
        self._cache_type = _CACHE_TYPES[folder.manifest.cache_precision].numpy
        self.threads = threads
        self._session = create_session(folder, threads, self._inspect)
        check_signature(folder, self._session)
        self._key_value_inputs, self._key_value_outputs = key_value_names(self.architecture.layers)
        try:
            self._cache = KVCache(self.architecture, 1, self._cache_type)
        except (MemoryError, ValueError) as error:
            raise ModelFolderError(
                f"there is no memory for the KV cache of {folder.path}, whose manifest has context_length "
                f"{self.architecture.context_length}: {error}"
            ) from error
        self.most_slots = rows_that_fit(self._cache.bytes_of_a_slot, free_memory_bytes())
        self._decode_steps: dict[int, _DecodeStep] = {}
        self._prefill_bindings: dict[int, Any] = {}
        self._gives_same_bits: dict[int, bool] = {}  # by the class of prompts of a batch
        self._prefill_options = onnxruntime.RunOptions()

    @property
    def slots(self) -> int:
        """How many sequences there is room for."""
        return self._cache.slots

    @property
    def spare_slots(self) -> int:
        """How many slots `release_spare_slots` would give back."""
        return self.slots - 1

    def reserve_slots(self, slots: int, lengths: Mapping[int, int]) -> None:
        """Make room for at least this many sequences.

        Args:
            slots: How many are needed.
            lengths: The slots in use and how many tokens each holds, which are kept.
        """
        if slots > self._cache.slots:
            self._replace_cache(slots, lengths)

    def release_spare_slots(self) -> None:
        """Give the memory of all slots but one back; what they held is lost."""
        if self._cache.slots > 1:
            self._replace_cache(1, {})

    def prefill(self, slot: int, tokens: Sequence[int], start: int, logit_positions: npt.NDArray[np.int64]) -> Logits:
        """Compute some consecutive tokens of one sequence.

        Args:
            slot: Where the sequence lives; its first `start` tokens must have been computed.
            tokens: Token ids, at positions `start`, `start + 1`, ...
            start: Number of tokens before them.
            logit_positions: Indices into `tokens` after which logits are wanted; may be empty.

        Returns:
            Logits, shape [len(logit_positions), vocabulary].
        """
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._bind_cache(self._cache, slot, 1)
        return self._run_prefill(binding, prefill_inputs(tokens, start, logit_positions))

    def batch_class(self, tokens: int) -> int | None:
        """Return a number that prompts have in common which may be computed in one run; None: one is computed alone.

        Whether a row gets the bits that it gets alone depends on the kernels that ONNX Runtime has for this processor.
        So it is tried out, once for each class.

        Args:
            tokens: Of the prompt.
        """
        found = self._batch_rule.batch_class(tokens)
        if found is None:
            return None
        if found not in self._gives_same_bits:
            self._gives_same_bits[found] = self._try_batch(self._batch_rule.example_lengths(found))
        return found if self._gives_same_bits[found] else None

    def prefill_batch(
        self, first_slot: int, prompts: Sequence[Sequence[int]], logit_positions: Sequence[npt.NDArray[np.int64]]
    ) -> Logits:
        """Compute several whole prompts, each into a slot of its own.

        What a slot holds after its prompt, up to the length of the longest, is overwritten by padding.

        Args:
            first_slot: Where the first lives; the others follow.
            prompts: Token ids, all of prompts of one `batch_class`.
            logit_positions: For each prompt, indices of its tokens after which logits are wanted; may be empty.

        Returns:
            Logits, shape [wanted positions of all prompts, vocabulary].
        """
        # The binding is not kept: each of many would keep its logits too.
        binding = self._bind_cache(self._cache, first_slot, len(prompts))
        return self._run_prefill(binding, prefill_batch_inputs(prompts, logit_positions))

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """Compute one more token for each of the first slots.

        Args:
            tokens: One token id for slot 0, slot 1, ...
            lengths: How many tokens each slot holds already.

        Returns:
            Logits, shape [len(tokens), vocabulary], valid until the next step.
        """
        step = self._decode_steps.get(len(tokens))
        if step is None:
            step = self._decode_steps[len(tokens)] = _DecodeStep(
                self._bind_cache(self._cache, 0, len(tokens)), len(tokens), self.architecture.vocabulary_size
            )
        step.write(tokens, lengths)
        self._run(step.binding)
        return step.logits

    def terminate_prefill(self) -> None:
        """Make the prefill that runs in another thread fail soon; no effect on any other."""
        self._prefill_options.terminate = True

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""
        self._cache.copy_slot(source, target, length)

    def save(self, slot: int, length: int) -> SequenceCache:
        """Return a copy of the first `length` tokens of a slot."""
        return self._cache.save(slot, length)

    def restore(self, slot: int, sequence: SequenceCache, length: int) -> None:
        """Put the first `length` tokens of a saved sequence into a slot."""
        self._cache.restore(slot, sequence, length)

    def close(self) -> None:
        """Free the graph, the weights and the cache; nothing else may be called after."""
        self._decode_steps.clear()
        self._prefill_bindings.clear()
        del self._session, self._cache

    def _try_batch(self, lengths: Sequence[int]) -> bool:
        """Compute made-up prompts together, and the first two alone: tell whether they get the same bits."""
        context_length, vocabulary_size = self.architecture.context_length, self.architecture.vocabulary_size
        prompts = [[7919 * token % vocabulary_size for token in range(min(each, context_length))] for each in lengths]
        last = [np.array([len(prompt) - 1]) for prompt in prompts]
        try:
            cache = KVCache(self.architecture, len(prompts) + 1, self._cache_type)
            binding = self._bind_cache(cache, 0, len(prompts))
            together = self._run_prefill(binding, prefill_batch_inputs(prompts, last))
            binding = self._bind_cache(cache, len(prompts), 1)
            for row in range(2):
                alone = self._run_prefill(binding, prefill_inputs(prompts[row], 0, last[row]))
                in_batch, by_itself = (cache.save(slot, len(prompts[row])) for slot in (row, len(prompts)))
                same = map(np.array_equal, in_batch.arrays, by_itself.arrays)
                if not (np.array_equal(together[row : row + 1], alone) and all(same)):
                    return False
        except (MemoryError, ModelFolderError):
            return False  # one by one they may succeed
        return True

    def _run_prefill(self, binding: Any, inputs: Mapping[str, npt.NDArray[Any]]) -> Logits:
        logits = np.empty((inputs["logit_positions"].size, self.architecture.vocabulary_size), np.float32)
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        self._prefill_options = onnxruntime.RunOptions()
        self._run(binding, self._prefill_options)
        return logits

    def _inspect(self, graph: Graph) -> None:
        self._batch_rule: BatchRule = batch_rule(graph)

    def _run(self, binding: Any, options: Any = None) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:
            if not is_of_onnxruntime(error):
                raise
            raise ModelFolderError(f"ONNX Runtime cannot compute the graph: {first_line(error)}") from error

    def _replace_cache(self, slots: int, lengths: Mapping[int, int]) -> None:
        cache = KVCache(self.architecture, slots, self._cache_type)
        cache.copy_slots_from(self._cache, lengths)
        self._decode_steps.clear()
        self._prefill_bindings.clear()
        self._cache = cache

    def _bind_cache(self, cache: KVCache, first_slot: int, slots: int) -> Any:
        """Bind the same memory as past and as present, which makes the attention kernel update it in place."""
        binding = self._session.io_binding()
        views = cache.views(first_slot, slots)
        for name, value in zip(self._key_value_inputs, views, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(self._key_value_outputs, views, strict=True):
            binding.bind_ortvalue_output(name, value)
        return binding


def prefill_inputs(
    tokens: Sequence[int], start: int, logit_positions: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """Return what `StepSession.prefill` gives the graph beside the cache."""
    count = len(tokens)
    return {
        "input_ids": np.array(tokens, np.int64)[np.newaxis],
        "position_ids": np.arange(start, start + count, dtype=np.int64)[np.newaxis],
        "seqlens_k": np.array([start + count - 1], np.int32),
        "total_sequence_length": np.array(start + count, np.int32),
        "logit_positions": logit_positions,
    }


def prefill_batch_inputs(
    prompts: Sequence[Sequence[int]], logit_positions: Sequence[npt.NDArray[np.int64]]
) -> dict[str, npt.NDArray[Any]]:
    """Return what `StepSession.prefill_batch` gives the graph beside the cache: prompts padded at their ends."""
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths.max())
    input_ids = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in zip(input_ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return {
        "input_ids": input_ids,
        "position_ids": np.tile(np.arange(longest, dtype=np.int64), (len(prompts), 1)),
        "seqlens_k": lengths - 1,
        "total_sequence_length": np.array(longest, np.int32),
        "logit_positions": np.concatenate([row * longest + positions for row, positions in enumerate(logit_positions)]),
    }


class _DecodeStep:
    """A binding for one number of rows, made once; a step writes a few numbers into its arrays."""

    def __init__(self, binding: Any, rows: int, vocabulary_size: int) -> None:
        self.binding = binding
        self.logits = np.empty((rows, vocabulary_size), np.float32)
        self._input_ids = np.zeros((rows, 1), np.int64)
        self._position_ids = np.zeros((rows, 1), np.int64)
        self._seqlens_k = np.zeros(rows, np.int32)
        self._total_sequence_length = np.zeros((), np.int32)
        # Kept, because not every version of ONNX Runtime keeps the arrays whose memory it was given.
        self._bound = {
            "input_ids": self._input_ids,
            "position_ids": self._position_ids,
            "seqlens_k": self._seqlens_k,
            "total_sequence_length": self._total_sequence_length,
            "logit_positions": np.arange(rows, dtype=np.int64),
        }
        for name, value in self._bound.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(self.logits))
        # A few numbers are written through views faster than by numpy's assignment of arrays.
        self._token_view = self._input_ids.reshape(rows).data
        self._position_view = self._position_ids.reshape(rows).data
        self._last_index_view = self._seqlens_k.data
        self._longest_view = self._total_sequence_length.reshape(1).data

    def write(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        for row, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
            self._token_view[row] = token
            self._position_view[row] = length
            self._last_index_view[row] = length  # the valid length after this step, minus 1
        self._longest_view[0] = max(lengths) + 1


def create_session(folder: ModelFolder, threads: int, inspect: Callable[[Graph], object] = lambda graph: None) -> Any:
    """Give a folder's graph to ONNX Runtime, on the CPU.

    Args:
        folder: An opened model folder.
        threads: Threads that compute a step, the calling one among them.
        inspect: Called with the graph.

    Raises:
        ModelFolderError: It cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what fails is raised; an app's standard error is not ours to fill
    # Threads that wait busily between two tokens save a fifth of the time; longer would only heat an idle app.
    options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_MICROSECONDS)
    if not folder.manifest.has_prompt_matrices:
        # Several matrices are packed at once, a thread each. In branches, which are packed one by one and have a matrix
        # each, this would only keep the threads from sharing it.
        options.add_session_config_entry("session.prepack.enable_parallel", "1")
    if folder.manifest.precision == "int8" and products_saturate():
        # Elsewhere it would only take the fastest kernels away.
        options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        with whole_matrix_attention():
            return open_graph(
                folder,
                folder.manifest.graphs["decoder"],
                options,
                providers=["CPUExecutionProvider"],
                # The fused kernel is several times slower on CPUs than the two operators it replaces.
                disabled_optimizers=["SkipLayerNormFusion"],
                inspect=inspect,
            )
    except ModelFolderError:
        raise
    except Exception as error:
        raise ModelFolderError(f"ONNX Runtime cannot load {folder.graph_path}: {first_line(error)}") from error


def is_of_onnxruntime(error: Exception) -> bool:
    """Tell whether ONNX Runtime or its C++ raised an error; what a signal's handler raises comes from a run too."""
    return type(error).__module__.startswith("onnxruntime") or type(error) in (RuntimeError, ValueError, MemoryError)


def first_line(error: Exception) -> str:
    """Return what ONNX Runtime says, without the calls that led there."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_onnxruntime_version(folder: ModelFolder) -> None:
    """Refuse a folder that needs a newer ONNX Runtime.

    Raises:
        ModelFolderError: It does.
    """
    needed, installed = folder.manifest.minimum_onnxruntime, onnxruntime.__version__
    if _version_numbers(installed) < _version_numbers(needed):
        raise ModelFolderError(
            f"{folder.path} needs ONNX Runtime {needed} or newer, {installed} is installed: "
            "run pip install --upgrade onnxruntime"
        )


def _version_numbers(version: str) -> tuple[int, ...]:
    numbers = [int(part) for part in version.partition("+")[0].split(".") if part.isdigit()]
    return tuple(numbers + [0] * (4 - len(numbers)))


def check_signature(
    folder: ModelFolder, session: Any, added_outputs: Mapping[str, tuple[str, list[int | None]]] | None = None
) -> None:
    """Compare the graph's inputs and outputs, their types and fixed dimensions with what a session binds.

    Args:
        folder: An opened model folder.
        session: An ONNX Runtime session of its graph.
        added_outputs: Types and dimensions of outputs that the session added to the graph.

    Raises:
        ModelFolderError: They differ.
    """
    architecture = folder.manifest.architecture
    past, present = key_value_names(architecture.layers)
    cache_type = _CACHE_TYPES[folder.manifest.cache_precision].onnxruntime
    # A graph may have been made for the capacity that the cache always has, the context length.
    capacities = {node.shape[2] for node in session.get_inputs() if node.name in past and len(node.shape) == 4}
    capacity = architecture.context_length if capacities == {architecture.context_length} else None
    cache = (cache_type, [None, architecture.heads, capacity, architecture.head_size])
    inputs = {
        "input_ids": ("tensor(int64)", [None, None]),
        "position_ids": ("tensor(int64)", [None, None]),
        "seqlens_k": ("tensor(int32)", [None]),
        "total_sequence_length": ("tensor(int32)", []),
        "logit_positions": ("tensor(int64)", [None]),
        **dict.fromkeys(past, cache),
    }
    outputs = {
        "logits": ("tensor(float)", [None, architecture.vocabulary_size]),
        **dict.fromkeys(present, cache),
        **(added_outputs or {}),
    }
    for kind, expected, found in (
        ("inputs", inputs, session.get_inputs()),
        ("outputs", outputs, session.get_outputs()),
    ):
        actual = {
            node.name: (node.type, [size if isinstance(size, int) else None for size in node.shape]) for node in found
        }
        problems = [f"{name} is missing" for name in expected if name not in actual]
        problems += [f"{name} is unknown" for name in actual if name not in expected]
        problems += [
            f"{name} is {actual[name]}, expected {signature}"
            for name, signature in expected.items()
            if name in actual and actual[name] != signature
        ]
        if problems:
            raise ModelFolderError(
                f"{folder.graph_path} is not the graph that the manifest describes: its {kind} differ: "
                f"{'; '.join(problems[:3])}; export the model again"
            )
