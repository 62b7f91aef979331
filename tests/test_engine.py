"""The engine: rows that come and go in any order and from any thread get exactly the tokens they get alone."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pytest
from fake_session import (
    PATIENCE_SECONDS,
    VOCABULARY,
    BatchingFakeSession,
    FakeSession,
    Logits,
    Spoken,
    Tokens,
    compute,
    engine_over,
    finish,
    logits_after,
    made_up_prompt,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_edge import Model, ModelClosedError
from gpt2_edge.engine import Engine
from gpt2_edge.generation import LogitsRow
from gpt2_edge.prefill import PREFILL_CHUNK_TOKENS
from gpt2_edge.row_limit import MAXIMUM_ROWS
from gpt2_edge.session import StepSession


@pytest.fixture(params=[FakeSession, BatchingFakeSession])
def session(request: pytest.FixtureRequest) -> Iterator[FakeSession]:
    session: FakeSession = request.param()
    yield session
    assert session.violations == []


@pytest.fixture
def engine(session: FakeSession) -> Engine:
    return engine_over(session)


# One thread, any order of events.


@dataclass(frozen=True)
class Join:
    """Some rows come at once; as samples they have one prompt in common. `room` is what fits after the prompt.

    All prompts may begin with the same `shared` tokens.
    """

    count: int
    prompt: int
    wanted: int
    samples: bool = False
    shared: int = 0
    room: int | None = None
    fails_after: int | None = None


@dataclass(frozen=True)
class Resume:
    """A row goes on with the tokens, and the saved keys and values, of one that is done."""

    which: int
    wanted: int


@dataclass(frozen=True)
class Advance:
    """Somebody waits until a row has said some more."""

    which: int
    tokens: int


@dataclass(frozen=True)
class Leave:
    which: int


LENGTHS: Final = st.one_of(
    st.integers(1, 6), st.sampled_from((8, 9, 40, 41)), st.sampled_from((255, 256, 257, 511, 512, 600))
)
EVENTS: Final = st.lists(
    st.one_of(
        st.builds(
            Join,
            count=st.integers(1, 7),
            prompt=LENGTHS,
            wanted=st.integers(1, 12),
            samples=st.booleans(),
            shared=st.sampled_from((0, 0, 255, 256, 400, 512)),
            room=st.sampled_from((None, None, 1, 4)),
            fails_after=st.sampled_from((None, None, None, 0, 1, 4)),
        ),
        st.builds(Resume, which=st.integers(0, 99), wanted=st.integers(1, 6)),
        st.builds(Advance, which=st.integers(0, 99), tokens=st.integers(1, 5)),
        st.builds(Advance, which=st.integers(0, 99), tokens=st.integers(1, 5)),
        st.builds(Leave, which=st.integers(0, 99)),
    ),
    max_size=40,
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(events=EVENTS)
@pytest.mark.parametrize("kind", [FakeSession, BatchingFakeSession])
def test_any_order_of_events(kind: type[FakeSession], events: list[Any]) -> None:
    session = kind()
    engine = engine_over(session)
    rows: list[Spoken] = []
    gone: list[Spoken] = []
    for number, event in enumerate(events):
        if isinstance(event, Join):
            rows += joined(engine, event, number)
        elif rows:
            happen(engine, event, rows, gone)
    finish(engine, rows)
    for row in rows:
        assert row.left
        if row in gone:
            row.check_beginning()
        elif row.fails:
            row.check_beginning()
            assert isinstance(row.failure, ArithmeticError)
        else:
            row.check()
    assert session.violations == []
    if rows:
        assert session.slots == 1, "memory was not given back"


def joined(engine: Engine, event: Join, number: int) -> list[Spoken]:
    rows = []
    for place in range(event.count):
        own = made_up_prompt(number if event.samples else 100 * number + place, event.prompt)
        prompt = [*made_up_prompt(0, event.shared), *own][: event.prompt]
        limit = None if event.room is None else event.prompt + event.room
        row = Spoken(prompt, event.wanted, accent=place, limit=limit)
        row.keeps_cache = True
        if place == event.count - 1:
            row.fails_after = event.fails_after
        rows.append(row)
    engine.join(rows)
    return rows


def happen(engine: Engine, event: Any, rows: list[Spoken], gone: list[Spoken]) -> None:
    row = rows[event.which % len(rows)]
    if isinstance(event, Advance):
        target = len(row.said) + event.tokens
        engine.run_until(lambda: row.done or len(row.said) >= target)
    elif isinstance(event, Leave):
        gone += [row] if not row.done else []
        engine.leave([row])
    elif row.final_cache is not None:
        again = Spoken(row.tokens, event.wanted, accent=3)
        again.initial_cache, again.keeps_cache = row.final_cache, True
        engine.join([again])
        rows.append(again)


def test_more_rows_than_slots_begin_in_their_order(engine: Engine, session: FakeSession) -> None:
    rows = [Spoken(made_up_prompt(seed, 3), wanted=80 + seed % 7) for seed in range(3 * MAXIMUM_ROWS)]
    compute(engine, *rows)
    for row in rows:
        row.check()
    assert max(session.decode_sizes()) == MAXIMUM_ROWS
    begun = [row.started_at for row in rows]
    assert begun == sorted(begun)


def test_decoding_goes_on_while_a_long_prompt_is_prefilled(engine: Engine, session: FakeSession) -> None:
    talking = Spoken([1], wanted=30)
    engine.join([talking])
    engine.run_until(lambda: len(talking.said) == 3)
    session.calls.clear()
    long = Spoken(made_up_prompt(1, 4 * PREFILL_CHUNK_TOKENS + 1), wanted=2)
    compute(engine, long)
    between = [call for call in session.calls if call == "prefill" or call.startswith("decode")]
    assert between.count("prefill") == 5
    assert between[:10] == ["decode 1", "prefill"] * 5
    finish(engine, [talking])
    talking.check()
    long.check()


def test_samples_of_one_prompt_share_its_prefill(engine: Engine, session: FakeSession) -> None:
    prompt = made_up_prompt(2, 2 * PREFILL_CHUNK_TOKENS + 44)
    rows = [Spoken(prompt, wanted=6, accent=accent) for accent in range(10)]
    compute(engine, *rows)
    for row in rows:
        row.check()
    assert session.calls.count("prefill") == 3


def test_samples_that_start_over_no_longer_share_anything(engine: Engine) -> None:
    """Each has forgotten the beginning, and kept what only it has said."""
    prompt = made_up_prompt(3, 20)
    rows = [Spoken(prompt, wanted=30, accent=accent, limit=24) for accent in range(3)]
    compute(engine, *rows)
    for row in rows:
        row.check()


@pytest.mark.parametrize("length", [1, *range(PREFILL_CHUNK_TOKENS - 1, PREFILL_CHUNK_TOKENS + 2), 600])
def test_logits_after_every_token(engine: Engine, length: int) -> None:
    talking = Spoken([1], wanted=20)
    engine.join([talking])
    tokens = made_up_prompt(4, length)
    row = LogitsRow(tokens)
    compute(engine, row)
    expected = [logits_after(tokens[: place + 1]) for place in range(length)]
    np.testing.assert_array_equal(np.concatenate(row.chunks), np.array(expected))
    finish(engine, [talking])
    talking.check()


# Failures.


@pytest.mark.parametrize("failing", ["prefill", "decode 3"])
def test_a_step_that_fails_fails_the_rows_in_flight_and_no_other(
    engine: Engine, session: FakeSession, failing: str
) -> None:
    error = RuntimeError("the step failed")
    rows = [Spoken(made_up_prompt(seed, 5), wanted=4 + 4 * seed) for seed in range(3)]
    engine.join(rows)
    engine.run_until(lambda: rows[2].said)
    late = [Spoken(made_up_prompt(9, 200), wanted=4), Spoken([7], wanted=4)]
    engine.join(late)
    session.on_call = fail_once(failing, error)
    with suppress(RuntimeError):
        in_a_thread(lambda: finish(engine, [*rows, *late]))
    in_a_thread(lambda: finish(engine, [*rows, *late]))
    assert late[1].failure is None, "it had not begun"
    for row in (*rows, *late):
        assert row.failure in (None, error)
        row.check_beginning() if row.failure else row.check()
    after = Spoken([5], wanted=3)
    compute(engine, after)
    after.check()


def fail_once(failing: str, error: BaseException) -> Callable[[str], None]:
    failed = []

    def on_call(call: str) -> None:
        if call == failing and not failed:
            failed.append(call)
            raise error

    return on_call


def test_a_row_that_raises_does_not_hurt_the_others(engine: Engine) -> None:
    rows = [Spoken(made_up_prompt(seed, 5), wanted=9) for seed in range(5)]
    rows[0].fails_after, rows[3].fails_after = 0, 4
    compute(engine, *rows)
    for row in rows:
        row.check_beginning() if row.fails else row.check()
        assert isinstance(row.failure, ArithmeticError) == row.fails


@pytest.mark.parametrize("failing", ["reserve 2", "restore", "release"])
def test_memory_that_runs_out_leaves_the_engine_usable(engine: Engine, session: FakeSession, failing: str) -> None:
    """If the thread that met the error kept the engine to itself, all others would wait for ever."""
    saved = Spoken([5, 6], wanted=2)
    saved.keeps_cache = True
    compute(engine, saved)
    session.on_call = fail_once(failing, MemoryError("no room"))
    with suppress(MemoryError):
        in_a_thread(lambda: compute(engine, Spoken([1], wanted=3), resumed(saved, wanted=3)))
    after = Spoken([3], wanted=3)
    in_a_thread(lambda: compute(engine, after))
    after.check()
    assert after.failure is None


def resumed(row: Spoken, wanted: int) -> Spoken:
    again = Spoken(row.tokens, wanted)
    again.initial_cache = row.final_cache
    return again


def in_a_thread(work: Callable[[], None]) -> None:
    """Run what might never end."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by `result`
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    future.result(timeout=PATIENCE_SECONDS)


