"""The manifest of a model folder: what is in it, where it came from, what was measured.

`manifest.json` is read from folders that anybody may have written, so every field is checked before it is used, and
a message names the field at fault.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from gpt2_edge.errors import ModelFolderError

FORMAT_VERSION: Final = 1
MANIFEST_NAME: Final = "manifest.json"
MANIFEST_LIMIT_BYTES: Final = 1_000_000
PRECISIONS: Final = ("fp32", "fp16", "int8", "int4")
CACHE_NUMBER_BYTES: Final = {"fp32": 4, "fp16": 2, "int8": 1}
FLAVOURS: Final = ("fused", "standard")

_MOST_LAYERS: Final = 10_000  # of which the inputs of the graph are named one by one
_MOST_FILES: Final = 100  # all are open at the same time
_PLAIN_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Architecture:
    """The shape of a GPT-2.

    Attributes:
        layers: Number of transformer blocks.
        heads: Attention heads of a block.
        head_size: Values of a head as the KV cache holds them (padded to a multiple of 8).
        width: Values of a hidden state, `n_embd`.
        inner_width: Values between the two matrices of the MLP, `n_inner`.
        context_length: Positions the model has embeddings for, `n_positions`.
        vocabulary_size: Rows of the token embedding.
        activation: The checkpoint's `activation_function`.
        tied_head: Whether the head is the token embedding.
    """

    layers: int
    heads: int
    head_size: int
    width: int
    inner_width: int
    context_length: int
    vocabulary_size: int
    activation: str
    tied_head: bool


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a model folder: its plain name, size and SHA-256 in hexadecimal."""

    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        architecture: The shape of the model.
        flavour: "fused": attention is `GroupQueryAttention` over a KV cache that is updated in place. "standard": as
            optimum makes it, keys and values go in and come out longer.
        precision: "fp32", "fp16", "int8" or "int4".
        cache_precision: Of keys and values in the KV cache: "fp32", "fp16" or "int8".
        recipe: How the weights were quantized, as the quantizer recorded it; None if they were not.
        graphs: File name of the ONNX graph for each role; the role "decoder" is always there. "decoder_cuda" computes
            the same from the same weights on a GPU, where the decoder itself cannot.
        end_of_text: Token id that ends a text and that an empty prompt starts from; None if the model has none.
        source: Where the weights came from: name, revision and SHA-256.
        tools: Versions of the programs that made the folder.
        minimum_onnxruntime: The oldest ONNX Runtime that runs the graphs.
        measured: What was measured when the folder was made.
        files: Every file but the manifest.
    """

    architecture: Architecture
    flavour: str
    precision: str
    cache_precision: str
    recipe: Mapping[str, Any] | None
    graphs: Mapping[str, str]
    end_of_text: int | None
    source: Mapping[str, Any]
    tools: Mapping[str, str]
    minimum_onnxruntime: str
    measured: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()

    def to_json(self) -> str:
        """Return the text of `manifest.json`."""
        document = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    @property
    def content_sha256(self) -> str:
        """SHA-256 over the names and hashes of all files: what tells one model from another."""
        listing = "".join(f"{entry.sha256} {entry.name}\n" for entry in self.files)
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def size_bytes(self) -> int:
        """Size of all listed files together."""
        return sum(entry.size_bytes for entry in self.files)

    @property
    def cache_bytes_per_token(self) -> int:
        """What the keys and values of a token take in the KV cache."""
        shape = self.architecture
        return 2 * CACHE_NUMBER_BYTES[self.cache_precision] * shape.layers * shape.heads * shape.head_size

    @property
    def has_prompt_matrices(self) -> bool:
        """Whether the graph has other matrices for prompts than for decoding."""
        return self.recipe is not None and self.recipe.get("prompt") is not None

    @property
    def decodes_as_it_prefills(self) -> bool:
        """Whether tokens that come one by one get the same logits as at once, but for the last digits.

        Keys and values that a cache rounds are unrounded for tokens that are computed together.
        """
        return self.cache_precision != "int8" and not self.has_prompt_matrices


def parse_manifest(text: str) -> Manifest:
    """Read and check the text of a `manifest.json`.

    Raises:
        ModelFolderError: The text is not a manifest of a version that this release reads; the message names the
            field at fault.
    """
    try:
        document = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelFolderError(f"{MANIFEST_NAME} is not JSON: {error}") from error
    fields = _Fields(document, MANIFEST_NAME)
    version = fields.integer("format_version")
    if version != FORMAT_VERSION:
        raise ModelFolderError(
            f"{MANIFEST_NAME} has format version {version}, this release of gpt2-edge reads version "
            f"{FORMAT_VERSION}: {'upgrade gpt2-edge' if version > FORMAT_VERSION else 'export the model again'}"
        )
    architecture = fields.object("architecture")
    precision = fields.choice("precision", PRECISIONS)
    usual_cache = _cache_precision_of(precision)
    manifest = Manifest(
        architecture=Architecture(
            layers=architecture.integer("layers", minimum=1, maximum=_MOST_LAYERS),
            heads=architecture.integer("heads", minimum=1),
            head_size=architecture.integer("head_size", minimum=1),
            width=architecture.integer("width", minimum=1),
            inner_width=architecture.integer("inner_width", minimum=1),
            context_length=architecture.integer("context_length", minimum=1),
            vocabulary_size=architecture.integer("vocabulary_size", minimum=1),
            activation=architecture.string("activation"),
            tied_head=architecture.boolean("tied_head"),
        ),
        flavour=fields.choice("flavour", FLAVOURS),
        precision=precision,
        cache_precision=fields.choice("cache_precision", tuple(CACHE_NUMBER_BYTES), default=usual_cache),
        recipe=fields.optional_mapping("recipe"),
        graphs=fields.file_names("graphs"),
        end_of_text=fields.optional_integer("end_of_text"),
        source=fields.mapping("source"),
        tools=fields.mapping("tools"),
        minimum_onnxruntime=fields.version("minimum_onnxruntime"),
        measured=fields.mapping("measured"),
        files=fields.file_entries("files"),
    )
    listed = {entry.name for entry in manifest.files}
    if len(listed) != len(manifest.files):
        raise ModelFolderError(f"{MANIFEST_NAME}: files lists a name twice")
    if "decoder" not in manifest.graphs:
        raise ModelFolderError(f"{MANIFEST_NAME}: graphs has no decoder")
    if missing := set(manifest.graphs.values()) - listed:
        raise ModelFolderError(f"{MANIFEST_NAME}: files does not list {', '.join(sorted(missing))}")
    end_of_text, vocabulary_size = manifest.end_of_text, manifest.architecture.vocabulary_size
    if end_of_text is not None and not 0 <= end_of_text < vocabulary_size:
        raise ModelFolderError(
            f"{MANIFEST_NAME}: end_of_text is {end_of_text}, the vocabulary has tokens 0 to {vocabulary_size - 1}"
        )
    return manifest


def _cache_precision_of(precision: str) -> str:
    """Return what the cache of a folder holds whose manifest is older than the field."""
    return "fp16" if precision == "fp16" else "fp32"


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with a name twice, of which other readers may take the other one."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("an object has a name twice")
    return fields


class _Fields:
    """A JSON object whose fields are read by type."""

    def __init__(self, document: object, where: str) -> None:
        if not isinstance(document, dict):
            raise ModelFolderError(f"{where} is {_describe(document)}, expected an object")
        self._document = document
        self._where = where

    def _get(self, name: str) -> Any:
        if name not in self._document:
            raise ModelFolderError(f"{self._where} has no {name}")
        return self._document[name]

    def _refuse(self, name: str, value: object, expected: str) -> ModelFolderError:
        return ModelFolderError(f"{self._where}: {name} is {_describe(value)}, expected {expected}")

    def integer(self, name: str, minimum: int | None = None, maximum: int = 2**40) -> int:
        value = self._get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._refuse(name, value, "an integer")
        if minimum is not None and not minimum <= value <= maximum:
            raise self._refuse(name, value, f"{minimum} to {maximum}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self._get(name) is None else self.integer(name)

    def boolean(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise self._refuse(name, value, "true or false")
        return value

    def string(self, name: str) -> str:
        value = self._get(name)
        if not isinstance(value, str):
            raise self._refuse(name, value, "a string")
        return value

    def choice(self, name: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        if default is not None and name not in self._document:
            return default
        value = self.string(name)
        if value not in allowed:
            raise self._refuse(name, value, f"one of {', '.join(allowed)}")
        return value

    def version(self, name: str) -> str:
        value = self.string(name)
        if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6}){0,3}", value) is None:
            raise self._refuse(name, value, 'a version such as "1.31"')
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._get(name)
        if not isinstance(value, dict):
            raise self._refuse(name, value, "an object")
        return value

    def optional_mapping(self, name: str) -> Mapping[str, Any] | None:
        return None if self._get(name) is None else self.mapping(name)

    def object(self, name: str) -> "_Fields":
        return _Fields(self._get(name), f"{self._where}: {name}")

    def file_names(self, name: str) -> Mapping[str, str]:
        entries = self.object(name)
        return {key: entries.file_name(key) for key in entries._document}

    def file_name(self, name: str) -> str:
        value = self.string(name)
        if _PLAIN_FILE_NAME.fullmatch(value) is None:
            raise self._refuse(name, value, "a plain file name inside the folder")
        return value

    def file_entries(self, name: str) -> tuple[FileEntry, ...]:
        value = self._get(name)
        if not isinstance(value, list):
            raise self._refuse(name, value, "a list")
        if len(value) > _MOST_FILES:
            raise ModelFolderError(f"{self._where}: {name} lists {len(value)} files, expected at most {_MOST_FILES}")
        entries = []
        for index, item in enumerate(value):
            entry = _Fields(item, f"{self._where}: {name}[{index}]")
            sha256 = entry.string("sha256")
            if _SHA256.fullmatch(sha256) is None:
                raise entry._refuse("sha256", sha256, "64 hexadecimal digits")
            entries.append(FileEntry(entry.file_name("name"), entry.integer("size_bytes", minimum=0), sha256))
        return tuple(entries)


def _describe(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
