"""Scoring: windows over long texts, compared with transformers; lists; the command's output, messages and bar."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import gpt2_edge
from gpt2_edge.cli import main
from gpt2_edge.commands.documents import document_batches
from gpt2_edge.engine import Engine
from gpt2_edge.generation import token_logprobs
from gpt2_edge.scoring import Window, windows_of

CONTEXT = 32  # of the tiny checkpoint
STORYTELLER_CHECKPOINT = Path(__file__).resolve().parent.parent / "models" / "storyteller"


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("scoring") / "tiny", n_positions=CONTEXT)


@pytest.fixture(scope="module")
def tiny_folder(tiny_checkpoint: Path) -> Path:
    from gpt2_edge.export import export_checkpoint

    folder = tiny_checkpoint.parent / "tiny-fp32"
    export_checkpoint(tiny_checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def tiny(tiny_folder: Path) -> Any:
    with gpt2_edge.load(tiny_folder) as model:
        yield model


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_checkpoint).eval()


def tokens_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(8192, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def reference_logprobs(model: GPT2LMHeadModel, tokens: list[int], stride: int) -> list[float]:
    """The loop of transformers' guide to the perplexity of fixed-length models, with a loss for each token."""
    logprobs: list[float] = []
    end_before = 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + CONTEXT, len(tokens))
        inputs = torch.tensor([tokens[begin:end]])
        targets = inputs.clone()
        targets[:, : -(end - end_before)] = -100
        with torch.no_grad():
            logits = model(inputs).logits.double()
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], targets[0, 1:], ignore_index=-100, reduction="none")
        logprobs += (-losses[targets[0, 1:] != -100]).tolist()
        end_before = end
        if end == len(tokens):
            break
    return logprobs


def test_windows_of_the_example_in_the_docs() -> None:
    assert list(windows_of(9, 4, 2)) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 8, 6), Window(6, 9, 8)]


@pytest.mark.parametrize("context", [2, 3, 4, 7])
def test_windows_score_each_token_but_the_first_once_and_never_without_context(context: int) -> None:
    for count in range(2, 30):
        for stride in range(1, context):
            windows = list(windows_of(count, context, stride))
            scored = [token for window in windows for token in range(window.first_scored, window.end)]
            assert scored == list(range(1, count))
            assert all(window.first_scored > window.begin for window in windows)
            assert all(window.end - window.begin <= context for window in windows)
            assert [window.begin for window in windows] == [index * stride for index in range(len(windows))]


