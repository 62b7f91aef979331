"""PyTorch: transformers' own GPT-2, one forward pass a step, in eager mode. See `peer_process.py`."""

import shutil
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def convert(checkpoint: str, variant: str, folder: str) -> None:
    """Copy the checkpoint: transformers runs it as it is."""
    for file in Path(checkpoint).iterdir():
        if file.name == "config.json" or ".safetensors" in file.name:
            shutil.copyfile(file, Path(folder) / file.name)


class Model:
    """A checkpoint, in float32."""

    def __init__(self, folder: str, variant: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Compute a prompt and its last logits."""
        tokens = torch.tensor([prompt])
        started_at = time.perf_counter()
        self._model(tokens, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - started_at

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
        """Go on from the prompts with the likeliest tokens."""
        output = self._model(torch.tensor(prompts), use_cache=True, logits_to_keep=1)
        started_at, computed = time.perf_counter(), 0
        for _ in range(new_tokens):
            chosen = output.logits[:, -1:].argmax(-1)
            output = self._model(chosen, past_key_values=output.past_key_values, use_cache=True)
            computed += chosen.numel()
        return time.perf_counter() - started_at, computed
