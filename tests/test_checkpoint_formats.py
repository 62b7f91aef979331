"""The same weights in every format in which checkpoints are published give the same model."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import gpt2_edge
from gpt2_edge import CheckpointError, OptionError
from gpt2_edge.export import export_checkpoint
from gpt2_edge.export.config import read_config
from gpt2_edge.export.source import describe_source
from gpt2_edge.export.weight_files import weight_files
from gpt2_edge.export.weights import read_weights
from gpt2_edge.folder import file_sha256, open_folder

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")

Tensors = dict[str, torch.Tensor]
Writer = Callable[[Path, Tensors], None]

SAFETENSORS: Final = "model.safetensors"
PICKLE: Final = "pytorch_model.bin"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("formats") / "checkpoint", n_embd=16, n_head=2)


@pytest.fixture
def checkpoint(tiny: Path, tmp_path: Path) -> Path:
    """A copy whose weights are to be written in another format."""
    return shutil.copytree(tiny, tmp_path / "checkpoint")


def tensors_of(checkpoint: Path) -> Tensors:
    return load_file(checkpoint / SAFETENSORS)


def read(checkpoint: Path) -> Mapping[str, torch.Tensor]:
    return read_weights(checkpoint, read_config(checkpoint))


def assert_same(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], tensor), name


def save_pickle(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / PICKLE)


def save_old_pickle(folder: Path, tensors: Tensors) -> None:
    """As torch before 1.6 did, and as the first published GPT-2 is."""
    torch.save(tensors, folder / PICKLE, _use_new_zipfile_serialization=False)


def save_shards(suffix: str, save: Callable[[Tensors, Path], object]) -> Writer:
    stem = Path(SAFETENSORS if suffix == ".safetensors" else PICKLE).stem

    def write(folder: Path, tensors: Tensors) -> None:
        names = sorted(tensors)
        shard_of = {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            shard = f"{stem}-{number:05}-of-00002{suffix}"
            save({name: tensors[name] for name in part}, folder / shard)
            shard_of |= dict.fromkeys(part, shard)
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"weight_map": shard_of}))

    return write


FORMATS: Final[dict[str, Writer]] = {
    "safetensors": lambda folder, tensors: save_file(tensors, folder / SAFETENSORS),
    "sharded safetensors": save_shards(".safetensors", save_file),
    "pickle": save_pickle,
    "pickle of torch before 1.6": save_old_pickle,
    "sharded pickle": save_shards(".bin", torch.save),
}


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_holds_the_same(format: str, checkpoint: Path) -> None:
    tensors, expected = tensors_of(checkpoint), read(checkpoint)
    (checkpoint / SAFETENSORS).unlink()
    FORMATS[format](checkpoint, tensors)
    assert_same(read(checkpoint), expected)
    assert describe_source(checkpoint)["sha256"] == {
        path.name: file_sha256(path) for path in sorted(checkpoint.glob("*")) if path.suffix in (".bin", ".safetensors")
    }


@pytest.mark.parametrize("index", range(len(FORMATS) - 1))
def test_safetensors_come_first(index: int, checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    (checkpoint / SAFETENSORS).unlink()
    order = ["safetensors", "sharded safetensors", "pickle", "sharded pickle"]
    for format in order[index:]:
        FORMATS[format](checkpoint, tensors)
    files = weight_files(checkpoint)
    assert len(files) == 1 + ("sharded" in order[index])
    assert {path.suffix for path in files} == {".safetensors" if index < 2 else ".bin"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("format", ["safetensors", "pickle"])
def test_other_precisions_are_computed_in_float32(format: str, dtype: torch.dtype, checkpoint: Path) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_of(checkpoint).items()}
    (checkpoint / SAFETENSORS).unlink()
    FORMATS[format](checkpoint, tensors)
    expected = {name.removeprefix("transformer."): tensor.to(torch.float32) for name, tensor in tensors.items()}
    assert_same(read(checkpoint), expected)


def test_half_precision_checkpoint_is_what_transformers_computes_in_float32(checkpoint: Path, tmp_path: Path) -> None:
    save_file(
        {name: tensor.to(torch.bfloat16) for name, tensor in tensors_of(checkpoint).items()}, checkpoint / SAFETENSORS
    )
    export_checkpoint(checkpoint, tmp_path / "model")
    check_against_transformers(checkpoint, tmp_path / "model")


def check_against_transformers(checkpoint: Path, folder: Path) -> None:
    reference = GPT2LMHeadModel.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(0, 8192, 20).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0].numpy()
    with gpt2_edge.load(folder, threads=1) as model:
        np.testing.assert_allclose(model.logits(tokens), expected, rtol=0, atol=1e-4)


def as_first_published(tensors: Tensors) -> Tensors:
    """Names of the original `gpt2` upload: no prefix, no head, and the causal masks."""
    mask = torch.ones(32, 32, dtype=torch.uint8).tril().view(1, 1, 32, 32)
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | masks


def as_fine_tuned(tensors: Tensors) -> Tensors:
    """Names of a fine-tune by an old transformers: the prefix, two buffers a layer, and the tied head again."""
    masks = {f"transformer.h.{layer}.attn.bias": torch.ones(1, 1, 32, 32).tril() for layer in range(2)}
    masks |= {f"transformer.h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(2)}
    return tensors | masks | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}


def as_head_only(tensors: Tensors) -> Tensors:
    """Names of `safetensors.torch.save_model`, which keeps the first name of a tensor that has two."""
    rest = dict(tensors)
    return rest | {"lm_head.weight": rest.pop("transformer.wte.weight")}


@pytest.mark.parametrize("format", ["safetensors", "pickle"])
@pytest.mark.parametrize("rename", [as_first_published, as_fine_tuned, as_head_only])
def test_names_of_published_checkpoints(rename: Callable[[Tensors], Tensors], format: str, checkpoint: Path) -> None:
    tensors, expected = tensors_of(checkpoint), read(checkpoint)
    (checkpoint / SAFETENSORS).unlink()
    FORMATS[format](checkpoint, rename(tensors))
    assert_same(read(checkpoint), expected)


# What the configs of the published models have beside their shape.
CONFIGS: Final[dict[str, dict[str, Any]]] = {
    "openai-community/gpt2": {
        "n_ctx": 32,
        "attn_pdrop": 0.1,
        "summary_type": "cls_index",
        "summary_proj_to_labels": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    },
    "distilgpt2": {"n_ctx": 32, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    "openai-community/gpt2-xl": {"n_ctx": 32, "output_past": True},
    "microsoft/DialoGPT-small": {"n_ctx": 32, "task_specific_params": {"conversational": {"max_length": 1000}}},
    "cerebras/Cerebras-GPT-111M": {
        "activation_function": "gelu",
        "n_inner": 64,
        "scale_attn_weights": True,
        "use_cache": True,
        "attn_pdrop": 0.0,
        "reorder_and_upcast_attn": False,
    },
    "stanford-crfm's": {
        "reorder_and_upcast_attn": True,
        "scale_attn_by_inverse_layer_idx": True,
        "gradient_checkpointing": False,
    },
    "a context of another length in n_ctx": {"n_ctx": 1024},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_of_published_checkpoints(name: str, checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "config.json"
    document = json.loads(path.read_text()) | CONFIGS[name]
    for of_late in ("dtype", "transformers_version", "use_cache"):
        document.pop(of_late, None)
    path.write_text(json.dumps(document))
    export_checkpoint(checkpoint, tmp_path / "model")
    check_against_transformers(checkpoint, tmp_path / "model")


@posix_only
def test_checkpoint_of_links(checkpoint: Path, tmp_path: Path) -> None:
    """As huggingface_hub's cache keeps them."""
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0123456789" * 4)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in checkpoint.iterdir():
        blob = blobs / file_sha256(file)
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    export_checkpoint(snapshot, tmp_path / "model")
    assert open_folder(tmp_path / "model").manifest.source == {
        "name": "owner/name",
        "revision": "0123456789" * 4,
        "sha256": {SAFETENSORS: file_sha256(checkpoint / SAFETENSORS)},
    }
    (tmp_path / "link").symlink_to(snapshot)
    assert_same(read(tmp_path / "link"), read(checkpoint))


