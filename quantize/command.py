"""`gpt2-edge quantize`: make a smaller, faster model folder."""

import argparse
from pathlib import Path

from gpt2_edge.quantize.recipes import RECIPES, default_recipe, recipe_named


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quantize`."""
    recipes = "; ".join(f"{recipe.name}: {recipe.note}" for recipe in RECIPES.values())
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an fp32 model folder")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="the model folder to make")
    parser.add_argument("--precision", required=True, choices=sorted({recipe.precision for recipe in RECIPES.values()}))
    parser.add_argument("--recipe", metavar="NAME", help=recipes)


def run(arguments: argparse.Namespace) -> int:
    """Quantize and say what was made."""
    if arguments.recipe is None:
        recipe = default_recipe(arguments.precision)
    else:
        recipe = recipe_named(arguments.recipe, arguments.precision)
    from gpt2_edge.quantize.pipeline import quantize_folder

    manifest = quantize_folder(arguments.folder, arguments.output, recipe)
    quality = manifest.measured["own_text"]
    matrices = manifest.recipe["quantized_matrices"] if manifest.recipe else 0
    print(
        f"{arguments.output}: {recipe.name}, {matrices} matrices, {manifest.size_bytes / 1e6:.1f} MB; over "
        f"{quality['tokens']} tokens that the model wrote itself it is {quality['mean_kl_divergence']:.2g} nats a "
        f"token from full precision and has the same likeliest token {quality['same_top_percent']:.0f} % of the time"
    )
    return 0
