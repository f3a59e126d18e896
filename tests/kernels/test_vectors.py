"""Inner products, norms and updates of vectors: NumPy's forms against the standard ones, and numbers at the edge."""

import numpy as np
import pytest
from krylov_problems import vectors

from ddnref._kernels.vectors import (
    LONG,
    UNTHREADED,
    axpy,
    dot,
    largest,
    norm,
    normalised,
    power_of_two,
    safe_norm,
    xpay,
)


def relative(x, expected):
    return np.max(np.abs(x - expected), initial=0) / np.max(np.abs(expected), initial=1e-300)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex64, np.complex128])
@pytest.mark.parametrize("n", [1, UNTHREADED, UNTHREADED + 1, 2 * UNTHREADED, 3 * UNTHREADED - 1])
@pytest.mark.parametrize("batch", [(), (3,), (2, 2), (0,)])
def test_inner_products_in_pieces(batch, n, dtype, rng):
    y, z = rng.standard_normal((2, *batch, n)).astype(dtype)
    if np.dtype(dtype).kind == "c":
        y, z = y * (1 + 2j), z * (2 - 1j)
    found, scale = dot(y, z), np.sum(np.abs(y) * np.abs(z), axis=-1)
    assert found.dtype == dtype
    assert found.shape == batch
    assert np.all(np.abs(found - np.sum(y.conj() * z, axis=-1)) <= 4 * np.finfo(dtype).eps * scale)


def test_in_place_forms_are_their_twins(rng):
    """NumPy's against the standard ones, on array-api-strict."""
    import array_api_strict as strict

    for dtype in (np.float32, np.float64, np.complex64, np.complex128):
        for n in (5, LONG + 3):
            for batch in ((), (3,), (2, 2)):
                y, x = (vectors(rng, (*batch, n), np.dtype(dtype).kind == "c").astype(dtype) for _ in range(2))
                alpha = np.asarray(rng.standard_normal(batch)).astype(np.real(y).dtype)
                go = np.asarray(rng.standard_normal(batch) > 0)
                standard = [strict.asarray(array) for array in (y, go, alpha, x)]
                x[~go] = np.nan
                expected = np.asarray(axpy(*standard))
                ours = axpy(y.copy(), go, alpha, x)
                assert np.array_equal(ours[~go], y[~go])
                assert relative(ours, expected) <= 4 * np.finfo(dtype).eps
                x[~go] = 0
                expected = np.asarray(xpay(strict.asarray(x), standard[2], standard[0]))
                assert relative(xpay(x, alpha, y), expected) <= 4 * np.finfo(dtype).eps
                assert np.array_equal(xpay(x, alpha, y), y), "p itself"


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.complex128])
def test_norms(dtype, xp, rng):
    y = rng.standard_normal((3, 4, 5)).astype(dtype)
    for axes in (1, 2):
        expected = np.sqrt(np.sum(np.abs(y) ** 2, axis=tuple(range(-axes, 0))))
        for function in (norm, safe_norm):
            assert relative(xp.numpy(function(xp.asarray(y), axes)), expected) <= 4 * np.finfo(dtype).eps
        large = y / expected.max() * (np.finfo(dtype).max / 8)  # its squares overflow
        found = xp.numpy(safe_norm(xp.asarray(large), axes)) / (np.finfo(dtype).max / 8)
        assert relative(found, expected / expected.max()) <= 8 * np.finfo(dtype).eps


def test_norms_of_nothing_and_of_what_is_not_finite(xp):
    assert xp.numpy(safe_norm(xp.asarray(np.zeros((2, 0))))).tolist() == [0, 0]
    assert xp.numpy(largest(xp.asarray(np.zeros((2, 0))))).tolist() == [0, 0]
    assert xp.numpy(safe_norm(xp.asarray(np.asarray([[np.inf, 1.0], [0.0, 0.0]])))).tolist() == [np.inf, 0]
    assert np.isnan(xp.numpy(safe_norm(xp.asarray(np.asarray([np.nan, 1.0])))))


def test_scaling(xp):
    y = np.asarray([[3.0, -5.0], [0.0, 0.0]])
    assert xp.numpy(power_of_two(xp.asarray(y))).tolist() == [4, 1]
    unit = xp.numpy(normalised(xp.asarray(y), norm(xp.asarray(y))))
    assert relative(unit, y / np.asarray([[34**0.5], [1.0]])) <= 1e-15
