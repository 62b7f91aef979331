"""The module that is traced: GPT-2 with past-key-value inputs, whose attention is one fused operator.

It cannot run in torch, since the operator exists in ONNX Runtime only: `com.microsoft::GroupQueryAttention` takes
queries, keys and values side by side, in the order in which GPT-2's `c_attn` makes them, and updates a cache
[batch, heads, capacity, head_size] in place.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from gpt2_edge.export.activations import ACTIVATIONS
from gpt2_edge.export.config import CheckpointConfig
from gpt2_edge.export.weights import Weights

_Attribute = int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]


class FusedGpt2(nn.Module):
    """GPT-2 as the runtime drives it.

    Args:
        weights: As `read_weights` gives them.
        config: The checkpoint's config.
    """

    def __init__(self, weights: Weights, config: CheckpointConfig) -> None:
        super().__init__()
        self.wte = _Table(weights["wte.weight"])
        self.wpe = _Table(weights["wpe.weight"])
        self.h = nn.ModuleList(_Block(weights, config, layer) for layer in range(config.n_layer))
        self.ln_f = _LayerNorm(weights, "ln_f", config)
        self.lm_head = _Table(weights["lm_head.weight"]) if "lm_head.weight" in weights else None

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
        logit_positions: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Compute new tokens after those in the cache.

        Args:
            input_ids: [batch, sequence].
            position_ids: [batch, sequence].
            seqlens_k: [batch], valid length of each row after this step, minus 1.
            total_sequence_length: Scalar, the largest valid length after this step.
            logit_positions: [n], indices into the flattened batch x sequence.
            past: Key and value of each layer, [batch, heads, capacity, head_size].

        Returns:
            Logits [n, vocabulary], then the updated keys and values.
        """
        tokens, positions = (
            functional.embedding(ids, table.weight) for ids, table in ((input_ids, self.wte), (position_ids, self.wpe))
        )
        # [batch x sequence, width]: 8-bit layers have a scale for each row, and the head takes rows out.
        hidden = (tokens + positions).reshape(-1, tokens.shape[-1])
        present: list[Tensor] = []
        for layer, module in enumerate(self.h):
            block = cast(_Block, module)
            attended, key, value = block.attend(
                hidden, input_ids.shape, past[2 * layer], past[2 * layer + 1], seqlens_k, total_sequence_length
            )
            present += [key, value]
            if layer == len(self.h) - 1:
                # Of the other tokens, only the keys and values are of use from here on.
                hidden, attended = (functional.embedding(logit_positions, each) for each in (hidden, attended))
            hidden = block(hidden, attended)
        head = self.wte if self.lm_head is None else self.lm_head
        return functional.linear(self.ln_f(hidden), head.weight), *present


class _Table(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


class _LayerNorm(nn.Module):
    def __init__(self, weights: Weights, name: str, config: CheckpointConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights[f"{name}.weight"], requires_grad=False)
        self.bias = nn.Parameter(weights[f"{name}.bias"], requires_grad=False)
        self.epsilon = config.layer_norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class _Linear(nn.Module):
    """`x @ weight + bias` with the weight as GPT-2 keeps it, [inputs, outputs]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        self.bias = nn.Parameter(bias.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class _Attention(nn.Module):
    def __init__(self, weights: Weights, config: CheckpointConfig, layer: int) -> None:
        super().__init__()
        name = f"h.{layer}.attn"
        self.c_attn = _Linear(
            _pad_heads(weights[f"{name}.c_attn.weight"], config, dimension=1, groups=3),
            _pad_heads(weights[f"{name}.c_attn.bias"], config, dimension=0, groups=3),
        )
        self.c_proj = _Linear(
            _pad_heads(weights[f"{name}.c_proj.weight"], config, dimension=0, groups=1), weights[f"{name}.c_proj.bias"]
        )
        self.attributes: dict[str, _Attribute] = {
            "num_heads": config.n_head,
            "kv_num_heads": config.n_head,
            "scale": config.attention_scale(layer),
            "do_rotary": 0,
        }

    def forward(
        self,
        x: Tensor,
        shape: torch.Size,
        past_key: Tensor,
        past_value: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, sequence = shape
        query_key_value = self.c_attn(x).reshape(batch, sequence, -1)
        triple_width = query_key_value.shape[-1]
        attended, key, value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            (query_key_value, None, None, past_key, past_value, seqlens_k, total_sequence_length),
            self.attributes,
            dtypes=(torch.float32,) * 3,
            shapes=((batch, sequence, triple_width // 3), past_key.shape, past_value.shape),
            version=1,
        )
        return attended.reshape(batch * sequence, -1), key, value


class _MLP(nn.Module):
    def __init__(self, weights: Weights, config: CheckpointConfig, layer: int) -> None:
        super().__init__()
        name = f"h.{layer}.mlp"
        self.c_fc = _Linear(weights[f"{name}.c_fc.weight"], weights[f"{name}.c_fc.bias"])
        self.c_proj = _Linear(weights[f"{name}.c_proj.weight"], weights[f"{name}.c_proj.bias"])
        self.activation = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.c_proj(self.activation(self.c_fc(x)))
        return projected


class _Block(nn.Module):
    def __init__(self, weights: Weights, config: CheckpointConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = _LayerNorm(weights, f"h.{layer}.ln_1", config)
        self.attn = _Attention(weights, config, layer)
        self.ln_2 = _LayerNorm(weights, f"h.{layer}.ln_2", config)
        self.mlp = _MLP(weights, config, layer)

    def attend(
        self,
        hidden: Tensor,
        shape: torch.Size,
        past_key: Tensor,
        past_value: Tensor,
        seqlens_k: Tensor,
        total_sequence_length: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what attention gathers, [batch x sequence, heads x head_size], and the updated keys and values."""
        attended: Tensor
        attended, key, value = self.attn(
            self.ln_1(hidden), shape, past_key, past_value, seqlens_k, total_sequence_length
        )
        return attended, key, value

    def forward(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Return the next hidden states; of tokens, which do not see each other any more."""
        hidden = hidden + self.attn.c_proj(attended)
        projected: Tensor = self.mlp(self.ln_2(hidden))
        return hidden + projected


def _pad_heads(tensor: Tensor, config: CheckpointConfig, dimension: int, groups: int) -> Tensor:
    """Fill each head up with zeros to the size that the attention kernel takes.

    A query and a key that end in zeros have the same product; a value that ends in zeros gives zeros, which the
    matching zero rows of the output matrix ignore. The result is exact.
    """
    padding = config.padded_head_size - config.head_size
    if padding == 0:
        return tensor
    before, after = tensor.shape[:dimension], tensor.shape[dimension + 1 :]
    by_head = tensor.reshape(*before, groups * config.n_head, config.head_size, *after)
    zeros = tensor.new_zeros(*before, groups * config.n_head, padding, *after)
    return torch.cat([by_head, zeros], dim=dimension + 1).reshape(*before, -1, *after)
