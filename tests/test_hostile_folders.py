"""Folders that mean harm: each is refused before it can do any, with one line."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import fuzz
import numpy as np
import onnx
import pytest
from model_folders import copy_of_storyteller, edit_graph, reseal
from onnx import TensorProto, helper, numpy_helper

import gpt2_edge
from gpt2_edge.checked_loading import checked
from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import MANIFEST_NAME

MEMORY_LIMIT: Final = 3 * 2**30
POSIX: Final = pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and devices in folders")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return copy_of_storyteller(tmp_path / "model")


def refusal_in_little_memory(folder: Path) -> str:
    """Verify a folder in a process that may not take much memory or time, and return its one line."""
    program = (
        "import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_AS, ({MEMORY_LIMIT}, {MEMORY_LIMIT}))\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "from gpt2_edge.cli import main\n"
        f"sys.exit(main(['verify', {str(folder)!r}, '--threads', '1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("gpt2-edge: ")
    return lines[0]


def list_file(folder: Path, name: str, size_bytes: int) -> None:
    """Make a file that has a size and takes no room, and list it."""
    with (folder / name).open("ab") as file:
        file.truncate(size_bytes)
    document = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    document["files"] = [entry for entry in document["files"] if entry["name"] != name]
    document["files"].append({"name": name, "size_bytes": size_bytes, "sha256": "0" * 64})
    (folder / MANIFEST_NAME).write_text(json.dumps(document), encoding="utf-8")


# Files.


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", r"tokenizer\.json is larger than 64,000,000 bytes: not a tokenizer"),
        ("model.onnx", r"model\.onnx is larger than 2,147,483,648 bytes: not an ONNX graph"),
        ("model.onnx.data", r"model\.onnx\.data has 10,000,000,000 bytes, of which at most 8,\d{3},\d{3} have a use"),
        ("notes.txt", r"notes\.txt has 10,000,000,000 bytes, of which at most 64,000,000 have a use"),
    ],
)
def test_ten_gigabytes_of_nothing(folder: Path, name: str, message: str) -> None:
    list_file(folder, name, 10**10)
    assert re.search(message, refusal_in_little_memory(folder))


@POSIX
@pytest.mark.parametrize("name", ["tokenizer.json", "model.onnx", "model.onnx.data", MANIFEST_NAME])
def test_a_pipe_in_the_place_of_a_file_is_refused_without_waiting(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelFolderError, match=r"is not a regular file|is not a model folder"):
        open_folder(folder)


@POSIX
def test_a_pipe_in_the_place_of_a_folder_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFolderError, match="is not a model folder"):
        open_folder(tmp_path / "pipe")


@POSIX
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "loop"])
def test_links_to_devices_and_to_themselves_are_refused(folder: Path, target: str) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(folder / "tokenizer.json" if target == "loop" else target)
    with pytest.raises(ModelFolderError):
        open_folder(folder)


def as_in_a_hub_cache(folder: Path, cache: Path) -> Path:
    """Lay a folder out as a hub's client does: links in a snapshot to blobs that are named after their hashes."""
    snapshot, blobs = cache / "models--ann--gpt2" / "snapshots" / "0123", cache / "models--ann--gpt2" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    return snapshot


def test_a_snapshot_in_a_hub_cache_is_loaded(folder: Path, tmp_path: Path) -> None:
    snapshot = as_in_a_hub_cache(folder, tmp_path / "cache")
    with gpt2_edge.load(snapshot) as model:
        assert model.generate("Once", max_new_tokens=1).finish_reason == "length"
    assert open_folder(snapshot).path == snapshot


@pytest.mark.parametrize("target", ["models--bob--other/blobs/x", "secret", "models--ann--gpt2/refs/x"])
def test_a_snapshot_reaches_no_other_files(folder: Path, tmp_path: Path, target: str) -> None:
    cache = tmp_path / "cache"
    snapshot = as_in_a_hub_cache(folder, cache)
    (cache / target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "tokenizer.json", cache / target)
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(cache / target)
    with pytest.raises(ModelFolderError, match="leads out of the model folder"):
        open_folder(snapshot)


def test_what_was_opened_is_what_is_hashed_and_run(folder: Path) -> None:
    """A file that is exchanged after it was checked changes nothing, and is noticed."""
    opened = open_folder(folder)
    before = opened.content("model.onnx.data").sha256()
    (folder / "other").write_bytes(bytes((folder / "model.onnx.data").stat().st_size))
    (folder / "other").replace(folder / "model.onnx.data")
    assert opened.content("model.onnx.data").sha256() == before
    with pytest.raises(ModelFolderError, match=r"model\.onnx\.data was changed while it was loaded"):
        opened.check_unchanged()


