"""The textbook ladder gives the same gradient on every rung."""

import numpy as np
import pytest
from problems import relative, symmetric

import ddnref
from ddnref.reference import eigh_vjp_v1, eigh_vjp_v2, eigh_vjp_v3


@pytest.mark.parametrize("shape", [(4,), (2, 5), (2, 3, 3)])
def test_every_rung_agrees(shape, xp, rng):
    *batch, m = shape
    x = xp.asarray(symmetric(rng, m, tuple(batch)))
    w, v = ddnref.eigh(x)
    v_bar = xp.asarray(rng.standard_normal(tuple(v.shape)))
    top = xp.numpy(ddnref.eigh_vjp(None, v_bar, w, v))
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
