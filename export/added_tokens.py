"""Tokens that a checkpoint adds to its vocabulary, wherever transformers' releases have written them down.

In order of age: `added_tokens.json` and `special_tokens_map.json`; `added_tokens_decoder` of `tokenizer_config.json`,
which replaces both; `tokenizer.json`, which has been read already.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.json_files import read_object

_END_OF_TEXT: Final = "<|endoftext|>"
# A GPT-2 has these even if no file names them.
_DEFAULT_SPECIAL_TOKENS: Final = {"bos_token": _END_OF_TEXT, "eos_token": _END_OF_TEXT, "unk_token": _END_OF_TEXT}
_SPECIAL_TOKEN_FIELDS: Final = (*_DEFAULT_SPECIAL_TOKENS, "sep_token", "pad_token", "cls_token", "mask_token")
_MORE_SPECIAL_TOKENS: Final = "additional_special_tokens"
_FLAGS: Final = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_tokens(tokenizer: Tokenizer, checkpoint: Path, settings: dict[str, Any], vocabulary_size: int) -> None:
    """Add to a tokenizer what the files beside it name.

    Special tokens that are named without an id, and that the vocabulary lacks, come after it, as long as the model
    has embeddings for them. Where it has none, they cannot be meant: they stay text like any other.

    Args:
        tokenizer: Is changed.
        checkpoint: The folder of the files.
        settings: What its `tokenizer_config.json` says.
        vocabulary_size: How many embeddings the model has.

    Raises:
        CheckpointError: A file cannot be read, or gives a token an id that it would not get.
    """
    settings_path = checkpoint / "tokenizer_config.json"
    names = _DEFAULT_SPECIAL_TOKENS | settings
    if "added_tokens_decoder" in settings:
        numbered = _numbered_tokens(settings_path, settings["added_tokens_decoder"])
    else:
        names |= _optional_object(checkpoint / "special_tokens_map.json")
        numbered = {}
    special = {token.content: token for token in _special_tokens(settings_path, names)}
    if "added_tokens_decoder" not in settings:
        numbered = _plain_numbered_tokens(checkpoint / "added_tokens.json", special)
    for token_id, token in sorted(numbered.items()):
        token.special = token.special or token.content in special
        _add(tokenizer, token)
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{checkpoint}: the added token {token.content!r} should have the id {token_id}, after those before "
                f"it would have {tokenizer.token_to_id(token.content)}: the tokenizer's files do not fit together"
            )
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for content, token in special.items():
        has_embedding = tokenizer.token_to_id(content) is not None or tokenizer.get_vocab_size() < vocabulary_size
        if content not in known and has_embedding:
            _add(tokenizer, token)


def _add(tokenizer: Tokenizer, token: AddedToken) -> None:
    if repr(token) not in {repr(known) for known in tokenizer.get_added_tokens_decoder().values()}:
        tokenizer.add_tokens([token])


def _special_tokens(path: Path, names: dict[str, Any]) -> Iterator[AddedToken]:
    more = names.get(_MORE_SPECIAL_TOKENS) or []
    if not isinstance(more, list):
        raise CheckpointError(f"{path}: {_MORE_SPECIAL_TOKENS} is {more!r}, expected a list")
    for value in (*(names.get(field) for field in _SPECIAL_TOKEN_FIELDS), *more):
        if value is not None:
            yield _token(path, {"content": value} if isinstance(value, str) else value, special=True)


def _numbered_tokens(path: Path, entries: Any) -> dict[int, AddedToken]:
    if not isinstance(entries, dict) or not all(key.isdecimal() for key in entries):
        raise CheckpointError(f"{path}: added_tokens_decoder does not map token ids to tokens")
    return {int(key): _token(path, entry) for key, entry in entries.items()}


def _plain_numbered_tokens(path: Path, special: dict[str, AddedToken]) -> dict[int, AddedToken]:
    entries = _optional_object(path)
    for content, token_id in entries.items():
        if not isinstance(token_id, int) or isinstance(token_id, bool):
            raise CheckpointError(f"{path}: the id of {content!r} is {token_id!r}, expected an integer")
    return {
        token_id: AddedToken(content, special=content in special, normalized=content not in special)
        for content, token_id in entries.items()
    }


def _token(path: Path, entry: Any, **flags: bool) -> AddedToken:
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(content, str) or not content:
        raise CheckpointError(f"{path}: {entry!r} is not a token: expected a text, or an object with its content")
    return AddedToken(content, **({name: bool(entry[name]) for name in _FLAGS if name in entry} | flags))


def _optional_object(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
