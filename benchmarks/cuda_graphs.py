"""Graphs without weights, carried in the repository, so that a GPU machine can be checked without torch or onnx.

    python -m gpt2_edge.benchmarks.cuda_graphs write      # where the export extra is installed
    fill("gpt2-fp16", folder)                             # anywhere with numpy: a whole model folder

The graphs are those of `gpt2-edge export`: a checkpoint of the same layers and heads but very narrow is traced, and
its sizes are then replaced. So a graph of GPT-2 XL takes seconds instead of gigabytes.
"""

import argparse
import json
import shutil
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gpt2_edge.manifest import Architecture, Manifest
from gpt2_edge.seal import write_manifest
from gpt2_edge.version import VERSION

GRAPHS: Final = Path(__file__).resolve().parent / "carried_graphs"
STORYTELLER: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"

_LAYOUT: Final = "layout.json"
_DATA: Final = "model.onnx.data"
_ALIGNMENT: Final = 4096
_NARROW_HEAD: Final = 8
_STANDARD_DEVIATION: Final = 0.02
_CHUNK_VALUES: Final = 1 << 24


@dataclass(frozen=True, slots=True)
class Kit:
    """A model whose graphs are carried: its shape and precision."""

    layers: int
    heads: int
    width: int
    context_length: int
    vocabulary_size: int
    precision: str

    @property
    def architecture(self) -> Architecture:
        """What its manifest says."""
        return Architecture(
            layers=self.layers,
            heads=self.heads,
            head_size=self.width // self.heads,
            width=self.width,
            inner_width=4 * self.width,
            context_length=self.context_length,
            vocabulary_size=self.vocabulary_size,
            activation="gelu_new",
            tied_head=True,
        )


KITS: Final[Mapping[str, Kit]] = {
    "storyteller-fp32": Kit(6, 4, 256, 512, 8192, "fp32"),
    "storyteller-fp16": Kit(6, 4, 256, 512, 8192, "fp16"),
    "gpt2-fp16": Kit(12, 12, 768, 1024, 50257, "fp16"),
    "gpt2-xl-fp16": Kit(48, 25, 1600, 1024, 50257, "fp16"),
    "tiny-fp16": Kit(2, 4, 32, 64, 8192, "fp16"),
}

Weight = Callable[[str, tuple[int, ...]], npt.NDArray[np.float16]]


def fill(name: str, folder: Path, weight: Weight | None = None) -> Path:
    """Make a model folder of a carried graph.

    Args:
        name: One of `KITS`.
        folder: Where; must not exist.
        weight: Gives a weight by its checkpoint's name and shape; None draws random ones, which is all that speed
            needs.

    Returns:
        The folder.
    """
    source, kit = GRAPHS / name, KITS[name]
    layout = json.loads((source / _LAYOUT).read_text(encoding="utf-8"))
    folder.mkdir(parents=True)
    for graph in layout["graphs"].values():
        shutil.copyfile(source / graph, folder / graph)
    shutil.copyfile(STORYTELLER / "tokenizer.json", folder / "tokenizer.json")
    random = np.random.default_rng(0)
    with (folder / _DATA).open("wb") as file:
        for tensor in layout["tensors"]:
            file.seek(tensor["offset"])
            shape, dtype = tuple(tensor["shape"]), np.dtype(tensor["dtype"])
            if weight is not None:
                file.write(weight(tensor["name"], shape).astype(dtype).tobytes())
            else:
                _write_random(file, tensor["name"], int(np.prod(shape)), dtype, random)
    write_manifest(
        folder,
        Manifest(
            architecture=kit.architecture,
            flavour="fused",
            precision=kit.precision,
            cache_precision=kit.precision,
            recipe=None,
            graphs=layout["graphs"],
            end_of_text=0,
            source={"name": name},
            tools={"gpt2-edge": VERSION},
            minimum_onnxruntime="1.22",
        ),
    )
    return folder


def storyteller_weights() -> Weight:
    """Read the storyteller's checkpoint with numpy alone; see https://github.com/huggingface/safetensors#format."""
    data = np.memmap(STORYTELLER / "model.safetensors", np.uint8, "r")
    (header_bytes,) = struct.unpack("<Q", data[:8].tobytes())
    header = json.loads(data[8 : 8 + header_bytes].tobytes())

    def weight(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float16]:
        entry = header[f"transformer.{name}"]
        if entry["dtype"] != "F16" or tuple(entry["shape"]) != shape:
            raise ValueError(f"{name} is {entry['dtype']} {entry['shape']}, the graph has fp16 {shape}")
        first, last = (8 + header_bytes + offset for offset in entry["data_offsets"])
        return np.frombuffer(data[first:last].tobytes(), np.float16).reshape(shape)

    return weight


def _write_random(file: Any, name: str, values: int, dtype: "np.dtype[Any]", random: np.random.Generator) -> None:
    """Write a normalization's weights around 1 and all others around 0, a piece at a time."""
    mean = 1.0 if ".ln_" in f".{name}" and name.endswith("weight") else 0.0
    for first in range(0, values, _CHUNK_VALUES):
        count = min(_CHUNK_VALUES, values - first)
        drawn = random.standard_normal(count, np.float32) * np.float32(_STANDARD_DEVIATION) + np.float32(mean)
        file.write(drawn.astype(dtype).tobytes())