# Several threads.


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Let threads interrupt each other far more often than they do."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("many_switches")
@pytest.mark.parametrize("seed", range(5))
def test_threads_that_come_and_go_get_what_they_get_alone(engine: Engine, session: FakeSession, seed: int) -> None:
    session.on_call = lambda call: time.sleep(0)
    finished: list[Spoken] = []
    left: list[Spoken] = []

    def caller(number: int) -> None:
        rng = np.random.default_rng(100 * seed + number)
        for _ in range(6):
            rows = [random_row(rng) for _ in range(rng.integers(1, 5))]
            if rng.random() < 0.3:
                leave_halfway(engine, rows)
                left.extend(rows)
            else:
                compute(engine, *rows)
                finished.extend(rows)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(caller, number) for number in range(8)]:
            done.result(timeout=PATIENCE_SECONDS)
    for row in finished:
        row.check()
    for row in left:
        row.check_beginning()
    assert max(session.decode_sizes()) > 1
    assert session.slots == 1


def random_row(rng: np.random.Generator) -> Spoken:
    prompt = rng.integers(0, VOCABULARY, rng.choice([1, 4, 130, 260])).tolist()
    return Spoken(prompt, wanted=int(rng.integers(1, 15)))


def leave_halfway(engine: Engine, rows: list[Spoken]) -> None:
    engine.join(rows)
    engine.run_until(lambda: len(rows[0].said) >= 2 or rows[0].done)
    engine.leave(rows)
    engine.run_until(lambda: all(row.left for row in rows))


