"""Hold the threads that compute when the interpreter ends.

Python ends a daemon thread when it comes back from other code after the interpreter has gone. In the C++ of ONNX
Runtime that aborts the whole process. So before the interpreter goes, the step in progress is waited for, and then
no other thread is let into the next one.
"""

import atexit
import threading
import time
from typing import Final, Protocol
from weakref import WeakSet

_FOREVER_SECONDS: Final = 3600.0


class _Computing(Protocol):
    def wait_for_step(self) -> None: ...


_computing: Final[WeakSet[_Computing]] = WeakSet()
_ended_by: int | None = None  # the thread


def wait_for_at_exit(engine: _Computing) -> None:
    """Let the interpreter end only when no other thread is in a step of an engine."""
    _computing.add(engine)


def is_held() -> bool:
    """Tell whether the calling thread must begin no step, because another one ends the interpreter."""
    return _ended_by is not None and _ended_by != threading.get_ident()


def hold() -> None:
    """Stay here until the process has ended, if `is_held`."""
    while is_held():
        time.sleep(_FOREVER_SECONDS)


@atexit.register
def _end() -> None:
    global _ended_by
    _ended_by = threading.get_ident()
    for engine in list(_computing):
        engine.wait_for_step()
