"""Stopping: cancel, deadline, closing, asyncio; processes and memory."""

import asyncio
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import gpt2_edge
from gpt2_edge import ModelClosedError, OptionError
from gpt2_edge.prefill_watch import ended_when
from gpt2_edge.session import StepSession

PROMPT = "Once upon a time"


def test_cancel_before_the_start(int8_model: gpt2_edge.Model) -> None:
    cancel = threading.Event()
    cancel.set()
    done = int8_model.generate(PROMPT, cancel=cancel)
    assert (done.text, done.tokens, done.finish_reason) == ("", [], "cancelled")


def test_cancel_keeps_the_text_so_far(int8_model: gpt2_edge.Model) -> None:
    cancel = threading.Event()
    whole = int8_model.generate(PROMPT, max_new_tokens=400, ignore_eos=True)
    pieces = []
    for piece in int8_model.stream(PROMPT, max_new_tokens=400, ignore_eos=True, cancel=cancel):
        pieces.append(piece)
        if len(pieces) == 20:
            cancel.set()
    text = "".join(piece.text for piece in pieces)
    assert pieces[-1].finish_reason == "cancelled"
    assert whole.text.startswith(text)
    assert 0 < len(text) < len(whole.text)


def test_deadline(int8_model: gpt2_edge.Model) -> None:
    done = int8_model.generate(PROMPT, max_new_tokens=100_000, overflow="slide", ignore_eos=True, deadline_seconds=0.2)
    assert done.finish_reason == "deadline"
    assert len(done.tokens) > 5
    assert int8_model.generate(PROMPT, deadline_seconds=0).tokens == []


