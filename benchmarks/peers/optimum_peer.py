"""optimum-onnx: `ORTModelForCausalLM` with its own export and dynamic INT8, a forward pass for each step.

See `peer_process.py`.
"""

import time
from pathlib import Path

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM

_QUANTIZED_NAME = "model_quantized.onnx"


def convert(checkpoint: str, variant: str, folder: str) -> None:
    """Export as "fp32", or export and quantize as "int8": dynamic, with the settings for AVX-512 VNNI."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    model = ORTModelForCausalLM.from_pretrained(checkpoint, export=True)
    if variant == "fp32":
        model.save_pretrained(folder)
        return
    exported = Path(folder) / "exported"
    model.save_pretrained(exported)
    ORTQuantizer.from_pretrained(exported).quantize(
        save_dir=folder, quantization_config=AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    )
    for file in exported.iterdir():
        file.unlink()
    exported.rmdir()


class Model:
    """An exported model."""

    def __init__(self, folder: str, variant: str, threads: int) -> None:
        torch.set_num_threads(threads)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        name = _QUANTIZED_NAME if variant == "int8" else "model.onnx"
        self._model = ORTModelForCausalLM.from_pretrained(folder, file_name=name, session_options=options)

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        """Compute a prompt; the exported graph computes the logits of all its tokens."""
        tokens = torch.tensor([prompt])
        started_at = time.perf_counter()
        self._forward(tokens, None, 0)
        return time.perf_counter() - started_at

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
        """Go on from the prompts with the likeliest tokens."""
        depth = len(prompts[0])
        logits, past = self._forward(torch.tensor(prompts), None, 0)
        started_at, computed = time.perf_counter(), 0
        for step in range(new_tokens):
            chosen = logits[:, -1:].argmax(-1)
            logits, past = self._forward(chosen, past, depth + step)
            computed += chosen.numel()
        return time.perf_counter() - started_at, computed

    def _forward(self, tokens: torch.Tensor, past: object, depth: int) -> tuple[torch.Tensor, object]:
        rows, count = tokens.shape
        output = self._model(
            tokens,
            attention_mask=torch.ones(rows, depth + count, dtype=torch.int64),
            position_ids=torch.arange(depth, depth + count).expand(rows, count),
            past_key_values=past,
            use_cache=True,
        )
        return output.logits, output.past_key_values
