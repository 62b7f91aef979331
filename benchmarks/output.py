"""Show a report: on the terminal, in the chosen format, in a file, as a picture.

What was measured is not lost to a full disk: if a result cannot be written, the tables are still shown.
"""

import io
import sys
from pathlib import Path
from typing import Final

from gpt2_edge.benchmarks.formats import to_csv, to_json_lines, to_markdown
from gpt2_edge.benchmarks.html_report import to_html
from gpt2_edge.benchmarks.report import Report
from gpt2_edge.benchmarks.table import print_tables
from gpt2_edge.errors import MissingDependencyError, OptionError
from gpt2_edge.seal import write_file

_WRITERS: Final = {
    "md": to_markdown,
    "csv": to_csv,
    "json": Report.to_json,
    "jsonl": to_json_lines,
    "html": to_html,
}
_PLOT_ENDINGS: Final = (".png", ".svg")


def show(report: Report, format_name: str, output: Path | None, plot: Path | None) -> bool:
    """Show a report.

    Args:
        report: What was measured.
        format_name: "table", or of a writer.
        output: Where to write it; None is standard output.
        plot: Where to draw it; None draws nothing.

    Returns:
        Whether everything could be written.
    """
    written = True
    if format_name == "table" and output is None:
        print_tables(report)
    elif output is None:
        written = _print(report, _WRITERS[format_name](report))
    else:
        print_tables(report)
        written = _write(report, format_name, output)
    if plot is not None:
        from gpt2_edge.benchmarks.plot import draw

        try:
            draw(report, plot)
        except OSError as error:
            print(f"gpt2-edge: cannot write {plot}: {error.strerror or error}", file=sys.stderr)
            written = False
    return written


def check_plot(path: Path) -> None:
    """Refuse a picture that could not be drawn, before anything is measured.

    Raises:
        OptionError: It has another ending than .png or .svg.
        MissingDependencyError: matplotlib is not installed.
    """
    if path.suffix.lower() not in _PLOT_ENDINGS:
        raise OptionError(f"--plot {path}: the name has to end in {' or '.join(_PLOT_ENDINGS)}")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "--plot needs matplotlib, which is not installed: run pip install 'gpt2-edge[cpu,bench]'"
        ) from error


def _print(report: Report, text: str) -> bool:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"gpt2-edge: cannot write the result: {error.strerror or error}", file=sys.stderr)
        print_tables(report, sys.stderr)
        return False
    return True


def _write(report: Report, format_name: str, output: Path) -> bool:
    if format_name == "table":
        table = io.StringIO()
        print_tables(report, table)
        text = table.getvalue()
    else:
        text = _WRITERS[format_name](report)
    try:
        write_file(output, [text.encode()])
    except OSError as error:
        print(f"gpt2-edge: cannot write {output}: {error.strerror or error}", file=sys.stderr)
        return False
    return True
