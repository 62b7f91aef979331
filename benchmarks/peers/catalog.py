"""The peers that are known: what they need, and the forms that a checkpoint is measured in."""

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Final

from gpt2_edge.errors import OptionError
from gpt2_edge.processor import describe_processor

TORCH_VERSION: Final = "2.13.0"
# What ggml calls the instruction sets, and what Linux does. Its own search for them (GGML_NATIVE) also finds AMX, and
# the library then ends with an illegal instruction where the system does not let programs use it.
_GGML_NAMES: Final = {
    "GGML_AVX2": "avx2",
    "GGML_BMI2": "avx2",  # every processor with AVX2 has it
    "GGML_FMA": "fma",
    "GGML_F16C": "f16c",
    "GGML_AVX512": "avx512f",
    "GGML_AVX512_VNNI": "avx512_vnni",
    "GGML_AVX512_BF16": "avx512_bf16",
}

# The precision of ours that a form is compared with.
PRECISIONS: Final = {
    **{name: name for name in ("fp32", "int8", "int4")},
    **{"float32": "fp32", "Q8_0": "int8", "Q4_K_M": "int4", "Q4_0": "int4"},
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Another program that runs GPT-2.

    Attributes:
        name: As `--peers` takes it.
        title: As it calls itself.
        script: Name of the file beside this one that drives it.
        distribution: Whose version is reported.
        requirements: For pip.
        without_dependencies: For pip, without what these need in turn.
        variants: Forms that a checkpoint is converted to.
        needs_torch: Whether torch is installed first, as a build for the CPU.
        installed_megabytes: Size of the environment, roughly.
    """

    name: str
    title: str
    script: str
    distribution: str
    requirements: tuple[str, ...]
    variants: tuple[str, ...]
    installed_megabytes: int
    without_dependencies: tuple[str, ...] = field(default=())
    needs_torch: bool = True

    @property
    def script_path(self) -> Path:
        """Where the script lies."""
        return Path(str(resources.files("gpt2_edge.benchmarks.peers") / self.script))

    def all_requirements(self) -> tuple[str, ...]:
        """Return everything that is asked for, torch included."""
        torch = (f"torch=={TORCH_VERSION}",) if self.needs_torch else ()
        return (*torch, *self.requirements, *self.without_dependencies)


PEERS: Final = (
    Peer(
        "ctranslate2",
        "CTranslate2",
        "ctranslate2_peer.py",
        "ctranslate2",
        ("ctranslate2>=4.8,<5", "transformers>=5,<6", "psutil"),
        ("int8", "float32"),
        1300,
    ),
    Peer(
        "llama.cpp",
        "llama.cpp",
        "llama_cpp_peer.py",
        "llama-cpp-python",
        ("llama-cpp-python==0.3.36", "gguf>=0.17", "safetensors>=0.5", "psutil"),
        ("Q8_0", "Q4_K_M", "Q4_0"),
        170,
        needs_torch=False,
    ),
    Peer(
        "openvino",
        "OpenVINO GenAI",
        "openvino_peer.py",
        "openvino-genai",
        (
            "openvino-genai>=2026.4,<2027",
            "nncf>=3.3,<4",
            "optimum>=2.3,<2.4",
            "transformers>=4.51,<5.6",
            "requests",
            "huggingface-hub<1.22",
            "psutil",
        ),
        ("int8", "int4"),
        1600,
        # It asks for torchvision as well, of which only a build with CUDA may be found, and does not need it for text.
        without_dependencies=("optimum-intel>=2.2,<2.3",),
    ),
    Peer(
        "optimum",
        "optimum-onnx",
        "optimum_peer.py",
        "optimum-onnx",
        ("optimum-onnx[onnxruntime]>=0.1,<0.2", "psutil"),
        ("int8", "fp32"),
        1250,
    ),
    Peer(
        "torch",
        "transformers",
        "torch_peer.py",
        "transformers",
        ("transformers>=5,<6", "psutil"),
        ("fp32",),
        1200,
    ),
)


def peers_named(names: Sequence[str]) -> list[Peer]:
    """Return peers by their names, each once.

    Raises:
        OptionError: One is not known.
    """
    known = {peer.name: peer for peer in PEERS}
    for name in names:
        if name not in known:
            raise OptionError(f"{name!r} is no peer: choose from {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def build_options() -> dict[str, str]:
    """Return the environment variables with which pip builds llama.cpp for this processor."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}
    found = describe_processor()[1]
    chosen = [name for name, flag in _GGML_NAMES.items() if flag in found]
    if not chosen:  # what the processor has is not known: its own search is better than nothing
        return {}
    return {"CMAKE_ARGS": " ".join(["-DGGML_NATIVE=OFF", *(f"-D{name}=ON" for name in chosen)])}
