"""The sweep on active units, with LU and Cholesky pivots and in float32: against dense matrices and the plain sweep."""

import pickle
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from hessian_problems import backward_error, dense, flatten, lists, network, problem

import ddnref
from ddnref import networks
from ddnref._kernels import blocks
from ddnref.curvature import hessian_factor
from ddnref.curvature.hessian import _active, _expansion, _methods

KINDS = [{"bias": bias, "residual": residual} for bias in (False, True) for residual in (False, True)]


def bump(width):
    """ReLU with its kinks counted: rows with a slope of zero and a curvature that is not."""
    return networks.Activation(
        lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0, lambda z: np.maximum(0, 1 - np.abs(z) / width) / width
    )


ACTIVATIONS = {"relu": "relu", "tanh": "tanh", "smoothed": bump(0.5)}


def definite(q):
    """A damping at which H + εI is positive definite."""
    return float(max(0.0, -q.w[0]) + 0.05 * np.max(np.abs(q.w)) + 0.01)


def check(q, damping, method, precision="double"):
    """Solution, determinant and inertia against the dense matrix."""
    factor = hessian_factor(q.chain, q.x, q.t, damping=damping, method=method, precision=precision)
    solution, info = factor.solve([z[0] for z in lists(q.b, q.chain)], throw=False)
    shifted = q.w + damping
    condition = np.max(np.abs(shifted)) / np.min(np.abs(shifted))
    assert info.converged, (method, precision, damping, info)
    assert info.backward_error <= 1e-15
    assert backward_error(q, damping, solution) <= 2e-15
    exact = np.linalg.solve(q.h + damping * np.eye(len(q.h)), q.b[0])
    assert np.linalg.norm(flatten([z[None] for z in solution])[0] - exact) <= 1e-14 * condition * np.linalg.norm(exact)
    sign, log = factor.slogdet()
    assert sign == np.prod(np.sign(shifted))
    np.testing.assert_allclose(log, np.sum(np.log(np.abs(shifted))), rtol=1e-10)
    assert factor.inertia() == (np.sum(shifted < 0), 0, np.sum(shifted > 0))
    return factor, info


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("n_layers", "a", "n"), [(1, 4, 2), (2, 6, 3), (4, 5, 1), (5, 6, 4), (4, 5, 12), (6, 4, 5)])
def test_against_the_dense_matrix(n_layers, a, n, activation, kind, rng):
    q = problem(rng, n_layers, a, n, ACTIVATIONS[activation], **kind)
    # Indefinite as a rule, and one shift below zero
    for damping in (0.11, -0.053):
        check(q, damping, "active")
    for method in ("active", "cholesky"):
        for precision in ("double", "single"):
            factor, info = check(q, definite(q), method, precision)
            assert info.path == factor.path == method + (" in float32" if precision == "single" else "")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_choice_of_coordinates(activation, kind, rng, monkeypatch):
    """Smaller spaces wherever a unit has fewer active samples than there are, or the whole one for all units."""
    for gathered in (-1e9, 1e9):
        monkeypatch.setattr(_active, "GATHERED", gathered)
        for n in (3, 12):
            q = problem(rng, 4, 5, n, ACTIVATIONS[activation], **kind)
            check(q, 0.11, "active")
            check(q, definite(q), "cholesky")


