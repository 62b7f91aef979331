"""Streams that are abandoned, models that are closed, and logits that are not numbers."""

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from generating import SAMPLED, Logits, assert_same, calls_but

import gpt2_edge
from gpt2_edge import LogitsError, Model, ModelClosedError
from gpt2_edge.session import StepSession


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
@pytest.mark.usefixtures("forgetful")
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
@pytest.mark.usefixtures("forgetful")
def test_nan_after_the_prompt(
    int8_model: Model, monkeypatch: pytest.MonkeyPatch, call: Callable[[Model, Any], Any]
) -> None:
    with monkeypatch.context() as patch:
        for name in ("prefill", "prefill_batch"):
            spoil(patch, name, after_calls=0)
        with pytest.raises(LogitsError, match="NaN"):
            call(int8_model, "Once upon a time")
    call(int8_model, "Once upon a time")


@pytest.mark.usefixtures("forgetful")
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


@pytest.mark.usefixtures("forgetful")
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


@pytest.mark.usefixtures("forgetful")
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
