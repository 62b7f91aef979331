"""Half precision: the operators it is made of, what it computes, and what it refuses."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from gpt2_edge import cli
from gpt2_edge.cuda_session import CudaSession
from gpt2_edge.errors import CheckpointError, ParityError
from gpt2_edge.export import export_checkpoint, pipeline
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import Architecture


def operators(graph: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(graph, load_external_data=False).graph.node)


@pytest.fixture
def half(make_checkpoint: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Export a tiny checkpoint in half precision."""

    def export(**config: Any) -> Path:
        export_checkpoint(make_checkpoint(**config), tmp_path / "half", precision="fp16")
        return tmp_path / "half"

    return export


def test_the_graph_is_made_of_the_operators_that_cuda_fuses(half: Callable[..., Path]) -> None:
    counts = operators(half(n_layer=3) / "model.onnx")
    assert counts["GroupQueryAttention"] == 3
    assert counts["SkipLayerNormalization"] == 7  # two a layer and the last; the first takes the sum of the embeddings
    assert counts["LayerNormalization"] == 0
    assert counts["FastGelu"] == 3
    assert counts["MatMul"] == 12
    assert counts["Add"] == 3  # biases of queries, keys and values
    assert counts["Cast"] == 1


@pytest.mark.parametrize(
    ("activation", "operator"), [("gelu", "BiasGelu"), ("gelu_new", "FastGelu"), ("relu", "Relu"), ("silu", "Sigmoid")]
)
def test_every_activation_runs_in_half_precision(half: Callable[..., Path], activation: str, operator: str) -> None:
    folder = half(activation_function=activation)  # the export runs it
    assert operators(folder / "model.onnx")[operator] == 2


def test_everything_but_ids_and_logits_is_half_precision(half: Callable[..., Path]) -> None:
    model = onnx_ir.load(half() / "model.onnx")
    kinds = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert kinds.pop("logits") == onnx_ir.DataType.FLOAT
    caches = [kinds.pop(name) for name in list(kinds) if name.startswith(("past_", "present."))]
    assert caches == [onnx_ir.DataType.FLOAT16] * 8
    assert set(kinds.values()) == {onnx_ir.DataType.INT64, onnx_ir.DataType.INT32}
    weights = {value.const_value.dtype for value in model.graph.initializers.values() if value.const_value is not None}
    assert weights == {onnx_ir.DataType.FLOAT16, onnx_ir.DataType.INT64}


def test_logits_are_those_of_transformers_within_the_tolerance(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(n_embd=36, n_head=4)  # heads of 9, padded to 16
    export_checkpoint(checkpoint, tmp_path / "half", precision="fp16")
    session = CudaSession(open_folder(tmp_path / "half"), "cpu")
    tokens = [5, 900, 33, 8000, 17, 2, 64]
    with torch.no_grad():
        expected = GPT2LMHeadModel.from_pretrained(checkpoint).eval()(torch.tensor([tokens])).logits[0].numpy()
    found = np.concatenate(
        [session.prefill(0, tokens[:4], 0, np.arange(4)), session.decode([tokens[4]], [4]).copy()]
        + [session.decode([token], [length]).copy() for length, token in ((5, tokens[5]), (6, tokens[6]))]
    )
    assert np.abs(found - expected).max() <= 0.01 * np.abs(expected).max()
    session.close()


def test_a_weight_beyond_half_precision_is_refused_by_name(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint()
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.1.mlp.c_fc.weight"][3, 5] = -70000.0
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.weight has a weight of magnitude 7e\+04, .* 65504"):
        export_checkpoint(checkpoint, tmp_path / "half", precision="fp16")
    assert not (tmp_path / "half").exists()


def test_a_graph_that_computes_something_else_is_refused(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = pipeline.to_half_precision

    def spoil(model: onnx_ir.Model) -> None:
        original(model)
        bias = model.graph.initializers["h.0.mlp.c_proj.bias"]
        assert bias.const_value is not None
        bias.const_value = onnx_ir.Tensor(bias.const_value.numpy() * np.float16(2), name=bias.name)

    monkeypatch.setattr(pipeline, "to_half_precision", spoil)
    with pytest.raises(ParityError, match="differs from the checkpoint"):
        export_checkpoint(make_checkpoint(), tmp_path / "half", precision="fp16")
    assert not (tmp_path / "half").exists()


def test_the_command_exports_it_and_says_how_close_it_is(
    make_checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(make_checkpoint()), "-o", str(tmp_path / "half"), "--precision", "fp16"]) == 0
    assert "fp16, " in capsys.readouterr().out
    manifest = open_folder(tmp_path / "half").manifest
    assert manifest.precision == "fp16"
    assert manifest.graphs == {"decoder": "model.onnx"}
    assert 0 < manifest.measured["parity"]["largest_difference"] <= manifest.measured["parity"]["tolerance"]


def test_the_graph_for_gpus_of_fp32_shares_the_weights_and_has_no_fused_attention(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    export_checkpoint(make_checkpoint(), tmp_path / "single")
    manifest = open_folder(tmp_path / "single").manifest
    assert manifest.graphs == {"decoder": "model.onnx", "decoder_cuda": "model_cuda.onnx"}
    assert operators(tmp_path / "single" / "model.onnx")["GroupQueryAttention"] == 2
    counts = operators(tmp_path / "single" / "model_cuda.onnx")
    assert counts["GroupQueryAttention"] == 0
    assert (counts["TensorScatter"], counts["Softmax"]) == (4, 2)
    # None of these, whose results live on the host and would keep steps from being captured:
    assert counts["Shape"] == counts["Range"] == counts["Squeeze"] == 0
    model = onnx.load(tmp_path / "single" / "model_cuda.onnx", load_external_data=False)
    locations = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert locations == {"model.onnx.data"}
    assert (tmp_path / "single" / "model_cuda.onnx").stat().st_size < 100_000


def test_a_half_precision_folder_cannot_be_quantized(half: Callable[..., Path], tmp_path: Path) -> None:
    from gpt2_edge.errors import QuantizationError
    from gpt2_edge.quantize import quantize_folder

    with pytest.raises(QuantizationError, match="is fp16: give the fp32 folder"):
        quantize_folder(half(), tmp_path / "int8")


def test_sizes_of_the_manifest_are_the_checkpoints(half: Callable[..., Path]) -> None:
    architecture = open_folder(half(n_layer=1)).manifest.architecture
    assert isinstance(architecture, Architecture)
    assert (architecture.layers, architecture.heads, architecture.head_size, architecture.width) == (1, 4, 8, 32)
