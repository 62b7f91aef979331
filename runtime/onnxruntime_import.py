"""The one place that imports ONNX Runtime, after telemetry was switched off."""

from gpt2_edge import telemetry
from gpt2_edge.errors import MissingDependencyError

__all__ = ["onnxruntime", "telemetry"]

try:
    import onnxruntime
except ImportError as error:
    if isinstance(error.__cause__, KeyboardInterrupt):  # its C++ code makes another error of it
        raise error.__cause__ from None
    from gpt2_edge.cuda_installation import INSTALL_FOR_CPU, INSTALL_FOR_CUDA

    raise MissingDependencyError(
        f"ONNX Runtime is not installed: run {INSTALL_FOR_CPU}, or for an NVIDIA GPU {INSTALL_FOR_CUDA} "
        f"(not both: they break each other). Python said: {error}"
    ) from error

if not hasattr(onnxruntime, "InferenceSession"):
    from gpt2_edge.cuda_installation import INSTALL_FOR_CPU, INSTALL_FOR_CUDA

    raise MissingDependencyError(
        "ONNX Runtime is installed incompletely, as happens when onnxruntime and onnxruntime-gpu were installed "
        f"together and one was removed: run pip uninstall onnxruntime onnxruntime-gpu, then {INSTALL_FOR_CPU}, "
        f"or for an NVIDIA GPU {INSTALL_FOR_CUDA}"
    )
