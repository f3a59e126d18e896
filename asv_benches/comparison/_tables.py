"""Tables, lists and charts from the record of the comparison. Nothing here measures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from html import escape
from typing import Any

from ._problem import DTYPES, LIBRARIES

Record = dict[str, Any]
Cell = dict[str, Any]
VERDICTS = {"right": "right", "silent": "silently wrong", "nan": "NaN", "told": "refused"}
COLOURS = {"right": "#2a9d8f", "silent": "#d62839", "nan": "#f4a259", "told": "#8d99ae"}
FASTER = 0.9  # a peer whose time is below this share of ddnref's is listed as faster
COLUMNS = (
    "library", "float64: error", "wrong / NaN / refused, %", "float32: error", "wrong / NaN / refused, %",
    "ms", "time / ddnref's", "MiB", "second order", "says so",
)  # fmt: skip


# --- tables -------------------------------------------------------------------------------------------------------


def of_problem(record: Record, name: str) -> str:
    """Write the table of one problem in Markdown, ddnref beside the libraries of the same framework."""
    cells = record["problems"][name]["cells"]
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    lines += [f"| {' | '.join([LIBRARIES[library].title, *row(cells[library])])} |" for library in in_order(cells)]
    return "\n".join(lines)


def in_order(cells: dict[str, Cell]) -> list[str]:
    return sorted(cells, key=list(LIBRARIES).index)


def row(cell: Cell) -> list[str]:
    """Write everything about one cell but its library."""
    if "missing" in cell:
        return ["does not run", *["–"] * (len(COLUMNS) - 2)]
    columns: list[str] = []
    for dtype in DTYPES:
        found = cell["errors"].get(dtype)
        columns += [size_of(found), shares_of(found)] if found else ["–", "–"]
    columns.append(f"{cell['milliseconds']:.3g}" if "milliseconds" in cell else "–")
    columns.append(f"{cell['ratio'][0]:.2f}" if "ratio" in cell else "–")
    columns.append("–" if cell["memory"] is None else f"{cell['memory']:.1f}")
    second, hard = ((cell[key] or "–").partition(":")[0] for key in ("second", "hard"))
    return [*columns, second, hard.replace("NaN and a warning", "NaN,\xa0warning")]


def size_of(found: dict[str, Any]) -> str:
    """Write the median and the worst error without a place to break the line."""
    return (
        f"{found['median']:.0e} … {found['worst']:.0e}".replace(" ", "\xa0").replace("-", "‑")
        if "median" in found
        else "–"
    )


def shares_of(found: dict[str, Any]) -> str:
    total = sum(found[key] for key in VERDICTS)
    return "\xa0/\xa0".join(f"{100 * found[key] / total:.0f}" for key in ("silent", "nan", "told"))


def notes(record: Record, name: str) -> Iterator[str]:
    """Yield in words what the table of a problem shortens: errors, warnings and reasons, each with its libraries."""
    found: dict[tuple[str, str], list[str]] = {}
    cells = record["problems"][name]["cells"]
    for library in in_order(cells):
        cell = cells[library]
        said = {
            "does not run": cell.get("missing", ""),
            "on the large instance": cell.get("fails", ""),
            "refused": next((one["said"] for one in cell.get("errors", {}).values() if one["said"]), ""),
            "second order": (cell.get("second") or "").partition(": ")[2],
            "without a result": (cell.get("hard") or "").partition(": ")[2],
        }
        for what, words in said.items():
            if words:
                found.setdefault((what, shortened(words)), []).append(LIBRARIES[library].title)
    for (what, words), libraries in found.items():
        yield f"{'; '.join(libraries)} – {what}: ``{words}``"


def shortened(words: str, length: int = 110) -> str:
    """Cut a message between words, and leave out what a page would read as markup."""
    words = " ".join(words.replace("`", "").replace("|", "/").split())
    return words if len(words) <= length else words[:length].rpartition(" ")[0] + " …"


def fails(found: dict[str, int]) -> bool:
    """Whether any result in one precision is not right."""
    return any(found[key] for key in VERDICTS if key != "right")


def is_right(cell: Cell) -> bool:
    """Whether all results in float64 are right."""
    found = cell.get("errors", {}).get("float64")
    return bool(found) and not fails(found)


def faster(record: Record) -> Iterator[str]:
    """Yield the cells in which another library is right in float64 and faster than ddnref in the same framework."""
    for one in record["problems"].values():
        for library in in_order(one["cells"]):
            cell = one["cells"][library]
            if not library.startswith("ddnref") and is_right(cell) and "ratio" in cell and cell["ratio"][0] < FASTER:
                yield f"{one['title']}: {LIBRARIES[library].title} takes {cell['ratio'][0]:.2f} of ddnref's time."


def behind(record: Record) -> Iterator[str]:
    """Yield where ddnref is wrong, says nothing, or has no second derivative where the framework itself has one."""
    refused: dict[str, list[str]] = {}  # titles of problems by framework
    for one in record["problems"].values():
        for library in in_order(one["cells"]):
            cell, framework = one["cells"][library], library.removeprefix("ddnref-")
            if framework == library:
                continue
            ours = f"ddnref in {LIBRARIES[framework].title}"
            for dtype, found in cell.get("errors", {}).items():
                if fails(found):
                    yield f"{one['title']}: {ours} in {dtype} is wrong, NaN or refuses: {shares_of(found)} %."
            if (cell.get("second") or "").startswith("wrong"):
                error = cell["second"].partition(": ")[2]
                yield f"{one['title']}: a second derivative of {ours} is silently wrong, {error}."
            if cell.get("hard") == "nothing":
                yield f"{one['title']}: {ours} says nothing about an instance without a result."
            theirs = one["cells"].get(framework, {}).get("second")
            if cell.get("second") not in (None, "yes") and theirs == "yes":
                refused.setdefault(framework, []).append(one["title"])
    for framework, titles in refused.items():
        title = LIBRARIES[framework].title
        yield f"Second derivatives that {title} gives and ddnref in {title} does not: {'; '.join(titles)}."


def conditions(record: Record) -> str:
    """Say when, where and with which versions the record was measured."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)} per process"
    return (
        f"Measured on {record['date']} by ``{record['command']}`` in {record['minutes']:g} minutes: "
        f"{record['processor']}, {record['cores']} cores, {threads}; other processes used {record['others']:.0%} "
        f"of one core meanwhile. Versions: {versions}."
    )


