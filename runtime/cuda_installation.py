"""What of CUDA this process can use: the installed ONNX Runtime, NVIDIA's libraries, the driver and the GPUs.

Looked at from outside, because ONNX Runtime itself only logs what is missing and then computes on the CPU.
"""

import contextlib
import ctypes
import io
import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from gpt2_edge.errors import MissingDependencyError

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
# The first whose node placement, device views and captured graphs this package was made for.
MINIMUM_ONNXRUNTIME: Final = (1, 31)
# What the extras of this package ask for, so that it holds from a clone, too. In double quotes, which every shell
# understands, that of Windows too.
INSTALL_FOR_CUDA: Final = f'pip install "onnxruntime-gpu[cuda,cudnn]>={".".join(map(str, MINIMUM_ONNXRUNTIME))}"'
INSTALL_FOR_CPU: Final = 'pip install "onnxruntime>=1.22"'
_DRIVERS: Final = "https://www.nvidia.com/drivers"
# NVIDIA's table of the driver that each CUDA needs at least, on Linux; Windows has about the same numbers.
_DRIVER_OF_CUDA: Final = {12: "525", 13: "580"}
# The oldest GPUs that onnxruntime-gpu's wheels have kernels for: https://github.com/microsoft/onnxruntime/pull/31992.
_LEAST_CAPABILITY_OF_CUDA: Final = {12: (6, 0), 13: (7, 5)}
_MAJORS: Final = (11, 12, 13, 14)
_WHEELS: Final = (
    *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino", "onnxruntime-qnn"),
    *("onnxruntime-silicon", "onnxruntime-training", "onnxruntime-migraphx", "onnxruntime-rocm"),
)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU, as the driver describes it."""

    index: int
    name: str
    compute_capability: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaInstallation:
    """What was found.

    Attributes:
        has_gpu_wheels: Whether onnxruntime-gpu is made for this system and processor.
        packages: Installed distributions of ONNX Runtime and their versions.
        onnxruntime: Version of the one that is imported; empty if it cannot be.
        import_error: Why it cannot be imported; empty if it can.
        providers: What it was built with.
        cuda_major: Which CUDA it was built for; 0 if for none.
        libraries: Where each library that its provider needs was found; None where it was not.
        other_cuda_majors: Versions of CUDA found beside the one that is needed.
        driver_found: Whether NVIDIA's driver is installed.
        driver_cuda: The newest CUDA that the driver runs, as (major, minor); (0, 0) without a driver.
        gpus: What the driver lists.
    """

    has_gpu_wheels: bool
    packages: Mapping[str, str]
    onnxruntime: str
    import_error: str
    providers: tuple[str, ...]
    cuda_major: int
    libraries: Mapping[str, str | None]
    other_cuda_majors: tuple[int, ...]
    driver_found: bool
    driver_cuda: tuple[int, int]
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and the command or step that mends it."""

    what: str
    remedy: str


def cuda_problems(found: CudaInstallation, gpu: int = 0) -> list[Problem]:
    """Return why a GPU cannot be used, the first to be mended first; an empty list if it can.

    Args:
        found: What `inspect_cuda` returned.
        gpu: Which GPU is meant.
    """
    broken = wheel_problem(found, for_gpu=True)
    if broken is not None:
        return [broken]
    if CUDA_PROVIDER not in found.providers:
        wheel = next(iter(found.packages), "onnxruntime")
        what = f"{wheel} {found.onnxruntime} was built without CUDA"
        if not found.has_gpu_wheels:
            return [
                Problem(
                    f"{what}, and there is no onnxruntime-gpu for this system: it is for Linux and Windows on x86-64",
                    'choose the CPU: device="cpu"',
                )
            ]
        return [Problem(what, f"pip uninstall -y {wheel} && {INSTALL_FOR_CUDA}")]
    version = tuple(int(part) for part in found.onnxruntime.split(".")[:2] if part.isdigit())
    if version < MINIMUM_ONNXRUNTIME:
        minimum = ".".join(map(str, MINIMUM_ONNXRUNTIME))
        return [
            Problem(
                f"onnxruntime-gpu is {found.onnxruntime}, a GPU needs {minimum} or newer",
                f'pip install --upgrade "onnxruntime-gpu[cuda,cudnn]>={minimum}"',
            )
        ]
    return [*_driver_problems(found, gpu), *_library_problems(found)]