@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json"])
def test_a_change_while_loading_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from gpt2_edge import model

    open_session = model.open_session

    def open_and_change(*arguments: object, **options: object) -> object:
        with (folder / name).open("r+b") as file:
            file.seek(100)
            file.write(b"changed")
        return open_session(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(model, "open_session", open_and_change)
    with pytest.raises(ModelFolderError, match=r"was changed while it was loaded|is damaged"):
        gpt2_edge.load(folder, device="cpu")


def test_a_file_that_is_exchanged_for_its_like_while_loading_is_noticed(folder: Path) -> None:
    """Its hash is right, whenever it was computed."""
    opened = open_folder(folder)
    shutil.copy(folder / "model.onnx.data", folder / "other")
    with pytest.raises(ModelFolderError, match="was changed while it was loaded"), checked(opened, True):
        (folder / "other").replace(folder / "model.onnx.data")


def test_a_tokenizer_of_nothing_but_brackets(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("[" * 5_000_000, encoding="utf-8")
    reseal(folder)
    assert "is not a tokenizer" in refusal_in_little_memory(folder)


# The graph.


def weights(graph: onnx.GraphProto, name: str = "wpe.weight") -> TensorProto:
    return next(tensor for tensor in graph.initializer if tensor.name == name)


def add_node(graph: onnx.GraphProto, operator: str, *inputs: str, domain: str = "", **attributes: object) -> None:
    """Add a node whose result is added to the logits, so that it is computed."""
    count = len(graph.node)
    next(node for node in graph.node if "logits" in node.output).output[0] = f"logits_{count}"
    graph.node.append(helper.make_node(operator, inputs, [f"more_{count}"], domain=domain, **attributes))
    graph.node.append(helper.make_node("ReduceMax", [f"more_{count}"], [f"most_{count}"], keepdims=0))
    graph.node.append(helper.make_node("Cast", [f"most_{count}"], [f"cast_{count}"], to=TensorProto.FLOAT))
    graph.node.append(helper.make_node("Add", [f"logits_{count}", f"cast_{count}"], ["logits"]))


def constant(graph: onnx.GraphProto, *values: int) -> str:
    name = f"constant_{len(graph.initializer)}"
    graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return name


def an_operator_of_another_domain(graph: onnx.GraphProto) -> None:
    add_node(graph, "ReadFile", "input_ids", domain="com.example")


def one_inside_of_a_branch(graph: onnx.GraphProto) -> None:
    inner = helper.make_graph(
        [helper.make_node("ReadFile", ["input_ids"], ["inner"], domain="com.example")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.INT64, None)],
    )
    add_node(graph, "If", "true", then_branch=inner, else_branch=inner)


def weights_of_another_file_inside_of_a_branch(graph: onnx.GraphProto) -> None:
    tensor = TensorProto(name="hidden", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../secret")
    inner = helper.make_graph([helper.make_node("Constant", [], ["inner"], value=tensor)], "branch", [], [])
    add_node(graph, "Identity", "input_ids", body=inner)


def an_endless_loop(graph: onnx.GraphProto) -> None:
    add_node(graph, "Loop", "", "", body=helper.make_graph([], "body", [], []))


def a_tensor_larger_than_its_bytes(graph: onnx.GraphProto) -> None:
    tensor = weights(graph)
    for field in ("external_data", "data_location"):
        tensor.ClearField(field)
    tensor.dims[:] = [2**20, 2**20]
    tensor.raw_data = b"\0" * 4


def a_tensor_of_a_negative_size(graph: onnx.GraphProto) -> None:
    weights(graph).dims[:] = [-512, -256]


def a_tensor_larger_than_its_place(graph: onnx.GraphProto) -> None:
    weights(graph).dims[:] = [2**30, 256]


def a_tensor_beyond_its_file(graph: onnx.GraphProto) -> None:
    next(entry for entry in weights(graph).external_data if entry.key == "offset").value = str(10**12)


def a_tensor_in_two_places(graph: onnx.GraphProto) -> None:
    weights(graph).external_data.add(key="location", value="/etc/passwd")


def a_place_that_is_no_number(graph: onnx.GraphProto) -> None:
    next(entry for entry in weights(graph).external_data if entry.key == "offset").value = "-1"


def a_tensor_of_an_unknown_type(graph: onnx.GraphProto) -> None:
    weights(graph).data_type = 99


def sparse_weights(graph: onnx.GraphProto) -> None:
    tensor = onnx.SparseTensorProto(dims=[2**20, 2**20])
    tensor.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "sparse"))
    tensor.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64)))
    graph.sparse_initializer.append(tensor)


