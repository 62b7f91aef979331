"""The logits of given tokens, computed as generated ones are: one after another."""

from collections.abc import Sequence

import numpy as np

from gpt2_edge.model import Model
from gpt2_edge.row import Row
from gpt2_edge.session import Logits


def decoded_logits(model: Model, tokens: Sequence[int], prompts: Sequence[int]) -> list[Logits]:
    """Compute the same tokens in a few rows side by side.

    Args:
        model: Of which.
        tokens: At least one.
        prompts: How many of the first tokens each row computes at once, at least one; the others come one by one.

    Returns:
        Logits after each token, shape [tokens, vocabulary], for each of the rows.
    """
    rows = [_GivenTokensRow(tokens, prompt) for prompt in prompts]
    model._core.run(rows)
    return [np.concatenate(row.chunks) for row in rows]


class _GivenTokensRow(Row):
    def __init__(self, tokens: Sequence[int], prompt: int) -> None:
        super().__init__(tokens[:prompt])
        self.chunks: list[Logits] = []
        self._following = iter(tokens[prompt:])
        self._received = 0

    def logit_positions(self, start: int, stop: int) -> range:
        """Logits after every token."""
        return range(start, stop)

    def receive(self, logits: Logits) -> None:
        """Keep the logits, and go on with the next token when those before it are computed."""
        self.chunks.append(logits.copy())
        self._received += len(logits)
        if self._received < len(self.tokens):
            return
        token = next(self._following, None)
        if token is None:
            self.done = True
        else:
            self.tokens.append(token)