def test_two_callers_share_steps(engine: Engine, session: FakeSession) -> None:
    first, second = Spoken([1], wanted=10), Spoken([2], wanted=10)
    first_decodes, second_has_joined = threading.Event(), threading.Event()

    def hold(call: str) -> None:
        if call == "decode 1" and not second_has_joined.is_set():
            first_decodes.set()
            assert second_has_joined.wait(PATIENCE_SECONDS)

    session.on_call = hold
    with ThreadPoolExecutor(1) as pool:
        caller = pool.submit(compute, engine, first)
        assert first_decodes.wait(PATIENCE_SECONDS)
        engine.join([second])
        second_has_joined.set()
        finish(engine, [second])
        caller.result(timeout=PATIENCE_SECONDS)
    first.check()
    second.check()
    assert session.decode_sizes().count(2) >= 7


def test_a_caller_goes_when_its_row_is_done_though_others_go_on(engine: Engine, session: FakeSession) -> None:
    long, short = Spoken([1], wanted=200), Spoken([2], wanted=3)
    short_is_back = threading.Event()

    def hold_the_long_one(call: str) -> None:
        if len(long.said) == 150:
            assert short_is_back.wait(PATIENCE_SECONDS), "the short row waits for the long one"

    session.on_call = hold_the_long_one
    engine.join([long])
    engine.run_until(lambda: long.said)
    with ThreadPoolExecutor(2) as pool:
        quick = pool.submit(compute, engine, short)
        slow = pool.submit(finish, engine, [long])
        quick.result(timeout=PATIENCE_SECONDS)
        short_is_back.set()
        slow.result(timeout=PATIENCE_SECONDS)
    short.check()
    long.check()


