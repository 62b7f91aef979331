"""`gpt2-edge next`: the likeliest next tokens with their probabilities."""

import argparse
import json
from dataclasses import asdict

from gpt2_edge.commands.arguments import add_model_arguments, add_prompt_argument, read_prompt

_BAR_WIDTH = 40


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `next`."""
    add_model_arguments(parser)
    add_prompt_argument(parser)
    parser.add_argument("-k", type=int, default=10, help="how many (default: 10)")
    parser.add_argument("--json", action="store_true", help="one JSON object a line: text, token, probability")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each token."""
    from gpt2_edge.model import load

    with load(arguments.folder, device=arguments.device, threads=arguments.threads) as model:
        tokens = model.next_tokens(read_prompt(arguments.prompt), arguments.k)
    if arguments.json:
        for token in tokens:
            print(json.dumps(asdict(token), ensure_ascii=False))
        return 0
    texts = [json.dumps(token.text, ensure_ascii=False) for token in tokens]
    width = max(map(len, texts))
    for text, token in zip(texts, tokens, strict=True):
        bar = "#" * round(_BAR_WIDTH * token.probability)
        print(f"{100 * token.probability:6.2f} %  {text:<{width}}  {bar}".rstrip())
    return 0
