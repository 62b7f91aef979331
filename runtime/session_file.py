"""Save the state of a text session to one file, and read it back: checked, never pickled.

The file is a line that names the format, a line with the SHA-256 of all that follows, a line of JSON, and the keys and
values as the model caches them: little-endian float32, or int8.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2_edge.errors import SessionError
from gpt2_edge.kv_cache import SequenceCache
from gpt2_edge.manifest import Manifest
from gpt2_edge.options import MAXIMUM_SEED
from gpt2_edge.seal import write_file

_FORMAT: Final = b"gpt2-edge session 1\n"
_HASH_LINE_BYTES: Final = 65
_HEADER_LIMIT_BYTES: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class SessionState:
    """All that a session is.

    Attributes:
        prompt: Tokens up to the end of what was appended last.
        continuation: Tokens generated since.
        cache: Keys and values of the first of them; None if nothing was computed yet.
        seed: Of the random numbers; None if none were drawn yet.
        draws: How many were drawn.
    """

    prompt: tuple[int, ...] = ()
    continuation: tuple[int, ...] = ()
    cache: SequenceCache | None = None
    seed: int | None = None
    draws: int = 0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and continuation."""
        return self.prompt + self.continuation


def save_session(path: Path, state: SessionState, manifest: Manifest) -> None:
    """Write a session's state; the file appears whole or not at all.

    Raises:
        SessionError: The file cannot be written.
    """
    arrays = [] if state.cache is None else state.cache.arrays
    header = {
        "model": manifest.content_sha256,
        "prompt": state.prompt,
        "continuation": state.continuation,
        "seed": state.seed,
        "draws": state.draws,
        "cached_tokens": 0 if state.cache is None else state.cache.tokens,
    }
    body = [
        json.dumps(header).encode() + b"\n",
        *(np.ascontiguousarray(array, _stored_type(manifest)).tobytes() for array in arrays),
    ]
    digest = hashlib.sha256()
    for part in body:
        digest.update(part)
    try:
        write_file(path, [_FORMAT, digest.hexdigest().encode() + b"\n", *body])
    except (OSError, ValueError) as error:  # ValueError if the path has a NUL in it
        raise SessionError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def read_session(path: Path, manifest: Manifest) -> SessionState:
    """Read a session's state.

    Args:
        path: What `save_session` wrote.
        manifest: Of the model that goes on with it.

    Raises:
        SessionError: The file cannot be read, is damaged, or belongs to another model.
    """
    try:
        data = memoryview(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SessionError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if bytes(data[: len(_FORMAT)]) != _FORMAT:
        raise SessionError(f"{path} is not a session saved by this version of gpt2-edge")
    body = data[len(_FORMAT) + _HASH_LINE_BYTES :]
    expected = bytes(data[len(_FORMAT) : len(_FORMAT) + _HASH_LINE_BYTES])
    if hashlib.sha256(body).hexdigest().encode() + b"\n" != expected:
        raise SessionError(f"{path} is damaged: its SHA-256 is not the one it was saved with")
    header_length = bytes(body[:_HEADER_LIMIT_BYTES]).find(b"\n") + 1
    try:
        header = json.loads(bytes(body[:header_length]))
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path} is damaged: {error}") from error
    return _state(path, header, body[header_length:], manifest)


def _state(path: Path, header: Any, values: memoryview, manifest: Manifest) -> SessionState:
    if not isinstance(header, dict) or header.get("model") != manifest.content_sha256:
        raise SessionError(f"{path} was saved with another model folder: load that one, or begin a new session")
    problem = _problem(header, manifest)
    if problem is not None:
        raise SessionError(f"{path} is damaged: {problem}")
    shape = manifest.architecture
    array_shape = (shape.heads, header["cached_tokens"], shape.head_size)
    arrays, count = 2 * shape.layers, math.prod(array_shape)
    stored_type = _stored_type(manifest)
    if len(values) != (stored_type.itemsize * arrays * count if count else 0):
        raise SessionError(f"{path} is damaged: it holds {len(values):,} bytes of keys and values")
    numbers = np.frombuffer(values, stored_type).astype(stored_type.newbyteorder("="), copy=False)
    cache = SequenceCache([part.reshape(array_shape) for part in np.split(numbers, arrays)]) if count else None
    return SessionState(tuple(header["prompt"]), tuple(header["continuation"]), cache, header["seed"], header["draws"])


def _problem(header: dict[str, Any], manifest: Manifest) -> str | None:
    """Say what the model could not go on with; the hash alone does not tell who wrote a file."""
    shape = manifest.architecture
    lists = [header.get(name) for name in ("prompt", "continuation")]
    if not all(isinstance(tokens, list) and _are_all(tokens, shape.vocabulary_size) for tokens in lists):
        return "it holds something else than tokens of the model"
    count = sum(map(len, lists))  # type: ignore[arg-type]
    if count > shape.context_length + 1:
        return f"it holds {count} tokens, more than the context"
    if not _are_all([header.get("cached_tokens")], count + 1):
        return "it holds keys and values of other tokens"
    seed, draws = header.get("seed", ""), header.get("draws")
    if not (seed is None or _are_all([seed], MAXIMUM_SEED + 1)) or not _are_all([draws], MAXIMUM_SEED + 1):
        return "it holds no state of random numbers"
    return None


def _are_all(values: list[Any], below: int) -> bool:
    return all(type(value) is int and 0 <= value < below for value in values)


def _stored_type(manifest: Manifest) -> np.dtype[Any]:
    return np.dtype("i1" if manifest.cache_precision == "int8" else "<f4")
