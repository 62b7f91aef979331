"""Make INT8 and INT4 variants of an exported model folder."""

if __name__ != "gpt2_edge.quantize":
    raise ImportError(f"this package is imported as gpt2_edge.quantize, not as {__name__}: run pip install .")

from pathlib import Path

__all__ = ["quantize_folder"]


def quantize_folder(source: str | Path, destination: str | Path, precision: str = "int8") -> None:
    """Quantize an fp32 model folder with the default recipe of a precision; see `gpt2_edge.quantize.pipeline`."""
    from gpt2_edge.quantize.pipeline import quantize_folder as run
    from gpt2_edge.quantize.recipes import default_recipe

    run(source, Path(destination), default_recipe(precision))
