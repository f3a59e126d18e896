"""One HTML page that needs nothing beside it: style inline, pictures embedded."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from ddnref.examples._show import Card, Cell, Check, Picture, Table, shown
from ddnref.report.narrative import html
from ddnref.report.runner import DPI, Code, Narrative, Part, Printed, Told

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")

TITLE = "ddnref: let a solver be part of something that learns"
LEAD = (
    "A program learns by following gradients. If it contains a solver (for eigenvectors, a function of a matrix, a "
    "linear system, the curvature of a network), the solver needs a gradient too. ddnref has both. The cards show "
    "uses on real data: the problem, the code that you write, and its result. The links lead to the whole stories, "
    "where every derivative is checked on the machine that made this page."
)


def page(stories: Sequence[Told], facts: Sequence[tuple[str, str]], note: str = "") -> str:
    """Return the whole page, with a note at its head, and the versions and settings in `facts` at its end."""
    cards = "".join(_card(story.name, story.title, story.card) for story in stories if story.card)
    made = "".join(f"{escape(name)} {escape(value)}<br>" for name, value in facts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ddnref report</title><style>{STYLE}</style></head><body>\n"
        f'<header><h1>{escape(TITLE)}</h1><p class="lead">{escape(LEAD)}</p>'
        f'<div class="cards">{cards}</div><p>{escape(note)}</p></header>\n'
        f"<main>{''.join(map(_chapter, stories))}</main>\n<footer><p>{made}</p></footer>\n</body></html>\n"
    )


def _card(name: str, title: str, card: Card) -> str:
    return (
        f"<article><p><strong>{escape(card.problem)}</strong></p>{_image(card.picture, card.problem)}"
        f"<pre>{escape(card.code)}</pre><p>{escape(card.result)}</p>"
        f'<p><a href="#{name}">{escape(title)}</a></p></article>'
    )


def _image(png: bytes, alt: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    width = int.from_bytes(png[16:20], "big") * 96 // DPI  # the size that its fonts were chosen for
    return f'<img alt="{escape(alt)}" style="max-width: {width}px" src="data:image/png;base64,{data}">'


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
            return f"<figure>{_image(part.figure, part.alt)}<figcaption>{html(part.caption)}</figcaption></figure>"


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
