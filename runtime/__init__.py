"""Run GPT-2 on a laptop, an edge box or inside a desktop app.

    import gpt2_edge

    model = gpt2_edge.load("storyteller")
    for piece in model.stream("Once upon a time", max_new_tokens=60, temperature=0.8, top_k=40):
        print(piece.text, end="", flush=True)

Importing this package loads nothing but numpy, onnxruntime and tokenizers, and those only when they are first
needed. It sets `ORT_DISABLE_TELEMETRY=1` in the environment, because ONNX Runtime sends telemetry otherwise.
"""

if __name__ != "gpt2_edge":
    raise ImportError(f"this package is imported as gpt2_edge, not as {__name__}: install it with pip install .")

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from gpt2_edge import telemetry as _telemetry  # noqa: F401 - before anything can import onnxruntime
from gpt2_edge.errors import (
    CheckpointError,
    ContextLengthError,
    DeviceError,
    Gpt2EdgeError,
    LogitsError,
    MachineError,
    MissingDependencyError,
    ModelClosedError,
    ModelFolderError,
    OptionError,
    ParityError,
    PromptError,
    QuantizationError,
    SessionError,
    UnsealedFolderWarning,
)
from gpt2_edge.version import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from gpt2_edge.model import Model, load
    from gpt2_edge.options import GenerationOptions, OptionKeywords
    from gpt2_edge.results import Generation, NextToken, Piece, Score, Timings, TokenLogprobs
    from gpt2_edge.stream import TextStream
    from gpt2_edge.text_session import Session

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "DeviceError",
    "Generation",
    "GenerationOptions",
    "Gpt2EdgeError",
    "LogitsError",
    "MachineError",
    "MissingDependencyError",
    "Model",
    "ModelClosedError",
    "ModelFolderError",
    "NextToken",
    "OptionError",
    "OptionKeywords",
    "ParityError",
    "Piece",
    "PromptError",
    "QuantizationError",
    "Score",
    "Session",
    "SessionError",
    "TextStream",
    "Timings",
    "TokenLogprobs",
    "UnsealedFolderWarning",
    "__version__",
    "load",
]

# What needs onnxruntime is imported when it is first asked for: so errors, `--help` and export without a runtime work
# where none is installed, and the message that says how to install one is the only thing that is seen.
_MODULE_OF = {
    **dict.fromkeys(("Model", "load"), "model"),
    **dict.fromkeys(("GenerationOptions", "OptionKeywords"), "options"),
    **dict.fromkeys(("Generation", "NextToken", "Piece", "Score", "Timings", "TokenLogprobs"), "results"),
    "Session": "text_session",
    "TextStream": "stream",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'gpt2_edge' has no attribute {name!r}")
    value = globals()[name] = getattr(_import_module(f"gpt2_edge.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
