"""What this machine and this installation offer, what is wrong with them, and the command that mends each."""

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from gpt2_edge.cuda_installation import (
    CUDA_PROVIDER,
    CudaInstallation,
    Problem,
    cuda_problems,
    inspect_cuda,
    wheel_problem,
)
from gpt2_edge.free_memory import free_memory_bytes
from gpt2_edge.processor import describe_processor
from gpt2_edge.telemetry import telemetry_state
from gpt2_edge.threads import usable_cores
from gpt2_edge.version import VERSION

_NVIDIA_SMI: Final = ("nvidia-smi", "--query-gpu=driver_version,memory.free", "--format=csv,noheader,nounits")
_LEAST_FREE_MEMORY_BYTES: Final = 500_000_000  # GPT-2 small at INT8, its cache and ONNX Runtime itself
_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found.

    Attributes:
        facts: Names and values, to be shown in this order.
        problems: What should be mended; the installation works without a problem if there is none.
        notes: What stands in nobody's way, but somebody may wonder about.
    """

    facts: Mapping[str, str]
    problems: list[Problem]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Host:
    """The parts of the machine that have nothing to do with a GPU.

    Attributes:
        free_memory_bytes: What programs can still have; None where the system does not tell.
        telemetry: As `telemetry_state` says.
        driver_version: Of NVIDIA's driver, as nvidia-smi says; None if it is not there.
        free_gpu_memory_bytes: Of each GPU, as nvidia-smi says.
    """

    free_memory_bytes: int | None
    telemetry: str
    driver_version: str | None
    free_gpu_memory_bytes: tuple[int, ...]


def examine() -> Examination:
    """Examine this machine and installation; takes a second or two, and loads NVIDIA's libraries if there are any."""
    return report(inspect_cuda(thoroughly=True), inspect_host())


def report(cuda: CudaInstallation, host: Host) -> Examination:
    """Say what was found; the same findings make the same report."""
    processor, instruction_sets = describe_processor()
    facts = {
        "gpt2-edge": VERSION,
        "python": f"{platform.python_version()} at {sys.executable}",
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor or "unknown",
        "instruction sets": " ".join(instruction_sets) or "unknown",
        "cores allowed": f"{usable_cores()} of {os.cpu_count()} logical processors",
        "free memory": "unknown" if host.free_memory_bytes is None else _gigabytes(host.free_memory_bytes),
        "onnxruntime": ", ".join(f"{name} {version}" for name, version in sorted(cuda.packages.items())) or "none",
        "providers": ", ".join(cuda.providers) or "none",
        "telemetry": host.telemetry,
        "gpu": "; ".join(
            f"cuda:{gpu.index} {gpu.name}, compute capability {gpu.compute_capability}, "
            f"{_free_of(host, gpu.index)}{_gigabytes(gpu.memory_bytes)}"
            for gpu in cuda.gpus
        )
        or "none",
        "driver": _describe_driver(cuda, host),
    }
    if CUDA_PROVIDER in cuda.providers:
        facts["cuda"] = f"onnxruntime-gpu was built for CUDA {cuda.cuda_major}"
        facts |= {f"  {name}": path or "not found" for name, path in cuda.libraries.items()}
    problems: list[Problem] = []
    notes: list[str] = []
    broken = wheel_problem(cuda, for_gpu=bool(cuda.gpus))
    obstacles = cuda_problems(cuda)
    if broken is not None:
        problems.append(broken)
    elif CUDA_PROVIDER in cuda.providers:
        problems += obstacles  # somebody installed the wheel for GPUs
    elif cuda.gpus and obstacles:
        notes.append(f"models run on the CPU: {obstacles[0].what}; to use the GPU: {obstacles[0].remedy}")
    if sys.maxsize < 2**32:
        problems.append(Problem("this Python is a 32-bit program", "install a 64-bit Python: https://www.python.org"))
    if "AVX2" not in " ".join(instruction_sets).upper() and platform.machine().lower() in ("x86_64", "amd64"):
        notes.append("this processor has no AVX2, or does not say so: models run, several times slower")
    if not host.telemetry.startswith("disabled"):
        switch_off = "setx ORT_DISABLE_TELEMETRY 1" if sys.platform == "win32" else "export ORT_DISABLE_TELEMETRY=1"
        problems.append(Problem(f"ONNX Runtime's telemetry {host.telemetry}", switch_off))
    if host.free_memory_bytes is not None and host.free_memory_bytes < _LEAST_FREE_MEMORY_BYTES:
        problems.append(
            Problem(
                f"only {_gigabytes(host.free_memory_bytes)} of memory are free; GPT-2 small at INT8 takes about "
                f"{_gigabytes(_LEAST_FREE_MEMORY_BYTES)}",
                "end other programs",
            )
        )
    return Examination(facts, problems, notes)


def inspect_host() -> Host:
    """Look at what does not concern CUDA's libraries."""
    driver_version, free = _ask_nvidia_smi()
    return Host(free_memory_bytes(), telemetry_state(), driver_version, free)


def _describe_driver(cuda: CudaInstallation, host: Host) -> str:
    if not cuda.driver_found:
        return "none"
    version = f"{host.driver_version}, " if host.driver_version else ""
    return f"{version}runs CUDA up to {'.'.join(map(str, cuda.driver_cuda))}"


def _free_of(host: Host, index: int) -> str:
    return (
        f"{_gigabytes(host.free_gpu_memory_bytes[index])} free of " if index < len(host.free_gpu_memory_bytes) else ""
    )


def _ask_nvidia_smi() -> tuple[str | None, tuple[int, ...]]:
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, encoding="utf-8", check=True, timeout=20)
        rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        return (rows[0][0] if rows else None), tuple(int(row[1]) * _MIB for row in rows)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None, ()


def _gigabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
