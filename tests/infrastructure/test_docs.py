"""The documentation is true: its code runs, it names all that is public, every page can be reached."""

from __future__ import annotations

import contextlib
import importlib
import io
import pkgutil
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

import ddnref
from ddnref import curvature, implicit, interop, krylov, networks, nodes, operators, reference, testing
from ddnref._rules import table as _rules

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.glob("*.rst") if path.name != "sg_execution_times.rst")
FRAMEWORKS = ("torch", "jax", "autograd", "tensorflow", "dask", "cupy")
BLOCK = re.compile(
    r"^(?P<indent> *)\.\. code-block:: (?P<language>\w+)\n(?P<options>(?:(?P=indent)   :.*\n)*)\n"
    r"(?P<body>(?:(?:(?P=indent)   .*)?\n)+)",
    re.MULTILINE,
)


class Code(NamedTuple):
    line: int
    source: str
    output: str | None
    """The output that the page states, or ``None``."""


def blocks(text: str) -> list[tuple[str, Code]]:
    """The Python blocks of a page in order, each with its framework ("" for none)."""
    found: list[tuple[str, Code]] = []
    for match in BLOCK.finditer(text):
        indent = len(match["indent"]) + 3
        body = "\n".join(line[indent:] for line in match["body"].splitlines()).strip("\n")
        kind = re.search(r":class: (\w+)", match["options"])
        kind = kind[1] if kind else ""
        if match["language"] == "python":
            found.append((kind, Code(text.count("\n", 0, match.start("body")), body, None)))
        elif kind == "output":
            framework, code = found.pop()
            assert code.output is None, "two outputs for one block"
            found.append((framework, code._replace(output=body)))
    return found


def run(page: Path, framework: str) -> None:
    """Run one framework's blocks of a page in one namespace and compare what they print."""
    names: dict[str, object] = {}
    for kind, code in blocks(page.read_text(encoding="utf-8")):
        if kind != framework:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * code.line + code.source, str(page), "exec"), names)
        if code.output is not None:
            assert printed.getvalue().strip() == code.output, f"{page.name}, line {code.line}"


def pages_with(framework: str) -> list[Path]:
    return [page for page in PAGES if any(kind == framework for kind, _ in blocks(page.read_text(encoding="utf-8")))]


@pytest.mark.parametrize("page", pages_with(""), ids=lambda page: page.stem)
def test_code(page):
    run(page, "")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own forward mode
