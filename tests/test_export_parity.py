"""An exported graph computes what transformers computes from the same checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, PreTrainedModel
from transformers.activations import ACT2FN

import gpt2_edge
from gpt2_edge.export import export_checkpoint
from gpt2_edge.export.activations import ACTIVATIONS
from gpt2_edge.export.config import read_config
from gpt2_edge.export.weights import read_weights

FloatArray = npt.NDArray[np.float32]

TOLERANCE: Final = 1e-4
STORYTELLER: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"

# Options that do not touch each other share a checkpoint. One layer is enough where only the MLP is of interest.
VARIATIONS: Final[dict[str, dict[str, Any]]] = {
    "all defaults": {},
    "gelu and an inner width": {"activation_function": "gelu", "n_inner": 48},
    "relu and a large epsilon": {"activation_function": "relu", "layer_norm_epsilon": 0.1},
    "silu and attention without a scale": {"activation_function": "silu", "scale_attn_weights": False},
    "tanh and attention scaled by layer": {
        "activation_function": "tanh",
        "scale_attn_by_inverse_layer_idx": True,
        "n_layer": 3,
    },
    "no scale but by layer": {"scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True},
    "quick_gelu and reordered attention": {
        "activation_function": "quick_gelu",
        "reorder_and_upcast_attn": True,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "gelu_pytorch_tanh, short context, other vocabulary": {
        "activation_function": "gelu_pytorch_tanh",
        "n_positions": 9,
        "vocab_size": 8197,
        "n_layer": 1,
    },
    "heads of 5": {"n_embd": 20, "n_head": 4},
    "heads of 12, untied head": {"n_embd": 36, "n_head": 3, "tie_word_embeddings": False},
    "one head, context of several chunks": {"n_head": 1, "n_positions": 300, "n_layer": 1},
    "mish": {"activation_function": "mish", "n_layer": 1},
    "relu2": {"activation_function": "relu2", "n_layer": 1},
    "relu6": {"activation_function": "relu6", "n_layer": 1},
    "sigmoid": {"activation_function": "sigmoid", "n_layer": 1},
    "linear": {"activation_function": "linear", "n_layer": 1},
}


@dataclass(frozen=True)
class Exported:
    """A checkpoint as transformers loads it, and the model folder that was exported from it."""

    reference: GPT2LMHeadModel
    folder: Path
    model: gpt2_edge.Model

    @property
    def config(self) -> GPT2Config:
        return self.reference.config

    def expected_logits(self, tokens: list[int]) -> FloatArray:
        with torch.no_grad():
            return self.reference(torch.tensor([tokens])).logits[0].numpy()

    def random_tokens(self, count: int, seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(0, self.config.vocab_size, count).tolist()


def load_reference(checkpoint: Path) -> GPT2LMHeadModel:
    # transformers' default attention ignores two of the options that are compared here.
    return GPT2LMHeadModel.from_pretrained(checkpoint, attn_implementation="eager", dtype=torch.float32).eval()


def greedy_tokens(reference: GPT2LMHeadModel, prompt: list[int], count: int) -> list[int]:
    """Continue a prompt with transformers' own loop and cache, end-of-text being a token like any other."""
    reference.generation_config.eos_token_id = None
    prompt_row = torch.tensor([prompt])
    tokens = reference.generate(
        prompt_row, attention_mask=torch.ones_like(prompt_row), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=VARIATIONS, ids=str)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]
) -> Iterator[Exported]:
    place = tmp_path_factory.mktemp("variation")
    checkpoint = write_checkpoint(place / "checkpoint", **VARIATIONS[request.param])
    export_checkpoint(checkpoint, place / "model")
    with gpt2_edge.load(place / "model", threads=1) as model:
        yield Exported(load_reference(checkpoint), place / "model", model)


@pytest.fixture(scope="module")
def storyteller(storyteller_fp32: Path, fp32_model: gpt2_edge.Model) -> Exported:
    return Exported(load_reference(STORYTELLER), storyteller_fp32, fp32_model)