def test_another_caller_takes_over_from_one_that_has_finished(engine: Engine) -> None:
    short, long = Spoken([1], wanted=5), Spoken([2], wanted=50)
    engine.join([short, long])
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(finish, engine, [row]) for row in (short, long)]:
            done.result(timeout=PATIENCE_SECONDS)
    short.check()
    long.check()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=["interrupt", "exit"])
def test_a_caller_that_is_interrupted_takes_only_its_own_row_along(
    engine: Engine, session: FakeSession, error: BaseException
) -> None:
    mine, other = Spoken([1], wanted=20), Spoken([2], wanted=20)
    engine.join([other])
    engine.run_until(lambda: len(other.said) == 2)
    session.on_call = fail_once("decode 2", error)
    with pytest.raises(type(error)):
        compute(engine, mine)
    assert not other.done
    in_a_thread(lambda: finish(engine, [other]))
    other.check()
    mine.check_beginning()
    assert mine.left


def test_leaving_ends_a_prefill_that_another_thread_computes(engine: Engine, session: FakeSession) -> None:
    row, waiting = Spoken(made_up_prompt(1, 400), wanted=5), Spoken([3], wanted=4)
    in_prefill = threading.Event()

    def hang(call: str) -> None:
        if call == "prefill":
            in_prefill.set()
            session.on_call = lambda call: None
            session.wait_until_terminated()

    session.on_call = hang
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(compute, engine, row)
        assert in_prefill.wait(PATIENCE_SECONDS)
        engine.join([waiting])
        engine.leave([row])
        computing.result(timeout=PATIENCE_SECONDS)
    assert row.left
    assert row.failure is None
    assert row.said == []
    assert session.calls.count("prefill") == 1
    finish(engine, [waiting])
    waiting.check()


def test_leaving_between_two_chunks_computes_no_more_of_them(engine: Engine, session: FakeSession) -> None:
    row, talking = Spoken(made_up_prompt(1, 400), wanted=5), Spoken([3], wanted=9)
    engine.join([talking])
    engine.run_until(lambda: talking.said)
    engine.join([row])
    engine.run_until(lambda: row.prefilled)
    assert row.prefilled == PREFILL_CHUNK_TOKENS
    session.calls.clear()
    engine.leave([row])
    assert row.left
    finish(engine, [talking])
    talking.check()
    assert "prefill" not in session.calls


def test_leaving_before_the_first_step_costs_nothing(engine: Engine, session: FakeSession) -> None:
    row = Spoken([1], wanted=5)
    engine.join([row])
    engine.leave([row])
    engine.leave([row])
    assert row.left
    assert row.done
    assert "prefill" not in session.calls


