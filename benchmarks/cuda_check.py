"""Check and measure gpt2-edge on an NVIDIA GPU: correctness against the CPU, then the speed that is aimed for.

    pip install numpy tokenizers 'onnxruntime-gpu[cuda,cudnn]>=1.31'
    python benchmarks/cuda_check.py --json results.json

Needs the repository, Python and these three packages, nothing else: no torch, no network, and gpt2-edge need not be
installed. The graphs are carried in the repository, the storyteller's weights too; the weights of the models that
are only timed are drawn at random here. `--device cpu --quick` goes the same way on a machine without a GPU.
"""

import argparse
import importlib.util
import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

REPOSITORY: Final = Path(__file__).resolve().parent.parent


def _import_from_repository(name: str, folder: Path) -> None:
    """Import a package under its installed name from the repository's folder for it."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no package in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if importlib.util.find_spec("gpt2_edge") is None:
    _import_from_repository("gpt2_edge", REPOSITORY / "runtime")
    _import_from_repository("gpt2_edge.benchmarks", REPOSITORY / "benchmarks")

from gpt2_edge.benchmarks.cuda_graphs import KITS, fill, storyteller_weights  # noqa: E402
from gpt2_edge.core import ModelCore  # noqa: E402
from gpt2_edge.cuda_session import CudaSession  # noqa: E402
from gpt2_edge.device import Device, parse_device  # noqa: E402
from gpt2_edge.device_array import DeviceArray  # noqa: E402
from gpt2_edge.doctor import examine  # noqa: E402
from gpt2_edge.engine import Engine  # noqa: E402
from gpt2_edge.errors import DeviceError  # noqa: E402
from gpt2_edge.folder import TOKENIZER_NAME, open_folder  # noqa: E402
from gpt2_edge.model import Model  # noqa: E402
from gpt2_edge.session import StepSession  # noqa: E402
from gpt2_edge.session_protocol import ModelSession  # noqa: E402
from gpt2_edge.tokenizer import Tokenizer  # noqa: E402

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
# Of the largest logit: what the export allows half precision.
FP16_TOLERANCE: Final = 0.01
MOST_SECONDS_OF_A_SPEED: Final = 20.0


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
    """What is run: on a GPU everything; a quick run takes a tiny model for the ones that are timed."""

    device: str
    index: int
    quick: bool

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


def main(argv: list[str] | None = None) -> int:
    """Run everything and print the table; the status is 1 if a check failed or a goal was missed."""
    parser = argparse.ArgumentParser(description="Check and measure gpt2-edge on an NVIDIA GPU.")
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:1 ...; or cpu, to try the script")
    parser.add_argument("--quick", action="store_true", help="a few tokens, and a tiny model for all that is timed")
    parser.add_argument("--no-xl", action="store_true", help="leave GPT-2 XL out (3 GB of random weights)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    arguments = parser.parse_args(argv)
    index = parse_device(arguments.device)
    plan = Plan("cpu" if index is None else "cuda", index or 0, arguments.quick)
    examination = examine()
    for name, value in examination.facts.items():
        print(f"{name:<20} {value}", file=sys.stderr)
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="gpt2-edge-cuda-check-") as folder:
        for step in (check_fp32, check_fp16, check_capture, measure_small, *(() if arguments.no_xl else (measure_xl,))):
            started_at = time.perf_counter()
            try:
                for result in step(plan, Path(folder)):
                    print(_line(result), flush=True)
                    results.append(result)
            except Exception as error:  # noqa: BLE001 - one part that fails must not keep the others from running
                if isinstance(error, DeviceError) and not results:
                    print(f"cuda_check: {error}", file=sys.stderr)
                    return 1
                results.append(Result(step.__name__, f"{type(error).__name__}: {error}", "to run", False))
                print(_line(results[-1]), flush=True)
            print(f"({step.__name__}: {time.perf_counter() - started_at:.0f} s)", file=sys.stderr)
    failed = [result for result in results if result.passed is False]
    print(f"\n{len(failed)} of {sum(result.passed is not None for result in results)} checks and goals failed")
    if arguments.json is not None:
        document = {
            "plan": asdict(plan),
            "machine": {"node": platform.machine(), **examination.facts},
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


def check_fp32(plan: Plan, folder: Path) -> Iterator[Result]:
    """The storyteller in float32: the GPU must choose the very tokens that the CPU chooses."""
    path = fill("storyteller-fp32", folder / "storyteller-fp32", storyteller_weights())
    greedy: dict[str, Any] = {"max_new_tokens": plan.tokens}
    sampled: dict[str, Any] = {"max_new_tokens": plan.tokens, "temperature": 0.8, "top_k": 40, "seed": 7}
    with cpu_model(path) as cpu:
        expected = [each.tokens for each in cpu.generate(PROMPTS, **greedy)]
        expected_samples = [each.tokens for each in cpu.generate(PROMPTS, **sampled)]
        expected_scores = np.concatenate([cpu.score(prompt + " and then").logprobs for prompt in PROMPTS])
    with gpu_model(path, plan) as gpu:
        batch = [each.tokens for each in gpu.generate(PROMPTS, **greedy)]
        alone = [gpu.generate(prompt, **greedy).tokens for prompt in PROMPTS]
        samples = [each.tokens for each in gpu.generate(PROMPTS, **sampled)]
        again = [each.tokens for each in gpu.generate(PROMPTS, **sampled)]
        scores = np.concatenate([gpu.score(prompt + " and then").logprobs for prompt in PROMPTS])
        fork_agrees = _fork_agrees(gpu)
    yield _same("fp32: greedy tokens as on the CPU, in a batch", batch, expected)
    yield _same("fp32: greedy tokens as on the CPU, one by one", alone, expected)
    yield _same("fp32: sampled tokens as on the CPU", samples, expected_samples)
    yield _same("fp32: the same seed draws the same tokens again", again, samples)
    difference = float(np.abs(scores - expected_scores).max())
    yield Result(
        "fp32: largest difference of a log-probability", f"{difference:.1e}", "at most 1e-03", difference <= 1e-3
    )
    yield Result("a session saved and restored goes on the same", str(fork_agrees), "True", fork_agrees)


def check_fp16(plan: Plan, folder: Path) -> Iterator[Result]:
    """The storyteller in half precision against the CPU in float32, token by token over the same text."""
    single = open_folder(folder / "storyteller-fp32")
    half = open_folder(fill("storyteller-fp16", folder / "storyteller-fp16", storyteller_weights()))
    text = (REPOSITORY / "models" / "storyteller" / "held_out.txt").read_text(encoding="utf-8")
    tokens = Tokenizer(single.content(TOKENIZER_NAME)).encode(text[:20000])[: 96 if plan.quick else 480]
    reference, session = StepSession(single, 2), open_gpu_session(half, plan)
    expected = _logits_over(reference, tokens)
    prefilled, decoded = _logits_over(session, tokens), _decoded_logits(session, tokens)
    reference.close()
    session.close()
    for name, logits in (("prefill", prefilled), ("decode", decoded)):
        relative = float(np.abs(logits - expected).max() / np.abs(expected).max())
        divergence = _mean_kl_divergence(expected, logits)
        same_top = float(np.mean(logits.argmax(axis=1) == expected.argmax(axis=1)))
        yield Result(
            f"fp16 {name}: largest difference of a logit, of the largest",
            f"{relative:.2%}",
            f"at most {FP16_TOLERANCE:.0%}",
            relative <= FP16_TOLERANCE,
        )
        yield Result(
            f"fp16 {name}: mean KL divergence, nats a token", f"{divergence:.1e}", "at most 1e-03", divergence <= 1e-3
        )
        yield Result(f"fp16 {name}: same likeliest token", f"{same_top:.1%}", "at least 98%", same_top >= 0.98)


def check_capture(plan: Plan, folder: Path) -> Iterator[Result]:
    """Steps replayed from a captured graph against steps that are launched one by one, over changing lengths."""
    opened = open_folder(folder / "storyteller-fp16")
    captured, launched = open_gpu_session(opened, plan), open_gpu_session(opened, plan)
    largest = 0.0
    for session in (captured, launched):
        session.reserve_slots(4, {})
        for slot in range(4):
            session.prefill(slot, list(range(3, 10 + slot)), 0, np.array([], np.int64))
    for step in range(8 if plan.quick else 200):
        for rows in (1, 2, 4):
            lengths = [7 + slot + step for slot in range(rows)]
            tokens = [(17 * step + slot) % 8192 for slot in range(rows)]
            replayed = captured.decode(tokens, lengths).copy()
            launched._decode_steps.clear()  # a new step is captured under a new number: launched, and never replayed
            largest = max(largest, float(np.abs(replayed - launched.decode(tokens, lengths)).max()))
    captured.close()
    launched.close()
    yield Result(
        "replayed steps against launched ones, largest difference", f"{largest:.1e}", "at most 1e-02", largest <= 1e-2
    )


def measure_small(plan: Plan, folder: Path) -> Iterator[Result]:
    """Speed of GPT-2 small in half precision; random weights cost the same."""
    opened = open_folder(fill(plan.timed_kit, folder / "small"))
    architecture = opened.manifest.architecture
    context, vocabulary = architecture.context_length, architecture.vocabulary_size
    prompt = [token % vocabulary for token in range(7, 7 + min(512, context // 2))]
    session = open_gpu_session(opened, plan)
    last = np.array([len(prompt) - 1])
    seconds = _median_seconds(lambda: session.prefill(0, prompt, 0, last), plan.repetitions)
    yield _speed(f"pp{len(prompt)}, tokens/s", len(prompt) / seconds, 100_000, plan)
    for rows, goal in ((1, 1_500), (16, None), (64, 40_000)):
        session.reserve_slots(rows, {})
        for slot in range(rows):
            session.prefill(slot, prompt[: context // 8], 0, np.array([], np.int64))
        seconds = _decode_seconds(session, rows, context // 8, plan)
        yield _speed(f"decode, batch {rows}, tokens/s", rows / seconds, goal, plan)
    session.close()
    with gpu_model(folder / "small", plan) as model:
        count = min(128, context - context // 8)
        options: dict[str, Any] = {"max_new_tokens": count, "ignore_eos": True}
        model.generate(prompt[: context // 8], **options)
        done = [model.generate(prompt[: context // 8], **options) for _ in range(plan.repetitions)]
        rate = statistics.median(each.timings.decode_tokens_per_second for each in done)
        yield _speed("generate(), batch 1, greedy, tokens/s", rate, 1_500, plan)


def measure_xl(plan: Plan, folder: Path) -> Iterator[Result]:
    """Decoding GPT-2 XL reads all its weights for each token: how much of the memory's bandwidth that reaches."""
    shutil.rmtree(folder / "small", ignore_errors=True)
    kit = plan.timed_kit if plan.quick else "gpt2-xl-fp16"
    opened = open_folder(fill(kit, folder / "xl"))
    weights = next(entry.size_bytes for entry in opened.manifest.files if entry.name.endswith(".data"))
    bandwidth = _copy_bandwidth(plan)
    yield Result("memory bandwidth of a copy, GB/s, read and written", f"{bandwidth / 1e9:,.0f}", "", None)
    session = open_gpu_session(opened, plan)
    start = KITS[kit].context_length // 8
    session.prefill(0, list(range(5, 5 + start)), 0, np.array([], np.int64))
    seconds = _decode_seconds(session, 1, start, plan)
    session.close()
    yield _speed("XL decode, batch 1, tokens/s", 1 / seconds, None, plan)
    share = weights / seconds / bandwidth
    passed = None if plan.quick else share >= 0.6
    yield Result("XL decode: bytes of weights a second over bandwidth", f"{share:.0%}", "at least 60%", passed)