class SlowPrefill:
    """Stands in for a session's prefill that takes long, and ends when it is terminated, as ONNX Runtime does."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.terminated = threading.Event()

    def __call__(self, session: Any, slot: int, tokens: Any, start: int, positions: Any) -> Any:
        if self.terminated.wait(self.seconds):
            raise RuntimeError("Exiting due to terminate flag being set to true.")
        raise AssertionError("nobody terminated the prefill")


@pytest.mark.parametrize("how", ["cancel", "deadline", "close"])
def test_a_long_prefill_is_terminated(fp32_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    slow = SlowPrefill(seconds=20)
    monkeypatch.setattr(StepSession, "prefill", lambda *arguments: slow(*arguments))
    monkeypatch.setattr(StepSession, "terminate_prefill", lambda self: slow.terminated.set())
    cancel = threading.Event()
    stream = fp32_model.stream(
        [5] * 200, max_new_tokens=5, cancel=cancel, deadline_seconds=0.2 if how == "deadline" else None
    )
    act = {"cancel": cancel.set, "deadline": lambda: None, "close": stream.close}[how]
    timer = threading.Timer(0.2, act)
    started_at = time.perf_counter()
    timer.start()
    pieces = list(stream)
    assert time.perf_counter() - started_at < 5
    timer.join()
    assert stream.result.finish_reason == ("deadline" if how == "deadline" else "cancelled")
    assert "".join(piece.text for piece in pieces) == ""
    monkeypatch.undo()
    assert len(fp32_model.generate(PROMPT, max_new_tokens=3).tokens) == 3


def test_a_run_that_is_over_is_not_terminated() -> None:
    """Else the next one would be, of another caller maybe."""
    asked, over, terminated = (threading.Event() for _ in range(3))

    def interrupted() -> bool:
        asked.set()
        return over.wait(10)

    with ended_when(interrupted, terminated.set, tokens=100):
        assert asked.wait(10)
    over.set()
    assert not terminated.wait(0.2)


def test_onnxruntime_ends_a_prefill_that_is_terminated(fp32_model: gpt2_edge.Model) -> None:
    """The real thing, over and over at random moments: the model stays usable and gives the same text."""
    expected = fp32_model.generate(PROMPT, max_new_tokens=5).tokens
    for milliseconds in range(0, 60, 4):
        cancel = threading.Event()
        timer = threading.Timer(milliseconds / 1000, cancel.set)
        timer.start()
        done = fp32_model.generate([5] * 500, max_new_tokens=5, cancel=cancel, ignore_eos=True)
        timer.join()
        assert done.finish_reason in ("cancelled", "length")
    assert fp32_model.generate(PROMPT, max_new_tokens=5).tokens == expected


def test_closing_the_model_fails_what_is_being_generated(storyteller_int8: Path) -> None:
    model = gpt2_edge.load(storyteller_int8)
    stream = model.stream(PROMPT, max_new_tokens=400, ignore_eos=True)
    next(stream)
    closer = threading.Thread(target=model.close)
    closer.start()
    with pytest.raises(ModelClosedError):
        for _ in stream:
            pass
    closer.join()
    model.close()
    with pytest.raises(ModelClosedError, match="load it again"):
        model.generate(PROMPT)


def test_agenerate_gives_what_generate_gives_and_the_loop_goes_on(int8_model: gpt2_edge.Model) -> None:
    options = {"max_new_tokens": 60, "temperature": 1.0, "ignore_eos": True}
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.001)

    async def run() -> list[gpt2_edge.Generation]:
        ticking = asyncio.create_task(tick())
        results = await asyncio.gather(*(int8_model.agenerate(PROMPT, seed=seed, **options) for seed in range(5)))
        ticking.cancel()
        return results

    results = asyncio.run(run())
    assert [done.tokens for done in results] == [
        int8_model.generate(PROMPT, seed=seed, **options).tokens for seed in range(5)
    ]
    assert ticks > 5


def test_astream_gives_the_same_pieces(int8_model: gpt2_edge.Model) -> None:
    async def collect() -> str:
        return "".join([piece.text async for piece in int8_model.astream(PROMPT, max_new_tokens=30)])

    assert asyncio.run(collect()) == int8_model.generate(PROMPT, max_new_tokens=30).text


def test_cancelling_a_task_stops_the_generation(int8_model: gpt2_edge.Model) -> None:
    async def run() -> float:
        forever = {"max_new_tokens": 1_000_000, "overflow": "slide", "ignore_eos": True}
        task = asyncio.create_task(int8_model.agenerate(PROMPT, **forever))
        await asyncio.sleep(0.05)
        started_at = time.perf_counter()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.perf_counter() - started_at

    # `asyncio.run` waits for the thread, so that it returns at all shows that the generation stopped.
    assert asyncio.run(run()) < 5
    assert len(int8_model.generate(PROMPT, max_new_tokens=3).tokens) == 3


def test_a_pickled_model_is_loaded_again(storyteller_int8: Path) -> None:
    with gpt2_edge.load(storyteller_int8, threads=1) as model, pickle.loads(pickle.dumps(model)) as copy:
        assert copy.threads == 1
        assert copy.generate(PROMPT, max_new_tokens=5).tokens == model.generate(PROMPT, max_new_tokens=5).tokens


def test_a_spawned_process_gets_a_model_of_its_own(int8_model: gpt2_edge.Model) -> None:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.submit(int8_model.generate, PROMPT, max_new_tokens=5).result(timeout=60)
    assert done.tokens == int8_model.generate(PROMPT, max_new_tokens=5).tokens


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this platform")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_gets_one_clear_message(int8_model: gpt2_edge.Model) -> None:
    int8_model.generate(PROMPT, max_new_tokens=1)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            int8_model.generate(PROMPT)
        except ModelClosedError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        message = pipe.read()
    os.waitpid(child, 0)
    assert "before this process was forked" in message
    assert len(int8_model.generate(PROMPT, max_new_tokens=3).tokens) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_use(int8_model: gpt2_edge.Model) -> None:
    def resident_pages() -> int:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])

    def use(count: int) -> None:
        for number in range(count):
            prompts = [[number % 500 + 1] * (1 + 37 * number % 200)] * (1 + number % 4)
            int8_model.generate(prompts, max_new_tokens=1 + number % 4, temperature=1.0, seed=number)

    use(80)
    before = resident_pages()
    use(160)
    assert resident_pages() < 1.05 * before


def test_an_idle_model_uses_no_processor(int8_model: gpt2_edge.Model) -> None:
    int8_model.generate(PROMPT, max_new_tokens=20)
    before = time.process_time()
    time.sleep(1.0)
    assert time.process_time() - before < 0.01


def generate_until_interrupted(model: gpt2_edge.Model, timer: threading.Timer) -> None:
    timer.start()
    while True:
        model.generate(PROMPT, max_new_tokens=40, ignore_eos=True)


@pytest.mark.skipif(sys.platform == "win32", reason="sends itself a signal")
def test_ctrl_c_at_any_moment_leaves_the_model_usable_for_other_threads(int8_model: gpt2_edge.Model) -> None:
    expected = int8_model.generate(PROMPT, max_new_tokens=10).tokens
    moments = random.Random(1)
    for _ in range(25):
        timer = threading.Timer(moments.uniform(0.0, 0.03), signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt):
            generate_until_interrupted(int8_model, timer)
        timer.join()
        results: list[list[int]] = []
        other = threading.Thread(
            target=lambda results=results: results.append(int8_model.generate(PROMPT, max_new_tokens=10).tokens)
        )
        other.start()
        other.join(timeout=20)
        assert results == [expected]


def test_a_logits_processor_that_calls_its_own_model_is_told(int8_model: gpt2_edge.Model) -> None:
    def ask(tokens: Any, logits: Any) -> None:
        int8_model.generate("x", max_new_tokens=1)

    with pytest.raises(OptionError, match="use another model"):
        int8_model.generate(PROMPT, max_new_tokens=3, logits_processor=ask)
    assert len(int8_model.generate(PROMPT, max_new_tokens=3).tokens) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="sends a thread a signal")
def test_ctrl_c_is_heard_while_another_thread_computes(int8_model: gpt2_edge.Model) -> None:
    forever = {"max_new_tokens": 10**6, "overflow": "slide", "ignore_eos": True}
    cancel = threading.Event()
    other = threading.Thread(target=lambda: int8_model.generate(PROMPT, **forever, cancel=cancel))
    other.start()
    while int8_model._core.engine._computed_by != other.ident:
        time.sleep(0.001)
    interrupt = threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT])
    interrupt.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            int8_model.generate(PROMPT, **forever, deadline_seconds=10)
        assert other.is_alive()
    finally:
        cancel.set()
        other.join()
        interrupt.join()


@pytest.mark.parametrize("error", [SystemExit(3), GeneratorExit()])
def test_what_a_processor_raises_arrives_at_its_own_caller(int8_model: gpt2_edge.Model, error: BaseException) -> None:
    """Also if the thread of another caller is the one that computes."""

    def fail(tokens: Any, logits: Any) -> None:
        raise error

    stream = int8_model.stream(PROMPT, max_new_tokens=5, logits_processor=fail)
    stream.begin()
    assert int8_model.generate(PROMPT, max_new_tokens=5).finish_reason == "length"
    with pytest.raises(type(error)):
        next(stream)


def test_stop_iteration_of_a_processor_does_not_end_a_stream_as_if_nothing_were_wrong(
    int8_model: gpt2_edge.Model,
) -> None:
    def fail(tokens: Any, logits: Any) -> None:
        raise StopIteration

    options: Any = {"max_new_tokens": 5, "logits_processor": fail}
    with pytest.raises(RuntimeError, match="logits_processor raised StopIteration"):
        list(int8_model.stream(PROMPT, **options))
    with pytest.raises(RuntimeError, match="logits_processor raised StopIteration"):
        asyncio.run(asyncio.wait_for(int8_model.agenerate(PROMPT, **options), timeout=20))


def test_many_callers_of_asyncio_share_steps(int8_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than asyncio has threads of its own: two cores have six."""
    sizes = []
    decode = StepSession.decode

    def record(session: StepSession, tokens: Any, lengths: Any) -> Any:
        sizes.append(len(tokens))
        return decode(session, tokens, lengths)

    async def run() -> list[gpt2_edge.Generation]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        calls = (int8_model.agenerate(PROMPT, max_new_tokens=100, ignore_eos=True, seed=seed) for seed in range(12))
        return await asyncio.gather(*calls)

    monkeypatch.setattr(StepSession, "decode", record)
    assert [done.seed for done in asyncio.run(run())] == list(range(12))
    assert max(sizes) == 12


