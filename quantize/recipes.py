"""The quantization recipes: data, not code."""

from dataclasses import dataclass
from typing import Final

from gpt2_edge.errors import OptionError


@dataclass(frozen=True, slots=True)
class MatrixFormat:
    """How a matrix is stored and rounded.

    Attributes:
        bits: Of a weight: 4, 7 or 8.
        block_size: So many consecutive weights of an output share a scale. The kernel rounds activations in blocks of
            the same size. None: all weights of an output share one, and all activations of a row.
        rounding: "nearest", or "gptq", which makes the errors of the weights cancel over a calibration text.
    """

    bits: int
    block_size: int | None
    rounding: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the matrices of a model are quantized.

    Attributes:
        name: What `--recipe` takes and the manifest records.
        precision: The manifest's precision.
        linear: The matrices of the blocks.
        head: The head, and with it the embedding that it is tied to.
        centred: Whether the mean of what a matrix is multiplied with, over a calibration text, is taken out before
            anything is rounded.
        note: What the recipe is for.
        prompt: How the matrices of the blocks are stored once more, for computing many tokens at once; None computes
            them with those that compute one.
    """

    name: str
    precision: str
    linear: MatrixFormat
    head: MatrixFormat
    centred: bool
    note: str
    prompt: MatrixFormat | None = None

    @property
    def needs_calibration(self) -> bool:
        """Whether it matters what the matrices are multiplied with."""
        return self.centred or "gptq" in (self.linear.rounding, self.head.rounding)


def _nearest(bits: int, block_size: int | None) -> MatrixFormat:
    return MatrixFormat(bits, block_size, "nearest")


def _gptq(bits: int, block_size: int) -> MatrixFormat:
    return MatrixFormat(bits, block_size, "gptq")


# Blocks of at most 64 at 8 bits and 32 at 4 bits: with larger ones the kernel gives a row other bits in a batch than
# alone.
_ALL: Final = (
    Recipe("int8", "int8", _nearest(8, None), _nearest(8, 64), True, "the default: fast prefill"),
    Recipe("int8-block64", "int8", _nearest(8, 64), _nearest(8, 64), True, "closer, but slower prefill"),
    Recipe("int8-block32", "int8", _nearest(8, 32), _nearest(8, 32), True, "closest, and 6 % larger than int8-block64"),
    Recipe("int4", "int4", _gptq(4, 32), _gptq(8, 64), True, "the default: 4-bit matrices, 8-bit head"),
    Recipe("int4-small", "int4", _gptq(4, 128), _gptq(4, 32), True, "the smallest: a 4-bit head too"),
    # Products with 7 bits saturate nowhere; with 8, ONNX Runtime has a remedy, which does not reach into branches.
    Recipe(
        "int4-fast",
        "int4",
        _gptq(4, 128),
        _gptq(4, 32),
        True,
        "the fastest: int4-small, with matrices like those of int8 for prompts",
        prompt=_nearest(7, None),
    ),
)
RECIPES: Final = {recipe.name: recipe for recipe in _ALL}
CACHES: Final = ("fp32", "int8")  # how keys and values may be kept
_DEFAULTS: Final = {"int8": "int8", "int4": "int4"}


def default_recipe(precision: str) -> Recipe:
    """Return the default recipe of a precision.

    Raises:
        OptionError: There is none.
    """
    if precision not in _DEFAULTS:
        raise OptionError(f"precision is {precision!r}: give {' or '.join(_DEFAULTS)}")
    return RECIPES[_DEFAULTS[precision]]


def recipe_named(name: str, precision: str) -> Recipe:
    """Return the recipe of that name.

    Raises:
        OptionError: There is none, or it is of another precision.
    """
    recipe = RECIPES.get(name)
    if recipe is None or recipe.precision != precision:
        names = [recipe.name for recipe in _ALL if recipe.precision == precision]
        raise OptionError(f"recipe is {name!r}: for {precision} give {' or '.join(names)}")
    return recipe
