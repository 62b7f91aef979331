"""The golden logits of a quantized folder; `gpt2_edge.machine_check` compares a machine with them."""

from dataclasses import replace
from pathlib import Path
from typing import Final

import onnx

from gpt2_edge.errors import QuantizationError
from gpt2_edge.machine_check import GOLDEN_TOKENS, Golden, make_golden
from gpt2_edge.manifest import Architecture
from gpt2_edge.quantize.branches import always_few, has_branches
from gpt2_edge.quantize.reference import reference_logits
from gpt2_edge.quantize.texts import held_out_text
from gpt2_edge.tokenizer import Tokenizer

# Where no kernel chooses how it rounds, the storyteller's logits were off by 0.0001 % of their spread in one pass and
# by 1 % token by token, because keys and values differ in their last bits; where integer products saturate, by 3.8 %.
_LEAST_TOLERANCE: Final = 0.02


def golden_logits(graph: Path, tokenizer: Tokenizer, architecture: Architecture) -> Golden:
    """Compute the golden logits of a graph, over the beginning of a fixed text.

    Args:
        graph: The graph, with its weights beside it.
        tokenizer: Of the model.
        architecture: Of the model.

    Raises:
        QuantizationError: The graph has an operator that the reference does not know.
    """
    tokens = [token for token in tokenizer.encode(held_out_text()) if token < architecture.vocabulary_size]
    tokens = tokens[: min(GOLDEN_TOKENS, architecture.context_length)]
    try:
        model = onnx.load(graph)
        golden = _golden(model, architecture, tokens)
        if has_branches(model):
            golden = replace(golden, decoded=_golden(always_few(model), architecture, tokens))
    except (NotImplementedError, RuntimeError) as error:
        raise QuantizationError(f"the golden logits cannot be computed: {error}") from error
    return golden


def _golden(model: onnx.ModelProto, architecture: Architecture, tokens: list[int]) -> Golden:
    golden = make_golden(tokens, reference_logits(model, architecture, tokens), _LEAST_TOLERANCE)
    # Some kernels round activations in another way than most, or not at all: all of that is right.
    exact = reference_logits(model, architecture, tokens, round_activations=False)
    return replace(golden, tolerance=max(_LEAST_TOLERANCE, 2 * golden.difference(exact)))
