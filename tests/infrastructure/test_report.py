"""``ddnref report``: the page is self-contained, its numbers are right, and a wrong result is noticed."""

from __future__ import annotations

import ast
import contextlib
import csv
import importlib.util
import io
import math
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import ddnref
import ddnref.examples
from ddnref.curvature import HessianFactor
from ddnref.examples import _peers, card, check, picture, settings, track
from ddnref.examples import table as show_table
from ddnref.examples._show import Card, Check, CheckError, Table
from ddnref.report import build, page, runner
from ddnref.report.narrative import html
from ddnref.report.runner import Code, Narrative, Printed, Told
from ddnref.verify._backends import backend
from ddnref.verify._cli import main

STEPS = 12
FEW = dict.fromkeys(("ddnref", "textbook", "dense"), (3, 6))
SMALL = {
    "subspaces": {"ITERATIONS": STEPS},
    "whitening": {},
    "repeated_eigenvalues": {},
    "ladder": {"SIZES": ((2, 8), (1, 128))},
    "rubber": {"RINGS": 4},
    "iteration_digits": {"STEPS": (1, 20), "COUNTS": (160,), "WIDTHS": (8, 16), "SEEDS": 1},
    "deblurring": {"SIDE": 64},
    "ggn": {
        "LOOKS": (0, 2, 4), "LATE": 4, "TRAIN": 200, "N": 20, "SUBSAMPLE": 30,
        "STEPS": dict.fromkeys(("gradient descent", "with momentum", "damped Newton"), 2),
    },
    "hessian": {"LAYERS": 6, "KEPT": (0, 40), "HARD": (3, 5, 4), "DEPTHS": FEW, "WIDTHS": FEW},
}  # fmt: skip
"""The stories of the report, with the constants that make each one quick."""

TIMED = ("ladder", "iteration_digits", "ggn", "hessian")
LEARN_BRIEFLY = {"ITERATIONS": 3}
TEXTS = ("when", "photograph", "image")
DEBLUR_BRIEFLY = {"SIDE": 24, "STEPS": 2, "RTOL": 1e-13}  # libraries are compared to 1e-9


def story(name, library="numpy", seed=0, **constants):
    with backend(library) as arrays, threadpool_limits(1):
        return runner.run(name, arrays, seed, constants=constants)


def use(patch, constants):
    """Let ``ddnref report`` tell the stories of `constants` only, with these constants."""
    patch.setattr(build, "STORIES", [name for name in build.STORIES if name in constants])
    patch.setattr(build, "run", lambda name, *a, **k: runner.run(name, *a, constants=constants[name], **k))


def run(out, *options):
    """Return the exit code and what was printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(["report", "--out", str(out), *options])
    return code, printed.getvalue()


def table(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One report with NumPy and whatever it is compared with that is installed."""
    out = tmp_path_factory.mktemp("report") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        use(patch, SMALL)
        patch.setattr("ddnref.examples._precision.SMALL", 16)
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
    monkeypatch.setattr(_peers, "installed", lambda name: False)
    brief = {name: value for name, value in SMALL.items() if name not in TIMED}
    use(monkeypatch, {**brief, "subspaces": LEARN_BRIEFLY, "deblurring": DEBLUR_BRIEFLY})


def test_files(report):
    out, _ = report
    pictures = {path.stem for path in out.glob("*.png")}
    numbers = {path.stem for path in out.glob("*.csv")}
    assert {
        "whitening-covariance", "whitening-digits", "whitening-photograph", "repeated_eigenvalues-error",
        "deblurring-photographs", "deblurring-kernels", "deblurring-course",
        "subspaces-course", "subspaces-weights", "subspaces-eigen-digits", "ladder-time", "rubber-sheet",
        "iteration_digits-gradients", "ggn-spectrum", "hessian-spectrum", "hessian-time", "hessian-errors",
    } <= pictures  # fmt: skip
    assert pictures - numbers == {"whitening-photograph"}  # every other picture has its numbers beside it
    assert len(list(out.iterdir())) == len(pictures) + len(numbers) + 1
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    for path in out.glob("*.csv"):
        assert len(table(path)) > 1


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.links, self.images, self.anchors, self.open = [], [], [], []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found[name] for name in ("src", "href") if name in found]
        self.images += [found] if tag == "img" else []
        self.anchors += [found["id"]] if "id" in found else []
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


