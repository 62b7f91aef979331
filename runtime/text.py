"""From tokens to text: bytes, whole characters, pieces."""

import codecs
from collections.abc import Callable


class TextAssembler:
    """Turns the bytes of tokens into text that only ever grows by whole characters.

    A character may be spread over several tokens; its bytes are held back until it is whole. Bytes that can never
    become one are U+FFFD, as `bytes.decode("utf-8", errors="replace")` has it, so the pieces put together are the
    text of all bytes put together.

    Args:
        token_bytes: Gives the bytes of a token.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return the characters that this token completes, perhaps none."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """Return what is still held back: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)