def wheel_problem(found: CudaInstallation, *, for_gpu: bool) -> Problem | None:
    """Return why ONNX Runtime cannot be used at all, or None if it can.

    Args:
        found: What `inspect_cuda` returned.
        for_gpu: Whether the remedy should install the wheel for GPUs; else that for the CPU.
    """
    install = INSTALL_FOR_CUDA if for_gpu and found.has_gpu_wheels else INSTALL_FOR_CPU
    wheels = sorted(found.packages)
    if len(wheels) > 1:
        return Problem(
            f"{' and '.join(wheels)} are installed together and overwrite each other's files",
            f"pip uninstall -y {' '.join(wheels)} && {install}",
        )
    if found.import_error:
        uninstall = f"pip uninstall -y {wheels[0]} && " if wheels else ""
        return Problem(found.import_error, f"{uninstall}{install}")
    return None


def _driver_problems(found: CudaInstallation, gpu: int) -> list[Problem]:
    needed = _DRIVER_OF_CUDA.get(found.cuda_major, "")
    update = f"install NVIDIA's driver {needed} or newer: {_DRIVERS}" if needed else f"update the driver: {_DRIVERS}"
    if not found.driver_found:
        return [Problem("NVIDIA's driver is not installed", f"{update} (in a container: start it with --gpus all)")]
    if found.driver_cuda < (found.cuda_major, 0):
        runs = ".".join(map(str, found.driver_cuda))
        return [
            Problem(
                f"the driver is too old: it runs CUDA up to {runs}, onnxruntime-gpu {found.onnxruntime} was built for "
                f"CUDA {found.cuda_major}",
                update,
            )
        ]
    if not found.gpus:
        return [
            Problem(
                "the driver finds no GPU",
                "unset CUDA_VISIBLE_DEVICES, or see whether nvidia-smi -L lists one (in a container: --gpus all)",
            )
        ]
    if gpu >= len(found.gpus):
        listing = ", ".join(f"cuda:{each.index} {each.name}" for each in found.gpus)
        return [Problem(f"there is no GPU cuda:{gpu}", f"choose one of {listing}")]
    least = _LEAST_CAPABILITY_OF_CUDA.get(found.cuda_major, (0, 0))
    if tuple(map(int, found.gpus[gpu].compute_capability.split("."))) < least:
        chosen = found.gpus[gpu]
        return [
            Problem(
                f"cuda:{gpu} {chosen.name} has compute capability {chosen.compute_capability}, onnxruntime-gpu "
                f"{found.onnxruntime} for CUDA {found.cuda_major} needs {'.'.join(map(str, least))} or newer",
                'choose the CPU: device="cpu"',
            )
        ]
    return []


def _library_problems(found: CudaInstallation) -> list[Problem]:
    missing = [name for name, path in found.libraries.items() if path is None]
    if not missing:
        return []
    others = ", ".join(map(str, found.other_cuda_majors))
    instead = f"; CUDA {others} is installed, which does not do" if others else ""
    return [
        Problem(
            f"onnxruntime-gpu {found.onnxruntime} needs libraries of CUDA {found.cuda_major} and cuDNN 9, and "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing{instead}",
            f'pip install "onnxruntime-gpu[cuda,cudnn]=={found.onnxruntime}"',
        )
    ]


