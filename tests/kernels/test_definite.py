"""Cholesky factors: right on every library, and an item without one leaves the others alone."""

import numpy as np
import pytest
from problems import adjoint, rotation

from ddnref._kernels.cholesky import cholesky


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (0,)])
def test_factors(dtype, shape, xp, rng):
    q = rotation(rng, 5, shape, dtype.startswith("complex"))
    s = (q * np.linspace(0.1, 2, 5)) @ adjoint(q)
    s = ((s + adjoint(s)) / 2).astype(dtype)
    factor, failed = map(xp.numpy, xp.jit(cholesky)(xp.asarray(s)))
    assert factor.dtype == s.dtype
    assert failed.shape == shape
    assert not failed.any()
    assert np.array_equal(factor, np.tril(factor))
    np.testing.assert_allclose(factor @ adjoint(factor), s, atol=20 * np.finfo(dtype).eps)


@pytest.mark.parametrize("smallest", [-1.0, -1e-3, 0.0])
def test_an_item_without_a_factor(smallest, xp, rng):
    q = rotation(rng, 5, (4,))
    spectra = np.tile(np.linspace(1, 2, 5), (4, 1))
    s = (q * spectra[:, None, :]) @ adjoint(q)
    good, _ = xp.lift(cholesky)((s + adjoint(s)) / 2)
    bad = np.diag([2.0, 1.0, smallest, 1.0, 1.0])
    s[2] = bad
    factor, failed = xp.lift(cholesky)((s + adjoint(s)) / 2)
    assert failed.tolist() == [False, False, True, False]
    assert np.all(np.isnan(factor[2]))
    assert np.array_equal(factor[[0, 1, 3]], good[[0, 1, 3]])
