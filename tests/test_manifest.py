"""What a manifest may say."""

import json
import re
from typing import Any, Final

import pytest
from model_folders import SHA256, Json, changed, manifest_document

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.manifest import parse_manifest


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
    manifest = parse(manifest_document())
    assert manifest.architecture.layers == 2
    assert [entry.name for entry in manifest.files] == ["model.onnx", "tokenizer.json"]
    assert manifest.size_bytes == 5
    assert parse_manifest(manifest.to_json()) == manifest


def test_unknown_fields_are_ignored() -> None:
    """So that a later release may add some without a new format version."""
    assert parse(manifest_document() | {"new": 1}) == parse(manifest_document())


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    with pytest.raises(ModelFolderError, match=rf"has no {field.split('.')[-1]}\b"):
        parse(removed(manifest_document(), field))


@pytest.mark.parametrize(("field", "value"), WRONG_TYPES, ids=str)
def test_a_field_of_a_wrong_type_is_named(field: str, value: Json) -> None:
    name = field.split(".")[-1].replace("1", "files[1]")
    with pytest.raises(ModelFolderError, match=f"{re.escape(name)}.* is {re.escape(json.dumps(value))}, expected "):
        parse(changed(manifest_document(), field, value))


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
        parse(changed(manifest_document(), field, value))


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
        parse(changed(manifest_document(), field, name))


@pytest.mark.parametrize(("version", "advice"), [(0, "export the model again"), (2, "upgrade gpt2-edge"), (10**30, "")])
def test_another_format_version_says_what_to_do(version: int, advice: str) -> None:
    with pytest.raises(ModelFolderError, match=f"format version {version}.*reads version 1.*{advice}"):
        parse({"format_version": version})


def test_a_name_listed_twice_is_refused() -> None:
    document = manifest_document()
    document["files"].append(document["files"][0])
    with pytest.raises(ModelFolderError, match="files lists a name twice"):
        parse(document)


def test_a_graph_that_is_not_listed_is_refused() -> None:
    with pytest.raises(ModelFolderError, match=r"files does not list other\.onnx"):
        parse(changed(manifest_document(), "graphs.decoder", "other.onnx"))


def test_a_decoder_is_required() -> None:
    with pytest.raises(ModelFolderError, match="graphs has no decoder"):
        parse(changed(manifest_document(), "graphs", {"prefill": "model.onnx"}))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="empty"),
        pytest.param("{", id="unfinished"),
        pytest.param("[" * 100_000 + "]" * 100_000, id="deep lists"),
        pytest.param('{"a":' * 100_000 + "1" + "}" * 100_000, id="deep objects"),
        pytest.param(json.dumps(manifest_document())[:-1] + ', "deep": ' + "[" * 100_000 + "}", id="deep inside"),
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
        parse(changed(manifest_document(), "flavour", "x" * 100_000))
    assert len(str(caught.value)) < 300
