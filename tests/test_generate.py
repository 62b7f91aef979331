"""Generating, streaming, looking at the next token and scoring, with the storyteller; transformers is the oracle."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest
import torch
from generating import (
    CONTEXT,
    END_OF_TEXT,
    SAMPLED,
    STORY,
    STORYTELLER,
    VOCABULARY,
    Follow,
    Logits,
    assert_same,
    story_tokens,
)
from transformers import GPT2LMHeadModel

import gpt2_edge
from gpt2_edge import Generation, Model
from gpt2_edge.prefill import PREFILL_CHUNK_TOKENS
from gpt2_edge.session import StepSession


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(STORYTELLER, attn_implementation="eager", dtype=torch.float32).eval()


def reference_logits(reference: GPT2LMHeadModel, tokens: Sequence[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference(torch.tensor([list(tokens)])).logits[0]


# Against transformers.


PROMPTS: Final = {
    "a beginning": "Once upon a time",
    "one letter": "a",
    "dialogue": '"What do you want?" asked the old man.\n\n',
    "nothing, so end-of-text": "",
    "other scripts": "日本語 🙂 привет",
    "two chunks": STORY[:1200],
}


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_greedy_equals_transformers(fp32_model: Model, reference: GPT2LMHeadModel, prompt: str) -> None:
    tokens = fp32_model.tokenize(prompt) or [END_OF_TEXT]
    given = torch.tensor([tokens])
    expected = reference.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=32, do_sample=False, pad_token_id=END_OF_TEXT
    )[0].tolist()[len(tokens) :]
    found = fp32_model.generate(prompt, max_new_tokens=32)
    assert found.tokens == [token for token in expected if token != END_OF_TEXT]
    assert found.text == fp32_model.detokenize(found.tokens)
    assert found.prompt_tokens == len(tokens)


def test_the_long_prompt_really_has_two_chunks(fp32_model: Model) -> None:
    assert PREFILL_CHUNK_TOKENS < len(fp32_model.tokenize(PROMPTS["two chunks"])) < CONTEXT - 32


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS.keys())
def test_next_tokens_equal_the_softmax_of_transformers(
    fp32_model: Model, reference: GPT2LMHeadModel, prompt: str
) -> None:
    expected = torch.softmax(
        reference_logits(reference, fp32_model.tokenize(prompt) or [END_OF_TEXT])[-1].double(), dim=0
    )
    found = fp32_model.next_tokens(prompt, k=VOCABULARY)
    probabilities = np.array([each.probability for each in found])
    np.testing.assert_allclose(probabilities, expected[[each.token for each in found]].numpy(), atol=1e-5)
    assert sorted(each.token for each in found) == list(range(VOCABULARY))
    assert (np.diff(probabilities) <= 0).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-6)
    assert [each.text for each in found] == [fp32_model.detokenize([each.token]) for each in found]
    assert fp32_model.next_tokens(prompt, k=7) == found[:7]
    assert len(fp32_model.next_tokens(prompt)) == 10


@pytest.mark.parametrize("count", [2, 3, 127, 128, 129, 130, 257, CONTEXT])
def test_score_equals_the_log_softmax_of_transformers(
    fp32_model: Model, reference: GPT2LMHeadModel, count: int
) -> None:
    tokens = story_tokens(fp32_model, count)
    expected = torch.log_softmax(reference_logits(reference, tokens).double(), dim=1)
    score = fp32_model.score(tokens)
    assert score.tokens == tokens
    following = [expected[place, token].item() for place, token in enumerate(tokens[1:])]
    np.testing.assert_allclose(score.logprobs, following, atol=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-sum(following) / len(following)), rel=1e-4)
    assert score.total_logprob == pytest.approx(sum(following), abs=1e-2)


def test_score_of_text_is_that_of_its_tokens(fp32_model: Model) -> None:
    text = STORY[:300]
    score = fp32_model.score(text)
    assert score == fp32_model.score(fp32_model.tokenize(text))
    assert fp32_model.detokenize(score.tokens) == text


@pytest.mark.parametrize("count", [1, 128, 129, 300])
def test_logits_equal_transformers(fp32_model: Model, reference: GPT2LMHeadModel, count: int) -> None:
    tokens = story_tokens(fp32_model, count)
    logits = fp32_model.logits(tokens)
    assert logits.shape == (count, VOCABULARY)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference_logits(reference, tokens).numpy(), atol=2e-3)


def test_logits_of_an_empty_prompt_are_those_of_end_of_text(model: Model) -> None:
    assert model.logits("").shape == (1, VOCABULARY)
    np.testing.assert_array_equal(model.logits(""), model.logits([END_OF_TEXT]))


# Streaming.


OPTIONS: Final = {
    "greedy": {},
    "sampled": SAMPLED,
    "top-p": {"top_p": 0.8, "seed": 2},
    "wild, so many unfinished characters": {"temperature": 4.0, "seed": 3},
    "through end-of-text": {"temperature": 2.0, "seed": 4, "ignore_eos": True},
    "one token": {"max_new_tokens": 1},
    "no token": {"max_new_tokens": 0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_streaming_equals_generating(model: Model, options: dict[str, Any]) -> None:
    options = {"max_new_tokens": 40} | options
    whole = model.generate("Once upon a time", **options)
    stream = model.stream("Once upon a time", **options)
    pieces = list(stream)
    assert_same(stream.result, whole, but_seed="seed" not in options)
    check_pieces(pieces, whole)
    assert whole.text == model.detokenize(whole.tokens)
    assert list(stream) == []


def check_pieces(pieces: list[gpt2_edge.Piece], whole: Generation) -> None:
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [whole.finish_reason]
    assert all(piece.text for piece in pieces[:-1])


class Script:
    """Makes a model choose the given tokens, one after another, whatever it was asked."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = iter(tokens)

    def prefill(self, slot: int, tokens: Sequence[int], start: int, logit_positions: npt.NDArray[np.int64]) -> Logits:
        return self._next(logit_positions.size)

    def decode(self, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        return self._next(len(tokens))

    def _next(self, rows: int) -> Logits:
        logits = np.zeros((rows, VOCABULARY), np.float32)
        if rows:
            logits[:, next(self._tokens)] = 20
        return logits


@pytest.fixture
def follow(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> Follow:
    """Make models follow a script."""

    def start(tokens: Sequence[int]) -> None:
        script = Script(tokens)
        monkeypatch.setattr(StepSession, "prefill", script.prefill)
        monkeypatch.setattr(StepSession, "decode", script.decode)

    return start


def test_pieces_hold_whole_characters_only(int8_model: Model, follow: Follow) -> None:
    text = "a🙂é 日本👩‍👩‍👧‍👦 \ufffd!"
    tokens = int8_model.tokenize(text)
    assert len(tokens) > len(text)
    follow(tokens)
    texts = [piece.text for piece in int8_model.stream("x", max_new_tokens=len(tokens))]
    assert "".join(texts) == text
    assert {"🙂", "日", "本", "👩", "\ufffd"} <= set(texts)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_ending_inside_a_character(int8_model: Model, follow: Follow, length: int) -> None:
    """The emoji has a token for each of its four bytes; of its first bytes only a U+FFFD remains."""
    tokens = int8_model.tokenize("a🙂")
    assert len(tokens) == 5
    follow(tokens)
    stream = int8_model.stream("x", max_new_tokens=1 + length)
    assert [piece.text for piece in stream] == ["a", "\ufffd"]
    assert stream.result.text == "a\ufffd"
    assert stream.result.tokens == tokens[: 1 + length]
    assert stream.result.finish_reason == "length"


# Why it ends.


def test_ends_at_end_of_text(int8_model: Model, follow: Follow) -> None:
    follow([41, 42, END_OF_TEXT, 43])
    done = int8_model.generate("x", max_new_tokens=10)
    assert done.finish_reason == "eos"
    assert done.tokens == [41, 42]
    assert "<|endoftext|>" not in done.text


def test_end_of_text_as_the_first_token(int8_model: Model, follow: Follow) -> None:
    follow([END_OF_TEXT])
    stream = int8_model.stream("x", max_new_tokens=10)
    assert [(piece.text, piece.finish_reason) for piece in stream] == [("", "eos")]
    assert stream.result.tokens == []


def test_ignoring_end_of_text(int8_model: Model, follow: Follow) -> None:
    follow([41, END_OF_TEXT, END_OF_TEXT, 43, 44])
    done = int8_model.generate("x", max_new_tokens=4, ignore_eos=True)
    assert done.finish_reason == "length"
    assert done.tokens == [41, END_OF_TEXT, END_OF_TEXT, 43]
    assert done.text.count("<|endoftext|>") == 2


def test_samples_that_end_go_on_if_end_of_text_is_ignored(int8_model: Model) -> None:
    """Nothing scripted: of 16 samples some end and some do not, once an end is made likelier."""
    options: dict[str, Any] = {"max_new_tokens": 40, "temperature": 1.0, "logit_bias": {END_OF_TEXT: 7.0}}
    samples = int8_model.generate("Once upon a time", n=16, seed=0, **options)
    ended = [sample for sample in samples if sample.finish_reason == "eos"]
    assert 0 < len(ended) < 16
    for sample in ended[:3]:
        longer = int8_model.generate("Once upon a time", seed=sample.seed, ignore_eos=True, **options)
        assert longer.tokens[: len(sample.tokens) + 1] == [*sample.tokens, END_OF_TEXT]
        assert len(longer.tokens) == 40


def test_no_new_tokens(model: Model) -> None:
    done = model.generate("Once upon a time", max_new_tokens=0, seed=5)
    assert (done.text, done.tokens, done.finish_reason, done.seed) == ("", [], "length", 5)
    assert done.prompt_tokens == 4
    assert math.isnan(done.timings.prefill_tokens_per_second)
    assert math.isnan(done.timings.decode_tokens_per_second)


@pytest.mark.parametrize(("prompt_tokens", "expected"), [(CONTEXT, 1), (CONTEXT - 1, 2), (CONTEXT - 10, 11)])
def test_ends_when_the_context_is_full(model: Model, prompt_tokens: int, expected: int) -> None:
    """One more than fits: the last token needs no place, as nothing is computed after it."""
    done = model.generate(story_tokens(model, prompt_tokens), max_new_tokens=100, ignore_eos=True)
    assert done.finish_reason == "context"
    assert len(done.tokens) == expected


def test_what_was_asked_for_is_more_than_a_full_context(model: Model) -> None:
    assert model.generate(story_tokens(model, CONTEXT), max_new_tokens=1).finish_reason == "length"


def test_the_last_places_of_the_context_equal_transformers(fp32_model: Model, reference: GPT2LMHeadModel) -> None:
    tokens = story_tokens(fp32_model, CONTEXT - 5)
    done = fp32_model.generate(tokens, max_new_tokens=100, ignore_eos=True)
    logits = reference_logits(reference, [*tokens, *done.tokens[:-1]])
    assert done.tokens == logits[len(tokens) - 1 :].argmax(dim=1).tolist()


# What else is reported.


def test_timings(model: Model) -> None:
    done = model.generate(story_tokens(model, 200), max_new_tokens=10, ignore_eos=True)
    timings = done.timings
    assert (timings.prompt_tokens, timings.decoded_tokens) == (200, 9)
    assert timings.prefill_seconds > 0
    assert timings.decode_seconds > 0
    assert timings.prefill_tokens_per_second == pytest.approx(200 / timings.prefill_seconds)
    assert timings.decode_tokens_per_second == pytest.approx(9 / timings.decode_seconds)


def test_facts_about_the_model(model: Model) -> None:
    assert model.context_length == CONTEXT
    assert model.device == "cpu"
    assert model.threads >= 1
    assert model.manifest.architecture.vocabulary_size == VOCABULARY


def test_more_threads_change_nothing(storyteller_int8: Path, int8_model: Model) -> None:
    expected = int8_model.generate(STORY[:400], max_new_tokens=20, **SAMPLED)
    for threads in (1, 3):
        with gpt2_edge.load(storyteller_int8, device="cpu", threads=threads) as model:
            assert model.threads == threads
            assert_same(model.generate(STORY[:400], max_new_tokens=20, **SAMPLED), expected)
