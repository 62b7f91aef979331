"""Golden logits: what they are, which machines they refuse, and when a check is remembered."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

import gpt2_edge
from gpt2_edge import MachineError, ModelFolderError, machine_check
from gpt2_edge.cli import main
from gpt2_edge.folder import open_folder
from gpt2_edge.machine_check import Golden, check_machine, make_golden, parse_golden, read_golden
from gpt2_edge.processor import describe_processor
from gpt2_edge.quantize.golden import golden_logits
from gpt2_edge.quantize.reference import MatMulIntegerToFloat, reference_logits
from gpt2_edge.saturation import products_saturate
from gpt2_edge.seal import write_manifest
from gpt2_edge.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def golden(storyteller_int8: Path) -> Golden:
    return read_golden(open_folder(storyteller_int8))


def test_the_reference_computes_what_full_precision_computes(
    storyteller_fp32: Path, fp32_model: gpt2_edge.Model
) -> None:
    tokens = list(range(100, 130))
    opened = open_folder(storyteller_fp32)
    found = reference_logits(onnx.load(opened.graph_path), opened.manifest.architecture, tokens)
    np.testing.assert_allclose(found, fp32_model.logits(tokens), atol=1e-4)


def test_this_machine_computes_the_golden_logits(golden: Golden, int8_model: gpt2_edge.Model) -> None:
    found = check_machine(int8_model, golden)
    assert set(found) == {"prefill", "decode", "batch"}
    assert 0 < max(found.values()).difference < golden.tolerance < 0.06
    assert {deviation.tolerance for deviation in found.values()} == {golden.tolerance}
    assert len(golden.tokens) == 48
    assert len(golden.token_ids) == 64


def test_rounding_activations_otherwise_is_right_and_saturating_is_not(
    storyteller_int8: Path, golden: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_folder(storyteller_int8)
    proto, architecture, tokens = onnx.load(opened.graph_path), opened.manifest.architecture, list(golden.tokens)
    unrounded = reference_logits(proto, architecture, tokens, round_activations=False)
    assert golden.difference(unrounded) == pytest.approx(golden.tolerance / 2, rel=1e-3)

    def saturating(
        operator: MatMulIntegerToFloat, a: Any, b: Any, a_scale: Any, b_scale: Any, a_zero: Any, *_: Any
    ) -> tuple[Any]:
        """As AVX2 computes it without VNNI: two products, whose sum has 16 bits."""
        left, right = a.astype(np.int16).astype(np.int32), b.astype(np.int32)
        sums = [
            np.clip(row[::2, None] * right[::2] + row[1::2, None] * right[1::2], -(2**15), 2**15 - 1) for row in left
        ]
        product = np.array([each.sum(axis=0) for each in sums]) - int(a_zero) * right.sum(axis=0)
        return (product.astype(np.float32) * (a_scale * b_scale),)

    monkeypatch.setattr(MatMulIntegerToFloat, "_run", saturating)
    assert golden.difference(reference_logits(proto, architecture, tokens)) > 1.5 * golden.tolerance


def test_golden_logits_of_a_model_with_activations_of_zeros(
    tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    """A layer that was switched off gets rows of zeros, whose scale is 0: nothing warns, and the machine agrees."""
    from gpt2_edge.export import export_checkpoint
    from gpt2_edge.quantize import quantize_folder

    checkpoint = make_checkpoint(n_layer=1, n_embd=16, n_head=2)
    weights = load_file(checkpoint / "model.safetensors")
    for name in ("weight", "bias"):
        weights[f"transformer.h.0.ln_2.{name}"].zero_()
    save_file(weights, checkpoint / "model.safetensors")
    export_checkpoint(checkpoint, tmp_path / "fp32")
    quantize_folder(tmp_path / "fp32", tmp_path / "int8")
    golden = read_golden(open_folder(tmp_path / "int8"))
    assert np.isfinite(golden.logits).all()
    assert golden.tolerance < 0.1
    with gpt2_edge.load(tmp_path / "int8") as model:
        assert max(check_machine(model, golden).values()).difference < golden.tolerance


def test_difference_by_hand() -> None:
    golden = Golden((1, 2), (0, 2), ((1.0, 3.0), (0.0, 4.0)), 0.1)
    exact = np.array([[1, 9, 3], [0, 9, 4]], np.float32)
    assert golden.difference(exact) == 0
    assert golden.difference(exact + 5) == 0  # of no consequence
    # Differences (0.5, -0.5) and (0, 0) against spreads of 1 and 2.
    assert golden.difference(exact + np.array([[0.5, 0, -0.5], [0, 0, 0]], np.float32)) == pytest.approx(0.25)
    exact[1, 2] = np.nan
    assert golden.difference(exact) == float("inf")


@pytest.mark.parametrize("way", ["prefill", "decode"])
def test_a_machine_that_is_off(
    way: str, golden: Golden, int8_model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = int8_model._core.engine._session
    original: Callable[..., Any] = getattr(session, way)
    noise = np.random.default_rng(0)

    def noisy(*arguments: Any) -> Any:
        logits = original(*arguments)
        return (logits + 0.2 * logits.std() * noise.normal(size=logits.shape)).astype(np.float32)

    monkeypatch.setattr(session, way, noisy)
    with pytest.raises(MachineError, match=f"computes the model wrongly: the logits of {way}"):
        check_machine(int8_model, golden)


def test_golden_logits_survive_json(golden: Golden) -> None:
    assert parse_golden(golden.to_json().encode(), 8192, 512) == golden
    small = make_golden([1, 2], np.arange(20, dtype=np.float32).reshape(2, 10), 0.5)
    assert small.token_ids == tuple(range(10))


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"tokens": [9000]},
        {"tokens": "many"},
        {"token_ids": [-1, 3]},
        {"logits": [[1.0]]},
        {"tolerance": 0},
        {"tolerance": None},
    ],
)
def test_golden_logits_of_another_kind(change: dict[str, Any], golden: Golden) -> None:
    document = json.loads(golden.to_json()) | change
    with pytest.raises(ModelFolderError, match=r"golden\.json"):
        parse_golden(json.dumps(document).encode(), 8192, 512)
    with pytest.raises(ModelFolderError, match=r"golden\.json"):
        parse_golden(b"\xff[", 8192, 512)


def test_verify_machine(storyteller_int8: Path, storyteller_fp32: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(storyteller_int8), "--machine"]) == 0
    assert (
        "this machine computes it right: off the golden logits, in percent of their spread: prefill "
        in capsys.readouterr().out
    )
    assert main(["verify", str(storyteller_fp32), "--machine"]) == 1
    refusal = capsys.readouterr().err
    assert "has no golden.json" in refusal
    assert "only quantized folders have one" in refusal
    assert refusal.count("\n") == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine_check, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_a_check_at_load_is_remembered(storyteller_int8: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gpt2_edge.load(storyteller_int8):
        pass
    assert not cache.exists()  # never by default
    with gpt2_edge.load(storyteller_int8, verify_machine=True):
        pass
    assert len(list((cache / "machine-checks").iterdir())) == 1
    monkeypatch.setattr(machine_check, "check_machine", lambda *_: pytest.fail("it was checked again"))
    with gpt2_edge.load(storyteller_int8, verify_machine=True):
        pass


@pytest.mark.parametrize("what", ["processor", "onnxruntime"])
def test_a_check_is_for_a_processor_and_an_onnxruntime(
    what: str, storyteller_int8: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gpt2_edge.load(storyteller_int8, verify_machine=True):
        pass
    if what == "processor":
        monkeypatch.setattr(machine_check, "describe_processor", lambda: ("another", []))
    else:
        monkeypatch.setattr(machine_check.onnxruntime, "__version__", "1.99.0")
    with gpt2_edge.load(storyteller_int8, verify_machine=True):
        pass
    assert len(list((cache / "machine-checks").iterdir())) == 2


def test_a_refusal_at_load_is_not_remembered(storyteller_int8: Path, cache: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(storyteller_int8, tmp_path / "other")
    opened = open_folder(folder)
    golden = read_golden(opened)
    wrong = tuple(tuple(reversed(row)) for row in golden.logits)
    (folder / "golden.json").write_text(replace(golden, logits=wrong).to_json())
    write_manifest(folder, opened.manifest)
    with pytest.raises(MachineError, match="computes the model wrongly"):
        gpt2_edge.load(folder, verify_machine=True)
    assert not cache.exists()


def test_a_check_without_a_home_is_made_and_not_remembered(
    storyteller_int8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    checks: list[Golden] = []
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(machine_check, "check_machine", lambda _, golden: checks.append(golden))
    for _ in range(2):
        gpt2_edge.load(storyteller_int8, verify_machine=True, verify_hashes="changed").close()
    assert len(checks) == 2


def test_a_vocabulary_that_has_no_letters_has_golden_logits(storyteller_int8: Path) -> None:
    class NoLetters:
        def encode(self, text: str) -> list[int]:
            return []

    architecture = open_folder(storyteller_int8).manifest.architecture
    golden = golden_logits(storyteller_int8 / "model.onnx", cast(Tokenizer, NoLetters()), architecture)
    assert len(set(golden.tokens)) == machine_check.GOLDEN_TOKENS
    with gpt2_edge.load(storyteller_int8) as model:
        check_machine(model, golden)


def test_products_saturate_where_there_is_no_vnni() -> None:
    _, flags = describe_processor()
    assert products_saturate() == ("avx2" in flags and not {"avx_vnni", "avx512_vnni"} & set(flags))
