"""Change model folders and seal them again, as somebody who means harm would."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from gpt2_edge.folder import file_sha256, open_folder
from gpt2_edge.manifest import MANIFEST_NAME

Json = Any


def copy_of_storyteller(place: Path) -> Path:
    """Copy the bundled model."""
    shutil.copytree(open_folder("storyteller").path, place)
    return place


def changed(document: dict[str, Json], path: str, value: Json) -> dict[str, Json]:
    """Replace the field at a path such as `files.0.name`."""
    *parents, last = path.split(".")
    place: Json = document
    for part in parents:
        place = place[int(part)] if part.isdigit() else place[part]
    place[int(last) if last.isdigit() else last] = value
    return document


def reseal(folder: Path, document: dict[str, Json] | None = None, **changes: Json) -> None:
    """Write the manifest anew, with the files that are there."""
    manifest = folder / MANIFEST_NAME
    document = document or json.loads(manifest.read_text(encoding="utf-8"))
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST_NAME)
    document["files"] = [
        {"name": name, "size_bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
        for name in names
    ]
    for field, value in changes.items():
        changed(document, field.replace("__", "."), value)
    manifest.unlink(missing_ok=True)
    manifest.write_text(json.dumps(document), encoding="utf-8")


def edit_graph(folder: Path, edit: Callable[[onnx.GraphProto], None]) -> None:
    """Change the graph and seal the folder again."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    reseal(folder)
