"""The one thread that a GPU session is used from.

ONNX Runtime's CUDA provider keeps for every thread that runs a session its own captured graphs and its own handles of
NVIDIA's libraries, with their workspaces, until the session ends; and CUDA keeps for every thread which GPU it is on.
A server that answers each request from a thread of its own would capture all graphs anew each time and never give the
memory back.

Several sessions take turns. While one captures, CUDA forbids all other threads of the process to allocate memory and
more: ONNX Runtime captures in the mode cudaStreamCaptureModeGlobal.
"""

import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_turn: Final = threading.Lock()

_Call = tuple[Callable[[], Any], SimpleQueue[tuple[Any, BaseException | None]]]


class CudaThread:
    """Runs calls one after another on a thread of its own, which ends with this object."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread = threading.Thread(target=_work, args=(self._calls,), name="gpt2-edge GPU", daemon=True)
        self._thread.start()
        weakref.finalize(self, self._calls.put, None)

    def run(
        self, function: Callable[Parameters, Result], *arguments: Parameters.args, **keywords: Parameters.kwargs
    ) -> Result:
        """Call a function there, wait for it, and return what it returns or raise what it raises."""
        if threading.current_thread() is self._thread:
            return function(*arguments, **keywords)
        outcome: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._calls.put((partial(function, *arguments, **keywords), outcome))
        result: Result
        result, error = outcome.get()
        if error is None:
            return result
        try:
            raise error
        finally:
            del error  # which refers to this frame by its traceback


def _work(calls: "SimpleQueue[_Call | None]") -> None:
    while (call := calls.get()) is not None:
        function, outcome = call
        try:
            with _turn:
                result = function()
            outcome.put((result, None))
            del result
        except BaseException as error:  # noqa: BLE001 - raised again where it was called
            outcome.put((None, error))
        del call, function, outcome  # or what they refer to would live until the next call
