"""`gpt2-edge bench` from end to end, with settings that take seconds. No test looks at how fast anything is."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2_edge
from gpt2_edge.benchmarks import Report, Settings, run
from gpt2_edge.benchmarks.coordinator import Coordinator
from gpt2_edge.benchmarks.rows import RandomTokensRow
from gpt2_edge.benchmarks.stopwatch import Stopwatch
from gpt2_edge.benchmarks.subject import Subject
from gpt2_edge.benchmarks.worker import Worker
from gpt2_edge.benchmarks.worker_process import WorkerError, WorkerProcess
from gpt2_edge.errors import OptionError
from gpt2_edge.quantize.quality import measure_quality

SMALL = Settings(
    prompts=(16,),
    new_tokens=(8,),
    depths=(32, 9999),
    batches=(1, 2),
    repetitions=3,
    sample_seconds=0,
    quality_tokens=200,
)
TESTS = ["pp16", "tg8", "tg8 @ d32", "tg8 b2"]


@pytest.fixture(scope="module")
def report(storyteller_fp32: Path, storyteller_int8: Path, tmp_path_factory: pytest.TempPathFactory) -> Report:
    damaged = tmp_path_factory.mktemp("models") / "damaged"
    damaged.mkdir()
    for file in storyteller_int8.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "model.onnx.data"
    weights.write_bytes(bytes(100) + weights.read_bytes()[100:])
    stages: list[str] = []
    report = run([storyteller_fp32, damaged, storyteller_int8, "nowhere"], settings=SMALL, on_stage=stages.append)
    assert stages[0] == "loading"
    assert "repetition 3 of 3" in stages
    return report


def test_sequences_that_do_not_fit_side_by_side_give_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker("storyteller", "cpu", 1)
    assert worker.speed(n_prompt=0, n_gen=4, n_depth=16, batch=4, sample_seconds=0)["tokens_per_second"] > 0
    monkeypatch.setattr(worker._model._core.engine, "_most_rows", 2)
    with pytest.raises(OptionError, match="4 sequences do not fit side by side"):
        worker.speed(n_prompt=0, n_gen=4, n_depth=16, batch=4, sample_seconds=0)


def test_every_test_has_its_samples(report: Report) -> None:
    for variant in (report.variants[0], report.variants[2]):
        assert variant.error is None
        assert [name for name, speed in variant.speeds.items() if speed.tokens_per_second] == TESTS
        for name in TESTS:
            speed = variant.speed(name)
            assert speed is not None
            assert len(speed.samples) == 3
            assert min(speed.samples) > 0


def test_a_depth_beyond_the_context_is_skipped_and_said(report: Report) -> None:
    assert report.variants[0].speeds["tg8 @ d9999"].skipped == "does not fit the context of 512 tokens"


def test_folders_that_do_not_load_are_rows_with_their_errors(report: Report) -> None:
    _, damaged, _, nowhere = report.variants
    assert damaged.error is not None
    assert "model.onnx.data is damaged" in damaged.error
    assert damaged.size_bytes is not None
    assert nowhere.error is not None
    assert "does not exist" in nowhere.error
    assert nowhere.size_bytes is None


def test_latency_adds_up(report: Report) -> None:
    latency = report.variants[0].latency
    assert latency is not None
    assert (latency.prompt_tokens, latency.new_tokens) == (128, 8)
    assert len(latency.inter_token_ms) == 3 * 7
    assert 0 < latency.p50_ms <= latency.p95_ms <= latency.p99_ms
    assert 0 < latency.sampling_share < 1
    assert 0 < latency.python_share < 1 - latency.sampling_share


def test_memory_is_that_of_the_process(report: Report) -> None:
    for variant in (report.variants[0], report.variants[2]):
        memory = variant.memory
        assert memory is not None
        assert variant.weights_bytes is not None
        # At least the weights came with loading, and all of it is far less than this process, which has torch.
        assert memory.before_loading_bytes + variant.weights_bytes // 2 < memory.steady_bytes
        assert memory.steady_bytes <= memory.peak_bytes < 1_000_000_000
        assert variant.idle_cpu_percent is not None
        assert variant.idle_cpu_percent < 50


def test_quality_is_that_of_the_models(
    report: Report, fp32_model: gpt2_edge.Model, int8_model: gpt2_edge.Model
) -> None:
    text = (Path(__file__).parent.parent / "models" / "storyteller" / "held_out.txt").read_text(encoding="utf-8")
    tokens = fp32_model.tokenize(text[:2000])[:200]  # the excerpt is its beginning
    full, small = report.variants[0].quality, report.variants[2].quality
    assert full is not None
    assert small is not None
    assert full.tokens == small.tokens == 199
    assert full.perplexity == pytest.approx(fp32_model.score(tokens).perplexity, rel=1e-5)
    assert small.perplexity == pytest.approx(int8_model.score(tokens).perplexity, rel=1e-5)
    assert full.reference is None
    assert small.reference == report.variants[0].name
    assert small.perplexity_change_percent == pytest.approx(100 * (small.perplexity / full.perplexity - 1), rel=1e-5)
    expected = measure_quality(fp32_model, int8_model, [tokens])
    assert small.mean_kl_divergence == pytest.approx(expected.mean_kl_divergence, rel=1e-4)
    assert small.same_top_percent == pytest.approx(expected.same_top_percent)


def test_bandwidth_is_compared_with_decoding(report: Report) -> None:
    bandwidth = report.variants[0].bandwidth
    assert bandwidth is not None
    speed = report.variants[0].speed("tg8")
    assert speed is not None
    assert bandwidth.test == "tg8"
    limit = bandwidth.read_bytes_per_second.mean / bandwidth.bytes_per_token
    assert bandwidth.limit_tokens_per_second == pytest.approx(limit)
    assert bandwidth.fraction == pytest.approx(speed.mean / limit)


def test_the_report_survives_json_and_says_how_to_repeat_it(report: Report, storyteller_fp32: Path) -> None:
    assert Report.from_json(report.to_json()) == report
    assert report.command[:3] == ("gpt2-edge", "bench", str(storyteller_fp32))
    options = " ".join(report.command[6:])
    assert options == "-p 16 -n 8 -d 32,9999 -b 1,2 -r 3 --sample-seconds 0 --quality-tokens 200"
    assert not report.interrupted


def test_rows_compute_every_token_once(int8_model: gpt2_edge.Model) -> None:
    rows = [RandomTokensRow([5, 6, 7], following) for following in ([1, 2], [3, 4])]
    int8_model._core.run(rows)
    assert [row.tokens for row in rows] == [[5, 6, 7, 1, 2], [5, 6, 7, 3, 4]]
    assert all(0 < row.started_at < row.prefilled_at < row.finished_at for row in rows)


def test_the_stopwatch_takes_the_time_of_every_token_and_leaves_no_trace(int8_model: gpt2_edge.Model) -> None:
    from gpt2_edge.choosing import TokenChooser

    original = TokenChooser.choose
    stopwatch = Stopwatch()
    with stopwatch.attached():
        generated = int8_model.generate("Once", max_new_tokens=6, ignore_eos=True, top_k=5, seed=1)
    assert TokenChooser.choose is original
    assert len(stopwatch.chosen_at) == 6
    assert bool(np.all(np.diff(stopwatch.chosen_at) > 0))
    assert 0 < stopwatch.sampling_seconds + stopwatch.run_seconds < stopwatch.decode_seconds
    assert generated.tokens == int8_model.generate("Once", max_new_tokens=6, ignore_eos=True, top_k=5, seed=1).tokens


def test_a_worker_says_what_went_wrong_and_goes_on(storyteller_int8: Path) -> None:
    with WorkerProcess() as worker:
        with pytest.raises(WorkerError, match="does not exist"):
            worker.ask("load", folder="nowhere", device="cpu", threads=1)
        assert worker.ask("load", folder=str(storyteller_int8), device="cpu", threads=1)["threads"] == 1
        with pytest.raises(WorkerError, match="513"):
            worker.ask("latency", prompt_tokens=513, new_tokens=2)
        assert worker.ask("tokenize", text="Once")["tokens"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_worker_that_dies_is_an_error_of_its_row(storyteller_int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_memory = Subject.take_memory

    def die(subject: Subject) -> None:
        process = subject._process
        assert process is not None
        if subject.name == "one":
            os.kill(process._process.pid, signal.SIGKILL)
        take_memory(subject)

    monkeypatch.setattr(Subject, "take_memory", die)
    settings = replace(SMALL, prompts=(8,), depths=(), batches=(1,), repetitions=1)
    coordinator = Coordinator(["storyteller"], settings)
    coordinator._subjects = [Subject(name, str(storyteller_int8), 1) for name in ("one", "two")]
    coordinator._tests = coordinator._plan_tests()
    coordinator.measure()
    one, two = coordinator.report().variants
    assert one.error == "its process was ended by signal 9: out of memory?"
    assert one.speed("tg8") is not None
    assert two.error is None
    assert two.quality is not None


def test_what_cannot_be_asked_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no model folder"):
        run([])
    with pytest.raises(OptionError, match="twice"):
        run(["storyteller", "storyteller"])
    with pytest.raises(OptionError, match="cannot read the text"):
        run(["storyteller"], text=tmp_path / "nothing.txt")


def _bench(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpt2_edge", "bench", *arguments],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
        **options,
    )


def test_the_command_line(tmp_path: Path) -> None:
    small = (
        "-p",
        "8",
        "-n",
        "8",
        "-d",
        "0",
        "-b",
        "1",
        "-r",
        "1",
        "--quality-tokens",
        "0",
        "--threads",
        "1",
        "--sample-seconds",
        "0",
    )
    path = tmp_path / "report.json"
    done = _bench("storyteller", *small, "--format", "json", "-o", str(path))
    assert done.returncode == 0, done.stderr
    assert "storyteller" in done.stdout
    assert json.loads(path.read_text(encoding="utf-8"))["schema"] == "gpt2-edge bench 1"

    done = _bench("storyteller", "nowhere", *small, "--sustain", "0.1", "--format", "json", "--compare", str(path))
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["variants"][0]["sustained"]["tokens_per_second"]
    assert "does not exist" in document["variants"][1]["error"]
    assert document["comparison"]["verdicts"][0]["verdict"] == "fewer than 3 samples"

    path.write_text('{"schema": "another"}', encoding="utf-8")
    done = _bench("storyteller", "--compare", str(path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "another" in done.stderr


def test_what_is_not_installed_is_named() -> None:
    program = 'import sys; sys.modules["psutil"] = None; from gpt2_edge.cli import main; sys.exit(main(["bench"]))'
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert "psutil, which is not installed: run pip install 'gpt2-edge[cpu,bench]'" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_shows_what_there_is() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gpt2_edge", "bench", "storyteller", "--threads", "1", "-r", "1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "repetition 2" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "tg128" in output
    assert "Interrupted" in output
