"""What is checked and measured on a GPU machine, one check after another; `cuda_check.py` runs them.

Every check stands alone: it makes the model folders that it needs, and none relies on what another has left behind.
"""

import importlib.util
import json
import math
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.benchmarks.cuda_graphs import KITS, STORYTELLER, Weight, fill, storyteller_weights
from gpt2_edge.core import ModelCore
from gpt2_edge.cuda_session import LAUNCHES_BEFORE_CAPTURE, CudaSession
from gpt2_edge.device import Device
from gpt2_edge.device_array import DeviceArray
from gpt2_edge.doctor import inspect_host
from gpt2_edge.engine import Engine
from gpt2_edge.errors import LogitsError
from gpt2_edge.folder import TOKENIZER_NAME, ModelFolder, open_folder
from gpt2_edge.model import Model
from gpt2_edge.session import StepSession
from gpt2_edge.session_protocol import ModelSession
from gpt2_edge.tokenizer import Tokenizer

FloatArray = npt.NDArray[np.float32]

PROMPTS: Final = [
    "Once upon a time",
    "The king",
    "There was a little girl who lived in a house near the",
    "It was a dark and stormy night, and the wind",
    "My dear friend,",
    '"Where are you going?" asked the fox.',
    "In the middle of the forest stood an old oak, and under it",
    "He",
]
MANY_ROWS: Final = 64
# Of the largest logit: what the export allows half precision.
FP16_TOLERANCE: Final = 0.01
MOST_SECONDS_OF_A_SPEED: Final = 20.0
_VOCABULARY_OF_KITS: Final = 8192  # the storyteller's, and the tiny one's


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table.

    Attributes:
        name: What was checked or measured.
        value: What was found.
        goal: What it should be; empty where there is no goal.
        passed: Whether it is; None where there is no goal.
    """

    name: str
    value: str
    goal: str
    passed: bool | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run: on a GPU everything; a quick run takes a tiny model for the ones that are timed.

    Attributes:
        device: "cuda", or "cpu" to try the checks through host memory.
        index: Which GPU.
        quick: Few tokens, and a tiny model for all that is timed.
        place: A folder for the models.
    """

    device: str
    index: int
    quick: bool
    place: Path

    @property
    def timed_kit(self) -> str:
        """The model whose speed is measured."""
        return "tiny-fp16" if self.quick else "gpt2-fp16"

    @property
    def tokens(self) -> int:
        """How many tokens each of the compared texts has."""
        return 12 if self.quick else 100

    @property
    def repetitions(self) -> int:
        """How often what takes long is timed."""
        return 2 if self.quick else 5

    def folder(self, kit: str, weight: Weight | None = None, name: str = "") -> ModelFolder:
        """Return the model of a carried graph, made when it is first asked for."""
        path = self.place / (name or kit)
        if not path.exists():
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a check that was ended in the middle of it
            fill(kit, partial, weight).rename(path)
        return open_folder(path)

    def storyteller(self, precision: str) -> ModelFolder:
        """Return the storyteller, "fp32" or "fp16"."""
        return self.folder(f"storyteller-{precision}", storyteller_weights())

    def session(self, folder: ModelFolder, *, captures: bool = True) -> CudaSession:
        """Open the session that is checked; on "cpu" the same one through host memory."""
        return CudaSession(folder, self.device, self.index, captures=captures)

    def model(self, folder: ModelFolder) -> Model:
        """Return a model over the session that is checked."""
        return _model(self.session(folder), folder)

    def cpu_model(self) -> Model:
        """Return the storyteller in float32 on the CPU, as everybody uses it."""
        folder = self.storyteller("fp32")
        return _model(StepSession(folder, 2), folder)


Check = Callable[[Plan], Iterator[Result]]


def check_opening(plan: Plan) -> Iterator[Result]:
    """Both precisions load with every operator on the device, and compute a token."""
    for precision in ("fp32", "fp16"):
        session = plan.session(plan.storyteller(precision))
        logits = session.prefill(0, [1, 2, 3], 0, np.array([2]))
        session.close()
        finite = bool(np.isfinite(logits).all())
        yield Result(f"{precision}: all operators on the device, logits finite", str(finite), "True", finite)


