"""Stop a generation: from another thread, by a deadline, or by leaving the loop. What was written is kept.

Run: python examples/cancel.py [FOLDER]
"""

import sys
import threading
import time

import gpt2_edge

folder = sys.argv[1] if len(sys.argv) > 1 else "storyteller"
# Without an end of its own, so that something has to stop it.
endless = {"max_new_tokens": 1_000_000, "ignore_eos": True, "overflow": "slide", "seed": 7, "top_k": 40}

with gpt2_edge.load(folder) as model:
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    began = time.perf_counter()
    done = model.generate("The old woman", cancel=cancel, **endless)
    print(f"{done.finish_reason}: {len(done.tokens)} tokens after {time.perf_counter() - began:.2f} s")

    began = time.perf_counter()
    done = model.generate("The old woman", deadline_seconds=0.3, **endless)
    print(f"{done.finish_reason}: {len(done.tokens)} tokens after {time.perf_counter() - began:.2f} s")

    with model.stream("The old woman", **endless) as stream:
        for _ in zip(range(5), stream, strict=False):  # five pieces are enough
            pass
    print(f"{stream.result.finish_reason}: {len(stream.result.tokens)} tokens, then the loop was left")

    # The model is as good as new.
    print("next:", repr(model.generate("The old woman", max_new_tokens=5).text))
