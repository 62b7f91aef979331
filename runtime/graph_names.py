"""What those who write fused graphs and those who run them must agree on, beside the manifest."""

from typing import Final

# The initializer of a graph with two branches that says up to how many new tokens of a row are computed in the one for
# a few.
MOST_FEW_TOKENS: Final = "branches.most_few_tokens"


def key_value_names(layers: int) -> tuple[list[str], list[str]]:
    """Return the names of the cache's inputs and of its outputs: key and value of layer 0, of layer 1, ..."""
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [f"past_key_values.{part}" for part in parts], [f"present.{part}" for part in parts]
