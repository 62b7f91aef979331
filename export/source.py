"""Where a checkpoint comes from: a folder, or a repository of a model hub."""

import re
from pathlib import Path
from typing import Any, Final

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.hub import download_checkpoint
from gpt2_edge.export.weight_files import weight_files
from gpt2_edge.folder import file_sha256

_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
# How huggingface_hub lays out its cache: models--OWNER--NAME/snapshots/COMMIT/FILE, a link to ../../blobs/HASH.
_CACHED_REPOSITORY: Final = "models--"
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


def find_checkpoint(given: str | Path, revision: str | None = None, offline: bool = False) -> Path:
    """Return the folder of a checkpoint, downloading it if a hub's name was given and no such folder exists.

    Args:
        given: A folder; or, as a `str`, a hub's name such as `gpt2` or `openai-community/gpt2`.
        revision: Branch, tag or commit of the hub's repository; its main branch if None.
        offline: Take what was downloaded before, and open no connection.

    Raises:
        CheckpointError: There is no such folder and no such repository, or it cannot be downloaded.
    """
    path = Path(given)
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{given} is a folder here, which has no revision {revision}: leave the revision out, or run the "
                "command elsewhere to get the hub's repository of that name"
            )
        return path
    if not is_hub_name(given) or path.exists():
        raise CheckpointError(
            f"{given} is not a folder: give the folder of a Hugging Face GPT-2 checkpoint, or the name of a hub's "
            "repository, such as openai-community/gpt2"
        )
    return download_checkpoint(str(given), revision, offline)


def is_hub_name(given: str | Path) -> bool:
    """Tell whether a checkpoint could be meant as the name of a hub's repository: a `Path` never is."""
    return isinstance(given, str) and _HUB_NAME.fullmatch(given) is not None


def describe_source(checkpoint: Path) -> dict[str, Any]:
    """Return name, revision and SHA-256 of the weights of a checkpoint, as the manifest has them.

    A folder of huggingface_hub's cache is named by its repository and commit, and its large files by their hash.

    Raises:
        CheckpointError: A cached file has not the hash that the hub says.
    """
    folder = checkpoint.absolute()
    repository, snapshots = folder.parent.parent.name, folder.parent.name
    is_cached = snapshots == "snapshots" and repository.startswith(_CACHED_REPOSITORY)
    hashes = {}
    for path in weight_files(checkpoint):
        hashes[path.name] = sha256 = file_sha256(path)
        blob = path.resolve()
        if is_cached and _SHA256.fullmatch(blob.name) is not None and blob.name != sha256:
            raise CheckpointError(
                f"{blob} is damaged: the hub says that its SHA-256 is its name, it is {sha256}; remove the file and "
                "download it again"
            )
    if is_cached:
        name = repository.removeprefix(_CACHED_REPOSITORY).replace("--", "/")
        return {"name": name, "revision": folder.name, "sha256": hashes}
    return {"name": checkpoint.resolve().name, "revision": None, "sha256": hashes}
