"""`gpt2-edge pack`: make one file of a model folder."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `pack`."""
    parser.add_argument("folder", metavar="FOLDER", help="a model folder or a pack, or `storyteller`")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the pack to make, such as model.gpt2")
    parser.add_argument("--sign", metavar="PEM", help="sign it with this private Ed25519 key")


def run(arguments: argparse.Namespace) -> int:
    """Write the pack."""
    from gpt2_edge.folder import open_folder
    from gpt2_edge.pack import pack_folder
    from gpt2_edge.signature import sign_manifest

    folder = open_folder(arguments.folder)
    signature = folder.signature
    if arguments.sign is not None:
        signature = sign_manifest(folder.manifest_bytes, Path(arguments.sign))
    output = Path(arguments.output)
    pack_folder(folder, output, signature)
    signed = "signed" if signature is not None else "not signed"
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {len(folder.manifest.files)} files, {signed}")
    return 0
