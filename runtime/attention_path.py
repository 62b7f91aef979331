"""Which of its two ways ONNX Runtime computes attention on the CPU."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_VARIABLE: Final = "ORT_GQA_DISABLE_FLASH_ATTENTION"
_lock = threading.Lock()


@contextmanager
def whole_matrix_attention() -> Iterator[None]:
    """Let sessions that are made here multiply whole matrices of queries and keys.

    The other way, by tiles, saves memory, which GPT-2's short contexts do not need, and takes 1.3 times as long over a
    prompt of 512 tokens. ONNX Runtime chooses by a variable of the environment, for the whole process, and reads it
    when a session is made; so it is set only meanwhile. Whoever has set it already is left alone.
    """
    with _lock:
        if _VARIABLE in os.environ:
            yield
            return
        os.environ[_VARIABLE] = "1"
        try:
            yield
        finally:
            del os.environ[_VARIABLE]
