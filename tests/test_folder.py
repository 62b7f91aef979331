"""Model folders: what a manifest may say, what a folder must hold, and which graphs are run."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import onnx
import onnxruntime
import pytest
from model_folders import changed, edit_graph, reseal
from onnx import TensorProto, helper

import gpt2_edge
from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import BUNDLED_MODELS, open_folder
from gpt2_edge.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, parse_manifest

Json = Any
SHA256: Final = "0123456789abcdef" * 4


def valid_document() -> dict[str, Json]:
    return {
        "format_version": 1,
        "architecture": {
            "layers": 2,
            "heads": 4,
            "head_size": 8,
            "width": 32,
            "inner_width": 128,
            "context_length": 16,
            "vocabulary_size": 100,
            "activation": "gelu_new",
            "tied_head": True,
        },
        "flavour": "fused",
        "precision": "fp32",
        "recipe": None,
        "graphs": {"decoder": "model.onnx"},
        "end_of_text": 0,
        "source": {"name": "made up"},
        "tools": {},
        "minimum_onnxruntime": "1.20",
        "measured": {},
        "files": [
            {"name": "model.onnx", "size_bytes": 5, "sha256": SHA256},
            {"name": "tokenizer.json", "size_bytes": 0, "sha256": SHA256},
        ],
    }


def parse(document: Json) -> Any:
    return parse_manifest(json.dumps(document))


def removed(document: dict[str, Json], path: str) -> dict[str, Json]:
    *parents, last = path.split(".")
    place: Json = document
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    del place[last]
    return document


# The manifest.


INTEGERS: Final = (
    "format_version",
    *(
        f"architecture.{name}"
        for name in ("layers", "heads", "head_size", "width", "inner_width", "context_length", "vocabulary_size")
    ),
    "files.0.size_bytes",
)
STRINGS: Final = (
    "architecture.activation",
    "flavour",
    "precision",
    "graphs.decoder",
    "minimum_onnxruntime",
    "files.0.name",
    "files.1.sha256",
)
OBJECTS: Final = ("architecture", "graphs", "source", "tools", "measured", "files.1")
WRONG_TYPES: Final = [
    *((field, value) for field in INTEGERS for value in (None, True, 1.0, "1", [1], {})),
    *((field, value) for field in STRINGS for value in (None, True, 1, ["fp32"], {})),
    *((field, value) for field in OBJECTS for value in (None, False, 3, "x", [])),
    *(("architecture.tied_head", value) for value in (None, 1, "true", [], {})),
    *(("end_of_text", value) for value in (True, 0.0, "0", [], {})),
    *(("recipe", value) for value in (False, 1, "int8", [])),
    *(("files", value) for value in (None, True, 1, "model.onnx", {})),
]
REQUIRED: Final = (
    *INTEGERS,
    *STRINGS,
    *(name for name in OBJECTS if name != "files.1"),
    "architecture.tied_head",
    "end_of_text",
    "recipe",
    "files",
)


def test_a_valid_manifest() -> None:
    manifest = parse(valid_document())
    assert manifest.architecture.layers == 2
    assert [entry.name for entry in manifest.files] == ["model.onnx", "tokenizer.json"]
    assert manifest.size_bytes == 5
    assert parse_manifest(manifest.to_json()) == manifest


def test_unknown_fields_are_ignored() -> None:
    """So that a later release may add some without a new format version."""
    assert parse(valid_document() | {"new": 1}) == parse(valid_document())


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ModelFolderError, match=rf"has no {field.split('.')[-1]}\b"):
        parse(removed(valid_document(), field))


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES, ids=str)
def test_a_field_of_a_wrong_type_is_named(field: str, value: Json) -> None:
    name = field.split(".")[-1].replace("1", "files[1]")
    with pytest.raises(ModelFolderError, match=f"{re.escape(name)}.* is {re.escape(json.dumps(value))}, expected "):
        parse(changed(valid_document(), field, value))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in INTEGERS[1:-1] for value in (0, -1)),
        ("files.0.size_bytes", -1),
        ("flavour", "eager"),
        ("precision", "FP32"),
        ("end_of_text", -1),
        ("end_of_text", 100),
        *(("minimum_onnxruntime", value) for value in ("", "new", "1.x", "1.31rc1", "-1", "1..2", "1.2.3.4.5", " 1")),
        *(("files.0.sha256", value) for value in ("", "0" * 63, "0" * 65, "G" * 64, "A" * 64, SHA256 + "\n")),
    ],
)
def test_a_field_with_a_value_that_is_not_allowed_is_named(field: str, value: Json) -> None:
    with pytest.raises(ModelFolderError, match=rf"\b{field.split('.')[-1]} is {re.escape(json.dumps(value)[:50])}"):
        parse(changed(valid_document(), field, value))


@pytest.mark.parametrize("field", ["graphs.decoder", "files.0.name"])
@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../x",
        "/etc/passwd",
        "a/b",
        "a\\b",
        "C:x",
        ".hidden",
        "-x",
        "a b",
        "a\x00b",
        "a\n",
        "ä",
        "x" * 129,
    ],
)
def test_a_hostile_file_name_is_refused(field: str, name: str) -> None:
    with pytest.raises(ModelFolderError, match="expected a plain file name"):
        parse(changed(valid_document(), field, name))


@pytest.mark.parametrize(("version", "advice"), [(0, "export the model again"), (2, "upgrade gpt2-edge"), (10**30, "")])
def test_another_format_version_says_what_to_do(version: int, advice: str) -> None:
    with pytest.raises(ModelFolderError, match=f"format version {version}.*reads version 1.*{advice}"):
        parse({"format_version": version})


def test_a_name_listed_twice_is_refused() -> None:
    document = valid_document()
    document["files"].append(document["files"][0])
    with pytest.raises(ModelFolderError, match="files lists a name twice"):
        parse(document)


def test_a_graph_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ModelFolderError, match=r"files does not list other\.onnx"):
        parse(changed(valid_document(), "graphs.decoder", "other.onnx"))


def test_a_decoder_is_required() -> None:
    with pytest.raises(ModelFolderError, match="graphs has no decoder"):
        parse(changed(valid_document(), "graphs", {"prefill": "model.onnx"}))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="unfinished"),
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep lists"),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="deep objects"),
        pytest.param(json.dumps(valid_document())[:-1] + ', "deep": ' + "[" * 100_000 + "}", id="deep inside"),
        pytest.param('{"format_version": 1' + "0" * 5000 + "}", id="a number of 5,000 digits"),
    ],
)
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ModelFolderError, match="is not JSON"):
        parse_manifest(text)


@pytest.mark.parametrize("text", ["null", "[]", "3", '"text"', "NaN", "[[]]"])
def test_json_that_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ModelFolderError, match=re.escape(f"is {text}, expected an object")):
        parse_manifest(text)


def test_long_values_are_cut_in_the_message() -> None:
    with pytest.raises(ModelFolderError, match=r"flavour is .*\.\.\.") as caught:
        parse(changed(valid_document(), "flavour", "x" * 100_000))
    assert len(str(caught.value)) < 300


# The folder.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose files are what its manifest says, though no model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "tokenizer.json").write_bytes(b"{}")
    reseal(folder, valid_document())
    return folder


@pytest.fixture
def model_copy(storyteller_int8: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the storyteller that may be changed."""
    copy = tmp_path / "copy"
    shutil.copytree(storyteller_int8, copy)
    yield copy
    shutil.rmtree(copy)