def test_page_is_self_contained(report):
    out, _ = report
    text, found = parsed(out)
    assert found.links
    for link in found.links:
        assert link.startswith("data:image/png;base64,") or (link[0] == "#" and link[1:] in found.anchors)
    assert len(found.anchors) == len(set(found.anchors))
    assert len(found.images) == len(list(out.glob("*.png"))) + len(SMALL)  # and one for each card
    assert all(len(image["alt"]) > 20 for image in found.images)
    prose = re.sub(r"data:image/png;base64,[^\"]*", "", text).replace("http://www.w3.org/1998/Math/MathML", "")
    for outside in ("http", "file:", "@import", "url(", "<script", "<link", str(out), str(Path.home()), "/tmp"):
        assert outside not in prose
    assert 'name="viewport"' in text
    assert "<math" in text
    assert "✓" in text
    assert "ddnref report --backend numpy --seed 3" in prose
    for package in ("ddnref 0", "Python 3", "NumPy 2", "scikit-learn 1"):
        assert package in prose


def test_console_says_where_and_what(report):
    out, printed = report
    lines = printed.splitlines()
    assert lines[-1] == f"The page: {out / 'index.html'}"
    assert [line[:4] for line in lines[: len(SMALL)]] == [f"{i + 1}/{len(SMALL)} " for i in range(len(SMALL))]
    assert max(map(len, lines[:-1])) <= 80  # the last has a path
    assert "It reads " in printed
    assert printed.isascii()


def test_cards_come_before_any_chapter(report):
    """Every story says what it is good for: problem, picture, what one writes and what comes out."""
    text, _ = parsed(report[0])
    head, body = text.split("<main>")
    assert head.count("<article>") == head.count("<img ") == head.count("<pre>") == len(SMALL)
    assert "<article>" not in body
    for article in head.split("<article>")[1:]:
        assert re.search(r'<p><strong>[A-Z].*[.?]</strong></p><img .*<pre>.*ddnref\..*</pre><p>.*\.</p><p><a href="#',
                         article, re.DOTALL)  # fmt: skip


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
    text, _ = parsed(out)
    for label in ("gradient through whitening", "gradient of kernel and weight"):
        assert float(re.search(f"✓ {label}: error against finite differences: (.*?),", text)[1]) < 1e-7


def test_exact_at_repeated_eigenvalues(report):
    out, _ = report
    rows = table(out / "repeated_eigenvalues-errors.csv")
    assert [row["gap"] for row in rows] == [*(f"1e{-e:+03d}" for e in range(16)), "0 (repeated)"]
    for dtype in ("float64", "float32"):
        for m in (6, 64, 256):
            bound = 60 * np.finfo(dtype).eps * m**0.5
            assert all(float(row[f"ddnref, m = {m}, {dtype}: worst error"]) <= bound for row in rows)
    assert rows == table(out / "repeated_eigenvalues-error.csv")


@pytest.mark.parametrize(("name", "module"), [
    pytest.param(name, module, marks=pytest.mark.framework(module))
    for name, module in (("PyTorch", "torch"), ("JAX", "jax"))
])  # fmt: skip
def test_peers_are_really_there(report, name, module):
    out, _ = report
    rows = table(out / "repeated_eigenvalues-errors.csv")
    assert float(rows[0][f"{name}, float64: worst error"]) < 1e-12  # the same loss: right where the gap is wide
    compared = next(row for row in table(out / "subspaces-gradients.csv") if row["gradient"].startswith(f"{name},"))
    assert compared["NaN"].endswith("of 10")
    assert compared["error"] == "nan" or float(compared["error"]) < 1e-10
    text, _ = parsed(out)
    assert f"{name} {version(module)}" in text


