"""Measure how fast transformers decodes a GPT-2 with random weights, for `cuda_checks.py` to compare with.

    python benchmarks/cuda_transformers.py '{"layers": 12, ...}'

A process of its own, because torch brings its own versions of NVIDIA's libraries. Prints tokens a second.
"""

import json
import sys
import time
from typing import Any

import torch
import transformers

_transformers: Any = transformers  # whose classes have no types


def decode_rate(asked: dict[str, Any]) -> float:
    """Return tokens a second of greedy decoding at batch 1, after a prompt.

    Args:
        asked: layers, heads, width, context_length and vocabulary_size of the model; prompt_tokens, new_tokens;
            device, "cpu" or as torch calls it, which computes in half precision.
    """
    torch.manual_seed(0)
    config = _transformers.GPT2Config(
        vocab_size=asked["vocabulary_size"],
        n_positions=asked["context_length"],
        n_embd=asked["width"],
        n_layer=asked["layers"],
        n_head=asked["heads"],
    )
    on_gpu = asked["device"] != "cpu"
    model = _transformers.GPT2LMHeadModel(config).to(asked["device"], torch.float16 if on_gpu else torch.float32).eval()
    rates: list[float] = []
    with torch.inference_mode():
        for _ in range(3):
            prompt = torch.arange(asked["prompt_tokens"], device=asked["device"])[None]
            output = model(prompt, use_cache=True)
            chosen = output.logits[:, -1:].argmax(-1)
            started_at = time.perf_counter()
            for _ in range(asked["new_tokens"]):
                output = model(chosen, past_key_values=output.past_key_values, use_cache=True)
                chosen = output.logits[:, -1:].argmax(-1)
            chosen.item()  # waits for the GPU
            rates.append(asked["new_tokens"] / (time.perf_counter() - started_at))
    return max(rates)


if __name__ == "__main__":
    print(decode_rate(json.loads(sys.argv[1])))
