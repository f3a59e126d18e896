"""Counts and eigenpairs of a network's Hessian against those of the dense matrix."""

import numpy as np
import pytest
from hessian_problems import dense, each_layer, flatten, hard_shifts, network, problem

import ddnref
from ddnref import curvature, networks, reference
from ddnref.curvature.hessian import _expansion, _joint, _methods, _solve, _spectrum


@pytest.mark.parametrize(("n_layers", "a", "n", "residual"), [(5, 6, 1, False), (4, 4, 9, True), (8, 5, 2, True)])
def test_counts(n_layers, a, n, residual, rng, monkeypatch):
    monkeypatch.setattr(_methods, "DENSE_LIMIT", 0)
    q = problem(rng, n_layers, a, n, residual=residual, bias=True)
    edges = [-np.inf, -0.3, -0.01, -1e-5, 1e-5, 0.02, 0.5, np.inf]
    counts, info = curvature.hessian_eigval_count(q.chain, q.x, q.t, edges)
    assert counts == tuple(np.histogram(q.w, [-1e9, *edges[1:-1], 1e9])[0])
    assert sum(counts) == len(q.w)
    assert info.uncertain == (0,) * len(edges)
    assert {"tridiagonal", "riccati"} & set(info.paths)
    g = np.linalg.eigvalsh(dense(q.chain, q.x, q.t, "ggnvp"))
    counts, _ = curvature.hessian_eigval_count(q.chain, q.x, q.t, [-0.1, 0.1, 9.0], curvature="ggn")
    assert counts == tuple(np.histogram(g, [-0.1, 0.1, 9.0])[0])


def test_count_at_an_eigenvalue(rng):
    q = problem(rng, 4, 6, 1)
    for edge in (0.0, float(q.w[-1])):
        with pytest.raises(ddnref.SingularError, match="of the edge"):
            curvature.hessian_eigval_count(q.chain, q.x, q.t, (edge, 100.0), method="qr")
    counts, info = curvature.hessian_eigval_count(q.chain, q.x, q.t, (float(q.w[-1]), 100.0), throw=False)
    assert (counts, info.uncertain) == ((1,), (1, 0))


@pytest.mark.parametrize(("n_layers", "a", "n"), [(5, 4, 2), (5, 4, 9), (4, 6, 1)])
def test_delayed_pivots_count_at_every_shift(n_layers, a, n, rng):
    """The count is right even where a layer's own block is singular, for which the other forms are not tested."""
    for activation, residual in (("tanh", True), ("relu", False), ("identity", False)):
        q = problem(rng, n_layers, a, n, activation, residual=residual)
        terms = _expansion.hessian_of(q.chain, q.x, q.t, "hessian").expansion
        for damping in [0.1, -0.05, 1e-6, *hard_shifts(q.chain, q.h)]:
            if np.min(np.abs(q.w + damping)) > 1e-9 * np.max(np.abs(q.w)):
                assert _joint.count_delayed(terms, damping) == np.sum(q.w + damping < 0)


def test_delaying_matters(rng, monkeypatch):
    """Without delays, some counts are wrong where the first joint block is singular to rounding."""
    monkeypatch.setattr(_joint, "THETA", 1e-30)
    wrong = 0
    for seed in range(4):
        q = problem(np.random.default_rng(seed), 5, 4, 3)
        terms = _expansion.hessian_of(q.chain, q.x, q.t, "hessian").expansion
        first, second = reference.tall_skinny_derivatives(q.chain, q.x, q.t)[:2]
        for value in np.linalg.eigvalsh(first.dxx + first.dx.T @ second.dzz @ first.dx)[[0, 1, -2, -1]]:
            with np.errstate(all="ignore"):
                wrong += _joint.count_delayed(terms, -float(value)) != np.sum(q.w < value)
            with monkeypatch.context() as patch:
                patch.setattr(_joint, "THETA", 1e-3)
                assert _joint.count_delayed(terms, -float(value)) == np.sum(q.w < value)
    assert wrong


def test_what_is_not_trusted_is_counted_another_way(rng, monkeypatch):
    """The probe of an elimination is what decides: near a singular block, and for small dampings, it is not used."""
    monkeypatch.setattr(_methods, "DENSE_LIMIT", 0)
    q = problem(rng, 5, 4, 3)
    paths = [
        curvature.hessian_factor(q.chain, q.x, q.t, damping=e).counted_by
        for e in (0.1, 1e-7, *hard_shifts(q.chain, q.h))
    ]
    assert paths[:2] == ["tridiagonal", "qr"]
    assert "qr" in paths[2:]


