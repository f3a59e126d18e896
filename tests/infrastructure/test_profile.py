"""The ladder's story: memory is measured right, what is skipped or missing is named. No test reads the clock."""

from __future__ import annotations

import json
import mmap
import subprocess
import sys

import numpy as np
import pytest

import ddnref
from ddnref import reference
from ddnref.examples import _measure, _passes, _peers
from ddnref.report.runner import Check, Picture, Printed, Table, run
from ddnref.verify._backends import backend

MIB = 2**20
RUNGS = ("v1", "v2", "v3", "final")

needs_proc = pytest.mark.skipif(_measure.address_space() is None, reason="no address space in /proc on this system")


def allocate(*sizes):
    """One mapping after the other, in MiB; each is gone before the next. An array may reuse what other tests freed."""
    for size in sizes:
        mmap.mmap(-1, size * MIB).close()


@needs_proc
def test_peak_of_a_known_allocation():
    assert abs(_measure.peak(lambda: allocate(64)) - 64 * MIB) < MIB


@needs_proc
def test_peak_is_the_largest_not_the_sum_and_forgets_the_past():
    allocate(512)  # the record of this process, which must not hide what follows
    assert abs(_measure.peak(lambda: allocate(64, 48, 64)) - 64 * MIB) < MIB
    assert _measure.peak(lambda: None) < MIB


@needs_proc
def test_peak_counts_what_is_held_together():
    assert abs(_measure.peak(lambda: [mmap.mmap(-1, 48 * MIB), allocate(32)]) - 80 * MIB) < MIB


def test_no_peak_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(_measure, "address_space", lambda: None)
    assert _measure.peak(lambda: allocate(1)) is None


TRACED = """
import json, sys, tracemalloc
from ddnref.examples import _passes
calls, found = _passes.numpy_ladder((5, 128)), {}
for name in sys.argv[1:]:
    calls[name]()
    tracemalloc.start()
    calls[name]()
    found[name] = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
print(json.dumps(found))
"""


