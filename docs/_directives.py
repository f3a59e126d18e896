"""Directives and a role: the cheat sheet, Markdown files, the comparison, and single backticks that link."""

from __future__ import annotations

import itertools
import json
import pkgutil
import re
import sys
from collections.abc import Iterable, Iterator
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
from ddnref import curvature, examples, implicit, interop, krylov, networks, operators, reference, testing
from ddnref._rules import table as _rules

GROUPS = {  # tables of the cheat sheet: the pages whose operations they show
    "Eigenpairs and singular values": ("eigen", "eigsh", "generalized", "iterations", "svd", "ggn"),
    "Functions of a matrix": ("spectral", "polar"),
    "Linear systems and factorisations": ("linear", "factorisations"),
    "Nodes": ("nodes",),
}
HEAD = ("operation", "function", "no gradient", "cost of the VJP", "page", "example")
ON_THE_PAGE = "on its page"


def cheat_sheet(group: str) -> str:
    """Return the table of one group as reStructuredText, from the table of rules and the sources of the gallery."""
    rows = [HEAD]
    for name, texts in _rules.TEXTS.items():
        if texts.page in GROUPS[group]:
            links = [f":doc:`{story.replace('_', ' ')} <auto_gallery/plot_{story}>`" for story in stories_with(name)]
            example = ", ".join(links) or ON_THE_PAGE
            rows.append((texts.docs, f"`{name}`", texts.singular, texts.cost, f":doc:`{texts.page}`", example))
    return list_table(rows, "cheat-sheet rules")


def list_table(rows: Iterable[Iterable[str]], classes: str) -> str:
    """Write rows of cells as a reStructuredText list table, the first row as its head."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :class: {classes}", ""]
    for row in rows:
        lines += [f"   {'* -' if i == 0 else '  -'} {cell}".rstrip() for i, cell in enumerate(row)]
    return "\n".join(lines)


def stories_with(name: str) -> list[str]:
    """Return the stories of the gallery that use an operation, at most two, those first that use it most."""
    counts = {path.stem.removeprefix("plot_"): len(uses(name, path)) for path in STORIES}
    return [story for story in sorted(counts, key=lambda story: -counts[story])[:2] if counts[story]]


def uses(name: str, path: Path) -> list[str]:
    """Return the places where a file uses an operation of ddnref, and not one of NumPy's that has the same name."""
    module = r"(?:from ddnref[.\w]* import .*|\bddnref\.(?:linalg\.|nodes\.|curvature\.)?)"
    return re.findall(rf"{module}\b{name}(?:_fwd|_vjp|_jvp|_second_derivative)?\b", path.read_text(encoding="utf-8"))


