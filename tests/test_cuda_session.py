"""The session for GPUs, driven through host memory: what it binds, captures, downloads, and on which thread."""

import math
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import pytest

import gpt2_edge
from gpt2_edge import cuda_session, model
from gpt2_edge.benchmarks.cuda_graphs import fill
from gpt2_edge.cuda_likeliest import LARGEST_LOGIT, LIKELIEST_TOKEN, likeliest_token_part
from gpt2_edge.cuda_session import CudaSession
from gpt2_edge.cuda_thread import CudaThread
from gpt2_edge.device import Device
from gpt2_edge.device_array import DeviceArray
from gpt2_edge.errors import DeviceError
from gpt2_edge.folder import open_folder
from gpt2_edge.session import StepSession

PROMPTS: Final = ["Once upon a time", "The king", "There was a little girl who lived in a house near the"]


def test_rows_of_a_device_array_are_views_that_outlive_it() -> None:
    array = DeviceArray((4, 2, 3), np.float32, "cpu", 0)
    array.clear()
    middle = array.rows(1, 2)
    assert middle.shape() == [2, 2, 3]
    middle.update_inplace(np.arange(12, dtype=np.float32).reshape(2, 2, 3))
    whole = array.value.numpy()
    assert whole.shape == (4, 2, 3)
    assert whole[:, 0, 0].tolist() == [0, 0, 6, 0]
    array.rows(3, 1).update_inplace(array.rows(2, 1))
    assert whole[3].tolist() == [[6, 7, 8], [9, 10, 11]]
    last = array.rows(3, 1)
    del array, middle, whole
    assert last.numpy().ravel().tolist() == [6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def gpu_model(storyteller_fp32: Path) -> Iterator[gpt2_edge.Model]:
    """The storyteller's graph for GPUs, driven by the GPU's session, computed by the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "open_session", lambda folder, *_: (CudaSession(folder, "cpu"), Device("cpu", "a test")))
        loaded = gpt2_edge.load(storyteller_fp32)
    with loaded:
        yield loaded


def test_the_graph_for_gpus_writes_the_same_texts(gpu_model: gpt2_edge.Model, fp32_model: gpt2_edge.Model) -> None:
    expected = fp32_model.generate(PROMPTS, max_new_tokens=40)
    assert [each.tokens for each in gpu_model.generate(PROMPTS, max_new_tokens=40)] == [
        each.tokens for each in expected
    ]
    for prompt, each in zip(PROMPTS, expected, strict=True):
        assert gpu_model.generate(prompt, max_new_tokens=40).tokens == each.tokens


def test_sampling_draws_the_same_tokens(gpu_model: gpt2_edge.Model, fp32_model: gpt2_edge.Model) -> None:
    options: Any = {"max_new_tokens": 30, "temperature": 0.9, "top_k": 40, "seed": 5, "n": 4}
    texts = [each.text for each in gpu_model.generate(PROMPTS[0], **options)]
    assert texts == [each.text for each in fp32_model.generate(PROMPTS[0], **options)]
    assert len(set(texts)) == 4


def test_a_prompt_longer_than_a_chunk_and_a_fork(gpu_model: gpt2_edge.Model, fp32_model: gpt2_edge.Model) -> None:
    prompt = "The old man walked along the river and thought of his children. " * 20
    score, expected = gpu_model.score(prompt), fp32_model.score(prompt)
    np.testing.assert_allclose(score.logprobs, expected.logprobs, atol=2e-4)
    session = gpu_model.session()
    session.append(prompt)
    session.generate(max_new_tokens=5)
    fork = session.fork()  # saved to host memory and restored into a slot
    assert session.generate(max_new_tokens=10).tokens == fork.generate(max_new_tokens=10).tokens


def test_slots_keep_their_tokens_when_there_are_more_of_them(storyteller_fp32: Path) -> None:
    session = CudaSession(open_folder(storyteller_fp32), "cpu")
    reference = StepSession(open_folder(storyteller_fp32), 1)
    last = np.array([2])
    for each in (session, reference):
        each.prefill(0, [5, 6, 7], 0, last)
        each.reserve_slots(4, {0: 3})
        each.prefill(1, [8, 9], 0, np.array([], np.int64))
        each.copy_slot(1, 2, 2)
        each.restore(3, each.save(0, 3), 3)
    tokens, lengths = [10, 11, 11, 10], [3, 2, 2, 3]
    logits = session.decode(tokens, lengths)
    np.testing.assert_allclose(logits, reference.decode(tokens, lengths), atol=2e-4)
    np.testing.assert_array_equal(logits[0], logits[3])
    np.testing.assert_array_equal(logits[1], logits[2])
    session.release_spare_slots()  # nothing is given back, so captured graphs stay right
    assert (session.slots, session.spare_slots) == (4, 0)
    np.testing.assert_allclose(session.decode(tokens, lengths), reference.decode(tokens, lengths), atol=2e-4)
    session.close()


@dataclass
class Recorder:
    """Stands before an ONNX Runtime session and writes down what is run and on which thread."""

    inner: Any
    captures: list[str] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    logit_shapes: list[list[int]] = field(default_factory=list)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.captures.append(options.get_run_config_entry("gpu_graph_id"))
        self.threads.add(threading.get_ident())
        self.inner.run_with_iobinding(binding, options)
        (logits,) = (value.shape() for value in binding.get_outputs() if value.shape()[1] == 8192)
        self.logit_shapes.append(logits)

    def release_captured_graph(self, capture: int) -> None:
        self.released.append(capture)


@pytest.fixture
def recorded(storyteller_fp32: Path) -> Iterator[tuple[CudaSession, Recorder]]:
    session = CudaSession(open_folder(storyteller_fp32), "cpu")
    recorder = session._session = Recorder(session._session)
    yield session, recorder
    if not recorder.released:
        session.close()


def test_a_number_of_rows_is_captured_when_it_stays_and_anew_after_the_cache_moved(
    recorded: tuple[CudaSession, Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    session, recorder = recorded
    monkeypatch.setattr(cuda_session, "LAUNCHES_BEFORE_CAPTURE", 2)
    session.prefill(0, [1, 2], 0, np.array([1]))
    for length in (2, 3, 4, 5):
        session.decode([3], [length])
    session.reserve_slots(2, {0: 6})
    for length in (6, 7, 8):
        session.decode([3], [length])
    session.decode([3, 4], [9, 1])
    session.prefill(1, [1, 2], 0, np.array([1]))
    assert recorder.captures == ["-1", "-1", "-1", "1", "1", "-1", "-1", "2", "-1", "-1"]
    assert recorder.released == [1]
    session.close()
    assert recorder.released == [1, 2, 3]


def test_everything_runs_on_one_thread_whoever_asks(recorded: tuple[CudaSession, Recorder]) -> None:
    session, recorder = recorded
    session.prefill(0, [1, 2], 0, np.array([1]))
    for length in (2, 3, 4):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(session.decode, [3], [length]).result()
    assert len(recorder.captures) == 4
    assert len(recorder.threads) == 1
    assert threading.get_ident() not in recorder.threads


def test_a_step_that_fails_is_an_error_of_the_device(recorded: tuple[CudaSession, Recorder]) -> None:
    session, _ = recorded
    with pytest.raises(DeviceError, match=r"cannot compute a step on cpu:0, .*indices element out of data bounds"):
        session.prefill(0, [1_000_000], 0, np.array([0]))
    assert session.prefill(0, [1], 0, np.array([0])).shape == (1, 8192)


def test_a_gpu_that_cannot_run_the_kernels_is_found_out_when_the_model_is_loaded(
    storyteller_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr("onnxruntime.InferenceSession.run_with_iobinding", fail)
    with pytest.raises(DeviceError, match="no kernel image is available"):
        CudaSession(open_folder(storyteller_fp32), "cpu")


def test_a_chunk_of_which_no_logits_are_wanted_is_computed_all_the_same(
    recorded: tuple[CudaSession, Recorder], storyteller_fp32: Path
) -> None:
    session, recorder = recorded
    assert session.prefill(0, [5, 6, 7], 0, np.array([], np.int64)).shape == (0, 8192)
    assert recorder.logit_shapes == [[1, 8192]]  # no kernel has nothing to do, which few are ever tried with
    reference = StepSession(open_folder(storyteller_fp32), 1)
    reference.prefill(0, [5, 6, 7], 0, np.array([], np.int64))
    np.testing.assert_allclose(session.decode([8], [3]), reference.decode([8], [3]), atol=2e-4)


def test_a_step_leaves_every_binding_where_it_was(storyteller_fp32: Path) -> None:
    session = CudaSession(open_folder(storyteller_fp32), "cpu")
    session.prefill(0, [1, 2], 0, np.array([1]))
    first = session.decode([3], [2]).copy()
    step = session._decode_steps[1]
    address = step.logits.value.data_ptr()
    second = session.decode([4], [3]).copy()
    assert session._decode_steps == {1: step}
    assert step.logits.value.data_ptr() == address
    assert not np.array_equal(first, second)
    session.close()


def test_a_cache_that_does_not_fit_is_refused_with_its_size(
    storyteller_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = CudaSession(open_folder(storyteller_fp32), "cpu")

    def fail(*arguments: Any) -> Any:
        raise RuntimeError("bad allocation\nat some line")

    monkeypatch.setattr(cuda_session, "DeviceArray", fail)
    with pytest.raises(DeviceError, match=r"cpu:0 has no memory for the KV cache of 64 sequences, 403 MB.*allocation$"):
        session.reserve_slots(64, {})
    assert session.slots == 1
    monkeypatch.undo()
    session.prefill(0, [1], 0, np.array([0]))
    session.close()


def with_likeliest_part(vocabulary_size: int) -> Any:
    """Return a session that takes logits and has the outputs that are added to a GPU's graph."""
    shape = ["positions", vocabulary_size]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["given"], ["logits"])],
        "graph",
        [onnx.helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)],
    )
    opset = onnx.helper.make_opsetid("", 21)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    whole = model + likeliest_token_part(vocabulary_size)
    loaded = onnx.load_from_string(whole)
    onnx.checker.check_model(loaded, full_check=True)
    for output in loaded.graph.output[1:]:
        assert [each.dim_param or each.dim_value for each in output.type.tensor_type.shape.dim] == ["logits", 1]
    return onnxruntime.InferenceSession(whole, providers=["CPUExecutionProvider"])


