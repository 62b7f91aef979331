"""The charts of the HTML report, drawn as SVG by hand: no library, no script, colours from the page's style sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import combinations, product
from typing import Final, NamedTuple

from gpt2_edge.benchmarks.chart_axes import Scale, linear_scale, logarithmic_scale, tick_text
from gpt2_edge.benchmarks.chart_labels import LINE_HEIGHT, Box, Place, beside, column, overlap, point_box
from gpt2_edge.benchmarks.report import Report, Variant
from gpt2_edge.benchmarks.spread import percentile
from gpt2_edge.benchmarks.summary import decode_test

WIDTH: Final = 460
HEIGHT: Final = 290
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 14, 44
_ROW_HEIGHT: Final = 46
_MOST_NAMES: Final = 6  # as many as there are colours
_HALF_LETTER: Final = 4
_NAME_LETTER, _QUIET_LETTER = 6.6, 6.1  # as wide as letters of both styles are in the mean
_ROOM_FOR_NAMES, _ROOM_FOR_NUMBERS = 1.25, 1.05


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing.

    Attributes:
        title: What it shows.
        caption: How to read it.
        svg: The drawing itself.
    """

    title: str
    caption: str
    svg: str


def charts_of(report: Report) -> list[Chart]:
    """Return the charts that there are numbers for."""
    makers = (_speed_and_size, _speed_and_context, _latency, _memory, _sustained)
    return [chart for maker in makers if (chart := maker(report)) is not None]


def has_numbers(report: Report) -> bool:
    """Tell whether charts show the numbers of the legend: there are many rows, or names would cover something."""
    _, _, points = _sizes_and_speeds(report, _ROOM_FOR_NAMES)
    names = [_box_of(name) for name in _places_of_names(points)]
    dots = [point_box(place) for place, _, _ in points]
    return (
        sum(1 for each in report.variants if each.speeds) > _MOST_NAMES
        or any(overlap(one, other) for one, other in combinations(names, 2))
        or any(overlap(*pair) for pair in product(names, dots))
    )


def row_number(index: int) -> str:
    """Return the number that stands for a row where names would cover each other."""
    return str(index + 1)


def series_class(index: int) -> str:
    """Return the style class of a row's colour."""
    return f"series-{index % 6}"


def _speed_and_size(report: Report) -> Chart | None:
    test = decode_test(report)
    numbered = has_numbers(report)
    x, y, points = _sizes_and_speeds(report, _ROOM_FOR_NUMBERS if numbered else _ROOM_FOR_NAMES)
    if test is None or not points:
        return None
    parts = [*_axes(x, y, "size on disk, MB", f"{test}, tokens/s")]
    for place, index, variant in points:
        parts += _point(variant, test, index, place.x, y)
    if numbered:
        parts += _numbers([place for place, _, _ in points], [index for _, index, _ in points])
    else:
        for name in _places_of_names(points):
            parts.append(_text(name.x, name.y, name.variant.name, name.anchor, "name halo"))
            words = _quality_words(name.variant)
            parts.append(_text(name.x, name.y + LINE_HEIGHT - 1, words, name.anchor, "quiet halo"))
    below = "" if numbered else "; below a name, what it costs in quality"
    caption = f"Up and to the left is better. Bars are ± one standard deviation{below}."
    return Chart("Speed against size and quality", caption, _svg(parts, HEIGHT, f"{test} against size"))


def _sizes_and_speeds(report: Report, room: float) -> tuple[Scale, Scale, list[tuple[Place, int, Variant]]]:
    """Return both axes, the first `room` times as long as the largest size, and where each row's point is."""
    test = decode_test(report)
    shown = [
        (index, each, (each.size_bytes or 0) / 1e6, speed)
        for index, each in enumerate(report.variants)
        if test and (speed := each.speed(test))
    ]
    x = linear_scale(0, room * max((size for _, _, size, _ in shown), default=1), LEFT, WIDTH - RIGHT)
    tops = [speed.mean + (speed.stddev or 0) for _, _, _, speed in shown]
    y = linear_scale(0, max(tops, default=1), HEIGHT - BOTTOM, TOP)
    return x, y, [(Place(x.at(size), y.at(speed.mean)), index, each) for index, each, size, speed in shown]


class _Name(NamedTuple):
    """Where a row's name stands, its quality below it."""

    x: float
    y: float
    anchor: str
    variant: Variant


def _places_of_names(points: Sequence[tuple[Place, int, Variant]]) -> list[_Name]:
    """Place names beside points, on the side where there is room, those of a side apart and above the axis."""
    middle = WIDTH * 0.6
    left = [(place, variant) for place, _, variant in points if place.x <= middle]
    right = [(place, variant) for place, _, variant in points if place.x > middle]
    names = []
    for side, anchor, shift in ((left, "start", 10), (right, "end", -10)):
        heights = column(
            [place.y for place, _ in side], 2 * LINE_HEIGHT + 2, TOP + 10, HEIGHT - BOTTOM - LINE_HEIGHT - 2
        )
        names += [_Name(place.x + shift, y, anchor, variant) for (place, variant), y in zip(side, heights, strict=True)]
    return names


