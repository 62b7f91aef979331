"""What cannot be exported exactly is refused by name, and no export leaves half a folder behind."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file

import gpt2_edge
from gpt2_edge import CheckpointError, ModelFolderError, ParityError, seal
from gpt2_edge.export import export_checkpoint, parity, pipeline
from gpt2_edge.export.activations import ACTIVATIONS

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs links, signals, limits or locks on folders")

Damage = Callable[[Path], None]

# The parts of a finished model folder.
WHOLE: Final = ["manifest.json", "model.onnx", "model.onnx.data", "model_cuda.onnx", "tokenizer.json"]


@pytest.fixture(scope="module")
def sound_checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("sound") / "checkpoint", n_layer=1, n_embd=16, n_head=2)


@pytest.fixture
def checkpoint(sound_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of a checkpoint that can be exported, to be damaged."""
    return shutil.copytree(sound_checkpoint, tmp_path / "checkpoint")


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """An empty folder to export into."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def config(**changes: Any) -> Damage:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def text(file: str, content: str) -> Damage:
    return lambda checkpoint: (checkpoint / file).write_text(content) and None


def data(file: str, content: bytes) -> Damage:
    return lambda checkpoint: (checkpoint / file).write_bytes(content) and None


def without(*files: str) -> Damage:
    def remove(checkpoint: Path) -> None:
        for file in files:
            (checkpoint / file).unlink()

    return remove


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    def rewrite(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / "model.safetensors")
        change(tensors)
        save_file(tensors, checkpoint / "model.safetensors")

    return rewrite


def shards(index: str) -> Damage:
    """Replace the weights by an index of shards, beside which lies no shard."""

    def replace(checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "model.safetensors.index.json").write_text(index)

    return replace


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 4000)


def only_pytorch_bin(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.h.0.mlp.c_fc.weight"][3, 5] = torch.nan


def put_infinity(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.ln_f.bias"][0] = -torch.inf


def misshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.h.0.attn.c_attn.weight"] = tensors["transformer.h.0.attn.c_attn.weight"].T.contiguous()


def make_integer(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"].to(torch.int8)


def keep_half_of_the_vocabulary(tensors: dict[str, torch.Tensor]) -> None:
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:4096].clone()


def word_pieces(checkpoint: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.save(str(checkpoint / "tokenizer.json"))


# For each way in which a checkpoint cannot be exported, the words that the message must have.
REFUSALS: Final[dict[str, tuple[Damage, list[str]]]] = {
    "cross-attention": (config(add_cross_attention=True), ["config.json", "add_cross_attention"]),
    "encoder and decoder": (config(is_encoder_decoder=True), ["is_encoder_decoder"]),
    "quantized weights": (config(quantization_config={"bits": 4}), ["quantization_config"]),
    "another model": (config(model_type="gpt_neo"), ["model_type", "'gpt_neo'", "'gpt2'"]),
    "another head": (
        config(architectures=["GPT2ForSequenceClassification"]),
        ["'GPT2ForSequenceClassification'", "GPT2LMHeadModel"],
    ),
    "architectures that are no list": (config(architectures=5), ["architecture", "5"]),
    "unknown activation": (config(activation_function="sine"), ["activation_function", "'sine'", "gelu_new"]),
    "uneven heads": (config(n_head=3), ["n_embd 16", "n_head 3"]),
    "a width of 0": (config(n_embd=0), ["n_embd", "0"]),
    "a text for a number": (config(n_layer="1"), ["n_layer", "'1'"]),
    "true for a number": (config(n_head=True), ["n_head", "True"]),
    "epsilon of 0": (config(layer_norm_epsilon=0), ["layer_norm_epsilon", "0"]),
    "epsilon that is not a number": (config(layer_norm_epsilon=float("nan")), ["layer_norm_epsilon", "nan"]),
    "a number for true": (config(scale_attn_weights=1), ["scale_attn_weights", "1"]),
    "a text for end-of-text": (config(eos_token_id="<|endoftext|>"), ["eos_token_id", "<|endoftext|>"]),
    "no config": (without("config.json"), ["config.json"]),
    "config that is not JSON": (text("config.json", '{"model_type": "gpt2",'), ["cannot read", "config.json"]),
    "config that is not text": (data("config.json", b"\xff\xfe\x00"), ["cannot read", "config.json"]),
    "config nested without end": (text("config.json", "[" * 100_000), ["cannot read", "config.json"]),
    "config that is a list": (text("config.json", "[]"), ["config.json", "object"]),
    "missing tensor": (weights(lambda tensors: tensors.pop("transformer.ln_f.bias")), ["ln_f.bias", "missing"]),
    "many missing tensors": (config(n_layer=9), ["h.1.attn.c_attn.bias", "93 more", "missing"]),
    "unknown tensor": (
        weights(lambda tensors: tensors.update({"transformer.h.0.adapter.weight": torch.ones(2)})),
        ["h.0.adapter.weight"],
    ),
    "more layers than the config says": (
        weights(lambda tensors: tensors.update({"transformer.h.1.ln_1.bias": torch.ones(16)})),
        ["h.1.ln_1.bias"],
    ),
    "misshaped tensor": (weights(misshape), ["h.0.attn.c_attn.weight", "(48, 16)", "(16, 48)"]),
    "smaller vocabulary": (weights(keep_half_of_the_vocabulary), ["wte.weight", "(4096, 16)", "(8192, 16)"]),
    "other inner width": (config(n_inner=32), ["h.0.mlp.c_fc.weight", "(16, 64)", "(16, 32)"]),
    "untied head that is not there": (config(tie_word_embeddings=False), ["lm_head.weight", "missing"]),
    "NaN": (weights(put_nan), ["h.0.mlp.c_fc.weight", "NaN"]),
    "infinity": (weights(put_infinity), ["ln_f.bias", "infinity"]),
    "integers": (weights(make_integer), ["wpe.weight", "int8"]),
    "truncated weights": (truncate, ["cannot read", "model.safetensors", "copy the file again"]),
    "empty weights": (data("model.safetensors", b""), ["cannot read", "model.safetensors"]),
    "no weights": (without("model.safetensors"), ["model.safetensors"]),
    "safetensors by the name of a pickle": (only_pytorch_bin, ["pytorch_model.bin", "nothing of it was run"]),
    "missing shard": (
        shards('{"weight_map": {"wte.weight": "model-00002-of-00002.safetensors"}}'),
        ["incomplete", "model-00002-of-00002.safetensors"],
    ),
    "shard outside": (shards('{"weight_map": {"wte.weight": "../x"}}'), ["outside", "../x"]),
    "shard at an absolute path": (shards('{"weight_map": {"wte.weight": "/etc/passwd"}}'), ["outside", "/etc/passwd"]),
    "shard that is a number": (shards('{"weight_map": {"wte.weight": 5}}'), ["5"]),
    "index without a map": (shards("{}"), ["model.safetensors.index.json"]),
    "index that is a list": (shards("[]"), ["model.safetensors.index.json"]),
    "index nested without end": (shards("[" * 100_000), ["model.safetensors.index.json"]),
    "index of nothing": (shards('{"weight_map": {}}'), ["missing"]),
    "no tokenizer": (without("tokenizer.json"), ["tokenizer.json", "vocab.json", "merges.txt"]),
    "half a tokenizer": (
        lambda checkpoint: (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json") and None,
        ["merges.txt"],
    ),
    "tokenizer that is not one": (text("tokenizer.json", "{}"), ["tokenizer"]),
    "tokenizer of another kind": (word_pieces, ["WordPiece", "byte-level BPE"]),
    "tokenizer with more tokens": (config(vocab_size=8000), ["8191", "7999"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_checkpoint_is_refused_by_name(case: str, checkpoint: Path, outputs: Path) -> None:
    damage, words = REFUSALS[case]
    damage(checkpoint)
    with pytest.raises(CheckpointError) as refusal:
        export_checkpoint(checkpoint, outputs / "model")
    message = str(refusal.value)
    assert [word for word in words if word not in message] == []
    assert str(checkpoint) in message
    assert "\n" not in message
    assert names_in(outputs) == []


@pytest.mark.parametrize("given", ["nowhere", "gpt2", "checkpoint/config.json"])
def test_checkpoint_that_is_not_a_folder(given: str, checkpoint: Path, outputs: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        export_checkpoint(checkpoint.parent / given, outputs / "model")
    assert names_in(outputs) == []


def test_a_model_folder_is_no_checkpoint(checkpoint: Path, outputs: Path) -> None:
    (checkpoint / "config.json").rename(checkpoint / "manifest.json")
    with pytest.raises(CheckpointError, match="is a model folder, not a checkpoint"):
        export_checkpoint(checkpoint, outputs / "model")
    assert names_in(outputs) == []


def refused_output(checkpoint: Path, destination: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Export to a place that must be refused before any work is done; return the message."""
    monkeypatch.setattr(pipeline, "find_checkpoint", lambda *given: pytest.fail("the checkpoint was read"))
    with pytest.raises(ModelFolderError) as refusal:
        export_checkpoint(checkpoint, destination)
    return str(refusal.value)


