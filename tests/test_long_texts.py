"""A long text is tokenized piece by piece: the same tokens, and other threads run meanwhile."""

import gzip
import json
import threading
import time
from pathlib import Path
from typing import Any, Final, cast

import pytest
from generating import STORY
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HuggingFaceTokenizer

import gpt2_edge
from gpt2_edge import tokenizer as module
from gpt2_edge.file_content import FileContent
from gpt2_edge.tokenizer import Tokenizer

DATA: Final = Path(__file__).resolve().parent / "data" / "gpt2-tokenizer"
END_OF_TEXT: Final = "<|endoftext|>"
PARTS: Final = [
    "a",
    "Z",
    " ",
    "  ",
    " " * 8,
    "\u00a0 \u00a0",  # GPT-2 has a token of these three
    "\n",
    "'s",
    "'re",
    END_OF_TEXT,
    "é",
    "1",
    ".",
    "\t",
    "\u00a0",
    "日",
    "\x1c",
    "\x85",
]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 3)


@pytest.fixture(scope="module")
def whole() -> HuggingFaceTokenizer:
    """GPT-2's own tokenizer, which has tokens of several spaces."""
    vocabulary, merges = (gzip.decompress((DATA / name).read_bytes()) for name in ("vocab.json.gz", "merges.txt.gz"))
    pairs = [(first, second) for first, second in map(str.split, merges.decode().splitlines()[1:])]
    tokenizer = HuggingFaceTokenizer(models.BPE(json.loads(vocabulary), pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


class Content:
    """Stands in for a `tokenizer.json`."""

    def __init__(self, tokenizer: HuggingFaceTokenizer) -> None:
        self.data = tokenizer.to_str().encode()
        self.size_bytes = len(self.data)
        self.path = "tokenizer.json"

    def read(self) -> bytes:
        return self.data


def in_pieces(whole: HuggingFaceTokenizer) -> Tokenizer:
    return Tokenizer(cast(FileContent, Content(whole)))


@pytest.mark.usefixtures("small_pieces")
def test_a_story_has_the_tokens_that_it_has_as_a_whole(whole: HuggingFaceTokenizer) -> None:
    assert in_pieces(whole).encode(STORY) == whole.encode(STORY, add_special_tokens=False).ids


def test_any_text_has_the_tokens_that_it_has_as_a_whole(whole: HuggingFaceTokenizer) -> None:
    tokenizer = in_pieces(whole)

    @settings(max_examples=500, deadline=None, derandomize=True)
    @given(st.lists(st.sampled_from(PARTS) | st.text(max_size=2), max_size=40).map("".join))
    def compare(text: str) -> None:
        assert tokenizer.encode(text) == whole.encode(text, add_special_tokens=False).ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE_CHARACTERS", 1)
        compare()


def add_token(**options: Any) -> Any:
    def change(tokenizer: HuggingFaceTokenizer) -> None:
        tokenizer.add_tokens([AddedToken(**options)])

    return change


def set_part(name: str, part: Any) -> Any:
    return lambda tokenizer: setattr(tokenizer, name, part)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize(
    "change",
    [
        add_token(content="king had"),
        add_token(content="king", rstrip=True),
        add_token(content="king", lstrip=True),
        set_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        set_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        set_part("normalizer", normalizers.Replace("king had", "queen")),
    ],
)
def test_a_tokenizer_that_looks_across_spaces_sees_the_whole_text(whole: HuggingFaceTokenizer, change: Any) -> None:
    other = HuggingFaceTokenizer.from_str(whole.to_str())
    change(other)
    text = "The old king had three sons, and the king had a bird."
    assert in_pieces(other).encode(text) == other.encode(text, add_special_tokens=False).ids


def test_other_threads_run_while_a_long_text_is_tokenized(int8_model: gpt2_edge.Model) -> None:
    """They get a turn after every piece, of which there are dozens."""
    turns, is_over = 0, threading.Event()

    def take_turns() -> None:
        nonlocal turns
        while not is_over.is_set():
            turns += 1
            time.sleep(0.0005)

    other = threading.Thread(target=take_turns)
    other.start()
    while not turns:
        time.sleep(0.001)
    before = turns
    int8_model.tokenize("word and more " * 50_000)
    taken = turns - before
    is_over.set()
    other.join()
    assert taken > 5
