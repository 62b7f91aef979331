"""The demonstration behind `make demo`: export, quantize, generate from both, compare.

python -m gpt2_edge.benchmarks.demo CHECKPOINT FOLDER
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from gpt2_edge.benchmarks.speed import Speed, measure_speeds
from gpt2_edge.errors import Gpt2EdgeError, ModelFolderError
from gpt2_edge.folder import file_sha256, open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.model import Model, load
from gpt2_edge.progress import Progress
from gpt2_edge.quantize.recipes import default_recipe
from gpt2_edge.version import VERSION

PROMPT: Final = "Once upon a time"
_PROMPT_TOKENS, _NEW_TOKENS, _REPETITIONS = 256, 64, 5
_COMPARED_TOKENS: Final = 256


def main() -> int:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description="Export, quantize, generate from both, compare.")
    parser.add_argument("checkpoint", type=Path, help="folder of a GPT-2 checkpoint")
    parser.add_argument("folder", type=Path, help="where the model folders go; what is there is used again")
    arguments = parser.parse_args()
    try:
        _demonstrate(arguments.checkpoint, arguments.folder)
    except Gpt2EdgeError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _demonstrate(checkpoint: Path, folder: Path) -> None:
    fp32, int8 = folder / f"{checkpoint.name}-fp32", folder / f"{checkpoint.name}-int8"
    weights = {path.name: file_sha256(path) for path in checkpoint.glob("*.safetensors")}
    made_anew = _make(fp32, weights, lambda: _export(checkpoint, fp32))
    if made_anew and int8.exists():
        shutil.rmtree(int8)
    _make(int8, weights, lambda: _quantize(fp32, int8))
    console = Console()
    with load(fp32) as full, load(int8) as quantized:
        for model in (full, quantized):
            console.print(f"\n[bold]{model.manifest.precision}[/bold], greedy:")
            print(PROMPT, end="", flush=True)
            for piece in model.stream(PROMPT, max_new_tokens=80):
                print(piece.text, end="", flush=True)
            print()
        print()
        with Progress("measure", total=2 * (_REPETITIONS + 1)) as progress:
            progress.start("speed, in turn")
            speeds = measure_speeds([full, quantized], _PROMPT_TOKENS, _NEW_TOKENS, _REPETITIONS, progress.advance)
        agreement = [_COMPARED_TOKENS, _agreeing_tokens(full, quantized)]
        console.print(_table([full.manifest, quantized.manifest], speeds, agreement, full.threads))


def _make(folder: Path, weights: dict[str, str], make: Callable[[], object]) -> bool:
    """Make a model folder unless a good one, of these weights and this version, is there already."""
    if folder.exists():
        try:
            opened = open_folder(folder)
            opened.check_hashes()
            made_by = opened.manifest.tools.get("gpt2-edge")
            if opened.manifest.source.get("sha256") == weights and made_by == VERSION:
                print(f"{folder} is there already", file=sys.stderr)
                return False
        except ModelFolderError as error:
            print(f"making {folder} again: {error}", file=sys.stderr)
        shutil.rmtree(folder)
    make()
    return True


def _export(checkpoint: Path, folder: Path) -> None:
    from gpt2_edge.export.pipeline import export_checkpoint

    export_checkpoint(checkpoint, folder)


def _quantize(source: Path, folder: Path) -> None:
    from gpt2_edge.quantize.pipeline import quantize_folder

    quantize_folder(source, folder, default_recipe("int8"))


def _agreeing_tokens(one: Model, other: Model) -> int:
    """How many greedy tokens two models have in common before the first difference."""
    first, second = (
        model.generate(PROMPT, max_new_tokens=_COMPARED_TOKENS, ignore_eos=True).tokens for model in (one, other)
    )
    return next((i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def _table(manifests: list[Manifest], speeds: list[Speed], agreement: list[int], threads: int) -> Table:
    table = Table(
        title=f"{_PROMPT_TOKENS}-token prompts, {_NEW_TOKENS} tokens after them, medians of {_REPETITIONS}, "
        f"{threads} threads",
        title_justify="left",
    )
    table.add_column("precision")
    for heading in ("size", "prefill", "decode", "same greedy tokens"):
        table.add_column(heading, justify="right")
    for manifest, speed, same in zip(manifests, speeds, agreement, strict=True):
        table.add_row(
            manifest.precision,
            f"{manifest.size_bytes / 1e6:.1f} MB",
            f"{speed.prefill_tokens_per_second:,.0f} tokens/s",
            f"{speed.decode_tokens_per_second:,.0f} tokens/s",
            f"{same} of {_COMPARED_TOKENS}",
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
