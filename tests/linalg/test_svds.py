"""The k largest singular triples, matrix-free: operators, small values, and what has no derivative."""

from functools import partial

import numpy as np
import pytest
from problems import adjoint, relative, with_singular

import ddnref
from ddnref import operators
from ddnref.testing import numerical_jvp


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "n"), [(40, 25), (25, 40), (30, 30)])
def test_triples(m, n, is_complex, xp, rng):
    a = with_singular(rng, m, 1 / (1 + np.arange(20)), (2,), is_complex, n=n)
    options = {"method": "iterative", "throw": False, "while_loop": xp.while_loop}
    (u, s, vh), info = xp.lift(partial(ddnref.svds, k=3, **options))(a)
    assert np.all(info.converged)
    np.testing.assert_allclose(s, [[1, 1 / 2, 1 / 3]] * 2, rtol=1e-14)
    np.testing.assert_allclose(a @ adjoint(vh), u * s[:, None, :], atol=1e-11)
    for basis in (u, adjoint(vh)):
        np.testing.assert_allclose(adjoint(basis) @ basis, np.broadcast_to(np.eye(3), (2, 3, 3)), atol=1e-11)


def test_small_values_keep_their_digits(rng):
    """Squares of singular values of 1e-9 are below the rounding of the Gram matrix."""
    a = with_singular(rng, 40, [1.0, 0.5, 1e-9], n=30)
    (_, s, _), _ = ddnref.svds(a, 3)
    assert np.max(np.abs(s - [1.0, 0.5, 1e-9])) <= 2e-15


@pytest.mark.parametrize(("method", "saves"), [("iterative", False), ("full", True)])
def test_derivatives_of_an_operator_on_images(method, saves, xp, rng):
    """Vectors have two axes, and what moves are weights and a kernel."""
    shape, params = (6, 5), (rng.uniform(0.5, 1.5, (6, 5)), rng.standard_normal((3, 3)))
    dots = [rng.standard_normal(p.shape) for p in params]

    def blur(weights, kernel):
        return operators.compose(operators.mask(weights, shape), operators.convolution(kernel, shape))

    a = blur(*map(xp.asarray, params))
    ((u, s, vh), saved), _ = ddnref.svds_fwd(a, 2, method=method)
    assert u.shape == (*shape, 2)
    assert vh.shape == (2, *shape)
    bars, given = [rng.standard_normal(y.shape) for y in (u, s, vh)], (*(saved if saves else ()), a)
    params_bar, info = ddnref.svds_vjp(*map(xp.asarray, bars), u, s, vh, *given, rtol=1e-12)
    assert np.all(xp.numpy(info.converged))
    u0 = xp.numpy(u)

    def loss(t):
        moved = (p + t * dot for p, dot in zip(params, dots, strict=True))
        (u, s, vh), _ = ddnref.svds(blur(*moved), 2, method="full")
        sign = np.sign(np.sum(u * u0, axis=(0, 1)))  # the one of two that is continuous
        return sum(np.sum(y * y_bar) for y, y_bar in zip((u * sign, s, vh * sign[:, None, None]), bars, strict=True))

    expected = numerical_jvp(loss, np.zeros(1), np.ones(1), step=2e-4)
    found = sum(np.sum(xp.numpy(p_bar) * dot) for p_bar, dot in zip(params_bar, dots, strict=True))
    size = sum(
        np.linalg.norm(xp.numpy(p_bar)) * np.linalg.norm(dot) for p_bar, dot in zip(params_bar, dots, strict=True)
    )
    assert abs(found - expected) <= 1e-9 * size

    # The tangents are the transpose.
    tangents, _ = ddnref.svds_jvp(tuple(map(xp.asarray, dots)), u, s, vh, *given, rtol=1e-12)
    pushed = sum(np.sum(xp.numpy(y_dot) * y_bar) for y_dot, y_bar in zip(tangents, bars, strict=True))
    assert abs(found - pushed) <= 1e-9 * size


def test_a_guess_saves_products(rng):
    a = with_singular(rng, 300, 1 / (1 + np.arange(100)) ** 0.5, n=200)
    (_, s, vh), cold = ddnref.svds(a, 1, method="iterative", basis=16)
    (_, again, _), warm = ddnref.svds(a, 1, method="iterative", basis=16, v0=vh[0])
    np.testing.assert_allclose(s, again, rtol=1e-12)
    assert warm.n_products < cold.n_products


