"""How far long work is: a bar on a terminal, plain lines in a pipe, both on standard error."""

import sys
import time
from types import TracebackType
from typing import Any, Self


class Progress:
    """A number of steps, some of them named.

    Args:
        title: What the work is.
        total: How many steps there are.
    """

    def __init__(self, title: str, total: int) -> None:
        self._title = title
        self._total = total
        self._bar: Any = None
        self._outcome = "done in"
        self._started_at = time.perf_counter()

    def start(self, stage: str) -> None:
        """Say what is done now."""
        if self._bar is not None:
            self._bar.set_description_str(f"{self._title}: {stage}")
        else:
            print(f"{self._title}: {stage}", file=sys.stderr, flush=True)

    def advance(self) -> None:
        """Say that a step is done."""
        if self._bar is not None:
            self._bar.update()

    def break_off(self) -> None:
        """Say at the end that the work was interrupted, though it goes on with what there is."""
        self._outcome = "interrupted after"

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:  # the runtime alone does not need it: lines will do
                return self
            self._bar = tqdm(total=self._total, desc=self._title, leave=False, bar_format="{desc} {bar:24} {elapsed}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        if error is None:
            seconds = time.perf_counter() - self._started_at
            print(f"{self._title}: {self._outcome} {seconds:.1f} s", file=sys.stderr, flush=True)
