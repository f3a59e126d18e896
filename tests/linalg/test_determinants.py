"""Log-determinants: those of singular matrices, overflow, gradients of ill-conditioned matrices."""

import numpy as np
import pytest
from problems import adjoint, relative, rotation, with_spectrum

import ddnref
from conftest import backend
from ddnref.testing import assert_jvp, assert_transpose, assert_vjp


def definite(rng, m, batch=(), is_complex=False):
    return with_spectrum(rotation(rng, m, batch, is_complex), np.geomspace(1, 0.2, m))


def square(rng, m, batch=(), is_complex=False):
    z = rng.standard_normal((2, *batch, m, m))
    return (z[0] + 1j * z[1] if is_complex else z[0]) + 2 * np.eye(m)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(("m", "batch"), [(1, ()), (5, ()), (4, (3,)), (3, (2, 0)), (0, ()), (0, (2,))])
def test_values_are_those_of_numpy(m, batch, is_complex, xp, rng):
    a = square(rng, m, batch, is_complex)
    outputs = ddnref.slogdet(xp.asarray(a))
    for ours, theirs in zip(outputs, np.linalg.slogdet(a), strict=True):
        np.testing.assert_allclose(xp.numpy(ours), theirs, atol=1e-13)
        assert xp.numpy(ours).dtype == theirs.dtype
        assert tuple(ours.shape) == batch
    a = definite(rng, m, batch, is_complex)
    logabsdet = ddnref.logdet(xp.asarray(a))
    assert tuple(logabsdet.shape) == batch
    np.testing.assert_allclose(xp.numpy(logabsdet), np.linalg.slogdet(a)[1], atol=1e-13)


def test_signs_of_permutations(xp):
    for order in ([0, 1, 2], [1, 0, 2], [1, 2, 0], [2, 1, 0]):
        p = np.eye(3)[order]
        sign, logabsdet = ddnref.slogdet(xp.asarray(p))
        assert (float(sign), float(logabsdet)) == (round(np.linalg.det(p)), 0.0)


def test_no_overflow(xp, rng):
    a = 1e6 * definite(rng, 60)
    with np.errstate(over="ignore"):
        assert np.isinf(np.linalg.det(a))
    expected = 60 * np.log(1e6) + np.sum(np.log(np.geomspace(1, 0.2, 60)))
    for found in (ddnref.logdet(xp.asarray(a)), ddnref.slogdet(xp.asarray(a))[1]):
        assert abs(float(found) - expected) <= 1e-13 * abs(expected)


@pytest.mark.parametrize("is_complex", [False, True])
def test_derivatives(is_complex, rng):
    a = definite(rng, 6, (2,), is_complex)
    given = {"saves": True, "needs": (), "tangent": "symmetric", "symmetrises": True}
    assert assert_vjp(ddnref.logdet_fwd, ddnref.logdet_vjp, a, gap=0.2, **given).error <= 1e-9
    assert_jvp(ddnref.logdet_fwd, ddnref.logdet_jvp, a, gap=0.2, rtol=1e-9, **given)
    assert_transpose(ddnref.logdet_fwd, ddnref.logdet_jvp, ddnref.logdet_vjp, a, rtol=1e-12, **given)
    a, given = square(rng, 5, (2,), is_complex), {"saves": True, "needs": ()}
    assert assert_vjp(ddnref.slogdet_fwd, ddnref.slogdet_vjp, a, gap=0.5, **given).error <= 1e-9
    assert_jvp(ddnref.slogdet_fwd, ddnref.slogdet_jvp, a, gap=0.5, rtol=1e-9, **given)
    assert_transpose(ddnref.slogdet_fwd, ddnref.slogdet_jvp, ddnref.slogdet_vjp, a, rtol=1e-12, **given)