def test_what_is_dropped(rng):
    """Rows of zero slope and zero curvature, and no others; dead units have no controls, dead layers no state."""
    chain, x, t = network(rng, 4, 8, 6, "relu")
    layers = list(chain.layers)
    layers[1] = networks.Dense(layers[1].weight, np.asarray([-1e3] * 3 + [0.0] * 5), "relu")  # three dead units
    for activation in ("relu", bump(0.3), "tanh"):  # the slope of tanh at -1000 is zero, too
        own = [networks.Dense(*z.params, activation=activation) for z in layers[:-1]]
        e = _expansion.hessian_of(networks.Chain([*own, layers[-1]], "cross_entropy"), x, t, "hessian").expansion
        states = [0]
        for layer, (u, m, state) in zip(e.layers, _active.sizes(e), strict=True):
            active = (layer.slope != 0) | (layer.c != 0)
            assert m == np.sum(active)
            assert state == states[-1]
            assert u == np.sum(np.minimum(np.sum(active, axis=0), min(layer.z.shape)))
            states.append(m)
        beyond = [np.any((layer.slope == 0) & (layer.c != 0)) for layer in e.layers]
        assert any(beyond) == isinstance(activation, networks.Activation), "kinks count where the slope is zero"
    dead = networks.Chain([networks.Dense(-np.ones((3, 4)), None, "relu"), networks.Dense(np.ones((2, 3)))], "mse")
    x, t = np.abs(x[:, :4]), rng.standard_normal((6, 2))
    h = dense(dead, x, t)
    q = SimpleNamespace(chain=dead, x=x, t=t, h=h, w=np.linalg.eigvalsh(h), b=rng.standard_normal((1, len(h))))
    for method in ("active", "cholesky"):
        check(q, 0.1, method)


def test_identical_samples(rng):
    """Inputs of rank one: the spaces of the units are found by QR, which does not mind."""
    chain, x, t = network(rng, 4, 6, 5, "relu", bias=True)
    x = np.repeat(x[:1], 5, axis=0)
    h = dense(chain, x, t)
    q = SimpleNamespace(chain=chain, x=x, t=t, h=h, w=np.linalg.eigvalsh(h), b=rng.standard_normal((1, len(h))))
    check(q, 0.07, "active")
    check(q, definite(q), "cholesky")


def test_gauss_newton(rng):
    chain, x, t = network(rng, 5, 6, 9, "relu", bias=True, residual=True)
    g = dense(chain, x, t, "ggnvp")
    b = rng.standard_normal((1, len(g)))
    for method in ("active", "cholesky"):
        for precision in ("double", "single"):
            factor = hessian_factor(chain, x, t, damping=0.1, curvature="ggn", method=method, precision=precision)
            solution, _ = factor.solve([z[0] for z in lists(b, chain)])
            exact = np.linalg.solve(g + 0.1 * np.eye(len(g)), b[0])
            np.testing.assert_allclose(flatten([z[None] for z in solution])[0], exact, rtol=0, atol=1e-12)
            assert factor.inertia() == (0, 0, len(g))


# --- positive definite or not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("n", [3, 12])
def test_the_verdict_is_that_of_the_smallest_eigenvalue(n, activation, kind, rng):
    q = problem(rng, 4, 5, n, activation, **kind)
    size = np.max(np.abs(q.w))
    for above in (1e-6, 1e-2, 0.3):
        for precision in ("double", "single"):
            call = partial(hessian_factor, q.chain, q.x, q.t, method="cholesky", precision=precision)
            call(damping=float(-q.w[0] + above * size))
            with pytest.raises(ddnref.SingularError, match=r"not positive definite.*in layer \d of 4"):
                call(damping=float(-q.w[0] - max(above, 1e-4) * size))


def test_a_shift_below_zero_is_not_definite_where_weights_are_free(rng):
    q = problem(rng, 2, 6, 2, "relu")
    for damping in (-0.1, 0.0):
        with pytest.raises(ddnref.SingularError):
            hessian_factor(q.chain, q.x, q.t, damping=damping, method="cholesky")
    # Convex in one layer, and more samples than inputs: no weight is free, and minus half of λ_min is definite.
    chain = networks.Chain([networks.Dense(rng.standard_normal((2, 3)))], "mse")
    x, t = rng.standard_normal((9, 3)), rng.standard_normal((9, 2))
    h = dense(chain, x, t)
    q = SimpleNamespace(chain=chain, x=x, t=t, h=h, w=np.linalg.eigvalsh(h), b=rng.standard_normal((1, len(h))))
    check(q, -q.w[0] / 2, "cholesky")


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_the_verdict_near_zero(activation, rng):
    """The sign of an eigenvalue is known a hundred roundings from zero; at zero the amplification shows."""
    q = problem(rng, 3, 5, 9, activation)
    rounding = np.finfo(np.float64).eps * len(q.w) * np.max(np.abs(q.w))
    call = partial(hessian_factor, q.chain, q.x, q.t, method="cholesky")
    call(damping=float(-q.w[0] + 100 * rounding))
    with pytest.raises(ddnref.SingularError, match="not positive definite"):
        call(damping=float(-q.w[0] - 100 * rounding))
    try:
        factor = call(damping=float(-q.w[0]))
    except ddnref.SingularError:
        return
    _, info = factor.solve(q.chain.unflatten(rng.standard_normal(len(q.w))), throw=False)
    assert info.amplification > 1e11


