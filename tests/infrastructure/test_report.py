"""``ddnref report``: the page stands alone, and its numbers are what it says."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ddnref.report import build, declarative, gaps, page, peers, pictures, subspace_model, whitening
from ddnref.report.content import Content, Context, Headline, Section, Table, Text
from ddnref.verify._backends import backend
from ddnref.verify._cli import main

STEPS = 12
TIMED = ("profile", "declarative", "hessian")
TEXTS = ("when", "photograph", "image")


def run(out, *options):
    """The exit code and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["report", "--out", str(out), *options])
    return code, printed.getvalue()


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One report with NumPy and whatever it is compared with that is installed; fewer steps, to be quick."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddnref.report.subspaces.ITERATIONS", STEPS)
        patch.setattr("ddnref.report.deblurring_model.SIDE", 64)
        patch.setattr("ddnref.report.hessian_model.LAYERS", 6)
        patch.setattr("ddnref.report.hessian_model.KEPT", (0, 40))
        patch.setattr("ddnref.report.hessian_model.DEPTHS", (4, 8))
        patch.setattr("ddnref.report.profile.SIZES", ((2, 8), (1, 128)))
        patch.setattr("ddnref.report.declarative.QUICK", declarative.QUICK._replace(widths=(8, 16), seeds=1))
        patch.setattr("ddnref.report.declarative.SMALL", 16)
        patch.setattr("ddnref.report.declarative_precision.SMALL", 16)
        code, printed = run(out, "--seed", "3")
    assert code == 0
    return out, printed


@pytest.fixture(autouse=True)
def one_thread():
    with threadpool_limits(1):
        yield


@pytest.fixture
def alone(monkeypatch):
    """Nothing to compare with, few steps, and nothing timed, because times differ from run to run."""
    monkeypatch.setattr(peers, "_installed", lambda module: False)
    monkeypatch.setattr(build, "SECTIONS", [section for section in build.SECTIONS if section.name not in TIMED])
    monkeypatch.setattr("ddnref.report.subspaces.ITERATIONS", 3)
    monkeypatch.setattr("ddnref.report.deblurring_model.SIDE", 24)
    monkeypatch.setattr("ddnref.report.deblurring_model.STEPS", 2)
    monkeypatch.setattr("ddnref.report.deblurring_model.RTOL", 1e-13)  # libraries are compared to 1e-9
    monkeypatch.setattr("ddnref.report.curvature_model.LOOKS", (0, 1, 2))
    monkeypatch.setattr("ddnref.report.curvature_model.SAMPLES", 12)


def test_files(report):
    out, _ = report
    pictures_ = {path.stem for path in out.glob("*.png")}
    numbers = {path.stem for path in out.glob("*.csv")}
    main = {
        "subspaces-course", "subspaces-weights", "subspaces-eigen-digits", "whitening-covariance", "gaps-error",
        "profile-time", "declarative-gradients", "declarative-time-by-size", "deblurring-photographs",
        "curvature-spectrum",
        "hessian-spectrum", "hessian-time", "hessian-errors",
    }  # fmt: skip
    assert main <= pictures_
    assert pictures_ < numbers  # the numbers of every picture, and the tables
    assert len(list(out.iterdir())) == len(pictures_) + len(numbers) + 1
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in out.glob("*.csv"):
        assert len(table(path)) > 1


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.images, self.anchors, self.open = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("src", "href") if name in found]
        self.images += [found] if tag == "img" else []
        self.anchors |= {found["id"]} if "id" in found else set()
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(out):
    text = (out / "index.html").read_text(encoding="utf-8")
    found = Page()
    found.feed(text)
    assert not found.open
    return text, found


def test_page_stands_alone(report):
    out, _ = report
    text, found = parsed(out)
    assert found.links
    for link in found.links:
        assert link.startswith("data:image/png;base64,") or (link[0] == "#" and link[1:] in found.anchors)
    assert len(found.images) == len(list(out.glob("*.png")))
    assert all(len(image["alt"]) > 20 for image in found.images)
    prose = re.sub(r"data:image/png;base64,[^\"]*", "", text)
    for outside in ("http", "file:", "@import", "url(", "<script", "<link", str(out), str(Path.home()), "/tmp"):
        assert outside not in prose
    assert 'name="viewport"' in text
    assert "ddnref report --backend numpy --seed 3" in prose
    for package in ("ddnref 0", "Python 3", "NumPy 2", "scikit-learn 1"):
        assert package in prose


def test_console_says_where_and_what(report):
    out, printed = report
    lines = printed.splitlines()
    assert lines[-1] == f"The page: {out / 'index.html'}"
    assert sum(line.startswith(f"{i + 1}/{len(build.SECTIONS)} ") for i, line in enumerate(lines)) == 8
    assert len(lines) == len(build.SECTIONS) + 12 + 1
    assert "before learning" in printed
    assert printed.isascii()


