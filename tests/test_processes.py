"""Processes that fork, processes that end, and what is sent from one to another."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

import gpt2_edge
from gpt2_edge import ContextLengthError, Gpt2EdgeError, errors

PROMPT: Final = "Once upon a time"
PATIENCE_SECONDS: Final = 60  # for what should take no time at all

needs_fork = pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows")


def run_program(program: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "-c", f"import os, sys, threading, time, gpt2_edge\n{program}", folder]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE_SECONDS, check=False)


@needs_fork
@pytest.mark.parametrize("end", ["sys.exit(0)", "del model"])
def test_a_forked_process_ends(storyteller_int8: Path, end: str) -> None:
    """Two threads, so that ONNX Runtime has one of its own that is not in the forked process."""
    program = f"model = gpt2_edge.load(sys.argv[1], threads=2)\nif os.fork() == 0:\n    {end}\nelse:\n    os.wait()\n"
    done = run_program(program, storyteller_int8)
    assert (done.returncode, done.stderr) == (0, "")


@needs_fork
@pytest.mark.parametrize(
    ("begin", "go_on"),
    [
        ("begun = model.stream('Once', max_new_tokens=9); next(begun)", "next(begun)"),
        (
            "begun = model.session(); stream = begun.stream(max_new_tokens=9); next(stream); del stream",
            "begun.generate()",
        ),
        ("import asyncio; asyncio.run(model.agenerate('Once', max_new_tokens=2))", "asyncio.run(model.agenerate('a'))"),
    ],
    ids=["stream", "session", "asyncio"],
)
def test_what_was_begun_before_a_fork_is_refused_after_it(storyteller_int8: Path, begin: str, go_on: str) -> None:
    program = f"""
model = gpt2_edge.load(sys.argv[1], threads=2)
{begin}
if os.fork() == 0:
    try:
        {go_on}
    except gpt2_edge.ModelClosedError as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""
    done = run_program(program, storyteller_int8)
    assert "before this process was forked" in done.stdout
    assert done.stderr == ""


@needs_fork
def test_a_session_keeps_its_text_after_a_fork(storyteller_int8: Path) -> None:
    program = """
session = gpt2_edge.load(sys.argv[1], threads=2).session()
session.append("Once")
session.generate(max_new_tokens=2)
if os.fork() == 0:
    session.append(" more")
    print(session.text, flush=True)
    os._exit(0)
os.wait()
"""
    done = run_program(program, storyteller_int8)
    assert done.stdout.endswith(" more\n")


@pytest.mark.parametrize(
    "compute",
    [
        "model.generate('Once', max_new_tokens=10**6, overflow='slide', ignore_eos=True)",
        "[model.logits([7] * 500) for _ in range(10**6)]",
    ],
    ids=["decode", "prefill"],
)
def test_a_daemon_thread_may_compute_when_the_program_ends(storyteller_int8: Path, compute: str) -> None:
    program = f"""
model = gpt2_edge.load(sys.argv[1])
for _ in range(2):
    threading.Thread(target=lambda: {compute}, daemon=True).start()
time.sleep(0.3)
"""
    done = run_program(program, storyteller_int8)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_model_may_be_used_by_what_is_called_at_exit(storyteller_int8: Path) -> None:
    program = """
import atexit
def say():
    print(model.generate("Once", max_new_tokens=2).finish_reason)
atexit.register(say)
model = gpt2_edge.load(sys.argv[1])
forever = dict(max_new_tokens=10**6, overflow="slide", ignore_eos=True)
threading.Thread(target=lambda: model.generate("Once", **forever), daemon=True).start()
time.sleep(0.2)
"""
    done = run_program(program, storyteller_int8)
    assert (done.returncode, done.stdout, done.stderr) == (0, "length\n", "")


ERRORS: Final = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Gpt2EdgeError)
]


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_can_be_sent_between_processes(kind: type[Gpt2EdgeError]) -> None:
    """One that cannot be breaks the whole pool of processes."""
    error = ContextLengthError(600, 512) if kind is ContextLengthError else kind("what is wrong")
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is kind
    assert str(sent) == str(error)
    assert vars(sent) == vars(error)


def test_results_can_be_sent_between_processes(int8_model: gpt2_edge.Model) -> None:
    results = (
        int8_model.generate(PROMPT, max_new_tokens=3, logprobs=2),
        int8_model.next_tokens(PROMPT),
        int8_model.score(PROMPT),
        next(int8_model.stream(PROMPT)),
    )
    assert pickle.loads(pickle.dumps(results)) == results


@pytest.mark.parametrize("send", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_cannot_be_sent_says_what_to_do(int8_model: gpt2_edge.Model, send: Any) -> None:
    session = int8_model.session()
    session.append(PROMPT)
    with pytest.raises(gpt2_edge.SessionError, match="`fork` it, or `save` it"):
        send(session)
    stream = int8_model.stream(PROMPT, max_new_tokens=2)
    with pytest.raises(gpt2_edge.OptionError, match="take its pieces, or its `result`"):
        send(stream)
    assert "".join(piece.text for piece in stream) == int8_model.generate(PROMPT, max_new_tokens=2).text
