"""Log-probabilities of the tokens that were chosen: the model's, whatever the options."""

import math
from collections.abc import Sequence

import pytest
import torch
from sampling_reference import (
    INFINITY,
    LOGITS,
    Float32s,
    Options,
    logits_of,
    random_cases,
)

from gpt2_edge import GenerationOptions, TokenLogprobs
from gpt2_edge.choosing import TokenChooser


def chosen(
    options: GenerationOptions, logits: Float32s, prompt: Sequence[int] = (0,), continuation: Sequence[int] = ()
) -> tuple[int, TokenLogprobs | None]:
    """Return a chosen token and what is reported of it."""
    chooser = TokenChooser(options, 1, [])
    token = chooser.choose(logits, prompt, continuation)
    return token, chooser.report(logits, token)


@pytest.mark.parametrize("more", [{}, {"temperature": 2.0, "top_k": 3}, {"banned_tokens": [1], "logit_bias": {2: 5}}])
def test_logprobs_are_those_of_the_model(more: Options) -> None:
    for case in random_cases(13, 10, []):
        options = GenerationOptions(**more, logprobs=7)
        token, logprobs = chosen(options, case.logits, case.prompt, case.continuation)
        exact = torch.log_softmax(torch.from_numpy(case.logits).double(), 0)
        values, tokens = exact.topk(7)
        assert logprobs is not None
        assert logprobs.token == token
        assert logprobs.logprob == pytest.approx(exact[token].item(), abs=1e-12)
        assert [token for token, _ in logprobs.likeliest] == tokens.tolist()
        assert [logprob for _, logprob in logprobs.likeliest] == pytest.approx(values.tolist(), abs=1e-12)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, []),
        (1, [(1, 0.5)]),
        (2, [(1, 0.5), (0, 0.125)]),
        (3, [(1, 0.5), (0, 0.125), (2, 0.125)]),
        (9, [(1, 0.5), (0, 0.125), (2, 0.125), (3, 0.125), (4, 0.125), (5, 0.0)]),
    ],
)
def test_logprobs_by_hand(count: int, expected: list[tuple[int, float]]) -> None:
    logits = logits_of(0.125, 0.5, 0.125, 0.125, 0.125, 0.0)
    token, logprobs = chosen(GenerationOptions(logprobs=count, banned_tokens=[1]), logits)
    assert token == 0
    assert logprobs is not None
    assert logprobs.logprob == pytest.approx(math.log(0.125), abs=1e-7)
    found = [(token, math.exp(logprob)) for token, logprob in logprobs.likeliest]
    assert found == [(token, pytest.approx(probability, abs=1e-7)) for token, probability in expected]


def test_logprobs_are_off_by_default() -> None:
    assert chosen(GenerationOptions(), LOGITS)[1] is None


def test_the_logprob_of_a_token_that_the_model_excludes() -> None:
    def insist(tokens: Sequence[int], logits: Float32s) -> None:
        logits[0] = 9

    options = GenerationOptions(logprobs=1, logits_processor=insist)
    token, logprobs = chosen(options, logits_of(0, 0.5, 0.5))
    assert token == 0
    assert logprobs is not None
    assert logprobs.logprob == -INFINITY
