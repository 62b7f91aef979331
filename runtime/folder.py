"""Open a model folder or a pack: find it, check its manifest, its paths and its hashes before anything in it is run."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Final

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.file_content import FileContent, OpenFile, whole_file
from gpt2_edge.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, Manifest, parse_manifest
from gpt2_edge.pack_format import SIGNATURE_NAME, is_pack, read_pack

BUNDLED_MODELS: Final = ("storyteller",)
TOKENIZER_NAME: Final = "tokenizer.json"
GRAPH_LIMIT_BYTES: Final = 2**31  # of protocol buffers

_TOKENIZER_LIMIT_BYTES: Final = 64_000_000
_SIGNATURE_LIMIT_BYTES: Final = 1_000


class ModelFolder:
    """A model folder, or a pack of one, whose manifest was read and whose files are open.

    Each file was opened once and is only read through what was opened, so what is hashed is what is run.

    Attributes:
        path: The folder that really holds the files, symbolic links followed; or the pack.
        manifest: Its manifest.
        manifest_bytes: The manifest as it is stored, which a signature is over.
        signature: The signature of the manifest; None if it is not signed.
        is_sealed: Whether the manifest lay with the files. Otherwise it was made of them as they were opened.
    """

    def __init__(
        self,
        path: Path,
        manifest_bytes: bytes,
        manifest: Manifest,
        contents: Mapping[str, FileContent],
        signature: bytes | None,
        *,
        is_sealed: bool = True,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.manifest_bytes = manifest_bytes
        self.signature = signature
        self.is_sealed = is_sealed
        self._contents = contents

    @property
    def graph_path(self) -> Path:
        """Path of the decoder's ONNX graph; inside a pack it only serves messages."""
        return self.content(self.manifest.graphs["decoder"]).path

    @property
    def cuda_graph_path(self) -> Path:
        """Path of the graph that computes the same on a GPU; inside a pack it only serves messages."""
        graphs = self.manifest.graphs
        return self.content(graphs.get("decoder_cuda", graphs["decoder"])).path

    @property
    def tokenizer_path(self) -> Path:
        """Path of the tokenizer; inside a pack it only serves messages."""
        return self.content(TOKENIZER_NAME).path

    @property
    def is_pack(self) -> bool:
        """Whether the files lie in one pack."""
        return all(content.file.path == self.path for content in self._contents.values())

    def content(self, name: str) -> FileContent:
        """Return the bytes of a listed file."""
        return self._contents[name]

    def check_hashes(self, names: Collection[str] | None = None, go_on: Callable[[], bool] = lambda: True) -> None:
        """Compare files with the manifest's SHA-256; one that was computed of these files needs no comparison.

        Args:
            names: Of which files; None compares all.
            go_on: Asked all the time; once it is false the rest is not compared.

        Raises:
            ModelFolderError: A file is not what the manifest says.
        """
        if not self.is_sealed:
            return
        # hashlib gives the interpreter up while it hashes, so threads run side by side.
        entries = [entry for entry in self.manifest.files if names is None or entry.name in names]
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda entry: self.content(entry.name).sha256(go_on), entries)
            for entry, sha256 in zip(entries, hashes, strict=True):
                if sha256 != entry.sha256 and go_on():
                    raise ModelFolderError(
                        f"{self.content(entry.name).path} is damaged: its SHA-256 is {sha256[:12]}..., the manifest "
                        f"has {entry.sha256[:12]}...: copy the folder again or make it anew"
                    )

    def check_unchanged(self) -> None:
        """Find out whether a file was written to, cut or replaced since it was opened.

        Raises:
            ModelFolderError: One was.
        """
        for file in {content.file for content in self._contents.values()}:
            file.check_unchanged()


def open_folder(folder: str | Path) -> ModelFolder:
    """Open a model folder, a pack, or the bundled model of that name, without hashing its files.

    Args:
        folder: Path of a model folder or a pack, or "storyteller". A folder of that name in the working directory is
            not meant: write "./storyteller" for it.

    Returns:
        The folder, with every listed file present, of the listed size and inside the folder.

    Raises:
        ModelFolderError: It is not a model folder, or one that cannot be used.
    """
    try:
        return _open(folder)
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in a path, a loop of links
        raise ModelFolderError(f"cannot read {folder}: {getattr(error, 'strerror', None) or error}") from error


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    return whole_file(path).sha256()


def _open(folder: str | Path) -> ModelFolder:
    if not isinstance(folder, str | Path):
        raise ModelFolderError(f"a model folder is a path or a name, not {folder!r}")
    # A `Path` is always meant as a path: that of "./storyteller" has lost its "./".
    path = _bundled_path(folder) if isinstance(folder, str) and folder in BUNDLED_MODELS else Path(folder)
    if not path.exists():
        raise ModelFolderError(
            f"{path} does not exist: give the path of a model folder or a pack, or {' or '.join(BUNDLED_MODELS)} "
            "for the bundled model"
        )
    if path.is_file():
        return _open_pack(path)
    manifest_path = path / MANIFEST_NAME
    if not manifest_path.is_file():
        raise ModelFolderError(_say_what_it_is_instead(path))
    manifest_bytes = _read_limited(OpenFile(manifest_path), MANIFEST_LIMIT_BYTES, "a manifest")
    manifest = _parse(manifest_bytes, manifest_path)
    # An installation may consist of links, one for each file, so what counts is where they lead: the files of one
    # model all lie in the folder that really holds its manifest. Or in the cache of a hub's repository.
    home = manifest_path.resolve().parent
    contents = {entry.name: open_file(path, home, entry.name, entry.size_bytes) for entry in manifest.files}
    signature = None
    if (path / SIGNATURE_NAME).is_file():
        signature_file = open_file(path, home, SIGNATURE_NAME, None).file
        signature = _read_limited(signature_file, _SIGNATURE_LIMIT_BYTES, "a signature")
    return _opened(ModelFolder(_real_folder(path, home), manifest_bytes, manifest, contents, signature))


