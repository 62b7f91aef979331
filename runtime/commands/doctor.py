"""`gpt2-edge doctor`: what this machine offers, what is wrong, and how to mend it."""

import argparse
import json
import os
import sys
import textwrap
from dataclasses import asdict

from gpt2_edge.doctor import Examination, examine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print what was found; the status is 1 if there is a problem."""
    found = examine()
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, ensure_ascii=False))
    else:
        print(as_text(found, coloured=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 1 if found.problems else 0


def as_text(found: Examination, *, coloured: bool) -> str:
    """Return the report as it is printed: facts, notes, and each problem with what mends it."""
    red, green, yellow, plain = ("\033[31m", "\033[32m", "\033[33m", "\033[0m") if coloured else ("", "", "", "")
    width = max(map(len, found.facts))
    lines = [f"{name:<{width}}  {value}" for name, value in found.facts.items()]
    for note in found.notes:
        lines += ["", *_wrapped(f"{yellow}note{plain}", note)]
    for problem in found.problems:
        lines += ["", *_wrapped(f"{red}problem{plain}", problem.what), f"    {problem.remedy}"]
    if not found.problems:
        lines += ["", f"{green}no problems found{plain}"]
    return "\n".join(lines)


def _wrapped(label: str, text: str) -> list[str]:
    first, *rest = textwrap.wrap(text, 100, break_long_words=False, break_on_hyphens=False)
    return [f"{label}: {first}", *(f"    {line}" for line in rest)]