def test_the_likeliest_token_is_found_on_the_device_as_numpy_finds_it() -> None:
    session, random = with_likeliest_part(50257), np.random.default_rng(1)
    logits = random.integers(-40, 40, (24, 50257)).astype(np.float32)  # many are equal
    logits[1] = -np.inf
    logits[1, 50256] = -1e30
    logits[2] = [0.0, -0.0] * 25128 + [0.0]
    tokens, largest = session.run([LIKELIEST_TOKEN, LARGEST_LOGIT], {"given": logits})
    np.testing.assert_array_equal(tokens[:, 0].astype(int), logits.argmax(axis=1))
    np.testing.assert_array_equal(largest[:, 0], logits.max(axis=1))


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 150, 299])
def test_what_cannot_be_chosen_from_is_told_by_the_largest_logit(fault: float, place: int) -> None:
    logits = np.zeros((3, 300), np.float32)
    logits[0, 200] = logits[1, 200] = logits[2, 200] = 5
    logits[1, slice(None) if fault == -math.inf else place] = fault
    (largest,) = with_likeliest_part(300).run([LARGEST_LOGIT], {"given": logits})
    assert np.isfinite(largest[:, 0]).tolist() == [True, False, True]


def test_a_vocabulary_beyond_what_float32_counts_is_refused() -> None:
    with pytest.raises(DeviceError, match="16777217 tokens: on a GPU it may have 16777216"):
        likeliest_token_part((1 << 24) + 1)


