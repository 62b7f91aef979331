"""A file, or a part of one, that is opened once: what was checked is what is read, whatever its path leads to later."""

import hashlib
import mmap
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpt2_edge.errors import ModelFolderError

_CHUNK_BYTES: Final = 1 << 18
_RELEASE_SECONDS: Final = 0.02
# Opening a pipe or a device would wait, or do something; on Windows text mode would change bytes.
_OPEN_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_BINARY", 0)
)


@dataclass(frozen=True, slots=True)
class Identity:
    """What tells one state of a file from another: its real path, its place on the disk, and when it was changed."""

    path: str
    device: int
    inode: int
    size_bytes: int
    times_ns: tuple[int, int]


class OpenFile:
    """A regular file, open for reading until nobody refers to it any more.

    Args:
        path: Where it lies; symbolic links are followed.

    Attributes:
        path: As given, for messages.
        size_bytes: Its size when it was opened.
        identity: What stays as it is as long as nobody changes the file.

    Raises:
        ModelFolderError: It is a pipe, a device or another thing that is not a file.
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        real = path.resolve(strict=True)
        if not stat.S_ISREG(real.stat().st_mode):
            raise ModelFolderError(f"{path} is not a regular file: copy the folder again")
        self.descriptor = os.open(real, _OPEN_FLAGS)
        weakref.finalize(self, os.close, self.descriptor)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):  # it was exchanged meanwhile
            raise ModelFolderError(f"{path} is not a regular file: copy the folder again")
        self.size_bytes = status.st_size
        self.identity = _identity(real, status)
        self._map: mmap.mmap | None = None

    def view(self) -> memoryview:
        """Return the file's bytes, mapped into memory; they must not be empty."""
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, self.size_bytes, access=mmap.ACCESS_READ)
        return memoryview(self._map)

    def release_pages(self) -> None:
        """Let the system forget the pages that were read through the map; they come back when they are read again."""
        if self._map is not None and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Find out whether the file was written to, cut or replaced since it was opened.

        Raises:
            ModelFolderError: It was.
        """
        real = Path(self.identity.path)
        try:
            is_same = self.identity == _identity(real, real.stat()) == _identity(real, os.fstat(self.descriptor))
        except OSError:
            is_same = False
        if not is_same:
            raise ModelFolderError(f"{self.path} was changed while it was loaded: load it again")


def whole_file(path: Path) -> "FileContent":
    """Open a file and return all of its bytes.

    Raises:
        ModelFolderError: It is not a regular file.
        OSError: It cannot be opened.
    """
    file = OpenFile(path)
    return FileContent(file, 0, file.size_bytes, path)


class FileContent:
    """The bytes of a file of a model folder, which may be a part of a pack.

    Args:
        file: The file that holds them.
        offset: Where they begin.
        size_bytes: How many there are; must lie inside the file.
        path: For messages.
    """

    def __init__(self, file: OpenFile, offset: int, size_bytes: int, path: Path) -> None:
        self.file = file
        self.offset = offset
        self.size_bytes = size_bytes
        self.path = path

    def view(self) -> memoryview:
        """Return the bytes, mapped into memory."""
        if self.size_bytes == 0:
            return memoryview(b"")
        return self.file.view()[self.offset : self.offset + self.size_bytes]

    def read(self) -> bytes:
        """Return a copy of the bytes.

        Raises:
            ModelFolderError: The file was cut off.
        """
        copy = bytearray(self.size_bytes)
        with memoryview(copy) as buffer:
            position = 0
            while position < self.size_bytes:
                position += self.read_into(position, buffer[position:])
        return bytes(copy)

    def read_into(self, start: int, buffer: memoryview) -> int:
        """Copy bytes from `start` on into a buffer and return how many.

        Unlike `view` this leaves no pages of the file in this process, and a file that was cut off is an error
        instead of a signal that kills it.

        Raises:
            ModelFolderError: The file was cut off.
        """
        wanted = min(len(buffer), self.size_bytes - start)
        if not hasattr(os, "preadv"):
            buffer[:wanted] = self.view()[start : start + wanted]
            return wanted
        done = os.preadv(self.file.descriptor, [buffer[:wanted]], self.offset + start) if wanted else 0
        if wanted and not done:
            raise ModelFolderError(f"{self.path} was cut off while it was read: copy it again")
        return done

    def sha256(self, go_on: Callable[[], bool] = lambda: True) -> str:
        """Return the SHA-256 in hexadecimal.

        Args:
            go_on: Asked a few thousand times a second; once it is false the hash, which is then wrong, is returned.
        """
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        position = 0
        while position < self.size_bytes and go_on():
            count = self.read_into(position, buffer)
            digest.update(buffer[:count])
            position += count
        return digest.hexdigest()


def _identity(path: Path, status: os.stat_result) -> Identity:
    times_ns = (status.st_mtime_ns, status.st_ctime_ns)
    return Identity(str(path), status.st_dev, status.st_ino, status.st_size, times_ns)


@contextmanager
def releasing_pages(files: Iterable[OpenFile]) -> Iterator[None]:
    """Release the pages of mapped files all the time while the block goes through them, and once more at its end.

    Without it, a process that packs the weights of a model into another form would for a moment hold them twice.
    """
    chosen = list(files)
    ended = threading.Event()

    def release() -> None:
        more = True
        while more:
            more = not ended.wait(_RELEASE_SECONDS)
            for file in chosen:
                file.release_pages()

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