def test_learning_works(report):
    out, _ = report
    course = table(out / "subspaces-course.csv")
    losses = [float(row["training loss"]) for row in course]
    accuracies = [float(row["held-out accuracy"]) for row in course]
    assert len(course) == STEPS + 1
    assert losses[-1] < 0.4 < 1.5 < losses[0]
    assert accuracies[0] < 0.5
    assert 0.8 < accuracies[-1] < 1.0
    shown = {row[""]: float(row["recognised"]) for row in table(out / "subspaces-accuracy.csv")}
    assert shown["damaged images, equal weights"] == accuracies[0]
    assert shown["damaged images, learned weights"] == accuracies[-1]
    assert 0.97 < shown["clean images, equal weights"] < 1.0
    weights = table(out / "subspaces-weights.csv")
    bad = [float(row["weight"]) for row in weights if row["damaged"] == "1"]
    good = [float(row["weight"]) for row in weights if row["damaged"] == "0"]
    assert len(bad) == 9
    assert max(bad) < np.median(good)


def test_deblurring_finds_the_kernel(report):
    out, _ = report
    course = table(out / "deblurring-course.csv")
    losses = [float(row["loss"]) for row in course]
    assert losses[-1] < 0.2 * losses[0]
    rows = {
        (row["photograph"], row["image"]): float(row["decibels"]) for row in table(out / "deblurring-photographs.csv")
    }
    for photograph in ("learned from", "held out"):
        assert rows[photograph, "restored, learned"] > rows[photograph, "as taken"] + 2
        assert rows[photograph, "restored, learned"] > rows[photograph, "restored, before"] + 2
    kernels = {}
    for row in table(out / "deblurring-kernels.csv"):
        kernels.setdefault(row["kernel"], []).append([float(row[f"column {j}"]) for j in range(9)])
    start, learned, true = map(np.asarray, kernels.values())
    assert np.sum(np.abs(learned - true)) < 0.5 * np.sum(np.abs(start - true))
    assert abs(np.sum(learned) - 1) < 1e-12


def test_gradients_are_right(report):
    out, _ = report
    rows = {row["gradient"]: row for row in table(out / "subspaces-gradients.csv")}
    assert float(rows["ddnref, of the matrices"]["error"]) < 1e-7
    assert float(rows["ddnref, of the pixel weights"]["error"]) < 1e-7
    numbers = {row[""]: row["value"] for row in table(out / "whitening-numbers.csv")}
    assert float(numbers["gradient, ddnref: error against finite differences"]) < 1e-7
    assert float(numbers["after: largest distance of the covariance from the identity"]) < 1e-10
    numbers = {row[""]: row["value"] for row in table(out / "deblurring-numbers.csv")}
    assert float(numbers["gradient of kernel and weight: error against finite differences"]) < 1e-7


def test_exact_at_repeated_eigenvalues(report):
    out, _ = report
    rows = table(out / "gaps-errors.csv")
    assert [row["gap"] for row in rows] == [*(f"1e{-e:+03d}" for e in range(16)), "0 (repeated)"]
    assert float(rows[-1]["ddnref: worst error"]) <= 1e-12
    assert float(rows[-2]["ddnref: worst error"]) <= 1e-12
    assert all(float(row[f"{gaps.TOLD}: worst error"]) <= 1e-12 for row in rows)
    assert rows == table(out / "gaps-error.csv")


@pytest.mark.parametrize(("name", "module"), [
    pytest.param(name, module, marks=pytest.mark.framework(module))
    for name, module in (("PyTorch", "torch"), ("JAX", "jax"))
])  # fmt: skip
def test_peers_are_really_there(report, name, module):
    out, _ = report
    rows = table(out / "gaps-errors.csv")
    assert float(rows[0][f"{name}: worst error"]) < 1e-12  # the same loss: right where the gap is wide
    compared = next(row for row in table(out / "subspaces-gradients.csv") if row["gradient"].startswith(name))
    assert compared["NaN"].endswith("of 10")
    assert compared["error"] == "nan" or float(compared["error"]) < 1e-10
    text, _ = parsed(out)
    assert f"{name} {peers.versions()[name]}" in text


