"""Which graphs are run, and which are refused before they are."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
from model_folders import edit_graph, reseal
from onnx import TensorProto, helper

import gpt2_edge
from gpt2_edge.errors import ModelFolderError


def value_named(values: Iterator[onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto:
    return next(value for value in values if value.name == name)


def use_instead(graph: onnx.GraphProto, name: str, replacement: str) -> None:
    for node in graph.node:
        node.input[:] = [replacement if each == name else each for each in node.input]


def add_an_input(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "sequence"]))


def fix_an_input(graph: onnx.GraphProto) -> None:
    graph.input.remove(value_named(graph.input, "logit_positions"))
    graph.initializer.append(helper.make_tensor("logit_positions", TensorProto.INT64, [1], [0]))


def rename_an_input(graph: onnx.GraphProto) -> None:
    value_named(graph.input, "position_ids").name = "positions"
    use_instead(graph, "position_ids", "positions")


def retype_an_input(graph: onnx.GraphProto) -> None:
    value_named(graph.input, "seqlens_k").type.tensor_type.elem_type = TensorProto.INT64
    use_instead(graph, "seqlens_k", "seqlens_k_32")
    graph.node.insert(0, helper.make_node("Cast", ["seqlens_k"], ["seqlens_k_32"], to=TensorProto.INT32))


def fix_a_dimension(graph: onnx.GraphProto) -> None:
    dimension = value_named(graph.input, "input_ids").type.tensor_type.shape.dim[0]
    dimension.ClearField("dim_param")
    dimension.dim_value = 1


def add_an_output(graph: onnx.GraphProto) -> None:
    graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["n", 8192]))
    graph.node.append(helper.make_node("Identity", ["logits"], ["more"]))


def drop_an_output(graph: onnx.GraphProto) -> None:
    graph.output.remove(value_named(graph.output, "present.5.value"))


def rename_the_logits(graph: onnx.GraphProto) -> None:
    value_named(graph.output, "logits").name = "scores"
    graph.node.append(helper.make_node("Identity", ["logits"], ["scores"]))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (add_an_input, "inputs differ: attention_mask is unknown"),
        (fix_an_input, "inputs differ: logit_positions is missing"),
        (rename_an_input, "inputs differ: position_ids is missing; positions is unknown"),
        (retype_an_input, r"inputs differ: seqlens_k is .*int64.*expected .*int32"),
        (fix_a_dimension, r"inputs differ: input_ids is .*\[1, None\]"),
        (add_an_output, "outputs differ: more is unknown"),
        (drop_an_output, r"outputs differ: present\.5\.value is missing"),
        (rename_the_logits, "outputs differ: logits is missing; scores is unknown"),
    ],
)
def test_a_graph_with_another_signature_is_refused(
    model_copy: Path, edit: Callable[[onnx.GraphProto], None], named: str
) -> None:
    edit_graph(model_copy, edit)
    with pytest.raises(ModelFolderError, match=named):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("layers", 5, r"past_key_values\.5\.key is unknown"),
        ("layers", 7, r"past_key_values\.6\.key is missing"),
        ("heads", 8, r"past_key_values\.0\.key is .*4.*expected .*8"),
        ("head_size", 32, r"past_key_values\.0\.key is .*64.*expected .*32"),
        ("vocabulary_size", 8100, r"logits is .*8192.*expected .*8100"),
        ("vocabulary_size", 8200, "embeddings for 8192 tokens, the manifest has vocabulary_size 8200"),
        ("context_length", 513, "embeddings for 512 positions, the manifest has context_length 513"),
    ],
)
def test_a_manifest_that_describes_another_graph_is_refused(
    model_copy: Path, field: str, value: int, named: str
) -> None:
    reseal(model_copy, **{f"architecture__{field}": value})
    with pytest.raises(ModelFolderError, match=named):
        gpt2_edge.load(model_copy)


def test_a_context_that_the_graph_does_not_have_is_refused(model_copy: Path) -> None:
    reseal(model_copy, architecture__context_length=10**12)
    with pytest.raises(ModelFolderError, match="context_length"):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x07"], ids=["empty", "text", "half a header"])
def test_a_file_that_is_no_graph_is_refused(model_copy: Path, content: bytes) -> None:
    (model_copy / "model.onnx").write_bytes(content)
    reseal(model_copy)
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        gpt2_edge.load(model_copy)


def test_weights_that_are_cut_off_are_refused(model_copy: Path) -> None:
    whole = (model_copy / "model.onnx.data").read_bytes()
    (model_copy / "model.onnx.data").unlink()
    (model_copy / "model.onnx.data").write_bytes(whole[: len(whole) // 2])
    reseal(model_copy)
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        gpt2_edge.load(model_copy)


def point_weights_to(location: str) -> Callable[[onnx.GraphProto], None]:
    def edit(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return edit


@pytest.mark.parametrize("location", ["../outside.data", "{parent}/outside.data", "./../outside.data"])
def test_weights_outside_of_the_folder_are_refused(model_copy: Path, location: str) -> None:
    shutil.copy(model_copy / "model.onnx.data", model_copy.parent / "outside.data")
    edit_graph(model_copy, point_weights_to(location.format(parent=model_copy.parent)))
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        gpt2_edge.load(model_copy)


def test_weights_that_the_manifest_does_not_list_are_refused(model_copy: Path) -> None:
    """Nobody hashed them."""
    edit_graph(model_copy, point_weights_to("unlisted.data"))
    shutil.copy(model_copy / "model.onnx.data", model_copy / "unlisted.data")
    with pytest.raises(ModelFolderError, match=r"unlisted\.data"):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize("installed", ["1.21.1", "1.21.0.dev20250101", "1.9.1", "0.99"])
def test_an_onnxruntime_that_is_too_old_is_named(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    reseal(model_copy, minimum_onnxruntime="1.22")
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    message = f"needs ONNX Runtime 1.22 or newer, {installed} is installed: run pip install --upgrade onnxruntime"
    with pytest.raises(ModelFolderError, match=re.escape(message)):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize(
    ("needed", "installed"),
    [
        *(("1.22", version) for version in ("1.22", "1.22.0", "1.22.1", "1.32.0.dev20261101001", "1.100.0", "2.0.0")),
        *(("1.22", version) for version in ("1.22.0+cpu", "1.23.0rc1")),
        *(("1.22.0.0", version) for version in ("1.22", "1.22.0")),
    ],
)
def test_an_onnxruntime_that_is_new_enough_is_accepted(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch, needed: str, installed: str
) -> None:
    reseal(model_copy, minimum_onnxruntime=needed)
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    with gpt2_edge.load(model_copy) as model:
        assert model.generate("Once", max_new_tokens=1).finish_reason == "length"
