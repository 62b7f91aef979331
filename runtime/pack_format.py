"""Read a pack: a model folder as one file, whose weights are mapped where they lie.

A pack is a ZIP archive without compression. It begins with `manifest.json`; `manifest.sig` follows if there is one, and
then the files in the order of the manifest, each beginning at a multiple of 16 KiB. The manifest says how long each is,
so the archive's directory at the end, of which another reader may make something else, is not needed.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.file_content import FileContent, OpenFile
from gpt2_edge.manifest import MANIFEST_LIMIT_BYTES, MANIFEST_NAME, Manifest

SIGNATURE_NAME: Final = "manifest.sig"
# Pages have 4 or 16 KiB, and the kernels want weights at multiples of 64 bytes.
ALIGNMENT_BYTES: Final = 16384
# Signature, version, flags, method, time, date, CRC, compressed size, size, length of the name, length of the extra.
LOCAL_HEADER: Final = struct.Struct("<4s5H3L2H")
ZIP64_EXTRA_BYTES: Final = 20

_LOCAL_MAGIC: Final = b"PK\x03\x04"
_DIRECTORY_MAGIC: Final = b"PK\x01\x02"
_SIZE_IN_EXTRA: Final = 0xFFFFFFFF
_UTF8_NAME: Final = 0x800
_END_RECORD: Final = struct.Struct("<4s4H2LH")


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack whose manifest was found.

    Attributes:
        file: The pack.
        manifest_bytes: Its manifest.
        signature: The signature of the manifest; None if there is none.
        files_offset: Where the header of the first other file begins.
    """

    file: OpenFile
    manifest_bytes: bytes
    signature: bytes | None
    files_offset: int

    def contents(self, manifest: Manifest) -> dict[str, FileContent]:
        """Return the files that the manifest lists.

        Raises:
            ModelFolderError: The pack holds other files, or was cut off.
        """
        position = self.files_offset
        contents = {}
        for entry in manifest.files:
            header = _read_header(self.file, position)
            if header.name != entry.name or header.size_bytes not in (entry.size_bytes, _SIZE_IN_EXTRA):
                raise _refuse(self.file, f"it has {header.name[:60]!r} where the manifest has {entry.name}")
            if header.data_offset % ALIGNMENT_BYTES:
                raise _refuse(self.file, f"{entry.name} is not where memory can be mapped")
            contents[entry.name] = _content(self.file, header.data_offset, entry.size_bytes, entry.name)
            position = header.data_offset + entry.size_bytes
        if _read(self.file, position, 4) != _DIRECTORY_MAGIC:
            raise _refuse(self.file, "it has more files than the manifest")
        end = _read(self.file, self.file.size_bytes - _END_RECORD.size, _END_RECORD.size)
        if not end.startswith(b"PK\x05\x06"):
            raise ModelFolderError(f"{self.file.path} is cut off: copy it again")
        return contents


def is_pack(file: OpenFile) -> bool:
    """Whether a file begins as a pack does."""
    return file.size_bytes >= LOCAL_HEADER.size and _read(file, 0, 4) == _LOCAL_MAGIC


def read_pack(file: OpenFile) -> Pack:
    """Find the manifest of a pack.

    Raises:
        ModelFolderError: The file is not a pack.
    """
    header = _read_header(file, 0)
    if header.name != MANIFEST_NAME:
        raise _refuse(file, f"it begins with {header.name[:60]!r}, not with {MANIFEST_NAME}")
    if header.size_bytes > MANIFEST_LIMIT_BYTES:
        raise _refuse(file, f"its manifest is larger than {MANIFEST_LIMIT_BYTES:,} bytes")
    manifest_bytes = _read(file, header.data_offset, header.size_bytes)
    position = header.data_offset + header.size_bytes
    header = _read_header(file, position)
    if header.name != SIGNATURE_NAME:
        return Pack(file, manifest_bytes, None, position)
    if header.size_bytes > MANIFEST_LIMIT_BYTES:
        raise _refuse(file, "its signature is too long")
    signature = _read(file, header.data_offset, header.size_bytes)
    return Pack(file, manifest_bytes, signature, header.data_offset + header.size_bytes)


@dataclass(frozen=True, slots=True)
class _Header:
    name: str
    size_bytes: int
    data_offset: int


def _read_header(file: OpenFile, position: int) -> _Header:
    magic, _, flags, method, _, _, _, _, size, name_length, extra_length = LOCAL_HEADER.unpack(
        _read(file, position, LOCAL_HEADER.size)
    )
    if magic != _LOCAL_MAGIC:
        raise _refuse(file, f"no file begins at byte {position:,}")
    if method or flags & ~_UTF8_NAME:
        raise _refuse(file, "its files are compressed, encrypted or streamed")
    name_offset = position + LOCAL_HEADER.size
    name = _read(file, name_offset, name_length).decode("utf-8", errors="replace")
    return _Header(name, size, name_offset + name_length + extra_length)


def _read(file: OpenFile, offset: int, size_bytes: int) -> bytes:
    return _content(file, offset, size_bytes, "").read()


def _content(file: OpenFile, offset: int, size_bytes: int, name: str) -> FileContent:
    if offset < 0 or offset + size_bytes > file.size_bytes:
        raise ModelFolderError(f"{file.path} is cut off: it has {file.size_bytes:,} bytes; copy it again")
    return FileContent(file, offset, size_bytes, Path(file.path, name))


def _refuse(file: OpenFile, reason: str) -> ModelFolderError:
    return ModelFolderError(f"{file.path} is not a pack: {reason}; make one with `gpt2-edge pack FOLDER -o FILE`")
