"""Results of each node against oracles, and where minimum or gradient is not unique; every option."""

import itertools
from functools import partial

import mpmath
import numpy as np
import pytest
from problems import relative
from scipy.optimize import minimize, minimize_scalar

from conftest import Backend, backend
from ddnref import ConvergenceError, OptimalityError, SingularError, nodes
from ddnref._kernels import least_squares
from ddnref.testing import assert_vjp, numerical_jvp

NUMPY = Backend("numpy", np)

NORMS = (1, 2, np.inf)
ORD = {1: 1, 2: 2, np.inf: np.inf}


def length(x, norm):
    return np.linalg.norm(x, ord=ORD[norm], axis=-1)


# --- projections --------------------------------------------------------------------------------------------------


def sphere_points(rng, norm, radius, count=200_000):
    z = rng.standard_normal((count, 3))
    return radius * z / length(z, norm)[:, None]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [0.2, 3.0], ids=["inside", "outside"])
@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_nearest_point_of_the_sphere(norm, scale, radius, rng):
    """On the sphere to rounding, and no point among many is nearer."""
    points = sphere_points(rng, norm, radius)
    for x in scale * radius * rng.uniform(0.3, 1, (20, 3)) * rng.choice([-1, 1], (20, 3)) / 3 ** (1 / norm):
        y = nodes.project_sphere(x, norm=norm, radius=radius)
        assert abs(length(y, norm) - radius) <= 1e-14 * radius
        assert np.linalg.norm(y - x) <= np.min(np.linalg.norm(points - x, axis=-1)) * (1 + 1e-12)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_nearest_point_of_the_ball(norm, radius, rng):
    """The variational inequality of a projection on a convex set: ⟨x − y, u − y⟩ ≤ 0 for all of its points."""
    points = sphere_points(rng, norm, radius, 2000)
    x = radius * rng.uniform(-2, 2, (50, 3))
    y = nodes.project_ball(x, norm=norm, radius=radius)
    inside = length(x, norm) <= radius
    assert 2 < np.sum(inside) < 48
    assert np.array_equal(y[inside], x[inside])
    assert np.all(length(y, norm) <= radius * (1 + 1e-14))
    for a, b in zip(x, y, strict=True):
        assert np.max((points - b) @ (a - b)) <= 1e-12


@pytest.mark.parametrize("total", [1.0, 3.0])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_nearest_point_of_the_simplex(total, offset, rng):
    x = rng.standard_normal((100, 4)) + offset
    y = nodes.project_simplex(x, total=total)
    assert np.all(y >= 0)
    np.testing.assert_allclose(np.sum(y, axis=-1), total, rtol=1e-14)
    vertices = total * np.eye(4)
    for a, b in zip(x, y, strict=True):
        assert np.max((vertices - b) @ (a - b)) <= 1e-9 * (1 + offset) ** 0.5


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_from_inside_a_sphere(norm, rng):
    x = np.asarray([0.12, -0.31, 0.23, 0.05])
    report = assert_vjp(
        lambda x: nodes.project_sphere(x, norm=norm, radius=1.5),
        lambda *a: nodes.project_sphere_vjp(*a, norm=norm, radius=1.5),
        x, needs=(0,), gap=0.03,
    )  # fmt: skip
    assert report.error <= 1e-9


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_inside_a_ball_is_the_cotangent(norm, rng):
    x, y_bar = np.asarray([0.1, -0.3, 0.2]), rng.standard_normal(3)
    y = nodes.project_ball(x, norm=norm)
    assert np.array_equal(nodes.project_ball_vjp(y_bar, y, x, norm=norm), y_bar)
    assert not np.array_equal(nodes.project_ball_vjp(y_bar, y, x, norm=norm, radius=0.1), y_bar)


@pytest.mark.parametrize(
    ("norm", "x"),
    [(1, [0.0, 0.0]), (2, [0.0, 0.0]), (np.inf, [0.0, 0.0]), (1, [0.5, 0.0]), (np.inf, [0.5, -0.5])],
)
def test_where_the_nearest_point_is_not_unique(norm, x, xp):
    x = xp.asarray(np.asarray([x, [3.0, 4.0]]))
    good = xp.numpy(nodes.project_sphere(xp.asarray(np.asarray([3.0, 4.0])), norm=norm))
    with pytest.raises(SingularError, match="not unique"):
        nodes.project_sphere(x, norm=norm)
    y = nodes.project_sphere(x, norm=norm, throw=False)
    assert np.all(np.isnan(xp.numpy(y)[0]))
    np.testing.assert_allclose(xp.numpy(y)[1], good)
    with pytest.raises(SingularError, match="not unique"):
        nodes.project_sphere_vjp(y, y, x, norm=norm)
    with pytest.raises(SingularError, match="project_sphere_jvp: the nearest point of the sphere is not unique"):
        nodes.project_sphere_jvp(y, y, x, norm=norm)
    for derivative in (nodes.project_sphere_vjp, nodes.project_sphere_jvp):
        moved = xp.numpy(derivative(xp.asarray(np.ones((2, 2))), y, x, norm=norm, throw=False))
        assert np.all(np.isnan(moved[0]))
        assert np.all(np.isfinite(moved[1]))


