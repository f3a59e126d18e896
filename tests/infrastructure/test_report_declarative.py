"""The declarative node's comparison: every method is in the tables, skipped and missing are named.

No test reads the clock.
"""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

import ddnref
from ddnref import reference
from ddnref.examples import _measure, _passes, _peers, _precision
from ddnref.report import build
from ddnref.report.runner import Check, Picture, Printed, Table, run
from ddnref.verify._backends import backend
from ddnref.verify._cli import main

M = 12
WIDTHS = (8, M, 16)
SHORT = {"DDN-J", "DDN-E", "DDN-E, pinv", "IFT-J", "IFT-E, B stored", "IFT-E"}
OURS = {"fixed_point", "bordered"}


def fake(monkeypatch, *, memory=True, installed=("PyTorch", "JAX")):
    """One second for every pass but PI-DDN-J, which is measured at the first size only."""

    def seconds(source, sizes, patience, *, least, repeat):
        torch = source == _passes.PASSES["PyTorch"]
        return {
            (name, size): 1.0
            for size in sizes
            for name in _passes.names(size[-1])
            if name.startswith("AT") == torch and (name != "PI-DDN-J" or size[1] == sizes[0][1])
        }

    monkeypatch.setattr(_precision, "SMALL", M)
    monkeypatch.setattr(_precision, "BATCH", 2)
    monkeypatch.setattr(_measure, "seconds", seconds)
    monkeypatch.setattr(_measure, "peaks", lambda source, timed: dict.fromkeys(timed, 2**20) if memory else {})
    monkeypatch.setattr(_peers, "installed", lambda name: name in installed)


def story(*, full=True):
    constants = {"STEPS": (1, 20), "COUNTS": (160,), "WIDTHS": WIDTHS, "SEEDS": 1, "PATIENCE": 0.5}
    with backend("numpy") as library, threadpool_limits(1):
        return run("iteration_digits", library, full=full, constants=constants)


@pytest.fixture(scope="module")
def full():
    """The whole comparison, with all libraries there."""
    with pytest.MonkeyPatch.context() as patch:
        fake(patch)
        return story()


def tables(told):
    return {part.name: {row[0]: row[1:] for row in part.rows} for part in told.parts if isinstance(part, Table)}


def printed(told):
    return "".join(part.text for part in told.parts if isinstance(part, Printed))


def named(n):
    return {*(f"{'PI' if n == 1 else 'SI'}-{name}" for name in SHORT), *OURS}


def test_tables_have_all_methods_and_skipped_is_named(full):
    assert not full.failed
    shown = tables(full)
    assert set(shown["gradients-1"]) == set(shown["distributions"]) == {*named(1), "PI-Unroll", "PI-Unroll, raw"}
    assert set(shown["gradients-4"]) == {*named(4), "SI-Unroll"}
    assert set(shown["pairs"]) == {"gaussian", "uniform", "von Mises", "integers 0–10", "photographs"}
    assert all(np.isfinite(cells).all() for name in ("pairs", "gradients-4") for cells in shown[name].values())
    forward = {"AT forward", "SI forward", "AT", "SI-Unroll"}
    for kind, value in (("time", 1000.0), ("memory", 1.0)):
        assert set(shown[f"{kind}-1"]) == {*named(1), *forward, "PI forward", "PI-Unroll"}
        assert set(shown[f"{kind}-4"]) == {*named(4), *forward}
        assert shown[f"{kind}-1"]["PI-DDN-J"] == (value, "skipped", "skipped")
        assert all(cells == (value,) * 3 for cells in shown[f"{kind}-4"].values())
    assert f"PI-DDN-J at (2, {M}, 1) skipped: 5.1 s expected, 0.5 s allowed" in printed(full)  # (12 / 8)⁴
    assert printed(full).count(" s expected, ") == 2
    pictures = [part for part in full.parts if isinstance(part, Picture)]
    assert [part.name for part in pictures] == [
        "eigen-digits", "steps", "gradients", "residuals", "time-by-size", "memory-by-size",
    ]  # fmt: skip
    assert all(len(row) == len(part.columns) for part in pictures for row in part.rows)