def check_greedy_tokens(plan: Plan) -> Iterator[Result]:
    """The storyteller in float32: the GPU must choose the very tokens that the CPU chooses."""
    with plan.cpu_model() as cpu, plan.model(plan.storyteller("fp32")) as gpu:
        expected = [each.tokens for each in cpu.generate(PROMPTS, max_new_tokens=plan.tokens)]
        batch = [each.tokens for each in gpu.generate(PROMPTS, max_new_tokens=plan.tokens)]
        yield _same("fp32: greedy tokens as on the CPU, in a batch", batch, expected)
        alone = [gpu.generate(prompt, max_new_tokens=plan.tokens).tokens for prompt in PROMPTS]
        yield _same("fp32: greedy tokens as on the CPU, one by one", alone, expected)


def check_sampled_tokens(plan: Plan) -> Iterator[Result]:
    """Sampling goes by the same logits, so the same seed draws the same tokens."""
    options: dict[str, Any] = {"max_new_tokens": plan.tokens, "temperature": 0.8, "top_k": 40, "seed": 7}
    with plan.cpu_model() as cpu, plan.model(plan.storyteller("fp32")) as gpu:
        expected = [each.tokens for each in cpu.generate(PROMPTS, **options)]
        samples = [each.tokens for each in gpu.generate(PROMPTS, **options)]
        yield _same("fp32: sampled tokens as on the CPU", samples, expected)
        again = [each.tokens for each in gpu.generate(PROMPTS, **options)]
        yield _same("fp32: the same seed draws the same tokens again", again, samples)


def check_scores(plan: Plan) -> Iterator[Result]:
    """Log-probabilities of given texts."""
    texts = [prompt + " and then" for prompt in PROMPTS]
    with plan.cpu_model() as cpu, plan.model(plan.storyteller("fp32")) as gpu:
        expected, scores = (np.concatenate([each.logprobs for each in model.score(texts)]) for model in (cpu, gpu))
    difference = float(np.abs(scores - expected).max())
    yield _at_most("fp32: largest difference of a log-probability", difference, 1e-3)


def check_saved_sessions(plan: Plan) -> Iterator[Result]:
    """Keys and values that went to host memory and back."""
    for precision in ("fp32", "fp16"):
        with plan.model(plan.storyteller(precision)) as model:
            session = model.session()
            session.append(PROMPTS[2])
            session.generate(max_new_tokens=5)
            fork = session.fork()
            agrees = session.generate(max_new_tokens=10).tokens == fork.generate(max_new_tokens=10).tokens
        yield Result(f"{precision}: a session saved and restored goes on the same", str(agrees), "True", agrees)


def check_fp16_prefill(plan: Plan) -> Iterator[Result]:
    """Half precision against float32 on the CPU, over held-out text, in chunks."""
    yield from _compare_fp16(plan, "prefill", _logits_over)


def check_fp16_decode(plan: Plan) -> Iterator[Result]:
    """The same token by token."""
    yield from _compare_fp16(plan, "decode", _decoded_logits)


def check_likeliest_tokens(plan: Plan) -> Iterator[Result]:
    """Tokens chosen on the device against those of the logits: half precision has many that are equally likely."""
    session = plan.session(plan.storyteller("fp16"))
    session.reserve_slots(4, {})
    chosen, expected, ties = [], [], 0
    for step in range(12 if plan.quick else 200):
        tokens, lengths = [(17 * step + slot) % _VOCABULARY_OF_KITS for slot in range(4)], [step] * 4
        choices = session.decode_likeliest(tokens, lengths, [True] * 4)
        chosen.append([choice if isinstance(choice, int) else -1 for choice in choices])
        logits = session.decode(tokens, lengths)
        expected.append(logits.argmax(axis=1).tolist())
        ties += int((np.sum(logits == logits.max(axis=1, keepdims=True), axis=1) > 1).sum())
    session.close()
    yield _same(f"tokens chosen on the device are those of the logits ({ties} ties)", chosen, expected)


