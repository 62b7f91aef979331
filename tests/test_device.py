"""Which device is chosen and why, and what is refused with which remedy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

import gpt2_edge
from gpt2_edge import cuda_session, device
from gpt2_edge.cuda_installation import CUDA_PROVIDER, CudaInstallation, Gpu, cuda_problems, inspect_cuda
from gpt2_edge.cuda_session import CudaSession, check_placement
from gpt2_edge.device import Device, open_session, parse_device, why_not_cuda
from gpt2_edge.errors import DeviceError, OptionError
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import ModelFolder, open_folder
from gpt2_edge.session import StepSession

LIBRARIES: Final = ("libcudart.so.13", "libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudnn.so.9")
HEALTHY: Final = CudaInstallation(
    has_gpu_wheels=True,
    packages={"onnxruntime-gpu": "1.31.1"},
    onnxruntime="1.31.1",
    import_error="",
    providers=(CUDA_PROVIDER, "CPUExecutionProvider"),
    cuda_major=13,
    libraries={name: f"/somewhere/{name}" for name in LIBRARIES},
    other_cuda_majors=(),
    driver_found=True,
    driver_cuda=(13, 0),
    gpus=(Gpu(0, "GPU A", "9.0", 80_000_000_000), Gpu(1, "GPU B", "8.9", 24_000_000_000)),
)
CPU_WHEEL: Final = replace(
    HEALTHY, packages={"onnxruntime": "1.31.1"}, providers=("CPUExecutionProvider",), cuda_major=0, libraries={}
)


@pytest.mark.parametrize(
    ("found", "gpu", "what", "remedy"),
    [
        pytest.param(
            replace(HEALTHY, packages={"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}),
            0,
            "onnxruntime and onnxruntime-gpu are installed together",
            'pip uninstall -y onnxruntime onnxruntime-gpu && pip install "onnxruntime-gpu[cuda,cudnn]>=1.31"',
            id="both wheels",
        ),
        pytest.param(
            CPU_WHEEL,
            0,
            "onnxruntime 1.31.1 was built without CUDA",
            'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]>=1.31"',
            id="the CPU's wheel",
        ),
        pytest.param(
            replace(HEALTHY, packages={}, onnxruntime="", import_error="ONNX Runtime is not installed", providers=()),
            0,
            "ONNX Runtime is not installed",
            'pip install "onnxruntime-gpu[cuda,cudnn]>=1.31"',
            id="no wheel",
        ),
        pytest.param(
            replace(HEALTHY, onnxruntime="1.22.0"),
            0,
            "onnxruntime-gpu is 1.22.0, a GPU needs 1.31 or newer",
            'pip install --upgrade "onnxruntime-gpu[cuda,cudnn]>=1.31"',
            id="an old wheel",
        ),
        pytest.param(
            replace(HEALTHY, driver_found=False, driver_cuda=(0, 0), gpus=()),
            0,
            "NVIDIA's driver is not installed",
            "driver 580 or newer",
            id="no driver",
        ),
        pytest.param(
            replace(HEALTHY, driver_cuda=(12, 4)),
            0,
            "the driver is too old: it runs CUDA up to 12.4, onnxruntime-gpu 1.31.1 was built for CUDA 13",
            "driver 580 or newer",
            id="an old driver",
        ),
        pytest.param(
            replace(HEALTHY, cuda_major=12, driver_cuda=(11, 8)), 0, "up to 11.8", "driver 525 or newer", id="CUDA 12"
        ),
        pytest.param(replace(HEALTHY, gpus=()), 0, "finds no GPU", "CUDA_VISIBLE_DEVICES", id="no GPU"),
        pytest.param(
            replace(CPU_WHEEL, has_gpu_wheels=False),
            0,
            "there is no onnxruntime-gpu for this system",
            'device="cpu"',
            id="a system without wheels for GPUs",
        ),
        pytest.param(
            replace(HEALTHY, gpus=(Gpu(0, "GPU C", "7.0", 16_000_000_000),)),
            0,
            "cuda:0 GPU C has compute capability 7.0, onnxruntime-gpu 1.31.1 for CUDA 13 needs 7.5 or newer",
            'device="cpu"',
            id="an old GPU",
        ),
        pytest.param(HEALTHY, 2, "no GPU cuda:2", "choose one of cuda:0 GPU A, cuda:1 GPU B", id="not that many GPUs"),
        pytest.param(
            replace(HEALTHY, libraries={**HEALTHY.libraries, "libcudnn.so.9": None}),
            0,
            "cuDNN 9, and libcudnn.so.9 is missing",
            'pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"',
            id="no cuDNN",
        ),
        pytest.param(
            replace(HEALTHY, libraries=dict.fromkeys(LIBRARIES), other_cuda_majors=(12,)),
            0,
            "libcudart.so.13, libcublasLt.so.13, libcublas.so.13, libcurand.so.10, libcudnn.so.9 are missing; "
            "CUDA 12 is installed, which does not do",
            'pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"',
            id="another CUDA",
        ),
    ],
)
def test_every_obstacle_is_named_with_what_mends_it(found: CudaInstallation, gpu: int, what: str, remedy: str) -> None:
    problems = cuda_problems(found, gpu)
    assert what in problems[0].what
    assert remedy in problems[0].remedy


def test_a_healthy_installation_has_no_problem() -> None:
    assert cuda_problems(HEALTHY, 0) == cuda_problems(HEALTHY, 1) == []


def test_one_missing_driver_does_not_hide_missing_libraries() -> None:
    found = replace(HEALTHY, driver_found=False, libraries=dict.fromkeys(LIBRARIES))
    assert [problem.what.split()[0] for problem in cuda_problems(found)] == ["NVIDIA's", "onnxruntime-gpu"]


def test_looking_at_this_machine_finds_the_wheel_that_is_imported() -> None:
    import onnxruntime

    found = inspect_cuda(thoroughly=True)
    assert found.onnxruntime == onnxruntime.__version__
    assert found.providers == tuple(onnxruntime.get_available_providers())
    assert onnxruntime.__version__ in found.packages.values()
    assert found.import_error == ""
    assert all(gpu.memory_bytes > 0 for gpu in found.gpus)


@pytest.mark.parametrize(
    ("text", "gpu"), [("cpu", None), ("auto", None), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("cuda:17", 17)]
)
def test_names_of_devices(text: str, gpu: int | None) -> None:
    assert parse_device(text) == gpu


@pytest.mark.parametrize("text", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cuda:1 ", "", None, 0, ["cuda"]])
def test_what_is_no_device_is_refused(text: Any) -> None:
    with pytest.raises(OptionError, match=r"device is .*: give 'cpu', 'cuda', 'cuda:1' .* or 'auto'"):
        parse_device(text)


@pytest.fixture(scope="module")
def fp16_folder(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> ModelFolder:
    place = tmp_path_factory.mktemp("half")
    export_checkpoint(write_checkpoint(place / "checkpoint"), place / "model", precision="fp16")
    return open_folder(place / "model")


@pytest.fixture
def gpu_session(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Let a GPU session be made of nothing, and return what each was made with."""
    made: list[tuple[Any, ...]] = []

    def make(*arguments: Any) -> Any:
        made.append(arguments)
        return SimpleNamespace()

    monkeypatch.setattr(cuda_session, "CudaSession", make)
    return made


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [("cuda", "cuda:0", "it was asked for"), ("cuda:1", "cuda:1", "it was asked for"), ("auto", "cuda:0", "there is")],
)
def test_a_gpu_is_taken_where_there_is_one(
    fp16_folder: ModelFolder, gpu_session: list[tuple[Any, ...]], text: str, name: str, reason: str
) -> None:
    _, chosen = open_session(fp16_folder, text, 1, inspect=lambda: HEALTHY)
    assert chosen.name == name
    assert chosen.reason.startswith(reason)
    assert gpu_session == [(fp16_folder, "cuda", int(name[-1]))]


