"""The model that the package carries is what today's exporter and quantizer make of `models/storyteller`."""

import json
from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir
import pytest
from tokenizers import Tokenizer

import gpt2_edge
from gpt2_edge.folder import file_sha256, open_folder

STORYTELLER: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"
TEXT: Final = "Once upon a time a fox and a hen shared a garden. 🦊\nIt's cold<|endoftext|>, said the hen."


@pytest.fixture(scope="module")
def bundled() -> Path:
    """The folder that really holds the bundled model's files."""
    return open_folder("storyteller").path


def operators(model: onnx_ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def test_weights_are_the_same(bundled: Path, storyteller_int8: Path) -> None:
    carried, made = (onnx_ir.load(folder / "model.onnx") for folder in (bundled, storyteller_int8))
    assert operators(carried) == operators(made)
    assert carried.graph.initializers.keys() == made.graph.initializers.keys()
    for name, value in made.graph.initializers.items():
        other = carried.graph.initializers[name]
        assert value.const_value is not None
        assert other.const_value is not None
        assert (other.dtype, other.shape) == (value.dtype, value.shape), name
        # The last bits of means over a text depend on the processor, and so may a weight between two integers.
        ours, theirs = value.const_value.numpy(), other.const_value.numpy()
        if ours.dtype.kind == "f":
            np.testing.assert_allclose(theirs, ours, rtol=1e-3, atol=1e-4, err_msg=name)
        else:
            differences = np.abs(theirs.astype(np.int64) - ours)
            assert differences.max(initial=0) <= 1, name
            assert differences.mean() <= 1e-3, name


def test_logits_are_the_same(int8_model: gpt2_edge.Model) -> None:
    with gpt2_edge.load("storyteller") as model:
        ours, theirs = int8_model.logits(TEXT), model.logits(TEXT)
        assert np.abs(theirs - ours).mean() <= 0.02 * ours.std()


def test_manifest_says_the_same(bundled: Path, storyteller_int8: Path) -> None:
    carried, made = (open_folder(folder).manifest for folder in (bundled, storyteller_int8))
    assert carried.source["sha256"] == {"model.safetensors": file_sha256(STORYTELLER / "model.safetensors")}
    for field in ("architecture", "flavour", "precision", "recipe", "graphs", "end_of_text", "source"):
        assert getattr(carried, field) == getattr(made, field), field
    assert carried.minimum_onnxruntime == made.minimum_onnxruntime


def test_files_are_undamaged(bundled: Path) -> None:
    open_folder("storyteller").check_hashes()
    assert {path.name for path in bundled.iterdir()} == {
        "golden.json",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
    }


def test_tokenizer_is_the_checkpoints(bundled: Path) -> None:
    carried, original = (
        json.loads(Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()) for folder in (bundled, STORYTELLER)
    )
    assert carried == original
