"""The programs and examples of docs/sampling.md, and the table that its benchmark prints."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from sampling_reference import (
    LOGITS,
    changed_logits,
    drawn_from,
    logits_of,
)

from gpt2_edge import GenerationOptions
from gpt2_edge.benchmarks import sampling_speed
from gpt2_edge.choosing import TokenChooser


def test_the_benchmark_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sampling_speed", "--vocabulary", "600", "--repetitions", "1"])
    assert sampling_speed.main() == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert rows[0].startswith("greedy ")
    assert all(len(re.findall(r" \d+\.\d{3}(?= |$)", row)) == 4 for row in rows)


SPECIFICATION: Final = (Path(__file__).parent.parent / "docs" / "sampling.md").read_text(encoding="utf-8")


def test_the_programs_in_the_specification_run() -> None:
    programs = re.findall(r"```python\n(.*?)```", SPECIFICATION, re.DOTALL)
    assert len(programs) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(programs)], capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200


def examples(header: str) -> list[list[str]]:
    """The rows of a table in the specification; options come first."""
    table = SPECIFICATION.split(header)[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert len(rows) > 3
    return rows


@pytest.mark.parametrize("row", examples("| options | kept | drawn with |"), ids=lambda row: row[0])
def test_examples_of_what_is_kept(row: list[str]) -> None:
    options = eval(f"dict({row[0].strip('`')})")
    kept = [int(token) for token in row[1].split(",")]
    logits = logits_of(0.4, 0.3, 0.2, 0.1)
    if options.get("temperature") == 0:
        assert kept == [TokenChooser(GenerationOptions(**options), 1, []).choose(logits, [0], []).token]
        return
    drawn = drawn_from(logits, options)
    assert np.flatnonzero(drawn).tolist() == kept
    shares = [float(over) / float(under) for over, under in re.findall(r"(\d+)/(\d+)", row[2])]
    assert drawn[kept].tolist() == pytest.approx(shares if len(kept) > 1 else [1.0], rel=1e-6)


@pytest.mark.parametrize("row", examples("| options | logits after step 4 |"), ids=lambda row: row[0])
def test_examples_of_changed_logits(row: list[str]) -> None:
    options = eval(f"dict({row[0].strip('`')})")
    expected = [float(number) for number in row[1].split(":")[0].split(",")]
    assert changed_logits(LOGITS, options, [0, 3], [1, 2, 1]).tolist() == expected
