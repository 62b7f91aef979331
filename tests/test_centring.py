"""Centring moves the means of activations into biases, and nothing else: unrounded, the model stays the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from quantized_graphs import altered, only_consumer, scales_of, set_weight, weight

from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.quantize import quantize_folder, rewrite, rounding
from gpt2_edge.quantize.blockwise import BlockwiseMatrix
from gpt2_edge.quantize.calibration import CalibrationRun
from gpt2_edge.quantize.centring import LinearLayer, centre
from gpt2_edge.quantize.recipes import RECIPES, MatrixFormat

FloatArray = npt.NDArray[np.float32]

LAYERS = 2


@pytest.fixture(scope="module", params=[{}, {"n_embd": 20, "n_head": 4, "n_inner": 70}], ids=["plain", "padded heads"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]
) -> Path:
    place = tmp_path_factory.mktemp("centring")
    export_checkpoint(write_checkpoint(place / "checkpoint", n_layer=LAYERS, **request.param), place / "fp32")
    return place / "fp32"


def loaded(folder: Path) -> onnx_ir.Model:
    model = onnx_ir.load(folder / "model.onnx")
    onnx_ir.external_data.load_to_model(model)
    return model


def windows() -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 8192, (6, 24)).tolist()


def run(folder: Path, model: onnx_ir.Model, window: list[int], names: list[str]) -> list[npt.NDArray[Any]]:
    """Run a graph over a window and return some of its values."""
    architecture = open_folder(folder).manifest.architecture
    proto = onnx_ir.to_proto(onnx_ir.Model(model.graph.clone(), ir_version=model.ir_version))
    known = {output.name for output in proto.graph.output}
    for name in names:
        if name not in known:
            proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    cache = np.zeros((1, architecture.heads, len(window), architecture.head_size), np.float32)
    feeds: dict[str, npt.NDArray[Any]] = {
        each.name: cache for each in session.get_inputs() if each.name.startswith("past_key_values")
    }
    feeds |= {
        "input_ids": np.array([window], np.int64),
        "position_ids": np.arange(len(window), dtype=np.int64)[np.newaxis],
        "seqlens_k": np.array([len(window) - 1], np.int32),
        "total_sequence_length": np.array(len(window), np.int32),
        "logit_positions": np.arange(len(window), dtype=np.int64),
    }
    results: list[npt.NDArray[Any]] = session.run(names, feeds)
    return results


def name_of(value: onnx_ir.Value | None) -> str:
    assert value is not None
    assert value.name is not None
    return value.name


def array_of(value: onnx_ir.Value | None) -> FloatArray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def new_weight(model: onnx_ir.Model, node: onnx_ir.Node, index: int, array: FloatArray) -> None:
    name = f"{name_of(node.outputs[0])}.new.{index}"
    value = onnx_ir.val(name, const_value=onnx_ir.tensor(np.ascontiguousarray(array), name=name))
    model.graph.register_initializer(value)
    node.resize_inputs(max(index + 1, len(node.inputs)))
    node.replace_input_with(index, value)


def centre_all(model: onnx_ir.Model, calibration: CalibrationRun, equalize: bool) -> dict[str, LinearLayer]:
    """Centre every layer and put its exact matrix and bias back into the graph."""
    layers = {}
    for node in tuple(model.graph):
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        x, weight = node.inputs[:2]
        assert x is not None
        if node.op_type == "Gemm":
            layer = LinearLayer(x, array_of(weight), np.zeros(len(array_of(weight)), np.float32))
            centre(model.graph, layer, calibration, equalize)
            new_weight(model, node, 1, layer.matrix)
            new_weight(model, node, 2, layer.bias)
        else:
            (addition,) = node.outputs[0].consumers()
            place = 1 - addition.inputs.index(node.outputs[0])
            layer = LinearLayer(x, np.ascontiguousarray(array_of(weight).T), array_of(addition.inputs[place]))
            centre(model.graph, layer, calibration, equalize)
            new_weight(model, node, 1, layer.matrix.T)
            new_weight(model, addition, place, layer.bias)
        layers[name_of(weight)] = layer
    return layers


@pytest.mark.parametrize("equalize", [False, True])
def test_unrounded_graph_stays_the_same(equalize: bool, folder: Path) -> None:
    original, model = loaded(folder), loaded(folder)
    calibration = CalibrationRun(model, open_folder(folder).manifest.architecture, windows())
    layers = centre_all(model, calibration, equalize)
    assert len(layers) == 4 * LAYERS + 1
    other = np.random.default_rng(9).integers(0, 8192, 24).tolist()
    for window in (windows()[0], other):
        expected, found = (run(folder, each, window, ["logits"])[0] for each in (original, model))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert expected.std() > 0.5


@pytest.mark.parametrize("equalize", [False, True])
def test_inputs_have_the_mean_0_wherever_that_is_free(equalize: bool, folder: Path) -> None:
    model = loaded(folder)
    calibration = CalibrationRun(model, open_folder(folder).manifest.architecture, windows())
    layers = centre_all(model, calibration, equalize)
    original = loaded(folder)
    inputs = [name_of(layer.x) for layer in layers.values()]
    before, after = (
        [
            np.concatenate(arrays).mean(axis=0)
            for arrays in zip(*(run(folder, each, window, inputs) for window in windows()), strict=True)
        ]
        for each in (original, model)
    )
    free = 0
    for (name, layer), was, mean in zip(layers.items(), before, after, strict=True):
        assert layer.mean is not None
        if name.endswith("mlp.c_proj.weight"):  # behind a Gelu
            np.testing.assert_allclose(mean, was, atol=1e-5)
            np.testing.assert_allclose(layer.mean, was, atol=1e-5)
        else:
            free += 1
            assert np.abs(was).max() > 0.05
            np.testing.assert_allclose(mean, 0, atol=1e-5)
            assert not layer.mean.any()
    assert free == 3 * LAYERS + 1


def test_channels_of_a_layer_normalization_share_their_scale_better(folder: Path) -> None:
    """Divided by the square root of their range over the weights', they have a range of their own that is smaller."""
    model = loaded(folder)
    normalization = next(node for node in model.graph if node.op_type == "LayerNormalization")
    gain = array_of(normalization.inputs[1]).copy()
    gain[3] *= 1000
    new_weight(model, normalization, 1, gain)
    layers = centre_all(model, CalibrationRun(model, open_folder(folder).manifest.architecture, windows()), True)
    first = layers["h.0.attn.c_attn.weight"]
    scaled = gain / array_of(normalization.inputs[1])
    largest = np.abs(np.concatenate([run(folder, model, each, [name_of(first.x)])[0] for each in windows()])).max(
        axis=0
    )
    # What SmoothQuant's strength of one half says: the same range of inputs and weights, up to one factor for all.
    ratios = largest / np.abs(first.matrix).max(axis=0)
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)
    assert scaled[3] > 10 * np.median(scaled)


