"""The charts as one picture, drawn with matplotlib."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2_edge.benchmarks.picture import write_picture
from gpt2_edge.benchmarks.report import Report, Variant
from gpt2_edge.benchmarks.spread import percentile
from gpt2_edge.benchmarks.summary import decode_test, summary_sentences

_COLOURS: Final = ("#2a6fd0", "#d9591c", "#138a5e", "#a86a00", "#c03f7c", "#5a45b5")
_PERCENTILES: Final = (1, 5, *range(10, 100, 5), 99)


def draw(report: Report, path: Path) -> None:
    """Draw speed against size, speed against context, latency and memory.

    Args:
        report: What was measured.
        path: A .png or .svg to write.

    Raises:
        OSError: It cannot be written.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    panels: tuple[Callable[[Axes, Report], None], ...] = (_size, _context, _latency, _memory)
    for axes, panel in zip(figure.subplots(2, 2).flat, panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        panel(axes, report)
    # Dollar signs in a name are no formula.
    figure.suptitle("\n".join(summary_sentences(report)).replace("$", r"\$"), wrap=True, fontsize=11)
    write_picture(figure, path)


def _coloured(report: Report) -> list[tuple[Variant, dict[str, Any]]]:
    return [
        (variant, {"color": _COLOURS[index % len(_COLOURS)], "label": variant.name.replace("$", r"\$")})
        for index, variant in enumerate(report.variants)
    ]


def _size(axes: Axes, report: Report) -> None:
    test = decode_test(report)
    for variant, style in _coloured(report):
        speed = variant.speed(test) if test else None
        if speed is not None and variant.size_bytes is not None:
            axes.errorbar(variant.size_bytes / 1e6, speed.mean, speed.stddev or 0, fmt="o", capsize=3, **style)
    axes.set(title="Speed against size", xlabel="size on disk, MB", ylabel=f"{test or 'tg'}, tokens/s")
    _from_zero(axes)


def _context(axes: Axes, report: Report) -> None:
    for variant, style in _coloured(report):
        points = sorted(
            (speed.n_depth + speed.n_gen / 2, speed.tokens_per_second.mean, speed.tokens_per_second.stddev or 0)
            for speed in variant.speeds.values()
            if speed.n_gen and speed.batch == 1 and speed.tokens_per_second is not None
        )
        if points:
            depths, means, spreads = zip(*points, strict=True)
            axes.errorbar(depths, means, spreads, fmt="o-", capsize=3, **style)
    axes.set(title="Decode speed against context length", xlabel="tokens before", ylabel="tokens/s")
    _from_zero(axes)


def _latency(axes: Axes, report: Report) -> None:
    for variant, style in _coloured(report):
        if variant.latency is not None:
            gaps = [percentile(variant.latency.inter_token_ms, percent) for percent in _PERCENTILES]
            axes.plot(gaps, _PERCENTILES, **style)
            axes.set_xscale("log")
    axes.set(title="Time between two tokens", xlabel="milliseconds", ylabel="% of tokens")
    _show_names(axes)


def _memory(axes: Axes, report: Report) -> None:
    shown = [(variant, style, variant.memory) for variant, style in _coloured(report) if variant.memory is not None]
    for place, (_, style, memory) in enumerate(shown):
        axes.barh(place, memory.peak_bytes / 1e6, color=style["color"], alpha=0.3)
        axes.barh(place, memory.steady_bytes / 1e6, color=style["color"])
    axes.set_yticks(range(len(shown)), [style["label"] for _, style, _ in shown])
    axes.set(title="Memory: steady, and peak in faint", xlabel="MB resident")
    axes.invert_yaxis()


def _from_zero(axes: Axes) -> None:
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    _show_names(axes)


def _show_names(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False)
