"""Options that are not allowed are named, with what is."""

import json
import math
import threading
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from generating import VOCABULARY

import gpt2_edge
from gpt2_edge import GenerationOptions, Model, OptionError

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


def test_tokens_to_keep_where_none_are_forgotten(int8_model: Model) -> None:
    """They would be ignored without a word, and missed when it is too late."""
    message = "keep_tokens is 20 and overflow is 'stop', .*: give overflow 'slide' with it, or leave keep_tokens out"
    session = int8_model.session()
    calls: list[Callable[..., object]] = [
        partial(int8_model.generate, "Once"),
        partial(int8_model.stream, "Once"),
        partial(session.generate),
        partial(session.append, "Once"),
    ]
    for call in calls:
        with pytest.raises(OptionError, match=message):
            call(keep_tokens=20)
        with pytest.raises(OptionError, match=message):
            call(keep_tokens=20, overflow="stop")
        call(keep_tokens=20, overflow="slide")
        call(keep_tokens=0)
    sliding = {"overflow": "slide", "max_new_tokens": 1}
    assert len(int8_model.generate(["Once"], **sliding, row_options=[{"keep_tokens": 20}])) == 1


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
        *(("device", value, f"device is {value!r}: ") for value in ("gpu", "", None, 0)),
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


NUMBERS: Final = {
    "max_new_tokens": 5,
    "min_new_tokens": 2,
    "top_k": 100,
    "no_repeat_ngram_size": 2,
    "seed": 5,
    "logprobs": 2,
    "keep_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.75,
    "min_p": 0.125,
    "typical_p": 0.75,
    "repetition_penalty": 1.25,
    "presence_penalty": 0.25,
    "frequency_penalty": 0.25,
    "deadline_seconds": 60.0,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_other_types_are_taken_as_those_of_python(int8_model: Model, name: str) -> None:
    number = NUMBERS[name]
    kinds: list[Any] = [np.int8, np.uint64] if isinstance(number, int) else [np.float16, np.longdouble, Fraction]
    common: Any = {"max_new_tokens": 6, "seed": 3, "overflow": "slide"}
    expected = int8_model.generate("Once upon a time", **(common | {name: number}))
    for kind in kinds:
        assert type(getattr(GenerationOptions(**(common | {name: kind(number)})), name)) is type(number)
        done = int8_model.generate("Once upon a time", **(common | {name: kind(number)}))
        assert (done.tokens, done.seed, done.logprobs) == (expected.tokens, expected.seed, expected.logprobs)
        json.dumps(asdict(done))


def test_integers_of_numpy_count_samples_and_tokens(int8_model: Model) -> None:
    samples = int8_model.generate("Once", n=np.int64(2), max_new_tokens=1, row_options=[{"seed": np.uint8(7)}, {}])
    assert [type(done.seed) for done in samples] == [int, int]
    assert samples[0].seed == 7
    assert len(int8_model.next_tokens("Once", k=np.int16(3))) == 3
    session = int8_model.session()
    session.append("Once upon a time")
    session.rewind(np.int64(1))
    assert session.text == "Once upon a"


HUGE: Final = 10**30


@pytest.mark.parametrize("name", ["min_new_tokens", "top_k", "logprobs", "no_repeat_ngram_size", "keep_tokens"])
def test_an_integer_may_be_huge(int8_model: Model, name: str) -> None:
    done = int8_model.generate("Once", **{"max_new_tokens": 3, "overflow": "slide", name: HUGE})
    assert len(done.tokens) == 3


@pytest.mark.parametrize(
    "options", [{"seed": 10**5000}, {"temperature": 10**5000}, {"banned_tokens": [10**5000]}, {"n": -(10**5000)}]
)
def test_a_number_of_too_many_digits_is_refused(int8_model: Model, options: Any) -> None:
    with pytest.raises(OptionError, match="int of too many digits"):
        int8_model.generate("Once", **options)


def test_a_stop_text_that_no_text_can_have(int8_model: Model) -> None:
    with pytest.raises(OptionError, match="without a lone surrogate"):
        int8_model.generate("Once", stop=["fine", "\ud800"])
