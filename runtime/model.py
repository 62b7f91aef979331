"""The facade: load a model folder, generate, stream, look at the next token, score."""

import secrets
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import Final, Self, Unpack, cast, overload

import numpy as np

from gpt2_edge.engine import Engine, Row
from gpt2_edge.errors import ContextLengthError, OptionError, PromptError
from gpt2_edge.folder import ModelFolder, open_folder
from gpt2_edge.generation import GenerationRow, LogitsRow, NextTokenRow, ScoreRow
from gpt2_edge.manifest import Manifest
from gpt2_edge.options import GenerationOptions, OptionKeywords, make_options
from gpt2_edge.results import Generation, NextToken, Piece, Score
from gpt2_edge.sampling import keep
from gpt2_edge.session import Logits, StepSession
from gpt2_edge.threads import usable_cores
from gpt2_edge.tokenizer import Tokenizer

Prompt = str | Sequence[int]
PromptList = list[str] | list[list[int]] | list[str | list[int]]

DEVICES: Final = ("cpu", "auto")
_DRAWN_SEED_BITS: Final = 32


def load(
    folder: str | Path, *, device: str = "auto", threads: int | None = None, verify_hashes: bool = True
) -> "Model":
    """Load a model.

    Args:
        folder: Path of a model folder, or "storyteller" for the bundled model.
        device: "cpu", or "auto" for the best there is, which in this release is the CPU.
        threads: Threads that compute; None takes the cores that this process may really use.
        verify_hashes: Compare every file with the manifest's SHA-256 before it is used.

    Returns:
        A model, which may be used from many threads. Close it, or use it in a `with` block, to free its memory.

    Raises:
        ModelFolderError: The folder is not a model folder, is damaged, or cannot be run.
        OptionError: The device or the number of threads is not allowed.
    """
    if device not in DEVICES:
        raise OptionError(f"device is {device!r}: this release runs on {' or '.join(map(repr, DEVICES))}")
    if threads is None:
        threads = usable_cores()
    elif not isinstance(threads, int) or isinstance(threads, bool) or threads < 1:
        raise OptionError(f"threads is {threads!r}: give an integer, 1 or more")
    opened = open_folder(folder)
    if verify_hashes:
        opened.check_hashes()
    return Model(opened, Tokenizer(opened.tokenizer_path), StepSession(opened, threads))