def check_logits(exported: Exported, tokens: list[int]) -> None:
    expected = exported.expected_logits(tokens)
    # A model whose logits hardly depend on what came before would pass with anything in its cache.
    changed = exported.expected_logits([*tokens[:-5], tokens[-5] ^ 1, *tokens[-4:]])
    assert np.abs(changed - expected)[-4:].max(axis=1).min() > 10 * TOLERANCE
    np.testing.assert_allclose(exported.model.logits(tokens), expected, rtol=0, atol=TOLERANCE)


def check_greedy(exported: Exported, prompt: list[int], count: int) -> None:
    done = exported.model.generate(prompt, max_new_tokens=count, ignore_eos=True)
    assert done.tokens == greedy_tokens(exported.reference, prompt, count)


class Graph:
    """The exported graph in ONNX Runtime with its default settings, and nothing of ours around it.

    The cache starts full of noise: what lies beyond a row's valid length must not matter.
    """

    def __init__(self, exported: Exported, rows: int, capacity: int = 8) -> None:
        self._session = onnxruntime.InferenceSession(
            str(exported.folder / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        noise = np.random.default_rng(0)
        self._cache = {
            node.name: noise.normal(size=(rows, node.shape[1], capacity, node.shape[3])).astype(np.float32)
            for node in self._session.get_inputs()
            if node.name.startswith("past_key_values.")
        }
        self._lengths = np.zeros(rows, np.int32)

    def step(self, new: list[list[int]]) -> list[FloatArray]:
        """Compute new tokens of each row, the shorter ones padded on the right; return each row's logits."""
        longest = max(map(len, new))
        input_ids = np.full((len(new), longest), 7, np.int64)
        position_ids = np.zeros((len(new), longest), np.int64)
        wanted = []
        for row, tokens in enumerate(new):
            input_ids[row, : len(tokens)] = tokens
            position_ids[row, : len(tokens)] = self._lengths[row] + np.arange(len(tokens))
            wanted += range(row * longest, row * longest + len(tokens))
        self._lengths += np.array([len(tokens) for tokens in new], np.int32)
        names = [name.replace("past_key_values", "present") for name in self._cache]
        logits, *present = self._session.run(
            ["logits", *names],
            {
                "input_ids": input_ids,
                "position_ids": position_ids,
                "seqlens_k": self._lengths - 1,
                "total_sequence_length": np.array(self._lengths.max(), np.int32),
                "logit_positions": np.array(wanted, np.int64),
                **self._cache,
            },
        )
        self._cache = dict(zip(self._cache, present, strict=True))
        return np.split(logits, np.cumsum([len(tokens) for tokens in new])[:-1])


def check_steps(exported: Exported, rows: list[list[int]], steps: list[list[int]]) -> None:
    """Run rows through the graph in steps of so many tokens for each row, and compare each row as if alone."""
    graph = Graph(exported, len(rows))
    done = [0] * len(rows)
    for step in steps:
        stop = [start + count for start, count in zip(done, step, strict=True)]
        found = graph.step([row[a:b] for row, a, b in zip(rows, done, stop, strict=True)])
        for row, a, b, logits in zip(rows, done, stop, found, strict=True):
            np.testing.assert_allclose(logits, exported.expected_logits(row[:b])[a:b], rtol=0, atol=TOLERANCE)
        done = stop


def test_logits_of_a_full_context(exported: Exported) -> None:
    check_logits(exported, exported.random_tokens(exported.config.n_positions, seed=1))


def test_greedy_continuation(exported: Exported) -> None:
    check_greedy(exported, exported.random_tokens(3, seed=2), count=exported.config.n_positions - 3)


def test_one_token_after_a_prompt(exported: Exported) -> None:
    check_steps(exported, [exported.random_tokens(7, seed=3)], [[5], [1], [1]])


def test_several_tokens_after_a_prompt(exported: Exported) -> None:
    check_steps(exported, [exported.random_tokens(8, seed=4)], [[3], [4], [1]])


def test_prompts_of_different_lengths_side_by_side(exported: Exported) -> None:
    rows = [exported.random_tokens(count, seed=5 + count) for count in (7, 5, 3)]
    check_steps(exported, rows, [[5, 3, 1], [1, 1, 1], [1, 1, 1]])


def test_the_storyteller(storyteller: Exported) -> None:
    text = (STORYTELLER / "held_out.txt").read_text(encoding="utf-8")
    tokens = storyteller.model.tokenize(text[:4000])[:300]  # three chunks of prefill
    check_logits(storyteller, tokens)
    check_greedy(storyteller, tokens[:20], count=60)
    check_steps(storyteller, [tokens[:7], tokens[10:15], tokens[20:23]], [[5, 3, 1], [1, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_is_the_one_that_transformers_has_under_that_name(name: str) -> None:
    grid = torch.cat([torch.linspace(-30, 30, 6001), torch.tensor([0.0, -0.0, 1e-30, 1e4, -1e4])])
    torch.testing.assert_close(ACTIVATIONS[name](grid), ACT2FN[name](grid), rtol=1e-6, atol=2e-6)


def test_every_kind_of_activation_goes_through_an_export() -> None:
    """Names that share a function need no export each."""
    exported = {ACTIVATIONS[variation.get("activation_function", "gelu_new")] for variation in VARIATIONS.values()}
    assert set(ACTIVATIONS.values()) - exported == set()


def add_causal_masks(checkpoint: Path) -> None:
    """Add what old checkpoints keep beside their weights."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    for layer in range(2):
        weights[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
        weights[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-10000.0)
    save_file(weights, file, metadata={"format": "pt"})


def add_stale_head(checkpoint: Path) -> None:
    """Add a head that is not the embedding, to a checkpoint whose config says that it is."""
    file = checkpoint / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = torch.ones(8192, 32)
    save_file(weights, file, metadata={"format": "pt"})


def save_again(
    kind: type[PreTrainedModel] = GPT2LMHeadModel, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB"
) -> Callable[[Path], None]:
    def save(checkpoint: Path) -> None:
        model = kind.from_pretrained(checkpoint, dtype=dtype)
        (checkpoint / "model.safetensors").unlink()
        model.save_pretrained(checkpoint, max_shard_size=max_shard_size)

    return save


FORMS: Final[dict[str, Callable[[Path], None]]] = {
    "as transformers saves it": lambda checkpoint: None,
    "without the prefix of a model with a head": save_again(GPT2Model),
    "in shards": save_again(max_shard_size="500KB"),
    "float16": save_again(dtype=torch.float16),
    "bfloat16": save_again(dtype=torch.bfloat16),
    "float64": save_again(dtype=torch.float64),
    "with causal masks": add_causal_masks,
    "with a head that is not used": add_stale_head,
    "bfloat16 shards without the prefix": save_again(GPT2Model, dtype=torch.bfloat16, max_shard_size="250KB"),
}


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_as_transformers_reads_them(form: str, make_checkpoint: Callable[..., Path]) -> None:
    checkpoint = make_checkpoint()
    FORMS[form](checkpoint)
    weights = read_weights(checkpoint, read_config(checkpoint))
    expected = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_reference(checkpoint).state_dict().items()
        if name != "lm_head.weight"
    }
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0)


def test_bfloat16_shards_with_masks_and_without_prefix_export(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(n_layer=2)
    add_causal_masks(checkpoint)
    save_again(GPT2Model, dtype=torch.bfloat16, max_shard_size="250KB")(checkpoint)
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    export_checkpoint(checkpoint, tmp_path / "model")
    with gpt2_edge.load(tmp_path / "model", threads=1) as model:
        exported = Exported(load_reference(checkpoint), tmp_path / "model", model)
        check_logits(exported, exported.random_tokens(32, seed=1))
