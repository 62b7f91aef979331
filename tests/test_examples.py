"""Every example runs, and what it prints is what it claims."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import gpt2_edge

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def output_of(name: str, folder: str = "storyteller") -> str:
    command = [sys.executable, str(EXAMPLES / name), folder]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_stream() -> None:
    printed = output_of("stream.py")
    with gpt2_edge.load("storyteller") as model:
        prompt = "Once upon a time there was a king who"
        expected = model.generate(prompt, max_new_tokens=60, temperature=0.8, top_k=40, seed=7).text
    assert printed.startswith(prompt + expected + "\n")
    assert re.search(r"first piece after \d+ ms, then \d+ tokens/s; ended by length\n", printed)
    assert printed.endswith("the same text as generate: True\n")


def test_cancel() -> None:
    cancelled, deadline, left, after = output_of("cancel.py").splitlines()
    assert re.fullmatch(r"cancelled: \d+ tokens after (\d\.\d\d) s", cancelled)
    assert re.fullmatch(r"deadline: \d+ tokens after (\d\.\d\d) s", deadline)
    for line in (cancelled, deadline):
        # Long before a million tokens; how soon exactly is measured elsewhere, on a quiet machine.
        assert 0.3 <= float(line.split()[-2]) < 5
    assert re.match(r"cancelled: [5-9] tokens, then the loop was left", left)
    with gpt2_edge.load("storyteller") as model:
        assert after == f"next: {model.generate('The old woman', max_new_tokens=5).text!r}"


def test_async_server_style() -> None:
    *texts, last = output_of("async_server_style.py").split("\n---\n")
    with gpt2_edge.load("storyteller") as model:
        for seed, (prompt, text) in enumerate(
            zip(["The wolf", "The youngest brother", "In the forest", "The queen said"], texts, strict=True)
        ):
            alone = model.generate(prompt, max_new_tokens=40, temperature=0.8, top_k=40, seed=seed)
            assert text == prompt + alone.text
    pieces, changes = map(int, re.findall(r"(\d+) (?:pieces|times)", last))
    assert changes > pieces / 4, "the clients were served one after another"
    ticks, late = map(int, re.findall(r"(\d+) (?:ticks|ms late)", last))
    assert ticks >= 3
    assert late < 1000


def test_threads() -> None:
    printed = output_of("threads.py")
    assert len(re.findall(r": +\d+ tokens/s$", printed, re.MULTILINE)) == 2
    assert printed.endswith("the same texts: True\n")


def test_sessions() -> None:
    printed = output_of("sessions.py")
    assert printed.startswith("the beginning: The fisherman went to the sea, and")
    one, other = re.findall(r"^(?:one way|the other): (.*?)(?=^the other|^back)", printed, re.MULTILINE | re.DOTALL)
    assert one != other
    assert "back where it was: True\n" in printed
    assert printed.endswith("the loaded one goes on alike: True\n")


def test_structured_choice() -> None:
    allowed = {" princess", " wolf", " ship", " golden crown", " an old soldier"}
    lines = output_of("structured_choice.py").splitlines()
    assert [line.partition("; or, drawn, ")[0] for line in lines] == [
        "The king had a daughter, a beautiful princess",
        "They sailed across the sea in a ship",
        "On his head the king wore a golden crown",
    ]
    for line in lines:
        drawn = ast.literal_eval(line.partition("; or, drawn, ")[2])
        assert len(drawn) == 4
        assert set(drawn) <= allowed


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_small_tested_and_listed(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 50
    assert f"Run: python examples/{path.name} [FOLDER]" in source
    assert f"[{path.name}]({path.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"def test_{path.stem}(" in Path(__file__).read_text(encoding="utf-8")


def test_another_folder_is_used(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "stream.py"), str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=False, timeout=120)
    assert done.returncode == 1
    assert "ModelFolderError" in done.stderr
