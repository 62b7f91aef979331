"""Measure model folders side by side: each in a process of its own, all loaded, one computing at a time.

Each test goes once around all models, in the other direction the next time, before it is repeated: a machine that
slows down while it is measured treats all of them alike.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

from gpt2_edge.benchmarks.bandwidth import read_bandwidth
from gpt2_edge.benchmarks.environment import describe_environment
from gpt2_edge.benchmarks.peers.preparation import PeerModel
from gpt2_edge.benchmarks.peers.subject import PeerSubject
from gpt2_edge.benchmarks.perplexity import bench_windows
from gpt2_edge.benchmarks.plan import Settings, SpeedTest, plan_tests
from gpt2_edge.benchmarks.report import Report
from gpt2_edge.benchmarks.subject import Subject
from gpt2_edge.benchmarks.worker_process import WorkerDiedError, WorkerError
from gpt2_edge.errors import Gpt2EdgeError, OptionError
from gpt2_edge.quantize.texts import held_out_text, read_text
from gpt2_edge.threads import usable_cores

_EXCERPT_TITLE: Final = "the excerpt that comes with gpt2-edge"
_IDLE_SECONDS: Final = 1.0
_SUSTAINED_SAMPLE_TOKENS: Final = 64

OnStage = Callable[[str], object]
OnStep = Callable[[], object]


class Coordinator:
    """Measures, and can say at any time what it has.

    Args:
        folders: Model folders, or "storyteller".
        settings: What is measured.
        text: A UTF-8 file to measure quality over; None takes the excerpt that comes with gpt2-edge.
        peers: Other programs' models, measured beside the folders.

    Attributes:
        steps: How many times `on_step` is called, unless something fails.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        settings: Settings,
        text: Path | None = None,
        peers: Sequence[PeerModel] = (),
    ) -> None:
        self._settings = settings
        self._text_title, self._text = _read_text(text)
        self._text_path = text
        self._started_at = time.perf_counter()
        self._created_at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        self._environment = describe_environment()
        self._folders = [str(folder) for folder in folders]
        self._peers = peers
        own_subjects = _subjects(self._folders, settings)
        _check_source(own_subjects, peers)
        self._subjects = [*own_subjects, *_peer_subjects(peers, settings)]
        self._tests = self._plan_tests()
        self._interrupted = False
        self._on_stage: OnStage = lambda _: None
        self._on_step: OnStep = lambda: None
        rounds = len(self._tests) * (1 + settings.repetitions)
        extras = 1 + 2 + bool(settings.sustain_seconds)
        own_extras = 2 * settings.repetitions + bool(settings.quality_tokens)
        self.steps = len(self._alive()) * (rounds + extras) + len(self._own_alive()) * own_extras

    def measure(self, on_stage: OnStage | None = None, on_step: OnStep | None = None) -> None:
        """Measure everything; on Ctrl-C, stop where it is.

        Args:
            on_stage: Called with a description when something else begins.
            on_step: Called after each step.
        """
        self._on_stage = on_stage or self._on_stage
        self._on_step = on_step or self._on_step
        with ExitStack() as stack:
            for subject in self._subjects:
                stack.callback(subject.close)
            try:
                self._load()
                if not self._alive():
                    return
                self._measure_speed()
                self._measure_processes()
                if self._settings.quality_tokens:
                    self._on_stage("quality")
                    self._measure_quality()
                if self._settings.sustain_seconds:
                    self._on_stage("sustained decoding")
                    self._each(self._sustain)
            except KeyboardInterrupt:
                self._interrupted = True

    def report(self) -> Report:
        """Return what was measured so far."""
        return Report(
            created_at=self._created_at,
            command=(
                *("gpt2-edge", "bench", *self._folders),
                *_arguments(self._settings, self._text_path),
                *_peer_arguments(self._peers),
            ),
            settings=json.loads(json.dumps(asdict(self._settings))),
            environment=self._environment,
            variants=tuple(subject.variant() for subject in self._subjects),
            interrupted=self._interrupted,
            seconds=round(time.perf_counter() - self._started_at, 1),
        )

    def _load(self) -> None:
        self._on_stage("loading")
        self._each(partial(Subject.start, device=self._settings.device))

    def _measure_speed(self) -> None:
        self._on_stage("warming up")
        for test in self._tests:
            self._each(partial(Subject.warm_up, test=test))
        repetitions, sample_seconds = self._settings.repetitions, self._settings.sample_seconds
        for repetition in range(repetitions):
            self._on_stage(f"repetition {repetition + 1} of {repetitions}")
            backwards = repetition % 2 == 1
            for test in self._tests:
                self._each(partial(Subject.sample_speed, test=test, sample_seconds=sample_seconds), backwards)
            self._each(partial(Subject.sample_latency, settings=self._settings), backwards, self._own_alive())
            self._each(_sample_bandwidth, backwards, self._own_alive())

    def _measure_processes(self) -> None:
        self._on_stage("memory and idle CPU")
        self._each(Subject.take_memory)
        self._each(partial(Subject.take_idle, seconds=_IDLE_SECONDS))

    def _plan_tests(self) -> list[SpeedTest]:
        """Give each model its tests, and return those of all."""
        shortest = min((subject.context_length for subject in self._alive()), default=0)
        for subject in self._alive():
            subject.plan(plan_tests(self._settings, subject.context_length, shortest))
        return list(dict.fromkeys(test for subject in self._alive() for test in subject.tests))

    def _alive(self) -> list[Subject]:
        return [subject for subject in self._subjects if subject.alive]

    def _own_alive(self) -> list[Subject]:
        """Those that are measured in full: a peer is measured by its speed, memory and size."""
        return [subject for subject in self._alive() if not isinstance(subject, PeerSubject)]

    def _each(
        self,
        measure: Callable[[Subject], object],
        backwards: bool = False,
        subjects: list[Subject] | None = None,
    ) -> None:
        """Do something with each model in turn; one whose process ends is not asked again."""
        subjects = self._alive() if subjects is None else subjects
        for subject in reversed(subjects) if backwards else subjects:
            with _blamed_on(subject):
                measure(subject)
            self._on_step()

    def _measure_quality(self) -> None:
        # Threads do not change the logits, so one row of each folder is enough.
        first_of_folder = {subject.folder: subject for subject in reversed(self._own_alive())}
        subjects = [subject for subject in self._own_alive() if first_of_folder[subject.folder] is subject]
        reference = next((subject for subject in subjects if subject.precision == "fp32"), None)
        compared = [subject for subject in subjects if reference and subject.same_vocabulary(reference)]
        alone = [[subject] for subject in subjects if subject not in compared]
        for group in [compared, *alone] if compared else alone:
            with _blamed_on(group[0]):
                self._measure_quality_of(group)
        for subject in self._own_alive():
            subject.take_quality_from(first_of_folder[subject.folder])
            self._on_step()

    def _measure_quality_of(self, subjects: list[Subject]) -> None:
        """Let models with the same vocabulary predict the text, window by window; the first is the reference."""
        reference, *others = subjects
        shortest_context = min(subject.context_length for subject in subjects)
        windows = bench_windows(reference.tokenize(self._text), shortest_context, self._settings.quality_tokens)
        reference.begin_quality(self._text_title, None)
        for subject in others:
            subject.begin_quality(self._text_title, reference.name)
        with tempfile.TemporaryDirectory(prefix="gpt2-edge-bench-") as folder:
            logits = str(Path(folder) / "logits.npy")
            for window in windows:
                reference.add_window(window, None, logits if others else None)
                for subject in others:
                    if subject.alive:
                        with _blamed_on(subject):
                            subject.add_window(window, logits, None)

    def _sustain(self, subject: Subject) -> None:
        count = min(_SUSTAINED_SAMPLE_TOKENS, subject.context_length - 1)
        started_at = time.perf_counter()
        while time.perf_counter() - started_at < self._settings.sustain_seconds:
            speed = subject.ask_speed(SpeedTest(0, count), self._settings.sample_seconds)
            subject.add_sustained(time.perf_counter() - started_at, speed)