# --- options ------------------------------------------------------------------------------------------------------


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_same_seed_same_bytes_and_peers_are_recorded(alone, tmp_path):
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        assert run(tmp_path / name, "--seed", seed)[0] == 0
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    for name in (
        "repeated_eigenvalues-errors.csv",
        "deblurring-course.csv",
        "subspaces-course.csv",
        "whitening-digits.csv",
        "index.html",
    ):
        assert first[name] != other[name]
    for folder, seed in (("a", ""), ("c", " with seed 0")):
        text, _ = parsed(tmp_path / folder)
        assert "PyTorch and JAX are not installed here" in text
        assert "python -m pip install torch jax" in text
        for label in _peers.peers().values():
            assert f"NaN for 7 of the ten digits in {label[:-1]}{seed})" in text
        assert "<td>not installed" not in text


@pytest.mark.parametrize("name", ["array-api-strict", *(
    pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))])  # fmt: skip
def test_other_backends(alone, tmp_path, name):
    assert run(tmp_path / "numpy")[0] == 0
    code, _ = run(tmp_path / "other", "--backend", name)
    assert code == 0
    text, _ = parsed(tmp_path / "other")
    assert f"Backend: {name} " in text
    for path in ("subspaces-course.csv", "whitening-digits.csv", "deblurring-photographs.csv"):
        here, there = (
            [[float(cell) for key, cell in row.items() if key not in TEXTS] for row in table(tmp_path / folder / path)]
            for folder in ("numpy", "other")
        )
        assert np.allclose(here, there, rtol=1e-9, atol=1e-9)


def test_default_folder(alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "STORIES", ["whitening"])
    assert main(["report"]) == 0
    assert (tmp_path / "ddnref-report" / "index.html").exists()


def test_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", "--out", str(tmp_path / "file")]) == 2
    assert "the folder for the report cannot be made" in capsys.readouterr().err


# --- a wrong result is noticed --------------------------------------------------------------------------------------


def slightly_wrong(correct):
    """The same function with every number in its result off by a millionth."""

    def off(found):
        if isinstance(found, (tuple, list)):
            changed = map(off, found)
            return type(found)(*changed) if hasattr(found, "_fields") else type(found)(changed)
        return (1 + 1e-6) * found if hasattr(found, "dtype") and "f" in str(found.dtype) else found

    return lambda *arguments, **options: off(correct(*arguments, **options))


@pytest.mark.parametrize(("name", "module", "function", "label"), [
    ("whitening", ddnref, "invsqrtm_vjp", "gradient through whitening"),
    ("whitening", ddnref, "invsqrtm_fwd", "covariance after whitening"),
    ("whitening", ddnref, "expm_vjp", "gradient of the mean"),
    ("repeated_eigenvalues", ddnref, "eigh_vjp", "every gap"),
    ("deblurring", ddnref, "linear_solve_vjp", "gradient of kernel and weight"),
    ("deblurring", ddnref.nodes, "project_simplex_vjp", "gradient of kernel and weight"),
    ("subspaces", ddnref, "eigh_topk_vjp", "gradient of the matrices"),
    ("rubber", ddnref, "spectral_function_jvp", "tangent stiffness"),
    ("low_rank", ddnref, "svdvals_vjp", "nuclear norm"),
    ("low_rank", ddnref, "svd_topk_vjp", "spectral norm"),
    ("eigsh_photograph", ddnref, "eigsh_vjp", "λ₂"),
    ("linear_solve", ddnref, "linear_solve_vjp", "b: linear_solve_vjp"),
    ("linear_solve", ddnref, "linear_solve_jvp", "ẋ: linear_solve_jvp"),
    ("robust_pooling", ddnref.nodes, "robust_pool_vjp", "quadratic"),
    ("procrustes", ddnref, "polar_vjp", "gradient of the weights"),
    ("sinkhorn", ddnref.nodes, "sinkhorn_vjp", "gradient of a random loss of the plan"),
    ("newton", HessianFactor, "solve", "damped Newton"),
    ("newton", ddnref.curvature, "hessian_eigvals", "saddle-free"),
])  # fmt: skip
def test_checks_notice_a_wrong_result(monkeypatch, name, module, function, label):
    monkeypatch.setattr(module, function, slightly_wrong(getattr(module, function)))
    told = story(name, **{"deblurring": DEBLUR_BRIEFLY, "subspaces": LEARN_BRIEFLY}.get(name, {}))
    assert told.failed.startswith(label)
    assert isinstance(told.parts[-1], Check)


