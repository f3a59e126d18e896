"""Two directives and a role for the pages: the capability table, Markdown files, and single backticks that link."""

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
    """Write a Markdown table as a reStructuredText list table; the default role turns single backticks into links."""
    rows = [line.strip().strip("|").split("|") for line in markdown.strip().splitlines()]
    del rows[1]  # the line of dashes
    lines = [".. list-table::", "   :header-rows: 1", "   :class: capabilities", ""]
    for row in rows:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell.strip()}" for i, cell in enumerate(row)]
    return "\n".join(lines)


class CapabilityTable(SphinxDirective):
    """Show ``ddnref._rules.texts.capability_table(...)`` as it is when the pages are built."""

    def run(self) -> list[nodes.Node]:
        """Parse the table into nodes at the place of the directive."""
        self.env.note_dependency(str(Path(_rules.__file__)))
        source = StringList(list_table(capability_table(_rules.TEXTS)).splitlines(), source="capability_table()")
        return self.parse_text_to_nodes("\n".join(source))


class MarkdownFile(SphinxDirective):
    """Show a Markdown file or, if the file does not exist, the content of the directive."""

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"class": directives.class_option}

    def run(self) -> list[nodes.Node]:
        """Convert the file without its first heading, because the page has one already."""
        path = Path(self.env.srcdir) / self.arguments[0]
        self.env.note_dependency(str(path))
        if not path.exists():
            return self.parse_content_to_nodes()
        html = markdown(path.read_text(encoding="utf-8"))
        return [nodes.raw("", f'<div class="from-markdown">{html}</div>', format="html")]


def markdown(text: str) -> str:
    """Convert Markdown to HTML, without the first heading and with tables that can scroll sideways."""
    first, _, rest = text.lstrip().partition("\n")
    html: str = MarkdownIt("commonmark").enable("table").render(rest if first.startswith("# ") else text)
    html = html.replace("<table>", '<div class="pst-scrollable-table-container"><table class="table">')
    return html.replace("</table>", "</table></div>")


def public_names() -> set[str]:
    """Return the full names of everything that the reference documents."""
    names = {f"ddnref.{name}" for name in ddnref.__all__}
    for module in (curvature, implicit, krylov, networks, ddnref.nodes, operators, reference, testing):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    bridges = {f"ddnref.interop.{module.name}" for module in pkgutil.iter_modules(interop.__path__)}
    names |= {f"ddnref.interop.dask.{name}" for name in ("map_items", "map_gradients", "reduce_blocks")}
    names |= {"ddnref.interop.torch.ggn", "ddnref.interop.torch.ModuleGgn"}
    return names | bridges | {f"{bridge}.differentiable" for bridge in bridges} | {"ddnref.interop", "ddnref.reference"}


class LinkOrLiteral(SphinxRole):
    """Single backticks: a link if they hold a public name, as seen from the current module, and code otherwise."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return a reference, which must resolve, or a literal."""
        # The name is looked up in the module of the page, then in the subject modules, then as a full name.
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
# Short names of the library. The bridges share one name, and textbook forms are linked by their full names.
BY_NAME = {name.rpartition(".")[2]: (name,) for name in PUBLIC if name.split(".")[1] not in ("interop", "reference")}


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the role and the two directives."""
    app.add_role("link-or-literal", LinkOrLiteral())
    app.add_directive("capability-table", CapabilityTable)
    app.add_directive("markdown-file", MarkdownFile)
    return {"version": "1", "parallel_read_safe": True}