def test_the_gradient_of_the_sign_is_that_of_an_angle(xp, rng):
    """Multiply a complex matrix by a phase: the sign turns m times as far, and the logarithm stays."""
    a = square(rng, 3, (), True)
    outputs, saved = ddnref.slogdet_fwd(xp.asarray(a))
    sign_dot, logabsdet_dot = ddnref.slogdet_jvp(xp.asarray(1j * a), *outputs, *saved)
    np.testing.assert_allclose(xp.numpy(sign_dot), 3j * xp.numpy(outputs[0]), rtol=1e-13)
    assert abs(float(logabsdet_dot)) <= 1e-14


def test_a_cotangent_that_is_not_there(xp, rng):
    for is_complex in (False, True):
        a = square(rng, 3, (2,), is_complex)
        outputs, saved = ddnref.slogdet_fwd(xp.asarray(a))
        bars = tuple(
            xp.asarray(np.ones(2, xp.numpy(y).dtype) * (1 + 2j if np.iscomplexobj(xp.numpy(y)) else 1)) for y in outputs
        )
        both = xp.numpy(xp.derivative(ddnref.slogdet_vjp, *bars, *outputs, *saved))
        sign = xp.numpy(xp.derivative(ddnref.slogdet_vjp, bars[0], None, *outputs, *saved))
        log = xp.numpy(xp.derivative(ddnref.slogdet_vjp, None, bars[1], *outputs, *saved))
        np.testing.assert_allclose(both, sign + log, atol=1e-14)
        assert np.all(sign == 0) or is_complex
        np.testing.assert_allclose(log, np.linalg.inv(adjoint(a)), atol=1e-13)


@pytest.mark.parametrize("condition", [1e4, 1e8, 1e12])
def test_ill_conditioned_ones_against_fifty_digits(condition, rng):
    import mpmath

    a = with_spectrum(rotation(rng, 6), np.geomspace(1, 1 / condition, 6))
    with mpmath.workdps(50):
        matrix = mpmath.matrix(a.tolist())
        inverse, log = np.asarray((matrix**-1).tolist(), float), float(mpmath.log(mpmath.det(matrix)))
    unit = np.finfo(float).eps * condition
    value, saved = ddnref.logdet_fwd(a)
    outputs, factors = ddnref.slogdet_fwd(a)
    for found in (value, outputs[1]):
        assert abs(float(found) - log) <= 8 * unit
    assert relative(ddnref.logdet_vjp(np.asarray(1.0), value, *saved), inverse) <= 8 * unit
    assert relative(ddnref.slogdet_vjp(None, np.asarray(1.0), *outputs, *factors), inverse) <= 8 * unit


def test_singular_matrices(xp, rng):
    a = square(rng, 3, (4,))
    a[1] = np.arange(9).reshape(3, 3)  # singular but for rounding
    a[2, 0, 0] = np.nan
    outputs, saved = ddnref.slogdet_fwd(xp.asarray(a))
    sign, logabsdet = map(xp.numpy, outputs)
    assert (sign[1], logabsdet[1]) == (0, -np.inf)
    assert np.isnan(sign).tolist() == np.isnan(logabsdet).tolist() == [False, False, True, False]
    bar, dot = xp.asarray(np.ones(4)), xp.asarray(np.ones((4, 3, 3)))
    with pytest.raises(ddnref.SingularError, match=r"minus infinity, or not a number \(items 1, 2 of 4\)"):
        ddnref.slogdet_vjp(None, bar, *outputs, *saved)
    with pytest.raises(ddnref.SingularError, match="items 1, 2 of 4"):
        ddnref.slogdet_jvp(dot, *outputs, *saved)
    found = ddnref.slogdet_vjp(None, bar, *outputs, *saved, throw=False)
    for array in (found, *ddnref.slogdet_jvp(dot, *outputs, *saved, throw=False)):
        flags = np.isnan(xp.numpy(array).reshape(4, -1))
        assert flags.all(axis=-1).tolist() == flags.any(axis=-1).tolist() == [False, True, True, False]


