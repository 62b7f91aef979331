"""Keep what a forked process inherited of ONNX Runtime's sessions from being freed there.

The threads of a session are not in the process that was forked; freeing it waits for them for ever, at the latest when
the interpreter ends. Its memory is shared with the process that it was forked from, so keeping it costs nothing.
"""

import ctypes
import os
from typing import Any, Final
from weakref import WeakSet

_sessions: Final[WeakSet[Any]] = WeakSet()


def keep_where_forked(session: Any) -> None:
    """Never free an `onnxruntime.InferenceSession` in processes that are forked from this one."""
    _sessions.add(session)


def _keep_all() -> None:
    for session in _sessions:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_all)
