"""Quality over a text: each model predicts the same windows of tokens, and the full-precision one is the reference.

The reference's logits go to the other processes through a file, a window at a time: at 50,257 tokens a window is as
large as a small model.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2_edge.benchmarks.report import Quality
from gpt2_edge.errors import LogitsError
from gpt2_edge.generation import token_logprobs
from gpt2_edge.model import Model
from gpt2_edge.quantize.quality import compare_logits

LONGEST_WINDOW_TOKENS: Final = 256
_FEWEST_TOKENS: Final = 2
_LARGEST_EXPONENT: Final = 700  # what floats hold


@dataclass(slots=True)
class QualityTally:
    """What the windows of one model add up to.

    Attributes:
        losses: Negative log-probability of each scored token, in nats.
        changes: The same less the reference's.
        divergences: Kullback-Leibler divergence at each position, averaged over a window; with the positions.
        same_tops: Positions with the same likeliest token.
    """

    losses: list[float] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)
    divergences: list[tuple[float, int]] = field(default_factory=list)
    same_tops: float = 0.0

    def add(self, window: dict[str, Any]) -> None:
        """Add what `measure_window` returned."""
        self.losses += window["losses"]
        self.changes += window["changes"]
        if window["positions"]:
            self.divergences.append((window["mean_kl_divergence"], window["positions"]))
            self.same_tops += window["same_tops"]

    def quality(self, text: str, reference: str | None) -> Quality:
        """Return what was measured, of at least one window."""
        perplexity = math.exp(min(statistics.fmean(self.losses), _LARGEST_EXPONENT))
        compared = sum(positions for _, positions in self.divergences)
        if not compared:
            return Quality(text=text, tokens=len(self.losses), perplexity=perplexity)
        change = min(statistics.fmean(self.changes), _LARGEST_EXPONENT)
        error = statistics.stdev(self.changes) / math.sqrt(len(self.changes)) if len(self.changes) > 1 else 0.0
        return Quality(
            text=text,
            tokens=len(self.losses),
            perplexity=perplexity,
            reference=reference,
            perplexity_change_percent=100 * math.expm1(change),
            perplexity_change_error_percent=100 * math.exp(change) * error,
            mean_kl_divergence=sum(mean * positions for mean, positions in self.divergences) / compared,
            same_top_percent=100 * self.same_tops / compared,
        )


def windows_of(tokens: Sequence[int], context_length: int, most_tokens: int) -> list[list[int]]:
    """Cut a text into windows, each predicted on its own, so many that at most `most_tokens` are used."""
    length = min(LONGEST_WINDOW_TOKENS, context_length)
    used = list(tokens[:most_tokens])
    windows = [used[start : start + length] for start in range(0, len(used), length)]
    return [window for window in windows if len(window) >= _FEWEST_TOKENS]


def measure_window(model: Model, window: Sequence[int], reference: Path | None, save_to: Path | None) -> dict[str, Any]:
    """Predict one window.

    Args:
        model: What is measured.
        window: Tokens, at least two; the first is not scored.
        reference: The reference's logits for the same window; None compares with nothing.
        save_to: Where to write this model's logits; None writes nothing.

    Returns:
        Numbers for `QualityTally.add`.
    """
    logits = model.logits(window)[:-1]
    following = list(window[1:])
    losses = -token_logprobs(logits, following)
    if save_to is not None:
        np.save(save_to, logits)
    result: dict[str, Any] = {"losses": losses.tolist(), "changes": [], "positions": 0}
    if reference is not None:
        expected = np.load(reference)
        quality = compare_logits(expected, logits)
        if not math.isfinite(quality.mean_kl_divergence):
            raise LogitsError("the model computed logits that are not finite: check it with `gpt2-edge verify`")
        result |= {
            "changes": (losses + token_logprobs(expected, following)).tolist(),
            "positions": quality.tokens,
            "mean_kl_divergence": quality.mean_kl_divergence,
            "same_tops": quality.same_top_percent / 100 * quality.tokens,
        }
    return result