def test_closing_fails_all_rows_and_ends_the_prefill(engine: Engine, session: FakeSession) -> None:
    computed, waiting = Spoken(made_up_prompt(1, 400), wanted=5), Spoken([1], wanted=5)
    in_prefill = threading.Event()

    def hang(call: str) -> None:
        if call == "prefill":
            in_prefill.set()
            session.wait_until_terminated()

    session.on_call = hang
    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(compute, engine, computed)]
        assert in_prefill.wait(PATIENCE_SECONDS)
        callers.append(pool.submit(compute, engine, waiting))
        while not waiting.tokens or waiting.left:
            time.sleep(0.001)
        engine.close()
        for caller in callers:
            caller.result(timeout=PATIENCE_SECONDS)
    for row in (computed, waiting):
        assert isinstance(row.failure, ModelClosedError)
        assert row.left
    assert session.closed
    engine.close()
    with pytest.raises(ModelClosedError, match="closed"):
        engine.join([Spoken([1], wanted=1)])
    engine.leave([computed, waiting])
    assert session.calls.count("close") == 1


# The real model.


def real_work(model: Model, number: int) -> Any:
    """One of several uses of a model, with a prompt and a seed of its own."""
    prompt = made_up_prompt(number, [3, 40, 130, 300][number % 4])
    options: dict[str, Any] = {"max_new_tokens": 6 + 3 * (number % 4), "temperature": 1.0, "seed": number}
    if number % 5 == 0:
        stream = model.stream(prompt, **options)
        return "".join(piece.text for piece in stream), stream.result.tokens
    if number % 5 == 1:
        return model.score(prompt).logprobs
    if number % 5 == 2:
        return [sample.tokens for sample in model.generate(prompt, n=3, **options)]
    return model.generate(prompt, **options).tokens


@pytest.mark.parametrize("fixture", ["fp32_model", "int8_model"])
def test_eight_threads_get_what_one_gets(request: pytest.FixtureRequest, fixture: str) -> None:
    model: Model = request.getfixturevalue(fixture)
    expected = [real_work(model, number) for number in range(10)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda number: real_work(model, number), range(10)))
    assert found == expected


def test_threads_of_a_real_model_share_steps(int8_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    decode = StepSession.decode

    def record(session: StepSession, tokens: Tokens, lengths: Tokens) -> Logits:
        sizes.append(len(tokens))
        return decode(session, tokens, lengths)

    monkeypatch.setattr(StepSession, "decode", record)
    start = threading.Barrier(2)

    def caller(seed: int) -> None:
        start.wait(PATIENCE_SECONDS)
        int8_model.generate([5], max_new_tokens=100, temperature=1.0, seed=seed, ignore_eos=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(caller, range(2)))
    assert 2 in sizes


def test_other_threads_run_during_a_step(fp32_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever computes a step must not keep the interpreter to itself: a window would freeze."""
    monkeypatch.setattr("gpt2_edge.prefill.PREFILL_CHUNK_TOKENS", 512)  # one long step
    steps: list[tuple[float, float]] = []
    prefill = StepSession.prefill

    def timed(session: StepSession, *arguments: Any) -> Logits:
        begin = time.perf_counter()
        logits = prefill(session, *arguments)
        steps.append((begin, time.perf_counter()))
        return logits

    monkeypatch.setattr(StepSession, "prefill", timed)
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        for seed in range(10):
            fp32_model.next_tokens(made_up_prompt(seed, 400))
    finally:
        over.set()
        ticker.join()
    assert len(steps) == 10
    smooth = [largest_gap(ticks, begin, end) < (end - begin) / 2 for begin, end in steps]
    assert smooth.count(True) > 5, "nothing else ran during most of the steps"


def largest_gap(ticks: list[float], begin: float, end: float) -> float:
    return max(np.diff([begin, *(moment for moment in ticks if begin < moment < end), end]))
