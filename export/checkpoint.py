"""A checkpoint as exports need it: found, read and checked."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from gpt2_edge.errors import OptionError
from gpt2_edge.export.config import CheckpointConfig, read_config
from gpt2_edge.export.source import describe_source
from gpt2_edge.export.tokenizer_files import read_tokenizer
from gpt2_edge.export.weights import Weights, read_weights


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was read.

    Attributes:
        path: The folder.
        config: What of `config.json` shapes the computation.
        tokenizer: Its tokenizer.
        weights: All weights as float32.
        source: Name, revision and SHA-256 of the weights, as the manifest has them.
    """

    path: Path
    config: CheckpointConfig
    tokenizer: Tokenizer
    weights: Weights
    source: dict[str, Any]

    @property
    def has_tied_head(self) -> bool:
        """Whether the head is the token embedding."""
        return "lm_head.weight" not in self.weights


def read_checkpoint(path: Path, max_context: int | None = None) -> Checkpoint:
    """Read a checkpoint.

    Args:
        path: Its folder.
        max_context: Keep this many positions only.

    Raises:
        CheckpointError: It cannot be read, or asks for something that cannot be exported exactly.
        OptionError: `max_context` is more than the checkpoint has.
    """
    config = read_config(path)
    if max_context is not None and not 1 <= max_context <= config.n_positions:
        raise OptionError(
            f"max_context is {max_context}; the checkpoint has {config.n_positions} positions: "
            f"give 1 to {config.n_positions}"
        )
    tokenizer = read_tokenizer(path, config.vocab_size)
    weights = read_weights(path, config)
    if max_context is not None:
        config = replace(config, n_positions=max_context)
        weights["wpe.weight"] = weights["wpe.weight"][:max_context]
    return Checkpoint(path, config, tokenizer, weights, describe_source(path))
