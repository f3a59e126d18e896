"""The exact diagonal of a network's Hessian and its traces, against dense matrices."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hessian_problems import dense, flatten, network

import ddnref
from ddnref import networks
from ddnref.curvature.hessian import _diagonal

diagonal, trace = ddnref.curvature.hessian_diagonal, ddnref.curvature.hessian_trace


def check(chain, x, t, curvature="hessian"):
    """Within 1e-14 of the largest entry, and traces within 1e-14 of the sum of sizes."""
    expected = np.diag(dense(chain, x, t, "hvp" if curvature == "hessian" else "ggnvp"))
    found = diagonal(chain, x, t, curvature=curvature)
    assert [d.shape for d in found] == [p.shape for p in chain.params]
    flat = flatten([d[None] for d in found])[0]
    np.testing.assert_allclose(flat, expected, rtol=0, atol=1e-14 * np.max(np.abs(expected)))
    ends = np.cumsum([0, *(p.size for p in chain.params)])
    sums = [np.sum(expected[i:j]) for i, j in pairwise(ends)]
    traces = trace(chain, x, t, curvature=curvature)
    np.testing.assert_allclose(traces, sums, rtol=0, atol=1e-14 * np.sum(np.abs(expected)))


@pytest.mark.parametrize("activation", ["tanh", "softplus", "gelu", "relu", "identity"])
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("n_layers", "a", "n"), [(1, 4, 2), (2, 5, 1), (5, 6, 9)])
def test_against_the_dense_matrix(n_layers, a, n, bias, residual, activation, rng):
    chain, x, t = network(rng, n_layers, a, n, activation, bias, residual)
    for curvature in ("hessian", "ggn"):
        check(chain, x, t, curvature)


def test_residual_blocks_inside_each_other_and_at_both_ends(rng):
    def layer(activation="tanh"):
        return networks.Dense(rng.standard_normal((4, 4)) / 2, 0.1 * rng.standard_normal(4), activation)

    inner = networks.Residual([layer(), networks.Residual([layer("gelu"), layer("relu")])])
    chain = networks.Chain(
        [networks.Residual([inner]), networks.Flatten(), layer(), networks.Residual([layer()])], "mse"
    )
    x, t = rng.standard_normal((3, 4)), rng.standard_normal((3, 4))
    for curvature in ("hessian", "ggn"):
        check(chain, x, t, curvature)


def test_both_ways_and_chunks_agree(rng, monkeypatch):
    """Both ways apply where no activation has a second derivative; samples a few at a time give the same sums."""
    for activation, residual in (("relu", False), ("relu", True), ("tanh", True)):
        chain, x, t = network(rng, 4, 6, 7, activation, bias=True, residual=residual)
        found = []
        for cheaper, chunk in ((True, 2**22), (False, 2**22), (False, 200), (True, 1)):
            monkeypatch.setattr(_diagonal, "CHUNK", chunk)
            if activation == "relu":
                monkeypatch.setattr(_diagonal, "_outputs_are_cheaper", lambda _, cheaper=cheaper: cheaper)
            found.append(flatten([d[None] for d in diagonal(chain, x, t)])[0])
        for other in found[1:]:
            np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-15 * np.max(np.abs(found[0])))


def test_outputs_are_carried_only_where_nothing_bends(rng):
    def chosen(activation, classes, curvature="hessian"):
        chain = networks.Chain.mlp(8, 8, classes, 9, activation=activation)
        x, t = rng.standard_normal((5, 8)), rng.integers(0, classes, 5)
        hessian = _diagonal.hessian_of(chain, x, t, curvature)
        return _diagonal._outputs_are_cheaper(hessian.expansion)

    assert chosen("relu", 3)
    assert chosen("tanh", 3, "ggn")
    assert not chosen("tanh", 3)
    assert not chosen("relu", 40)


MUTANTS = {
    "pull": ("_pull", lambda f, xp, s, m, n: f(xp, s, m, n) * (1 + 1e-6)),
    "through": ("_through", lambda f, xp, w, m, n: f(xp, -w if n == 6 else w, m, n) * 1.001),
    "slope": ("_with_ones", lambda f, xp, s, kept: f(xp, s * s, kept)),
}


@pytest.mark.parametrize("name", MUTANTS)
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_wrong_term_is_noticed(name, activation, rng, monkeypatch):
    attribute, wrong = MUTANTS[name]
    monkeypatch.setattr(_diagonal, attribute, partial(wrong, getattr(_diagonal, attribute)))
    chain, x, t = network(rng, 4, 6, 3, "gelu" if activation == "relu" else activation, residual=True)
    with pytest.raises(AssertionError):
        check(chain, x, t)


def test_single_precision(rng):
    """Computed in double precision, and rounded once."""

    def rounded(z):
        return z if z.dtype.kind == "i" else z.astype(np.float32)

    chain, x, t = network(rng, 4, 6, 5, bias=True, asarray=rounded)
    exact = [networks.Dense(*(p.astype(np.float64) for p in z.params), z.activation) for z in chain.layers]
    exact = networks.Chain(exact, "cross_entropy")
    found, traces = diagonal(chain, x, t), trace(chain, x, t)
    assert traces.dtype == np.float32
    for ours, theirs in zip(found, diagonal(exact, x.astype(np.float64), t), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=0)


def test_other_layers_are_formed_or_refused(rng, monkeypatch):
    layers = [
        networks.Conv2d(rng.standard_normal((2, 1, 2, 2)), rng.standard_normal(2), activation="tanh"),
        networks.Flatten(),
    ]
    chain = networks.Chain([*layers, networks.Dense(rng.standard_normal((3, 8)))], "cross_entropy")
    x, t = rng.standard_normal((2, 1, 3, 3)), np.asarray([0, 2])
    check(chain, x, t)
    monkeypatch.setattr(_diagonal, "DENSE_LIMIT", 5)
    with pytest.raises(TypeError, match="layer of type Conv2d"):
        diagonal(chain, x, t)


def test_bad_input(rng):
    chain, x, t = network(rng, 3, 4, 2)
    for call in (diagonal, trace):
        with pytest.raises(ValueError, match="curvature is 'fisher'"):
            call(chain, x, t, curvature="fisher")
        with pytest.raises(ddnref.NonFiniteError, match="NaN or infinity"):
            call(chain, x + np.nan, t)
        with pytest.raises(ValueError, match="no samples"):
            call(chain, x[:0], t[:0])
        with pytest.raises(ValueError, match="out of range"):
            call(chain, x, t + 3)


def test_every_library(xp):
    """Every library gives the numbers of NumPy, whose own are held to the dense matrix above."""
    found = []
    for asarray, numpy in ((np.asarray, np.asarray), (xp.asarray, xp.numpy)):
        for activation in ("tanh", "relu"):
            rng = np.random.default_rng(3)
            chain, x, t = network(rng, 3, 3, 2, activation, bias=True, residual=True, asarray=asarray)
            found.append([*map(numpy, diagonal(chain, x, t)), numpy(trace(chain, x, t))])
    for ours, theirs in zip(found[2:], found[:2], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)


def test_nothing_leaves_the_device(second):
    if second.name == "torch":
        return  # the meta device has no values, and the data are checked for NaN
    rng = np.random.default_rng(3)
    chain, x, t = network(rng, 4, 4, 2, residual=True, asarray=second.asarray)
    for entry in diagonal(chain, x, t):
        assert str(entry.device) == str(x.device)
