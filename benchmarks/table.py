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
_SPEEDS_SIDE_BY_SIDE: Final = 4


def print_tables(report: Report, file: IO[str] | None = None) -> None:
    """Print the overview, the details, the summary and the remarks.

    Args:
        report: What was measured.
        file: Where to; None is standard output.
    """
    console = Console(file=file, highlight=False)
    console.width = min(console.width, MAXIMUM_COLUMNS) if console.is_terminal else MAXIMUM_COLUMNS
    for sheet in sheets_of(report, _SPEEDS_SIDE_BY_SIDE):
        console.print(_table(sheet))
    for sentence in summary_sentences(report):
        console.print(f"[bold]{escape(sentence)}[/bold]")
    if any(variant.disturbed for variant in report.variants):
        console.print(f"{DISTURBED_MARK} disturbed: the spread is above 10 %; close other programs and measure again")
    for remark in remarks(report):
        console.print(f"- {escape(remark)}")
    for note in report.comparison.notes if report.comparison else ():
        console.print(f"- {escape(note)}")
    console.print(_where(report), style="dim")


def _table(sheet: Sheet) -> Table:
    table = Table(
        title=escape(sheet.title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1)
    )
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
