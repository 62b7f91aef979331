"""What `gpt2-edge doctor` finds, from made-up installations and on this machine."""

import json
from dataclasses import replace
from typing import Any, Final

import pytest

from gpt2_edge import cli, doctor
from gpt2_edge.commands import doctor as command
from gpt2_edge.cuda_installation import CUDA_PROVIDER, CudaInstallation, Gpu, Problem
from gpt2_edge.doctor import Examination, Host, report

HOST: Final = Host(16_000_000_000, "disabled", None, ())
CPU_ONLY: Final = CudaInstallation(
    has_gpu_wheels=True,
    packages={"onnxruntime": "1.31.1"},
    onnxruntime="1.31.1",
    import_error="",
    providers=("CPUExecutionProvider",),
    cuda_major=0,
    libraries={},
    other_cuda_majors=(),
    driver_found=False,
    driver_cuda=(0, 0),
    gpus=(),
)
GPU: Final = Gpu(0, "GPU A", "9.0", 80_000_000_000)
WITH_GPU: Final = replace(
    CPU_ONLY,
    packages={"onnxruntime-gpu": "1.31.1"},
    providers=(CUDA_PROVIDER, "CPUExecutionProvider"),
    cuda_major=13,
    libraries={"libcudart.so.13": "/somewhere/libcudart.so.13", "libcudnn.so.9": None},
    driver_found=True,
    driver_cuda=(13, 1),
    gpus=(GPU,),
)


def test_a_machine_without_a_gpu_is_healthy() -> None:
    found = report(CPU_ONLY, HOST)
    assert (found.problems, found.facts["gpu"], found.facts["driver"]) == ([], "none", "none")
    assert found.facts["onnxruntime"] == "onnxruntime 1.31.1"
    assert found.facts["free memory"] == "16.0 GB"


def test_what_there_is_of_cuda_is_said_with_its_place() -> None:
    host = replace(HOST, driver_version="580.65.06", free_gpu_memory_bytes=(70_000_000_000,))
    facts = report(WITH_GPU, host).facts
    assert facts["gpu"] == "cuda:0 GPU A, compute capability 9.0, 70.0 GB free of 80.0 GB"
    assert facts["driver"] == "580.65.06, runs CUDA up to 13.1"
    assert facts["cuda"] == "onnxruntime-gpu was built for CUDA 13"
    assert facts["  libcudart.so.13"] == "/somewhere/libcudart.so.13"
    assert facts["  libcudnn.so.9"] == "not found"


@pytest.mark.parametrize(
    ("cuda", "host", "what", "remedy"),
    [
        pytest.param(
            replace(CPU_ONLY, packages={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}),
            HOST,
            "installed together",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "onnxruntime>=1.22"',
            id="both wheels",
        ),
        pytest.param(
            WITH_GPU,
            HOST,
            "libcudnn.so.9 is missing",
            'pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"',
            id="a library",
        ),
        pytest.param(
            replace(CPU_ONLY, packages={}, import_error="ONNX Runtime is not installed"),
            HOST,
            "ONNX Runtime is not installed",
            'pip install "onnxruntime>=1.22"',
            id="no wheel",
        ),
        pytest.param(
            replace(WITH_GPU, packages={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}),
            HOST,
            "installed together",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "onnxruntime-gpu[cuda,cudnn]>=1.31"',
            id="both wheels beside a GPU",
        ),
        pytest.param(
            CPU_ONLY,
            replace(HOST, telemetry="may be on: onnxruntime was imported before"),
            "telemetry may be on",
            "export ORT_DISABLE_TELEMETRY=1",
            id="telemetry",
        ),
        pytest.param(
            CPU_ONLY, replace(HOST, free_memory_bytes=200_000_000), "only 0.2 GB", "end other programs", id="memory"
        ),
    ],
)
def test_each_problem_comes_with_what_mends_it(cuda: CudaInstallation, host: Host, what: str, remedy: str) -> None:
    (problem,) = report(cuda, host).problems
    assert what in problem.what
    assert problem.remedy == remedy


def test_the_command_that_switches_telemetry_off_is_that_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    (problem,) = report(CPU_ONLY, replace(HOST, telemetry="may be on")).problems
    assert problem.remedy == "setx ORT_DISABLE_TELEMETRY 1"


def test_a_gpu_that_the_installed_wheel_cannot_use_is_a_note_and_no_problem() -> None:
    found = report(replace(CPU_ONLY, driver_found=True, driver_cuda=(13, 0), gpus=(GPU,)), HOST)
    assert found.problems == []
    (note,) = found.notes
    assert note.startswith("models run on the CPU: onnxruntime 1.31.1 was built without CUDA")
    assert note.endswith('pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]>=1.31"')


def test_the_status_says_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    healthy = Examination({"python": "3"}, [], ["a note"])
    monkeypatch.setattr(command, "examine", lambda: healthy)
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out == "python  3\n\nnote: a note\n\nno problems found\n"
    ill = replace(healthy, notes=[], problems=[Problem("something is wrong " * 9, "pip install it")])
    monkeypatch.setattr(command, "examine", lambda: ill)
    assert cli.main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("problem: something is wrong")
    assert lines[-1] == "    pip install it"  # on a line of its own, to be copied
    assert max(map(len, lines)) <= 110


def test_json_has_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ill = Examination({"python": "3"}, [Problem("a", "b")], [])
    monkeypatch.setattr(command, "examine", lambda: ill)
    assert cli.main(["doctor", "--json"]) == 1
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document == {"facts": {"python": "3"}, "problems": [{"what": "a", "remedy": "b"}], "notes": []}


def test_this_machine_can_be_examined() -> None:
    found = doctor.examine()
    assert {"python", "platform", "processor", "cores allowed", "onnxruntime", "telemetry", "gpu"} <= set(found.facts)
    assert all(problem.what and problem.remedy for problem in found.problems)


def test_nvidia_smi_is_read_where_it_is_and_missed_where_it_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setattr(doctor, "_NVIDIA_SMI", (str(program),))
    assert doctor.inspect_host().driver_version is None
    program.write_text("#!/bin/sh\nprintf '580.65.06, 70000\\n580.65.06, 1000\\n'\n")
    program.chmod(0o755)
    host = doctor.inspect_host()
    assert host.driver_version == "580.65.06"
    assert host.free_gpu_memory_bytes == (70000 << 20, 1000 << 20)
