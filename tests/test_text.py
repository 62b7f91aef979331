"""Tokens to text: whole characters only, nothing lost, nothing invented; and text to tokens and back."""

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gpt2_edge.errors import ModelFolderError, PromptError
from gpt2_edge.file_content import whole_file
from gpt2_edge.text import TextAssembler
from gpt2_edge.tokenizer import Tokenizer

TOKENIZER_PATH: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller" / "tokenizer.json"
TOKENIZER: Final = Tokenizer(whole_file(TOKENIZER_PATH))
VOCABULARY_SIZE: Final = 8192
END_OF_TEXT: Final = 0

FUZZ: Final = settings(deadline=None, derandomize=True, max_examples=300)

FAMILY: Final = "👩‍👩‍👧‍👦"  # four people, joined by three zero-width joiners
TEXTS: Final = {
    "plain": "Once upon a time,\r\n\tthere was a cat.",
    "accents": "naïve café, e\u0301 composed of two, Ångström",
    "emoji": "🙂👍🏽🇩🇪🏴‍☠️",
    "joined emoji": f"a{FAMILY}b{FAMILY}",
    "cjk": "日本語の物語、中文故事，한국어 이야기",
    "right to left": "שלום עולם مرحبا بالعالم",
    "a real replacement character": "before \ufffd after \ufffd",
    "nul and other controls": "a\x00b\x01\x7f\x80\x85\u2028c",
    "edges of the planes": "\u007f\u0080\u07ff\u0800\uffff\U00010000\U0010ffff",
    "byte order mark": "\ufeffOnce",
    "a special token": "The end<|endoftext|>Once",
    "spaces": "  two  \n\n\n   three \t ",
    "nothing": "",
}
text_cases = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())


def pieces_of(chunks: Sequence[bytes]) -> list[str]:
    """What the assembler gives for each chunk, and at last for the end."""
    assembler = TextAssembler(lambda token: chunks[token])
    return [*map(assembler.add, range(len(chunks))), assembler.finish()]


def check_pieces(chunks: Sequence[bytes]) -> None:
    """The pieces are the text of all bytes, and at no time lag more than an unfinished character behind."""
    pieces = pieces_of(chunks)
    assert "".join(pieces) == as_text(b"".join(chunks))
    so_far, text = b"", ""
    for chunk, piece in zip(chunks, pieces, strict=False):
        so_far += chunk
        text += piece
        assert text in [as_text(so_far[: len(so_far) - held_back]) for held_back in range(4)]
        if (whole := whole_characters(so_far)) is not None:
            assert text == whole


def as_text(data: bytes) -> str:
    return data.decode("utf-8", errors="replace")


def whole_characters(data: bytes) -> str | None:
    """The characters of a text that was cut anywhere; None if it is not the start of a text."""
    for held_back in range(4):
        try:
            whole = data[: len(data) - held_back].decode("utf-8")
        except UnicodeDecodeError:
            continue
        return whole if data[len(data) - held_back :] in STARTS else None
    return None


SOME_CHARACTERS: Final = [*range(0x80, 0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x110000, 64)]
# Every way in which a character may begin, since the last byte holds the lowest 6 bits.
STARTS: Final = {chr(code).encode()[:length] for code in SOME_CHARACTERS for length in range(4)}


def split(data: bytes, borders: Iterable[int]) -> list[bytes]:
    places = [0, *sorted(border % (len(data) + 1) for border in borders), len(data)]
    return [data[start:stop] for start, stop in pairwise(places)]


# The assembler over made-up vocabularies.


@text_cases
@pytest.mark.parametrize("chunk_length", [1, 2, 3, 5, 1000])
def test_valid_text_in_chunks_of_any_length(text: str, chunk_length: int) -> None:
    data = text.encode()
    chunks = [data[start : start + chunk_length] for start in range(0, len(data), chunk_length)]
    check_pieces(chunks)
    pieces = pieces_of(chunks)
    assert "".join(pieces) == text
    assert pieces[-1] == ""
    assert sum(piece.count("\ufffd") for piece in pieces) == text.count("\ufffd")


@FUZZ
@given(text=st.text(), borders=st.lists(st.integers(0, 400)))
@example(text=FAMILY * 2, borders=list(range(50)))
def test_valid_text_split_anywhere(text: str, borders: list[int]) -> None:
    chunks = split(text.encode(), borders)
    check_pieces(chunks)
    assert "".join(pieces_of(chunks)) == text


PARTS_OF_CHARACTERS: Final = st.sampled_from(
    [
        *(bytes([byte]) for byte in b"\xf0\x9f\x8d\xe0\xa0\x90\xf4\xc2\xc0\xffa"),
        *(b"\x98\x80", b"\xf0\x9f\x98", b"\xe2\x80", b"\xed\xa0", b"\xef\xbf\xbd", b""),
        *("語".encode(), FAMILY.encode()),
    ]
)


