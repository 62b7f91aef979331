"""`gpt2-edge sign`: sign a model folder."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `sign`."""
    parser.add_argument("folder", metavar="FOLDER", help="a model folder; a pack is signed by `gpt2-edge pack --sign`")
    parser.add_argument("--key", required=True, metavar="PEM", help="the private Ed25519 key")


def run(arguments: argparse.Namespace) -> int:
    """Compare the files with the manifest, and write its signature."""
    from gpt2_edge.folder import open_folder
    from gpt2_edge.signature import write_signature

    write_signature(open_folder(arguments.folder), Path(arguments.key))
    print(f"{arguments.folder} is signed")
    return 0
