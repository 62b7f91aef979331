"""One ONNX Runtime session whose weights, KV cache, inputs and outputs stay on a GPU.

Has the same methods as `StepSession`. A decode step uploads a few numbers a row; it downloads the likeliest token of
each row, and the logits of those that need more. Everything else was bound to device memory before. Steps of the same
number of rows are the same launches over the same memory, so a number of rows that stays is captured as a CUDA graph
and replayed from then on. Prefill, whose shapes vary, is never captured.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, Concatenate, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.cuda_likeliest import ADDED_OUTPUTS, LARGEST_LOGIT, LIKELIEST_TOKEN, likeliest_token_part
from gpt2_edge.cuda_thread import CudaThread, Parameters, Result
from gpt2_edge.device_array import DeviceArray
from gpt2_edge.errors import DeviceError, ModelFolderError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.graph_names import key_value_names
from gpt2_edge.graph_session import open_graph
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.manifest import Architecture
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.row_limit import MAXIMUM_ROWS
from gpt2_edge.session import Logits, check_onnxruntime_version, check_signature, first_line, prefill_inputs

# Capturing takes as long as several launched steps: ONNX Runtime runs the step twice before it. Rows of a batch end one
# after another, and a number of rows that is there for a few steps only is not worth it.
LAUNCHES_BEFORE_CAPTURE: Final = 8

_PROVIDER_OF: Final = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_NO_CAPTURE: Final = "-1"
_ALIGNED_ROWS: Final = 64  # times 4 bytes, the smallest number that is moved, is what CUDA aligns allocations to
_WARNING, _FATAL = 2, 4  # severities of ONNX Runtime; the first is its default


def _on_its_thread(
    method: "Callable[Concatenate[CudaSession, Parameters], Result]",
) -> "Callable[Concatenate[CudaSession, Parameters], Result]":
    """Make a method of `CudaSession` run on the thread that the session belongs to."""

    @wraps(method)
    def run(self: "CudaSession", /, *arguments: Parameters.args, **keywords: Parameters.kwargs) -> Result:
        return self._thread.run(method, self, *arguments, **keywords)

    return run


class CudaSession:
    """Runs prefill and decode steps on a GPU.

    Not thread-safe: one step at a time.

    Args:
        folder: An opened model folder, fp16 or fp32.
        device: "cuda"; or "cpu", which takes the same way through host memory, for tests on machines without a GPU.
        device_index: Which GPU.
        captures: Replay decode steps from captured graphs; without, every kernel is launched each time.

    Raises:
        DeviceError: The GPU cannot compute all of the graph, or has too little memory.
        ModelFolderError: ONNX Runtime cannot load the graph, or it is not a graph that this class drives.
    """

    most_slots: Final = MAXIMUM_ROWS
    # The memory would not go back to the system, which ONNX Runtime returns nothing to; but graphs were captured over
    # it, which ONNX Runtime cannot release, and which would have to be captured anew.
    spare_slots: Final = 0

    def __init__(
        self, folder: ModelFolder, device: str = "cuda", device_index: int = 0, *, captures: bool = True
    ) -> None:
        check_onnxruntime_version(folder)
        self.architecture = folder.manifest.architecture
        self._device, self._device_index, self._captures = device, device_index, captures
        self._cache_type = np.dtype(np.float16 if folder.manifest.cache_precision == "fp16" else np.float32)
        self._key_value_inputs, self._key_value_outputs = key_value_names(self.architecture.layers)
        self._decode_steps: dict[int, _DecodeStep] = {}
        self._steps_made = 0
        self._prefill_bindings: dict[int, Any] = {}
        self._prefill_options = _run_options(_NO_CAPTURE)
        self._thread = CudaThread()
        self._open(folder)

    @_on_its_thread
    def _open(self, folder: ModelFolder) -> None:
        self._session = _create_session(folder, self._device, self._device_index, self._captures)
        check_signature(folder, self._session, ADDED_OUTPUTS)
        self._cache = self._allocate(1)
        # A GPU for which the wheel has no kernels is found out by running them, and better now than later.
        self.prefill(0, [0], 0, np.zeros(1, np.int64))

    @property
    def slots(self) -> int:
        """How many sequences there is room for."""
        return self._cache.slots

    @_on_its_thread
    def reserve_slots(self, slots: int, lengths: Mapping[int, int]) -> None:
        """Make room for at least this many sequences; see `StepSession.reserve_slots`.

        Raises:
            DeviceError: The GPU has no memory for so many; those that there were are kept.
        """
        if slots > self._cache.slots:
            cache = self._allocate(slots)
            cache.copy_slots_from(self._cache, lengths)
            self._forget_bindings()
            self._cache = cache

    def release_spare_slots(self) -> None:
        """Nothing is given back, see `spare_slots`."""

    @_on_its_thread
    def prefill(self, slot: int, tokens: Sequence[int], start: int, logit_positions: npt.NDArray[np.int64]) -> Logits:
        """Compute some consecutive tokens of one sequence; see `StepSession.prefill`."""
        # Kernels for no logits at all are hardly ever run by anyone: compute those of a token, and leave them there.
        positions = logit_positions if logit_positions.size else np.zeros(1, np.int64)
        logits = np.empty((logit_positions.size, self.architecture.vocabulary_size), np.float32)
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._bind_cache(slot, 1)
        for name, value in prefill_inputs(tokens, start, positions).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        if logit_positions.size:
            binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        else:
            binding.bind_output("logits", self._device, self._device_index)
        self._prefill_options = _run_options(_NO_CAPTURE)
        self._run(binding, self._prefill_options)
        return logits

    @_on_its_thread
    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """Compute one more token for each of the first slots; see `StepSession.decode`."""
        return self._compute_step(tokens, lengths).download_logits()

    @_on_its_thread
    def decode_likeliest(
        self, tokens: Sequence[int], lengths: Sequence[int], wanted: Sequence[bool]
    ) -> list[int | Logits]:
        """Compute one more token for each of the first slots, and choose it on the device where that is enough.

        Args:
            tokens: One token id for slot 0, slot 1, ...
            lengths: How many tokens each slot holds already.
            wanted: Of which rows the likeliest token is enough.

        Returns:
            For each of these the likeliest token, of equally likely ones the lowest; for the others their logits,
            shape [1, vocabulary], valid until the next step. Logits also where one is NaN or none can be chosen.
        """
        step = self._compute_step(tokens, lengths)
        likeliest, largest = step.download_choices()
        return [
            int(likeliest[row]) if is_wanted and math.isfinite(largest[row]) else step.download_logits_of(row)
            for row, is_wanted in enumerate(wanted)
        ]

    def terminate_prefill(self) -> None:
        """Make the prefill that runs in another thread fail soon; no effect on any other."""
        self._prefill_options.terminate = True

    @_on_its_thread
    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy a slot to another, on the device; of whatever length, since a whole slot lies in one piece."""
        self._cache.copy_slot(source, target)

    @_on_its_thread
    def save(self, slot: int, length: int) -> SequenceCache:
        """Return a copy of the first `length` tokens of a slot, as float32 in host memory."""
        return self._cache.save(slot, length)

    @_on_its_thread
    def restore(self, slot: int, sequence: SequenceCache, length: int) -> None:
        """Put the first `length` tokens of a saved sequence into a slot."""
        self._cache.restore(slot, sequence, length)

    @_on_its_thread
    def close(self) -> None:
        """Free the graph, the weights and the cache; nothing else may be called after."""
        self._forget_bindings()
        del self._session, self._cache

    def _compute_step(self, tokens: Sequence[int], lengths: Sequence[int]) -> "_DecodeStep":
        rows = len(tokens)
        step = self._decode_steps.get(rows)
        if step is None:
            step = self._decode_steps[rows] = self._make_decode_step(rows)
        step.write(tokens, lengths)
        self._run(step.binding, step.next_options())
        return step

    def _run(self, binding: Any, options: Any) -> None:
        try:
            self._session.run_with_iobinding(binding, options)
        except Exception as error:  # ONNX Runtime has no errors of its own
            raise DeviceError(
                f"ONNX Runtime cannot compute a step on {self._device}:{self._device_index}, which may go on until the "
                f'program is started again; or choose device="cpu". It says: {first_line(error)}'
            ) from error

    def _allocate(self, slots: int) -> "_DeviceCache":
        try:
            return _DeviceCache(self.architecture, slots, self._cache_type, self._device, self._device_index)
        except Exception as error:  # ONNX Runtime has no class of its own for an allocation that failed
            shape = self.architecture
            size = 2 * shape.layers * shape.heads * shape.context_length * shape.head_size * self._cache_type.itemsize
            raise DeviceError(
                f"{self._device}:{self._device_index} has no memory for the KV cache of {slots} sequences, "
                f"{slots * size / 1e6:,.0f} MB: generate fewer at a time, or end other programs on it; "
                f"ONNX Runtime says: {first_line(error)}"
            ) from error

    def _forget_bindings(self) -> None:
        """Drop what refers to the cache's memory, the captured graphs above all: they would go on writing there."""
        for step in self._decode_steps.values():
            # Does nothing in ONNX Runtime 1.31, which frees them with the session; a later version may.
            self._session.release_captured_graph(step.capture)
        self._decode_steps.clear()
        self._prefill_bindings.clear()

    def _make_decode_step(self, rows: int) -> "_DecodeStep":
        self._steps_made += 1  # a number that was used is never used again, since its graph may not be released
        return _DecodeStep(
            self._bind_cache(0, rows), rows, self.architecture, self._steps_made, self._device, self._device_index
        )

    def _bind_cache(self, first_slot: int, slots: int) -> Any:
        """Bind the same memory as past and as present, which makes the attention kernel update it in place."""
        binding = self._session.io_binding()
        views = self._cache.views(first_slot, slots)
        for name, value in zip(self._key_value_inputs, views, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name, value in zip(self._key_value_outputs, views, strict=True):
            binding.bind_ortvalue_output(name, value)
        return binding


class _DecodeStep:
    """A binding for one number of rows, over memory of its own that never moves, as a captured graph demands."""

    def __init__(
        self, binding: Any, rows: int, architecture: Architecture, capture: int, device: str, device_index: int
    ) -> None:
        self.binding = binding
        self.capture = capture
        self.logits = DeviceArray((rows, architecture.vocabulary_size), np.float32, device, device_index)
        self._rows = rows
        self._launches = 0
        self._launched, self._captured = _run_options(_NO_CAPTURE), _run_options(str(capture))
        self._host_logits = np.empty((rows, architecture.vocabulary_size), np.float32)
        self._host_value = onnxruntime.OrtValue.ortvalue_from_numpy(self._host_logits)
        # Two halves that are moved at once, each of which begins where the device's own allocations would.
        self._half = -(-rows // _ALIGNED_ROWS) * _ALIGNED_ROWS
        self._host_numbers = np.zeros((2 * self._half, 1), np.int64)  # token ids, then positions
        self._host_last_indices = np.zeros(rows, np.int32)
        self._numbers = DeviceArray(self._host_numbers.shape, np.int64, device, device_index)
        self._last_indices = DeviceArray((rows,), np.int32, device, device_index)
        self._choices = DeviceArray((2 * self._half, 1), np.float32, device, device_index)  # tokens, then logits
        logit_positions = DeviceArray((rows,), np.int64, device, device_index)
        logit_positions.value.update_inplace(np.arange(rows, dtype=np.int64))
        binding.bind_ortvalue_input("input_ids", self._numbers.rows(0, rows))
        binding.bind_ortvalue_input("position_ids", self._numbers.rows(self._half, rows))
        binding.bind_ortvalue_input("seqlens_k", self._last_indices.value)
        binding.bind_ortvalue_input("logit_positions", logit_positions.value)
        # The kernel reads this one on the host, to choose its launches, so a captured graph keeps it: the capacity is
        # right for every length. What each row really holds is in `seqlens_k`, on the device.
        total = np.array(architecture.context_length, np.int32)
        binding.bind_ortvalue_input("total_sequence_length", onnxruntime.OrtValue.ortvalue_from_numpy(total))
        binding.bind_ortvalue_output("logits", self.logits.value)
        binding.bind_ortvalue_output(LIKELIEST_TOKEN, self._choices.rows(0, rows))
        binding.bind_ortvalue_output(LARGEST_LOGIT, self._choices.rows(self._half, rows))
        self._kept = (logit_positions, total)

    def next_options(self) -> Any:
        """Return how to run the next step: launched at first, captured when this number of rows turns out to stay."""
        if self._launches < LAUNCHES_BEFORE_CAPTURE:
            self._launches += 1
            return self._launched
        return self._captured

    def write(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        self._host_numbers[: self._rows, 0] = tokens
        self._host_numbers[self._half : self._half + self._rows, 0] = lengths
        self._host_last_indices[:] = lengths  # the valid length after this step, minus 1
        self._numbers.value.update_inplace(self._host_numbers)
        self._last_indices.value.update_inplace(self._host_last_indices)

    def download_choices(self) -> tuple[list[float], list[float]]:
        choices = self._choices.value.numpy()[:, 0].tolist()
        return choices[: self._rows], choices[self._half : self._half + self._rows]

    def download_logits(self) -> Logits:
        # To the same place each time: fresh memory for the logits of many rows takes longer than copying them.
        self._host_value.update_inplace(self.logits.value)
        return self._host_logits

    def download_logits_of(self, row: int) -> Logits:
        logits = self._host_logits[row : row + 1]
        onnxruntime.OrtValue.ortvalue_from_numpy(logits).update_inplace(self.logits.rows(row, 1))
        return logits


class _DeviceCache:
    """One array for each layer's keys and one for its values, shape [slots, heads, context_length, head_size]."""

    def __init__(
        self, architecture: Architecture, slots: int, dtype: "np.dtype[Any]", device: str, device_index: int
    ) -> None:
        self.slots = slots
        self._slot_shape = (1, architecture.heads, architecture.context_length, architecture.head_size)
        self._dtype = dtype
        shape = (slots, *self._slot_shape[1:])
        self._arrays = [DeviceArray(shape, dtype, device, device_index) for _ in range(2 * architecture.layers)]
        if dtype == np.float32:
            # Plain attention multiplies what lies beyond a row's length by 0, which must not be NaN.
            for array in self._arrays:
                array.clear()

    def views(self, first_slot: int, slots: int) -> list[Any]:
        return [array.rows(first_slot, slots) for array in self._arrays]

    def copy_slot(self, source: int, target: int) -> None:
        for array in self._arrays:
            array.rows(target, 1).update_inplace(array.rows(source, 1))

    def copy_slots_from(self, other: "_DeviceCache", slots: Mapping[int, int]) -> None:
        for array, source in zip(self._arrays, other._arrays, strict=True):
            for slot in slots:
                array.rows(slot, 1).update_inplace(source.rows(slot, 1))

    def save(self, slot: int, length: int) -> SequenceCache:
        return SequenceCache([array.rows(slot, 1).numpy()[0, :, :length].astype(np.float32) for array in self._arrays])

    def restore(self, slot: int, sequence: SequenceCache, length: int) -> None:
        whole = np.zeros(self._slot_shape, self._dtype)
        for array, saved in zip(self._arrays, sequence.arrays, strict=True):
            whole[0, :, :length] = saved[:, :length]
            array.rows(slot, 1).update_inplace(whole)


def _run_options(capture: str) -> Any:
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", capture)
    return options


def _create_session(folder: ModelFolder, device: str, device_index: int, captures: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # nothing is left for the CPU
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL  # what fails is raised; an app's standard error is not ours to fill
    # Tells afterwards which provider got each node.
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    provider_options = {}
    if device == "cuda":
        provider_options = {
            "device_id": str(device_index),
            "enable_cuda_graph": "1" if captures else "0",
            "use_tf32": "0",  # float32 means float32: TF32 keeps 10 bits of the mantissa
            "arena_extend_strategy": "kSameAsRequested",  # no doubling of what a large batch took once
        }
    # It warns of every CUDA session that the provider is not of the plugin kind, past the session's own severity.
    onnxruntime.set_default_logger_severity(_FATAL)
    try:
        session = open_graph(
            folder,
            folder.cuda_graph_path.name,
            options,
            likeliest_token_part(folder.manifest.architecture.vocabulary_size),
            providers=[(_PROVIDER_OF[device], provider_options)],
            enable_fallback=0,  # or it would print what went wrong, and try again on the CPU
        )
    except (DeviceError, ModelFolderError):
        raise
    except Exception as error:
        raise DeviceError(
            f"ONNX Runtime cannot run {folder.cuda_graph_path} on {device}:{device_index}: {first_line(error)}"
        ) from error
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
    check_placement(session, _PROVIDER_OF[device])
    return session


def check_placement(session: Any, provider: str) -> None:
    """Refuse a session of which a part would run elsewhere, with a copy between devices before and after.

    Args:
        session: An ONNX Runtime session that recorded its assignment of nodes.
        provider: Where all of it belongs.

    Raises:
        DeviceError: ONNX Runtime dropped the provider, or gave nodes to another.
    """
    if provider not in session.get_providers():
        raise DeviceError(
            f"ONNX Runtime could not start its {provider} and would have used {', '.join(session.get_providers())} "
            "instead: run gpt2-edge doctor, which names what is missing"
        )
    elsewhere = [
        f"{node.op_type} {node.name}".strip()
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != provider
        for node in part.get_nodes()
    ]
    if elsewhere:
        raise DeviceError(
            f"{len(elsewhere)} operators have no kernel in {provider} and would run elsewhere, with copies between the "
            f"devices in every step ({', '.join(elsewhere[:3])}{', ...' if len(elsewhere) > 3 else ''}): "
            "export the checkpoint with --precision fp16"
        )
