"""A session file is taken from anybody: whatever is in it, it is a session of the model or refused."""

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import pytest

import gpt2_edge
from gpt2_edge import SessionError

FORMAT: Final = b"gpt2-edge session 1\n"


def saved(model: gpt2_edge.Model, path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the keys and values of a saved session."""
    session = model.session()
    session.append("The old king")
    session.generate(max_new_tokens=3, temperature=1.0, seed=1)
    session.save(path)
    _, _, header, values = path.read_bytes().split(b"\n", 3)
    return json.loads(header), values


def write(path: Path, header: Any, values: bytes) -> None:
    body = json.dumps(header).encode() + b"\n" + values
    path.write_bytes(FORMAT + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def test_a_file_that_is_written_the_same_is_taken(int8_model: gpt2_edge.Model, tmp_path: Path) -> None:
    header, values = saved(int8_model, tmp_path / "state")
    write(tmp_path / "state", header, values)
    assert int8_model.load_session(tmp_path / "state").text.startswith("The old king")


@pytest.mark.parametrize(
    "change",
    [
        *({"prompt": value} for value in (None, "abc", [1.5], [True], [-1], [8192], [[1]], [7] * 600, {})),
        *({"continuation": value} for value in (None, [2**70], ["a"])),
        *({"cached_tokens": value} for value in (None, -1, 1.0, True, 10**9, 7)),
        *({"seed": value} for value in (-1, 2**64, 1.5, "1", True)),
        *({"draws": value} for value in (None, -1, 2**70, 0.5)),
    ],
    ids=str,
)
def test_what_the_model_could_not_go_on_with_is_refused(
    int8_model: gpt2_edge.Model, tmp_path: Path, change: dict[str, Any]
) -> None:
    header, values = saved(int8_model, tmp_path / "state")
    write(tmp_path / "state", header | change, values)
    with pytest.raises(SessionError, match="is damaged: it holds"):
        int8_model.load_session(tmp_path / "state")


@pytest.mark.parametrize("name", ["prompt", "continuation", "cached_tokens", "seed", "draws", "model"])
def test_a_header_that_lacks_something_is_refused(int8_model: gpt2_edge.Model, tmp_path: Path, name: str) -> None:
    header, values = saved(int8_model, tmp_path / "state")
    del header[name]
    write(tmp_path / "state", header, values)
    with pytest.raises(SessionError):
        int8_model.load_session(tmp_path / "state")


@pytest.mark.parametrize("header", [None, [], 5, "text"])
def test_a_header_of_another_kind_is_refused(int8_model: gpt2_edge.Model, tmp_path: Path, header: Any) -> None:
    write(tmp_path / "state", header, b"")
    with pytest.raises(SessionError):
        int8_model.load_session(tmp_path / "state")


@pytest.mark.parametrize("path", ["no\0path", ".", "nothing/here/state"])
def test_what_is_no_path_of_a_file(int8_model: gpt2_edge.Model, path: str) -> None:
    with pytest.raises(SessionError, match="cannot read"):
        int8_model.load_session(path)
    with pytest.raises(SessionError, match="cannot write"):
        int8_model.session().save(path)
