"""Runs optimum-onnx itself, both ways; `make test-optimum` installs it and calls this."""

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import pytest
import torch
from optimum.exporters.onnx import main_export
from optimum.exporters.onnx.model_configs import GPT2OnnxConfig
from optimum.onnx.graph_transformations import merge_decoders
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoConfig, AutoTokenizer, GPT2LMHeadModel

import gpt2_edge
from gpt2_edge.cli import main

pytestmark = [
    pytest.mark.filterwarnings("default"),  # those of optimum, transformers and torch are not ours
    pytest.mark.filterwarnings("ignore::gpt2_edge.UnsealedFolderWarning"),
]

CHECKPOINT: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"
PROMPTS: Final = ["Once upon a time", "The king", "A fox ran into the wood, and there he met"]
TASK: Final = "text-generation-with-past"
KINDS: Final = ("cli", "cli_int8", "merged", "without_position_ids", "without_attention_mask", "tokens_and_past_alone")


class ConfigWithout(GPT2OnnxConfig):  # type: ignore[misc]
    """Exports a graph that lacks inputs, as old versions of optimum did."""

    dropped: tuple[str, ...] = ()

    @property
    def inputs(self) -> dict[str, Any]:
        return {name: axes for name, axes in super().inputs.items() if name not in self.dropped}


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimum") / "cli"
    optimum_cli("export", "onnx", "--model", CHECKPOINT, "--task", TASK, folder)
    return folder


@pytest.fixture(scope="module")
def cli_int8(cli: Path) -> Path:
    folder = cli.parent / "int8"
    optimum_cli("onnxruntime", "quantize", "--onnx_model", cli, "--avx2", "-o", folder)
    return folder


@pytest.fixture(scope="module")
def merged(cli: Path) -> Path:
    """Two decoders merged to one with `use_cache_branch`, as optimum did before it dropped that for GPT-2."""
    folder = cli.parent / "merged"
    first = cli.parent / "without_past"
    config = GPT2OnnxConfig(
        AutoConfig.from_pretrained(CHECKPOINT), task="text-generation", use_past=True, use_past_in_inputs=False
    )
    export_with(config, first)
    shutil.copytree(cli, folder)
    (folder / "model.onnx").unlink()
    merge_decoders(first / "model.onnx", cli / "model.onnx", save_path=folder / "decoder_model_merged.onnx")
    graph = onnx.load(folder / "decoder_model_merged.onnx").graph
    assert [node.op_type for node in graph.node] == ["If"]
    assert "use_cache_branch" in {value.name for value in graph.input}
    return folder


@pytest.fixture(scope="module")
def without_position_ids(cli: Path) -> Path:
    return exported_without(cli.parent / "without_position_ids", "position_ids")


@pytest.fixture(scope="module")
def without_attention_mask(cli: Path) -> Path:
    return exported_without(cli.parent / "without_attention_mask", "attention_mask")


@pytest.fixture(scope="module")
def tokens_and_past_alone(cli: Path) -> Path:
    return exported_without(cli.parent / "tokens_and_past_alone", "position_ids", "attention_mask")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ours") / "standard"
    assert main(["export", str(CHECKPOINT), "-o", str(folder), "--flavour", "standard"]) == 0
    return folder


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest) -> Path:
    found: Path = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def model(folder: Path) -> Iterator[gpt2_edge.Model]:
    with gpt2_edge.load(folder, threads=1) as loaded:
        yield loaded