def inspect_cuda(*, thoroughly: bool = False) -> CudaInstallation:
    """Look at what is installed.

    NVIDIA's libraries are loaded into the process on the way, from their Python packages or from where the system
    looks; this is what makes a GPU usable without importing torch first.

    Args:
        thoroughly: Look for driver and libraries even if this ONNX Runtime was built without CUDA.
    """
    packages = _onnxruntime_packages()
    try:
        from gpt2_edge.onnxruntime_import import onnxruntime
    except MissingDependencyError as error:
        version, import_error, providers, cuda_major = "", str(error), (), 0
    else:
        version, import_error = onnxruntime.__version__, ""
        providers = tuple(onnxruntime.get_available_providers())
        built_for = str(getattr(onnxruntime, "cuda_version", None) or "")
        cuda_major = int(built_for.partition(".")[0]) if built_for.partition(".")[0].isdigit() else 0
        if CUDA_PROVIDER in providers:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find; we say it ourselves
                onnxruntime.preload_dlls()
    has_cuda = CUDA_PROVIDER in providers
    driver = _Driver() if has_cuda or thoroughly else None
    libraries = {name: _find_library(name) for name in _library_names(cuda_major)} if has_cuda else {}
    return CudaInstallation(
        has_gpu_wheels=sys.platform in ("linux", "win32") and platform.machine().lower() in ("x86_64", "amd64"),
        packages=packages,
        onnxruntime=version,
        import_error=import_error,
        providers=providers,
        cuda_major=cuda_major,
        libraries=libraries,
        other_cuda_majors=_other_majors(cuda_major) if None in libraries.values() else (),
        driver_found=driver is not None and driver.found,
        driver_cuda=(0, 0) if driver is None else driver.cuda,
        gpus=() if driver is None else driver.gpus,
    )


def _onnxruntime_packages() -> dict[str, str]:
    """Return the installed wheels that hold the module `onnxruntime`; two of them overwrite each other's files."""
    packages = {}
    for name in _WHEELS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return packages


def _library_names(cuda_major: int) -> list[str]:
    if sys.platform == "win32":
        cuda = [f"cudart64_{cuda_major}.dll", f"cublasLt64_{cuda_major}.dll", f"cublas64_{cuda_major}.dll"]
        return [*cuda, "cudnn64_9.dll"]
    cuda = [f"libcudart.so.{cuda_major}", f"libcublasLt.so.{cuda_major}", f"libcublas.so.{cuda_major}"]
    return [*cuda, "libcurand.so.10", "libcudnn.so.9"]


def _other_majors(cuda_major: int) -> tuple[int, ...]:
    pattern = "cudart64_{}.dll" if sys.platform == "win32" else "libcudart.so.{}"
    return tuple(major for major in _MAJORS if major != cuda_major and _find_library(pattern.format(major)) is not None)


def _find_library(name: str) -> str | None:
    """Load a library as the system's loader does, and return its path, or its name if the path cannot be told."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return None
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return name
    paths = ("/" + line.partition("/")[2] for line in maps.splitlines())
    return next((path for path in paths if Path(path).name.startswith(name)), name)


class _Driver:
    """NVIDIA's driver, asked through its own library, which needs nothing else of CUDA."""

    _CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute

    def __init__(self) -> None:
        self.found = False
        self.cuda = (0, 0)
        self.gpus: tuple[Gpu, ...] = ()
        try:
            library: Any = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
            library.cuDriverGetVersion, library.cuDeviceGetCount  # noqa: B018 - a library of another kind lacks them
        except (OSError, AttributeError):
            return
        self.found = True
        version, count = ctypes.c_int(), ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(version)) == 0:
            self.cuda = (version.value // 1000, version.value % 1000 // 10)
        if library.cuInit(0) != 0 or library.cuDeviceGetCount(ctypes.byref(count)) != 0:
            return
        self.gpus = tuple(self._describe(library, index) for index in range(count.value))

    def _describe(self, library: Any, index: int) -> Gpu:
        device, major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
        name = ctypes.create_string_buffer(256)
        library.cuDeviceGet(ctypes.byref(device), index)
        library.cuDeviceGetName(name, len(name), device)
        library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        library.cuDeviceGetAttribute(ctypes.byref(major), self._CAPABILITY_MAJOR, device)
        library.cuDeviceGetAttribute(ctypes.byref(minor), self._CAPABILITY_MINOR, device)
        return Gpu(index, name.value.decode(errors="replace"), f"{major.value}.{minor.value}", memory.value)
