"""The tables of a report, as texts: the terminal, Markdown and HTML show the same ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gpt2_edge.benchmarks.comparison import FIRST_TOKEN
from gpt2_edge.benchmarks.report import Report, Variant, Verdict
from gpt2_edge.benchmarks.spread import Measurement
from gpt2_edge.benchmarks.summary import decode_test, prefill_test

NOTHING = "–"
DISTURBED_MARK = "*"
SPEEDS_TITLE = "Tokens/s without sampling"

_Column = tuple[str, Callable[[Variant], str]]


@dataclass(frozen=True, slots=True)
class Sheet:
    """A table.

    Attributes:
        title: What it shows.
        header: Names of the columns; the first is left-aligned.
        rows: Cells.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def sheets_of(report: Report) -> list[Sheet]:
    """Return the overview, then the details."""
    sheets = [_overview(report), _speeds(report), _latency(report), _resources(report)]
    if any(variant.quality for variant in report.variants):
        sheets.append(_quality(report))
    if any(variant.sustained for variant in report.variants):
        sheets.append(_sustained(report))
    if report.comparison is not None:
        sheets.append(_comparison(report))
    return [sheet for index, sheet in enumerate(sheets) if index == 0 or _says_anything(sheet)]


def _says_anything(sheet: Sheet) -> bool:
    return any(cell != NOTHING for row in sheet.rows for cell in row[1:])


def with_spread(measured: Measurement | None, scale: float = 1.0) -> str:
    """Write mean ± standard deviation, with a mark if that is above 10 %."""
    if measured is None:
        return NOTHING
    mean = measured.mean * scale
    digits = 0 if mean >= 100 else 1 if mean >= 10 else 2
    if measured.stddev is None:
        return f"{mean:,.{digits}f}"
    mark = DISTURBED_MARK if measured.disturbed else ""
    return f"{mean:,.{digits}f} ± {measured.stddev * scale:,.{digits}f}{mark}"


def megabytes(count: int | None) -> str:
    """Write a size in megabytes."""
    return NOTHING if count is None else f"{count / 1e6:,.0f} MB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _sheet(title: str, report: Report, columns: Sequence[_Column], with_peers: bool = True) -> Sheet:
    names, cells = zip(*columns, strict=True)
    variants = [variant for variant in report.variants if with_peers or variant.peer is None]
    rows = tuple((variant.name, *(cell(variant) for cell in cells)) for variant in variants)
    return Sheet(title, ("model", *names), rows)


def _overview(report: Report) -> Sheet:
    columns: list[_Column] = [
        ("size", lambda variant: "error" if variant.error and not variant.speeds else megabytes(variant.size_bytes)),
        ("memory", lambda variant: megabytes(variant.memory.steady_bytes if variant.memory else None)),
    ]
    columns += [_speed_column(test) for test in (prefill_test(report), decode_test(report)) if test is not None]
    columns += [
        ("perplexity", lambda variant: f"{variant.quality.perplexity:,.2f}" if variant.quality else NOTHING),
        ("same top", _same_top),
    ]
    return _sheet("Overview: speed in tokens/s, mean ± standard deviation", report, columns)


def _speeds(report: Report) -> Sheet:
    tests = list(dict.fromkeys(name for variant in report.variants for name in variant.speeds))
    measured = [test for test in tests if any(variant.speed(test) for variant in report.variants)]
    threads: _Column = ("threads", lambda variant: str(variant.threads or NOTHING))
    repetitions = report.settings.get("repetitions")
    title = f"{SPEEDS_TITLE}, {repetitions} repetition{'' if repetitions == 1 else 's'}"
    return _sheet(title, report, [*map(_speed_column, measured), threads])


def _latency(report: Report) -> Sheet:
    lengths = next((each.latency for each in report.variants if each.latency), None)
    title = "What a caller waits for"
    if lengths is not None:
        title += f": {lengths.prompt_tokens} prompt tokens, {lengths.new_tokens} sampled ones"

    def milliseconds(name: str) -> Callable[[Variant], str]:
        return lambda variant: f"{getattr(variant.latency, name):.2f} ms" if variant.latency else NOTHING

    def percent(name: str) -> Callable[[Variant], str]:
        return lambda variant: f"{100 * getattr(variant.latency, name):.1f} %" if variant.latency else NOTHING

    return _sheet(
        title,
        report,
        [
            (
                "first token, ms",
                lambda variant: with_spread(variant.latency.time_to_first_token if variant.latency else None, 1e3),
            ),
            ("next: p50", milliseconds("p50_ms")),
            ("p95", milliseconds("p95_ms")),
            ("p99", milliseconds("p99_ms")),
            ("sampling", percent("sampling_share")),
            ("Python", percent("python_share")),
        ],
        with_peers=False,
    )


