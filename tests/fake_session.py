"""A session that keeps tokens where the real one keeps keys and values, and rows that say what only it would say."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, cast

import numpy as np
import numpy.typing as npt

from gpt2_edge.engine import Engine
from gpt2_edge.prefill import PREFILL_CHUNK_TOKENS
from gpt2_edge.row import Row
from gpt2_edge.row_limit import MAXIMUM_ROWS
from gpt2_edge.session import StepSession

Logits = npt.NDArray[np.float32]
Tokens = Sequence[int]

VOCABULARY: Final = 64
PATIENCE_SECONDS: Final = 30  # for what should take no time at all


def logits_after(tokens: Tokens) -> Logits:
    digest = blake2b(bytes(tokens), digest_size=VOCABULARY).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32)


@dataclass(frozen=True)
class FakeCache:
    saved: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.saved)


class FakeSession:
    """Checks that the engine uses slots as the real session allows.

    Attributes:
        calls: "prefill", "decode 2" (for two rows) and so on, in order.
        on_call: Called with the same text before the call does anything.
        violations: What was done that is not allowed. Raised too, but the engine takes that for a failed step.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.on_call: Callable[[str], None] = lambda call: None
        self.violations: list[AssertionError] = []
        self.closed = False
        self._stored: list[list[int] | None] = [None]
        self._in_use = threading.Lock()
        self._terminated = threading.Event()

    @property
    def slots(self) -> int:
        return len(self._stored)

    most_slots: Final = MAXIMUM_ROWS

    @property
    def spare_slots(self) -> int:
        return self.slots - 1

    def reserve_slots(self, slots: int, lengths: Mapping[int, int]) -> None:
        with self._used_alone(f"reserve {slots}"):
            assert slots <= MAXIMUM_ROWS
            if slots > self.slots:
                kept = {slot: self._first(slot, length) for slot, length in lengths.items()}
                self._stored = [kept.get(slot) for slot in range(slots)]

    def release_spare_slots(self) -> None:
        with self._used_alone("release"):
            if self.slots > 1:
                self._stored = [None]

    def prefill(self, slot: int, tokens: Tokens, start: int, logit_positions: npt.NDArray[np.int64]) -> Logits:
        self._terminated.clear()
        with self._used_alone("prefill"):
            assert 1 <= len(tokens) <= PREFILL_CHUNK_TOKENS
            before = self._first(slot, start) if start else []
            self._stored[slot] = [*before, *tokens]
            rows = [logits_after([*before, *tokens[: position + 1]]) for position in logit_positions.tolist()]
            return np.array(rows, np.float32).reshape(-1, VOCABULARY)

    def decode(self, tokens: Tokens, lengths: Tokens) -> Logits:
        with self._used_alone(f"decode {len(tokens)}"):
            assert 1 <= len(tokens) == len(lengths) <= MAXIMUM_ROWS
            for slot, (token, length) in enumerate(zip(tokens, lengths, strict=True)):
                self._stored[slot] = [*self._first(slot, length), token]
            return np.array([logits_after(cast(list[int], self._stored[slot])) for slot in range(len(tokens))])

    def copy_slot(self, source: int, target: int, length: int) -> None:
        with self._used_alone("copy"):
            assert source != target
            self._first_slot_exists(target)
            self._stored[target] = self._first(source, length)

    def save(self, slot: int, length: int) -> FakeCache:
        with self._used_alone("save"):
            return FakeCache(tuple(self._first(slot, length)))

    def restore(self, slot: int, sequence: FakeCache, length: int) -> None:
        with self._used_alone("restore"):
            self._first_slot_exists(slot)
            assert length <= sequence.tokens
            self._stored[slot] = list(sequence.saved[:length])

    def terminate_prefill(self) -> None:
        self._terminated.set()

    def wait_until_terminated(self) -> None:
        assert self._terminated.wait(PATIENCE_SECONDS), "nobody ended the prefill"
        raise RuntimeError("the run was terminated")

    def close(self) -> None:
        with self._used_alone("close"):
            self.closed = True

    def decode_sizes(self) -> list[int]:
        return [int(call.removeprefix("decode ")) for call in self.calls if call.startswith("decode")]

    @contextmanager
    def _used_alone(self, call: str) -> Iterator[None]:
        is_alone = self._in_use.acquire(blocking=False)
        try:
            assert is_alone, "two threads use the session at once"
            assert not self.closed, "the session is used after it was closed"
            self.calls.append(call)
            self.on_call(call)
            yield
        except AssertionError as violation:
            self.violations.append(violation)
            raise
        finally:
            if is_alone:
                self._in_use.release()

    def _first(self, slot: int, length: int) -> list[int]:
        self._first_slot_exists(slot)
        stored = self._stored[slot]
        assert stored is not None, f"slot {slot} is read, and nothing was written to it"
        assert len(stored) >= length, f"slot {slot} holds {len(stored)} tokens, {length} are read"
        return stored[:length]

    def _first_slot_exists(self, slot: int) -> None:
        assert 0 <= slot < self.slots, f"there are {self.slots} slots, slot {slot} is used"


