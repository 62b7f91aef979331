"""Folders without a manifest and graphs of the standard flavour: they run like ours, or are refused with one line."""

import json
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from onnxruntime.quantization import quantize_dynamic
from standard_graphs import build, write_folder
from transformers import GPT2LMHeadModel

import gpt2_edge
from gpt2_edge import CheckpointError, ModelFolderError, QuantizationError, UnsealedFolderWarning
from gpt2_edge.checked_loading import checked
from gpt2_edge.cli import main
from gpt2_edge.export.tied_head import tie_head
from gpt2_edge.file_content import FileContent
from gpt2_edge.quantize import quantize_folder
from gpt2_edge.standard_folder import open_unsealed
from gpt2_edge.standard_seal import seal_folder
from gpt2_edge.standard_session import StandardStepSession

pytestmark = pytest.mark.filterwarnings("ignore::gpt2_edge.UnsealedFolderWarning")

CONTEXT: Final = 300  # more than two chunks of prefill
PROMPTS: Final = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16, 17]]
VARIANTS: Final[dict[str, dict[str, Any]]] = {
    "as optimum 0.1 makes it": {},
    "without position_ids": {"position_ids": False},
    "without attention_mask": {"attention_mask": False},
    "tokens and past alone": {"position_ids": False, "attention_mask": False},
    "merged": {"merged": True, "name": "decoder_model_merged.onnx"},
    "merged without position_ids": {"merged": True, "position_ids": False, "name": "decoder_model_merged.onnx"},
    "another name of the file": {"name": "decoder_with_past_model.onnx"},
    "another spelling": {"past": "past.{}.{}", "present": "present_key_values.{}.{}"},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("standard") / "checkpoint", n_positions=CONTEXT)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("variant") / "model", checkpoint, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The usual folder; not to be changed."""
    return write_folder(tmp_path_factory.mktemp("usual") / "model", checkpoint)


@pytest.fixture(scope="module")
def int8_folder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized by the function that optimum calls."""
    copy = tmp_path_factory.mktemp("int8") / "model"
    shutil.copytree(folder, copy)
    (copy / "model.onnx").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_dynamic(folder / "model.onnx", copy / "model_quantized.onnx", per_channel=False)
    return copy


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[gpt2_edge.Model]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = gpt2_edge.load(folder, threads=1)
    with loaded:
        yield loaded


@pytest.fixture(scope="module")
def int8_model(int8_folder: Path) -> Iterator[gpt2_edge.Model]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = gpt2_edge.load(int8_folder, threads=1)
    with loaded:
        yield loaded


@torch.no_grad()
def reference_logits(reference: GPT2LMHeadModel, tokens: list[int]) -> np.ndarray:  # type: ignore[type-arg]
    return reference(torch.tensor([tokens])).logits[0].numpy()


