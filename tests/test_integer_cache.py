"""A cache of 8-bit integers: what it holds, what is computed with it, and all that rests on it."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir
import pytest
from generating import assert_same, write_words
from model_folders import reseal

import gpt2_edge
from gpt2_edge.cli import main
from gpt2_edge.decoded_logits import decoded_logits
from gpt2_edge.errors import ModelFolderError, QuantizationError, SessionError
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.manifest import MANIFEST_NAME
from gpt2_edge.quantize import cache_scaling
from gpt2_edge.quantize.branches import always_few
from gpt2_edge.quantize.cache_scaling import scale_cache
from gpt2_edge.quantize.calibration import CalibrationRun
from gpt2_edge.quantize.calibration_text import CalibrationText
from gpt2_edge.quantize.folder_graph import read_model
from gpt2_edge.quantize.graph_edit import source_of
from gpt2_edge.quantize.integer_cache import use_integer_cache
from gpt2_edge.quantize.quality import window_logits
from gpt2_edge.quantize.reference import reference_logits
from gpt2_edge.session import Logits, StepSession

LARGEST: Final = 127 / 1.25
NOTHING: Final = np.array([], np.int64)


@pytest.fixture(scope="module", params=[{}, {"n_embd": 20, "n_head": 4, "n_inner": 70}], ids=["plain", "padded heads"])
def original(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]
) -> Path:
    """A model that is not quantized at all."""
    place = tmp_path_factory.mktemp("original")
    checkpoint = write_checkpoint(place / "checkpoint", n_positions=600, **request.param)
    export_checkpoint(checkpoint, place / "fp32")
    return place / "fp32"


@pytest.fixture(scope="module")
def scaled(original: Path) -> Path:
    """The same model with scaled keys and values, which it keeps as floats."""
    return rewritten(original, "scaled", keeps_integers=False)


@pytest.fixture(scope="module")
def rounded(original: Path) -> Path:
    """The same model with integers in its cache; its weights are not quantized."""
    return rewritten(original, "rounded", keeps_integers=True)


@pytest.fixture(scope="module")
def model(rounded: Path) -> Iterator[gpt2_edge.Model]:
    with gpt2_edge.load(rounded, threads=2) as loaded:
        yield loaded


def rewritten(source: Path, name: str, *, keeps_integers: bool) -> Path:
    opened = open_folder(source)
    model = read_model(opened)
    scale_cache(model, CalibrationRun(model, opened.manifest.architecture, windows()))
    if keeps_integers:
        use_integer_cache(model)
    target = source.with_name(name)
    target.mkdir()
    onnx_ir.save(model, target / "model.onnx", external_data="model.onnx.data")
    (target / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    manifest = json.loads((source / MANIFEST_NAME).read_text(encoding="utf-8"))
    cache_precision = "int8" if keeps_integers else "fp32"
    reseal(target, manifest, graphs={"decoder": "model.onnx"}, cache_precision=cache_precision)
    return target


def windows() -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 8192, (12, 48)).tolist()


def some_tokens(count: int) -> list[int]:
    return np.random.default_rng(8).integers(0, 8192, count).tolist()


def step_session(folder: Path) -> StepSession:
    return StepSession(open_folder(folder), threads=2)


def cached(folder: Path, tokens: Sequence[int], chunks: Sequence[int]) -> SequenceCache:
    """Return what is in the cache after computing the tokens in chunks of these sizes."""
    session, start = step_session(folder), 0
    for size in chunks:
        session.prefill(0, tokens[start : start + size], start, NOTHING)
        start += size
    return session.save(0, start)


def last_logits(session: StepSession, tokens: Sequence[int], start: int) -> Logits:
    return session.prefill(0, tokens, start, np.array([len(tokens) - 1]))


def test_scaling_changes_no_logits(original: Path, scaled: Path) -> None:
    tokens = some_tokens(70)
    with gpt2_edge.load(original) as one, gpt2_edge.load(scaled) as other:
        expected, found = one.logits(tokens), other.logits(tokens)
    np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_scaled_keys_and_values_use_the_range_of_the_integers(original: Path, scaled: Path) -> None:
    architecture = open_folder(original).manifest.architecture
    used = slice(architecture.width // architecture.heads)  # what heads are padded with is 0
    caches = [cached(scaled, window, [len(window)]) for window in windows()]
    for layer in range(architecture.layers):
        keys, values = (
            np.concatenate([cache.arrays[2 * layer + part] for cache in caches], axis=1)[..., used] for part in (0, 1)
        )
        np.testing.assert_allclose(keys.mean(axis=1), 0, atol=0.01)
        for each in (keys, values):
            np.testing.assert_allclose(np.abs(each).max(axis=1), LARGEST, rtol=1e-3)


@pytest.mark.parametrize("chunks", [[40], [1] * 40, [8] * 5, [30, 2, 8], [5, 35]])
def test_the_cache_holds_rounded_keys_and_values(chunks: list[int], scaled: Path, rounded: Path) -> None:
    tokens = some_tokens(40)
    floats, integers = cached(scaled, tokens, chunks), cached(rounded, tokens, chunks)
    # Later layers see what attention made of rounded keys and values.
    for expected, found in zip(floats.arrays[:2], integers.arrays[:2], strict=True):
        assert found.dtype == np.int8
        clipped = np.clip(expected, -128, 127)
        assert np.abs(found - clipped).max() < 0.51
    for expected, found in zip(floats.arrays[2:], integers.arrays[2:], strict=True):
        assert np.abs(found - np.clip(expected, -128, 127)).mean() < 1


def test_keys_and_values_that_are_too_large_are_cut_off(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_scaling, "_HEADROOM", 0.5)
    folder, floats = (
        rewritten(original, f"too large {keeps_integers}", keeps_integers=keeps_integers)
        for keeps_integers in (True, False)
    )
    tokens = windows()[0]
    expected = cached(floats, tokens, [len(tokens)])
    few, many = cached(folder, tokens, [1] * len(tokens)), cached(folder, tokens, [len(tokens)])
    for exact, one, other in zip(expected.arrays[:2], few.arrays[:2], many.arrays[:2], strict=True):
        assert (np.abs(exact) > 128).any()
        np.testing.assert_array_equal(one, other)
        assert np.abs(one - np.clip(exact, -128, 127)).max() < 0.51


def test_tokens_one_by_one_see_rounded_keys_and_values(rounded: Path, model: gpt2_edge.Model) -> None:
    tokens = some_tokens(24)
    proto = onnx.load(rounded / "model.onnx")
    expected = reference_logits(always_few(proto), model.manifest.architecture, tokens)
    (found,) = decoded_logits(model, tokens, [1])
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
    np.testing.assert_array_equal(window_logits(model, tokens), found)
    unrounded = reference_logits(proto, model.manifest.architecture, tokens)
    assert np.abs(unrounded - expected).max() > 5e-3 * np.abs(expected).max()


def test_tokens_at_once_see_each_other_unrounded(original: Path, model: gpt2_edge.Model) -> None:
    tokens = some_tokens(24)
    with gpt2_edge.load(original) as exact:
        expected = exact.logits(tokens)
    np.testing.assert_allclose(model.logits(tokens), expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("count", [1, 8, 9, 64])
def test_later_tokens_see_what_the_cache_holds(count: int, scaled: Path, rounded: Path) -> None:
    tokens = some_tokens(300)
    session = step_session(rounded)
    session.prefill(0, tokens[:236], 0, NOTHING)
    floats = step_session(scaled)
    floats.restore(0, SequenceCache([each.astype(np.float32) for each in session.save(0, 236).arrays]), 236)
    new = tokens[236 : 236 + count]
    expected, found = last_logits(floats, new, 236), last_logits(session, new, 236)
    # Few tokens see each other rounded, which is as little as the share of these tokens in all.
    np.testing.assert_allclose(found, expected, atol=(2e-4 if count > 8 else 0.02) * np.abs(expected).max())


def test_rows_of_a_batch_equal_each_alone(model: gpt2_edge.Model) -> None:
    prompts = [some_tokens(count) for count in (1, 3, 8, 9, 40, 300)]
    options: dict[str, Any] = {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0.8, "top_k": 50}
    together = model.generate(prompts, seed=5, **options)
    for prompt, row in zip(prompts, together, strict=True):
        assert_same(row, model.generate(prompt, **options, seed=row.seed))
    assert len({tuple(row.tokens) for row in together}) == len(prompts)


def test_a_context_that_slides(model: gpt2_edge.Model) -> None:
    prompt = some_tokens(590)
    result = model.generate(prompt, max_new_tokens=40, overflow="slide", ignore_eos=True)
    assert len(result.tokens) == 40


def test_a_saved_session_goes_on_as_if_it_had_not_been_saved(
    model: gpt2_edge.Model, scaled: Path, tmp_path: Path
) -> None:
    session = model.session()
    session.append(some_tokens(80))
    session.generate(max_new_tokens=5, ignore_eos=True)
    session.save(tmp_path / "integers")
    expected = session.fork().generate(max_new_tokens=20, ignore_eos=True).tokens
    assert model.load_session(tmp_path / "integers").generate(max_new_tokens=20, ignore_eos=True).tokens == expected
    with gpt2_edge.load(scaled) as floats:
        other = floats.session()
        other.append(some_tokens(80))
        other.generate(max_new_tokens=5, ignore_eos=True)
        other.save(tmp_path / "floats")
        with pytest.raises(SessionError, match="another model"):
            floats.load_session(tmp_path / "integers")
    sizes = [(tmp_path / name).stat().st_size for name in ("integers", "floats")]
    assert 3.5 < sizes[1] / sizes[0] < 4


def test_a_manifest_that_says_another_cache_than_the_graph_has(rounded: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(rounded, copy)
    for said in ("fp32", "fp16"):
        reseal(copy, cache_precision=said)
        with pytest.raises(ModelFolderError, match=r"past_key_values\.0\.key is .*int8"):
            gpt2_edge.load(copy)


def test_an_older_manifest_does_not_say(original: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(original, copy)
    document = json.loads((copy / MANIFEST_NAME).read_text(encoding="utf-8"))
    assert document.pop("cache_precision") == "fp32"
    reseal(copy, document)
    assert open_folder(copy).manifest.cache_precision == "fp32"
    with gpt2_edge.load(copy) as loaded:
        loaded.generate([5], max_new_tokens=2)


def test_quantize_command(storyteller_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    text, calibration = (write_words(tmp_path / name, seed) for seed, name in enumerate(("text", "calibration")))
    options = ["--cache", "int8", "--recipe", "int8-block64", "--text", str(text), "--calibration", str(calibration)]
    assert main(["quantize", str(storyteller_fp32), "-o", str(made), "--precision", "int8", *options]) == 0
    manifest = open_folder(made).manifest
    assert manifest.cache_precision == "int8"
    assert manifest.minimum_onnxruntime == "1.27"
    assert manifest.cache_bytes_per_token == 2 * 6 * 256
    assert manifest.measured["quality"]["mean_kl_divergence"] < 0.01
    capsys.readouterr()
    assert main(["verify", str(made), "--machine"]) == 0
    assert "this machine computes it right" in capsys.readouterr().out
    assert main(["info", str(made)]) == 0
    assert "KV cache in int8, 1.6 MB when full" in capsys.readouterr().out


def test_quality_is_measured_with_rounded_keys_and_values(model: gpt2_edge.Model, original: Path) -> None:
    window = some_tokens(40)
    with gpt2_edge.load(original) as exact:
        at_once = np.abs(model.logits(window) - exact.logits(window)).max()
        measured = np.abs(window_logits(model, window) - window_logits(exact, window)).max()
    assert measured > 10 * at_once


@pytest.mark.parametrize("count", [2, 16, 64])
def test_ranges_come_from_texts_with_many_beginnings(count: int) -> None:
    windows = [list(range(1000 * number, 1000 * number + 512)) for number in range(count)]
    found = CalibrationText("text", windows).with_other_beginnings()
    whole = min(count, 16)
    assert found[:whole] == windows[:whole]
    assert len(found) == whole + 128
    for piece in found[whole:]:
        assert piece in ([piece[0], piece[0] + 1], [piece[0]])
        assert piece[0] % 1000 > 0
    assert len({piece[0] for piece in found}) == len(found)


@pytest.mark.parametrize("missing", ["bias", "matrix after", "cache"])
def test_a_graph_of_another_form(missing: str, original: Path) -> None:
    opened = open_folder(original)
    model = read_model(opened)
    attention = next(node for node in model.graph if node.op_type == "GroupQueryAttention")
    run = CalibrationRun(model, opened.manifest.architecture, windows()[:1])
    if missing == "bias":
        packed = attention.inputs[0]
        assert packed is not None
        addition = source_of(packed)
        onnx_ir.convenience.replace_all_uses_with(addition.outputs[0], addition.inputs[0])
    elif missing == "matrix after":
        attention.outputs[0].consumers()[0].replace_input_with(0, attention.outputs[1])
    else:
        model.graph.outputs.pop()
    with pytest.raises(QuantizationError, match="export the model again"):
        use_integer_cache(model) if missing == "cache" else scale_cache(model, run)
