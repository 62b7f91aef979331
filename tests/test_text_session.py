"""Text sessions: what was generated goes on, back, in branches, and in another process."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2_edge
from gpt2_edge import ContextLengthError, OptionError, PromptError, SessionError
from gpt2_edge.session import StepSession
from gpt2_edge.stream import TextStream

PROMPT = "The old king had three sons, and"
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 50, "ignore_eos": True}


# Continuing generated tokens is compared with a fresh prompt at full precision only: at INT8 the rounding of
# activations makes a tenth of a logit out of the last bits in which decode steps and prefill differ.
@pytest.fixture(params=["fp32_model", "int8_model"])
def model(request: pytest.FixtureRequest) -> gpt2_edge.Model:
    chosen: gpt2_edge.Model = request.getfixturevalue(request.param)
    return chosen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {**SAMPLING, "seed": 3},
        {**SAMPLING, "seed": 3, "frequency_penalty": 0.7, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
    ],
)
def test_two_calls_give_what_one_call_gives(model: gpt2_edge.Model, options: dict[str, Any]) -> None:
    whole = model.generate(PROMPT, max_new_tokens=40, **options)
    session = model.session()
    session.append(PROMPT)
    first = session.generate(max_new_tokens=15, **options)
    later = {name: value for name, value in options.items() if name != "seed"}
    second = session.generate(max_new_tokens=25, **later)
    assert first.tokens + second.tokens == whole.tokens
    assert session.tokens == model.tokenize(PROMPT) + whole.tokens
    assert session.text == PROMPT + whole.text
    assert second.seed == first.seed


def test_a_saved_session_goes_on_in_a_new_process(
    int8_model: gpt2_edge.Model, storyteller_int8: Path, tmp_path: Path
) -> None:
    options = {**SAMPLING, "presence_penalty": 0.5}
    whole = int8_model.generate(PROMPT, max_new_tokens=30, seed=11, **options)
    session = int8_model.session()
    session.append(PROMPT)
    session.generate(max_new_tokens=12, seed=11, **options)
    session.save(tmp_path / "state")
    program = (
        "import sys, gpt2_edge\n"
        "session = gpt2_edge.load(sys.argv[1]).load_session(sys.argv[2])\n"
        "print(session.generate(max_new_tokens=18, temperature=1.0, top_k=50, ignore_eos=True,"
        " presence_penalty=0.5).tokens)\n"
    )
    command = [sys.executable, "-c", program, str(storyteller_int8), str(tmp_path / "state")]
    printed = subprocess.run(command, capture_output=True, check=True, encoding="utf-8").stdout
    assert printed.strip() == str(whole.tokens[12:])


def test_a_fork_goes_its_own_way(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append(PROMPT)
    session.generate(max_new_tokens=10, seed=1, **SAMPLING)
    branch = session.fork()
    before = session.tokens
    branch.append(" But the youngest")
    branch.generate(max_new_tokens=10)
    assert session.tokens == before
    assert branch.tokens[: len(before)] == before
    assert session.generate(max_new_tokens=10).tokens == fp32_model.generate(before, max_new_tokens=10).tokens


def test_rewind_takes_back(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append(PROMPT)
    session.generate(max_new_tokens=20, seed=1, **SAMPLING)
    session.rewind(15)
    kept = session.tokens
    assert len(kept) == len(fp32_model.tokenize(PROMPT)) + 5
    assert session.generate(max_new_tokens=8, seed=2, **SAMPLING).tokens == (
        fp32_model.generate(kept, max_new_tokens=8, seed=2, **SAMPLING).tokens
    )
    session.rewind(len(session.tokens))
    assert session.tokens == []
    assert session.generate(max_new_tokens=3).tokens == fp32_model.generate("", max_new_tokens=3).tokens


def test_only_what_is_new_is_computed(fp32_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prefilled: list[int] = []
    original = StepSession.prefill

    def counting(self: StepSession, slot: int, tokens: list[int], start: int, positions: Any) -> Any:
        prefilled.append(len(tokens))
        return original(self, slot, tokens, start, positions)

    monkeypatch.setattr(StepSession, "prefill", counting)
    session = fp32_model.session()
    session.append(PROMPT)
    session.generate(max_new_tokens=10)
    session.append(" and then")
    session.generate(max_new_tokens=10)
    added = len(fp32_model.tokenize(" and then"))
    # The last generated token was chosen but not computed yet.
    assert prefilled == [len(fp32_model.tokenize(PROMPT)), 1 + added]
    prefilled.clear()
    session.replace(PROMPT + " nothing")
    session.generate(max_new_tokens=1)
    assert prefilled == [len(fp32_model.tokenize(PROMPT + " nothing")) - len(fp32_model.tokenize(PROMPT))]


def test_next_tokens_go_on_from_what_was_computed(fp32_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    session = fp32_model.session()
    assert session.next_tokens() == fp32_model.next_tokens("")
    session.append(PROMPT)
    session.generate(max_new_tokens=10, seed=1, **SAMPLING)
    before = session.tokens
    expected = fp32_model.next_tokens(before, 5)
    prefilled: list[int] = []
    original = StepSession.prefill

    def counting(self: StepSession, slot: int, tokens: list[int], start: int, positions: Any) -> Any:
        prefilled.append(len(tokens))
        return original(self, slot, tokens, start, positions)

    monkeypatch.setattr(StepSession, "prefill", counting)
    found = session.next_tokens(5)
    assert prefilled == [1]
    assert [each.token for each in found] == [each.token for each in expected]
    np.testing.assert_allclose([each.probability for each in found], [each.probability for each in expected], rtol=1e-4)
    assert session.tokens == before
    with pytest.raises(OptionError, match="k is 0"):
        session.next_tokens(0)


def test_next_tokens_change_nothing_of_what_follows(model: gpt2_edge.Model) -> None:
    """Not even the last bits, in which INT8 would choose other tokens."""
    results = []
    for looks in (False, True):
        session = model.session()
        for turn in range(4):
            session.append(" The king said that")
            if looks:
                session.next_tokens(3)
            session.generate(max_new_tokens=12, seed=turn, **SAMPLING)
        results.append(session.tokens)
    assert results[0] == results[1]


def test_replace_gives_what_a_fresh_prompt_gives(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append(PROMPT)
    session.generate(max_new_tokens=10)
    session.replace(PROMPT + " one of them was blind.")
    fresh = fp32_model.generate(PROMPT + " one of them was blind.", max_new_tokens=10, seed=1, **SAMPLING)
    assert session.generate(max_new_tokens=10, seed=1, **SAMPLING).tokens == fresh.tokens


def test_a_session_that_overflows_keeps_the_latest_half(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append([7] * 500)
    with pytest.raises(ContextLengthError):
        session.append([7] * 13)
    assert len(session.tokens) == 500
    done = session.generate(max_new_tokens=40, overflow="slide", keep_tokens=3, seed=1, **SAMPLING)
    assert len(done.tokens) == 40
    # 513 tokens overflowed: 3 + 253 were kept, and 27 more came.
    assert len(session.tokens) == 256 + 27
    assert session.tokens[:3] == [7, 7, 7]
    assert session.tokens[-27:] == done.tokens[-27:]
    expected = fp32_model.generate(session.tokens, max_new_tokens=5).tokens
    assert session.generate(max_new_tokens=5).tokens == expected


def test_a_full_session_says_so_and_can_slide(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append([7] * 512)
    assert session.generate(max_new_tokens=5, ignore_eos=True).finish_reason == "context"
    with pytest.raises(ContextLengthError):
        session.generate(max_new_tokens=5)
    assert len(session.generate(max_new_tokens=5, overflow="slide", ignore_eos=True).tokens) == 5


def test_stop_text_is_not_part_of_the_session(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append(PROMPT)
    whole = fp32_model.generate(PROMPT, max_new_tokens=30)
    stop = fp32_model.detokenize([whole.tokens[10]])
    done = session.generate(max_new_tokens=30, stop=stop)
    assert session.tokens == fp32_model.tokenize(PROMPT) + done.tokens
    assert stop not in fp32_model.detokenize(session.tokens[len(fp32_model.tokenize(PROMPT)) :])
    assert (
        session.generate(max_new_tokens=5).tokens
        == fp32_model.generate(fp32_model.tokenize(PROMPT) + done.tokens, max_new_tokens=5).tokens
    )


def test_text_before_a_stop_text_inside_a_token_is_kept(model: gpt2_edge.Model) -> None:
    whole = model.generate(PROMPT, max_new_tokens=30)
    token = next(token for token in whole.tokens[5:] if len(model.detokenize([token])) >= 4)
    stop = model.detokenize([token])[2:]
    session = model.session()
    session.append(PROMPT)
    done = session.generate(max_new_tokens=30, stop=stop)
    assert done.finish_reason == "stop"
    assert session.text == PROMPT + done.text
    assert len(session.generate(max_new_tokens=3, ignore_eos=True).tokens) == 3


def test_append_can_slide(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append([7] * 500)
    session.append([8] * 20, overflow="slide", keep_tokens=2)
    assert session.tokens == [7] * (256 - 20) + [8] * 20
    assert (
        session.generate(max_new_tokens=3).tokens == fp32_model.generate(session.tokens[:256], max_new_tokens=3).tokens
    )


def test_text_from_nothing_does_not_show_its_start(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    done = session.generate(max_new_tokens=5)
    assert session.tokens == [0, *done.tokens]
    assert session.text == done.text


def test_a_session_in_use_refuses_and_is_free_again(model: gpt2_edge.Model) -> None:
    session = model.session()
    session.append(PROMPT)
    stream = session.stream(max_new_tokens=50)
    pieces = [next(stream).text for _ in range(3)]
    for use in (lambda: session.append("x"), session.fork, lambda: session.rewind(1), lambda: session.stream()):
        with pytest.raises(SessionError, match="is generating"):
            use()
    stream.close()
    assert session.text.startswith(PROMPT + "".join(pieces))
    abandoned = session.stream(max_new_tokens=50)
    next(abandoned)
    del abandoned
    session.append(" and")
    assert session.generate(max_new_tokens=2).finish_reason == "length"


def test_a_stream_that_was_never_begun_changes_nothing(model: gpt2_edge.Model) -> None:
    session = model.session()
    session.append(PROMPT)
    stream = session.stream(max_new_tokens=5)
    session.append(" x")
    assert list(stream) == []
    assert session.tokens == model.tokenize(PROMPT) + model.tokenize(" x")


def test_a_failure_changes_nothing(model: gpt2_edge.Model) -> None:
    def fail(tokens: object, logits: object) -> None:
        raise ZeroDivisionError

    session = model.session()
    session.append(PROMPT)
    with pytest.raises(ZeroDivisionError):
        session.generate(max_new_tokens=5, logits_processor=fail)
    assert session.text == PROMPT
    assert session.generate(max_new_tokens=5).tokens == model.generate(PROMPT, max_new_tokens=5).tokens


@pytest.mark.parametrize("n", [-1, 1000, 1.5, True, None])
def test_rewind_refuses(fp32_model: gpt2_edge.Model, n: Any) -> None:
    session = fp32_model.session()
    session.append(PROMPT)
    with pytest.raises(OptionError, match="give an integer from 0 to"):
        session.rewind(n)


def test_append_refuses_and_leaves_the_session_as_it_was(fp32_model: gpt2_edge.Model) -> None:
    session = fp32_model.session()
    session.append(PROMPT)
    with pytest.raises(PromptError):
        session.append([99999])
    assert session.text == PROMPT


def saved_session(model: gpt2_edge.Model, path: Path) -> bytes:
    session = model.session()
    session.append(PROMPT)
    session.generate(max_new_tokens=4)
    session.save(path)
    return path.read_bytes()


def test_every_damaged_byte_is_noticed(fp32_model: gpt2_edge.Model, tmp_path: Path) -> None:
    path = tmp_path / "state"
    data = saved_session(fp32_model, path)
    random = np.random.default_rng(0)
    for place in (*range(0, 90, 7), *random.integers(90, len(data), 20).tolist()):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        with pytest.raises(SessionError):
            fp32_model.load_session(path)
    for length in (0, 10, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(SessionError):
            fp32_model.load_session(path)


def test_another_model_is_refused(fp32_model: gpt2_edge.Model, int8_model: gpt2_edge.Model, tmp_path: Path) -> None:
    saved_session(fp32_model, tmp_path / "state")
    with pytest.raises(SessionError, match="another model folder"):
        int8_model.load_session(tmp_path / "state")
    with pytest.raises(SessionError, match="cannot read"):
        int8_model.load_session(tmp_path / "nothing")


def test_a_session_file_appears_whole_or_not_at_all(
    fp32_model: gpt2_edge.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    before = saved_session(fp32_model, path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    session = fp32_model.session()
    session.append("Another")
    with pytest.raises(SessionError, match="No space left"):
        session.save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_session_that_is_cancelled_as_its_context_slides_goes_on_right(fp32_model: gpt2_edge.Model) -> None:
    """The kept tokens wait to be computed again then, and what was cached belongs to others."""
    cancel = threading.Event()

    def cancel_at_the_end(tokens: Any, logits: Any) -> None:
        if len(tokens) == 512:
            cancel.set()

    session = fp32_model.session()
    session.append(list(range(100, 605)))
    session.generate(max_new_tokens=3, ignore_eos=True)
    done = session.generate(
        max_new_tokens=99, ignore_eos=True, overflow="slide", cancel=cancel, logits_processor=cancel_at_the_end
    )
    assert done.finish_reason == "cancelled"
    assert len(session.tokens) == 256
    expected = fp32_model.generate(session.tokens, max_new_tokens=5, ignore_eos=True).tokens
    assert session.generate(max_new_tokens=5, ignore_eos=True).tokens == expected


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_two_threads_that_append_lose_nothing(int8_model: gpt2_edge.Model) -> None:
    for _ in range(20):
        session = int8_model.session()
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(session.append, [7]) for _ in range(20)]:
                done.result()
        assert session.tokens == [7] * 20


def test_a_session_is_in_use_from_the_moment_it_generates(
    int8_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use_it_meanwhile(stream: TextStream) -> TextStream:
        with pytest.raises(SessionError, match="is generating"):
            session.append(" x")
        return stream

    session = int8_model.session()
    session.append(PROMPT)
    monkeypatch.setattr(TextStream, "__iter__", use_it_meanwhile)
    assert len(session.generate(max_new_tokens=3, ignore_eos=True).tokens) == 3
    assert len(session.tokens) == len(int8_model.tokenize(PROMPT)) + 3
