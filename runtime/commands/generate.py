"""`gpt2-edge generate`: continue a prompt."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from gpt2_edge.commands.arguments import add_model_arguments, add_prompt_argument, read_prompt
from gpt2_edge.errors import OptionError
from gpt2_edge.options import OptionKeywords, make_options
from gpt2_edge.results import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    add_model_arguments(parser)
    add_prompt_argument(parser)
    length = parser.add_argument_group("length")
    length.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after N tokens (default: 128)")
    length.add_argument("--min-new-tokens", type=int, metavar="N", help="do not end before N tokens")
    length.add_argument("--stop", action="append", metavar="STR", help="end before this text; may be repeated")
    length.add_argument("--ignore-eos", action="store_true", default=None, help="go on after an end-of-text token")
    length.add_argument("--overflow", metavar="HOW", help="when the context is full: stop (the default) or slide")
    length.add_argument(
        "--keep-tokens",
        type=int,
        metavar="N",
        help="with --overflow slide: never forget the first N tokens (default: 0)",
    )
    length.add_argument("--deadline-seconds", type=float, metavar="S", help="end after S seconds")
    choice = parser.add_argument_group("choice of tokens (greedy, unless one of the first five is given)")
    choice.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; higher is more varied")
    choice.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    choice.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach P together")
    choice.add_argument(
        "--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the first"
    )
    choice.add_argument("--typical-p", type=float, metavar="P", help="draw from the most typical tokens that reach P")
    choice.add_argument("--repetition-penalty", type=float, metavar="X", help="1 is off, 1.1 is mild")
    choice.add_argument("--presence-penalty", type=float, metavar="X", help="0 is off")
    choice.add_argument("--frequency-penalty", type=float, metavar="X", help="0 is off")
    choice.add_argument("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens occur twice; 0 is off")
    choice.add_argument("--seed", type=int, metavar="S", help="draw with this seed again (default: a new one)")
    choice.add_argument(
        "--logprobs",
        type=int,
        metavar="K",
        help="with --json: log-probabilities of the tokens, and of the K likeliest at each place",
    )
    parser.add_argument("-n", type=int, metavar="N", help="so many samples of the prompt, each with its seed")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: prompt, text, seed, timings ...")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    from gpt2_edge.model import load

    if arguments.logprobs is not None and not arguments.json:
        raise OptionError("--logprobs is shown with --json only: give both")
    prompt = read_prompt(arguments.prompt)
    options = _options(arguments)
    if (arguments.n or 1) > 1 and make_options(options).effective_temperature == 0:
        raise OptionError(
            f"-n {arguments.n} would give the same text {arguments.n} times, because the choice of tokens is greedy: "
            "give --temperature or another option that draws, or leave -n out"
        )
    with load(arguments.folder, device=arguments.device, threads=arguments.threads) as model:
        if arguments.json:
            samples = model.generate(prompt, n=arguments.n or 1, **options)
            for sample in samples:
                print(json.dumps(_as_json(prompt, sample), ensure_ascii=False))
            return 0
        if arguments.n is not None:
            for number, sample in enumerate(model.generate(prompt, n=arguments.n, **options)):
                print(f"{'' if number == 0 else chr(10)}--- seed {sample.seed}\n{prompt}{sample.text}")
            return 0
        stream = model.stream(prompt, **options)
        print(prompt, end="", flush=True)
        for piece in stream:
            print(piece.text, end="", flush=True)
        print()
        if sys.stderr.isatty():
            print(_summary(stream.result), file=sys.stderr)
    return 0


def _options(arguments: argparse.Namespace) -> OptionKeywords:
    given: dict[str, Any] = {name: getattr(arguments, name, None) for name in OptionKeywords.__annotations__}
    options: OptionKeywords = {name: value for name, value in given.items() if value is not None}  # type: ignore[assignment]
    return options


def _as_json(prompt: str, sample: Generation) -> dict[str, Any]:
    return {"prompt": prompt, **asdict(sample), "timings": asdict(sample.timings)}


def _summary(result: Generation) -> str:
    timings = result.timings
    rate = f", {timings.decode_tokens_per_second:.0f} tokens/s" if timings.decoded_tokens else ""
    return (
        f"[{result.prompt_tokens} + {len(result.tokens)} tokens, first after {timings.prefill_seconds * 1000:.0f} ms"
        f"{rate}, ended by {result.finish_reason}, seed {result.seed}]"
    )