def test_a_matrix_that_is_not_definite(xp, rng):
    a = definite(rng, 3, (3,))
    a[1] = -a[1]
    with pytest.raises(ddnref.SingularError, match=r"1 of 3 matrices \(item 1\) are not positive definite"):
        ddnref.logdet(xp.asarray(a))
    value, saved = ddnref.logdet_fwd(xp.asarray(a), throw=False)
    assert np.isnan(xp.numpy(value)).tolist() == [False, True, False]
    one, dot = xp.asarray(np.ones(3)), xp.asarray(a)
    with pytest.raises(ddnref.SingularError, match="item 1"):
        ddnref.logdet_vjp(one, value, *saved)
    found = xp.numpy(xp.derivative(ddnref.logdet_vjp, one, value, *saved, throw=False))
    assert np.isnan(found).all(axis=(-2, -1)).tolist() == np.isnan(found).any(axis=(-2, -1)).tolist()
    assert np.isnan(xp.numpy(xp.derivative(ddnref.logdet_jvp, dot, value, *saved, throw=False))).tolist() == [
        False,
        True,
        False,
    ]


def test_single_precision(xp, rng):
    a = definite(rng, 6, (2,))
    value, saved = ddnref.logdet_fwd(a)
    exact = ddnref.logdet_vjp(np.ones(2), value, *saved)
    value, saved = ddnref.logdet_fwd(xp.asarray(a.astype(np.float32)))
    found = xp.numpy(xp.derivative(ddnref.logdet_vjp, xp.asarray(np.ones(2, np.float32)), value, *saved))
    assert found.dtype == xp.numpy(value).dtype == np.float32
    assert relative(found, exact) <= 1e-5


def test_static_errors(rng):
    a = square(rng, 3)
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\)"):
        ddnref.slogdet(a[:, :2])
    with pytest.raises(TypeError, match="a has dtype int64"):
        ddnref.logdet(a.astype(np.int64))
    outputs, saved = ddnref.slogdet_fwd(a)
    with pytest.raises(TypeError, match="sign_bar and logabsdet_bar are both None"):
        ddnref.slogdet_vjp(None, None, *outputs, *saved)
    with pytest.raises(TypeError, match="logabsdet_bar has dtype float32"):
        ddnref.slogdet_vjp(None, np.float32(1) * np.ones((), np.float32), *outputs, *saved)
    with pytest.raises(ValueError, match=r"sign_bar has shape \(2,\), expected \(\)"):
        ddnref.slogdet_vjp(np.ones(2), None, *outputs, *saved)
    with pytest.raises(TypeError, match="pivots has dtype float64, expected the integers that slogdet_fwd saved"):
        ddnref.slogdet_vjp(None, np.asarray(1.0), *outputs, saved[0], np.ones(3))
    with pytest.raises(ValueError, match=r"a_dot has shape \(2, 3, 3\)"):
        ddnref.slogdet_jvp(np.ones((2, 3, 3)), *outputs, *saved)
    value, saved = ddnref.logdet_fwd(definite(rng, 3))
    with pytest.raises(ValueError, match=r"logabsdet_bar has shape \(3,\), expected \(\)"):
        ddnref.logdet_vjp(np.ones(3), value, *saved)
    with pytest.raises(TypeError, match="a_dot has dtype float32"):
        ddnref.logdet_jvp(np.ones((3, 3), np.float32), value, *saved)


def test_one_flag_is_read(host_reads, rng):
    strict = backend("array-api-strict")
    a = strict.asarray(definite(rng, 3, (2,)))
    value, saved = ddnref.logdet_fwd(a, throw=False)
    outputs, factors = ddnref.slogdet_fwd(a)
    ddnref.logdet_vjp(value, value, *saved, throw=False)
    ddnref.slogdet_vjp(*outputs, *outputs, *factors, throw=False)
    ddnref.slogdet_jvp(a, *outputs, *factors, throw=False)
    assert host_reads == []
    ddnref.logdet_fwd(a)
    ddnref.slogdet_vjp(*outputs, *outputs, *factors)
    assert host_reads == ["__bool__"] * 2
