"""The other end of a worker: start its process, ask, close."""

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self, cast

from gpt2_edge.errors import Gpt2EdgeError

_PATIENCE_SECONDS = 5.0


class WorkerError(Gpt2EdgeError):
    """A request failed; the worker can go on."""


class WorkerDiedError(WorkerError):
    """The worker's process ended."""


@contextmanager
def _ctrl_c_blocked() -> Iterator[None]:
    """Let processes that are started in the block not hear Ctrl-C before they come to ignore it: see `worker.main`."""
    if not hasattr(signal, "pthread_sigmask"):  # on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class WorkerProcess:
    """A process of its own for one model.

    Args:
        command: What to start; None for `gpt2_edge.benchmarks.worker`.
        environment: Variables that it sees; None for those of this process.
        log: File that what it prints is added to; None lets it print.
    """

    def __init__(
        self,
        command: Sequence[str] | None = None,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self._printed = "above" if log is None else f"in {log}"
        output = None if log is None else log.open("ab")
        with _ctrl_c_blocked():
            self._process = subprocess.Popen(
                # -P: what lies in the working directory is not imported.
                command or [sys.executable, "-P", "-m", "gpt2_edge.benchmarks.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env=environment,
                stderr=output,
            )
        if output is not None:
            output.close()
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer.

        Raises:
            WorkerError: It failed; `WorkerDiedError` if the process ended.
        """
        try:
            self._requests.write(json.dumps({"do": do, **arguments}) + "\n")
            self._requests.flush()
            line = self._answers.readline()
        except OSError:
            line = ""
        if not line:
            raise WorkerDiedError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process, whatever it is doing. May be called again."""
        for stream in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                stream.close()
        self._process.terminate()
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        status = self._process.wait()
        if status < 0:
            hint = ": out of memory?" if status == -9 else ""
            return f"its process was ended by signal {-status}{hint}"
        return f"its process ended with status {status}; what it printed is {self._printed}"