def test_equal_values(rng):
    a = with_singular(rng, 30, [2.0, 2.0, 1.0, 0.5], n=20)
    (u, s, vh), _ = ddnref.svds(a, 2)
    # A loss of the product U Vᴴ, which is the same for each basis of the cluster.
    c = rng.standard_normal((30, 20))
    a_bar, _ = ddnref.svds_vjp(c @ adjoint(vh), None, adjoint(u) @ c, u, s, vh, a)

    def loss(a):
        u, _, vh = np.linalg.svd(a)
        return np.sum(c * (u[:, :2] @ vh[:2]))

    a_dot = rng.standard_normal(a.shape)
    assert abs(np.sum(a_bar * a_dot) - numerical_jvp(loss, a, a_dot, gap=0.5)) <= 1e-9 * np.linalg.norm(a_bar) * 25
    with pytest.raises(ddnref.GaugeError, match=r"svds_vjp takes .* depends on a choice"):
        ddnref.svds_vjp(rng.standard_normal(u.shape), None, None, u, s, vh, a)
    with pytest.raises(ddnref.GaugeError, match=r"svds takes .* Eigenvalue 1 equals the next one"):
        ddnref.svds(a, 1)
    with pytest.raises(ddnref.GaugeError, match="svds_jvp takes"):
        ddnref.svds_jvp(a_dot, u, s, vh, a)


def test_a_value_of_zero_is_refused(rng):
    with pytest.raises(ddnref.GaugeError, match="Eigenvalue 3 equals the next one"):
        ddnref.svds(with_singular(rng, 30, [2.0, 1.0], n=20), 3)


def test_one_bad_item_leaves_the_others_alone(xp, rng):
    a = with_singular(rng, 12, [2.0, 1.0, 0.5], (3,), n=20)
    a[1, 0, 0] = np.nan
    (u, s, vh), info = ddnref.svds(xp.asarray(a), 2, throw=False)
    assert xp.numpy(info.converged).tolist() == [True, False, True]
    np.testing.assert_allclose(xp.numpy(s)[[0, 2]], [[2.0, 1.0]] * 2, rtol=1e-13)
    a_bar, _ = ddnref.svds_vjp(None, xp.asarray(np.ones((3, 2))), None, u, s, vh, xp.asarray(a), throw=False)
    assert np.isnan(xp.numpy(a_bar)).any(axis=(1, 2)).tolist() == [False, True, False]


def test_traces(jax, rng):
    a = with_singular(rng, 40, [2.0, 1.0, 0.5, 0.4], n=30)
    run = jax.jit(partial(ddnref.svds, k=2, throw=False, method="iterative", while_loop=jax.lax.while_loop))
    (_, s, _), info = run(a)
    np.testing.assert_allclose(s, [2.0, 1.0], rtol=1e-13)
    assert info.converged


def test_bad_input(rng):
    a = rng.standard_normal((5, 4))
    with pytest.raises(ValueError, match="k is 5, expected 1 <= k <= 4"):
        ddnref.svds(a, 5)
    with pytest.raises(ValueError, match="v0 has shape"):
        ddnref.svds(a, 1, v0=np.ones(5))
    with pytest.raises(TypeError, match="a"):
        ddnref.svds(np.ones((3, 2), dtype=int), 1)
    (u, s, vh), _ = ddnref.svds(a, 2)
    with pytest.raises(TypeError, match="nothing to differentiate"):
        ddnref.svds_vjp(None, None, None, u, s, vh, a)
    with pytest.raises(ValueError, match="u_bar has shape"):
        ddnref.svds_vjp(u.T, None, None, u, s, vh, a)
    with pytest.raises(TypeError, match="s_rest, uv_rest, a"):
        ddnref.svds_vjp(u, None, None, u, s, vh, s, a)
    with pytest.raises(TypeError, match="no direction"):
        ddnref.svds_jvp(None, u, s, vh, a)


def test_gradient_of_the_best_approximation_of_low_rank(rng):
    a = with_singular(rng, 12, [3.0, 2.0, 1.5, 1.0, 0.5], n=9)
    (u, s, vh), _ = ddnref.svds(a, 2)
    c = rng.standard_normal((12, 9))
    # Of Σ c ∘ (U diag(s) Vᴴ), the truncation of A.
    left, right = (c @ adjoint(vh)) * s, s[:, None] * (adjoint(u) @ c)
    diagonal = np.diagonal(adjoint(u) @ c @ adjoint(vh))
    a_bar, _ = ddnref.svds_vjp(left, diagonal, right, u, s, vh, a)
    a_dot = rng.standard_normal(a.shape)

    def loss(a):
        u, s, vh = np.linalg.svd(a)
        return np.sum(c * ((u[:, :2] * s[:2]) @ vh[:2]))

    assert relative(np.sum(a_bar * a_dot), numerical_jvp(loss, a, a_dot, gap=0.5)) <= 1e-8
