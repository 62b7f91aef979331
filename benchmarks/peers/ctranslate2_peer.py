"""CTranslate2: `Generator.generate_batch`, greedy, with its own converter from transformers. See `peer_process.py`."""

import time
from typing import Any

import ctranslate2


def convert(checkpoint: str, variant: str, folder: str) -> None:
    """Convert with quantized weights: "int8", or "float32"."""
    from ctranslate2.converters import TransformersConverter  # it imports torch, which running does not need

    class NumberedVocabulary(TransformersConverter):
        """Names tokens by their number, because prompts are random numbers; text plays no part in speed."""

        def _load(self) -> Any:
            spec = super()._load()
            spec.register_vocabulary([str(token) for token in range(spec.decoder.embeddings.weight.shape[0])])
            spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = "0"
            return spec

    NumberedVocabulary(checkpoint).convert(folder, quantization=variant, force=True)


class Model:
    """A converted model."""

    def __init__(self, folder: str, variant: str, threads: int) -> None:
        self._generator = ctranslate2.Generator(folder, device="cpu", compute_type=variant, intra_threads=threads)

    def prefill(self, prompt: list[int]) -> float:
        """One new token: it is chosen from the logits after the prompt."""
        started_at = time.perf_counter()
        self._generate([prompt], 1)
        return time.perf_counter() - started_at

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
        """The first new token ends the prompt; each other one is a step."""
        step_ends: dict[int, float] = {}
        tokens = self._generate(prompts, new_tokens + 1, step_ends)
        return max(step_ends.values()) - step_ends[0], tokens - len(prompts)

    def _generate(self, prompts: list[list[int]], new_tokens: int, step_ends: dict[int, float] | None = None) -> int:
        def on_token(result: Any) -> bool:
            if step_ends is not None:
                step_ends[result.step] = time.perf_counter()
            return False

        results = self._generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=new_tokens,
            min_length=new_tokens,
            include_prompt_in_result=False,
            callback=on_token,
        )
        return sum(len(result.sequences_ids[0]) for result in results)
