"""`gpt2-edge quantize`: make a smaller, faster model folder."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from gpt2_edge.errors import OptionError
from gpt2_edge.manifest import Manifest
from gpt2_edge.quality_table import quality_rows
from gpt2_edge.quantize.recipes import CACHES, RECIPES, Recipe, default_recipe, recipe_named
from gpt2_edge.seal import check_folder_of_file, write_file

if TYPE_CHECKING:
    from gpt2_edge.quantize.auto import Candidate

_TABLE: Final = "table"
_DEFAULT_BUDGET: Final = "1%"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quantize`."""
    recipes = "; ".join(f"{recipe.name}{_default_of(recipe)}: {recipe.note}" for recipe in RECIPES.values())
    precisions = sorted({recipe.precision for recipe in RECIPES.values()})
    parser.add_argument("folder", metavar="FOLDER", help="an fp32 model folder")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="the model folder to make")
    parser.add_argument("--precision", choices=precisions, help="needed, unless --recipe tells or --auto chooses")
    parser.add_argument("--recipe", metavar="NAME", help=recipes.replace("%", "%%"))
    parser.add_argument(
        "--calibration", metavar="FILE", type=Path, help="a text for recipes that look at one as they round"
    )
    parser.add_argument(
        "--cache",
        choices=CACHES,
        default=CACHES[0],
        help="how keys and values are kept; int8 takes a quarter of the memory and is faster late in a long text",
    )
    parser.add_argument(
        "--text", metavar="FILE", type=Path, help="a text to measure quality over (default: what suits the model)"
    )
    parser.add_argument(
        "--report",
        nargs="?",
        const=_TABLE,
        metavar="FILE.json",
        type=_report_target,
        help="show what quantization cost as a table; or write it as JSON to a file, or to standard output (-)",
    )
    parser.add_argument(
        "--auto", action="store_true", help="make every recipe, and keep the fastest on this machine within the budget"
    )
    parser.add_argument(
        "--max-perplexity-increase",
        metavar="PERCENT",
        type=_percent,
        help=f"the budget of --auto, as 1%% or 0.01 (default: {_DEFAULT_BUDGET}%)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantize and say what was made."""
    if arguments.auto:
        return _run_auto(arguments)
    if arguments.max_perplexity_increase is not None:
        raise OptionError("--max-perplexity-increase is for --auto: give both")
    recipe = _recipe(arguments.precision, arguments.recipe)
    _check_report(arguments.report)
    from gpt2_edge.quantize.pipeline import quantize_folder

    manifest = quantize_folder(
        arguments.folder,
        arguments.output,
        recipe,
        text=arguments.text,
        calibration=arguments.calibration,
        cache=arguments.cache,
    )
    _print_result(arguments.output, recipe, manifest, arguments.report)
    return 0


def _recipe(precision: str | None, name: str | None) -> Recipe:
    if name is not None:
        return recipe_named(name, precision)
    if precision is None:
        raise OptionError(f"no precision is given: give --precision {' or '.join(_precisions())}, or --auto")
    return default_recipe(precision)


def _run_auto(arguments: argparse.Namespace) -> int:
    if arguments.recipe is not None:
        raise OptionError("--auto chooses the recipe: leave --recipe out")
    _check_report(arguments.report)
    from gpt2_edge.quantize.auto import candidate_table, quantize_automatically

    budget = (
        _percent(_DEFAULT_BUDGET) if arguments.max_perplexity_increase is None else arguments.max_perplexity_increase
    )
    recipes = [recipe for recipe in RECIPES.values() if arguments.precision in (None, recipe.precision)]

    def show(candidates: Sequence["Candidate"]) -> None:
        # On standard error if standard output is for JSON.
        print(
            *candidate_table(candidates, budget), sep="\n", file=sys.stderr if arguments.report == "-" else sys.stdout
        )

    chosen = quantize_automatically(
        arguments.folder,
        arguments.output,
        recipes,
        budget,
        text=arguments.text,
        calibration=arguments.calibration,
        cache=arguments.cache,
        on_measured=show,
        on_failed=lambda recipe, error: print(f"{recipe.name}: {error}", file=sys.stderr),
    )
    _print_result(arguments.output, chosen.recipe, chosen.manifest, arguments.report)
    return 0


def _print_result(output: Path, recipe: Recipe, manifest: Manifest, report: str | None) -> None:
    quality = manifest.measured["quality"]
    if report == "-":
        print(json.dumps(_document(output, manifest), indent=2, ensure_ascii=False))
        return
    matrices = manifest.recipe["quantized_matrices"] if manifest.recipe else 0
    print(
        f"{output}: {recipe.name}, {matrices} matrices, {manifest.size_bytes / 1e6:.1f} MB; over {quality['tokens']:,} "
        f"tokens of {quality['text']} it is {quality['mean_kl_divergence']:.2g} nats a token from full precision, has "
        f"the same likeliest token {quality['same_top_percent']:.1f} % of the time, and perplexity changes by "
        f"{quality['perplexity_change_percent']:+.2f} % ± {quality['perplexity_change_error_percent']:.2f}"
    )
    if report == _TABLE:
        rows = quality_rows(quality)
        width = max(len(name) for name, _ in rows)
        print(*(f"{name:<{width}}  {value}" for name, value in rows), sep="\n")
    elif report is not None:
        document = json.dumps(_document(output, manifest), indent=2, ensure_ascii=False)
        try:
            write_file(Path(report), [f"{document}\n".encode()])
        except OSError as error:
            raise OptionError(
                f"cannot write {report}: {error.strerror or error}; {output} is made, and its manifest says the same"
            ) from error


def _document(output: Path, manifest: Manifest) -> dict[str, object]:
    return {
        "folder": str(output),
        "recipe": manifest.recipe,
        "size_bytes": manifest.size_bytes,
        "content_sha256": manifest.content_sha256,
        "quality": manifest.measured["quality"],
    }


def _check_report(report: str | None) -> None:
    if report not in (None, "-", _TABLE):
        check_folder_of_file(Path(report))


def _default_of(recipe: Recipe) -> str:
    return f" (default of {recipe.precision})" if recipe is default_recipe(recipe.precision) else ""


def _precisions() -> list[str]:
    return sorted({recipe.precision for recipe in RECIPES.values()})


def _report_target(value: str) -> str:
    if value in ("-", _TABLE) or value.endswith(".json"):
        return value
    # The folder, if it came right after the option.
    raise argparse.ArgumentTypeError(f"{value!r} is not - or a name that ends in .json: put FOLDER before --report")


def _percent(value: str) -> float:
    """Read "1%" or "0.01" as 1.0."""
    try:
        number = float(value.removesuffix("%")) * (1 if value.endswith("%") else 100)
    except ValueError:
        number = math.nan
    if not value.endswith("%") and 100 <= number < math.inf:
        raise argparse.ArgumentTypeError(
            f"{value!r} would be {number:g} %: write {value}% if that many percent are meant"
        )
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{value!r} is not an increase: give one such as 1% or 0.01")
    return number
