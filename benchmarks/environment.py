"""The machine that numbers were measured on, as far as it can be found out without privileges."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

from gpt2_edge.processor import describe_processor
from gpt2_edge.threads import usable_cores
from gpt2_edge.version import VERSION

_LIBRARIES: Final = ("onnxruntime", "onnxruntime-gpu", "numpy", "tokenizers")
_GOVERNOR: Final = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def describe_environment() -> dict[str, Any]:
    """Return names and values; what cannot be found out is None."""
    cpu_name, instruction_sets = describe_processor()
    return {
        "cpu": cpu_name,
        "isa": instruction_sets,
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
