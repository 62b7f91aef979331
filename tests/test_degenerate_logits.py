"""Logits that no token can be drawn from, and those that only just can."""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import pytest
from sampling_reference import (
    INFINITY,
    LOGITS,
    Float32s,
    Options,
)

from gpt2_edge import GenerationOptions, LogitsError, OptionError
from gpt2_edge.choosing import TokenChooser

EVERYTHING: Final[Options] = {
    "temperature": 0.9,
    "top_k": 3,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "no_repeat_ngram_size": 2,
    "logit_bias": {0: 1.0},
    "logprobs": 2,
}


@pytest.mark.parametrize("options", [{}, {"typical_p": 0.5}, {"banned_tokens": [2]}, EVERYTHING], ids=len)
@pytest.mark.parametrize(
    ("raw", "found"),
    [
        ([1, 0, math.nan, 2], "model computed NaN"),
        ([1, 0, INFINITY, 2], r"model computed \+inf"),
        ([-INFINITY] * 4, "model computed only -inf"),
        ([-INFINITY, math.nan, INFINITY, 0], "model computed NaN"),
    ],
    ids=str,
)
def test_what_the_model_should_not_have_computed(options: Options, raw: list[float], found: str) -> None:
    """Even where the option would hide it."""

    def must_not_see_it(tokens: Sequence[int], logits: Float32s) -> None:
        raise AssertionError("the processor was called")

    for more in ({}, {"logits_processor": must_not_see_it}):
        chooser = TokenChooser(GenerationOptions(**options, **more), 1, [])
        with pytest.raises(LogitsError, match=found):
            chooser.choose(np.array(raw, np.float32), [0], [1])
        assert chooser.position == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"typical_p": 0.5}, EVERYTHING], ids=len)
def test_one_possible_token_is_chosen(options: Options) -> None:
    chooser = TokenChooser(GenerationOptions(**options), 1, [])
    logits = np.array([-INFINITY, -INFINITY, -70, -INFINITY], np.float32)
    assert [chooser.choose(logits, [0], [1] * n) for n in range(5)] == [2] * 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"banned_tokens": [0, 1, 2, 3]}, "^all tokens are forbidden by banned_tokens: allow"),
        ({"no_repeat_ngram_size": 1}, "^all tokens are forbidden by no_repeat_ngram_size: allow"),
        ({"no_repeat_ngram_size": 2, "banned_tokens": [0, 1, 2, 3]}, "no_repeat_ngram_size and banned_tokens:"),
        ({"min_new_tokens": 3, "banned_tokens": [1, 2, 3]}, "banned_tokens and min_new_tokens:"),
        ({"min_new_tokens": 2, "banned_tokens": [0, 1, 2, 3]}, "by banned_tokens: allow"),
        ({"logit_bias": dict.fromkeys(range(4), -1e300)}, "forbidden by logit_bias:"),
        ({"logit_bias": {2: 1e300}}, r"^logit_bias led to \+inf"),
        ({"presence_penalty": -1e39}, r"^presence_penalty led to \+inf"),
        ({"frequency_penalty": -1e39, "repetition_penalty": 1.5}, r"repetition_penalty and frequency_penalty led to"),
    ],
    ids=str,
)
def test_options_that_leave_nothing_are_named(options: Options, message: str) -> None:
    for more in ({}, {"top_p": 0.5}, {"logits_processor": lambda tokens, logits: None}):
        chooser = TokenChooser(GenerationOptions(**options, **more), 1, [0])
        with pytest.raises(LogitsError, match=message):
            chooser.choose(LOGITS, [3, 2], [1, 0])
        assert chooser.position == 0


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (math.nan, "logits_processor left NaN"),
        (INFINITY, r"logits_processor left \+inf"),
        (-INFINITY, "logits_processor left only -inf"),
    ],
)
@pytest.mark.parametrize("options", [{}, EVERYTHING, {"banned_tokens": [3]}], ids=len)
def test_a_processor_that_leaves_nothing_is_named(left: float, message: str, options: Options) -> None:
    def spoil(tokens: Sequence[int], logits: Float32s) -> None:
        logits[:] = left

    with pytest.raises(LogitsError, match=message):
        TokenChooser(GenerationOptions(**options, logits_processor=spoil), 1, []).choose(LOGITS, [0], [1])


def test_what_a_processor_raises_is_not_changed() -> None:
    error = KeyError("mine")
    fails = [False, True, False]

    def process(tokens: Sequence[int], logits: Float32s) -> None:
        if fails.pop(0):
            raise error

    chooser = TokenChooser(GenerationOptions(temperature=1.0, logits_processor=process), 3, [])
    undisturbed = TokenChooser(GenerationOptions(temperature=1.0), 3, [])
    first = chooser.choose(LOGITS, [0], [])
    with pytest.raises(KeyError) as caught:
        chooser.choose(LOGITS, [0], [])
    assert caught.value is error
    second = chooser.choose(LOGITS, [0], [])
    assert [first, second] == [undisturbed.choose(LOGITS, [0], []) for _ in range(2)]


def test_a_processor_that_returns_new_logits_is_told() -> None:
    new = GenerationOptions(logits_processor=lambda tokens, logits: logits * 2)
    with pytest.raises(OptionError, match="logits_processor returned ndarray: change"):
        TokenChooser(new, 1, []).choose(LOGITS, [0], [])
    same = GenerationOptions(logits_processor=lambda tokens, logits: np.negative(logits, out=logits))
    assert TokenChooser(same, 1, []).choose(LOGITS, [0], []) == 1


@pytest.mark.parametrize("options", [{"typical_p": 0.9}, {"min_p": 0.1, "top_p": 0.9}, {"temperature": 1e300}], ids=str)
def test_logits_as_large_as_float32_holds(options: Options) -> None:
    largest = np.finfo(np.float32).max
    logits = np.array([-largest, largest, -INFINITY, largest], np.float32)
    chooser = TokenChooser(GenerationOptions(**options), 1, [])
    tokens = {chooser.choose(logits, [0], []) for _ in range(60)}
    assert tokens - {0} == {1, 3}
