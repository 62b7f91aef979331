"""Write a folder, or a file, so that it appears whole or not at all.

Everything is written to a temporary folder beside the final one, on the same file system, flushed to the disk, and
renamed when it is complete. A process that is killed leaves only a temporary folder, whose name says what it is and
that the next run to the same place removes.
"""

import errno
import os
import secrets
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final

from gpt2_edge.errors import ModelFolderError, OptionError
from gpt2_edge.folder import file_sha256
from gpt2_edge.manifest import MANIFEST_NAME, FileEntry, Manifest
from gpt2_edge.pack_format import SIGNATURE_NAME

_WINDOWS: Final = sys.platform == "win32"
if not _WINDOWS:
    import fcntl

_WINDOWS_ABANDONED_AFTER_SECONDS: Final = 24 * 3600
_WINDOWS_RENAME_ATTEMPTS: Final = 20


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Give a temporary folder to fill; rename it to `destination` when the block ends without an error.

    Args:
        destination: Must not exist, except as an empty folder.

    Yields:
        The temporary folder.

    Raises:
        ModelFolderError: The destination exists, cannot be written, or the disk is full.
    """
    check_destination(destination)
    with _parents_of(destination), _temporary_folder(destination) as temporary:
        yield temporary


@contextmanager
def _parents_of(destination: Path) -> Iterator[None]:
    """Make the folders above a destination; remove those that were made if nothing comes into them."""
    missing = [parent for parent in destination.parents if not parent.exists()]
    try:
        try:
            destination.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(destination, error) from error
        yield
    finally:
        for parent in missing:
            with suppress(OSError):  # it is not empty, or was never made
                parent.rmdir()


@contextmanager
def _temporary_folder(destination: Path) -> Iterator[Path]:
    try:
        _remove_abandoned(destination)
        temporary, lock = _make_temporary(destination)
    except OSError as error:
        raise _cannot_write(destination, error) from error
    try:
        yield temporary
        _make_as_open_as_any_new_folder(temporary)
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        _rename(temporary, destination)
        _flush(destination.parent)
    except OSError as error:
        raise _cannot_write(destination, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # nothing is there any more if it was renamed
        if lock is not None:
            os.close(lock)


def _make_as_open_as_any_new_folder(private: Path) -> None:
    """Give a folder of mkdtemp, which only its owner may enter, the mode that the umask gives to new folders."""
    ordinary = private / "mode"
    ordinary.mkdir()
    private.chmod(stat.S_IMODE(ordinary.stat().st_mode))
    ordinary.rmdir()


def check_destination(destination: Path) -> None:
    """Refuse a destination that cannot become a new folder, before long work starts.

    Raises:
        ModelFolderError: It exists and is not an empty folder, or its parent is not a folder.
    """
    if destination.name in ("", ".."):
        raise ModelFolderError(f"{destination} is not the name of a new folder: give one, such as {destination}/model")
    try:
        is_empty_folder = destination.is_dir() and not destination.is_symlink() and not any(destination.iterdir())
        if not is_empty_folder and (destination.exists() or destination.is_symlink()):
            raise ModelFolderError(f"{destination} already exists: remove it or choose another output")
        nearest = next(parent for parent in destination.absolute().parents if parent.exists())
        if not nearest.is_dir():
            raise ModelFolderError(f"cannot write {destination}: {nearest} is not a folder")
    except OSError as error:
        raise _cannot_write(destination, error) from error


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write `manifest.json` for the files that lie in `folder`, with their sizes and hashes.

    Returns:
        The manifest with its list of files.
    """
    files = tuple(
        FileEntry(file.name, file.stat().st_size, file_sha256(file))
        for file in sorted(folder.iterdir())
        if file.name not in (MANIFEST_NAME, SIGNATURE_NAME)
    )
    manifest = replace(manifest, files=files)
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8", newline="\n")
    return manifest


def check_folder_of_file(path: Path) -> None:
    """Refuse a file that has no folder, before long work starts.

    Raises:
        OptionError: There is none.
    """
    if not path.absolute().parent.is_dir():
        raise OptionError(f"cannot write {path}: there is no folder {path.parent}")


