"""The names of a fused graph's cache inputs and outputs, which those who write graphs and who run them share."""


def key_value_names(layers: int) -> tuple[list[str], list[str]]:
    """Return the names of the cache's inputs and of its outputs: key and value of layer 0, of layer 1, ..."""
    parts = [f"{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
    return [f"past_key_values.{part}" for part in parts], [f"present.{part}" for part in parts]
