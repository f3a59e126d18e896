"""Plain English: docstrings, comments, messages and pages avoid patterns that a reader has to decode.

Only patterns that need no judgement are searched for. A place that is found should be rewritten, not excepted.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
WRITTEN_BY_TESTS = {"docs/matrix.md", "docs/fuzz.md", "docs/estimates.md"}
HERE = "tests/infrastructure/test_language.py"


class Text(NamedTuple):
    path: str
    line: int
    kind: str
    """``docstring``, ``comment``, ``string`` or ``page``."""
    text: str


class Finding(NamedTuple):
    path: str
    line: int
    pattern: str
    words: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.pattern}: {self.words}"


# --- patterns ------------------------------------------------------------------------------------------------------

THINGS = "call|cell|item|iteration|layer|line|matrix|pair|product|row|column|rule|sample|second|step|system|test|vector"
JOINTS = "and|as|at|by|for|from|in|into|is|of|on|or|per|than|that|to|with|are|has|gives|makes|was|like|over|but|if"
NUMBERS = "one|two|three|four|five|six|seven|eight|ten|several|a few|half|no"
ANYWHERE = {
    "distributive 'a' (write 'per')": rf"\b(?:\d+(?:[.,]\d+)*|{NUMBERS})[ -](?:\w+ )?"
    rf"(?!(?:{JOINTS})\b)\w+ an? (?:{THINGS})\b",
    "'once a …' (write 'once per')": rf"\b(?:once|twice) an? (?:{THINGS})\b",
    "'after a look at'": r"\bafter a look at\b",
    "'some hundred' (write 'a few hundred')": r"\b[Ss]ome (?:dozens?|hundreds?|thousands?|millions?)\b",
    "'told apart' (write 'distinguished')": r"\btold apart\b",
    "'of its own' (write 'separate')": r"\bof (?:its|their|his) own\b",
    "'stands in' (write 'is in')": r"\bstands? (?:in|here|there|beside|below|above|at|on)\b",
    "'wait for good' (write 'deadlock')": r"\b(?:waits?|waited|waiting|hangs?|blocks?)\b(?: \S+){0,4} for good\b",
    "'is no array' (write 'is not an array')": r"(?<!\bthere )(?<!\bThere )\bis no (?:array|tensor|matrix|number|"
    r"function|operator|string|tuple|integer|instance|module|name|real|comment|node|network|layer)\b",
    "'what is no' (name it)": r"\b[Ww]hat is no\b",
    "'Likely' without a verb": r"(?:^|(?<=[.:;] ))Likely\b(?! (?:to|causes?)\b)",
}
FRAGMENTS = r"(?:The same|As given|Itself|Likewise|As above|As before|Ditto|The other way round)[.,;:]"
TAILS = "Of|As|To|Than|Those|That|What|Where|Who|Whose|Which|And|Or|But|Also|So"
LEADS = "From|With|Without|By|Over|Between|For|In|On|At|After|Before|Under|Through|Among"
SUMMARY = {
    "the summary is the tail of another sentence": rf"(?!As (?:many|much|few)\b)(?:{TAILS})\b",
    "the summary has no verb": rf"(?:{LEADS})\b[^,:]*$",
    "the summary is a fragment": FRAGMENTS,
    "the summary is a reference to another place": r"The same(?:,| as| for| where| with| of| in)\b",
}


def summary_of(docstring: str) -> str:
    """Return the first sentence of a docstring on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.) ", paragraph)[0]


def findings(text: Text) -> Iterator[Finding]:
    """Yield the patterns that occur in a text."""
    # Search in one line, because a phrase may be broken, and keep where each character was for the number of the line.
    flat = re.sub(r"\s", " ", text.text)
    flat = re.sub(r"(?<= ) +| (?=#)", lambda spaces: "\x00" * len(spaces[0]), flat)
    kept = [i for i, c in enumerate(flat) if c != "\x00"]
    joined = "".join(flat[i] for i in kept)
    for name, pattern in ANYWHERE.items():
        for match in re.finditer(pattern, joined):
            line = text.line + text.text.count("\n", 0, kept[match.start()])
            yield Finding(text.path, line, name, match[0])
    if text.kind == "docstring":
        summary = summary_of(text.text)
        for name, pattern in SUMMARY.items():
            if re.match(pattern, summary):
                yield Finding(text.path, text.line, name, summary[:60])
    if text.kind == "comment" and re.match(FRAGMENTS, joined.strip()):
        yield Finding(text.path, text.line, "the comment is a fragment", joined[:60])


# --- texts ---------------------------------------------------------------------------------------------------------