def test_a_sound_folder(folder: Path) -> None:
    opened = open_folder(folder)
    opened.check_hashes()
    assert opened.path == folder.resolve()
    assert opened.graph_path == folder / "model.onnx"
    assert open_folder(str(folder)).manifest == opened.manifest


def nothing(place: Path) -> None:
    pass


def a_file(place: Path) -> None:
    place.write_text("text")


def an_empty_folder(place: Path) -> None:
    place.mkdir()


def a_checkpoint(place: Path) -> None:
    place.mkdir()
    (place / "config.json").write_text("{}")


def a_folder_as_manifest(place: Path) -> None:
    (place / MANIFEST_NAME).mkdir(parents=True)


def a_huge_manifest(place: Path) -> None:
    place.mkdir()
    with (place / MANIFEST_NAME).open("wb") as file:
        file.truncate(MANIFEST_LIMIT_BYTES + 1)


def a_manifest_that_is_no_text(place: Path) -> None:
    place.mkdir()
    (place / MANIFEST_NAME).write_bytes(b'{"format_version": "\xff"}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nothing, "place does not exist: give the path of a model folder, or storyteller"),
        (a_file, "place is a file: give the model folder that it lies in"),
        (an_empty_folder, "place is not a model folder: it has no manifest.json"),
        (a_checkpoint, "place is a checkpoint, not a model folder: make one with `gpt2-edge export "),
        (a_folder_as_manifest, "place is not a model folder"),
        (a_huge_manifest, "manifest.json is larger than 1,000,000 bytes"),
        (a_manifest_that_is_no_text, "cannot read .*manifest.json"),
    ],
)
def test_what_is_no_model_folder(tmp_path: Path, make: Callable[[Path], None], message: str) -> None:
    make(tmp_path / "place")
    with pytest.raises(ModelFolderError, match=message):
        open_folder(tmp_path / "place")


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b"], ids=["a name that is too long", "a NUL in the name"])
def test_names_that_no_file_system_takes(name: str) -> None:
    with pytest.raises(ModelFolderError):
        open_folder(name)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFolderError, match=r"is incomplete: tokenizer\.json is missing"):
        open_folder(folder)


