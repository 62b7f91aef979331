"""What is measured: the settings, and the tests that they mean for a model with a given context.

Tests have llama-bench's names: `pp512` computes a prompt of 512 tokens, `tg128` 128 tokens one after another,
`tg128 @ d512` the same after 512 tokens that are not timed. `tg128 b4` is ours: 4 sequences side by side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from gpt2_edge.errors import OptionError
from gpt2_edge.row_limit import MAXIMUM_ROWS

DEFAULT_PROMPTS: Final = (128, 512)
DEFAULT_NEW_TOKENS: Final = (128,)
DEFAULT_DEPTHS: Final = (512, 900)
DEFAULT_BATCHES: Final = (1, 4, 8)
DEFAULT_REPETITIONS: Final = 5
_FEWEST_TIMED_TOKENS: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `run` was asked for.

    Attributes:
        prompts: Prompt lengths of the pp tests; None for 128 and 512, or what a small context holds.
        new_tokens: Tokens of the tg tests.
        depths: Tokens before the tg tests, beside 0; None for 512 and 900, or what a small context holds.
        batches: Sequences side by side in the tg tests at depth 0.
        repetitions: Samples of every test, after a warm-up.
        sample_seconds: A test that is over sooner is run again until then, and all of that is one sample: a prompt of a
            tiny model takes milliseconds, which would measure the moods of the clock and the scheduler.
        threads: Threads that compute, each number a row of its own; None for the cores allowed.
        device: As in `gpt2_edge.load`.
        quality_tokens: Tokens of the text over which quality is measured, at most; 0 leaves it out.
        sustain_seconds: How long each row then decodes without a pause; 0 leaves it out.
    """

    prompts: tuple[int, ...] | None = None
    new_tokens: tuple[int, ...] = DEFAULT_NEW_TOKENS
    depths: tuple[int, ...] | None = None
    batches: tuple[int, ...] = DEFAULT_BATCHES
    repetitions: int = DEFAULT_REPETITIONS
    sample_seconds: float = 0.25
    threads: tuple[int, ...] | None = None
    device: str = "auto"
    quality_tokens: int = 4096
    sustain_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check_counts("prompts", self.prompts, 1)
        _check_counts("new_tokens", self.new_tokens, 1)
        _check_counts("depths", self.depths, 0)
        _check_counts("batches", self.batches, 1, MAXIMUM_ROWS)
        _check_counts("repetitions", (self.repetitions,), 1)
        _check_counts("threads", self.threads, 1)
        _check_counts("quality_tokens", (self.quality_tokens,), 0)
        for name in ("sample_seconds", "sustain_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise OptionError(f"{name} is {getattr(self, name)!r}: give seconds, 0 or more")


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """One test.

    Attributes:
        n_prompt: Prompt tokens that are timed; 0 in a tg test.
        n_gen: Tokens that are timed, one after another; 0 in a pp test.
        n_depth: Tokens before them, which are not timed.
        batch: Sequences side by side.
    """

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    batch: int = 1

    @property
    def name(self) -> str:
        """As llama-bench writes it: "pp512", "tg128", "tg128 @ d512"; and "tg128 b4"."""
        name = f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}"
        if self.n_depth:
            name += f" @ d{self.n_depth}"
        return name if self.batch == 1 else f"{name} b{self.batch}"


@dataclass(frozen=True, slots=True)
class Plan:
    """The tests for one context length.

    Attributes:
        tests: Those that fit.
        skipped: Those that do not, and why.
        notes: What differs from what was asked for.
    """

    tests: tuple[SpeedTest, ...]
    skipped: dict[SpeedTest, str]
    notes: tuple[str, ...]


def plan_tests(settings: Settings, context_length: int, shortest_context: int | None = None) -> Plan:
    """Choose the tests of a model.

    Args:
        settings: What is asked for.
        context_length: Of this model.
        shortest_context: Of all models that are compared. Where lengths were not asked for, its own are measured
            with every model, so that each test has a row to be compared with.
    """
    shortest = min(context_length, shortest_context or context_length)
    prompts = settings.prompts or _defaults(DEFAULT_PROMPTS, shortest, (shortest,))
    depths = settings.depths
    if depths is None:
        smaller = (shortest // 2, shortest - max(settings.new_tokens))
        depths = _defaults(DEFAULT_DEPTHS, shortest, smaller)
    tests: list[SpeedTest] = []
    skipped: dict[SpeedTest, str] = {}
    notes: list[str] = []
    for wanted in _wanted(settings, prompts, depths):
        fitting = _fit(wanted, context_length)
        if fitting is None:
            skipped[wanted] = f"does not fit the context of {context_length} tokens"
            continue
        if fitting != wanted:
            notes.append(f"{fitting.name} in place of {wanted.name}: the context of {context_length} ends there")
        if fitting not in tests:
            tests.append(fitting)
    return Plan(tuple(tests), skipped, tuple(notes))


def _defaults(usual: tuple[int, ...], shortest_context: int, smaller: tuple[int, ...]) -> tuple[int, ...]:
    """Return the usual lengths, and others beside them if the shortest context holds none of those."""
    if any(length < shortest_context for length in usual):
        return usual
    return tuple(sorted({*usual, *(length for length in smaller if length > 0)}))


def _wanted(settings: Settings, prompts: Sequence[int], depths: Sequence[int]) -> list[SpeedTest]:
    tests = [SpeedTest(length, 0) for length in prompts]
    for count in settings.new_tokens:
        tests.append(SpeedTest(0, count))
        tests += [SpeedTest(0, count, depth) for depth in depths if depth > 0]
        tests += [SpeedTest(0, count, 0, batch) for batch in settings.batches if batch > 1]
    return tests


def _fit(test: SpeedTest, context_length: int) -> SpeedTest | None:
    """Return the test, one with fewer new tokens if the context ends before, or None if it does not fit at all."""
    if test.n_prompt:
        return test if test.n_prompt <= context_length else None
    # At depth 0 there still is one token to start from.
    room = context_length - max(test.n_depth, 1)
    if room >= test.n_gen:
        return test
    return SpeedTest(0, room, test.n_depth, test.batch) if room >= _FEWEST_TIMED_TOKENS else None


def _check_counts(name: str, counts: Sequence[int] | None, least: int, most: int | None = None) -> None:
    if counts is None:
        return
    for count in counts:
        if not isinstance(count, int) or isinstance(count, bool) or count < least or (most and count > most):
            limits = f"{least} or more" if most is None else f"from {least} to {most}"
            raise OptionError(f"{name} has {count!r}: give integers, {limits}")
    if not counts and name in ("new_tokens", "batches", "threads"):
        raise OptionError(f"{name} is empty: give at least one")
