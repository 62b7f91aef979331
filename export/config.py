"""Read a checkpoint's `config.json`, and refuse by name what cannot be exported exactly."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gpt2_edge.errors import CheckpointError
from gpt2_edge.export.activations import ACTIVATIONS
from gpt2_edge.export.json_files import read_object
from gpt2_edge.manifest import MANIFEST_NAME

# The fused attention kernel takes head sizes that are multiples of this; others are padded with zeros, exactly.
_HEAD_SIZE_MULTIPLE: Final = 8
_ARCHITECTURES: Final = ("GPT2LMHeadModel", "GPT2Model")
_OTHER_NAMES: Final = {
    "n_embd": "hidden_size",
    "n_positions": "max_position_embeddings",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}


@dataclass(frozen=True, slots=True)
class CheckpointConfig:
    """What of `config.json` shapes the computation; names are the file's own."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    tie_word_embeddings: bool
    eos_token_id: int | None

    @property
    def head_size(self) -> int:
        """Values of a head."""
        return self.n_embd // self.n_head

    @property
    def padded_head_size(self) -> int:
        """Values of a head in the KV cache."""
        return -(-self.head_size // _HEAD_SIZE_MULTIPLE) * _HEAD_SIZE_MULTIPLE

    def attention_scale(self, layer: int) -> float:
        """What the products of queries and keys of a layer are multiplied by."""
        scale = self.head_size**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale


def read_config(checkpoint: Path) -> CheckpointConfig:
    """Read `config.json` of a checkpoint; what it leaves out has transformers' defaults.

    `reorder_and_upcast_attn` only concerns the rounding of half precision: in float32 it computes the same.

    Raises:
        CheckpointError: There is none, it is not a GPT-2's, or asks for something that cannot be exported exactly.
    """
    path = checkpoint / "config.json"
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder: give the folder of a Hugging Face GPT-2 checkpoint")
    if not path.is_file():
        if (checkpoint / MANIFEST_NAME).is_file():
            raise CheckpointError(f"{checkpoint} is a model folder, not a checkpoint: it is exported already")
        raise CheckpointError(f"{checkpoint} is not a checkpoint: it has no config.json; give the folder that has it")
    document = read_object(path)
    _refuse_what_is_not_gpt2(path, document)
    fields = _Fields(path, document)
    width = fields.integer("n_embd", 768)
    config = CheckpointConfig(
        vocab_size=fields.integer("vocab_size", 50257),
        n_positions=fields.integer("n_positions", 1024),
        n_embd=width,
        n_layer=fields.integer("n_layer", 12),
        n_head=fields.integer("n_head", 12),
        n_inner=fields.integer("n_inner", 4 * width),
        activation_function=str(document.get("activation_function", "gelu_new")),
        layer_norm_epsilon=fields.number("layer_norm_epsilon", 1e-5),
        scale_attn_weights=fields.boolean("scale_attn_weights", True),
        scale_attn_by_inverse_layer_idx=fields.boolean("scale_attn_by_inverse_layer_idx", False),
        tie_word_embeddings=fields.boolean("tie_word_embeddings", True),
        eos_token_id=fields.token_id("eos_token_id", 50256),
    )
    if config.activation_function not in ACTIVATIONS:
        raise CheckpointError(
            f"{path}: activation_function is {config.activation_function!r}; "
            f"those that can be exported exactly are {', '.join(sorted(ACTIVATIONS))}"
        )
    if config.n_embd % config.n_head:
        raise CheckpointError(f"{path}: n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
    return config


def _refuse_what_is_not_gpt2(path: Path, document: dict[str, Any]) -> None:
    model_type = document.get("model_type", "gpt2")
    if model_type != "gpt2":
        raise CheckpointError(f"{path}: model_type is {model_type!r}; only 'gpt2' can be exported")
    architectures = document.get("architectures") or []
    for architecture in architectures if isinstance(architectures, list) else [architectures]:
        if architecture not in _ARCHITECTURES:
            raise CheckpointError(
                f"{path}: the architecture is {architecture!r}; those that can be exported are "
                f"{' and '.join(_ARCHITECTURES)}"
            )
    for option in ("add_cross_attention", "is_encoder_decoder", "quantization_config"):
        if document.get(option):
            raise CheckpointError(f"{path}: {option} is set, which cannot be exported")


class _Fields:
    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self._path = path
        self._document = document

    def _get(self, name: str, default: Any) -> Any:
        value = self._document.get(name)
        if value is None and name in _OTHER_NAMES:
            value = self._document.get(_OTHER_NAMES[name])
        return default if value is None else value

    def integer(self, name: str, default: int) -> int:
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{self._path}: {name} is {value!r}, expected an integer, 1 or more")
        return value

    def number(self, name: str, default: float) -> float:
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1:
            raise CheckpointError(f"{self._path}: {name} is {value!r}, expected a number between 0 and 1")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._path}: {name} is {value!r}, expected true or false")
        return value

    def token_id(self, name: str, default: int) -> int | None:
        """Read a token id; null, or one outside of the vocabulary, means that the model has none."""
        value = self._document.get(name, default)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise CheckpointError(f"{self._path}: {name} is {value!r}, expected an integer or null")
        return value if 0 <= value < self.integer("vocab_size", 50257) else None
