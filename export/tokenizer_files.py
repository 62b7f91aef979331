"""Bring a checkpoint's tokenizer into a model folder as one `tokenizer.json`.

The result gives the token ids that transformers' fast tokenizer gives for the same files.
"""

from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.added_tokens import add_tokens
from gpt2_edge.export.json_files import read_object

_WHOLE_NAME: Final = "tokenizer.json"
_SETTINGS_NAME: Final = "tokenizer_config.json"
_GPT2_CLASSES: Final = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
# Settings that would change what a text is encoded to, in a way that `tokenizer.json` cannot say or we do not follow.
_UNSUPPORTED_SETTINGS: Final = ("add_bos_token", "add_eos_token", "split_special_tokens", "auto_map")


def read_tokenizer(checkpoint: Path, vocabulary_size: int) -> Tokenizer:
    """Read `tokenizer.json`, or GPT-2's own pair `vocab.json` and `merges.txt`, and the settings beside them.

    Raises:
        CheckpointError: The checkpoint has neither, they cannot be read, are of another kind, ask for what cannot be
            done, or have tokens the model does not know.
    """
    settings_path = checkpoint / _SETTINGS_NAME
    settings = read_object(settings_path) if settings_path.is_file() else {}
    for name in _UNSUPPORTED_SETTINGS:
        if settings.get(name):
            raise CheckpointError(
                f"{settings_path}: {name} is {settings[name]!r}, which cannot be exported: remove it and do in the "
                "prompt what it does"
            )
    tokenizer = _read_vocabulary(checkpoint, settings)
    if not isinstance(tokenizer.model, models.BPE) or not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise CheckpointError(
            f"{checkpoint}: the tokenizer is {type(tokenizer.model).__name__} with the decoder "
            f"{type(tokenizer.decoder).__name__}; only GPT-2's byte-level BPE can be exported"
        )
    if tokenizer.model.dropout:
        raise CheckpointError(f"{checkpoint / _WHOLE_NAME}: dropout is {tokenizer.model.dropout}: set it to null")
    _set_prefix_space(tokenizer, settings_path, settings.get("add_prefix_space", False))
    add_tokens(tokenizer, checkpoint, settings, vocabulary_size)
    if tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        raise CheckpointError(
            f"{checkpoint / _WHOLE_NAME}: its post_processor adds tokens to every text, which cannot be exported: set "
            "it to null and give them in the prompt"
        )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocabulary_size:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has a token {largest} ({tokenizer.id_to_token(largest)}), the model's "
            f"vocabulary ends at {vocabulary_size - 1}: remove the token from the tokenizer's files"
        )
    return tokenizer


def _read_vocabulary(checkpoint: Path, settings: dict[str, Any]) -> Tokenizer:
    whole = checkpoint / _WHOLE_NAME
    vocabulary, merges = checkpoint / "vocab.json", checkpoint / "merges.txt"
    if not whole.is_file():
        if not (vocabulary.is_file() and merges.is_file()):
            raise CheckpointError(f"{checkpoint} has no {_WHOLE_NAME}, and not both vocab.json and merges.txt")
        if settings.get("tokenizer_class") not in _GPT2_CLASSES:
            raise CheckpointError(
                f"{checkpoint / _SETTINGS_NAME}: tokenizer_class is {settings['tokenizer_class']!r}; without a "
                f"{_WHOLE_NAME} only GPT-2's can be exported"
            )
    try:
        return Tokenizer.from_file(str(whole)) if whole.is_file() else _from_gpt2_files(vocabulary, merges)
    except Exception as error:
        raise CheckpointError(f"cannot read the tokenizer of {checkpoint}: {error}") from error


def _from_gpt2_files(vocabulary: Path, merges: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _set_prefix_space(tokenizer: Tokenizer, path: Path, add_prefix_space: object) -> None:
    """Have a space put before each text, or not, which the settings decide even over `tokenizer.json`."""
    if not isinstance(add_prefix_space, bool):
        raise CheckpointError(f"{path}: add_prefix_space is {add_prefix_space!r}, expected true or false")
    if isinstance(tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        tokenizer.pre_tokenizer.add_prefix_space = add_prefix_space
