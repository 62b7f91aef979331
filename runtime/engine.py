"""The one loop: rows join, are prefilled in chunks, decode together, and leave between steps.

Rows live in the slots of the session's KV cache: those that decode in slots 0, 1, ..., so that one run computes a
token for all of them, and those that are being prefilled in the slots after them. A step is one decoded token for
every row that is past its prompt, and one run of prefill, if a row waits for it: a chunk of one prompt, or several
short prompts whole. What a slot holds of the prompt of an earlier row, or of one that still decodes, is not computed
again.

Any thread may bring rows. There is no thread of our own: whoever waits for a row computes steps, for all rows there
are; if another thread is at it already, it waits for that step instead. So a caller that is alone never switches
threads, and callers that come together share steps instead of fighting for the cores.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Final

from gpt2_edge.errors import DeviceError, ModelClosedError, OptionError
from gpt2_edge.interpreter_exit import hold, is_held, wait_for_at_exit
from gpt2_edge.interrupt import deferred_interrupt
from gpt2_edge.prefill import Prefill
from gpt2_edge.row import Row
from gpt2_edge.session import Logits
from gpt2_edge.session_protocol import ChoosingSession, ModelSession

_INTERRUPT_SECONDS: Final = 0.05
_CANDIDATES: Final = 64  # so many waiting rows are looked at for some that go well together


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
        self._prefilling: list[Row] = []  # one, of whose prompt a part may be computed, or several without any
        self._decoding: list[Row] = []
        self._prefill = Prefill(session)
        wait_for_at_exit(self)

    def join(self, rows: Iterable[Row]) -> None:
        """Queue rows; they are computed while somebody waits in `run_until`.

        Raises:
            ModelClosedError: The engine was closed, or belongs to the process that this one was forked from.
        """
        self._check_process()
        with self._lock:
            self.check_usable()
            for row in rows:
                row.left = False
                self._waiting.append(row)

    def check_usable(self) -> None:
        """Refuse to compute where that is not possible any more.

        Raises:
            ModelClosedError: The engine was closed, or belongs to the process that this one was forked from.
        """
        self._check_process()
        if self._closed:
            raise ModelClosedError("the model is closed: load it again")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise ModelClosedError(
                "the model was loaded before this process was forked, and its threads are not here: "
                "load it again in this process"
            )

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
            ModelClosedError: The engine belongs to the process that this one was forked from.
        """
        self._check_process()
        me = threading.get_ident()
        if self._computed_by == me and self._in_receive:
            raise OptionError("a logits_processor was about to use the model that waits for it: use another model")
        with deferred_interrupt() as interrupt:
            with self._lock:
                while not ready() and not interrupt.is_set() and self._is_computed_by_another():
                    self._wait_for(ready)
                if ready() or interrupt.is_set():
                    self._pass_on()
                    return
                self._computed_by = me
            try:
                while not ready() and not interrupt.is_set() and not is_held():
                    self._prepare_step()
                    if ready():
                        break
                    self._step()
                    if self._waiters or self._somebody_left:
                        self._tell_others()
            finally:
                with self._lock:
                    self._computed_by = None
                    self._tell_others()
                    self._pass_on()
            hold()

    def _wait_for(self, ready: Callable[[], object]) -> None:
        """Wait, with the lock held, until the computing thread finds `ready()` true or stops computing."""
        waiter = _Waiter(ready, threading.Condition(self._lock))
        self._waiters.append(waiter)
        # Ctrl-C reaches the main thread alone, and does not wake it while it is deferred.
        is_main = threading.current_thread() is threading.main_thread()
        try:
            waiter.condition.wait(_INTERRUPT_SECONDS if is_main else None)
        finally:
            self._waiters.remove(waiter)

    def _pass_on(self) -> None:
        """Let a thread that still waits for something compute, if nobody does any more."""
        if self._computed_by is None:
            unfinished = next((waiter for waiter in self._waiters if not waiter.ready()), None)
            if unfinished is not None:
                unfinished.condition.notify()

    def _tell_others(self) -> None:
        with self._lock:
            if self._somebody_left:
                self._remove_interrupted()
            self._wake_ready()

    def _wake_ready(self) -> None:
        """Wake the threads that have what they wait for; others would only take time from those that compute."""
        for waiter in self._waiters:
            if waiter.ready():
                waiter.condition.notify()

    def _prepare_step(self) -> None:
        nothing_new = not self._waiting and not self._somebody_left and not self._prefilling
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
            self.wait_for_step()
            for row in rows:
                row.left = True
            self._prefilling, self._decoding = [], []
            self._waiting.clear()
            self._session.close()

    def wait_for_step(self) -> None:
        """Wait until no other thread computes."""
        if os.getpid() != self._process:
            return
        with self._lock:
            while self._is_computed_by_another():
                self._wait_for(lambda: not self._is_computed_by_another())

    def _all_rows(self) -> list[Row]:
        return [*self._decoding, *self._prefilling]

    def _step(self) -> None:
        """Decode first: so the first token of a row that ends its prefill now reaches its caller at once."""
        try:
            if self._decoding:
                self._decode()
            self._prefill_step()
        except Exception as error:  # noqa: BLE001 - whatever the session raises belongs to those whose rows it was
            self._fail(self._all_rows(), error)
        self._remove_done()

    def _prefill_step(self) -> None:
        """Make one run; rows that need none, because their prompt is known, join in the same step."""
        if not self._prefilling:
            self._begin_next()
        self._prefill_run()
        while not self._prefilling and self._next_is_known():
            self._begin_next()
            self._prefill_run()

    def _next_is_known(self) -> bool:
        with self._lock:
            row = self._waiting[0] if self._waiting else None
        slot = len(self._decoding)
        return row is not None and slot < self._most_rows and self._prefill.knows(row, slot)

    def _begin_next(self) -> None:
        """Let the row that waits longest begin, in the slot after those that decode."""
        with self._lock:
            waiting = len(self._waiting)
            if not waiting or len(self._decoding) >= self._most_rows:
                return
            row = self._waiting.popleft()
            self._prefilling = [row]
        first_time = not row.started_at
        try:
            self._make_room(min(self._most_rows, len(self._decoding) + waiting))
            if len(self._decoding) >= self._session.slots:  # it waits on, until another has ended
                with self._lock:
                    self._waiting.appendleft(row)
                self._prefilling = []
                return
            row.started_at = row.started_at or time.perf_counter()
            self._prefill.begin(row, len(self._decoding))
        except Exception as error:  # noqa: BLE001 - belongs to the row that begins; nobody else is touched
            row.prefilled = 0
            self._fail([row], error)
            self._prefilling, row.left = [], True
            return
        if first_time:
            row.reused = row.prefilled
        self._prefilling += self._take_companions(row)

    def _take_companions(self, first: Row) -> list[Row]:
        """Take rows out of the queue that are computed in one run with the one that begins."""
        slot, slots = len(self._decoding), min(self._session.slots, self._most_rows)
        with self._lock:
            waiting = list(islice(self._waiting, _CANDIDATES))
        # Without the lock, because the session may try prompts out. Others only append to the queue meanwhile.
        rows = self._prefill.companions(first, slot, waiting, slots - slot)
        with self._lock:
            for row in rows:
                self._waiting.remove(row)
        for row in rows:
            row.started_at = row.started_at or time.perf_counter()
        return rows

    def _make_room(self, slots: int) -> None:
        in_use = {slot: len(row.tokens) - 1 for slot, row in enumerate(self._decoding)}
        wanted = 1 << (slots - 1).bit_length()  # doubled, so that it happens rarely
        while wanted > self._session.slots:
            try:
                self._session.reserve_slots(wanted, self._prefill.lengths() | in_use)
            except (DeviceError, MemoryError):
                # Fewer side by side take longer, but all are answered.
                wanted //= 2
                self._most_rows = max(wanted, self._session.slots)

    def _prefill_run(self) -> None:
        """Compute the next chunk of a prompt, or several prompts; rows whose prompt is computed decode from then on.

        If a row is interrupted, nothing is computed; it ends with this step, and the others begin again.
        """
        rows, slot = self._prefilling, len(self._decoding)
        if len(rows) > 1:
            for part in self._prefill.compute_batch(rows, slot) or []:
                tokens = len(rows[0].tokens)
                self._deliver(rows[0], part)
                rows[0].prefilled = tokens
                self._decoding.append(rows.pop(0))
        elif rows:
            logits = self._prefill.compute_chunk(rows[0], slot)
            if logits is None:
                return
            is_whole = rows[0].prefilled == len(rows[0].tokens)
            self._deliver(rows[0], logits)
            if is_whole:
                self._decoding.append(rows.pop(0))

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
        """Give a row its logits, if it wants any, or the token that was chosen for it."""
        if not isinstance(outcome, int) and not len(outcome):
            return
        self._in_receive = True
        try:
            if isinstance(outcome, int):
                row.receive_likeliest(outcome)
            else:
                row.receive(outcome)
            if row.done or row.restarts:
                self._somebody_done = True
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for the row
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
            self._wake_ready()  # before the next step, which may take long

    def _remove_done(self) -> None:
        """Take out the rows that are done or restart, and close the gaps: the last row moves into the free slot."""
        if not self._somebody_done:
            return
        self._somebody_done = False
        slot_of_prefilling = len(self._decoding)
        for row in self._prefilling:
            if row.done:
                self._let_go(row, slot_of_prefilling, row.prefilled)
        self._prefilling = [row for row in self._prefilling if not row.done]
        remaining = list(self._decoding)
        for slot in reversed(range(len(remaining))):
            row = remaining[slot]
            if row.done:
                self._let_go(row, slot, len(row.tokens) - 1)
            if row.done or row.restarts:
                last = remaining.pop()
                if slot < len(remaining):
                    self._prefill.copy_slot(len(remaining), slot, len(last.tokens) - 1)
                    remaining[slot] = last
        restarting = [row for row in self._decoding if row.restarts and not row.done]
        self._decoding = remaining
        if self._prefilling and self._prefilling[0].prefilled and slot_of_prefilling != len(remaining):
            self._prefill.copy_slot(slot_of_prefilling, len(remaining), self._prefilling[0].prefilled)
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
        self._prefill.release_spare_slots()

    def _let_go(self, row: Row, slot: int, length: int) -> None:
        if row.keeps_cache and row.failure is None:
            row.final_cache = self._session.save(slot, length)
        row.left = True


def _is_interrupted(row: Row) -> bool:
    return row.interrupted()