def test_counts_between_edges(rng):
    """Edges above and below the spectrum are counted by Cholesky pivots too; in between they do not exist."""
    q = problem(rng, 4, 5, 9, "relu", bias=True)
    middle = float(q.w[3] + q.w[4]) / 2
    for edges in ([float(q.w[0]) - 1, middle, float(q.w[-1]) + 1], [-np.inf, middle, np.inf]):
        counts, info = ddnref.curvature.hessian_eigval_count(q.chain, q.x, q.t, edges, method="active")
        assert counts == (4, len(q.w) - 4)
        assert set(info.paths) <= {"active", "none"}
    with pytest.raises(ddnref.SingularError, match="not positive definite"):
        ddnref.curvature.hessian_eigval_count(q.chain, q.x, q.t, [-np.inf, middle], method="cholesky")


# --- single precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tridiagonal", "riccati", "active", "cholesky"])
def test_single_precision_is_refined_to_the_backward_error_of_double(method, rng):
    q = problem(rng, 5, 8, 3, "tanh" if method == "tridiagonal" else "relu")
    damping = definite(q)
    call = partial(hessian_factor, q.chain, q.x, q.t, damping=damping, method=method)
    factor, plain = call(precision="single"), call()
    assert factor.nbytes == plain.nbytes / 2
    b = [z[0] for z in lists(q.b, q.chain)]
    _, unrefined = factor.solve(b, refine=0, throw=False)
    assert 1e-10 < unrefined.backward_error < 1e-5, "the factor is one of single precision"
    _, info = factor.solve(b)
    assert info.path == f"{method} in float32"
    assert info.backward_error <= 1e-15
    assert info.n_iter >= 1


def test_tiny_and_huge_right_hand_sides_in_single_precision(rng):
    q = problem(rng, 4, 6, 9, "relu")
    factor = hessian_factor(q.chain, q.x, q.t, damping=definite(q), method="cholesky", precision="single")
    for size in (1e-100, 1e100, 0.0):
        solution, info = factor.solve([size * z[0] for z in lists(q.b, q.chain)])
        assert info.backward_error <= 1e-15
        assert info.path == factor.path
        assert np.all(np.isfinite(flatten([z[None] for z in solution])))


@pytest.mark.parametrize("method", ["active", "cholesky"])
def test_double_precision_takes_over(method, rng):
    """A condition beyond single precision is noticed, and the same method solves again in double precision."""
    q = problem(rng, 4, 6, 9, "relu", gain=2.0)
    damping = float(-q.w[0] + 3e-9 * np.max(np.abs(q.w)))
    factor = hessian_factor(q.chain, q.x, q.t, damping=damping, method=method, precision="single")
    _, info = factor.solve([z[0] for z in lists(q.b, q.chain)], throw=False)
    assert info.backward_error <= 1e-15
    assert info.path == method


