"""`gpt2-edge export`: make a model folder from a GPT-2 checkpoint."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="folder of a Hugging Face GPT-2 checkpoint")
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="the model folder to make")
    parser.add_argument("--precision", choices=["fp32"], default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--flavour", choices=["fused"], default="fused", help="of the graph (default: fused)")


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was made."""
    from gpt2_edge.export.pipeline import export_checkpoint

    manifest = export_checkpoint(arguments.checkpoint, arguments.output)
    parity = manifest.measured["parity"]
    print(
        f"{arguments.output}: {manifest.precision}, {manifest.size_bytes / 1e6:.1f} MB; logits differ from the "
        f"checkpoint's by at most {parity['largest_difference']:.1g} (allowed {parity['tolerance']:.1g})"
    )
    return 0
