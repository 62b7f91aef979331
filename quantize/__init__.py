"""Make INT8 and INT4 variants of an exported model folder."""

if __name__ != "gpt2_edge.quantize":
    raise ImportError(f"this package is imported as gpt2_edge.quantize, not as {__name__}: run pip install .")

from pathlib import Path

__all__ = ["quantize_folder"]


def quantize_folder(
    source: str | Path,
    destination: str | Path,
    precision: str = "int8",
    *,
    recipe: str | None = None,
    cache: str = "fp32",
    calibration: str | Path | None = None,
    text: str | Path | None = None,
) -> None:
    """Quantize an fp32 model folder; the new one appears whole or not at all.

    Args:
        source: An fp32 model folder.
        destination: The model folder to make; must not exist.
        precision: "int8" or "int4".
        recipe: As `gpt2-edge quantize --recipe` names it; None takes the default of the precision.
        cache: How keys and values are kept, "fp32" or "int8".
        calibration: A UTF-8 file, a text to look at while rounding; None takes what suits the model.
        text: A UTF-8 file, a text to measure the quality over; None takes what suits the model.

    Raises:
        OptionError: There is no such precision, recipe or cache, or the text cannot be read.
        QuantizationError: The source cannot be quantized, or the result is not close to it.
        ModelFolderError: The source cannot be read, or the destination exists or cannot be written.
    """
    from gpt2_edge.quantize.pipeline import quantize_folder as run
    from gpt2_edge.quantize.recipes import default_recipe, recipe_named

    chosen = default_recipe(precision) if recipe is None else recipe_named(recipe, precision)
    run(
        source,
        Path(destination),
        chosen,
        text=None if text is None else Path(text),
        calibration=None if calibration is None else Path(calibration),
        cache=cache,
    )
