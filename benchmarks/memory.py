"""The memory of this process: what it holds now, and the most that it ever held."""

import sys
from pathlib import Path

import psutil


def resident_bytes() -> int:
    """Return how much memory of this process is resident (RSS; the working set on Windows)."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Return the most that was resident since the process began."""
    if sys.platform == "linux":
        # getrusage would not do: on Linux a new program inherits its parent's maximum.
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return resident_bytes()
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS
