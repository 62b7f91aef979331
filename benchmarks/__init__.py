"""Speed, memory and quality, side by side."""

if __name__ != "gpt2_edge.benchmarks":
    raise ImportError(f"this package is imported as gpt2_edge.benchmarks, not as {__name__}: run pip install .")
