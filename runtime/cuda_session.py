"""One ONNX Runtime session whose weights, KV cache, inputs and outputs stay on a GPU.

Has the same methods as `StepSession`. A decode step uploads a few numbers a row and downloads the logits; everything
else was bound to device memory before. Steps of the same number of rows are the same launches over the same memory,
so each number of rows is captured as a CUDA graph once and replayed from then on. Prefill, whose shapes vary, is
never captured.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.device_array import DeviceArray
from gpt2_edge.errors import DeviceError, ModelFolderError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.graph_names import key_value_names
from gpt2_edge.graph_session import open_graph
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.manifest import Architecture
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.session import Logits, check_onnxruntime_version, check_signature, first_line, prefill_inputs

_PROVIDER_OF: Final = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
_NO_CAPTURE: Final = "-1"
_WARNING, _FATAL = 2, 4  # severities of ONNX Runtime; the first is its default


class CudaSession:
    """Runs prefill and decode steps on a GPU.

    Not thread-safe: one step at a time.

    Args:
        folder: An opened model folder, fp16 or fp32.
        device: "cuda"; or "cpu", which takes the same way through host memory, for tests on machines without a GPU.
        device_index: Which GPU.

    Raises:
        DeviceError: The GPU cannot compute all of the graph, or has too little memory.
        ModelFolderError: ONNX Runtime cannot load the graph, or it is not a graph that this class drives.
    """

    def __init__(self, folder: ModelFolder, device: str = "cuda", device_index: int = 0) -> None:
        check_onnxruntime_version(folder)
        self.architecture = folder.manifest.architecture
        self._device, self._device_index = device, device_index
        self._cache_type = np.dtype(np.float16 if folder.manifest.precision == "fp16" else np.float32)
        self._session = _create_session(folder, device, device_index)
        check_signature(folder, self._session)
        self._key_value_inputs, self._key_value_outputs = key_value_names(self.architecture.layers)
        self._decode_steps: dict[int, _DecodeStep] = {}
        self._captures = 0
        self._prefill_bindings: dict[int, Any] = {}
        self._prefill_options = _run_options(_NO_CAPTURE)
        self._cache = self._allocate(1)

    @property
    def slots(self) -> int:
        """How many sequences there is room for."""
        return self._cache.slots

    def reserve_slots(self, slots: int, lengths: Mapping[int, int]) -> None:
        """Make room for at least this many sequences; see `StepSession.reserve_slots`.

        Raises:
            DeviceError: The GPU has no memory for so many; those that there were are kept.
        """
        if slots > self._cache.slots:
            self._replace_cache(slots, lengths)

    def release_spare_slots(self) -> None:
        """Give the memory of all slots but one back; what they held is lost."""
        if self._cache.slots > 1:
            self._replace_cache(1, {})

    def prefill(self, slot: int, tokens: Sequence[int], start: int, logit_positions: npt.NDArray[np.int64]) -> Logits:
        """Compute some consecutive tokens of one sequence; see `StepSession.prefill`."""
        logits = np.empty((logit_positions.size, self.architecture.vocabulary_size), np.float32)
        binding = self._prefill_bindings.get(slot)
        if binding is None:
            binding = self._prefill_bindings[slot] = self._bind_cache(slot, 1)
        for name, value in prefill_inputs(tokens, start, logit_positions).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        binding.bind_ortvalue_output("logits", onnxruntime.OrtValue.ortvalue_from_numpy(logits))
        self._prefill_options = _run_options(_NO_CAPTURE)
        self._session.run_with_iobinding(binding, self._prefill_options)
        return logits

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        """Compute one more token for each of the first slots; see `StepSession.decode`."""
        step = self._decode_steps.get(len(tokens))
        if step is None:
            step = self._decode_steps[len(tokens)] = self._make_decode_step(len(tokens))
        step.write(tokens, lengths)
        self._session.run_with_iobinding(step.binding, step.options)
        logits: Logits = step.logits.value.numpy()
        return logits

    def terminate_prefill(self) -> None:
        """Make the prefill that runs in another thread fail soon; no effect on any other."""
        self._prefill_options.terminate = True

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy a slot to another, on the device; of whatever length, since a whole slot lies in one piece."""
        self._cache.copy_slot(source, target)

    def save(self, slot: int, length: int) -> SequenceCache:
        """Return a copy of the first `length` tokens of a slot, as float32 in host memory."""
        return self._cache.save(slot, length)

    def restore(self, slot: int, sequence: SequenceCache, length: int) -> None:
        """Put the first `length` tokens of a saved sequence into a slot."""
        self._cache.restore(slot, sequence, length)

    def close(self) -> None:
        """Free the graph, the weights and the cache; nothing else may be called after."""
        self._forget_bindings()
        del self._session, self._cache

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

    def _replace_cache(self, slots: int, lengths: Mapping[int, int]) -> None:
        cache = self._allocate(slots)
        cache.copy_slots_from(self._cache, lengths)
        self._forget_bindings()
        self._cache = cache

    def _forget_bindings(self) -> None:
        """Drop what refers to the cache's memory, the captured graphs above all: they would go on writing there."""
        for step in self._decode_steps.values():
            self._session.release_captured_graph(step.capture)
        self._decode_steps.clear()
        self._prefill_bindings.clear()

    def _make_decode_step(self, rows: int) -> "_DecodeStep":
        self._captures += 1  # a number that was used is never used again, should its graph not have been released
        return _DecodeStep(
            self._bind_cache(0, rows), rows, self.architecture, self._captures, self._device, self._device_index
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
        self.options = _run_options(str(capture))
        self.logits = DeviceArray((rows, architecture.vocabulary_size), np.float32, device, device_index)
        self._rows = rows
        self._host_numbers = np.zeros((2 * rows, 1), np.int64)  # token ids, then positions: one upload for both
        self._host_last_indices = np.zeros(rows, np.int32)
        self._numbers = DeviceArray((2 * rows, 1), np.int64, device, device_index)
        self._last_indices = DeviceArray((rows,), np.int32, device, device_index)
        logit_positions = DeviceArray((rows,), np.int64, device, device_index)
        logit_positions.value.update_inplace(np.arange(rows, dtype=np.int64))
        binding.bind_ortvalue_input("input_ids", self._numbers.rows(0, rows))
        binding.bind_ortvalue_input("position_ids", self._numbers.rows(rows, rows))
        binding.bind_ortvalue_input("seqlens_k", self._last_indices.value)
        binding.bind_ortvalue_input("logit_positions", logit_positions.value)
        # The kernel reads this one on the host, to choose its launches, so a captured graph keeps it: the capacity is
        # right for every length. What each row really holds is in `seqlens_k`, on the device.
        total = np.array(architecture.context_length, np.int32)
        binding.bind_ortvalue_input("total_sequence_length", onnxruntime.OrtValue.ortvalue_from_numpy(total))
        binding.bind_ortvalue_output("logits", self.logits.value)
        self._kept = (logit_positions, total)

    def write(self, tokens: Sequence[int], lengths: Sequence[int]) -> None:
        self._host_numbers[: self._rows, 0] = tokens
        self._host_numbers[self._rows :, 0] = lengths
        self._host_last_indices[:] = lengths  # the valid length after this step, minus 1
        self._numbers.value.update_inplace(self._host_numbers)
        self._last_indices.value.update_inplace(self._host_last_indices)


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


def _create_session(folder: ModelFolder, device: str, device_index: int) -> Any:
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
            "enable_cuda_graph": "1",
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
            providers=[(_PROVIDER_OF[device], provider_options)],
            enable_fallback=0,  # or it would print what went wrong, and try again on the CPU
        )
    except ModelFolderError:
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
