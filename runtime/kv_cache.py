"""The keys and values of all tokens so far, for a few sequences side by side."""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gpt2_edge.manifest import Architecture
from gpt2_edge.onnxruntime_import import onnxruntime

CacheArray = npt.NDArray[Any]  # float32 or int8
KeyValueViews = list[onnxruntime.OrtValue]  # key and value of layer 0, key and value of layer 1, ...


@dataclass(frozen=True, slots=True)
class SequenceCache:
    """The keys and values of one sequence, outside of any slot. Never changed, so it can be shared.

    Attributes:
        arrays: Key and value of layer 0, of layer 1, ..., each of shape [heads, tokens, head_size].
    """

    arrays: list[CacheArray]

    @property
    def tokens(self) -> int:
        """How many tokens it holds."""
        return int(self.arrays[0].shape[1])

    def first(self, tokens: int) -> "SequenceCache":
        """Return the keys and values of at most the first `tokens` tokens, over the same memory."""
        return self if tokens >= self.tokens else SequenceCache([array[:, :tokens] for array in self.arrays])


class KVCache:
    """One buffer for each layer's keys and one for its values, shape [slots, heads, context_length, head_size].

    A slot holds one sequence. It is contiguous, so any run of slots can be bound as a batch without a copy. The
    memory comes zeroed from the operating system, which provides a page when it is first written: a slot takes
    memory for the tokens that are in it, not for the context.

    Args:
        architecture: The shape of the model.
        slots: How many sequences fit.
        dtype: Of keys and values: float32 or int8.
    """

    def __init__(self, architecture: Architecture, slots: int, dtype: npt.DTypeLike = np.float32) -> None:
        shape = (slots, architecture.heads, architecture.context_length, architecture.head_size)
        self.slots = slots
        self._buffers = [_untouched_zeros(shape, np.dtype(dtype)) for _ in range(2 * architecture.layers)]

    @property
    def bytes_of_a_slot(self) -> int:
        """What a sequence takes that fills its context."""
        return sum(buffer.nbytes for buffer in self._buffers) // self.slots

    def views(self, first_slot: int, slots: int) -> KeyValueViews:
        """Return ONNX Runtime values over the memory of some consecutive slots."""
        chosen = slice(first_slot, first_slot + slots)
        return [onnxruntime.OrtValue.ortvalue_from_numpy(buffer[chosen]) for buffer in self._buffers]

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def copy_slots_from(self, other: "KVCache", lengths: Mapping[int, int]) -> None:
        """Copy slots of another cache, each up to its number of tokens, to the same slots of this one."""
        for buffer, source in zip(self._buffers, other._buffers, strict=True):
            for slot, length in lengths.items():
                buffer[slot, :, :length] = source[slot, :, :length]

    def save(self, slot: int, length: int) -> SequenceCache:
        """Return a copy of the first `length` tokens of a slot."""
        return SequenceCache([buffer[slot, :, :length].copy() for buffer in self._buffers])

    def restore(self, slot: int, sequence: SequenceCache, length: int) -> None:
        """Put the first `length` tokens of a saved sequence into a slot."""
        for buffer, saved in zip(self._buffers, sequence.arrays, strict=True):
            buffer[slot, :, :length] = saved[:, :length]


def _untouched_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> CacheArray:
    """Return zeros in memory of its own, of which the system provides small pages as they are written.

    `np.zeros` asks for huge pages where an array is large. With these the first tokens of a sequence, which lie in all
    heads, would fill the memory of the whole context.

    Raises:
        MemoryError: There is not so much.
    """
    size_bytes = dtype.itemsize * math.prod(shape)
    try:
        memory = mmap.mmap(-1, size_bytes)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"the system has no {size_bytes:,} bytes for a part of the KV cache") from error
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    zeros: CacheArray = np.frombuffer(memory, dtype).reshape(shape)
    return zeros