def test_a_folder_in_the_place_of_a_file_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").mkdir()
    with pytest.raises(ModelFolderError, match=r"tokenizer\.json is missing"):
        open_folder(folder)


@pytest.mark.parametrize("content", [b"", b"grap", b"graph "])
def test_a_file_of_another_size_is_named(folder: Path, content: bytes) -> None:
    (folder / "model.onnx").write_bytes(content)
    with pytest.raises(ModelFolderError, match=rf"model\.onnx is damaged: it has {len(content)} bytes.*says 5"):
        open_folder(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    reseal(folder)
    with pytest.raises(ModelFolderError, match=r"has no tokenizer\.json"):
        open_folder(folder)


def test_a_changed_byte_is_found_by_its_hash(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"Graph")
    opened = open_folder(folder)
    with pytest.raises(ModelFolderError, match=r"model\.onnx is damaged: its SHA-256 is"):
        opened.check_hashes()


def test_loading_checks_the_hashes_unless_told_not_to(model_copy: Path) -> None:
    with (model_copy / "model.onnx.data").open("r+b") as weights:
        weights.seek(1_000_000)
        byte = weights.read(1)[0]
        weights.seek(1_000_000)
        weights.write(bytes([byte ^ 1]))
    with pytest.raises(ModelFolderError, match=r"model\.onnx\.data is damaged: its SHA-256 is"):
        gpt2_edge.load(model_copy)
    with gpt2_edge.load(model_copy, verify_hashes=False) as model:
        assert model.generate("Once", max_new_tokens=1).finish_reason == "length"


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    with pytest.raises(ModelFolderError, match=f"{name} is a link that leads out of the model folder"):
        open_folder(folder)


def test_a_link_to_nothing_is_a_missing_file(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to(folder / "gone")
    with pytest.raises(ModelFolderError, match=r"model\.onnx is missing"):
        open_folder(folder)


def test_a_folder_of_links_to_one_folder_is_accepted(folder: Path, tmp_path: Path) -> None:
    """As a strict editable installation makes it."""
    links = folder_of_links(folder, tmp_path / "links")
    opened = open_folder(links)
    opened.check_hashes()
    assert opened.path == folder.resolve()


def test_a_model_is_loaded_through_links(storyteller_int8: Path, tmp_path: Path) -> None:
    links = folder_of_links(storyteller_int8, tmp_path / "links")
    (tmp_path / "link").symlink_to(links)
    with gpt2_edge.load(tmp_path / "link") as model:
        assert model.generate("Once", max_new_tokens=1).finish_reason == "length"


def test_links_to_several_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    links = folder_of_links(folder, tmp_path / "links")
    (links / "model.onnx").unlink()
    (tmp_path / "model.onnx").write_bytes(b"graph")
    (links / "model.onnx").symlink_to(tmp_path / "model.onnx")
    with pytest.raises(ModelFolderError, match=r"model\.onnx is a link that leads out"):
        open_folder(links)


def folder_of_links(folder: Path, links: Path) -> Path:
    links.mkdir()
    for file in folder.iterdir():
        (links / file.name).symlink_to(file)
    return links


# The bundled model.


def test_the_bundled_model_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of that name in the working directory changes nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "storyteller").mkdir()
    with gpt2_edge.load("storyteller") as model:
        assert model.generate("Once upon a time", max_new_tokens=3).text
    with pytest.raises(ModelFolderError, match="is not a model folder"):
        gpt2_edge.load("./storyteller")


def test_a_bundled_model_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2_edge.folder.BUNDLED_MODELS", (*BUNDLED_MODELS, "no-such-model"))
    with pytest.raises(ModelFolderError, match="the bundled model no-such-model is missing from this installation"):
        open_folder("no-such-model")


# The graph.


def value_named(values: Iterator[onnx.ValueInfoProto], name: str) -> onnx.ValueInfoProto:
    return next(value for value in values if value.name == name)


def use_instead(graph: onnx.GraphProto, name: str, replacement: str) -> None:
    for node in graph.node:
        node.input[:] = [replacement if each == name else each for each in node.input]


def add_an_input(graph: onnx.GraphProto) -> None:
    graph.input.append(helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "sequence"]))


