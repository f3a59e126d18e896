"""The profile section: memory is measured right, what is skipped or missing is named. No test reads the clock."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from ddnref.report import cost, peers, pictures, profile
from ddnref.report.content import Context, Picture, Table, Text
from ddnref.verify._backends import backend

MIB = 2**20
RUNGS = ("v1", "v2", "v3", "final")

needs_proc = pytest.mark.skipif(cost._address_space() is None, reason="no address space in /proc on this system")


def allocate(*sizes):
    """One array after the other, in MiB; each is gone before the next."""
    for size in sizes:
        np.ones(size * MIB, dtype=np.int8)


@needs_proc
def test_peak_of_a_known_allocation():
    assert abs(cost.peak(lambda: allocate(64)) - 64 * MIB) < MIB


@needs_proc
def test_peak_is_the_largest_not_the_sum_and_forgets_the_past():
    allocate(512)  # the record of this process, which must not hide what follows
    assert abs(cost.peak(lambda: allocate(64, 48, 64)) - 64 * MIB) < MIB
    assert cost.peak(lambda: None) < MIB


@needs_proc
def test_peak_counts_what_is_held_together():
    assert abs(cost.peak(lambda: [np.ones(48 * MIB, dtype=np.int8), allocate(32)]) - 80 * MIB) < MIB


def test_no_peak_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(cost, "_address_space", lambda: None)
    assert cost.peak(lambda: allocate(1)) is None


@needs_proc
def test_other_process_agrees_with_tracemalloc(monkeypatch):
    """Where tracemalloc sees everything: v1 asks LAPACK, whose workspace it does not see."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # each thread has buffers, and how they overlap is chance
    size = (5, 128)
    calls = cost.PASSES["NumPy"](cost.problem(size))
    found = cost.peaks("NumPy", {(name, size): 0.0 for name in ("v2", "v3", "final")})
    for (name, _), value in found.items():
        calls[name]()
        tracemalloc.start()
        calls[name]()
        exact = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert value == pytest.approx(exact, rel=0.1), name
    assert len(found) == 3


@needs_proc
@pytest.mark.parametrize(("library", "module"), [
    pytest.param(library, module, marks=pytest.mark.framework(module))
    for library, module in (("PyTorch", "torch"), ("JAX", "jax"))
])  # fmt: skip
def test_memory_of_peers_is_seen(library, module):
    """The gradient alone is one input; nobody needs ten."""
    size = (5, 256)
    found = cost.peaks(library, {(library, size): 0.0})
    assert 1.0 <= found[library, size] / (5 * 256**2 * 4) < 10.0


def test_a_failing_process_is_told():
    with pytest.raises(RuntimeError, match=r"measuring Nothing .*\n(?s:.*)KeyError: 'Nothing'"):
        cost.seconds("Nothing", ((1, 2),))


def test_passes_are_the_right_ones():
    calls = cost.PASSES["NumPy"](cost.problem((2, 8)))
    assert list(calls) == ["NumPy forward", *RUNGS]
    gradients = [calls[name]() for name in RUNGS]
    for gradient in gradients[:-1]:
        assert np.linalg.norm(gradient - gradients[-1]) < 1e-3 * np.linalg.norm(gradients[-1])


# --- the rule for skipping ----------------------------------------------------------------------------------------


def test_expected_time():
    known = {("v1", (5, 32)): 1.0, ("v1", (5, 64)): 0.5, ("v3", (5, 128)): 9.0}
    assert cost.expected("v1", (10, 128), known) == 2 * 16 * 0.5  # from the largest size of this pass
    assert cost.expected("v2", (5, 128), known) == 0.0


def test_nobody_waits_longer_than_patience():
    found = cost.seconds("NumPy", ((1, 4), (1, 8)), patience=0.0)
    assert {size for _, size in found} == {(1, 4)}
    found = cost.seconds("NumPy", ((1, 4), (1, 8)), patience=0.0, always=("NumPy forward",))
    assert {name for name, size in found if size == (1, 8)} == {"NumPy forward"}
    found = cost.seconds("NumPy", ((1, 4), (1, 8)), patience=1e6)
    assert set(found) == {(name, size) for name in ("NumPy forward", *RUNGS) for size in ((1, 4), (1, 8))}


# --- the section --------------------------------------------------------------------------------------------------

SIZES = ((1, 128), (1, 256))


def fake(monkeypatch, *, memory=True):
    """One second for every pass but v1, which is not measured at the second size."""

    def names(library):
        return [name for name, one in profile.PASSES.items() if one.library == library]

    def seconds(library, sizes, *, always):
        assert always == (profile.UNIT,)
        return {(name, size): 1.0 for name in names(library) for size in sizes if (name, size) != ("v1", SIZES[1])}

    monkeypatch.setattr(profile, "SIZES", SIZES)
    monkeypatch.setattr(cost, "seconds", seconds)
    monkeypatch.setattr(cost, "peaks", lambda library, timed: dict.fromkeys(timed, 2**20) if memory else {})


def content():
    with backend("numpy") as library, pictures.style():
        return profile.SECTION.run(Context(library, 0, lambda items, description: items))


def tables(found):
    return {part.name: {row[0]: row[1:] for row in part.rows} for part in found.parts if isinstance(part, Table)}


def test_all_passes_are_in_the_tables_and_skipped_is_named(monkeypatch):
    fake(monkeypatch)
    monkeypatch.setattr(peers, "_installed", lambda module: True)
    monkeypatch.setattr(peers, "version", lambda module: "1")
    found = content()
    times, peaks = tables(found)["times"], tables(found)["peaks"]
    assert set(times) == {"NumPy forward, in ms", *profile.PASSES}
    assert set(peaks) == {*RUNGS, "PyTorch", "JAX"}
    assert times["v1"] == (1.0, "skipped")
    assert peaks["v1"] == (2**20 / (128**2 * 4), "skipped")
    assert times["NumPy forward, in ms"] == (1000.0, 1000.0)
    told = next(part.html for part in found.parts if isinstance(part, Text) and part.html.startswith("Skipped"))
    assert "v1 at (1, 256) (16 s expected)" in told
    assert "v2" not in told
    for part in found.parts:
        if isinstance(part, Picture):
            assert "v1 skipped" in [text.get_text() for text in part.drawing.axes[0].texts]


@pytest.mark.parametrize("module", ["torch", "jax"])
def test_missing_peer_is_named(monkeypatch, module):
    fake(monkeypatch)
    monkeypatch.setattr(peers, "_installed", lambda name: name != module)
    monkeypatch.setattr(peers, "version", lambda name: "1")
    missing = {"torch": "PyTorch", "jax": "JAX"}[module]
    found = content()
    for table in tables(found).values():
        assert table[missing] == ("not installed",) * len(table[missing])
        assert not any("not installed" in row for name, row in table.items() if not name.startswith(missing))
    assert f"{missing} not installed" in found.headlines[0].values
    for part in found.parts:
        if isinstance(part, Picture):
            labels = [text.get_text() for text in part.drawing.legends[0].get_texts()]
            assert f"{missing}: not installed" in labels
            assert "final" in labels


def test_small_inputs_have_no_memory(monkeypatch):
    fake(monkeypatch)
    monkeypatch.setattr(profile, "SIZES", ((5, 32), *SIZES))
    times, peaks = tables(content()).values()
    assert len(times["final"]) == 3
    assert len(peaks["final"]) == 2


def test_no_memory_is_said(monkeypatch):
    fake(monkeypatch, memory=False)
    found = content()
    assert "peaks" not in tables(found)
    assert "Peak memory is not shown" in found.parts[-1].html