@pytest.mark.parametrize(
    ("page", "framework"),
    [
        pytest.param(page, framework, marks=pytest.mark.framework(framework), id=f"{page.stem}-{framework}")
        for framework in FRAMEWORKS
        if framework != "cupy"
        for page in pages_with(framework)
    ],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # in torch.func.jvp itself
def test_framework_code(page, framework):
    run(page, framework)


def test_cupy_code_compiles():
    """It needs a GPU to run; its calls are held to CuPy's signatures by test_cupy_namespace.py."""
    for page in pages_with("cupy"):
        for kind, code in blocks(page.read_text(encoding="utf-8")):
            if kind == "cupy":
                compile(code.source, str(page), "exec")


def test_no_code_is_forgotten():
    assert {page.stem for page in pages_with("")} >= {"conventions", "which-gradient", "verify", "eigen"}
    assert {page.stem for page in pages_with("autograd")} == {"frameworks", "quickstart"}
    assert {page.stem for page in pages_with("tensorflow")} == {"frameworks", "quickstart"}
    assert {page.stem for page in pages_with("dask")} == {"quickstart", "scale-out"}
    assert {page.stem for page in pages_with("torch")} == {
        "custom", "eigen", "forward-mode", "frameworks", "ggn", "index", "migration", "networks", "operators",
        "quickstart",
    }  # fmt: skip
    assert {page.stem for page in pages_with("jax")} == {
        "custom", "forward-mode", "frameworks", "ggn", "index", "migration", "quickstart",
    }  # fmt: skip
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = blocks(text)
        assert len(found) == text.count(".. code-block:: python"), page.name
        assert {kind for kind, _ in found} <= {"", *FRAMEWORKS}, page.name


def test_code_fits_on_a_page():
    """A column of the pages is about 88 characters wide."""
    for page in [*PAGES, ROOT / "README.md"]:
        text = page.read_text(encoding="utf-8")
        found = [match["body"] for match in BLOCK.finditer(text)] + re.findall(r"```\w+\n(.*?)```", text, re.DOTALL)
        for body in found:
            for line in textwrap.dedent(body).splitlines():
                assert len(line) <= 88, f"{page.name}: {line}"


def test_a_wrong_output_is_noticed(tmp_path):
    page = tmp_path / "page.rst"
    page.write_text(
        ".. code-block:: python\n\n   print(1)\n\n.. code-block:: text\n   :class: output\n\n   2\n", encoding="utf-8"
    )
    with pytest.raises(AssertionError):
        run(page, "")


# --- names, links, tables ---------------------------------------------------------------------------------------


def documented() -> set[str]:
    """Full names in the autosummary tables of the reference."""
    module, names = "", set()
    inside = False
    for line in (DOCS / "api.rst").read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\.\. (currentmodule|automodule):: (\S+)", line):
            names.add(found[2])
            module = found[2] if found[1] == "currentmodule" else module
        if line.startswith(".. "):
            inside = line.startswith(".. autosummary::")
        elif inside and re.fullmatch(r"   \w+", line):
            names.add(f"{module}.{line.strip()}")
    return names


def public() -> set[str]:
    names = {f"ddnref.{name}" for name in ddnref.__all__}
    for module in (curvature, implicit, krylov, networks, nodes, operators, reference, testing):
        names |= {f"{module.__name__}.{name}" for name in module.__all__}
    modules = [module.name for module in pkgutil.iter_modules(interop.__path__)]
    bridges = {f"ddnref.interop.{name}" for name in modules if not name.startswith("_")}
    maps = {f"ddnref.interop.dask.{name}" for name in ("map_items", "map_gradients", "reduce_blocks")}
    maps |= {f"ddnref.interop.torch.{name}" for name in ("ggn", "ModuleGgn")}
    return names | bridges | {f"{bridge}.differentiable" for bridge in bridges - {"ddnref.interop.dask"}} | maps


def test_every_public_name_is_in_the_reference():
    modules = {"ddnref", "ddnref.testing", "ddnref.reference", "ddnref.interop"}
    assert documented() | {"ddnref.testing"} == public() | modules


def test_every_page_can_be_reached():
    entries = []
    for name in ("index", "systems", "practice", "gallery"):
        text = (DOCS / f"{name}.rst").read_text(encoding="utf-8")
        tree = re.search(r"\.\. toctree::\n   :hidden:\n\n((?:   .+\n)+)", text)
        entries += re.findall(r"<(.+)>", tree[1])
    assert sorted(entries) == sorted({page.stem for page in PAGES if page.stem != "index"} | {"auto_gallery/index"})


def test_the_gallery_shows_every_story_once():
    text = (DOCS / "gallery.rst").read_text(encoding="utf-8")
    shown = re.findall(r"^   \.\./ddnref/examples/(plot_\w+\.py)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(path.name for path in (ROOT / "ddnref/examples").glob("plot_*.py"))


def test_shown_lines_of_code_exist():
    shown = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"\.\. literalinclude:: (\S+)\n((?:   :.*\n)+)", text):
            source = (page.parent / match[1]).read_text(encoding="utf-8")
            for option, value in re.findall(r":(start-at|end-at|pyobject): (.*)", match[2]):
                assert (f"def {value}(" if option == "pyobject" else value) in source, f"{page.name}: {value}"
                shown += 1
    assert shown >= 5


@pytest.fixture
def directives(monkeypatch):
    pytest.importorskip("sphinx", reason="the directives need Sphinx")
    pytest.importorskip("markdown_it", reason="the directives need markdown-it-py")
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("_directives")


def test_the_cheat_sheet_has_every_operation_once(directives):
    page = (DOCS / "cheat-sheet.rst").read_text(encoding="utf-8")
    assert re.findall(r"\.\. cheat-sheet:: (.+)", page) == list(directives.GROUPS)
    tables = "".join(directives.cheat_sheet(group) for group in directives.GROUPS)
    for name in _rules.RULES:
        assert tables.count(f"\n     - `{name}`\n") == 1, name


def test_each_operation_has_a_page_and_an_example(directives):
    for name, texts in _rules.TEXTS.items():
        page = DOCS / f"{texts.page}.rst"
        assert f"`{name}`" in page.read_text(encoding="utf-8"), f"{texts.page} does not name {name}"
        assert directives.stories_with(name) or directives.uses(name, page), f"no example of {name}"
    assert "iteration_digits" not in directives.stories_with("pinv")  # it uses NumPy's


def test_the_cheat_sheet_names_all_other_functions():
    """The operations without a rule are listed by hand; types, statuses and derivatives go with their functions."""
    text = (DOCS / "cheat-sheet.rst").read_text(encoding="utf-8")
    named = {name.rpartition(".")[2] for name in re.findall(r"`([\w.]+)`", text)}
    for module in (ddnref.linalg, nodes, implicit, curvature, krylov, operators, testing):
        for name in module.__all__:
            stem = re.sub(r"_(fwd|vjp|jvp|second_derivative)$", "", name)
            if name[0].islower() and stem not in _rules.RULES:
                assert {name, f"{stem}_vjp"} & named, f"{module.__name__}.{name}"


def test_markdown_becomes_html(directives):
    html = directives.markdown("# Title\n\n| a | b |\n|---|---|\n| 1 | `x` |\n| 2 | [p](docs/eigen.rst) |\n")
    assert "Title" not in html
    assert '<td data-column="a">1</td>\n<td data-column="b"><code>x</code></td>' in html
    assert 'href="eigen.html"' in directives.to_pages(html, DOCS)
    figures = '<a href="docs/figures-iterative.md">, <a href="CONTRIBUTING.md">, <a href="docs/eigen.rst#code">'
    pages = '<a href="figures.html">, <a href="contributing.html">, <a href="eigen.html#code">'
    assert directives.to_pages(figures, DOCS) == pages


def test_the_directives_know_all_public_names(directives):
    assert public() <= directives.PUBLIC


def test_the_page_of_the_history_shows_curves(monkeypatch):
    pytest.importorskip("sphinx", reason="the directive needs Sphinx")
    monkeypatch.syspath_prepend(str(DOCS))
    history = importlib.import_module("_history")
    records = history.recorded()
    for kind, longest in (("errors", 40), ("counts", 40), ("memory", 40)):
        html = "".join(history.Curves.html(SimpleNamespace(arguments=[kind]), records))
        curves = [points.split() for points in re.findall(r'<polyline points="([^"]+)"', html)]
        assert max(map(len, curves)) >= longest
        assert min(map(len, curves)) >= history.FEWEST
        assert html.count("<circle") == sum(map(len, curves))
    steps = "".join(history.Steps.html(SimpleNamespace(), records))
    assert steps.count("<td>worse</td>") + steps.count("<td>better</td>") == steps.count("<code>") > 0
    commits = "".join(history.Commits.html(SimpleNamespace(), records))
    assert commits.count("<li>") == len({record["commit_hash"] for record in records}) >= 40


def test_bridges_are_documented_without_their_frameworks():
    """The pages are built with the extra ``docs`` alone: what it does not install is mocked."""
    mocked = re.search(r"^FRAMEWORKS = \((.+)\)$", (DOCS / "conf.py").read_text(encoding="utf-8"), re.MULTILINE)[1]
    bridges = {module.name for module in pkgutil.iter_modules(interop.__path__) if not module.name.startswith("_")}
    assert {*re.findall(r'"(\w+)"', mocked)} == bridges


def test_gallery_comments_have_single_backslashes():
    """In a comment, unlike in a string, a doubled backslash would be a line break in the formula."""
    for path in (DOCS.parent / "ddnref/examples").glob("plot_*.py"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not (line.startswith("#") and "\\\\" in line), f"{path.name}: {line}"


def test_katex_is_whole():
    folder = DOCS / "_static/katex"
    css = (folder / "katex.min.css").read_text(encoding="utf-8")
    fonts = set(re.findall(r"url\(([^)]+)\)", css))
    assert len(fonts) == 20
    assert all((folder / font).is_file() for font in fonts)
    assert re.search(r'^KATEX = "(.+)"', (DOCS / "conf.py").read_text(encoding="utf-8"), re.MULTILINE)[1] in css
    assert (folder / "LICENSE").is_file()