# --- options ------------------------------------------------------------------------------------------------------


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_same_seed_same_bytes_and_missing_peers_are_named(alone, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(tmp_path / name, "--seed", seed)[0] == 0
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    for name in (
        "gaps-errors.csv",
        "deblurring-course.csv",
        "subspaces-course.csv",
        "whitening-digits.csv",
        "index.html",
    ):
        assert first[name] != other[name]
    text, _ = parsed(tmp_path / "a")
    for name in ("PyTorch", "JAX"):
        assert f"{name} not installed" in text
    assert "<td>not installed</td>" in text


@pytest.mark.parametrize("name", ["array-api-strict", *(
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))])  # fmt: skip
def test_other_backends(alone, tmp_path, name):
    assert run(tmp_path / "numpy")[0] == 0
    code, _ = run(tmp_path / "other", "--backend", name)
    assert code == 0
    text, _ = parsed(tmp_path / "other")
    assert f"Backend: {name} " in text
    for path in (
        "subspaces-course.csv",
        "whitening-digits.csv",
        "deblurring-photographs.csv",
        "curvature-spectrum.csv",
    ):
        here, there = (
            [[float(cell) for key, cell in row.items() if key not in TEXTS] for row in table(tmp_path / folder / path)]
            for folder in ("numpy", "other")
        )
        assert np.allclose(here, there, rtol=1e-9, atol=1e-9)


def test_default_folder(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "SECTIONS", (whitening.SECTION,))
    assert main(["report"]) == 0
    assert (tmp_path / "ddnref-report" / "index.html").exists()


def test_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", "--out", str(tmp_path / "file")]) == 2
    assert "the folder for the report cannot be made" in capsys.readouterr().err


# --- the parts --------------------------------------------------------------------------------------------------


def test_known_gradient_is_the_gradient():
    problem = gaps.pose(seed=0)
    x, c, x_bar = problem.x[3, 0], problem.c[3, 0], problem.gradient[3, 0]  # gap 1e-3
    d = np.random.default_rng(0).standard_normal(x.shape)
    d = d + d.T
    h = 1e-4

    def loss(s):
        return gaps.projector_loss(*np.linalg.eigh(x + s * d), c)

    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert abs(slope - np.sum(x_bar * d)) < 1e-9 * np.linalg.norm(x_bar) * np.linalg.norm(d)


def test_nan_and_missing_are_drawn_and_told():
    wrong = np.full((len(gaps.GAPS), gaps.MATRICES), 1e-3)
    wrong[-1, :4], wrong[-2] = math.nan, math.inf
    found = {gaps.OURS: np.full_like(wrong, 1e-15), gaps.TOLD: None, "PyTorch": wrong, "JAX": None}
    assert gaps.worst(wrong)[-1] == 1e-3
    assert math.isnan(gaps.worst(wrong)[-2])
    assert list(gaps.nans(wrong)[-3:]) == [0, gaps.MATRICES, 4]
    with pictures.style():
        drawing = gaps.draw(found)
    at_top = [line for line in drawing.axes[0].lines if len(line.get_xdata()) and np.all(line.get_ydata() == gaps.TOP)]
    assert [len(line.get_xdata()) for line in at_top] == [2]
    assert pictures.png(drawing).startswith(b"\x89PNG")
    assert gaps.summary(found) == ("ddnref 1e-15", "PyTorch 1e-03 (4 of 50 NaN)", "JAX not installed")


def test_page_marks_nan_and_escapes():
    content = Content([Text("<em>a</em>"), Table("t", "c", ("x<y", "z"), [("a&b", math.nan), ("c", 0.125)], ".1e")],
                      [Headline("l<", ("v&",))])  # fmt: skip
    text = page.page([(Section("s", "T<", lambda context: content), content)], {}, [("F", "1<2")])
    for part in ("<em>a</em>", "x&lt;y", "a&amp;b", '<td class="bad">NaN</td>', "<td>1.2e-01</td>", "T&lt;", "1&lt;2"):
        assert part in text


def test_learned_gradient_is_ours_alone(monkeypatch):
    """The chain uses eigh_topk_vjp: break it, and the finite differences notice."""
    correct = subspace_model.ddnref.eigh_topk_vjp
    monkeypatch.setattr(subspace_model.ddnref, "eigh_topk_vjp", lambda *a, **k: (1 + 1e-6) * correct(*a, **k))
    with backend("numpy") as library:
        train, _ = subspace_model.digits.split(0)
        data = subspace_model.prepare(library, train)
        state = subspace_model.forward(np.zeros(64), data)
        checked = subspace_model.check(library, data, state, 0)
    assert checked.matrix > 1e-7
    assert checked.chain > 1e-8


def test_context_tracks_progress(alone):
    seen = []

    def track(items, description):
        seen.append((len(items), description))
        return items

    with backend("numpy") as library, pictures.style():
        content = build.SECTIONS[0].run(Context(library, 0, track))
    assert seen == [(3, "Learning pixel weights")]
    assert len(content.headlines) == 3
