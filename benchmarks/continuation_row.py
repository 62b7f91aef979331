"""The row that continuations are scored with, as lm-evaluation-harness wants them: how likely, and whether greedy."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2_edge.generation import token_logprobs
from gpt2_edge.row import Row
from gpt2_edge.session import Logits


@dataclass(slots=True)
class Continuation:
    """Tokens that the last logits after some inputs score.

    Attributes:
        request: Number of the harness's request that it is of.
        tokens: As many as the inputs, or fewer.
        logprob: Of all of them together, as far as they are scored.
        is_greedy: Whether each is the likeliest, as far as they are scored.
    """

    request: int
    tokens: Sequence[int]
    logprob: float = 0.0
    is_greedy: bool = True


class ContinuationRow(Row):
    """Scores continuations of the same inputs.

    Args:
        inputs: At least one token.
        continuations: What is scored, in place.

    Attributes:
        continuations: The same.
    """

    def __init__(self, inputs: Sequence[int], continuations: Sequence[Continuation]) -> None:
        super().__init__(inputs)
        self.continuations = continuations
        longest = max(len(continuation.tokens) for continuation in continuations)
        self._scored_from = len(self.tokens) - max(1, longest)  # an empty one ends with its inputs, too

    def logit_positions(self, start: int, stop: int) -> range:
        """Logits after as many of the last tokens as the longest continuation has."""
        return range(max(start, self._scored_from), stop)

    def receive(self, logits: Logits) -> None:
        """Score the tokens that follow the ones computed."""
        begin, self._scored_from = self._scored_from, self._scored_from + len(logits)
        for continuation in self.continuations:
            first = len(self.tokens) - len(continuation.tokens)
            own = logits[max(0, first - begin) :]
            following = continuation.tokens[max(0, begin - first) : max(0, self._scored_from - first)]
            continuation.logprob += float(token_logprobs(own, following).sum())
            continuation.is_greedy &= bool((own.argmax(axis=1) == following).all())
        self.done = self._scored_from == len(self.tokens)