def test_auto_in_single_precision(rng):
    q = problem(rng, 12, 8, 3, "tanh")
    factor = hessian_factor(q.chain, q.x, q.t, damping=definite(q), precision="single")
    assert factor.path == "tridiagonal in float32"
    _, info = factor.solve(q.chain.params)
    assert info.backward_error <= 1e-15
    small = problem(rng, 1, 4, 2)
    assert hessian_factor(small.chain, small.x, small.t, damping=0.1, precision="single").path == "dense"
    with pytest.raises(ValueError, match='precision="single" is for eliminations, and method is'):
        hessian_factor(q.chain, q.x, q.t, damping=0.1, method="qr", precision="single")
    with pytest.raises(ValueError, match="precision is 'half'"):
        hessian_factor(q.chain, q.x, q.t, damping=0.1, precision="half")


# --- the derivative, copies, cost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["double", "single"])
def test_vjp(precision, rng):
    """Right-hand side and damping, against the plain sweep."""
    q = problem(rng, 4, 5, 9, "relu", bias=True)
    found = []
    for options in ({"method": "cholesky", "precision": precision}, {"method": "riccati"}):
        factor = hessian_factor(q.chain, q.x, q.t, damping=definite(q), **options)
        b, x_bar = ([np.cos(k + p) for p in q.chain.params] for k in (1, 2))
        x, _ = factor.solve(b)
        (b_bar, damping_bar), _ = ddnref.curvature.hessian_solve_vjp(x_bar, x, factor)
        found.append(np.append(flatten([z[None] for z in b_bar])[0], damping_bar))
    np.testing.assert_allclose(*found, rtol=0, atol=1e-12 * np.max(np.abs(found[1])))


def test_pickle_keeps_method_and_precision(rng):
    q = problem(rng, 4, 5, 9, "relu")
    factor = hessian_factor(q.chain, q.x, q.t, damping=definite(q), method="cholesky", precision="single")
    again = pickle.loads(pickle.dumps(factor))
    assert again.path == factor.path == "cholesky in float32"
    for u, v in zip(factor.solve(q.chain.params)[0], again.solve(q.chain.params)[0], strict=True):
        np.testing.assert_array_equal(u, v)


def test_several_right_hand_sides(rng):
    q = problem(rng, 4, 5, 9, "relu", bias=True, residual=True)
    rows = rng.standard_normal((3, len(q.h)))
    rows[1] = 0
    for method, damping in (("active", 0.11), ("cholesky", definite(q))):
        together, _ = hessian_factor(q.chain, q.x, q.t, damping=damping, method=method).solve(lists(rows, q.chain))
        exact = np.linalg.solve(q.h + damping * np.eye(len(q.h)), rows.T).T
        np.testing.assert_allclose(flatten(together), exact, rtol=0, atol=1e-11 * np.max(np.abs(exact)))
        assert np.all(flatten(together)[1] == 0)


def test_auto_drops_inactive_units_where_it_pays(rng):
    chain = networks.Chain.mlp(60, 24, 10, 8, activation="relu", bias=False)
    x, t = rng.standard_normal((64, 60)), rng.integers(0, 10, 64)
    e = _expansion.hessian_of(chain, x, t, "hessian")
    assert _methods.order(e, "auto", 0.1)[0] == "active"
    assert _methods.cost("cholesky", e)[0] < 0.7 * _methods.cost("active", e)[0] < 0.3 * _methods.cost("riccati", e)[0]
    smooth = networks.Chain.mlp(60, 24, 10, 8, bias=False)
    assert _methods.order(_expansion.hessian_of(smooth, x, t, "hessian"), "auto", 0.1)[0] == "riccati"


