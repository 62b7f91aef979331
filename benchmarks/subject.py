"""One model under measurement: its process, the samples so far, and the row that they make."""

from typing import Any, Final

from gpt2_edge.benchmarks.bandwidth import bytes_touched_per_token, parameters, weights_bytes
from gpt2_edge.benchmarks.perplexity import QualityTally
from gpt2_edge.benchmarks.plan import Plan, Settings, SpeedTest
from gpt2_edge.benchmarks.report import Bandwidth, Latency, Memory, Quality, Speed, SustainedSpeed, Variant
from gpt2_edge.benchmarks.spread import measurement, percentile
from gpt2_edge.benchmarks.worker_process import WorkerDiedError, WorkerError, WorkerProcess
from gpt2_edge.errors import Gpt2EdgeError
from gpt2_edge.folder import TOKENIZER_NAME, open_folder
from gpt2_edge.interrupt import deferred_interrupt
from gpt2_edge.manifest import Manifest

LATENCY_PROMPT_TOKENS: Final = 128


class Subject:
    """A model folder with a number of threads.

    Args:
        name: Tells the rows apart.
        folder: Of the model.
        threads: None for the cores allowed.

    Attributes:
        alive: Whether it can be measured, as far as is known.
    """

    def __init__(self, name: str, folder: str, threads: int | None) -> None:
        self.name = name
        self.folder = folder
        self.alive = False
        self._bandwidth_samples: list[float] = []
        self._sustained: list[tuple[float, float]] = []
        self._quality_text = ""
        self._quality_reference: str | None = None
        self._asked_threads = threads
        self._process: WorkerProcess | None = None
        self._manifest: Manifest | None = None
        self._loaded: dict[str, Any] = {}
        self._error: str | None = None
        self._notes: list[str] = []
        self._plan = Plan((), {}, ())
        self._speed_samples: dict[str, list[float]] = {}
        self._speed_errors: dict[str, str] = {}
        self._latency_samples: list[dict[str, Any]] = []
        self._latency_lengths = (0, 0)
        self._memory: Memory | None = None
        self._idle_cpu_percent: float | None = None
        self._tally = QualityTally()
        self._quality: Quality | None = None
        self._open()

    def start(self, device: str) -> None:
        """Load the model in a process of its own; if that fails, the row says why."""
        try:
            with deferred_interrupt():  # or nobody would end a process that has just begun
                self._process = self._start_process()
            self._loaded = self._process.ask("load", **self._load_arguments(device))
        except (Gpt2EdgeError, OSError) as error:
            self.fail(str(error))

    def add_bandwidth(self, bytes_per_second: float) -> None:
        """Take a sample of the speed of memory."""
        self._bandwidth_samples.append(bytes_per_second)

    def close(self) -> None:
        """End the process."""
        self.alive = False
        if self._process is not None:
            self._process.close()
            self._process = None

    def fail(self, error: str) -> None:
        """Give up: the row keeps what it has, and says why there is no more."""
        self._error = error
        self.close()

    def note(self, text: str) -> None:
        """Remember something that the reader of the row should know."""
        if text not in self._notes:
            self._notes.append(text)

    @property
    def manifest(self) -> Manifest:
        """Of the folder, which is loaded."""
        if self._manifest is None:
            raise WorkerError(f"{self.folder} is not loaded")
        return self._manifest

    @property
    def context_length(self) -> int:
        """How many tokens the model can hold."""
        return self.manifest.architecture.context_length

    @property
    def precision(self) -> str:
        """Of the weights."""
        return self.manifest.precision

    @property
    def weights_bytes(self) -> int:
        """Size of the graphs and their weights."""
        return weights_bytes(self.manifest)

    def same_vocabulary(self, other: "Subject") -> bool:
        """Tell whether the tokens of both mean the same."""
        return _vocabulary(self.manifest) == _vocabulary(other.manifest)

    @property
    def tests(self) -> tuple[SpeedTest, ...]:
        """Those that fit this model."""
        return self._plan.tests

    def plan(self, plan: Plan) -> None:
        """Take the tests that will be made."""
        self._plan = plan
        for note in plan.notes:
            self.note(note)

    def warm_up(self, test: SpeedTest) -> None:
        """Run a test without a result, if it is planned for this model."""
        self._try_test(test, "warm_up")

    def sample_speed(self, test: SpeedTest, sample_seconds: float) -> None:
        """Run a test once more, if it is planned for this model."""
        answer = self._try_test(test, "speed", sample_seconds=sample_seconds)
        if answer is not None:
            self._speed_samples.setdefault(test.name, []).append(answer["tokens_per_second"])

    def ask_speed(self, test: SpeedTest, sample_seconds: float) -> float:
        """Run a test that is no part of the plan, and return tokens a second."""
        return float(self._ask("speed", **_arguments(test), sample_seconds=sample_seconds)["tokens_per_second"])

    def sample_latency(self, settings: Settings) -> None:
        """Generate once more as a caller does."""
        new_tokens = min(max(settings.new_tokens), self.context_length // 2)
        prompt_tokens = min(LATENCY_PROMPT_TOKENS, self.context_length - new_tokens)
        if new_tokens < 2:
            return
        answer = self._ask("latency", prompt_tokens=prompt_tokens, new_tokens=new_tokens)
        self._latency_lengths = (prompt_tokens, new_tokens)
        self._latency_samples.append(answer)

    def take_memory(self) -> None:
        """Measure the memory of the process."""
        self._memory = Memory(**self._ask("memory"))

    def take_idle(self, seconds: float) -> None:
        """Measure the CPU that the process takes for nothing."""
        self._idle_cpu_percent = float(self._ask("idle", seconds=seconds)["cpu_percent"])

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        tokens: list[int] = self._ask("tokenize", text=text)["tokens"]
        return tokens

    def begin_quality(self, text: str, reference: str | None) -> None:
        """Take the name of the text, and of the row that is compared with."""
        self._quality_text, self._quality_reference = text, reference

    def add_window(self, window: list[int], reference: str | None, save_to: str | None) -> None:
        """Predict a window of the text."""
        self._tally.add(self._ask("window", tokens=window, reference=reference, save_to=save_to))

    def add_sustained(self, seconds: float, tokens_per_second: float) -> None:
        """Take a sample of decoding without a pause."""
        self._sustained.append((round(seconds, 3), tokens_per_second))

    def take_quality_from(self, other: "Subject") -> None:
        """Take what was measured with another number of threads."""
        self._quality = other._own_quality()

    def variant(self) -> Variant:
        """Return the row as it is now."""
        return Variant(
            name=self.name,
            folder=self.folder,
            error=self._error,
            threads=self._loaded.get("threads", self._asked_threads),
            device=self._loaded.get("device"),
            load_seconds=self._loaded.get("load_seconds"),
            speeds=self._speeds(),
            latency=self._latency(),
            memory=self._memory,
            idle_cpu_percent=self._idle_cpu_percent,
            bandwidth=self._bandwidth(),
            quality=self._quality or self._own_quality(),
            sustained=self._sustained_speed(),
            notes=tuple(self._notes),
            **self._facts(),
        )

    def _open(self) -> None:
        try:
            self._manifest = open_folder(self.folder).manifest
            self.alive = True
        except Gpt2EdgeError as error:
            self.fail(str(error))

    def _start_process(self) -> WorkerProcess:
        return WorkerProcess()

    def _load_arguments(self, device: str) -> dict[str, Any]:
        return {"folder": self.folder, "device": device, "threads": self._asked_threads}

    def _facts(self) -> dict[str, Any]:
        """Return what is known of the model without running it."""
        manifest = self._manifest
        if manifest is None:
            return {}
        return {
            "precision": manifest.precision,
            "recipe": None if manifest.recipe is None else str(manifest.recipe.get("name")),
            "parameters": parameters(manifest),
            "size_bytes": manifest.size_bytes,
            "weights_bytes": weights_bytes(manifest),
            "context_length": manifest.architecture.context_length,
            "vocabulary_size": manifest.architecture.vocabulary_size,
            "content_sha256": manifest.content_sha256,
        }

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self._process is None:
            raise WorkerError(f"{self.folder} is not loaded")
        return self._process.ask(do, **arguments)

    def _try_test(self, test: SpeedTest, do: str, **more: float) -> dict[str, Any] | None:
        """Run a test, unless it does not fit or failed before."""
        if test not in self._plan.tests or test.name in self._speed_errors:
            return None
        try:
            return self._ask(do, **_arguments(test), **more)
        except WorkerDiedError:
            raise
        except WorkerError as error:
            self._speed_errors[test.name] = str(error)
            self.note(f"{test.name}: {error}")
            return None

    def _speeds(self) -> dict[str, Speed]:
        speeds = {}
        for test in self._plan.tests:
            samples = self._speed_samples.get(test.name)
            speed = measurement(samples) if samples else None
            speeds[test.name] = _speed(test, tokens_per_second=speed, error=self._speed_errors.get(test.name))
        for test, reason in self._plan.skipped.items():
            speeds[test.name] = _speed(test, skipped=reason)
        return speeds

    def _latency(self) -> Latency | None:
        if not self._latency_samples:
            return None
        gaps = [gap for sample in self._latency_samples for gap in sample["inter_token_ms"]]
        seconds = {
            name: sum(sample[name] for sample in self._latency_samples)
            for name in ("decode_seconds", "run_seconds", "sampling_seconds")
        }
        prompt_tokens, new_tokens = self._latency_lengths
        sampling_share = seconds["sampling_seconds"] / seconds["decode_seconds"]
        return Latency(
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            time_to_first_token=measurement([each["time_to_first_token_seconds"] for each in self._latency_samples]),
            inter_token_ms=tuple(gaps),
            p50_ms=percentile(gaps, 50),
            p95_ms=percentile(gaps, 95),
            p99_ms=percentile(gaps, 99),
            sampling_share=sampling_share,
            python_share=max(0.0, 1 - sampling_share - seconds["run_seconds"] / seconds["decode_seconds"]),
        )

    def _bandwidth(self) -> Bandwidth | None:
        if not self._bandwidth_samples:
            return None
        test = next((test for test in self._plan.tests if test.n_gen and test.batch == 1), None)
        depth = 0.0 if test is None else test.n_depth + test.n_gen / 2
        bytes_per_token = bytes_touched_per_token(self.manifest, depth)
        bandwidth = measurement(self._bandwidth_samples)
        limit = bandwidth.mean / bytes_per_token
        samples = None if test is None else self._speed_samples.get(test.name)
        return Bandwidth(
            buffer_bytes=self.weights_bytes,
            read_bytes_per_second=bandwidth,
            bytes_per_token=bytes_per_token,
            limit_tokens_per_second=limit,
            test=None if test is None or not samples else test.name,
            fraction=measurement(samples).mean / limit if samples else None,
        )

    def _own_quality(self) -> Quality | None:
        return self._tally.quality(self._quality_text, self._quality_reference) if self._tally.logprobs else None

    def _sustained_speed(self) -> SustainedSpeed | None:
        if not self._sustained:
            return None
        seconds, speeds = zip(*self._sustained, strict=True)
        return SustainedSpeed(seconds=tuple(seconds), tokens_per_second=tuple(speeds))


def _arguments(test: SpeedTest) -> dict[str, int]:
    return {"n_prompt": test.n_prompt, "n_gen": test.n_gen, "n_depth": test.n_depth, "batch": test.batch}


def _speed(test: SpeedTest, **result: Any) -> Speed:
    return Speed(n_prompt=test.n_prompt, n_gen=test.n_gen, n_depth=test.n_depth, batch=test.batch, **result)


def _vocabulary(manifest: Manifest) -> tuple[int, set[str]]:
    return manifest.architecture.vocabulary_size, {
        entry.sha256 for entry in manifest.files if entry.name == TOKENIZER_NAME
    }
