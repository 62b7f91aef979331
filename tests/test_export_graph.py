"""What lies in an exported folder: one graph, its weights once, the tokenizer, and nothing about who made it."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir
import pytest
from safetensors import safe_open
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2TokenizerFast

import gpt2_edge
from gpt2_edge.export import export_checkpoint
from gpt2_edge.export.tokenizer_files import read_tokenizer
from gpt2_edge.folder import open_folder

REPOSITORY: Final = Path(__file__).resolve().parent.parent
STORYTELLER: Final = REPOSITORY / "models" / "storyteller"

# Shape of GPT-2 "small", and what a token takes in tokenizer.json: the storyteller's take 28 bytes.
SMALL: Final = {"vocabulary": 50257, "context": 1024, "width": 768, "layers": 12}
TOKENIZER_BYTES_PER_TOKEN: Final = 40
MEGABYTE: Final = 1_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    """A model folder with padded heads, an untied head and an activation that the tracer takes apart."""
    place = tmp_path_factory.mktemp("tiny")
    checkpoint = write_checkpoint(
        place / "checkpoint",
        n_layer=1,
        n_embd=20,
        n_head=4,
        n_inner=48,
        activation_function="mish",
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    export_checkpoint(checkpoint, place / "model")
    return place / "model"


def initializer_bytes(folder: Path) -> dict[str, int]:
    return {
        name: value.const_value.nbytes
        for name, value in onnx_ir.load(folder / "model.onnx").graph.initializers.items()
        if value.const_value is not None
    }


def float32_bytes(vocabulary: int, context: int, width: int, layers: int) -> int:
    """Bytes of all parameters of a GPT-2 whose head is its embedding, each of them once."""
    block = 12 * width**2 + 13 * width
    return 4 * ((vocabulary + context) * width + layers * block + 2 * width)


def int8_bytes(vocabulary: int, context: int, width: int, layers: int) -> int:
    """Bytes when a matrix has a byte for each weight, and everything else has float32.

    Beside that, a matrix has a scale for each output; the head has a bias, and its columns are scaled.
    """
    matrices = vocabulary * width + layers * 12 * width**2
    scales = vocabulary + width + layers * 9 * width
    others = context * width + layers * 13 * width + 2 * width + vocabulary
    return matrices + 4 * (scales + others)


def storyteller_shape() -> dict[str, int]:
    config = json.loads((STORYTELLER / "config.json").read_text())
    return {
        "vocabulary": config["vocab_size"],
        "context": config["n_positions"],
        "width": config["n_embd"],
        "layers": config["n_layer"],
    }


@pytest.mark.parametrize("kind", ["storyteller_fp32", "storyteller_int8", "tiny"])
def test_nothing_tells_of_the_machine_that_exported(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    parts = [model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer]
    parts += [*model.graph.input, *model.graph.output, *model.functions]
    assert [part.metadata_props for part in parts if part.metadata_props] == []
    assert [part.doc_string for part in parts if part.doc_string] == []
    assert model.producer_name == "gpt2-edge"
    assert [name for name in names_in_graph(model) if "/" in name or "\\" in name or ".py" in name] == []
    for file in (folder / "model.onnx", folder / "manifest.json"):
        content = file.read_bytes()
        for secret in ("stack_trace", "site-packages", str(REPOSITORY), str(folder.parent), str(Path.home()) + "/"):
            assert secret.encode() not in content, secret


def names_in_graph(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    names = [value.name for value in (*graph.input, *graph.output, *graph.initializer, *graph.value_info)]
    return [*names, *(name for node in graph.node for name in (node.name, *node.input, *node.output))]


@pytest.mark.parametrize("kind", ["storyteller_fp32", "storyteller_int8", "tiny"])
def test_folder_has_its_files_and_the_weights_beside_the_graph(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    parts = {"manifest.json", "model.onnx", "model.onnx.data", "tokenizer.json"}
    parts.add("golden.json" if kind == "storyteller_int8" else "model_cuda.onnx")
    assert {path.name for path in folder.iterdir()} == parts
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    outside = 0
    for tensor in model.graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            assert entries["location"] == "model.onnx.data"
            outside += int(entries["length"])
        else:
            assert len(tensor.raw_data) <= 256, tensor.name
    assert (folder / "model.onnx.data").stat().st_size == outside


def test_every_float32_weight_is_stored_once(storyteller_fp32: Path) -> None:
    sizes = initializer_bytes(storyteller_fp32)
    shape = storyteller_shape()
    assert sizes["wte.weight"] == 4 * shape["vocabulary"] * shape["width"]
    assert "lm_head.weight" not in sizes
    # The tracer merges weights that are equal, and adds a few numbers for shapes.
    assert float32_bytes(**shape) - 1000 <= sum(sizes.values()) <= float32_bytes(**shape) + 100


def test_every_int8_weight_is_stored_once(storyteller_int8: Path) -> None:
    sizes = initializer_bytes(storyteller_int8)
    assert "wte.weight" not in sizes
    # Steps, zeros and shapes add a few numbers.
    assert int8_bytes(**storyteller_shape()) - 1000 <= sum(sizes.values()) <= int8_bytes(**storyteller_shape()) + 200


def test_untied_head_is_stored_beside_the_embedding(tiny: Path) -> None:
    sizes = initializer_bytes(tiny)
    assert sizes["lm_head.weight"] == sizes["wte.weight"] == 4 * 8192 * 20


def test_gpt2_small_would_have_500_and_140_megabytes(storyteller_fp32: Path, storyteller_int8: Path) -> None:
    """By the rules that hold for the storyteller, whose graph has half as many layers."""
    tokenizer_bytes = (storyteller_fp32 / "tokenizer.json").stat().st_size
    assert tokenizer_bytes < TOKENIZER_BYTES_PER_TOKEN * storyteller_shape()["vocabulary"]
    tokenizer = TOKENIZER_BYTES_PER_TOKEN * SMALL["vocabulary"]
    for folder, weights, limit in (
        (storyteller_fp32, float32_bytes, 500 * MEGABYTE),
        (storyteller_int8, int8_bytes, 140 * MEGABYTE),
    ):
        manifest = open_folder(folder).manifest
        overhead = manifest.size_bytes - tokenizer_bytes - weights(**storyteller_shape())
        assert 0 < overhead < 120_000
        assert weights(**SMALL) + 2 * overhead + tokenizer < limit


def test_the_same_checkpoint_gives_the_same_bytes(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint(n_layer=1, n_embd=16, n_head=2)
    export_checkpoint(checkpoint, tmp_path / "first")
    export_checkpoint(checkpoint, tmp_path / "second")
    for name in ("model.onnx", "model.onnx.data", "model_cuda.onnx", "tokenizer.json", "manifest.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_graph_is_made_of_fused_operators(storyteller_fp32: Path) -> None:
    graph = onnx.load(storyteller_fp32 / "model.onnx", load_external_data=False).graph
    layers = storyteller_shape()["layers"]
    assert Counter(node.op_type for node in graph.node) == {
        "GroupQueryAttention": layers,
        "LayerNormalization": 2 * layers + 1,
        "MatMul": 4 * layers,
        "Gelu": layers,
        "Add": 6 * layers + 1,  # a bias for each matrix, two residual connections, the positions
        "Gather": 4,
        # Tokens side by side, but as the attention takes and gives them.
        "Reshape": 2 * layers + 1,
        "Shape": 2,
        "Concat": 1,
        "Gemm": 1,
    }


def test_inputs_and_outputs_are_the_documented_ones(tiny: Path) -> None:
    graph = onnx.load(tiny / "model.onnx", load_external_data=False).graph
    cache = ("FLOAT", ["batch", 4, "capacity", 8])
    assert {value.name: signature(value) for value in graph.input} == {
        "input_ids": ("INT64", ["batch", "sequence"]),
        "position_ids": ("INT64", ["batch", "sequence"]),
        "seqlens_k": ("INT32", ["batch"]),
        "total_sequence_length": ("INT32", []),
        "logit_positions": ("INT64", ["logits"]),
        "past_key_values.0.key": cache,
        "past_key_values.0.value": cache,
    }
    assert {value.name: signature(value) for value in graph.output} == {
        "logits": ("FLOAT", ["logits", 8192]),
        "present.0.key": cache,
        "present.0.value": cache,
    }


def signature(value: onnx.ValueInfoProto) -> tuple[str, list[str | int]]:
    tensor = value.type.tensor_type
    return (
        onnx.TensorProto.DataType.Name(tensor.elem_type),
        [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    )


def test_manifest_of_the_storyteller(storyteller_fp32: Path) -> None:
    document = json.loads((storyteller_fp32 / "manifest.json").read_text(encoding="utf-8"))
    assert document["architecture"] == {
        "layers": 6,
        "heads": 4,
        "head_size": 64,
        "width": 256,
        "inner_width": 1024,
        "context_length": 512,
        "vocabulary_size": 8192,
        "activation": "gelu_pytorch_tanh",
        "tied_head": True,
    }
    assert (document["flavour"], document["precision"], document["recipe"]) == ("fused", "fp32", None)
    assert document["end_of_text"] == 0
    assert document["source"] == {
        "name": "storyteller",
        "revision": None,
        "sha256": {"model.safetensors": sha256(STORYTELLER / "model.safetensors")},
    }
    assert document["tools"].keys() == {"gpt2-edge", "torch", "onnxscript", "onnx-ir", "onnxruntime"}
    assert document["tools"]["gpt2-edge"] == gpt2_edge.__version__
    parity = document["measured"]["parity"]
    assert parity["cases"] == 6
    assert 0 < parity["largest_difference"] <= parity["tolerance"] < 1e-3
    assert {entry["name"]: (entry["size_bytes"], entry["sha256"]) for entry in document["files"]} == {
        name: ((storyteller_fp32 / name).stat().st_size, sha256(storyteller_fp32 / name))
        for name in ("model.onnx", "model.onnx.data", "model_cuda.onnx", "tokenizer.json")
    }


def test_manifest_of_another_shape(tiny: Path) -> None:
    manifest = open_folder(tiny).manifest
    architecture = manifest.architecture
    assert (architecture.width, architecture.heads, architecture.head_size) == (20, 4, 8)
    assert (architecture.inner_width, architecture.activation, architecture.tied_head) == (48, "mish", False)
    assert manifest.end_of_text is None


def test_shards_are_hashed_one_by_one(tmp_path: Path, make_checkpoint: Callable[..., Path]) -> None:
    from transformers import GPT2LMHeadModel

    checkpoint = make_checkpoint(n_layer=1, eos_token_id=50256)
    model = GPT2LMHeadModel.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="500KB")
    shards = sorted(checkpoint.glob("*.safetensors"))
    assert len(shards) > 1
    export_checkpoint(checkpoint, tmp_path / "model")
    manifest = open_folder(tmp_path / "model").manifest
    assert manifest.source["sha256"] == {path.name: sha256(path) for path in shards}
    assert manifest.end_of_text is None  # the config's default is beyond this vocabulary


def test_weights_in_the_graph_are_those_of_the_checkpoint(storyteller_fp32: Path) -> None:
    graph = onnx_ir.load(storyteller_fp32 / "model.onnx").graph
    with safe_open(STORYTELLER / "model.safetensors", framework="np") as checkpoint:
        for name in ("wte.weight", "wpe.weight", "h.5.attn.c_attn.weight", "h.0.mlp.c_proj.weight"):
            value = graph.initializers[name].const_value
            assert value is not None
            expected = checkpoint.get_tensor(f"transformer.{name}").astype(np.float32)
            np.testing.assert_array_equal(value.numpy(), expected)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


TEXTS: Final = [
    "",
    " ",
    "Once upon a time, there was a little fox.",
    "   leading and trailing spaces   ",
    "two\n\nparagraphs\r\n\tand a tab",
    "it's we'll they've I'm you'd don't CAN'T",
    "numbers 1234567890 3.14 and $ymbols!? (brackets) [more] {curly}",
    "naïve café Ünïcödé ß",
    "日本語のテキスト と 한국어 и русский עברית العربية",
    "🦊🐉👩‍👩‍👧‍👦 flags 🇫🇷 and e\u0301 combining",
    "zero\x00byte, control\x1b, soft\xadhyphen, wide\u3000space, thin\u2009space, nbsp\xa0",
    "one<|endoftext|>two <|endoftext|> <|endoftext|>\n",
    "<|endoftext|>",
    "almost <|endoftext| > and <|end|>",
    "a" * 300,
    "The quick brown fox " * 20,
    "def f(x):\n    return x ** 2  # comment\n",
]


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `vocab.json` and `merges.txt` as GPT-2 has them, end-of-text being the last token."""
    folder = tmp_path_factory.mktemp("gpt2-files")
    trained = ByteLevelBPETokenizer()
    text = (STORYTELLER / "held_out.txt").read_text(encoding="utf-8")[:200_000]
    trained.train_from_iterator([text, *TEXTS], vocab_size=1000, show_progress=False)
    trained.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def expected_tokenizer(gpt2_files: Path) -> Any:
    return GPT2TokenizerFast(vocab_file=str(gpt2_files / "vocab.json"), merges_file=str(gpt2_files / "merges.txt"))


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_of_vocabulary_and_merges_is_gpt2s(text: str, gpt2_files: Path, expected_tokenizer: Any) -> None:
    tokenizer = read_tokenizer(gpt2_files, vocabulary_size=1001)
    tokens = tokenizer.encode(text).ids
    assert tokens == expected_tokenizer.encode(text)
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def test_exported_folder_speaks_the_tokenizer_of_vocabulary_and_merges(
    gpt2_files: Path, expected_tokenizer: Any, tmp_path: Path, make_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = make_checkpoint(n_layer=1, vocab_size=1001, eos_token_id=1000, bos_token_id=1000)
    (checkpoint / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        (checkpoint / name).write_bytes((gpt2_files / name).read_bytes())
    export_checkpoint(checkpoint, tmp_path / "model")
    with gpt2_edge.load(tmp_path / "model", threads=1) as model:
        assert model.manifest.end_of_text == 1000
        for text in TEXTS:
            assert model.tokenize(text) == expected_tokenizer.encode(text)
            assert model.detokenize(model.tokenize(text)) == text


def test_tokenizer_of_the_storyteller_is_unchanged(fp32_model: gpt2_edge.Model) -> None:
    expected = GPT2TokenizerFast(tokenizer_file=str(STORYTELLER / "tokenizer.json"))
    for text in TEXTS:
        assert fp32_model.tokenize(text) == expected.encode(text)
