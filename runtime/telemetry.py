"""Keep ONNX Runtime from sending telemetry.

Official builds of ONNX Runtime send telemetry from the moment they are imported, and write a device id to the
home folder, unless `ORT_DISABLE_TELEMETRY` is set before. So this module is the first that `gpt2_edge` imports. A
process that imported onnxruntime earlier cannot be helped any more; `telemetry_state` tells.
"""

import os
import sys
from typing import Final

_VARIABLE: Final = "ORT_DISABLE_TELEMETRY"


def _disable() -> str:
    if _VARIABLE in os.environ:
        value = os.environ[_VARIABLE]
        return "disabled" if value == "1" else f"left as the environment has it ({_VARIABLE}={value})"
    os.environ[_VARIABLE] = "1"
    if "onnxruntime" in sys.modules:
        return f"may be on: onnxruntime was imported before gpt2_edge; import gpt2_edge first, or set {_VARIABLE}=1"
    return "disabled"


_STATE: Final = _disable()


def telemetry_state() -> str:
    """Return "disabled", or a sentence that says why ONNX Runtime may send telemetry."""
    return _STATE
