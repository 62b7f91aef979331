"""Fixtures that several test files share."""

import os
import shutil
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
from filelock import FileLock

import gpt2_edge

REPOSITORY = Path(__file__).resolve().parent.parent
STORYTELLER_CHECKPOINT = REPOSITORY / "models" / "storyteller"


def pytest_configure(config: pytest.Config) -> None:
    """Give each pytest-xdist worker one core: ONNX Runtime's threads, too, wait for each other in busy loops."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


@pytest.fixture(scope="session")
def shared_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models that take long to make; pytest-xdist's workers share it and make each once."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared-models"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def storyteller_fp32(shared_models: Path) -> Path:
    """The storyteller's fp32 model folder, exported by the code under test."""
    from gpt2_edge.export import export_checkpoint

    folder = shared_models / "storyteller-fp32"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            export_checkpoint(STORYTELLER_CHECKPOINT, folder)
    return folder


@pytest.fixture(scope="session")
def storyteller_int8(storyteller_fp32: Path, shared_models: Path) -> Path:
    """The storyteller's INT8 model folder, quantized by the code under test."""
    from gpt2_edge.quantize.pipeline import quantize_folder
    from gpt2_edge.quantize.recipes import default_recipe

    folder = shared_models / "storyteller-int8"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            calibration = STORYTELLER_CHECKPOINT / "calibration.txt"
            quantize_folder(storyteller_fp32, folder, default_recipe("int8"), calibration=calibration)
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


@pytest.fixture(params=["fp32_model", "int8_model"])
def model(request: pytest.FixtureRequest) -> gpt2_edge.Model:
    """The storyteller, once at full precision and once at INT8."""
    loaded: gpt2_edge.Model = request.getfixturevalue(request.param)
    return loaded


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models neither use what earlier tests computed nor keep what is made up in this one."""
    from gpt2_edge.prompt_reuse import PromptReuse, Reuse

    monkeypatch.setattr(PromptReuse, "find", lambda reuse, tokens, wanted, slot: Reuse(slot, 0))
    monkeypatch.setattr(PromptReuse, "extend", lambda reuse, slot, start, tokens, logits: reuse.begin(slot, 0))


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    """Write a tiny GPT-2 checkpoint with random weights, as transformers saves it, and the storyteller's tokenizer."""

    def write(folder: Path, **config: Any) -> Path:
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


@pytest.fixture
def model_copy(storyteller_int8: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the storyteller that may be changed."""
    copy = tmp_path / "copy"
    shutil.copytree(storyteller_int8, copy)
    yield copy
    shutil.rmtree(copy)
