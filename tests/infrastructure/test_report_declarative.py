"""The declarative section: every method is in the tables, skipped and missing are named. No test reads the clock."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ddnref.report import build, cost, declarative, declarative_passes, matrices, peers, pictures
from ddnref.report import declarative_precision as exact
from ddnref.report.content import Context, Picture, Table, Text
from ddnref.verify._backends import backend
from ddnref.verify._cli import main

M = 12
PLAN = declarative.Plan((8, M, 16), (1, 4), seeds=1, calls=1, repeat=0.0, patience=0.5, command="ddnref report")
SHORT = {"DDN-J", "DDN-E", "DDN-E, pinv", "IFT-J", "IFT-E, B stored", "IFT-E"}
OURS = {"fixed_point", "bordered"}


def fake(monkeypatch, *, memory=True, installed=("torch", "jax")):
    """A small plan; one second for every pass but PI-DDN-J, which is measured at the first size only."""

    def seconds(process, sizes, patience, *, least, repeat):
        assert (patience, least, repeat) == (PLAN.patience, PLAN.calls, PLAN.repeat)
        torch = process == declarative_passes.PROCESSES["PyTorch"]
        return {
            (name, size): 1.0
            for size in sizes
            for name in declarative_passes.names(size[-1])
            if name.startswith("AT") == torch and (name != "PI-DDN-J" or size[1] == PLAN.widths[0])
        }

    for module in (declarative, exact):
        monkeypatch.setattr(module, "SMALL", M)
    monkeypatch.setattr(exact, "BATCH", 2)
    monkeypatch.setattr(declarative, "QUICK", PLAN)
    monkeypatch.setattr(cost, "seconds", seconds)
    monkeypatch.setattr(cost, "peaks", lambda process, timed: dict.fromkeys(timed, 2**20) if memory else {})
    monkeypatch.setattr(peers, "_installed", lambda module: module in installed)
    monkeypatch.setattr(peers, "version", lambda module: "1")


def content():
    with backend("numpy") as library, pictures.style(), threadpool_limits(1):
        return declarative.SECTION.run(Context(library, 0, lambda items, description: items))


def tables(found):
    return {part.name: {row[0]: row[1:] for row in part.rows} for part in found.parts if isinstance(part, Table)}


def named(n):
    return {*(f"{'PI' if n == 1 else 'SI'}-{name}" for name in SHORT), *OURS}


def test_tables_have_all_methods_and_skipped_is_named(monkeypatch):
    fake(monkeypatch)
    found = content()
    shown = tables(found)
    assert set(shown["gradients-1"]) == set(shown["distributions"]) == {*named(1), "PI-Unroll", "PI-Unroll, raw"}
    assert set(shown["gradients-4"]) == {*named(4), "SI-Unroll"}
    assert set(shown["pairs"]) == {"gaussian", "uniform", "von Mises", "integers 0–10", "photographs"}
    forward = {"AT forward", "SI forward", "AT", "SI-Unroll"}
    for kind, value in (("time", 1000.0), ("memory", 1.0)):
        assert set(shown[f"{kind}-1"]) == {*named(1), *forward, "PI forward", "PI-Unroll"}
        assert set(shown[f"{kind}-4"]) == {*named(4), *forward}
        assert shown[f"{kind}-1"]["PI-DDN-J"] == (value, "skipped", "skipped")
        assert all(cells == (value,) * 3 for cells in shown[f"{kind}-4"].values())
    told = next(part.html for part in found.parts if isinstance(part, Text) and part.html.startswith("Skipped"))
    assert f"PI-DDN-J at (5, {M}, 1) (5.1 s expected, 0.5 s allowed)" in told  # (12 / 8)⁴
    assert told.count(" expected, ") == 2
    assert all("ddnref report</code>" in part.caption for part in found.parts if isinstance(part, Picture))
    assert "1 seeds, m up to 16. <code>ddnref report --full</code>" in found.parts[1].html


def test_the_numbers_say_who_is_right(monkeypatch):
    fake(monkeypatch)
    found = content()
    shown = tables(found)["gradients-1"]
    for name, errors in shown.items():
        for error, dtype in zip(errors, ("float32", "float32", "float64", "float64"), strict=True):
            right = error <= 200 * np.finfo(dtype).eps
            assert right == (name not in {"PI-DDN-J", "PI-DDN-E", "PI-Unroll, raw"}), (name, dtype, error)
    assert found.headlines[0].values[0].startswith("ddnref bordered ")
    assert found.headlines[0].values[1].startswith("tutorial's DDN-E, solve ")


def test_missing_torch_is_named(monkeypatch):
    fake(monkeypatch, installed=("jax",))
    shown = tables(content())
    for name in ("time-1", "time-4", "memory-1", "memory-4"):
        for label, cells in shown[name].items():
            missing = ("PyTorch not installed",) * len(cells)
            assert (cells == missing) == label.startswith("AT"), label


def test_no_memory_is_said(monkeypatch):
    fake(monkeypatch, memory=False)
    found = content()
    assert "memory-1" not in tables(found)
    assert any(isinstance(part, Text) and part.html.startswith("Peak memory is not shown") for part in found.parts)


def test_full_is_the_tutorials_plan():
    quick, full = declarative.plan(full=False), declarative.plan(full=True)
    assert (full.seeds, full.calls, full.patience) == (100, 10, 20.0)
    assert full.widths == (32, 64, 128, 256, 512, 1024)
    assert quick.widths == (32, 64, 128)
    assert quick.seeds < 10
    assert quick.sizes[0] == (5, 32, 1)
    assert quick.sizes[-1] == (5, 128, 4)
    assert full.command == "ddnref report --full"


@pytest.mark.parametrize("options", [[], ["--full"]])
def test_the_option_reaches_the_section(options, monkeypatch, tmp_path):
    seen = []

    def run(context):
        seen.append(context.full)
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "SECTIONS", (declarative.SECTION._replace(run=run),))
    with pytest.raises(KeyboardInterrupt):
        main(["report", "--out", str(tmp_path), *options])
    assert seen == [bool(options)]


def test_the_plan_follows_the_option(monkeypatch):
    seen = []
    monkeypatch.setattr(
        declarative, "measure", lambda context, what: seen.append(what) or (_ for _ in ()).throw(EOFError)
    )
    for full in (False, True):
        with pytest.raises(EOFError):
            declarative.SECTION.run(Context(None, 0, None, full))
    assert seen == [declarative.QUICK, declarative.FULL]


# --- the rules for skipping ---------------------------------------------------------------------------------------


def test_memory_that_would_not_do_is_skipped(monkeypatch):
    assert declarative_passes.expected_bytes("PI-IFT-E", (5, 1024, 1)) == 0.0
    assert declarative_passes.expected_bytes("SI-DDN-J", (5, 64, 4)) == 24 * 5 * 4 * 64**3
    assert declarative_passes.expected_bytes("SI-IFT-J", (5, 64, 4)) == 8 * 5 * 64**3
    size = (5, 8, 1)
    everything = set(declarative_passes.numpy_passes(size))
    assert everything == {name for name in declarative_passes.names(1) if not name.startswith("AT")}
    monkeypatch.setattr(declarative_passes, "MEMORY", 1000)
    monkeypatch.setattr(declarative, "MEMORY", 1000)
    assert everything - set(declarative_passes.numpy_passes(size)) == {"PI-DDN-J", "PI-IFT-J", "PI-IFT-E, B stored"}
    costs = declarative.Costs({}, {}, ())
    assert declarative.state(costs, PLAN, "PI-IFT-J", size).endswith("GiB expected")


def test_a_size_whose_precision_takes_too_long_is_skipped(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(exact.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(exact, "_compare", lambda *key: iter([(exact.Key(*key[:3], "", "", "y"), np.ones(1))]))
    found = exact.precision((8, 16, 64), range(2), patience=16.0)
    assert {key.m for key in found.errors} == {8, 16}
    assert found.skipped == {64: 256.0}
    found = exact.precision((8, 16), range(2), patience=15.0)
    assert found.skipped == {16: 16.0}
    told = declarative.skipped(declarative.Costs({}, {}, ("PyTorch",)), found, PLAN._replace(widths=()))
    assert told == ["precision at m = 16 (16 s a seed expected)"]


def test_other_process_finds_the_passes():
    process = declarative_passes.PROCESSES["NumPy"]
    found = cost.seconds(process, [(1, 4, 1), (1, 4, 4)], 1e6, least=1, repeat=1e-3)
    expected = {(name, (1, 4, n)) for n in (1, 4) for name in declarative_passes.names(n) if name[:2] != "AT"}
    assert set(found) == expected


# --- the problems -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", matrices.DISTRIBUTIONS)
def test_matrices(name):
    x = matrices.matrices(name, 3, 10, seed=1)
    assert x.shape == (3, 10, 10)
    assert x.dtype == np.float32
    assert np.array_equal(x, np.swapaxes(x, -1, -2))
    assert np.min(x) >= 0
    w = np.linalg.eigvalsh(x.astype(float))
    assert np.all(w[:, -1] > np.abs(w[:, 0]))
    assert np.array_equal(x, matrices.matrices(name, 3, 10, seed=1))
    assert not np.array_equal(x, matrices.matrices(name, 3, 10, seed=2))


def test_cotangents():
    assert np.array_equal(matrices.cotangent("ones", (2, 3), 0), np.ones((2, 3)))
    assert np.std(matrices.cotangent("random", (50,), 0)) > 0.5


def test_nan_does_not_pass_for_a_small_error():
    key = exact.Key("gaussian", 8, 1, "float32", "PI", "PI-DDN-E", "random")
    found = exact.Precision({key: [1.0, float("nan"), float("nan")]}, {})
    assert exact.median(found, key) == exact.worst(found, key) == np.inf
    assert np.isnan(exact.median(found, key._replace(m=9)))