def test_what_comes_back_where_the_activity_changes():
    """The documented gradient: the cotangent on the boundary of a ball, 0 at a bound or at the threshold."""
    y_bar = np.asarray([1.0, 2.0])
    for norm, x in ((1, [0.5, 0.5]), (2, [0.6, 0.8]), (np.inf, [1.0, 0.3])):
        x = np.asarray(x)
        assert np.array_equal(nodes.project_ball_vjp(y_bar, x, x, norm=norm), y_bar)
    x = np.asarray([1.0, 3.0])
    y = nodes.project_sphere(x, norm=np.inf)
    assert np.array_equal(nodes.project_sphere_vjp(y_bar, y, x, norm=np.inf), [0.0, 0.0])
    x = np.asarray([1.5, 0.5])
    y = nodes.project_simplex(x)
    assert np.array_equal(nodes.project_simplex_vjp(y_bar, y), [0.0, 0.0])


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
@pytest.mark.parametrize("side", [-1, 1])
def test_gradients_close_to_a_change_of_activity(distance, side):
    """Steps of a tenth of the distance to it."""
    x = np.asarray([1.5 + side * distance, 0.5, -0.3])  # the second entry leaves the support at 0.5
    for f, f_vjp, needs in (
        (nodes.project_simplex, nodes.project_simplex_vjp, ()),
        (
            lambda x: nodes.project_ball(x, norm=1),
            lambda *a: nodes.project_ball_vjp(*a, norm=1),
            (0,),
        ),
    ):
        report = assert_vjp(f, f_vjp, x, needs=needs, step=distance / 10)
        assert report.error <= 1e-9


def test_static_errors_of_projections():
    with pytest.raises(ValueError, match="norm is 3, expected 1, 2 or inf"):
        nodes.project_sphere(np.ones(2), norm=3)
    for radius in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="radius"):
            nodes.project_ball(np.ones(2), radius=radius)
    with pytest.raises(ValueError, match="total"):
        nodes.project_simplex(np.ones(2), total=0.0)
    with pytest.raises(ValueError, match=r"x has shape \(3, 0\)"):
        nodes.project_simplex(np.ones((3, 0)))


# --- least squares ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(6, 4), (4, 4), (4, 1), (2, 4)])
def test_least_squares_on_sphere_is_the_global_minimum(radius, shape, rng):
    """Against many descents from random starts."""
    for _ in range(5):
        a, b = rng.standard_normal(shape), rng.standard_normal(shape[0])
        if shape == (2, 4) and np.linalg.norm(np.linalg.pinv(a) @ b) < radius:  # all of a circle has residual zero
            with pytest.raises(SingularError, match="hard case"):
                nodes.least_squares_on_sphere(a, b, radius=radius)
            continue
        y = nodes.least_squares_on_sphere(a, b, radius=radius)
        assert abs(np.linalg.norm(y) - radius) <= 1e-12 * radius
        starts = rng.standard_normal((30, shape[1]))

        def f(u, a=a, b=b):
            """Objective at the point of the sphere in the direction of u, and its gradient."""
            unit = u / np.linalg.norm(u)
            error = radius * (a @ unit) - b
            gradient = 2 * radius * (error @ a)
            return error @ error, (gradient - (gradient @ unit) * unit) / np.linalg.norm(u)

        best = min(minimize(f, u, jac=True, tol=1e-12).fun for u in starts)
        assert np.sum((a @ y - b) ** 2) <= best * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-8])
def test_least_squares_on_sphere_near_the_hard_case(size, rng):
    """c_1 → 0: the multiplier approaches the eigenvalue, the equation stays solved."""
    q = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    a, c = np.diag([1.0, 2.0, 3.0, 4.0]) @ q.T, np.asarray([size, 0.1, 0.1, 0.1])
    b = np.linalg.solve(a.T, q @ c)
    y = nodes.least_squares_on_sphere(a, b, radius=2.0)
    gradient = a.T @ (a @ y - b)
    assert abs(np.linalg.norm(y) - 2) <= 1e-10
    assert np.linalg.norm(gradient - (gradient @ y) / 4 * y) <= 1e-8
    assert np.sign(q[:, 0] @ y) == np.sign(c[0])


def test_least_squares_on_sphere_radius_matters_to_the_gradient(rng):
    a, b = rng.standard_normal((5, 3)), 4 * rng.standard_normal(5)
    report = assert_vjp(
        lambda a, b: nodes.least_squares_on_sphere(a, b, radius=0.7),
        lambda *args: nodes.least_squares_on_sphere_vjp(*args, radius=0.7),
        a, b, needs=(0, 1), gap=0.3,
    )  # fmt: skip
    assert report.error <= 1e-9
    y = nodes.least_squares_on_sphere(a, b, radius=0.7)
    with pytest.raises(OptimalityError):
        nodes.least_squares_on_sphere_vjp(y, y, a, b)
    with pytest.raises(OptimalityError):
        nodes.least_squares_on_sphere_jvp(a, b, y, a, b)
    a_dot = rng.standard_normal(a.shape)
    numerical = numerical_jvp(lambda a: nodes.least_squares_on_sphere(a, b, radius=0.7), a, a_dot, gap=0.3)
    assert relative(nodes.least_squares_on_sphere_jvp(a_dot, None, y, a, b, radius=0.7), numerical) <= 1e-9
    with pytest.raises(OptimalityError):
        nodes.least_squares_on_sphere_jvp(a, b, y * (1 + 1e-4), a, b, radius=0.7, check_rtol=1e-6)
    nodes.least_squares_on_sphere_jvp(a, b, y * (1 + 1e-4), a, b, radius=0.7, check_rtol=1e-2)


