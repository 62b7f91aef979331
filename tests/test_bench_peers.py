"""`gpt2-edge bench --peers` with peers that are a few lines long: nothing is downloaded, no real peer is needed."""

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

import gpt2_edge.known_hashes
from gpt2_edge.benchmarks import Report, Settings, run
from gpt2_edge.benchmarks.peers import catalog, installation, options, preparation, process
from gpt2_edge.benchmarks.peers.catalog import PEERS, Peer
from gpt2_edge.benchmarks.peers.preparation import PeerModel, prepare_peers, read_checkpoint
from gpt2_edge.benchmarks.report import Speed, Variant
from gpt2_edge.benchmarks.sheets import sheets_of
from gpt2_edge.benchmarks.spread import measurement
from gpt2_edge.benchmarks.summary import remarks, summary_sentences
from gpt2_edge.cli import main
from gpt2_edge.errors import OptionError

CHECKPOINT = Path(__file__).resolve().parent.parent / "models" / "storyteller"
SMALL = Settings(prompts=(16,), new_tokens=(8,), depths=(32,), batches=(1, 2), repetitions=3, quality_tokens=0)
TESTS = ["pp16", "tg8", "tg8 @ d32", "tg8 b2"]

# Writes down what it is asked for. As variant "short" it stops early, "broken" cannot be converted, "dying" ends.
SCRIPT = """
import json, os, sys, time
from pathlib import Path

def convert(checkpoint, variant, folder):
    if variant == "broken":
        raise ValueError("no such form")
    (Path(folder) / "model.bin").write_bytes(bytes(1000))
    (Path(folder) / "half.json").write_text(json.dumps([checkpoint, variant]))

class Model:
    def __init__(self, folder, variant, threads):
        assert "gpt2_edge" not in sys.modules
        print("a library says hello")
        self._log = Path(LOG).open("a")
        self._variant = variant
        self._say(["load", variant, threads])

    def _say(self, what):
        self._log.write(json.dumps(what) + "\\n")
        self._log.flush()

    def prefill(self, prompt):
        self._say(["prefill", self._variant, prompt])
        return len(prompt) / 1000

    def decode(self, prompts, new_tokens):
        if self._variant == "dying":
            os._exit(3)
        self._say(["decode", self._variant, prompts, new_tokens])
        computed = len(prompts) * new_tokens
        return computed / 100, computed - (self._variant == "short" and new_tokens > 1)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and this Python in place of those of the peers' environments."""
    for module in (installation, preparation):
        monkeypatch.setattr(module, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(process, "python_of", lambda peer: Path(sys.executable))
    return tmp_path / "cache"


@pytest.fixture
def fake(tmp_path: Path) -> Peer:
    script = tmp_path / "fake_peer.py"
    script.write_text(SCRIPT.replace("LOG", repr(str(tmp_path / "log"))))
    return Peer("fake", "Fake", str(script), "psutil", ("fake-package>=1",), ("fast",), 12, needs_torch=False)


def _pretend_to_install(peer: Peer) -> None:
    folder = installation.environment_of(peer)
    folder.mkdir(parents=True)
    (folder / "complete").touch()


def _prepare(peers: Sequence[Peer], checkpoint: Path = CHECKPOINT, agreed: bool = True) -> list[PeerModel]:
    return prepare_peers(peers, read_checkpoint(checkpoint), lambda missing: agreed, lambda stage: None)


def _log(tmp_path: Path) -> list[list[object]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def _row(report: Report, name: str) -> Variant:
    return next(variant for variant in report.variants if variant.name == name)


def test_a_peer_is_a_row_with_the_same_tests(cache: Path, fake: Peer, tmp_path: Path) -> None:
    _pretend_to_install(fake)
    report = run("storyteller", settings=replace(SMALL, threads=(1,)), peers=_prepare([fake]))
    own, row = report.variants
    assert (own.peer, own.error, row.error) == (None, None, None)
    assert row.name == "Fake fast"
    assert row.peer is not None
    assert row.peer == f"psutil {metadata.version('psutil')}"
    assert row.size_bytes == 1000 + len(json.dumps([str(CHECKPOINT), "fast"]))
    assert row.memory is not None
    assert row.load_seconds is not None
    for name in TESTS:
        speed, own_speed = row.speed(name), own.speed(name)
        assert speed is not None
        assert own_speed is not None
        # 1,000 tokens a second in prefill and 100 in decoding, for all rows of a batch together.
        assert speed.mean == pytest.approx(1000 if name.startswith("pp") else 100)
        assert len(speed.samples) == len(own_speed.samples) == 3
    assert Report.from_json(report.to_json()) == report
    assert report.command[-4:] == ("--peers", "fake", "--checkpoint", str(CHECKPOINT))
    assert own.latency is not None
    assert row.latency is row.bandwidth is row.quality is None


def test_prompts_are_new_each_time_and_threads_the_same(cache: Path, fake: Peer, tmp_path: Path) -> None:
    _pretend_to_install(fake)
    run("storyteller", settings=replace(SMALL, threads=(1,), sample_seconds=0.0), peers=_prepare([fake]))
    log = _log(tmp_path)
    assert log[0] == ["load", "fast", 1]
    prompts = [line[2] for line in log if line[0] == "prefill"]
    assert [len(prompt) for prompt in prompts if isinstance(prompt, list)] == [16] * 4  # a warm-up and 3 repetitions
    assert len({str(prompt) for prompt in prompts}) == 4
    tokens = [token for prompt in prompts if isinstance(prompt, list) for token in prompt]
    assert min(tokens) >= 0
    assert 1000 < max(tokens) < 8192
    batches = [line[2] for line in log if line[0] == "decode"]
    pair = next(batch for batch in batches if isinstance(batch, list) and len(batch) == 2)
    assert pair[0] != pair[1]
    depths = {len(batch[0]) for batch in batches if isinstance(batch, list)}
    assert depths == {1, 32}


def test_a_run_that_stops_early_is_void_and_gives_no_ratio(cache: Path, fake: Peer) -> None:
    short = replace(fake, variants=("short",))
    _pretend_to_install(short)
    report = run("storyteller", settings=replace(SMALL, threads=(1,)), peers=_prepare([short]))
    row = _row(report, "Fake short")
    assert row.speed("pp16") is not None
    assert row.speed("tg8") is None
    assert row.speeds["tg8"].error == "ValueError: void: it computed 7 tokens in place of 8"
    assert row.speeds["tg8 b2"].error == "ValueError: void: it computed 15 tokens in place of 16"
    assert any("Fake short" in remark and "void" in remark for remark in remarks(report))
    assert not any("(tg" in sentence and "peer" in sentence for sentence in summary_sentences(report))
    cells = next(cells for cells in sheets_of(report)[0].rows if cells[0] == "Fake short")
    assert "error" in cells


def test_what_is_not_available_is_a_row_that_says_why(cache: Path, fake: Peer, tmp_path: Path) -> None:
    mixed = replace(fake, variants=("broken", "dying", "Q4_0"))
    absent = replace(fake, name="absent", title="Absent", variants=("one", "two"))
    _pretend_to_install(mixed)
    models = _prepare([mixed, absent], agreed=False)
    report = run("storyteller", settings=replace(SMALL, threads=(1,)), peers=models)
    assert [variant.name for variant in report.variants] == [
        *("storyteller", "Fake broken", "Fake dying", "Fake Q4_0", "Absent one", "Absent two")
    ]
    assert _row(report, "Fake broken").error == "cannot be converted: ValueError: no such form"
    log = cache / "peers" / installation.environment_of(mixed).name / "output.log"
    assert _row(report, "Fake dying").error == f"its process ended with status 3; what it printed is in {log}"
    assert "a library says hello" in log.read_text()
    assert _row(report, "Absent two").error == "Absent is not installed: --yes installs it"
    assert _row(report, "Fake Q4_0").error is None
    assert [variant.precision for variant in report.variants] == ["int8", None, None, "int4", None, None]
    assert [cells[0] for cells in sheets_of(report)[0].rows] == [variant.name for variant in report.variants]
    assert not list((cache / "peer-models").rglob("*broken*"))


def test_a_conversion_is_kept_until_the_checkpoint_changes(cache: Path, fake: Peer, tmp_path: Path) -> None:
    _pretend_to_install(fake)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    first = _prepare([fake], folder)[0].folder
    assert first is not None
    written_ns = (first / "model.bin").stat().st_mtime_ns
    assert _prepare([fake], folder)[0].folder == first
    assert (first / "model.bin").stat().st_mtime_ns == written_ns
    changed = json.loads((folder / "config.json").read_text()) | {"layer_norm_epsilon": 1e-6}
    (folder / "config.json").write_text(json.dumps(changed))
    second = _prepare([fake], folder)[0].folder
    assert second is not None
    assert second != first
    newer = replace(fake, requirements=("fake-package>=2",))
    _pretend_to_install(newer)
    assert _prepare([newer], folder)[0].folder not in (first, second)


def test_it_installs_only_what_is_missing_and_agreed_to(
    cache: Path, fake: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(fake, name="other", title="Other")
    _pretend_to_install(other)
    commands = [[sys.executable, "-c", "print('installing')"]]
    monkeypatch.setattr(installation, "_commands", lambda peer: commands)
    asked: list[list[str]] = []

    def prepare(agreed: bool) -> list[PeerModel]:
        def may_install(missing: Sequence[Peer]) -> bool:
            asked.append([peer.name for peer in missing])
            return agreed

        return prepare_peers([fake, other], read_checkpoint(CHECKPOINT), may_install, lambda stage: None)

    assert [model.error is None for model in prepare(agreed=False)] == [False, True]
    assert not installation.environment_of(fake).exists()
    assert [model.error is None for model in prepare(agreed=True)] == [True, True]
    assert (installation.environment_of(fake) / "install.log").read_text().strip() == "installing"
    prepare(agreed=False)
    assert asked == [["fake"], ["fake"]]  # and not asked a third time


def test_an_installation_that_fails_says_why_and_is_begun_again(
    cache: Path, fake: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys; print('Collecting x'); sys.exit('ERROR: No matching distribution found for fake-package')"
    monkeypatch.setattr(installation, "_commands", lambda peer: [[sys.executable, "-c", program]])
    error = _prepare([fake])[0].error
    assert error is not None
    assert error.startswith("Fake cannot be installed: ERROR: No matching distribution found for fake-package; see ")
    assert not installation.is_installed(fake)
    monkeypatch.setattr(installation, "_commands", lambda peer: [[sys.executable, "-c", "pass"]])
    assert _prepare([fake])[0].error is None


def test_torch_is_pinned_wherever_it_is_needed(cache: Path) -> None:
    for peer in PEERS:
        environment, *commands = installation._commands(peer)
        assert environment[1:3] == ["-m", "venv"]
        installs = [command for command in commands if "install" in command and "--no-deps" not in command]
        if peer.needs_torch:
            assert commands[0][1].endswith("install_torch.py")
            assert Path(commands[0][1]).is_file()
            assert all("torch==2.13.0" in command for command in installs)
        else:
            assert not any(word.startswith("torch") for command in commands for word in command)


def test_llama_cpp_is_built_for_the_instructions_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(catalog, "describe_processor", lambda: ("a laptop", ["avx2", "fma", "f16c", "amx_int8"]))
    arguments = catalog.build_options()["CMAKE_ARGS"].split()
    assert arguments == [*("-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_BMI2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON")]
    monkeypatch.setattr(catalog.platform, "machine", lambda: "aarch64")
    assert catalog.build_options() == {}


def test_scripts_of_peers_import_nothing_of_gpt2_edge() -> None:
    folder = Path(catalog.__file__).parent
    scripts = [folder / "peer_process.py", *(peer.script_path for peer in PEERS)]
    assert len(scripts) == 6
    for script in scripts:
        tree = ast.parse(script.read_text(encoding="utf-8"))
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert imported
        assert not any(name.startswith(("gpt2_edge", ".")) for name in imported), script
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert script.name == "peer_process.py" or {"convert", "Model"} <= names


def test_folders_of_another_checkpoint_are_refused(
    cache: Path, fake: Peer, tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    _pretend_to_install(fake)
    other = write_checkpoint(tmp_path / "other")
    with pytest.raises(OptionError, match=r"was not exported from the checkpoint .*other: give the checkpoint"):
        run("storyteller", settings=SMALL, peers=_prepare([fake], other))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "torch"], "--peers needs --checkpoint FOLDER"),
        (["--checkpoint", str(CHECKPOINT)], "give --peers as well"),
        (["--yes"], "give --peers as well"),
        (
            ["--peers", "torch,gguf", "--checkpoint", str(CHECKPOINT)],
            "'gguf' is no peer: choose from ctranslate2, llama.cpp, openvino, optimum, torch",
        ),
        (["--peers", "torch", "--checkpoint", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert main(["bench", *arguments]) != 0
    assert message in capsys.readouterr().err


def test_the_command_says_what_it_would_install_and_does_not_without_a_yes(
    cache: Path, fake: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(options, "peers_named", lambda names: [fake])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    output = tmp_path / "report.json"
    settings = ["-p", "8", "-n", "2", "-d", "0", "-b", "1", "-r", "1", "--quality-tokens", "0", "--sample-seconds", "0"]
    peers = ["--peers", "fake", "--checkpoint", str(CHECKPOINT)]
    status = main(["bench", *settings, *peers, "--format", "json", "-o", str(output)])
    assert status == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "pip would install fake-package>=1 into a virtual environment of its own, " in said
    assert str(installation.environment_of(fake)) in said
    assert "about 12 MB" in said
    row = _row(Report.from_json(output.read_text()), "Fake fast")
    assert row.error == "Fake is not installed: --yes installs it"
    assert not (cache / "peers").exists()


def _measured(name: str, decode: float, prefill: float, spread: float, peer: str | None) -> Variant:
    def speed(mean: float, **lengths: int) -> Speed:
        samples = measurement([mean * (1 - spread), mean, mean * (1 + spread)])
        return Speed(**({"n_prompt": 0, "n_gen": 0, "n_depth": 0, "batch": 1} | lengths), tokens_per_second=samples)

    speeds = {"pp512": speed(prefill, n_prompt=512), "tg128": speed(decode, n_gen=128)}
    return Variant(name=name, folder=name, threads=2, load_seconds=1.0, size_bytes=10**6, speeds=speeds, peer=peer)


def _peer_sentence(*variants: Variant) -> str:
    report = Report(created_at="", command=(), settings={}, environment={}, variants=variants)
    return summary_sentences(report)[-1]


def test_the_summary_names_the_fastest_peer_and_claims_only_what_the_spread_supports() -> None:
    own = _measured("mine", 200, 1000, 0.01, None)
    slow, fast = _measured("slow", 50, 2000, 0.01, "Slow 1"), _measured("fast", 100, 500, 0.01, "Fast 1")
    assert _peer_sentence(own, slow, fast) == (
        "mine decodes 2.0 x as fast as the fastest peer, fast (tg128) and reads prompts 0.50 x as fast as the fastest "
        "peer, slow (pp512)."
    )
    near = _measured("near", 195, 2000, 0.03, "Near 1")
    assert "decodes not faster or slower than the fastest peer, near, beyond the spread (tg128)" in _peer_sentence(
        own, near, slow
    )
    failed = replace(fast, error="it failed")
    assert "fast" not in _peer_sentence(own, slow, failed).replace("as fast as", "").replace("fastest", "")
    alike = [replace(each, precision="int8") for each in (own, slow)]
    assert "2.0 x" not in _peer_sentence(*alike, replace(fast, precision="int4"))
    assert "decodes 4.0 x as fast as the fastest int8 peer, slow (tg128)" in _peer_sentence(*alike, fast)
    with_other_threads = replace(fast, threads=1)
    assert "peer, slow (tg128)" in _peer_sentence(own, slow, with_other_threads)


def test_cache_folders_are_those_of_gpt2_edge() -> None:
    assert gpt2_edge.known_hashes.memory_path().parent == gpt2_edge.known_hashes.cache_folder()