def fix_an_input(graph: onnx.GraphProto) -> None:
    graph.input.remove(value_named(graph.input, "logit_positions"))
    graph.initializer.append(helper.make_tensor("logit_positions", TensorProto.INT64, [1], [0]))


def rename_an_input(graph: onnx.GraphProto) -> None:
    value_named(graph.input, "position_ids").name = "positions"
    use_instead(graph, "position_ids", "positions")


def retype_an_input(graph: onnx.GraphProto) -> None:
    value_named(graph.input, "seqlens_k").type.tensor_type.elem_type = TensorProto.INT64
    use_instead(graph, "seqlens_k", "seqlens_k_32")
    graph.node.insert(0, helper.make_node("Cast", ["seqlens_k"], ["seqlens_k_32"], to=TensorProto.INT32))


def fix_a_dimension(graph: onnx.GraphProto) -> None:
    dimension = value_named(graph.input, "input_ids").type.tensor_type.shape.dim[0]
    dimension.ClearField("dim_param")
    dimension.dim_value = 1


def add_an_output(graph: onnx.GraphProto) -> None:
    graph.output.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["n", 8192]))
    graph.node.append(helper.make_node("Identity", ["logits"], ["more"]))


def drop_an_output(graph: onnx.GraphProto) -> None:
    graph.output.remove(value_named(graph.output, "present.5.value"))


def rename_the_logits(graph: onnx.GraphProto) -> None:
    value_named(graph.output, "logits").name = "scores"
    graph.node.append(helper.make_node("Identity", ["logits"], ["scores"]))


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (add_an_input, "inputs differ: attention_mask is unknown"),
        (fix_an_input, "inputs differ: logit_positions is missing"),
        (rename_an_input, "inputs differ: position_ids is missing; positions is unknown"),
        (retype_an_input, r"inputs differ: seqlens_k is .*int64.*expected .*int32"),
        (fix_a_dimension, r"inputs differ: input_ids is .*\[1, None\]"),
        (add_an_output, "outputs differ: more is unknown"),
        (drop_an_output, r"outputs differ: present\.5\.value is missing"),
        (rename_the_logits, "outputs differ: logits is missing; scores is unknown"),
    ],
)
def test_a_graph_with_another_signature_is_refused(
    model_copy: Path, edit: Callable[[onnx.GraphProto], None], named: str
) -> None:
    edit_graph(model_copy, edit)
    with pytest.raises(ModelFolderError, match=named):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("layers", 5, r"past_key_values\.5\.key is unknown"),
        ("layers", 7, r"past_key_values\.6\.key is missing"),
        ("heads", 8, r"past_key_values\.0\.key is .*4.*expected .*8"),
        ("head_size", 32, r"past_key_values\.0\.key is .*64.*expected .*32"),
        ("vocabulary_size", 8100, r"logits is .*8192.*expected .*8100"),
        ("vocabulary_size", 8200, "embeddings for 8192 tokens, the manifest has vocabulary_size 8200"),
        ("context_length", 513, "embeddings for 512 positions, the manifest has context_length 513"),
    ],
)
def test_a_manifest_that_describes_another_graph_is_refused(
    model_copy: Path, field: str, value: int, named: str
) -> None:
    reseal(model_copy, **{f"architecture__{field}": value})
    with pytest.raises(ModelFolderError, match=named):
        gpt2_edge.load(model_copy)