def test_hard_case_is_reported_and_harms_no_other(xp, rng):
    a = np.stack([np.diag([1.0, 2.0, 3.0])] * 3)
    b = np.asarray([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    with pytest.raises(SingularError, match="hard case"):
        nodes.least_squares_on_sphere(xp.asarray(a), xp.asarray(b), radius=5.0)
    y = xp.numpy(nodes.least_squares_on_sphere(xp.asarray(a), xp.asarray(b), radius=5.0, throw=False))
    assert np.all(np.isnan(y[[0, 2]]))
    np.testing.assert_allclose(y[1], nodes.least_squares_on_sphere(a[1], b[1], radius=5.0))
    # no component along the first eigenvector, but a sphere so small that none is needed
    y = nodes.least_squares_on_sphere(a[0], np.asarray([0.0, 9.0, 9.0]), radius=0.5)
    assert abs(np.linalg.norm(y) - 0.5) <= 1e-14


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_ridge", [True, False])
def test_weighted_least_squares(bias, with_ridge, rng):
    a, b, weights = rng.standard_normal((3, 9, 2)), rng.standard_normal((3, 9)), rng.uniform(0, 2, (3, 9))
    ridge = (rng.uniform(0.5, 1, 3),) if with_ridge else ()
    y = nodes.weighted_least_squares(a, b, weights, *ridge, bias=bias)
    for i in range(3):
        columns = np.concat([a[i], np.ones((9, 1))], axis=1) if bias else a[i]
        root = np.sqrt(weights[i])
        rows = [root[:, None] * columns]
        if with_ridge:
            rows.append(np.sqrt(ridge[0][i]) * np.eye(2, columns.shape[1]))
        target = np.concat([root * b[i], np.zeros(2 * with_ridge)])
        assert relative(y[i], np.linalg.lstsq(np.concat(rows), target, rcond=None)[0]) <= 1e-12

    def vjp(*args):
        return tuple(g for g in nodes.weighted_least_squares_vjp(*args, bias=bias) if g is not None)

    inputs = (a, b, weights, *ridge)
    forward = lambda *z: nodes.weighted_least_squares(*z, bias=bias)
    assert assert_vjp(forward, vjp, *inputs, needs=range(len(inputs)), gap=0.3).error <= 1e-9
    # The tangent along each input alone is the transpose, for every combination of ridge and bias.
    y_bar = rng.standard_normal(y.shape)
    for i, bar in enumerate(vjp(y_bar, y, *inputs)):
        dot = rng.standard_normal(bar.shape)
        dots = [dot if i == j else None for j in range(4)]
        y_dot = nodes.weighted_least_squares_jvp(*dots, y, *inputs, bias=bias)
        error = abs(np.sum(y_bar * y_dot) - np.sum(bar * dot))
        assert error <= 1e-12 * np.linalg.norm(y_bar) * np.linalg.norm(y_dot)
        along = lambda t, i=i, dot=dot: forward(*(z + t[0] * dot if i == j else z for j, z in enumerate(inputs)))
        assert relative(y_dot, numerical_jvp(along, np.zeros(1), np.ones(1), step=1e-4)) <= 1e-9


def exact_regression(a, b, weights, ridge, bias, y_bar):
    """Solution and gradients by the normal equations with 60 digits."""
    n = a.shape[1]
    number = lambda z: mpmath.matrix(np.asarray(z, dtype=np.float64).tolist())
    with mpmath.workdps(60):
        whole = number(np.concat([a, np.ones((len(a), 1))], axis=1) if bias else a)
        w = mpmath.diag(list(number(weights)))
        h = whole.T * w * whole
        for i in range(n if ridge is not None else 0):
            h[i, i] += float(ridge)
        y, u = mpmath.lu_solve(h, whole.T * (w * number(b))), mpmath.lu_solve(h, number(y_bar))
        z, r = whole * u, number(b) - whole * y
        zr = mpmath.matrix([p * q for p, q in zip(z, r, strict=True)])
        found = y, (w * r) * u.T - (w * z) * y.T, w * z, zr
        y_, a_bar, b_bar, weights_bar = (np.asarray(f.tolist(), dtype=np.float64) for f in found)
        ridge_bar = () if ridge is None else (float(-sum(u[i] * y[i] for i in range(n))),)
        return y_[:, 0], a_bar[:, :n], b_bar[:, 0], weights_bar[:, 0], *ridge_bar


def exact_regression_tangents(a, b, weights, ridge, bias, dots):
    """Tangents of the coefficients along each input alone, with 60 digits, and the size of the terms of each."""
    n, one = a.shape[1], np.ones((len(a), 1))
    number = lambda z: mpmath.matrix(np.asarray(z, dtype=np.float64).tolist())
    times = lambda d, z: mpmath.matrix([[x * z[i, j] for j in range(z.cols)] for i, x in enumerate(d)])
    with mpmath.workdps(60):
        whole, w = number(np.concat([a, one], axis=1) if bias else a), number(weights)
        moved = number(np.concat([dots[0], 0 * one], axis=1) if bias else dots[0])
        penalty = mpmath.matrix([ridge if ridge is not None and i < n else 0 for i in range(whole.cols)])
        h = whole.T * times(w, whole) + mpmath.diag(list(penalty))
        y = mpmath.lu_solve(h, whole.T * times(w, number(b)))
        r = number(b) - whole * y
        right = [
            [moved.T * times(w, r), -whole.T * times(w, moved * y)],
            [whole.T * times(w, number(dots[1]))],
            [whole.T * times(r, number(dots[2]))],
            [mpmath.matrix([-dots[3] * y[i] if i < n else 0 for i in range(whole.cols)])] if ridge is not None else [],
        ]
        found = [[np.asarray(mpmath.lu_solve(h, z).tolist(), np.float64)[:n, 0] for z in terms] for terms in right]
    return [(sum(terms), sum(map(np.linalg.norm, terms))) for terms in found if terms]


def errors_of_regression_tangents(xp, rng, a, b, weights, ridge=None, bias=True):
    """Errors of the tangent of the coefficients along each input alone, relative to its terms, which may cancel."""
    n, given = a.shape[1], [a, b, weights, *(() if ridge is None else (np.asarray(ridge, a.dtype),))]
    y = nodes.weighted_least_squares(*map(xp.asarray, given), bias=bias)
    sizes = [np.std(a, axis=0), np.max(np.abs(b)), np.max(weights), ridge][: len(given)]
    dots = [(size * rng.standard_normal(z.shape)).astype(a.dtype) for size, z in zip(sizes, given, strict=True)]
    errors = []
    for i, (expected, size) in enumerate(exact_regression_tangents(a, b, weights, ridge, bias, [*dots, 0.0])):
        some = [xp.asarray(dots[i]) if i == j else None for j in range(4)]
        y_dot = xp.numpy(xp.derivative(nodes.weighted_least_squares_jvp, *some, y, *map(xp.asarray, given), bias=bias))
        assert y_dot.dtype == a.dtype
        errors.append(np.linalg.norm(y_dot[:n] - expected) / size)
    return errors


def errors_of_regression(xp, rng, a, b, weights, ridge=None, bias=True):
    """Relative errors of the coefficients and of each gradient."""
    y_bar = rng.standard_normal(a.shape[1] + bias).astype(a.dtype)
    expected = exact_regression(a, b, weights, ridge, bias, y_bar)
    given = [xp.asarray(z) for z in (a, b, weights, *(() if ridge is None else (np.asarray(ridge, a.dtype),)))]
    y = nodes.weighted_least_squares(*given, bias=bias)
    bars = nodes.weighted_least_squares_vjp(xp.asarray(y_bar), y, *given, bias=bias)
    n = a.shape[1]
    assert xp.numpy(y).dtype == a.dtype
    return [relative(xp.numpy(y)[:n], expected[0][:n])] + [
        relative(xp.numpy(bar), e) for bar, e in zip(bars[: len(given)], expected[1:], strict=True)
    ]


def condition_of_regression(a, weights, bias):
    """Return the condition of ``√W [A 1]`` with columns of unit length."""
    columns = np.concat([a, np.ones((len(a), 1))], axis=1) if bias else a
    columns = np.sqrt(weights.astype(np.float64))[:, None] * columns
    return np.linalg.cond(columns / np.linalg.norm(columns, axis=0))


def powers(degree):
    return np.linspace(0, 1, 50)[:, None] ** np.arange(1, degree + 1)


@pytest.mark.parametrize(
    ("dtype", "columns", "bar"),
    [
        (np.float32, lambda rng: rng.standard_normal((50, 1)) + 100, 2e-6),
        (np.float32, lambda rng: rng.standard_normal((50, 2)) + 1000, 2e-6),
        (np.float32, lambda rng: np.arange(2000.0, 2030)[:, None], 1e-5),
        (np.float32, lambda rng: powers(4), 1e-4),
        (np.float32, lambda rng: powers(8), 5e-2),
        (np.float32, lambda rng: 1e-18 * rng.standard_normal((50, 3)), 2e-6),
        (np.float64, lambda rng: rng.standard_normal((50, 1)) + 1e8, 1e-14),
        (np.float64, lambda rng: powers(8), 1e-10),
        (np.float64, lambda rng: powers(14), 1e-5),
        (np.float64, lambda rng: rng.standard_normal((50, 4)) * [1, 1e6, 1e-6, 1e3], 1e-14),
    ],
    ids=["mean 100", "mean 1000", "years", "degree 4", "degree 8", "tiny", "mean 1e8", "8 in double", "14", "units"],
)  # fmt: skip
def test_regressions_that_normal_equations_cannot_do(dtype, columns, bar, xp, rng):
    a = columns(rng).astype(dtype)
    b = (np.cos(3 * np.linspace(0, 1, len(a))) + 0.1 * rng.standard_normal(len(a))).astype(dtype)
    assert max(errors_of_regression(xp, rng, a, b, np.ones(len(a), dtype))) <= bar
    # Sums along random tangents cancel more than those of the smooth targets.
    assert max(errors_of_regression_tangents(xp, rng, a, b, np.ones(len(a), dtype))) <= 3 * bar


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_regressions_lose_no_more_than_their_condition(dtype, rng):
    """Any mean, unit, weight and ridge: the relative error is a few eps of the condition of ``√W [A 1]``."""
    unit = np.finfo(dtype).eps
    for i in range(40):
        n = int(rng.integers(1, 5))
        bias, m = bool(rng.integers(2)), int(rng.integers(n + 3, 20))
        far = 10.0 ** rng.uniform(-1, 0.4 * -np.log10(unit), n) * bias
        a = ((rng.standard_normal((m, n)) + far) * 10.0 ** rng.uniform(-3, 3, n)).astype(dtype)
        weights = (10.0 ** rng.uniform(-4, 0, m)).astype(dtype)
        b = (a @ (rng.standard_normal(n) / np.linalg.norm(a, axis=0)) + rng.standard_normal(m) / 10).astype(dtype)
        ridge = None if i % 3 else float(np.float32(10.0 ** rng.uniform(-3, 1)) * np.max(np.abs(a)) ** 2)
        condition = condition_of_regression(a, weights, bias)
        errors = errors_of_regression(NUMPY, rng, a, b, weights, ridge, bias)
        assert max(errors) <= 30 * unit * condition, (n, m, bias, ridge)
        moved = errors_of_regression_tangents(NUMPY, rng, a, b, weights, ridge, bias)
        assert max(moved) <= 30 * unit * condition, (n, m, bias, ridge)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_dependent_columns_are_always_refused(dtype, bias, xp, rng):
    """A duplicate, a combination, or a column that is constant beside the bias, in any units and at any mean."""
    a = rng.standard_normal((60, 30, 4)) + 10.0 ** rng.uniform(-2, 2, (60, 1, 4))
    a[:20, :, 3] = a[:20, :, 0]
    a[20:40, :, 3] = a[20:40, :, 0] - 2 * a[20:40, :, 1]
    if bias:
        a[40:50, :, 3] = 0.1
        a[50:, :, 3] = 1 - a[50:, :, 0]
    else:
        a[40:, :, 3] = 0
    a = (a * 10.0 ** rng.uniform(-3, 3, (60, 1, 4))).astype(dtype)
    b, weights = rng.standard_normal((60, 30)).astype(dtype), rng.uniform(0.1, 1, (60, 30)).astype(dtype)
    given = [xp.asarray(z) for z in (a, b, weights)]
    y = nodes.weighted_least_squares(*given, bias=bias, throw=False)
    assert np.all(np.isnan(xp.numpy(y)))
    assert all(np.all(np.isnan(xp.numpy(z))) for z in nodes.weighted_least_squares_vjp(
        y, xp.asarray(np.zeros(y.shape, dtype)), *given, bias=bias, throw=False)[:3])  # fmt: skip
    ridge = xp.asarray(np.ones(60, dtype) * np.max(np.abs(a), axis=(-2, -1)) ** 2)
    assert np.all(np.isfinite(xp.numpy(nodes.weighted_least_squares(*given, ridge, bias=bias))))


def test_cholesky_factors_and_qr_agree(rng, monkeypatch):
    """The two ways of the NumPy form, and that a badly conditioned item sends its batch to the second."""
    calls, qr = [], least_squares.dense.qr
    monkeypatch.setattr(least_squares.dense, "qr", lambda b: calls.append(1) or qr(b))
    inputs = [rng.standard_normal((3, 9, 2)), rng.standard_normal((3, 9)), rng.uniform(0.1, 1, (3, 9)), np.ones(3)]
    y_bar = rng.standard_normal((3, 3))

    def both():
        y = nodes.weighted_least_squares(*inputs)
        return y, *nodes.weighted_least_squares_vjp(y_bar, y, *inputs)

    fast = both()
    assert not calls
    monkeypatch.setattr(least_squares, "CHOLESKY", np.inf)
    for one, other in zip(fast, both(), strict=True):
        assert 0 < relative(one, other) <= 1e-14
    assert len(calls) == 2
    monkeypatch.undo()


def test_weighted_least_squares_reads_nothing_on_the_host(host_reads, rng):
    strict = backend("array-api-strict")
    inputs = [rng.standard_normal((2, 6, 2)), rng.standard_normal((2, 6)), np.ones((2, 6)), np.ones(2)]
    arrays = [strict.asarray(a) for a in inputs]
    y = nodes.weighted_least_squares(*arrays, throw=False)
    nodes.weighted_least_squares_vjp(y, y, *arrays, throw=False)
    assert host_reads == []
    nodes.weighted_least_squares(*arrays)
    assert host_reads == ["__bool__"]


@pytest.mark.parametrize("m", [0, 1, 2, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_few_samples(m, bias, xp, rng):
    """Without a ridge there must be as many samples as unknowns; with one, a single sample fixes the bias."""
    a, b, weights = (rng.standard_normal(shape) for shape in ((m, 2), (m,), (m,)))
    given = [xp.asarray(z) for z in (a, b, np.abs(weights))]
    y = xp.numpy(nodes.weighted_least_squares(*given, bias=bias, throw=False))
    assert np.all(np.isfinite(y)) == (m >= 2 + bias)
    y = nodes.weighted_least_squares(*given, xp.asarray(np.asarray(0.5)), bias=bias, throw=False)
    assert np.all(np.isfinite(xp.numpy(y))) == (m > 0 or not bias)
    bars = nodes.weighted_least_squares_vjp(y, y, *given, xp.asarray(np.asarray(0.5)), bias=bias, throw=False)
    assert [tuple(bar.shape) for bar in bars] == [(m, 2), (m,), (m,), ()]
    dots = (*given, xp.asarray(np.asarray(0.5)))
    y_dot = nodes.weighted_least_squares_jvp(*dots, y, *dots, bias=bias, throw=False)
    assert tuple(y_dot.shape) == (2 + bias,)
    assert np.all(np.isfinite(xp.numpy(y_dot))) == (m > 0 or not bias)


def test_no_weight_at_all_leaves_the_bias_open(xp, rng):
    given = [xp.asarray(z) for z in (rng.standard_normal((4, 2)), rng.standard_normal(4), np.zeros(4), np.asarray(1.0))]
    with pytest.raises(SingularError, match="samples of positive weight"):
        nodes.weighted_least_squares(*given)
    assert np.all(xp.numpy(nodes.weighted_least_squares(*given, bias=False)) == 0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_least_squares_on_sphere_in_any_units(dtype, xp, rng):
    """Squares of A or of the radius may leave the range of exponents; the solution only scales."""
    a, b, y_bar = rng.standard_normal((6, 4)), rng.standard_normal(6), rng.standard_normal(4)
    dots = rng.standard_normal((6, 4)), rng.standard_normal(6)
    y = nodes.least_squares_on_sphere(a, b, radius=0.7)
    y_dot = nodes.least_squares_on_sphere_jvp(*dots, y, a, b, radius=0.7)
    bars = nodes.least_squares_on_sphere_vjp(y_bar, y, a, b, radius=0.7)
    for exponents in ((-80, 0), (80, 0), (-40, 40), (40, -40), (0, 60), (0, -60)):
        p, q = (2.0**e for e in exponents)  # of A and of the radius
        scaled = [xp.asarray((x * f).astype(dtype)) for x, f in ((a, p), (b, p * q))]
        found = nodes.least_squares_on_sphere(*scaled, radius=0.7 * q)
        assert relative(xp.numpy(found).astype(np.float64) / q, y) <= 20 * np.finfo(dtype).eps
        got = nodes.least_squares_on_sphere_vjp(xp.asarray(y_bar.astype(dtype)), found, *scaled, radius=0.7 * q)
        for bar, expected, unit in zip(got, bars, (q / p, 1 / p), strict=True):
            assert relative(xp.numpy(bar).astype(np.float64) / unit, expected) <= 100 * np.finfo(dtype).eps
        moved = [xp.asarray((x * f).astype(dtype)) for x, f in zip(dots, (p, p * q), strict=True)]
        got = nodes.least_squares_on_sphere_jvp(*moved, found, *scaled, radius=0.7 * q)
        assert relative(xp.numpy(got).astype(np.float64) / q, y_dot) <= 100 * np.finfo(dtype).eps


def test_singular_weighted_least_squares(xp):
    a, b = np.ones((2, 4, 1)), np.ones((2, 4))
    a[1, :, 0] = [1, 2, 3, 4]
    weights = np.ones((2, 4))
    arrays = [xp.asarray(z) for z in (a, b, weights)]
    with pytest.raises(SingularError, match=r"1 of 2.*\(item 0; rcond .*\).*a constant one beside the bias"):
        nodes.weighted_least_squares(*arrays)
    y = nodes.weighted_least_squares(*arrays, throw=False)
    assert np.array_equal(np.isnan(xp.numpy(y)), [[True, True], [False, False]])
    with pytest.raises(SingularError):
        nodes.weighted_least_squares_vjp(y, y, *arrays)
    with pytest.raises(SingularError):
        nodes.weighted_least_squares_jvp(*arrays, None, y, *arrays)
    y_dot = xp.numpy(xp.derivative(nodes.weighted_least_squares_jvp, *arrays, None, y, *arrays, throw=False))
    assert np.array_equal(np.isnan(y_dot), [[True, True], [False, False]])
    for bar in nodes.weighted_least_squares_vjp(y, y, *arrays, throw=False)[:3]:
        assert np.all(np.isnan(xp.numpy(bar)[0]))
    assert np.all(np.isfinite(xp.numpy(nodes.weighted_least_squares(*arrays, xp.asarray(np.ones(2))))))
    weights[1, 0] = -1
    with pytest.raises(SingularError, match="negative"):
        nodes.weighted_least_squares(xp.asarray(a[1]), xp.asarray(b[1]), xp.asarray(weights[1]))


@pytest.mark.parametrize("which", [1, 2, 3])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_target_weight_or_ridge(which, bad, xp, rng):
    inputs = [rng.standard_normal((2, 6, 2)), rng.standard_normal((2, 6)), np.ones((2, 6)), np.ones(2)]
    good = nodes.weighted_least_squares(*inputs)
    inputs[which].reshape(2, -1)[0, 0] = bad
    arrays = [xp.asarray(a) for a in inputs]
    y = nodes.weighted_least_squares(*arrays, throw=False)
    assert np.all(np.isnan(xp.numpy(y)[0]))
    np.testing.assert_allclose(xp.numpy(y)[1], good[1], rtol=1e-12)
    for bar in nodes.weighted_least_squares_vjp(y, y, *arrays, throw=False):
        assert np.all(np.isnan(xp.numpy(bar)[0]))
        assert np.all(np.isfinite(xp.numpy(bar)[1]))


def test_a_weight_of_zero_may_grow(xp, rng):
    """The tangent of a weight counts where the weight is zero, and the sample has no other influence."""
    a, b, weights = rng.standard_normal((6, 2)), rng.standard_normal(6), np.asarray([0.0, 1, 1, 1, 2, 0])
    y = nodes.weighted_least_squares(a, b, weights)
    arrays = [xp.asarray(z) for z in (y, a, b, weights)]
    grows = xp.asarray(np.eye(6)[0])
    y_dot = nodes.weighted_least_squares_jvp(None, None, grows, None, *arrays)
    bars = nodes.weighted_least_squares_vjp(np.ones(3), y, a, b, weights)
    assert abs(np.sum(xp.numpy(y_dot)) - bars[2][0]) <= 1e-13 * np.max(np.abs(bars[2]))
    for still in (xp.asarray(np.eye(6)[0]), xp.asarray(np.eye(6)[5])):
        y_dot = nodes.weighted_least_squares_jvp(None, still, None, None, *arrays)
        assert np.max(np.abs(xp.numpy(y_dot))) <= 1e-15


def test_static_errors_of_least_squares():
    a, b = np.ones((4, 2)), np.ones(4)
    with pytest.raises(TypeError, match="a_dot and b_dot are all None: there is no direction"):
        nodes.least_squares_on_sphere_jvp(None, None, a[0], a, b)
    with pytest.raises(TypeError, match="ridge_dot is given, but there is no ridge"):
        nodes.weighted_least_squares_jvp(None, None, None, b[0], np.ones(3), a, b, b)
    with pytest.raises(ValueError, match=r"weights_dot has shape \(3,\), expected \(4,\)"):
        nodes.weighted_least_squares_jvp(None, None, b[:3], None, np.ones(3), a, b, b)
    with pytest.raises(ValueError, match=r"y has shape \(2,\), expected \(3,\)"):
        nodes.weighted_least_squares_jvp(None, b, None, None, np.ones(2), a, b, b)
    with pytest.raises(ValueError, match=r"b has shape \(3,\), expected \(4,\)"):
        nodes.least_squares_on_sphere(a, b[:3])
    with pytest.raises(ValueError, match="radius is 0"):
        nodes.least_squares_on_sphere(a, b, radius=0)
    with pytest.raises(ValueError, match="weights has shape"):
        nodes.weighted_least_squares(a, b, np.ones(3))
    with pytest.raises(ValueError, match=r"ridge has shape \(4,\), expected \(\)"):
        nodes.weighted_least_squares(a, b, b, b)
    with pytest.raises(TypeError, match="not an array"):
        nodes.weighted_least_squares(a, b, b, 0.1)


# --- robust pooling -----------------------------------------------------------------------------------------------

PHI = {
    "quadratic": lambda z, a: z**2 / 2,
    "pseudo-huber": lambda z, a: a**2 * (np.sqrt(1 + (z / a) ** 2) - 1),
    "huber": lambda z, a: np.where(np.abs(z) <= a, z**2 / 2, a * (np.abs(z) - a / 2)),
    "welsch": lambda z, a: 1 - np.exp(-(z**2) / (2 * a**2)),
    "truncated": lambda z, a: np.minimum(z**2, a**2) / 2,
}
CONVEX = ("quadratic", "pseudo-huber", "huber")
kinds = pytest.mark.parametrize("kind", PHI)


@kinds
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_pooling_finds_a_minimum(kind, alpha, rng):
    x = rng.standard_normal((30, 9)) + 5 * (rng.uniform(size=(30, 9)) < 0.25)
    y, info = nodes.robust_pool(x, kind=kind, alpha=alpha)
    assert np.all(info.converged)
    assert np.all(info.residual_norm <= 64 * 2.0**-52)
    for xi, yi in zip(x, y, strict=True):
        f = lambda u, xi=xi: np.sum(PHI[kind](u - xi, alpha))
        grid = np.linspace(-4, 10, 3001) if kind in CONVEX else yi + np.linspace(-1e-3, 1e-3, 11)
        assert f(yi) <= np.min(np.sum(PHI[kind](grid[:, None] - xi, alpha), axis=-1)) + 1e-12
        assert f(yi) <= min(f(np.mean(xi)), f(np.median(xi))) + 1e-12
        if kind in CONVEX:
            assert f(yi) <= minimize_scalar(f, (xi.min(), xi.max())).fun + 1e-9


def test_the_better_of_both_starts_wins(rng):
    far = np.asarray([0.0, 0.1, 0.2, 9.0, 9.1])  # from the mean of 3.7, with alpha 4, all are pulled together
    ends = [nodes.robust_pool(x, kind="welsch", alpha=0.5)[0] for x in (far, -far)]
    assert abs(ends[0] - 0.1) < 0.05
    assert abs(ends[0] + ends[1]) <= 1e-12
    even = np.asarray([0.0, 0.1, 9.0, 9.1])  # median and mean in the empty middle, the worst value there is
    for kind in ("welsch", "truncated"):
        y, _ = nodes.robust_pool(even, kind=kind, alpha=0.5)
        assert min(abs(y - 0.05), abs(y - 9.05)) <= 1e-12
    with pytest.raises(SingularError, match="no gradient"):
        nodes.robust_pool_vjp(np.asarray(1.0), np.asarray(4.55), even, kind="truncated", alpha=0.5)


def truncated_value(x, y, alpha):
    return float(np.sum(np.minimum((np.asarray(x, dtype=float) - float(y)) ** 2, alpha**2)))


def test_truncated_pooling_finds_the_global_minimum(xp, rng):
    """Against the mean of every run of neighbours in sorted order: clusters of any number, width and distance."""
    y, info = nodes.robust_pool(xp.asarray(np.asarray([0.0, 0.0, 10.0, 10.0])), kind="truncated")
    assert float(y) == 0
    assert bool(info.converged)
    x = rng.choice([-7.0, 0.0, 0.6, 1e3], (40, 9)) + rng.standard_normal((40, 9)) * 10 ** rng.uniform(-2, 1, (40, 1))
    x[:5] = np.floor(x[:5])  # ties
    x[5:10, 3:] = 1e6 * x[5:10, 3:]
    for alpha in (0.3, 1.0, 5.0):
        for dtype, slack in ((np.float64, 1e-13), (np.float32, 1e-5)):
            z = x.astype(dtype)
            options = {"kind": "truncated", "alpha": alpha, "while_loop": xp.while_loop, "throw": False}
            y, _ = xp.jit(partial(nodes.robust_pool, **options))(xp.asarray(z))
            assert xp.numpy(y).dtype == dtype
            for row, at in zip(z, xp.numpy(y), strict=True):
                ordered = np.sort(row.astype(float))
                runs = (np.mean(ordered[i:j]) for i in range(9) for j in range(i + 1, 10))
                best = min(truncated_value(row, u, alpha) for u in runs)
                # y itself is rounded to its precision.
                rounded = 9 * abs(float(at)) * np.finfo(dtype).eps * alpha
                assert truncated_value(row, at, alpha) <= best + slack * alpha**2 + rounded


def test_pooling_does_not_stay_where_all_forces_are_small():
    """Mean and median are a maximum of Welsch's penalty there, and forces of 1e-20 balance."""
    for size in (4.0, 10.0, 1e4):
        y, info = nodes.robust_pool(np.asarray([-size, -size, size, size]), kind="welsch")
        assert abs(abs(y) - size) <= 1e-12 * size
        assert info.converged


@kinds
@pytest.mark.parametrize("alpha", [0.7, 2.0])
def test_gradient_at_any_alpha(kind, alpha, rng):
    x = np.concat([0.1 * rng.standard_normal((4, 5)), 3 * alpha + rng.uniform(0, 1, (4, 2))], axis=-1)
    report = assert_vjp(
        lambda x: nodes.robust_pool(x, kind=kind, alpha=alpha)[0],
        lambda *a: nodes.robust_pool_vjp(*a, kind=kind, alpha=alpha),
        x, needs=(0,), gap=0.3,
    )  # fmt: skip
    assert report.error <= 1e-9
    y, _ = nodes.robust_pool(x, kind=kind, alpha=alpha)
    x_dot = rng.standard_normal(x.shape)
    y_dot = nodes.robust_pool_jvp(x_dot, y, x, kind=kind, alpha=alpha)
    numerical = numerical_jvp(lambda x: nodes.robust_pool(x, kind=kind, alpha=alpha)[0], x, x_dot, gap=0.3)
    assert relative(y_dot, numerical) <= 1e-9


@kinds
def test_a_common_offset_costs_only_its_own_digits(kind, rng):
    x = 0.1 * rng.standard_normal(9)
    y, _ = nodes.robust_pool(x, kind=kind)
    far, info = nodes.robust_pool(x + 1e8, kind=kind)
    assert abs(far - 1e8 - y) <= 1e-7
    assert bool(info.converged)


def test_where_pooling_has_no_gradient(xp):
    x = np.asarray([[0.0, 10.0], [0.0, 0.1]])
    for kind in ("huber", "truncated", "welsch"):
        y, _ = nodes.robust_pool(xp.asarray(x), kind=kind, alpha=0.1)
        with pytest.raises(SingularError, match="second derivatives"):
            nodes.robust_pool_vjp(y, xp.asarray(np.asarray([5.0, 0.05])), xp.asarray(x), kind=kind, alpha=0.1)
        with pytest.raises(SingularError, match=r"robust_pool_jvp.*no tangent exists"):
            nodes.robust_pool_jvp(
                xp.asarray(x), xp.asarray(np.asarray([5.0, 0.05])), xp.asarray(x), kind=kind, alpha=0.1
            )
        y_dot = xp.numpy(
            nodes.robust_pool_jvp(
                xp.asarray(x), xp.asarray(np.asarray([5.0, 0.05])), xp.asarray(x), kind=kind, alpha=0.1, throw=False
            )
        )
        assert np.isnan(y_dot[0])
        np.testing.assert_allclose(y_dot[1], 0.05)
        x_bar = xp.numpy(
            nodes.robust_pool_vjp(
                xp.asarray(np.ones(2)), xp.asarray(np.asarray([5.0, 0.05])), xp.asarray(x),
                kind=kind, alpha=0.1, throw=False,
            )
        )  # fmt: skip
        assert np.all(np.isnan(x_bar[0]))
        np.testing.assert_allclose(x_bar[1], [0.5, 0.5])


def test_gradients_that_vanish_on_the_sphere_are_not_refused(xp, rng):
    """The length of y is fixed, so that the gradient of a loss of it is zero but for rounding."""
    a, b = rng.standard_normal((40, 8, 6)), rng.standard_normal((40, 8))
    a, b = xp.asarray(a), xp.asarray(b)
    y = xp.jit(partial(nodes.least_squares_on_sphere, throw=False))(a, b)
    for bar in xp.derivative(nodes.least_squares_on_sphere_vjp, y, y, a, b):
        assert np.max(np.abs(xp.numpy(bar))) <= 1e-13


def test_pooling_numbers_whose_squares_overflow(xp, rng):
    """The minimum is near the median: between the two middle numbers of an even count."""
    x = np.sort(rng.standard_normal((5, 4)).astype(np.float32), axis=-1) * np.float32(2.0**70)
    y, _ = nodes.robust_pool(xp.asarray(x), kind="pseudo-huber")
    y = xp.numpy(y)
    assert np.all((x[:, 1] <= y) & (y <= x[:, 2]))


def test_options_of_pooling(rng):
    x = rng.standard_normal(20)
    y, info = nodes.robust_pool(x, alpha=0.3)
    _, rough_info = nodes.robust_pool(x, alpha=0.3, rtol=0.1, check_every=1)
    assert rough_info.n_iter < info.n_iter
    assert 1e-12 < rough_info.residual_norm <= 0.1
    with pytest.raises(ConvergenceError, match="maxiter=1"):
        nodes.robust_pool(x, alpha=0.3, maxiter=1)
    rough, rough_info = nodes.robust_pool(x, alpha=0.3, maxiter=1, throw=False)
    assert not rough_info.converged
    assert 0 < abs(rough - y) < 0.1
    calls = []

    def loop(cond, body, state):
        while cond(state):
            calls.append(1)
            state = body(state)
        return state

    assert nodes.robust_pool(x, alpha=0.3, while_loop=loop)[0] == y
    assert len(calls) >= int(info.n_iter) > 0
    with pytest.raises(ValueError, match="check_every is 0"):
        nodes.robust_pool(x, check_every=0)
    with pytest.raises(ValueError, match="kind is 'median', expected one of quadratic, pseudo-huber"):
        nodes.robust_pool(x, kind="median")
    with pytest.raises(ValueError, match="alpha is 0"):
        nodes.robust_pool(x, alpha=0)


def test_all_pairs_of_kinds_differ(rng):
    x = np.asarray([0.0, 0.3, 0.4, 2.0, 7.0])
    ends = [float(nodes.robust_pool(x, kind=kind, alpha=1.0)[0]) for kind in PHI]
    assert all(abs(a - b) > 1e-3 for a, b in itertools.combinations(ends, 2))
