"""Which of the prompts that wait are computed in one run.

A run reads all weights once, whatever it computes, so that of a short prompt mostly pays for that. Prompts of one run
are padded to the longest of them, and padding costs as much as tokens do. On two cores, for GPT-2's smallest shape,
the weights cost as much as 36 tokens at full precision and at INT8, and 6 at INT4. Random lengths from 5 to 60 tokens
take the least time, or nearly, with 4 tokens of padding for each prompt that joins, whichever of these it is; more
wastes at INT4 what it saves.
"""

from collections.abc import Sequence
from typing import Final

MOST_PADDING_TOKENS: Final = 4  # by each prompt that joins


def companions(first: int, waiting: Sequence[int], most_prompts: int, most_tokens: int) -> list[int]:
    """Return which prompts are computed in one run with the one whose turn it is: those of the most similar lengths.

    Args:
        first: Tokens of the prompt whose turn it is.
        waiting: Tokens of each of the others, in their order, which counts where lengths are equally similar.
        most_prompts: In a run, at least one.
        most_tokens: In a run, padding included.

    Returns:
        Indices into `waiting`.
    """
    chosen: list[int] = []
    prompts, longest = 1, first
    for index in sorted(range(len(waiting)), key=lambda index: abs(waiting[index] - first)):
        if prompts == most_prompts:
            break
        new_longest = max(longest, waiting[index])
        size = (prompts + 1) * new_longest
        padding = size - prompts * longest - waiting[index]
        if size <= most_tokens and padding <= MOST_PADDING_TOKENS:
            chosen.append(index)
            prompts, longest = prompts + 1, new_longest
    return chosen
