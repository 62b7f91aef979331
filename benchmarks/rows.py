"""The row that speed is measured with: random tokens instead of chosen ones, as llama-bench does."""

import time
from collections.abc import Sequence

from gpt2_edge.row import Row
from gpt2_edge.session import Logits


class RandomTokensRow(Row):
    """Computes a prompt and then given tokens one at a time, whatever the logits say: no sampling, no text.

    Args:
        prompt: At least one token.
        following: Tokens that are computed after it, one in a step.

    Attributes:
        prefilled_at: `time.perf_counter()` when the prompt was computed.
        finished_at: The same for the last token.
    """

    def __init__(self, prompt: Sequence[int], following: Sequence[int] = ()) -> None:
        super().__init__(prompt)
        self.prefilled_at = 0.0
        self.finished_at = 0.0
        self._following = iter(following)

    def logit_positions(self, start: int, stop: int) -> range:
        """Only the last token so far needs logits."""
        return range(stop - 1 if stop == len(self.tokens) else stop, stop)

    def receive(self, logits: Logits) -> None:
        """Go on with the next given token."""
        self.finished_at = time.perf_counter()
        self.prefilled_at = self.prefilled_at or self.finished_at
        token = next(self._following, None)
        if token is None:
            self.done = True
        else:
            self.tokens.append(token)
