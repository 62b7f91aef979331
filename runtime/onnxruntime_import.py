"""The one place that imports ONNX Runtime, after telemetry was switched off."""

from gpt2_edge import telemetry
from gpt2_edge.errors import MissingDependencyError

__all__ = ["onnxruntime", "telemetry"]

try:
    import onnxruntime
except ImportError as error:
    if isinstance(error.__cause__, KeyboardInterrupt):  # its C++ code makes another error of it
        raise error.__cause__ from None
    raise MissingDependencyError(
        "ONNX Runtime is not installed: run pip install 'gpt2-edge[cpu]', or 'gpt2-edge[cuda]' for an NVIDIA GPU "
        f"(not both: they break each other). Python said: {error}"
    ) from error

if not hasattr(onnxruntime, "InferenceSession"):
    raise MissingDependencyError(
        "ONNX Runtime is installed incompletely, as happens when onnxruntime and onnxruntime-gpu were installed "
        "together and one was removed: run pip uninstall onnxruntime onnxruntime-gpu, "
        "then pip install 'gpt2-edge[cpu]'"
    )
