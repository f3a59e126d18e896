"""Conjugate gradients reversed through their iterates: right for a few steps, useless for many."""

import numpy as np
import pytest
from krylov_problems import stencil
from problems import relative

import ddnref
from ddnref.operators import LinearOperator
from ddnref.reference import cg_unrolled, cg_unrolled_vjp
from ddnref.testing import assert_vjp


def dense(a):
    def apply(params, x):
        return (params[0] @ x[..., None])[..., 0]

    def params_vjp(params, y_bar, x):
        outer = y_bar[..., :, None] * x[..., None, :]
        return (outer if outer.ndim == params[0].ndim else outer.sum(axis=0),)

    def adjoint(params, y):
        return (params[0].mT @ y[..., None])[..., 0]

    return LinearOperator((a,), apply, adjoint, params_vjp, a.shape[-1:], a.shape[-2:-1], self_adjoint=True)


@pytest.mark.parametrize("n_iter", [1, 2, 5])
def test_against_finite_differences(n_iter, xp, rng):
    """The derivative of these steps exists for nonsymmetric parameters too: A and Aᵀ are distinguished."""
    z = rng.standard_normal((6, 6)) / 4
    a, b = xp.asarray(3 * np.eye(6) + z), xp.asarray(rng.standard_normal(6))

    def forward(a, b):
        return cg_unrolled(dense(a), b, n_iter)[0]

    def vjp(x_bar, x, a, b):
        (a_bar,), b_bar = cg_unrolled_vjp(x_bar, b, cg_unrolled(dense(a), b, n_iter)[1], dense(a))
        return a_bar, b_bar

    report = assert_vjp(forward, vjp, a, b, needs=(0, 1), gap=1.0, directions=3)
    assert report.error <= 1e-9, report


def test_batch_is_the_loop(rng):
    weight = rng.uniform(0.5, 1.0, (5, 6))
    b, x_bar = rng.standard_normal((2, 3, 5, 6))
    operator = stencil(weight)
    _, saved = cg_unrolled(operator, b, 4)
    (bar,), b_bar = cg_unrolled_vjp(x_bar, b, saved, operator)
    alone = [cg_unrolled_vjp(x_bar[i], b[i], cg_unrolled(operator, b[i], 4)[1], operator) for i in range(3)]
    assert relative(bar, sum(one[0][0] for one in alone)) <= 1e-13
    assert relative(b_bar, np.stack([one[1] for one in alone])) <= 1e-13


def blurred(n, ridge):
    """The eigenvalues of a blur with a ridge as a diagonal operator: a few large ones, many at the ridge."""
    kernel = np.hanning(9)[:, None] * np.hanning(9)
    spectrum = np.abs(np.fft.fft2(kernel / kernel.sum(), (n, n))) ** 2 + ridge

    def apply(params, x):
        return params[0] * x

    return LinearOperator((spectrum,), apply, apply, lambda p, y_bar, x: (y_bar * x,), (n, n), (n, n), True)


def test_unstable_where_the_implicit_gradient_is_not(rng):
    """x and the gradient of b are right to six digits, that of the parameters is wrong by orders of magnitude."""
    operator = blurred(64, 1e-3)
    (d,) = operator.params
    b, x_bar = rng.standard_normal((2, 64, 64))
    exact = -x_bar / d * b / d
    x, saved = cg_unrolled(operator, b, 180)
    (bar,), b_bar = cg_unrolled_vjp(x_bar, b, saved, operator)
    assert relative(x, b / d) <= 1e-6
    assert relative(b_bar, x_bar / d) <= 1e-6
    assert relative(bar, exact) >= 1e2
    adjoint, _ = ddnref.krylov.cg(operator, x_bar, rtol=1e-6)
    assert relative(-adjoint * x, exact) <= 1e-4


def test_static_errors():
    operator = stencil(np.ones((3, 3)))
    with pytest.raises(TypeError, match="real arrays only"):
        cg_unrolled(operator, np.ones((3, 3), dtype=complex), 2)
    with pytest.raises(ValueError, match="b has shape"):
        cg_unrolled(operator, np.ones((3, 4)), 2)
    with pytest.raises(ValueError, match="saved is empty"):
        cg_unrolled_vjp(np.ones((3, 3)), np.ones((3, 3)), (), operator)
    with pytest.raises(ValueError, match="x_bar has shape"):
        cg_unrolled_vjp(np.ones((2, 3)), np.ones((3, 3)), cg_unrolled(operator, np.ones((3, 3)), 1)[1], operator)
