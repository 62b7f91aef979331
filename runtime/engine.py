"""The one loop: rows join, are prefilled in chunks, decode together, and leave between steps.

Rows live in the slots of the session's KV cache: those that decode in slots 0, 1, ..., so that one run computes a
token for all of them, and the one that is being prefilled in the slot after them. A step is one decoded token for
every row that is past its prompt, and one chunk of prefill, if a row waits for it. What a slot holds of the prompt of
an earlier row, or of one that still decodes, is not computed again.

Any thread may bring rows. There is no thread of our own: whoever waits for a row computes steps, for all rows there
are; if another thread is at it already, it waits for that step instead. So a caller that is alone never switches
threads, and callers that come together share steps instead of fighting for the cores.
"""

import os
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np

from gpt2_edge.errors import DeviceError, ModelClosedError, OptionError
from gpt2_edge.interrupt import deferred_interrupt
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.prompt_reuse import PromptReuse
from gpt2_edge.session import Logits
from gpt2_edge.session_protocol import ChoosingSession, ModelSession

PREFILL_CHUNK_TOKENS: Final = 256
_WATCHED_CHUNK_TOKENS: Final = 64  # a shorter chunk is over before anybody could interrupt it
_WATCH_SECONDS: Final = 0.02


class Row(ABC):
    """A sequence that the engine computes, until the row itself says that it is done.

    Attributes:
        tokens: All tokens so far. The engine computes them in order; `receive` may append the next one.
        done: Set by the row when it wants no more; by the engine when it failed or was abandoned.
        restarts: Set by `receive` after it replaced `tokens`: they are all computed again.
        failure: The exception because of which the engine gave the row up.
        takes_likeliest: Whether the likeliest token is all that the row wants of a decode step. Where the session can
            choose it, `receive_likeliest` is called instead of `receive`; but not always.
        abandoned: Set when nobody waits for the row any more.
        left: Whether the engine has nothing to do with the row, because it has not joined or was taken out.
        started_at: `time.perf_counter()` when its first chunk began; 0 before.
        prefilled: How many of the first tokens are in the cache, until the row decodes.
        reused: How many of the first tokens were in the cache when it first began, and were not computed.
        initial_cache: Keys and values of the first tokens, to begin with; None computes all.
        keeps_cache: Whether the engine saves the keys and values when the row is done.
        final_cache: What was saved.
    """

    def __init__(self, tokens: Iterable[int]) -> None:
        self.tokens = list(tokens)
        self.done = False
        self.restarts = False
        self.failure: BaseException | None = None
        self.takes_likeliest = False
        self.abandoned = False
        self.left = True
        self.started_at = 0.0
        self.prefilled = 0
        self.reused = 0
        self.initial_cache: SequenceCache | None = None
        self.keeps_cache = False
        self.final_cache: SequenceCache | None = None

    @abstractmethod
    def logit_positions(self, start: int, stop: int) -> range:
        """Say after which of the tokens `start` to `stop - 1` logits are wanted, during prefill."""

    @abstractmethod
    def receive(self, logits: Logits) -> None:
        """Take logits, shape [wanted positions, vocabulary]; they are valid during the call only.

        After the last token so far, the row must append a token to `tokens`, or set `restarts` or `done`.
        """

    def receive_likeliest(self, token: int) -> None:
        """Take the token with the largest logit; as `receive` after the last token, where `takes_likeliest` is set."""
        raise NotImplementedError

    def interrupted(self) -> bool:
        """Tell whether the row should end where it is; asked often, from any thread."""
        return self.abandoned

    def end_early(self) -> None:
        """End where it is, because it was interrupted."""
        self.done = True


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    """A thread that waits for another to compute."""

    ready: Callable[[], object]
    condition: threading.Condition


