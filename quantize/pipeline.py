"""From an fp32 model folder to a sealed, quantized one: rewrite, count, write, compare, seal."""

import shutil
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Final

from gpt2_edge.errors import MissingDependencyError, QuantizationError
from gpt2_edge.folder import TOKENIZER_NAME, open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.model import Model, load
from gpt2_edge.progress import Progress
from gpt2_edge.quantize.blockwise import round_to_nearest
from gpt2_edge.quantize.quality import Quality, compare_logits
from gpt2_edge.quantize.recipes import Recipe
from gpt2_edge.seal import check_destination, new_folder, write_manifest
from gpt2_edge.version import VERSION

try:
    import onnx_ir

    from gpt2_edge.quantize.rewrite import quantize_matrices
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"quantizing needs {error.name}, which is not installed: run pip install 'gpt2-edge[cpu,quantize]'"
    ) from error

_COMPARED_TOKENS: Final = 256
_TEXT_SEED: Final = 1
# The storyteller's INT8 has 0.002. A graph that computes something else has several nats.
_LARGEST_SANE_KL_DIVERGENCE: Final = 0.5


def quantize_folder(source: Path, destination: Path, recipe: Recipe) -> Manifest:
    """Quantize an fp32 model folder; the new one appears whole or not at all.

    Args:
        source: An fp32 model folder.
        destination: The model folder to make; must not exist.
        recipe: How.

    Returns:
        The manifest of the new folder.

    Raises:
        QuantizationError: The source is quantized already, has weights that are not finite, not all matrices could
            be quantized, or the result is not close to the source.
        ModelFolderError: The source cannot be read, or the destination exists or cannot be written.
    """
    check_destination(destination)
    opened = open_folder(source)
    opened.check_hashes()
    manifest = opened.manifest
    if manifest.precision != "fp32":
        raise QuantizationError(f"{source} is {manifest.precision}: give the fp32 folder that it was made from")
    uses = 4 * manifest.architecture.layers + 2  # products of the blocks, the head's product, the embedding's lookup
    matrices = uses - 1 if manifest.architecture.tied_head else uses
    with Progress("quantize", total=matrices + 2) as progress:
        progress.start(f"rounding the matrices ({recipe.name})")
        model = onnx_ir.load(opened.graph_path)
        try:
            replaced = quantize_matrices(
                model, recipe, lambda matrix: round_to_nearest(matrix, recipe.block_size), progress.advance
            )
        except ValueError as error:  # onnx refuses weights that are linked to from elsewhere, for example
            raise QuantizationError(f"cannot read the weights of {source}: {error}; copy the folder first") from error
        quantized = len(set(replaced))
        # The tracer keeps small matrices that are equal as one, so there may be fewer than the blocks have.
        if len(replaced) != uses or quantized > matrices:
            raise QuantizationError(
                f"{quantized} matrices were quantized in {len(replaced)} places, where the model has {matrices} in "
                f"{uses}: export it again"
            )
        with new_folder(destination) as folder:
            progress.start("writing the graph and the weights")
            graph_name = manifest.graphs["decoder"]
            onnx_ir.save(model, folder / graph_name, external_data=f"{graph_name}.data")
            shutil.copyfile(opened.tokenizer_path, folder / TOKENIZER_NAME)
            progress.advance()
            progress.start("comparing with full precision")
            draft = replace(
                manifest,
                precision=recipe.precision,
                recipe={**asdict(recipe), "quantized_matrices": quantized},
                tools={**manifest.tools, "gpt2-edge": VERSION, "onnx-ir": metadata.version("onnx-ir")},
                measured={},
            )
            write_manifest(folder, draft)
            quality = _measure(source, folder)
            finished = replace(draft, measured={"own_text": asdict(quality)})
            progress.start("sealing")
            finished = write_manifest(folder, finished)
        progress.advance()
    return finished


def _measure(source: Path, quantized: Path) -> Quality:
    """Compare both over a text that the source writes itself, which fits any model and needs none from outside."""
    with load(source, verify_hashes=False) as original, load(quantized, verify_hashes=False) as candidate:
        tokens = _own_text(original)
        quality = compare_logits(original.logits(tokens), candidate.logits(tokens))
    # Written so that NaN fails as well.
    if not quality.mean_kl_divergence <= _LARGEST_SANE_KL_DIVERGENCE:
        raise QuantizationError(
            f"the quantized model is {quality.mean_kl_divergence:.2g} nats a token away from full precision: "
            "no folder was written; this recipe does not suit the model"
        )
    return quality


def _own_text(model: Model) -> list[int]:
    start = model.manifest.end_of_text or 0
    count = min(_COMPARED_TOKENS, model.context_length) - 1
    text = model.generate([start], max_new_tokens=count, temperature=1.0, seed=_TEXT_SEED, ignore_eos=True)
    return [start, *text.tokens]
