"""What an export holds in memory: a model that fits into a machine can be exported on it."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from safetensors.torch import load_file, save_file

from gpt2_edge.export import export_checkpoint, pipeline


@pytest.mark.skipif(sys.platform != "linux", reason="tells what is mapped by /proc")
def test_the_checkpoint_is_let_go_before_its_graph_is_loaded(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = make_checkpoint() / "model.safetensors"
    weights = load_file(file)
    weights["transformer.h.0.ln_1.weight"] = weights["transformer.h.1.ln_1.weight"].clone()  # the tracer keeps one
    save_file(weights, file, {"format": "pt"})
    del weights
    is_mapped = []

    def watch(name: str) -> None:
        original = getattr(pipeline, name)

        def watched(*arguments: object) -> object:
            is_mapped.append((name, str(file) in Path("/proc/self/maps").read_text()))
            return original(*arguments)

        monkeypatch.setattr(pipeline, name, watched)

    watch("save")
    watch("check_parity")
    export_checkpoint(file.parent, tmp_path / "model")
    # The second graph is the one for GPUs.
    assert is_mapped == [("save", True), ("check_parity", False), ("check_parity", False)]


def test_weights_become_half_precision_one_at_a_time(
    make_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, rounded = pipeline.save, []

    def look_and_save(model: onnx_ir.Model, path: Path) -> None:
        for value in model.graph.initializers.values():
            weight = value.const_value
            if weight is not None and weight.dtype == onnx_ir.DataType.FLOAT16:
                rounded.append(value.name)
                assert not np.shares_memory(weight.numpy(), weight.numpy())
        save(model, path)

    monkeypatch.setattr(pipeline, "save", look_and_save)
    export_checkpoint(make_checkpoint(), tmp_path / "model", precision="fp16")
    assert {"wte.weight", "h.1.mlp.c_fc.weight"} <= set(rounded)
