"""Show a text while it is being written, and what is known about it afterwards.

Run: python examples/stream.py [FOLDER]
"""

import sys
import time

import gpt2_edge

folder = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
prompt = "Once upon a time there was a king who"

with gpt2_edge.load(folder) as model:
    began = time.perf_counter()
    first_after = None
    with model.stream(prompt, max_new_tokens=60, temperature=0.8, top_k=40, seed=7) as stream:
        print(prompt, end="")
        for piece in stream:
            if first_after is None:
                first_after = time.perf_counter() - began
            print(piece.text, end="", flush=True)
    result = stream.result
    print(f"\n\nfirst piece after {1000 * (first_after or 0):.0f} ms,", end=" ")
    print(f"then {result.timings.decode_tokens_per_second:.0f} tokens/s; ended by {result.finish_reason}")

    # The pieces put together are what generate returns for the same seed.
    whole = model.generate(prompt, max_new_tokens=60, temperature=0.8, top_k=40, seed=result.seed)
    print("the same text as generate:", whole.text == result.text)