def test_a_context_that_the_graph_does_not_have_is_refused(model_copy: Path) -> None:
    reseal(model_copy, architecture__context_length=10**12)
    with pytest.raises(ModelFolderError, match="context_length"):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x07"], ids=["empty", "text", "half a header"])
def test_a_file_that_is_no_graph_is_refused(model_copy: Path, content: bytes) -> None:
    (model_copy / "model.onnx").write_bytes(content)
    reseal(model_copy)
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        gpt2_edge.load(model_copy)


def test_weights_that_are_cut_off_are_refused(model_copy: Path) -> None:
    whole = (model_copy / "model.onnx.data").read_bytes()
    (model_copy / "model.onnx.data").unlink()
    (model_copy / "model.onnx.data").write_bytes(whole[: len(whole) // 2])
    reseal(model_copy)
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        gpt2_edge.load(model_copy)


def point_weights_to(location: str) -> Callable[[onnx.GraphProto], None]:
    def edit(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location

    return edit


@pytest.mark.parametrize("location", ["../outside.data", "{parent}/outside.data", "./../outside.data"])
def test_weights_outside_of_the_folder_are_refused(model_copy: Path, location: str) -> None:
    shutil.copy(model_copy / "model.onnx.data", model_copy.parent / "outside.data")
    edit_graph(model_copy, point_weights_to(location.format(parent=model_copy.parent)))
    with pytest.raises(ModelFolderError, match=r"model\.onnx"):
        gpt2_edge.load(model_copy)


def test_weights_that_the_manifest_does_not_list_are_refused(model_copy: Path) -> None:
    """Nobody hashed them."""
    edit_graph(model_copy, point_weights_to("unlisted.data"))
    shutil.copy(model_copy / "model.onnx.data", model_copy / "unlisted.data")
    with pytest.raises(ModelFolderError, match=r"unlisted\.data"):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize("installed", ["1.21.1", "1.21.0.dev20250101", "1.9.1", "0.99"])
def test_an_onnxruntime_that_is_too_old_is_named(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    reseal(model_copy, minimum_onnxruntime="1.22")
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    message = f"needs ONNX Runtime 1.22 or newer, {installed} is installed: run pip install --upgrade onnxruntime"
    with pytest.raises(ModelFolderError, match=re.escape(message)):
        gpt2_edge.load(model_copy)


@pytest.mark.parametrize(
    ("needed", "installed"),
    [
        *(("1.22", version) for version in ("1.22", "1.22.0", "1.22.1", "1.32.0.dev20261101001", "1.100.0", "2.0.0")),
        *(("1.22", version) for version in ("1.22.0+cpu", "1.23.0rc1")),
        *(("1.22.0.0", version) for version in ("1.22", "1.22.0")),
    ],
)
def test_an_onnxruntime_that_is_new_enough_is_accepted(
    model_copy: Path, monkeypatch: pytest.MonkeyPatch, needed: str, installed: str
) -> None:
    reseal(model_copy, minimum_onnxruntime=needed)
    monkeypatch.setattr(onnxruntime, "__version__", installed)
    with gpt2_edge.load(model_copy) as model:
        assert model.generate("Once", max_new_tokens=1).finish_reason == "length"
