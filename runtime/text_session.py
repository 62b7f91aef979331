"""A text that grows turn by turn: append, generate, go back, branch, save. Nothing is computed twice."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from gpt2_edge.core import ModelCore, Prompt, row_seeds
from gpt2_edge.errors import ContextLengthError, SessionError
from gpt2_edge.generation import GenerationRow, NextTokenRow, window_of
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.options import GenerationOptions, OptionKeywords, Overflow, checked_integer
from gpt2_edge.results import Generation, NextToken
from gpt2_edge.session_file import SessionState, save_session
from gpt2_edge.stream import TextStream


class Session:
    """A text and the keys and values of its tokens; made by `Model.session`.

    A session is used by one caller at a time; many sessions of one model may be used at once.

    Where generated tokens are gone on from, their keys and values come from decode steps, which differ from those of
    a prefill of the same tokens in the last bits: so a session may choose other tokens than a fresh prompt of the
    same text would, very rarely at full precision and more often at INT8, whose rounding amplifies it.

    Args:
        core: Of the model.
        state: To begin with.
    """

    def __init__(self, core: ModelCore, state: SessionState) -> None:
        self._core = core
        self._state = state
        self._row: GenerationRow | None = None  # what is being generated, until the state has taken it over
        self._lock = threading.RLock()  # guards the two; held for moments, never while something is computed

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        with self._in_use() as state:
            return list(state.tokens)

    @property
    def text(self) -> str:
        """The text of all tokens so far, without the end-of-text token that a text from nothing starts from.

        After the context has slid, that is the kept part only.
        """
        with self._in_use() as state:
            tokens = state.tokens
        return self._core.tokenizer.decode(tokens[1:] if tokens[:1] == (self._core.facts.end_of_text,) else tokens)

    def append(self, text: Prompt, *, overflow: Overflow = "stop", keep_tokens: int = 0) -> None:
        """Add text or token ids; they are computed at the next `generate`.

        A text is tokenized by itself, without regard to what stands before it.

        Args:
            text: What to add.
            overflow: If there is no room: "stop" is an error, "slide" forgets the oldest tokens.
            keep_tokens: With "slide": so many of the first tokens are never forgotten.

        Raises:
            PromptError: It cannot be used; `ContextLengthError` if there is no room. The session stays as it was.
            OptionError: `overflow` or `keep_tokens` is not allowed, or the latter is given without "slide".
        """
        GenerationOptions(overflow=overflow, keep_tokens=keep_tokens)
        added = self._core.tokens(text)
        with self._in_use() as state:
            tokens, cache = (*state.tokens, *added), state.cache
            if len(tokens) > self._core.facts.context_length and overflow == "slide":
                tokens, cache = tuple(window_of(tokens, self._core.facts.context_length, keep_tokens)), None
            self._core.check_length(tokens)
            self._state = replace(state, prompt=tokens, continuation=(), cache=cache)

    def replace(self, text: Prompt) -> None:
        """Make the whole text another; what it has in common with the old one at the start is not computed again.

        Raises:
            PromptError: It cannot be used; `ContextLengthError` if there is no room. The session stays as it was.
        """
        tokens = tuple(self._core.tokens(text))
        self._core.check_length(tokens)
        with self._in_use() as state:
            pairs = zip(tokens, state.tokens, strict=False)
            common = next((place for place, (new, old) in enumerate(pairs) if new != old), len(tokens))
            self._state = replace(state, prompt=tokens, continuation=(), cache=_first_of(state.cache, common))

    def rewind(self, n: int) -> None:
        """Take the last n tokens back.

        Raises:
            OptionError: There are fewer, or n is no number of tokens.
        """
        with self._in_use() as state:
            length = len(state.tokens)
            self._state = _first_tokens(state, length - checked_integer("n", n, 0, length))

    def generate(self, **options: Unpack[OptionKeywords]) -> Generation:
        """Continue the text; what is generated belongs to it from then on.

        Args:
            **options: As of `Model.generate`. Without a seed, the random numbers go on where the last call left
                them: two calls give what one call of both lengths gives. Penalties count what was generated since
                the last `append`.

        Raises:
            OptionError: An option is unknown or has a value that is not allowed.
            ContextLengthError: The context is full, and `overflow` is not "slide".
        """
        stream = self._stream(options, begins=True)
        for _ in stream:
            pass
        return stream.result

    def stream(self, **options: Unpack[OptionKeywords]) -> TextStream:
        """Continue the text piece by piece; the session waits until the stream has ended or was closed."""
        return self._stream(options, begins=False)

    def _stream(self, options: OptionKeywords, *, begins: bool) -> TextStream:
        checked = self._core.options(options)
        with self._in_use() as state:
            self._row = self._make_row(state, checked)
            stream = TextStream(self._core.engine, self._row)
            if begins:
                stream.begin()  # so that the session is in use for other threads, before any has waited
        return stream

    def next_tokens(self, k: int = 10) -> list[NextToken]:
        """Return the k likeliest next tokens with their probabilities, the likeliest first; changes nothing.

        Args:
            k: How many; at most the vocabulary.

        Raises:
            OptionError: k is not allowed.
            ContextLengthError: The context is more than full.
        """
        with self._in_use() as state:
            pass
        row = NextTokenRow(self._core.prompt_tokens(state.tokens))
        row.initial_cache = state.cache
        return self._core.next_tokens(row, k)

    def fork(self) -> "Session":
        """Return a session with the same text, which goes on by itself. Costs nothing."""
        with self._in_use() as state:
            return Session(self._core, state)

    def save(self, path: str | Path) -> None:
        """Write the session to a file, for `Model.load_session` of the same model folder.

        Raises:
            SessionError: The file cannot be written.
        """
        with self._in_use() as state:
            pass
        save_session(Path(path), state, self._core.manifest)

    def __reduce__(self) -> Any:
        raise SessionError("a session cannot be copied or pickled: `fork` it, or `save` it and load it again")

    def _make_row(self, state: SessionState, options: GenerationOptions) -> GenerationRow:
        facts = self._core.facts
        if not state.tokens:
            state = replace(state, prompt=tuple(self._core.prompt_tokens("")))
        if len(state.tokens) > facts.context_length:
            if options.overflow != "slide":
                raise ContextLengthError(len(state.tokens), facts.context_length)
            kept = window_of(state.tokens, facts.context_length, options.keep_tokens)
            state = replace(state, prompt=tuple(kept), continuation=(), cache=None)
        seed, draws = state.seed, state.draws
        if options.seed is not None or seed is None:
            (seed,), draws = row_seeds(options.seed, 1), 0
        self._state = replace(state, seed=seed, draws=draws)
        row = GenerationRow(state.prompt, options, seed, facts, continuation=state.continuation, draws=draws)
        row.initial_cache, row.keeps_cache = state.cache, True
        return row

    @contextmanager
    def _in_use(self) -> Iterator[SessionState]:
        """Give the state after what was generated last, and keep other threads from changing it in the block.

        Raises:
            SessionError: Something is still being generated.
        """
        row = self._row
        if row is not None and not row.left and (row.done or row.abandoned):
            self._core.engine.run_until(lambda: row.left)  # without the lock, which those who compute may want
        with self._lock:
            self._take_over_row()
            yield self._state

    def _take_over_row(self) -> None:
        """Make what was generated a part of the state; a row that failed changes nothing."""
        row, state = self._row, self._state
        if row is None:
            return
        if not row.left:
            raise SessionError("the session is generating: wait for its end or close the stream; or fork it before")
        row.abandoned = True  # a stream that was never begun can begin no more
        if row.failure is None:
            if row.forgot_tokens:
                # What was cached before belongs to tokens that are no longer there.
                state = replace(state, prompt=tuple(row.tokens_without_stop()), continuation=(), cache=row.final_cache)
            else:
                continuation = (*state.continuation, *row.result().tokens)
                state = replace(state, continuation=continuation, cache=row.final_cache or state.cache)
            state = replace(state, draws=row.draws, cache=_first_of(state.cache, len(state.tokens)))
            rest = self._core.tokenizer.encode(row.text_beyond_tokens())
            state = replace(state, continuation=(*state.continuation, *rest))
        self._state, self._row = state, None


def _first_tokens(state: SessionState, count: int) -> SessionState:
    prompt = state.prompt[:count]
    continuation = state.continuation[: count - len(prompt)]
    return replace(state, prompt=prompt, continuation=continuation, cache=_first_of(state.cache, count))


def _first_of(cache: SequenceCache | None, tokens: int) -> SequenceCache | None:
    return cache.first(tokens) if cache is not None and tokens else None