@FUZZ
@given(chunks=st.lists(st.one_of(PARTS_OF_CHARACTERS, st.binary(max_size=6)), max_size=25))
@example(chunks=[b"\xf0\x9f", b"a", b"\x98\x80"])
@example(chunks=[b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80"])
def test_any_bytes(chunks: list[bytes]) -> None:
    check_pieces(chunks)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_an_end_inside_a_character(length: int) -> None:
    """What is held back comes out as one U+FFFD at the end, and not before."""
    unfinished = "🙂".encode()[:length]
    pieces = pieces_of([b"a", *(bytes([byte]) for byte in unfinished)])
    assert pieces == ["a", *[""] * length, "\ufffd"]


def test_a_character_that_another_one_interrupts() -> None:
    assert pieces_of([b"\xf0\x9f", b"a", b"\x99\x82"]) == ["", "\ufffda", "\ufffd\ufffd", ""]


def test_finishing_twice_adds_nothing() -> None:
    assembler = TextAssembler(lambda token: b"\xe2")
    assert assembler.add(0) == ""
    assert assembler.finish() == "\ufffd"
    assert assembler.finish() == ""


# The assembler over the storyteller's vocabulary.


def single_byte_tokens() -> list[int]:
    return [token for token in range(VOCABULARY_SIZE) if len(TOKENIZER.token_bytes(token)) == 1]


@FUZZ
@given(
    tokens=st.lists(
        st.one_of(st.integers(0, VOCABULARY_SIZE - 1), st.sampled_from(single_byte_tokens()), st.integers(8192, 2**31)),
        max_size=40,
    )
)
def test_random_tokens(tokens: list[int]) -> None:
    check_pieces([TOKENIZER.token_bytes(token) for token in tokens])
    assembler = TextAssembler(TOKENIZER.token_bytes)
    assert "".join([*map(assembler.add, tokens), assembler.finish()]) == TOKENIZER.decode(tokens)


@text_cases
def test_tokens_of_a_text_stream_back_as_that_text(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    check_pieces([TOKENIZER.token_bytes(token) for token in tokens])
    assert "".join(pieces_of([TOKENIZER.token_bytes(token) for token in tokens])) == text


def test_characters_really_are_split_over_tokens() -> None:
    """Otherwise the tests above would show nothing."""
    tokens = TOKENIZER.encode(FAMILY)
    assert len(tokens) > len(FAMILY)


# The tokenizer.


@text_cases
def test_a_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@FUZZ
@given(text=st.text())
def test_any_text_comes_back(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert all(0 <= token < VOCABULARY_SIZE for token in tokens)
    assert b"".join(map(TOKENIZER.token_bytes, tokens)) == text.encode()


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER_PATH))


@FUZZ
@given(text=st.text())
def test_tokens_equal_those_of_transformers(reference: Any, text: str) -> None:
    assert TOKENIZER.encode(text) == reference.encode(text, add_special_tokens=False)


def test_every_token_has_the_bytes_that_transformers_gives_it() -> None:
    from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = json.loads(TOKENIZER_PATH.read_text(encoding="utf-8"))["model"]["vocab"]
    assert len(vocabulary) == VOCABULARY_SIZE
    for text, token in vocabulary.items():
        expected = text.encode() if token == END_OF_TEXT else bytes(byte_of[character] for character in text)
        assert TOKENIZER.token_bytes(token) == expected


def test_every_byte_has_a_token() -> None:
    assert {TOKENIZER.token_bytes(token) for token in single_byte_tokens()} == {bytes([byte]) for byte in range(256)}
    assert len(single_byte_tokens()) == 256


def test_a_nul_byte_is_a_token_like_any_other() -> None:
    tokens = TOKENIZER.encode("a\x00b")
    assert [TOKENIZER.token_bytes(token) for token in tokens] == [b"a", b"\x00", b"b"]


def test_a_special_token_in_a_text_is_recognised() -> None:
    tokens = TOKENIZER.encode("The end<|endoftext|>Once")
    assert tokens.count(END_OF_TEXT) == 1
    assert TOKENIZER.decode([END_OF_TEXT]) == "<|endoftext|>"


def test_a_part_of_a_special_token_is_plain_text() -> None:
    assert END_OF_TEXT not in TOKENIZER.encode("<|endoftext| > <|endoftext")


@pytest.mark.parametrize("token", [VOCABULARY_SIZE, 50257, 2**31 - 1])
def test_an_id_beyond_the_vocabulary_stands_for_no_bytes(token: int) -> None:
    assert TOKENIZER.token_bytes(token) == b""
    assert TOKENIZER.decode([token]) == ""


def test_decoding_nothing() -> None:
    assert TOKENIZER.decode([]) == ""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("\ud800", "U\\+D800 at character 0"),
        ("ab\udfffc", "U\\+DFFF at character 2"),
        ("\ud83d\ude42", "U\\+D83D at character 0"),
    ],
    ids=["high", "low", "a pair as JSON escapes it"],
)
def test_a_lone_surrogate_is_refused(text: str, found: str) -> None:
    with pytest.raises(PromptError, match=found):
        TOKENIZER.encode(text)


@pytest.mark.parametrize("content", ["", "not JSON", "{}", '{"version": "1.0"}', "[" * 100_000], ids=len)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ModelFolderError, match="is not a tokenizer"):
        Tokenizer(whole_file(path))


def test_truncation_and_padding_that_a_tokenizer_file_asks_for_are_ignored(tmp_path: Path) -> None:
    document = json.loads(TOKENIZER_PATH.read_text(encoding="utf-8"))
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    document["padding"] = {
        "strategy": {"Fixed": 16},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    for text in ("Once", TEXTS["plain"]):
        assert Tokenizer(whole_file(path)).encode(text) == TOKENIZER.encode(text)
