"""The rows that the engine computes: a continuation, the next token's distribution, a score."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.engine import Row
from gpt2_edge.errors import LogitsError
from gpt2_edge.options import GenerationOptions
from gpt2_edge.results import FinishReason, Generation, Piece, Timings
from gpt2_edge.sampling import RandomUniform, choose_token
from gpt2_edge.session import Logits
from gpt2_edge.text import TextAssembler

_NO_POSITIONS: Final = range(0)


class GenerationRow(Row):
    """Continues a prompt token by token.

    Args:
        prompt: At least one token, at most `context_length`.
        options: How to choose tokens and when to stop.
        seed: Of this row's random numbers.
        context_length: Tokens that the model can hold.
        end_of_text: The token that ends the text; None if the model has none.
        token_bytes: Gives the bytes of a token.

    Attributes:
        pieces: Text that nobody has taken yet.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        seed: int,
        context_length: int,
        end_of_text: int | None,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        super().__init__(prompt)
        self.pieces: deque[Piece] = deque()
        self._prompt_tokens = len(prompt)
        self._options = options
        self._seed = seed
        self._uniform = RandomUniform(seed)
        self._context_length = context_length
        self._end_of_text = None if options.ignore_eos else end_of_text
        self._assembler = TextAssembler(token_bytes)
        self._texts: list[str] = []
        self._finish_reason: FinishReason = "cancelled"
        self._chosen = 0
        self._first_token_at = 0.0
        self._last_token_at = 0.0
        if options.max_new_tokens == 0:
            self._finish("length")

    def logit_positions(self, start: int, stop: int) -> range:
        """Only the prompt's last token needs logits."""
        return range(stop - 1, stop) if stop == len(self.tokens) else _NO_POSITIONS

    def receive(self, logits: Logits) -> None:
        """Choose the next token and decide whether it is the last."""
        token = choose_token(logits[0], self._options, self._uniform)
        self._last_token_at = time.perf_counter()
        self._chosen += 1
        if self._chosen == 1:
            self._first_token_at = self._last_token_at
        if token == self._end_of_text:
            self._finish("eos")
            return
        self.tokens.append(token)
        self._emit(self._assembler.add(token))
        if self._chosen == self._options.max_new_tokens:
            self._finish("length")
        elif len(self.tokens) > self._context_length:
            self._finish("context")

    def result(self) -> Generation:
        """Return what was generated so far."""
        return Generation(
            text="".join(self._texts),
            tokens=self.tokens[self._prompt_tokens :],
            finish_reason=self._finish_reason,
            seed=self._seed,
            prompt_tokens=self._prompt_tokens,
            timings=Timings(
                prefill_seconds=self._first_token_at - self.started_at,
                decode_seconds=self._last_token_at - self._first_token_at,
                prompt_tokens=self._prompt_tokens if self._chosen else 0,
                decoded_tokens=max(0, self._chosen - 1),
            ),
        )

    def _emit(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self.pieces.append(Piece(text))

    def _finish(self, reason: FinishReason) -> None:
        tail = self._assembler.finish()
        self._texts.append(tail)
        self._finish_reason = reason
        self.pieces.append(Piece(tail, reason))
        self.done = True


class NextTokenRow(Row):
    """Takes the logits after the last token of a prompt.

    Attributes:
        logits: Shape [vocabulary], once the row is done.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        super().__init__(prompt)
        self.logits: Logits = np.empty(0, np.float32)

    def logit_positions(self, start: int, stop: int) -> range:
        """Only the prompt's last token needs logits."""
        return range(stop - 1, stop) if stop == len(self.tokens) else _NO_POSITIONS

    def receive(self, logits: Logits) -> None:
        """Keep the logits."""
        self.logits = logits[0].copy()
        self.done = True


class LogitsRow(Row):
    """Keeps the logits after every token.

    Attributes:
        chunks: Logits, each of shape [some tokens, vocabulary], in order.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(tokens)
        self.chunks: list[Logits] = []

    def logit_positions(self, start: int, stop: int) -> range:
        """Logits after every token."""
        return range(start, stop)

    def receive(self, logits: Logits) -> None:
        """Keep the logits."""
        self.chunks.append(logits.copy())
        self.done = sum(map(len, self.chunks)) == len(self.tokens)


class ScoreRow(Row):
    """Takes the log-probability of each token but the first, given those before it.

    Attributes:
        logprobs: Natural logarithms, for the tokens from the second on, so far.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(tokens)
        self.logprobs: list[float] = []

    def logit_positions(self, start: int, stop: int) -> range:
        """Logits after every token but the last, which nothing follows."""
        return range(start, min(stop, len(self.tokens) - 1))

    def receive(self, logits: Logits) -> None:
        """Score the tokens that follow the ones computed."""
        first = len(self.logprobs) + 1
        following = self.tokens[first : first + len(logits)]
        self.logprobs.extend(token_logprobs(logits, following).tolist())
        self.done = len(self.logprobs) == len(self.tokens) - 1


def token_logprobs(logits: Logits, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the natural logarithm of the softmax of each row of logits at its token.

    Args:
        logits: Shape [positions, vocabulary].
        tokens: One token id for each position.

    Raises:
        LogitsError: A logit is NaN or +inf, or a row is all -inf.
    """
    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise LogitsError("the model computed logits that are NaN or infinite: check it with `gpt2-edge verify`")
    total = np.exp(logits - largest).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(logits)), tokens].astype(np.float64)
    logprobs: npt.NDArray[np.float64] = chosen - largest[:, 0].astype(np.float64) - np.log(total)
    return logprobs
