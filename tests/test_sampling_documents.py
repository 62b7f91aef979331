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
from gpt2_edge.benchmarks import sampling_speed, step_overhead
from gpt2_edge.choosing import TokenChooser


def test_the_benchmark_prints_its_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["sampling_speed", "--vocabulary", "600", "--repetitions", "1"])
    assert sampling_speed.main() == 0
    rows = capsys.readouterr().out.splitlines()[3:]
    assert rows[0].startswith("greedy ")
    assert all(len(re.findall(r" \d+\.\d{3}(?= |$)", row)) == 5 for row in rows)


def test_the_benchmark_in_place_prints_its_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["step_overhead", "storyteller", "--entropy", "2"])
    monkeypatch.setattr(step_overhead, "_TOKENS", 4)
    monkeypatch.setattr(step_overhead, "_REPETITIONS", 1)
    choose = TokenChooser.choose
    assert step_overhead.main() == 0
    assert TokenChooser.choose is choose
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split("  ")[0] for row in rows[:2]] == ["greedy", "top-k 40"]
    assert len(rows) == 6
    assert all(len(re.findall(r"-?\b\d+\.\d{3}\b", row)) == 4 for row in rows)


def test_logits_are_made_as_peaked_as_asked_for() -> None:
    logits = np.random.default_rng(0).normal(0, 0.5, (5, 3000)).astype(np.float32)
    for entropy in (0.5, 3.3, 7.5):
        temperature = step_overhead.temperature_of_entropy(logits, entropy)
        probabilities = np.exp(logits.astype(np.float64) / temperature)
        probabilities /= probabilities.sum(axis=1, keepdims=True)
        assert -(probabilities * np.log(probabilities)).sum(axis=1).mean() == pytest.approx(entropy, rel=1e-4)


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
        assert kept == [TokenChooser(GenerationOptions(**options), 1, []).choose(logits, [0], [])]
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
