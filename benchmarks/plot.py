"""stub"""

from pathlib import Path

from gpt2_edge.benchmarks.report import Report


def draw(report: Report, path: Path) -> None:
    """Stub."""
