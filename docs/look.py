"""Look at the built pages in headless Chromium: ``python docs/look.py`` after the build.

For each main page: a screenshot that must not be blank, no error on the console, and, where the page has mathematics,
all of it rendered by KaTeX. At the width of a desktop and of a phone no page scrolls sideways, no text is cut off, and
every formula can be read whole and does not run into its number. For every page and style sheet: nothing is fetched
from a network. Exit code 0: fine, 1: a page is not, 2: no Chromium or no pages.

- ``--html DIR``: the built pages, default ``docs/_build/html``;
- ``--out DIR``: where screenshots go, default ``docs/_build/look``;
- ``--chromium PATH``: the browser, default the first of chromium, chromium-browser, google-chrome on the path.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.image import imread

HERE = Path(__file__).parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
DESKTOP, PHONE = (1400, 2000), (390, 2000)
AT_ONCE = 8  # pages that one run of Chromium measures
FRAME = """<!doctype html><body style="margin:0">{frames}<script>
function visible(e) {{ return e.getClientRects().length && getComputedStyle(e).visibility !== "hidden"; }}
function scroller(e) {{
  for (let up = e; up; up = up.parentElement)
    if (["auto", "scroll"].includes(up.ownerDocument.defaultView.getComputedStyle(up).overflowX)) return up;
  return null;
}}
function wrong(page, width) {{
  const found = [];
  const say = (what, e) => found.push(what + ": " + e.textContent.trim().replace(/\\s+/g, " ").slice(0, 40));
  if (page.documentElement.scrollWidth > width) {{
    found.push(`is ${{page.documentElement.scrollWidth}} pixels wide`);
    const out = [...page.querySelectorAll(".bd-article *")].filter(e =>
      visible(e) && e.getBoundingClientRect().right > width + 1 && !scroller(e) && !e.closest(".katex-mathml"));
    const inner = out.filter(e => !out.some(other => e !== other && e.contains(other)));
    for (const e of inner.slice(0, 3)) say("sticks out", e);
  }}
  for (const e of page.querySelectorAll("h1, h2, h3, p, li, dt, dd, figure, td, th"))
    if (visible(e) && getComputedStyle(e).display !== "inline" && e.scrollWidth > e.clientWidth + 1) say("cut off", e);
  for (const display of page.querySelectorAll(".katex-display")) {{
    const parts = [...display.querySelectorAll(".base, .tag")].map(e => e.getBoundingClientRect());
    const left = Math.min(...parts.map(r => r.left)), right = Math.max(...parts.map(r => r.right));
    const box = scroller(display), room = (box || page.querySelector(".bd-article")).getBoundingClientRect();
    if (left < room.left - 1) say("formula cut off at the left", display);
    if (right > room.right + 1 && (!box || width > 1000)) say("formula does not fit", display);
    const number = display.closest("div.math")?.querySelector(".eqno");
    if (number && visible(number) && parts.some(r => r.right > number.getBoundingClientRect().left
        && r.bottom > number.getBoundingClientRect().top && r.top < number.getBoundingClientRect().bottom))
      say("formula runs into its number", display);
  }}
  return found;
}}
onload = () => {{
  for (const frame of document.querySelectorAll("iframe"))
    for (const what of wrong(frame.contentDocument, Number(frame.width)))
      document.body.append(Object.assign(document.createElement("pre"),
        {{textContent: `${{frame.dataset.page}} at ${{frame.width}}: ${{what}}`}}));
  document.body.dataset.measured = document.querySelectorAll("iframe").length;
}};
</script>"""
ONE = '<iframe data-page="{page}" src="{url}" width="{width}" height="{height}" style="border:0"></iframe>'
FAULTY = """<!doctype html><body><article class="bd-article">
<p style="width: 200px; overflow: hidden; white-space: nowrap">a line that does not fit into two hundred pixels</p>
<div style="width: 1500px">wide</div>
<div class="math" style="position: relative"><span class="eqno" style="position: absolute; right: 0">(1)</span>
<span class="katex-display" style="display: block"><span class="base" style="display: block">long</span></span></div>
<div style="overflow-x: auto"><span class="katex-display" style="display: block; margin-left: -9px">
<span class="base">left</span></span></div>
<div style="overflow-x: auto; width: 100px"><span class="katex-display" style="display: block">
<span class="base" style="display: block; width: 200px">right</span></span></div></article>"""
FAULTS = {"cut off: a line", "sticks out: wide", "runs into its number: long", "at the left: left", "not fit: right"}
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage", "--enable-logging=stderr",
    "--allow-file-access-from-files", "--v=0", "--virtual-time-budget=4000",
)  # fmt: skip
PAGES = {  # page: whether it has mathematics
    "index": False,
    "quickstart": False,
    "cheat-sheet": False,
    "faq": False,
    "glossary": True,
    "changelog": False,
    "contributing": False,
    "which-gradient": True,
    "forward-mode": True,
    "verify": True,
    "systems": False,
    "frameworks": False,
    "conventions": True,
    "eigen": True,
    "spectral": True,
    "polar": True,
    "eigsh": True,
    "generalized": True,
    "nodes": True,
    "custom": True,
    "iterations": True,
    "operators": True,
    "krylov": True,
    "linear": True,
    "factorisations": True,
    "networks": True,
    "ggn": True,
    "hessian": True,
    "practice": False,
    "migration": True,
    "versions": False,
    "figures": False,
    "history": False,
    "comparison": False,
    "api": False,
    "generated/ddnref.eigh_vjp": True,
    "gallery": False,
    "auto_gallery/index": False,
    "auto_gallery/plot_deblurring": True,
    "auto_gallery/plot_discriminant": True,
    "auto_gallery/plot_eigsh_photograph": True,
    "auto_gallery/plot_equilibrium": True,
    "auto_gallery/plot_ggn": True,
    "auto_gallery/plot_hessian": True,
    "auto_gallery/plot_iteration_digits": True,
    "auto_gallery/plot_ladder": True,
    "auto_gallery/plot_linear_solve": True,
    "auto_gallery/plot_low_rank": True,
    "auto_gallery/plot_marimba": True,
    "auto_gallery/plot_newton": True,
    "auto_gallery/plot_trust_region": True,
    "auto_gallery/plot_procrustes": True,
    "auto_gallery/plot_repeated_eigenvalues": True,
    "auto_gallery/plot_robust_pooling": True,
    "auto_gallery/plot_rubber": True,
    "auto_gallery/plot_sinkhorn": True,
    "auto_gallery/plot_smoothing": True,
    "auto_gallery/plot_subspaces": True,
    "auto_gallery/plot_whitening": True,
}
ON_A_PHONE = (
    "index", "quickstart", "cheat-sheet", "faq", "gallery", "which-gradient", "eigen", "figures", "history",
    "comparison", "auto_gallery/plot_ladder",
)  # fmt: skip
ERRORS = re.compile(
    r'CONSOLE[:(\d)]*\].*?"((?:Uncaught|Error|Failed|Access|Refused|Mixed|ParseError|KaTeX).*?)", source'
)
FETCHED = re.compile(
    r"""<(?:script|img|source|iframe|audio|video|embed)\b[^>]*?\s(?:src|srcset)\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*rel=["']?(?:stylesheet|preload|modulepreload|icon|preconnect))[^>]*?href=["']?((?:https?:)?//[^"'\s>]+)""",
    re.IGNORECASE,
)
FETCHED_BY_CSS = re.compile(r"""(?:url\(\s*|@import\s+)["']?((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
ONE_GREY = 0.995  # a page of which more than this is one colour is blank


def main() -> int:
    """Look at every page and say what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", type=Path, default=HERE / "_build/html")
    parser.add_argument("--out", type=Path, default=HERE / "_build/look")
    parser.add_argument("--chromium", default=next(filter(None, map(shutil.which, BROWSERS)), None))
    parser.add_argument("pages", nargs="*", metavar="PAGE", help="only these, such as eigen; default: all main pages")
    arguments = parser.parse_args()
    if arguments.chromium is None:
        print("look.py: Chromium is not installed; on Debian: apt-get install chromium", file=sys.stderr)
        return 2
    if not (arguments.html / "index.html").exists():
        print(f"look.py: no pages in {arguments.html}; build them first, see docs/conf.py", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    wrong = list(fetched(arguments.html))
    pages = arguments.pages or [*PAGES]
    for page in pages:
        found = list(look(arguments, page, PAGES.get(page, False)))
        print(f"{'WRONG' if found else 'fine ':<5} {page}")
        wrong += [f"{page}: {what}" for what in found]
    wrong += controls(arguments)
    wrong += measured(arguments, [page for page in pages if (arguments.html / f"{page}.html").exists()])
    for what in wrong:
        print(f"look.py: {what}", file=sys.stderr)
    print(f"{len(pages)} pages, {len(wrong)} problems; screenshots in {arguments.out}")
    return 1 if wrong else 0


def fetched(folder: Path) -> Iterator[str]:
    """Yield everything that a built page or style sheet would fetch from a network."""
    for path in sorted(folder.rglob("*.html")):
        for match in FETCHED.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(folder)} fetches {''.join(match)}"
    for path in sorted(folder.rglob("*.css")):
        for url in FETCHED_BY_CSS.findall(path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(folder)} fetches {url}"


def look(arguments: argparse.Namespace, page: str, mathematics: bool) -> Iterator[str]:
    """Yield everything that is wrong with one page."""
    path = arguments.html / f"{page}.html"
    if not path.exists():
        yield "was not built"
        return
    url = path.resolve().as_uri()
    dom, console = chromium(arguments.chromium, url, "--dump-dom", "--window-size=1400,2000")
    yield from (f"console: {error}" for error in ERRORS.findall(console))
    formulas = path.read_text(encoding="utf-8").count('class="math')
    rendered = dom.count('class="katex"')
    if mathematics and not formulas:
        yield "has no mathematics, expected some"
    if rendered < formulas:
        yield f"{rendered} of {formulas} formulas are rendered"
    if "katex-error" in dom:
        yield "KaTeX could not read a formula"
    width, height = DESKTOP
    yield from screenshot(arguments, page, url, "desktop", f"--window-size={width},{height}")
    if page in ON_A_PHONE:
        yield from on_a_phone(arguments, page, url)


def controls(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield the faults of a faulty page that are not found."""
    with tempfile.TemporaryDirectory(prefix="ddnref-look-") as folder:
        (Path(folder) / "faulty.html").write_text(FAULTY, encoding="utf-8")
        found = " ".join(measured(argparse.Namespace(html=Path(folder), chromium=arguments.chromium), ["faulty"]))
    yield from (f"a planted fault was not found: {fault}" for fault in sorted(FAULTS) if fault not in found)


def measured(arguments: argparse.Namespace, pages: Sequence[str]) -> Iterator[str]:
    """Yield what is cut off at either width, in frames because headless Chromium makes no narrow window."""
    with tempfile.TemporaryDirectory(prefix="ddnref-look-") as folder:
        frame = Path(folder) / "frame.html"
        for some in (pages[i : i + AT_ONCE] for i in range(0, len(pages), AT_ONCE)):
            sizes = [(page, *size) for page in some for size in (DESKTOP, PHONE)]
            frames = "".join(
                ONE.format(page=page, url=(arguments.html / f"{page}.html").resolve().as_uri(), width=w, height=h)
                for page, w, h in sizes
            )
            frame.write_text(FRAME.format(frames=frames), encoding="utf-8")
            dom = chromium(arguments.chromium, frame.as_uri(), "--dump-dom", "--window-size=1400,2000")[0]
            if f'data-measured="{len(sizes)}"' not in dom:
                yield f"{', '.join(some)}: cannot be measured in frames"
            yield from (html.unescape(what) for what in re.findall(r"<pre>(.*?)</pre>", dom, re.DOTALL))


def on_a_phone(arguments: argparse.Namespace, page: str, url: str) -> Iterator[str]:
    """Take a screenshot of a phone's width, in a frame because headless Chromium makes no window that narrow."""
    width, height = PHONE
    with tempfile.TemporaryDirectory(prefix="ddnref-look-") as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(ONE.format(page=page, url=url, width=width, height=height), encoding="utf-8")
        yield from screenshot(arguments, page, frame.as_uri(), "phone", f"--window-size={max(width, 500)},{height}")


def screenshot(arguments: argparse.Namespace, page: str, url: str, name: str, size: str) -> Iterator[str]:
    """Take it, and say so if there is nothing on it."""
    target = arguments.out / f"{page.replace('/', '-')}-{name}.png"
    target.unlink(missing_ok=True)
    chromium(arguments.chromium, url, f"--screenshot={target}", size)
    if not target.exists():
        yield f"no screenshot ({name})"
    elif (share := flat(target)) > ONE_GREY:
        yield f"the screenshot is blank ({name}): {share:.1%} of it is one colour"


def chromium(browser: str, url: str, *options: str) -> tuple[str, str]:
    """Standard output and error of one run, with a fresh profile."""
    with tempfile.TemporaryDirectory(prefix="ddnref-look-") as profile:
        done = subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={profile}", *options, url],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    return done.stdout, done.stderr


def flat(picture: Path) -> float:
    """The share of the most frequent grey in the upper part of a screenshot, of a phone's width, below the header."""
    grey = np.rint(imread(picture)[80:1400, : PHONE[0], :3].mean(axis=-1) * 255).astype(np.int64)
    return float(np.bincount(grey.ravel()).max() / grey.size)


if __name__ == "__main__":
    sys.exit(main())