def graphs_inside_of_graphs(graph: onnx.GraphProto) -> None:
    inner = helper.make_graph([], "innermost", [], [])
    for _ in range(20):
        inner = helper.make_graph([helper.make_node("If", ["x"], ["y"], then_branch=inner)], "branch", [], [])
    add_node(graph, "If", "x", then_branch=inner)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (an_operator_of_another_domain, r"an operator ReadFile of the foreign domain com\.example"),
        (one_inside_of_a_branch, r"an operator If, which no fused graph|of the foreign domain"),
        (weights_of_another_file_inside_of_a_branch, r"weights in \.\./\.\./secret, which the manifest does not list"),
        (an_endless_loop, "an operator Loop"),
        (a_tensor_larger_than_its_bytes, r"wpe\.weight has the shape \[1048576, 1048576\], but not the bytes"),
        (a_tensor_of_a_negative_size, r"wpe\.weight has the shape \[-512, -256\]"),
        (a_tensor_larger_than_its_place, r"wpe\.weight needs 1,099,511,627,776 bytes and is said to have 524,288"),
        (a_tensor_beyond_its_file, r"wpe\.weight ends at byte 1,000,000,524,288 of model\.onnx\.data"),
        (a_tensor_in_two_places, "a tensor has two places: location is there twice"),
        (a_place_that_is_no_number, "a tensor's place is '-1', not a number"),
        (a_tensor_of_an_unknown_type, r"wpe\.weight has the unknown type 99"),
        (sparse_weights, "it has sparse tensors"),
        (graphs_inside_of_graphs, "graphs are nested too deeply"),
    ],
)
def test_a_hostile_graph(folder: Path, edit: Callable[[onnx.GraphProto], None], message: str) -> None:
    edit_graph(folder, edit)
    with pytest.raises(ModelFolderError, match=message):
        gpt2_edge.load(folder, device="cpu", verify_hashes=False)
    with pytest.raises(ModelFolderError, match=message):
        gpt2_edge.load(folder, device="cpu")


HUGE: Final = 2**40


@pytest.mark.parametrize("flavour", ["fused", "standard"])
@pytest.mark.parametrize(
    "bomb",
    [
        lambda graph: add_node(graph, "ConstantOfShape", constant(graph, HUGE)),
        lambda graph: add_node(graph, "Expand", constant(graph, 1), constant(graph, 2**20, 2**20)),
        lambda graph: add_node(graph, "Tile", constant(graph, 1), constant(graph, HUGE)),
        lambda graph: add_node(graph, "RandomNormal", shape=[2**20, 2**20]),
        lambda graph: add_node(graph, "ConstantOfShape", constant(graph, *[1] * 200)),
    ],
    ids=["ConstantOfShape", "Expand", "Tile", "RandomNormal", "a shape that is too long to read"],
)
def test_an_operator_that_makes_much_of_little(
    folder: Path, bomb: Callable[[onnx.GraphProto], None], flavour: str
) -> None:
    edit_graph(folder, bomb)
    reseal(folder, flavour=flavour)
    with pytest.raises(ModelFolderError, match=r"which no fused graph of ours has|makes a tensor of more than"):
        gpt2_edge.load(folder, device="cpu")


@pytest.mark.parametrize("part", ["functions", "training_info"])
def test_parts_that_hide_other_graphs_are_refused(folder: Path, part: str) -> None:
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    getattr(model, part).add()
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
    with pytest.raises(ModelFolderError, match=r"functions of its own|training information"):
        gpt2_edge.load(folder, device="cpu")


def test_a_second_graph_that_is_merged_into_the_first_is_refused(folder: Path) -> None:
    second = onnx.ModelProto()
    second.graph.node.append(helper.make_node("ReadFile", ["input_ids"], ["x"], domain="com.example"))
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes() + second.SerializeToString())
    reseal(folder)
    with pytest.raises(ModelFolderError, match="field 7 is there twice"):
        gpt2_edge.load(folder, device="cpu")


@pytest.mark.parametrize("length", [0, 1, 100, 10_000, 30_952])
def test_a_graph_that_is_cut_off(folder: Path, length: int) -> None:
    whole = (folder / "model.onnx").read_bytes()
    (folder / "model.onnx").write_bytes(whole[:length])
    reseal(folder)
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        gpt2_edge.load(folder, device="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_what_no_reader_foresees_ends_in_one_line_too(folder: Path) -> None:
    """An outer product of two short constants: 64 GB, for which ONNX Runtime finds no memory."""

    def outer_product(graph: onnx.GraphProto) -> None:
        graph.initializer.append(numpy_helper.from_array(np.ones((1 << 17, 1), np.float32), "column"))
        graph.initializer.append(numpy_helper.from_array(np.ones((1, 1 << 17), np.float32), "row"))
        add_node(graph, "MatMul", "column", "row")

    edit_graph(folder, outer_product)
    refusal_in_little_memory(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["wpe.weight", "h.0.ln_1.weight", "h.5.mlp.c_proj.weight.bias"])
def test_weights_that_are_not_finite(folder: Path, name: str, value: float) -> None:
    places = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    }
    with (folder / "model.onnx.data").open("r+b") as file:
        file.seek(int(places[name]["offset"]) + int(places[name]["length"]) - 4)
        file.write(np.float32(value).tobytes())
    reseal(folder)
    with pytest.raises(ModelFolderError, match=f"weights that are not finite, in {re.escape(name)}"):
        gpt2_edge.load(folder, device="cpu")


# Damaged at random; `tests/fuzz.py` tries as many as one likes.


@pytest.mark.parametrize("name", ["manifest", "graph reader", "graph check", "pack"])
def test_damaged_files_are_accepted_or_refused(name: str, tmp_path: Path) -> None:
    good, reader = fuzz.readers(tmp_path)[name]
    outcomes, findings = fuzz.try_inputs(name, good, reader, inputs=60, seed=0)
    assert findings == []
    assert outcomes["refused"] > 10
