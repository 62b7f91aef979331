"""Make every recipe, measure quality and speed on this machine, and keep the fastest within a budget of quality."""

import random
import shutil
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpt2_edge.errors import QuantizationError
from gpt2_edge.manifest import Manifest
from gpt2_edge.model import Model, load
from gpt2_edge.quantize.pipeline import open_source, quantize_folder
from gpt2_edge.quantize.recipes import Recipe
from gpt2_edge.seal import new_folder

_REPETITIONS: Final = 5
_PROMPT_TOKENS: Final = 256
_NEW_TOKENS: Final = 64


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second of the repetitions.

    Attributes:
        samples: One for each repetition.
    """

    samples: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.fmean(self.samples)

    @property
    def stddev(self) -> float:
        """Sample standard deviation; 0 of a single sample."""
        return statistics.stdev(self.samples) if len(self.samples) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """What was measured of one recipe.

    Attributes:
        recipe: Which.
        manifest: Of its folder, with the measured quality.
        decode: Tokens a second, one after another.
        prefill: Tokens a second of a prompt.
    """

    recipe: Recipe
    manifest: Manifest
    decode: Speed
    prefill: Speed

    @property
    def perplexity_increase_percent(self) -> float:
        """Over full precision."""
        return float(self.manifest.measured["quality"]["perplexity_change_percent"])

    @property
    def mean_kl_divergence(self) -> float:
        """From full precision, in nats a token."""
        return float(self.manifest.measured["quality"]["mean_kl_divergence"])


def quantize_automatically(
    source: str | Path,
    destination: Path,
    recipes: Sequence[Recipe],
    max_perplexity_increase_percent: float,
    text: Path | None = None,
    calibration: Path | None = None,
    cache: str = "fp32",
    on_measured: Callable[[Sequence[Candidate]], object] = lambda candidates: None,
    on_failed: Callable[[Recipe, QuantizationError], object] = lambda recipe, error: None,
) -> Candidate:
    """Quantize with each recipe, and keep the fastest one that is good enough; nothing remains of the others.

    Args:
        source: An fp32 model folder.
        destination: The model folder to make; must not exist.
        recipes: Those to choose from.
        max_perplexity_increase_percent: Over full precision.
        text: To measure quality over, as in `quantize_folder`.
        calibration: As in `quantize_folder`.
        cache: As in `quantize_folder`.
        on_measured: Called with all candidates before one is chosen.
        on_failed: Called for a recipe that does not suit the model; the others are tried.

    Returns:
        The one that `destination` now holds.

    Raises:
        QuantizationError: No recipe is good enough, or none suits the model; nothing was written.
        ModelFolderError: The source cannot be read, or the destination exists or cannot be written.
    """
    open_source(source)  # instead of a refusal for each recipe
    with new_folder(destination) as work:
        made: list[tuple[Recipe, Manifest]] = []
        failures: list[QuantizationError] = []
        for recipe in recipes:
            try:
                manifest = quantize_folder(source, work / recipe.name, recipe, text, calibration, cache=cache)
                made.append((recipe, manifest))
            except QuantizationError as error:
                failures.append(error)
                on_failed(recipe, error)
        if not made:
            raise failures[0]
        speeds = _measure_speeds([work / recipe.name for recipe, _ in made])
        candidates = [
            Candidate(recipe, manifest, decode, prefill)
            for (recipe, manifest), (decode, prefill) in zip(made, speeds, strict=True)
        ]
        on_measured(candidates)
        chosen = choose(candidates, max_perplexity_increase_percent)
        for file in (work / chosen.recipe.name).iterdir():
            file.rename(work / file.name)
        for recipe, _ in made:
            shutil.rmtree(work / recipe.name)
    return chosen


def choose(candidates: Sequence[Candidate], max_perplexity_increase_percent: float) -> Candidate:
    """Return the candidate that decodes fastest within the budget.

    Of those whose speed cannot be told from the fastest one's, the closest to full precision: intervals
    mean ± standard deviation that overlap prove no difference.

    Raises:
        QuantizationError: None is within the budget.
    """
    # Written so that NaN is not within it.
    good = [each for each in candidates if each.perplexity_increase_percent <= max_perplexity_increase_percent]
    if not good:
        best = min(candidates, key=lambda each: each.perplexity_increase_percent)
        raise QuantizationError(
            f"no recipe meets the budget of {max_perplexity_increase_percent:+g} % perplexity: the closest, "
            f"{best.recipe.name}, has {best.perplexity_increase_percent:+.2f} %; no folder was written"
        )
    fastest = max(good, key=lambda each: each.decode.mean)
    as_fast = [
        each for each in good if each.decode.mean + each.decode.stddev >= fastest.decode.mean - fastest.decode.stddev
    ]
    return min(as_fast, key=lambda each: each.mean_kl_divergence)


def candidate_table(candidates: Sequence[Candidate], max_perplexity_increase_percent: float) -> list[str]:
    """Return the lines of a table of all candidates, the fastest first."""
    rows = [("recipe", "size", "decode tokens/s", "prefill tokens/s", "perplexity", "mean KLD", "same top", "")]
    for each in sorted(candidates, key=lambda candidate: -candidate.decode.mean):
        quality = each.manifest.measured["quality"]
        rows.append(
            (
                each.recipe.name,
                f"{each.manifest.size_bytes / 1e6:.1f} MB",
                f"{each.decode.mean:,.0f} ± {each.decode.stddev:,.0f}",
                f"{each.prefill.mean:,.0f} ± {each.prefill.stddev:,.0f}",
                f"{each.perplexity_increase_percent:+.2f} % ± {quality['perplexity_change_error_percent']:.2f}",
                f"{each.mean_kl_divergence:.5f}",
                f"{quality['same_top_percent']:.1f} %",
                "" if each.perplexity_increase_percent <= max_perplexity_increase_percent else "over the budget",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index in (0, len(row) - 1) else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _measure_speeds(folders: Sequence[Path]) -> list[tuple[Speed, Speed]]:
    """Measure decoding and prefill of each, once around all of them before the next repetition."""
    with ExitStack() as stack:
        models = [stack.enter_context(load(folder, verify_hashes=False)) for folder in folders]
        rounds: list[list[tuple[float, float]]] = []
        for repetition in range(-1, _REPETITIONS):
            order = range(len(models)) if repetition % 2 else reversed(range(len(models)))
            samples = {index: _sample_speed(models[index], seed=repetition + 1) for index in order}
            if repetition >= 0:  # the first round only warms up
                rounds.append([samples[index] for index in range(len(models))])
    return [
        (Speed(tuple(decode for decode, _ in samples)), Speed(tuple(prefill for _, prefill in samples)))
        for samples in zip(*rounds, strict=True)
    ]


def _sample_speed(model: Model, seed: int) -> tuple[float, float]:
    """Return tokens a second of decoding and of prefill, for a prompt of random tokens."""
    new_tokens = min(_NEW_TOKENS, model.context_length // 2)
    prompt_tokens = min(_PROMPT_TOKENS, model.context_length - new_tokens)
    vocabulary_size = model.manifest.architecture.vocabulary_size
    prompt = random.Random(seed).choices(range(vocabulary_size), k=prompt_tokens)
    timings = model.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True).timings
    return timings.decode_tokens_per_second, timings.prefill_tokens_per_second
