"""Write a model folder as one file, and a pack as a folder again."""

import hashlib
import struct
import zipfile
from pathlib import Path
from typing import IO, Final

from gpt2_edge.errors import ModelFolderError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.manifest import MANIFEST_NAME, FileEntry
from gpt2_edge.pack_format import ALIGNMENT_BYTES, LOCAL_HEADER, SIGNATURE_NAME, ZIP64_EXTRA_BYTES
from gpt2_edge.seal import check_new_file, new_file, new_folder

_CHUNK_BYTES: Final = 1 << 20
_FIRST_ZIP64_BYTES: Final = 2**31 - 1
_EARLIEST: Final = (1980, 1, 1, 0, 0, 0)  # so that the same folder makes the same pack at any time
# The extra field that Android's zipalign fills up entries with: its number, its length, the alignment, zeros.
_PADDING_EXTRA: Final = struct.Struct("<HHH")
_PADDING_EXTRA_NUMBER: Final = 0xD935


def pack_folder(folder: ModelFolder, destination: Path, signature: bytes | None) -> None:
    """Write a pack, which appears whole or not at all. The same folder gives the same bytes.

    Args:
        folder: An opened model folder, whose files are compared with its manifest on the way.
        destination: The file to make; must not exist.
        signature: What to put into `manifest.sig`; None leaves it out.

    Raises:
        ModelFolderError: The folder is damaged, or the destination exists or cannot be written.
    """
    check_new_file(destination)
    with new_file(destination) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(_entry(MANIFEST_NAME), folder.manifest_bytes)
        if signature is not None:
            archive.writestr(_entry(SIGNATURE_NAME), signature)
        for entry in folder.manifest.files:
            info = _entry(entry.name)
            info.file_size = entry.size_bytes
            has_zip64 = entry.size_bytes >= _FIRST_ZIP64_BYTES
            info.extra = _padding(file.tell() + len(entry.name), has_zip64)
            with archive.open(info, "w", force_zip64=has_zip64) as part:
                _copy(folder, entry, part)
            info.extra = b""  # the directory at the end needs no padding


def unpack_folder(pack: ModelFolder, destination: Path) -> None:
    """Write the files of a pack, or of a folder, as a folder, which appears whole or not at all.

    Raises:
        ModelFolderError: The pack is damaged, or the destination exists or cannot be written.
    """
    with new_folder(destination) as folder:
        (folder / MANIFEST_NAME).write_bytes(pack.manifest_bytes)
        if pack.signature is not None:
            (folder / SIGNATURE_NAME).write_bytes(pack.signature)
        for entry in pack.manifest.files:
            with (folder / entry.name).open("xb") as file:
                _copy(pack, entry, file)


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EARLIEST)
    info.create_system = 3  # Unix, on Windows too
    info.external_attr = 0o100644 << 16
    return info


def _padding(end_of_name: int, has_zip64: bool) -> bytes:
    """Return the extra field after which the data begin at a multiple of the alignment.

    Args:
        end_of_name: Where the header would end, less its fixed part.
        has_zip64: Whether `zipfile` adds a field with large sizes.
    """
    end = end_of_name + LOCAL_HEADER.size + _PADDING_EXTRA.size + (ZIP64_EXTRA_BYTES if has_zip64 else 0)
    zeros = -end % ALIGNMENT_BYTES
    return _PADDING_EXTRA.pack(_PADDING_EXTRA_NUMBER, 2 + zeros, ALIGNMENT_BYTES) + bytes(zeros)


def _copy(folder: ModelFolder, entry: FileEntry, file: IO[bytes]) -> None:
    content = folder.content(entry.name)
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    position = 0
    while position < content.size_bytes:
        count = content.read_into(position, buffer)
        digest.update(buffer[:count])
        file.write(buffer[:count])
        position += count
    if digest.hexdigest() != entry.sha256:
        raise ModelFolderError(f"{content.path} is damaged: it is not what the manifest says; nothing was written")
