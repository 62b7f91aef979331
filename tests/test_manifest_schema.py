"""The published schema of `manifest.json`, and the reader, say the same."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import hypothesis.strategies as st
import jsonschema
import pytest
from hypothesis import example, given, settings

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import CACHE_NUMBER_BYTES, FLAVOURS, PRECISIONS, parse_manifest

Json = Any
REPOSITORY: Final = Path(__file__).resolve().parent.parent
SCHEMA: Final = json.loads((REPOSITORY / "docs" / "manifest.schema.json").read_text(encoding="utf-8"))
VALIDATOR: Final = jsonschema.Draft202012Validator(SCHEMA)
BUNDLED: Final = json.loads(open_folder("storyteller").manifest_bytes)
EXAMPLES: Final = int(os.environ.get("GPT2_EDGE_FUZZ_EXAMPLES", "300"))
# What the schema cannot say, and its description does.
BEYOND_THE_SCHEMA: Final = re.compile(r"lists a name twice|files does not list|the vocabulary has tokens")


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_knows_the_same_choices() -> None:
    assert set(SCHEMA["properties"]["flavour"]["enum"]) == set(FLAVOURS)
    assert set(SCHEMA["properties"]["precision"]["enum"]) == set(PRECISIONS)
    assert set(SCHEMA["properties"]["cache_precision"]["enum"]) == set(CACHE_NUMBER_BYTES)


def test_manifests_that_we_write(storyteller_fp32: Path, storyteller_int8: Path) -> None:
    for folder in ("storyteller", storyteller_fp32, storyteller_int8):
        VALIDATOR.validate(json.loads(open_folder(folder).manifest_bytes))


def places(document: Json, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the paths of all values inside a document."""
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


# Integral floats are left out: to JSON Schema 1.0 is an integer, to the reader it is not.
VALUES: Final = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 2**40, 2**40 + 1, 10_000, 10_001, 8191, 8192, 10**30, 1.5, -0.5, 1e-300]),
    st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\n"), max_size=12),
    st.sampled_from(["fp32", "fp16", "int4", "standard", "fused", "1.31", "1.٣", "a" * 64, "model.onnx", "../x", "-"]),
    st.lists(st.integers(0, 3), max_size=3),
    st.dictionaries(st.sampled_from(["decoder", "name", "x"]), st.sampled_from(["model.onnx", "a/b", 1]), max_size=2),
)


@st.composite
def mutations(draw: st.DrawFn) -> Json:
    """A manifest of which up to three values were replaced, removed or added."""
    document = json.loads(json.dumps(BUNDLED))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(places(document)))
        if not place:
            continue
        parent = document
        for key in place[:-1]:
            parent = parent[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            parent[place[-1]] = draw(VALUES)
        elif action == "remove":
            del parent[place[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=4))] = draw(VALUES)
        else:
            parent.append(draw(VALUES))
    return document


@given(document=mutations() | VALUES)
@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 300, database=None)
@example(document=BUNDLED | {"minimum_onnxruntime": "1.٣"})
@example(document=BUNDLED | {"files": BUNDLED["files"] * 34})
@example(document=BUNDLED | {"precision": "int2"})
@example(document=BUNDLED | {"format_version": True})
def test_the_schema_and_the_reader_agree(document: Json) -> None:
    try:
        parse_manifest(json.dumps(document))
        refusal = None
    except ModelFolderError as error:
        refusal = str(error)
    except RecursionError:  # pragma: no cover - the depth of these documents is small
        pytest.fail("the reader gave up")
    if VALIDATOR.is_valid(document):
        assert refusal is None or BEYOND_THE_SCHEMA.search(refusal), refusal
    else:
        assert refusal is not None, document


@given(text=st.text(max_size=200) | st.recursive(VALUES, lambda inner: st.lists(inner), max_leaves=20).map(json.dumps))
@settings(max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES == 300, database=None)
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    refusal = ""
    try:
        parse_manifest(text)
    except ModelFolderError as error:
        refusal = str(error)
    assert "\n" not in refusal
    assert len(refusal) < 400


@pytest.mark.parametrize("place", ["format_version", "files.0.sha256", "measured.x"])
def test_a_name_that_is_there_twice_is_refused(place: str) -> None:
    """Of two values a signature could be meant for the one and a program take the other."""
    text = json.dumps(BUNDLED)
    name = place.split(".")[0]
    with pytest.raises(ModelFolderError, match="a name twice"):
        parse_manifest(text[:-1] + f', "{name}": {json.dumps(BUNDLED[name])}}}')


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_manifest_of_nothing_but_brackets_takes_little_memory() -> None:
    program = (
        "import resource, gpt2_edge.manifest as m, gpt2_edge.errors as e\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))\n"
        "try: m.parse_manifest('[' * m.MANIFEST_LIMIT_BYTES)\n"
        "except e.ModelFolderError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "is not JSON" in done.stdout, done.stderr