def _box_of(name: _Name) -> Box:
    width = max(_NAME_LETTER * len(name.variant.name), _QUIET_LETTER * len(_quality_words(name.variant)))
    left = name.x - width if name.anchor == "end" else name.x
    return Box(left, name.y - LINE_HEIGHT + _HALF_LETTER, left + width, name.y + LINE_HEIGHT)


def _numbers(places: Sequence[Place], indices: Sequence[int]) -> list[str]:
    """Write the numbers that rows have in the legend beside their points."""
    numbers = [row_number(index) for index in indices]
    middles = beside(places, numbers, Place(LEFT, TOP), Place(WIDTH - RIGHT, HEIGHT - BOTTOM))
    return [
        _text(middle.x, middle.y + _HALF_LETTER, number, "middle", f"name coloured {series_class(index)}")
        for middle, number, index in zip(middles, numbers, indices, strict=True)
    ]


def _quality_words(variant: Variant) -> str:
    quality = variant.quality
    if quality is None:
        return ""
    if quality.perplexity_change_percent is None:
        return f"perplexity {quality.perplexity:,.2f}"
    return f"perplexity {quality.perplexity_change_percent:+.2f} %, KLD {quality.mean_kl_divergence or 0:.4f}"


def _latency(report: Report) -> Chart | None:
    shown = [(index, each) for index, each in enumerate(report.variants) if each.latency]
    gaps = [gap for _, each in shown if each.latency for gap in each.latency.inter_token_ms if gap > 0]
    if not gaps:
        return None
    height = TOP + BOTTOM + _ROW_HEIGHT * len(shown)
    x = logarithmic_scale(min(gaps), max(gaps), 16, WIDTH - RIGHT)
    parts = _horizontal_axis(x, height, "milliseconds between two tokens, logarithmic")
    for place, (index, variant) in enumerate(shown):
        samples = variant.latency.inter_token_ms if variant.latency else ()
        parts += _distribution(samples, x, TOP + place * _ROW_HEIGHT, index, variant.name)
    caption = "Line: 1st to 99th percentile. Box: the middle half. Bar: median. Dots: 95th and 99th percentile."
    return Chart("Time between two tokens", caption, _svg(parts, height, "latency distribution"))


def _distribution(samples: Sequence[float], x: Scale, top: float, index: int, name: str) -> list[str]:
    low, quarter, median, three_quarters, p95, p99 = (
        x.at(percentile(samples, percent)) for percent in (1, 25, 50, 75, 95, 99)
    )
    middle, colour = top + 30, series_class(index)
    return [
        _text(16, top + 14, f"{name}: median {percentile(samples, 50):.2f} ms", "start", "name"),
        f'<line class="line {colour}" x1="{low:.1f}" x2="{p99:.1f}" y1="{middle}" y2="{middle}"/>',
        f'<rect class="fill {colour}" x="{quarter:.1f}" width="{max(2, three_quarters - quarter):.1f}" '
        f'y="{middle - 8}" height="16" rx="2"/>',
        f'<line class="median" x1="{median:.1f}" x2="{median:.1f}" y1="{middle - 8}" y2="{middle + 8}"/>',
        *(f'<circle class="fill {colour}" cx="{place:.1f}" cy="{middle}" r="4"/>' for place in (p95, p99)),
    ]


