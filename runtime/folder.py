"""Open a model folder: find it, check its manifest, its paths and its hashes before anything in it is run."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, FileEntry, Manifest, parse_manifest

BUNDLED_MODELS: Final = ("storyteller",)
TOKENIZER_NAME: Final = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder whose manifest was read and whose paths are safe to open.

    Attributes:
        path: The folder that really holds the files, symbolic links followed.
        manifest: Its manifest.
    """

    path: Path
    manifest: Manifest

    @property
    def graph_path(self) -> Path:
        """Path of the decoder's ONNX graph."""
        return self.path / self.manifest.graphs["decoder"]

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer."""
        return self.path / TOKENIZER_NAME

    def check_hashes(self) -> None:
        """Compare every file with the manifest's SHA-256.

        Raises:
            ModelFolderError: A file is not what the manifest says.
        """
        # hashlib gives the interpreter up while it hashes, so threads run side by side.
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda entry: file_sha256(self.path / entry.name), self.manifest.files)
            for entry, sha256 in zip(self.manifest.files, hashes, strict=True):
                if sha256 != entry.sha256:
                    raise ModelFolderError(
                        f"{self.path / entry.name} is damaged: its SHA-256 is {sha256[:12]}..., the manifest "
                        f"has {entry.sha256[:12]}...: copy the folder again or make it anew"
                    )


def open_folder(folder: str | Path) -> ModelFolder:
    """Open a model folder, or the bundled model of that name, without hashing its files.

    Args:
        folder: Path of a model folder, or "storyteller". A folder of that name in the working directory is not
            meant: write "./storyteller" for it.

    Returns:
        The folder, with every listed file present, of the listed size and inside the folder.

    Raises:
        ModelFolderError: It is not a model folder, or one that cannot be used.
    """
    try:
        return _open(folder)
    except OSError as error:
        raise ModelFolderError(f"cannot read {folder}: {error.strerror or error}") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _open(folder: str | Path) -> ModelFolder:
    if not isinstance(folder, str | Path):
        raise ModelFolderError(f"a model folder is a path or a name, not {folder!r}")
    # A `Path` is always meant as a path: that of "./storyteller" has lost its "./".
    path = _bundled_path(folder) if isinstance(folder, str) and folder in BUNDLED_MODELS else Path(folder)
    manifest_path = path / MANIFEST_NAME
    if not path.exists():
        raise ModelFolderError(
            f"{path} does not exist: give the path of a model folder, or {' or '.join(BUNDLED_MODELS)} "
            "for a bundled model"
        )
    if not manifest_path.is_file():
        raise ModelFolderError(_say_what_it_is_instead(path))
    if manifest_path.stat().st_size > MANIFEST_LIMIT_BYTES:
        raise ModelFolderError(f"{manifest_path} is larger than {MANIFEST_LIMIT_BYTES:,} bytes: not a manifest")
    try:
        manifest = parse_manifest(manifest_path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"cannot read {manifest_path}: it is not UTF-8: {error}") from error
    # An installation may consist of links, one for each file, so what counts is where they lead: the files of one
    # model all lie in the folder that really holds its manifest.
    home = manifest_path.resolve().parent
    for entry in manifest.files:
        _check_entry(path, home, entry)
    if TOKENIZER_NAME not in {entry.name for entry in manifest.files}:
        raise ModelFolderError(f"{path} has no {TOKENIZER_NAME}: export the model again")
    return ModelFolder(home, manifest)


def _check_entry(path: Path, home: Path, entry: FileEntry) -> None:
    file = path / entry.name
    if not file.is_file():
        raise ModelFolderError(f"{path} is incomplete: {entry.name} is missing; copy the folder again")
    if file.resolve() != home / entry.name:
        raise ModelFolderError(
            f"{file} is a link that leads out of the model folder, to {file.resolve()}: replace it by the file"
        )
    size = file.stat().st_size
    if size != entry.size_bytes:
        raise ModelFolderError(
            f"{file} is damaged: it has {size:,} bytes, the manifest says {entry.size_bytes:,}; "
            "copy the folder again or make it anew"
        )


def _say_what_it_is_instead(path: Path) -> str:
    if path.is_file():
        return f"{path} is a file: give the model folder that it lies in"
    if (path / "config.json").is_file():
        return f"{path} is a checkpoint, not a model folder: make one with `gpt2-edge export {path} -o FOLDER`"
    return f"{path} is not a model folder: it has no {MANIFEST_NAME}"


def _bundled_path(name: str) -> Path:
    path = Path(str(resources.files("gpt2_edge"))) / "bundled" / name
    if not path.is_dir():
        raise ModelFolderError(f"the bundled model {name} is missing from this installation: install gpt2-edge again")
    return path
