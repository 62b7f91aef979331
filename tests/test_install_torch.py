"""Which torch `make` would install, and what it says before a large download."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from gpt2_edge.export import install_torch

CPU_BUILD = {"metadata": {"requires_dist": ["filelock", "sympy>=1.13"]}}
CUDA_BUILD = {"metadata": {"requires_dist": ["filelock", 'nvidia-cublas==13.1; platform_system == "Linux"']}}


@contextmanager
def pip_that_finds(plain: dict[str, Any] | None, cpu_index: dict[str, Any] | None) -> Iterator[mock.MagicMock]:
    """Replace pip: what it resolves without and with the CPU index. Nothing is installed."""

    def resolve(requirement: str, *options: str) -> dict[str, Any] | None:
        return cpu_index if install_torch.CPU_INDEX in options else plain

    with (
        mock.patch.object(install_torch, "resolve", resolve),
        mock.patch.object(install_torch, "pip") as pip,
        mock.patch.object(install_torch, "installed_version", return_value=None),
        mock.patch.object(install_torch.time, "sleep"),
        mock.patch.object(install_torch.sys, "argv", ["install_torch.py", "2.13.0"]),
        mock.patch.object(install_torch.sys, "platform", "linux"),
    ):
        pip.return_value.returncode = 0
        yield pip


def test_a_cpu_build_is_installed_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    with pip_that_finds(plain=CPU_BUILD, cpu_index=None) as pip:
        assert install_torch.main() == 0
    pip.assert_called_once_with("install", "torch==2.13.0")
    assert capsys.readouterr().out == ""


def test_cuda_is_avoided_by_the_cpu_index(capsys: pytest.CaptureFixture[str]) -> None:
    with pip_that_finds(plain=CUDA_BUILD, cpu_index=CPU_BUILD) as pip:
        assert install_torch.main() == 0
    pip.assert_called_once_with("install", "torch==2.13.0", "--index-url", install_torch.CPU_INDEX)
    assert "would bring CUDA" in capsys.readouterr().out


def test_a_large_download_is_announced_before_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    with pip_that_finds(plain=CUDA_BUILD, cpu_index=None) as pip:
        assert install_torch.main() == 0
        install_torch.time.sleep.assert_called_once()  # type: ignore[attr-defined]
    pip.assert_called_once_with("install", "torch==2.13.0")
    printed = capsys.readouterr().out
    assert "several gigabytes" in printed
    assert install_torch.CPU_INDEX in printed


def test_nothing_happens_if_it_is_there() -> None:
    with (
        pip_that_finds(plain=CUDA_BUILD, cpu_index=None) as pip,
        mock.patch.object(install_torch, "installed_version", return_value="2.13.0"),
    ):
        assert install_torch.main() == 0
    pip.assert_not_called()


def test_only_linux_builds_bring_cuda() -> None:
    with mock.patch.object(install_torch.sys, "platform", "darwin"):
        assert not install_torch.brings_cuda(CUDA_BUILD)