def write_file(path: Path, parts: Iterable[bytes]) -> None:
    """Write a file that appears whole or not at all, in place of one of that name.

    A link stays, and what it leads to is replaced. What is no file, as /dev/stdout or a named pipe, is written to.

    Raises:
        OSError: It cannot be written; what was there before still is.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            stream.writelines(parts)
        return
    with _temporary_file(Path(os.path.realpath(path))) as file:
        file.writelines(parts)


@contextmanager
def new_file(destination: Path) -> Iterator[BinaryIO]:
    """Give a temporary file to fill; rename it to `destination` when the block ends without an error.

    Args:
        destination: Checked by `check_new_file` before; a file that another process made meanwhile is replaced.

    Yields:
        The temporary file.

    Raises:
        ModelFolderError: The destination cannot be written, or the disk is full.
    """
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with _temporary_file(destination) as file:
            yield file
        _flush(destination.parent)
    except OSError as error:
        raise _cannot_write(destination, error) from error


def check_new_file(destination: Path) -> None:
    """Refuse a destination that cannot become a new file, before long work starts.

    Raises:
        ModelFolderError: It exists, or its parent is not a folder.
    """
    if destination.is_dir():
        raise ModelFolderError(f"{destination} is a folder: give the name of a new file, such as {destination}.gpt2")
    check_destination(destination)


def _temporary_prefix(destination: Path) -> str:
    return f".{destination.name}.making-"


def _cannot_write(destination: Path, error: OSError) -> ModelFolderError:
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY) and destination.exists():
        return ModelFolderError(f"{destination} was made by another process meanwhile: nothing was changed")
    hint = ": free some space and run it again" if error.errno == errno.ENOSPC else ""
    return ModelFolderError(f"cannot write {destination}: {error.strerror or error}{hint}")


@contextmanager
def _temporary_file(destination: Path) -> Iterator[BinaryIO]:
    """Give a temporary file beside `destination`, and rename it when the block ends without an error.

    Raises:
        OSError: Also if a file of that name is there and may not be written to, which a rename would not ask.
    """
    replaced = destination.stat() if destination.exists() else None
    if replaced is not None and not os.access(destination, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(destination))
    _remove_abandoned(destination)
    temporary, lock = _make_temporary(destination, is_folder=False)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            if replaced is not None and not _WINDOWS:
                os.fchmod(file.fileno(), stat.S_IMODE(replaced.st_mode))
            os.fsync(file.fileno())
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)  # nothing is there any more if it was renamed
        if lock is not None:
            os.close(lock)


def _make_temporary(destination: Path, *, is_folder: bool = True) -> tuple[Path, int | None]:
    """Make a temporary folder or file and lock it for as long as this process lives; Windows has no such locks."""
    while True:
        if is_folder:
            temporary = Path(tempfile.mkdtemp(prefix=_temporary_prefix(destination), dir=destination.parent))
        else:
            temporary = destination.with_name(_temporary_prefix(destination) + secrets.token_hex(8))
            temporary.touch(exist_ok=False)  # unlike mkstemp's, with the mode that the umask gives to new files
        if _WINDOWS:
            return temporary, None
        # Before it is locked, another run may take it for abandoned. That run holds the lock while it removes it.
        lock = _lock(temporary, fcntl.LOCK_SH)
        if lock is not None and temporary.exists():
            return temporary, lock
        if lock is not None:
            os.close(lock)


def _remove_abandoned(destination: Path) -> None:
    """Remove what runs that were killed left behind, and nothing that a living run is still filling."""
    prefix = _temporary_prefix(destination)
    for leftover in [path for path in destination.parent.iterdir() if path.name.startswith(prefix)]:
        if _WINDOWS:
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > _WINDOWS_ABANDONED_AFTER_SECONDS:
                    _remove(leftover)
            continue
        lock = _lock(leftover, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            _remove(leftover)
            os.close(lock)


def _remove(leftover: Path) -> None:
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        with suppress(OSError):
            leftover.unlink()


def _lock(folder: Path, operation: int) -> int | None:
    """Lock a folder; return the descriptor that holds the lock, None if another run has locked or removed it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _flush(path: Path) -> None:
    """Force a file or a folder to the disk; Windows cannot flush folders."""
    if _WINDOWS and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if _WINDOWS else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename(temporary: Path, destination: Path) -> None:
    if not _WINDOWS:
        temporary.rename(destination)  # replaces an empty folder and refuses any other
        return
    if destination.is_dir():
        destination.rmdir()
    for attempt in range(_WINDOWS_RENAME_ATTEMPTS):
        try:
            temporary.rename(destination)
        except PermissionError:  # a virus scanner may hold a new file open for a moment
            if attempt == _WINDOWS_RENAME_ATTEMPTS - 1:
                raise
            time.sleep(0.1)
        else:
            return
