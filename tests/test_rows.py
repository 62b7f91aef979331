"""Several rows side by side, as prompts of a list or samples of one prompt, and their seeds."""

import threading
from collections.abc import Sequence
from typing import Any, Final

import pytest
from generating import CONTEXT, END_OF_TEXT, SAMPLED, STORY, assert_same, story_tokens

from gpt2_edge import Generation, Model, OptionError

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


# Options of each row.


def test_rows_with_options_of_their_own_equal_each_alone(model: Model) -> None:
    prompts = ["Once upon a time", "The king", "“Well,” said she", [5, 6, 7], "A bird"]
    cancelled = threading.Event()
    cancelled.set()
    own: list[dict[str, Any]] = [
        {},
        {"temperature": 1.2, "seed": 11, "max_new_tokens": 5},
        {"stop": ["."], "repetition_penalty": 1.3},
        {"temperature": 0.7, "top_k": 5, "logprobs": 2, "stop_tokens": [17]},
        {"cancel": cancelled},
    ]
    shared: dict[str, Any] = {"max_new_tokens": 24, "seed": 3}
    rows = model.generate(prompts, row_options=own, **shared)
    assert rows[0].seed == 3
    assert rows[1].seed == 11
    assert rows[3].seed == model.generate(prompts, **shared)[3].seed
    assert [row.finish_reason for row in rows[:2]] == ["length", "length"]
    assert rows[4].finish_reason == "cancelled"
    for prompt, options, row in zip(prompts, own, rows, strict=True):
        assert_same(row, model.generate(prompt, **(shared | options | {"seed": row.seed})))


def test_samples_with_options_of_their_own(int8_model: Model) -> None:
    short, long = int8_model.generate("Once", n=2, row_options=[{"max_new_tokens": 2}, {"max_new_tokens": 6}])
    assert [len(short.tokens), len(long.tokens)] == [2, 6]
    assert long.tokens[:2] == short.tokens


@pytest.mark.parametrize(
    ("row_options", "message"),
    [
        ([{}], "row_options has 1 entries for 2 rows: give one for each"),
        ({"seed": 1}, "row_options is not a list of dictionaries"),
        ([{}, None], "row_options is not a list of dictionaries"),
        ([{}, {"top_p": 2}], r"row_options\[1\]: top_p is 2: give a number from 0 to 1"),
        ([{"tempreature": 1}, {}], r"row_options\[0\]: unknown option tempreature: did you mean temperature\?"),
        ([{}, {"stop_tokens": [8192]}], r"row_options\[1\]: stop_tokens has token 8192"),
    ],
)
def test_options_of_rows_that_are_refused(int8_model: Model, row_options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        int8_model.generate(["Once", "Twice"], row_options=row_options)