class Malicious:
    """Leaves a file behind when it is unpickled by a careless reader."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._trace,))


def malicious(folder: Path, trace: Path) -> None:
    torch.save({"transformer.wte.weight": Malicious(trace)}, folder / PICKLE)


def malicious_and_old(folder: Path, trace: Path) -> None:
    torch.save({"x": Malicious(trace)}, folder / PICKLE, _use_new_zipfile_serialization=False)


def malicious_and_plain(folder: Path, trace: Path) -> None:
    (folder / PICKLE).write_bytes(pickle.dumps(Malicious(trace)))


def malicious_shard(folder: Path, trace: Path) -> None:
    malicious(folder, trace)
    (folder / PICKLE).rename(folder / "x.bin")
    (folder / f"{PICKLE}.index.json").write_text('{"weight_map": {"wte.weight": "x.bin"}}')


@pytest.mark.parametrize("write", [malicious, malicious_and_old, malicious_and_plain, malicious_shard])
def test_pickle_that_would_run_code_is_refused(
    write: Callable[[Path, Path], None], checkpoint: Path, tmp_path: Path
) -> None:
    (checkpoint / SAFETENSORS).unlink()
    trace = tmp_path / "trace"
    write(checkpoint, trace)
    with pytest.raises(CheckpointError, match=r"\.bin .*nothing of it was run") as refusal:
        read(checkpoint)
    assert "\n" not in str(refusal.value)
    assert not trace.exists()


def truncate(folder: Path, tensors: Tensors) -> None:
    save_pickle(folder, tensors)
    content = (folder / PICKLE).read_bytes()
    (folder / PICKLE).write_bytes(content[: len(content) // 2])


def truncate_old(folder: Path, tensors: Tensors) -> None:
    save_old_pickle(folder, tensors)
    content = (folder / PICKLE).read_bytes()
    (folder / PICKLE).write_bytes(content[: len(content) // 2])


DAMAGES: Final[dict[str, tuple[Writer, str]]] = {
    "truncated": (truncate, "copy the file again|holds something else"),
    "truncated, old": (truncate_old, "copy the file again|holds something else"),
    "empty": (lambda folder, tensors: (folder / PICKLE).write_bytes(b"") and None, "cannot read|holds something else"),
    "a list": (lambda folder, tensors: torch.save(list(tensors.values()), folder / PICKLE), "holds a list"),
    "a training state": (
        lambda folder, tensors: torch.save({"epoch": 3, "model": tensors}, folder / PICKLE),
        "'epoch' is int, expected a tensor",
    ),
    "numbers for names": (lambda folder, tensors: torch.save({1: torch.ones(2)}, folder / PICKLE), "1 is Tensor"),
    "a sparse tensor": (
        lambda folder, tensors: torch.save(
            tensors | {"transformer.wte.weight": tensors["transformer.wte.weight"].to_sparse()}, folder / PICKLE
        ),
        "wte.weight is sparse",
    ),
    "one name twice": (
        lambda folder, tensors: torch.save(tensors | {"ln_f.bias": tensors["transformer.ln_f.bias"]}, folder / PICKLE),
        "a second ln_f.bias",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_pickle_is_refused(case: str, checkpoint: Path) -> None:
    write, said = DAMAGES[case]
    tensors = tensors_of(checkpoint)
    (checkpoint / SAFETENSORS).unlink()
    write(checkpoint, tensors)
    with pytest.raises(CheckpointError, match=said) as refusal:
        read(checkpoint)
    assert PICKLE in str(refusal.value) or str(checkpoint) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_untied_head_that_equals_the_embedding_is_stored_once(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(n_layer=1, n_embd=16, n_head=2, tie_word_embeddings=False)
    tensors = tensors_of(checkpoint)
    assert "lm_head.weight" in read(checkpoint)
    save_file(tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}, checkpoint / SAFETENSORS)
    export_checkpoint(checkpoint, tmp_path / "model")
    manifest = open_folder(tmp_path / "model").manifest
    assert manifest.architecture.tied_head
    assert manifest.size_bytes < 2 * tensors["transformer.wte.weight"].nbytes
    check_against_transformers(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("length", [1, 12])
def test_shorter_context(length: int, checkpoint: Path, tmp_path: Path) -> None:
    export_checkpoint(checkpoint, tmp_path / "whole")
    export_checkpoint(checkpoint, tmp_path / "short", max_context=length)
    whole, short = open_folder(tmp_path / "whole").manifest, open_folder(tmp_path / "short").manifest
    assert short.architecture.context_length == length
    saved = (32 - length) * 16 * 4
    size = {entry.name: entry.size_bytes for entry in short.files}["model.onnx.data"]
    # Small files keep weights of up to 256 bytes in the graph, and align the others.
    assert abs({entry.name: entry.size_bytes for entry in whole.files}["model.onnx.data"] - saved - size) < 8192
    tokens = list(range(100, 100 + length))
    with (
        gpt2_edge.load(tmp_path / "whole", threads=1) as whole_model,
        gpt2_edge.load(tmp_path / "short", threads=1) as short_model,
    ):
        np.testing.assert_allclose(short_model.logits(tokens), whole_model.logits(tokens), rtol=0, atol=1e-5)
        with pytest.raises(gpt2_edge.ContextLengthError, match=f"context holds {length}"):
            short_model.logits([*tokens, 1])


@pytest.mark.parametrize("length", [0, -1, 33])
def test_context_that_is_no_part_of_the_checkpoints(length: int, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"max_context is {length}; the checkpoint has 32 positions: give 1 to 32"):
        export_checkpoint(checkpoint, tmp_path / "new" / "model", max_context=length)
    assert not (tmp_path / "new").exists()
