"""The machine that numbers were measured on, as far as it can be found out without privileges."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

from gpt2_edge.threads import usable_cores
from gpt2_edge.version import VERSION

# Those that decide which kernels ONNX Runtime can use, as Linux names them.
_INTERESTING_FLAGS: Final = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_LIBRARIES: Final = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")
_GOVERNOR: Final = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_environment() -> dict[str, Any]:
    """Return names and values; what cannot be found out is None."""
    cpu_name, flags = _cpu()
    return {
        "cpu": cpu_name,
        "isa": [flag for flag in _INTERESTING_FLAGS if flag in flags],
        "cores_allowed": usable_cores(),
        "logical_processors": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "governor": _read(_GOVERNOR),
        "load_average": _load_average(),
        "on_battery": _on_battery(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpt2-edge": VERSION,
        **{name: version for name in _LIBRARIES if (version := _version(name)) is not None},
    }


def _cpu() -> tuple[str | None, set[str]]:
    if sys.platform == "linux":
        lines = (_read(Path("/proc/cpuinfo")) or "").splitlines()
        fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        flags = set((fields.get("flags") or fields.get("Features") or "").split())
        return fields.get("model name") or platform.machine(), flags
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string"), set(
            f"{_sysctl('machdep.cpu.features')} {_sysctl('machdep.cpu.leaf7_features')}".lower().split()
        )
    return platform.processor() or None, set()


def _sysctl(name: str) -> str | None:
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", name], capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _load_average() -> float | None:
    """Of the last minute: above the number of processes that should run, somebody else is computing."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _on_battery() -> bool | None:
    if not hasattr(psutil, "sensors_battery"):
        return None
    battery = psutil.sensors_battery()
    return None if battery is None else not battery.power_plugged


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
