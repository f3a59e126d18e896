"""Results of each node against oracles, and where minimum or gradient is not unique; every option."""

import itertools

import numpy as np
import pytest
from problems import relative
from scipy.optimize import linprog, minimize, minimize_scalar

from conftest import backend
from ddnref import ConvergenceError, OptimalityError, SingularError, nodes
from ddnref.testing import assert_vjp

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
    x_bar = xp.numpy(nodes.project_sphere_vjp(xp.asarray(np.ones((2, 2))), y, x, norm=norm, throw=False))
    assert np.all(np.isnan(x_bar[0]))
    assert np.all(np.isfinite(x_bar[1]))


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


def test_singular_weighted_least_squares(xp):
    a, b = np.ones((2, 4, 1)), np.ones((2, 4))
    a[1, :, 0] = [1, 2, 3, 4]
    weights = np.ones((2, 4))
    arrays = [xp.asarray(z) for z in (a, b, weights)]
    with pytest.raises(SingularError, match="a constant one beside the bias"):
        nodes.weighted_least_squares(*arrays)
    y = nodes.weighted_least_squares(*arrays, throw=False)
    assert np.array_equal(np.isnan(xp.numpy(y)), [[True, True], [False, False]])
    with pytest.raises(SingularError):
        nodes.weighted_least_squares_vjp(y, y, *arrays)
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


def test_static_errors_of_least_squares():
    a, b = np.ones((4, 2)), np.ones(4)
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


# --- optimal transport --------------------------------------------------------------------------------------------


def transport(rng, n=7, m=5, batch=()):
    p, q = rng.uniform(0.2, 1, (*batch, n)), rng.uniform(0.2, 1, (*batch, m))
    return (
        rng.uniform(0, 1, (*batch, n, m)),
        p / p.sum(-1, keepdims=True),
        q / q.sum(-1, keepdims=True),
    )


@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_sinkhorn_is_the_plain_loop(eps, xp, rng):
    cost, p, q = transport(rng)
    u, k = np.ones(7), np.exp(-cost / eps)
    for _ in range(3000):
        v = q / (k.T @ u)
        u = p / (k @ v)
    plan, info = nodes.sinkhorn(*(xp.asarray(a) for a in (cost, p, q)), eps=eps, rtol=1e-12)
    assert relative(xp.numpy(plan), u[:, None] * k * v) <= 1e-11
    assert xp.numpy(info.residual_norm) <= 2e-12
    assert bool(info.converged)


def test_sinkhorn_approaches_the_linear_program(rng):
    cost, p, q = transport(rng, 5, 5)
    rows, columns = np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))
    exact = linprog(cost.ravel(), A_eq=np.concat([rows, columns]), b_eq=np.concat([p, q])).fun
    plan, _ = nodes.sinkhorn(cost, p, q, eps=5e-3, maxiter=100_000)
    assert exact - 1e-8 <= np.sum(plan * cost) <= exact + 5e-3 * np.log(25)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (5, 7), (1, 4), (4, 1)])
def test_sinkhorn_gradient_on_either_side(n, m, rng):
    """The larger side is eliminated: both ways must agree with the unreduced system and its gauge."""
    plan, _ = nodes.sinkhorn(*transport(rng, n, m), eps=0.1, rtol=1e-13)
    plan_bar = rng.standard_normal((n, m))
    t = plan_bar * plan
    whole = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]])
    z = np.linalg.pinv(whole) @ np.concat([t.sum(1), t.sum(0)])
    alpha, beta = z[:n], z[n:]
    expected = (
        plan * (alpha[:, None] + beta - plan_bar) / 0.1,
        alpha - alpha.mean(),
        beta - beta.mean(),
    )
    for got, e in zip(nodes.sinkhorn_vjp(plan_bar, plan, eps=0.1), expected, strict=True):
        np.testing.assert_allclose(got, e, atol=1e-11 * np.max(np.abs(expected[0])) + 1e-12)


