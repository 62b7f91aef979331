"""What the README shows works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_edge.cli import _COMMANDS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_examples_run() -> None:
    examples = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert examples
    for example in examples:
        done = subprocess.run([sys.executable, "-c", example], capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 100


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_every_command_is_in_the_table(command: str) -> None:
    assert f"| `gpt2-edge {command} " in README


def test_the_table_has_no_other_commands() -> None:
    assert set(re.findall(r"^\| `gpt2-edge (\w+)", README, re.MULTILINE)) == set(_COMMANDS)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (Path(__file__).parent.parent / target).exists(), target
