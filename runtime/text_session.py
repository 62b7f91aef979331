"""A text that grows turn by turn: append, generate, go back, branch, save. Nothing is computed twice."""

from dataclasses import replace
from pathlib import Path
from typing import Unpack

from gpt2_edge.core import ModelCore, Prompt, row_seeds
from gpt2_edge.errors import ContextLengthError, OptionError, SessionError
from gpt2_edge.generation import GenerationRow, NextTokenRow, window_of
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.options import GenerationOptions, OptionKeywords, Overflow
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

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        return list(self._settled().tokens)

    @property
    def text(self) -> str:
        """The text of all tokens so far, without the end-of-text token that a text from nothing starts from.

        After the context has slid, that is the kept part only.
        """
        tokens = self._settled().tokens
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
            OptionError: `overflow` or `keep_tokens` is not allowed.
        """
        GenerationOptions(overflow=overflow, keep_tokens=keep_tokens)
        state = self._settled()
        tokens = (*state.tokens, *self._core.tokens(text))
        cache = state.cache
        if len(tokens) > self._core.facts.context_length and overflow == "slide":
            tokens, cache = tuple(window_of(tokens, self._core.facts.context_length, keep_tokens)), None
        self._core.check_length(tokens)
        self._state = replace(state, prompt=tokens, continuation=(), cache=cache)

    def replace(self, text: Prompt) -> None:
        """Make the whole text another; what it has in common with the old one at the start is not computed again.

        Raises:
            PromptError: It cannot be used; `ContextLengthError` if there is no room. The session stays as it was.
        """
        state = self._settled()
        tokens = tuple(self._core.tokens(text))
        self._core.check_length(tokens)
        pairs = zip(tokens, state.tokens, strict=False)
        common = next((place for place, (new, old) in enumerate(pairs) if new != old), len(tokens))
        self._state = replace(state, prompt=tokens, continuation=(), cache=_first_of(state.cache, common))

    def rewind(self, n: int) -> None:
        """Take the last n tokens back.

        Raises:
            OptionError: There are fewer.
        """
        state = self._settled()
        length = len(state.tokens)
        if not isinstance(n, int) or isinstance(n, bool) or not 0 <= n <= length:
            raise OptionError(f"n is {n!r}: the session has {length} tokens, give an integer from 0 to {length}")
        self._state = _first_tokens(state, length - n)

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
        stream = self.stream(**options)
        for _ in stream:
            pass
        return stream.result

    def stream(self, **options: Unpack[OptionKeywords]) -> TextStream:
        """Continue the text piece by piece; the session waits until the stream has ended or was closed."""
        checked = self._core.options(options)
        self._row = self._make_row(self._settled(), checked)
        return TextStream(self._core.engine, self._row)

    def next_tokens(self, k: int = 10) -> list[NextToken]:
        """Return the k likeliest next tokens with their probabilities, the likeliest first; changes nothing.

        Args:
            k: How many; at most the vocabulary.

        Raises:
            OptionError: k is not allowed.
            ContextLengthError: The context is more than full.
        """
        state = self._settled()
        row = NextTokenRow(self._core.prompt_tokens(state.tokens))
        row.initial_cache = state.cache
        return self._core.next_tokens(row, k)

    def fork(self) -> "Session":
        """Return a session with the same text, which goes on by itself. Costs nothing."""
        return Session(self._core, self._settled())

    def save(self, path: str | Path) -> None:
        """Write the session to a file, for `Model.load_session` of the same model folder.

        Raises:
            SessionError: The file cannot be written.
        """
        save_session(Path(path), self._settled(), self._core.manifest)

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

    def _settled(self) -> SessionState:
        """Return the state after what was generated last; a row that failed changes nothing.

        Raises:
            SessionError: Something is still being generated.
        """
        row, state = self._row, self._state
        if row is None:
            return state
        if not row.done and not row.abandoned and not row.left:
            raise SessionError("the session is generating: wait for its end or close the stream; or fork it before")
        row.abandoned = True  # a stream that was never begun can begin no more
        self._core.engine.run_until(lambda: row.left)
        if row.failure is None:
            state = replace(state, draws=row.draws, cache=row.final_cache or state.cache)
            if row.forgot_tokens:
                state = replace(state, prompt=tuple(row.tokens_without_stop()), continuation=())
            else:
                state = replace(state, continuation=(*state.continuation, *row.result().tokens))
            state = replace(state, cache=_first_of(state.cache, len(state.tokens)))
            rest = self._core.tokenizer.encode(row.text_beyond_tokens())
            state = replace(state, continuation=(*state.continuation, *rest))
        self._state, self._row = state, None
        return state


def _first_tokens(state: SessionState, count: int) -> SessionState:
    prompt = state.prompt[:count]
    continuation = state.continuation[: count - len(prompt)]
    return replace(state, prompt=prompt, continuation=continuation, cache=_first_of(state.cache, count))


def _first_of(cache: SequenceCache | None, tokens: int) -> SequenceCache | None:
    return cache.first(tokens) if cache is not None and tokens else None