def test_check_notices_that_the_plan_moves_with_the_cost(monkeypatch):
    monkeypatch.setattr(ddnref.nodes, "sinkhorn_vjp", lambda plan_bar, plan, *inputs: ((np.zeros_like(plan),), None))
    assert story("sinkhorn").failed.startswith("gradient of the transport cost")


def test_check_notices_the_wrong_root_of_the_secular_equation(monkeypatch):
    """The inertia overlooks one negative eigenvalue, so that a trial damping may lie below the largest pole."""
    correct = HessianFactor.inertia

    def one_less(self):
        found = correct(self)
        return found._replace(negative=max(found.negative - 1, 0))

    monkeypatch.setattr(HessianFactor, "inertia", one_less)
    told = story("newton")
    assert told.failed.startswith("trust region")
    assert next(part.label for part in told.parts if isinstance(part, Check)) == "damped Newton"


def test_failed_check_is_reported(monkeypatch, tmp_path):
    """The page says so, the other stories go on, and the command fails."""
    use(monkeypatch, {"whitening": {}, "repeated_eigenvalues": {}})
    monkeypatch.setattr(ddnref, "invsqrtm_vjp", slightly_wrong(ddnref.invsqrtm_vjp))
    code, printed = run(tmp_path)
    assert code == 1
    assert "FAILED: gradient through whitening: error against finite differences: 1.0e-06 is more than" in printed
    text, _ = parsed(tmp_path)
    assert '<span class="bad">✗ gradient through whitening' in text
    assert "This story ended here." in text
    assert "repeated_eigenvalues-error.png" in contents(tmp_path)


def test_known_gradient_is_the_gradient():
    told = story("repeated_eigenvalues").namespace
    x, c, x_bar = told["x"][3, 0], told["c"][3, 0], told["truth"][3, 0]  # m = 6, gap 1e-3
    d = np.random.default_rng(0).standard_normal(x.shape)
    d = d + d.T
    h = 1e-4

    def loss(s):
        return told["loss"](*np.linalg.eigh(x + s * d), c)

    slope = (8 * (loss(h) - loss(-h)) - (loss(2 * h) - loss(-2 * h))) / (12 * h)
    assert abs(slope - np.sum(x_bar * d)) < 1e-9 * np.linalg.norm(x_bar) * np.linalg.norm(d)


def test_nan_is_drawn_and_told(monkeypatch):
    """Some NaN at the last gap, and nothing finite at the one before."""

    def gradient(name, loss, x, c):
        wrong = np.ones_like(x)
        wrong[-1, :4], wrong[-2] = math.nan, math.inf
        return wrong

    monkeypatch.setattr(_peers, "autograd_gradient", gradient)
    monkeypatch.setattr(_peers, "installed", lambda name: True)
    told = story("repeated_eigenvalues", seed=1)
    worst, nans = (told.namespace[key]["float64"]["PyTorch"] for key in ("worst", "nans"))
    assert math.isfinite(worst[-1])
    assert math.isnan(worst[-2])
    assert list(nans[-3:]) == [0, 50, 4]
    axes, top = told.namespace["axes"][0], told.namespace["NAN"]
    at_top = [line for line in axes.lines if len(line.get_xdata()) and np.all(line.get_ydata() == top)]
    assert [len(line.get_xdata()) for line in at_top if len(line.get_xdata()) > 1] == [2, 2]
    assert f"wrong by {worst[-1]:.1g} and NaN for 4 of 50 matrices in PyTorch (orange)" in told.card.result


# --- figures of other frameworks ------------------------------------------------------------------------------------


