"""The process that a peer converts a checkpoint in, or is measured in.

python -P peer_process.py PEER.py

Runs inside the peer's own environment, without gpt2-edge. Requests come from standard input and answers go to standard
output, a JSON object on each line, as in `worker.py`. PEER.py has

    convert(checkpoint: str, variant: str, folder: str) -> None
    class Model:
        def __init__(self, folder: str, variant: str, threads: int) -> None
        def prefill(self, prompt: list[int]) -> float: seconds until the logits after the prompt are there
        def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]: seconds for so many steps of
            all prompts side by side, and how many tokens they computed in fact
"""

import importlib.metadata
import importlib.util
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

_SETTLING_SECONDS = 0.2


class PeerWorker:
    """Answers the requests for one peer.

    Args:
        peer: The peer's module.
    """

    def __init__(self, peer: ModuleType) -> None:
        self._peer = peer
        self._memory = _module(Path(__file__).parents[1] / "memory.py")
        self._before_loading_bytes = 0
        self._vocabulary_size = 0
        self._model: Any = None

    def convert(self, checkpoint: str, variant: str, folder: str) -> dict[str, Any]:
        """Write what the peer runs into an empty folder."""
        self._peer.convert(checkpoint, variant, folder)
        return {}

    def load(self, folder: str, variant: str, threads: int, vocabulary_size: int, distribution: str) -> dict[str, Any]:
        """Load what `convert` wrote."""
        self._vocabulary_size = vocabulary_size
        self._before_loading_bytes = self._memory.resident_bytes()
        started_at = time.perf_counter()
        self._model = self._peer.Model(folder, variant, threads)
        return {
            "load_seconds": time.perf_counter() - started_at,
            "threads": threads,
            "device": "cpu",
            "version": importlib.metadata.version(distribution),
        }

    def warm_up(self, n_prompt: int, n_gen: int, n_depth: int, batch: int) -> dict[str, Any]:
        """Run a test once without a result: the whole prompt, or a single new token."""
        self._run(n_prompt, min(n_gen, 1), n_depth, batch)
        return {}

    def speed(self, n_prompt: int, n_gen: int, n_depth: int, batch: int, sample_seconds: float) -> dict[str, Any]:
        """Run a test with new random tokens, again until it took long enough to be measured."""
        tokens, seconds = 0, 0.0
        while not tokens or seconds < sample_seconds:
            seconds += self._run(n_prompt, n_gen, n_depth, batch)
            tokens += n_prompt + n_gen * batch
        return {"tokens_per_second": tokens / seconds}

    def save_logits(self, tokens: list[int], path: str) -> dict[str, Any]:
        """Write the logits after each token as a .npy file of shape [tokens, vocabulary]; not every peer can."""
        import numpy as np

        np.save(path, self._model.logits(tokens))
        return {}

    def memory(self) -> dict[str, Any]:
        """Return this process's memory."""
        return {
            "before_loading_bytes": self._before_loading_bytes,
            "steady_bytes": self._memory.resident_bytes(),
            "peak_bytes": self._memory.peak_resident_bytes(),
        }

    def idle(self, seconds: float) -> dict[str, Any]:
        """Do nothing, and return how much CPU this process used meanwhile."""
        time.sleep(_SETTLING_SECONDS)
        cpu_before, started_at = time.process_time(), time.perf_counter()
        time.sleep(seconds)
        return {"cpu_percent": 100 * (time.process_time() - cpu_before) / (time.perf_counter() - started_at)}

    def _run(self, n_prompt: int, n_gen: int, n_depth: int, batch: int) -> float:
        if n_prompt:
            return float(self._model.prefill(self._random_tokens(n_prompt)))
        prompts = [self._random_tokens(max(n_depth, 1)) for _ in range(batch)]
        seconds, tokens = self._model.decode(prompts, n_gen)
        if tokens != n_gen * batch:
            raise ValueError(f"void: it computed {tokens} tokens in place of {n_gen * batch}")
        return float(seconds)

    def _random_tokens(self, count: int) -> list[int]:
        return random.choices(range(self._vocabulary_size), k=count)


def serve(worker: PeerWorker, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more; an answer has "error" if the request failed."""
    for line in requests:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as error:  # noqa: BLE001 - whatever it is belongs into the row of this peer
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Serve the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started us decides, and closes our standard input
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no answer
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    try:
        serve(PeerWorker(_module(Path(sys.argv[1]))), sys.stdin, answers)
    except BrokenPipeError:  # who asked has gone: nobody reads the rest of the answer, nor anything about it
        os._exit(1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