def test_auto_takes_the_cpu_and_says_why(storyteller_fp32: Path) -> None:
    session, chosen = open_session(open_folder(storyteller_fp32), "auto", 1, inspect=lambda: CPU_WHEEL)
    assert isinstance(session, StepSession)
    assert chosen.name == "cpu"
    assert chosen.reason.startswith("onnxruntime 1.31.1 was built without CUDA: pip uninstall -y onnxruntime")


def test_auto_takes_the_cpu_if_the_gpu_fails_after_all(storyteller_fp32: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise DeviceError("no memory")

    monkeypatch.setattr(cuda_session, "CudaSession", fail)
    folder = open_folder(storyteller_fp32)
    assert open_session(folder, "auto", 1, inspect=lambda: HEALTHY)[1] == Device("cpu", "no memory")
    with pytest.raises(DeviceError, match="device 'cuda' cannot be used: no memory"):
        open_session(folder, "cuda", 1, inspect=lambda: HEALTHY)


def test_cuda_never_falls_back(storyteller_fp32: Path) -> None:
    with pytest.raises(
        DeviceError, match=r"device 'cuda:1' cannot be used: onnxruntime 1\.31\.1 was built without CUDA"
    ):
        open_session(open_folder(storyteller_fp32), "cuda:1", 1, inspect=lambda: CPU_WHEEL)


def test_int8_is_refused_on_a_gpu_before_anything_is_looked_at() -> None:
    folder = open_folder("storyteller")
    reason = why_not_cuda(folder, 0, inspect=lambda: pytest.fail("the installation does not matter"))
    assert reason is not None
    assert "is int8, which runs on the CPU only" in reason
    assert "--precision fp16" in reason


def test_an_fp32_folder_without_a_graph_for_gpus_is_refused(storyteller_fp32: Path) -> None:
    opened = open_folder(storyteller_fp32)
    graphs = {"decoder": opened.manifest.graphs["decoder"]}
    older = SimpleNamespace(path=opened.path, manifest=replace(opened.manifest, graphs=graphs))
    assert "exported without a graph for GPUs" in str(why_not_cuda(older, 0, inspect=lambda: HEALTHY))  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "because"), [("cpu", False), ("auto", True)])
