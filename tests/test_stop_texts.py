"""Stop texts: found across and inside tokens, never leaked, the same streamed or not."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2_edge
from gpt2_edge.text import TextAssembler

PROMPT = "Once upon a time"


def assemble(chunks: list[bytes], stops: list[str], minimum: int = 0) -> tuple[list[str], TextAssembler]:
    """Feed chunks as tokens until a stop text is found; return the pieces and the assembler."""
    assembler = TextAssembler(lambda token: chunks[token], stops)
    pieces = []
    for token in range(len(chunks)):
        pieces.append(assembler.add(token, may_stop=token >= minimum))
        if assembler.stop is not None:
            break
    pieces.append(assembler.finish())
    return pieces, assembler


@pytest.mark.parametrize(
    ("chunks", "stops", "text", "stop", "tokens_before"),
    [
        ([b"ab", b"cd"], ["bc"], "a", "bc", 0),  # across tokens: the first token lies partly in it
        ([b"a", b"bc", b"d"], ["bc"], "a", "bc", 1),
        ([b"abcd"], ["bc"], "a", "bc", 0),  # inside a token
        ([b"ab", b"cd"], ["bx"], "abcd", None, 2),  # a beginning that does not become one is given after all
        ([b"ab"], ["bc"], "ab", None, 1),  # ... also at the end
        ([b"a", b"a", b"b"], ["ab"], "a", "ab", 1),
        ([b"aaa", b"ab"], ["aab"], "aa", "aab", 0),
        ([b"abc"], ["c", "bc"], "a", "bc", 0),  # the one that begins first
        ([b"abcd"], ["bc", "bcd"], "a", "bcd", 0),  # of those the longest
        ([b"ab", b"cd"], ["bcd", "bc"], "a", "bcd", 0),
        ([b"\xc3", b"\xa9x"], ["\u00e9"], "", "\u00e9", 0),  # a character spread over tokens
        ([b"a\xc3"], ["\ufffd"], "a", "\ufffd", 1),  # a broken character at the end is U+FFFD, which may be a stop
        ([b"ab"], ["ab"], "", "ab", 0),
        ([b"ab", b"\xe9\xad", b"\x94"], ["\u9b54"], "ab", "\u9b54", 1),  # bytes of the stop text alone
    ],
)
def test_hand_worked(chunks: list[bytes], stops: list[str], text: str, stop: str | None, tokens_before: int) -> None:
    pieces, assembler = assemble(chunks, stops)
    assert "".join(pieces) == text
    assert assembler.stop == stop
    assert assembler.tokens_before_stop == tokens_before


def test_stop_texts_wait_for_the_minimum() -> None:
    pieces, assembler = assemble([b"xab", b"xab"], ["ab"], minimum=1)
    assert "".join(pieces) == "xabx"
    assert assembler.stop == "ab"


@settings(deadline=None, derandomize=True, max_examples=400)
@given(
    text=st.text(alphabet="abé😀", max_size=14),
    cuts=st.sets(st.integers(1, 40), max_size=10),
    stops=st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_any_cut_into_tokens_gives_the_text_before_a_stop_and_leaks_nothing(
    text: str, cuts: set[int], stops: list[str]
) -> None:
    data = text.encode()
    borders = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[start:end] for start, end in itertools.pairwise(borders)]
    pieces, assembler = assemble(chunks, stops)
    given_text = "".join(pieces)
    assert text.startswith(given_text)
    if assembler.stop is None:
        assert given_text == text
        assert not any(stop in text for stop in stops)
    else:
        assert text.startswith(given_text + assembler.stop)
        # No stop text is complete before: with whole texts at hand the search could not have ended earlier.
        assert not any(stop in given_text for stop in stops)


@pytest.mark.parametrize("seed", range(6))
def test_generate_and_stream_agree_and_report_the_stop(int8_model: gpt2_edge.Model, seed: int) -> None:
    whole = int8_model.generate(PROMPT, max_new_tokens=60, temperature=1.0, seed=seed, ignore_eos=True).text
    choose = random.Random(seed)
    start = choose.randrange(5, len(whole) - 12)
    stop = whole[start : start + choose.randrange(1, 9)]
    expected = whole[: whole.index(stop)]
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": seed, "ignore_eos": True, "stop": ["\x00", stop]}
    done = int8_model.generate(PROMPT, **options)
    stream = int8_model.stream(PROMPT, **options)
    pieces = [piece.text for piece in stream]
    assert done.text == "".join(pieces) == expected
    assert (done.finish_reason, done.stop) == ("stop", stop)
    assert (stream.result.finish_reason, stream.result.stop, stream.result.tokens) == ("stop", stop, done.tokens)
    assert expected.startswith(int8_model.detokenize(done.tokens))


def test_a_stop_token_ends_and_is_reported(int8_model: gpt2_edge.Model) -> None:
    tokens = int8_model.generate(PROMPT, max_new_tokens=20).tokens
    done = int8_model.generate(PROMPT, max_new_tokens=20, stop_tokens=[tokens[7]])
    first = tokens.index(tokens[7])
    assert done.tokens == tokens[:first]
    assert (done.finish_reason, done.stop) == ("stop", tokens[7])


def test_logprobs_belong_to_the_tokens_before_the_stop(fp32_model: gpt2_edge.Model) -> None:
    done = fp32_model.generate(PROMPT, max_new_tokens=30, stop="boy", logprobs=2)
    assert done.logprobs is not None
    assert [entry.token for entry in done.logprobs] == done.tokens
    scored = fp32_model.score([*fp32_model.tokenize(PROMPT), *done.tokens]).logprobs[-len(done.tokens) :]
    assert [entry.logprob for entry in done.logprobs] == pytest.approx(scored, abs=1e-4)
