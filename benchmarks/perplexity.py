"""Quality over a text: each model predicts the same windows of tokens, and the full-precision one is the reference.

The statistics are those of `gpt2_edge.quantize.quality`. Here each model has a process of its own, so the reference's
logits go to the other processes through a file, a window at a time: at 50,257 tokens a window is as large as a small
model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_edge.benchmarks.report import Quality
from gpt2_edge.generation import token_logprobs
from gpt2_edge.model import Model
from gpt2_edge.quantize.quality import (
    WINDOW_TOKENS,
    PositionStatistics,
    compare_logits,
    perplexity_of,
    summarize,
    window_logits,
    windows_of,
)


@dataclass(slots=True)
class QualityTally:
    """What the windows of one model add up to.

    Attributes:
        logprobs: Natural logarithms of the probability of each scored token.
        compared: What was compared with the reference, window by window.
    """

    logprobs: list[float] = field(default_factory=list)
    compared: list[PositionStatistics] = field(default_factory=list)

    def add(self, window: dict[str, Any]) -> None:
        """Add what `measure_window` returned."""
        self.logprobs += window["logprobs"]
        if "divergences" in window:
            self.compared.append(
                PositionStatistics(
                    np.array(window["reference_logprobs"]),
                    np.array(window["logprobs"]),
                    np.array(window["divergences"]),
                    np.array(window["same_top"], np.bool_),
                )
            )

    def quality(self, text: str, reference: str | None) -> Quality:
        """Return what was measured, of at least one window."""
        perplexity = perplexity_of(np.array(self.logprobs))
        if not self.compared:
            return Quality(text=text, tokens=len(self.logprobs), perplexity=perplexity)
        quality = summarize(self.compared)
        return Quality(
            text=text,
            tokens=len(self.logprobs),
            perplexity=perplexity,
            reference=reference,
            perplexity_change_percent=quality.perplexity_change_percent,
            perplexity_change_error_percent=quality.perplexity_change_error_percent,
            mean_kl_divergence=quality.mean_kl_divergence,
            same_top_percent=quality.same_top_percent,
        )


def bench_windows(tokens: Sequence[int], context_length: int, most_tokens: int) -> list[list[int]]:
    """Cut windows out of a text, spread evenly over it, so many that at most `most_tokens` are used."""
    length = min(WINDOW_TOKENS, context_length, most_tokens)
    return windows_of(tokens, length, most_windows=max(1, most_tokens // length))


def measure_window(model: Model, window: Sequence[int], reference: Path | None, save_to: Path | None) -> dict[str, Any]:
    """Predict one window.

    Args:
        model: What is measured.
        window: Tokens, at least two; the first is not scored.
        reference: The reference's logits for the same window; None compares with nothing.
        save_to: Where to write this model's logits; None writes nothing.

    Returns:
        Numbers for `QualityTally.add`.

    Raises:
        LogitsError: The model computes logits that are not finite.
    """
    logits = window_logits(model, window)[:-1]
    following = list(window[1:])
    if save_to is not None:
        np.save(save_to, logits)
    if reference is None:
        return {"logprobs": token_logprobs(logits, following).tolist()}
    compared = compare_logits(np.load(reference, mmap_mode="r"), logits, following)
    return {
        "logprobs": compared.logprobs.tolist(),
        "reference_logprobs": compared.full_precision_logprobs.tolist(),
        "divergences": compared.divergences.tolist(),
        "same_top": compared.same_top.tolist(),
    }
