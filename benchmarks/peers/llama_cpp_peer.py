"""llama.cpp: `llama_decode` on random tokens as llama-bench does, through llama-cpp-python. See `peer_process.py`."""

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

_FILE_TYPES = {
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
_NAMES_IN_GGUF = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_PREFIX = "transformer."
_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
_LOG_LEVEL_ERROR = 4


def convert(checkpoint: str, variant: str, folder: str) -> None:
    """Write `model.gguf`: "F32", or quantized from that by llama.cpp itself.

    llama.cpp's `convert_hf_to_gguf.py` would do, but for tokenizers that it does not know; prompts here are numbers, so
    the file has no tokenizer. The matrices are the same.
    """
    full, target = Path(folder) / "full.gguf", Path(folder) / "model.gguf"
    write_full_precision(Path(checkpoint), target if variant == "F32" else full)
    if variant == "F32":
        return
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = _FILE_TYPES[variant]
    status = llama_cpp.llama_model_quantize(str(full).encode(), str(target).encode(), ctypes.byref(parameters))
    full.unlink()
    if status:
        raise RuntimeError(f"llama_model_quantize failed with status {status}")


def write_full_precision(checkpoint: Path, path: Path) -> None:
    """Write a checkpoint as GGUF in float32, its head tied to the embedding."""
    import gguf  # these two import what running does not need
    from safetensors.numpy import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["activation_function"] not in _TANH_GELU:
        raise ValueError(f"llama.cpp has one activation for GPT-2, not {config['activation_function']}")
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_block_count(config["n_layer"])
    writer.add_feed_forward_length(config.get("n_inner") or 4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config.get("layer_norm_epsilon", 1e-5))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for file in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            renamed = _name_in_gguf(name.removeprefix(_PREFIX))
            if renamed is not None:
                # GPT-2 stores its matrices as inputs x outputs, llama.cpp the other way around.
                matrix = tensor.T if ".c_" in name else tensor
                writer.add_tensor(renamed, matrix.astype("float32", order="C"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name_in_gguf(name: str) -> str | None:
    """Return llama.cpp's name of a tensor; None for what it does not need: masks, and the head, which is tied."""
    layer, prefix = "", ""
    if name.startswith("h."):
        _, layer, name = name.split(".", 2)
        prefix = f"blk.{layer}."
    module, _, kind = name.rpartition(".")
    renamed = _NAMES_IN_GGUF.get(module)
    return None if renamed is None else f"{prefix}{renamed}.{kind}"


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: int) -> None:
    if level == _LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


class Model:
    """A GGUF file."""

    def __init__(self, folder: str, variant: str, threads: int) -> None:
        llama_cpp.llama_log_set(_log, None)
        self._threads = threads
        self._context: int | None = None
        self._shape = (0, 0)
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(Path(folder) / "model.gguf").encode(), parameters)
        if not self._model:
            raise RuntimeError("llama_model_load_from_file failed: its messages are above")
        self._prepare(llama_cpp.llama_model_n_ctx_train(self._model), 1)

    def prefill(self, prompt: list[int]) -> float:
        """Compute a prompt, its last logits included."""
        self._prepare(len(prompt), 1)
        started_at = time.perf_counter()
        self._compute([prompt], 0)
        return time.perf_counter() - started_at

    def decode(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
        """Compute the prompts, and then one token of each in a step."""
        depth, rows = len(prompts[0]), len(prompts)
        self._prepare(depth + new_tokens, rows)
        for row, prompt in enumerate(prompts):
            self._compute([prompt], 0, first_row=row)
        tokens = prompts[0]
        started_at = time.perf_counter()
        for step in range(new_tokens):
            self._compute([[tokens[step % depth]]] * rows, depth + step)
        return time.perf_counter() - started_at, new_tokens * rows

    def logits(self, tokens: list[int]) -> Any:
        """Return the logits after each token as a numpy array of shape [tokens, vocabulary]."""
        import numpy as np

        self._prepare(len(tokens), 1)
        self._compute([tokens], 0, every_logit=True)
        vocabulary_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        pointer = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), vocabulary_size)).copy()

    def _prepare(self, tokens: int, rows: int) -> None:
        """Make an empty cache for so many sequences of so many tokens."""
        if (tokens, rows) == self._shape:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            llama_cpp.llama_free(self._context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = tokens * rows
        parameters.n_seq_max = rows
        parameters.n_threads = parameters.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama_init_from_model failed: its messages are above")
        self._shape = (tokens, rows)

    def _compute(self, rows: list[list[int]], position: int, first_row: int = 0, every_logit: bool = False) -> None:
        batch = llama_cpp.llama_batch_init(sum(map(len, rows)), 0, 1)
        count = 0
        for number, tokens in enumerate(rows, first_row):
            for offset, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = position + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = number
                batch.logits[count] = every_logit or offset == len(tokens) - 1
                count += 1
        batch.n_tokens = count
        status = llama_cpp.llama_decode(self._context, batch)
        llama_cpp.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode failed with status {status}")
        llama_cpp.llama_synchronize(self._context)
