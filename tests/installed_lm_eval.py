"""Runs lm-evaluation-harness itself on small local tasks; `make test-lm-eval` installs it and calls this."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
import pytest
import torch
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import GPT2LMHeadModel

import gpt2_edge
from gpt2_edge.benchmarks.lm_eval_model import Gpt2EdgeLM, rolling_windows

pytestmark = pytest.mark.filterwarnings("default")  # those of the harness are not ours

STORYTELLER_CHECKPOINT = Path(__file__).resolve().parent.parent / "models" / "storyteller"
QUESTIONS = [
    {"question": "Once upon a", "choices": ["time", "king", "the"], "answer": 0},
    {"question": "There was once a", "choices": ["of", "king who had three sons", "time"], "answer": 1},
    {"question": "The king had three", "choices": ["and", "old", "daughters"], "answer": 2},
]
TEXTS = [{"text": "Once upon a time there was a king."}, {"text": "The fox ran into the wood. " * 120}]
BASE = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
    "doc_to_target: '{{answer}}'\nmetric_list:\n  - metric: acc\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity\n",
    "writing": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{choices[answer]}}'\n"
    "generation_kwargs:\n  until: ['.']\n  max_gen_toks: 12\n  do_sample: false\n"
    "metric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(STORYTELLER_CHECKPOINT).eval()


@pytest.fixture(scope="module")
def results(fp32_model: gpt2_edge.Model, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        for name, body in TASKS.items():
            file = folder / f"{name}.jsonl"
            documents = TEXTS if name == "rolling" else QUESTIONS
            file.write_text("".join(json.dumps(each) + "\n" for each in documents), encoding="utf-8")
            (folder / f"{name}.yaml").write_text(f"task: {name}\n{BASE.format(file=file)}{body}", encoding="utf-8")
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        yield lm_eval.simple_evaluate(
            Gpt2EdgeLM(fp32_model), tasks=list(TASKS), task_manager=manager, log_samples=True, bootstrap_iters=0
        )


def reference_logprob(reference: GPT2LMHeadModel, inputs: list[int], scored: list[int]) -> float:
    with torch.no_grad():
        logprobs = torch.log_softmax(reference(torch.tensor([inputs])).logits[0].double(), dim=-1)
    return sum(float(logprobs[len(inputs) - len(scored) + i, token]) for i, token in enumerate(scored))


def test_multiple_choice(results: dict[str, Any], fp32_model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    for sample in results["samples"]["choice"]:
        question = fp32_model.tokenize(sample["doc"]["question"])
        for choice, (logprob, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
            whole = fp32_model.tokenize(sample["doc"]["question"] + " " + choice)
            expected = reference_logprob(reference, whole[:-1], whole[len(question) :])
            assert float(logprob) == pytest.approx(expected, abs=1e-4)
    assert results["results"]["choice"]["acc,none"] >= 2 / 3


def test_rolling(results: dict[str, Any], fp32_model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    total, words = 0.0, 0
    for document in TEXTS:
        tokens = fp32_model.tokenize(document["text"])
        windows = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, 512, 1))
        # The last token of a window is only scored.
        total += sum(reference_logprob(reference, (begin + scored)[:-1], scored) for begin, scored in windows)
        words += len(document["text"].split(" "))
    assert len(tokens) > 512
    found = results["results"]["rolling"]["word_perplexity,none"]
    assert torch.log(torch.tensor(found)).item() == pytest.approx(-total / words, abs=1e-4)


def test_writing(results: dict[str, Any], fp32_model: gpt2_edge.Model, reference: GPT2LMHeadModel) -> None:
    for sample in results["samples"]["writing"]:
        tokens = fp32_model.tokenize(sample["doc"]["question"])
        written = reference.generate(
            torch.tensor([tokens]), max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=0
        )[0, len(tokens) :].tolist()
        text = fp32_model.detokenize([token for token in written if token != 0])
        assert sample["filtered_resps"] == [text.split(".")[0]]


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_rolling_windows_are_those_of_the_harness(count: int) -> None:
    tokens = list(range(1, count + 1))
    expected = [
        ((begin + scored)[:-1], scored)
        for begin, scored in map(make_disjoint_window, get_rolling_token_windows(tokens, 0, 32, 1))
    ]
    assert list(rolling_windows(0, tokens, 32)) == expected


def test_the_command_line_of_the_harness(tmp_path: Path) -> None:
    file = tmp_path / "choice.jsonl"
    file.write_text("".join(json.dumps(each) + "\n" for each in QUESTIONS), encoding="utf-8")
    (tmp_path / "choice.yaml").write_text(f"task: choice\n{BASE.format(file=file)}{TASKS['choice']}", encoding="utf-8")
    command = [sys.executable, "-m", "gpt2_edge.benchmarks.lm_eval_model", "run", "--model", "gpt2-edge"]
    command += ["--model_args", "model=storyteller,threads=1", "--tasks", "choice", "--include_path", str(tmp_path)]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, check=False, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stderr
    assert "|choice|" in done.stdout
