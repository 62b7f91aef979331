"""What quantization cost: two models' logits over the same tokens."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Quality:
    """How far a model is from its full-precision original.

    Attributes:
        tokens: Positions that were compared.
        mean_kl_divergence: Of the quantized from the full-precision distribution, in nats a token.
        largest_kl_divergence: At the worst position.
        same_top_percent: Positions at which both find the same token the likeliest.
    """

    tokens: int
    mean_kl_divergence: float
    largest_kl_divergence: float
    same_top_percent: float


def compare_logits(full_precision: Logits, quantized: Logits) -> Quality:
    """Compare distributions position by position.

    Args:
        full_precision: Shape [positions, vocabulary].
        quantized: The same shape.
    """
    reference = _log_softmax(full_precision)
    divergences = (np.exp(reference) * (reference - _log_softmax(quantized))).sum(axis=1)
    same_top = full_precision.argmax(axis=1) == quantized.argmax(axis=1)
    return Quality(
        tokens=len(divergences),
        mean_kl_divergence=float(divergences.mean()),
        largest_kl_divergence=float(divergences.max()),
        same_top_percent=float(100 * same_top.mean()),
    )


def _log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normalized: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized
