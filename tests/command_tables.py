"""The tables of arguments in docs/commands.md, made from the parsers: `python tests/command_tables.py` renews them."""

import argparse
import re
from importlib import import_module
from pathlib import Path

from gpt2_edge.cli import _COMMANDS, _IntermixedParser

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"

_TABLE = re.compile(r"<!-- arguments of (?P<command>\w+) -->\n\n(?P<table>.*?)\n\n<!-- end -->", re.DOTALL)


def parser_of(command: str) -> argparse.ArgumentParser:
    """Return the parser that the command line uses for a command."""
    parser = _IntermixedParser(prog=f"gpt2-edge {command}")
    import_module(_COMMANDS[command][0]).add_arguments(parser)
    return parser


def table_of(command: str) -> str:
    """Return a Markdown table of a command's arguments."""
    parser = parser_of(command)
    formatter = parser._get_formatter()
    rows = ["| argument | meaning |", "| --- | --- |"]
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):  # as --help orders them
        if isinstance(action, argparse._HelpAction):
            continue
        default = action.dest.upper() if action.option_strings else action.dest
        value = formatter._format_args(action, default)
        names = ", ".join(action.option_strings)
        cells = f"`{f'{names} {value}'.strip()}`", formatter._expand_help(action)
        rows.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(rows)


def tables_in(page: str) -> dict[str, str]:
    """Return the tables that stand in the page, by command."""
    return {found["command"]: found["table"] for found in _TABLE.finditer(page)}


def renewed(page: str) -> str:
    """Return the page with all tables made anew."""
    return _TABLE.sub(
        lambda found: f"<!-- arguments of {found['command']} -->\n\n{table_of(found['command'])}\n\n<!-- end -->", page
    )


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
