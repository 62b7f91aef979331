"""GPT-2 in plain torch, straight from the checkpoint's weights: what an exported graph is compared with.

Written apart from the traced module on purpose: no padding, no fused attention, no cache.
"""

import torch
from torch import Tensor
from torch.nn import functional

from gpt2_edge.export.activations import ACTIVATIONS
from gpt2_edge.export.config import CheckpointConfig
from gpt2_edge.export.weights import Weights


@torch.no_grad()
def reference_logits(weights: Weights, config: CheckpointConfig, tokens: Tensor) -> Tensor:
    """Compute the logits after every token.

    Args:
        weights: As `read_weights` gives them.
        config: The checkpoint's config.
        tokens: Token ids, shape [sequence].

    Returns:
        Logits, shape [sequence, vocabulary].
    """
    activation = ACTIVATIONS[config.activation_function]

    def normalize(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, (config.n_embd,), weight, bias, config.layer_norm_epsilon)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def split_heads(x: Tensor) -> Tensor:  # [sequence, width] -> [heads, sequence, head_size]
        return x.view(len(tokens), config.n_head, config.head_size).transpose(0, 1)

    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    hidden = weights["wte.weight"][tokens] + weights["wpe.weight"][: len(tokens)]  # [sequence, width]
    for layer in range(config.n_layer):
        block = f"h.{layer}"
        query, key, value = map(
            split_heads, linear(normalize(hidden, f"{block}.ln_1"), f"{block}.attn.c_attn").chunk(3, dim=1)
        )
        scores = query @ key.transpose(1, 2) * config.attention_scale(layer)  # [heads, sequence, sequence]
        attended = scores.masked_fill(future, -torch.inf).softmax(dim=-1) @ value
        merged = attended.transpose(0, 1).reshape(len(tokens), config.n_embd)
        hidden = hidden + linear(merged, f"{block}.attn.c_proj")
        inner = activation(linear(normalize(hidden, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        hidden = hidden + linear(inner, f"{block}.mlp.c_proj")
    head = weights.get("lm_head.weight", weights["wte.weight"])
    return normalize(hidden, "ln_f") @ head.T
