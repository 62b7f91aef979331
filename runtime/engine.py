"""The one loop: rows join, are prefilled in chunks, decode together, and leave between steps.

Rows live in the slots of the session's KV cache: those that decode in slots 0, 1, ..., so that one run computes a
token for all of them, and the one that is being prefilled in the slot after them. A step is one chunk of prefill, if
a row waits for it, and one decoded token for every other row.

Any thread may bring rows. There is no thread of our own: whoever waits for a row computes steps, for all rows there
are; if another thread is at it already, it waits for that step instead. So a caller that is alone never switches
threads, and callers that come together share steps instead of fighting for the cores.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np

from gpt2_edge.errors import ModelClosedError
from gpt2_edge.session import Logits, StepSession

PREFILL_CHUNK_TOKENS: Final = 128
MAXIMUM_ROWS: Final = 16


class Row(ABC):
    """A sequence that the engine computes, until the row itself says that it is done.

    Attributes:
        tokens: All tokens so far. The engine computes them in order; `receive` may append the next one.
        done: Set by the row when it wants no more; by the engine when it failed.
        failure: The exception because of which the engine gave the row up.
        started_at: `time.perf_counter()` when its first chunk began.
        prefilled: How many of the first tokens went through prefill.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens = list(tokens)
        self.done = False
        self.failure: BaseException | None = None
        self.started_at = 0.0
        self.prefilled = 0

    @abstractmethod
    def logit_positions(self, start: int, stop: int) -> range:
        """Say after which of the tokens `start` to `stop - 1` logits are wanted, during prefill."""

    @abstractmethod
    def receive(self, logits: Logits) -> None:
        """Take logits, shape [wanted positions, vocabulary]; they are valid during the call only.

        After the last token so far, the row must append a token to `tokens` or set `done`.
        """


class Engine:
    """Computes rows, a step at a time, on the threads of those who wait for them.

    Args:
        session: Used by one thread at a time.
    """

    def __init__(self, session: StepSession) -> None:
        self._session = session
        self._changed = threading.Condition()  # guards the four below; held for moments, never during a step
        self._computing = False
        self._closed = False
        self._waiting: deque[Row] = deque()
        self._departed: set[Row] = set()
        # These belong to the thread that computes.
        self._prefilling: Row | None = None
        self._decoding: list[Row] = []

    def join(self, rows: Iterable[Row]) -> None:
        """Queue rows; they are computed while somebody waits in `run_until`.

        Raises:
            ModelClosedError: The engine was closed.
        """
        with self._changed:
            if self._closed:
                raise ModelClosedError("the model is closed: load it again")
            self._waiting.extend(rows)

    def leave(self, rows: Iterable[Row]) -> None:
        """Take rows out that need not be finished; those that are done have left by themselves."""
        with self._changed:
            self._departed.update(row for row in rows if not row.done)
            if not self._computing:
                self._remove_departed()

    def run_until(self, ready: Callable[[], object]) -> None:
        """Compute steps, or wait for the thread that does, until `ready()` is true.

        Args:
            ready: Must become true at the latest when the rows it looks at are done. Called often: keep it short.
        """
        while True:
            with self._changed:
                while not ready() and self._computing:
                    self._changed.wait()
                if ready():
                    return
                self._computing = True
                self._admit()
            try:
                self._step()
            finally:
                with self._changed:
                    self._computing = False
                    self._remove_departed()
                    self._changed.notify_all()

    def close(self) -> None:
        """Fail all rows, wait for the step in progress, and release the session. May be called again."""
        with self._changed:
            self._closed = True
            self._changed.wait_for(lambda: not self._computing)
            self._fail([*self._all_rows(), *self._waiting], ModelClosedError("the model was closed meanwhile"))
            self._prefilling, self._decoding = None, []
            self._waiting.clear()
            self._changed.notify_all()

    def _all_rows(self) -> list[Row]:
        return [*self._decoding, *([self._prefilling] if self._prefilling else [])]

    def _admit(self) -> None:
        if self._prefilling is not None or not self._waiting or len(self._decoding) >= MAXIMUM_ROWS:
            return
        in_use = {slot: len(row.tokens) - 1 for slot, row in enumerate(self._decoding)}
        self._session.reserve_slots(min(MAXIMUM_ROWS, len(self._decoding) + len(self._waiting)), in_use)
        self._prefilling = self._waiting.popleft()
        self._prefilling.started_at = time.perf_counter()

    def _step(self) -> None:
        """Decode first: so the first token of a row that ends its prefill now reaches its caller at once."""
        try:
            if self._decoding:
                self._decode()
            if self._prefilling is not None:
                self._prefill_chunk(self._prefilling)
        except Exception as error:  # noqa: BLE001 - whatever the session raises belongs to those whose rows it was
            self._fail(self._all_rows(), error)
        self._remove_done()

    def _prefill_chunk(self, row: Row) -> None:
        start = row.prefilled
        stop = min(start + PREFILL_CHUNK_TOKENS, len(row.tokens))
        positions = row.logit_positions(start, stop)
        chunk_positions = np.arange(positions.start - start, positions.stop - start, dtype=np.int64)
        is_last = stop == len(row.tokens)
        logits = self._session.prefill(len(self._decoding), row.tokens[start:stop], start, chunk_positions)
        row.prefilled = stop
        if positions:
            self._deliver(row, logits)
        if is_last and not row.done:
            self._prefilling = None
            self._decoding.append(row)

    def _decode(self) -> None:
        rows = self._decoding
        # The last token of a row is the one that has not been computed yet.
        logits = self._session.decode([row.tokens[-1] for row in rows], [len(row.tokens) - 1 for row in rows])
        for index, row in enumerate(rows):
            self._deliver(row, logits[index : index + 1])

    def _deliver(self, row: Row, logits: Logits) -> None:
        try:
            row.receive(logits)
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits for the row
            self._fail([row], error)

    def _fail(self, rows: Iterable[Row], error: BaseException) -> None:
        for row in rows:
            row.failure = error
            row.done = True

    def _remove_departed(self) -> None:
        if self._departed:
            for row in self._departed:
                row.done = True
            self._departed.clear()
            self._waiting = deque(row for row in self._waiting if not row.done)
            self._remove_done()
        if not self._waiting and not self._all_rows():
            self._session.release_spare_slots()

    def _remove_done(self) -> None:
        """Close the gaps that rows leave: the last row moves into the free slot."""
        if self._prefilling is not None and self._prefilling.done:
            self._prefilling = None
        remaining = list(self._decoding)
        for slot in reversed(range(len(remaining))):
            if remaining[slot].done:
                last = remaining.pop()
                if slot < len(remaining):
                    self._session.move(len(remaining), slot, len(last.tokens) - 1)
                    remaining[slot] = last
        former_slot, self._decoding = len(self._decoding), remaining
        if self._prefilling is not None and former_slot != len(remaining):
            self._session.move(former_slot, len(remaining), self._prefilling.prefilled)
