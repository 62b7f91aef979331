"""What cannot be quantized is refused, with a line that says why, and nothing is left behind."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx_ir
import pytest
from quantized_graphs import STORYTELLER, FloatArray, altered, name_of, nodes, only_consumer, set_weight, weight

from gpt2_edge import ModelFolderError, OptionError, PromptError, QuantizationError
from gpt2_edge.cli import main
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.quantize import pipeline, quantize_folder, rounding
from gpt2_edge.quantize.blockwise import round_to_nearest
from gpt2_edge.quantize.calibration import CalibrationRun
from gpt2_edge.quantize.recipes import RECIPES, default_recipe, recipe_named
from gpt2_edge.quantize.rewrite import quantize_matrices


@pytest.fixture(scope="module")
def tiny_fp32(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """The folder that tests damage copies of."""
    place = tmp_path_factory.mktemp("tiny")
    export_checkpoint(write_checkpoint(place / "checkpoint", n_layer=1, n_embd=16, n_head=2), place / "fp32")
    return place / "fp32"


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def refused(source: str | Path, outputs: Path, kind: type[Exception] = QuantizationError) -> str:
    """Quantize what must be refused; check that nothing is left, and return the message."""
    with pytest.raises(kind) as refusal:
        quantize_folder(source, outputs / "int8")
    assert list(outputs.iterdir()) == []
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight"])
def test_weight_that_is_not_finite(name: str, number: float, tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    def damage(model: onnx_ir.Model) -> None:
        array = weight(model, name).copy()
        array[2, 3] = number
        set_weight(model, name, array)

    message = refused(altered(tiny_fp32, tmp_path / "source", damage), outputs)
    assert f"{name} holds NaN or infinity" in message


def test_next_to_no_context(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    def shorten(manifest: Manifest) -> Manifest:
        return replace(manifest, architecture=replace(manifest.architecture, context_length=3))

    message = refused(altered(tiny_fp32, tmp_path / "source", manifest=shorten), outputs)
    assert "has a context of 3 tokens" in message


@pytest.mark.parametrize("what", ["text", "calibration"])
def test_a_text_of_a_few_words_is_refused_before_the_work(
    what: str, tiny_fp32: Path, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "quantize_matrices", lambda *_: pytest.fail("it began"))
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time")
    with pytest.raises(PromptError, match=r"the text .*short\.txt has \d tokens"):
        quantize_folder(tiny_fp32, outputs / "int8", **{what: short})
    assert list(outputs.iterdir()) == []


def test_an_integer_cache_needs_a_longer_calibration_text(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Once upon a time there was a king. " * 20)
    with pytest.raises(QuantizationError, match="and --cache int8 cuts off what it does not show"):
        quantize_folder(tiny_fp32, outputs / "int8", calibration=short, cache="int8")
    quantize_folder(tiny_fp32, outputs / "int8", calibration=short)


def hide_matrix(model: onnx_ir.Model) -> None:
    """Let a matrix reach its product by way of another operator."""
    node = nodes(model, "MatMul")[2]
    copy = onnx_ir.node("Identity", [node.inputs[1]])
    model.graph.insert_before(node, copy)
    node.replace_input_with(1, copy.outputs[0])


def hide_embedding(model: onnx_ir.Model) -> None:
    """Let the lookup of the embedding look like another one."""
    (node,) = [node for node in nodes(model, "Gather") if name_of(node.inputs[0]) == "wte.weight"]
    copy = onnx_ir.node("Identity", [node.inputs[1]])
    model.graph.insert_before(node, copy)
    node.replace_input_with(1, copy.outputs[0])


def copy_head(model: onnx_ir.Model) -> None:
    (head,) = nodes(model, "Gemm")
    copy = onnx_ir.val("copy", const_value=onnx_ir.tensor(weight(model, "wte.weight"), name="copy"))
    model.graph.register_initializer(copy)
    head.replace_input_with(1, copy)


def subtract_bias(model: onnx_ir.Model) -> None:
    nodes(model, "MatMul")[0].outputs[0].consumers()[0].op_type = "Sub"


def scale_bias(model: onnx_ir.Model) -> None:
    add = nodes(model, "MatMul")[0].outputs[0].consumers()[0]
    copy = onnx_ir.node("Identity", [add.inputs[1]])
    model.graph.insert_before(add, copy)
    add.replace_input_with(1, copy.outputs[0])


def transpose_head(model: onnx_ir.Model) -> None:
    (head,) = nodes(model, "Gemm")
    head.attributes["transB"] = onnx_ir.AttrInt64("transB", 0)


ODD_GRAPHS: Final[dict[str, tuple[Callable[[onnx_ir.Model], None], str]]] = {
    "hidden matrix": (hide_matrix, "4 matrices were quantized in 5 places, where the model has 5 in 6"),
    "bias of another kind": (subtract_bias, "h.0.attn.c_attn.weight is not followed by its bias"),
    "bias that is computed": (scale_bias, "bias of h.0.attn.c_attn.weight is not a weight"),
}


@pytest.mark.parametrize("case", ODD_GRAPHS)
def test_graph_of_another_form(case: str, tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    change, said = ODD_GRAPHS[case]
    message = refused(altered(tiny_fp32, tmp_path / "source", change), outputs)
    assert said in message
    assert "export" in message


def test_head_the_other_way_round(tiny_fp32: Path) -> None:
    model = onnx_ir.load(tiny_fp32 / "model.onnx")
    transpose_head(model)
    run = CalibrationRun(model, open_folder(tiny_fp32).manifest.architecture, [[1, 2, 3]])
    with pytest.raises(QuantizationError, match=r"head wte\.weight is not of the expected form: export"):
        quantize_matrices(model, default_recipe("int8"), run)


def test_graph_of_an_older_release(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    """It has [batch, sequence, width] where it now has [batch x sequence, width]."""
    message = refused(altered(tiny_fp32, tmp_path / "source", three_dimensions), outputs)
    assert "the graph was made by an older release (h.0.attn.c_attn.weight)" in message
    assert "export the model again" in message
    # The other recipes do not mind.
    pipeline.quantize_folder(tmp_path / "source", outputs / "int8", RECIPES["int8-block64"])


def three_dimensions(model: onnx_ir.Model) -> None:
    """Give each product [1, rows, width], which computes the same."""
    axis = onnx_ir.val("axis", const_value=onnx_ir.tensor(np.array([0], np.int64), name="axis"))
    model.graph.register_initializer(axis)
    for node in nodes(model, "MatMul"):
        x, addition = node.inputs[0], only_consumer(node.outputs[0])
        assert x is not None
        assert x.shape is not None
        wide = onnx_ir.node("Unsqueeze", [x, axis])
        wide.outputs[0].shape = onnx_ir.Shape([1, *x.shape])
        wide.outputs[0].type = x.type
        model.graph.insert_before(node, wide)
        node.replace_input_with(0, wide.outputs[0])
        for output in (node.outputs[0], addition.outputs[0]):
            output.shape = None
        flat = onnx_ir.node("Squeeze", [addition.outputs[0], axis])
        model.graph.insert_after(addition, flat)
        for consumer in addition.outputs[0].consumers():
            if consumer is not flat:
                for index, value in enumerate(consumer.inputs):
                    if value is addition.outputs[0]:
                        consumer.replace_input_with(index, flat.outputs[0])


def test_manifest_of_another_graph(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    def one_layer_more(manifest: Manifest) -> Manifest:
        return replace(manifest, architecture=replace(manifest.architecture, layers=2))

    message = refused(altered(tiny_fp32, tmp_path / "source", manifest=one_layer_more), outputs, ModelFolderError)
    assert "is not the graph that the manifest describes" in message


def test_lookup_that_stays_in_float32_is_noticed(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    """A tied embedding that only the head was quantized of would be stored twice."""
    message = refused(altered(tiny_fp32, tmp_path / "source", hide_embedding), outputs)
    assert "5 matrices were quantized in 5 places, where the model has 5 in 6" in message


def test_tied_head_with_a_matrix_of_its_own_is_noticed(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    message = refused(altered(tiny_fp32, tmp_path / "source", copy_head), outputs)
    assert "6 matrices were quantized in 6 places, where the model has 5 in 6" in message


def test_source_that_is_quantized_already(storyteller_int8: Path, outputs: Path) -> None:
    assert "is int8: give the fp32 folder" in refused(storyteller_int8, outputs)


def test_the_bundled_model_is_found_by_its_name_and_quantized_already(outputs: Path) -> None:
    said = refused("storyteller", outputs)
    assert said.startswith("storyteller is the bundled model, which is int8 already: export its checkpoint, models/st")
    # A path is a path.
    assert "storyteller does not exist" in refused(Path("storyteller"), outputs, ModelFolderError)


def test_source_that_is_no_model_folder(outputs: Path, tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "nowhere", outputs, ModelFolderError)
    assert "is a checkpoint, not a model folder" in refused(STORYTELLER, outputs, ModelFolderError)


def test_source_that_is_damaged(tiny_fp32: Path, outputs: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_fp32, tmp_path / "source")
    content = bytearray((source / "model.onnx.data").read_bytes())
    content[1000] ^= 1
    (source / "model.onnx.data").write_bytes(content)
    assert "model.onnx.data is damaged" in refused(source, outputs, ModelFolderError)


def test_output_that_exists(tiny_fp32: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "open_folder", lambda source: pytest.fail("the source was read"))
    for taken in (outputs, tiny_fp32):
        (outputs / "mine").write_text("mine")
        with pytest.raises(ModelFolderError, match="already exists"):
            quantize_folder(tiny_fp32, taken)
    assert [path.name for path in outputs.iterdir()] == ["mine"]


def test_output_that_is_an_empty_folder(tiny_fp32: Path, outputs: Path) -> None:
    quantize_folder(tiny_fp32, outputs)
    open_folder(outputs).check_hashes()
    assert [path.name for path in outputs.parent.iterdir()] == ["outputs"]


def test_full_disk(tiny_fp32: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half of the graph")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(pipeline.onnx_ir, "save", save)
    assert "No space left on device: free some space" in refused(tiny_fp32, outputs, ModelFolderError)


@pytest.mark.parametrize(
    ("factor", "said"), [(30.0, "nats a token away from full precision"), (np.nan, "numbers that are not finite")]
)
def test_rounding_that_loses_the_model(
    factor: float, said: str, tiny_fp32: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(matrix: FloatArray, block_size: int, bits: int) -> tuple[npt.NDArray[np.int8], FloatArray]:
        steps, scales = round_to_nearest(matrix, block_size, bits)
        return steps, scales * np.float32(factor)

    monkeypatch.setattr(rounding, "round_to_nearest", wrong)
    assert said in refused(tiny_fp32, outputs)


def test_precisions_and_recipes_by_name() -> None:
    assert default_recipe("int8").name == "int8"
    assert default_recipe("int4").name == "int4"
    assert recipe_named("int8-block64", "int8").linear.block_size == 64
    assert recipe_named("int4-small") is RECIPES["int4-small"]
    with pytest.raises(OptionError, match=r"recipe is 'int5': give int8 or .* or int4-fast"):
        recipe_named("int5")
    with pytest.raises(OptionError, match=r"'int3'.*int8"):
        default_recipe("int3")
    with pytest.raises(OptionError, match=r"'int8-block128': for int8 give int8 or int8-fast or int8-block64 or"):
        recipe_named("int8-block128", "int8")
    with pytest.raises(OptionError, match=r"'int8-block64': for int4 give int4 or int4-close or int4-small"):
        recipe_named("int8-block64", "int4")


def test_report_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = str(tmp_path / "nowhere" / "report.json")
    made = str(outputs / "int4")
    assert main(["quantize", "no-such-folder", "-o", made, "--recipe", "int4", "--report", report]) == 1
    assert f"cannot write {report}: there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err