@contextmanager
def cpu_model(path: Path) -> Iterator[Model]:
    """The model on the CPU, as everybody uses it."""
    folder = open_folder(path)
    with _model(StepSession(folder, 2), path, "cpu") as model:
        yield model


@contextmanager
def gpu_model(path: Path, plan: Plan) -> Iterator[Model]:
    """The model on the GPU."""
    with _model(open_gpu_session(open_folder(path), plan), path, plan.device) as model:
        yield model


def open_gpu_session(folder: Any, plan: Plan) -> CudaSession:
    """Open the session that is checked; on "cpu" the same one through host memory."""
    return CudaSession(folder, plan.device, plan.index)


def _model(session: ModelSession, path: Path, device: str) -> Model:
    folder = open_folder(path)
    core = ModelCore(folder.manifest, Tokenizer(folder.content(TOKENIZER_NAME)), Engine(session))
    return Model(core, Device(device, "cuda_check"), 1, (path, device, 1, True, None))


def _fork_agrees(model: Model) -> bool:
    session = model.session()
    session.append(PROMPTS[2])
    session.generate(max_new_tokens=5)
    fork = session.fork()
    return session.generate(max_new_tokens=10).tokens == fork.generate(max_new_tokens=10).tokens


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


def _decode_seconds(session: ModelSession, rows: int, start: int, plan: Plan) -> float:
    """Return the median seconds of a step over some lengths, after steps that capture it."""
    steps = 16 if plan.quick else 128
    for warm_up in range(3):
        session.decode([11] * rows, [start + warm_up] * rows)
    seconds = []
    deadline = time.perf_counter() + MOST_SECONDS_OF_A_SPEED
    for step in range(steps):
        started_at = time.perf_counter()
        session.decode([11 + step] * rows, [start + step] * rows)
        seconds.append(time.perf_counter() - started_at)
        if time.perf_counter() > deadline:
            break
    return statistics.median(seconds)


def _median_seconds(run: Callable[[], object], repetitions: int) -> float:
    run()
    seconds = []
    for _ in range(repetitions):
        started_at = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds)


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


def _same(name: str, found: list[list[int]], expected: list[list[int]]) -> Result:
    equal = sum(one == other for one, other in zip(found, expected, strict=True))
    return Result(name, f"{equal} of {len(expected)}", f"{len(expected)} of {len(expected)}", equal == len(expected))


def _line(result: Result) -> str:
    verdict = {True: "ok", False: "FAILED", None: ""}[result.passed]
    return f"{result.name:<60} {result.value:>14}  {result.goal:<18} {verdict}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