def test_one_table_and_one_picture_by_default(monkeypatch):
    fake(monkeypatch)
    told = story(full=False)
    assert not told.failed
    ((name, shown),) = tables(told).items()
    assert name == "passes"
    forward = {"AT forward", "PI forward", "SI forward", "AT", "SI-Unroll", "PI-Unroll, raw"}
    assert set(shown) == {*named(1), "PI-Unroll", *forward}
    assert shown["AT"] == ("", "", 1.0, 1.0)
    assert shown["bordered"][2:] == (1.0, 1.0)
    assert {size[1] for _, size in told.namespace["seconds"]} == {M}
    assert [part.name for part in told.parts if isinstance(part, Picture)] == ["eigen-digits", "steps", "gradients"]


def test_the_numbers_say_who_is_right(full):
    shown = tables(full)["gradients-1"]
    for name, errors in shown.items():
        for error, dtype in zip(errors, ("float32", "float32", "float64", "float64"), strict=True):
            right = error <= 200 * np.finfo(dtype).eps
            assert right == (name not in {"PI-DDN-J", "PI-DDN-E", "PI-Unroll, raw"}), (name, dtype, error)
    for name, errors in tables(full)["passes"].items():
        if name in shown:
            assert errors[:2] == (shown[name][1], shown[name][3])
    error = tables(full)["passes"]["bordered"][0]
    assert f"ours is wrong by {error:.0e} in float32" in full.card.result


@pytest.mark.parametrize(("module", "name", "label"), [
    (ddnref, "simultaneous_iteration_vjp", "bordered, converged"),
    (ddnref, "power_iteration_vjp", "gradient by PI-Unroll, float64"),
    (reference, "ift_vjp_structured", "gradient by PI-IFT-E, float64"),
])  # fmt: skip
def test_a_wrong_gradient_is_noticed(monkeypatch, module, name, label):
    """One hundred-millionth off: less than the error of float32."""
    correct = getattr(module, name)

    def wrong(*arguments, **options):
        return correct(*arguments, **options) * (1 + 2e-8)

    fake(monkeypatch)
    monkeypatch.setattr(module, name, wrong)
    monkeypatch.setitem(_passes.BACKWARD, "IFT-E", wrong if module is reference else _passes.BACKWARD["IFT-E"])
    told = story(full=False)
    assert told.failed.startswith(label)
    *before, _ = (part for part in told.parts if isinstance(part, Check))
    assert all(part.error <= part.limit for part in before)


def test_missing_torch_is_recorded(monkeypatch):
    """Recorded figures are shown at the size of the page, and other sizes are said not to be recorded."""
    fake(monkeypatch, installed=("JAX",))
    shown = tables(story())
    for name in ("time-1", "time-4", "memory-1", "memory-4"):
        for label, cells in shown[name].items():
            assert (cells == ("not recorded",) * len(cells)) == label.startswith("AT"), label
    monkeypatch.setattr(_precision, "SMALL", 64)
    monkeypatch.setattr(_precision, "BATCH", 5)
    with backend("numpy") as library, threadpool_limits(1):
        told = run(
            "iteration_digits", library, constants={"STEPS": (1, 20), "COUNTS": (160,), "WIDTHS": (8,), "SEEDS": 1}
        )
    kept = _peers.recorded()["figures"]["PyTorch"]
    assert tables(told)["passes"][f"AT, {_peers.peers()['PyTorch']}"] == (
        "", "", kept["iteration: time of AT at (5, 64, 1)"], kept["iteration: peak memory of AT at (5, 64, 1)"] / 2**20,
    )  # fmt: skip


def test_no_memory_is_said(monkeypatch):
    fake(monkeypatch, memory=False)
    shown = tables(story(full=False))["passes"]
    assert {cells[3] for name, cells in shown.items() if "raw" not in name} == {"unknown"}


@pytest.mark.parametrize("full", [False, True])
def test_full_is_the_tutorials_plan(monkeypatch, full):
    seen = {}

    def seconds(source, sizes, patience, *, least, repeat):
        seen["time"] = sizes, patience, least, repeat
        return {}

    def precision(sizes, seeds, *, full):
        seen["precision"] = tuple(sizes), seeds, full
        raise EOFError

    monkeypatch.setattr(_measure, "seconds", seconds)
    monkeypatch.setattr(_measure, "peaks", lambda source, timed: {})
    monkeypatch.setattr(_precision, "precision", precision)
    with pytest.raises(EOFError), backend("numpy") as library:
        run("iteration_digits", library, seed=5, full=full, constants={"STEPS": (1, 2), "COUNTS": (160,)})
    widths = (32, 64, 128, 256, 512, 1024)
    if full:
        assert seen["time"] == ([(5, m, n) for n in (1, 4) for m in widths], 20.0, 10, 0.1)
        assert seen["precision"] == (widths, range(5, 105), True)
    else:
        assert seen["time"] == ([(5, 64, 1)], 1.5, 3, 0.03)
        assert seen["precision"] == ((32, 64, 128), range(5, 7), False)