def test_fp16_is_refused_on_the_cpu(fp16_folder: ModelFolder, text: str, because: bool) -> None:
    with pytest.raises(DeviceError, match="is fp16, which is for NVIDIA GPUs") as raised:
        open_session(fp16_folder, text, 1, inspect=lambda: CPU_WHEEL)
    assert ("no GPU can be used: onnxruntime 1.31.1 was built without CUDA" in str(raised.value)) == because


def test_a_loaded_model_says_where_it_runs_and_why() -> None:
    with gpt2_edge.load("storyteller", device="cpu") as model:
        assert (model.device, model.device_reason) == ("cpu", "it was asked for")
    with gpt2_edge.load("storyteller") as model:
        assert model.device == "cpu"
        assert "is int8, which runs on the CPU only" in model.device_reason


def placed(providers: list[str], **nodes: list[str]) -> Any:
    parts = [
        SimpleNamespace(
            ep_name=provider,
            get_nodes=lambda operators=operators: [SimpleNamespace(op_type=name, name="") for name in operators],
        )
        for provider, operators in nodes.items()
    ]
    return SimpleNamespace(get_providers=lambda: providers, get_provider_graph_assignment_info=lambda: parts)


def test_nodes_elsewhere_are_refused_by_name() -> None:
    session = placed(
        [CUDA_PROVIDER, "CPUExecutionProvider"],
        CUDAExecutionProvider=["MatMul"] * 9,
        CPUExecutionProvider=["GroupQueryAttention"] * 4,
    )
    with pytest.raises(DeviceError, match=r"^4 operators have no kernel in CUDA.*\(GroupQueryAttention, .*, \.\.\.\)"):
        check_placement(session, CUDA_PROVIDER)


def test_a_provider_that_was_dropped_is_an_error() -> None:
    with pytest.raises(DeviceError, match=r"could not start its CUDAExecutionProvider .* gpt2-edge doctor"):
        check_placement(placed(["CPUExecutionProvider"], CPUExecutionProvider=["MatMul"]), CUDA_PROVIDER)


def test_a_session_that_is_wholly_on_its_device_is_taken() -> None:
    check_placement(placed([CUDA_PROVIDER], CUDAExecutionProvider=["MatMul", "Add"]), CUDA_PROVIDER)


def test_the_placement_that_onnxruntime_reports_is_read(storyteller_fp32: Path) -> None:
    session = CudaSession(open_folder(storyteller_fp32), "cpu")
    with pytest.raises(DeviceError, match="operators have no kernel in Elsewhere"):
        check_placement(
            SimpleNamespace(
                get_providers=lambda: ["Elsewhere"],
                get_provider_graph_assignment_info=session._session.get_provider_graph_assignment_info,
            ),
            "Elsewhere",
        )
    session.close()


def test_nothing_for_gpus_is_imported_on_the_cpu() -> None:
    assert "CudaSession" not in vars(device)