def test_recorded_and_measured_figures_take_the_same_path(monkeypatch, tmp_path):
    """Measure, write the record, and read from it what was measured."""
    measured = {"a": [[1.23456e-3, math.inf], [0, 50]], "b": math.nan, "c": 7}
    monkeypatch.setattr(_peers, "RECORD", tmp_path / "recorded.json")
    monkeypatch.setattr(_peers, "_measured", {"PyTorch": {}, "JAX": {}})
    monkeypatch.setattr(_peers, "version", lambda module: "2.13.0+cpu")
    monkeypatch.setattr(_peers, "installed", lambda name: True)
    _peers.recorded.cache_clear()
    here = {key: _peers.figure(key, "JAX", lambda name, value=value: value) for key, value in measured.items()}
    assert _peers.figure("d", "JAX", lambda name: None) is None
    assert _peers.peers() == {"PyTorch": "PyTorch", "JAX": "JAX"}
    _peers.write_record()
    monkeypatch.setattr(_peers, "installed", lambda name: name == "PyTorch")
    there = {key: _peers.figure(key, "JAX", lambda name: 1 / 0) for key in measured}
    for key in measured:
        assert type(here[key]) is type(there[key])
        assert np.allclose(here[key], there[key], rtol=1e-3, equal_nan=True)
    assert _peers.figure("d", "JAX", lambda name: 1 / 0) is None
    assert re.fullmatch(r"JAX 2\.13 \(recorded \d{4}-\d\d-\d\d\)", _peers.peers()["JAX"])
    assert (tmp_path / "recorded.json").read_text().count("\n") == 18  # one line for each figure
    _peers.recorded.cache_clear()


def asked():
    """Patterns of the keys that examples ask for, and whether of PyTorch alone, from their source."""
    for path in runner.FOLDER.glob("plot_*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("figure", "with_peers"):
                key, second = call.args[:2]
                parts = key.values if isinstance(key, ast.JoinedStr) else [key]
                pattern = "".join(re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in parts)
                pattern += r" of .+ at \(.+\)" * (call.func.id == "with_peers")
                source = ast.unparse(second)
                yield pattern, "'PyTorch'" in source and "'JAX'" not in source


def test_the_record_has_what_examples_ask_for_and_nothing_else():
    """Whoever adds or renames a figure has to record it; test_profile.py has the sizes."""
    patterns = list(asked())
    assert len(patterns) >= 11
    for name, figures in _peers.recorded()["figures"].items():
        wanted = [pattern for pattern, of_pytorch in patterns if name == "PyTorch" or not of_pytorch]
        for pattern in wanted:
            assert any(re.fullmatch(pattern, key) for key in figures), (name, pattern)
        for key in figures:
            assert any(re.fullmatch(pattern, key) for pattern in wanted), (name, key)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.framework(module))
    for name, module in (("PyTorch", "torch"), ("JAX", "jax"))
])  # fmt: skip
def test_recorded_errors_are_those_that_are_measured(name):
    """Up to the rounding of other machines, in the sizes where errors are not yet chance."""
    told = story("repeated_eigenvalues")
    assert told.namespace["labels"][name] == name
    for dtype, count in (("float64", 12), ("float32", 5)):
        key = f"repeated eigenvalues: worst errors and numbers of NaN, {dtype}"
        worst, nans = np.asarray(_peers.recorded()["figures"][name][key], dtype=float)
        assert np.all(nans[:count] == 0)
        assert np.all(np.abs(np.log10(told.namespace["worst"][dtype][name] / worst))[:count] < 1)


def test_recording_needs_the_frameworks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "jax") else name)
    assert main(["report", "--record", "--out", str(tmp_path)]) == 2
    assert "needs torch and jax, which is not installed" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert main(["report", "--record", "--seed", "1", "--out", str(tmp_path)]) == 2
    assert "the record is of the default page" in capsys.readouterr().err


# --- the runner -----------------------------------------------------------------------------------------------------

SCRIPT = '''r"""
A title
=======

First :math:`x_i` text.
"""

SIZE = 10
print("one")
show("t", "A *caption*", ("a", "b"), [("x", 1.25)])
# a comment in code

# %%
# A heading
# ---------
# - `ddnref.eigh`
#
# .. math:: \\\\frac{1}{2}
print("two", SIZE)
# %%
check("fine", 1e-9, 1e-8)
check("wrong", 2e-8, 1e-8)
print("never")
'''.replace("\\\\", "\\")


@pytest.fixture
def script(monkeypatch, tmp_path):
    (tmp_path / "plot_script.py").write_text("from ddnref.examples import check, table as show\n" * 0 + SCRIPT)
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    monkeypatch.setattr("builtins.show", show_table, raising=False)
    monkeypatch.setattr("builtins.check", check, raising=False)


