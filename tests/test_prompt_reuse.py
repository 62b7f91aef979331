"""A prompt that begins like an earlier one is not computed again, and gives the very same bits as if it were."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

import gpt2_edge
from gpt2_edge import Model
from gpt2_edge.generation import NextTokenRow
from gpt2_edge.prompt_reuse import PromptReuse
from gpt2_edge.session import Logits, StepSession

VOCABULARY: Final = 8192


def made_up(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


COMMON: Final = made_up(0, 500)


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each run of a prefill computes."""
    counts: list[int] = []
    prefill = StepSession.prefill

    def counting(session: StepSession, slot: int, tokens: list[int], start: int, positions: Any) -> Logits:
        counts.append(len(tokens))
        return prefill(session, slot, tokens, start, positions)

    monkeypatch.setattr(StepSession, "prefill", counting)
    return counts


@pytest.fixture(params=["fp32", "int8"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"storyteller_{request.param}")
    return path


@pytest.fixture
def model(folder: Path) -> Iterator[Model]:
    """A model that has computed nothing yet."""
    with gpt2_edge.load(folder) as loaded:
        yield loaded


def logits_after(model: Model, prompt: list[int]) -> Logits:
    row = NextTokenRow(prompt)
    model._core.run([row])
    return row.logits


@pytest.mark.parametrize("length", [1, 2, 128, 255, 256, 257, 258, 385, 500])
def test_logits_are_the_same_bits_whatever_was_computed_before(model: Model, folder: Path, length: int) -> None:
    """Runs of one token differ from longer ones in the last bits, so where a prefill is divided makes a difference."""
    prompt = [*COMMON[: length // 2], *made_up(1, length - length // 2)]
    with gpt2_edge.load(folder) as fresh:
        alone = logits_after(fresh, prompt)
    for before in (1, 128, 255, 256, 257, 300, 500):
        earlier = [*prompt[:before], *COMMON[before : before + 130]][:512]
        model.generate(earlier, max_new_tokens=5, ignore_eos=True)
        np.testing.assert_array_equal(logits_after(model, prompt), alone)
        np.testing.assert_array_equal(logits_after(model, prompt), alone)


def test_generated_tokens_are_not_taken_for_a_prompt(model: Model, folder: Path, prefilled: list[int]) -> None:
    """Their keys and values come from decode steps, which at INT8 are up to a tenth of a logit away."""
    said = model.generate(COMMON[:100], max_new_tokens=200, ignore_eos=True).tokens
    prompt = [*COMMON[:100], *said]
    found = logits_after(model, prompt)
    assert prefilled == [100, 256, 44]
    with gpt2_edge.load(folder) as fresh:
        np.testing.assert_array_equal(found, logits_after(fresh, prompt))


def test_a_session_that_goes_on_is_not_taken_for_a_prompt(model: Model, folder: Path) -> None:
    session = model.session()
    session.append(COMMON[:100])
    session.generate(max_new_tokens=60, ignore_eos=True)
    session.append(COMMON[:100])
    session.generate(max_new_tokens=2, ignore_eos=True)
    going_on = session.tokens[:200]
    other = made_up(9, 300)
    model.generate(other, max_new_tokens=2)
    session.generate(max_new_tokens=2, ignore_eos=True)  # is put over the other prompt
    with gpt2_edge.load(folder) as fresh:
        for prompt in (other[:200], going_on):
            np.testing.assert_array_equal(logits_after(model, prompt), logits_after(fresh, prompt))


def test_only_what_is_new_is_computed(int8_model: Model, prefilled: list[int]) -> None:
    prompt = made_up(2, 400)
    int8_model.generate(prompt, max_new_tokens=2)
    assert prefilled == [256, 144]
    prefilled.clear()
    repeated = int8_model.generate(prompt, max_new_tokens=2)
    assert prefilled == [], "the whole prompt is known"
    assert repeated.timings.prompt_tokens == 0
    assert repeated.prompt_tokens == 400
    longer = int8_model.generate([*prompt, 5, 6], max_new_tokens=2)
    assert prefilled == [146]
    assert longer.timings.prompt_tokens == 146
    prefilled.clear()
    int8_model.generate([*prompt[:300], *made_up(3, 90)], max_new_tokens=2)
    assert prefilled == [134]
    prefilled.clear()
    int8_model.next_tokens(prompt[:256])
    assert prefilled == [256], "its last token is computed, for the logits after it"


def test_scores_and_logits_are_computed_where_they_are_wanted(int8_model: Model, prefilled: list[int]) -> None:
    prompt = made_up(4, 300)
    score = int8_model.score(prompt)
    int8_model.next_tokens(prompt)
    prefilled.clear()
    assert int8_model.score(prompt) == score
    assert int8_model.logits(prompt).shape == (300, VOCABULARY)
    assert prefilled == [256, 44] * 2


def test_the_begin_is_taken_from_a_prompt_that_still_decodes(int8_model: Model, prefilled: list[int]) -> None:
    prompt = made_up(5, 300)
    with int8_model.stream(prompt, max_new_tokens=50, ignore_eos=True) as stream:
        next(stream)
        prefilled.clear()
        other = [*prompt[:290], *made_up(6, 20)]
        found = int8_model.generate(other, max_new_tokens=20, temperature=1.0, seed=1)
        assert prefilled == [54]
        rest = [piece.text for piece in stream]
    assert len(rest) > 1
    assert found.tokens == int8_model.generate(other, max_new_tokens=20, temperature=1.0, seed=1).tokens


def test_samples_and_equal_prompts_of_a_list_are_computed_once(int8_model: Model, prefilled: list[int]) -> None:
    prompt = made_up(7, 300)
    samples = int8_model.generate(prompt, n=20, max_new_tokens=6, temperature=1.0, seed=3, ignore_eos=True)
    assert prefilled == [256, 44]
    prefilled.clear()
    repeated = int8_model.generate([made_up(8, 280)] * 5, max_new_tokens=6)
    assert prefilled == [256, 24]
    assert len({tuple(each.tokens) for each in repeated}) == 1
    for sample in samples[:3]:
        alone = int8_model.generate(prompt, max_new_tokens=6, temperature=1.0, seed=sample.seed, ignore_eos=True)
        assert sample.tokens == alone.tokens


def test_the_longest_prompt_survives_when_slots_are_given_back(int8_model: Model, prefilled: list[int]) -> None:
    prompts = [made_up(10 + number, 130 + 50 * number) for number in range(5)]
    int8_model.generate(prompts, max_new_tokens=4, ignore_eos=True)
    assert int8_model._core.engine._session.slots == 1
    alone = int8_model.next_tokens(prompts[0])
    int8_model.generate(prompts, max_new_tokens=4, ignore_eos=True)
    prefilled.clear()
    int8_model.next_tokens(prompts[4])
    assert prefilled == []
    assert int8_model.next_tokens(prompts[0]) == alone


def test_threads_with_prompts_that_begin_alike_get_what_they_get_alone(model: Model, folder: Path) -> None:
    prompts = [[*COMMON[: 128 * (number % 4)], *made_up(number % 5, 60)] for number in range(16)]

    def run(loaded: Model, number: int) -> list[int]:
        done = loaded.generate(prompts[number], max_new_tokens=8, temperature=1.0, seed=number, ignore_eos=True)
        return done.tokens

    expected = []
    for number in range(16):
        model._core.engine._prefill._prompts.keep_only(None)
        expected.append(run(model, number))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda number: run(model, number), range(16))) == expected


# The notes about slots, by themselves.

LAST: Final[Callable[[Sequence[int]], range]] = lambda tokens: range(len(tokens) - 1, len(tokens))  # noqa: E731


@pytest.fixture
def reuse() -> PromptReuse:
    """Slot 1 holds a prompt of 10 tokens, in chunks of 4."""
    notes = PromptReuse(4)
    notes.begin(1, 0)
    notes.extend(1, 0, [1, 2, 3, 4], None)
    notes.extend(1, 4, [5, 6, 7, 8], None)
    notes.extend(1, 8, [9, 10], np.zeros((1, 3), np.float32))
    return notes


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], 0),
        ([1, 2, 3, 4], 0),
        ([1, 2, 3, 4, 5], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8], 4),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], 8),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 10),
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13], 8),
        ([1, 2, 3, 4, 5, 0, 7, 8, 9], 4),
        ([0, 2, 3, 4, 5, 6, 7, 8, 9], 0),
    ],
)
def test_whole_chunks_or_all(reuse: PromptReuse, tokens: list[int], expected: int) -> None:
    found = reuse.find(tokens, LAST(tokens), 0)
    assert (found.tokens, found.logits is not None) == (expected, expected == 10)
    assert found.slot == (1 if expected else 0)


def test_logits_in_the_middle_are_computed(reuse: PromptReuse) -> None:
    tokens = list(range(1, 11))
    assert reuse.find(tokens, range(6, 9), 0).tokens == 4
    assert reuse.find(tokens, range(0, 9), 0).tokens == 0
    assert reuse.find(tokens, range(9, 9), 0).tokens == 8


def test_what_is_overwritten_is_forgotten(reuse: PromptReuse) -> None:
    tokens = list(range(1, 11))
    reuse.copy(1, 0, 10)
    reuse.begin(1, 4)
    assert reuse.find(tokens, LAST(tokens), 1).slot == 0
    reuse.begin(0, 0)
    assert reuse.find(tokens, LAST(tokens), 1) == (1, 4, None)
    reuse.extend(0, 4, [5, 6, 7, 8], None)  # after something else than a prompt
    assert reuse.lengths() == {1: 4}
