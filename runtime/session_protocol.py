"""What the engine asks of a session, whatever device computes and whatever graph it drives."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from gpt2_edge.kv_cache import SequenceCache


class ModelSession(Protocol):
    """Runs prefill and decode steps over a KV cache with slots; see `StepSession` for what each method does."""

    @property
    def slots(self) -> int: ...  # noqa: D102

    @property
    def most_slots(self) -> int: ...  # noqa: D102

    @property
    def spare_slots(self) -> int: ...  # noqa: D102

    def reserve_slots(self, slots: int, lengths: Mapping[int, int]) -> None: ...  # noqa: D102

    def release_spare_slots(self) -> None: ...  # noqa: D102

    def prefill(  # noqa: D102
        self, slot: int, tokens: Sequence[int], start: int, logit_positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]: ...

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> npt.NDArray[np.float32]: ...  # noqa: D102

    def terminate_prefill(self) -> None: ...  # noqa: D102

    def copy_slot(self, source: int, target: int, length: int) -> None: ...  # noqa: D102

    def save(self, slot: int, length: int) -> SequenceCache: ...  # noqa: D102

    def restore(self, slot: int, sequence: SequenceCache, length: int) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


@runtime_checkable
class ChoosingSession(Protocol):
    """Can choose the likeliest tokens itself; see `CudaSession` for what the method does."""

    def decode_likeliest(  # noqa: D102
        self, tokens: Sequence[int], lengths: Sequence[int], wanted: Sequence[bool]
    ) -> list[int | npt.NDArray[np.float32]]: ...


@runtime_checkable
class BatchPrefillSession(Protocol):
    """Can compute several whole prompts in one run; see `StepSession` for what the methods do."""

    def batch_class(self, tokens: int) -> int | None: ...  # noqa: D102

    def prefill_batch(  # noqa: D102
        self,
        first_slot: int,
        prompts: Sequence[Sequence[int]],
        logit_positions: Sequence[npt.NDArray[np.int64]],
    ) -> npt.NDArray[np.float32]: ...