# --- charts -------------------------------------------------------------------------------------------------------


LEFT, TOP, WIDTH, HEIGHT = 235, 120, 34, 26  # of the grid: room for titles, size of a cell


def chart(record: Record, dtype: str) -> str:
    """Draw for each cell the shares of right, silently wrong, NaN and refused results, as SVG."""

    def draw(x: float, y: float, cell: Cell, hover: str) -> str:
        return bar(x + 3, y + 4, WIDTH - 6, HEIGHT - 8, cell.get("errors", {}).get(dtype), hover)

    parts, width, bottom = grid(record, draw)
    for j, (key, words) in enumerate({**VERDICTS, "": "does not run"}.items()):
        x = LEFT + 125 * j
        fill = f'fill="{COLOURS[key]}"' if key else 'fill="none" stroke="currentColor" stroke-dasharray="2 2"'
        parts.append(f'<rect x="{x}" y="{bottom + 13}" width="14" height="12" {fill}/>')
        parts.append(text(x + 20, bottom + 24, words))
    size = max(width, LEFT + 640), bottom + 36
    return svg(parts, *size, f"Shares of right, silently wrong, NaN and refused results in {dtype}")


def times(record: Record) -> str:
    """Write for each cell its time relative to ddnref in the same framework, as SVG; "" where no times were taken."""

    def draw(x: float, y: float, cell: Cell, hover: str) -> str:
        if "ratio" not in cell:
            return ""
        ratio = cell["ratio"][0]
        fill = COLOURS["right"] if ratio < FASTER else "none"
        place = f'x="{x + 3:g}" y="{y + 3:g}" width="{WIDTH - 6}" height="{HEIGHT - 6}"'
        frame = f'<rect {place} fill="{fill}" opacity="0.45"/>'
        number = text(x + WIDTH / 2, y + HEIGHT / 2 + 4, f"{ratio:.2g}", 'text-anchor="middle"')
        return f"<g><title>{escape(hover)}</title>{frame}{number}</g>"

    if not any("ratio" in cell for one in record["problems"].values() for cell in one["cells"].values()):
        return ""
    parts, width, bottom = grid(record, draw)
    parts.append(
        f'<rect x="{LEFT}" y="{bottom + 12}" width="14" height="13" fill="{COLOURS["right"]}" opacity="0.45"/>'
    )
    parts.append(text(LEFT + 20, bottom + 24, f"faster than {FASTER:g} of ddnref's time"))
    return svg(parts, max(width, LEFT + 640), bottom + 36, "Times relative to ddnref in the same framework")


def grid(record: Record, draw: Callable[[float, float, Cell, str], str]) -> tuple[list[str], float, float]:
    """Draw problems in rows and libraries in columns; return the parts and the right and the lower end."""
    problems = record["problems"]
    libraries = [library for library in LIBRARIES if any(library in one["cells"] for one in problems.values())]
    parts = []
    for j, library in enumerate(libraries):
        x = LEFT + (j + 0.6) * WIDTH
        parts.append(text(x, TOP - 8, LIBRARIES[library].title, f'transform="rotate(-45 {x:g} {TOP - 8})"'))
    for i, (name, one) in enumerate(problems.items()):
        y = TOP + i * HEIGHT
        parts.append(text(LEFT - 10, y + HEIGHT / 2 + 4, one["title"], 'text-anchor="end"'))
        for j, library in enumerate(libraries):
            if library in one["cells"]:
                parts.append(draw(LEFT + j * WIDTH, y, one["cells"][library], f"{name}:{library}"))
    return parts, LEFT + len(libraries) * WIDTH + 90, TOP + len(problems) * HEIGHT


def bar(x: float, y: float, width: float, height: float, found: dict[str, Any] | None, title: str) -> str:
    """Draw one cell: a bar cut into the shares of its verdicts, or a dashed frame where the library does not run."""
    hover = f"<title>{escape(title)}</title>"
    if found is None:
        frame = 'fill="none" stroke="currentColor" stroke-dasharray="2 2"'
        return f'<g>{hover}<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {frame}/></g>'
    total, pieces = sum(found[key] for key in VERDICTS), []
    for key in VERDICTS:
        part = width * found[key] / total
        pieces.append(f'<rect x="{x:.2f}" y="{y:g}" width="{part:.2f}" height="{height:g}" fill="{COLOURS[key]}"/>')
        x += part
    return f"<g>{hover}{''.join(pieces)}</g>"


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{escape(words)}</text>'


def svg(parts: list[str], width: float, height: float, label: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" '
    head += 'style="max-width: 100%; min-width: 700px; height: auto" '
    head += f'aria-label="{escape(label)}" font-family="sans-serif" font-size="13" fill="currentColor">'
    return "\n".join([head, *parts, "</svg>"])