def texts_of(path: str, source: str) -> Iterator[Text]:
    """Yield the docstrings, comments and other strings of a module, or a page as one text."""
    if not path.endswith(".py"):
        yield Text(path, 1, "page", source)
        return
    nodes = list(ast.walk(ast.parse(source)))
    strings = {node for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    docstrings = {node.value for node in nodes if isinstance(node, ast.Expr) and node.value in strings}
    for node in strings:
        yield Text(path, node.lineno, "docstring" if node in docstrings else "string", node.value)
    yield from comments(path, source)


def comments(path: str, source: str) -> Iterator[Text]:
    """Yield the comments of a module. Those on neighbouring lines are one text."""
    block: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line = token.start[0]
        alone = token.line.lstrip().startswith("#")
        if block and (line != last + 1 or not alone):
            yield Text(path, first, "comment", "\n".join(block))
            block = []
        first = first if block else line
        block.append(token.string.lstrip("#: "))
        last = line
    if block:
        yield Text(path, first, "comment", "\n".join(block))


def sources() -> list[str]:
    """List the tracked files of the package, its tests, benchmarks and pages."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:  # an unpacked sdist
        listed_paths = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    else:
        listed_paths = listed.stdout.splitlines()
    wanted = re.compile(r"(?:ddnref|tests|asv_benches|docs)/.*\.(?:py|rst|md)|[A-Z]+\.md|conftest\.py")
    paths = [path for path in listed_paths if wanted.fullmatch(path) and path not in WRITTEN_BY_TESTS | {HERE}]
    return sorted(path for path in paths if (ROOT / path).is_file())


def test_texts_are_plain_english():
    found = [
        finding
        for path in sources()
        for text in texts_of(path, (ROOT / path).read_text(encoding="utf-8"))
        for finding in findings(text)
    ]
    folders = Counter("/".join(finding.path.split("/")[:2]) for finding in found)
    listing = "\n".join([*map(str, found), "", *(f"{count:4} {folder}" for folder, count in folders.most_common())])
    assert not found, f"{len(found)} places to rewrite:\n{listing}"


# --- the check rejects each pattern, and accepts its plain form ------------------------------------------------------

PLANTED = {
    "docstring": [
        ("Of a triangular matrix with that diagonal.", "Sign of a triangular matrix, from its diagonal."),
        ("From all parameters to those of A.", "Map all parameters to those of A."),
        ("With ridge and bias.", "Least squares with ridge and bias."),
        ("By name.", "Activations by name."),
        ("As given.", "Return the argument unchanged."),
        ("Those of the layer.", "Parameters of the layer."),
        ("What the user calls.", "The function that the user calls."),
        ("For each edge the eigenvalues near it.", "For each edge, return the eigenvalues near it."),
        ("In which it computes.", "In double precision, compare with finite differences."),
        ("The same.", "The same operator in another precision."),
        ("The same where nothing is traced.", "Skip the checks if nothing is traced."),
        ("Itself.", "Return self."),
    ],
    "comment": [
        ("The same.", "The same rule holds for columns."),
        ("The system, after a look at\nall arguments.", "Validate all arguments."),
        ("20 ms a call", "20 ms per call"),
        ("one test a cell", "one test per cell"),
        ("once a step", "once per step"),
        ("some hundred steps", "a few hundred steps"),
        ("where rounding is told\n  apart", "where rounding is distinguished"),
        ("an environment of its own", "a separate environment"),
        ("The equation stands beside the code.", "The equation is beside the code."),
        ("They wait for each other for good.", "They deadlock."),
        ("It is no array.", "There is no array in it."),
    ],
    "string": [
        ("singular. Likely rows that depend on each other.", "singular. The most likely cause is dependent rows."),
        ("x is no array", "x is not an array"),
    ],
    "page": [
        ("what is no array of their library is refused", "an argument that is not an array is refused"),
        ("equal eigenvalues are not told apart", "equal eigenvalues are not distinguished"),
    ],
}
CASES = [(kind, *pair) for kind, pairs in PLANTED.items() for pair in pairs]


@pytest.mark.parametrize(("kind", "bad", "good"), CASES, ids=[case[1][:30] for case in CASES])
def test_planted_patterns_are_found(kind, bad, good):
    def found(words: str) -> list[Finding]:
        source = {
            "docstring": f'def f():\n    """{words}"""\n',
            "comment": "".join(f"# {line.strip()}\n" for line in words.splitlines()),
            "string": f"raise ValueError({words!r})\n",
            "page": words,
        }[kind]
        path = "page.rst" if kind == "page" else "module.py"
        return [finding for text in texts_of(path, source) for finding in findings(text)]

    assert found(bad)
    assert not found(good)


def test_the_line_of_a_phrase_is_told():
    page = Text("page.rst", 1, "page", "First line.\nIt takes 20 ms\n   a call here.\n")
    (finding,) = findings(page)
    assert str(finding) == "page.rst:2: distributive 'a' (write 'per'): 20 ms a call"


def test_every_pattern_has_a_planted_case():
    hit = {finding.pattern for kind, bad, _ in CASES for finding in findings(Text("module.py", 1, kind, bad))}
    assert hit >= {*ANYWHERE, *SUMMARY}
