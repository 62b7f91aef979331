"""`gpt2-edge score`: how likely a model finds each text."""

import argparse
import json
import sys

from gpt2_edge.commands.arguments import add_model_arguments, read_text_file
from gpt2_edge.errors import PromptError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `score`."""
    add_model_arguments(parser)
    parser.add_argument(
        "files", metavar="FILE", nargs="*", default=["-"], help="texts, UTF-8; standard input without any"
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object a line, with the tokens' log-probabilities"
    )


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each document; one that cannot be scored gets a line on standard error."""
    from gpt2_edge.model import load

    failed = False
    with load(arguments.folder, device=arguments.device, threads=arguments.threads) as model:
        if not arguments.json:
            print(f"{'tokens':>7}  {'log-probability':>15}  {'perplexity':>10}  document")
        for path in arguments.files:
            try:
                score = model.score(read_text_file(path))
            except PromptError as error:
                print(f"gpt2-edge: {path}: {error}", file=sys.stderr)
                failed = True
                continue
            if arguments.json:
                document = {
                    "document": path,
                    "tokens": score.tokens,
                    "logprobs": score.logprobs,
                    "total_logprob": score.total_logprob,
                    "perplexity": score.perplexity,
                }
                print(json.dumps(document, ensure_ascii=False), flush=True)
            else:
                line = f"{len(score.tokens):7}  {score.total_logprob:15.3f}  {score.perplexity:10.3f}  {path}"
                print(line, flush=True)
    return 1 if failed else 0
