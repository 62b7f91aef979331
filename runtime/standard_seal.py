"""Seal a folder with a GPT-2 that optimum exported: check that it runs, and write the manifest that it lacks."""

import shutil
from pathlib import Path

from gpt2_edge.checked_loading import checked
from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import TOKENIZER_NAME, ModelFolder
from gpt2_edge.manifest import MANIFEST_NAME, Manifest, parse_manifest
from gpt2_edge.seal import check_destination, new_folder, write_file, write_manifest
from gpt2_edge.standard_folder import open_unsealed
from gpt2_edge.standard_session import StandardStepSession
from gpt2_edge.tokenizer import Tokenizer


def seal_folder(folder: Path, destination: Path | None = None, graph_name: str | None = None) -> Manifest:
    """Write the manifest of a folder that has none, after its graph has computed a few tokens.

    Args:
        folder: Has `config.json`, `tokenizer.json` and a graph.
        destination: A new folder for copies of the files that belong to the model; None writes the manifest into
            `folder`, where other files may stay: they are not listed.
        graph_name: Which graph; see `open_unsealed`.

    Returns:
        The manifest.

    Raises:
        ModelFolderError: The folder has a manifest already, is no GPT-2 that can be run, or cannot be written.
    """
    if (folder / MANIFEST_NAME).exists():
        raise ModelFolderError(
            f"{folder} is sealed already; if its files were changed on purpose, remove {folder / MANIFEST_NAME}"
        )
    if destination is not None:
        check_destination(destination)
    opened = open_unsealed(folder, graph_name)
    manifest = parse_manifest(opened.manifest.to_json())
    with checked(opened, True):
        Tokenizer(opened.content(TOKENIZER_NAME))
        StandardStepSession(opened, threads=1).close()
    if destination is None:
        _write_into(opened, manifest)
        return manifest
    with new_folder(destination) as new:
        for entry in manifest.files:
            shutil.copyfile(opened.content(entry.name).path, new / entry.name)
        copied = write_manifest(new, manifest)
        if copied.content_sha256 != manifest.content_sha256:
            raise ModelFolderError(f"{folder} was changed while it was copied: run it again")
    return copied


def _write_into(opened: ModelFolder, manifest: Manifest) -> None:
    path = opened.path / MANIFEST_NAME
    try:
        write_file(path, [manifest.to_json().encode()])
    except OSError as error:
        raise ModelFolderError(
            f"cannot write {path}: {error.strerror or error}; seal a copy with -o FOLDER instead"
        ) from error