def test_the_context_of_the_caller_is_that_of_its_processor(int8_model: gpt2_edge.Model) -> None:
    name: ContextVar[str] = ContextVar("name")
    seen = []

    async def run() -> None:
        name.set("mine")
        await int8_model.agenerate(PROMPT, max_new_tokens=1, logits_processor=lambda *_: seen.append(name.get()))

    asyncio.run(run())
    assert seen == ["mine"]


def test_a_stream_left_without_closing_takes_no_more_steps(int8_model: gpt2_edge.Model) -> None:
    async def run() -> None:
        async for _ in int8_model.astream(PROMPT, max_new_tokens=10**6, overflow="slide", ignore_eos=True):
            break

    asyncio.run(run())
    gc.collect()
    assert len(int8_model.generate(PROMPT, max_new_tokens=3).tokens) == 3
    assert int8_model._core.engine._all_rows() == []


def test_what_the_handler_of_a_signal_raises_arrives_unchanged(
    int8_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a time limit that a test or an evaluation sets: Python calls the handler when a run comes back."""
    expected = int8_model.generate(PROMPT, max_new_tokens=5).tokens
    run = onnxruntime.InferenceSession.run_with_iobinding

    def run_until_late(*arguments: Any) -> None:
        run(*arguments)
        raise TimeoutError("over")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", run_until_late)
    with pytest.raises(TimeoutError, match="over"):
        int8_model.generate("Another prompt", max_new_tokens=5)
    monkeypatch.undo()
    assert int8_model.generate(PROMPT, max_new_tokens=5).tokens == expected


def test_a_row_that_fails_ends_its_list_at_once(int8_model: gpt2_edge.Model) -> None:
    def fail(tokens: Any, logits: Any) -> None:
        raise ZeroDivisionError

    forever: Any = {"max_new_tokens": 10**6, "overflow": "slide", "ignore_eos": True, "deadline_seconds": 30}
    started_at = time.perf_counter()
    with pytest.raises(ZeroDivisionError):
        int8_model.generate([PROMPT, "Twice"], row_options=[{}, {"logits_processor": fail}], **forever)
    assert time.perf_counter() - started_at < 15
