"""`gpt2-edge verify`: check that a model folder is whole and runs."""

import argparse

from gpt2_edge.commands.arguments import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verify`."""
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare all hashes, load the graph, and compute a token."""
    from gpt2_edge.model import load

    with load(arguments.folder, device=arguments.device, threads=arguments.threads) as model:
        files = len(model.manifest.files)
        print(f"{files} of {files} files are what the manifest says")
        print(f"the graph loads on {model.device}, with the inputs and outputs it should have")
        prompt = [0] * min(8, model.context_length)
        likeliest = model.next_tokens(prompt, k=1)[0]
        print(
            f"it computes: after {len(prompt)} tokens its logits are finite, the likeliest token is {likeliest.token}"
        )
    return 0
