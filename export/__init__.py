"""Trace a GPT-2 checkpoint with past-key-value inputs to an ONNX graph, check it, and seal it as a model folder."""

if __name__ != "gpt2_edge.export":
    raise ImportError(f"this package is imported as gpt2_edge.export, not as {__name__}: run pip install .")

from pathlib import Path
from typing import Any

__all__ = ["export_checkpoint"]


def export_checkpoint(checkpoint: str | Path, destination: str | Path, **options: Any) -> None:
    """Export a GPT-2 checkpoint, a folder or a hub's repository; see `gpt2_edge.export.pipeline` for the options."""
    from gpt2_edge.export.pipeline import export_checkpoint as run

    run(checkpoint, Path(destination), **options)