class BatchingFakeSession(FakeSession):
    """Computes prompts of up to 8 tokens together, and those of 9 to 40."""

    def batch_class(self, tokens: int) -> int | None:
        return int(tokens > 8) if tokens <= 40 else None

    def prefill_batch(
        self, first_slot: int, prompts: Sequence[Tokens], logit_positions: Sequence[npt.NDArray[np.int64]]
    ) -> Logits:
        self._terminated.clear()
        with self._used_alone(f"prefill batch {len(prompts)}"):
            assert len(prompts) > 1
            assert len({self.batch_class(len(prompt)) for prompt in prompts} - {None}) == 1
            assert len(prompts) * max(map(len, prompts)) <= PREFILL_CHUNK_TOKENS
            rows = []
            for slot, prompt, positions in zip(range(first_slot, self.slots), prompts, logit_positions, strict=False):
                self._stored[slot] = list(prompt)
                rows += [logits_after(prompt[: position + 1]) for position in positions.tolist()]
            assert first_slot + len(prompts) <= self.slots, "a prompt has no slot"
            return np.array(rows, np.float32).reshape(-1, VOCABULARY)

    def batch_sizes(self) -> list[int]:
        return [int(call.removeprefix("prefill batch ")) for call in self.calls if call.startswith("prefill batch")]


class Spoken(Row):
    """Takes the likeliest token shifted by `accent`, so that rows with one prompt say different things.

    With a `limit`, it forgets the older half of its tokens whenever there are more, and is computed again.
    """

    def __init__(self, prompt: Tokens, wanted: int, accent: int = 0, limit: int | None = None) -> None:
        super().__init__(prompt)
        self.said: list[int] = []
        self.fails_after: int | None = None
        self._wanted, self._accent, self._limit = wanted, accent, limit
        self._expected = spoken_alone(prompt, wanted, accent, limit)

    def logit_positions(self, start: int, stop: int) -> range:
        return range(stop - 1, stop) if stop == len(self.tokens) else range(0)

    def receive(self, logits: Logits) -> None:
        assert logits.shape == (1, VOCABULARY)
        if len(self.said) == self.fails_after:
            raise ArithmeticError("this row fails")
        token = next_token(logits[0], self._accent)
        self.said.append(token)
        self.tokens.append(token)
        self.done = len(self.said) == self._wanted
        if not self.done and self._limit is not None and len(self.tokens) > self._limit:
            self.tokens = self.tokens[-(self._limit // 2) :]
            self.restarts = True

    @property
    def fails(self) -> bool:
        return self.fails_after is not None and self.fails_after < self._wanted

    def check(self) -> None:
        """What was said must be what is said alone."""
        assert self.failure is None
        assert self.said == self._expected
        self.check_beginning()

    def check_beginning(self) -> None:
        """What was said until the row was ended must be what is said alone so far."""
        assert self.done
        assert self.said == self._expected[: len(self.said)]
        if self.final_cache is not None:
            saved = cast(FakeCache, self.final_cache).saved
            assert list(saved) == self.tokens[: len(saved)]


def next_token(logits: Logits, accent: int) -> int:
    return (int(np.argmax(logits)) + accent) % VOCABULARY


def spoken_alone(prompt: Tokens, wanted: int, accent: int, limit: int | None) -> list[int]:
    tokens, said = list(prompt), []
    while len(said) < wanted:
        said.append(next_token(logits_after(tokens), accent))
        tokens.append(said[-1])
        if limit is not None and len(tokens) > limit:
            tokens = tokens[-(limit // 2) :]
    return said


def made_up_prompt(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


def engine_over(session: FakeSession) -> Engine:
    return Engine(cast(StepSession, session))


def finish(engine: Engine, rows: Sequence[Row]) -> None:
    engine.run_until(lambda: all(row.done for row in rows))


def compute(engine: Engine, *rows: Row) -> None:
    """What a caller does: bring rows, wait for them, and take them out whatever happens."""
    engine.join(rows)
    try:
        finish(engine, rows)
    finally:
        engine.leave(rows)