def test_sinkhorn_gauge(rng):
    plan, _ = nodes.sinkhorn(*transport(rng, batch=(3,)), eps=0.1)
    cost_bar, p_bar, q_bar = nodes.sinkhorn_vjp(rng.standard_normal(plan.shape), plan, eps=0.1)
    for bar in (p_bar, q_bar):
        assert np.max(np.abs(bar.sum(-1))) <= 1e-13 * np.max(np.abs(bar)) * 7
    assert np.max(np.abs(cost_bar.sum(-1))) <= 1e-12  # the plan keeps its marginals
    shifted = rng.standard_normal((3, 7, 1)) + rng.standard_normal((3, 1, 5))  # a loss of the marginals alone
    assert np.max(np.abs(nodes.sinkhorn_vjp(shifted, plan, eps=0.1)[0])) <= 1e-12


def test_empty_bins(xp, rng):
    """Rows and columns without mass are empty, and the rest is the problem without them."""
    cost, p, q = transport(rng)
    p[2], q[1] = 0, 0
    p, q = p / p.sum(), q / q.sum()
    rows, columns = [0, 1, 3, 4, 5, 6], [0, 2, 3, 4]
    arrays = [xp.asarray(a) for a in (cost, p, q)]
    plan, _ = nodes.sinkhorn(*arrays, eps=0.1)
    small, _ = nodes.sinkhorn(cost[np.ix_(rows, columns)], p[rows], q[columns], eps=0.1)
    plan_bar = rng.standard_normal((7, 5))
    bars = xp.tuple(nodes.sinkhorn_vjp(xp.asarray(plan_bar), plan, eps=0.1))
    small_bars = nodes.sinkhorn_vjp(plan_bar[np.ix_(rows, columns)], small, eps=0.1)
    assert relative(xp.numpy(plan)[np.ix_(rows, columns)], small) <= 1e-12
    assert relative(bars[0][np.ix_(rows, columns)], small_bars[0]) <= 1e-8
    assert relative(bars[1][rows], small_bars[1]) <= 1e-8
    assert relative(bars[2][columns], small_bars[2]) <= 1e-8
    for empty in (xp.numpy(plan)[2], xp.numpy(plan)[:, 1], bars[0][2], bars[0][:, 1], bars[1][2], bars[2][1]):
        assert np.all(empty == 0)


@pytest.mark.parametrize("change", ["sum", "negative", "nan", "zero"])
def test_marginals_without_a_plan(change, xp, rng):
    cost, p, q = transport(rng, batch=(3,))
    good, _ = nodes.sinkhorn(cost, p, q, eps=0.1)
    bad = {"sum": 1.01 * p[1], "negative": p[1] + [-1, 1, 0, 0, 0, 0, 0], "nan": p[1] * np.nan, "zero": 0 * p[1]}
    p[1] = bad[change]
    arrays = [xp.asarray(a) for a in (cost, p, q)]
    with pytest.raises(ConvergenceError, match="admit no plan"):
        nodes.sinkhorn(*arrays, eps=0.1)
    plan, info = nodes.sinkhorn(*arrays, eps=0.1, throw=False)
    assert np.array_equal(xp.numpy(info.feasible), [True, False, True])
    assert np.array_equal(xp.numpy(info.converged), [True, False, True])
    assert np.isnan(xp.numpy(info.residual_norm)[1])
    assert np.all(np.isnan(xp.numpy(plan)[1]))
    np.testing.assert_allclose(xp.numpy(plan)[[0, 2]], good[[0, 2]], rtol=1e-12)
    for bar in nodes.sinkhorn_vjp(plan, plan, eps=0.1, throw=False):
        assert np.array_equal(np.isnan(xp.numpy(bar)).reshape(3, -1).any(-1), [False, True, False])
    with pytest.raises(SingularError, match="exchange no mass, or is not finite"):
        nodes.sinkhorn_vjp(plan, plan, eps=0.1)


