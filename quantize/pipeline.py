"""From an fp32 model folder to a sealed, quantized one: rewrite, count, write, compare, seal."""

import json
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Final

from gpt2_edge.errors import MissingDependencyError, OptionError, PromptError, QuantizationError
from gpt2_edge.folder import BUNDLED_MODELS, TOKENIZER_NAME, ModelFolder, open_folder
from gpt2_edge.machine_check import GOLDEN_NAME
from gpt2_edge.manifest import Manifest
from gpt2_edge.progress import Progress
from gpt2_edge.quantize.calibration_text import CalibrationText, choose_calibration_text
from gpt2_edge.quantize.measurement import MOST_STEPS, measure_folder
from gpt2_edge.quantize.recipes import CACHES, Recipe
from gpt2_edge.quantize.texts import read_text
from gpt2_edge.seal import check_destination, new_folder, write_manifest
from gpt2_edge.tokenizer import Tokenizer
from gpt2_edge.version import VERSION

# To fix how inputs are rounded: the storyteller was 0.0029 nats a token off with 1,024, 0.04 with 289, and 1 with 20.
_FEWEST_CALIBRATION_TOKENS: Final = 1_000
_FEWEST_TEXT_TOKENS: Final = 32
_FEWEST_CONTEXT_TOKENS: Final = 4

try:
    import onnx_ir

    from gpt2_edge.quantize.cache_scaling import scale_cache
    from gpt2_edge.quantize.calibration import CalibrationRun
    from gpt2_edge.quantize.folder_graph import read_model
    from gpt2_edge.quantize.golden import golden_logits
    from gpt2_edge.quantize.integer_cache import MINIMUM_ONNXRUNTIME, use_integer_cache
    from gpt2_edge.quantize.rewrite import Replaced, check_finite, quantize_matrices
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"quantizing needs {error.name}, which is not installed: run pip install 'gpt2-edge[cpu,quantize]'"
    ) from error


def open_source(source: str | Path) -> ModelFolder:
    """Open a model folder that can be quantized, without hashing its files.

    Raises:
        QuantizationError: It is quantized already, of another flavour, or has next to no context.
        ModelFolderError: It cannot be read.
    """
    opened = open_folder(source)
    manifest = opened.manifest
    if manifest.flavour != "fused":
        raise QuantizationError(f"{source} is of the {manifest.flavour} flavour: export the checkpoint as fused first")
    if isinstance(source, str) and source in BUNDLED_MODELS:
        raise QuantizationError(
            f"{source} is the bundled model, which is {manifest.precision} already: export its checkpoint, "
            f"models/{source} of gpt2-edge's repository, and give that folder; write ./{source} for a folder here"
        )
    if manifest.precision != "fp32":
        raise QuantizationError(f"{source} is {manifest.precision}: give the fp32 folder that it was made from")
    if manifest.architecture.context_length < _FEWEST_CONTEXT_TOKENS:
        raise QuantizationError(
            f"{source} has a context of {manifest.architecture.context_length} tokens, too few to measure "
            f"quality and speed over: export it with at least {_FEWEST_CONTEXT_TOKENS}"
        )
    return opened


