"""The tables on a terminal, at most 100 columns wide."""

from typing import IO, Final

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpt2_edge.benchmarks.report import Report
from gpt2_edge.benchmarks.sheets import DISTURBED_MARK, NOTHING, Sheet, sheets_of
from gpt2_edge.benchmarks.summary import remarks, summary_sentences

MAXIMUM_COLUMNS: Final = 100
_BETWEEN_COLUMNS: Final = 3
_EDGES: Final = 4
_NARROWEST_NAMES: Final = 16


def print_tables(report: Report, file: IO[str] | None = None) -> None:
    """Print the overview, the details, the summary and the remarks.

    Args:
        report: What was measured.
        file: Where to; None is standard output.
    """
    console = Console(file=file, highlight=False)
    console.width = min(console.width, MAXIMUM_COLUMNS) if console.is_terminal else MAXIMUM_COLUMNS
    for sheet in sheets_of(report):
        for part in fitting_parts(sheet, console.width):
            console.print(part.title, style="bold", markup=False)
            console.print(_table(part))
    for sentence in summary_sentences(report):
        console.print(f"[bold]{escape(sentence)}[/bold]")
    if any(variant.disturbed for variant in report.variants):
        console.print(f"{DISTURBED_MARK} disturbed: the spread is above 10 %; close other programs and measure again")
    for remark in remarks(report):
        console.print(f"- {escape(remark)}")
    for note in report.comparison.notes if report.comparison else ():
        console.print(f"- {escape(note)}")
    console.print(_where(report), style="dim")


def fitting_parts(sheet: Sheet, width: int) -> list[Sheet]:
    """Cut a table that is too wide into several, each with the first column and as many others as fit."""
    names = min(_NARROWEST_NAMES, _column_width(sheet, 0))
    parts: list[list[int]] = [[]]
    used = names
    for column in range(1, len(sheet.header)):
        needed = _column_width(sheet, column) + _BETWEEN_COLUMNS
        if parts[-1] and used + needed > width - _EDGES:
            parts.append([])
            used = names
        parts[-1].append(column)
        used += needed
    return [
        Sheet(
            sheet.title if number == 0 else f"{sheet.title} (continued)",
            tuple(sheet.header[column] for column in (0, *columns)),
            tuple(tuple(row[column] for column in (0, *columns)) for row in sheet.rows),
        )
        for number, columns in enumerate(parts)
    ]


def _column_width(sheet: Sheet, column: int) -> int:
    return max(len(cells[column]) for cells in (sheet.header, *sheet.rows))


def _table(sheet: Sheet) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for place, name in enumerate(sheet.header):
        # The first column gives way when names are long: a number is never cut.
        table.add_column(escape(name), justify="right" if place else "left", no_wrap=place > 0, overflow="fold")
    for row in sheet.rows:
        table.add_row(*(cell if cell != NOTHING else f"[dim]{NOTHING}[/dim]" for cell in map(escape, row)))
    return table


def _where(report: Report) -> str:
    environment = report.environment
    versions = f"gpt2-edge {environment.get('gpt2-edge')}, onnxruntime {environment.get('onnxruntime')}"
    return escape(
        f"{environment.get('cpu')}, {environment.get('cores_allowed')} cores; {versions}; {report.seconds:.0f} s"
    )
