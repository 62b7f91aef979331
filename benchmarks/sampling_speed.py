"""How long the choice of a token takes in a loop by itself, by options and by shape of the logits.

    python -m gpt2_edge.benchmarks.sampling_speed

Normal logits of a deviation of 4.5 have an entropy of 3.4 nats, about what GPT-2's predictions of English text have.
`step_overhead` measures the same between the steps of a model, where it takes several times as long.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Final

import numpy as np

from gpt2_edge.choosing import TokenChooser
from gpt2_edge.options import GenerationOptions, OptionKeywords
from gpt2_edge.sampling import Logits

VOCABULARY_SIZE: Final = 50_257
SAID_TOKENS: Final = 500  # different ones
_DIFFERENT_LOGITS: Final = 24
_COLUMN: Final = 17


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table.

    Attributes:
        name: What is measured.
        options: Of the choice.
    """

    name: str
    options: OptionKeywords


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description="Measure how long the choice of a token takes.")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY_SIZE, help="number of logits")
    parser.add_argument("--repetitions", type=int, default=200, help="choices for each number")
    arguments = parser.parse_args()
    if arguments.vocabulary < SAID_TOKENS or arguments.repetitions < 1:
        parser.error(f"the vocabulary has at least {SAID_TOKENS} tokens, and there is at least one repetition")
    shapes = _shapes(arguments.vocabulary)
    print(
        f"Milliseconds to choose one of {arguments.vocabulary:,} tokens, medians of {arguments.repetitions}, "
        f"numpy {np.__version__}"
    )
    print()
    print(f"{'':44}" + "".join(f"{name:>{_COLUMN}}" for name in shapes))
    for row in _rows(arguments.vocabulary):
        medians = [measure(row.options, logits, arguments.repetitions) for logits in shapes.values()]
        print(f"{row.name:44}" + "".join(f"{1000 * seconds:{_COLUMN}.3f}" for seconds in medians), flush=True)
    return 0


def measure(keywords: OptionKeywords, logits: list[Logits], repetitions: int) -> float:
    """Return the median time of a choice in seconds.

    Args:
        keywords: Options of the choice.
        logits: Are used in turn: branch prediction learns logits that it sees again and again.
        repetitions: How many choices.
    """
    said = _different_tokens(logits[0].size, seed=1)
    prompt, continuation = said[: SAID_TOKENS // 2], said[SAID_TOKENS // 2 :]
    chooser = TokenChooser(GenerationOptions(**keywords), seed=0, final_tokens=[])
    computed = np.empty_like(logits[0])
    seconds = []
    for repetition in range(repetitions + 1):
        np.copyto(computed, logits[repetition % len(logits)])  # in the cache, as after the model's last layer
        started_at = time.perf_counter()
        chooser.report(computed, chooser.choose(computed, prompt, continuation))
        seconds.append(time.perf_counter() - started_at)
    return statistics.median(seconds[1:])  # the first reads the prompt


def _shapes(vocabulary_size: int) -> dict[str, list[Logits]]:
    random = np.random.default_rng(0)
    deviations = {"peaked N(0,4.5)": 4.5, "N(0,3)": 3.0, "N(0,1)": 1.0, "flat N(0,.01)": 0.01, "all equal": 0.0}
    return {
        name: [
            (deviation * random.standard_normal(vocabulary_size)).astype(np.float32) for _ in range(_DIFFERENT_LOGITS)
        ]
        for name, deviation in deviations.items()
    }


def _rows(vocabulary_size: int) -> list[Row]:
    bias = dict.fromkeys(_different_tokens(vocabulary_size, seed=2), 1.0)
    penalties: OptionKeywords = {"repetition_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": 0.1}
    return [
        Row("greedy", {}),
        Row("temperature", {"temperature": 0.8}),
        Row("top-k 40", {"top_k": 40}),
        Row("top-p 0.95", {"top_p": 0.95}),
        Row("min-p 0.05", {"min_p": 0.05}),
        Row("top-k 40, top-p 0.95, min-p 0.05", {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}),
        Row("top-p 0.95, min-p 0.05", {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05}),
        Row("top-k 20000", {"top_k": 20_000}),
        Row("typical-p 0.95", {"typical_p": 0.95}),
        Row("typical-p 0.2", {"typical_p": 0.2}),
        Row("top-p 0.999, min-p 0.001, typical-p 0.9", {"top_p": 0.999, "min_p": 0.001, "typical_p": 0.9}),
        Row(f"greedy, bias of {SAID_TOKENS} tokens", {"logit_bias": bias}),
        Row(f"greedy, penalties of {SAID_TOKENS} tokens", penalties),
        Row("greedy, no 3-gram twice", {"no_repeat_ngram_size": 3}),
        Row("greedy, all of these", {**penalties, "logit_bias": bias, "no_repeat_ngram_size": 3}),
        Row("greedy, 5 log-probabilities", {"logprobs": 5}),
    ]


def _different_tokens(vocabulary_size: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).permutation(vocabulary_size)[:SAID_TOKENS].tolist()
    return tokens


if __name__ == "__main__":
    sys.exit(main())
