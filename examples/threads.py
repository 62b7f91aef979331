"""Let threads share one model: each gets the text that it would get alone, and together they are faster.

Run: python examples/threads.py [FOLDER]
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gpt2_edge

folder = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
seeds = range(8)

with gpt2_edge.load(folder) as model:

    def write(seed: int) -> gpt2_edge.Generation:
        """Write a text that does not end by itself."""
        return model.generate("The giant", max_new_tokens=60, temperature=0.9, top_k=40, ignore_eos=True, seed=seed)

    write(0)  # the first run of a model takes longer

    began = time.perf_counter()
    one_after_another = [write(seed) for seed in seeds]
    alone = sum(len(done.tokens) for done in one_after_another) / (time.perf_counter() - began)

    with ThreadPoolExecutor(len(seeds)) as pool:
        began = time.perf_counter()
        at_once = list(pool.map(write, seeds))
        together = sum(len(done.tokens) for done in at_once) / (time.perf_counter() - began)

same = all(before.tokens == after.tokens for before, after in zip(one_after_another, at_once, strict=True))
print(f"one after another: {alone:6.0f} tokens/s")
print(f"{len(seeds)} threads at once: {together:6.0f} tokens/s")
print("the same texts:", same)
