"""What a decoded token costs outside of ONNX Runtime: choosing it, and the rest.

    python -m gpt2_edge.benchmarks.step_overhead FOLDER

Between two choices the model really runs. After each run over the weights the interpreter's and numpy's own code and
data have to come back from memory, so a choice takes several times what it takes in a loop by itself
(`sampling_speed`). What taking the time itself takes is measured in the same way and is no part of the figures.

The logits are those of the run, where it has left them. How long a choice takes depends on how peaked they are, and
those of random weights, which the 124M shape is mostly measured with, are flat: one temperature for all gives them the
mean entropy that is asked for. The options then add a temperature of 0.8 to that, as is usual.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.benchmarks.stopwatch import Stopwatch
from gpt2_edge.choosing import TokenChooser
from gpt2_edge.model import Model, load
from gpt2_edge.options import OptionKeywords
from gpt2_edge.sampling import Logits, keep

# The loss of GPT-2 124M on English text is 3.1 to 3.4 nats a token; a calibrated model's entropy is its loss.
_ENTROPY: Final = 3.3
_TEMPERATURE: Final = 0.8  # of the options, on top of that
_TOP_P: Final = 0.95
_TOKENS, _REPETITIONS = 150, 7
_MEASURED_POSITIONS: Final = 64
_BISECTIONS: Final = 40
_CASES: Final[dict[str, OptionKeywords]] = {
    "top-k 40": {"top_k": 40},
    "top-p 0.95": {"top_p": _TOP_P},
    "min-p 0.05": {"min_p": 0.05},
    "top-p 0.95, min-p 0.05": {"top_p": _TOP_P, "min_p": 0.05},
    "top-k 40, top-p 0.95, min-p 0.05": {"top_k": 40, "top_p": _TOP_P, "min_p": 0.05},
}
_NO_CHOICE: Final = "no choice at all"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description="What a decoded token costs outside of ONNX Runtime: choosing it, between two real runs of the "
        "model, and the rest, which is the engine, the text and taking the time.",
        epilog="The logits of the runs are made as peaked as a language model's by a temperature that gives them the "
        f"mean entropy, over {_MEASURED_POSITIONS} positions; the options have a temperature of {_TEMPERATURE} more.",
    )
    parser.add_argument("folder")
    parser.add_argument("--entropy", type=float, default=_ENTROPY, help=f"in nats (default: {_ENTROPY})")
    arguments = parser.parse_args()
    with load(arguments.folder) as model:
        vocabulary_size = model.manifest.architecture.vocabulary_size
        if not 0 < arguments.entropy < np.log(vocabulary_size):
            parser.error(
                f"the entropy of {vocabulary_size:,} tokens is above 0 and below {np.log(vocabulary_size):.1f}"
            )
        prompt = np.random.default_rng(0).integers(0, vocabulary_size, _MEASURED_POSITIONS).tolist()
        logits = model.logits(prompt)
        peaking = temperature_of_entropy(logits, arguments.entropy)
        nucleus = statistics.median(keep(row, _TEMPERATURE * peaking, top_p=_TOP_P)[1].size for row in logits)
        print(
            f"{vocabulary_size:,} logits, made peaked to {arguments.entropy:g} nats by a temperature of {peaking:.3g}; "
            f"with {_TEMPERATURE} more top-p {_TOP_P} keeps {nucleus:.0f} tokens (median)"
        )
        print(f"{'ms a token':34} {'choosing':>22} {'the rest':>10}")
        drawn: OptionKeywords = {"temperature": _TEMPERATURE * peaking}
        cases = {_NO_CHOICE: OptionKeywords(), "greedy": OptionKeywords()}
        cases |= {name: drawn | options for name, options in _CASES.items()}
        _print_table(model, prompt[:8], cases)
    return 0


def temperature_of_entropy(logits: Logits, entropy: float) -> float:
    """Return the temperature at which rows of logits, shape [positions, vocabulary], have a mean entropy in nats."""
    lowest, highest = 1e-3, 1e3
    for _ in range(_BISECTIONS):
        middle = (lowest * highest) ** 0.5
        if _entropies(logits, middle).mean() < entropy:
            lowest = middle
        else:
            highest = middle
    return lowest


def _entropies(logits: Logits, temperature: float) -> npt.NDArray[np.float64]:
    scaled = (logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature
    weights = np.exp(scaled)
    totals = weights.sum(axis=1)
    entropies: npt.NDArray[np.float64] = np.log(totals) - (weights * scaled).sum(axis=1) / totals
    return entropies


def _print_table(model: Model, prompt: Sequence[int], cases: dict[str, OptionKeywords]) -> None:
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for _ in range(_REPETITIONS):
        for name, options in cases.items():  # in turn: so a disturbance is nobody's alone
            samples[name].append(_measure(model, prompt, options, _any if name == _NO_CHOICE else TokenChooser.choose))
    taking_time = statistics.median(choosing for choosing, _ in samples.pop(_NO_CHOICE))
    for name, pairs in samples.items():
        choosing, rest = zip(*((time - taking_time, others) for time, others in pairs), strict=True)
        spread = f"({min(choosing):.3f} to {max(choosing):.3f})"
        print(f"{name:34} {statistics.median(choosing):6.3f} {spread} {statistics.median(rest):9.3f}")


def _any(chooser: TokenChooser, logits: Logits, prompt: Sequence[int], continuation: Sequence[int]) -> int:
    """Stand in for `TokenChooser.choose`."""
    return 0


def _measure(model: Model, prompt: Sequence[int], options: OptionKeywords, choose: object) -> tuple[float, float]:
    """Return the milliseconds a token of choosing and of the rest."""
    original, stopwatch = TokenChooser.choose, Stopwatch()
    settings: OptionKeywords = {"max_new_tokens": _TOKENS + 1, "ignore_eos": True, "seed": 1}
    TokenChooser.choose = choose  # type: ignore[method-assign,assignment]
    try:
        with stopwatch.attached():
            model.generate(prompt, **(settings | options))
    finally:
        TokenChooser.choose = original  # type: ignore[method-assign]
    rest = stopwatch.decode_seconds - stopwatch.run_seconds - stopwatch.sampling_seconds
    return 1000 * stopwatch.sampling_seconds / _TOKENS, 1000 * rest / _TOKENS


if __name__ == "__main__":
    sys.exit(main())
