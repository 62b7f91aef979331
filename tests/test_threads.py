"""How many threads are used: affinity, hyperthreads and cgroup quotas, from made-up system folders."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from gpt2_edge import threads

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Make this process believe that it runs elsewhere."""

    def pretend(allowed: Iterable[int], siblings: dict[int, str], files: dict[str, str] | None = None) -> None:
        cpu_root, cgroup_root = tmp_path / "cpu", tmp_path / "cgroup"
        monkeypatch.setattr(threads, "sys", SimpleNamespace(platform="linux"))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(allowed), raising=False)
        monkeypatch.setattr(threads, "_CPU_ROOT", cpu_root)
        monkeypatch.setattr(threads, "_CGROUP_ROOT", cgroup_root)
        for cpu, listing in siblings.items():
            write(cpu_root / f"cpu{cpu}/topology/thread_siblings_list", listing)
        for name, content in (files or {}).items():
            write(cgroup_root / name, content)

    return pretend


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="ascii")


HYPERTHREADED = {cpu: f"{cpu % 4},{cpu % 4 + 4}\n" for cpu in range(8)}  # four cores, two threads each
PLAIN = {cpu: f"{cpu}\n" for cpu in range(8)}


@pytest.mark.parametrize(
    ("allowed", "siblings", "expected"),
    [
        pytest.param(range(8), PLAIN, 8, id="all of eight cores"),
        pytest.param([2, 5, 7], PLAIN, 3, id="three of eight cores"),
        pytest.param([3], PLAIN, 1, id="one"),
        pytest.param(range(8), HYPERTHREADED, 4, id="eight threads of four cores"),
        pytest.param([0, 4], HYPERTHREADED, 1, id="both threads of one core"),
        pytest.param([0, 1, 4], HYPERTHREADED, 2, id="three threads of two cores"),
        pytest.param([0, 1, 2, 3], HYPERTHREADED, 4, id="one thread of each core"),
        pytest.param(range(4), {0: "0-1\n", 1: "0-1\n", 2: "2-3\n", 3: "2-3\n"}, 2, id="a range of siblings"),
        pytest.param(range(3), {}, 3, id="no topology: every CPU is a core"),
        pytest.param(range(4), {0: "0,1\n", 1: "0,1\n"}, 3, id="half a topology"),
        pytest.param(range(2), {0: "", 1: "\n"}, 2, id="empty files"),
    ],
)
def test_cores_of_the_affinity_mask(
    machine: Machine, allowed: Iterable[int], siblings: dict[int, str], expected: int
) -> None:
    machine(allowed, siblings)
    assert threads.usable_cores() == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({"cpu.max": "max 100000\n"}, 8, id="version 2 without a limit"),
        pytest.param({"cpu.max": "200000 100000\n"}, 2, id="version 2, two CPUs"),
        pytest.param({"cpu.max": "150000 100000\n"}, 2, id="one and a half rounds up"),
        pytest.param({"cpu.max": "5000 100000\n"}, 1, id="a twentieth is still one"),
        pytest.param({"cpu.max": "6400000 100000\n"}, 8, id="more than there are"),
        pytest.param({"cpu.max": "150000 50000\n"}, 3, id="another period"),
        pytest.param({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8, id="no version 1 limit"),
        pytest.param({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3, id="version 1"),
        pytest.param({"cpu/cpu.cfs_quota_us": "300000\n"}, 8, id="version 1 without its period"),
        pytest.param({"cpu.max": ""}, 8, id="empty"),
        pytest.param({"cpu.max": "many few\n"}, 8, id="nonsense"),
        pytest.param({"cpu.max": "100000\n"}, 8, id="half a line"),
        pytest.param({"cpu.max/directory": ""}, 8, id="a folder of that name"),
    ],
)
def test_quota_of_the_root_cgroup(machine: Machine, files: dict[str, str], expected: int) -> None:
    machine(range(8), PLAIN, files)
    assert threads.usable_cores() == expected


def test_hyperthreads_and_quota_together(machine: Machine) -> None:
    machine(range(8), HYPERTHREADED, {"cpu.max": "300000 100000\n"})
    assert threads.usable_cores() == 3


NESTED = {"a/b/c/cpu.max": "max 100000", "a/b/cpu.max": "150000 100000", "a/cpu.max": "400000 100000"}
NESTED_VERSION_1 = {
    "cpu/a/b/cpu.cfs_quota_us": "50000",
    "cpu/a/b/cpu.cfs_period_us": "100000",
    "cpu/a/cpu.cfs_quota_us": "-1",
    "cpu/a/cpu.cfs_period_us": "100000",
}


@pytest.mark.parametrize(
    ("files", "membership", "expected"),
    [
        pytest.param(NESTED, "0::/a/b/c\n", 1.5, id="the smallest of the own group and those above it"),
        pytest.param(NESTED, "0::/a\n", 4.0, id="groups below do not count"),
        pytest.param(NESTED, "0::/elsewhere\n", None, id="groups beside do not count"),
        pytest.param(NESTED, "0::/\n", None, id="in the root"),
        pytest.param(NESTED | {"cpu.max": "100000 100000"}, "0::/a/b/c\n", 1.0, id="the root limits all"),
        pytest.param(NESTED, "0::/../outside\n", None, id="a path out of the namespace"),
        pytest.param(NESTED, "0::/a/b:c\n", 4.0, id="a colon in the path"),
        pytest.param(NESTED_VERSION_1, "5:cpu,cpuacct:/a/b\n4:memory:/x\n0::/\n", 0.5, id="version 1"),
        pytest.param(NESTED_VERSION_1, "5:cpuacct,cpu:/a/b\n", 0.5, id="version 1, as older systems write it"),
        pytest.param(NESTED_VERSION_1, "5:cpu:/a/b\n", 0.5, id="version 1, alone"),
        pytest.param(NESTED_VERSION_1, "5:cpuset:/a/b\n", None, id="version 1, another controller"),
        pytest.param(NESTED | NESTED_VERSION_1, "5:cpu,cpuacct:/a/b\n0::/a/b\n", 0.5, id="both versions"),
        pytest.param(NESTED, "", None, id="no membership"),
        pytest.param(NESTED, "nonsense\n0::/a\n", 4.0, id="a line that cannot be read"),
    ],
)
def test_nested_cgroups(tmp_path: Path, files: dict[str, str], membership: str, expected: float | None) -> None:
    for name, content in files.items():
        write(tmp_path / "cgroup" / name, content)
    write(tmp_path / "membership", membership)
    assert threads._cgroup_cpu_quota(tmp_path / "cgroup", tmp_path / "membership") == expected


def test_no_membership_file(tmp_path: Path) -> None:
    write(tmp_path / "cpu.max", "250000 100000")
    assert threads._cgroup_cpu_quota(tmp_path, tmp_path / "nothing") == 2.5


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_systems_without_affinity(machine: Machine, monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    machine([], {})
    monkeypatch.setattr(threads, "sys", SimpleNamespace(platform=platform))
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads.usable_cores() == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads.usable_cores() == 1


def test_this_machine() -> None:
    assert 1 <= threads.usable_cores() <= (os.cpu_count() or 1)
