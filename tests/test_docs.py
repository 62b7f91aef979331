"""The documentation is true where a machine can tell: links, programs, commands, options, messages."""

import argparse
import ast
import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import command_tables
import pytest

import gpt2_edge
from gpt2_edge.cli import _COMMANDS
from gpt2_edge.results import FinishReason

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ALL_PAGES = [
    *PAGES,
    *(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *(REPOSITORY / "examples").glob("*.md"),
    *(REPOSITORY / "benchmarks").rglob("*.md"),
]

NOT_RUN = "<!-- not run by the tests: "
# What stands in a message for something that differs.
PLACEHOLDERS = (
    *("CHECKPOINT", "FILE", "FOLDER", "GRAPH", "HUB", "M", "N", "NAME", "PACK", "PACKAGE", "R", "SESSION", "X", "Y"),
    *("503", "65504", "'cuda'", "int8", "manifest.json", "..."),
)


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def without_code(page: str) -> str:
    page = re.sub(r"^```.*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(re.sub(r"`[^`]*`", "", line) for line in page.splitlines() if not line.startswith("    "))


# Links


def slugs(path: Path) -> set[str]:
    """Return the anchors that a page has both on a Git host and on the site: each names headings its own way."""
    page = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = set()
    for heading in re.findall(r"^#+ (.*)$", page, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
        plain = unicodedata.normalize("NFKD", words).encode("ascii", "ignore").decode()
        if words.replace(" ", "-") == re.sub(r"[-\s]+", "-", plain):
            found.add(words.replace(" ", "-"))
    return found


@pytest.mark.parametrize("path", ALL_PAGES, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        leads_to = (path.parent / file).resolve() if file else path
        assert leads_to.exists(), f"{target}: no such file"
        if path.parent == DOCS:
            assert leads_to.parent == DOCS, f"{target}: the site has nothing outside of docs/"
        if anchor:
            assert anchor in slugs(leads_to), f"{target}: no such heading; there are {sorted(slugs(leads_to))}"


def test_the_site_lists_every_page() -> None:
    listed = re.findall(r": (\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == [path.name for path in PAGES]


# Programs


def programs() -> Iterator[tuple[str, str]]:
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for number, found in enumerate(re.finditer(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE), 1):
            if not page[: found.start()].rstrip().splitlines()[-1].startswith(NOT_RUN):
                yield f"{path.stem}-{number}", found[1]


PROGRAMS = dict(programs())


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_run(name: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAMS[name]],
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.strip(), "it shows nothing"


def test_the_graph_without_gpt2_edge_writes_what_gpt2_edge_writes(tmp_path: Path) -> None:
    from gpt2_edge.saturation import products_saturate

    if products_saturate():
        pytest.skip("on this processor the runtime sets an option that the page only names")
    (program,) = (program for name, program in PROGRAMS.items() if name.startswith("graph-"))
    assert "import gpt2_edge" not in program
    printed = subprocess.check_output([sys.executable, "-c", program], encoding="utf-8", cwd=tmp_path)
    prompt = re.search(r'encode\("(.*?)"\)', program)[1]
    count = int(re.search(r"in range\((\d+)\)", program)[1])
    with gpt2_edge.load("storyteller", device="cpu") as model:
        assert printed == prompt + model.generate(prompt, max_new_tokens=count).text + "\n"


# Commands


def command_lines(page: str) -> Iterator[str]:
    """Yield the lines of shell commands in blocks of code."""
    blocks = re.sub(r"^```(python|json).*?^```$", "", page, flags=re.DOTALL | re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", blocks).splitlines():
        if line.startswith("    "):
            yield from re.split(r" (?:\||&&) ", line.strip())


def gpt2_edge_commands(page: str) -> Iterator[tuple[str, bool]]:
    """Yield the arguments after `gpt2-edge`, and whether they are a whole command."""
    for line in command_lines(page):
        if line.startswith("gpt2-edge "):
            yield line.removeprefix("gpt2-edge "), not re.search(r"\[[A-Z-]|\.\.\.|COMMAND|--help|--version", line)
    for part in re.findall(r"`gpt2-edge ([^`]+)`", page):
        yield part, False


@cache
def parser_of(command: str) -> argparse.ArgumentParser:
    return command_tables.parser_of(command)


@pytest.mark.parametrize("path", ALL_PAGES, ids=name_of)
def test_commands_exist(path: Path) -> None:
    for line, is_whole in gpt2_edge_commands(path.read_text(encoding="utf-8")):
        command, *arguments = shlex.split(line, comments=True)
        if command in ("COMMAND", "--version"):
            continue
        assert command in _COMMANDS, line
        parser = parser_of(command)
        if is_whole:
            try:
                parser.parse_args(arguments)
            except SystemExit:
                pytest.fail(f"gpt2-edge {line}: {parser.format_usage()}")
        options = {name.strip("[]") for name in arguments if re.match(r"\[?--?[a-z]", name)}
        assert options <= set(parser._option_string_actions), line


@pytest.mark.parametrize("path", ALL_PAGES, ids=name_of)
def test_programs_and_targets_exist(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    lines = [*command_lines(page), *re.findall(r"`([^`\n]+)`", page)]
    for line in lines:
        words = line.split()
        match words:
            case ["make", target, *_] if re.fullmatch(r"[a-z-]+", target):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), line
            case ["python", "-m", module, *_] if module.startswith("gpt2_edge"):
                assert find_spec(module) is not None, line
            case ["python", program, *_] if program.endswith(".py"):
                assert (REPOSITORY / program).exists(), line


def test_the_page_of_commands_has_all() -> None:
    page = command_tables.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == list(command_tables.tables_in(page)) == list(_COMMANDS)


@pytest.mark.parametrize("command", _COMMANDS)
def test_the_page_of_commands_has_all_arguments(command: str) -> None:
    page = command_tables.PAGE.read_text(encoding="utf-8")
    assert "option_strings" not in command_tables.table_of(command), "a help text has a % that is not doubled"
    assert command_tables.tables_in(page)[command] == command_tables.table_of(command), (
        "run python tests/command_tables.py"
    )


# Python


def public_words() -> Iterator[str]:
    """Yield what somebody who uses the package may write: names, arguments, options, methods, fields."""
    from gpt2_edge.quantize import quantize_folder

    yield from (name for name in gpt2_edge.__all__ if not name.startswith("_"))
    for function in (gpt2_edge.load, gpt2_edge.Model.score, gpt2_edge.Model.generate, quantize_folder):
        yield from inspect.signature(function).parameters.keys() - {"self", "source", "destination"}
    for thing in (gpt2_edge.Model, gpt2_edge.Session, gpt2_edge.TextStream, gpt2_edge.Timings, gpt2_edge.Score):
        yield from (name for name in vars(thing) if not name.startswith("_"))
    for made in (gpt2_edge.GenerationOptions, gpt2_edge.Generation, gpt2_edge.Timings, gpt2_edge.Piece):
        yield from (field.name for field in dataclasses.fields(made))
    for made in (gpt2_edge.TokenLogprobs, gpt2_edge.NextToken, gpt2_edge.Score):
        yield from (field.name for field in dataclasses.fields(made))
    yield from get_args(FinishReason)


def test_the_page_of_python_names_all_that_is_public() -> None:
    page = re.sub(r"^```.*?^```$", "", (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = {word for code in re.findall(r"`([^`\n]+)`", page) for word in re.findall(r"\w+", code)}
    assert set(public_words()) - named == set()


@pytest.mark.parametrize("option", ["max_new_tokens", "min_new_tokens", "keep_tokens"])
def test_the_page_of_python_has_the_defaults(option: str) -> None:
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    assert f"| `{option}` | {getattr(gpt2_edge.GenerationOptions(), option)} |" in page


# Messages


@cache
def strings_of_the_source() -> frozenset[str]:
    """Return all strings of the source, with NUL for what is put into them."""
    strings = set()
    for folder in ("runtime", "export", "quantize", "benchmarks"):
        for path in (REPOSITORY / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    strings.add("".join(_text(part) for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    strings.add(node.value)
    return frozenset(strings)


def _text(part: ast.expr) -> str:
    return str(part.value) if isinstance(part, ast.Constant) else "\0"


def messages() -> Iterator[tuple[str, str]]:
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        for table in re.findall(r"^\| message \|.*\n\| ---.*\n((?:\|.*\n)+)", page, re.MULTILINE):
            for row in table.splitlines():
                for message in re.findall(r"`([^`]+)`", row.split(" | ")[0]):
                    yield path.name, message


@pytest.mark.parametrize(("page", "message"), list(messages()))
def test_messages_are_those_of_the_source(page: str, message: str) -> None:
    placeholders = "|".join(re.escape(word) for word in sorted(PLACEHOLDERS, key=len, reverse=True))
    pieces = re.split(rf"(?<!\w)(?:{placeholders})(?!\w)", message)
    longest = max(pieces, key=len)
    assert len(longest) >= 8, "too little of it is fixed"
    pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
    found = [string for string in strings_of_the_source() if longest in string and pattern.search(string)]
    assert found, f"{page}: nothing says {message!r} any more"
