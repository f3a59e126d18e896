"""The bridge to HIPS autograd, where test_matrix.py does not go: complex conventions, operators, refusals."""

import subprocess
import sys

import numpy as np
import pytest
from problems import projector_gradient, relative, rotation, symmetric, with_spectrum

import ddnref
from ddnref import operators

pytestmark = pytest.mark.framework("autograd")

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, 2.0])
INSIDE = TRIPLE == 0.3


@pytest.fixture
def autograd():
    return pytest.importorskip("autograd")


@pytest.fixture
def differentiable(autograd):
    from ddnref.interop.autograd import differentiable

    return differentiable


def test_complex_gradients_follow_autograd(autograd, differentiable, rng):
    """The same loss through autograd's own eigenvalues, whose convention is the conjugate of ours."""
    np_, x = autograd.numpy, symmetric(rng, 4, (), True)
    theirs = autograd.grad(lambda x: np_.sum(np_.linalg.eigh(x)[0] ** 3))(x)
    ours = autograd.grad(lambda x: np_.sum(differentiable(ddnref.eigh)(x)[0] ** 3))(x)
    assert relative(ours, (theirs + theirs.conj().T) / 2) <= 1e-12


def test_exact_at_repeated_eigenvalues(autograd, differentiable, rng):
    v = rotation(rng, 6)
    x, c = with_spectrum(v, TRIPLE), rng.standard_normal((6, 6))
    c = (c + c.T) / 2

    def loss(x):
        v = differentiable(ddnref.eigh)(x)[1][:, INSIDE]
        return autograd.numpy.sum(c * (v @ v.T))

    assert relative(autograd.grad(loss)(x), projector_gradient(v, TRIPLE, INSIDE, c)) <= 1e-12


def test_tangents_are_the_transpose_of_gradients(autograd, differentiable, rng):
    """It holds for complex input too, where autograd's gradient is the conjugate of ours."""
    np_, eigh = autograd.numpy, differentiable(ddnref.eigh)

    def loss(x):
        w, v = eigh(x)
        return np_.sum(w**3) + np_.sum(np_.abs(v) ** 3)

    for is_complex in (False, True):
        x, x_dot = (symmetric(rng, 4, (), is_complex) for _ in range(2))
        value, moved = autograd.make_jvp(loss)(x)(x_dot)
        assert value == loss(x)
        assert relative(moved, np.sum(np.real(autograd.grad(loss)(x) * x_dot))) <= 1e-12


def test_the_projector_of_a_cluster_moves_as_it_should(autograd, differentiable, rng):
    """Along a direction that leaves the cluster together; one that splits it has no tangent."""
    v, c = rotation(rng, 6), symmetric(rng, 6)
    x, x_dot = with_spectrum(v, TRIPLE), symmetric(rng, 6)
    inside = v[:, INSIDE] @ v[:, INSIDE].T
    whole = x_dot - inside @ x_dot @ inside

    def loss(x):
        v = differentiable(ddnref.eigh)(x)[1][:, INSIDE]
        return autograd.numpy.sum(c * (v @ v.T))

    _, moved = autograd.make_jvp(loss)(x)(whole)
    assert relative(moved, np.sum(projector_gradient(v, TRIPLE, INSIDE, c) * whole)) <= 1e-12
    with pytest.warns(RuntimeWarning, match="A tangent is NaN"):
        assert np.isnan(autograd.make_jvp(loss)(x)(x_dot)[1])


def test_a_gauge_dependent_loss_is_nan_with_a_warning(autograd, differentiable, rng):
    x = with_spectrum(rotation(rng, 6), TRIPLE)
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        x_bar = autograd.grad(lambda x: autograd.numpy.sum(differentiable(ddnref.eigh)(x)[1] ** 3))(x)
    assert np.all(np.isnan(x_bar))


def test_an_operator_and_its_status(autograd, differentiable, rng):
    """Gradients reach the parameters of an operator; the status is a plain array."""
    d, b = 1 + rng.random(5), rng.standard_normal(5)
    operator, solve = (
        operators.diagonal(d, positive_definite=True),
        differentiable(ddnref.linear_solve, rtol=1e-14),
    )

    def loss(d, b):
        x, info = solve(operator.with_params(d), b)
        assert bool(info.converged)
        return autograd.numpy.sum(x**2)

    d_bar, b_bar = autograd.grad(loss, (0, 1))(d, b)
    assert relative(d_bar, -2 * b**2 / d**3) <= 1e-12
    assert relative(b_bar, 2 * b / d**2) <= 1e-12
    d_dot = rng.standard_normal(5)
    assert relative(autograd.make_jvp(loss)(d, b)(d_dot)[1], np.sum(d_bar * d_dot)) <= 1e-12
    assert relative(autograd.make_jvp(loss, 1)(d, b)(d_dot)[1], np.sum(b_bar * d_dot)) <= 1e-12


def test_an_unused_result_costs_nothing_and_gives_zero(autograd, differentiable, rng):
    x = symmetric(rng, 4)
    assert np.all(autograd.grad(lambda x: autograd.numpy.sum(0 * differentiable(ddnref.eigh)(x)[0]))(x) == 0)


def test_a_direction_of_zeros_moves_nothing(autograd, differentiable, rng):
    x = symmetric(rng, 4)
    assert autograd.make_jvp(lambda x: autograd.numpy.sum(differentiable(ddnref.eigh)(x)[1]))(x)(0 * x)[1] == 0


def test_second_derivatives_are_refused_in_every_order_of_the_modes(autograd, differentiable, rng):
    loss = lambda x: autograd.numpy.sum(differentiable(ddnref.eigh)(x)[0] ** 3)
    x, x_dot = symmetric(rng, 3), symmetric(rng, 3)
    tangent = lambda x: autograd.make_jvp(loss)(x)(x_dot)[1]
    for call in (
        lambda: autograd.hessian(loss)(x),
        lambda: autograd.make_jvp(autograd.grad(loss))(x)(x_dot),
        lambda: autograd.grad(tangent)(x),
        lambda: autograd.make_jvp(tangent)(x)(x_dot),
    ):
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            call()


def test_unknown_options_and_operations(differentiable):
    with pytest.raises(TypeError, match="has no option rtl"):
        differentiable(ddnref.eigsh, k=2, rtl=1e-3)
    with pytest.raises(TypeError, match="has no rule"):
        differentiable(np.sin)


def test_boxes_outside_the_bridge_are_refused_by_name(autograd):
    for call in (ddnref.eigh, operators.dense, lambda x: operators.diagonal(x[0])):
        with pytest.raises(TypeError, match=r"autograd\.ArrayBox.*interop\.autograd.*differentiable.*with_params"):
            autograd.grad(call)(np.eye(2))


def test_imports_autograd_only_when_used():
    code = "import sys, ddnref; assert 'autograd' not in sys.modules; import ddnref.interop.autograd"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
