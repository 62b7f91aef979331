"""The command line: output, messages and exit statuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import gpt2_edge
from gpt2_edge.cli import _COMMANDS, main

PROMPT = "Once upon a time"


def run_process(*arguments: str, stdin: bytes = b"", **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "gpt2_edge", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False, timeout=120, **options)


def test_generate_prints_prompt_and_continuation_as_one_text(
    storyteller_int8: Path, int8_model: gpt2_edge.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(storyteller_int8), PROMPT, "--max-new-tokens", "20"]) == 0
    printed = capsys.readouterr()
    assert printed.out == PROMPT + int8_model.generate(PROMPT, max_new_tokens=20).text + "\n"
    assert printed.err == ""


def test_generate_json_separates_prompt_and_text(
    storyteller_int8: Path, int8_model: gpt2_edge.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--max-new-tokens", "8", "--temperature", "1", "--seed", "5", "-n", "3", "--json"]
    assert main(["generate", str(storyteller_int8), PROMPT, *arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = int8_model.generate(PROMPT, max_new_tokens=8, temperature=1.0, seed=5, n=3)
    assert [line["text"] for line in lines] == [sample.text for sample in expected]
    assert [line["seed"] for line in lines] == [sample.seed for sample in expected]
    assert lines[0]["prompt"] == PROMPT
    assert lines[0]["finish_reason"] == "length"


def test_generate_shows_each_sample_with_its_seed(storyteller_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["-n", "2", "--temperature", "1", "--seed", "5", "--max-new-tokens", "4"]
    assert main(["generate", str(storyteller_int8), PROMPT, *arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"--- seed 5\n{PROMPT}")
    assert printed.count("--- seed ") == 2


@pytest.mark.parametrize("ending", [b"", b"\n", b"\r\n"])
def test_prompt_from_standard_input_loses_only_its_last_newline(storyteller_int8: Path, ending: bytes) -> None:
    done = run_process(
        "generate", str(storyteller_int8), "-", "--max-new-tokens", "0", stdin="Zwölf\nund ".encode() + ending
    )
    assert done.returncode == 0
    assert done.stdout.decode() == "Zwölf\nund \n"


def test_nul_byte_in_the_prompt_is_a_byte_like_any_other(storyteller_int8: Path) -> None:
    done = run_process("generate", str(storyteller_int8), "-", "--max-new-tokens", "1", stdin=b"a\0b")
    assert done.returncode == 0
    assert done.stdout.startswith(b"a\0b")


def test_empty_prompt_starts_a_new_document(storyteller_int8: Path, int8_model: gpt2_edge.Model) -> None:
    done = run_process("generate", str(storyteller_int8), "", "--max-new-tokens", "10")
    assert done.stdout.decode() == int8_model.generate([0], max_new_tokens=10).text + "\n"


def test_invalid_utf8_is_one_line_that_says_where(storyteller_int8: Path) -> None:
    done = run_process("generate", str(storyteller_int8), "-", stdin=b"ab\xffc")
    assert done.returncode == 1
    assert done.stdout == b""
    assert b"standard input is not UTF-8: byte 0xff at offset 2" in done.stderr
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "1.5"], "top_p is 1.5: give a number from 0 to 1"),
        (["--temperature", "-1"], "temperature is -1.0: give 0 (greedy) or any number above it"),
        (["--temperature", "nan"], "temperature is nan: give 0 (greedy) or any number above it"),
        (["--top-k", "-3"], "top_k is -3: give an integer, 0 or more"),
        (["--max-new-tokens", "-1"], "max_new_tokens is -1: give an integer, 0 or more"),
        (
            ["--keep-tokens", "20"],
            "keep_tokens is 20 and overflow is 'stop', which forgets no tokens: "
            "give overflow 'slide' with it, or leave keep_tokens out",
        ),
        (["--seed", "-1"], "seed is -1: give an integer from 0 to 18446744073709551615"),
        (["-n", "0"], "n is 0: give an integer, 1 or more"),
        (
            ["-n", "3", "--min-new-tokens", "2"],
            "-n 3 would give the same text 3 times, because the choice of tokens is greedy: "
            "give --temperature or another option that draws, or leave -n out",
        ),
        (["--logprobs", "3"], "--logprobs is shown with --json only: give both"),
        (["--threads", "0"], "threads is 0: give an integer from 1 to 1024"),
        (["--device", "gpu"], "device is 'gpu': give 'cpu', 'cuda', 'cuda:1' (the second GPU) or 'auto'"),
    ],
)
def test_a_bad_option_is_one_line_and_status_1(
    storyteller_int8: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["generate", str(storyteller_int8), PROMPT, *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"gpt2-edge: {message}\n"


def test_top_p_0_is_greedy(storyteller_int8: Path, int8_model: gpt2_edge.Model) -> None:
    done = run_process("generate", str(storyteller_int8), PROMPT, "--top-p", "0", "--max-new-tokens", "10")
    assert done.stdout.decode() == PROMPT + int8_model.generate(PROMPT, max_new_tokens=10).text + "\n"


def test_a_prompt_longer_than_the_context_names_both_counts(storyteller_int8: Path) -> None:
    done = run_process("generate", str(storyteller_int8), "-", stdin=b"a b " * 1000)
    assert done.returncode == 1
    assert b"tokens, the model's context holds 512" in done.stderr


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.write_text("x"), "is a file"),
        (lambda path: path.mkdir(), "is not a model folder: it has no manifest.json"),
    ],
)
def test_what_is_not_a_model_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Any, message: str
) -> None:
    path = tmp_path / "folder"
    make(path)
    for command in (["generate", str(path), "a"], ["info", str(path)], ["verify", str(path)], ["score", str(path)]):
        assert main(command) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2.Q8_0.gguf", "is in the format of llama.cpp: export the checkpoint that it was made from"),
        ("model.safetensors", "has the weights of a checkpoint: export its folder, `gpt2-edge export "),
        ("model.onnx", "is a file: give the model folder that it lies in"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF and more")
    assert main(["generate", str(tmp_path / name), "a"]) == 1
    assert message in capsys.readouterr().err


def test_sealing_a_checkpoint_says_where_it_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert main(["seal", str(tmp_path)]) == 1
    assert "has no .onnx file: give a folder that optimum exported; a checkpoint goes to" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[], ["bogus"], ["generate"], ["generate", "folder"], ["next", "f", "p", "-k", "x"]]
)
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: gpt2-edge" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Once", "--temprature", "1"], "there is no option --temprature: did you mean --temperature?"),
        (["Once", "--topk=40"], "there is no option --topk: did you mean --top-k?"),
        (["Once", "--what-is-this"], "there is no option --what-is-this\n"),
        (
            ["Once", "upon", "a", "time"],
            "'upon' is one argument too many: put a text or a path that has spaces in quotes",
        ),
    ],
)
def test_what_is_typed_wrongly_is_named_with_what_was_meant(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["generate", "storyteller", *arguments])
    assert caught.value.code == 2
    assert f"gpt2-edge generate: error: {message}" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_is_said_without_the_systems_number() -> None:
    with Path("/dev/full").open("wb") as full:
        command = [sys.executable, "-m", "gpt2_edge", "next", "storyteller", "Once"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (1, b"gpt2-edge: No space left on device\n")


@pytest.mark.parametrize("command", list(_COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"usage: gpt2-edge {command}" in capsys.readouterr().out


def test_next_prints_the_likeliest_tokens(
    storyteller_int8: Path, int8_model: gpt2_edge.Model, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["next", str(storyteller_int8), "Once upon a", "-k", "3", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["token"] for line in lines] == [token.token for token in int8_model.next_tokens("Once upon a", 3)]
    assert main(["next", str(storyteller_int8), "Once upon a", "-k", "3"]) == 0
    assert '" time"' in capsys.readouterr().out.splitlines()[0]


def test_score_takes_files_and_standard_input(
    storyteller_int8: Path, int8_model: gpt2_edge.Model, tmp_path: Path
) -> None:
    text = "There was once a king who had three sons."
    file = tmp_path / "text.txt"
    file.write_text(text, encoding="utf-8")
    from_file = run_process("score", str(storyteller_int8), str(file), "--json")
    from_stdin = run_process("score", str(storyteller_int8), "--json", stdin=text.encode())
    expected = int8_model.score(text)
    for done in (from_file, from_stdin):
        document = json.loads(done.stdout)
        assert document["tokens"] == expected.tokens
        assert document["logprobs"] == pytest.approx(expected.logprobs, abs=1e-6)
        assert document["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)


def test_score_goes_on_after_a_document_that_cannot_be_scored(storyteller_int8: Path, tmp_path: Path) -> None:
    good, empty, missing = tmp_path / "good.txt", tmp_path / "empty.txt", tmp_path / "missing.txt"
    good.write_text("A king.", encoding="utf-8")
    empty.write_text("", encoding="utf-8")
    done = run_process("score", str(storyteller_int8), str(missing), str(empty), str(good))
    assert done.returncode == 1
    assert done.stdout.decode().rstrip().endswith(str(good))
    assert f"{empty}: the text has 0 tokens" in done.stderr.decode()
    assert f"gpt2-edge: {missing}: it cannot be read: No such file or directory\n" in done.stderr.decode()


def test_info_and_verify(storyteller_int8: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(storyteller_int8), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["precision"] == "int8"
    assert document["here"]["telemetry here"] == "disabled"
    assert main(["info", str(storyteller_int8)]) == 0
    assert "int8, recipe int8\n" in capsys.readouterr().out
    assert main(["verify", str(storyteller_int8)]) == 0
    assert "4 of 4 files" in capsys.readouterr().out


def test_a_reader_that_goes_away_is_no_traceback(storyteller_int8: Path) -> None:
    command = [sys.executable, "-m", "gpt2_edge", "next", str(storyteller_int8), "a", "-k", "8000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    process.wait(timeout=60)
    assert errors == b""


def test_commands_import_only_what_they_need() -> None:
    program = "import sys; from gpt2_edge.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" + (
        "print([name for name in ('onnxruntime', 'tokenizers', 'numpy', 'torch', 'onnx') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(sys.platform == "win32", reason="closes streams as a shell does")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(
    "arguments", ["generate storyteller - --max-new-tokens 2", "repl", "doctor --json", "next storyteller -"]
)
def test_a_stream_that_is_closed_is_an_empty_one(closed: str, arguments: str) -> None:
    command = f'exec "{sys.executable}" -m gpt2_edge {arguments} {closed}'
    done = subprocess.run(["sh", "-c", command], input=b"", capture_output=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")