def _open_pack(path: Path) -> ModelFolder:
    file = OpenFile(path)
    if not is_pack(file):
        raise ModelFolderError(_say_what_file_it_is(path))
    pack = read_pack(file)
    manifest = _parse(pack.manifest_bytes, path / MANIFEST_NAME)
    contents = pack.contents(manifest)
    return _opened(ModelFolder(path, pack.manifest_bytes, manifest, contents, pack.signature))


def _opened(folder: ModelFolder) -> ModelFolder:
    listed = {entry.name: entry.size_bytes for entry in folder.manifest.files}
    if TOKENIZER_NAME not in listed:
        raise ModelFolderError(f"{folder.path} has no {TOKENIZER_NAME}: export the model again")
    limits = dict.fromkeys(folder.manifest.graphs.values(), (GRAPH_LIMIT_BYTES, "an ONNX graph"))
    limits[TOKENIZER_NAME] = (_TOKENIZER_LIMIT_BYTES, "a tokenizer")
    for name, (limit, what) in limits.items():
        if listed[name] > limit:
            raise ModelFolderError(f"{folder.content(name).path} is larger than {limit:,} bytes: not {what}")
    return folder


def _parse(manifest_bytes: bytes, path: Path) -> Manifest:
    try:
        return parse_manifest(manifest_bytes.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ModelFolderError(f"cannot read {path}: it is not UTF-8: {error}") from error


def _read_limited(file: OpenFile, limit: int, what: str) -> bytes:
    if file.size_bytes > limit:
        raise ModelFolderError(f"{file.path} is larger than {limit:,} bytes: not {what}")
    return FileContent(file, 0, file.size_bytes, file.path).read()


def open_file(path: Path, home: Path, name: str, size_bytes: int | None = None) -> FileContent:
    """Open one file of a folder.

    Args:
        path: The folder.
        home: The folder that really holds its files.
        name: Name of the file.
        size_bytes: The size that it must have, if it is known.

    Raises:
        ModelFolderError: It is missing, has another size, or is a link that leads out of the folder.
    """
    file_path = path / name
    if not file_path.exists() or file_path.is_dir():
        raise ModelFolderError(f"{path} is incomplete: {name} is missing; copy the folder again")
    real = file_path.resolve()
    if real != home / name and not _is_in_hub_cache(path, real):
        raise ModelFolderError(
            f"{file_path} is a link that leads out of the model folder, to {real}: replace it by the file"
        )
    file = OpenFile(file_path)
    if size_bytes is not None and file.size_bytes != size_bytes:
        raise ModelFolderError(
            f"{file_path} is damaged: it has {file.size_bytes:,} bytes, the manifest says {size_bytes:,}; "
            "copy the folder again or make it anew"
        )
    return FileContent(file, 0, file.size_bytes, file_path)


def _is_in_hub_cache(path: Path, real: Path) -> bool:
    """Whether a file is a blob of the hub cache's repository that the folder is a snapshot of.

    The cache has `models--NAME/snapshots/REVISION/FILE`, which are links to `models--NAME/blobs/HASH`. Blobs are files
    that the same download wrote, so a snapshot cannot reach anything else of the user's through them.
    """
    repositories = [parent for parent in path.resolve().parents if parent.name.startswith("models--")]
    return any(
        path.resolve().is_relative_to(repository / "snapshots") and real.parent == repository / "blobs"
        for repository in repositories
    )


def _real_folder(path: Path, home: Path) -> Path:
    """Return the folder that really holds the files; of the hub's cache, the snapshot that names them."""
    return path.resolve() if _is_in_hub_cache(path, home / "manifest") else home


def _say_what_it_is_instead(path: Path) -> str:
    if (path / "config.json").is_file():
        if any(path.glob("*.onnx")):
            return f"{path} is not sealed: it has no {MANIFEST_NAME}; make one with `gpt2-edge seal {path}`"
        if any(path.glob("onnx/*.onnx")):
            return f"{path} has its graphs in {path / 'onnx'}: copy one of them beside config.json, with its weights"
        return f"{path} is a checkpoint, not a model folder: make one with `gpt2-edge export {path} -o FOLDER`"
    return f"{path} is not a model folder: it has no {MANIFEST_NAME}"


def _say_what_file_it_is(path: Path) -> str:
    match path.suffix.lower():
        case ".gguf":
            return f"{path} is in the format of llama.cpp: export the checkpoint that it was made from"
        case ".safetensors" | ".bin":
            return (
                f"{path} has the weights of a checkpoint: export its folder, `gpt2-edge export {path.parent} -o FOLDER`"
            )
    return f"{path} is a file: give the model folder that it lies in"


def _bundled_path(name: str) -> Path:
    path = Path(str(resources.files("gpt2_edge"))) / "bundled" / name
    if not path.is_dir():
        raise ModelFolderError(f"the bundled model {name} is missing from this installation: install gpt2-edge again")
    return path
