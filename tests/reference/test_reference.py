"""The textbook ladder gives the same gradient on every rung."""

import numpy as np
import pytest
from problems import relative, symmetric

import ddnref
from ddnref import networks
from ddnref.reference import eigh_vjp_v1, eigh_vjp_v2, eigh_vjp_v3, network_ggn, network_hessian


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 3, 3)])
def test_every_rung_agrees(shape, xp, rng):
    *batch, m = shape
    x = xp.asarray(symmetric(rng, m, tuple(batch)))
    w, v = ddnref.eigh(x)
    v_bar = xp.asarray(rng.standard_normal(tuple(v.shape)))
    top = xp.numpy(xp.derivative(ddnref.eigh_vjp, None, v_bar, w, v))
    assert relative(xp.numpy(eigh_vjp_v1(v_bar, x, w, v)), top) <= 1e-10
    assert relative(xp.numpy(eigh_vjp_v2(v_bar, w, v)), top) <= 1e-12
    assert relative(xp.numpy(eigh_vjp_v3(v_bar, w, v)), top) <= 1e-12


def test_the_absolute_tolerance_returns_zero_for_a_small_matrix(rng):
    """Why the top of the ladder has a relative one."""
    x = 1e-10 * symmetric(rng, 4)
    w, v = ddnref.eigh(x)
    v_bar = rng.standard_normal((4, 4))
    assert np.all(eigh_vjp_v3(v_bar, w, v) == 0)
    assert np.all(ddnref.eigh_vjp(None, v_bar, w, v) != 0)
    assert relative(eigh_vjp_v3(v_bar, w, v, atol=1e-16), ddnref.eigh_vjp(None, v_bar, w, v)) <= 1e-12


def test_static_errors():
    with pytest.raises(ValueError, match="v_bar has shape"):
        eigh_vjp_v3(np.ones((2, 3)), np.ones(2), np.eye(2))
    with pytest.raises(TypeError, match="v_bar has dtype int64"):
        eigh_vjp_v2(np.ones((2, 2), dtype=int), np.ones(2), np.eye(2))


def test_dense_curvature_on_every_library(xp, rng):
    """In the entries of two parameters, by hand: y = w₂ tanh(w₁ x)."""
    w = rng.standard_normal((2, 1, 1))
    x, t = rng.standard_normal((2, 3, 1))
    chain = networks.Chain(
        [networks.Dense(xp.asarray(w[0]), activation="tanh"), networks.Dense(xp.asarray(w[1]))], "mse"
    )
    (w_1, w_2), z = w[:, 0, 0], x[:, 0]
    h = np.tanh(w_1 * z)
    slope = 1 - h**2
    j = np.stack([w_2 * slope * z, h], axis=-1)
    k = np.zeros((3, 2, 2))
    k[:, 0, 0] = w_2 * -2 * h * slope * z**2
    k[:, 0, 1] = k[:, 1, 0] = slope * z
    g = 2 / 3 * j.T @ j
    hessian = g + 2 / 3 * np.sum((w_2 * h - t[:, 0])[:, None, None] * k, axis=0)
    x, t = xp.asarray(x), xp.asarray(t)
    assert relative(xp.numpy(network_ggn(chain, x, t)), g) <= 1e-14
    assert relative(xp.numpy(network_hessian(chain, x, t)), hessian) <= 1e-14
