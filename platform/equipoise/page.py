"""How a report looks: one HTML file that holds all it shows.

Knows type, colours and the few lines of script of the page; knows nothing of studies. The page's own policy forbids the
browser to fetch anything, whatever a script in it may try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from equipoise.figures import Figure

NOTHING = '<span class="soft">–</span>'
"""Stands for what was never measured or did not happen."""


def page(title: str, body: str, colours: Mapping[str, str]) -> str:
    """The whole file.

    Args:
        title: plain text.
        body: HTML.
        colours: by CSS class, the `--kind` that bars and badges of the class are drawn in.
    """
    from plotly.offline import get_plotlyjs

    kinds = "".join(f".{kind} {{ --kind: {colour}; }}\n" for kind, colour in colours.items())
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{_STYLE}{kinds}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
{body}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def section(title: str, note: str, *body: str) -> str:
    """A part of the page: heading and note are plain text, the rest is HTML."""
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{told}{''.join(body)}</section>"


def table(heads: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A plain table: heads and the lines' names are plain text, cells are HTML; the line named `all` stands out."""
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    rows = "".join(
        f'<tr{" class=all" if name == "all" else ""}><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>"
        for name, cells in lines
    )
    return f'<table class="plain"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def folded(summary: str, body: str) -> str:
    """HTML behind a line that opens it."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def drawn(figure: Figure) -> str:
    """A figure, and below it what it cannot show."""
    from plotly.io import to_html

    config = {"displaylogo": False, "displayModeBar": False, "responsive": True}
    items = "".join(f"<li>{escape(note)}</li>" for note in figure.notes)
    notes = folded(f"What this figure cannot show ({len(figure.notes)})", f"<ul>{items}</ul>") if items else ""
    return str(to_html(figure.figure, config=config, include_plotlyjs=False, full_html=False)) + notes


def number(value: float | None) -> str:
    """Three decimals; what is not finite is named."""
    if value is None:
        return NOTHING
    return f"{value:.3f}" if math.isfinite(value) else f'<span class="bad">not finite ({value})</span>'


def key(value: object) -> str:
    """What a cell is sorted by; nothing for what was never measured or is not finite, which comes last."""
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else str(value)


def duration(seconds: float) -> str:
    """A duration in a unit that suits it."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_STYLE = """
