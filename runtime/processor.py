"""The processor of this machine, as its system describes it."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Final

# Those that decide which kernels ONNX Runtime can use, as Linux names them.
_INTERESTING_FLAGS: Final = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)


def describe_processor() -> tuple[str | None, list[str]]:
    """Return the processor's name and which of the instruction sets that matter it has; None and [] if unknown."""
    name, flags = _name_and_flags()
    return name, [flag for flag in _INTERESTING_FLAGS if flag in flags]


def _name_and_flags() -> tuple[str | None, set[str]]:
    if sys.platform == "linux":
        try:
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
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
