"""The story that a REPL's user and the model write in turns, and the way back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gpt2_edge.generation import window_of
from gpt2_edge.model import Model
from gpt2_edge.options import OptionKeywords
from gpt2_edge.results import Generation, NextToken
from gpt2_edge.stream import TextStream
from gpt2_edge.text_session import Session

# What follows a word without a space.
_CLOSING_PUNCTUATION: Final = tuple(".,;:!?)]}…’”")


@dataclass(slots=True)
class _Place:
    """A place in the story to go back to.

    Attributes:
        written: How many tokens the story had.
        seen: The tokens that the session had, which are fewer after the context has overflowed.
    """

    written: int
    seen: list[int]


@dataclass(slots=True)
class _Turn:
    """What was typed or picked, and the reply to it.

    Attributes:
        start: Before what was typed.
        reply: Between what was typed and the reply.
    """

    start: _Place
    reply: _Place


class Story:
    """All tokens of a story, and the session that goes on with it.

    Args:
        model: Writes the replies.
        session: To begin with.
    """

    def __init__(self, model: Model, session: Session) -> None:
        self._model = model
        self._session = session
        end_of_text = model.manifest.end_of_text
        tokens = session.tokens
        # A story that the model began starts from an end-of-text, which is not for readers.
        self._tokens = tokens[1:] if tokens[:1] == [end_of_text] else tokens
        self._turns: list[_Turn] = []

    @property
    def text(self) -> str:
        """The whole text, also what the model no longer sees."""
        return self._model.detokenize(self._tokens)

    @property
    def has_turns(self) -> bool:
        """Whether there is a turn to take back."""
        return bool(self._turns)

    @property
    def forgotten_tokens(self) -> int:
        """How many of the first tokens the model no longer sees."""
        return max(0, len(self._tokens) - len(self._session.tokens))

    def begin_turn(self, typed: str, exactly: bool, options: OptionKeywords) -> None:
        """Append what a user typed.

        Args:
            typed: Text; may be empty.
            exactly: Append it as it stands. Otherwise spaces at its end are dropped, which would make the model
                continue with odd words, and a space is put before it where one is due.
            options: Say what to do if the context is full.

        Raises:
            PromptError: It cannot be appended; nothing is changed.
        """
        start = self._here()
        if not exactly:
            typed = self._space_due_before(typed) + typed.rstrip(" \t")
        self._append(self._model.tokenize(typed), options)
        self._turns.append(_Turn(start, self._here()))

    def pick(self, token: NextToken, options: OptionKeywords) -> None:
        """Append a token, as a turn without a reply."""
        start = self._here()
        self._append([token.token], options)
        self._turns.append(_Turn(start, self._here()))

    def reply(self, options: OptionKeywords) -> TextStream:
        """Let the model continue; `end_reply` has to follow."""
        return self._session.stream(**options)

    def end_reply(self, reply: Generation) -> None:
        """Make a reply part of the story, exactly as it was shown."""
        tokens = reply.tokens
        if self._model.detokenize(tokens) != reply.text:
            # A stop text began inside a token, which the session dropped together with the characters before it.
            self._go_back(self._turns[-1].reply)
            tokens = self._model.tokenize(reply.text)
            self._session.append(tokens)
        self._tokens += tokens

    def undo(self) -> None:
        """Take back the last turn."""
        self._go_back(self._turns.pop().start)

    def undo_reply(self) -> None:
        """Take back the last turn's reply."""
        self._go_back(self._turns[-1].reply)

    def next_tokens(self, count: int, options: OptionKeywords) -> list[NextToken]:
        """Return the likeliest next tokens, the likeliest first."""
        self._make_room([], options)
        return self._session.next_tokens(count)

    def save(self, path: str) -> None:
        """Write what the model sees of the story to a file, for `Model.load_session`."""
        self._session.save(path)

    def _here(self) -> _Place:
        return _Place(len(self._tokens), self._session.tokens)

    def _go_back(self, place: _Place) -> None:
        del self._tokens[place.written :]
        seen = self._session.tokens
        if seen[: len(place.seen)] == place.seen:
            self._session.rewind(len(seen) - len(place.seen))
        else:  # the context has overflowed since
            self._session.replace(place.seen)

    def _append(self, tokens: list[int], options: OptionKeywords) -> None:
        if not self._make_room(tokens, options):
            self._session.append(tokens)
        self._tokens += tokens

    def _make_room(self, tokens: list[int], options: OptionKeywords) -> bool:
        """Forget the oldest tokens if the new ones do not fit and the options allow it; say whether it did.

        The new ones are appended then.
        """
        length = self._model.context_length
        seen = [*self._session.tokens, *tokens]
        if len(seen) <= length or options.get("overflow") != "slide":
            return False
        self._session.replace(window_of(seen, length, options.get("keep_tokens", 0)))
        return True

    def _space_due_before(self, typed: str) -> str:
        before = self._model.detokenize(self._last_tokens())
        if not before or before[-1].isspace() or not typed or typed[0].isspace():
            return ""
        return "" if typed.startswith(_CLOSING_PUNCTUATION) else " "

    def _last_tokens(self) -> Sequence[int]:
        return self._tokens[-4:]  # a character has at most four bytes
