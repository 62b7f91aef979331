"""The quantization recipes: data, not code."""

from dataclasses import dataclass
from typing import Final

from gpt2_edge.errors import OptionError


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the matrices of a model are quantized.

    Attributes:
        name: What `--recipe` takes and the manifest records.
        precision: The manifest's precision.
        bits: Bits of a weight.
        block_size: So many consecutive weights of a row share a scale. The kernel rounds activations in blocks of
            the same size.
        note: What the recipe is for.
    """

    name: str
    precision: str
    bits: int
    block_size: int
    note: str


# Blocks of at most 64: with larger ones the kernel gives a row other bits in a batch than alone.
_ALL: Final = (
    Recipe("int8-block64", "int8", 8, 64, "the default: 1.06 bytes a weight"),
    Recipe("int8-block32", "int8", 8, 32, "closer to full precision: 1.13 bytes a weight, slower"),
)
RECIPES: Final = {recipe.name: recipe for recipe in _ALL}
_DEFAULTS: Final = {"int8": "int8-block64"}


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
