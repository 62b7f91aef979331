"""Generating, streaming, looking at the next token and scoring, with the storyteller; transformers is the oracle."""

import gc
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from transformers import GPT2LMHeadModel

import gpt2_edge
from gpt2_edge import ContextLengthError, Generation, LogitsError, Model, ModelClosedError, OptionError, PromptError
from gpt2_edge.session import StepSession

STORYTELLER: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"
STORY: Final = (STORYTELLER / "calibration.txt").read_text(encoding="utf-8")[:6000]
CONTEXT: Final = 512
VOCABULARY: Final = 8192
END_OF_TEXT: Final = 0
SAMPLED: Final = {"temperature": 1.0, "top_k": 50, "seed": 11}

Logits = npt.NDArray[np.float32]
Follow = Callable[[Sequence[int]], None]


def story_tokens(model: Model, count: int, start: int = 0) -> list[int]:
    return model.tokenize(STORY)[start : start + count]


@pytest.fixture(params=["fp32_model", "int8_model"])
def model(request: pytest.FixtureRequest) -> Model:
    """The storyteller, once at full precision and once at INT8."""
    loaded: Model = request.getfixturevalue(request.param)
    return loaded


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
    "three chunks": STORY[:1200],
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


def test_the_long_prompt_really_has_three_chunks(fp32_model: Model) -> None:
    assert 256 < len(fp32_model.tokenize(PROMPTS["three chunks"])) < CONTEXT - 32


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


def assert_same(one: Generation, other: Generation, but_seed: bool = False) -> None:
    """All but the timings, and the seed where none was given."""
    assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
    assert one.prompt_tokens == other.prompt_tokens
    assert but_seed or one.seed == other.seed


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
def follow(monkeypatch: pytest.MonkeyPatch) -> Follow:
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


CALLS: Final[dict[str, Callable[[Model, Any], Any]]] = {
    "generate": lambda model, prompt: model.generate(prompt, max_new_tokens=2),
    "generate a list": lambda model, prompt: model.generate(["Once", prompt], max_new_tokens=2),
    "stream": lambda model, prompt: model.stream(prompt, max_new_tokens=2),
    "next_tokens": lambda model, prompt: model.next_tokens(prompt),
    "logits": lambda model, prompt: model.logits(prompt),
    "score": lambda model, prompt: model.score(prompt),
}


def calls_but(*left_out: str) -> pytest.MarkDecorator:
    names = [name for name in CALLS if name not in left_out]
    return pytest.mark.parametrize("call", [CALLS[name] for name in names], ids=names)


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


# Prompts.


def test_an_empty_prompt_starts_from_end_of_text(model: Model) -> None:
    for empty in ("", [], (), np.array([], np.int64)):
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
    assert any(word in str(caught.value) for word in ("give ", "has tokens 0 to 8191", "errors='replace'"))


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


# Several rows.


RAGGED: Final = ["", "Once", STORY[:700], [5], "“Well,” said she", STORY[100:1300], [END_OF_TEXT, 17, 18], "The"]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.4, "top_p": 0.95, "seed": 0}], ids=str)
def test_rows_of_a_list_equal_each_alone(model: Model, options: dict[str, Any]) -> None:
    """Also those whose prompts need several chunks, while others decode already."""
    rows = model.generate(RAGGED, max_new_tokens=16, **options)
    assert [len(RAGGED), len(set(seeds(rows)))] == [len(rows), len(rows)]
    for prompt, row in zip(RAGGED, rows, strict=True):
        assert_same(row, model.generate(prompt, max_new_tokens=16, **(options | {"seed": row.seed})))


def seeds(rows: Sequence[Generation]) -> list[int]:
    return [row.seed for row in rows]


def test_more_prompts_than_fit_side_by_side(int8_model: Model) -> None:
    prompts = [STORY[start : start + 40] for start in range(0, 20 * 50, 50)]
    rows = int8_model.generate(prompts, max_new_tokens=9, **SAMPLED)
    for prompt, row in zip(prompts, rows, strict=True):
        assert_same(row, int8_model.generate(prompt, max_new_tokens=9, **(SAMPLED | {"seed": row.seed})))


