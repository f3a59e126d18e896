"""Operators in formulas: ``A @ x``, ``A.H``, ``2 * A + B`` and the like mean what they do for matrices."""

import numpy as np
import pytest

from conftest import need
from ddnref import operators

EXPRESSIONS = {
    "A @ B": lambda a, b, c, m: a @ b,
    "2 * A": lambda a, b, c, m: 2 * a,
    "A * c": lambda a, b, c, m: a * c,
    "A / 4": lambda a, b, c, m: a / 4,
    "-A": lambda a, b, c, m: -a,
    "A + B": lambda a, b, c, m: a + b,
    "A - B": lambda a, b, c, m: a - b,
    "A + M": lambda a, b, c, m: a + m,
    "M - A": lambda a, b, c, m: m - a,
    "A - M": lambda a, b, c, m: a - m,
    "sum": lambda a, b, c, m: sum([a, b, m]),
    "A.T @ B - 2j * A.H": lambda a, b, c, m: (
        a.T @ b - 2j * a.T.conj() if isinstance(a, np.ndarray) else a.T @ b - 2j * a.H
    ),
}


@pytest.fixture
def matrices(rng):
    return [rng.standard_normal((4, 4)) + 1j * rng.standard_normal((4, 4)) for _ in range(3)]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions(name, matrices, xp, rng):
    a, b, m = matrices
    x, c = rng.standard_normal((2, 4)) + 0j, np.asarray(0.5 + 1j)
    wanted = EXPRESSIONS[name](a, b, c, m)
    left, right = (operators.dense(xp.asarray(z)) for z in (a, b))
    if xp.name == "array-api-strict" and name == "M - A":  # its arrays do not give way to the operator
        with pytest.raises(TypeError, match="Expected Array"):
            EXPRESSIONS[name](left, right, xp.asarray(c), xp.asarray(m))
        return
    operator = EXPRESSIONS[name](left, right, xp.asarray(c), xp.asarray(m))
    np.testing.assert_allclose(xp.numpy(operator @ xp.asarray(x)), x @ wanted.T, rtol=1e-13, atol=1e-13)
    if xp.name == "numpy":
        operators.check_operator(operator, x)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_arrays_on_the_left_give_way(library, matrices, request):
    need(request.config, library)
    from conftest import backend

    xp = backend(library)
    a, m = (xp.asarray(z.real) for z in matrices[:2])
    x = xp.asarray(np.arange(4.0))
    for operator, wanted in (
        (xp.asarray(np.asarray(2.0)) * operators.dense(a), 2 * matrices[0].real),
        (m + operators.dense(a), matrices[0].real + matrices[1].real),
    ):
        assert isinstance(operator, operators.LinearOperator)
        np.testing.assert_allclose(xp.numpy(operator @ x), wanted @ np.arange(4.0), rtol=1e-13)


def test_numbers_of_numpy_get_a_gradient_and_python_numbers_do_not(matrices):
    a = operators.dense(matrices[0].real)
    assert len((2 * a).params) == 1
    assert len((np.float64(2) * a).params) == 2


def test_what_is_known_of_an_operator():
    grid, points = operators.difference((4, 5)), operators.diagonal(np.ones(3, np.float32), positive_definite=True)
    assert grid.shape == (40, 20)
    assert grid.dtype is None
    assert points.dtype == np.float32
    assert repr(grid) == "LinearOperator((4, 5) → (2, 4, 5))"
    assert repr(points) == "LinearOperator((3,) → (3,), float32, positive definite, params (3,))"
    assert repr(points - points) == "LinearOperator((3,) → (3,), float32, self-adjoint, params (3,), (3,))"


def test_static_errors(matrices):
    a, b = (operators.dense(z) for z in matrices[:2])
    for wrong, match in (
        (lambda: np.ones(4) @ a, r"x @ A is not defined for an operator A and a ndarray: write A.T @ x"),
        (lambda: a * b, r"write A @ B for their product"),
        (lambda: a / b, r"ddnref.linear_solve\(A, b\) solves A x = b"),
        (lambda: a + 2, r"operators\[1\] is a int, expected a LinearOperator or an array"),
        (lambda: a - "b", r"unsupported operand|expected a LinearOperator"),
    ):
        with pytest.raises(TypeError, match=match):
            wrong()
    with pytest.raises(ValueError, match=r"x has shape \(3,\), expected \(..., 4\)"):
        a @ np.ones(3)
    with pytest.raises(ValueError, match=r"operators\[1\] has domain_shape \(3,\), expected \(4,\)|domain_shape"):
        a + operators.diagonal(np.ones(3))
