"""The commands of `gpt2-edge` that need nothing but the runtime."""

if __name__ != "gpt2_edge.commands":
    raise ImportError(f"this package is imported as gpt2_edge.commands, not as {__name__}: run pip install .")
