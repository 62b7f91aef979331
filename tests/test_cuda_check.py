"""The script that checks a GPU machine, tried on the CPU, and the graphs that it carries."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from gpt2_edge.benchmarks import cuda_check, cuda_graphs
from gpt2_edge.benchmarks.cuda_check import run_apart
from gpt2_edge.benchmarks.cuda_checks import CHECKS, Plan, Result, collect
from gpt2_edge.benchmarks.cuda_graphs import KITS, fill, storyteller_weights, write_kit
from gpt2_edge.export import export_checkpoint

REPOSITORY: Final = Path(__file__).resolve().parent.parent
SCRIPT: Final = REPOSITORY / "benchmarks" / "cuda_check.py"


def test_it_runs_from_the_repository_alone(tmp_path: Path) -> None:
    """With nothing importable but numpy, onnxruntime and tokenizers, in a process of its own."""
    # A package that is found raises, so the script must do without; gpt2_edge is taken from the repository's folders.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'onnx_ir', 'onnxscript', 'safetensors', 'transformers'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--json", str(tmp_path / "results.json")],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads((tmp_path / "results.json").read_text())
    results = {result["name"]: result for result in document["results"]}
    checks = [result for result in results.values() if result["passed"] is not None]
    assert document["state"] == "finished"
    assert len(checks) == 21
    assert all(result["passed"] for result in checks)
    assert results["fp32: greedy tokens as on the CPU, in a batch"]["value"] == "8 of 8"
    # Goals are for a GPU and the whole models: a quick run judges none, whatever it measures.
    assert results["decode, greedy, batch 64, tokens/s"]["passed"] is None
    assert results["decode, greedy, batch 64, without CUDA graphs, tokens/s"]["goal"] == ""
    assert results["XL decode: bytes of weights a second over bandwidth"]["goal"] == "at least 60%"
    beside_transformers = results["decode, greedy, batch 1, over that of transformers"]
    assert beside_transformers["value"] == "torch and transformers are not installed"
    assert {"python", "onnxruntime", "gpu", "driver", "numpy", "tokenizers"} <= set(document["machine"])


def test_asked_for_a_gpu_it_fails_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    assert cuda_check.main(["--quick", "--json", str(tmp_path / "results.json")]) == 1
    captured = capsys.readouterr()
    assert "nothing else can run before this does" in captured.err
    (result,) = json.loads((tmp_path / "results.json").read_text())["results"]
    assert "CUDAExecutionProvider" in result["value"]
    assert result["passed"] is False


def test_it_is_compared_with_transformers_where_there_is_one(tmp_path: Path) -> None:
    theirs, ratio = collect(CHECKS["transformers"], Plan("cpu", 0, True, tmp_path))
    assert float(theirs.value.replace(",", "")) > 0
    assert float(ratio.value) > 0
    assert ratio.passed is None


def test_what_a_check_raises_is_a_line_after_those_that_it_had(tmp_path: Path) -> None:
    def check_something(plan: Plan) -> Iterator[Result]:
        yield Result("first", "1", "", None)
        raise ArithmeticError("no more")

    plan = Plan("cpu", 0, True, tmp_path)
    assert list(collect(check_something, plan)) == [
        Result("first", "1", "", None),
        Result("check_something ended early", "ArithmeticError: no more", "to run", False),
    ]


FIRST_LINE: Final = "import json,sys; print(json.dumps({'name':'a','value':'1','goal':'','passed':None}),flush=True)"


@pytest.mark.parametrize(
    ("rest", "value"),
    [
        ("", None),
        ("sys.exit(3)", "ended with status 3"),
        ("import os,signal; os.kill(os.getpid(),signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import time; time.sleep(60)", "took more than 2 s"),
    ],
)
def test_a_check_that_crashes_or_hangs_is_a_line_too(
    rest: str, value: str | None, capfd: pytest.CaptureFixture[str]
) -> None:
    started_at = time.monotonic()
    results = list(run_apart("it", [sys.executable, "-c", f"{FIRST_LINE}; print('5 and other things'); {rest}"], 2))
    assert time.monotonic() - started_at < 15
    assert results[0] == Result("a", "1", "", None)
    assert results[1:] == ([] if value is None else [Result("it ended early", value, "to run", False)])
    if value is None:
        assert capfd.readouterr().err == "5 and other things\n"


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_was_found_is_kept_when_it_is_interrupted(sent: signal.Signals, status: int, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--json", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while not file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(sent)
        assert process.wait(60) == status
    document = json.loads(file.read_text())
    assert document["state"] == "interrupted"
    assert document["results"]
    assert list(tmp_path.iterdir()) == [file]


def described(graph: Path) -> tuple[Any, ...]:
    model = onnx_ir.load(graph)
    nodes = [
        (
            node.domain,
            node.op_type,
            [value and value.name for value in node.inputs],
            sorted(map(str, node.attributes.values())),
        )
        for node in model.graph
    ]
    ends = [(value.name, str(value.dtype), str(value.shape)) for value in (*model.graph.inputs, *model.graph.outputs)]
    return model.opset_imports, nodes, ends


def test_the_carried_graphs_of_the_storyteller_are_those_that_export_makes(
    storyteller_fp32: Path, tmp_path: Path
) -> None:
    single = fill("storyteller-fp32", tmp_path / "single", storyteller_weights())
    for name in ("model.onnx", "model_cuda.onnx"):
        assert described(single / name) == described(storyteller_fp32 / name), (
            f"{name} differs: run python -m gpt2_edge.benchmarks.cuda_graphs write"
        )
    export_checkpoint(cuda_graphs.STORYTELLER, tmp_path / "exported", precision="fp16")
    half = fill("storyteller-fp16", tmp_path / "half", storyteller_weights())
    assert described(half / "model.onnx") == described(tmp_path / "exported" / "model.onnx")
    theirs, ours = (onnx_ir.load(path / "model.onnx").graph.initializers for path in (tmp_path / "exported", half))
    for name, value in theirs.items():
        assert value.const_value is not None
        other = ours[name].const_value
        assert other is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.numpy(), err_msg=name)


def test_a_kit_is_written_as_it_is_carried(tmp_path: Path) -> None:
    write_kit("tiny-fp16", tmp_path / "tiny-fp16")
    carried = cuda_graphs.GRAPHS / "tiny-fp16"
    assert (tmp_path / "tiny-fp16" / "layout.json").read_bytes() == (carried / "layout.json").read_bytes()
    written, kept = (
        onnx.load(path / "model.onnx", load_external_data=False) for path in (tmp_path / "tiny-fp16", carried)
    )
    assert Counter(node.op_type for node in written.graph.node) == Counter(node.op_type for node in kept.graph.node)


@pytest.mark.parametrize(("name", "parameters"), [("gpt2-fp16", 124_439_808), ("gpt2-xl-fp16", 1_557_611_200)])
def test_the_models_that_are_timed_have_their_published_sizes(name: str, parameters: int) -> None:
    layout = json.loads((cuda_graphs.GRAPHS / name / "layout.json").read_text())
    assert sum(int(np.prod(tensor["shape"])) for tensor in layout["tensors"]) == parameters
    model = onnx.load(cuda_graphs.GRAPHS / name / "model.onnx", load_external_data=False)
    counts = Counter(node.op_type for node in model.graph.node)
    assert counts["GroupQueryAttention"] == KITS[name].layers
    assert counts["SkipLayerNormalization"] == 2 * KITS[name].layers + 1
    offsets = {
        tensor.name: int(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "offset"
    }
    assert offsets == {tensor["name"]: tensor["offset"] for tensor in layout["tensors"]}
