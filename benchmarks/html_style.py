"""The style sheet of the HTML report: light and dark, narrow and wide, without a network."""

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --page: #fbfbf9; --card: #ffffff; --ink: #1c1c1a; --quiet: #63625c; --line: #e2e1da;
  --series-0: #2a6fd0; --series-1: #d9591c; --series-2: #138a5e; --series-3: #a86a00; --series-4: #c03f7c;
  --series-5: #5a45b5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #161615; --card: #1f1f1d; --ink: #f1f0ea; --quiet: #aeada4; --line: #3a3a36;
    --series-0: #6ea8f7; --series-1: #ff9462; --series-2: #45c795; --series-3: #e3b341; --series-4: #f08bb9;
    --series-5: #a897f5;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1rem; font-weight: 600; color: var(--quiet); margin: 0 0 .75rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
.summary { font-size: clamp(1.25rem, 2.6vw, 1.7rem); line-height: 1.35; font-weight: 600; margin: 0 0 .6rem;
  text-wrap: pretty; overflow-wrap: anywhere; }
.remarks { padding-left: 1.2rem; color: var(--quiet); overflow-wrap: anywhere; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
figcaption { font-size: .85rem; color: var(--quiet); margin-top: .4rem; }
svg { display: block; width: 100%; height: auto; font: 12.5px system-ui, sans-serif; }
svg text { fill: var(--ink); }
svg text.quiet { fill: var(--quiet); }
svg text.name { font-weight: 600; }
svg text.coloured { fill: currentColor; }
svg text.halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round; }
.grid { stroke: var(--line); stroke-width: 1; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.fill { fill: currentColor; }
.faint { opacity: .3; }
.median { stroke: var(--card); stroke-width: 2.5; }
.series-0 { color: var(--series-0); } .series-1 { color: var(--series-1); } .series-2 { color: var(--series-2); }
.series-3 { color: var(--series-3); } .series-4 { color: var(--series-4); } .series-5 { color: var(--series-5); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; padding: 0; margin: 0 0 .75rem; }
.legend span { display: inline-block; width: .8em; height: .8em; border-radius: 50%; background: currentColor; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin-bottom: 1rem; }
.card h3 { padding: .8rem 1rem .3rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1rem; text-align: right; white-space: nowrap; border-top: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; }
thead th { font-weight: 500; color: var(--quiet); border-top: 0; }
dl { display: grid; grid-template-columns: minmax(9rem, auto) 1fr; gap: .3rem 1.5rem; margin: 0; }
dt { color: var(--quiet); }
dd { margin: 0; overflow-wrap: anywhere; }
pre { overflow-x: auto; padding: .8rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.method { color: var(--quiet); max-width: 46rem; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .5rem; } }
@media print { body { max-width: none; } figure, .card { break-inside: avoid; } }
"""