def greedy(reference: GPT2LMHeadModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference_logits(reference, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


# What is read.


def test_a_folder_without_a_manifest_is_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    sha256 = FileContent.sha256

    def counted(content: FileContent, *arguments: Any) -> str:
        hashed.append(content.path.name)
        return sha256(content, *arguments)

    monkeypatch.setattr(FileContent, "sha256", counted)
    with gpt2_edge.load(folder, threads=1) as model:
        assert sorted(hashed) == sorted(entry.name for entry in model.manifest.files)


def test_a_folder_without_a_manifest_that_is_changed_while_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    opened = open_unsealed(tmp_path / "model")
    with pytest.raises(ModelFolderError, match="was changed while it was loaded"), checked(opened, True):
        os.utime(tmp_path / "model" / "model.onnx", (1, 1))


# What is computed.


def test_every_kind_of_graph_computes_what_transformers_computes(variant: Path, reference: GPT2LMHeadModel) -> None:
    tokens = np.random.default_rng(1).integers(0, 8192, CONTEXT).tolist()
    with gpt2_edge.load(variant, threads=1) as model:
        np.testing.assert_allclose(model.logits(tokens), reference_logits(reference, tokens), atol=1e-4)
        for prompt, done in zip(PROMPTS, model.generate(PROMPTS, max_new_tokens=8, ignore_eos=True), strict=True):
            assert done.tokens == greedy(reference, prompt, 8)


def test_decoded_tokens_see_all_before_them(model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    prompt = np.random.default_rng(2).integers(0, 8192, 150).tolist()
    done = model.generate(prompt, max_new_tokens=12, ignore_eos=True, logprobs=0)
    assert done.tokens == greedy(reference, prompt, 12)
    expected = torch.log_softmax(torch.from_numpy(reference_logits(reference, prompt + done.tokens)), dim=-1)
    assert done.logprobs is not None
    for place, (token, found) in enumerate(zip(done.tokens, done.logprobs, strict=True), start=len(prompt) - 1):
        assert found.logprob == pytest.approx(float(expected[place, token]), abs=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_row_gets_the_same_tokens_alone_and_in_company(
    precision: str, model: gpt2_edge.Model, int8_model: gpt2_edge.Model
) -> None:
    chosen = model if precision == "fp32" else int8_model
    options: dict[str, Any] = {"max_new_tokens": 30, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    together = chosen.generate([*PROMPTS, *PROMPTS], **options)
    assert len({len(row.tokens) for row in together}) == 1
    for prompt, row in zip([*PROMPTS, *PROMPTS], together, strict=True):
        assert chosen.generate(prompt, **(options | {"seed": row.seed})).tokens == row.tokens


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_samples_of_one_prompt_are_those_it_gets_alone(
    precision: str, model: gpt2_edge.Model, int8_model: gpt2_edge.Model
) -> None:
    chosen = model if precision == "fp32" else int8_model
    samples = chosen.generate(PROMPTS[0], n=5, max_new_tokens=20, temperature=1.0, seed=11, ignore_eos=True)
    assert len({tuple(sample.tokens) for sample in samples}) == 5
    for sample in samples:
        alone = chosen.generate(PROMPTS[0], max_new_tokens=20, temperature=1.0, seed=sample.seed, ignore_eos=True)
        assert alone.tokens == sample.tokens


def test_rows_of_one_length_share_a_run_unless_they_would_share_a_scale(folder: Path, int8_folder: Path) -> None:
    for path, runs in ((folder, [2, 1]), (int8_folder, [1, 1, 1])):
        session = StandardStepSession(open_unsealed(path), 1)
        session.reserve_slots(3, {})
        for slot, prompt in enumerate(([1, 2], [3, 4, 5], [6, 7])):
            session.prefill(slot, prompt, 0, np.arange(0))
        counted = CountingSession(session._session)
        session._session = counted
        session.decode([1, 2, 3], [2, 3, 2])
        assert counted.rows == runs
        session.close()


class CountingSession:
    """Notes how many rows each run has."""

    def __init__(self, session: Any) -> None:
        self.rows: list[int] = []
        self._session = session

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self._session.run_with_iobinding(binding, options)
        self.rows.append(binding.get_outputs()[0].shape()[0])


def test_int8_is_close_to_full_precision(model: gpt2_edge.Model, int8_model: gpt2_edge.Model) -> None:
    tokens = list(range(100, 140))
    exact, rounded = model.logits(tokens), int8_model.logits(tokens)
    assert int8_model.manifest.precision == "int8"
    assert np.abs(exact - rounded).max() > 1e-3  # else nothing was quantized
    assert np.corrcoef(exact.ravel(), rounded.ravel())[0, 1] > 0.98


def test_a_session_goes_on_as_if_it_had_not_been_interrupted(model: gpt2_edge.Model, tmp_path: Path) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "ignore_eos": True}
    whole = model.generate(PROMPTS[2], max_new_tokens=20, seed=5, **options)
    session = model.session()
    session.append(PROMPTS[2])
    first = session.generate(max_new_tokens=8, seed=5, **options)
    session.save(tmp_path / "session")
    fork = session.fork()
    rest = session.generate(max_new_tokens=12, **options)
    assert [*first.tokens, *rest.tokens] == whole.tokens
    assert fork.generate(max_new_tokens=12, **options).tokens == rest.tokens
    assert model.load_session(tmp_path / "session").generate(max_new_tokens=12, **options).tokens == rest.tokens


def test_a_rewound_session_forgets(model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    session = model.session()
    session.append([1, 2, 3, 4, 5, 6])
    session.generate(max_new_tokens=4, ignore_eos=True)
    session.rewind(7)
    session.append([9, 9])
    assert session.generate(max_new_tokens=6, ignore_eos=True).tokens == greedy(reference, [1, 2, 3, 9, 9], 6)


def test_scores_and_next_tokens(model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    tokens = np.random.default_rng(4).integers(0, 8192, 200).tolist()
    expected = torch.log_softmax(torch.from_numpy(reference_logits(reference, tokens)).double(), dim=-1)
    score = model.score(tokens)
    np.testing.assert_allclose(
        score.logprobs, [float(expected[place, token]) for place, token in enumerate(tokens[1:])], atol=1e-4
    )
    likeliest = model.next_tokens(tokens, k=3)
    assert [each.token for each in likeliest] == torch.topk(expected[-1], 3).indices.tolist()
    assert likeliest[0].probability == pytest.approx(float(expected[-1].max().exp()), rel=1e-3)


def test_context_that_slides(model: gpt2_edge.Model) -> None:
    done = model.generate([1, 2, 3], max_new_tokens=CONTEXT + 20, overflow="slide", ignore_eos=True)
    assert len(done.tokens) == CONTEXT + 20


def test_a_cancelled_row_ends_and_others_go_on(model: gpt2_edge.Model) -> None:
    cancel = threading.Event()
    cancel.set()
    assert model.generate(PROMPTS[0], max_new_tokens=5, cancel=cancel).finish_reason == "cancelled"
    assert model.generate(PROMPTS[0], max_new_tokens=5, ignore_eos=True).finish_reason == "length"


def test_a_prefill_can_be_terminated(folder: Path) -> None:
    session = StandardStepSession(open_unsealed(folder), 1)
    session.terminate_prefill()  # there is none: no effect
    session.prefill(0, [1, 2, 3], 0, np.arange(0))
    inner = session._session

    class Terminated(CountingSession):
        def run_with_iobinding(self, binding: Any, options: Any) -> None:
            session.terminate_prefill()
            super().run_with_iobinding(binding, options)

    session._session = Terminated(inner)
    with pytest.raises(Exception, match="terminate"):
        session.prefill(0, [4, 5], 3, np.arange(2))
    session._session = inner
    assert session.prefill(0, [4, 5], 3, np.arange(2)).shape == (2, 8192)


# Without a manifest, and with one.


def test_loading_says_that_there_is_no_manifest(folder: Path) -> None:
    with pytest.warns(UnsealedFolderWarning, match=r"has no manifest\.json.*`gpt2-edge seal ") as caught:
        gpt2_edge.load(folder, threads=1).close()
    assert caught[0].filename == __file__


def test_sealing_in_place_lists_what_belongs_to_the_model(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    (copy / "README.md").write_text("not a part of it")
    (copy / ".git").mkdir()
    manifest = seal_folder(copy)
    assert {entry.name for entry in manifest.files} == {
        "config.json",
        "generation_config.json",
        "model.onnx",
        "tokenizer.json",
    }
    assert (manifest.flavour, manifest.precision, manifest.end_of_text) == ("standard", "fp32", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpt2_edge.load(copy, threads=1).close()
    with pytest.raises(ModelFolderError, match="is sealed already"):
        seal_folder(copy)
    graph = bytearray((copy / "model.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (copy / "model.onnx").write_bytes(graph)
    with pytest.raises(ModelFolderError, match="is damaged"):
        gpt2_edge.load(copy, threads=1)


def test_sealing_a_copy_leaves_the_folder_as_it_was(folder: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in folder.iterdir())
    sealed = tmp_path / "sealed"
    manifest = seal_folder(folder, sealed)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert sorted(path.name for path in sealed.iterdir()) == sorted([*before, "manifest.json"])
    with gpt2_edge.load(sealed, threads=1) as model:
        assert model.manifest == manifest


def test_several_graphs_have_to_be_chosen_from(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    shutil.copy(copy / "model.onnx", copy / "a.onnx")
    (copy / "model.onnx").rename(copy / "b.onnx")
    with pytest.raises(ModelFolderError, match=r"several graphs, a\.onnx, b\.onnx: choose one with"):
        gpt2_edge.load(copy)
    assert seal_folder(copy, graph_name="b.onnx").graphs == {"decoder": "b.onnx"}


def test_weights_beside_the_graph(folder: Path, tmp_path: Path, reference: GPT2LMHeadModel) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    graph = onnx.load(folder / "model.onnx")
    onnx.save(graph, copy / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=1000)
    with gpt2_edge.load(copy, threads=1) as model:
        np.testing.assert_allclose(model.logits(PROMPTS[2]), reference_logits(reference, PROMPTS[2]), atol=1e-4)
        assert "model.onnx_data" in {entry.name for entry in model.manifest.files}


def test_a_sealed_folder_cannot_be_quantized(folder: Path, tmp_path: Path) -> None:
    seal_folder(folder, tmp_path / "sealed")
    with pytest.raises(QuantizationError, match="standard flavour"):
        quantize_folder(tmp_path / "sealed", tmp_path / "int8")


def test_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = str(shutil.copytree(folder, tmp_path / "model"))
    assert main(["generate", copy, "Once", "--max-new-tokens", "2"]) == 0
    warning = f"gpt2-edge: {copy} has no manifest.json, so nothing tells whether its files are whole: "
    assert capsys.readouterr().err == f"{warning}`gpt2-edge seal {copy}` makes one\n"
    assert main(["verify", copy]) == 1
    assert capsys.readouterr().err == (
        f"gpt2-edge: {copy} is not sealed: it has no manifest.json; make one with `gpt2-edge seal {copy}`\n"
    )
    assert main(["seal", copy]) == 0
    assert re.fullmatch(rf"{re.escape(copy)}: model\.onnx, fp32, 2\.\d MB in 4 files\n", capsys.readouterr().out)
    assert main(["verify", copy]) == 0
    assert main(["generate", copy, "Once", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().err == ""


# What is refused.


def config_says(**fields: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def half_precision_cache(folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    for value in graph.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in graph.graph.node:
        if node.op_type == "Concat":
            graph.graph.node.remove(node)
            break
    onnx.save(graph, folder / "model.onnx")


def weights_outside(folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    onnx.save(graph, folder / "model.onnx", save_as_external_data=True, location="weights", size_threshold=1000)
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights"
    (folder / "weights").rename(folder.parent / "weights")
    (folder / "model.onnx").write_bytes(graph.SerializeToString())


def weights_that_are_not_finite(folder: Path) -> None:
    graph = onnx.load(folder / "model.onnx")
    for tensor in graph.graph.initializer:
        if tensor.name == "wpe.weight":
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[:] = np.nan
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, folder / "model.onnx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (config_says(model_type="llama"), r"config\.json: model_type is 'llama'; only 'gpt2' can be run"),
        (config_says(model_type=None), r"model_type is 'None'; only 'gpt2' can be run"),
        (config_says(n_layer=3), r"its inputs have 4 keys and values, 3 layers need 2 each"),
        (
            config_says(n_head=8),
            r"past_key_values\.0\.key is tensor\(float\) \[None, 4, None, 8\], expected .*8, None, 4",
        ),
        (config_says(n_head=5), r"n_embd 32 is not a multiple of n_head 5"),
        (config_says(vocab_size=8191), r"the output logits is tensor\(float\) \[None, None, 8192\]"),
        (config_says(n_layer=0), r"n_layer is 0, expected an integer from 1"),
        (config_says(n_positions="many"), r"n_positions is many, expected an integer from 1"),
        (config_says(n_layer=2**31 - 1), r"n_layer is 2147483647, expected at most"),
        (written("config.json", "{"), r"config\.json is not JSON"),
        (written("config.json", "[" * 100_000), r"config\.json is not JSON"),
        (written("config.json", "[]"), r"config\.json does not hold a JSON object"),
        (written("model.onnx", "not a graph"), r"model\.onnx is not a graph that is run here"),
        (removed("tokenizer.json"), r"has no tokenizer\.json: make one with"),
        (written("tokenizer.json", "{}"), r"tokenizer\.json is not a tokenizer"),
        (weights_outside, r"has weights outside of the folder, in \.\./weights"),
        (weights_that_are_not_finite, r"not finite|computes other logits"),
        (half_precision_cache, r"model\.onnx"),
    ],
)
def test_a_hostile_or_foreign_folder_is_refused_in_one_line(
    folder: Path, tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    for use in (lambda: gpt2_edge.load(copy, threads=1), lambda: seal_folder(copy)):
        with pytest.raises(ModelFolderError, match=message) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert not (copy / "manifest.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"takes_past": False, "position_ids": False},
            "it takes no keys and values of earlier tokens.*text-generation-",
        ),
        ({"extra_input": "token_type_ids"}, "the input token_type_ids is unknown"),
        ({"drop_last_present": True}, "its outputs have 3 keys and values, 2 layers need 2 each"),
        ({"sees_past": False}, "computes other logits with a past than without"),
        ({"repeats_present": True}, "keys and values of .*expected"),
        ({"past": "past_{}_{}"}, "the input past_0_key is unknown|it takes no keys and values"),
    ],
)
def test_a_graph_of_another_kind_is_refused(
    checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelFolderError, match=message):
        gpt2_edge.load(write_folder(tmp_path / "model", checkpoint, **options), threads=1)


# What the export of this flavour does by itself; `installed_optimum.py` has the rest.


def with_optimums_name(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Give the embedding the name that it has in optimum's graphs."""
    names = {"wte.weight": "transformer.wte.weight"}
    for tensor in graph.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    return graph


def test_a_tied_embedding_is_stored_once(checkpoint: Path, tmp_path: Path) -> None:
    graph = with_optimums_name(build(checkpoint))
    onnx.save(graph, tmp_path / "twice.onnx")
    model = onnx_ir.load(tmp_path / "twice.onnx")
    tie_head(model)
    onnx_ir.save(model, tmp_path / "once.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("twice.onnx", "once.onnx")]
    assert sizes[0] - sizes[1] == pytest.approx(4 * 8192 * 32, rel=0.01)
    inputs = {
        "input_ids": np.array([[1, 2, 3], [4, 5, 6]]),
        "attention_mask": np.ones((2, 3), np.int64),
        "position_ids": np.tile(np.arange(3), (2, 1)),
        **{
            f"past_key_values.{n}.{part}": np.empty((2, 4, 0, 8), np.float32)
            for n in (0, 1)
            for part in ("key", "value")
        },
    }
    twice, once = (
        onnxruntime.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]).run(["logits"], inputs)[0]
        for name in ("twice.onnx", "once.onnx")
    )
    assert twice.shape == (2, 3, 8192)
    np.testing.assert_allclose(once, twice, atol=1e-4)


def test_a_head_that_is_not_the_embedding_is_not_tied(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> None:
    untied = write_checkpoint(tmp_path / "untied", tie_word_embeddings=False)
    onnx.save(with_optimums_name(build(untied)), tmp_path / "model.onnx")
    with pytest.raises(CheckpointError, match="head is not the transposed embedding"):
        tie_head(onnx_ir.load(tmp_path / "model.onnx"))


def test_without_optimum_the_export_says_what_to_install(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "optimum.exporters.onnx", None)
    monkeypatch.delitem(sys.modules, "gpt2_edge.export.standard_graph", raising=False)
    command = ["export", str(checkpoint), "-o", str(tmp_path / "standard"), "--flavour", "standard"]
    assert main(command) == 1
    assert "run pip install 'gpt2-edge[cpu,export,optimum]'" in capsys.readouterr().err
    assert main([*command, "--precision", "fp16"]) == 1
    assert not (tmp_path / "standard").exists()
