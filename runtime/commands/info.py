"""`gpt2-edge info`: what a model folder holds and how it would run here."""

import argparse
import json
import platform
from collections import Counter
from collections.abc import Mapping
from typing import Any

from gpt2_edge.errors import MissingDependencyError
from gpt2_edge.folder import ModelFolder, open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.quality_table import quality_rows
from gpt2_edge.telemetry import telemetry_state
from gpt2_edge.threads import usable_cores
from gpt2_edge.version import VERSION


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `info`."""
    parser.add_argument("folder", metavar="FOLDER", help="a model folder or a pack, or `storyteller`")
    parser.add_argument("--json", action="store_true", help="print everything the manifest says, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the manifest's contents and this machine's."""
    folder = open_folder(arguments.folder)
    if arguments.json:
        document = {"folder": str(folder.path), **json.loads(folder.manifest.to_json()), "here": _here(folder)}
        print(json.dumps(document, indent=2, ensure_ascii=False))
        return 0
    rows = [*_about_the_model(folder), *_here(folder).items()]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _about_the_model(folder: ModelFolder) -> list[tuple[str, str]]:
    manifest = folder.manifest
    shape = manifest.architecture
    return [
        ("folder", str(folder.path)),
        ("made from", _source(manifest.source)),
        ("precision", manifest.precision + (f", recipe {manifest.recipe.get('name')}" if manifest.recipe else "")),
        *_matrices(manifest.recipe),
        ("size", f"{manifest.size_bytes / 1e6:.1f} MB in {len(manifest.files)} files"),
        ("shape", f"{shape.layers} layers, {shape.heads} heads, width {shape.width}, {shape.activation}"),
        ("context", f"{shape.context_length} tokens, {_cache(manifest)}"),
        ("vocabulary", f"{shape.vocabulary_size} tokens, end of text {manifest.end_of_text}"),
        *_measured(manifest.measured),
        ("needs", f"ONNX Runtime {manifest.minimum_onnxruntime} or newer"),
        ("made with", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
    ]


def _here(folder: ModelFolder) -> dict[str, str]:
    try:
        from gpt2_edge.device import why_not_cuda
        from gpt2_edge.onnxruntime_import import onnxruntime

        installed = f"{onnxruntime.__version__}, providers {', '.join(onnxruntime.get_available_providers())}"
        obstacle = why_not_cuda(folder)
        on_the_cpu = "no device" if folder.manifest.precision == "fp16" else "cpu by default"
        device = "cuda:0 by default" if obstacle is None else f"{on_the_cpu}: {obstacle}"
    except MissingDependencyError as error:
        installed, device = str(error), "none"
    return {
        "gpt2-edge here": f"{VERSION} on Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "onnxruntime here": installed,
        "device here": device,
        "threads here": f"{usable_cores()} by default",
        "telemetry here": telemetry_state(),
    }


def _source(source: Mapping[str, Any]) -> str:
    revision = source.get("revision")
    return str(source.get("name", "unknown")) + (f" at revision {revision}" if revision else "")


def _matrices(recipe: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Say how many matrices are stored in which way, if the manifest lists them."""
    listed = None if recipe is None else recipe.get("matrices")
    if not isinstance(listed, dict):
        return []
    counts = Counter(str(stored) for stored in listed.values())
    return [("matrices", f"{count}: {stored}") for stored, count in counts.most_common()]


def _cache(manifest: Manifest) -> str:
    megabytes = manifest.cache_bytes_per_token * manifest.architecture.context_length / 1e6
    return f"KV cache in {manifest.cache_precision}, {megabytes:.1f} MB when full"


def _measured(measured: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for name, values in measured.items():
        if name == "quality" and isinstance(values, dict):
            rows += [(f"quality: {row}", value) for row, value in quality_rows(values)]
        else:
            rows.append((f"measured: {name}", _plain(values)))
    return rows


def _plain(values: Any) -> str:
    if not isinstance(values, dict):
        return str(values)
    return ", ".join(
        f"{name.replace('_', ' ')} {f'{value:.3g}' if isinstance(value, float) else value}"
        for name, value in values.items()
    )
