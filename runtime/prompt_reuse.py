"""Which prompts lie in the slots of the KV cache, so that the begin of one is not computed again for another.

What a row chooses must not depend on what ran before it, down to the last bit. Keys and values from decode steps, or
from a prefill that was divided elsewhere, differ in the last bits: a run of one token, for instance, takes other
kernels than a run of two. So only what would be computed by the very same runs is taken over: whole chunks of a
prefill from the first token on, or all of a prompt that is the same to the end, with the logits after it. Prompts that
were computed together count as well: see `StepSession.batch_class`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpt2_edge.session import Logits


def is_last(wanted: range, tokens: Sequence[int]) -> bool:
    """Tell whether logits are wanted after the last of some tokens and no other: these are kept."""
    return wanted == range(len(tokens) - 1, len(tokens))


class Reuse(NamedTuple):
    """What of a prompt is there already.

    Attributes:
        slot: Where.
        tokens: How many of the first tokens.
        logits: After the last token, if it is the whole prompt; shape [1, vocabulary].
    """

    slot: int
    tokens: int
    logits: Logits | None = None


@dataclass(slots=True)
class _Prompt:
    tokens: list[int]
    logits: Logits | None = None


class PromptReuse:
    """Follows what a prefill writes to the slots. Does not touch the slots itself.

    Args:
        chunk_tokens: How many tokens the runs of a prefill compute, but for the last.
    """

    def __init__(self, chunk_tokens: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._prompts: dict[int, _Prompt] = {}

    def find(self, tokens: Sequence[int], wanted: range, slot: int) -> Reuse:
        """Return the most that is there of a prompt.

        Args:
            tokens: Of the prompt.
            wanted: After which of them logits are wanted.
            slot: Is preferred to others that have as much.
        """
        found = Reuse(slot, 0)
        for place in sorted(self._prompts, key=lambda place: place != slot):
            prompt = self._prompts[place]
            if prompt.logits is not None and is_last(wanted, tokens) and prompt.tokens == tokens:
                return Reuse(place, len(tokens), prompt.logits)
            common = self._common_chunks(prompt.tokens, tokens, wanted.start if wanted else len(tokens) - 1)
            if common > found.tokens:
                found = Reuse(place, common)
        return found

    def begin(self, slot: int, kept_tokens: int) -> None:
        """Note that a slot is overwritten after its first `kept_tokens` tokens, or entirely by something else: 0."""
        prompt = self._prompts.pop(slot, None)
        if prompt is not None and kept_tokens:
            self._prompts[slot] = _Prompt(prompt.tokens[:kept_tokens])

    def extend(self, slot: int, start: int, tokens: Sequence[int], logits: Logits | None) -> None:
        """Note that a prefill has written tokens, which are the whole prompt if there are logits after the last."""
        before = self._prompts.get(slot, _Prompt([])).tokens
        if len(before) == start:  # else it goes on from something else
            self._prompts[slot] = _Prompt([*before, *tokens], logits)

    def copy(self, source: int, target: int, length: int) -> None:
        """Note that the first `length` tokens of a slot were copied to another."""
        prompt = self._prompts.get(source)
        self._prompts.pop(target, None)
        if prompt is not None:
            whole = length >= len(prompt.tokens)
            self._prompts[target] = _Prompt(prompt.tokens[:length], prompt.logits if whole else None)

    def lengths(self) -> dict[int, int]:
        """Return the slots that hold something, and how many tokens."""
        return {slot: len(prompt.tokens) for slot, prompt in self._prompts.items()}

    def keep_only(self, slot: int | None) -> None:
        """Forget all slots but one, which becomes slot 0."""
        self._prompts = {0: self._prompts[slot]} if slot is not None else {}

    def _common_chunks(self, one: Sequence[int], other: Sequence[int], limit: int) -> int:
        """Return how many tokens the whole chunks have that both begin with, at most `limit`."""
        size, length = self._chunk_tokens, 0
        while length + size <= min(len(one), limit) and one[length : length + size] == other[length : length + size]:
            length += size
        return length
