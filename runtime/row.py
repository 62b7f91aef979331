"""What the engine computes: a sequence of tokens that says itself what it wants and when it is done."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.session import Logits


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
