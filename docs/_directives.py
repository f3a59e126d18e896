"""Directives: the capability table from the table of rules, and a Markdown file that may not exist yet. One role."""

from __future__ import annotations

import pkgutil
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from markdown_it import MarkdownIt
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

import ddnref
from ddnref import curvature, implicit, interop, krylov, networks, operators, reference, testing
from ddnref._rules import table as _rules
from ddnref._rules.texts import capability_table


def list_table(markdown: str) -> str:
    """A Markdown table as a reStructuredText list table; single backticks become links by the default role."""
    rows = [line.strip().strip("|").split("|") for line in markdown.strip().splitlines()]
    del rows[1]  # the line of dashes
    lines = [".. list-table::", "   :header-rows: 1", "   :class: capabilities", ""]
    for row in rows:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell.strip()}" for i, cell in enumerate(row)]
    return "\n".join(lines)


class CapabilityTable(SphinxDirective):
    """``ddnref._rules.texts.capability_table(...)``, drawn when the pages are built."""

    def run(self) -> list[nodes.Node]:
        """Parse the table where the directive stands."""
        self.env.note_dependency(str(Path(_rules.__file__)))
        source = StringList(list_table(capability_table(_rules.TEXTS)).splitlines(), source="capability_table()")
        return self.parse_text_to_nodes("\n".join(source))


class MarkdownFile(SphinxDirective):
    """Show a Markdown file; its content below the directive instead where the file does not exist."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"class": directives.class_option}

    def run(self) -> list[nodes.Node]:
        """Tables can scroll sideways; the first heading is the page's own and is left out."""
        path = Path(self.env.srcdir) / self.arguments[0]
        self.env.note_dependency(str(path))
        if not path.exists():
            return self.parse_content_to_nodes()
        html = markdown(path.read_text(encoding="utf-8"))
        return [nodes.raw("", f'<div class="from-markdown">{html}</div>', format="html")]


def markdown(text: str) -> str:
    """HTML, without the first heading."""
    first, _, rest = text.lstrip().partition("\n")
    html: str = MarkdownIt("commonmark").enable("table").render(rest if first.startswith("# ") else text)
    html = html.replace("<table>", '<div class="pst-scrollable-table-container"><table class="table">')
    return html.replace("</table>", "</table></div>")


def public_names() -> set[str]:
    """Full names of all that the reference documents."""
    names = {f"ddnref.{name}" for name in ddnref.__all__}
    for module in (curvature, implicit, krylov, networks, ddnref.nodes, operators, reference, testing):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    bridges = {f"ddnref.interop.{module.name}" for module in pkgutil.iter_modules(interop.__path__)}
    names |= {f"ddnref.interop.dask.{name}" for name in ("map_items", "map_gradients", "reduce_blocks")}
    return names | bridges | {f"{bridge}.differentiable" for bridge in bridges} | {"ddnref.interop", "ddnref.reference"}


class LinkOrLiteral(SphinxRole):
    """Single backticks: a link where they hold a public name, seen from the module at hand, and code otherwise."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """A reference that must resolve, or a literal."""
        module = self.env.ref_context.get("py:module") or "ddnref"
        literal = nodes.literal(self.rawtext, self.text)
        for target in (f"{module}.{self.text}", *BY_NAME.get(self.text, ()), self.text):
            if target in PUBLIC:
                link = pending_xref(
                    self.rawtext, literal, refdomain="py", reftype="obj", reftarget=target, refwarn=True,
                    refexplicit=True, refdoc=self.env.docname,
                )  # fmt: skip
                return [link], []
        return [literal], []


PUBLIC = public_names()
BY_NAME = {name.rpartition(".")[2]: (name,) for name in PUBLIC if name.split(".")[1] not in ("interop", "reference")}


def setup(app: Sphinx) -> dict[str, Any]:
    """Register all three."""
    app.add_role("link-or-literal", LinkOrLiteral())
    app.add_directive("capability-table", CapabilityTable)
    app.add_directive("markdown-file", MarkdownFile)
    return {"version": "1", "parallel_read_safe": True}
