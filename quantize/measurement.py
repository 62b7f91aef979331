"""Measure a quantized folder against the one it was made from: what its manifest then says in `measured`."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gpt2_edge.errors import LogitsError, QuantizationError
from gpt2_edge.folder import TOKENIZER_NAME, open_folder
from gpt2_edge.model import load
from gpt2_edge.quantize.quality import (
    MOST_WINDOWS,
    GreedyComparison,
    Quality,
    compare_greedy_texts,
    measure_quality,
)
from gpt2_edge.quantize.texts import choose_text

MOST_STEPS: Final = MOST_WINDOWS + 1
# The storyteller's INT8 has 0.001. A graph that computes something else has several nats.
_LARGEST_SANE_KL_DIVERGENCE: Final = 0.5


@dataclass(frozen=True, slots=True)
class Measurement:
    """The quality of a quantized folder.

    Attributes:
        text: Over which text.
        windows: How many windows of it were predicted, each on its own.
        quality: Over all positions of all windows.
        greedy: Greedy continuations of the beginnings of some of the windows.
    """

    text: str
    windows: int
    quality: Quality
    greedy: GreedyComparison

    def document(self) -> dict[str, Any]:
        """Return what the manifest's `measured` holds as `quality`."""
        return {
            "text": self.text,
            "windows": self.windows,
            **asdict(self.quality),
            "greedy_tokens": self.greedy.tokens,
            "first_divergent_tokens": list(self.greedy.first_divergent_tokens),
            "first_divergent_in_batch": list(self.greedy.first_divergent_in_batch),
        }


def measure_folder(
    source: str | Path, quantized: Path, text: Path | None, on_step: Callable[[], object] = lambda: None
) -> Measurement:
    """Compare a quantized folder with its source.

    Args:
        source: The fp32 folder.
        quantized: The folder that was made from it.
        text: A UTF-8 file; None takes what suits the model: see `choose_text`.
        on_step: Called as the work goes on, at most `MOST_STEPS` times.

    Raises:
        OptionError: The text cannot be read.
        PromptError: The text is too short.
        QuantizationError: The two are not the same model.
    """
    with load(source, verify_hashes=False) as original, load(quantized, verify_hashes=False) as candidate:
        chosen = choose_text(text, original, open_folder(source).content(TOKENIZER_NAME).read())
        try:
            quality = measure_quality(original, candidate, chosen.windows, on_step)
        except LogitsError as error:
            raise QuantizationError(f"{error}: no folder was written; this recipe does not suit the model") from error
        if quality.mean_kl_divergence > _LARGEST_SANE_KL_DIVERGENCE:
            raise QuantizationError(
                f"the quantized model is {quality.mean_kl_divergence:.2g} nats a token away from full precision: "
                "no folder was written; this recipe does not suit the model"
            )
        greedy = compare_greedy_texts(original, candidate, chosen.windows)
        on_step()
    return Measurement(chosen.title, len(chosen.windows), quality, greedy)
