"""A memory of files whose hashes were right, so that unchanged ones need not be hashed at every start.

It is asked for with `verify_hashes="changed"`. A file counts as unchanged while its path, device, inode, size and the
times of its last changes are the same; the time of the last change of the inode cannot be set by a program.
"""

import contextlib
import errno
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from gpt2_edge.file_content import FileContent
from gpt2_edge.folder import ModelFolder
from gpt2_edge.manifest import FileEntry
from gpt2_edge.seal import write_file

_LIMIT_BYTES: Final = 1_000_000
_MOST_ENTRIES: Final = 1_000
# A change right after the hash could leave the time as it is where the system's clock ticks slowly.
_SETTLED_AFTER_SECONDS: Final = 2


def changed_files(folder: ModelFolder) -> set[str]:
    """Return the names of the files that have to be hashed."""
    known = _read()
    return {
        entry.name
        for entry in folder.manifest.files
        if known.get(_key(folder.content(entry.name))) != _record(folder.content(entry.name), entry)
    }


def remember(folder: ModelFolder) -> None:
    """Note that all files are what the manifest says; if that cannot be written, they are hashed again next time."""
    known = _read()
    for entry in folder.manifest.files:
        content = folder.content(entry.name)
        if time.time_ns() - max(content.file.identity.times_ns) > _SETTLED_AFTER_SECONDS * 10**9:
            known.pop(_key(content), None)  # the newest come last
            known[_key(content)] = _record(content, entry)
    newest = dict(list(known.items())[-_MOST_ENTRIES:])
    with contextlib.suppress(OSError):
        path = memory_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, [json.dumps(newest).encode()])


def memory_path() -> Path:
    """Return where the memory lies. It may be removed at any time."""
    return cache_folder() / "hashes.json"


def cache_folder() -> Path:
    """Return the folder of gpt2-edge in the user's cache folder. What lies there may be removed at any time.

    Raises:
        FileNotFoundError: The user has no home folder, as in some services and containers.
    """
    try:
        if sys.platform == "win32":
            cache = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            cache = Path.home() / "Library" / "Caches"
        else:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder") from error
    return cache / "gpt2-edge"


def _read() -> dict[str, Any]:
    try:
        path = memory_path()
        known = json.loads(path.read_bytes()) if path.stat().st_size <= _LIMIT_BYTES else None
    except (OSError, ValueError, RecursionError):  # no such file, no JSON
        return {}
    return known if isinstance(known, dict) else {}


def _key(content: FileContent) -> str:
    return f"{content.file.identity.path}@{content.offset}"


def _record(content: FileContent, entry: FileEntry) -> list[Any]:
    identity = content.file.identity
    return [identity.device, identity.inode, identity.size_bytes, *identity.times_ns, entry.sha256]
