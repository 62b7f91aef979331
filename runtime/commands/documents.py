"""The documents that `gpt2-edge score` is given: files or lines, in batches of what is there to read."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Final

from gpt2_edge.errors import PromptError

STANDARD_INPUT: Final = "-"
_READ_BYTES: Final = 1 << 16
# Of short documents enough to fill a few runs, which take less than a second or two: nobody waits long for results.
_MOST_DOCUMENTS: Final = 64
_MOST_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Document:
    """A text to score, or the reason why it could not be read."""

    name: str
    data: bytes
    error: PromptError | None = None


def document_batches(paths: Sequence[str], lines: bool) -> Iterator[list[Document]]:
    """Yield documents in their order, short ones several at a time; what comes slowly is not waited for.

    Args:
        paths: Files, or "-" for standard input.
        lines: Whether each line is a document, instead of each file.
    """
    for documents in _documents_by_line(paths) if lines else _documents_by_file(paths):
        yield from _divided(documents)


def _documents_by_line(paths: Sequence[str]) -> Iterator[list[Document]]:
    """Yield the lines that each read from a file completes."""
    for path in paths:
        try:
            with _open(path) as file:
                number = 0
                for lines in _lines(file):
                    names = (f"{path}:{number + index}" for index in range(1, len(lines) + 1))
                    yield [Document(name, line.removesuffix(b"\r")) for name, line in zip(names, lines, strict=True)]
                    number += len(lines)
        except OSError as error:
            yield [_unreadable(path, error)]


def _lines(file: BufferedReader) -> Iterator[list[bytes]]:
    unfinished = bytearray()
    while part := file.read1(_READ_BYTES):  # of a pipe what is there, without waiting for more
        *lines, rest = part.split(b"\n")
        if lines:
            yield [bytes(unfinished) + lines[0], *lines[1:]]
            unfinished.clear()
        unfinished += rest
    if unfinished:
        yield [bytes(unfinished)]


def _documents_by_file(paths: Sequence[str]) -> Iterator[list[Document]]:
    """Yield files that lie there together, and those that may have to be waited for one by one."""
    batch: list[Document] = []
    for path in paths:
        if not Path(path).is_file() or sum(len(document.data) for document in batch) > _MOST_BYTES:
            yield batch
            batch = []
        try:
            with _open(path) as file:
                batch.append(Document(path, file.read()))
        except OSError as error:
            batch.append(_unreadable(path, error))
    yield batch


def _divided(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    batch_bytes = 0
    for document in documents:
        if batch and (len(batch) == _MOST_DOCUMENTS or batch_bytes + len(document.data) > _MOST_BYTES):
            yield batch
            batch, batch_bytes = [], 0
        batch.append(document)
        batch_bytes += len(document.data)
    if batch:
        yield batch


def _open(path: str) -> AbstractContextManager[BufferedReader]:
    if path == STANDARD_INPUT:
        return nullcontext(sys.stdin.buffer)  # type: ignore[arg-type]  # is a BufferedReader
    return Path(path).open("rb")


def _unreadable(path: str, error: OSError) -> Document:
    return Document(path, b"", PromptError(f"it cannot be read: {error.strerror or error}"))
