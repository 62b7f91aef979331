"""`gpt2-edge seal`: write the manifest of a folder that optimum exported."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `seal`."""
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a folder with a GPT-2 that optimum exported")
    parser.add_argument(
        "-o", "--output", metavar="NEW", type=Path, help="copy what belongs to the model to a new folder and seal that"
    )
    parser.add_argument("--graph", metavar="NAME", help="which .onnx file of the folder, if it has several")


def run(arguments: argparse.Namespace) -> int:
    """Check that the graph runs, write the manifest, and say what is in it."""
    from gpt2_edge.standard_seal import seal_folder

    manifest = seal_folder(arguments.folder, arguments.output, arguments.graph)
    print(
        f"{arguments.output or arguments.folder}: {manifest.graphs['decoder']}, {manifest.precision}, "
        f"{manifest.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files"
    )
    return 0
