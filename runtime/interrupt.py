"""Ctrl-C, and SIGTERM which means the same: where they are heard, and where they have to wait.

Ctrl-C must not tear a step apart, where other threads wait for its end. A program that handles one of the two signals
itself is left alone.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

# Exit statuses, as a shell gives them.
INTERRUPTED: Final = 128 + signal.SIGINT
TERMINATED: Final = 128 + signal.SIGTERM

_terminated = threading.Event()
_waiting: threading.Event | None = None  # of the block that holds KeyboardInterrupt back


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in the block, so that what cleans up after Ctrl-C does so then, too.

    Only in the main thread, and where SIGTERM would end the process at once.
    """
    _terminated.clear()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def is_terminated() -> bool:
    """Tell whether SIGTERM came since `sigterm_interrupts` was entered last."""
    return _terminated.is_set()


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Hold KeyboardInterrupt back until the end of the block.

    Only where Python would raise it: in the main thread, with Python's own handler in place, or that of
    `sigterm_interrupts`.

    Yields:
        Set as soon as Ctrl-C was pressed: end the block soon then.
    """
    global _waiting
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    is_heard = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_heard:
        signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    before, _waiting = _waiting, pressed
    try:
        yield pressed
    finally:
        _waiting = before
        if is_heard:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _terminated.set()
    if _waiting is None:
        raise KeyboardInterrupt
    _waiting.set()