def write_kit(name: str, destination: Path) -> None:
    """Trace, rewrite and save the graphs of a kit; needs the export extra."""
    import onnx_ir

    from gpt2_edge.export.half_precision import to_half_precision
    from gpt2_edge.export.plain_attention import save_with_plain_attention
    from gpt2_edge.export.tracing import traced

    kit = KITS[name]
    config, weights = _narrow_checkpoint(kit)
    destination.mkdir(parents=True, exist_ok=True)
    graphs = {"decoder": "model.onnx"}
    with traced(weights, config) as model:
        if kit.precision == "fp16":
            to_half_precision(model)
        tensors = _widen(model, kit)
        onnx_ir.save(model, destination / graphs["decoder"])
    if kit.precision == "fp32":
        graphs["decoder_cuda"] = "model_cuda.onnx"
        save_with_plain_attention(
            destination / graphs["decoder"], destination / graphs["decoder_cuda"], kit.architecture
        )
    layout = {"kit": asdict(kit), "graphs": graphs, "tensors": tensors}
    (destination / _LAYOUT).write_text(json.dumps(layout, indent=1) + "\n", encoding="utf-8")


def _narrow_checkpoint(kit: Kit) -> tuple[Any, dict[str, Any]]:
    import torch

    from gpt2_edge.export.config import CheckpointConfig

    width = _NARROW_HEAD * kit.heads
    config = CheckpointConfig(
        vocab_size=64,
        n_positions=16,
        n_embd=width,
        n_layer=kit.layers,
        n_head=kit.heads,
        n_inner=4 * width,
        activation_function="gelu_new",
        layer_norm_epsilon=1e-5,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    torch.manual_seed(0)  # all weights differ, or the tracer would merge those that are equal
    shapes = _shapes(config.n_layer, width, config.vocab_size, config.n_positions)
    return config, {name: torch.randn(shape) for name, shape in shapes.items()}


def _shapes(layers: int, width: int, vocabulary_size: int, context_length: int) -> dict[str, tuple[int, ...]]:
    block = {
        **{f"{name}.{part}": (width,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")},
        **{"attn.c_attn.weight": (width, 3 * width), "attn.c_attn.bias": (3 * width,)},
        **{"attn.c_proj.weight": (width, width), "attn.c_proj.bias": (width,)},
        **{"mlp.c_fc.weight": (width, 4 * width), "mlp.c_fc.bias": (4 * width,)},
        **{"mlp.c_proj.weight": (4 * width, width), "mlp.c_proj.bias": (width,)},
    }
    return {
        "wte.weight": (vocabulary_size, width),
        "wpe.weight": (context_length, width),
        **{f"h.{layer}.{name}": shape for layer in range(layers) for name, shape in block.items()},
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }


def _widen(model: Any, kit: Kit) -> list[dict[str, Any]]:
    """Replace the narrow sizes of a traced graph by those of the kit, and its weights by places in a data file."""
    import onnx_ir

    graph, shape = model.graph, kit.architecture
    shapes = _shapes(kit.layers, kit.width, kit.vocabulary_size, kit.context_length)
    tensors: list[dict[str, Any]] = []
    offset = 0
    for name, value in graph.initializers.items():
        if name not in shapes:  # the shape [-1, width] to which the hidden state is flattened, for one
            sizes = value.const_value.numpy()
            wide = np.where(sizes == _NARROW_HEAD * kit.heads, kit.width, sizes).astype(np.int64)
            value.const_value = onnx_ir.Tensor(wide, name=name)
            continue
        dtype = value.const_value.dtype
        length = int(np.prod(shapes[name])) * dtype.numpy().itemsize
        value.const_value = onnx_ir.ExternalTensor(
            _DATA, offset, length, dtype, shape=onnx_ir.Shape(shapes[name]), name=name, base_dir=""
        )
        value.shape = onnx_ir.Shape(shapes[name])
        tensors.append({"name": name, "dtype": dtype.numpy().name, "shape": shapes[name], "offset": offset})
        offset += -(-length // _ALIGNMENT) * _ALIGNMENT
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.attributes["scale"] = onnx_ir.AttrFloat32("scale", shape.head_size**-0.5)
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    for value in (*graph.inputs, *graph.outputs):
        if value.name.startswith(("past_key_values.", "present.")):
            value.shape = onnx_ir.Shape([*value.shape[:3], shape.head_size])
        elif value.name == "logits":
            value.shape = onnx_ir.Shape([value.shape[0], kit.vocabulary_size])
    return tensors


def main() -> int:
    """Write the graphs of all kits anew."""
    parser = argparse.ArgumentParser(description="Write the graphs without weights that a GPU machine is checked with.")
    parser.add_argument("action", choices=["write"])
    parser.parse_args()
    for name in KITS:
        write_kit(name, GRAPHS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
