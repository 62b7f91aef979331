"""Puts prompts into the slots of the KV cache: takes over what is known of them, and computes the rest in runs.

A run is a chunk of one prompt, or several short prompts whole.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

from gpt2_edge.prefill_batch import companions
from gpt2_edge.prefill_watch import ended_when
from gpt2_edge.prompt_reuse import PromptReuse, is_last
from gpt2_edge.row import Row
from gpt2_edge.session import Logits
from gpt2_edge.session_protocol import BatchPrefillSession, ModelSession

PREFILL_CHUNK_TOKENS: Final = 256  # the most that a run computes, so that those who decode need not wait for long


class Prefill:
    """Computes prompts, and knows what of them the slots hold.

    Args:
        session: Computes.
    """

    def __init__(self, session: ModelSession) -> None:
        self._session = session
        self._batching = session if isinstance(session, BatchPrefillSession) else None
        self._prompts = PromptReuse(PREFILL_CHUNK_TOKENS)
        self._known_logits: Logits | None = None  # after the prompt of the row that began last

    def lengths(self) -> dict[int, int]:
        """Return the slots that hold a prompt that may be taken over, and how many tokens."""
        return self._prompts.lengths()

    def knows(self, row: Row, slot: int) -> bool:
        """Tell whether nothing of a row's prompt would have to be computed, if it began in a slot."""
        return row.initial_cache is None and self._prompts.find(row.tokens, _wanted(row), slot).logits is not None

    def begin(self, row: Row, slot: int) -> None:
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
                self.copy_slot(source, slot, length)
        row.prefilled = length

    def compute_chunk(self, row: Row, slot: int) -> Logits | None:
        """Compute the next tokens of a row that has begun, or none if all are known.

        Returns:
            The logits that the row wants of them; None if it was interrupted.
        """
        start = row.prefilled
        if start == len(row.tokens):
            return self._known_logits
        stop = min(start + PREFILL_CHUNK_TOKENS, len(row.tokens))
        wanted = row.logit_positions(start, stop)
        positions = np.arange(wanted.start - start, wanted.stop - start, dtype=np.int64)
        self._prompts.begin(slot, start)
        with ended_when(row.interrupted, self._session.terminate_prefill, stop - start):
            try:
                logits = self._session.prefill(slot, row.tokens[start:stop], start, positions)
            except Exception:
                if not row.interrupted():
                    raise
                return None
        row.prefilled = stop
        self._note_computed(row, slot, range(start, stop), wanted, logits)
        return logits

    def companions(self, first: Row, slot: int, waiting: Sequence[Row], free_slots: int) -> list[Row]:
        """Return rows that wait whose prompts are computed in one run with that of a row that begins.

        Args:
            first: The row that begins.
            slot: Where.
            waiting: The other rows.
            free_slots: How many there are, that of `first` included.
        """
        if not waiting or first.prefilled or free_slots < 2:
            return []
        batch_class = self._batch_class(first)
        if batch_class is None:
            return []
        candidates = []
        computed = {_reusable_prompt(first)} - {None}
        for row in waiting:
            prompt = _reusable_prompt(row)
            # Equal prompts are computed once: the others are known then.
            if self._batch_class(row) == batch_class and prompt not in computed and not self.knows(row, slot):
                candidates.append(row)
                if prompt is not None:
                    computed.add(prompt)
        lengths = [len(row.tokens) for row in candidates]
        return [candidates[index] for index in companions(len(first.tokens), lengths, free_slots, PREFILL_CHUNK_TOKENS)]

    def compute_batch(self, rows: Sequence[Row], first_slot: int) -> list[Logits] | None:
        """Compute prompts of which nothing is computed yet, each into a slot of its own.

        Args:
            rows: A row and its companions.
            first_slot: Of the first row; the others follow.

        Returns:
            The logits that each row wants; None if one was interrupted, and then nothing is computed.

        Raises:
            TypeError: The session cannot compute several prompts in one run.
        """
        if self._batching is None:
            raise TypeError(f"{type(self._session).__name__} has no prefill_batch")
        wanted = [_wanted(row) for row in rows]
        for slot in range(first_slot, first_slot + len(rows)):
            self._prompts.begin(slot, 0)
        padded_tokens = len(rows) * max(len(row.tokens) for row in rows)
        with ended_when(lambda: _any_interrupted(rows), self._session.terminate_prefill, padded_tokens):
            try:
                logits = self._batching.prefill_batch(
                    first_slot,
                    [row.tokens for row in rows],
                    [np.arange(each.start, each.stop, dtype=np.int64) for each in wanted],
                )
            except Exception:
                if not _any_interrupted(rows):
                    raise
                return None
        ends = np.cumsum([len(each) for each in wanted]).tolist()
        parts = [logits[end - len(each) : end] for end, each in zip(ends, wanted, strict=True)]
        for index, (row, each, part) in enumerate(zip(rows, wanted, parts, strict=True)):
            self._note_computed(row, first_slot + index, range(len(row.tokens)), each, part)
        return parts

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a slot to another."""
        self._prompts.begin(target, 0)
        self._session.copy_slot(source, target, length)
        self._prompts.copy(source, target, length)

    def release_spare_slots(self) -> None:
        """Give all slots but one back, and keep the longest prompt in it."""
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

    def _batch_class(self, row: Row) -> int | None:
        if self._batching is None or row.initial_cache is not None:
            return None
        return self._batching.batch_class(len(row.tokens))

    def _note_computed(self, row: Row, slot: int, computed: range, wanted: range, logits: Logits) -> None:
        last = logits.copy() if is_last(wanted, row.tokens) else None
        self._prompts.extend(slot, computed.start, row.tokens[computed.start : computed.stop], last)


def _wanted(row: Row) -> range:
    """Return after which tokens of its prompt a row wants logits."""
    return row.logit_positions(0, len(row.tokens))


def _reusable_prompt(row: Row) -> tuple[int, ...] | None:
    """Return a row's prompt, if another row need not compute it again; None if it wants more than the last logits."""
    return tuple(row.tokens) if is_last(_wanted(row), row.tokens) else None


def _any_interrupted(rows: Sequence[Row]) -> bool:
    return any(row.interrupted() for row in rows)
