"""The quantization recipes: data, not code."""

from dataclasses import dataclass, replace
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

    def __str__(self) -> str:
        """Say how it is stored, for the manifest."""
        return f"{self.bits} bits, " + (
            f"blocks of {self.block_size}" if self.block_size else "a scale for each output"
        )


@dataclass(frozen=True, slots=True)
class Promotion:
    """What is stored with more bits than the rest, because it pays most for them.

    Attributes:
        matrix_format: How.
        first_tokens: This share of the vocabulary's rows of the head and the embedding, from the first on. A byte-pair
            vocabulary lists tokens in the order in which they were merged, the frequent ones first; so a few rows have
            most of the probability, and what is wrong with the others hardly matters.
        layers: The matrices of the blocks whose names end so.
    """

    matrix_format: MatrixFormat
    first_tokens: float
    layers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the matrices of a model are quantized.

    Attributes:
        name: What `--recipe` takes and the manifest records.
        precision: The manifest's precision.
        linear: The matrices of the blocks.
        head: The head, and with it the embedding that it is tied to.
        note: What the recipe is for.
        promotion: What of both is stored more finely.
        prompt: How the matrices of the blocks are stored once more, for computing many tokens at once; None computes
            them with those that compute one.
        float_bits: Of the floats that are stored for each block and each position, 16 or 32.
        fixed_rounding: Whether the inputs of matrices with one scale for each output are rounded in the same way for
            all rows, by what they are over the calibration text; else each row has a step of its own.
    """

    name: str
    precision: str
    linear: MatrixFormat
    head: MatrixFormat
    note: str
    promotion: Promotion | None = None
    prompt: MatrixFormat | None = None
    float_bits: int = 32
    fixed_rounding: bool = False

    def linear_format(self, name: str) -> MatrixFormat:
        """Return how a matrix of the blocks is stored."""
        if self.promotion is not None and name.endswith(self.promotion.layers):
            return self.promotion.matrix_format
        return self.linear

    def head_formats(self, vocabulary_size: int) -> list[tuple[int, MatrixFormat]]:
        """Return how the rows of the head are stored: how many, from the first on, in which way."""
        if self.promotion is None:
            return [(vocabulary_size, self.head)]
        first = round(self.promotion.first_tokens * vocabulary_size / _ROWS_TOGETHER) * _ROWS_TOGETHER
        first = min(max(first, _ROWS_TOGETHER), vocabulary_size)
        parts = [(first, self.promotion.matrix_format), (vocabulary_size - first, self.head)]
        return [(rows, matrix_format) for rows, matrix_format in parts if rows]


_ROWS_TOGETHER: Final = 64  # that the kernels compute at a time, or a divisor of it


def _nearest(bits: int, block_size: int | None) -> MatrixFormat:
    return MatrixFormat(bits, block_size, "nearest")


def _gptq(bits: int, block_size: int) -> MatrixFormat:
    return MatrixFormat(bits, block_size, "gptq")


_INT4_SMALL: Final = Recipe(
    "int4-small",
    "int4",
    _gptq(4, 128),
    _gptq(4, 128),
    "the smallest: 8 bits for a tenth of the vocabulary only",
    promotion=Promotion(_gptq(8, 64), first_tokens=0.1),
    float_bits=16,
)
# Blocks of at most 64 at 8 bits and, but for the smallest, 32 at 4 bits: with larger ones the kernel gives a row other
# bits in a batch than alone.
_ALL: Final = (
    Recipe("int8", "int8", _nearest(8, None), _nearest(8, None), "fast prompts"),
    Recipe(
        "int8-fast",
        "int8",
        _nearest(8, None),
        _nearest(8, None),
        "faster at everything, less close",
        fixed_rounding=True,
    ),
    Recipe("int8-block64", "int8", _nearest(8, 64), _nearest(8, 64), "closer, but slower prefill"),
    Recipe("int8-block32", "int8", _nearest(8, 32), _nearest(8, 32), "closest, and 6 % larger than int8-block64"),
    Recipe(
        "int4",
        "int4",
        _gptq(4, 32),
        _gptq(4, 32),
        "4-bit matrices, 8 bits for half of the vocabulary",
        promotion=Promotion(_gptq(8, 64), first_tokens=0.5),
        float_bits=16,
    ),
    Recipe(
        "int4-close",
        "int4",
        _gptq(4, 32),
        _gptq(4, 32),
        "between int4 and int8: 8 bits where they pay most",
        promotion=Promotion(_gptq(8, 64), first_tokens=0.75, layers=("attn.c_proj.weight", "mlp.c_fc.weight")),
        float_bits=16,
    ),
    _INT4_SMALL,
    # Products with 7 bits saturate nowhere; with 8, ONNX Runtime has a remedy, which does not reach into branches.
    replace(
        _INT4_SMALL,
        name="int4-fast",
        note="fast at both: int4-small for decoding, matrices like those of int8-fast for prompts",
        prompt=_nearest(7, None),
        fixed_rounding=True,
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


def recipe_named(name: str, precision: str | None = None) -> Recipe:
    """Return the recipe of that name.

    Raises:
        OptionError: There is none, or it is of another precision.
    """
    recipe = RECIPES.get(name)
    if recipe is None or precision not in (None, recipe.precision):
        names = [recipe.name for recipe in _ALL if precision in (None, recipe.precision)]
        raise OptionError(f"recipe is {name!r}: {f'for {precision} ' if precision else ''}give {' or '.join(names)}")
    return recipe
