"""A recipe with matrices of its own for prompts: each way of computing does what the integers say."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from generating import write_words
from onnx import numpy_helper

import gpt2_edge
from gpt2_edge.decoded_logits import decoded_logits
from gpt2_edge.errors import MachineError, OptionError
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.machine_check import check_machine, parse_golden, read_golden
from gpt2_edge.quantize import quantize_folder
from gpt2_edge.quantize.branches import always_few, has_branches
from gpt2_edge.quantize.quality import window_logits
from gpt2_edge.quantize.reference import reference_logits

FloatArray = npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=["fp32", "int8"], ids=["floats in the cache", "integers in the cache"])
def folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]
) -> Path:
    place = tmp_path_factory.mktemp("branches")
    checkpoint = write_checkpoint(place / "checkpoint", n_embd=128, n_positions=600, initializer_range=0.1)
    export_checkpoint(checkpoint, place / "source")
    quantize_folder(
        place / "source",
        place / "fast",
        "int4",
        recipe="int4-fast",
        calibration=write_words(place / "words"),
        cache=request.param,
    )
    return place / "fast"


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[gpt2_edge.Model]:
    with gpt2_edge.load(folder, threads=2) as loaded:
        yield loaded


def some_tokens(count: int) -> list[int]:
    return np.random.default_rng(8).integers(0, 8192, count).tolist()


def off_by(found: FloatArray, expected: FloatArray) -> float:
    return float((found - expected).std() / expected.std())


def test_a_prompt_and_single_tokens_are_computed_with_different_matrices(folder: Path, model: gpt2_edge.Model) -> None:
    tokens = some_tokens(32)
    proto, architecture = onnx.load(folder / "model.onnx"), model.manifest.architecture
    many, few = (reference_logits(each, architecture, tokens) for each in (proto, always_few(proto)))
    (one_by_one,) = decoded_logits(model, tokens, [1])
    at_once = model.logits(tokens)
    assert off_by(few, many) > 0.05
    # Kernels round activations in their own ways.
    assert off_by(at_once, many) < 0.01
    assert off_by(one_by_one, few) < 0.02
    np.testing.assert_array_equal(window_logits(model, tokens), one_by_one)


@pytest.mark.parametrize(("count", "is_few"), [(1, True), (8, True), (9, False), (64, False)])
def test_up_to_8_tokens_are_a_few(count: int, is_few: bool, folder: Path, model: gpt2_edge.Model) -> None:
    tokens = some_tokens(count)
    proto = onnx.load(folder / "model.onnx")
    expected = reference_logits(always_few(proto) if is_few else proto, model.manifest.architecture, tokens)
    assert off_by(model.logits(tokens), expected) < 0.02


def test_prompts_are_closer_to_full_precision_than_single_tokens(folder: Path, model: gpt2_edge.Model) -> None:
    tokens = some_tokens(300)
    with gpt2_edge.load(folder.with_name("source")) as original:
        expected = original.logits(tokens)
    (one_by_one,) = decoded_logits(model, tokens, [1])
    at_once = off_by(model.logits(tokens), expected)
    assert at_once < 0.1  # of which the head, with its 4 bits, has most
    assert off_by(one_by_one, expected) > 1.3 * at_once


def test_both_kinds_of_matrices_hold_the_same_numbers(folder: Path) -> None:
    weights = {each.name: numpy_helper.to_array(each) for each in onnx.load(folder / "model.onnx").graph.initializer}
    names = [name.removesuffix(".quantized") for name in weights if name.endswith(".weight.quantized")]
    blocks = [name for name in names if name.startswith("h.")]
    assert len(blocks) == 4 * 2
    for name in blocks:
        packed, scales = weights[f"{name}.quantized"], weights[f"{name}.scales"]
        values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), packed.shape[1], -1)
        coarse = ((values.astype(np.float32) - 8) * scales.reshape(len(packed), -1, 1)).reshape(len(packed), -1)
        # Two products of 255 x 63 are less than 2**15: nothing saturates.
        assert np.abs(weights[f"{name}.prompt.quantized"]).max() == 63
        fine = (weights[f"{name}.prompt.quantized"] * weights[f"{name}.prompt.scales"]).T
        assert off_by(coarse[:, : fine.shape[1]], fine) < 0.2


def test_a_graph_without_branches_stays(tmp_path: Path) -> None:
    proto = onnx.load(open_folder("storyteller").graph_path, load_external_data=False)
    assert not has_branches(proto)
    assert always_few(proto) == proto


def test_a_prompt_in_chunks_and_tokens_after_it(model: gpt2_edge.Model) -> None:
    whole = some_tokens(300)
    session = model.session()
    session.append(whole)
    first = session.generate(max_new_tokens=12, ignore_eos=True)
    assert first.tokens == model.generate(whole, max_new_tokens=12, ignore_eos=True).tokens


def test_the_machine_is_checked_in_both_ways(
    folder: Path, model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = read_golden(open_folder(folder))
    assert golden.decoded is not None
    assert golden.decoded.logits != golden.logits
    assert parse_golden(golden.to_json().encode(), 8192, 600) == golden
    found = check_machine(model, golden)
    assert [found[way].tolerance for way in ("prefill", "decode", "batch")] == [
        golden.tolerance,
        golden.decoded.tolerance,
        golden.decoded.tolerance,
    ]
    for way, deviation in found.items():
        assert 0 < deviation.difference < deviation.tolerance, way
    exchanged = parse_golden(golden.to_json().encode(), 8192, 600).decoded
    assert exchanged is not None
    with pytest.raises(MachineError, match="the logits of prefill differ"):
        check_machine(model, exchanged)


def test_the_recipe_says_that_prompts_differ(folder: Path) -> None:
    manifest = open_folder(folder).manifest
    assert not manifest.decodes_as_it_prefills
    assert manifest.recipe is not None
    assert manifest.recipe["prompt"] == {"bits": 7, "block_size": None, "rounding": "nearest"}
    assert open_folder("storyteller").manifest.decodes_as_it_prefills


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "int4"}, "cache is 'int4': give fp32 or int8"),
        ({"text": "no-such.txt"}, "cannot read the text no-such.txt: No such file or directory"),
        ({"calibration": "no-such.txt"}, "cannot read the text no-such.txt"),
        ({"recipe": "int4-fast"}, "recipe is 'int4-fast': for int8 give int8 or int8-fast or int8-block64 or"),
    ],
)
def test_options_that_are_refused(options: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        quantize_folder("storyteller", tmp_path / "new", **options)
