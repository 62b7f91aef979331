"""What the facade and its sessions share: the loaded parts of a model, and how prompts and options are checked."""

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from operator import index
from typing import Final, SupportsIndex, TypeVar

import numpy as np

from gpt2_edge.engine import Engine
from gpt2_edge.errors import ContextLengthError, OptionError, PromptError
from gpt2_edge.generation import ModelFacts, NextTokenRow
from gpt2_edge.manifest import Manifest
from gpt2_edge.options import GenerationOptions, OptionKeywords, checked_integer, make_options, shown
from gpt2_edge.prefill import PREFILL_CHUNK_TOKENS
from gpt2_edge.results import NextToken
from gpt2_edge.row import Row
from gpt2_edge.sampling import keep
from gpt2_edge.tokenizer import Tokenizer

Prompt = str | Sequence[int]

RowType = TypeVar("RowType", bound=Row)

_DRAWN_SEED_BITS: Final = 32
_TOKENS_AHEAD: Final = 2 * PREFILL_CHUNK_TOKENS


class ModelCore:
    """The loaded parts of a model.

    Attributes:
        manifest: What the model folder says about itself.
        tokenizer: Text to tokens and back.
        engine: Computes rows.
        facts: What a continuation needs to know.
    """

    def __init__(self, manifest: Manifest, tokenizer: Tokenizer, engine: Engine) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.engine = engine
        self.facts = ModelFacts(manifest.architecture.context_length, manifest.end_of_text, tokenizer.token_bytes)

    def run(self, rows: Sequence[Row]) -> None:
        """Compute rows until all are done, or one has failed.

        Raises:
            BaseException: The failure of the first row that failed.
        """
        unfinished = [row for row in rows if not row.done]
        self.engine.join(unfinished)
        try:
            for row in unfinished:
                self.engine.run_until(lambda row=row: row.done or any(map(_has_failed, unfinished)))  # type: ignore[misc]
        finally:
            self.engine.leave(unfinished)
        for row in unfinished:
            if row.failure is not None:
                raise row.failure

    def run_each(self, rows: Iterable[RowType], on_done: Callable[[RowType], object]) -> None:
        """Compute rows that are done when their prompts are.

        A few are brought ahead of their turn, as many as two runs compute: so rows of similar lengths that follow each
        other are computed together, and other callers need not wait for all of them.

        Args:
            rows: Taken as they are needed.
            on_done: Called with each row in its turn, when it is done.

        Raises:
            BaseException: The failure of a row, in its turn.
        """
        coming = iter(rows)
        ahead: deque[RowType] = deque()
        try:
            while True:
                while sum(len(row.tokens) for row in ahead) < _TOKENS_AHEAD and (row := next(coming, None)) is not None:
                    ahead.append(row)
                    self.engine.join([row])
                if not ahead:
                    return
                self.engine.run_until(lambda: ahead[0].done)
                row = ahead.popleft()
                if row.failure is not None:
                    raise row.failure
                on_done(row)
        finally:
            self.engine.leave(ahead)

    def options(self, keywords: OptionKeywords) -> GenerationOptions:
        """Return validated options, whose token ids this model has.

        Raises:
            OptionError: An option is unknown or has a value that is not allowed.
        """
        options = make_options(keywords)
        vocabulary_size = self.manifest.architecture.vocabulary_size
        for name in ("logit_bias", "banned_tokens", "stop_tokens"):
            for token in getattr(options, name):
                if token >= vocabulary_size:
                    raise OptionError(
                        f"{name} has token {shown(token)}: this model has tokens 0 to {vocabulary_size - 1}"
                    )
        return options

    def tokens(self, text: Prompt) -> list[int]:
        """Return the token ids of a text, or check token ids.

        Raises:
            PromptError: It is not text or token ids of this model.
        """
        if isinstance(text, str):
            return self.tokenizer.encode(text)
        if isinstance(text, bytes | bytearray):
            raise PromptError(f"the prompt is {_describe(text)}: decode it to text first, or give a list of token ids")
        try:
            given = text.tolist() if isinstance(text, np.ndarray) and text.ndim else list(text)
        except TypeError as error:
            raise PromptError(f"the prompt is {_describe(text)}: give text or a list of token ids") from error
        vocabulary_size = self.manifest.architecture.vocabulary_size
        if all(type(token) is int and 0 <= token < vocabulary_size for token in given):
            return given  # a prompt has many tokens, and each would take 5 us below
        return [self._checked_token(token) for token in given]

    def _checked_token(self, token: object) -> int:
        vocabulary_size = self.manifest.architecture.vocabulary_size
        error = PromptError(f"token {shown(token)}: this model has tokens 0 to {vocabulary_size - 1}")
        # numpy's integers are integers too, but a float is not, and neither is a truth value.
        if isinstance(token, bool) or not isinstance(token, SupportsIndex):
            raise error
        try:
            number = index(token)
        except TypeError:  # an array has the method, whether it is a number or not
            raise error from None
        if not 0 <= number < vocabulary_size:
            raise error
        return number

    def prompt_tokens(self, prompt: Prompt) -> list[int]:
        """Return the tokens of a prompt, which are at least one: an empty one starts from end-of-text.

        Raises:
            PromptError: It cannot be used; `ContextLengthError` if it is too long.
        """
        tokens = self.tokens(prompt)
        if not tokens:
            if self.manifest.end_of_text is None:
                raise PromptError("the prompt is empty, and this model has no end-of-text token to start from")
            tokens = [self.manifest.end_of_text]
        self.check_length(tokens)
        return tokens

    def next_tokens(self, row: NextTokenRow, k: int) -> list[NextToken]:
        """Compute a row and return the k likeliest tokens after it, the likeliest first.

        Raises:
            OptionError: k is not allowed.
        """
        vocabulary_size = self.manifest.architecture.vocabulary_size
        k = checked_integer("k", k, 1, vocabulary_size)
        self.run([row])
        _, weights = keep(row.logits, temperature=1.0)
        probabilities = weights / weights.sum(dtype=np.float64)
        order = np.argsort(-row.logits, kind="stable")[:k]
        return [
            NextToken(self.tokenizer.decode([token]), token, float(probabilities[token])) for token in order.tolist()
        ]

    def check_length(self, tokens: Sequence[int]) -> None:
        """Refuse what does not fit the context.

        Raises:
            ContextLengthError: It does not.
        """
        if len(tokens) > self.facts.context_length:
            raise ContextLengthError(len(tokens), self.facts.context_length)


def _has_failed(row: Row) -> bool:
    return row.failure is not None


def row_seeds(seed: int | None, rows: int) -> list[int]:
    """Return a seed for each row: the first is the given one, or a new one; the others are derived from it."""
    first = secrets.randbits(_DRAWN_SEED_BITS) if seed is None else seed
    return [first, *(_derived_seed(first, row) for row in range(1, rows))]


def _derived_seed(seed: int, row: int) -> int:
    digest = blake2b(f"{seed}/{row}".encode(), digest_size=_DRAWN_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "little")


def _describe(value: object) -> str:
    return f"{type(value).__name__} {shown(value)}"
