"""Points that solve their problem only nearly: the correction, the reported error, and which constraints are active."""

from functools import partial

import numpy as np
import pytest
from estimates._points import KINDS, Problems, dot, outer
from estimates._results import Promise, distance, joined, of_batch

from ddnref import OptimalityError, SingularError, implicit

EPS = {np.float64: 2.0**-52, np.float32: 2.0**-23}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("dtype", EPS, ids=["float64", "float32"])
def test_what_the_correction_leaves(kind, dtype):
    """Points that are right to 1e-5 are nearly all accepted, and the gradient is far more exact than they are."""
    rng, rows = np.random.default_rng(16), []
    for _ in range(4):
        problems = Problems(kind, rng, 50, dtype)
        bars, info = problems.vjp(problems.y_bar, problems.y, *problems.inputs, throw=False)
        rows.append((problems.errors(bars), info.converged, problems.distance[:, 0] < 1e-5))
    true, accepted, near = map(np.concat, zip(*rows, strict=True))
    assert np.mean(accepted[near]) >= 0.95
    assert np.median(true[accepted & near]) <= 1e-9 if dtype == np.float64 else 1e-5


@kinds
@pytest.mark.parametrize("dtype", EPS, ids=["float64", "float32"])
def test_the_error_of_a_tangent_is_what_info_says(kind, dtype):
    """Keep the promise about the gradient's error, along random tangents of all inputs."""
    rng, parts = np.random.default_rng(16), []
    for _ in range(4):
        problems = Problems(kind, rng, 50, dtype)
        # Each tangent is as long as its input, so that none of them hides the others.
        dots = [rng.standard_normal(a.shape) * np.max(np.abs(a), initial=0) for a in problems.inputs]
        dots = [d.astype(dtype) for d in dots]
        y_dot, info = problems.jvp(*dots, problems.y, *problems.inputs, throw=False)
        error = np.where(info.converged, distance(y_dot, problems.exact_tangent(dots)), np.nan)
        parts.append(of_batch(kind, dtype, Promise(), error, info.error, info.converged))
        near = problems.distance[:, 0] < 1e-5
        assert np.mean(info.converged[near]) >= 0.95
    assert joined(parts).broken() == []


@kinds
def test_every_library_reports_the_same(kind, xp):
    problems = Problems(kind, np.random.default_rng(3), 4)
    arrays = (problems.y_bar, problems.exact_y.astype(float) * (1 + 1e-5), *problems.inputs)
    expected, report = problems.vjp(*arrays, throw=False)
    bars, info = xp.jit(partial(problems.vjp, throw=False))(*map(xp.asarray, arrays))
    assert np.array_equal(xp.numpy(info.converged), report.converged)
    for got, e in zip(bars, expected, strict=True):
        np.testing.assert_allclose(xp.numpy(got), e, rtol=1e-8, atol=1e-10 * np.nanmax(abs(e)))
    ok = report.converged
    assert np.any(ok)
    ratio = xp.numpy(info.error)[ok] / report.error[ok]
    assert np.all((ratio > 0.2) & (ratio < 5))
    np.testing.assert_allclose(xp.numpy(info.rcond), report.rcond, rtol=1e-6)
    assert xp.numpy(info.n_iter).shape == xp.numpy(info.residual_norm).shape == (4,)


def test_a_point_right_to_a_millionth_is_corrected():
    """It was refused, although the Newton step that showed its error would also have corrected it."""
    x = np.asarray([4.0, 9.0, 2.0])
    stated = {
        "residual": lambda y, x: y**2 - x,
        "jacobian": lambda y, x: implicit.Diagonal(2 * y),
        "residual_vjp": lambda w, y, x: -w,
    }
    exact = 0.5 / np.sqrt(x)
    for wrong, error in ((1e-2, 1e-3), (1e-4, 1e-7), (1e-6, 1e-11), (0.0, 1e-15)):
        x_bar, info = implicit.root_vjp(np.ones(3), np.sqrt(x) * (1 + 0.9 * wrong), x, **stated)
        found = np.linalg.norm(x_bar - exact) / np.linalg.norm(exact)
        assert found <= error
        assert found / 2 <= info.error <= max(2 * found, 4e-16)
        assert abs(info.residual_norm - 0.9 * wrong) <= wrong / 50 + 1e-15
    with pytest.raises(OptimalityError, match="Newton step does not help"):
        implicit.root_vjp(np.ones(3), 1.2 * np.sqrt(x), x, **stated)


