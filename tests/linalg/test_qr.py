"""QR: unique factors, gradients where columns depend, bad input."""

import numpy as np
import pytest
from problems import adjoint, relative

import ddnref


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 4), (2, 3, 6, 1)])
def test_factors(is_complex, shape, xp, rng):
    a = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)
    q, r = xp.tuple(ddnref.qr(xp.asarray(a)))
    assert relative(q @ r, a) <= 1e-14
    assert relative(adjoint(q) @ q, np.broadcast_to(np.eye(shape[-1]), r.shape)) <= 1e-14
    assert np.all(np.tril(r, -1) == 0)
    diagonal = np.einsum("...ii->...i", r)
    assert np.all(diagonal.real > 0)
    assert np.max(np.abs(diagonal.imag)) <= 1e-15 * np.max(np.abs(r))


def test_dependent_columns_have_no_gradient(xp, rng):
    a = rng.standard_normal((2, 5, 3))
    a[0, :, 2] = a[0, :, 0] - a[0, :, 1]
    q, r = ddnref.qr(xp.asarray(a))
    with pytest.raises(ddnref.SingularError, match="linearly dependent"):
        ddnref.qr_vjp(q, r, q, r)
    a_bar = xp.numpy(ddnref.qr_vjp(q, r, q, r, throw=False))
    assert np.all(np.isnan(a_bar[0]))
    assert np.all(np.isfinite(a_bar[1]))


def test_what_lies_below_the_diagonal_of_r_bar_is_not_used(rng):
    a, r_bar = rng.standard_normal((5, 3)), rng.standard_normal((3, 3))
    q, r = ddnref.qr(a)
    assert np.array_equal(ddnref.qr_vjp(None, r_bar, q, r), ddnref.qr_vjp(None, np.triu(r_bar), q, r))


def test_static_errors(rng):
    a = rng.standard_normal((5, 3))
    q, r = ddnref.qr(a)
    with pytest.raises(ValueError, match="m >= n"):
        ddnref.qr(a.T)
    with pytest.raises(TypeError, match="both None"):
        ddnref.qr_vjp(None, None, q, r)
    with pytest.raises(ValueError, match="q_bar has shape"):
        ddnref.qr_vjp(r, r, q, r)
    with pytest.raises(TypeError, match="r_bar has dtype"):
        ddnref.qr_vjp(q, r.astype(np.float32), q, r)
