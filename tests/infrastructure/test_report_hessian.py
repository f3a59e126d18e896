"""The Hessian's section: counts are those of the dense matrix, whatever the library, and errors are noticed."""

from __future__ import annotations

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from ddnref import curvature, networks
from ddnref.report import hessian, pictures
from ddnref.report import hessian_model as model
from ddnref.report.content import Context, Picture, Table, Text
from ddnref.verify._backends import backend

TORCH, JAX = (pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax"))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {
        "LAYERS": 5, "WIDTH": 4, "KEPT": (0, 30), "DEPTHS": (3, 6), "HARD_LAYERS": 3, "HARD_WIDTH": 5,
        "DAMPINGS": (1e-6, 1e-2),
    }.items():  # fmt: skip
        monkeypatch.setattr(model, name, value)
    with threadpool_limits(1), pictures.style():
        yield


def content(name, seed=0):
    with backend(name) as library:
        return hessian.SECTION.run(Context(library, seed, lambda items, description: items))


def parts(found):
    return {part.name: part for part in found.parts if not isinstance(part, Text)}


@pytest.mark.parametrize("name", ["numpy", TORCH])
def test_counts_and_solves(name):
    found = parts(content(name))
    numbers = dict(found["numbers"].rows)
    (_, before, *first), (_, after, *last) = found["spectrum"].rows
    assert after < before
    total = 64 * 4 + 4 + 3 * 20 + 50
    assert sum(first) == sum(last) == numbers["parameters"] == total
    assert numbers["eigenvalues in another bin than the dense matrix puts them, after training"] == 0
    assert numbers["eigenvalues below -0.1 after 0 steps"] == sum(first[:3]) > 0
    assert max(row[3] for row in found["errors"].rows) <= 1e-15
    assert numbers["largest backward error, refined"] == max(row[3] for row in found["errors"].rows)
    assert "time" in found
    assert "exponent of the time in the depth" in numbers


@pytest.mark.parametrize("name", ["array-api-strict", JAX])
def test_other_libraries(name, monkeypatch):
    """One count and one solve: the others would be compiled, or checked operation by operation, for a minute."""
    monkeypatch.setattr(model, "EDGES", (-np.inf, -0.1, np.inf))
    monkeypatch.setattr(model, "DAMPINGS", (1e-2,))
    monkeypatch.setattr(model, "PATHS", ("riccati",))
    problem = model.one_of_each(0, 3, 3)
    with backend(name) as library:
        counts = model.count(library, 0, problem).counts
        errors = model.backward_errors(library, 0)
    assert counts == model.count_densely(problem)
    assert min(counts) > 0
    assert errors["riccati"].shape == (2, 1)
    assert errors["riccati"][1, 0] <= 1e-15


def test_times_are_left_out_where_they_mean_nothing(monkeypatch):
    monkeypatch.setattr(model, "timed", lambda library: False)
    found = content("numpy")
    assert "time" not in parts(found)
    assert any("not drawn for this backend" in part.html for part in found.parts if isinstance(part, Text))
    monkeypatch.undo()
    timed = {}
    for name in ("numpy", "array-api-strict"):
        with backend(name) as library:
            timed[name] = model.timed(library)
            timed[f"{name}, compiled"] = model.timed(library._replace(compiles=True))
    assert [name for name, yes in timed.items() if yes] == ["numpy"]


def test_pictures_have_their_numbers():
    found = content("numpy")
    for part in parts(found).values():
        if isinstance(part, Picture):
            assert len(part.rows) > 1
        assert all(len(row) == len(part.columns) for row in part.rows)
        assert isinstance(part, (Picture, Table))
    assert len(found.headlines) == 2
    assert found.headlines[0].values[0].split(" to ")[0] == str(sum(parts(found)["spectrum"].rows[0][2:5]))


def test_seed_chooses_network_and_images():
    spectra = [parts(content("numpy", seed))["spectrum"].rows for seed in (0, 0, 1)]
    assert spectra[0] == spectra[1]
    assert spectra[0] != spectra[2]


def test_wrong_counts_are_noticed(monkeypatch):
    correct = curvature.hessian_eigval_count

    def moved(chain, x, t, interval, **options):
        (first, second, *others), info = correct(chain, x, t, interval, **options)
        return (first + 1, second - 1, *others), info

    monkeypatch.setattr(model.ddnref.curvature, "hessian_eigval_count", moved)
    numbers = dict(parts(content("numpy"))["numbers"].rows)
    assert numbers["eigenvalues in another bin than the dense matrix puts them, after training"] == 1


def test_dense_counts_are_of_the_hessian():
    """Of a linear model under cross-entropy, whose Hessian is known."""
    rng = np.random.default_rng(0)
    x, t, weight = rng.standard_normal((4, 3)), np.asarray([0, 1, 1, 0]), 3 * rng.standard_normal((2, 3))
    chain = networks.Chain.from_arrays([weight], loss="cross_entropy")
    p = 1 / (1 + np.exp(x @ (weight[1] - weight[0])))  # of class 1 is 1 - p
    block = np.einsum("n,ni,nj->ij", (p * (1 - p)), x, x) / 4
    w = np.linalg.eigvalsh(np.kron(np.asarray([[1, -1], [-1, 1]]), block))
    expected = tuple(np.histogram(w, model.EDGES)[0])
    assert model.count_densely(model.Problem(chain, x, t)) == expected
    assert sum(expected) == 6


def test_training_lowers_the_loss_and_starts_at_the_start():
    with backend("numpy") as library:
        context = Context(library, 0, lambda items, description: items)
        problem = model.one_of_each(0, 5, 4)
        learned = model.learn(context, problem)
    assert [steps for steps, _ in learned] == [0, 30]
    assert learned[0][1].chain is problem.chain
    first, last = (float(each.chain.loss(each.x, each.t)) for _, each in learned)
    assert last < 0.9 * first
    assert sorted(problem.t) == list(range(10))


def test_bins_are_named_after_their_edges():
    assert hessian.BINS == (
        "below -10", "-10 to -1", "-1 to -0.1", "-0.1 to 0.1", "0.1 to 1", "1 to 10", "above 10",
    )  # fmt: skip
    assert len(model.EDGES) == len(hessian.BINS) + 1


def test_slope_of_a_power():
    assert abs(model.slope((1, 2, 4), (3.0, 12.0, 48.0)) - 2) < 1e-12
