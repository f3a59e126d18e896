"""Turn the narrative of a story into HTML, formulas into MathML."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.core import publish_parts
from docutils.parsers.rst import roles
from docutils.writers.html5_polyglot import Writer

SETTINGS = {
    "doctitle_xform": False,
    "file_insertion_enabled": False,
    "halt_level": 2,  # a mistake in a story is an error, not a note on the page
    "initial_header_level": 3,
    "math_output": "MathML",
    "raw_enabled": False,
    "report_level": 2,
    "syntax_highlight": "none",
    "warning_stream": "",
}


def _reference(name: str, rawtext: str, text: str, *_: Any, **__: Any) -> tuple[list[nodes.Node], list[Any]]:
    """Show a reference that only the documentation can resolve: names of Python as code, pages by their titles."""
    words = re.fullmatch(r"(.+?)\s*<.+>", text, re.DOTALL)
    if words:
        return [nodes.inline(rawtext, words[1])], []
    if name == "doc":
        return [nodes.inline(rawtext, text.rpartition("/")[2])], []
    return [nodes.literal(rawtext, text.rpartition(".")[2] if text[0] == "~" else text)], []


for _role in ("func", "class", "meth", "attr", "mod", "obj", "doc", "ref"):
    roles.register_local_role(_role, _reference)


def html(rst: str, prefix: str = "") -> str:
    """Convert a text; `prefix` begins the anchors of its headings.

    Raises
    ------
    docutils.utils.SystemMessage
        The text is not valid.
    """
    source = f".. default-role:: obj\n\n{rst}\n"
    parts = publish_parts(source, writer=Writer(), settings_overrides={**SETTINGS, "id_prefix": prefix})
    # Marked as accents, bars are drawn through the letters by browsers with common fonts.
    return str(parts["body"]).strip().replace('<mover accent="true">', "<mover>")
