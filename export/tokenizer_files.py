"""Bring a checkpoint's tokenizer into a model folder as one `tokenizer.json`."""

from pathlib import Path
from typing import Final

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gpt2_edge.errors import CheckpointError

_END_OF_TEXT: Final = "<|endoftext|>"


def read_tokenizer(checkpoint: Path, vocabulary_size: int) -> Tokenizer:
    """Read `tokenizer.json`, or GPT-2's own pair `vocab.json` and `merges.txt`.

    Raises:
        CheckpointError: The checkpoint has neither, they cannot be read, are of another kind, or have tokens
            the model does not know.
    """
    whole = checkpoint / "tokenizer.json"
    vocabulary, merges = checkpoint / "vocab.json", checkpoint / "merges.txt"
    try:
        if whole.is_file():
            tokenizer = Tokenizer.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            tokenizer = _from_gpt2_files(vocabulary, merges)
        else:
            raise CheckpointError(f"{checkpoint} has no tokenizer.json, and not both vocab.json and merges.txt")
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"cannot read the tokenizer of {checkpoint}: {error}") from error
    if not isinstance(tokenizer.model, models.BPE) or not isinstance(tokenizer.decoder, decoders.ByteLevel):
        raise CheckpointError(
            f"{checkpoint}: the tokenizer is {type(tokenizer.model).__name__} with the decoder "
            f"{type(tokenizer.decoder).__name__}; only GPT-2's byte-level BPE can be exported"
        )
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocabulary_size:
        raise CheckpointError(
            f"{checkpoint}: the tokenizer has a token {largest}, the model's vocabulary ends at {vocabulary_size - 1}"
        )
    return tokenizer


def _from_gpt2_files(vocabulary: Path, merges: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if tokenizer.token_to_id(_END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([AddedToken(_END_OF_TEXT, special=True, normalized=False)])
    return tokenizer
