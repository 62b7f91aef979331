"""`gpt2-edge export`: make a model folder from a GPT-2 checkpoint."""

import argparse
from pathlib import Path

from gpt2_edge.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `export`."""
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of a Hugging Face GPT-2 checkpoint, or the name of a hub's repository, such as gpt2",
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", type=Path, required=True, help="the model folder to make")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16"],
        default="fp32",
        help="of the weights: fp32 (the default), or fp16 for an NVIDIA GPU",
    )
    parser.add_argument(
        "--flavour",
        choices=["fused", "standard"],
        default="fused",
        help="of the graph: fused (the default), or standard, which optimum loads as well and which is slower",
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of the hub's repository")
    parser.add_argument("--offline", action="store_true", help="take what was downloaded before, open no connection")
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="keep the first N positions only, for a smaller KV cache"
    )


def run(arguments: argparse.Namespace) -> int:
    """Export and say what was made."""
    from gpt2_edge.export.pipeline import export_checkpoint

    if arguments.flavour == "fused":
        manifest = export_checkpoint(
            arguments.checkpoint,
            arguments.output,
            precision=arguments.precision,
            revision=arguments.revision,
            offline=arguments.offline,
            max_context=arguments.max_context,
        )
    else:
        if arguments.precision != "fp32":
            raise OptionError("the standard flavour is exported as fp32: leave --precision out")
        from gpt2_edge.export.standard_pipeline import export_standard

        manifest = export_standard(
            arguments.checkpoint,
            arguments.output,
            revision=arguments.revision,
            offline=arguments.offline,
            max_context=arguments.max_context,
        )
    parity = manifest.measured["parity"]
    print(
        f"{arguments.output}: {manifest.precision}, {manifest.size_bytes / 1e6:.1f} MB; logits differ from the "
        f"checkpoint's by at most {parity['largest_difference']:.1g} (allowed {parity['tolerance']:.1g})"
    )
    return 0
