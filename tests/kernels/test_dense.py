"""The hardened batched solve: one bad item harms no other, on any library, with or without tracing."""

import numpy as np
import pytest

from ddnref._kernels import dense as _linalg


def system(rng, batch=(2, 3), n=4, k=2):
    return rng.standard_normal((*batch, n, n)), rng.standard_normal((*batch, n, k))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_solves_and_keeps_the_dtype(dtype, xp, rng):
    a, b = (z.astype(dtype) for z in system(rng))
    x = xp.numpy(_linalg.solve(xp.asarray(a), xp.asarray(b)))
    assert x.dtype == dtype
    np.testing.assert_allclose(x, np.linalg.solve(a, b), rtol=1e-3 if dtype == np.float32 else 1e-10)


def test_bad_items_are_nan_and_the_others_as_alone(xp, rng):
    a, b = system(rng)
    a[0, 1] = 0
    a[1, 0, 2, 1] = np.nan
    a[1, 1, 0, 0] = np.inf
    b[1, 2, 3, 1] = np.inf
    bad = np.asarray([[False, True, False], [True, True, True]])
    for solve in (_linalg.solve, xp.jit(_linalg.solve)):
        x = xp.numpy(solve(xp.asarray(a), xp.asarray(b)))
        assert np.all(np.isnan(x[bad]))
        np.testing.assert_allclose(x[~bad], np.linalg.solve(a[~bad], b[~bad]), rtol=1e-12)


def test_a_single_singular_matrix_is_nan(xp):
    a, b = np.asarray([[1.0, 2.0], [2.0, 4.0]]), np.ones((2, 1))
    assert np.all(np.isnan(xp.numpy(_linalg.solve(xp.asarray(a), xp.asarray(b)))))


@pytest.mark.parametrize("shape", [((0, 3, 3), (0, 3, 2)), ((2, 0, 0), (2, 0, 1)), ((3, 3), (3, 0))])
def test_empty(shape, xp):
    a, b = (xp.asarray(np.ones(s)) for s in shape)
    assert tuple(_linalg.solve(a, b).shape) == shape[1]


def test_host_reads(host_reads, rng):
    from conftest import backend

    strict = backend("array-api-strict")
    a, b = (strict.asarray(z) for z in system(rng))
    host_reads.clear()
    _linalg.solve(a, b)
    assert host_reads == []


def test_another_device(second, rng):
    a, b = (second.asarray(z) for z in system(rng))
    assert _linalg.solve(a, b).device == b.device


@pytest.mark.parametrize("shape", [(2, 5, 3), (2, 3, 5), (3, 3)])
def test_svd(shape, xp, rng):
    a = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
    u, s, v_h = map(xp.numpy, xp.jit(_linalg.svd)(xp.asarray(a)))
    assert (u.shape[-1], v_h.shape[-2]) == (min(shape[-2:]),) * 2
    np.testing.assert_allclose((u * s[..., None, :]) @ v_h, a, atol=1e-13)
    assert np.all(np.diff(s) <= 0)


def test_svd_of_a_bad_item_is_nan(xp, rng):
    a = rng.standard_normal((2, 5, 3))
    a[0, 1, 1] = np.nan
    for array, alone in zip(_linalg.svd(xp.asarray(a)), _linalg.svd(xp.asarray(a[1])), strict=True):
        assert np.all(np.isnan(xp.numpy(array)[0]))
        np.testing.assert_allclose(xp.numpy(array)[1], xp.numpy(alone), atol=1e-14)