def test_normalization_that_several_layers_share_is_left_alone(folder: Path) -> None:
    """Its bias would change what the others get, so the mean goes into the layer's own bias, as behind a Gelu."""
    model = loaded(folder)
    normalization = next(node for node in model.graph if node.op_type == "LayerNormalization")
    gain, bias = normalization.inputs[1:3]
    extra = onnx_ir.node("Identity", [normalization.outputs[0]])
    model.graph.insert_after(normalization, extra)
    calibration = CalibrationRun(model, open_folder(folder).manifest.architecture, windows())
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert product.inputs[0] is not None
    matrix = np.ascontiguousarray(array_of(product.inputs[1]).T)
    layer = LinearLayer(product.inputs[0], matrix, np.zeros(len(matrix), np.float32))
    centre(model.graph, layer, calibration, equalize=True)
    assert (normalization.inputs[1], normalization.inputs[2]) == (gain, bias)
    assert layer.mean is not None
    assert layer.mean.any()
    assert layer.matrix is matrix


def test_layers_that_have_parameters_in_common_get_their_own(
    tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    """The tracer keeps parameters that are equal as one; each layer has means of its own."""
    from safetensors.torch import load_file, save_file

    checkpoint = write_checkpoint(tmp_path / "checkpoint", n_layer=LAYERS)
    weights = load_file(checkpoint / "model.safetensors")
    for name in list(weights):
        if name.startswith("transformer.h.1."):
            weights[name] = weights[name.replace(".h.1.", ".h.0.")].clone()
    save_file(weights, checkpoint / "model.safetensors")
    export_checkpoint(checkpoint, tmp_path / "fp32")
    model = loaded(tmp_path / "fp32")
    matrices = [name_of(node.inputs[1]) for node in model.graph if node.op_type == "MatMul"]
    assert len(set(matrices)) < len(matrices) == 4 * LAYERS
    calibration = CalibrationRun(model, open_folder(tmp_path / "fp32").manifest.architecture, windows())
    centre_all(model, calibration, equalize=True)
    expected, found = (
        run(tmp_path / "fp32", each, windows()[1], ["logits"])[0] for each in (loaded(tmp_path / "fp32"), model)
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bias_beside_a_rounded_matrix_keeps_the_output_for_the_mean() -> None:
    random = np.random.default_rng(0)
    matrix, rounded = (random.normal(size=(6, 9)).astype(np.float32) for _ in range(2))
    bias, mean = random.normal(size=6).astype(np.float32), random.normal(size=9).astype(np.float32)
    layer = LinearLayer(onnx_ir.val("x"), matrix, bias, mean)
    np.testing.assert_allclose(mean @ rounded.T + layer.bias_beside(rounded), mean @ matrix.T + bias, rtol=1e-5)
    layer.mean = None
    assert layer.bias_beside(rounded) is bias


@pytest.mark.parametrize("recipe", [name for name, recipe in RECIPES.items() if recipe.prompt is None])
def test_layer_behind_a_gelu_keeps_its_mean_output(recipe: str, folder: Path) -> None:
    """Its own bias makes up for what rounding the matrix does to the mean of the inputs that the graph now computes.

    With GPTQ it also makes up for a part of what became of that mean.
    """
    model, original = loaded(folder), loaded(folder)
    calibration = CalibrationRun(model, open_folder(folder).manifest.architecture, windows())
    rewrite.quantize_matrices(model, RECIPES[recipe], calibration)
    for layer in range(LAYERS):
        name = f"h.{layer}.mlp.c_proj.weight"
        (multiplied,) = (node for node in original.graph if name in [value.name for value in node.inputs if value])
        (addition,) = multiplied.outputs[0].consumers()
        bias = array_of(addition.inputs[1 - addition.inputs.index(multiplied.outputs[0])])
        matrix = array_of(multiplied.inputs[1]).T
        (product,) = (
            node for node in model.graph if f"{name}.quantized" in [each.name for each in node.inputs if each]
        )
        if product.op_type == "MatMulNBits":
            table = BlockwiseMatrix(
                array_of(product.inputs[1]).astype(np.uint8),
                scales_of(product.inputs[2]),
                product.attributes["K"].as_int(),
                product.attributes["bits"].as_int(),
            )
            rounded, x, found = table.dequantized(), product.inputs[0], array_of(product.inputs[5])
        else:
            rounded = (array_of(product.inputs[1]) * array_of(product.inputs[3])).T
            assert product.inputs[0] is not None
            quantization = product.inputs[0].producer()
            assert quantization is not None
            x = quantization.inputs[0]
            found = array_of(model.graph.initializers[f"{name}.bias"])
        mean, original_mean = (
            np.concatenate([run(folder, each, window, [name_of(x)])[0] for window in windows()]).mean(axis=0)
            for each in (model, original)
        )
        expected = bias + (matrix - rounded) @ mean
        if RECIPES[recipe].linear_format(name).rounding == "gptq":
            share = 0.7 * max(0, 1 - len(mean) / sum(map(len, windows())))
            expected += share * matrix @ (original_mean - mean)
        correction = np.abs(expected - bias).max()
        assert correction > 1e-3
        # In pieces, the last bits are others, and now and then an activation is rounded to the next integer; and the
        # embedding was still exact.
        np.testing.assert_allclose(found, expected, rtol=0, atol=max(2e-4, 0.1 * correction))


def biases_of_products(model: onnx_ir.Model) -> list[onnx_ir.Value | None]:
    blockwise = [node.inputs[5] for node in model.graph if node.op_type == "MatMulNBits"]
    scalings = [only_consumer(node.outputs[0]) for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    return blockwise + [only_consumer(scaling.outputs[0]).inputs[1] for scaling in scalings]


@pytest.mark.parametrize("recipe", RECIPES)
def test_mean_logits_survive_a_coarse_rounding(recipe: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers from -1 to 1 are far off, but the head's own bias keeps the mean of the logits over the text.

    That is a bias of the product, which the head of no checkpoint has: of the last normalization's mean.
    """

    def coarse(matrix: FloatArray, matrix_format: MatrixFormat, hessian: object) -> tuple[npt.NDArray[np.int8], Any]:
        block_size = matrix_format.block_size or matrix.shape[1]
        blocks = -(-matrix.shape[1] // block_size)
        scales = np.tile(np.abs(matrix).max(axis=1, keepdims=True), (1, blocks))
        return np.rint(matrix / scales[:, :1]).astype(np.int8), scales

    def rounded_head_only(
        matrix: FloatArray, matrix_format: MatrixFormat, hessian: object
    ) -> tuple[npt.NDArray[np.int8], Any]:
        if len(matrix) > 800:  # the head, or a part of it
            return coarse(matrix, matrix_format, hessian)
        return exact(matrix, matrix_format, hessian)

    exact: Callable[..., Any] = rounding.round_matrix
    monkeypatch.setattr(rewrite, "round_matrix", rounded_head_only)
    model = loaded(folder)
    head = next(node for node in model.graph if node.op_type == "Gemm")
    matrix = array_of(head.inputs[1])
    # The other layers stay exact: of the graph, only the head is rewritten.
    x = head.inputs[0]
    assert x is not None
    calibration = CalibrationRun(model, open_folder(folder).manifest.architecture, windows())
    mean = calibration.mean(x)
    rewriter = rewrite._Rewriter(model.graph, RECIPES[recipe], calibration, lambda: None)
    rewriter.replace_head(head)
    bias = np.concatenate([array_of(value) for value in biases_of_products(model)])
    steps, scales = coarse(matrix, RECIPES[recipe].head, None)
    assert np.abs(steps * scales[:, :1] - matrix).max() > 0.3 * np.abs(matrix).max()
    # x - mean times the rounded matrix, plus the mean times the exact one.
    np.testing.assert_allclose(bias, matrix @ mean, rtol=1e-4, atol=1e-4)
    (logits,) = zip(*(run(folder, model, window, ["logits"]) for window in windows()), strict=True)
    (expected,) = zip(*(run(folder, loaded(folder), window, ["logits"]) for window in windows()), strict=True)
    error = np.concatenate(logits) - np.concatenate(expected)
    # Rounding of activations has no mean to speak of; that of the matrix has none at all.
    assert np.abs(error.mean(axis=0)).max() < 0.03 * error.std()
    assert error.std() > 0.1


def test_a_channel_that_the_last_normalization_stops_is_kept_in_the_embedding(folder: Path, tmp_path: Path) -> None:
    def stop(model: onnx_ir.Model) -> None:
        for name in ("ln_f.weight", "ln_f.bias"):
            array = weight(model, name).copy()
            array[0] = 0
            set_weight(model, name, array)

    quantize_folder(altered(folder, tmp_path / "fp32", stop), tmp_path / "int8")
    integers = np.abs(weight(loaded(tmp_path / "int8"), "wte.weight.quantized")[:, 0].astype(int))
    assert integers.max() > 16