def _resources(report: Report) -> Sheet:
    return _sheet(
        "Memory of the process, and decoding against the speed of memory",
        report,
        [
            ("load", lambda variant: NOTHING if variant.load_seconds is None else f"{variant.load_seconds:.2f} s"),
            ("RSS", lambda variant: megabytes(variant.memory.steady_bytes if variant.memory else None)),
            ("peak", lambda variant: megabytes(variant.memory.peak_bytes if variant.memory else None)),
            (
                "idle CPU",
                lambda variant: NOTHING if variant.idle_cpu_percent is None else f"{variant.idle_cpu_percent:.1f} %",
            ),
            (
                "bandwidth, GB/s",
                lambda variant: with_spread(
                    variant.bandwidth.read_bytes_per_second if variant.bandwidth else None, 1e-9
                ),
            ),
            ("a token", lambda variant: megabytes(variant.bandwidth.bytes_per_token if variant.bandwidth else None)),
            ("of limit", _fraction_of_limit),
        ],
    )


def _quality(report: Report) -> Sheet:
    text = next((each.quality.text for each in report.variants if each.quality), "")
    return _sheet(
        f"Quality over {text}",
        report,
        [
            ("tokens", lambda variant: f"{variant.quality.tokens:,}" if variant.quality else NOTHING),
            ("perplexity", lambda variant: f"{variant.quality.perplexity:,.3f}" if variant.quality else NOTHING),
            ("change", _perplexity_change),
            (
                "mean KLD",
                lambda variant: (
                    NOTHING
                    if variant.quality is None or variant.quality.mean_kl_divergence is None
                    else f"{variant.quality.mean_kl_divergence:.5f}"
                ),
            ),
            ("same top", _same_top),
        ],
        with_peers=False,
    )


def _sustained(report: Report) -> Sheet:
    def part(start: float, stop: float) -> Callable[[Variant], str]:
        def cell(variant: Variant) -> str:
            if variant.sustained is None:
                return NOTHING
            speeds = variant.sustained.tokens_per_second
            chosen = speeds[int(start * len(speeds)) : max(int(start * len(speeds)) + 1, int(stop * len(speeds)))]
            return f"{sum(chosen) / len(chosen):,.0f}"

        return cell

    quarters = [(f"{name} quarter", part(index / 4, (index + 1) / 4)) for index, name in enumerate(_ORDINALS)]
    return _sheet("Sustained decoding, tokens/s", report, quarters)


def _comparison(report: Report) -> Sheet:
    verdicts = () if report.comparison is None else report.comparison.verdicts
    earlier = "" if report.comparison is None else report.comparison.earlier
    return Sheet(f"Against {earlier}", ("model", "test", "before", "now", "verdict"), tuple(map(_verdict, verdicts)))


def _verdict(verdict: Verdict) -> tuple[str, ...]:
    is_time = verdict.quantity == FIRST_TOKEN
    scale = 1e3 if is_time else 1.0
    return (
        verdict.name,
        "first token, ms" if is_time else verdict.quantity,
        with_spread(verdict.before, scale),
        with_spread(verdict.now, scale),
        verdict.verdict if verdict.times_as_fast is None else f"{verdict.verdict}, {verdict.times_as_fast}",
    )


_ORDINALS = ("first", "second", "third", "last")


def _speed_column(test: str) -> _Column:
    def cell(variant: Variant) -> str:
        speed = variant.speeds.get(test)
        return "error" if speed is not None and speed.error else with_spread(variant.speed(test))

    return test, cell


def _read_bandwidth(variant: Variant) -> str:
    return NOTHING if variant.bandwidth is None else with_spread(variant.bandwidth.read_bytes_per_second, 1e-9)


def _fraction_of_limit(variant: Variant) -> str:
    if variant.bandwidth is None or variant.bandwidth.fraction is None:
        return NOTHING
    return f"{100 * variant.bandwidth.fraction:.0f} %"


def _perplexity_change(variant: Variant) -> str:
    quality = variant.quality
    if quality is None or quality.perplexity_change_percent is None:
        return NOTHING
    return f"{quality.perplexity_change_percent:+.2f} % ± {quality.perplexity_change_error_percent or 0:.2f}"


def _same_top(variant: Variant) -> str:
    if variant.quality is None or variant.quality.same_top_percent is None:
        return NOTHING
    return f"{variant.quality.same_top_percent:.1f} %"