def test_output_that_is_a_file(checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (outputs / "model").write_text("mine")
    assert "already exists" in refused_output(checkpoint, outputs / "model", monkeypatch)
    assert (outputs / "model").read_text() == "mine"
    assert names_in(outputs) == ["model"]


def test_output_that_is_a_folder_with_files(checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (outputs / "model").mkdir()
    (outputs / "model" / "mine").write_text("mine")
    assert "already exists" in refused_output(checkpoint, outputs / "model", monkeypatch)
    assert names_in(outputs / "model") == ["mine"]
    assert names_in(outputs) == ["model"]


@posix_only
@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_output_that_is_a_link(target: str, checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (outputs / "empty").mkdir()
    (outputs / "model").symlink_to(outputs / target)
    assert "already exists" in refused_output(checkpoint, outputs / "model", monkeypatch)


@pytest.mark.parametrize("below", ["model", "deep/model"])
def test_output_below_a_file(below: str, checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (outputs / "file").write_text("mine")
    message = refused_output(checkpoint, outputs / "file" / below, monkeypatch)
    assert f"{outputs / 'file'} is not a folder" in message


def test_output_that_is_the_working_folder(checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outputs)
    assert "./model" in refused_output(checkpoint, Path(), monkeypatch)


def test_output_with_a_name_that_is_too_long(checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert os.strerror(errno.ENAMETOOLONG) in refused_output(checkpoint, outputs / ("x" * 300), monkeypatch)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root and Windows may write anywhere")
def test_output_below_a_folder_that_cannot_be_written(checkpoint: Path, outputs: Path) -> None:
    outputs.chmod(0o500)
    with pytest.raises(ModelFolderError, match=os.strerror(errno.EACCES)):
        export_checkpoint(checkpoint, outputs / "model")
    assert names_in(outputs) == []


def test_output_that_is_an_empty_folder_below_new_folders(
    checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (outputs / "empty").mkdir()
    export_checkpoint(checkpoint, outputs / "empty")
    assert names_in(outputs / "empty") == WHOLE
    monkeypatch.chdir(outputs)
    export_checkpoint(Path("..", "checkpoint"), Path("new", "folders", "model"))
    assert names_in(outputs / "new" / "folders") == ["model"]
    assert names_in(outputs / "new" / "folders" / "model") == WHOLE


def test_full_disk(checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: object, path: Path) -> None:
        path.write_bytes(b"half of the graph")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(pipeline, "save", save)
    with pytest.raises(ModelFolderError, match="No space left on device: free some space"):
        export_checkpoint(checkpoint, outputs / "model")
    assert names_in(outputs) == []


# The graph has 5 KB, the weights 140 KB, the tokenizer 230 KB: one after the other does not fit.
@posix_only
@pytest.mark.parametrize("limit", [2_000, 100_000, 200_000])
def test_file_that_cannot_be_written_to_its_end(
    limit: int, make_checkpoint: Callable[..., Path], outputs: Path
) -> None:
    import resource  # Unix has it

    checkpoint = make_checkpoint(n_layer=1, n_embd=4, n_head=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(ModelFolderError, match=os.strerror(errno.EFBIG)):
            export_checkpoint(checkpoint, outputs / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names_in(outputs) == []


@pytest.mark.parametrize(("shift", "said"), [(1e-3, "0.001"), (float("nan"), "nan")])
def test_graph_that_computes_something_else(
    shift: float, said: str, checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = parity.reference_logits
    monkeypatch.setattr(parity, "reference_logits", lambda *arguments: exact(*arguments) + shift)
    with pytest.raises(ParityError, match=f"differs from the checkpoint by {said}"):
        export_checkpoint(checkpoint, outputs / "model")
    assert names_in(outputs) == []


def test_tracer_that_makes_another_graph(checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another release of torch may take apart what should stay whole, or add what nobody asked for."""
    monkeypatch.setitem(ACTIVATIONS, "gelu_new", lambda x: x @ torch.eye(x.shape[-1]))
    with pytest.raises(CheckpointError, match="traced 5 MatMul operators where 4 belong: export with torch"):
        export_checkpoint(checkpoint, outputs / "model")
    assert names_in(outputs) == []


def test_interrupted_export(checkpoint: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: object) -> None:
        assert names_in(next(outputs.iterdir())) == WHOLE[1:]
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "check_parity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(checkpoint, outputs / "model")
    assert names_in(outputs) == []


# An export that stops and waits, once, when it calls the function named by its third argument.
WAITING_EXPORT: Final = """
import importlib, sys, time
from gpt2_edge.export import pipeline
from gpt2_edge import seal
checkpoint, destination, module, function = sys.argv[1:]
place = importlib.import_module(module)
exact = getattr(place, function)
def wait(*arguments):
    setattr(place, function, exact)
    print("waiting", flush=True)
    sys.stdin.readline()
    return exact(*arguments)
setattr(place, function, wait)
from pathlib import Path
try:
    pipeline.export_checkpoint(Path(checkpoint), Path(destination))
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


class WaitingExport:
    """An export in a process of its own, which waits when it comes to a function."""

    def __init__(self, checkpoint: Path, destination: Path, module: str, function: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WAITING_EXPORT, str(checkpoint), str(destination), module, function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_there(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "waiting\n", self._process.communicate()[1]

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.communicate()
        assert self._process.returncode == -signal.SIGKILL

    def finish(self) -> tuple[int, str]:
        """Let it go on; return its exit status and the last line of what it said."""
        _, errors = self._process.communicate("\n")
        return self._process.returncode, errors.splitlines()[-1]


@posix_only
def test_killed_export_leaves_no_model_and_the_next_one_cleans_up(checkpoint: Path, outputs: Path) -> None:
    moments = {
        "empty": ("gpt2_edge.export.pipeline", "save"),
        "graph": ("gpt2_edge.export.pipeline", "check_parity"),
        "sealed": ("gpt2_edge.seal", "_rename"),
    }
    killed = {
        name: WaitingExport(checkpoint, outputs / name, module, function)
        for name, (module, function) in moments.items()
    }
    left = {}
    for name, export in killed.items():
        export.wait_until_there()
        export.kill()
        assert not (outputs / name).exists()
        (leftover,) = outputs.glob(f".{name}.making-*")
        left[name] = names_in(leftover)
    assert left == {"empty": [], "graph": WHOLE[1:], "sealed": WHOLE}
    for name in moments:
        seal_again(outputs / name)
    assert names_in(outputs) == sorted(moments)


def seal_again(destination: Path) -> None:
    """What an export does to its destination, without the work of an export."""
    with seal.new_folder(destination) as folder:
        (folder / "file").write_text("new")
    assert names_in(destination) == ["file"]


@posix_only
def test_export_killed_at_any_moment(checkpoint: Path, outputs: Path) -> None:
    """Watch for the temporary folder instead of stopping at a known place."""
    export = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from gpt2_edge.export import export_checkpoint; export_checkpoint(*sys.argv[1:])",
            str(checkpoint),
            str(outputs / "model"),
        ],
        stderr=subprocess.DEVNULL,
    )
    while not any(outputs.glob(".model.making-*/model.onnx")):
        assert export.poll() is None
        time.sleep(0.001)
    export.kill()
    export.wait()
    assert not (outputs / "model").exists()
    export_checkpoint(checkpoint, outputs / "model")
    assert names_in(outputs) == ["model"]
    with gpt2_edge.load(outputs / "model", threads=1) as model:
        assert len(model.generate([1], max_new_tokens=3, ignore_eos=True).tokens) == 3


@posix_only
def test_two_exports_to_one_place(checkpoint: Path, outputs: Path) -> None:
    both = [WaitingExport(checkpoint, outputs / "model", "gpt2_edge.seal", "_rename") for _ in range(2)]
    for export in both:
        export.wait_until_there()
    assert len(names_in(outputs)) == 2  # the second has not taken the first's folder for a leftover
    assert both[0].finish()[0] == 0
    whole = {path.name: path.read_bytes() for path in (outputs / "model").iterdir()}
    status, error = both[1].finish()
    assert status == 1
    assert error == (
        f"ModelFolderError: {outputs / 'model'} was made by another process meanwhile: nothing was changed"
    )
    assert names_in(outputs) == ["model"]
    assert {path.name: path.read_bytes() for path in (outputs / "model").iterdir()} == whole
    with gpt2_edge.load(outputs / "model", threads=1) as model:
        assert len(model.generate([1], max_new_tokens=3, ignore_eos=True).tokens) == 3


def test_leftovers_of_other_places_stay(outputs: Path) -> None:
    others = [".other.making-abc", ".model.making", "model.making-abc", ".model1.making-abc"]
    for name in others:
        (outputs / name).mkdir()
    seal_again(outputs / "model")
    seal_again(outputs / "model[1]")
    assert names_in(outputs) == sorted([*others, "model", "model[1]"])


@posix_only
def test_leftover_of_a_name_with_brackets(outputs: Path) -> None:
    (outputs / ".model[1].making-abc").mkdir()
    seal_again(outputs / "model[1]")
    assert names_in(outputs) == ["model[1]"]


@posix_only
@pytest.mark.parametrize("moment", ["_lock", "flock"])
def test_folder_that_another_run_takes_for_a_leftover(
    moment: str, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run may remove the temporary folder before it is locked: before it is opened, or just after."""
    place = seal if moment == "_lock" else seal.fcntl
    exact, taken = getattr(place, moment), []

    def interfere(*arguments: Any) -> Any:
        if not taken:
            taken.extend(outputs.iterdir())
            monkeypatch.setattr(place, moment, exact)
            seal._remove_abandoned(outputs / "model")
            monkeypatch.setattr(place, moment, interfere)
        return exact(*arguments)

    monkeypatch.setattr(place, moment, interfere)
    with seal.new_folder(outputs / "model") as folder:
        assert taken != [folder]
        assert list(outputs.iterdir()) == [folder]
    assert len(taken) == 1
    assert names_in(outputs) == ["model"]


@posix_only
def test_leftover_that_disappears_meanwhile(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may finish, and rename its folder, while this one looks for leftovers."""
    leftover = outputs / ".model.making-abc"
    leftover.mkdir()
    exact = seal._lock

    def lock(folder: Path, operation: int) -> int | None:
        if leftover.exists():
            leftover.rmdir()
        return exact(folder, operation)

    monkeypatch.setattr(seal, "_lock", lock)
    seal_again(outputs / "model")
    assert names_in(outputs) == ["model"]


@posix_only
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_finished_folder_follows_the_umask(umask: int, mode: int, outputs: Path) -> None:
    before = os.umask(umask)
    try:
        seal_again(outputs / "model")
    finally:
        os.umask(before)
    assert (outputs / "model").stat().st_mode & 0o777 == mode
    assert (outputs / "model" / "file").stat().st_mode & 0o777 == mode & 0o666


def test_failed_export_leaves_no_new_folders(outputs: Path) -> None:
    def fail(destination: Path, *others: Path) -> None:
        with seal.new_folder(destination):
            for other in others:
                other.write_text("somebody else's")
            raise KeyboardInterrupt

    (outputs / "old").mkdir()
    with pytest.raises(KeyboardInterrupt):
        fail(outputs / "old" / "new" / "newer" / "model")
    assert names_in(outputs / "old") == []
    with pytest.raises(KeyboardInterrupt):
        fail(outputs / "shared" / "newer" / "model", outputs / "shared" / "file")
    assert names_in(outputs / "shared") == ["file"]
    assert names_in(outputs) == ["old", "shared"]


@posix_only
def test_folders_that_cannot_be_made(outputs: Path) -> None:
    with pytest.raises(ModelFolderError, match=os.strerror(errno.ENAMETOOLONG)):
        seal_again(outputs / "new" / ("x" * 300) / "model")
    assert names_in(outputs) == []
