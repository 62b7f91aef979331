"""Keep Ctrl-C from tearing a step apart, where other threads wait for its end."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Hold KeyboardInterrupt back until the end of the block.

    Only where Python would raise it: in the main thread, with Python's own handler in place. A program that handles
    SIGINT itself is left alone.

    Yields:
        Set as soon as Ctrl-C was pressed: end the block soon then.
    """
    pressed = threading.Event()
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield pressed
        return
    signal.signal(signal.SIGINT, lambda number, frame: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed.is_set():
        raise KeyboardInterrupt
