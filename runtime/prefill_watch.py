"""End a run of a prefill soon after somebody has lost interest in it."""

import _thread
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_WATCHED_TOKENS: Final = 64  # a shorter run is over before anybody could interrupt it
_WATCH_SECONDS: Final = 0.05  # each look takes a core from the run for a moment


@contextmanager
def ended_when(interrupted: Callable[[], bool], terminate: Callable[[], None], tokens: int) -> Iterator[None]:
    """Terminate the run in the block when it is interrupted meanwhile.

    Args:
        interrupted: Asked often, in another thread.
        terminate: Makes the run fail soon; never called after the block.
        tokens: That the run computes.
    """
    if tokens < _WATCHED_TOKENS:
        yield
        return
    running = threading.Lock()
    running.acquire()
    terminating = threading.Lock()

    def watch() -> None:
        while not running.acquire(timeout=_WATCH_SECONDS):
            if interrupted():
                with terminating:
                    if running.locked():
                        terminate()
                return

    # `threading.Thread` would wait here until the thread runs, and at the end until it has ended: 1 % of a prompt.
    _thread.start_new_thread(watch, ())
    try:
        yield
    finally:
        with terminating:
            running.release()
