"""Dense systems: right-hand sides that broadcast, one factorisation for both ways, singular matrices."""

import numpy as np
import pytest
import scipy.linalg
from problems import adjoint, relative
from scipy.linalg import get_lapack_funcs

import ddnref
from conftest import backend
from ddnref._kernels import lu as _lu
from ddnref.testing import assert_vjp

SHAPES = [
    ((4, 4), (4,)),
    ((4, 4), (3, 4)),
    ((2, 4, 4), (2, 4)),
    ((2, 4, 4), (4,)),
    ((2, 4, 4), (3, 2, 4)),
    ((2, 4, 4), (3, 1, 4)),
    ((1, 4, 4), (2, 4)),
    ((2, 1, 4, 4), (5, 1, 3, 4)),
    ((0, 4, 4), (0, 4)),
    ((2, 0, 0), (2, 0)),
    ((1, 1), (3, 1)),
]


def system(rng, a_shape, b_shape, is_complex=False):
    a, b = rng.standard_normal(a_shape), rng.standard_normal(b_shape)
    if is_complex:
        a, b = a + 1j * rng.standard_normal(a_shape), b + 1j * rng.standard_normal(b_shape)
    return a + 2 * np.eye(a_shape[-1]), b


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
def test_right_hand_sides_broadcast_and_their_gradients_are_sums(a_shape, b_shape, xp, rng):
    a, b = system(rng, a_shape, b_shape)
    x, saved = ddnref.solve_fwd(xp.asarray(a), xp.asarray(b))
    expected = np.linalg.solve(a, b[..., None])[..., 0] if a.size else np.zeros(b_shape)
    np.testing.assert_allclose(xp.numpy(x), expected, atol=1e-12)
    np.testing.assert_array_equal(xp.numpy(ddnref.solve(xp.asarray(a), xp.asarray(b))), xp.numpy(x))
    x_bar = rng.standard_normal(expected.shape)
    a_bar, b_bar = ddnref.solve_vjp(xp.asarray(x_bar), x, *saved, xp.asarray(b))
    assert tuple(a_bar.shape) == a_shape
    assert tuple(b_bar.shape) == b_shape
    if a.size == 0:
        return
    y = np.linalg.solve(adjoint(a), x_bar[..., None])[..., 0]
    full = -y[..., :, None] * expected[..., None, :]
    for ours, theirs, shape in ((a_bar, full, a_shape), (b_bar, y, b_shape)):
        extra = theirs.ndim - len(shape)
        theirs = theirs.sum(axis=tuple(range(extra)))
        axes = tuple(i for i, n in enumerate(shape) if n == 1)
        np.testing.assert_allclose(xp.numpy(ours), theirs.sum(axis=axes, keepdims=True) if axes else theirs, atol=1e-12)


@pytest.mark.parametrize("is_complex", [False, True])
def test_a_shared_matrix_gets_the_sum(is_complex, rng):
    a, b = system(rng, (5, 5), (3, 5), is_complex)
    report = assert_vjp(ddnref.solve_fwd, ddnref.solve_vjp, a, b, saves=True)
    assert report.error <= 1e-9


def test_the_gradient_factorises_nothing(rng, monkeypatch):
    a, b = system(rng, (5, 5), (5,))
    x, saved = ddnref.solve_fwd(a, b)

    def refuse(*args, **kwargs):
        raise AssertionError("a second factorisation")

    monkeypatch.setattr(_lu, "lu_factor", refuse)
    monkeypatch.setattr(scipy.linalg, "get_lapack_funcs", lambda names, arrays, original=get_lapack_funcs: (
        refuse() if "getrf" in names else original(names, arrays)))  # fmt: skip
    ddnref.solve_vjp(x, x, *saved)


def test_arguments_are_not_changed(rng):
    a, b = system(rng, (2, 4, 4), (3, 2, 4))
    copies = a.copy(), b.copy()
    x, (lu, pivots) = ddnref.solve_fwd(a, b)
    kept = x.copy(), lu.copy(), pivots.copy()
    ddnref.solve_vjp(x, x, lu, pivots)
    for now, before in zip((a, b, x, lu, pivots), (*copies, *kept), strict=True):
        assert np.array_equal(now, before)


