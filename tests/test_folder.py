"""What a model folder must hold, and where models are looked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
from model_folders import manifest_document, reseal

import gpt2_edge
from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import BUNDLED_MODELS, open_folder
from gpt2_edge.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose files are what its manifest says, though no model."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "tokenizer.json").write_bytes(b"{}")
    reseal(folder, manifest_document())
    return folder


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
        (nothing, "place does not exist: give the path of a model folder or a pack, or storyteller"),
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