def quantize_folder(
    source: str | Path,
    destination: Path,
    recipe: Recipe,
    text: Path | None = None,
    calibration: Path | None = None,
    *,
    cache: str = "fp32",
) -> Manifest:
    """Quantize an fp32 model folder; the new one appears whole or not at all.

    Args:
        source: An fp32 model folder.
        destination: The model folder to make; must not exist.
        recipe: How.
        text: A UTF-8 file to measure quality over; None takes what suits the model: see `choose_text`.
        calibration: A UTF-8 file for recipes that look at a text as they round; None takes what suits the model: see
            `choose_calibration_text`.
        cache: How keys and values are kept, "fp32" or "int8".

    Returns:
        The manifest of the new folder.

    Raises:
        QuantizationError: The source is quantized already, has weights that are not finite, not all matrices could
            be quantized, the recipe needs a longer calibration text, or the result is not close to the source.
        ModelFolderError: The source cannot be read, or the destination exists or cannot be written.
        OptionError: The text cannot be read, or there is no such cache.
        PromptError: The text is too short.
    """
    check_destination(destination)
    if cache not in CACHES:
        raise OptionError(f"cache is {cache!r}: give {' or '.join(CACHES)}")
    given = {path: read_text(path) for path in (text, calibration) if path is not None}  # before long work starts
    opened = open_source(source)
    opened.check_hashes()
    manifest = opened.manifest
    tokenizer = Tokenizer(opened.content(TOKENIZER_NAME))
    for path, content in given.items():
        _check_text(path, len(tokenizer.encode(content)))
    with Progress("quantize", total=_matrices(manifest) + 2 + MOST_STEPS) as progress:
        model = read_model(opened)
        check_finite(model)
        progress.start("preparing the calibration text")
        calibrated = choose_calibration_text(calibration, source)
        if calibration is not None and (recipe.fixed_rounding or cache == "int8"):
            _check_long_enough(calibrated, recipe.name if recipe.fixed_rounding else "--cache int8")
        try:
            replaced = _rewrite(model, manifest, recipe, calibrated, cache, progress)
        except ValueError as error:  # onnx refuses weights that are linked to from elsewhere, for example
            raise QuantizationError(f"cannot read the weights of {source}: {error}; copy the folder first") from error
        with new_folder(destination) as folder:
            progress.start("writing the graph and the weights")
            graph_name = manifest.graphs["decoder"]
            onnx_ir.save(model, folder / graph_name, external_data=f"{graph_name}.data")
            (folder / TOKENIZER_NAME).write_bytes(opened.content(TOKENIZER_NAME).read())
            progress.advance()
            progress.start("comparing with full precision")
            draft = write_manifest(folder, _unmeasured(manifest, recipe, calibrated.title, replaced, cache))
            measurement = measure_folder(source, folder, text, progress.advance)
            progress.start("computing golden logits")
            golden = golden_logits(folder / graph_name, tokenizer, manifest.architecture)
            (folder / GOLDEN_NAME).write_text(golden.to_json(), encoding="utf-8", newline="\n")
            finished = replace(draft, measured={"quality": measurement.document()})
            progress.start("sealing")
            finished = write_manifest(folder, finished)
        progress.advance()
    return finished


def _check_text(path: Path, tokens: int) -> None:
    if tokens < _FEWEST_TEXT_TOKENS:
        raise PromptError(f"the text {path} has {tokens} tokens, which say nothing: give one of some thousand words")


def _check_long_enough(calibrated: CalibrationText, needed_by: str) -> None:
    tokens = sum(map(len, calibrated.windows))
    if tokens < _FEWEST_CALIBRATION_TOKENS:
        raise QuantizationError(
            f"the calibration text {calibrated.title} has {tokens} tokens, and {needed_by} cuts off what it does not "
            f"show: give one of at least {_FEWEST_CALIBRATION_TOKENS:,}, or none, or go without {needed_by}"
        )


def _unmeasured(source: Manifest, recipe: Recipe, calibrated_on: str, replaced: Replaced, cache: str) -> Manifest:
    return replace(
        source,
        precision=recipe.precision,
        cache_precision=cache,
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME if cache == "int8" else source.minimum_onnxruntime,
        graphs={"decoder": source.graphs["decoder"]},
        recipe={
            **json.loads(json.dumps(asdict(recipe))),  # as it is read again
            "calibration": calibrated_on,
            "quantized_matrices": len(replaced.formats),
            "matrices": dict(replaced.formats),
        },
        tools={**source.tools, "gpt2-edge": VERSION, "onnx-ir": metadata.version("onnx-ir")},
        measured={},
    )


def _rewrite(
    model: onnx_ir.Model,
    manifest: Manifest,
    recipe: Recipe,
    calibrated: CalibrationText,
    cache: str,
    progress: Progress,
) -> Replaced:
    """Change the graph in place."""
    if cache == "int8":
        progress.start("scaling keys and values")
        scale_cache(model, CalibrationRun(model, manifest.architecture, calibrated.with_other_beginnings()))
    progress.start(f"rounding the matrices ({recipe.name})")
    run = CalibrationRun(model, manifest.architecture, calibrated.windows)
    replaced = quantize_matrices(model, recipe, run, progress.advance)
    quantized = len(replaced.formats)
    # The tracer keeps small matrices that are equal as one, so there may be fewer than the blocks have.
    if replaced.places != _uses(manifest) or quantized > _matrices(manifest):
        raise QuantizationError(
            f"{quantized} matrices were quantized in {replaced.places} places, where the model has "
            f"{_matrices(manifest)} in {_uses(manifest)}: export it again"
        )
    if cache == "int8":
        use_integer_cache(model)
    return replaced


def _uses(manifest: Manifest) -> int:
    """Return how often a matrix is used: in products of the blocks, the head's product, the embedding's lookup."""
    return 4 * manifest.architecture.layers + 2


def _matrices(manifest: Manifest) -> int:
    return _uses(manifest) - 1 if manifest.architecture.tied_head else _uses(manifest)
