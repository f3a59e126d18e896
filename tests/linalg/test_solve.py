"""Dense systems: right-hand sides that broadcast, one factorisation for both ways, singular matrices."""

from functools import partial

import numpy as np
import pytest
import scipy.linalg
from problems import adjoint, relative
from scipy.linalg import get_lapack_funcs

import ddnref
from conftest import backend
from ddnref._kernels import lu as _lu
from ddnref.testing import assert_vjp, numerical_jvp

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
    with pytest.raises(ddnref.SingularError, match=r"1 of 4 matrices.*\(item 1; rcond .*16 eps\).*ridge.*throw=False"):
        ddnref.solve(a, b)
    x, saved = ddnref.solve_fwd(a, b, throw=False)
    assert np.isnan(xp.numpy(x)).all(axis=-1).tolist() == [False, True, True, False]
    assert np.isnan(xp.numpy(x)).any(axis=-1).tolist() == [False, True, True, False]
    with pytest.raises(ddnref.SingularError, match=r"2 of 4.*\(items 1, 2\)"):
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
    _, saved = ddnref.solve_fwd(np.stack([a, a]), b)
    for derivative in (partial(ddnref.solve_vjp, x), partial(ddnref.solve_jvp, None, b)):
        with pytest.raises(ValueError, match=r"x has leading axes \(\), expected \(2,\): the solution for this matrix"):
            derivative(x, *saved)


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


# --- forward mode -----------------------------------------------------------------------------------------------


def direction(rng, array):
    z = rng.standard_normal((2, *array.shape))
    return z[0] + 1j * z[1] if np.iscomplexobj(array) else z[0]


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES)
def test_the_jvp_of_right_hand_sides_that_broadcast(a_shape, b_shape, xp, rng):
    a, b = system(rng, a_shape, b_shape)
    dots = direction(rng, a), direction(rng, b)
    x, saved = ddnref.solve_fwd(xp.asarray(a), xp.asarray(b))
    size, solution = a.size, xp.numpy(x)
    for given in ((True, True), (True, False), (False, True)):
        a_dot, b_dot = (xp.asarray(d) if g else None for g, d in zip(given, dots, strict=True))
        right = given[1] * dots[1] - given[0] * (dots[0] @ solution[..., None])[..., 0]
        expected = np.linalg.solve(a, right[..., None])[..., 0] if size else np.zeros(solution.shape)
        for more in ((), (xp.asarray(b),)):
            x_dot = xp.numpy(xp.derivative(ddnref.solve_jvp, a_dot, b_dot, x, *saved, *more))
            assert x_dot.shape == solution.shape
            np.testing.assert_allclose(x_dot, expected, atol=1e-12)


