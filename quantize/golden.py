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

# Last bits decide how some activations are rounded, and what follows from that adds up. Over 24 texts, in one pass, the
# storyteller's logits as `int8` were off by up to 1.8 % of their spread; without any rounding of activations they are
# 2.0 to 2.3 % off, and where integer products saturate 6.7 to 9 %.
_LEAST_TOLERANCE: Final = 0.02
_LARGEST_TOLERANCE: Final = 0.5  # logits that are all 0 are off by 1
_TOKEN_STRIDE: Final = 7919


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
    if not tokens:  # a vocabulary that has no letters
        tokens = [place * _TOKEN_STRIDE % architecture.vocabulary_size for place in range(GOLDEN_TOKENS)]
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
    # Kernels round activations each in its own way, or not at all: all of that is right.
    exact = reference_logits(model, architecture, tokens, round_activations=False)
    tolerance = min(max(_LEAST_TOLERANCE, 2 * golden.difference(exact)), _LARGEST_TOLERANCE)
    return replace(golden, tolerance=tolerance)
