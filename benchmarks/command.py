"""`gpt2-edge bench`: speed, memory and quality of model folders, side by side."""

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import Final

from gpt2_edge.benchmarks.peers.options import add_peer_arguments, peer_models_from
from gpt2_edge.benchmarks.plan import DEFAULT_BATCHES, DEFAULT_NEW_TOKENS, DEFAULT_REPETITIONS, Settings
from gpt2_edge.benchmarks.report import Report
from gpt2_edge.errors import MissingDependencyError, OptionError
from gpt2_edge.interrupt import INTERRUPTED
from gpt2_edge.progress import Progress
from gpt2_edge.seal import check_folder_of_file

FORMATS: Final = ("table", "md", "csv", "json", "jsonl", "html")
_QUICK_REPETITIONS: Final = 3
_QUICK_QUALITY_TOKENS: Final = 1024
_QUALITY_TOKENS: Final = 4096
_MOST_COUNTS: Final = 1000
_RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `bench`."""
    parser.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="*",
        default=["storyteller"],
        help="model folders or packs (default: storyteller)",
    )
    lengths = parser.add_argument_group("what is measured (lists: 128,512 or 128-1024+128 or 128-1024*2)")
    lengths.add_argument("-p", "--prompts", metavar="N,...", type=_counts, help="prompt lengths, pp (default: 128,512)")
    lengths.add_argument("-n", "--new-tokens", metavar="N,...", type=_counts, help="new tokens, tg (default: 128)")
    lengths.add_argument("-d", "--depths", metavar="N,...", type=_counts, help="tokens before tg (default: 512,900)")
    lengths.add_argument("-b", "--batches", metavar="N,...", type=_counts, help="side by side (default: 1,4,8)")
    lengths.add_argument("-r", "--repetitions", metavar="N", type=int, help="samples of each test (default: 5)")
    lengths.add_argument(
        "--sample-seconds", metavar="S", type=float, default=0.25, help="run again what is over sooner (default: 0.25)"
    )
    lengths.add_argument(
        "--threads", metavar="N,...", type=_counts, help="threads that compute, a row for each (default: the cores)"
    )
    lengths.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ..., or auto (the default)")
    lengths.add_argument(
        "--text", metavar="FILE", type=Path, help="text to measure quality over (default: the storyteller's)"
    )
    lengths.add_argument(
        "--quality-tokens", metavar="N", type=int, help="of the text (default: 4096); 0 leaves quality out"
    )
    lengths.add_argument("--quick", action="store_true", help="about a minute: 3 repetitions, batch 1, less text")
    lengths.add_argument(
        "--sustain", metavar="SECONDS", type=float, default=0.0, help="then decode for so long, to see it slow down"
    )
    add_peer_arguments(parser)
    output = parser.add_argument_group("what is shown")
    output.add_argument("--format", choices=FORMATS, default="table", help="how to write the result (default: table)")
    output.add_argument("-o", "--output", metavar="FILE", type=Path, help="write the result there, and show the table")
    output.add_argument("--plot", metavar="FILE", type=Path, help="also draw it, as .png or .svg")
    output.add_argument("--compare", metavar="REPORT", type=Path, help="show changes since an earlier --format json")


def run(arguments: argparse.Namespace) -> int:
    """Measure and show."""
    try:
        from gpt2_edge.benchmarks.comparison import compare_reports
        from gpt2_edge.benchmarks.coordinator import Coordinator
        from gpt2_edge.benchmarks.output import check_plot, show
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"measuring needs {error.name}, which is not installed: run pip install 'gpt2-edge[cpu,bench]'"
        ) from error
    earlier = None if arguments.compare is None else _read_report(arguments.compare)
    for path in (arguments.output, arguments.plot):
        if path is not None:
            check_folder_of_file(path)
    if arguments.plot is not None:
        check_plot(arguments.plot)
    settings = settings_from(arguments)
    peers = peer_models_from(arguments)
    coordinator = Coordinator(arguments.folders, settings, arguments.text, peers)
    with Progress("bench", total=coordinator.steps) as progress:
        coordinator.measure(progress.start, progress.advance)
        report = coordinator.report()
        if report.interrupted:
            progress.break_off()
    if report.interrupted and not _has_speeds(report):
        raise KeyboardInterrupt  # there is nothing to show, and an earlier result of that name is worth more
    if earlier is not None:
        report = replace(report, comparison=compare_reports(report, earlier, arguments.compare.name))
    shown = show(report, arguments.format, arguments.output, arguments.plot)
    if report.interrupted:
        return INTERRUPTED
    return 0 if shown and all(variant.error is None for variant in report.variants) else 1


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Return what the options ask for.

    Raises:
        OptionError: A value is not allowed.
    """
    quick = arguments.quick
    quality_tokens, repetitions = arguments.quality_tokens, arguments.repetitions
    if quality_tokens is None:
        quality_tokens = _QUICK_QUALITY_TOKENS if quick else _QUALITY_TOKENS
    if repetitions is None:
        repetitions = _QUICK_REPETITIONS if quick else DEFAULT_REPETITIONS
    return Settings(
        prompts=arguments.prompts,
        new_tokens=arguments.new_tokens or DEFAULT_NEW_TOKENS,
        depths=arguments.depths,
        batches=arguments.batches or ((1,) if quick else DEFAULT_BATCHES),
        repetitions=repetitions,
        sample_seconds=arguments.sample_seconds,
        threads=arguments.threads,
        device=arguments.device,
        quality_tokens=quality_tokens,
        sustain_seconds=arguments.sustain,
    )


def _has_speeds(report: Report) -> bool:
    speeds = (speed for variant in report.variants for speed in variant.speeds.values())
    return any(speed.tokens_per_second is not None for speed in speeds)


def _read_report(path: Path) -> Report:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read {path}: {error}") from error
    return Report.from_json(text, str(path))


def _counts(text: str) -> tuple[int, ...]:
    """Read "128,512", "128-1024+128" or "128-1024*2", as llama-bench does."""
    counts: list[int] = []
    for part in text.split(","):
        matched = _RANGE.fullmatch(part)
        if matched is None:
            counts.append(_count(part))
            continue
        value, last = int(matched[1]), int(matched[2])
        operator, step = matched[3] or "+", int(matched[4] or 1)
        if step < (2 if operator == "*" else 1) or (operator == "*" and value < 1):
            raise argparse.ArgumentTypeError(f"{part!r} never ends: the step is too small")
        if value > last:
            raise argparse.ArgumentTypeError(f"{part!r} has no numbers: give the smaller one first")
        while value <= last:
            if len(counts) == _MOST_COUNTS:
                raise argparse.ArgumentTypeError(f"{part!r} has over {_MOST_COUNTS} numbers: give a larger step")
            counts.append(value)
            value = value + step if operator == "+" else value * step
    return tuple(dict.fromkeys(counts))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: give for example 128,512")
    return int(text)