:root { color-scheme: light; --ink: #1b2430; --soft: #667080; --line: #dfe3e8; --bad: #c2272d; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 40px 32px 80px; }
h1 { font-size: 30px; line-height: 1.22; font-weight: 650; letter-spacing: -0.01em; max-width: 30em;
  margin: 4px 0 24px; }
h2 { font-size: 19px; font-weight: 650; margin: 0 0 4px; }
section { margin-top: 44px; border-top: 1px solid var(--line); padding-top: 20px; }
.kind-of-page, .note, .soft, small, figcaption, summary { color: var(--soft); }
.kind-of-page { margin: 0; }
.note { max-width: 66em; margin: 0 0 12px; font-size: 14px; }
.note b, figcaption b, .kind-of-page b { font-weight: 600; color: var(--ink); }
.lead { font-size: 18px; max-width: 52em; margin: 16px 0 0; }
.bad { color: var(--bad); }
.bar { display: flex; gap: 2px; max-width: 860px; border-radius: 4px; overflow: hidden; }
.bar span { flex: 0 1 0; min-width: max-content; padding: 4px 10px; background: var(--kind); color: #fff;
  font-size: 13px; font-weight: 600; }
.wide { overflow-x: auto; margin: 0 0 14px; }
.tall { overflow: auto; max-height: 80vh; }
.tall thead th { position: sticky; top: 0; background: #fff; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 5px 7px; text-align: right; white-space: nowrap; vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 1.5px solid var(--ink); vertical-align: bottom; font-weight: 600; line-height: 1.3; }
button { all: unset; cursor: pointer; }
button:hover { text-decoration: underline; }
button:focus-visible { outline: 2px solid #3f74b5; outline-offset: 2px; }
.runs { width: 100%; }
.runs thead th { white-space: normal; }
.runs small { display: block; font-weight: 400; line-height: 1.3; }
.runs th:nth-child(2), .runs td:nth-child(2) { text-align: left; }
.runs tbody { border-bottom: 1px solid var(--line); }
.runs tbody.alone { background: #eef3f9; }
.runs button.run { font-weight: 600; }
.runs th[aria-sort=ascending] button::after { content: " ↑"; }
.runs th[aria-sort=descending] button::after { content: " ↓"; }
.runs .sentence td { padding-top: 0; color: var(--soft); white-space: normal; font-size: 13px; }
.verdict { color: var(--kind); font-weight: 600; }
.plain thead th { white-space: normal; }
.plain th[scope=row] { font-weight: 400; }
.plain tbody tr { border-bottom: 1px solid var(--line); }
.plain .all > :is(th, td) { font-weight: 600; }
details .plain { margin-top: 10px; }
details .plain :is(th, td) { text-align: left; }
.pictures { display: flex; flex-wrap: wrap; gap: 24px; }
figure { margin: 0; max-width: 100%; }
img { max-width: 100%; display: block; }
figcaption { padding-top: 6px; font-size: 14px; }
summary { cursor: pointer; font-size: 14px; }
ul { padding-left: 18px; margin: 8px 0; font-size: 14px; }
pre { background: #f5f7f9; padding: 14px 16px; margin: 10px 0; white-space: pre-wrap; font-size: 13.5px; }
code { font-size: 0.92em; overflow-wrap: anywhere; }
@media print { main { max-width: none; padding: 0; } figure, .js-plotly-plot { break-inside: avoid; }
  .tall { max-height: none; } }
"""

_SCRIPT = """
const table = document.querySelector("table.runs");
if (table) table.querySelectorAll("thead th").forEach((th, column) => th.firstChild.addEventListener("click", () => {
  const up = th.getAttribute("aria-sort") !== "ascending";
  table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = body => body.rows[0].cells[column].dataset.v;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  [...table.tBodies].sort((one, two) => {
    const a = key(one), b = key(two);
    return a === "" || b === "" ? (a === "") - (b === "") : (up ? 1 : -1) * compare(a, b);
  }).forEach(body => table.append(body));
}));
let alone = null;
const part = (trace, name) => {
  let start = 0;
  for (const [run, length] of Object.entries(trace.meta.runs)) {
    if (run === name) return {x: Array.from(trace.x.slice(start, start + length)),
      y: Array.from(trace.y.slice(start, start + length))};
    start += length;
  }
};
const isolate = plot => {
  const added = plot.data.flatMap((trace, i) => trace.meta && trace.meta.alone ? [i] : []);
  if (added.length) Plotly.deleteTraces(plot, added);
  const all = plot._fullData, lines = [], points = [], single = [];
  all.forEach((trace, i) => {
    const meta = trace.meta || {};
    if (meta.runs) lines.push(i);
    if (meta.points) points.push(i);
    const found = meta.runs && alone !== null && part(trace, alone);
    if (found) single.push({...found, mode: "lines", name: alone, showlegend: false, meta: {alone: true},
      xaxis: trace.xaxis, yaxis: trace.yaxis, line: {color: trace.line.color, width: 2.4}});
  });
  if (lines.length) Plotly.restyle(plot, {opacity: alone === null ? 1 : 0.08}, lines);
  if (points.length) Plotly.restyle(plot, {selectedpoints: points.map(i => alone === null ? null :
    all[i].meta.points.flatMap((name, k) => name === alone ? [k] : []))}, points);
  if (single.length) Plotly.addTraces(plot, single);
};
document.querySelectorAll("button.run").forEach(button => button.addEventListener("click", () => {
  const name = button.closest("tbody").dataset.run;
  alone = alone === name ? null : name;
  [...table.tBodies].forEach(body => body.classList.toggle("alone", body.dataset.run === alone));
  document.querySelectorAll(".js-plotly-plot").forEach(isolate);
}));
"""