class CheatSheet(SphinxDirective):
    """Show one table of the cheat sheet as the table of rules is when the pages are built."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """Parse the table into nodes at the place of the directive."""
        self.env.note_dependency(str(Path(_rules.__file__)))
        source = StringList(cheat_sheet(self.arguments[0]).splitlines(), source="cheat_sheet()")
        return self.parse_text_to_nodes("\n".join(source))


class MarkdownFile(SphinxDirective):
    """Show a Markdown file, or a part of it, or, if the file does not exist, the content of the directive.

    A part lies between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->``.
    """

    required_arguments = 1
    has_content = True
    option_spec: ClassVar[dict[str, Any]] = {"part": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        """Convert the file without its first heading, because the page has one already."""
        path = Path(self.env.srcdir) / self.arguments[0]
        self.env.note_dependency(str(path))
        if not path.exists():
            return self.parse_content_to_nodes()
        text, kind = path.read_text(encoding="utf-8"), "figures"
        if (part := self.options.get("part")) is not None:
            text, kind = text.split(f"<!-- {part}: begin -->\n")[1].split(f"<!-- {part}: end -->")[0], "prose"
        elif path.parent != Path(self.env.srcdir):
            kind = "prose"
        shown = to_pages(markdown(text), Path(self.env.srcdir))
        return [nodes.raw("", f'<div class="from-markdown {kind}">{shown}</div>', format="html")]


def markdown(text: str) -> str:
    """Convert Markdown to HTML, without the first heading, with tables whose cells know the head of their column."""
    first, _, rest = text.lstrip().partition("\n")
    page = MarkdownIt("commonmark").enable("table").render(rest if first.startswith("# ") else text)
    return re.sub(r"<table>.*?</table>", labelled, page, flags=re.DOTALL)


def labelled(table: re.Match[str]) -> str:
    """Return a table that can scroll sideways, and whose cells can be stacked under the names of their columns."""
    heads = [re.sub(r"<.*?>", "", head) for head in re.findall(r"<th>(.*?)</th>", table[0], re.DOTALL)]
    column = itertools.cycle(heads)
    rows = re.sub(r"<td>", lambda _: f'<td data-column="{next(column)}">', table[0])
    rows = rows.replace("<table>", '<table class="table">')
    return f'<div class="pst-scrollable-table-container">{rows}</div>'


def to_pages(text: str, folder: Path) -> str:
    """Let links to files of the repository lead to the pages that show them."""

    def page(match: re.Match[str]) -> str:
        name = match[1].lower()
        return f'href="{name if (folder / f"{name}.rst").exists() else name.partition("-")[0]}.html'

    return re.sub(r'href="(?:docs/)?([\w-]+)\.(?:rst|md)', page, text)


class Comparison(SphinxDirective):
    """Show a part of the recorded comparison with other libraries; `comparison_parts` names the parts."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the part, made from ``comparison.json``, into nodes at the place of the directive."""
        path = Path(self.env.srcdir) / "comparison.json"
        self.env.note_dependency(str(path))
        part = "\n".join(comparison_parts(json.loads(path.read_text(encoding="utf-8")), self.arguments[0]))
        return self.parse_text_to_nodes(part, allow_section_headings=True)


def comparison_parts(record: dict[str, Any], part: str) -> Iterator[str]:
    """Yield reStructuredText for a part: "conditions", "charts", "better" or "problems"."""
    benches = str(Path(__file__).parents[1] / "asv_benches")
    if benches not in sys.path:
        sys.path.append(benches)
    from comparison import _tables

    if part == "conditions":
        yield _tables.conditions(record)
    elif part == "charts":
        pictures = {
            f"Shares of the results in {dtype}": _tables.chart(record, dtype) for dtype in ("float64", "float32")
        }
        pictures["Time relative to ddnref in the same framework"] = _tables.times(record)
        for title, picture in pictures.items():
            if picture:
                lines = "\n".join(f"   {line}" for line in picture.splitlines())
                yield f'**{title}**\n\n.. raw:: html\n\n   <div class="wide-picture">\n{lines}\n   </div>\n'
    elif part == "better":
        lines = [*_tables.faster(record), *_tables.behind(record)]
        yield "\n".join(f"- {line}" for line in lines)
    elif part == "problems":
        for name, one in record["problems"].items():
            yield f"{one['title']}\n{'-' * len(one['title'])}\n\n{one['text']}\n"
            yield f"Time and memory: {one['large_text']}.\n"
            if one["hard_text"]:
                yield f"Without a result: {one['hard_text']}.\n"
            lines = _tables.of_problem(record, name).splitlines()
            del lines[1]  # the line of dashes
            rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            yield f"{list_table(rows, 'comparison')}\n"
            yield from (f"- {note}" for note in _tables.notes(record, name))
            yield f"\n.. code-block:: sh\n\n   python asv_benches/compare.py --only {name}"
            yield f"   python asv_benches/compare.py --show {name}:{next(iter(one['cells']))}\n"
    else:
        raise ValueError(f"The comparison has no part {part!r}.")


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


STORIES = sorted(Path(examples.__file__).parent.glob("plot_*.py"))
PUBLIC = public_names()
# Short names of the library. The bridges share one name, and textbook forms are linked by their full names.
BY_NAME = {name.rpartition(".")[2]: (name,) for name in PUBLIC if name.split(".")[1] not in ("interop", "reference")}


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the role and the directives."""
    app.add_role("link-or-literal", LinkOrLiteral())
    app.add_directive("cheat-sheet", CheatSheet)
    app.add_directive("markdown-file", MarkdownFile)
    app.add_directive("comparison", Comparison)
    return {"version": "1", "parallel_read_safe": True}
