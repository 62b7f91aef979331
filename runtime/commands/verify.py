"""`gpt2-edge verify`: check that a model folder is whole and runs."""

import argparse

from gpt2_edge.commands.arguments import add_model_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `verify`."""
    add_model_arguments(parser)
    parser.add_argument("--public-key", metavar="PEM", help="refuse a folder that this Ed25519 key did not sign")
    parser.add_argument(
        "--machine", action="store_true", help="also compare what this machine computes with the folder's golden logits"
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare all hashes, load the graph, and compute a token."""
    from gpt2_edge.folder import open_folder
    from gpt2_edge.model import load

    folder = open_folder(arguments.folder)  # refuses one without a manifest, which `load` takes
    with load(
        arguments.folder, device=arguments.device, threads=arguments.threads, public_key=arguments.public_key
    ) as model:
        files = len(model.manifest.files)
        print(f"{files} of {files} files are what the manifest says")
        if arguments.public_key is not None:
            print(f"{arguments.public_key} signed them")
        print(f"the graph loads on {model.device}, with the inputs and outputs it should have")
        prompt = [0] * min(8, model.context_length)
        likeliest = model.next_tokens(prompt, k=1)[0]
        print(
            f"it computes: after {len(prompt)} tokens its logits are finite, the likeliest token is {likeliest.token}"
        )
        if arguments.machine:
            from gpt2_edge.machine_check import check_machine, read_golden

            found = check_machine(model, read_golden(folder))
            ways = ", ".join(
                f"{way} {100 * deviation.difference:.2g} % ({100 * deviation.tolerance:.2g} % is allowed)"
                for way, deviation in found.items()
            )
            print(f"this machine computes it right: off the golden logits, in percent of their spread: {ways}")
    return 0
