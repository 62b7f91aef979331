"""Fixtures that several test files share."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Tests compare with transformers, which must not look for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# torch's threads wait for each other in busy loops: on a machine that also does something else, tiny models take
# fifty times as long with two threads as with one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import gpt2_edge

REPOSITORY = Path(__file__).resolve().parent.parent
STORYTELLER_CHECKPOINT = REPOSITORY / "models" / "storyteller"


@pytest.fixture(scope="session")
def storyteller_fp32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storyteller's fp32 model folder, exported by the code under test."""
    from gpt2_edge.export import export_checkpoint

    folder = tmp_path_factory.mktemp("models") / "storyteller-fp32"
    export_checkpoint(STORYTELLER_CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="session")
def storyteller_int8(storyteller_fp32: Path) -> Path:
    """The storyteller's INT8 model folder, quantized by the code under test."""
    from gpt2_edge.quantize import quantize_folder

    folder = storyteller_fp32.parent / "storyteller-int8"
    quantize_folder(storyteller_fp32, folder)
    return folder


@pytest.fixture(scope="session")
def fp32_model(storyteller_fp32: Path) -> Iterator[gpt2_edge.Model]:
    """The storyteller at full precision, loaded."""
    with gpt2_edge.load(storyteller_fp32) as model:
        yield model


@pytest.fixture(scope="session")
def int8_model(storyteller_int8: Path) -> Iterator[gpt2_edge.Model]:
    """The storyteller at INT8, loaded."""
    with gpt2_edge.load(storyteller_int8) as model:
        yield model


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Write a tiny GPT-2 checkpoint with random weights, as transformers saves it, and the storyteller's tokenizer."""

    def write(folder: Path, **config: Any) -> Path:
        import shutil

        import torch
        from transformers import GPT2Config, GPT2LMHeadModel

        torch.manual_seed(0)
        fields = {
            "vocab_size": 8192,
            "n_positions": 32,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "attn_implementation": "eager",
            "initializer_range": 0.2,
        }
        model = GPT2LMHeadModel(GPT2Config(**(fields | config))).eval()
        # transformers starts with biases of 0 and normalization weights of 1, which would hide one that is lost.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(folder)
        shutil.copy(STORYTELLER_CHECKPOINT / "tokenizer.json", folder)
        return folder

    return write


@pytest.fixture
def make_checkpoint(tmp_path: Path, write_checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Make a tiny checkpoint of a given name in the test's own folder; see `write_checkpoint`."""

    def make(name: str = "tiny", **config: Any) -> Path:
        return write_checkpoint(tmp_path / name, **config)

    return make
