"""Where the time of a generation goes: ONNX Runtime, sampling, and the rest, which is Python.

The runtime is not changed to be measured: for as long as a stopwatch is attached, two methods are replaced by ones
that take the time around the original.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from gpt2_edge.choosing import TokenChooser
from gpt2_edge.onnxruntime_import import onnxruntime


class Stopwatch:
    """Takes times while it is attached.

    Attributes:
        chosen_at: `time.perf_counter()` after each chosen token.
        run_seconds: In ONNX Runtime since the first token was chosen.
        sampling_seconds: Choosing tokens since the first one was chosen.
    """

    def __init__(self) -> None:
        self.chosen_at: list[float] = []
        self.run_seconds = 0.0
        self.sampling_seconds = 0.0

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Measure this process's runs and choices; for one generation at a time."""
        with ExitStack() as stack:
            for name in ("run", "run_with_iobinding"):
                stack.enter_context(_timed(onnxruntime.InferenceSession, name, self._on_run))
            stack.enter_context(_timed(TokenChooser, "choose", self._on_choice))
            yield

    @property
    def decode_seconds(self) -> float:
        """From the first chosen token to the last."""
        return self.chosen_at[-1] - self.chosen_at[0]

    def _on_run(self, started_at: float, ended_at: float) -> None:
        self.run_seconds += ended_at - started_at

    def _on_choice(self, started_at: float, ended_at: float) -> None:
        if self.chosen_at:
            self.sampling_seconds += ended_at - started_at
        else:
            self.run_seconds = 0.0  # what went before was prefill
        self.chosen_at.append(ended_at)


@contextmanager
def _timed(owner: Any, name: str, report: Callable[[float, float], None]) -> Iterator[None]:
    original = getattr(owner, name)

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started_at = time.perf_counter()
        try:
            return original(*arguments, **keywords)
        finally:
            report(started_at, time.perf_counter())

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, original)
