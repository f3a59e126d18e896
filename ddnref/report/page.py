"""One HTML page that needs nothing beside it: style inline, pictures embedded."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from html import escape

from ddnref.report.content import Cell, Content, Headline, Part, Picture, Section, Table, Text

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
p { margin: .9rem 0; }
.lead { color: var(--soft); font-size: 1.125rem; }
code { font: .9em/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #f3f5f7;
  padding: .1em .3em; border-radius: 3px; overflow-wrap: anywhere; }
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
figcaption { margin: .5rem 0; }
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

TITLE = "ddnref: derivatives through eigenvectors, checked on real data"
LEAD = (
    "ddnref computes eigenvectors and functions of a matrix together with their derivatives, so that they can be "
    "part of something that learns. This page shows what that is good for, and measures whether the derivatives "
    "are right, on the machine where it was made."
)


def page(
    sections: Sequence[tuple[Section, Content]], pictures: Mapping[str, bytes], facts: Sequence[tuple[str, str]]
) -> str:
    """The whole page; `pictures` are PNG files by file name, `facts` the versions and settings at its end."""
    headlines = [headline for _, content in sections for headline in content.headlines]
    links = "".join(f'<li><a href="#{s.name}">{escape(s.title)}</a></li>' for s, _ in sections)
    chapters = "".join(_chapter(section, content, pictures) for section, content in sections)
    made = "".join(f"{escape(name)} {escape(value)}<br>" for name, value in facts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ddnref report</title><style>{STYLE}</style></head><body>\n"
        f'<header><h1>{escape(TITLE)}</h1><p class="lead">{escape(LEAD)}</p>'
        f"<dl>{''.join(map(_headline, headlines))}</dl><nav><ol>{links}</ol></nav></header>\n"
        f"<main>{chapters}</main>\n<footer><p>{made}</p></footer>\n</body></html>\n"
    )


def file_name(section: Section, part: Table | Picture) -> str:
    """What the files of a table or picture are called, without their ending."""
    return f"{section.name}-{part.name}"


def shown(cell: Cell, spec: str) -> str:
    """A cell as a reader sees it: numbers rounded, NaN by its name."""
    if isinstance(cell, float):
        return "NaN" if math.isnan(cell) else format(cell, spec)
    return str(cell)


def brief(value: float) -> str:
    """One digit, for a headline."""
    return "NaN" if math.isnan(value) else f"{value:.0e}" if value < 0.01 else f"{value:.1g}"


def _headline(headline: Headline) -> str:
    lines = "<br>".join(map(escape, headline.values))
    return f"<div><dt>{escape(headline.label)}</dt><dd>{lines}</dd></div>"


def _chapter(section: Section, content: Content, pictures: Mapping[str, bytes]) -> str:
    parts = "\n".join(_part(section, part, pictures) for part in content.parts)
    return f'<section id="{section.name}"><h2>{escape(section.title)}</h2>\n{parts}</section>\n'


def _part(section: Section, part: Part, pictures: Mapping[str, bytes]) -> str:
    if isinstance(part, Text):
        return f"<p>{part.html}</p>"
    if isinstance(part, Table):
        return _table(part)
    return _picture(part, pictures[file_name(section, part)])


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.columns)
    body = "".join(f"<tr>{''.join(_cell(cell, table.format) for cell in row)}</tr>" for row in table.rows)
    return (
        f'<figure><figcaption>{table.caption}</figcaption><div class="scroll"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></figure>"
    )


def _cell(cell: Cell, spec: str) -> str:
    text = shown(cell, spec)
    return f'<td class="bad">{text}</td>' if text.startswith("NaN") else f"<td>{escape(text)}</td>"


def _picture(picture: Picture, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><img alt="{escape(picture.alt)}" '
        f'src="data:image/png;base64,{data}"><figcaption>{picture.caption}</figcaption></figure>'
    )