def run(
    folders: str | Path | Sequence[str | Path] = "storyteller",
    *,
    settings: Settings | None = None,
    text: str | Path | None = None,
    peers: Sequence[PeerModel] = (),
    on_stage: OnStage | None = None,
) -> Report:
    """Measure speed, memory and quality of model folders side by side.

    Args:
        folders: A model folder or several, or "storyteller".
        settings: What is measured; None takes the defaults.
        text: A UTF-8 file to measure quality over; None takes the excerpt that comes with gpt2-edge.
        peers: Other programs' models, from `gpt2_edge.benchmarks.peers.preparation.prepare_peers`.
        on_stage: Called with a description when something else begins.

    Returns:
        A row for each folder and number of threads; one that cannot be measured says why. After Ctrl-C, what was
        measured until then.

    Raises:
        OptionError: There is no folder, the text cannot be used, or the peers run another checkpoint.
    """
    if isinstance(folders, str | Path):
        folders = [folders]
    coordinator = Coordinator(folders, settings or Settings(), None if text is None else Path(text), peers)
    coordinator.measure(on_stage)
    return coordinator.report()


def _subjects(folders: Sequence[str], settings: Settings) -> list[Subject]:
    if not folders:
        raise OptionError("no model folder is given: give at least one, or storyteller")
    short_names = [Path(folder).name or folder for folder in folders]
    names = [
        short if short_names.count(short) == 1 else folder for short, folder in zip(short_names, folders, strict=True)
    ]
    if len(set(names)) < len(names):
        raise OptionError("a model folder is given twice: give each once")
    threads = settings.threads or (None,)
    return [
        Subject(name if len(threads) == 1 else f"{name} ({count} thr.)", folder, count)
        for name, folder in zip(names, folders, strict=True)
        for count in threads
    ]


