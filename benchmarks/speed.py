"""Prefill and decode speed of loaded models, measured alternately so that a drifting machine treats them alike."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gpt2_edge.model import Model


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the repetitions, in tokens a second.

    Attributes:
        prefill_tokens_per_second: Of a prompt of random tokens.
        decode_tokens_per_second: After that prompt, one token at a time.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float


def measure_speeds(
    models: Sequence[Model],
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    on_run: Callable[[], object] = lambda: None,
) -> list[Speed]:
    """Measure models in turn, a new random prompt each time, after one warm-up.

    Args:
        models: What is compared.
        prompt_tokens: Length of the prompts.
        new_tokens: Tokens generated after each, greedily; end-of-text does not stop them.
        repetitions: How often each model is measured.
        on_run: Called after each run.
    """
    random = np.random.default_rng(0)
    timings: list[list[tuple[float, float]]] = [[] for _ in models]
    for repetition in range(repetitions + 1):
        for model, results in zip(models, timings, strict=True):
            prompt = random.integers(0, model.manifest.architecture.vocabulary_size, prompt_tokens).tolist()
            timed = model.generate(prompt, max_new_tokens=new_tokens, ignore_eos=True).timings
            if repetition > 0:  # the first warms up
                results.append((timed.prefill_tokens_per_second, timed.decode_tokens_per_second))
            on_run()
    return [Speed(*map(statistics.median, zip(*results, strict=True))) for results in timings]
