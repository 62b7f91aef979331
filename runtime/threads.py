"""How many cores this process may really use."""

import math
import os
import sys
from pathlib import Path

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CPU_ROOT = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Return how many physical cores this process may use: at least 1.

    Counted from the affinity mask, with hyperthreads of one core counted once, and limited by the cgroup's CPU
    quota. More threads than that make decoding slower, by a factor where a quota throttles them.
    """
    allowed = _allowed_cpus()
    cores = _physical_cores(allowed, _CPU_ROOT)
    quota = _cgroup_cpu_quota(_CGROUP_ROOT)
    if quota is not None:
        cores = min(cores, math.ceil(quota))
    return max(1, cores)


def _allowed_cpus() -> set[int]:
    if sys.platform == "linux":
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _physical_cores(cpus: set[int], cpu_root: Path) -> int:
    """Count the distinct physical cores behind `cpus`; where the system does not tell, every CPU is one."""
    siblings = set()
    for cpu in cpus:
        try:
            listing = (cpu_root / f"cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii").strip()
        except OSError:
            listing = ""
        siblings.add(listing or f"cpu {cpu}")
    return len(siblings)


def _cgroup_cpu_quota(cgroup_root: Path, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """Read how many CPUs' worth of time the cgroups of this process allow; None without a limit.

    A limit may sit on the process's own cgroup or on any above it: the smallest counts.
    """
    quotas = [
        quota
        for group in _own_cgroups(cgroup_root, membership)
        if (quota := _read_version_2(group) or _read_version_1(group)) is not None
    ]
    return min(quotas, default=None)


def _own_cgroups(cgroup_root: Path, membership: Path) -> set[Path]:
    groups = {cgroup_root, cgroup_root / "cpu"}
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return groups
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and (not controllers or "cpu" in controllers.split(",")):
            mount = cgroup_root / "cpu" if controllers else cgroup_root
            parts = Path(path.lstrip("/")).parts
            groups.update(mount.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1))
    return groups


def _read_version_2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _read_version_1(group: Path) -> float | None:
    try:
        quota_us = int((group / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        period_us = int((group / "cpu.cfs_period_us").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    return quota_us / period_us if quota_us > 0 else None