def check_faulty_logits(plan: Plan) -> Iterator[Result]:
    """A model that computes NaN ends in the same error as on the CPU, instead of in some token."""

    def weight(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
        return np.full(shape, math.nan if name == "ln_f.bias" else 0.01, np.float16)

    with plan.model(plan.folder("tiny-fp16", weight, "faulty")) as model:
        try:
            model.generate(PROMPTS[0], max_new_tokens=4)
            found = "none"
        except LogitsError as error:
            found = "raised" if "NaN" in str(error) else str(error)
    yield Result("an error where the logits are NaN", found, "raised", found == "raised")


def check_captured_steps(plan: Plan) -> Iterator[Result]:
    """Steps replayed from captured graphs against steps that are launched, over changing lengths and rows."""
    opened = plan.storyteller("fp16")
    captured, launched = plan.session(opened), plan.session(opened, captures=False)
    largest, same, steps = 0.0, 0, (LAUNCHES_BEFORE_CAPTURE + 4 if plan.quick else 200)
    for session in (captured, launched):
        session.reserve_slots(4, {})
        for slot in range(4):
            session.prefill(slot, list(range(3, 10 + slot)), 0, np.array([], np.int64))
    for step in range(steps):
        for rows in (1, 2, 4):
            lengths = [7 + slot + step for slot in range(rows)]
            tokens = [(17 * step + slot) % _VOCABULARY_OF_KITS for slot in range(rows)]
            replayed, expected = captured.decode(tokens, lengths), launched.decode(tokens, lengths)
            largest = max(largest, float(np.abs(replayed - expected).max()))
            same += np.array_equal(replayed.argmax(axis=1), expected.argmax(axis=1))
    captured.close()
    launched.close()
    yield _at_most("replayed steps against launched ones, largest difference", largest, 1e-2)
    yield Result("replayed steps with the tokens of launched ones", f"{same} of {3 * steps}", "", None)


def check_moved_cache(plan: Plan) -> Iterator[Result]:
    """A graph that was captured before the cache moved must not be replayed after."""
    opened = plan.storyteller("fp16")
    grown, fresh = plan.session(opened), plan.session(opened)
    fresh.reserve_slots(8, {})
    steps = LAUNCHES_BEFORE_CAPTURE + 4
    largest = 0.0
    for step in range(3 * steps):
        if step % steps == 0 and step:
            grown.reserve_slots(4 * step // steps, {0: step})
        token, length = [(31 * step) % _VOCABULARY_OF_KITS], [step]
        largest = max(largest, float(np.abs(grown.decode(token, length) - fresh.decode(token, length)).max()))
    grown.close()
    fresh.close()
    yield _at_most("steps after the cache moved, largest difference", largest, 1e-2)


def check_threads(plan: Plan) -> Iterator[Result]:
    """Requests from many threads, as a server makes them, get what they get alone."""
    with plan.model(plan.storyteller("fp32")) as model:
        expected = [model.generate(prompt, max_new_tokens=plan.tokens).tokens for prompt in PROMPTS]
        found: list[list[int]] = [[] for _ in PROMPTS]

        def ask(index: int) -> None:
            found[index] = model.generate(PROMPTS[index], max_new_tokens=plan.tokens).tokens

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(PROMPTS))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    yield _same("fp32: tokens of requests from 8 threads as alone", found, expected)


def check_many_rows(plan: Plan) -> Iterator[Result]:
    """64 rows of different lengths side by side, which end one after another."""
    prompts = [PROMPTS[row % len(PROMPTS)] + " and" * (row // len(PROMPTS)) for row in range(MANY_ROWS)]
    with plan.model(plan.storyteller("fp32")) as model:
        together = [each.tokens for each in model.generate(prompts, max_new_tokens=plan.tokens)]
        alone = [model.generate(prompt, max_new_tokens=plan.tokens).tokens for prompt in prompts]
    # The products of 64 rows and of one add up in another order, which may tip a close choice.
    yield _same(f"fp32: greedy tokens of {MANY_ROWS} rows as alone", together, alone, allowed=2)


def measure_prefill(plan: Plan) -> Iterator[Result]:
    """Speed of a prompt, and how much longer the first of its length takes."""
    opened = plan.folder(plan.timed_kit)
    session, prompt = plan.session(opened), _timed_prompt(opened)
    last = np.array([len(prompt) - 1])
    session.prefill(0, prompt[:3], 0, np.array([2]))
    first = _seconds(lambda: session.prefill(0, prompt, 0, last))
    seconds = _median_seconds(lambda: session.prefill(0, prompt, 0, last), plan.repetitions)
    new_lengths = [_seconds(lambda n=n: session.prefill(0, prompt[:-n], 0, np.array([0]))) for n in (1, 3, 5)]  # type: ignore[misc]
    session.close()
    yield _speed(f"pp{len(prompt)}, tokens/s", len(prompt) / seconds, 100_000, plan)
    yield _milliseconds(f"pp{len(prompt)}", seconds)
    yield _milliseconds(f"pp{len(prompt)}, the first time", first)
    yield _milliseconds("a prompt of a length that was not there before", statistics.median(new_lengths))


def measure_decode(plan: Plan) -> Iterator[Result]:
    """Speed of steps: replayed and launched, with and without their logits."""
    opened = plan.folder(plan.timed_kit)
    start = opened.manifest.architecture.context_length // 8
    for captures in (True, False):
        session, how = plan.session(opened, captures=captures), "" if captures else ", without CUDA graphs"
        for rows, goal in ((1, 1_500), (16, None), (MANY_ROWS, 40_000)):
            session.reserve_slots(rows, {})
            if captures:
                yield _milliseconds(f"the step of {rows} rows that captures", _capturing_seconds(session, rows, start))
            seconds = _step_seconds(session, rows, start, plan, greedy=True)
            yield _speed(
                f"decode, greedy, batch {rows}{how}, tokens/s", rows / seconds, goal if captures else None, plan
            )
            seconds = _step_seconds(session, rows, start, plan, greedy=False)
            yield _speed(f"decode with logits, batch {rows}{how}, tokens/s", rows / seconds, None, plan)
        session.close()


def measure_generate(plan: Plan) -> Iterator[Result]:
    """Speed of the whole way: engine, sampling, text."""
    opened = plan.folder(plan.timed_kit)
    prompt = _timed_prompt(opened)[: opened.manifest.architecture.context_length // 8]
    count = min(128, opened.manifest.architecture.context_length - len(prompt))
    with plan.model(opened) as model:
        for name, options, goal in (
            ("greedy", {}, 1_500),
            ("temperature 0.8, top-k 40", {"temperature": 0.8, "top_k": 40, "seed": 1}, None),
        ):
            arguments: dict[str, Any] = {"max_new_tokens": count, "ignore_eos": True, **options}
            model.generate(prompt, **arguments)
            done = [model.generate(prompt, **arguments) for _ in range(plan.repetitions)]
            rate = statistics.median(each.timings.decode_tokens_per_second for each in done)
            yield _speed(f"generate(), {name}, batch 1, tokens/s", rate, goal, plan)
            prompts = [[*prompt, row] for row in range(MANY_ROWS)]
            seconds = _median_seconds(lambda: model.generate(prompts, **arguments), 1)  # noqa: B023 - called at once
            yield _speed(
                f"generate(), {name}, batch {MANY_ROWS}, prefill included, tokens/s",
                MANY_ROWS * count / seconds,
                None,
                plan,
            )


def measure_transformers(plan: Plan) -> Iterator[Result]:
    """Decoding beside that of transformers on the same GPU, where torch and transformers are installed."""
    kit, name = KITS[plan.timed_kit], "decode, greedy, batch 1, over that of transformers"
    if not (_is_installed("torch") and _is_installed("transformers")):
        yield Result(name, "torch and transformers are not installed", "at least 2.0", None)
        return
    start, new_tokens = kit.context_length // 8, 16 if plan.quick else 128
    asked = {
        **{field: getattr(kit, field) for field in ("layers", "heads", "width", "context_length", "vocabulary_size")},
        **{"prompt_tokens": start, "new_tokens": new_tokens},
        "device": f"cuda:{plan.index}" if plan.device == "cuda" else "cpu",
    }
    command = [sys.executable, str(Path(__file__).with_name("cuda_transformers.py")), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    theirs = float(done.stdout.split()[-1])
    session = plan.session(plan.folder(plan.timed_kit))
    ours = 1 / _step_seconds(session, 1, start, plan, greedy=True)
    session.close()
    yield _speed("decode, greedy, batch 1, of transformers, tokens/s", theirs, None, plan)
    passed = None if plan.quick or plan.device == "cpu" else ours >= 2 * theirs
    yield Result(name, f"{ours / theirs:.1f}", "at least 2.0", passed)


def measure_memory(plan: Plan) -> Iterator[Result]:
    """Memory of the GPU that a model takes, as nvidia-smi says."""
    opened = plan.folder(plan.timed_kit)
    before = _free_gpu_megabytes(plan)
    session = plan.session(opened)
    for rows in (1, MANY_ROWS):
        session.reserve_slots(rows, {})
        for step in range(LAUNCHES_BEFORE_CAPTURE + 1):
            session.decode([5] * rows, [step] * rows)
        used = before - _free_gpu_megabytes(plan)
        yield Result(f"GPU memory with {rows} slots, MB", "unknown" if math.isnan(used) else f"{used:,.0f}", "", None)
    session.close()


def measure_xl(plan: Plan) -> Iterator[Result]:
    """Decoding GPT-2 XL reads all its weights for each token: how much of the memory's bandwidth that reaches."""
    bandwidth = _copy_bandwidth(plan)
    yield Result("memory bandwidth of a copy, GB/s, read and written", f"{bandwidth / 1e9:,.0f}", "", None)
    opened = plan.folder(plan.timed_kit if plan.quick else "gpt2-xl-fp16")
    weights = next(entry.size_bytes for entry in opened.manifest.files if entry.name.endswith(".data"))
    session = plan.session(opened)
    start = opened.manifest.architecture.context_length // 8
    seconds = _step_seconds(session, 1, start, plan, greedy=True)
    session.close()
    yield _speed("XL decode, batch 1, tokens/s", 1 / seconds, None, plan)
    share = weights / seconds / bandwidth
    passed = None if plan.quick or plan.device == "cpu" else share >= 0.6
    yield Result("XL decode: bytes of weights a second over bandwidth", f"{share:.0%}", "at least 60%", passed)


CHECKS: Final[Mapping[str, Check]] = {
    "opening": check_opening,
    "greedy-tokens": check_greedy_tokens,
    "sampled-tokens": check_sampled_tokens,
    "scores": check_scores,
    "saved-sessions": check_saved_sessions,
    "fp16-prefill": check_fp16_prefill,
    "fp16-decode": check_fp16_decode,
    "likeliest-tokens": check_likeliest_tokens,
    "faulty-logits": check_faulty_logits,
    "captured-steps": check_captured_steps,
    "moved-cache": check_moved_cache,
    "threads": check_threads,
    "many-rows": check_many_rows,
    "prefill": measure_prefill,
    "decode": measure_decode,
    "generate": measure_generate,
    "transformers": measure_transformers,
    "memory": measure_memory,
    "xl": measure_xl,
}


def collect(check: Check, plan: Plan) -> Iterator[Result]:
    """Run a check; what it raises becomes a line of the table, after the lines that it had got to."""
    try:
        yield from check(plan)
    except Exception as error:  # noqa: BLE001 - one check that fails must not keep the others from running
        yield Result(f"{check.__name__} ended early", f"{type(error).__name__}: {error}", "to run", False)


def _model(session: ModelSession, folder: ModelFolder) -> Model:
    core = ModelCore(folder.manifest, Tokenizer(folder.content(TOKENIZER_NAME)), Engine(session))
    return Model(core, Device("cuda_check", ""), 1, (folder.path, "cuda_check", 1, True, None))


def _compare_fp16(
    plan: Plan, name: str, logits_over: Callable[[ModelSession, list[int]], FloatArray]
) -> Iterator[Result]:
    single, half = plan.storyteller("fp32"), plan.storyteller("fp16")
    text = (STORYTELLER / "held_out.txt").read_text(encoding="utf-8")
    tokens = Tokenizer(single.content(TOKENIZER_NAME)).encode(text[:20000])[: 96 if plan.quick else 480]
    reference, session = StepSession(single, 2), plan.session(half)
    expected, logits = _logits_over(reference, tokens), logits_over(session, tokens)
    reference.close()
    session.close()
    relative = float(np.abs(logits - expected).max() / np.abs(expected).max())
    yield Result(
        f"fp16 {name}: largest difference of a logit, of the largest",
        f"{relative:.2%}",
        f"at most {FP16_TOLERANCE:.0%}",
        relative <= FP16_TOLERANCE,
    )
    yield _at_most(f"fp16 {name}: mean KL divergence, nats a token", _mean_kl_divergence(expected, logits), 1e-3)
    same_top = float(np.mean(logits.argmax(axis=1) == expected.argmax(axis=1)))
    yield Result(f"fp16 {name}: same likeliest token", f"{same_top:.1%}", "at least 98%", same_top >= 0.98)


def _logits_over(session: ModelSession, tokens: list[int]) -> FloatArray:
    """Return the logits after each token, computed in chunks."""
    parts = [
        session.prefill(0, chunk, start, np.arange(len(chunk))).copy()
        for start in range(0, len(tokens), 128)
        if (chunk := tokens[start : start + 128])
    ]
    return np.concatenate(parts)


def _decoded_logits(session: ModelSession, tokens: list[int]) -> FloatArray:
    """Return the logits after each token, computed one by one."""
    return np.concatenate([session.decode([token], [length]).copy() for length, token in enumerate(tokens)])


def _mean_kl_divergence(expected: FloatArray, logits: FloatArray) -> float:
    log_p, log_q = _log_softmax(expected), _log_softmax(logits)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def _log_softmax(logits: FloatArray) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)), np.float64)


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # something keeps it from being looked for
        return False


def _timed_prompt(folder: ModelFolder) -> list[int]:
    architecture = folder.manifest.architecture
    length = min(512, architecture.context_length // 2)
    return [token % architecture.vocabulary_size for token in range(7, 7 + length)]


def _capturing_seconds(session: CudaSession, rows: int, start: int) -> float:
    for step in range(LAUNCHES_BEFORE_CAPTURE):
        session.decode_likeliest([11] * rows, [start + step] * rows, [True] * rows)
    length = start + LAUNCHES_BEFORE_CAPTURE
    return _seconds(lambda: session.decode_likeliest([11] * rows, [length] * rows, [True] * rows))


def _step_seconds(session: CudaSession, rows: int, start: int, plan: Plan, *, greedy: bool) -> float:
    """Return the median seconds of a step over some lengths, after those that capture it."""
    seconds: list[float] = []
    deadline = time.perf_counter() + MOST_SECONDS_OF_A_SPEED
    for step in range(LAUNCHES_BEFORE_CAPTURE + 2 + (16 if plan.quick else 128)):
        tokens, lengths = [11 + step] * rows, [start + step] * rows
        started_at = time.perf_counter()
        if greedy:
            session.decode_likeliest(tokens, lengths, [True] * rows)
        else:
            session.decode(tokens, lengths)
        if step >= LAUNCHES_BEFORE_CAPTURE + 2:
            seconds.append(time.perf_counter() - started_at)
        if seconds and time.perf_counter() > deadline:
            break
    return statistics.median(seconds)


def _seconds(run: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    run()
    return time.perf_counter() - started_at


def _median_seconds(run: Callable[[], object], repetitions: int) -> float:
    run()
    return statistics.median(_seconds(run) for _ in range(repetitions))


def _free_gpu_megabytes(plan: Plan) -> float:
    free = inspect_host().free_gpu_memory_bytes
    return free[plan.index] / 1e6 if plan.device == "cuda" and plan.index < len(free) else math.nan


def _copy_bandwidth(plan: Plan) -> float:
    """Return bytes a second that a copy within the device's memory reads and writes together."""
    size = 1 << (24 if plan.quick else 30)
    array = DeviceArray((2, size), np.uint8, plan.device, plan.index)
    source, target = array.rows(0, 1), array.rows(1, 1)
    source.update_inplace(np.zeros((1, size), np.uint8))
    waited_for = DeviceArray((1,), np.uint8, plan.device, plan.index)

    def copy() -> None:
        for _ in range(8):
            target.update_inplace(source)
        waited_for.value.numpy().copy()  # copies within a GPU return before they are done; a download waits for them

    return 2 * 8 * size / _median_seconds(copy, plan.repetitions)


def _speed(name: str, rate: float, goal: float | None, plan: Plan) -> Result:
    """Judge a rate by its goal, which is for the GPU and the whole model."""
    passed = None if goal is None or plan.quick or plan.device == "cpu" else rate >= goal
    return Result(name, f"{rate:,.0f}", "" if goal is None else f"at least {goal:,.0f}", passed)


def _milliseconds(name: str, seconds: float) -> Result:
    return Result(f"{name}, ms", f"{1e3 * seconds:,.2f}", "", None)


def _at_most(name: str, value: float, goal: float) -> Result:
    return Result(name, f"{value:.1e}", f"at most {goal:.0e}", value <= goal)


def _same(name: str, found: list[list[int]], expected: list[list[int]], allowed: int = 0) -> Result:
    equal = sum(one == other for one, other in zip(found, expected, strict=True))
    goal = len(expected) - allowed
    return Result(name, f"{equal} of {len(expected)}", f"{goal} of {len(expected)}", equal >= goal)
