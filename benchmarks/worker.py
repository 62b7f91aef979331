"""The process that one model is measured in: reads requests from standard input, answers on standard output.

python -m gpt2_edge.benchmarks.worker

Each request and each answer is a JSON object on a line of its own. A process for each model, because memory and idle
CPU are properties of a process, and because a model that brings its process down must not take the others with it.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from gpt2_edge.benchmarks.memory import peak_resident_bytes, resident_bytes
from gpt2_edge.benchmarks.perplexity import measure_window
from gpt2_edge.benchmarks.rows import RandomTokensRow
from gpt2_edge.benchmarks.stopwatch import Stopwatch
from gpt2_edge.errors import Gpt2EdgeError, OptionError
from gpt2_edge.model import Model, load

TEMPERATURE: Final = 0.8
TOP_K: Final = 40
_SETTLING_SECONDS: Final = 0.2


class Worker:
    """Measures one model.

    Args:
        folder: Of the model.
        device: As in `gpt2_edge.load`.
        threads: As in `gpt2_edge.load`.
    """

    def __init__(self, folder: str, device: str, threads: int | None) -> None:
        self._before_loading_bytes = resident_bytes()
        started_at = time.perf_counter()
        self._model: Model = load(folder, device=device, threads=threads)
        self._load_seconds = time.perf_counter() - started_at
        self._random = np.random.default_rng()

    def loaded(self) -> dict[str, Any]:
        """Say what was loaded."""
        return {"load_seconds": self._load_seconds, "threads": self._model.threads, "device": self._model.device}

    def warm_up(self, n_prompt: int, n_gen: int, n_depth: int, batch: int) -> dict[str, Any]:
        """Run a test once without a result, as llama-bench does: the whole prompt, or a single new token."""
        self._run(n_prompt, min(n_gen, 1), n_depth, batch)
        return {}

    def speed(self, n_prompt: int, n_gen: int, n_depth: int, batch: int, sample_seconds: float) -> dict[str, Any]:
        """Run a test with new random tokens, again until it took long enough to be measured."""
        tokens, seconds = 0, 0.0
        while not tokens or seconds < sample_seconds:
            seconds += self._run(n_prompt, n_gen, n_depth, batch)
            tokens += n_prompt + n_gen * batch
        return {"tokens_per_second": tokens / seconds}

    def latency(self, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
        """Generate once, as a caller does, and take the time of every token."""
        stopwatch = Stopwatch()
        with stopwatch.attached():
            timings = self._model.generate(
                self._random_tokens(prompt_tokens),
                max_new_tokens=new_tokens,
                ignore_eos=True,
                temperature=TEMPERATURE,
                top_k=TOP_K,
            ).timings
        return {
            "time_to_first_token_seconds": timings.prefill_seconds,
            "inter_token_ms": [round(1e3 * each, 4) for each in np.diff(stopwatch.chosen_at).tolist()],
            "decode_seconds": stopwatch.decode_seconds,
            "run_seconds": stopwatch.run_seconds,
            "sampling_seconds": stopwatch.sampling_seconds,
        }

    def memory(self) -> dict[str, Any]:
        """Return this process's memory."""
        return {
            "before_loading_bytes": self._before_loading_bytes,
            "steady_bytes": resident_bytes(),
            "peak_bytes": peak_resident_bytes(),
        }

    def idle(self, seconds: float) -> dict[str, Any]:
        """Do nothing, and return how much CPU this process used meanwhile."""
        time.sleep(_SETTLING_SECONDS)  # threads still look for work for a moment
        cpu_before, started_at = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        return {"cpu_percent": 100 * (time.process_time() - cpu_before) / (time.perf_counter() - started_at)}

    def tokenize(self, text: str) -> dict[str, Any]:
        """Return the tokens of a text."""
        return {"tokens": self._model.tokenize(text)}

    def window(self, tokens: list[int], reference: str | None, save_to: str | None) -> dict[str, Any]:
        """Predict a window of a text."""
        paths = [None if path is None else Path(path) for path in (reference, save_to)]
        return measure_window(self._model, tokens, *paths)

    def _run(self, n_prompt: int, n_gen: int, n_depth: int, batch: int) -> float:
        """Return the seconds that the timed part of a test took."""
        prompt = self._random_tokens(n_prompt or max(n_depth, 1))
        rows = [RandomTokensRow(prompt, self._random_tokens(n_gen)) for _ in range(batch)]
        self._model._core.run(rows)
        if n_prompt:
            return rows[0].prefilled_at - rows[0].started_at
        last_began_at = max(row.prefilled_at for row in rows)
        if any(row.finished_at < last_began_at for row in rows):
            raise OptionError(f"{batch} sequences do not fit side by side into what memory is free here: give fewer")
        return max(row.finished_at for row in rows) - last_began_at

    def _random_tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._random.integers(0, self._model.manifest.architecture.vocabulary_size, count).tolist()
        return tokens


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more.

    The first loads the model. An answer has "error" if the request failed, and "fatal" if no other can succeed.
    """
    worker: Worker | None = None
    for line in requests:
        request = json.loads(line)
        do = request.pop("do")
        try:
            if worker is None:
                worker = Worker(**request)
                answer = worker.loaded()
            else:
                method: Callable[..., dict[str, Any]] = getattr(worker, do)
                answer = method(**request)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs into the row of this model
            own = isinstance(error, Gpt2EdgeError)
            answer = {"error": str(error) if own else f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main() -> int:
    """Serve the process that started this one."""
    # Ctrl-C reaches every process of a terminal; the one that started us decides, and closes our standard input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        serve(sys.stdin, answers)
    except BrokenPipeError:  # who asked has gone: nobody reads the rest of the answer, nor anything about it
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