@needs_proc
def test_other_process_agrees_with_tracemalloc(monkeypatch):
    """Compare the rungs whose memory tracemalloc sees in full; v1 uses LAPACK's workspace, which it does not see.

    tracemalloc runs in a fresh process too: after other tests in the same process it saw 1.19 times as much for v3.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # each thread has buffers, and how they overlap is chance
    names = ("v2", "v3", "final")
    found = _measure.peaks(_passes.LADDER["NumPy"], {(name, (5, 128)): 0.0 for name in names})
    command = [sys.executable, "-c", TRACED, *names]
    exact = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for (name, _), value in found.items():
        assert value == pytest.approx(exact[name], rel=0.1), name
    assert len(found) == 3


@needs_proc
@pytest.mark.parametrize(("library", "module"), [
    pytest.param(library, module, marks=pytest.mark.framework(module))
    for library, module in (("PyTorch", "torch"), ("JAX", "jax"))
])  # fmt: skip
def test_memory_of_peers_is_seen(library, module):
    """The gradient alone is one input; nobody needs ten."""
    size = (5, 256)
    found = _measure.peaks(_passes.LADDER[library], {(library, size): 0.0})
    assert 1.0 <= found[library, size] / (5 * 256**2 * 4) < 10.0


def test_a_failing_process_is_told():
    with pytest.raises(RuntimeError, match=r"measuring ddnref:nothing .*\n(?s:.*)no attribute 'nothing'"):
        _measure.seconds("ddnref:nothing", ((1, 2),))


def test_passes_are_the_right_ones():
    calls = _passes.numpy_ladder((2, 8))
    assert list(calls) == ["NumPy forward", *RUNGS]
    gradients = [calls[name]() for name in RUNGS]
    for gradient in gradients[:-1]:
        assert np.linalg.norm(gradient - gradients[-1]) < 1e-3 * np.linalg.norm(gradients[-1])


# --- the rule for skipping ----------------------------------------------------------------------------------------


def test_expected_time():
    known = {("v1", (5, 32)): 1.0, ("v1", (5, 64)): 0.5, ("v3", (5, 128)): 9.0}
    assert _measure.expected("v1", (10, 128), known) == 2 * 16 * 0.5  # from the largest size of this pass
    assert _measure.expected("v2", (5, 128), known) == 0.0


def test_nobody_waits_longer_than_patience():
    found = _measure.seconds(_passes.LADDER["NumPy"], ((1, 4), (1, 8)), patience=0.0)
    assert {size for _, size in found} == {(1, 4)}
    found = _measure.seconds(_passes.LADDER["NumPy"], ((1, 4), (1, 8)), patience=0.0, always=("NumPy forward",))
    assert {name for name, size in found if size == (1, 8)} == {"NumPy forward"}
    found = _measure.seconds(_passes.LADDER["NumPy"], ((1, 4), (1, 8)), patience=1e6)
    assert set(found) == {(name, size) for name in ("NumPy forward", *RUNGS) for size in ((1, 4), (1, 8))}


# --- the story ----------------------------------------------------------------------------------------------------

SIZES = ((1, 128), (1, 256))
LIBRARIES = {**dict.fromkeys(("NumPy forward", *RUNGS), "NumPy"), "PyTorch forward": "PyTorch", "PyTorch": "PyTorch",
             "JAX forward": "JAX", "JAX": "JAX"}  # fmt: skip


def fake(monkeypatch, *, memory=True, missing=None):
    """One second for every pass but v1, which is not measured at the second size."""

    def seconds(source, sizes, patience, *, always):
        assert always == ("NumPy forward",)
        names = [name for name, library in LIBRARIES.items() if _passes.LADDER[library] == source]
        return {(name, size): 1.0 for name in names for size in sizes if (name, size) != ("v1", SIZES[1])}

    monkeypatch.setattr(_measure, "seconds", seconds)
    monkeypatch.setattr(_measure, "peaks", lambda source, timed: dict.fromkeys(timed, 2**20) if memory else {})
    monkeypatch.setattr(_peers, "installed", lambda name: name != missing)
    monkeypatch.setattr(_peers, "version", lambda name: "1")


def story(sizes=SIZES, **constants):
    with backend("numpy") as library:
        return run("ladder", library, constants={"SIZES": sizes, **constants})


def tables(told):
    return {part.name: {row[0]: row[1:] for row in part.rows} for part in told.parts if isinstance(part, Table)}


def printed(told):
    return "".join(part.text for part in told.parts if isinstance(part, Printed))


def test_all_passes_are_in_the_tables_and_skipped_is_named(monkeypatch):
    fake(monkeypatch)
    told = story()
    assert not told.failed
    times, peaks = tables(told)["times"], tables(told)["peaks"]
    assert set(times) == {"NumPy forward, in ms", *LIBRARIES}
    assert set(peaks) == {*RUNGS, "PyTorch", "JAX"}
    assert times["v1"] == (1.0, "skipped")
    assert peaks["v1"] == (2**20 / (128**2 * 4), "skipped")
    assert times["NumPy forward, in ms"] == (1000.0, 1000.0)
    assert "v1 at (1, 256) skipped: 16 s expected" in printed(told)
    assert "v2" not in printed(told)
    assert [part.name for part in told.parts if isinstance(part, Picture)] == ["time", "memory"]
    figure = told.namespace["draw"](RUNGS, SIZES, told.namespace["relative"], "", log=True)
    assert "v1 skipped" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("missing", ["PyTorch", "JAX"])
def test_missing_peer_is_recorded(monkeypatch, missing):
    """Recorded figures are shown at the sizes of the page, and other sizes are said not to be recorded."""
    fake(monkeypatch, missing=missing)
    told = story(((5, 256), (1, 128)))
    label = _peers.peers()[missing]
    assert "recorded 20" in label
    for name, table in tables(told).items():
        values, absent = table[label]
        key = f"ladder: {'time' if name == 'times' else 'peak memory'} of {missing} at (5, 256)"
        scale = 1 if name == "times" else 5 * 256**2 * 4
        assert values == _peers.recorded()["figures"][missing][key] / scale
        assert absent == "not recorded"
        assert not any("recorded" in str(row) for other, row in table.items() if not other.startswith(missing))
    figure = told.namespace["draw"](LIBRARIES, ((5, 256), (1, 128)), told.namespace["relative"], "", log=True)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {label, f"{label} forward", "final"} <= {*labels}
    assert f"{missing} not recorded" in [text.get_text() for text in figure.axes[0].texts]
    assert f"not recorded in {label}" in told.card.result


def test_the_record_has_all_sizes_of_the_page(monkeypatch):
    fake(monkeypatch)
    monkeypatch.setattr(_peers, "installed", lambda name: False)
    with backend("numpy") as library:
        told = run("ladder", library)
    for table in tables(told).values():
        assert not any("not recorded" in cells for cells in table.values())
        assert {label for label in table if "recorded" in label} >= {*_peers.peers().values()}


def test_small_inputs_have_no_memory(monkeypatch):
    fake(monkeypatch)
    times, peaks = tables(story(((5, 32), *SIZES))).values()
    assert len(times["final"]) == 3
    assert len(peaks["final"]) == 2


def test_no_memory_is_said(monkeypatch):
    fake(monkeypatch, memory=False)
    told = story()
    assert "peaks" not in tables(told)
    assert "Peak memory is read from /proc, which this system does not have" in printed(told)


@pytest.mark.parametrize(("rung", "name"), [
    *((rung, f"eigh_vjp_{rung}") for rung in RUNGS[:3]), ("final", "eigh_vjp"),
])  # fmt: skip
def test_a_wrong_rung_is_noticed(monkeypatch, rung, name):
    """In float32: the truth, which the last rung computes in float64, stays as it is."""
    module = ddnref if rung == "final" else reference
    correct = getattr(module, name)

    def wrong(*arguments):
        found = correct(*arguments)
        return found if found.dtype == np.float64 else found * np.float32(1.001)

    fake(monkeypatch)
    monkeypatch.setattr(module, name, wrong)
    told = story()
    assert told.failed.startswith(f"{rung} in float32 against float64")
    *before, _ = (part for part in told.parts if isinstance(part, Check))
    assert all(part.error <= part.limit for part in before)
