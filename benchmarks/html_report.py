"""The report as one HTML file that needs nothing else: no script, no font, no network."""

import shlex
from html import escape
from typing import Any

from gpt2_edge.benchmarks.charts import charts_of, has_numbers, row_number, series_class
from gpt2_edge.benchmarks.html_style import STYLE
from gpt2_edge.benchmarks.report import Report
from gpt2_edge.benchmarks.sheets import Sheet, sheets_of
from gpt2_edge.benchmarks.summary import remarks, summary_sentences

_METHOD = """Every model runs in a process of its own; all are loaded, one computes at a time, and each test goes around
all of them before it is repeated. Tokens/s is the mean ± sample standard deviation of the repetitions, with new random
tokens each time, after a warm-up, without tokenization and sampling, as llama-bench measures it. pp512 computes a
prompt of 512 tokens; tg128 decodes 128 tokens one after another; @ d512 means after 512 others; b4 means 4 sequences
side by side. A star marks a spread above 10 %: the machine was disturbed. A ratio is given only where the spreads do
not overlap."""
_MOST_HEADLINES = 3
# Nothing may be fetched, whatever is in the names that are shown.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def to_html(report: Report) -> str:
    """Return the page."""
    sentences = summary_sentences(report) or ["Nothing could be measured."]
    said = [*remarks(report), *(report.comparison.notes if report.comparison else ())]
    charts = charts_of(report)
    body = [
        f"<h1>gpt2-edge bench, {escape(report.created_at)}</h1>",
        *_summary(sentences),
        _list(said),
    ]
    overview, *details = sheets_of(report)
    body.append(_table(overview))
    if charts:
        body += ["<h2>Charts</h2>", _legend(report), '<div class="charts">']
        body += [
            f"<figure><h3>{escape(chart.title)}</h3>\n{chart.svg}\n<figcaption>{escape(chart.caption)}</figcaption></figure>"
            for chart in charts
        ]
        body.append("</div>")
    body += ["<h2>All numbers</h2>", *map(_table, details)]
    body += ["<h2>Environment</h2>", _definitions(_environment(report))]
    body += ["<h2>How to measure this again</h2>", f"<pre>{escape(shlex.join(report.command))}</pre>"]
    body.append(f'<p class="method">{escape(_METHOD)}</p>')
    return _PAGE.format(policy=escape(_POLICY), style=STYLE, body="\n".join(body))


def _summary(sentences: list[str]) -> list[str]:
    """Return the sentences as headlines, or as a list where they are too many for that."""
    if len(sentences) > _MOST_HEADLINES:
        return [_list(sentences)]
    return [f'<p class="summary">{escape(sentence)}</p>' for sentence in sentences]


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>gpt2-edge bench</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def _legend(report: Report) -> str:
    numbered = has_numbers(report)
    items = (
        f'<li class="{series_class(index)}"><span></span> '
        f"<b>{row_number(index) + ' ' if numbered else ''}{escape(variant.name)}</b></li>"
        for index, variant in enumerate(report.variants)
        if variant.speeds
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _list(lines: list[str]) -> str:
    return f'<ul class="remarks">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _table(sheet: Sheet) -> str:
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in sheet.header)
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in sheet.rows)
    return (
        f'<section class="card"><h3>{escape(sheet.title)}</h3>\n<div class="scroll"><table>\n'
        f"<thead><tr>{header}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></section>"
    )


def _environment(report: Report) -> dict[str, Any]:
    facts = {name.replace("_", " "): value for name, value in report.environment.items() if value is not None}
    if isinstance(facts.get("memory bytes"), int):
        facts["memory"] = f"{facts.pop('memory bytes') / 2**30:.1f} GiB"
    facts["isa"] = ", ".join(facts.get("isa") or ["nothing recognized"])
    measured = {each.bandwidth.buffer_bytes: each.bandwidth for each in report.variants if each.bandwidth}
    bandwidths = [
        f"{each.read_bytes_per_second.mean / 1e9:.1f} GB/s over {size / 1e6:,.0f} MB" for size, each in measured.items()
    ]
    return facts | ({"memory bandwidth": "; ".join(bandwidths)} if bandwidths else {}) | {"took": f"{report.seconds} s"}


def _definitions(facts: dict[str, Any]) -> str:
    items = (f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{''.join(items)}</dl>"
