"""How much memory is free, as each system says it, and how many rows that allows."""

from pathlib import Path
from typing import Any, Final

import pytest

from gpt2_edge import free_memory
from gpt2_edge.free_memory import free_memory_bytes
from gpt2_edge.row_limit import MAXIMUM_ROWS, rows_that_fit

MEMINFO: Final = (
    "MemTotal:       32000000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB\nBuffers: 1 kB\n"
)
VM_STAT: Final = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                5000.
Pages active:                            300000.
Pages inactive:                          250000.
Pages speculative:                         1000.
Pages throttled:                              0.
Pages wired down:                        100000.
Pages purgeable:                          20000.
"Translation faults":                 123456789.
"""


def write_cgroup(folder: Path, limit: str, used: int = 0, files: int = 0) -> Path:
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 7\n")
    return folder


def test_linux_says_what_is_available(tmp_path: Path) -> None:
    assert free_memory._of_linux(MEMINFO, tmp_path / "none") == 8_192_000_000
    assert free_memory._of_linux(MEMINFO, write_cgroup(tmp_path / "unlimited", "max")) == 8_192_000_000


def test_the_limit_of_a_container_counts_if_it_is_closer(tmp_path: Path) -> None:
    near = write_cgroup(tmp_path / "near", "1000000000", used=700_000_000, files=200_000_000)
    assert free_memory._of_linux(MEMINFO, near) == 500_000_000
    assert free_memory._of_linux(MEMINFO, write_cgroup(tmp_path / "far", "99000000000")) == 8_192_000_000
    assert free_memory._of_linux(MEMINFO, write_cgroup(tmp_path / "full", "1000", used=2000)) == 0


def test_macos_counts_pages() -> None:
    assert free_memory._of_macos(VM_STAT) == 16384 * (5000 + 1000 + 250000)


def test_windows_fills_a_structure() -> None:
    class Kernel:
        def GlobalMemoryStatusEx(self, pointer: Any) -> int:  # noqa: N802 - the name that Windows has
            status = pointer._obj
            assert status.length == 64
            status.total_physical, status.available_physical = 16_000_000_000, 6_000_000_000
            return 1

    assert free_memory._of_windows(Kernel()) == 6_000_000_000


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB\n", "Pages free: 5.\n", "(page size of 4096 bytes)\n"])
def test_what_says_something_else_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^no "):
        free_memory._of_linux(text, tmp_path)
    with pytest.raises(ValueError, match=r"^no "):
        free_memory._of_macos(text)


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_a_system_that_does_not_answer_is_unknown(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def GlobalMemoryStatusEx(self, pointer: Any) -> int:  # noqa: N802
            return 0

    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr(free_memory, "_VM_STAT", "/nowhere/vm_stat")
    monkeypatch.setattr(free_memory.ctypes, "windll", type("Windows", (), {"kernel32": Kernel()}), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self, **_: "")
    assert free_memory_bytes() is None


def test_this_machine_has_some() -> None:
    free = free_memory_bytes()
    assert free is None or free > 0


@pytest.mark.parametrize(
    ("bytes_of_a_row", "free_bytes", "rows"),
    [
        (1_000, 512_000, 64),
        (1_000, 511_999, 32),
        (1_000, 256_000, 32),
        (1_000, 255_999, 16),
        (1_000, 0, 16),
        (1_000, None, 16),
    ],
)
def test_more_than_16_rows_need_memory_for_full_contexts(
    bytes_of_a_row: int, free_bytes: int | None, rows: int
) -> None:
    assert rows_that_fit(bytes_of_a_row, free_bytes) == rows <= MAXIMUM_ROWS == 64
