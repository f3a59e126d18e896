"""One HTML page that needs nothing beside it: style inline, pictures embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ddnref.examples._show import Cell, Check, Picture, Table, shown
from ddnref.report.narrative import html
from ddnref.report.runner import DPI, Code, Narrative, Part, Printed, Told

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")

TITLE = "ddnref: derivatives of eigenvectors and solvers, checked on real data"
LEAD = (
    "ddnref computes eigenvectors, functions of matrices and solutions of systems together with their derivatives, so "
    "that they can be part of something that learns. This page shows what that is good for, and measures whether the "
    "derivatives are right, on the machine where it was made."
)


def page(stories: Sequence[Told], facts: Sequence[tuple[str, str]]) -> str:
    """Return the whole page, with the versions and settings in `facts` at its end."""
    headlines = "".join(
        f"<div><dt>{escape(label)}</dt>{''.join(f'<dd>{escape(value)}</dd>' for value in values)}</div>"
        for story in stories
        for label, values in story.headlines
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
        case Code(source, _):
            return f"<details><summary>Code</summary><pre>{escape(source)}</pre></details>"
        case Printed(text):
            return f'<pre class="out">{escape(text.rstrip())}</pre>'
        case Check(_, error, limit):
            verdict = '<span class="bad">✗' if not error <= limit else "<span>✓"
            return f'<p class="check">{verdict} {escape(str(part))}</span></p>'
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
