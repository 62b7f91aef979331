"""How much memory programs can still have without pushing others out to disk."""

import ctypes
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

_VM_STAT: Final = "/usr/bin/vm_stat"
# What psutil calls available on macOS too.
_AVAILABLE_PAGES: Final = ("Pages free", "Pages speculative", "Pages inactive")


class _MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX: https://learn.microsoft.com/windows/win32/api/sysinfoapi/ns-sysinfoapi-memorystatusex."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load_percent", ctypes.c_uint32),
        ("total_physical", ctypes.c_uint64),
        ("available_physical", ctypes.c_uint64),
        ("total_page_file", ctypes.c_uint64),
        ("available_page_file", ctypes.c_uint64),
        ("total_virtual", ctypes.c_uint64),
        ("available_virtual", ctypes.c_uint64),
        ("available_extended_virtual", ctypes.c_uint64),
    )


def free_memory_bytes() -> int | None:
    """Return what can be had without swapping; None where the system does not tell."""
    try:
        if sys.platform == "win32":
            return _of_windows(ctypes.windll.kernel32)
        if sys.platform == "darwin":
            return _of_macos(subprocess.run([_VM_STAT], capture_output=True, encoding="utf-8", check=True).stdout)
        return _of_linux(Path("/proc/meminfo").read_text(encoding="ascii"), Path("/sys/fs/cgroup"))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None


def _of_linux(meminfo: str, cgroup: Path) -> int:
    """Return what the kernel calls available; less, if a container's limit is closer.

    Raises:
        ValueError: It does not say.
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", meminfo, re.MULTILINE)
    if found is None:
        raise ValueError("no MemAvailable")
    available = int(found[1]) * 1024
    try:
        limit, used = (int((cgroup / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        statistics = (cgroup / "memory.stat").read_text(encoding="ascii")
    except (OSError, ValueError):  # not in a container with a limit: memory.max says "max", or is not there
        return available
    files = re.search(r"^inactive_file (\d+)$", statistics, re.MULTILINE)  # are counted as used, but can be dropped
    return min(available, max(0, limit - used + (int(files[1]) if files else 0)))


def _of_macos(vm_stat: str) -> int:
    """Add up the pages that `vm_stat` lists as available.

    Raises:
        ValueError: It says something else.
    """
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    if page is None:
        raise ValueError("no page size")
    pages = dict(re.findall(r"^([A-Za-z ]+):\s+(\d+)\.$", vm_stat, re.MULTILINE))
    if _AVAILABLE_PAGES[0] not in pages:
        raise ValueError("no free pages")
    return int(page[1]) * sum(int(pages.get(name, 0)) for name in _AVAILABLE_PAGES)


def _of_windows(kernel32: Any) -> int:
    """Ask GlobalMemoryStatusEx.

    Raises:
        OSError: It failed.
    """
    status = _MemoryStatus(length=ctypes.sizeof(_MemoryStatus))
    if not kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return int(status.available_physical)
