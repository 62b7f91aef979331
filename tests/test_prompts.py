"""What is a prompt, and what is refused as one."""

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from generating import (
    CONTEXT,
    END_OF_TEXT,
    SAMPLED,
    VOCABULARY,
    assert_same,
    calls_but,
    story_tokens,
)

import gpt2_edge
from gpt2_edge import ContextLengthError, Model, PromptError


@calls_but("score")
def test_a_prompt_that_is_too_long(int8_model: Model, call: Callable[[Model, Any], Any]) -> None:
    tokens = story_tokens(int8_model, CONTEXT + 3)
    with pytest.raises(ContextLengthError, match=r"515 tokens.* 512.* at least 3 tokens") as caught:
        call(int8_model, tokens)
    assert caught.value.tokens == CONTEXT + 3
    assert caught.value.context_length == int8_model.context_length == CONTEXT


def test_one_token_too_many(int8_model: Model) -> None:
    with pytest.raises(ContextLengthError, match=r"at least 1 token$"):
        int8_model.generate(story_tokens(int8_model, CONTEXT + 1))


def test_an_empty_prompt_starts_from_end_of_text(model: Model) -> None:
    for empty in ("", np.array([], np.int64)):
        done = model.generate(empty, max_new_tokens=12, **SAMPLED)
        assert_same(done, model.generate([END_OF_TEXT], max_new_tokens=12, **SAMPLED))
        assert done.prompt_tokens == 1


@pytest.mark.parametrize(
    "convert",
    [
        list,
        tuple,
        lambda tokens: np.array(tokens),
        lambda tokens: np.array(tokens, np.int32),
        lambda tokens: np.array(tokens, np.uint16),
        lambda tokens: list(np.array(tokens)),
        lambda tokens: np.array(tokens)[::-1][::-1],
    ],
    ids=["list", "tuple", "int64 array", "int32 array", "uint16 array", "list of numpy integers", "strided array"],
)
def test_tokens_in_any_shape_are_a_prompt(int8_model: Model, convert: Callable[[list[int]], Any]) -> None:
    text = "Once upon a time"
    tokens = convert(int8_model.tokenize(text))
    assert_same(
        int8_model.generate(tokens, max_new_tokens=10, **SAMPLED),
        int8_model.generate(text, max_new_tokens=10, **SAMPLED),
    )
    assert int8_model.next_tokens(tokens) == int8_model.next_tokens(text)
    assert int8_model.score(tokens) == int8_model.score(text)
    np.testing.assert_array_equal(int8_model.logits(tokens), int8_model.logits(text))
    assert int8_model.detokenize(tokens) == text


@pytest.mark.parametrize("empty", [[], ()])
def test_an_empty_list_may_be_no_prompts(int8_model: Model, empty: Any) -> None:
    with pytest.raises(PromptError, match="may be no prompts or a prompt of no tokens"):
        int8_model.generate(empty)
    assert int8_model.next_tokens(empty) == int8_model.next_tokens("")


def test_a_list_of_arrays_is_a_list_of_prompts(int8_model: Model) -> None:
    texts = ["Once upon a time", "The"]
    arrays: Any = [np.array(int8_model.tokenize(text), np.uint16) for text in texts]
    for found, text in zip(int8_model.generate(arrays, max_new_tokens=5), texts, strict=True):
        assert_same(found, int8_model.generate(text, max_new_tokens=5), but_seed=True)
    assert int8_model.score(arrays[:1]) == [int8_model.score(texts[0])]


def test_a_list_where_one_prompt_is_meant(int8_model: Model) -> None:
    texts: Any = ["Once", "The"]
    with pytest.raises(PromptError, match="next_tokens looks after one prompt"):
        int8_model.next_tokens(texts)
    with pytest.raises(PromptError, match="logits takes one prompt"):
        int8_model.logits(texts)
    with pytest.raises(PromptError, match="agenerate continues one prompt"):
        asyncio.run(int8_model.agenerate(texts))


@pytest.mark.parametrize("convert", [list, tuple, set, frozenset, np.array])
def test_tokens_and_texts_that_stop_in_any_collection(int8_model: Model, convert: Callable[[Any], Any]) -> None:
    expected = int8_model.generate("Once upon a time", max_new_tokens=30)
    tokens = expected.tokens[5:7]
    done = int8_model.generate("Once upon a time", max_new_tokens=30, stop_tokens=convert(tokens))
    assert done.stop in tokens
    assert type(done.stop) is int
    texts = [int8_model.detokenize([token]) for token in tokens]
    done = int8_model.generate("Once upon a time", max_new_tokens=30, stop=convert(texts))
    assert type(done.stop) is str
    banned = int8_model.generate("Once upon a time", max_new_tokens=30, banned_tokens=convert(tokens))
    assert not set(tokens) & set(banned.tokens)


def test_a_folder_below_the_home_folder(
    storyteller_int8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(storyteller_int8.parent))
    monkeypatch.setenv("USERPROFILE", str(storyteller_int8.parent))
    with gpt2_edge.load(f"~/{storyteller_int8.name}") as model:
        assert model.generate("Once", max_new_tokens=1).tokens
    with pytest.raises(gpt2_edge.ModelFolderError, match="nothing-here"):
        gpt2_edge.load("~/nothing-here")


BAD_PROMPTS: Final = {
    "None": None,
    "a number": 5,
    "bytes": b"abc",
    "whole floats": [1.0, 2.0],
    "a float": [1, 2.5],
    "NaN": [math.nan],
    "infinity": [math.inf],
    "a boolean": [True, False],
    "a negative token": [3, -1],
    "a token too large": [3, VOCABULARY],
    "a huge token": [2**70],
    "text among tokens": [1, "a"],
    "None among tokens": [1, None],
    "a list among tokens": [1, [2]],
    "a list of lists of lists": [[1], [[2]]],
    "a list of lists of texts": [["a"]],
    "None among texts": ["a", None],
    "a number among texts": ["a", 5],
    "a float array": np.array([1.5, 2.0]),
    "a matrix": np.array([[1, 2], [3, 4]]),
    "a column": np.array([[1], [2]]),
    "an array without dimensions": np.array(5),
    "an array of texts": np.array(["1", "2"]),
    "a lone surrogate": "Once \ud83d upon",
}


@pytest.mark.parametrize("prompt", BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
@calls_but()
def test_what_is_no_prompt_is_refused(int8_model: Model, call: Callable[[Model, Any], Any], prompt: Any) -> None:
    with pytest.raises(PromptError) as caught:
        call(int8_model, prompt)
    assert any(
        word in str(caught.value) for word in ("give ", "call it for each", "has tokens 0 to 8191", "errors='replace'")
    )


def test_tokens_from_a_generator_are_a_prompt_or_refused(int8_model: Model) -> None:
    """Whether they are taken is for the model to say; half-consumed and crashed it must not be."""
    try:
        done = int8_model.generate((token for token in [5, 6]), max_new_tokens=2)  # type: ignore[call-overload]
    except PromptError:
        return
    assert_same(done, int8_model.generate([5, 6], max_new_tokens=2), but_seed=True)


@pytest.mark.parametrize(("text", "count"), [("", "0 tokens"), ("a", "1 token"), ([7], "1 token")])
def test_too_little_to_score(int8_model: Model, text: str | list[int], count: str) -> None:
    with pytest.raises(PromptError, match=f"the text has {count}: a score needs at least 2"):
        int8_model.score(text)


@pytest.mark.parametrize("text", [5, None, b"abc", ["a"]])
def test_what_cannot_be_tokenized(int8_model: Model, text: Any) -> None:
    with pytest.raises(PromptError):
        int8_model.tokenize(text)
