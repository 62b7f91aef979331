"""End a run of a prefill soon after somebody has lost interest in it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

_WATCHED_TOKENS: Final = 64  # a shorter run is over before anybody could interrupt it
_WATCH_SECONDS: Final = 0.02


@contextmanager
def ended_when(interrupted: Callable[[], bool], terminate: Callable[[], None], tokens: int) -> Iterator[None]:
    """Terminate the run in the block when it is interrupted meanwhile.

    Args:
        interrupted: Asked often, in another thread.
        terminate: Makes the run fail soon.
        tokens: That the run computes.
    """
    if tokens < _WATCHED_TOKENS:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        while not over.wait(_WATCH_SECONDS):
            if interrupted():
                terminate()
                return

    watcher = threading.Thread(target=watch, name="gpt2-edge prefill watch", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