@pytest.mark.parametrize("stride", [1, 5, CONTEXT // 2, CONTEXT - 1])
@pytest.mark.parametrize("count", [2, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 3 * CONTEXT + 5])
def test_agrees_with_transformers(tiny: gpt2_edge.Model, reference: GPT2LMHeadModel, count: int, stride: int) -> None:
    tokens = tokens_of(count)
    score = tiny.score(tokens, stride=stride)
    expected = reference_logprobs(reference, tokens, stride)
    assert score.tokens == tokens
    assert len(score.logprobs) == count - 1
    assert score.logprobs == pytest.approx(expected, abs=1e-4)
    assert score.perplexity == pytest.approx(math.exp(-sum(expected) / (count - 1)), rel=1e-4)


def test_windows_that_are_computed_in_several_chunks_agree_with_transformers(fp32_model: gpt2_edge.Model) -> None:
    reference = GPT2LMHeadModel.from_pretrained(STORYTELLER_CHECKPOINT).eval()
    tokens = fp32_model.tokenize("There was once a king who had three sons, and the youngest was a fool. " * 40)
    assert len(tokens) > fp32_model.context_length == 512
    score = fp32_model.score(tokens, stride=300)
    with torch.no_grad():
        first, second = (
            torch.log_softmax(reference(torch.tensor([part])).logits[0].double(), dim=-1)
            for part in (tokens[:512], tokens[300:812])
        )
    assert score.logprobs[:511] == pytest.approx([float(first[i, tokens[i + 1]]) for i in range(511)], abs=1e-4)
    end = min(len(tokens), 812)
    expected = [float(second[i - 301, tokens[i]]) for i in range(512, end)]
    assert score.logprobs[511 : end - 1] == pytest.approx(expected, abs=1e-4)


def test_stride_is_half_the_context_unless_given(tiny: gpt2_edge.Model) -> None:
    tokens = tokens_of(3 * CONTEXT)
    assert tiny.score(tokens) == tiny.score(tokens, stride=CONTEXT // 2)
    assert tiny.score(tokens) != tiny.score(tokens, stride=CONTEXT // 2 - 1)


@pytest.mark.parametrize("stride", [0, -1, CONTEXT, 1.0, True, "8"])
def test_a_stride_that_is_not_allowed(tiny: gpt2_edge.Model, stride: Any) -> None:
    with pytest.raises(gpt2_edge.OptionError, match=r"stride is .*: give an integer from 1 to 31"):
        tiny.score([1, 2, 3], stride=stride)


def test_a_list_is_scored_as_each_text_alone(tiny: gpt2_edge.Model) -> None:
    texts = [tokens_of(count, seed=count) for count in (2, 100, 7, CONTEXT, 33, 64)]
    assert tiny.score(texts) == [tiny.score(text) for text in texts]
    assert tiny.score(["Once upon a time"]) == [tiny.score("Once upon a time")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the text has 0 tokens: a score needs at least 2"),
        ([5], "the text has 1 token: a score needs at least 2"),
        ([[5, 6], [7]], "text 1 of the list has 1 token: a score needs at least 2"),
        ([1, 8192], "token 8192"),
    ],
)
def test_a_text_that_cannot_be_scored(tiny: gpt2_edge.Model, text: Any, message: str) -> None:
    with pytest.raises(gpt2_edge.PromptError, match=message):
        tiny.score(text)


def test_progress_is_reported_window_by_window(tiny: gpt2_edge.Model) -> None:
    counts: list[int] = []
    tiny.score([tokens_of(CONTEXT + 20), tokens_of(3)], stride=10, on_scored=counts.append)
    assert counts == [CONTEXT - 1, 10, 10, 2]


def test_few_windows_of_a_long_text_exist_at_a_time(tiny: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[int] = []
    join = Engine.join
    monkeypatch.setattr(Engine, "join", lambda engine, rows: (brought.append(len(rows)), join(engine, rows))[1])
    most_ahead = 0
    scored_windows = 0

    def count(tokens: int) -> None:
        nonlocal most_ahead, scored_windows
        scored_windows += 1
        most_ahead = max(most_ahead, sum(brought) - scored_windows)

    tiny.score(tokens_of(50 * CONTEXT), on_scored=count)
    assert sum(brought) == scored_windows == 99
    assert most_ahead <= 16


def test_a_failed_text_leaves_the_model_usable(tiny: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [tokens_of(count, seed=count) for count in range(2, 30)]
    expected = tiny.score(texts)
    fail_for(texts[11], monkeypatch)
    with pytest.raises(gpt2_edge.LogitsError, match="made up"):
        tiny.score(texts)
    assert not tiny._core.engine._waiting
    assert tiny.score(texts[:11] + texts[12:]) == expected[:11] + expected[12:]


def fail_for(text: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the model compute NaN for one text."""

    def failing(logits: Any, following: list[int]) -> Any:
        if following == text[1:]:
            raise gpt2_edge.LogitsError("made up")
        return token_logprobs(logits, following)

    monkeypatch.setattr("gpt2_edge.scoring.token_logprobs", failing)


def test_an_interrupted_score_leaves_the_model_usable(tiny: gpt2_edge.Model) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    expected = tiny.score([1, 2, 3])
    with pytest.raises(KeyboardInterrupt):
        tiny.score(tokens_of(5 * CONTEXT), on_scored=interrupt)
    assert tiny.score([1, 2, 3]) == expected


# The command


def write_documents(folder: Path) -> list[Path]:
    texts = {"king.txt": b"Once there was a king.\n", "long.txt": b"The fox ran. " * 40, "bad.txt": b"ab\xffc"}
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return [folder / name for name in texts]


def test_table_ends_with_the_total(
    tiny_folder: Path, tiny: gpt2_edge.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    king, long, bad = write_documents(tmp_path)
    assert main(["score", str(tiny_folder), str(king), str(bad), str(long), "--stride", "5"]) == 1
    printed = capsys.readouterr()
    scores = [tiny.score(path.read_text(encoding="utf-8"), stride=5) for path in (king, long)]
    logprobs = scores[0].logprobs + scores[1].logprobs
    assert len(scores[1].tokens) > CONTEXT
    rows = [line.split(maxsplit=3) for line in printed.out.splitlines()]
    assert [row[3] for row in rows] == ["document", str(king), str(long), "total of 2 documents"]
    assert [int(row[0]) for row in rows[1:3]] == [len(score.tokens) for score in scores]
    assert int(rows[3][0]) == len(scores[0].tokens) + len(scores[1].tokens)
    assert float(rows[3][1]) == pytest.approx(sum(logprobs), abs=2e-3)
    assert float(rows[3][2]) == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-3)
    assert printed.err.startswith(f"gpt2-edge: {bad}: the text is not UTF-8: byte 0xff at offset 2")
    assert printed.err.count("\n") == 1


def test_json_has_an_object_for_each_document_in_order(
    tiny_folder: Path, tiny: gpt2_edge.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    king, long, bad = write_documents(tmp_path)
    missing = tmp_path / "missing.txt"
    assert main(["score", str(tiny_folder), str(missing), str(bad), str(king), str(long), "--json"]) == 1
    printed = capsys.readouterr()
    objects = [json.loads(line) for line in printed.out.splitlines()]
    assert [each["document"] for each in objects] == [str(path) for path in (missing, bad, king, long)]
    assert objects[0]["error"] == "it cannot be read: No such file or directory"
    assert "not UTF-8" in objects[1]["error"]
    for each, path in zip(objects[2:], (king, long), strict=True):
        score = tiny.score(path.read_text(encoding="utf-8"))
        assert each["tokens"] == score.tokens
        assert each["logprobs"] == score.logprobs
        assert each["total_logprob"] == score.total_logprob
        assert each["perplexity"] == score.perplexity
    assert len(printed.err.splitlines()) == 2


def test_lines_are_documents(
    tiny_folder: Path, tiny: gpt2_edge.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "lines.txt"
    # U+2028 separates lines for Python's str, not for a text file.
    file.write_bytes(b"A king.\r\n\nTwo kings\xe2\x80\xa8and a fox.\nb\xff\nThe end.")
    assert main(["score", str(tiny_folder), str(file), "--lines", "--json"]) == 1
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["document"] for each in objects] == [f"{file}:{number}" for number in range(1, 6)]
    texts = {0: "A king.", 2: "Two kings\u2028and a fox.", 4: "The end."}
    for index, each in enumerate(objects):
        if index in texts:
            assert each["logprobs"] == tiny.score(texts[index]).logprobs
        else:
            assert set(each) == {"document", "error"}
    assert "0 tokens" in objects[1]["error"]
    assert "not UTF-8" in objects[3]["error"]


def test_many_lines_are_scored_as_each_alone_and_in_their_order(
    tiny_folder: Path, tiny: gpt2_edge.Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Short and long ones, some that cannot be scored, and more than are read at once."""
    file = tmp_path / "lines.txt"
    words = ["king", "fox", "the", "", "ran", "\xff", "old"]
    lines = [" ".join(words[(3 * number) % 7] for _ in range(number % 9)) for number in range(300)]
    lines[170] = "The fox ran. " * 6000
    file.write_bytes("\n".join(lines).encode("latin-1"))
    assert main(["score", str(tiny_folder), str(file), "--lines", "--json", "--stride", "31"]) == 1
    objects = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["document"] for each in objects] == [f"{file}:{number}" for number in range(1, 301)]
    for line, each in zip(lines, objects, strict=True):
        if "\xff" in line:
            assert "not UTF-8" in each["error"]
        elif len(tiny.tokenize(line)) < 2:
            assert each["error"].startswith("the text has")
        else:
            assert each["logprobs"] == tiny.score(line, stride=31).logprobs


def test_a_document_that_fails_takes_no_other_along(
    tiny_folder: Path,
    tiny: gpt2_edge.Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("The king was old.\nThe fox ran.\nThe end.\n", encoding="utf-8")
    expected = [tiny.score(text).logprobs for text in ("The king was old.", "The end.")]
    fail_for(tiny.tokenize("The fox ran."), monkeypatch)
    assert main(["score", str(tiny_folder), str(file), "--lines", "--json"]) == 1
    printed = capsys.readouterr()
    first, second, third = (json.loads(line) for line in printed.out.splitlines())
    assert [first["logprobs"], third["logprobs"]] == expected
    assert second == {"document": f"{file}:2", "error": "made up"}
    assert printed.err == f"gpt2-edge: {file}:2: made up\n"


def test_short_documents_are_scored_together_and_few_at_a_time(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    lengths = [10] * 100 + [3000, 3000, 300_000, 5, 0, 5]
    file.write_bytes(b"".join(b"x" * length + b"\n" for length in lengths))
    batches = list(document_batches([str(file)], lines=True))
    assert [document.data for batch in batches for document in batch] == [b"x" * length for length in lengths]
    assert [len(batch) for batch in batches] == [64, 36 + 1, 1, 1, 3]
    paths = [tmp_path / f"{number}.txt" for number in range(70)]
    for path in paths:
        path.write_bytes(b"y" * 10)
    batches = list(document_batches([*map(str, paths), str(tmp_path / "missing"), str(file)], lines=False))
    assert [len(batch) for batch in batches] == [64, 6, 1, 1]
    assert [document.name for batch in batches for document in batch] == [
        *map(str, paths),
        str(tmp_path / "missing"),
        str(file),
    ]


def test_a_wrong_stride_is_no_fault_of_the_documents(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["score", str(tiny_folder), "missing.txt", "--stride", "32"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("gpt2-edge: stride is 32: give an integer from 1 to 31")


def test_a_line_is_scored_as_soon_as_it_comes(tiny_folder: Path, tiny: gpt2_edge.Model) -> None:
    expected = tiny.score("A king.").logprobs
    command = [sys.executable, "-m", "gpt2_edge", "score", str(tiny_folder), "--lines", "--json"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for number in (1, 2):
            process.stdin.write(b"king.\nA " if number > 1 else b"A king.\nA ")  # the next has begun
            process.stdin.flush()
            line = json.loads(process.stdout.readline())
            assert (line["document"], line["logprobs"]) == (f"-:{number}", expected)
        process.stdin.write(b"king.\n" * 200)
        process.stdin.close()
        documents = [json.loads(line)["document"] for line in process.stdout]
        assert documents == [f"-:{number}" for number in range(3, 203)]
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == b""  # no bar in a pipe


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are Unix")
def test_a_terminal_shows_a_bar_that_stays_out_of_the_results(tiny_folder: Path, tmp_path: Path) -> None:
    import fcntl
    import pty
    import struct
    import termios

    _, long, bad = write_documents(tmp_path)
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-m", "gpt2_edge", "score", str(tiny_folder), str(long), str(bad), "--stride", "1"]
    results = tmp_path / "results"
    with results.open("wb") as stdout, subprocess.Popen(command, stdout=stdout, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        while chunk := _read(controller):
            shown += chunk
        assert process.wait(timeout=60) == 1
    os.close(controller)
    assert "█".encode() in shown
    # The bar is wiped before a message, which so begins its line.
    assert re.search(rf"\r +\rgpt2-edge: {re.escape(str(bad))}: the text is not UTF-8", shown.decode())
    lines = results.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2
    assert lines[1].endswith(str(long))
    assert "█" not in results.read_text(encoding="utf-8")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # Linux's answer when the other end is closed
        return b""
