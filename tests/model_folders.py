"""Change model folders and seal them again, as somebody who means harm would."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import onnx

from gpt2_edge.folder import file_sha256, open_folder
from gpt2_edge.manifest import MANIFEST_NAME

Json = Any
SHA256: Final = "0123456789abcdef" * 4


def manifest_document() -> dict[str, Json]:
    """Return a manifest that is right, of a model that there is not."""
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