def test_a_point_where_newton_does_not_converge_is_refused():
    """Near a double root the second step is half of the first, whatever `rtol` allows."""
    stated = {
        "residual": lambda y, x: (y - x) ** 2,
        "jacobian": lambda y, x: implicit.Diagonal(2 * (y - x)),
        "residual_vjp": lambda w, y, x: -2 * (y - x) * w,
    }
    one = np.ones(1)
    for wrong in (1e-3, 1e-6):
        with pytest.raises(OptimalityError):
            implicit.root_vjp(one, one + wrong, one, **stated)
    with pytest.raises(SingularError):
        implicit.root_vjp(one, one, one, **stated)


def test_a_gradient_of_zero_is_no_failure(rng):
    """At a vertex nothing moves: the gradient is rounding, and its error relative to itself means nothing."""
    s = rng.standard_normal((4, 4))
    s = s @ s.T + np.eye(4)
    y, x, q = np.zeros(4), rng.uniform(1, 2, 4), np.linalg.qr(rng.standard_normal((4, 4)))[0]
    bars, info = project(rng.standard_normal(4), y, s, np.linalg.solve(s, q.T @ x), q, 0 * x)
    assert np.max(abs(bars[0])) <= 1e-14
    assert info.error <= 1e-3


# --- constraints that repeat each other -------------------------------------------------------------------------------


