"""What lets lm-evaluation-harness use a model, compared with transformers.

The harness is big, so `make test` takes a stand-in for the few parts that are used; `make test-lm-eval` installs the
harness, and these tests take the real parts and `installed_lm_eval.py` runs the harness on tasks.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

import gpt2_edge

CONTEXT = 32
END_OF_TEXT = 0
HARNESS = "installed" if importlib.util.find_spec("lm_eval") else "stand-in"


class CacheHook:
    """As the harness's: what it is told is kept."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    def add_partial(self, method: str, arguments: Any, result: Any) -> None:
        self.told.append((method, arguments, result))


class StandInLM:
    def __init__(self) -> None:
        self.cache_hook = CacheHook()


@dataclass
class Request:
    """The part of `lm_eval.api.instance.Instance` that a model sees."""

    args: tuple[Any, ...]


def stand_in_modules() -> dict[str, ModuleType]:
    modules = {
        name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model", "lm_eval.api.registry")
    }
    modules["lm_eval.api.model"].LM = StandInLM  # type: ignore[attr-defined]
    modules["lm_eval.api.registry"].register_model = lambda *names: lambda cls: cls  # type: ignore[attr-defined]
    return modules


@pytest.fixture(scope="module", params=[HARNESS])
def adapter(request: pytest.FixtureRequest) -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stand-in":
            for name, module in stand_in_modules().items():
                patch.setitem(sys.modules, name, module)
        yield importlib.import_module("gpt2_edge.benchmarks.lm_eval_model")
        if request.param == "stand-in":
            sys.modules.pop("gpt2_edge.benchmarks.lm_eval_model")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("lm-eval") / "tiny", n_positions=CONTEXT)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Iterator[gpt2_edge.Model]:
    from gpt2_edge.export import export_checkpoint

    export_checkpoint(checkpoint, checkpoint.parent / "tiny-fp32")
    with gpt2_edge.load(checkpoint.parent / "tiny-fp32") as loaded:
        yield loaded


@pytest.fixture(scope="module")
def lm(adapter: Any, model: gpt2_edge.Model) -> Any:
    return adapter.Gpt2EdgeLM(model)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> "Reference":
    return Reference(checkpoint)


class Reference:
    """Log-likelihoods by transformers, one token after the other, as a definition and not as a program."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = GPT2LMHeadModel.from_pretrained(checkpoint).eval()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(checkpoint / "tokenizer.json"))

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def distributions(self, inputs: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([inputs])).logits[0].double(), dim=-1)

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Of a continuation after a context; of both together the last `CONTEXT` inputs are seen."""
        inputs = (context + continuation)[:-1][-CONTEXT:]
        last = self.distributions(inputs)[-len(continuation) :]
        total = sum(float(last[index, token]) for index, token in enumerate(continuation))
        return total, last.argmax(dim=-1).tolist() == continuation


def requests(*arguments: tuple[Any, ...]) -> list[Request]:
    return [Request(each) for each in arguments]


