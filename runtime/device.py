"""Which device computes: what was asked for, what there is, and why.

"cuda" is strict: it computes on the GPU or fails. "auto" may take the CPU, and says why.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gpt2_edge.cuda_installation import CudaInstallation, cuda_problems, inspect_cuda
from gpt2_edge.errors import DeviceError, OptionError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.session import StepSession
from gpt2_edge.session_protocol import ModelSession
from gpt2_edge.standard_session import StandardStepSession

_CUDA: Final = re.compile(r"cuda(?::(\d{1,3}))?")


@dataclass(frozen=True, slots=True)
class Device:
    """Where a model runs.

    Attributes:
        name: "cpu", or "cuda:0", "cuda:1", ...
        reason: Why it runs there.
    """

    name: str
    reason: str


def open_session(
    folder: ModelFolder,
    device: str,
    threads: int,
    *,
    inspect: Callable[[], CudaInstallation] = inspect_cuda,
) -> tuple[ModelSession, Device]:
    """Open a session on the device that was asked for.

    Args:
        folder: An opened model folder.
        device: "cpu", "cuda", "cuda:1" or "auto".
        threads: Threads that compute, on the CPU.
        inspect: Finds out what of CUDA can be used.

    Raises:
        OptionError: There is no such device.
        DeviceError: The GPU cannot be used, or the device cannot run this folder.
        ModelFolderError: ONNX Runtime cannot load the graph, or it is not a graph that this release drives.
    """
    gpu = parse_device(device)
    if gpu is None and device == "cpu":
        _check_cpu(folder, "")
        return _cpu_session(folder, threads), Device("cpu", "it was asked for")
    obstacle = why_not_cuda(folder, gpu or 0, inspect)
    if obstacle is None:
        from gpt2_edge.cuda_session import CudaSession  # here, because only machines with a GPU need it

        name = f"cuda:{gpu or 0}"
        try:
            return CudaSession(folder, "cuda", gpu or 0), Device(
                name, "it was asked for" if gpu is not None else "there is a GPU that runs it"
            )
        except DeviceError as error:
            obstacle = str(error)
    if gpu is not None:
        raise DeviceError(f"device {device!r} cannot be used: {obstacle}")
    _check_cpu(folder, obstacle)
    return _cpu_session(folder, threads), Device("cpu", obstacle)


def parse_device(device: object) -> int | None:
    """Return the number of the GPU that a device names, or None for "cpu" and "auto".

    Raises:
        OptionError: It is no device.
    """
    if device in ("cpu", "auto"):
        return None
    match = _CUDA.fullmatch(device) if isinstance(device, str) else None
    if match is None:
        raise OptionError(f"device is {device!r}: give 'cpu', 'cuda', 'cuda:1' (the second GPU) or 'auto'")
    return int(match[1] or 0)


def why_not_cuda(
    folder: ModelFolder, gpu: int = 0, inspect: Callable[[], CudaInstallation] = inspect_cuda
) -> str | None:
    """Return why a folder cannot run on a GPU of this machine and how to change that, or None if it can."""
    manifest = folder.manifest
    if manifest.precision not in ("fp32", "fp16"):
        return (
            f"{folder.path} is {manifest.precision}, which runs on the CPU only: its attention works in fp32, for "
            "which the fused operator has no CUDA kernel, and would be copied to the CPU and back in every layer; "
            "export the checkpoint with --precision fp16 for a GPU"
        )
    if manifest.flavour != "fused":
        return f"{folder.path} is of the {manifest.flavour} flavour, which runs on the CPU only: export the checkpoint"
    if manifest.precision == "fp32" and "decoder_cuda" not in manifest.graphs:
        return (
            f"{folder.path} was exported without a graph for GPUs: export the checkpoint again, best with "
            "--precision fp16"
        )
    problems = cuda_problems(inspect(), gpu)
    return f"{problems[0].what}: {problems[0].remedy}" if problems else None


def _cpu_session(folder: ModelFolder, threads: int) -> ModelSession:
    return (StandardStepSession if folder.manifest.flavour == "standard" else StepSession)(folder, threads)


def _check_cpu(folder: ModelFolder, obstacle: str) -> None:
    """Refuse half precision, of which a CPU has next to no kernels: it would convert all weights in every step."""
    if folder.manifest.precision == "fp16":
        because = f", and no GPU can be used: {obstacle}" if obstacle else ""
        raise DeviceError(
            f"{folder.path} is fp16, which is for NVIDIA GPUs: on the CPU fp32 or int8 are faster and more exact"
            f"{because}; for the CPU, export the checkpoint with --precision fp32, then gpt2-edge quantize"
        )
