"""Choose the next token of one sequence: its options, its random numbers, what it has said so far.

The steps and their order are specified in `docs/sampling.md`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from gpt2_edge.errors import LogitsError, OptionError
from gpt2_edge.options import GenerationOptions
from gpt2_edge.peaked import PeakedDraw, can_draw
from gpt2_edge.random_uniform import RandomUniform
from gpt2_edge.results import TokenLogprobs
from gpt2_edge.sampling import Logits, TokenIds, choose_token, find_fault, greedy, keep_top_k
from gpt2_edge.token_history import TokenHistory

_OFF: Final = GenerationOptions()
_CHANGE_LOGITS: Final = (
    "logit_bias",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "no_repeat_ngram_size",
    "banned_tokens",
    "min_new_tokens",
)


class TokenChooser:
    """Chooses the tokens of one continuation, one after another.

    Args:
        options: How to choose. The tokens that they name are in the vocabulary.
        seed: Of the random numbers.
        final_tokens: Tokens that may end the continuation, which `min_new_tokens` holds back.
        position: Random numbers that were drawn before, to go on after them.

    Attributes:
        is_plainly_greedy: Whether it takes the likeliest token of the raw logits and wants nothing else of them.
    """

    def __init__(self, options: GenerationOptions, seed: int, final_tokens: Sequence[int], position: int = 0) -> None:
        self._options = options
        self._uniform = RandomUniform(seed, position)
        self._biased_tokens = np.array(list(options.logit_bias), np.int64)
        self._biases = np.array(list(options.logit_bias.values()), np.float64)
        self._banned_tokens = np.array(options.banned_tokens, np.int64)
        self._final_tokens = np.array(final_tokens, np.int64)
        self._looks_back = _looks_back(options)
        self._always_changes = bool(
            self._looks_back or options.logit_bias or options.banned_tokens or options.logits_processor
        )
        self._peaked_draw = PeakedDraw(options, self._uniform) if can_draw(options) else None
        is_plain = options.logprobs is None and not self._always_changes and not options.min_new_tokens
        self.is_plainly_greedy = is_plain and options.effective_temperature == 0
        self._plain_draw = self._peaked_draw if is_plain else None
        self._history: TokenHistory | None = None
        # A result that is written to what exists already reaches Python sooner than a new number of numpy's.
        self._likeliest = np.zeros((), np.intp)
        self._likeliest_view: Any = self._likeliest.data

    @property
    def position(self) -> int:
        """How many random numbers were drawn; a chooser that starts there goes on with the same ones."""
        return self._uniform.position

    def choose(self, logits: Logits, prompt: Sequence[int], continuation: Sequence[int]) -> int:
        """Choose the next token.

        Args:
            logits: Raw logits, shape [vocabulary]; not changed.
            prompt: Tokens of the prompt.
            continuation: Tokens chosen so far. Prompt and continuation may be others than in the last call.

        Raises:
            LogitsError: The model's logits, the options or the logits processor leave nothing that can be chosen.
            OptionError: The logits processor returns something. What it raises itself is not caught.
        """
        # The same as below, without touching more code than needed: it has to be fetched anew after every step.
        if self.is_plainly_greedy:
            logits.argmax(0, self._likeliest)
            likeliest: int = self._likeliest_view[()]
            largest = logits.item(likeliest)
            if -math.inf < largest < math.inf:
                return likeliest
        elif self._plain_draw is not None:
            drawn = self._plain_draw.draw(logits)
            if drawn is not None:
                return drawn
        if self._always_changes or self._holds_back(continuation):
            return self._choose_from_changed(logits, prompt, continuation)
        return self._choose_from(logits)

    def report(self, logits: Logits, token: int) -> TokenLogprobs | None:
        """Return the log-probabilities that the options ask for, if they do.

        Args:
            logits: Those that the token was chosen from, shape [vocabulary].
            token: What was chosen.
        """
        count = self._options.logprobs
        return None if count is None else report_logprobs(logits, token, count)

    def _choose_from(self, logits: Logits) -> int:
        token = None if self._peaked_draw is None else self._peaked_draw.draw(logits)
        return choose_token(logits, self._options, self._uniform) if token is None else token

    def _choose_from_changed(self, logits: Logits, prompt: Sequence[int], continuation: Sequence[int]) -> int:
        greedy(logits)  # refuses what the model should not have computed, before anybody sees it
        changed = logits.copy()
        self._apply_options(changed, prompt, continuation)
        self._call_processor(changed, prompt, continuation)
        try:
            return self._choose_from(changed)
        except LogitsError:
            raise self._name_culprit(logits, changed, prompt, continuation) from None

    def _apply_options(self, logits: Logits, prompt: Sequence[int], continuation: Sequence[int]) -> None:
        # In float32 a number may become infinite: -inf is never chosen, and +inf is refused in the end.
        with np.errstate(over="ignore", invalid="ignore"):
            logits[self._biased_tokens] += self._biases
            if self._looks_back:
                penalize(logits, self._follow(prompt, continuation), self._options)
        logits[self._banned_tokens] = -math.inf
        if self._holds_back(continuation):
            logits[self._final_tokens] = -math.inf

    def _follow(self, prompt: Sequence[int], continuation: Sequence[int]) -> TokenHistory:
        if self._history is None or not self._history.grows_to(prompt, continuation):
            self._history = TokenHistory(prompt, self._options.no_repeat_ngram_size)
        self._history.grow_to(continuation)
        return self._history

    def _holds_back(self, continuation: Sequence[int]) -> bool:
        return len(continuation) < self._options.min_new_tokens and self._final_tokens.size > 0

    def _call_processor(self, logits: Logits, prompt: Sequence[int], continuation: Sequence[int]) -> None:
        processor: Callable[[Sequence[int], Logits], object] | None = self._options.logits_processor
        if processor is None:
            return
        given = logits[:]  # a view, so that not even its shape can be changed for the steps that follow
        try:
            returned = processor([*prompt, *continuation], given)
        except StopIteration as error:
            # It would end an iteration over a stream as if nothing were wrong, as it would in a generator (PEP 479).
            raise RuntimeError("logits_processor raised StopIteration") from error
        if returned is not None and returned is not given:
            raise OptionError(
                f"logits_processor returned {type(returned).__name__}: "
                "change the logits that it is given in place, and return nothing"
            )

    def _name_culprit(
        self, raw: Logits, changed: Logits, prompt: Sequence[int], continuation: Sequence[int]
    ) -> LogitsError:
        without_processor = raw.copy()
        self._apply_options(without_processor, prompt, continuation)
        fault = find_fault(without_processor)
        if fault is None:
            return LogitsError(
                f"logits_processor left {find_fault(changed)}, so no token can be chosen: "
                "it must leave at least one number above -inf, and neither NaN nor +inf"
            )
        names = " and ".join(
            name
            for name in _CHANGE_LOGITS
            if getattr(self._options, name) != getattr(_OFF, name)
            and (name != "min_new_tokens" or self._holds_back(continuation))
        )
        if np.isneginf(without_processor).all():
            return LogitsError(f"all tokens are forbidden by {names}: allow at least one")
        return LogitsError(f"{names} led to {fault}, so no token can be chosen: give smaller numbers")


def penalize(logits: Logits, history: TokenHistory, options: GenerationOptions) -> None:
    """Make what has been said less likely, in place: steps 2 to 4 as far as they look back."""
    tokens = history.tokens
    if options.repetition_penalty != 1:
        penalize_repetition(logits, tokens, options.repetition_penalty)
    if options.presence_penalty or options.frequency_penalty:
        times = history.times
        logits[tokens] -= options.presence_penalty * (times > 0) + options.frequency_penalty * times
    logits[history.completions] = -math.inf


def penalize_repetition(logits: Logits, tokens: TokenIds, penalty: float) -> None:
    """Divide positive and multiply other logits of different tokens by a penalty, in place.

    Keskar et al. 2019, "CTRL: A Conditional Transformer Language Model for Controllable Generation", section 4.1, with
    the care for the sign that everybody takes since.
    """
    found = logits[tokens]
    logits[tokens] = np.where(found > 0, found / penalty, found * penalty)


def report_logprobs(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Return the log-probabilities of a token and of the `count` likeliest; of equally likely ones the lower id first.

    Args:
        logits: Raw logits, shape [vocabulary], of which one can be chosen.
        token: The chosen token.
        count: How many of the likeliest; at most all are returned.
    """
    likeliest = keep_top_k(logits, count) if count else np.empty(0, np.int64)
    likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    largest = float(logits.max())
    shares = logits.astype(np.float64)
    shares -= largest
    np.exp(shares, out=shares)
    logarithm_of_sum = largest + math.log(shares.sum())
    logprobs = logits[likeliest].astype(np.float64) - logarithm_of_sum
    return TokenLogprobs(
        token=token,
        logprob=float(logits[token]) - logarithm_of_sum,
        likeliest=list(zip(likeliest.tolist(), logprobs.tolist(), strict=True)),
    )


def _looks_back(options: GenerationOptions) -> bool:
    return bool(
        options.repetition_penalty != 1
        or options.presence_penalty
        or options.frequency_penalty
        or options.no_repeat_ngram_size
    )
