"""What a decoded token costs outside of ONNX Runtime: the engine, the choice, the text.

    python -m gpt2_edge.benchmarks.step_overhead FOLDER

Wall time less the time in `InferenceSession.run_with_iobinding`. What a call costs once is taken out by the difference
between a long and a short continuation. After each run over the weights the interpreter's own code and data have to
come back into the caches, so this is several times what the same code takes in a loop by itself.

Logits of trained models are peaked. A model of random weights has flat ones, which a low temperature makes peaked:
`--temperature 0.15` gives those of the GPT-2 shape a standard deviation of 3.7.
"""

import argparse
import statistics
import sys
import time
from typing import Any, Final

from gpt2_edge.model import Model, load
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.options import OptionKeywords

_SHORT, _LONG, _REPETITIONS = 50, 250, 7
_CASES: Final[dict[str, OptionKeywords]] = {
    "top-k 40": {"top_k": 40},
    "top-p 0.95": {"top_p": 0.95},
    "min-p 0.05": {"min_p": 0.05},
    "top-k 40, top-p 0.95, min-p 0.05": {"top_k": 40, "top_p": 0.95, "min_p": 0.05},
}


class _Clock:
    """Adds up the time in ONNX Runtime's runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        original = onnxruntime.InferenceSession.run_with_iobinding

        def timed(session: Any, *arguments: Any) -> Any:
            started_at = time.perf_counter()
            result = original(session, *arguments)
            self.seconds += time.perf_counter() - started_at
            return result

        onnxruntime.InferenceSession.run_with_iobinding = timed


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a decoded token costs outside of ONNX Runtime.")
    parser.add_argument("folder")
    parser.add_argument("--temperature", type=float, default=0.8, help="of all but greedy (default: 0.8)")
    arguments = parser.parse_args()
    clock = _Clock()
    with load(arguments.folder) as model:
        drawn: OptionKeywords = {"temperature": arguments.temperature}
        cases = {"greedy": OptionKeywords()} | {name: drawn | options for name, options in _CASES.items()}
        for name, options in cases.items():
            samples = [_overhead_ms(model, options, clock) for _ in range(_REPETITIONS)]
            print(f"{name:34} {statistics.median(samples):6.3f} ms a token ({min(samples):.3f} to {max(samples):.3f})")
    return 0


def _overhead_ms(model: Model, options: OptionKeywords, clock: _Clock) -> float:
    outside = []
    for tokens in (_SHORT, _LONG):
        clock.seconds, started_at = 0.0, time.perf_counter()
        settings: OptionKeywords = {"max_new_tokens": tokens, "ignore_eos": True, "seed": 1}
        model.generate([5] * 8, **(settings | options))
        outside.append(time.perf_counter() - started_at - clock.seconds)
    return 1000 * (outside[1] - outside[0]) / (_LONG - _SHORT)


if __name__ == "__main__":
    sys.exit(main())
