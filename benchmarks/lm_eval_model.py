"""Lets lm-evaluation-harness evaluate a model folder.

    pip install 'gpt2-edge[cpu,lm-eval]'
    python -m gpt2_edge.benchmarks.lm_eval_model run --model gpt2-edge --model_args model=FOLDER --tasks lambada_openai

The last line is the harness's own command line, to which this module adds the model. In Python:

    lm_eval.simple_evaluate(Gpt2EdgeLM("storyteller"), tasks=["lambada_openai"])

Texts are cut into tokens, contexts are shortened and long texts are divided as by the harness's own model class for
transformers (`hf`), so the results can be compared.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gpt2_edge.benchmarks.continuation_row import Continuation, ContinuationRow
from gpt2_edge.errors import MissingDependencyError, OptionError, PromptError
from gpt2_edge.model import Model, load

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from tqdm import tqdm
except ImportError as error:
    raise MissingDependencyError(
        "lm-evaluation-harness is not installed: run pip install 'gpt2-edge[lm-eval]'"
    ) from error

_PROMPTS_TOGETHER: Final = 64  # more than are decoded side by side, so that a row that leaves is replaced at once
_HARNESS_DEVICE: Final = "cuda:0"  # what the harness gives when nobody chose one
# The harness takes all of these, the first that is given counts.
_LENGTH_NAMES: Final = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@register_model("gpt2-edge")
class Gpt2EdgeLM(LM):  # type: ignore[misc]  # the harness is not typed
    """A model as lm-evaluation-harness wants it.

    Args:
        model: A loaded model, which stays open; or a model folder to load.
        device: See `gpt2_edge.load`; "cuda:0", the harness's default, is taken for "auto".
        threads: See `gpt2_edge.load`.
        max_gen_toks: Tokens to generate where a task does not say.
        seed: For tasks that draw tokens.
        batch_size: Has no effect, the harness always gives it: the engine makes its batches itself.
        max_batch_size: Has no effect either.
    """

    def __init__(
        self,
        model: Model | str | Path,
        *,
        device: str = "auto",
        threads: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        device = "auto" if device == _HARNESS_DEVICE else device
        self.model = model if isinstance(model, Model) else load(model, device=device, threads=threads)
        self._max_gen_toks = max_gen_toks
        self._seed = seed

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations.

        Args:
            requests: Their `args` are a context, which may be empty, and its continuation.
            disable_tqdm: Show no progress.

        Returns:
            For each the log-probability of the continuation after the context, and whether greedy decoding would
            have written it.

        Raises:
            PromptError: A continuation is longer than the model's context.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        # What has equal inputs is computed once: answers of one token to the same question, for instance.
        continuations_of: dict[tuple[int, ...], list[Continuation]] = {}
        for index, (inputs, tokens) in enumerate(pairs):
            continuations_of.setdefault(tuple(inputs), []).append(Continuation(index, tokens))
        # Inputs of similar lengths after each other are computed together.
        order = sorted(continuations_of, key=len, reverse=True)
        results: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:

            def take(row: ContinuationRow) -> None:
                for scored in row.continuations:
                    index = scored.request
                    results[index] = (scored.logprob, scored.is_greedy)
                    self.cache_hook.add_partial("loglikelihood", requests[index].args, results[index])
                    bar.update()

            self.model._core.run_each((ContinuationRow(inputs, continuations_of[inputs]) for inputs in order), take)
        return [results[index] for index in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts after an end-of-text token, each token once, with as much before it as there is room for.

        This divides a text as the harness does, whose windows are not those of `Model.score`.

        Args:
            requests: Their `args` are one text.
            disable_tqdm: Show no progress.

        Returns:
            The log-probability of each text.
        """
        texts = [self.model.tokenize(*request.args) for request in requests]
        totals = [0.0] * len(requests)
        windows_left = [-(-len(tokens) // self.model.context_length) for tokens in texts]
        rows = (
            ContinuationRow(inputs, [Continuation(index, scored)])
            for index in sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
            for inputs, scored in rolling_windows(self._prefix(), texts[index], self.model.context_length)
        )
        with tqdm(total=len(requests), desc="loglikelihood_rolling", disable=disable_tqdm) as bar:

            def finish(index: int) -> None:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, totals[index])
                bar.update()

            def take(row: ContinuationRow) -> None:
                (window,) = row.continuations
                totals[window.request] += window.logprob
                windows_left[window.request] -= 1
                if not windows_left[window.request]:
                    finish(window.request)

            self.model._core.run_each(rows, take)
            for index, tokens in enumerate(texts):
                if not tokens:
                    finish(index)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts, greedily unless a task asks for drawing.

        Args:
            requests: Their `args` are a context and a mapping of options: `until`, `max_gen_toks`, `do_sample`, and
                those of `GenerationOptions`.
            disable_tqdm: Show no progress.

        Returns:
            The continuations, without the text that ended them.

        Raises:
            OptionError: An option is unknown or not allowed, or leaves no room for a context.
        """
        results: dict[int, str] = {}
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for indices in _groups_of_equal_options(requests):
                # The seed tells apart what has the same place in different groups.
                options = {
                    "seed": self._seed + indices[0],
                    **generation_options(requests[indices[0]].args[1], self._max_gen_toks),
                }
                prompts = [self._shortened(requests[index].args[0], options["max_new_tokens"]) for index in indices]
                done = self.model.generate(prompts, **options)
                for index, generation in zip(indices, done, strict=True):
                    results[index] = generation.text
                    self.cache_hook.add_partial("generate_until", requests[index].args, generation.text)
                bar.update(len(indices))
        return [results[index] for index in range(len(requests))]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Return the model's inputs, and the continuation's tokens, which the last logits after the inputs score.

        Both are cut out of the tokens of the whole, because a token may reach across the border; and spaces at the
        end of the context are part of the continuation, because words of GPT-2 begin with their space.
        """
        stripped = context.rstrip()
        context, continuation = stripped, context[len(stripped) :] + continuation
        context_tokens = self.model.tokenize(context)
        tokens = self.model.tokenize(context + continuation)[len(context_tokens) :]
        if not tokens:
            # One token holds the end of the context and all of the continuation.
            tokens = self.model.tokenize(continuation)
        if not context_tokens:
            prefix = self._prefix()
            context_tokens, tokens = (tokens[:1], tokens[1:]) if tokens[:1] == [prefix] else ([prefix], tokens)
        if len(tokens) > self.model.context_length:
            raise PromptError(
                f"a continuation has {len(tokens)} tokens, the model's context holds {self.model.context_length}: "
                "leave this task out"
            )
        return (context_tokens + tokens)[-self.model.context_length - 1 : -1], tokens

    def _prefix(self) -> int:
        """Return the token that begins a text which nothing comes before."""
        end_of_text = self.model.manifest.end_of_text
        if end_of_text is None:
            raise PromptError("this model has no end-of-text token, which would be the context of the first token")
        return end_of_text

    def _shortened(self, context: str, new_tokens: int) -> list[int]:
        """Return the last tokens of a context, so many that the continuation fits after them."""
        room = self.model.context_length - new_tokens
        if room < 1:
            raise OptionError(
                f"max_gen_toks is {new_tokens}: this model's context of {self.model.context_length} tokens leaves no "
                "room for a prompt; pass --gen_kwargs max_gen_toks=... with a smaller number"
            )
        return self.model.tokenize(context)[-room:]


def rolling_windows(prefix: int, tokens: Sequence[int], context_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Divide a text as the harness does: the scored parts follow each other, each with as many inputs as fit.

    Args:
        prefix: The token before the first.
        tokens: The text.
        context_length: The most inputs.

    Yields:
        Inputs, and the tokens which the last logits after them score.
    """
    inputs = [prefix, *tokens]
    for begin in range(0, len(tokens), context_length):
        end = min(begin + context_length, len(tokens))
        yield inputs[max(0, end - context_length) : end], list(tokens[begin:end])


def generation_options(harness_options: Mapping[str, Any], default_new_tokens: int) -> dict[str, Any]:
    """Translate a task's options to those of `Model.generate`.

    Names that are not special here are passed on, so that an unknown one is refused and not ignored.
    """
    options = dict(harness_options)
    lengths = [options.pop(name, None) for name in _LENGTH_NAMES]
    until = options.pop("until", None) or []
    return {
        "temperature": _temperature(options.pop("do_sample", None), options.pop("temperature", None)),
        "max_new_tokens": next((int(length) for length in lengths if length is not None), default_new_tokens),
        "stop": [text for text in ([until] if isinstance(until, str) else until) if text],
        **options,
    }


def _temperature(do_sample: bool | None, temperature: float | None) -> float:
    if do_sample is False:
        return 0.0  # tasks say both, and mean greedy
    if temperature is None:
        return 1.0 if do_sample else 0.0
    return float(temperature)


def _groups_of_equal_options(requests: Sequence[Any]) -> Iterator[list[int]]:
    """Yield indices of requests that can be one batch."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(repr(sorted(request.args[1].items())), []).append(index)
    for indices in groups.values():
        for first in range(0, len(indices), _PROMPTS_TOGETHER):
            yield indices[first : first + _PROMPTS_TOGETHER]


def main() -> int:
    """Run the harness's command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