@pytest.mark.parametrize("prompts", [["Once"], ("Once", "Twice"), [[5, 6]], [""], [[]]], ids=str)
def test_a_list_in_is_a_list_out(int8_model: Model, prompts: Any) -> None:
    rows = int8_model.generate(prompts, max_new_tokens=1)
    assert isinstance(rows, list)
    assert len(rows) == len(prompts)


@pytest.mark.parametrize("count", [1, 3, 20])
def test_samples_of_one_prompt(model: Model, count: int) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.0}
    samples = model.generate("Once upon a time", n=count, seed=1, **options)
    assert len(samples) == len(set(seeds(samples))) == count
    assert samples[0].seed == 1
    assert len({sample.text for sample in samples}) == count
    for sample in samples:
        assert_same(sample, model.generate("Once upon a time", seed=sample.seed, **options))


def test_samples_are_the_same_again(int8_model: Model) -> None:
    first, second = (int8_model.generate("Once", n=3, max_new_tokens=8, temperature=1.0, seed=1) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert_same(one, other)


def test_samples_of_a_prompt_of_several_chunks(int8_model: Model) -> None:
    prompt = story_tokens(int8_model, 300)
    for sample in int8_model.generate(prompt, n=3, max_new_tokens=12, temperature=1.0, seed=8):
        assert_same(sample, int8_model.generate(prompt, max_new_tokens=12, temperature=1.0, seed=sample.seed))


def test_samples_whose_context_slides(int8_model: Model) -> None:
    """The rows began with one prompt, but what each keeps of its past is its own."""
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "overflow": "slide", "ignore_eos": True}
    prompt = story_tokens(int8_model, CONTEXT - 10)
    for sample in int8_model.generate(prompt, n=3, seed=8, **options):
        assert_same(sample, int8_model.generate(prompt, seed=sample.seed, **options))


def test_samples_that_differ_in_length(int8_model: Model) -> None:
    """Rows that leave early make room, and the others move; nothing else changes."""
    newline = int8_model.tokenize("\n")
    options: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.0, "stop_tokens": newline}
    samples = int8_model.generate("Once upon a time", n=16, seed=3, **options)
    assert len({len(sample.tokens) for sample in samples}) > 3
    for sample in samples:
        assert_same(sample, int8_model.generate("Once upon a time", seed=sample.seed, **options))


# Seeds.


def test_a_seed_that_was_drawn_is_reported_and_repeats_the_row(model: Model) -> None:
    drawn = [model.generate("Once", max_new_tokens=8, temperature=1.0) for _ in range(4)]
    assert len(set(seeds(drawn))) == 4
    for row in drawn:
        assert_same(row, model.generate("Once", max_new_tokens=8, temperature=1.0, seed=row.seed))


def test_a_drawn_seed_repeats_a_whole_batch(int8_model: Model) -> None:
    rows = int8_model.generate(["Once", "Twice"], max_new_tokens=8, temperature=1.0)
    again = int8_model.generate(["Once", "Twice"], max_new_tokens=8, temperature=1.0, seed=rows[0].seed)
    assert [row.text for row in again] == [row.text for row in rows]
    assert seeds(again) == seeds(rows)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**64 - 1])
def test_every_allowed_seed_works(int8_model: Model, seed: int) -> None:
    done = int8_model.generate("Once", max_new_tokens=8, temperature=1.5, seed=seed)
    assert done.seed == seed
    assert int8_model.generate("Once", max_new_tokens=8, temperature=1.5, seed=seed + 1 - 2 * (seed > 1)) != done


def test_other_options_do_not_shift_the_random_numbers(int8_model: Model) -> None:
    """What does not change the distribution must not change the draw."""
    plain = int8_model.generate("Once", max_new_tokens=8, temperature=1.0, seed=4)
    same = int8_model.generate("Once", max_new_tokens=8, temperature=1.0, seed=4, top_k=0, top_p=1.0)
    shorter = int8_model.generate("Once", max_new_tokens=5, temperature=1.0, seed=4)
    assert same.tokens == plain.tokens
    assert shorter.tokens == plain.tokens[:5]


# Options.


