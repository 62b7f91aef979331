"""Train the storyteller's tokenizer on its corpus and turn the corpus into arrays of tokens.

    python tokenize_corpus.py --corpus corpus

Reads what `corpus.py` wrote and writes beside it `tokenizer.json` (a byte-level BPE of at most 8,192 tokens)
and, as NumPy arrays of 16-bit token ids, `fairy.npy`, `fiction.npy` and `held_out.npy`: the books of each set
one after another in a shuffled order, `<|endoftext|>` after each.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import (  # type: ignore[import-untyped]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 8192

# The vocabulary is meant for fairy tales; the other fiction has a smaller say in it.
FICTION_BOOKS_FOR_TOKENIZER = 120
FICTION_BOOKS_FOR_TRAINING = 330

# Fixed, so that the same books give the same tokenizer and the same arrays.
TOKENIZER_SAMPLE_SEED = 0
TRAINING_SAMPLE_SEED = 3
SHUFFLE_SEED = 0

# 16 bits hold every id of the vocabulary.
Tokens: TypeAlias = npt.NDArray[np.uint16]


def read_books(path: Path) -> list[str]:
    """Read the texts of one set of books that `corpus.py` wrote."""
    try:
        books = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"No {path}: run corpus.py first, or name its output folder with --corpus") from None
    return ["\n\n".join(paragraphs) for _, paragraphs in books]


def sample_books(books: Sequence[str], count: int, seed: int) -> list[str]:
    """Draw `count` different books, in the order in which they are drawn."""
    if len(books) < count:
        raise SystemExit(f"Got {len(books)} books of other fiction: expected {count} or more from corpus.py")
    return random.Random(seed).sample(books, count)


def train_tokenizer(books: Sequence[str]) -> Tokenizer:
    """Train a byte-level BPE with `<|endoftext|>` as token 0.

    All 256 bytes are in the vocabulary from the start, so any text can be encoded.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(books, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def pack(books: Sequence[str], tokenizer: Tokenizer) -> Tokens:
    """Encode books into one array, in a shuffled order and with `<|endoftext|>` after each.

    Shuffled, because in the order of names the works of one author follow each other.
    """
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    shuffled = list(books)
    random.Random(SHUFFLE_SEED).shuffle(shuffled)
    encoded = ([*tokenizer.encode(book).ids, end_of_text] for book in shuffled)
    return np.concatenate([np.array(ids, np.uint16) for ids in encoded])


def write_tokens(books: Sequence[str], tokenizer: Tokenizer, path: Path) -> None:
    """Pack books into an array file and say how many tokens it holds."""
    tokens = pack(books, tokenizer)
    np.save(path, tokens)
    token_length = sum(len(book) for book in books) / len(tokens)
    print(f"{path.name}: {len(tokens) / 1e6:.2f} million tokens, {token_length:.2f} characters a token")


def tokenize_corpus(corpus: Path) -> None:
    """Train the tokenizer and pack the three sets of books.

    Everything is written aside and then moved into place: the arrays always belong to the tokenizer.

    Args:
        corpus: Folder that `corpus.py` wrote; the results are written there too.
    """
    fairy = read_books(corpus / "fairy.json")
    fiction = read_books(corpus / "fiction.json")
    held_out = read_books(corpus / "held_out.json")
    fiction_for_tokenizer = sample_books(fiction, FICTION_BOOKS_FOR_TOKENIZER, TOKENIZER_SAMPLE_SEED)
    fiction_for_training = sample_books(fiction, FICTION_BOOKS_FOR_TRAINING, TRAINING_SAMPLE_SEED)

    with tempfile.TemporaryDirectory(prefix=".partial-", dir=corpus) as temporary:
        aside = Path(temporary)
        tokenizer = train_tokenizer(fairy + fiction_for_tokenizer)
        tokenizer.save(str(aside / "tokenizer.json"))
        print(f"tokenizer.json: {tokenizer.get_vocab_size()} tokens")
        write_tokens(fairy, tokenizer, aside / "fairy.npy")
        write_tokens(fiction_for_training, tokenizer, aside / "fiction.npy")
        write_tokens(held_out, tokenizer, aside / "held_out.npy")
        for file in aside.iterdir():
            file.replace(corpus / file.name)


def main() -> None:
    """Read the command line and tokenize the corpus."""
    parser = argparse.ArgumentParser(
        description="Train the storyteller's tokenizer on its corpus and turn the corpus into token arrays."
    )
    parser.add_argument(
        "--corpus",
        type=Path,
        default=Path("corpus"),
        metavar="FOLDER",
        help="folder that corpus.py wrote; the results are written there too (default: %(default)s)",
    )
    tokenize_corpus(parser.parse_args().corpus)


if __name__ == "__main__":
    main()
