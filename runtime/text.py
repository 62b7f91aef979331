"""From tokens to text: bytes, whole characters, stop texts, pieces."""

import codecs
from collections.abc import Callable, Sequence
from itertools import pairwise


class TextAssembler:
    """Turns the tokens of a continuation into text that only ever grows by whole characters, up to a stop text.

    A character may be spread over several tokens; its bytes are held back until it is whole. Bytes that can never
    become one are U+FFFD, as `bytes.decode("utf-8", errors="replace")` has it. What may be the beginning of a stop
    text is held back too, until it is one or cannot become one. So the pieces put together are the text.

    Args:
        token_bytes: Gives the bytes of a token.
        stops: Texts that end the text; none of them empty.

    Attributes:
        stop: The stop text that was found; None before. Of several the one that begins first, and of those the
            longest.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], stops: Sequence[str] = ()) -> None:
        self.stop: str | None = None
        self._token_bytes = token_bytes
        self._stops = sorted(stops, key=len, reverse=True)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._given = 0  # characters that were returned
        self._ends: list[int] = []  # for each token how many characters there were after it, held ones included

    def add(self, token: int, may_stop: bool = True) -> str:
        """Return the characters that this token makes certain, perhaps none.

        Args:
            token: The next token.
            may_stop: Whether a stop text in what this token adds ends the text.
        """
        return self._take(self._decoder.decode(self._token_bytes(token)), may_stop, token_ends=True)

    def finish(self) -> str:
        """Return what is still held back; a character that was never completed is U+FFFD."""
        if self.stop is not None:
            return ""
        text = self._take(self._decoder.decode(b"", final=True), may_stop=True, token_ends=False)
        text, self._held = text + self._held, ""
        return text

    @property
    def tokens_before_stop(self) -> int:
        """How many of the first tokens lie wholly before the stop text; all of them if none was found."""
        if self.stop is None:
            return len(self._ends)
        # A token that ends where the stop text begins without having ended a character holds bytes of the stop text.
        complete = (end < self._given or before < end == self._given for before, end in pairwise((0, *self._ends)))
        return sum(complete)

    @property
    def characters_before_stop(self) -> int:
        """How many characters these tokens have."""
        tokens = self.tokens_before_stop
        return self._ends[tokens - 1] if tokens else 0

    def _take(self, text: str, may_stop: bool, token_ends: bool) -> str:
        self._held += text
        if token_ends:
            self._ends.append(self._given + len(self._held))
        certain = len(self._held)
        if may_stop and self._stops:
            found = self._find_stop()
            if found is not None:
                certain, self.stop = found
            else:
                certain -= self._possible_beginning()
        given = self._held[:certain]
        self._held = self._held[certain:] if self.stop is None else ""
        self._given += len(given)
        return given

    def _find_stop(self) -> tuple[int, str] | None:
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        return min(places, key=lambda found: found[0], default=None)

    def _possible_beginning(self) -> int:
        """Length of the longest end of the held text that is the beginning of a stop text."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
