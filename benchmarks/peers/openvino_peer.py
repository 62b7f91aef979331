"""OpenVINO GenAI: `LLMPipeline`, greedy, on a model exported by optimum-intel. See `peer_process.py`."""

import time

import numpy as np
import openvino_genai
from openvino import Tensor


def convert(checkpoint: str, variant: str, folder: str) -> None:
    """Export with weights compressed by NNCF, each with its own defaults: "int8" or "int4"."""
    from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

    compression = OVWeightQuantizationConfig(bits=int(variant.removeprefix("int")))
    model = OVModelForCausalLM.from_pretrained(checkpoint, export=True, quantization_config=compression, compile=False)
    model.save_pretrained(folder)


class Model:
    """An exported model.

    The pipeline caches prefixes of prompts: prompts have to be new each time.
    """

    def __init__(self, folder: str, variant: str, threads: int) -> None:
        self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)

    def prefill(self, prompt: list[int]) -> float:
        """One new token: it is chosen from the logits after the prompt."""
        started_at = time.perf_counter()
        self._generate([prompt], 1)
        return time.perf_counter() - started_at

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
        """The first new token ends the prompt; each other one is a step. OpenVINO GenAI takes their times itself."""
        results = self._generate(prompts, new_tokens + 1)
        times_ms = results.perf_metrics.raw_metrics.m_new_token_times
        return (times_ms[-1] - times_ms[0]) / 1e3, sum(map(len, results.tokens)) - len(prompts)

    def _generate(self, prompts: list[list[int]], new_tokens: int) -> openvino_genai.EncodedResults:
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos = new_tokens, True
        tokens = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(Tensor(tokens), Tensor(np.ones_like(tokens)))
        return self._pipeline.generate(inputs, settings)