@pytest.fixture(params=["read off", "iterated"])
def way(request, monkeypatch):
    """Both ways to the eigenvalues of a network: from its whole spectrum, and as if it were too large for that."""
    if request.param == "iterated":
        monkeypatch.setattr(_spectrum, "WHOLE", 0)
        monkeypatch.setattr(_spectrum, "ALWAYS", 0)
    return request.param


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_extreme_eigenvalues(which, way, rng):
    chain, x, t = network(rng, 8, 5, 2, bias=True)
    w_all = np.linalg.eigvalsh(dense(chain, x, t))
    order = {"LA": np.argsort(-w_all), "SA": np.argsort(w_all), "LM": np.argsort(-np.abs(w_all))}[which]
    (w, v), info = curvature.hessian_eigvals(chain, x, t, 4, which=which)
    np.testing.assert_allclose(w, w_all[order][:4], atol=1e-11 * np.max(np.abs(w_all)))
    check_vectors(chain, x, t, w, v)
    assert info.converged
    assert not info.cut
    assert info.zeros == (np.sum(np.abs(w_all) <= 1e-13 * np.max(np.abs(w_all))) if way == "read off" else None)


def check_vectors(chain, x, t, w, v):
    rows = flatten(v)
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(w)), atol=1e-8)
    products = flatten(chain.hvp(x, t, v))
    np.testing.assert_allclose(products, w[:, None] * rows, atol=1e-8 * np.max(np.abs(products)))


def test_nearest(way, rng):
    chain, x, t = network(rng, 8, 5, 2)
    w_all = np.linalg.eigvalsh(dense(chain, x, t))
    sigma = 0.03
    (w, v), _ = curvature.hessian_eigvals(chain, x, t, 5, sigma=sigma)
    nearest = w_all[np.argsort(np.abs(w_all - sigma))][:5]
    np.testing.assert_allclose(w, nearest, atol=1e-11)
    check_vectors(chain, x, t, w, v)


def test_nearest_to_zero(way, rng):
    """Zero eigenvalues are found; beyond the size for that a sigma of zero is refused by name if zero is one."""
    chain, x, t = network(rng, 3, 4, 1)
    if way == "read off":
        (w, v), info = curvature.hessian_eigvals(chain, x, t, 2, sigma=0)
        assert np.all(np.abs(w) <= 1e-15)
        assert info.cut
        np.testing.assert_allclose(flatten(v) @ flatten(v).T, np.eye(2), atol=1e-14)
        assert np.max(np.abs(flatten(chain.hvp(x, t, v)))) <= 1e-15
    else:
        refused(chain, x, t)
    x, t = rng.standard_normal((20, 4)), rng.standard_normal((20, 2))
    chain = networks.Chain([networks.Dense(rng.standard_normal((2, 4)) / 2, activation="tanh")], "mse")
    w_all = np.linalg.eigvalsh(dense(chain, x, t))
    nearest = w_all[np.argsort(np.abs(w_all))][:2]
    assert abs(nearest[0]) > 1e-8
    (w, _), _ = curvature.hessian_eigvals(chain, x, t, 2, sigma=0)
    np.testing.assert_allclose(w, nearest, atol=1e-11)


def refused(chain, x, t):
    with pytest.raises(ddnref.SingularError, match=r"^sigma is zero and the Hessian is singular.*Pass a sigma"):
        curvature.hessian_eigvals(chain, x, t, 2, sigma=0)


def resnet(rng, n_layers=4, a=5, n=2, **options):
    return network(rng, n_layers, a, n, residual=True, bias=True, **options)