NOT_INTEGERS: Final = (1.5, "5", True, [1])
NOT_NUMBERS: Final = ("1", True, [1.0], math.nan, math.inf)
BAD_OPTIONS: Final = [
    *(("max_new_tokens", value) for value in (*NOT_INTEGERS, -1, None)),
    *(("min_new_tokens", value) for value in (*NOT_INTEGERS, -1, None)),
    *(("temperature", value) for value in (*NOT_NUMBERS, -0.1, 10**400)),
    *(("top_k", value) for value in (*NOT_INTEGERS, -1)),
    *((name, value) for name in ("top_p", "min_p", "typical_p") for value in (*NOT_NUMBERS, -0.1, 1.1)),
    *(("repetition_penalty", value) for value in (*NOT_NUMBERS, 0, -1.0, None)),
    *(("presence_penalty", value) for value in (*NOT_NUMBERS, None)),
    *(("frequency_penalty", value) for value in (*NOT_NUMBERS, None)),
    *(("no_repeat_ngram_size", value) for value in (*NOT_INTEGERS, -1)),
    *(("logit_bias", value) for value in (5, [1], {"a": 1.0}, {-1: 1.0}, {1: "a"}, {1: math.nan}, {VOCABULARY: 1.0})),
    *(("banned_tokens", value) for value in (5, "ab", [-1], [1.5], [VOCABULARY])),
    *(("logits_processor", value) for value in (5, "f")),
    *(("seed", value) for value in (*NOT_INTEGERS, -1, 2**64)),
    *(("stop", value) for value in (5, "", [""], [5], ["a", ""])),
    *(("stop_tokens", value) for value in (5, "ab", [-1], [1.5], [VOCABULARY])),
    *(("ignore_eos", value) for value in (1, "yes", None)),
    *(("logprobs", value) for value in (*NOT_INTEGERS, -1)),
    *(("overflow", value) for value in (None, "shift", True)),
    *(("keep_tokens", value) for value in (*NOT_INTEGERS, -1)),
    *(("deadline_seconds", value) for value in ("1", True, math.nan, -1)),
    *(("cancel", value) for value in (True, "now", threading.Lock())),
]


@pytest.mark.parametrize(("name", "value"), BAD_OPTIONS, ids=lambda value: str(value)[:30])
@pytest.mark.parametrize("method", ["generate", "stream"])
def test_a_bad_option_is_named_with_its_value_and_what_is_allowed(
    int8_model: Model, method: str, name: str, value: Any
) -> None:
    with pytest.raises(OptionError) as caught:
        getattr(int8_model, method)("Once", **{name: value})
    message = str(caught.value)
    assert name in message
    assert "give " in message or "this model has tokens 0 to 8191" in message
    shown = next(iter(value.items())) if isinstance(value, dict) else value
    parts = shown if isinstance(shown, list | tuple) else [shown]
    assert any(repr(part)[:40] in message or str(part)[:40] in message for part in parts)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_bad_number_of_samples(int8_model: Model, value: Any) -> None:
    with pytest.raises(OptionError, match=f"n is {value!r}: give an integer, 1 or more"):
        int8_model.generate("Once", n=value)


def test_samples_of_several_prompts(int8_model: Model) -> None:
    with pytest.raises(OptionError, match="n is for one prompt: repeat the prompts in the list instead"):
        int8_model.generate(["Once", "Twice"], n=2)  # type: ignore[call-overload]


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2", VOCABULARY + 1])
def test_a_bad_number_of_next_tokens(int8_model: Model, value: Any) -> None:
    with pytest.raises(OptionError, match=f"k is {value!r}: give an integer from 1 to 8192"):
        int8_model.next_tokens("Once", k=value)


