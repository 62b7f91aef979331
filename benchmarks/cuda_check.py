"""Check and measure gpt2-edge on an NVIDIA GPU: correctness against the CPU, then the speed that is aimed for.

    pip install numpy tokenizers 'onnxruntime-gpu[cuda,cudnn]>=1.31'
    python benchmarks/cuda_check.py --json results.json

Needs the repository, Python and these three packages, nothing else: no torch, no network, and gpt2-edge need not be
installed. The graphs are carried in the repository, the storyteller's weights too; the weights of the models that
are only timed are drawn at random here. `--device cpu --quick` goes the same way on a machine without a GPU.

Each check runs in a process of its own, since an error of CUDA spoils the whole process that it happens in: one that
fails, crashes or hangs becomes a line of the table, and the next one runs. The results are written after each.
"""

import argparse
import importlib.util
import json
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parent.parent


def _import_from_repository(name: str, folder: Path) -> None:
    """Import a package under its installed name from the repository's folder for it."""
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"there is no package in {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if importlib.util.find_spec("gpt2_edge") is None:
    _import_from_repository("gpt2_edge", REPOSITORY / "runtime")
    _import_from_repository("gpt2_edge.benchmarks", REPOSITORY / "benchmarks")

from gpt2_edge.benchmarks.cuda_checks import CHECKS, Plan, Result, collect  # noqa: E402
from gpt2_edge.device import parse_device  # noqa: E402
from gpt2_edge.doctor import examine  # noqa: E402
from gpt2_edge.errors import Gpt2EdgeError  # noqa: E402
from gpt2_edge.interrupt import INTERRUPTED, TERMINATED, is_terminated, sigterm_interrupts  # noqa: E402
from gpt2_edge.seal import write_file  # noqa: E402

MOST_SECONDS_OF_A_CHECK: Final = 900.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and print the table; the status is 1 if a check failed or a goal was missed."""
    parser = argparse.ArgumentParser(description="Check and measure gpt2-edge on an NVIDIA GPU.")
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:1 ...; or cpu, to try the script")
    parser.add_argument("--quick", action="store_true", help="a few tokens, and a tiny model for all that is timed")
    parser.add_argument("--no-xl", action="store_true", help="leave GPT-2 XL out (3 GB of random weights)")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too, after each check")
    parser.add_argument("--run-in", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    try:
        index = parse_device(arguments.device)
    except Gpt2EdgeError as error:
        parser.error(str(error))
    names = [name for name in arguments.only or CHECKS if not (arguments.no_xl and name == "xl")]
    plan = Plan("cpu" if index is None else "cuda", index or 0, arguments.quick, arguments.run_in or Path())
    if arguments.run_in is not None:
        run_here(names, plan)
        return 0
    machine = describe_machine()
    for name, value in machine.items():
        print(f"{name:<24} {value}", file=sys.stderr)
    results: list[Result] = []
    was_interrupted = False
    with sigterm_interrupts(), tempfile.TemporaryDirectory(prefix="gpt2-edge-cuda-check-") as place:
        try:
            for name in names:
                started_at = time.perf_counter()
                command = [sys.executable, __file__, "--device", arguments.device, "--only", name, "--run-in", place]
                for result in run_apart(name, [*command, "--quick"] if plan.quick else command):
                    print(_line(result), flush=True)
                    results.append(result)
                    write_results(arguments.json, plan, machine, results, "running")
                print(f"({name}: {time.perf_counter() - started_at:.0f} s)", file=sys.stderr)
                if name == "opening" and any(result.passed is False for result in results):
                    print("cuda_check: nothing else can run before this does", file=sys.stderr)
                    break
        except KeyboardInterrupt:
            was_interrupted = True
    write_results(arguments.json, plan, machine, results, "interrupted" if was_interrupted else "finished")
    failed = [result for result in results if result.passed is False]
    print(f"\n{len(failed)} of {sum(result.passed is not None for result in results)} checks and goals failed")
    if was_interrupted:
        return TERMINATED if is_terminated() else INTERRUPTED
    return int(bool(failed))


def describe_machine() -> dict[str, str]:
    """Return what `gpt2-edge doctor` finds, and the versions of all that takes part."""
    versions = {}
    for distribution in metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in ("numpy", "tokenizers") or name.startswith("nvidia-"):
            versions[name] = distribution.version
    try:
        facts = dict(examine().facts)
    except Exception as error:  # noqa: BLE001 - a machine that cannot be described can be checked all the same
        facts = {"gpt2-edge doctor": f"{type(error).__name__}: {error}"}
    return {"node": platform.machine(), **facts, **dict(sorted(versions.items()))}


def run_here(names: Sequence[str], plan: Plan) -> None:
    """Run checks in this process and print each result as a line of JSON."""
    for name in names:
        for result in collect(CHECKS[name], plan):
            print(json.dumps(asdict(result)), flush=True)


def run_apart(name: str, command: Sequence[str], most_seconds: float = MOST_SECONDS_OF_A_CHECK) -> Iterator[Result]:
    """Run a check in a process of its own.

    Args:
        name: Of the check.
        command: Prints results as lines of JSON; what else it prints is passed on to standard error.
        most_seconds: After which it is ended.

    Yields:
        Its results as they come, and one more if it ended otherwise than it should.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace") as process:
        watch = threading.Timer(most_seconds, process.kill)
        watch.start()
        try:
            if process.stdout is None:
                raise ValueError("the output was not piped")
            for line in process.stdout:
                result = _parse(line)
                if result is None:
                    print(line, end="", file=sys.stderr)
                else:
                    yield result
            status = process.wait()
        finally:
            was_late = not watch.is_alive()
            watch.cancel()
            process.kill()
    if status:
        how = f"took more than {most_seconds:.0f} s" if was_late else _describe_status(status)
        yield Result(f"{name} ended early", how, "to run", False)


def write_results(
    path: Path | None, plan: Plan, machine: dict[str, str], results: Sequence[Result], state: str
) -> None:
    """Write what there is so far; the file appears whole.

    Args:
        path: Where; None writes nothing.
        plan: What was asked for.
        machine: As `describe_machine` returns it.
        results: So far.
        state: "running", "finished" or "interrupted".
    """
    if path is None:
        return
    document = {
        "state": state,
        "plan": {"device": plan.device, "index": plan.index, "quick": plan.quick},
        "machine": machine,
        "results": [asdict(result) for result in results],
    }
    write_file(path, [(json.dumps(document, indent=2) + "\n").encode()])


def _parse(line: str) -> Result | None:
    try:
        fields: Any = json.loads(line)
        return Result(**fields)
    except (TypeError, ValueError):
        return None


def _describe_status(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"ended by signal {-status}"


def _line(result: Result) -> str:
    verdict = {True: "ok", False: "FAILED", None: ""}[result.passed]
    return f"{result.name:<64} {result.value:>14}  {result.goal:<18} {verdict}".rstrip()


if __name__ == "__main__":
    sys.exit(main())