MUTANTS = {
    "coupling": ("_coupling", lambda f, xp, k, before: -f(xp, k, before)),
    "free": ("_free", lambda f, *a: None if f(*a) is None else 0.9 * f(*a)),
    "behind": ("_behind", lambda f, xp, layer, at, p: f(xp, layer._replace(c=0 * layer.c), at, p)),
    "rest": ("_rest", lambda f, *a: None if f(*a) is None else 1.1 * f(*a)),
    "pull": ("_pull", lambda f, *a: f(*a) * (1 + 1e-6)),
    "mask": ("support", lambda f, xp, mask: f(xp, mask & (np.arange(mask.shape[1]) > 0))),
    "act": ("_act", lambda f, xp, k, m: f(xp, k._replace(by_unit=k.at.index * 0 + k.by_unit[::-1]), m)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_term_is_noticed(name, rng, monkeypatch):
    attribute, wrong = MUTANTS[name]
    problems = [problem(rng, 4, 6, 3, a, residual=r) for a in ("relu", ACTIVATIONS["smoothed"]) for r in (False, True)]
    monkeypatch.setattr(_active, attribute, partial(wrong, getattr(_active, attribute)))
    errors = []
    for q in problems:
        b = [z[0] for z in lists(q.b, q.chain)]
        x, _ = ddnref.curvature.hessian_solve(
            q.chain, q.x, q.t, b, damping=0.11, method="active", refine=0, throw=False
        )
        errors.append(backward_error(q, 0.11, x))
    assert not max(errors) <= 1e-9


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 7), (130, 300), (4, 0)])
def test_kernels_in_every_order_of_memory(m, k, dtype, rng):
    a = rng.standard_normal((m, m))
    d = (a @ a.T + m * np.eye(m)).astype(dtype)
    b, s = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, k))
    p = (s + s.T).astype(dtype)
    rtol = 1e3 * np.finfo(dtype).eps
    for first in ("C", "F"):
        l_, flag = blocks.cholesky(np.array(d, order=first))
        assert flag
        np.testing.assert_allclose(np.tril(l_) @ np.tril(l_).T, d, rtol=0, atol=rtol * np.max(d))
        for order in ("C", "F"):
            x = blocks.forward_substitution(l_, np.array(b, order=order))
            np.testing.assert_allclose(np.tril(l_) @ x, b, rtol=0, atol=rtol)
            found = blocks.minus_gram(np.array(p, order=first), np.array(x, order=order))
            assert found.dtype == dtype
            np.testing.assert_array_equal(found, found.T)
            np.testing.assert_allclose(found, p - x.T @ x, rtol=0, atol=rtol * m)


def test_a_block_that_is_not_definite(xp):
    for d, expected in (
        ([[1.0, 2.0], [2.0, 1.0]], False),
        ([[1.0, 1.0], [1.0, 1.0]], False),
        ([[1e-9, 0], [0, 1]], True),
    ):
        assert bool(blocks.cholesky(xp.asarray(np.asarray(d, dtype="float64")))[1]) is expected


# --- every library ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "precision"), [("active", "double"), ("cholesky", "single")])
def test_every_library(xp, method, precision):
    """Every library gives the numbers of NumPy, whose own are held to the dense matrix above.

    Few shapes, because JAX compiles every operation for every shape.
    """
    found = []
    for asarray, numpy in ((np.asarray, np.asarray), (xp.asarray, xp.numpy)):
        rng = np.random.default_rng(3)
        chain, x, t = network(rng, 2, 3, 2, "relu", bias=True, residual=True, asarray=asarray)
        b = [asarray(rng.standard_normal(p.shape)) for p in chain.params]
        factor = hessian_factor(chain, x, t, damping=6.0, method=method, precision=precision)
        solution, info = factor.solve(b)
        sign, log = factor.slogdet()
        found.append([*map(numpy, solution), numpy(sign), numpy(log), np.asarray(factor.inertia())])
        assert info.path == factor.path
        assert numpy(info.converged)
        assert type(solution[0]) is type(b[0])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_nothing_leaves_the_device(second):
    if second.name == "torch":
        return  # the meta device has no values to compare errors with
    rng = np.random.default_rng(3)
    chain, x, t = network(rng, 3, 4, 2, "relu", residual=True, asarray=second.asarray)
    b = [second.asarray(rng.standard_normal(p.shape)) for p in chain.params]
    for method in ("active", "cholesky"):
        for precision in ("double", "single"):
            factor = hessian_factor(chain, x, t, damping=6.0, method=method, precision=precision)
            solution, _ = factor.solve(b)
            assert str(solution[0].device) == str(x.device)
            factor.slogdet()
            assert sum(factor.inertia()) == factor.total