def test_rows_get_the_likeliest_token_or_their_logits(recorded: tuple[CudaSession, Recorder]) -> None:
    session, _ = recorded
    session.reserve_slots(3, {})
    tokens, lengths = [5, 6, 7], [0, 0, 0]
    logits = session.decode(tokens, lengths).copy()
    first, second, third = session.decode_likeliest(tokens, lengths, [True, False, True])
    assert (first, third) == (int(logits[0].argmax()), int(logits[2].argmax()))
    np.testing.assert_array_equal(second, logits[1:2])


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What steps bring back from the device, in order."""
    seen: list[str] = []
    for name in ("download_choices", "download_logits", "download_logits_of"):
        original = getattr(cuda_session._DecodeStep, name)

        def download(self: Any, *arguments: Any, name: str = name, original: Any = original) -> Any:
            seen.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(cuda_session._DecodeStep, name, download)
    return seen


def test_greedy_rows_bring_no_logits_back(gpu_model: gpt2_edge.Model, downloads: list[str]) -> None:
    gpu_model.generate(PROMPTS, max_new_tokens=9, stop="###", stop_tokens=[3])
    assert set(downloads) == {"download_choices"}


@pytest.mark.parametrize(
    "options",
    [
        {"logprobs": 1},
        {"temperature": 0.5, "seed": 1},
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 2},
        {"logit_bias": {5: 1.0}},
        {"banned_tokens": [5]},
        {"min_new_tokens": 3},
        {"logits_processor": lambda tokens, logits: None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_whatever_looks_at_logits_gets_them(
    gpu_model: gpt2_edge.Model, fp32_model: gpt2_edge.Model, downloads: list[str], options: Any
) -> None:
    found = gpu_model.generate(PROMPTS[0], max_new_tokens=9, **options)
    assert set(downloads) == {"download_logits"}
    assert found.tokens == fp32_model.generate(PROMPTS[0], max_new_tokens=9, **options).tokens


def test_rows_of_both_kinds_decode_together(
    gpu_model: gpt2_edge.Model, fp32_model: gpt2_edge.Model, downloads: list[str]
) -> None:
    every: list[dict[str, Any]] = [{}, {"temperature": 0.9, "seed": 4}, {}, {"logprobs": 2}]
    barrier = threading.Barrier(len(every))

    def ask(options: dict[str, Any]) -> Any:
        barrier.wait()
        return gpu_model.generate(PROMPTS[1], max_new_tokens=60, **options).tokens

    with ThreadPoolExecutor(len(every)) as pool:
        found = list(pool.map(ask, every))
    assert found == [fp32_model.generate(PROMPTS[1], max_new_tokens=60, **options).tokens for options in every]
    assert {"download_choices", "download_logits_of"} <= set(downloads)


def test_a_row_whose_logits_are_nan_gets_the_logits(tmp_path: Path) -> None:
    def weight(name: str, shape: tuple[int, ...]) -> Any:
        return np.full(shape, math.nan if name == "ln_f.bias" else 0.01, np.float16)

    session = CudaSession(open_folder(fill("storyteller-fp32", tmp_path / "faulty", weight)), "cpu")
    (logits,) = session.decode_likeliest([1], [0], [True])
    session.close()
    assert not isinstance(logits, int)
    assert np.isnan(logits).all()


def test_where_the_device_finds_a_fault_the_logits_decide(
    gpu_model: gpt2_edge.Model, fp32_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_session._DecodeStep, "download_choices", lambda self: ([7.0], [math.nan]))
    found = gpu_model.generate(PROMPTS[0], max_new_tokens=9)
    assert found.tokens == fp32_model.generate(PROMPTS[0], max_new_tokens=9).tokens


def has_memory_for(most_slots: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let models be loaded on a device with little memory, and return for how many slots it is asked."""
    allocate = CudaSession._allocate
    asked: list[int] = []

    def little(self: CudaSession, slots: int) -> Any:
        asked.append(slots)
        if slots > most_slots:
            raise DeviceError("no memory")
        return allocate(self, slots)

    monkeypatch.setattr(CudaSession, "_allocate", little)
    monkeypatch.setattr(model, "open_session", lambda folder, *_: (CudaSession(folder, "cpu"), Device("cpu", "a test")))
    return asked


