"""Which tests a model gets, by its context."""

import argparse
from typing import Any

import pytest

from gpt2_edge.benchmarks.command import _counts, add_arguments, settings_from
from gpt2_edge.benchmarks.plan import Settings, SpeedTest, plan_tests
from gpt2_edge.errors import OptionError


def _names(settings: Settings, context_length: int, shortest: int | None = None) -> list[str]:
    return [test.name for test in plan_tests(settings, context_length, shortest).tests]


def test_the_defaults_for_gpt_2() -> None:
    plan = plan_tests(Settings(), 1024)
    assert [test.name for test in plan.tests] == [
        *("pp128", "pp512", "tg128", "tg128 @ d512", "tg124 @ d900", "tg128 b4", "tg128 b8")
    ]
    assert plan.notes == ("tg124 @ d900 in place of tg128 @ d900: the context of 1024 ends there",)
    assert not plan.skipped


def test_a_small_context_gets_depths_that_fit_and_the_others_are_skipped() -> None:
    plan = plan_tests(Settings(), 512)
    assert [test.name for test in plan.tests] == [
        *("pp128", "pp512", "tg128", "tg128 @ d256", "tg128 @ d384", "tg128 b4", "tg128 b8")
    ]
    assert {test.name: reason for test, reason in plan.skipped.items()} == {
        "tg128 @ d512": "does not fit the context of 512 tokens",
        "tg128 @ d900": "does not fit the context of 512 tokens",
    }


def test_a_large_model_beside_a_small_one_gets_the_depths_of_both() -> None:
    assert {"tg128 @ d256", "tg128 @ d512", "tg124 @ d900"} <= set(_names(Settings(), 1024, 512))


def test_a_tiny_context() -> None:
    assert _names(Settings(), 32) == ["pp32", "tg31", "tg16 @ d16", "tg31 b4", "tg31 b8"]


def test_what_was_asked_for_is_not_replaced() -> None:
    plan = plan_tests(Settings(prompts=(600,), depths=(512,), batches=(1,)), 512)
    assert [test.name for test in plan.tests] == ["tg128"]
    assert [test.name for test in plan.skipped] == ["pp600", "tg128 @ d512"]


def test_the_last_token_of_a_depth_fits_exactly() -> None:
    assert SpeedTest(0, 128, 384) in plan_tests(Settings(depths=(384,)), 512).tests


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompts": (0,)},
        {"new_tokens": ()},
        {"batches": (65,)},
        {"batches": (True,)},
        {"repetitions": 0},
        {"threads": (0,)},
        {"depths": (-1,)},
        {"sustain_seconds": float("nan")},
    ],
)
def test_settings_that_are_not_allowed(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parametrize(
    ("text", "counts"),
    [("128,512", (128, 512)), ("1-3", (1, 2, 3)), ("128-512+128", (128, 256, 384, 512)), ("1-8*2", (1, 2, 4, 8))],
)
def test_lists_and_ranges(text: str, counts: tuple[int, ...]) -> None:
    assert _counts(text) == counts


@pytest.mark.parametrize("text", ["", "a", "1,", "-5", "1-8*1", "1-8+0", "0-8*2", "8-4", "1-1000000000"])
def test_lists_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        _counts(text)


def _settings(*options: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return settings_from(parser.parse_args(options))


def test_options_become_settings() -> None:
    assert _settings() == Settings()
    assert _settings("-p", "16", "-d", "0", "-r", "7", "--threads", "1,2", "--quality-tokens", "0") == Settings(
        prompts=(16,), depths=(0,), repetitions=7, threads=(1, 2), quality_tokens=0
    )


def test_quick_leaves_what_was_asked_for() -> None:
    assert _settings("--quick", "-r", "4") == Settings(batches=(1,), repetitions=4, quality_tokens=1024)


def test_zero_repetitions_are_refused() -> None:
    with pytest.raises(OptionError, match="repetitions"):
        _settings("-r", "0")