class Engine:
    """Computes rows, a step at a time, on the threads of those who wait for them.

    Args:
        session: Used by one thread at a time.
    """

    def __init__(self, session: ModelSession) -> None:
        self._session = session
        self._choosing = session if isinstance(session, ChoosingSession) else None
        self._process = os.getpid()
        self._lock = threading.RLock()  # guards the five below; held for moments, never during a step
        self._computed_by: int | None = None  # the thread
        self._closed = False
        self._somebody_left = False
        self._waiters: list[_Waiter] = []
        self._waiting: deque[Row] = deque()
        # These belong to the thread that computes.
        self._in_receive = False
        self._somebody_done = False
        self._most_rows = session.most_slots
        self._prefilling: Row | None = None
        self._decoding: list[Row] = []
        self._prompts = PromptReuse(PREFILL_CHUNK_TOKENS)
        self._known_logits: Logits | None = None  # after the prompt of the row that is being prefilled

    def join(self, rows: Iterable[Row]) -> None:
        """Queue rows; they are computed while somebody waits in `run_until`.

        Raises:
            ModelClosedError: The engine was closed, or belongs to the process that this one was forked from.
        """
        if os.getpid() != self._process:
            raise ModelClosedError(
                "the model was loaded before this process was forked, and its threads are not here: "
                "load it again in this process"
            )
        with self._lock:
            if self._closed:
                raise ModelClosedError("the model is closed: load it again")
            for row in rows:
                row.left = False
                self._waiting.append(row)

    def leave(self, rows: Iterable[Row]) -> None:
        """Take rows out that need not be finished; those that are done have left by themselves."""
        for row in rows:
            row.abandoned = True
        if os.getpid() == self._process:
            with self._lock:
                self._somebody_left = True
                if self._computed_by is None:
                    self._remove_interrupted()

    def run_until(self, ready: Callable[[], object]) -> None:
        """Compute steps, or wait for the thread that does, until `ready()` is true.

        Args:
            ready: Must become true at the latest when the rows it looks at are done. Called often: keep it short.

        Raises:
            KeyboardInterrupt: Ctrl-C was pressed; the rows stay as they are.
            OptionError: A logits processor called the model that it belongs to.
        """
        me = threading.get_ident()
        if self._computed_by == me and self._in_receive:
            raise OptionError("a logits_processor was about to use the model that waits for it: use another model")
        with deferred_interrupt() as interrupt:
            with self._lock:
                while not ready() and self._is_computed_by_another():
                    self._wait_for(ready)
                if ready():
                    self._pass_on()
                    return
                self._computed_by = me
            try:
                while not ready() and not interrupt.is_set():
                    self._prepare_step()
                    self._step()
                    if self._waiters or self._somebody_left:
                        self._tell_others()
            finally:
                with self._lock:
                    self._computed_by = None
                    self._tell_others()
                    self._pass_on()

    def _wait_for(self, ready: Callable[[], object]) -> None:
        """Wait, with the lock held, until the computing thread finds `ready()` true or stops computing."""
        waiter = _Waiter(ready, threading.Condition(self._lock))
        self._waiters.append(waiter)
        try:
            waiter.condition.wait()
        finally:
            self._waiters.remove(waiter)

    def _pass_on(self) -> None:
        """Let a thread that still waits for something compute, if nobody does any more."""
        if self._computed_by is None:
            unfinished = next((waiter for waiter in self._waiters if not waiter.ready()), None)
            if unfinished is not None:
                unfinished.condition.notify()

    def _tell_others(self) -> None:
        """Wake the threads that have what they wait for; others would only take time from those that compute."""
        with self._lock:
            if self._somebody_left:
                self._remove_interrupted()
            for waiter in self._waiters:
                if waiter.ready():
                    waiter.condition.notify()

    def _prepare_step(self) -> None:
        nothing_new = not self._waiting and not self._somebody_left and self._prefilling is None
        if nothing_new and not any(map(_is_interrupted, self._decoding)):
            return  # as nearly always
        with self._lock:
            self._remove_interrupted()

    def _is_computed_by_another(self) -> bool:
        """Tell whether another thread computes a step; a mark of this one was left by an exception of a signal."""
        return self._computed_by not in (None, threading.get_ident())

    def close(self) -> None:
        """Fail all rows, wait for the step in progress, and release the session. May be called again."""
        if os.getpid() != self._process:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            rows = [*self._all_rows(), *self._waiting]
            self._fail(rows, ModelClosedError("the model was closed meanwhile"))
            for row in rows:
                row.abandoned = True  # ends a prefill that is going on
            while self._is_computed_by_another():
                self._wait_for(lambda: not self._is_computed_by_another())
            for row in rows:
                row.left = True
            self._prefilling, self._decoding = None, []
            self._waiting.clear()
            self._session.close()

    def _all_rows(self) -> list[Row]:
        return [*self._decoding, *([self._prefilling] if self._prefilling else [])]

    def _step(self) -> None:
        """Decode first: so the first token of a row that ends its prefill now reaches its caller at once."""
        try:
            if self._decoding:
                self._decode()
            self._prefill()
        except Exception as error:  # noqa: BLE001 - whatever the session raises belongs to those whose rows it was
            self._fail(self._all_rows(), error)
        self._remove_done()

    def _prefill(self) -> None:
        """Compute one chunk; rows that need none, because their prompt is known, join in the same step."""
        if self._prefilling is None:
            self._begin_next()
        if self._prefilling is not None:
            self._prefill_chunk(self._prefilling)
        while self._prefilling is None and self._next_is_known():
            self._begin_next()
            if self._prefilling is not None:
                self._prefill_chunk(self._prefilling)

    def _next_is_known(self) -> bool:
        with self._lock:
            row = self._waiting[0] if self._waiting else None
        if row is None or row.initial_cache is not None or len(self._decoding) >= self._most_rows:
            return False
        return self._prompts.find(row.tokens, _wanted(row), len(self._decoding)).logits is not None

    def _begin_next(self) -> None:
        """Let the row that waits longest begin, in the slot after those that decode."""
        with self._lock:
            waiting = len(self._waiting)
            if not waiting or len(self._decoding) >= self._most_rows:
                return
            row = self._prefilling = self._waiting.popleft()
        first_time = not row.started_at
        try:
            self._make_room(min(self._most_rows, len(self._decoding) + waiting))
            if len(self._decoding) >= self._session.slots:  # it waits on, until another has ended
                with self._lock:
                    self._waiting.appendleft(row)
                self._prefilling = None
                return
            row.started_at = row.started_at or time.perf_counter()
            self._take_over_what_is_known(row, len(self._decoding))
        except Exception as error:  # noqa: BLE001 - belongs to the row that begins; nobody else is touched
            row.prefilled = 0
            self._fail([row], error)
            self._prefilling, row.left = None, True
            return
        if first_time:
            row.reused = row.prefilled

    def _make_room(self, slots: int) -> None:
        in_use = {slot: len(row.tokens) - 1 for slot, row in enumerate(self._decoding)}
        wanted = 1 << (slots - 1).bit_length()  # doubled, so that it happens rarely
        while wanted > self._session.slots:
            try:
                self._session.reserve_slots(wanted, self._prompts.lengths() | in_use)
            except (DeviceError, MemoryError):
                # Fewer side by side take longer, but all are answered.
                wanted //= 2
                self._most_rows = max(wanted, self._session.slots)

    def _take_over_what_is_known(self, row: Row, slot: int) -> None:
        """Put what is known of the first tokens of a row into a slot."""
        if row.initial_cache is not None:
            self._prompts.begin(slot, 0)
            # At least the last token is computed, for its logits.
            length = min(row.initial_cache.tokens, len(row.tokens) - 1)
            self._session.restore(slot, row.initial_cache, length)
            row.initial_cache, self._known_logits = None, None
        else:
            source, length, self._known_logits = self._prompts.find(row.tokens, _wanted(row), slot)
            if length and source != slot:
                self._copy_slot(source, slot, length)
        row.prefilled = length

    def _prefill_chunk(self, row: Row) -> None:
        """Compute the next tokens of a row, or none if it is known what follows; after the last it decodes."""
        start, slot = row.prefilled, len(self._decoding)
        stop = min(start + PREFILL_CHUNK_TOKENS, len(row.tokens))
        is_last = stop == len(row.tokens)
        logits = self._known_logits if start == stop else self._compute_chunk(row, slot, start, stop)
        if logits is None:
            return  # it was interrupted, and ends with this step
        if len(logits):
            self._deliver(row, logits)
        if is_last:
            self._prefilling, self._known_logits = None, None
            self._decoding.append(row)

    def _compute_chunk(self, row: Row, slot: int, start: int, stop: int) -> Logits | None:
        """Compute tokens of a prompt and return the logits that the row wants of them; None if it was interrupted."""
        positions = row.logit_positions(start, stop)
        chunk_positions = np.arange(positions.start - start, positions.stop - start, dtype=np.int64)
        self._prompts.begin(slot, start)
        with self._interruptible(row, stop - start):
            try:
                logits = self._session.prefill(slot, row.tokens[start:stop], start, chunk_positions)
            except Exception:
                if not row.interrupted():
                    raise
                return None
        row.prefilled = stop
        ends_prompt = stop == len(row.tokens) and positions == range(stop - 1, stop)
        self._prompts.extend(slot, start, row.tokens[start:stop], logits.copy() if ends_prompt else None)
        return logits

    def _copy_slot(self, source: int, target: int, length: int) -> None:
        self._prompts.begin(target, 0)
        self._session.copy_slot(source, target, length)
        self._prompts.copy(source, target, length)

    @contextmanager
    def _interruptible(self, row: Row, tokens: int) -> Iterator[None]:
        """Terminate the session's run when the row is interrupted meanwhile."""
        if tokens < _WATCHED_CHUNK_TOKENS:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(_WATCH_SECONDS):
                if row.interrupted():
                    self._session.terminate_prefill()
                    return

        watcher = threading.Thread(target=watch, name="gpt2-edge prefill watch", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _decode(self) -> None:
        rows = self._decoding
        # The last token of a row is the one that has not been computed yet.
        tokens, lengths = [row.tokens[-1] for row in rows], [len(row.tokens) - 1 for row in rows]
        if self._choosing is not None and any(row.takes_likeliest for row in rows):
            wanted = [row.takes_likeliest for row in rows]
            for row, outcome in zip(rows, self._choosing.decode_likeliest(tokens, lengths, wanted), strict=True):
                self._deliver(row, outcome)
            return
        logits = self._session.decode(tokens, lengths)
        for index, row in enumerate(rows):
            self._deliver(row, logits[index : index + 1])

    def _deliver(self, row: Row, outcome: Logits | int) -> None:
        self._in_receive = True
        try:
            if isinstance(outcome, int):
                row.receive_likeliest(outcome)
            else:
                row.receive(outcome)
            if row.done or row.restarts:
                self._somebody_done = True
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits for the row
            self._fail([row], error)
        finally:
            self._in_receive = False

    def _fail(self, rows: Iterable[Row], error: BaseException) -> None:
        for row in rows:
            row.failure = error
            row.done = True
        self._somebody_done = True

    def _remove_interrupted(self) -> None:
        """Let the rows end that were interrupted; called between steps, before and after each."""
        self._somebody_left = False
        interrupted = [row for row in (*self._all_rows(), *self._waiting) if row.interrupted()]
        for row in interrupted:
            if not row.done:
                row.end_early()
            if row in self._waiting:
                self._waiting.remove(row)
                row.left = True
        if interrupted:
            self._somebody_done = True
            self._remove_done()
            self._release_memory_if_idle()

    def _remove_done(self) -> None:
        """Take out the rows that are done or restart, and close the gaps: the last row moves into the free slot."""
        if not self._somebody_done:
            return
        self._somebody_done = False
        slot_of_prefilling = len(self._decoding)
        if self._prefilling is not None and self._prefilling.done:
            self._let_go(self._prefilling, slot_of_prefilling, self._prefilling.prefilled)
            self._prefilling = None
        remaining = list(self._decoding)
        for slot in reversed(range(len(remaining))):
            row = remaining[slot]
            if row.done:
                self._let_go(row, slot, len(row.tokens) - 1)
            if row.done or row.restarts:
                last = remaining.pop()
                if slot < len(remaining):
                    self._copy_slot(len(remaining), slot, len(last.tokens) - 1)
                    remaining[slot] = last
        restarting = [row for row in self._decoding if row.restarts and not row.done]
        self._decoding = remaining
        if self._prefilling is not None and slot_of_prefilling != len(remaining):
            self._copy_slot(slot_of_prefilling, len(remaining), self._prefilling.prefilled)
        for row in restarting:
            row.restarts, row.prefilled = False, 0
        with self._lock:
            self._waiting.extendleft(reversed(restarting))
            self._release_memory_if_idle()

    def _release_memory_if_idle(self) -> None:
        """Give all slots but one back, and keep the longest prompt in it."""
        if self._waiting or self._all_rows() or self._closed:
            return
        self._most_rows = self._session.most_slots  # there may be more memory the next time
        if not self._session.spare_slots:
            return
        lengths = self._prompts.lengths()
        longest = max(lengths, key=lambda slot: lengths[slot], default=None)
        saved = None if longest is None else self._session.save(longest, lengths[longest])
        self._prompts.keep_only(longest)
        try:
            self._session.release_spare_slots()
            if saved is not None:
                self._session.restore(0, saved, saved.tokens)
        except BaseException:
            self._prompts.keep_only(None)
            raise

    def _let_go(self, row: Row, slot: int, length: int) -> None:
        if row.keeps_cache and row.failure is None:
            row.final_cache = self._session.save(slot, length)
        row.left = True


def _is_interrupted(row: Row) -> bool:
    return row.interrupted()


def _wanted(row: Row) -> range:
    """Return after which tokens of its prompt a row wants logits."""
    return row.logit_positions(0, len(row.tokens))
