"""Markdown, CSV and JSON lines, with llama-bench's columns and field names."""

import csv
import io
import json
from typing import Any

from gpt2_edge.benchmarks.report import Report, Speed, Variant
from gpt2_edge.benchmarks.sheets import NOTHING, SPEEDS_TITLE, Sheet, sheets_of, with_spread
from gpt2_edge.benchmarks.summary import remarks, summary_sentences

_MEBIBYTE = 1024 * 1024


def to_markdown(report: Report) -> str:
    """Return llama-bench's table, the other tables, and what is to be said about them."""
    parts = [_markdown_table(_llama_bench_sheet(report))]
    parts += [
        f"**{_cell(sheet.title)}**\n\n{_markdown_table(sheet)}"
        for sheet in sheets_of(report)
        if not sheet.title.startswith(SPEEDS_TITLE)
    ]
    parts += summary_sentences(report)
    said = [*remarks(report), *(report.comparison.notes if report.comparison else ())]
    if said:
        parts.append("\n".join(f"- {remark}" for remark in said))
    environment = report.environment
    parts.append(
        f"build: gpt2-edge {environment.get('gpt2-edge')} (onnxruntime {environment.get('onnxruntime')}), "
        f"{environment.get('cpu')}, {report.created_at}"
    )
    return "\n\n".join(parts) + "\n"


def to_csv(report: Report) -> str:
    """Return a line for each test of each row."""
    records = [_without_samples(record) for record in _records(report)]
    output = io.StringIO()
    fields = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(output, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return output.getvalue()


def to_json_lines(report: Report) -> str:
    """Return a JSON object for each test of each row."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in _records(report))


def _records(report: Report) -> list[dict[str, Any]]:
    records = []
    for variant in report.variants:
        row = _facts(report, variant)
        if not variant.speeds:
            records.append(row | {"error": variant.error})
        for test, speed in variant.speeds.items():
            records.append(row | {"test": test} | _result(speed) | {"error": speed.error or variant.error})
    return records


def _facts(report: Report, variant: Variant) -> dict[str, Any]:
    latency, memory, quality = variant.latency, variant.memory, variant.quality
    return {
        "schema": report.schema,
        "build_commit": f"gpt2-edge {report.environment.get('gpt2-edge')}",
        "cpu_info": report.environment.get("cpu"),
        "backends": f"onnxruntime {report.environment.get('onnxruntime')} {variant.device or ''}".strip(),
        "model_filename": variant.folder,
        "model_type": f"gpt2 {variant.precision}" if variant.precision else None,
        "model_size": variant.size_bytes,
        "model_n_params": variant.parameters,
        "n_threads": variant.threads,
        "test_time": report.created_at,
        "load_seconds": variant.load_seconds,
        "time_to_first_token_ms": latency and round(1e3 * latency.time_to_first_token.mean, 3),
        "inter_token_p50_ms": latency and latency.p50_ms,
        "inter_token_p95_ms": latency and latency.p95_ms,
        "inter_token_p99_ms": latency and latency.p99_ms,
        "steady_bytes": memory and memory.steady_bytes,
        "peak_bytes": memory and memory.peak_bytes,
        "perplexity": quality and quality.perplexity,
        "mean_kl_divergence": quality and quality.mean_kl_divergence,
        "same_top_percent": quality and quality.same_top_percent,
        "test": None,
    }


def _result(speed: Speed) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "n_prompt": speed.n_prompt,
        "n_gen": speed.n_gen,
        "n_depth": speed.n_depth,
        "batch": speed.batch,
        "skipped": speed.skipped,
    }
    measured = speed.tokens_per_second
    if measured is None:
        return fields
    tokens = speed.n_prompt + speed.n_gen * speed.batch
    nanoseconds = [round(1e9 * tokens / sample) for sample in measured.samples]
    mean = sum(nanoseconds) / len(nanoseconds)
    spread = (sum((each - mean) ** 2 for each in nanoseconds) / max(1, len(nanoseconds) - 1)) ** 0.5
    return fields | {
        "avg_ns": round(mean),
        "stddev_ns": round(spread),
        "avg_ts": measured.mean,
        "stddev_ts": measured.stddev,
        "samples_ns": nanoseconds,
        "samples_ts": list(measured.samples),
    }


def _without_samples(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith("samples_")}


def _llama_bench_sheet(report: Report) -> Sheet:
    rows = []
    for variant in report.variants:
        facts = (
            variant.name,
            NOTHING if variant.size_bytes is None else f"{variant.size_bytes / _MEBIBYTE:.2f} MiB",
            NOTHING if variant.parameters is None else f"{variant.parameters / 1e6:.2f} M",
            "ONNX Runtime " + (variant.device or "cpu").upper(),
            str(variant.threads or NOTHING),
        )
        if not variant.speeds:
            rows.append((*facts, NOTHING, variant.error or NOTHING))
        for test, speed in variant.speeds.items():
            rows.append((*facts, test, speed.error or speed.skipped or with_spread(speed.tokens_per_second)))
    return Sheet("", ("model", "size", "params", "backend", "threads", "test", "t/s"), tuple(rows))


def _markdown_table(sheet: Sheet) -> str:
    lines = [
        "| " + " | ".join(map(_cell, sheet.header)) + " |",
        "| --- |" + " ---: |" * (len(sheet.header) - 1),
        *("| " + " | ".join(map(_cell, row)) + " |" for row in sheet.rows),
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("\n", " ")