def test_a_row_for_which_there_is_no_memory_waits(
    storyteller_fp32: Path, fp32_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = has_memory_for(1, monkeypatch)
    first, second = (fp32_model.generate(prompt, max_new_tokens=9).tokens for prompt in PROMPTS[:2])
    with gpt2_edge.load(storyteller_fp32) as loaded, loaded.stream(PROMPTS[0], max_new_tokens=9) as stream:
        next(stream)
        assert loaded.generate(PROMPTS[1], max_new_tokens=9).tokens == second
        assert stream.result.tokens == first
    assert asked == [1, 2]


def test_a_gpu_with_little_memory_computes_fewer_rows_side_by_side(
    storyteller_fp32: Path, fp32_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = has_memory_for(4, monkeypatch)
    prompts = [f"{PROMPTS[row % 3]} {row}" for row in range(11)]
    expected = [each.tokens for each in fp32_model.generate(prompts, max_new_tokens=12)]
    with gpt2_edge.load(storyteller_fp32) as loaded:
        assert [each.tokens for each in loaded.generate(prompts, max_new_tokens=12)] == expected
    assert asked == [1, 16, 8, 4]


def test_sessions_take_turns() -> None:
    """While one captures, no other thread of the process may allocate memory on the GPU."""
    threads = [CudaThread() for _ in range(4)]
    running, most = [0], [0]

    def work() -> None:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        running[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda thread: thread.run(work), threads))
    assert most == [1]


def test_every_input_of_a_step_is_aligned_as_an_allocation(recorded: tuple[CudaSession, Recorder]) -> None:
    session, _ = recorded
    session.reserve_slots(3, {})
    session.decode([1, 2, 3], [0, 0, 0])
    step = session._decode_steps[3]
    offsets = [step._numbers.rows(step._half, 3).data_ptr() - step._numbers.value.data_ptr()]
    offsets.append(step._choices.rows(step._half, 3).data_ptr() - step._choices.value.data_ptr())
    assert offsets == [512, 256]


def test_the_thread_of_a_session_raises_what_was_raised_and_ends_with_it() -> None:
    threads = [CudaThread()]
    worker = threads[0]._thread
    assert threads[0].run(divmod, 7, 2) == (3, 1)
    assert threads[0].run(lambda: threads[0].run(threading.get_ident)) == worker.ident
    with pytest.raises(ZeroDivisionError):
        threads[0].run(divmod, 1, 0)
    assert worker.is_alive()
    threads.clear()
    worker.join(5)
    assert not worker.is_alive()