def _peer_subjects(peers: Sequence[PeerModel], settings: Settings) -> list[Subject]:
    threads = settings.threads or (usable_cores(),)
    return [
        PeerSubject(peer.name if len(threads) == 1 else f"{peer.name} ({count} thr.)", peer, count)
        for peer in peers
        for count in threads
    ]


def _check_source(subjects: Sequence[Subject], peers: Sequence[PeerModel]) -> None:
    """Refuse to compare folders with peers that run other weights."""
    for subject in subjects:
        for peer in peers:
            if subject.alive and subject.manifest.source.get("sha256") != peer.checkpoint.source:
                raise OptionError(
                    f"{subject.folder} was not exported from the checkpoint {peer.checkpoint.folder}: give the "
                    "checkpoint that it was exported from, so that the peers run the same model"
                )


def _sample_bandwidth(subject: Subject) -> None:
    subject.add_bandwidth(read_bandwidth(subject.weights_bytes, usable_cores()))


@contextlib.contextmanager
def _blamed_on(subject: Subject) -> Iterator[None]:
    """What fails belongs to the row of one model, and the others go on."""
    try:
        yield
    except WorkerDiedError as error:
        subject.fail(str(error))
    except (WorkerError, Gpt2EdgeError, OSError, MemoryError) as error:
        subject.note(str(error) or type(error).__name__)


def _read_text(path: Path | None) -> tuple[str, str]:
    """Return the title and the contents of the text for quality."""
    if path is None:
        return _EXCERPT_TITLE, held_out_text()
    return path.name, read_text(path)


def _arguments(settings: Settings, text: Path | None) -> list[str]:
    """Return the options that measure the same again."""
    default = Settings()
    arguments: list[str] = []
    for option, name in (("-p", "prompts"), ("-n", "new_tokens"), ("-d", "depths"), ("-b", "batches")):
        value: Any = getattr(settings, name)
        if value != getattr(default, name):
            arguments += [option, ",".join(map(str, value))]
    if settings.repetitions != default.repetitions:
        arguments += ["-r", str(settings.repetitions)]
    if settings.sample_seconds != default.sample_seconds:
        arguments += ["--sample-seconds", f"{settings.sample_seconds:g}"]
    if settings.threads is not None:
        arguments += ["--threads", ",".join(map(str, settings.threads))]
    if settings.device != default.device:
        arguments += ["--device", settings.device]
    if settings.quality_tokens != default.quality_tokens:
        arguments += ["--quality-tokens", str(settings.quality_tokens)]
    if settings.sustain_seconds:
        arguments += ["--sustain", f"{settings.sustain_seconds:g}"]
    return arguments if text is None else [*arguments, "--text", str(text)]


def _peer_arguments(peers: Sequence[PeerModel]) -> list[str]:
    if not peers:
        return []
    names = ",".join(dict.fromkeys(peer.peer.name for peer in peers))
    return ["--peers", names, "--checkpoint", str(peers[0].checkpoint.folder)]
