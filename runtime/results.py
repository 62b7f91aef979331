"""What generating and scoring give back."""

import math
from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["length", "eos", "stop", "context", "cancelled", "deadline"]


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a generation took, without loading and tokenization.

    Attributes:
        prefill_seconds: From the first step of the prompt until the first token was chosen.
        decode_seconds: From then until the last token was chosen.
        prompt_tokens: Tokens that were prefilled; without those that were computed before, for an earlier prompt.
        decoded_tokens: Tokens that were chosen after the first.
    """

    prefill_seconds: float
    decode_seconds: float
    prompt_tokens: int
    decoded_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens a second; NaN if nothing was prefilled."""
        return _rate(self.prompt_tokens, self.prefill_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Decoded tokens a second; NaN if no token was decoded."""
        return _rate(self.decoded_tokens, self.decode_seconds)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a streamed text.

    Attributes:
        text: Whole characters only; may be empty in the last piece.
        finish_reason: Why the generation ended, in the last piece; None before.
    """

    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely the model found a chosen token, before any option changed its distribution.

    Attributes:
        token: The chosen token.
        logprob: Natural logarithm of its probability.
        likeliest: The likeliest tokens at this place and their log-probabilities, the likeliest first.
    """

    token: int
    logprob: float
    likeliest: list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished continuation.

    Attributes:
        text: The continuation without the prompt.
        tokens: Its token ids, without a final end-of-text or stop token, and without those that a stop text lies in.
        finish_reason: "length" after `max_new_tokens`, "eos" at an end-of-text, "stop" at a stop text or token,
            "context" when the context was full, "cancelled" when the caller closed the stream or set `cancel`,
            "deadline" when the time was over.
        stop: The stop text, or the stop token, that ended it; None if none did.
        seed: Generating with this seed gives this text again.
        prompt_tokens: How many tokens the prompt had.
        timings: How long it took.
        logprobs: For each token, if they were asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    stop: str | int | None
    seed: int
    prompt_tokens: int
    timings: Timings
    logprobs: list[TokenLogprobs] | None = None


@dataclass(frozen=True, slots=True)
class NextToken:
    """A token that may come next, its text and its probability at temperature 1."""

    text: str
    token: int
    probability: float


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds a text.

    Attributes:
        tokens: The text's token ids.
        logprobs: Natural logarithm of the probability of each token but the first, given those before it.
    """

    tokens: list[int]
    logprobs: list[float]

    @property
    def total_logprob(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """`exp` of the mean negative log-probability of the scored tokens."""
        try:
            return math.exp(-self.total_logprob / len(self.logprobs))
        except OverflowError:
            return math.inf


def _rate(count: int, seconds: float) -> float:
    return count / seconds if count and seconds > 0 else math.nan