@pytest.mark.parametrize(("a_complex", "b_complex"), [(False, False), (True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("a_shape", "b_shape"), [((5, 5), (5,)), ((2, 4, 4), (3, 1, 4))])
def test_jvp_agrees_with_finite_differences_and_with_the_vjp(a_shape, b_shape, a_complex, b_complex, xp, rng):
    a, b = system(rng, a_shape, b_shape)[0] + 0j, system(rng, a_shape, b_shape)[1] + 0j
    a, b = a + 1j * rng.standard_normal(a_shape), b + 1j * rng.standard_normal(b_shape)
    a, b = a if a_complex else a.real, b if b_complex else b.real
    a_dot, b_dot = direction(rng, a), direction(rng, b)
    x, (lu, pivots) = ddnref.solve_fwd(xp.asarray(a), xp.asarray(b))
    jvp = xp.jit(lambda *arrays: ddnref.solve_jvp(*arrays, throw=False))
    x_dot = xp.numpy(jvp(xp.asarray(a_dot), xp.asarray(b_dot), x, lu, pivots, xp.asarray(b)))
    moved = lambda t: ddnref.solve(a + t * a_dot, b + t * b_dot)
    assert x_dot.dtype == xp.numpy(x).dtype
    assert relative(x_dot, numerical_jvp(moved, np.zeros(1), np.ones(1), step=1e-3)) <= 1e-9
    x_bar = direction(rng, x_dot)
    bars = xp.tuple(ddnref.solve_vjp(xp.asarray(x_bar), x, lu, pivots, xp.asarray(b)))
    forward = np.sum(np.conj(x_bar) * x_dot).real
    backward = sum(np.sum(np.conj(u) * v).real for u, v in zip(bars, (a_dot, b_dot), strict=True))
    assert abs(forward - backward) <= 1e-12 * np.linalg.norm(x_bar) * np.linalg.norm(x_dot)


def test_the_jvp_factorises_nothing(rng, monkeypatch):
    a, b = system(rng, (5, 5), (5,))
    x, saved = ddnref.solve_fwd(a, b)

    def refuse(*args, **kwargs):
        raise AssertionError("a second factorisation")

    monkeypatch.setattr(_lu, "lu_factor", refuse)
    monkeypatch.setattr(scipy.linalg, "get_lapack_funcs", lambda names, arrays, original=get_lapack_funcs: (
        refuse() if "getrf" in names else original(names, arrays)))  # fmt: skip
    ddnref.solve_jvp(a, b, x, *saved)


def test_the_jvp_in_single_precision(xp, rng):
    a, b = system(rng, (2, 5, 5), (3, 2, 5))
    a_dot, b_dot = direction(rng, a), direction(rng, b)
    x, saved = ddnref.solve_fwd(a, b)
    exact = ddnref.solve_jvp(a_dot, b_dot, x, *saved)
    a, b, a_dot, b_dot = (xp.asarray(y.astype(np.float32)) for y in (a, b, a_dot, b_dot))
    x, saved = ddnref.solve_fwd(a, b)
    x_dot = xp.numpy(xp.derivative(ddnref.solve_jvp, a_dot, b_dot, x, *saved, b))
    assert x_dot.dtype == np.float32
    assert relative(x_dot, exact) <= 1e-4


def test_the_jvp_of_a_singular_matrix_raises_or_is_nan_alone(xp, rng):
    a, b = system(rng, (4, 3, 3), (4, 3))
    a[1] = np.arange(9).reshape(3, 3)
    a[2, 0, 0] = np.nan
    b[3, 1] = np.inf
    a, b = xp.asarray(a), xp.asarray(b)
    x, saved = ddnref.solve_fwd(a, b, throw=False)
    ones, zero = xp.asarray(np.ones((4, 3, 3))), xp.asarray(np.zeros((4, 3)))
    with pytest.raises(ddnref.SingularError, match=r"2 of 4.*\(items 1, 2\)"):
        ddnref.solve_jvp(None, zero, x, *saved)
    for dots in ((ones, None), (None, zero), (ones, zero)):
        missing = np.isnan(xp.numpy(xp.derivative(ddnref.solve_jvp, *dots, x, *saved, throw=False)))
        assert missing.all(axis=-1).tolist() == missing.any(axis=-1).tolist() == [False, True, True, True]


def test_the_jvp_of_rows_in_units(xp, rng):
    """Equations in other units have the same solution, and so the same derivative."""
    a, b = system(rng, (4, 4), (4,))
    a_dot, b_dot = direction(rng, a), direction(rng, b)
    x, saved = ddnref.solve_fwd(a, b)
    expected = ddnref.solve_jvp(a_dot, b_dot, x, *saved)
    units = np.asarray([1e-30, 1.0, 1e12, 1e30])
    a, a_dot, b, b_dot = map(xp.asarray, (a * units[:, None], a_dot * units[:, None], b * units, b_dot * units))
    x, saved = ddnref.solve_fwd(a, b)
    np.testing.assert_allclose(xp.numpy(xp.derivative(ddnref.solve_jvp, a_dot, b_dot, x, *saved)), expected, rtol=1e-12)


def test_static_errors_of_the_jvp(rng):
    a, b = system(rng, (3, 3), (2, 3))
    x, saved = ddnref.solve_fwd(a, b)
    with pytest.raises(TypeError, match="a_dot and b_dot are both None: there is no direction"):
        ddnref.solve_jvp(None, None, x, *saved)
    with pytest.raises(ValueError, match=r"a_dot has shape \(2, 3\), expected \(3, 3\)"):
        ddnref.solve_jvp(b, None, x, *saved)
    with pytest.raises(TypeError, match="a_dot has dtype complex128, expected float64"):
        ddnref.solve_jvp(a + 0j, None, x, *saved)
    with pytest.raises(ValueError, match=r"b_dot has shape \(3,\), expected \(2, 3\)"):
        ddnref.solve_jvp(None, b[0], x, *saved, b)
    with pytest.raises(ValueError, match=r"b_dot has shape \(4, 3\), but the solution belongs to"):
        ddnref.solve_jvp(None, np.ones((4, 3)), x, *saved)
    with pytest.raises(TypeError, match="b_dot has dtype complex128, expected float64"):
        ddnref.solve_jvp(None, b + 0j, x, *saved)
    with pytest.raises(TypeError, match="b_dot has dtype complex128, expected float64"):
        ddnref.solve_jvp(None, b + 0j, x, *saved, b)
    with pytest.raises(TypeError, match="one precision"):
        ddnref.solve_jvp(None, b.astype(np.float32), x, *saved)
    with pytest.raises(TypeError, match="one library"):
        ddnref.solve_jvp(backend("array-api-strict").asarray(a), b, x, *saved)


def test_the_jvp_reads_nothing_on_the_host_without_throw(host_reads, rng):
    strict = backend("array-api-strict")
    a, b = map(strict.asarray, system(rng, (2, 3, 3), (4, 2, 3)))
    x, saved = ddnref.solve_fwd(a, b, throw=False)
    ddnref.solve_jvp(a, b, x, *saved, throw=False)
    assert host_reads == []
    ddnref.solve_jvp(a, b, x, *saved)
    assert host_reads == ["__bool__"]