class Model:
    """A loaded GPT-2; made by `load`.

    Attributes:
        device: Where it runs: "cpu".
        manifest: What the model folder says about itself.
        threads: Threads that compute a step.
    """

    def __init__(self, folder: ModelFolder, tokenizer: Tokenizer, session: StepSession) -> None:
        self.device = "cpu"
        self.manifest: Manifest = folder.manifest
        self.threads = session.threads
        self._tokenizer = tokenizer
        self._engine = Engine(session)

    @property
    def context_length(self) -> int:
        """How many tokens the model can hold, prompt and continuation together."""
        return self.manifest.architecture.context_length

    @overload
    def generate(self, prompt: Prompt, *, n: None = None, **options: Unpack[OptionKeywords]) -> Generation: ...
    @overload
    def generate(self, prompt: Prompt, *, n: int, **options: Unpack[OptionKeywords]) -> list[Generation]: ...
    @overload
    def generate(
        self, prompt: PromptList, *, n: None = None, **options: Unpack[OptionKeywords]
    ) -> list[Generation]: ...
    def generate(
        self, prompt: Prompt | PromptList, *, n: int | None = None, **options: Unpack[OptionKeywords]
    ) -> Generation | list[Generation]:
        """Continue a prompt, or several side by side.

        Args:
            prompt: Text or token ids; an empty one starts from end-of-text, as a new document does. Or a list of
                prompts, of any lengths.
            n: So many samples of one prompt, as a list.
            **options: See `GenerationOptions`. In a list each row has a seed of its own, derived from the given
                one; the first row's is the given one.

        Returns:
            The continuation, or a list of them in the order of the prompts.

        Raises:
            OptionError: An option is unknown or has a value that is not allowed.
            PromptError: A prompt is not text or token ids of this model; `ContextLengthError` if it is too long.
            LogitsError: The model computed NaN.
            ModelClosedError: The model was closed.
        """
        checked = make_options(options)
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise OptionError(f"n is {n!r}: give an integer, 1 or more")
        prompts = _list_of_prompts(prompt)
        if n is not None and prompts is not None:
            raise OptionError("n is for one prompt: repeat the prompts in the list instead")
        if prompts is None:
            prompts = [cast(Prompt, prompt)] * (n or 1)
            one_result = n is None
        else:
            one_result = False
        token_lists = [self._prompt_tokens(each) for each in prompts]
        rows = [
            self._generation_row(tokens, checked, seed)
            for tokens, seed in zip(token_lists, _row_seeds(checked.seed, len(prompts)), strict=True)
        ]
        self._run(rows)
        results = [row.result() for row in rows]
        return results[0] if one_result else results

    def stream(self, prompt: Prompt, **options: Unpack[OptionKeywords]) -> "TextStream":
        """Continue a prompt piece by piece: the same options and the same text as `generate`.

        Args:
            prompt: Text or token ids.
            **options: See `GenerationOptions`.

        Returns:
            An iterator of pieces. Nothing is computed before the first is asked for, and closing it stops.

        Raises:
            OptionError: An option is unknown or has a value that is not allowed.
            PromptError: The prompt is not text or token ids of this model; `ContextLengthError` if it is too long.
        """
        checked = make_options(options)
        (seed,) = _row_seeds(checked.seed, 1)
        return TextStream(self._engine, self._generation_row(self._prompt_tokens(prompt), checked, seed))

    def next_tokens(self, prompt: Prompt, k: int = 10) -> list[NextToken]:
        """Return the k likeliest next tokens with their probabilities, the likeliest first.

        Args:
            prompt: Text or token ids.
            k: How many; at most the vocabulary.

        Raises:
            OptionError: k is not allowed.
            PromptError: The prompt cannot be used.
        """
        vocabulary_size = self.manifest.architecture.vocabulary_size
        if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= vocabulary_size:
            raise OptionError(f"k is {k!r}: give an integer from 1 to {vocabulary_size}")
        row = NextTokenRow(self._prompt_tokens(prompt))
        self._run([row])
        _, weights = keep(row.logits, temperature=1.0)
        probabilities = weights / weights.sum(dtype=np.float64)
        order = np.argsort(-row.logits, kind="stable")[:k]
        return [
            NextToken(self._tokenizer.decode([token]), token, float(probabilities[token])) for token in order.tolist()
        ]

    def score(self, text: Prompt) -> Score:
        """Return the log-probability of each token of a text but the first, given those before it.

        Args:
            text: Text or token ids, at least two tokens, at most the model's context.

        Raises:
            PromptError: The text cannot be used, or has fewer than two tokens.
        """
        tokens = self.tokenize(text) if isinstance(text, str) else self._checked_tokens(text)
        if len(tokens) < 2:
            raise PromptError(
                f"the text has {len(tokens)} token{'' if len(tokens) == 1 else 's'}: "
                "a score needs at least 2, since the first has nothing before it"
            )
        self._check_length(tokens)
        row = ScoreRow(tokens)
        self._run([row])
        return Score(tokens, row.logprobs)

    def logits(self, prompt: Prompt) -> Logits:
        """Return the raw logits after every token of a prompt.

        Args:
            prompt: Text or token ids.

        Returns:
            Logits, float32, shape [tokens, vocabulary].

        Raises:
            PromptError: The prompt cannot be used.
        """
        row = LogitsRow(self._prompt_tokens(prompt))
        self._run([row])
        return np.concatenate(row.chunks)

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return self._tokenizer.encode(text)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of token ids; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(self._checked_tokens(tokens))

    def close(self) -> None:
        """Free the model's memory; what is being generated fails. May be called again."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, rows: Sequence[Row]) -> None:
        unfinished = [row for row in rows if not row.done]
        self._engine.join(unfinished)
        try:
            self._engine.run_until(lambda: all(row.done for row in unfinished))
        finally:
            self._engine.leave(unfinished)
        for row in unfinished:
            if row.failure is not None:
                raise row.failure

    def _generation_row(self, prompt: list[int], options: GenerationOptions, seed: int) -> GenerationRow:
        return GenerationRow(
            prompt,
            options,
            seed,
            self.context_length,
            self.manifest.end_of_text,
            self._tokenizer.token_bytes,
        )

    def _prompt_tokens(self, prompt: Prompt) -> list[int]:
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else self._checked_tokens(prompt)
        if not tokens:
            if self.manifest.end_of_text is None:
                raise PromptError("the prompt is empty, and this model has no end-of-text token to start from")
            tokens = [self.manifest.end_of_text]
        self._check_length(tokens)
        return tokens

    def _check_length(self, tokens: list[int]) -> None:
        if len(tokens) > self.context_length:
            raise ContextLengthError(len(tokens), self.context_length)

    def _checked_tokens(self, tokens: Sequence[int]) -> list[int]:
        vocabulary_size = self.manifest.architecture.vocabulary_size
        try:
            checked = [int(token) for token in tokens]
        except (TypeError, ValueError) as error:
            raise PromptError(f"a prompt is {type(tokens).__name__}: give text or a list of token ids") from error
        for token, given in zip(checked, tokens, strict=True):
            if token != given or not 0 <= token < vocabulary_size:
                raise PromptError(f"token {given!r}: this model has tokens 0 to {vocabulary_size - 1}")
        return checked


class TextStream(Iterator[Piece]):
    """The pieces of a continuation, computed as they are asked for; made by `Model.stream`.

    Leaving the loop early is enough to stop; `close` or a `with` block says so at once.
    """

    def __init__(self, engine: Engine, row: GenerationRow) -> None:
        self._engine = engine
        self._row = row
        self._joined = False

    def __next__(self) -> Piece:
        row = self._row
        if not row.pieces:
            if row.done:
                raise StopIteration
            if not self._joined:
                self._engine.join([row])
                self._joined = True
            try:
                self._engine.run_until(lambda: row.pieces or row.done)
            except BaseException:
                self.close()
                raise
            if row.failure is not None:
                raise row.failure
        return row.pieces.popleft()

    @property
    def result(self) -> Generation:
        """Everything generated so far; `finish_reason` is "cancelled" unless it ended by itself."""
        return self._row.result()

    def close(self) -> None:
        """Stop generating. `result` keeps what was generated; may be called again."""
        self._engine.leave([self._row])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _list_of_prompts(prompt: Prompt | PromptList) -> list[Prompt] | None:
    """Tell a list of prompts, whose first element is a text or a list, from one prompt: None."""
    if isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str | list | tuple):
        return list(cast(Sequence[Prompt], prompt))
    return None


def _row_seeds(seed: int | None, rows: int) -> list[int]:
    """Return a seed for each row: the first is the given one, or a new one; the others are derived from it."""
    first = secrets.randbits(_DRAWN_SEED_BITS) if seed is None else seed
    return [first, *(_derived_seed(first, row) for row in range(1, rows))]


def _derived_seed(seed: int, row: int) -> int:
    digest = blake2b(f"{seed}/{row}".encode(), digest_size=_DRAWN_SEED_BITS // 8).digest()
    return int.from_bytes(digest, "little")
