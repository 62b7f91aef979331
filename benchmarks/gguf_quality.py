"""Quality of llama.cpp's quantizations of a checkpoint, by the same text and the same measures as `gpt2-edge quantize`.

    python -m gpt2_edge.benchmarks.gguf_quality CHECKPOINT FP32_FOLDER --text TEXT.txt -o FILE.json

The reference is the full-precision model folder; GGUF's own F32 is a row, which shows what else than rounding differs.
Other model folders of the same checkpoint can be rows as well: `--folders`. Sizes are without tokenizers, in both.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from gpt2_edge.benchmarks.bandwidth import weights_bytes
from gpt2_edge.benchmarks.environment import describe_environment
from gpt2_edge.benchmarks.output import check_plot
from gpt2_edge.benchmarks.peers.catalog import peers_named
from gpt2_edge.benchmarks.peers.preparation import PeerModel, prepare_peers, read_checkpoint
from gpt2_edge.benchmarks.peers.process import start_peer
from gpt2_edge.errors import Gpt2EdgeError
from gpt2_edge.folder import open_folder
from gpt2_edge.interrupt import INTERRUPTED, TERMINATED, is_terminated, sigterm_interrupts
from gpt2_edge.model import load
from gpt2_edge.progress import Progress
from gpt2_edge.quantize.quality import (
    WINDOW_TOKENS,
    Logits,
    PositionStatistics,
    compare_logits,
    summarize,
    window_logits,
    windows_of,
)
from gpt2_edge.quantize.texts import read_text
from gpt2_edge.seal import write_file

VARIANTS: Final = ("F32", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0")
SCHEMA: Final = "gpt2-edge gguf quality 1"

_Predict = Callable[[list[int]], Logits]


def measure(checkpoint: Path, reference: Path, text: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Return a row for each model: its size and the measures of `gpt2_edge.quantize.quality`.

    Args:
        checkpoint: What everything was made from.
        reference: Its full-precision model folder.
        text: UTF-8.
        folders: Model folders that are measured beside the GGUF files.
    """
    llama_cpp = replace(peers_named(["llama.cpp"])[0], variants=VARIANTS)
    models = prepare_peers([llama_cpp], read_checkpoint(checkpoint), lambda missing: True, _say)
    with ExitStack() as stack:
        full = stack.enter_context(load(reference))
        rows: list[dict[str, Any]] = []
        predictors: list[_Predict] = []
        for folder in folders:
            model = stack.enter_context(load(folder))
            manifest = open_folder(str(folder)).manifest
            rows.append({"name": folder.name, "size_bytes": weights_bytes(manifest)})
            predictors.append(partial(window_logits, model))
        for gguf in models:
            rows.append({"name": gguf.name, "size_bytes": _size_bytes(gguf)})
            predictors.append(_predictor(gguf, stack))
        windows = windows_of(full.tokenize(read_text(text)), min(WINDOW_TOKENS, full.context_length))
        parts: list[list[PositionStatistics]] = [[] for _ in rows]
        with Progress("gguf quality", total=len(windows)) as progress:
            for window in windows:
                expected = full.logits(window)[:-1]
                for predict, found in zip(predictors, parts, strict=True):
                    found.append(compare_logits(expected, predict(window)[:-1], window[1:]))
                progress.advance()
    return {
        "schema": SCHEMA,
        "checkpoint": models[0].checkpoint.source,
        "text": text.name,
        "windows": len(windows),
        "window_tokens": len(windows[0]),
        "environment": describe_environment(),
        "models": [row | asdict(summarize(found)) for row, found in zip(rows, parts, strict=True)],
    }


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the mean divergence of each model against its size; one without any has no place on the logarithmic axis."""
    from matplotlib.figure import Figure

    from gpt2_edge.benchmarks.picture import write_picture

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    # Names to the left of ours and to the right of the others', so that neighbours do not cover each other.
    for colour, label, is_peer, side, offset in (
        ("#2a6fd0", "gpt2-edge", False, "right", (-6, -12)),
        ("#d9591c", "llama.cpp", True, "left", (6, 4)),
    ):
        drawn = [row for row in rows if row["name"].startswith("llama.cpp") == is_peer and _divergence(row) > 1e-6]
        sizes, divergences = [row["size_bytes"] / 1e6 for row in drawn], [_divergence(row) for row in drawn]
        axes.plot(sizes, divergences, "o", color=colour, label=label)
        for row, size, divergence in zip(drawn, sizes, divergences, strict=True):
            name = row["name"].removeprefix("llama.cpp ")
            axes.annotate(name, (size, divergence), offset, textcoords="offset points", ha=side, fontsize=9)
    axes.set(yscale="log", xlabel="graph and weights, MB", ylabel="mean KL divergence from fp32, nats a token")
    axes.margins(x=0.45, y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    write_picture(figure, path)


def _divergence(row: dict[str, Any]) -> float:
    return float(row["mean_kl_divergence"])


def _predictor(model: PeerModel, stack: ExitStack) -> _Predict:
    """Start llama.cpp with a model, and return what asks it for logits."""
    if model.folder is None:
        raise Gpt2EdgeError(f"{model.name}: {model.error}")
    process = stack.enter_context(start_peer(model.peer))
    process.ask(
        "load",
        folder=str(model.folder),
        variant=model.variant,
        threads=1,  # they change no logits, and llama.cpp's wait for each other in busy loops
        vocabulary_size=model.checkpoint.vocabulary_size,
        distribution=model.peer.distribution,
    )
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpt2-edge-gguf-"))) / "logits.npy"

    def predict(tokens: list[int]) -> Logits:
        process.ask("save_logits", tokens=tokens, path=str(path))
        logits: Logits = np.load(path)
        return logits

    return predict


def _size_bytes(model: PeerModel) -> int:
    return 0 if model.folder is None else sum(file.stat().st_size for file in model.folder.iterdir())


def _say(text: str) -> None:
    print(f"gguf quality: {text}", file=sys.stderr, flush=True)


def main() -> int:
    """Measure, print a table and write JSON; nothing else is left, also after Ctrl-C or SIGTERM."""
    with sigterm_interrupts():
        try:
            return _run(_parsed_arguments())
        except KeyboardInterrupt:
            print("error: interrupted", file=sys.stderr)
            return TERMINATED if is_terminated() else INTERRUPTED


def _parsed_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Quality of llama.cpp's quantizations of a checkpoint.")
    parser.add_argument("checkpoint", type=Path, help="of Hugging Face, with safetensors")
    parser.add_argument("reference", type=Path, help="its full-precision model folder")
    parser.add_argument("--folders", type=Path, nargs="*", default=[], help="model folders of it, as rows beside")
    parser.add_argument("--text", type=Path, required=True, help="held-out text, UTF-8")
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="divergence against size, .svg or .png")
    return parser.parse_args()


def _run(arguments: argparse.Namespace) -> int:
    try:
        if arguments.plot is not None:
            check_plot(arguments.plot)
        result = measure(arguments.checkpoint, arguments.reference, arguments.text, arguments.folders)
    except Gpt2EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_table(result)
    try:
        if arguments.output is not None:
            write_file(arguments.output, [(json.dumps(result, indent=2) + "\n").encode()])
        if arguments.plot is not None:
            draw(result["models"], arguments.plot)
    except OSError as error:
        print(f"error: cannot write {error.filename or 'the result'}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _print_table(result: dict[str, Any]) -> None:
    print("| model | MB | perplexity | mean KLD | p99 KLD | same top |\n| --- | --- | --- | --- | --- | --- |")
    for row in result["models"]:
        print(
            f"| {row['name']} | {row['size_bytes'] / 1e6:.2f} | {row['perplexity']:.3f} "
            f"({row['perplexity_change_percent']:+.2f} %) | {row['mean_kl_divergence']:.5f} "
            f"| {row['kl_divergence_99']:.4f} | {row['same_top_percent']:.1f} % |"
        )


if __name__ == "__main__":
    sys.exit(main())