def _speed_and_context(report: Report) -> Chart | None:
    lines: list[tuple[int, Variant, list[tuple[int, str]]]] = []
    for index, variant in enumerate(report.variants):
        # A tg test at depth d is, on average, in the middle of its own tokens.
        places = [
            (speed.n_depth + speed.n_gen // 2, name)
            for name, speed in variant.speeds.items()
            if speed.n_gen and speed.batch == 1 and speed.tokens_per_second is not None
        ]
        if len(places) > 1:
            lines.append((index, variant, sorted(places)))
    if not lines:
        return None
    tops = [
        speed.mean + (speed.stddev or 0)
        for _, variant, places in lines
        for _, name in places
        if (speed := variant.speed(name))
    ]
    x = linear_scale(0, max(place for _, _, places in lines for place, _ in places), LEFT, WIDTH - RIGHT - 8)
    y = linear_scale(0, max(tops), HEIGHT - BOTTOM, TOP)
    parts = _axes(x, y, "tokens before", "tokens/s")
    for index, variant, places in lines:
        points = " ".join(
            f"{x.at(place):.1f},{y.at(speed.mean):.1f}" for place, name in places if (speed := variant.speed(name))
        )
        parts.append(f'<polyline class="line {series_class(index)}" points="{points}"/>')
        for place, name in places:
            parts += _point(variant, name, index, x.at(place), y)
    if has_numbers(report):
        ends = [speed.mean for _, variant, places in lines if (speed := variant.speed(places[-1][1]))]
        heights = column([y.at(end) for end in ends], LINE_HEIGHT - 4, TOP + _HALF_LETTER, HEIGHT - BOTTOM)
        parts += [
            _text(WIDTH, height + _HALF_LETTER, row_number(index), "end", f"name coloured {series_class(index)}")
            for (index, _, _), height in zip(lines, heights, strict=True)
        ]
    caption = "Decoding slows down as the context fills: each token reads the keys and values of all before it."
    return Chart("Decode speed against context length", caption, _svg(parts, HEIGHT, "tokens/s against depth"))


def _memory(report: Report) -> Chart | None:
    shown = [(index, each) for index, each in enumerate(report.variants) if each.memory]
    if not shown:
        return None
    height = TOP + BOTTOM + _ROW_HEIGHT * len(shown)
    x = linear_scale(0, max(each.memory.peak_bytes for _, each in shown if each.memory) / 1e6, 16, WIDTH - RIGHT)
    parts = _horizontal_axis(x, height, "resident memory of the process, MB")
    for place, (index, variant) in enumerate(shown):
        if variant.memory is None:
            continue
        top, colour = TOP + place * _ROW_HEIGHT, series_class(index)
        steady, peak = variant.memory.steady_bytes / 1e6, variant.memory.peak_bytes / 1e6
        parts += [
            _text(16, top + 14, f"{variant.name}: {steady:,.0f} MB, at most {peak:,.0f} MB", "start", "name"),
            _bar(x, peak, top, f"fill faint {colour}"),
            _bar(x, steady, top, f"fill {colour}"),
        ]
    caption = "Solid: after the tests, idle, the interpreter included. Faint: the most during loading and all tests."
    return Chart("Memory", caption, _svg(parts, height, "resident memory"))


def _sustained(report: Report) -> Chart | None:
    shown = [(index, each.sustained) for index, each in enumerate(report.variants) if each.sustained]
    if not shown:
        return None
    x = linear_scale(0, max(each.seconds[-1] for _, each in shown), LEFT, WIDTH - RIGHT - 8)
    y = linear_scale(0, max(max(each.tokens_per_second) for _, each in shown), HEIGHT - BOTTOM, TOP)
    parts = _axes(x, y, "seconds of decoding without a pause", "tokens/s")
    for index, each in shown:
        colour = series_class(index)
        places = [
            (f"{x.at(second):.1f}", f"{y.at(speed):.1f}")
            for second, speed in zip(each.seconds, each.tokens_per_second, strict=True)
        ]
        parts.append(f'<polyline class="line {colour}" points="{" ".join(map(",".join, places))}"/>')
        parts += [f'<circle class="fill {colour}" cx="{across}" cy="{up}" r="2.5"/>' for across, up in places]
    caption = "A machine that gets too hot slows down: then the line falls."
    return Chart("Sustained speed", caption, _svg(parts, HEIGHT, "tokens/s over time"))


def _point(variant: Variant, test: str, index: int, x: float, y: Scale) -> list[str]:
    speed = variant.speed(test)
    if speed is None:
        return []
    colour = series_class(index)
    spread = speed.stddev or 0
    return [
        f'<line class="line {colour}" x1="{x:.1f}" x2="{x:.1f}" '
        f'y1="{y.at(max(0, speed.mean - spread)):.1f}" y2="{y.at(speed.mean + spread):.1f}"/>',
        f'<circle class="fill {colour}" cx="{x:.1f}" cy="{y.at(speed.mean):.1f}" r="5">'
        f"<title>{escape(variant.name)}: {escape(test)} {speed.mean:,.1f} ± {spread:,.1f} tokens/s</title></circle>",
    ]


def _bar(x: Scale, value: float, top: float, style: str) -> str:
    left, width = x.at(0), x.at(value) - x.at(0)
    return f'<rect class="{style}" x="{left:.1f}" width="{width:.1f}" y="{top + 22}" height="16" rx="2"/>'


def _axes(x: Scale, y: Scale, x_title: str, y_title: str) -> list[str]:
    parts = []
    for tick in y.ticks:
        place = y.at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(_text(LEFT - 6, place + 4, tick_text(tick), "end", "quiet"))
    parts += [_text(x.at(tick), HEIGHT - BOTTOM + 18, tick_text(tick), "middle", "quiet") for tick in x.ticks]
    parts.append(_text((LEFT + WIDTH) / 2, HEIGHT - 8, x_title, "middle", "quiet"))
    parts.append(
        f'<text class="quiet" text-anchor="middle" transform="translate(13 {(HEIGHT - BOTTOM) / 2:.0f}) rotate(-90)">'
        f"{escape(y_title)}</text>"
    )
    return parts


def _horizontal_axis(x: Scale, height: float, title: str) -> list[str]:
    parts = []
    for tick in x.ticks:
        place = x.at(tick)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(_text(place, height - BOTTOM + 18, tick_text(tick), "middle", "quiet"))
    parts.append(_text(WIDTH / 2, height - 8, title, "middle", "quiet"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], height: float, label: str) -> str:
    opening = f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">'
    return "\n".join([opening, *parts, "</svg>"])