@pytest.mark.parametrize("curved", ["hessian", "ggn"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_whole_spectrum(curved, dtype, rng):
    """Every eigenvalue, whatever coincides, in the order asked for; with k any number of them."""
    for build in (resnet, lambda rng, **o: network(rng, 3, 6, 1, **o), lambda rng, **o: network(rng, 2, 4, 30, **o)):
        chain, x, t = build(rng, asarray=lambda z: z if z.dtype.kind == "i" else z.astype(dtype))
        exact = networks.Chain([_in_double(layer) for layer in chain.layers], "cross_entropy")
        h = dense(exact, x.astype(float), t, "hvp" if curved == "hessian" else "ggnvp")
        w_all = np.linalg.eigvalsh(h)
        size = np.max(np.abs(w_all))
        (w, v), info = curvature.hessian_eigvals(chain, x, t, curvature=curved)
        assert w.shape == w_all.shape
        np.testing.assert_allclose(w, w_all[::-1], atol=1e-13 * size)
        assert info.zeros == np.sum(np.abs(w_all) <= 1e-13 * size)
        assert not info.cut
        assert np.all(info.residual_norm <= 1e-13)
        rows = flatten(v).astype(float)
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(w)), atol=30 * np.finfo(dtype).eps)
        assert np.all(w >= 0) or curved == "hessian"
        (w_s, none), _ = curvature.hessian_eigvals(chain, x, t, which="SA", curvature=curved, vectors=False)
        np.testing.assert_allclose(w_s, w_all, atol=1e-13 * size)
        assert none is None
        for k in (1, len(w) // 3, len(w) // 2, len(w) - 1):
            (w_k, v_k), info = curvature.hessian_eigvals(chain, x, t, k, which="LM", curvature=curved)
            magnitudes = np.sort(np.abs(w_all))[::-1]
            np.testing.assert_allclose(np.abs(w_k), magnitudes[:k], atol=1e-13 * size)
            assert info.cut == (magnitudes[k - 1] - magnitudes[k] <= 1e-14 * size)
            assert flatten(v_k).shape == (k, len(w))


def _in_double(layer):
    if isinstance(layer, networks.Residual):
        return networks.Residual([_in_double(inner) for inner in layer.layers])
    return layer.with_params(tuple(p.astype(float) for p in layer.params))


def test_a_cut_cluster_is_flagged_and_not_raised(way, rng):
    """REPORTS 20: eigenvalues alone were asked for, and each k inside the zero eigenvalues raised `GaugeError`."""
    chain, x, t = network(rng, 4, 5, 2, bias=True)
    w_all = np.linalg.eigvalsh(dense(chain, x, t))[::-1]
    size = np.max(np.abs(w_all))
    (zero,) = np.nonzero(np.abs(w_all) <= 1e-13 * size)
    assert len(zero) > 20
    for k in (zero[0], zero[0] + 1, zero[3], zero[-1], zero[-1] + 1):
        (w, v), info = curvature.hessian_eigvals(chain, x, t, int(k))
        np.testing.assert_allclose(w, w_all[:k], atol=1e-11 * size)
        assert info.cut == (zero[0] < k <= zero[-1])
        check_vectors(chain, x, t, w, v)


def test_an_interval_may_hold_a_multiple_eigenvalue(rng, monkeypatch):
    chain, x, t = network(rng, 4, 5, 2, bias=True)
    w_all = np.linalg.eigvalsh(dense(chain, x, t))
    edges = (-0.01 * w_all[-1], 0.4 * w_all[-1])
    expected = w_all[(w_all > edges[0]) & (w_all < edges[1])]
    for always in (512, 0):  # read off at once, or because the slices fail
        monkeypatch.setattr(_spectrum, "ALWAYS", always)
        (w, v), _ = curvature.hessian_eigvals(chain, x, t, interval=edges)
        np.testing.assert_allclose(w, expected, atol=1e-11 * w_all[-1])
        check_vectors(chain, x, t, w, v)


def test_what_is_too_large_for_the_whole_spectrum_says_so(rng, monkeypatch):
    chain, x, t = network(rng, 4, 5, 2)
    monkeypatch.setattr(_spectrum, "VECTORS", 10)
    with pytest.raises(ValueError, match="vectors=False"):
        curvature.hessian_eigvals(chain, x, t)
    curvature.hessian_eigvals(chain, x, t, vectors=False)
    monkeypatch.setattr(_spectrum, "WHOLE", 20)
    with pytest.raises(ValueError, match=r"does not fit into 20 dimensions. Pass k="):
        curvature.hessian_eigvals(chain, x, t, vectors=False)


def test_interval(way, rng, monkeypatch):
    """All eigenvalues between two numbers, in slices."""
    chain, x, t = network(rng, 8, 5, 2, bias=True)
    w_all = np.linalg.eigvalsh(dense(chain, x, t))
    monkeypatch.setattr(_spectrum, "AT_ONCE", 6)
    for low, high in ((0.01, 100.0), (2.0 * float(w_all[-1]), 1e6)):
        (w, v), info = curvature.hessian_eigvals(chain, x, t, interval=(low, high))
        expected = w_all[(w_all > low) & (w_all < high)]
        assert w.shape == expected.shape
        np.testing.assert_allclose(w, expected, atol=1e-11 * np.max(np.abs(w_all)))
        assert v[0].shape == (len(w), *chain.params[0].shape)
        if len(w):
            check_vectors(chain, x, t, w, v)
        assert info.uncertain == (0, 0)
        assert (info.paths == ("whole",) * 2) == (way == "read off")
    assert len(list(each_layer(chain))) == 8


def test_interval_far_above_the_estimated_norm(rng, monkeypatch):
    """One eigenvalue of 8 (or -8) beyond two hundred near 2, which products with a few vectors hardly see."""
    monkeypatch.setattr(_spectrum, "ALWAYS", 0)
    a, scale = 200, np.linspace(0.9, 1.1, 200)
    scale[0] = 2.0
    q = [np.linalg.qr(rng.standard_normal((a, a)))[0] for _ in range(2)]
    x, t = (q[0] * scale) @ q[1], np.ones((a, 1))
    for sign, loss in ((1.0, "mse"), (-1.0, _negative_squares())):
        chain = networks.Chain([networks.Dense(np.zeros((1, a)))], loss, "sum")
        assert 1.5 * float(curvature.hessian_factor(chain, x, t, damping=0.1).norm) < 7.0
        for low, high in ((7.0, 9.0), (3.0, np.inf), (7.0, 1e9)):
            interval = (low, high) if sign > 0 else (-high, -low)
            (w, v), info = curvature.hessian_eigvals(chain, x, t, interval=interval)
            np.testing.assert_allclose(w, [8.0 * sign], rtol=1e-12)
            check_vectors(chain, x, t, w, v)
            assert info.uncertain == (0, 0)
        for interval in ((9.0, np.inf), (-1e9, -9.0)):
            assert curvature.hessian_eigvals(chain, x, t, interval=interval)[0][0].shape == (0,)


def _negative_squares():
    """Minus the squares: a Hessian without a positive eigenvalue."""
    return networks.Loss(
        value=lambda y, t: -np.sum((y - t) ** 2, axis=-1),
        gradient=lambda y, t: -2 * (y - t),
        hessian_sqrt=lambda y, t: np.full((*y.shape, 1), np.nan),
        hessian=lambda y, t: np.full((*y.shape, 1), -2.0),
    )


def test_static_errors(rng):
    chain, x, t = network(rng, 3, 4, 2)
    for run, error, match in [
        (lambda: curvature.hessian_eigval_count(chain, x, t, (1.0,)), ValueError, "two or more ascending"),
        (lambda: curvature.hessian_eigval_count(chain, x, t, (1.0, 0.5)), ValueError, "ascending"),
        (
            lambda: curvature.hessian_eigval_count(chain, x, t, (0.1, 1), curvature="x"),
            ValueError,
            "curvature is 'x'",
        ),
        (
            lambda: curvature.hessian_eigvals(chain, x, t, 2, interval=(0.1, 1)),
            ValueError,
            "either k or interval",
        ),
        (lambda: curvature.hessian_eigvals(chain, x, t, interval=(0.1, 1), sigma=0.5), ValueError, "sigma"),
        (lambda: curvature.hessian_eigvals(chain, x, t, 2, sigma=np.nan), ValueError, "sigma is NaN"),
        (lambda: curvature.hessian_eigvals(chain, x, t, 2, sigma=np.inf), ValueError, "sigma is inf"),
        (lambda: curvature.hessian_eigvals(chain, x, t, 0), ValueError, "k is 0"),
        (lambda: curvature.hessian_eigvals(chain, x, t, 2, which="SM"), ValueError, "which"),
        (lambda: curvature.hessian_eigvals(chain, x * np.nan, t, 2), ddnref.NonFiniteError, "NaN"),
    ]:
        with pytest.raises(error, match=match):
            run()
    assert _solve.ZERO < 1e-9
