"""Score texts of any length, through windows that each fit the context; `docs/scoring.md` is the specification."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from gpt2_edge.core import ModelCore, Prompt
from gpt2_edge.errors import ContextLengthError, OptionError, PromptError
from gpt2_edge.generation import token_logprobs
from gpt2_edge.results import Score
from gpt2_edge.row import Row
from gpt2_edge.session import Logits


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text that the model sees at once, from its position 0 on.

    Attributes:
        begin: Index of the first token that the model sees.
        end: Index after the last one.
        first_scored: Index of the first token that is scored here, and not in an earlier window; all up to `end` are.
    """

    begin: int
    end: int
    first_scored: int


def windows_of(token_count: int, context_length: int, stride: int) -> Iterator[Window]:
    """Yield the windows in which a text is scored: they begin `stride` tokens apart, the last ends with the text.

    Args:
        token_count: Tokens of the text, at least 2.
        context_length: Tokens of a window.
        stride: From 1 to `context_length - 1`, so that each scored token has at least one before it in its window.
    """
    first_scored = 1
    for begin in range(0, token_count, stride):
        end = min(begin + context_length, token_count)
        yield Window(begin, end, first_scored)
        if end == token_count:
            return
        first_scored = end


def check_stride(stride: int | None, context_length: int) -> int:
    """Return the stride to use: the given one, or half the context.

    Raises:
        OptionError: It is not allowed.
    """
    if stride is None:
        return max(1, context_length // 2)
    if not isinstance(stride, int) or isinstance(stride, bool) or not 1 <= stride < context_length:
        raise OptionError(
            f"stride is {stride!r}: give an integer from 1 to {context_length - 1}, one less than the model's context"
        )
    return stride


def check_scorable(tokens: Sequence[int], context_length: int, name: str = "the text") -> None:
    """Refuse a text that cannot be scored.

    Raises:
        PromptError: It has fewer than two tokens, or the model cannot see two at once.
    """
    if len(tokens) < 2:
        raise PromptError(
            f"{name} has {len(tokens)} token{'' if len(tokens) == 1 else 's'}: "
            "a score needs at least 2, since the first has nothing before it"
        )
    if context_length < 2:
        raise ContextLengthError(len(tokens), context_length)


def score_texts(
    core: ModelCore,
    texts: Sequence[Prompt],
    stride: int | None = None,
    on_scored: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """Score texts, each as if it were alone.

    Args:
        core: The model.
        texts: Texts or token ids.
        stride: Tokens from the begin of one window to that of the next; None takes half the context.
        on_scored: Called as the work goes on, with how many more tokens were scored.

    Raises:
        OptionError: The stride is not allowed.
        PromptError: A text cannot be used, or has fewer than two tokens.
    """
    stride = check_stride(stride, core.facts.context_length)
    scores = [Score(tokens, []) for tokens in _token_lists(core, texts)]

    def take(row: _WindowRow) -> None:
        row.score.logprobs.extend(row.logprobs)
        on_scored(len(row.logprobs))

    # Sorted, so that short texts of similar lengths are computed together.
    rows = (
        _WindowRow(score, window)
        for score in sorted(scores, key=lambda score: len(score.tokens), reverse=True)
        for window in windows_of(len(score.tokens), core.facts.context_length, stride)
    )
    core.run_each(rows, take)
    return scores


def _token_lists(core: ModelCore, texts: Sequence[Prompt]) -> list[list[int]]:
    token_lists = [core.tokens(text) for text in texts]
    for index, tokens in enumerate(token_lists):
        name = "the text" if len(texts) == 1 else f"text {index} of the list"
        check_scorable(tokens, core.facts.context_length, name)
    return token_lists


class _WindowRow(Row):
    """Scores the tokens of one window.

    Attributes:
        score: What the window is a part of; it is not changed here.
        logprobs: Natural logarithms, for the tokens from the window's `first_scored` on, so far.
    """

    def __init__(self, score: Score, window: Window) -> None:
        super().__init__(score.tokens[window.begin : window.end])
        self.score = score
        self.logprobs: list[float] = []
        self._first_scored = window.first_scored - window.begin

    def logit_positions(self, start: int, stop: int) -> range:
        """Logits after each token that comes before a scored one."""
        return range(max(start, self._first_scored - 1), min(stop, len(self.tokens) - 1))

    def receive(self, logits: Logits) -> None:
        """Score the tokens that follow the ones computed."""
        first = self._first_scored + len(self.logprobs)
        following = self.tokens[first : first + len(logits)]
        self.logprobs.extend(token_logprobs(logits, following).tolist())
        self.done = first + len(following) == len(self.tokens)
