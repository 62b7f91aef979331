"""Text to token ids, and token ids back to bytes."""

import re
from collections.abc import Iterable, Iterator
from typing import Final

from tokenizers import Tokenizer as HuggingFaceTokenizer
from tokenizers.pre_tokenizers import ByteLevel

from gpt2_edge.errors import ModelFolderError, PromptError
from gpt2_edge.file_content import FileContent

_SIZE_LIMIT_BYTES: Final = 64_000_000
_PIECE_CHARACTERS: Final = 16_384
_BEFORE_A_WORD: Final = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


class Tokenizer:
    """A byte-level BPE tokenizer, as every GPT-2 has.

    Args:
        content: A `tokenizer.json`.

    Raises:
        ModelFolderError: The file is not a tokenizer.
    """

    def __init__(self, content: FileContent) -> None:
        if content.size_bytes > _SIZE_LIMIT_BYTES:
            raise ModelFolderError(f"{content.path} is larger than {_SIZE_LIMIT_BYTES:,} bytes: not a tokenizer")
        try:
            self._tokenizer = HuggingFaceTokenizer.from_str(content.read().decode("utf-8"))
        except Exception as error:  # the library raises plain Exception for a bad file
            raise ModelFolderError(f"{content.path} is not a tokenizer: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._is_cuttable = _splits_at_every_space(self._tokenizer)
        self._added: dict[int, bytes] = {
            token_id: added.content.encode() for token_id, added in self._tokenizer.get_added_tokens_decoder().items()
        }
        self._bytes_of: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text; tokens such as `<|endoftext|>` are recognised in it.

        Raises:
            PromptError: The text holds a lone surrogate, which no encoding can express.
        """
        if not isinstance(text, str):
            raise PromptError(f"the text is {type(text).__name__}: give a str")
        try:
            pieces = _pieces(text) if self._is_cuttable else [text]
            return [token for piece in pieces for token in self._tokenizer.encode(piece, add_special_tokens=False).ids]
        except (UnicodeEncodeError, TypeError) as error:
            raise PromptError(
                f"the text is not valid Unicode: {_first_surrogate(text)}; decode it with errors='replace'"
            ) from error

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for, which may be a part of a character.

        A token id beyond the tokenizer's vocabulary, which a padded embedding has, stands for no bytes.
        """
        if token not in self._bytes_of:
            self._bytes_of[token] = self._look_up(token)
        return self._bytes_of[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of tokens; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def _look_up(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token]
        text = self._tokenizer.id_to_token(token)
        if text is None:
            return b""
        return bytes(_BYTE_OF_CHARACTER[character] for character in text if character in _BYTE_OF_CHARACTER)


def _splits_at_every_space(tokenizer: HuggingFaceTokenizer) -> bool:
    """Tell whether a word and the space before it never share a token with what comes before, as in every GPT-2."""
    splitter = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        tokenizer.normalizer is None
        and isinstance(splitter, ByteLevel)
        and splitter.use_regex
        and not splitter.add_prefix_space
        and not any(" " in token.content or token.lstrip or token.rstrip for token in added)
    )


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text before words: the library lets no other thread run, and no Ctrl-C through, until it is done."""
    start = 0
    while len(text) - start > _PIECE_CHARACTERS and (found := _BEFORE_A_WORD.search(text, start + _PIECE_CHARACTERS)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte behind each character of GPT-2's vocabulary.

    GPT-2 writes bytes that are printable in Latin-1 as themselves and the other 68, in order, as the characters from
    U+0100 (`bytes_to_unicode` in OpenAI's `encoder.py`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet |= {chr(0x100 + index): byte for index, byte in enumerate(others)}
    return alphabet


_BYTE_OF_CHARACTER: Final = _byte_level_alphabet()


def _first_surrogate(text: str) -> str:
    for position, character in enumerate(text):
        if "\ud800" <= character <= "\udfff":
            return f"a lone surrogate U+{ord(character):04X} at character {position}"
    return "it cannot be encoded as UTF-8"
