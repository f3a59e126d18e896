"""The story of the Hessian: counts are those of the dense matrix, whatever the library, and errors are noticed."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ddnref import curvature, networks
from ddnref.report.runner import Check, Picture, Printed, run
from ddnref.verify._backends import backend

TORCH, JAX = (pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))
SMALL = {
    "LAYERS": 5, "WIDTH": 4, "KEPT": (0, 30), "HARD": (3, 5, 4), "DAMPINGS": (1e-6, 1e-2),
    "DEPTHS": dict.fromkeys(("ddnref", "textbook", "dense"), (3, 6)),
    "WIDTHS": dict.fromkeys(("ddnref", "textbook", "dense"), (2, 3)),
}  # fmt: skip
BINS = ("below -10", "-10 to -1", "-1 to -0.1", "-0.1 to 0.1", "0.1 to 1", "1 to 10", "above 10")


def story(name="numpy", seed=0, change=None, **constants):
    with threadpool_limits(1), backend(name) as library:
        return run("hessian", change(library) if change else library, seed, constants={**SMALL, **constants})


def parts(told, kind=Picture):
    return {part.name if kind is Picture else part.label: part for part in told.parts if isinstance(part, kind)}


@pytest.fixture(scope="module")
def told():
    return story()


@pytest.mark.parametrize("name", ["numpy", TORCH])
def test_counts_and_solves(name):
    told = story(name)
    assert not told.failed
    shown, checks = parts(told), parts(told, Check)
    (_, before, *first), (_, after, *last) = shown["spectrum"].rows
    assert after < before
    assert sum(first) == sum(last) == told.namespace["total"] == 64 * 4 + 4 + 3 * 20 + 50
    assert checks["eigenvalues in another bin than the dense matrix puts them, after training"].error == 0
    assert told.namespace["negative"][0] == sum(first[:3]) > 0
    assert max(row[3] for row in shown["errors"].rows) <= 1e-15
    assert checks["largest backward error, refined"].error == max(row[3] for row in shown["errors"].rows)
    assert {row[0] for row in shown["time"].rows} == {"ddnref", "textbook", "dense"}


@pytest.mark.parametrize("name", ["array-api-strict", JAX])
def test_other_libraries(name):
    """One count and one solve: the others would be compiled, or checked operation by operation, for a minute."""
    told = story(name, LAYERS=3, WIDTH=3, KEPT=(0, 1), SIZES=(0.1,), DAMPINGS=(1e-2,), PATHS=("riccati",))
    assert not told.failed
    shown, checks = parts(told), parts(told, Check)
    assert all(min(row[2:]) > 0 for row in shown["spectrum"].rows)
    assert checks["eigenvalues in another bin than the dense matrix puts them, after training"].error == 0
    ((*_, refined),) = shown["errors"].rows
    assert refined <= 1e-15
    assert "time" not in shown
    assert any(f"Times are not measured with {name}." in part.text for part in told.parts if isinstance(part, Printed))


def test_times_are_left_out_where_they_mean_nothing(told):
    assert told.namespace["TIMED"]
    compiled = story(change=lambda library: library._replace(compiles=True))
    assert "time" not in parts(compiled)


def test_pictures_have_their_numbers(told):
    shown = parts(told)
    assert list(shown) == ["spectrum", "time", "errors"]
    for part in shown.values():
        assert len(part.rows) > 1
        assert all(len(row) == len(part.columns) for row in part.rows)
    assert told.card.result.startswith(f"{sum(shown['spectrum'].rows[0][2:5])} of ")


def test_seed_chooses_network_and_images(told):
    spectra = [parts(one)["spectrum"].rows for one in (told, story(), story(seed=1))]
    assert spectra[0] == spectra[1]
    assert spectra[0] != spectra[2]


def test_wrong_counts_are_noticed(monkeypatch):
    correct = curvature.hessian_eigval_count

    def moved(chain, x, t, interval, **options):
        (first, second, *others), info = correct(chain, x, t, interval, **options)
        return (first + 1, second - 1, *others), info

    monkeypatch.setattr(curvature, "hessian_eigval_count", moved)
    told = story()
    assert told.failed.startswith("eigenvalues in another bin")
    assert next(iter(parts(told, Check).values())).error == 1


def test_wrong_solutions_are_noticed(monkeypatch):
    """A damping that the factor does not have, one millionth off: the backward error is that of the solution."""
    correct = curvature.hessian_factor

    class Wrong:
        def __init__(self, *arguments, **options):
            self.factor = correct(*arguments, **options)

        def solve(self, b, **options):
            x, info = self.factor.solve(b, **options)
            return x, info._replace(backward_error=info.backward_error + 1e-13)

    monkeypatch.setattr(curvature, "hessian_factor", Wrong)
    assert story().failed.startswith("largest backward error")


def test_dense_counts_are_of_the_hessian(told):
    """The counts are right for a linear model under cross-entropy, whose Hessian is known."""
    rng = np.random.default_rng(0)
    x, t, weight = rng.standard_normal((4, 3)), np.asarray([0, 1, 1, 0]), 3 * rng.standard_normal((2, 3))
    chain = networks.Chain.from_arrays([weight], loss="cross_entropy")
    p = 1 / (1 + np.exp(x @ (weight[1] - weight[0])))  # of class 1 is 1 - p
    block = np.einsum("n,ni,nj->ij", (p * (1 - p)), x, x) / 4
    w = np.linalg.eigvalsh(np.kron(np.asarray([[1, -1], [-1, 1]]), block))
    expected = np.histogram(w, told.namespace["EDGES"])[0]
    assert np.array_equal(told.namespace["count_densely"](chain, x, t), expected)
    assert sum(expected) == 6


def test_training_lowers_the_loss_and_starts_at_the_start(told):
    losses, kept = told.namespace["losses"], told.namespace["kept"]
    assert list(losses) == [0, 30]
    assert losses[30] < 0.9 * losses[0]
    start = networks.Chain.mlp(64, 4, 10, 5, gain=1.2, seed=0)
    assert all(np.array_equal(p, q) for p, q in zip(kept[0].params, start.params, strict=True))
    assert sorted(told.namespace["labels"][told.namespace["places"]]) == list(range(10))


def test_bins_are_named_after_their_edges(told):
    assert parts(told)["spectrum"].columns[2:] == BINS
    assert len(told.namespace["EDGES"]) == len(BINS) + 1


def test_slope_of_a_power(told):
    assert abs(told.namespace["slope"]((1, 2, 4), (3.0, 12.0, 48.0)) - 2) < 1e-12
