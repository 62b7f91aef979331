"""`gpt2-edge generate`: continue a prompt."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from gpt2_edge.commands.arguments import add_model_arguments, add_prompt_argument, read_prompt
from gpt2_edge.options import OptionKeywords
from gpt2_edge.results import Generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `generate`."""
    add_model_arguments(parser)
    add_prompt_argument(parser)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="stop after N tokens (default: 128)")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy, the default without --top-k/-p")
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that reach P")
    parser.add_argument("--seed", type=int, metavar="S", help="repeat what was drawn with this seed")
    parser.add_argument("--ignore-eos", action="store_true", default=None, help="go on after an end-of-text token")
    parser.add_argument("-n", type=int, metavar="N", help="so many samples of the prompt")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: prompt, text, seed, timings ...")


def run(arguments: argparse.Namespace) -> int:
    """Generate and print."""
    from gpt2_edge.model import load

    prompt = read_prompt(arguments.prompt)
    options = _options(arguments)
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
    timings = sample.timings
    return {
        "prompt": prompt,
        **asdict(sample),
        "timings": {
            "prefill_seconds": timings.prefill_seconds,
            "decode_seconds": timings.decode_seconds,
            "decoded_tokens": timings.decoded_tokens,
        },
    }


def _summary(result: Generation) -> str:
    timings = result.timings
    rate = f", {timings.decode_tokens_per_second:.0f} tokens/s" if timings.decoded_tokens else ""
    return (
        f"[{result.prompt_tokens} + {len(result.tokens)} tokens, first after {timings.prefill_seconds * 1000:.0f} ms"
        f"{rate}, ended by {result.finish_reason}, seed {result.seed}]"
    )
