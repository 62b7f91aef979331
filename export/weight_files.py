"""Which files of a checkpoint hold its weights."""

from collections.abc import Collection
from pathlib import Path
from typing import Final

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.json_files import read_object

# A checkpoint may have several of these; the first is taken, which is the order of transformers.
WEIGHT_FILES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX_SUFFIX: Final = ".index.json"


def weight_file_name(names: Collection[str]) -> str | None:
    """Return which of a checkpoint's files has its weights, or is the index of their shards; None if none has."""
    return next((name for name in WEIGHT_FILES if name in names), None)


def is_shard_index(name: str) -> bool:
    """Tell whether a name of `WEIGHT_FILES` is an index of shards."""
    return name.endswith(_INDEX_SUFFIX)


def shard_names(index_path: Path) -> list[str]:
    """Return the names of the shards that an index names.

    Raises:
        CheckpointError: It is not an index, or names a file outside of its folder or of another format.
    """
    try:
        names = sorted({str(name) for name in read_object(index_path)["weight_map"].values()})
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{index_path} is not an index of shards: {error!r}") from error
    suffix = Path(index_path.name.removesuffix(_INDEX_SUFFIX)).suffix
    for name in names:
        if Path(name).name != name or "\\" in name:
            raise CheckpointError(f"{index_path} names a shard outside of the checkpoint: {name}")
        if not name.endswith(suffix):
            raise CheckpointError(f"{index_path} names a shard that is not a {suffix} file: {name}")
    return names


def weight_files(checkpoint: Path) -> list[Path]:
    """Return the files that hold the weights of a checkpoint.

    Raises:
        CheckpointError: There are none, or a shard is missing.
    """
    present = {path.name for path in checkpoint.iterdir() if path.is_file()}
    name = weight_file_name(present)
    if name is None:
        others = sorted(name for name in present if name.endswith((".h5", ".msgpack", ".ot", ".bin", ".safetensors")))
        found = f"; it has {', '.join(others)}" if others else ""
        raise CheckpointError(f"{checkpoint} has no weights that can be read: none of {', '.join(WEIGHT_FILES)}{found}")
    if not is_shard_index(name):
        return [checkpoint / name]
    shards = shard_names(checkpoint / name)
    for shard in shards:
        if shard not in present:
            raise CheckpointError(f"{checkpoint} is incomplete: the shard {shard} is missing")
    return [checkpoint / shard for shard in shards]
