"""The pieces of a continuation, computed as they are asked for."""

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from gpt2_edge.engine import Engine
from gpt2_edge.errors import OptionError
from gpt2_edge.generation import GenerationRow
from gpt2_edge.results import Generation, Piece


class TextStream(Iterator[Piece]):
    """The pieces of a continuation, computed as they are asked for; made by `Model.stream` and `Session.stream`.

    Leaving the loop early is enough to stop; `close` or a `with` block says so at once. `close` may be called from
    another thread, and ends a prefill that is going on.

    Args:
        engine: Computes.
        row: What is generated.
    """

    def __init__(self, engine: Engine, row: GenerationRow) -> None:
        self._engine = engine
        self._row = row
        self._joined = False

    def __next__(self) -> Piece:
        row = self._row
        if not row.pieces and not row.done and not row.abandoned:
            self._compute()
        if row.pieces:
            return row.pieces.popleft()
        if row.failure is not None:
            raise row.failure
        raise StopIteration

    @property
    def result(self) -> Generation:
        """Everything generated so far; `finish_reason` is "cancelled" unless it ended by itself."""
        return self._row.result()

    def begin(self) -> None:
        """Queue what is generated, so that it is computed as soon as anybody waits; the first piece does it otherwise.

        Raises:
            ModelClosedError: The model was closed.
        """
        if not self._joined:
            self._engine.join([self._row])
            self._joined = True

    def close(self) -> None:
        """Stop generating. `result` keeps what was generated; may be called again."""
        self._engine.leave([self._row])

    def _compute(self) -> None:
        row = self._row
        try:
            self.begin()
            self._engine.run_until(lambda: row.pieces or row.done)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> Any:
        raise OptionError("a stream cannot be copied or pickled: take its pieces, or its `result`")

    def __del__(self) -> None:
        # May run at any moment, also inside the engine: so nothing but a mark that it looks at between steps.
        self._row.abandoned = True