@pytest.mark.parametrize(
    ("keyword", "value", "message"),
    [
        *(
            ("threads", value, f"threads is {value!r}: give an integer from 1 to 1024")
            for value in (0, -1, 1.5, True, "2")
        ),
        *(("device", value, f"device is {value!r}: ") for value in ("cuda", "gpu", "", None, 0)),
    ],
)
def test_a_bad_way_to_load(storyteller_int8: Path, keyword: str, value: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        gpt2_edge.load(storyteller_int8, **{keyword: value})


@pytest.mark.parametrize(
    ("given", "meant"),
    [("temprature", "temperature"), ("max_tokens", "max_new_tokens"), ("topp", "top_p"), ("ignore_eot", "ignore_eos")],
)
def test_an_unknown_option_is_answered_with_a_close_one(int8_model: Model, given: str, meant: str) -> None:
    for method in (int8_model.generate, int8_model.stream):
        with pytest.raises(OptionError, match=rf"unknown option {given}: did you mean {meant}\?.*options are max_new"):
            method("Once", **{given: 1})


def test_an_unknown_option_like_no_other(int8_model: Model) -> None:
    with pytest.raises(OptionError, match=r"unknown option do_sample[.:;] .*options are max_new_tokens, "):
        int8_model.generate("Once", do_sample=True)  # type: ignore[call-overload]


# Ending early, closing, failing.


def test_closing_a_stream_early_keeps_what_was_generated(model: Model) -> None:
    expected = model.generate("Once upon a time", max_new_tokens=40)
    with model.stream("Once upon a time", max_new_tokens=40) as stream:
        first = [next(stream).text for _ in range(3)]
    rest = "".join(piece.text for piece in stream)
    stream.close()
    result = stream.result
    assert result.finish_reason == "cancelled"
    assert result.text == "".join(first) + rest
    assert 3 <= len(result.tokens) < 40
    assert result.tokens == expected.tokens[: len(result.tokens)]
    assert_same(model.generate("Once upon a time", max_new_tokens=40), expected, but_seed=True)


def test_a_stream_that_never_began(int8_model: Model) -> None:
    stream = int8_model.stream("Once", max_new_tokens=5)
    stream.close()
    assert "".join(piece.text for piece in stream) == ""
    assert stream.result.tokens == []
    assert stream.result.finish_reason == "cancelled"


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each decode step had."""
    sizes: list[int] = []
    decode = StepSession.decode

    def record(session: StepSession, tokens: Sequence[int], lengths: Sequence[int]) -> Logits:
        sizes.append(len(tokens))
        return decode(session, tokens, lengths)

    monkeypatch.setattr(StepSession, "decode", record)
    return sizes


def test_an_abandoned_stream_takes_no_more_steps(int8_model: Model, batch_sizes: list[int]) -> None:
    expected = int8_model.generate("Twice", max_new_tokens=10)
    for _ in range(3):
        stream = int8_model.stream("Once upon a time", max_new_tokens=400)
        next(stream)
        next(stream)
        del stream
        gc.collect()
        batch_sizes.clear()
        assert_same(int8_model.generate("Twice", max_new_tokens=10), expected, but_seed=True)
        assert batch_sizes == [1] * 9


def test_a_loop_that_breaks_takes_no_more_steps(int8_model: Model, batch_sizes: list[int]) -> None:
    for _ in int8_model.stream("Once upon a time", max_new_tokens=400):
        break
    gc.collect()
    batch_sizes.clear()
    int8_model.generate("Twice", max_new_tokens=5)
    assert batch_sizes == [1] * 4


def test_two_streams_in_turn_share_steps(model: Model, batch_sizes: list[int]) -> None:
    prompts = ("Once upon a time", "Twice")
    expected = [model.generate(prompt, max_new_tokens=30, **SAMPLED).text for prompt in prompts]
    batch_sizes.clear()
    streams = [model.stream(prompt, max_new_tokens=30, **SAMPLED) for prompt in prompts]
    texts = ["", ""]
    for pieces in zip(*streams, strict=False):
        texts = [text + piece.text for text, piece in zip(texts, pieces, strict=True)]
    texts = [text + "".join(piece.text for piece in rest) for text, rest in zip(texts, streams, strict=True)]
    assert texts == expected
    assert 2 in batch_sizes


def spoil(monkeypatch: pytest.MonkeyPatch, name: str, after_calls: int, row: int = -1) -> None:
    """Let a step of the session give NaN from some call on; for one row of at least two if `row` is given."""
    original = getattr(StepSession, name)
    calls = 0

    def spoilt(session: StepSession, *arguments: Any) -> Logits:
        nonlocal calls
        calls += 1
        logits: Logits = original(session, *arguments).copy()
        if calls > after_calls and (row < 0 or len(logits) > row > 0):
            logits[row:] = np.nan
        return logits

    monkeypatch.setattr(StepSession, name, spoilt)


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=str)
def test_nan_in_the_middle_of_a_generation(
    int8_model: Model, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    expected = int8_model.generate("Once", max_new_tokens=10, **options)
    with monkeypatch.context() as patch:
        spoil(patch, "decode", after_calls=3)
        with pytest.raises(LogitsError, match="NaN"):
            int8_model.generate("Once", max_new_tokens=10, **options)
    with monkeypatch.context() as patch:
        spoil(patch, "decode", after_calls=3)
        stream = int8_model.stream("Once", max_new_tokens=10, **options)
        texts = [next(stream).text for _ in range(4)]
        with pytest.raises(LogitsError, match="NaN"):
            next(stream)
    assert expected.text.startswith("".join(texts))
    assert_same(int8_model.generate("Once", max_new_tokens=10, **options), expected, but_seed=not options)


@calls_but("logits", "stream")
def test_nan_after_the_prompt(
    int8_model: Model, monkeypatch: pytest.MonkeyPatch, call: Callable[[Model, Any], Any]
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, "prefill", after_calls=0)
        with pytest.raises(LogitsError, match="NaN"):
            call(int8_model, "Once upon a time")
    call(int8_model, "Once upon a time")


def test_nan_in_one_row_does_not_hurt_another(int8_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = int8_model.generate("Once upon a time", max_new_tokens=30)
    spoil(monkeypatch, "decode", after_calls=5, row=1)
    healthy = int8_model.stream("Once upon a time", max_new_tokens=30)
    texts = [next(healthy).text]
    ill = int8_model.stream("Twice", max_new_tokens=30)
    with pytest.raises(LogitsError, match="NaN"):
        for _ in ill:
            pass
    texts += [piece.text for piece in healthy]
    assert "".join(texts) == expected.text
    assert_same(healthy.result, expected, but_seed=True)


def test_a_stream_that_failed_while_another_was_computed_still_says_so(
    int8_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its end must not look like the end of its text."""
    healthy = int8_model.stream("Once upon a time", max_new_tokens=30)
    next(healthy)
    ill = int8_model.stream("Twice", max_new_tokens=30)
    next(ill)
    spoil(monkeypatch, "decode", after_calls=0, row=1)
    list(healthy)
    with pytest.raises(LogitsError, match="NaN"):
        list(ill)


def test_nan_in_one_row_of_a_list_fails_the_call_and_not_the_model(
    int8_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, "decode", after_calls=5, row=1)
        with pytest.raises(LogitsError, match="NaN"):
            int8_model.generate(["Once", "Twice", "Thrice"], max_new_tokens=30)
    rows = int8_model.generate(["Once", "Twice", "Thrice"], max_new_tokens=5)
    assert [row.finish_reason for row in rows] == ["length"] * 3


def loaded_sessions() -> int:
    gc.collect()
    return sum(type(each) is onnxruntime.InferenceSession for each in gc.get_objects())


def test_closing_frees_the_session_and_may_be_repeated(storyteller_int8: Path) -> None:
    before = loaded_sessions()
    model = gpt2_edge.load(storyteller_int8)
    assert loaded_sessions() == before + 1
    model.generate("Once", max_new_tokens=3)
    model.close()
    assert loaded_sessions() == before, "the model holds its memory although it was closed"
    model.close()


@pytest.fixture
def closed_model(storyteller_int8: Path) -> Iterator[Model]:
    with gpt2_edge.load(storyteller_int8) as model:
        pass
    yield model
    model.close()


@calls_but("stream")
def test_a_closed_model_says_so(closed_model: Model, call: Callable[[Model, Any], Any]) -> None:
    with pytest.raises(ModelClosedError, match="closed"):
        call(closed_model, "Once upon")


def test_a_closed_model_gives_no_pieces_and_no_samples(closed_model: Model) -> None:
    with pytest.raises(ModelClosedError, match="closed"):
        next(closed_model.stream("Once upon"))
    with pytest.raises(ModelClosedError, match="closed"):
        closed_model.generate("Once upon", n=2)


def test_closing_the_model_ends_its_streams(storyteller_int8: Path) -> None:
    with gpt2_edge.load(storyteller_int8) as model:
        stream = model.stream("Once upon a time", max_new_tokens=100)
        next(stream)
        not_begun = model.stream("Once upon a time", max_new_tokens=100)
    with pytest.raises(ModelClosedError, match="closed"):
        list(stream)
    with pytest.raises(ModelClosedError, match="closed"):
        next(not_begun)
    stream.close()
    not_begun.close()
    assert stream.result.tokens


def test_a_model_that_an_error_leaves_is_closed(storyteller_int8: Path) -> None:
    with pytest.raises(KeyError), gpt2_edge.load(storyteller_int8) as model:
        raise KeyError
    with pytest.raises(ModelClosedError):
        model.generate("Once")


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