def project(y_bar, y, s, x, a, b, nu=None, **options):
    """``½ (y − x)ᵀ S (y − x)`` subject to ``A y ≤ b``."""
    return implicit.ineq_argmin_vjp(
        y_bar, y, nu, x, a, b,
        gradient=lambda y, x, a, b: s @ (y - x), hessian=lambda y, nu, x, a, b: s,
        constraint=lambda y, x, a, b: dot(a, y) - b, constraint_jacobian=lambda y, x, a, b: a,
        residual_vjp=lambda w, eta, y, nu, x, a, b: (-s @ w, outer(eta, y) - outer(nu, w), -eta), **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", EPS, ids=["float64", "float32"])
@pytest.mark.parametrize("given", [False, True], ids=["least squares", "given"])
def test_redundant_constraints(dtype, given, rng):
    """Repeated, in other units, implied by others, or slack by very little: the gradient is that without them."""
    eye, eps = np.eye(3, dtype=dtype), EPS[dtype]
    x, y_bar = np.asarray([-1.0, 2.0, -0.5], dtype=dtype), rng.standard_normal(3).astype(dtype)
    y = np.maximum(x, 0)
    plain, _ = project(y_bar, y, eye, x, -eye, 0 * x)
    total = -np.asarray([[1, 0, 1]], dtype=dtype)
    for rows in (-eye, -1e3 * eye, total, np.concat([-eye, -eye, 2 * total])):
        for room in (0.0, 1e-6 if dtype == np.float64 else 1e-4, 1e-2):
            for wrong in (0.0, 1e-4):
                a = np.concat([-eye, rows])
                b = np.concat([0 * x, np.full(len(rows), room, dtype=dtype)])
                nu = np.concat([np.minimum(x, 0), np.zeros(len(rows), dtype=dtype)]) if given else None
                near = y + dtype(wrong) * np.cos(np.arange(3, dtype=dtype))
                bars, _ = project(y_bar, near, eye, x, a, b, nu)
                assert np.max(abs(bars[0] - plain[0])) <= 1e3 * eps
                # The shares of equal constraints add up to the whole.
                if rows is not total and len(rows) == 3 and room == 0:
                    size = np.concat([np.ones(3), np.full(3, abs(rows[0, 0]))]).astype(dtype)
                    whole = (bars[2] * size).reshape(2, 3).sum(axis=0)
                    assert np.max(abs(whole - plain[2])) <= 2e-2 * eps ** (1 / 3)


def test_more_constraints_than_unknowns_meet_in_a_vertex(rng):
    """The simplex as two inequalities in a box, each twice: at a corner, on an edge and inside a face."""
    from ddnref import nodes

    eye, y_bar = np.eye(3), rng.standard_normal(3)
    ones = np.ones((1, 3))
    a = np.concat([ones, -ones, -eye, eye, -eye])
    b = np.concat([[1.0, -1.0], np.zeros(3), np.ones(3), np.zeros(3)])
    for x in ([0.3, 0.2, 0.1], [3.0, 0.2, 0.1], [3.0, 2.9, 0.1]):
        y = nodes.project_simplex(np.asarray(x))
        for point in (y, y + 1e-6 * rng.standard_normal(3)):
            (x_bar, _, _), info = project(y_bar, point, eye, np.asarray(x), a, b)
            assert np.max(abs(x_bar - nodes.project_simplex_vjp(y_bar, y))) <= 1e-10
            assert info.error <= 1e-8
    with pytest.raises(SingularError, match="constraints repeat each other"):  # equalities may not
        project(y_bar, y, eye, np.asarray(x), np.concat([a[:1], a]), np.concat([b[:1], b]), equalities=2)


def test_random_faces_of_a_polytope_with_every_constraint_repeated(rng):
    """Draw repeated rows in random units, in any order, at points that are not quite right."""
    for _ in range(20):
        n = int(rng.integers(2, 6))
        p = int(rng.integers(1, n + 1))
        s = rng.standard_normal((n, n))
        s = s @ s.T + 0.1 * np.eye(n)
        a, y, active = rng.standard_normal((2 * n, n)), rng.standard_normal(n), np.arange(2 * n) < p
        nu = np.where(active, -rng.uniform(0.1, 1, 2 * n), 0)
        b = a @ y + np.where(active, 0, rng.uniform(0.1, 1, 2 * n))
        x = y - np.linalg.solve(s, a.T @ nu)
        y_bar = rng.standard_normal(n)
        plain, _ = project(y_bar, y, s, x, a, b)
        order, units = rng.permutation(6 * n), 10 ** rng.uniform(-3, 3, 6 * n)
        a, b = (units[:, None] * np.tile(a, (3, 1)))[order], (units * np.tile(b, 3))[order]
        bars, info = project(y_bar, y + 1e-6 * rng.standard_normal(n), s, x, a, b)
        assert np.max(abs(bars[0] - plain[0])) <= 1e-9 * (1 + np.max(abs(plain[0])))
        assert info.converged


def test_a_solution_at_zero_needs_no_scale_of_its_own():
    """Under constraints the gradient of f does not vanish there, and says what is near."""
    eye, x = np.eye(2), np.asarray([-1.0, -2.0])
    bars, _ = project(np.ones(2), np.asarray([1e-7, -1e-7]), eye, x, -eye, 0 * x)
    assert np.max(abs(bars[0])) <= 1e-15


@pytest.mark.parametrize("dtype", EPS, ids=["float64", "float32"])
def test_units_of_rows_and_columns_do_not_decide_what_is_singular(dtype, rng):
    """Graded but regular matrices are accepted, dependent rows in any units are refused; rcond says which."""
    stated = {
        "residual": lambda y, m, r: m @ y - r,
        "jacobian": lambda y, m, r: m,
        "residual_vjp": lambda w, y, m, r: (outer(w, y), -w),
    }
    for _ in range(10):
        a, ones = rng.standard_normal((6, 6)) + 3 * np.eye(6), np.ones(6, dtype=dtype)
        rows, columns = (10 ** rng.uniform(-6, 6, 6) for _ in range(2))
        y = (1 / columns).astype(dtype)
        graded = (rows[:, None] * a * columns).astype(dtype)
        _, info = implicit.root_vjp(ones, y, graded, graded @ y, **stated)
        assert info.rcond > 1e-3
        a[3] = 2 * a[1] + a[0] / 16
        dependent = (rows[:, None] * a * columns).astype(dtype)
        with pytest.raises(SingularError):
            implicit.root_vjp(ones, y, dependent, dependent @ y, **stated)
        _, info = implicit.root_vjp(ones, y, dependent, dependent @ y, **stated, throw=False)
        assert not info.rcond > 16 * EPS[dtype]
        assert np.isinf(info.error)


@pytest.mark.parametrize("dtype", EPS, ids=["float64", "float32"])
def test_a_low_rank_term_that_cancels_the_diagonal_is_singular(dtype, rng):
    """``D − D^½ x xᵀ D^½``: the system of order r is nothing but rounding, whatever the units."""
    for _ in range(10):
        x, root = rng.standard_normal(5), 10 ** rng.uniform(-3, 3, 5)
        u = ((x / np.linalg.norm(x)) * root)[:, None].astype(dtype)
        d, y = (root**2).astype(dtype), np.zeros(5, dtype=dtype)
        stated = {"residual": lambda y: 0 * y, "residual_vjp": lambda w, y: w}
        for sign in (-1, 1):
            h = implicit.DiagonalPlusLowRank(d, u, dtype(sign) * u)
            _, info = implicit.root_vjp(y + 1, y, **stated, jacobian=lambda y, h=h: h, throw=False)
            assert bool(info.converged) == (sign > 0)