def optimum_cli(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def exported_without(folder: Path, *dropped: str) -> Path:
    kind = type("Config", (ConfigWithout,), {"dropped": dropped})
    config = kind(
        AutoConfig.from_pretrained(CHECKPOINT), task="text-generation", use_past=True, use_past_in_inputs=True
    )
    main_export(str(CHECKPOINT), output=folder, task=TASK, custom_onnx_configs={"model": config}, do_validation=False)
    names = {value.name for value in onnx.load(folder / "model.onnx").graph.input}
    assert "past_key_values.0.key" in names
    assert names.isdisjoint(dropped)
    return folder


def export_with(config: GPT2OnnxConfig, folder: Path) -> None:
    main_export(str(CHECKPOINT), output=folder, task=TASK, custom_onnx_configs={"model": config}, do_validation=False)


@torch.no_grad()
def greedy(reference: Any, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    whole = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    found: list[int] = whole[0, len(prompt) :].tolist()
    return found


@torch.no_grad()
def test_logits_are_those_of_transformers(folder: Path, model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    tokens = model.tokenize((CHECKPOINT / "held_out.txt").read_text(encoding="utf-8")[:3000])[:300]
    expected = reference(torch.tensor([tokens])).logits[0].numpy()
    found = model.logits(tokens)
    if folder.name == "int8":
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.99
    else:
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())


def test_batches_and_sessions(folder: Path, model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    together = model.generate(PROMPTS, max_new_tokens=24)
    for prompt, done in zip(PROMPTS, together, strict=True):
        assert model.generate(prompt, max_new_tokens=24).tokens == done.tokens
        if folder.name != "int8":
            expected = greedy(reference, model.tokenize(prompt), 24)
            assert done.tokens == expected[: len(done.tokens)]
    session = model.session()
    session.append(PROMPTS[0])
    first = session.generate(max_new_tokens=10).tokens
    assert [*first, *session.fork().generate(max_new_tokens=14).tokens] == together[0].tokens
    samples = model.generate(PROMPTS[0], n=3, temperature=1.0, seed=4, max_new_tokens=10)
    for sample in samples:
        alone = model.generate(PROMPTS[0], temperature=1.0, seed=sample.seed, max_new_tokens=10)
        assert alone.tokens == sample.tokens


def test_int8_generates_what_optimum_generates_from_it(cli_int8: Path) -> None:
    """One row at a time: dynamic quantization computes other numbers in other company."""
    theirs = ORTModelForCausalLM.from_pretrained(cli_int8)
    with gpt2_edge.load(cli_int8, threads=1) as model:
        for prompt in PROMPTS:
            tokens = model.tokenize(prompt)
            done = model.generate(prompt, max_new_tokens=24)
            assert done.tokens == greedy(theirs, tokens, 24)[: len(done.tokens)]


def test_sealing(cli: Path, tmp_path: Path) -> None:
    assert main(["seal", str(cli), "-o", str(tmp_path / "sealed")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", gpt2_edge.UnsealedFolderWarning)
        gpt2_edge.load(tmp_path / "sealed").close()
    assert main(["verify", str(tmp_path / "sealed")]) == 0


def test_optimum_generates_from_our_folder_what_we_generate(ours: Path, reference: GPT2LMHeadModel) -> None:
    theirs = ORTModelForCausalLM.from_pretrained(ours)
    tokenizer = AutoTokenizer.from_pretrained(ours)
    with gpt2_edge.load(ours, threads=1) as model:
        for prompt in PROMPTS:
            tokens = model.tokenize(prompt)
            assert tokenizer(prompt)["input_ids"] == tokens
            expected = greedy(reference, tokens, 40)
            assert greedy(theirs, tokens, 40) == expected
            done = model.generate(prompt, max_new_tokens=40)
            assert done.tokens == expected[: len(done.tokens)]


def test_our_folder_stores_the_embedding_once_and_names_no_machine(ours: Path, cli: Path) -> None:
    config = json.loads((ours / "config.json").read_text())
    embedding = 4 * config["vocab_size"] * config["n_embd"]
    assert cli.joinpath("model.onnx").stat().st_size - weights_size(ours) == pytest.approx(embedding, rel=0.03)
    graph = onnx.load(ours / "model.onnx", load_external_data=False)
    large = [tensor for tensor in graph.graph.initializer if config["vocab_size"] in tensor.dims]
    assert [tensor.name for tensor in large] == ["transformer.wte.weight"]
    content = (ours / "model.onnx").read_bytes()
    for secret in ("site-packages", str(ours.parent), str(Path.home()) + "/"):
        assert secret.encode() not in content
    assert {domain.domain for domain in graph.opset_import} == {""}  # runs wherever ONNX does


def test_a_short_context_and_an_untied_head(tmp_path: Path, write_checkpoint: Any) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tie_word_embeddings=False, n_inner=48)
    folder = tmp_path / "standard"
    command = ["export", str(checkpoint), "-o", str(folder), "--flavour", "standard", "--max-context", "20"]
    assert main(command) == 0
    with gpt2_edge.load(folder, threads=1) as model:
        assert model.context_length == 20
        assert not model.manifest.architecture.tied_head
        expected = greedy(GPT2LMHeadModel.from_pretrained(checkpoint), [1, 2, 3], 10)
        assert model.generate([1, 2, 3], max_new_tokens=10, ignore_eos=True).tokens == expected
    assert greedy(ORTModelForCausalLM.from_pretrained(folder), [1, 2, 3], 10) == expected


def test_scaled_attention(tmp_path: Path, write_checkpoint: Any) -> None:
    """transformers' usual attention leaves this out, and so does optimum-cli."""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", scale_attn_by_inverse_layer_idx=True)
    assert main(["export", str(checkpoint), "-o", str(tmp_path / "standard"), "--flavour", "standard"]) == 0


def weights_size(folder: Path) -> int:
    return (folder / "model.onnx").stat().st_size + (folder / "model.onnx.data").stat().st_size
