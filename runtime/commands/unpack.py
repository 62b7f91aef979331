"""`gpt2-edge unpack`: make a model folder of a pack."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `unpack`."""
    parser.add_argument("pack", metavar="FILE", help="a pack, as `gpt2-edge pack` makes it")
    parser.add_argument("-o", "--output", required=True, metavar="FOLDER", help="the model folder to make")


def run(arguments: argparse.Namespace) -> int:
    """Write the folder."""
    from gpt2_edge.folder import open_folder
    from gpt2_edge.pack import unpack_folder

    pack = open_folder(arguments.pack)
    unpack_folder(pack, Path(arguments.output))
    print(f"{arguments.output}: {pack.manifest.size_bytes / 1e6:.1f} MB in {len(pack.manifest.files)} files")
    return 0
