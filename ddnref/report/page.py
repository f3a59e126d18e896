"""One HTML page that needs nothing beside it: style inline, pictures embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from ddnref.examples._show import Cell, Check, Picture, Table, shown
from ddnref.report.narrative import html
from ddnref.report.runner import DPI, Code, Narrative, Part, Printed, Told

STYLE = """
:root { color-scheme: light; --ink: #1c1f23; --soft: #5a626b; --line: #dde1e6; --accent: #0067a5; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main, header, footer { max-width: 46rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.4rem; line-height: 1.3; margin: 3.5rem 0 .75rem; padding-top: 1.25rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.15rem; line-height: 1.3; margin: 2rem 0 .5rem; }
p { margin: .9rem 0; }
.lead { color: var(--soft); font-size: 1.125rem; }
.literal, pre { font: .9em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #f3f5f7;
  border-radius: 3px; }
.literal { padding: .1em .3em; overflow-wrap: anywhere; }
pre { padding: .6rem .8rem; margin: .9rem 0; overflow-x: auto; font-size: .8125rem; }
.out { white-space: pre-wrap; }
details { margin: .9rem 0; }
summary { color: var(--soft); font-size: .875rem; cursor: pointer; }
math[display="block"] { margin: 1.1rem 0; overflow-x: auto; overflow-y: hidden; }
.check { color: var(--soft); font-size: .9375rem; }
a { color: var(--accent); }
nav ol { padding-left: 1.25rem; }
dl { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0; }
dl div { flex: 1 1 13rem; border: 1px solid var(--line); border-radius: 6px; padding: .75rem 1rem; }
dt { color: var(--soft); font-size: .875rem; line-height: 1.35; }
dd { margin: .35rem 0 0; font-size: 1.125rem; line-height: 1.3; font-weight: 600;
  font-variant-numeric: tabular-nums; }
figure { margin: 1.75rem 0; }
img { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: .9375rem; line-height: 1.5; text-align: left; }
figcaption p { margin: .5rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; min-width: 100%; font-size: .9375rem; line-height: 1.4;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem .4rem 0; text-align: right; vertical-align: bottom;
  border-bottom: 1px solid var(--line); }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 5.5rem; }
th { font-weight: 600; border-bottom-color: var(--ink); }
.bad { color: #b3261e; font-weight: 600; }
footer { margin-top: 3.5rem; padding-top: 1.25rem; padding-bottom: 3rem; color: var(--soft);
  font-size: .875rem; border-top: 1px solid var(--line); }
@media (max-width: 30rem) {
  body { font-size: 1rem; } h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; }
  main, header, footer { padding-left: 1rem; padding-right: 1rem; }
}
"""

TITLE = "ddnref: derivatives of eigenvectors and solvers, checked on real data"
LEAD = (
    "ddnref computes eigenvectors, functions of matrices and solutions of systems together with their derivatives, so "
    "that they can be part of something that learns. This page shows what that is good for, and measures whether the "
    "derivatives are right, on the machine where it was made."
)


def page(stories: Sequence[Told], facts: Sequence[tuple[str, str]]) -> str:
    """Return the whole page, with the versions and settings in `facts` at its end."""
    headlines = "".join(
        f"<div><dt>{escape(headline.label)}</dt><dd>{'<br>'.join(map(escape, headline.values))}</dd></div>"
        for story in stories
        for headline in story.headlines
    )
    links = "".join(f'<li><a href="#{story.name}">{escape(story.title)}</a></li>' for story in stories)
    made = "".join(f"{escape(name)} {escape(value)}<br>" for name, value in facts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ddnref report</title><style>{STYLE}</style></head><body>\n"
        f'<header><h1>{escape(TITLE)}</h1><p class="lead">{escape(LEAD)}</p>'
        f"<dl>{headlines}</dl><nav><ol>{links}</ol></nav></header>\n"
        f"<main>{''.join(map(_chapter, stories))}</main>\n<footer><p>{made}</p></footer>\n</body></html>\n"
    )


def _chapter(story: Told) -> str:
    parts = "\n".join(_part(part, f"{story.name}-{i}-") for i, part in enumerate(story.parts))
    failed = f'<p class="bad">This story ended here. {escape(story.failed)}</p>' if story.failed else ""
    return f'<section id="{story.name}"><h2>{escape(story.title)}</h2>\n{parts}{failed}</section>\n'


def _part(part: Part, prefix: str) -> str:
    match part:
        case Narrative(rst):
            return html(rst, prefix)
        case Code(source):
            return f"<details><summary>Code</summary><pre>{escape(source)}</pre></details>"
        case Printed(text):
            return f'<pre class="out">{escape(text.rstrip())}</pre>'
        case Check(label, error, limit):
            verdict = '<span class="bad">✗' if not error <= limit else "<span>✓"
            return f'<p class="check">{verdict} {escape(label)}: {error:.1e}, at most {limit:.0e}</span></p>'
        case Table():
            return _table(part)
        case Picture():
            data = base64.b64encode(part.figure).decode("ascii")
            width = int.from_bytes(part.figure[16:20], "big") * 96 // DPI  # the size that its fonts were chosen for
            return (
                f'<figure><img alt="{escape(part.alt)}" style="max-width: {width}px" '
                f'src="data:image/png;base64,{data}">'
                f"<figcaption>{html(part.caption)}</figcaption></figure>"
            )


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "".join(f"<tr>{''.join(_cell(cell, table.format) for cell in row)}</tr>" for row in table.rows)
    return (
        f'<figure><figcaption>{html(table.caption)}</figcaption><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _cell(cell: Cell, spec: str) -> str:
    text = shown(cell, spec)
    return f'<td class="bad">{text}</td>' if text.startswith("NaN") else f"<td>{escape(text)}</td>"
