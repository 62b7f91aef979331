"""The rows that the engine computes: a continuation, the next token's distribution, a score."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.choosing import TokenChooser
from gpt2_edge.errors import LogitsError
from gpt2_edge.options import GenerationOptions
from gpt2_edge.results import FinishReason, Generation, Piece, Timings, TokenLogprobs
from gpt2_edge.row import Row
from gpt2_edge.session import Logits
from gpt2_edge.text import TextAssembler

_NO_POSITIONS: Final = range(0)
_POSITIONS_AT_ONCE: Final = 4  # whose logits stay in the processor's cache while they are worked on


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a continuation needs to know of its model.

    Attributes:
        context_length: Tokens that the model can hold.
        end_of_text: The token that ends a text; None if there is none.
        token_bytes: Gives the bytes of a token.
    """

    context_length: int
    end_of_text: int | None
    token_bytes: Callable[[int], bytes]


class GenerationRow(Row):
    """Continues a prompt token by token.

    Args:
        prompt: At least one token; prompt and continuation so far together at most `context_length`.
        options: How to choose tokens and when to stop.
        seed: Of this row's random numbers.
        facts: About the model.
        continuation: Tokens that an earlier call chose after the prompt, which this one goes on from.
        draws: Random numbers that it drew.

    Attributes:
        pieces: Text that nobody has taken yet.
        forgot_tokens: Whether the context overflowed, so that `tokens` holds the latest part only.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        seed: int,
        facts: ModelFacts,
        continuation: Sequence[int] = (),
        draws: int = 0,
    ) -> None:
        super().__init__([*prompt, *continuation])
        self.pieces: deque[Piece] = deque()
        self.forgot_tokens = False
        self._prompt = list(prompt)
        self._continuation = list(continuation)
        self._before = len(continuation)
        self._options = options
        self._seed = seed
        self._facts = facts
        final_tokens = set(options.stop_tokens)
        if facts.end_of_text is not None and not options.ignore_eos:
            final_tokens.add(facts.end_of_text)
        self._final_tokens = final_tokens
        self._chooser = TokenChooser(options, seed, sorted(final_tokens), draws)
        self.takes_likeliest = self._chooser.is_plainly_greedy
        self._assembler = TextAssembler(facts.token_bytes, tuple(options.stop))
        self._deadline = None if options.deadline_seconds is None else time.perf_counter() + options.deadline_seconds
        self._can_be_interrupted = options.cancel is not None or self._deadline is not None
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish_reason: FinishReason = "cancelled"
        self._stop: str | int | None = None
        self._chosen = 0
        self._first_token_at = 0.0
        self._last_token_at = 0.0
        if options.max_new_tokens == 0:
            self._finish("length")

    @property
    def draws(self) -> int:
        """How many random numbers were drawn."""
        return self._chooser.position

    def logit_positions(self, start: int, stop: int) -> range:
        """Only the last token so far needs logits."""
        return range(stop - 1, stop) if stop == len(self.tokens) else _NO_POSITIONS

    def receive(self, logits: Logits) -> None:
        """Choose the next token and decide whether it is the last."""
        token = self._chooser.choose(logits[0], self._prompt, self._continuation)
        self._take(token, self._chooser.report(logits[0], token))

    def receive_likeliest(self, token: int) -> None:
        """Take the token that was chosen for it."""
        self._take(token, None)

    def _take(self, token: int, logprobs: TokenLogprobs | None) -> None:
        self._last_token_at = time.perf_counter()
        self._chosen += 1
        if self._chosen == 1:
            self._first_token_at = self._last_token_at
        if token in self._final_tokens:
            self._end_at(token)
            return
        self.tokens.append(token)
        self._continuation.append(token)
        if logprobs is not None:
            self._logprobs.append(logprobs)
        self._emit(self._assembler.add(token, may_stop=len(self._continuation) > self._options.min_new_tokens))
        if self._assembler.stop is not None:
            self._end_at(self._assembler.stop)
        elif self._chosen == self._options.max_new_tokens:
            self._finish("length")
        elif len(self.tokens) > self._facts.context_length:
            self._overflow()

    def interrupted(self) -> bool:
        """Tell whether the caller has gone, has cancelled, or has no more time."""
        return self.abandoned or (self._can_be_interrupted and self._interruption() is not None)

    def end_early(self) -> None:
        """Finish with what there is."""
        self._finish(self._interruption() or "cancelled")

    def result(self) -> Generation:
        """Return what was generated so far."""
        kept = self._assembler.tokens_before_stop
        return Generation(
            text="".join(self._texts),
            tokens=self._continuation[self._before : self._before + kept],
            finish_reason=self._finish_reason,
            stop=self._stop,
            seed=self._seed,
            prompt_tokens=len(self._prompt) + self._before,
            timings=Timings(
                prefill_seconds=self._first_token_at - self.started_at if self._chosen else 0.0,
                decode_seconds=self._last_token_at - self._first_token_at,
                prompt_tokens=len(self._prompt) + self._before - self.reused if self._chosen else 0,
                decoded_tokens=max(0, self._chosen - 1),
            ),
            logprobs=self._logprobs[:kept] if self._options.logprobs is not None else None,
        )

    def text_beyond_tokens(self) -> str:
        """Return the text that belongs to no kept token, because a stop text begins inside of a token."""
        if self._assembler.stop is None:
            return ""
        return "".join(self._texts)[self._assembler.characters_before_stop :]

    def tokens_without_stop(self) -> list[int]:
        """Return `tokens` without those that a stop text lies in."""
        surplus = len(self._continuation) - self._before - self._assembler.tokens_before_stop
        return self.tokens[: len(self.tokens) - surplus]

    def _interruption(self) -> FinishReason | None:
        if self._options.cancel is not None and self._options.cancel.is_set():
            return "cancelled"
        if self._deadline is not None and time.perf_counter() >= self._deadline:
            return "deadline"
        return None

    def _end_at(self, final: str | int) -> None:
        if final == self._facts.end_of_text and final not in self._options.stop_tokens:
            self._finish("eos")
        else:
            self._stop = final
            self._finish("stop")

    def _overflow(self) -> None:
        """The token that was just chosen has no position left."""
        if self._options.overflow == "stop":
            self._finish("context")
            return
        self.tokens = window_of(self.tokens, self._facts.context_length, self._options.keep_tokens)
        self.restarts = self.forgot_tokens = True

    def _emit(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self.pieces.append(Piece(text))

    def _finish(self, reason: FinishReason) -> None:
        tail = self._assembler.finish()
        if self._assembler.stop is not None and self._stop is None:
            # The bytes of a character that was never completed were the end of a stop text.
            reason, self._stop = "stop", self._assembler.stop
        self._texts.append(tail)
        self._finish_reason = reason
        self.pieces.append(Piece(tail, reason))
        self.done = True


def window_of(tokens: Sequence[int], context_length: int, keep_tokens: int) -> list[int]:
    """Return what is kept of tokens that overflow the context: the first ones asked for and the latest.

    Together half a context, so that as much can follow. Learned positions cannot be shifted, so the kept tokens are
    computed again from position 0.
    """
    first = min(keep_tokens, context_length // 2)
    latest = max(1, context_length // 2 - first)
    return [*tokens[:first], *tokens[-latest:]]


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


def token_logprobs(logits: Logits, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    """Return the natural logarithm of the softmax of each row of logits at its token.

    Args:
        logits: Shape [positions, vocabulary].
        tokens: One token id for each position.

    Raises:
        LogitsError: A logit is NaN or +inf, or a row is all -inf.
    """
    logprobs = np.empty(len(logits))
    for first in range(0, len(logits), _POSITIONS_AT_ONCE):
        some = slice(first, first + _POSITIONS_AT_ONCE)
        logprobs[some] = _token_logprobs(logits[some], tokens[some])
    return logprobs


def _token_logprobs(logits: Logits, tokens: Sequence[int]) -> npt.NDArray[np.float64]:
    largest = logits.max(axis=1, keepdims=True)
    if not np.isfinite(largest).all():
        raise LogitsError("the model computed logits that are NaN or infinite: check it with `gpt2-edge verify`")
    shifted = logits - largest
    total = np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64)
    chosen = logits[np.arange(len(logits)), tokens].astype(np.float64)
    logprobs: npt.NDArray[np.float64] = chosen - largest[:, 0].astype(np.float64) - np.log(total)
    return logprobs