@pytest.mark.parametrize("options", [[], ["--full"]])
def test_the_option_reaches_the_story(options, monkeypatch, tmp_path):
    seen = []

    def tell(name, backend, seed, *, full, **options):
        seen.append(full)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "run", tell)
    with pytest.raises(KeyboardInterrupt):
        main(["report", "--out", str(tmp_path), *options])
    assert seen == [bool(options)]


# --- the rules for skipping ---------------------------------------------------------------------------------------


def test_memory_that_would_not_do_is_skipped(monkeypatch):
    assert _passes.expected_bytes("PI-IFT-E", (5, 1024, 1)) == 0.0
    assert _passes.expected_bytes("SI-DDN-J", (5, 64, 4)) == 24 * 5 * 4 * 64**3
    assert _passes.expected_bytes("SI-IFT-J", (5, 64, 4)) == 8 * 5 * 64**3
    size = (2, M, 1)
    everything = set(_passes.numpy_passes(size))
    assert everything == {name for name in _passes.names(1) if not name.startswith("AT")}
    monkeypatch.setattr(_passes, "MEMORY", 1000)
    assert everything - set(_passes.numpy_passes(size)) == {"PI-DDN-J", "PI-IFT-J", "PI-IFT-E, B stored"}
    fake(monkeypatch)
    told = story(full=False)
    assert told.namespace["state"]("PI-IFT-J", (5, 8, 1)).endswith("GiB expected")


def test_a_size_whose_precision_takes_too_long_is_skipped(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(_precision.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(
        _precision,
        "compare",
        lambda *key, full: iter([(_precision.Key(*key[:3], "", "", "y"), np.ones(1))]),
    )
    found = _precision.precision((8, 16, 64), range(2), full=True, patience=16.0)
    assert {key.m for key in found.errors} == {8, 16}
    assert found.skipped == {64: 256.0}
    found = _precision.precision((8, 16), range(2), full=True, patience=15.0)
    assert found.skipped == {16: 16.0}


def test_skipped_precision_is_told(monkeypatch):
    fake(monkeypatch)
    correct = _precision.precision
    monkeypatch.setattr(_precision, "precision", lambda *a, **k: correct(*a, **k)._replace(skipped={16: 16.0}))
    assert "precision at m = 16 skipped: 16 s per seed expected" in printed(story(full=False))


def test_other_process_finds_the_passes():
    found = _measure.seconds(_passes.PASSES["NumPy"], [(1, 4, 1), (1, 4, 4)], 1e6, least=1, repeat=1e-3)
    expected = {(name, (1, 4, n)) for n in (1, 4) for name in _passes.names(n) if name[:2] != "AT"}
    assert set(found) == expected


# --- the problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", _passes.DISTRIBUTIONS)
def test_matrices(name):
    x = _passes.matrices(name, 3, 10, seed=1)
    assert x.shape == (3, 10, 10)
    assert x.dtype == np.float32
    assert np.array_equal(x, np.swapaxes(x, -1, -2))
    assert np.min(x) >= 0
    w = np.linalg.eigvalsh(x.astype(float))
    assert np.all(w[:, -1] > np.abs(w[:, 0]))
    assert np.array_equal(x, _passes.matrices(name, 3, 10, seed=1))
    assert not np.array_equal(x, _passes.matrices(name, 3, 10, seed=2))


def test_cotangents():
    assert np.array_equal(_passes.cotangent("ones", (2, 3), 0), np.ones((2, 3)))
    assert np.std(_passes.cotangent("random", (50,), 0)) > 0.5


def test_nan_does_not_pass_for_a_small_error():
    key = _precision.Key("gaussian", 8, 1, "float32", "PI", "PI-DDN-E", "random")
    found = _precision.Precision({key: [1.0, float("nan"), float("nan")]}, {})
    assert found.median(key) == found.worst(key) == np.inf
    assert np.isnan(found.median(key._replace(m=9)))