def test_options_of_sinkhorn(rng):
    cost, p, q = transport(rng)
    rough, info = nodes.sinkhorn(cost, p, q, eps=0.05, rtol=1e-2)
    fine, fine_info = nodes.sinkhorn(cost, p, q, eps=0.05)
    assert info.n_iter < fine_info.n_iter
    assert 1e-9 < info.residual_norm <= 1e-2
    assert fine_info.residual_norm <= 1.01e-9
    assert abs(np.abs(rough.sum(1) - p).sum() - info.residual_norm) <= 1e-12
    enough, _ = nodes.sinkhorn(cost, p, q, eps=0.05, maxiter=int(fine_info.n_iter))  # none left to see it in the loop
    assert np.array_equal(enough, fine)
    with pytest.raises(ConvergenceError, match=r"after 3 updates.*Raise eps, maxiter or rtol"):
        nodes.sinkhorn(cost, p, q, eps=0.05, maxiter=3)
    assert np.all(np.isnan(nodes.sinkhorn(cost, p, q, eps=0.05, maxiter=3, throw=False)[0]))
    each, each_info = nodes.sinkhorn(cost, p, q, eps=0.05, check_every=1)
    assert np.array_equal(each, fine)
    assert each_info.n_iter == fine_info.n_iter
    with pytest.raises(ValueError, match="check_every is 0"):
        nodes.sinkhorn(cost, p, q, eps=0.05, check_every=0)
    calls = []

    def loop(cond, body, state):
        while cond(state):
            calls.append(1)
            state = body(state)
        return state

    looped, _ = nodes.sinkhorn(cost, p, q, eps=0.05, while_loop=loop)
    assert np.array_equal(looped, fine)
    assert len(calls) >= int(fine_info.n_iter)


def test_sinkhorn_flags_are_read_every_few_updates(host_reads, rng):
    strict = backend("array-api-strict")
    arrays = [strict.asarray(a) for a in transport(rng)]
    counts = []
    for check_every in (1, 10):
        host_reads.clear()
        nodes.sinkhorn(*arrays, eps=0.05, check_every=check_every, throw=False)
        counts.append(len(host_reads))
    assert counts[0] > 5 * counts[1]


def test_a_plan_in_parts_has_no_gradient(rng):
    plan = np.diag([0.5, 0.5])
    with pytest.raises(SingularError, match="exchange no mass"):
        nodes.sinkhorn_vjp(np.ones((2, 2)), plan, eps=0.1)
    assert np.all(np.isnan(nodes.sinkhorn_vjp(np.ones((2, 2)), plan, eps=0.1, throw=False)[0]))


def test_sinkhorn_with_small_eps_does_not_overflow(rng):
    cost, p, q = transport(rng)
    plan, info = nodes.sinkhorn(1e3 * cost, p, q, eps=1.0, maxiter=100_000, throw=False)
    assert np.isfinite(info.residual_norm)
    plan, _ = nodes.sinkhorn(cost.astype(np.float32), p.astype(np.float32), q.astype(np.float32), eps=0.05)
    assert plan.dtype == np.float32


def test_static_errors_of_sinkhorn(rng):
    cost, p, q = transport(rng)
    with pytest.raises(ValueError, match="p has shape"):
        nodes.sinkhorn(cost, q, p, eps=0.1)
    with pytest.raises(ValueError, match=r"eps is 0\.0"):
        nodes.sinkhorn(cost, p, q, eps=0.0)
    with pytest.raises(TypeError, match="p has dtype float32"):
        nodes.sinkhorn(cost, p.astype(np.float32), q, eps=0.1)
    with pytest.raises(ValueError, match="plan_bar has shape"):
        nodes.sinkhorn_vjp(cost[:3], cost, eps=0.1)


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
    even = np.asarray([0.0, 0.1, 9.0, 9.1])  # median and mean in the empty middle: a flat stretch, no gradient
    y, _ = nodes.robust_pool(even, kind="truncated", alpha=0.5)
    with pytest.raises(SingularError, match="no gradient"):
        nodes.robust_pool_vjp(np.asarray(1.0), y, even, kind="truncated", alpha=0.5)


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
        x_bar = xp.numpy(
            nodes.robust_pool_vjp(
                xp.asarray(np.ones(2)), xp.asarray(np.asarray([5.0, 0.05])), xp.asarray(x),
                kind=kind, alpha=0.1, throw=False,
            )
        )  # fmt: skip
        assert np.all(np.isnan(x_bar[0]))
        np.testing.assert_allclose(x_bar[1], [0.5, 0.5])


def test_options_of_pooling(rng):
    x = rng.standard_normal(20)
    y, info = nodes.robust_pool(x, alpha=0.3)
    _, rough_info = nodes.robust_pool(x, alpha=0.3, rtol=0.1, check_every=1)
    assert rough_info.n_iter < info.n_iter
    assert 1e-12 < rough_info.residual_norm <= 0.1
    with pytest.raises(ConvergenceError, match="maxiter=1"):
        nodes.robust_pool(x, alpha=0.3, maxiter=1)
    assert np.isnan(nodes.robust_pool(x, alpha=0.3, maxiter=1, throw=False)[0])
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