def test_script_is_split_as_the_gallery_does():
    parser = pytest.importorskip("sphinx_gallery.py_source_parser")
    for path in sorted(runner.FOLDER.glob("plot_*.py")):
        _, blocks = parser.split_code_and_text_blocks(str(path))
        theirs = [(kind, text.strip()) for kind, text, _ in blocks[1:]]
        ours = [("code" if isinstance(block, Code) else "text", block[0].strip())
                for block in runner.split(path.read_text(encoding="utf-8"))[1][1:]]  # fmt: skip
        assert [kind for kind, _ in ours] == [kind for kind, _ in theirs], path.name
        assert [text for kind, text in ours if kind == "text"] == [text for kind, text in theirs if kind == "text"]


def test_parts_in_their_order(script):
    told = story("script", SIZE=3)
    assert told.title == "A title"
    assert told.failed == "wrong: 2.0e-08 is more than 1e-08."
    kinds = [type(part) for part in told.parts]
    assert kinds == [Narrative, Code, Printed, Table, Narrative, Code, Printed, Code, Check, Check]
    assert told.parts[2].text == "one\n"
    assert told.parts[6].text == "two 3\n"
    assert told.parts[1].source.endswith("# a comment in code")
    text = page.page([told], [])
    for expected in ("<h3>A heading", "<em>caption</em>", "<mfrac>", "<li>", "ddnref.eigh</span>", "✗ wrong"):
        assert expected in text
    with pytest.raises(KeyError, match="The story script assigns no constant MISSING"):
        story("script", MISSING=1)


def test_mistake_in_a_narrative_is_an_error():
    assert html("``a`` and `b.c` and :func:`~d.e` and :doc:`words <page>`").count("literal") == 3
    with pytest.raises(Exception, match="Inline literal"):
        html("``not closed")


def test_page_marks_nan_and_escapes():
    parts = [Table("t", "c", ("x<y", "z"), [("a&b", math.nan), ("c", 0.125)], ".1e"), Printed("1<2")]
    card = Card("p<", b"\x89PNG" + bytes(20), "code<", "v&")
    text = page.page([Told("s", "T<", parts, card, "", {})], [("F", "1<2")], "n<")
    expected = ("x&lt;y", "a&amp;b", '<td class="bad">NaN</td>', "<td>1.2e-01</td>", "T&lt;", "1&lt;2", "p&lt;",
                "code&lt;", "v&amp;", "n&lt;")  # fmt: skip
    for part in expected:
        assert part in text


def test_gallery_prints(capsys):
    """Without a runner the same calls print, and nothing is recorded."""
    show_table("t", "Numbers.", ("name", "value"), [("a", 0.5), ("long name", math.nan)])
    card("A problem.", plt, "code", "Result: 1, 2")
    check("error", 1e-9, 1e-8)
    picture("p", plt, "c", "a")
    assert list(track([1, 2], "label")) == [1, 2]
    assert capsys.readouterr().out.splitlines() == [
        "Numbers.", "name         value", "a          5.0e-01", "long name      NaN", "Result: 1, 2",
        "error: 1.0e-09, at most 1e-08",
    ]  # fmt: skip
    for error in (1e-7, math.nan):
        with pytest.raises(CheckError):
            check("error", error, 1e-8)


def test_settings_and_progress_are_those_of_the_run(monkeypatch, tmp_path):
    (tmp_path / "plot_script.py").write_text('''"""Title\n"""
from ddnref.examples import settings, track
found = settings.full, settings.seed, settings.backend.name, list(track([1, 2], "a loop"))
''')
    monkeypatch.setattr(runner, "FOLDER", tmp_path)
    seen = []

    def follow(items, label):
        seen.append(label)
        return items

    with backend("array-api-strict") as library:
        told = runner.run("script", library, 5, full=True, track=follow)
    assert told.namespace["found"] == (True, 5, "array-api-strict", [1, 2])
    assert seen == ["a loop"]
    assert (settings.full, settings.seed, settings.backend.name) == (False, 0, "numpy")


def test_terminal_shows_progress_where_there_is_one():
    stream = io.StringIO()
    stream.isatty = lambda: True
    terminal = build.Terminal(stream)
    assert list(terminal.track(range(2), "learning")) == [0, 1]
    terminal.say("done")
    assert stream.getvalue() == "\r\x1b[K  learning 0/2\r\x1b[K  learning 1/2\r\x1b[Kdone\n"