def assert_equal_scores(actual: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [each[0] for each in actual] == pytest.approx([each[0] for each in expected], abs=1e-4)
    assert [each[1] for each in actual] == [each[1] for each in expected]
    assert all(type(logprob) is float and type(is_greedy) is bool for logprob, is_greedy in actual)


def test_loglikelihood_agrees_with_transformers(lm: Any, reference: Reference) -> None:
    pairs = [("Once upon a", " time"), ("The king", " was very old"), ("A", "B"), ("Once upon a", " king")]
    expected = [reference.score(reference.encode(context), reference.encode(text)) for context, text in pairs]
    assert_equal_scores(lm.loglikelihood(requests(*pairs), disable_tqdm=True), expected)


def test_greedy_continuations_are_told_from_others(lm: Any, model: gpt2_edge.Model, reference: Reference) -> None:
    prompt = "Once upon a time"
    greedy = model.generate(prompt, max_new_tokens=3, ignore_eos=True)
    tokens = model.tokenize(prompt + greedy.text)
    assert tokens == model.tokenize(prompt) + greedy.tokens  # else the example says nothing
    (found,) = lm.loglikelihood(requests((prompt, greedy.text)), disable_tqdm=True)
    assert found[1] is True
    assert found[0] == pytest.approx(reference.score(tokens[:-3], tokens[-3:])[0], abs=1e-4)
    (other,) = lm.loglikelihood(requests((prompt, greedy.text[:-1])), disable_tqdm=True)
    assert other[1] is False


def test_the_whole_is_tokenized_and_not_its_parts(lm: Any, reference: Reference) -> None:
    """ "kin" + "gdom" has other tokens than "kingdom": only those of the whole are counted."""
    context, continuation = "The king was in the gar", "den of the house"
    whole, part = reference.encode(context + continuation), reference.encode(context)
    assert whole[: len(part)] + reference.encode(continuation) != whole  # else the example says nothing
    expected = reference.score(part, whole[len(part) :])
    assert_equal_scores(lm.loglikelihood(requests((context, continuation)), disable_tqdm=True), [expected])


def test_spaces_at_the_end_of_the_context_belong_to_the_continuation(lm: Any) -> None:
    apart, together = lm.loglikelihood(requests(("Once upon a ", "time"), ("Once upon a", " time")), disable_tqdm=True)
    assert apart == together


def test_an_empty_context_is_an_end_of_text(lm: Any, reference: Reference) -> None:
    tokens = reference.encode("The king was old.")
    expected = reference.score([END_OF_TEXT], tokens)
    pairs = [("", "The king was old."), ("", "<|endoftext|>The king was old.")]
    assert_equal_scores(lm.loglikelihood(requests(*pairs), disable_tqdm=True), [expected, expected])


def test_a_context_of_spaces_is_no_context(lm: Any, reference: Reference) -> None:
    expected = reference.score([END_OF_TEXT], reference.encode("  The king"))
    assert_equal_scores(lm.loglikelihood(requests(("  ", "The king")), disable_tqdm=True), [expected])


def test_long_contexts_lose_their_begin(lm: Any, reference: Reference) -> None:
    context = "There was a king who had a fox and a wolf and a bear. " * 4
    continuation = " And then the youngest son went away."
    whole = reference.encode(context.rstrip() + " " + continuation)
    part = reference.encode(context.rstrip())
    assert len(part) > CONTEXT
    expected = reference.score(part, whole[len(part) :])
    assert_equal_scores(lm.loglikelihood(requests((context, continuation)), disable_tqdm=True), [expected])


@pytest.mark.parametrize("surplus", [-1, 0])
def test_a_continuation_that_just_fits(lm: Any, model: gpt2_edge.Model, reference: Reference, surplus: int) -> None:
    text = model.detokenize(reference.encode(" the king and the fox" * 20)[: CONTEXT + surplus])
    tokens = reference.encode(text)
    assert len(tokens) == CONTEXT + surplus
    assert_equal_scores(
        lm.loglikelihood(requests(("A", text)), disable_tqdm=True),
        [reference.score(reference.encode("A"), tokens)],
    )


def test_a_continuation_longer_than_the_context_is_refused(lm: Any) -> None:
    with pytest.raises(gpt2_edge.PromptError, match=r"a continuation has \d+ tokens, the model's context holds 32"):
        lm.loglikelihood(requests(("A", " king" * 40)), disable_tqdm=True)


def test_equal_inputs_are_computed_once(lm: Any, model: gpt2_edge.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[Any] = []
    join = model._core.engine.join
    monkeypatch.setattr(model._core.engine, "join", lambda rows: (computed.extend(rows), join(rows)))
    question = "Was the king old? Answer:"
    answers = [" and", " the", " king", " the"]
    assert all(len(model.tokenize(question + answer)) == len(model.tokenize(question)) + 1 for answer in answers)
    scores = lm.loglikelihood(requests(*((question, answer) for answer in answers)), disable_tqdm=True)
    assert len(computed) == 1
    assert scores[1] == scores[3] != scores[0]


def test_many_requests_are_scored_as_each_alone(lm: Any, model: gpt2_edge.Model) -> None:
    """Of contexts and continuations of many lengths, which are computed together; several have inputs in common."""
    words = ["the", "king", "was", "very", "old", "and", "the", "fox", "ran", "to", "the", "wolf", "in", "the", "wood"]
    pairs = [
        (" ".join(words[begin:middle]), " " + " ".join(words[middle:end]))
        for begin in range(3)
        for middle in range(begin, begin + 5)
        for end in range(middle + 1, len(words), 3)
    ]
    assert len({len(model.tokenize(context + text)) for context, text in pairs}) > 8
    together = lm.loglikelihood(requests(*pairs), disable_tqdm=True)
    alone = [lm.loglikelihood(requests(pair), disable_tqdm=True)[0] for pair in pairs]
    assert together == alone
    texts = [(context + text,) for context, text in pairs]
    assert lm.loglikelihood_rolling(requests(*texts), disable_tqdm=True) == [
        lm.loglikelihood_rolling(requests(text), disable_tqdm=True)[0] for text in texts
    ]


@pytest.mark.parametrize("count", [1, CONTEXT - 1, CONTEXT, CONTEXT + 1, 2 * CONTEXT, 3 * CONTEXT - 5])
def test_rolling_agrees_with_transformers(
    lm: Any, model: gpt2_edge.Model, reference: Reference, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Each token once, with the windows that the harness documents: the last one is full and scores what is left."""
    tokens = torch.randint(1, 8192, (count,), generator=torch.Generator().manual_seed(count)).tolist()
    monkeypatch.setattr(model, "tokenize", lambda text: tokens)
    sequence = [END_OF_TEXT, *tokens]
    expected = 0.0
    for target in range(1, count + 1):
        end = min((target + CONTEXT - 1) // CONTEXT * CONTEXT, count)  # of the part that the target is in
        begin = max(0, end - CONTEXT)
        expected += float(reference.distributions(sequence[begin:end])[target - 1 - begin, sequence[target]])
    (total,) = lm.loglikelihood_rolling(requests(("a text",)), disable_tqdm=True)
    assert total == pytest.approx(expected, abs=1e-4 * max(1, count / 10))
    assert type(total) is float


def test_rolling_windows_of_the_harness_example(adapter: Any) -> None:
    """The example in the docstring of the harness's `LM.loglikelihood_rolling`."""
    assert list(adapter.rolling_windows(-1, list(range(10)), 4)) == [
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]


def test_rolling_takes_texts(lm: Any, model: gpt2_edge.Model, reference: Reference) -> None:
    text = "The king was old."
    expected = [reference.score([END_OF_TEXT], reference.encode(text))[0], 0.0]
    assert lm.loglikelihood_rolling(requests((text,), ("",)), disable_tqdm=True) == pytest.approx(expected, abs=1e-4)


def greedy_reference(reference: Reference, prompt: list[int], new_tokens: int) -> str:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(reference.distributions(tokens)[-1].argmax()))
        if tokens[-1] == END_OF_TEXT:
            break
    return reference.tokenizer.decode([token for token in tokens[len(prompt) :] if token != END_OF_TEXT])


def test_generate_until_is_greedy_and_keeps_the_order(lm: Any, reference: Reference) -> None:
    prompts = ["Once upon a time", "The king", "A fox and a wolf"]
    lengths = [5, 7, 5]
    arguments = [
        (prompt, {"until": ["\n\n"], "max_gen_toks": length, "do_sample": False, "temperature": 0.7})
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    expected = [greedy_reference(reference, reference.encode(p), n) for p, n in zip(prompts, lengths, strict=True)]
    assert lm.generate_until(requests(*arguments), disable_tqdm=True) == expected


@pytest.mark.parametrize("as_list", [True, False])
def test_generate_until_ends_before_the_text(lm: Any, reference: Reference, as_list: bool) -> None:
    whole = greedy_reference(reference, reference.encode("The king"), 10)
    stop = whole[len(whole) // 2 :][:3]
    arguments = ("The king", {"until": [stop] if as_list else stop, "max_gen_toks": 10})
    assert lm.generate_until(requests(arguments), disable_tqdm=True) == [whole[: whole.index(stop)]]


def test_generate_until_shortens_the_context_on_the_left(lm: Any, reference: Reference) -> None:
    prompt = "There was a king who had a fox and a wolf and a bear. " * 4
    expected = greedy_reference(reference, reference.encode(prompt)[-(CONTEXT - 8) :], 8)
    assert lm.generate_until(requests((prompt, {"max_gen_toks": 8})), disable_tqdm=True) == [expected]


def test_generate_until_leaves_room_for_a_context(lm: Any) -> None:
    with pytest.raises(gpt2_edge.OptionError, match="max_gen_toks is 32: this model's context of 32 tokens"):
        lm.generate_until(requests(("A", {"max_gen_toks": CONTEXT})), disable_tqdm=True)


def test_samples_of_one_prompt_differ_and_can_be_repeated(adapter: Any, model: gpt2_edge.Model) -> None:
    same = requests(*[("The king", {"do_sample": True, "max_gen_toks": 8})] * 3)
    first = adapter.Gpt2EdgeLM(model, seed=3).generate_until(same, disable_tqdm=True)
    assert len(set(first)) == 3
    assert adapter.Gpt2EdgeLM(model, seed=3).generate_until(same, disable_tqdm=True) == first
    assert adapter.Gpt2EdgeLM(model, seed=4).generate_until(same, disable_tqdm=True) != first


def test_samples_differ_between_batches_too(lm: Any) -> None:
    """Other options make another batch, in which the prompt has the same place as in the first."""
    options = [{"do_sample": True, "max_gen_toks": length} for length in (8, 9)]
    first, second = lm.generate_until(requests(*(("The king", each) for each in options)), disable_tqdm=True)
    assert not second.startswith(first)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_new_tokens": 256, "stop": [], "temperature": 0.0}),
        ({"until": None, "max_tokens": 9}, {"max_new_tokens": 9, "stop": [], "temperature": 0.0}),
        (
            {"until": ["", "Q:"], "max_gen_toks": 5, "max_tokens": 9},
            {"max_new_tokens": 5, "stop": ["Q:"], "temperature": 0.0},
        ),
        ({"do_sample": False, "temperature": 0.8}, {"max_new_tokens": 256, "stop": [], "temperature": 0.0}),
        ({"do_sample": True}, {"max_new_tokens": 256, "stop": [], "temperature": 1.0}),
        ({"temperature": 0.8, "top_p": 0.9}, {"max_new_tokens": 256, "stop": [], "temperature": 0.8, "top_p": 0.9}),
    ],
)
def test_options_of_tasks(adapter: Any, given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert adapter.generation_options(given, 256) == expected


def test_an_unknown_option_is_refused(lm: Any) -> None:
    with pytest.raises(gpt2_edge.OptionError, match="unknown option num_beams"):
        lm.generate_until(requests(("A", {"num_beams": 4, "max_gen_toks": 2})), disable_tqdm=True)


def test_the_harness_cache_hears_of_every_result(adapter: Any, model: gpt2_edge.Model) -> None:
    lm = adapter.Gpt2EdgeLM(model)
    lm.cache_hook = CacheHook()
    pair, text, prompt = ("The", " king"), ("The king",), ("The", {"max_gen_toks": 2})
    (score,) = lm.loglikelihood(requests(pair), disable_tqdm=True)
    (total,) = lm.loglikelihood_rolling(requests(text), disable_tqdm=True)
    (written,) = lm.generate_until(requests(prompt), disable_tqdm=True)
    assert lm.cache_hook.told == [
        ("loglikelihood", pair, score),
        ("loglikelihood_rolling", text, total),
        ("generate_until", prompt, written),
    ]


def test_without_the_harness_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "gpt2_edge.benchmarks.lm_eval_model", raising=False)
    with pytest.raises(gpt2_edge.Gpt2EdgeError, match=r"pip install 'gpt2-edge\[lm-eval\]'"):
        importlib.import_module("gpt2_edge.benchmarks.lm_eval_model")