def test_a_singular_matrix_raises_or_is_nan_alone(xp, rng):
    a, b = system(rng, (4, 3, 3), (4, 3))
    a[1] = np.arange(9).reshape(3, 3)
    a[2, 0, 0] = np.nan
    a, b = xp.asarray(a), xp.asarray(b)
    with pytest.raises(ddnref.SingularError, match=r"1 of 4 matrices are singular.*ridge.*throw=False"):
        ddnref.solve(a, b)
    x, saved = ddnref.solve_fwd(a, b, throw=False)
    assert np.isnan(xp.numpy(x)).all(axis=-1).tolist() == [False, True, True, False]
    assert np.isnan(xp.numpy(x)).any(axis=-1).tolist() == [False, True, True, False]
    with pytest.raises(ddnref.SingularError, match="2 of 4"):
        ddnref.solve_vjp(x, x, *saved)
    bars = ddnref.solve_vjp(xp.asarray(rng.standard_normal((4, 3))), x, *saved, throw=False)
    for bar in map(xp.numpy, bars):
        flat = np.isnan(bar.reshape(4, -1))
        assert flat.all(axis=-1).tolist() == flat.any(axis=-1).tolist() == [False, True, True, False]


def test_a_bad_right_hand_side_is_nan_alone(xp, rng):
    a, b = system(rng, (3, 3), (4, 3))
    b[2, 1] = np.inf
    x, saved = ddnref.solve_fwd(xp.asarray(a), xp.asarray(b))
    assert np.isnan(xp.numpy(x)).all(axis=-1).tolist() == [False, False, True, False]
    _, b_bar = ddnref.solve_vjp(xp.asarray(np.ones((4, 3))), x, *saved)
    assert np.isnan(xp.numpy(b_bar)).all(axis=-1).tolist() == [False, False, True, False]


def test_the_error_grows_with_the_condition_as_documented(rng):
    """About eps κ for the solution, twice that for the gradient; here within ten times."""
    q, u = (np.linalg.qr(rng.standard_normal((30, 30)))[0] for _ in range(2))
    for kappa in (1e2, 1e6, 1e10):
        a = (q * np.geomspace(1, 1 / kappa, 30)) @ u
        inverse = (u.T / np.geomspace(1, 1 / kappa, 30)) @ q.T
        b, x_bar = rng.standard_normal((2, 30))
        x, saved = ddnref.solve_fwd(a, b)
        a_bar, _ = ddnref.solve_vjp(x_bar, x, *saved)
        limit = 10 * kappa * np.finfo(float).eps
        assert relative(x, inverse @ b) <= limit
        assert relative(a_bar, -np.outer(inverse.T @ x_bar, inverse @ b)) <= 2 * limit


def test_static_errors(rng):
    a, b = system(rng, (3, 3), (3,))
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\), expected \(..., m, m\)"):
        ddnref.solve(a[:, :2], b)
    with pytest.raises(ValueError, match=r"b has shape \(3, 2\), expected \(..., 3\): vectors.*leading axes, not col"):
        ddnref.solve(a, np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"leading axes \(5,\) of b do not broadcast against the batch axes \(4,\)"):
        ddnref.solve(np.broadcast_to(a, (4, 3, 3)), np.ones((5, 3)))
    with pytest.raises(TypeError, match="b has dtype float32"):
        ddnref.solve(a, b.astype(np.float32))
    with pytest.raises(TypeError, match="int64"):
        ddnref.solve(a.astype(np.int64), b)
    with pytest.raises(TypeError, match="not an array"):
        ddnref.solve(a, [1.0, 2.0, 3.0])
    x, saved = ddnref.solve_fwd(a, b)
    with pytest.raises(ValueError, match=r"x_bar has shape \(2,\), expected that of x, \(3,\)"):
        ddnref.solve_vjp(x[:2], x, *saved)
    with pytest.raises(TypeError, match="x_bar has dtype float32"):
        ddnref.solve_vjp(x.astype(np.float32), x, *saved)


def test_libraries_do_not_mix(rng):
    strict = backend("array-api-strict")
    a, b = system(rng, (3, 3), (3,))
    with pytest.raises(TypeError, match="one library"):
        ddnref.solve(a, strict.asarray(b))


def test_reads_nothing_on_the_host_without_throw(host_reads, rng):
    strict = backend("array-api-strict")
    a, b = map(strict.asarray, system(rng, (2, 3, 3), (4, 2, 3)))
    x, saved = ddnref.solve_fwd(a, b, throw=False)
    ddnref.solve_vjp(x, x, *saved, throw=False)
    assert host_reads == []
    ddnref.solve(a, b)
    assert host_reads == ["__bool__"]
