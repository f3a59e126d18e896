"""Entropic optimal transport against a 60-digit solution, on easy and hostile problems; every option and message."""

import importlib

import numpy as np
import pytest
from estimates._transport import exact, hostile
from problems import relative
from scipy.optimize import linprog

from conftest import backend, need
from ddnref import ConvergenceError, SingularError, nodes
from ddnref.testing import assert_vjp, numerical_jvp

EPS = {np.float64: 2.0**-52, np.float32: 2.0**-23}


def transport(rng, n=7, m=5, batch=()):
    p, q = rng.uniform(0.2, 1, (*batch, n)), rng.uniform(0.2, 1, (*batch, m))
    return (
        rng.uniform(0, 1, (*batch, n, m)),
        p / p.sum(-1, keepdims=True),
        q / q.sum(-1, keepdims=True),
    )


def single(*arrays):
    """The arrays in float32, with marginals whose sums are one in float32."""
    return tuple(np.asarray(a, np.float32) for a in arrays)


# --- hostile problems -------------------------------------------------------------------------------------------------


def measured(dtype, count):
    """Errors, in machine epsilons, of `count` hostile problems that do not split."""
    rows = []
    for seed in range(count):
        *arrays, eps, plan_bar = hostile(seed)
        cost, p, q, plan_bar = (a.astype(dtype) for a in (*arrays, plan_bar))
        plan, info = nodes.sinkhorn(cost, p, q, eps)
        (cost_bar, p_bar, q_bar, eps_bar), vjp_info = nodes.sinkhorn_vjp(plan_bar, plan, cost, p, q, eps)
        if max(info.blocks, vjp_info.blocks) > 1:
            continue
        true = exact(cost, p, q, eps, plan_bar, plan.astype(np.float64))
        assert true is not None
        size = max(np.max(np.abs(true.p_bar)), np.max(np.abs(true.q_bar)))
        error = max(np.max(np.abs(p_bar - true.p_bar)), np.max(np.abs(q_bar - true.q_bar))) / size
        # At a vertex of the polytope of plans the cost's gradient cancels to zero: its terms are the scale.
        terms = np.max(np.abs(true.plan * plan_bar)) / eps
        rows.append(
            (
                error,
                np.max(np.abs(plan - true.plan)),
                np.max(np.abs(cost_bar - true.cost_bar)) / terms,
                abs(eps_bar - true.eps_bar) / terms,
            )
        )
    return np.asarray(rows).T / EPS[dtype]


@pytest.mark.parametrize("dtype", EPS)
def test_hostile_problems(dtype):
    """Plan and gradients of cost and ε are right to rounding, those of marginals too where nothing is amplified."""
    count = 150 if dtype is np.float64 else 60
    error, plan, cost_bar, eps_bar = measured(dtype, count)
    assert len(error) >= 0.75 * count
    assert np.max(plan) <= 4
    assert np.max(cost_bar) <= 8
    assert np.max(eps_bar) <= 40
    assert np.median(error) <= 4


# --- what was reported --------------------------------------------------------------------------------------------


def test_weak_coupling_is_reported():
    """Two halves that exchange 1e-14 of the mass: one digit less than float64 can have, and the estimate says so."""
    cost, half = np.asarray([[0, 1], [0.6, 0]]), np.full(2, 0.5)
    plan, info = nodes.sinkhorn(cost, half, half, 0.025)
    assert info.residual_norm <= 1e-15
    np.testing.assert_allclose(plan[0, 1], 6.3320827745470215e-15, rtol=0.02)
    assert 1e-3 <= info.error <= 1
    plan_bar = np.asarray([[1.0, 0], [0, 0]])
    (cost_bar, p_bar, _, _), vjp_info = nodes.sinkhorn_vjp(plan_bar, plan, cost, half, half, 0.025)
    assert abs(p_bar[0] - 0.25) / 0.25 <= min(vjp_info.error, 0.03)
    np.testing.assert_allclose(cost_bar[0, 0], -1.26641655e-13, atol=2e-15)
    with pytest.raises(ConvergenceError, match=r"found a plan whose gradient is uncertain.*vjp_rtol 1.0e-06"):
        nodes.sinkhorn(cost, half, half, 0.025, vjp_rtol=1e-6)


@pytest.mark.parametrize("split", [1e-7, 1e-12])
def test_an_exchange_that_counts_as_none_is_part_of_the_error(split):
    """A column that exchanges a rounding error of float32 with two others, which are hardly coupled either."""
    plan = np.asarray([[1, 1e-3, split], [1e-3, 1, 3 * split], [split, split, 1]])
    plan_bar = np.asarray([[0.3, -1, 0.2], [0.7, 0.1, -0.4], [0.5, 0.9, -0.8]])
    inputs = -np.log(plan), plan.sum(axis=1) / plan.sum(), plan.sum(axis=0) / plan.sum()
    cost, p, q = single(*inputs)
    found, info = nodes.sinkhorn(cost, p, q, 1.0)
    (_, p_bar, q_bar, _), more = nodes.sinkhorn_vjp(plan_bar.astype(np.float32), found, cost, p, q, 1.0)
    assert info.blocks == more.blocks == 2
    # In float64 there is a single block; the means of the two are removed afterwards.
    true = nodes.sinkhorn_vjp(plan_bar, plan / plan.sum(), *inputs, 1.0)[0][1:3]
    true = [np.append(bar[:2] - bar[:2].mean(), 0) for bar in true]
    error = max(np.max(np.abs(bar - right)) for bar, right in zip((p_bar, q_bar), true, strict=True))
    error = error / max(np.max(np.abs(right)) for right in true)
    assert (error > 1e-5) == (split == 1e-7)
    assert error / 2 <= min(info.error, more.error) <= max(info.error, more.error) <= max(20 * error, 1e-5)


def test_points_on_a_line_in_single_precision():
    x = np.linspace(0, 1, 16)
    rng = np.random.default_rng(3)
    p, q = rng.dirichlet(np.ones(16)), rng.dirichlet(np.ones(16))
    cost, p, q = single((x[:, None] - x) ** 2, p, q)
    plan_bar = rng.standard_normal((16, 16)).astype(np.float32)
    plan, info = nodes.sinkhorn(cost, p, q, 0.01)
    bars, _ = nodes.sinkhorn_vjp(plan_bar, plan, cost, p, q, 0.01)
    wide = [z.astype(np.float64) for z in (cost, p, q)]
    wide[1:] = [z / z.sum() for z in wide[1:]]
    wide_plan, _ = nodes.sinkhorn(*wide, 0.01)
    wide_bars, _ = nodes.sinkhorn_vjp(plan_bar.astype(np.float64), wide_plan, *wide, 0.01)
    for got, expected in zip(bars, wide_bars, strict=True):
        assert got.dtype == np.float32
        assert relative(got, expected) <= 3e-6
    assert info.error <= 3e-6


@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("eps", [0.05, 1e-3])
def test_scores_with_small_eps(dtype, eps, xp):
    """Assignments by Gumbel scores, of which scaling solves none at the smaller ε."""
    rng = np.random.default_rng(8)
    scores = -rng.gumbel(size=(5, 8, 8)).astype(dtype)
    uniform = np.full(8, 1 / 8, dtype)
    plan, info = nodes.sinkhorn(*map(xp.asarray, (scores, uniform, uniform)), eps, while_loop=xp.while_loop)
    plan = xp.numpy(plan)
    assert np.all(xp.numpy(info.converged))
    assert np.max(np.abs(plan.sum(-1) - uniform)) <= 2 * EPS[dtype]
    assert np.max(np.abs(plan.sum(-2) - uniform)) <= 2 * EPS[dtype]
    assert np.max(xp.numpy(info.newton_steps)) <= 40


def test_numbers_of_numpy_do_not_promote(rng):
    arrays = single(*transport(rng))
    for eps in (np.float64(0.1), np.float32(0.1), 0.1):
        plan, info = nodes.sinkhorn(*arrays, eps)
        assert plan.dtype == info.error.dtype == info.residual_norm.dtype == np.float32
        bars, vjp_info = nodes.sinkhorn_vjp(plan, plan, *arrays, eps)
        assert {z.dtype for z in (*bars, vjp_info.error)} == {np.dtype(np.float32)}


# --- the plan -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("newton", [True, False])
@pytest.mark.parametrize("eps", [0.05, 0.5])
def test_sinkhorn_is_the_plain_loop(eps, newton, xp, rng):
    cost, p, q = transport(rng)
    u, k = np.ones(7), np.exp(-cost / eps)
    for _ in range(3000):
        v = q / (k.T @ u)
        u = p / (k @ v)
    plan, info = nodes.sinkhorn(*(xp.asarray(a) for a in (cost, p, q)), eps, newton=newton, rtol=1e-12)
    assert relative(xp.numpy(plan), u[:, None] * k * v) <= 1e-11
    assert xp.numpy(info.residual_norm) <= 1e-12
    assert bool(info.converged)


@pytest.mark.parametrize("newton", [True, False])
def test_sinkhorn_approaches_the_linear_program(newton, rng):
    cost, p, q = transport(rng, 5, 5)
    rows, columns = np.kron(np.eye(5), np.ones(5)), np.kron(np.ones(5), np.eye(5))
    exact = linprog(cost.ravel(), A_eq=np.concat([rows, columns]), b_eq=np.concat([p, q])).fun
    plan, _ = nodes.sinkhorn(cost, p, q, 5e-3, newton=newton, maxiter=100_000)
    assert exact - 1e-8 <= np.sum(plan * cost) <= exact + 5e-3 * np.log(25)


def test_scaling_does_not_overflow(rng):
    """Products of u, v and the kernel leave the range of the exponents; potentials take them up."""
    cost, p, q = transport(rng, 6, 6)
    for c, small in ((cost, 1e-3), (cost.astype(np.float32), 5e-3)):
        arrays = (c, *(z.astype(c.dtype) for z in (p, q)))
        plan, info = nodes.sinkhorn(*arrays, small, newton=False, throw=False)
        assert np.all(np.isfinite(plan))
        assert info.residual_norm <= 0.1


def test_a_batch_is_its_items(xp, rng):
    """ε per item, easy and hard ones together, each as it is alone; shared inputs get the sum of their gradients."""
    cost, p, q = transport(rng, batch=(3,))
    eps = np.asarray([0.5, 0.02, 1e-3])
    arrays = [xp.asarray(a) for a in (cost, p[0], q, eps)]
    plan, info = nodes.sinkhorn(*arrays)
    plan_bar = rng.standard_normal((3, 7, 5))
    bars, vjp_info = nodes.sinkhorn_vjp(xp.asarray(plan_bar), plan, *arrays)
    alone = []
    for i in range(3):  # on NumPy, where they must be the same to the last bit
        item = cost[i], p[0], q[i], float(eps[i])
        plan_alone, info_alone = nodes.sinkhorn(*item)
        assert np.max(np.abs(plan_alone - xp.numpy(plan)[i])) <= (0 if xp.name == "numpy" else 1e-15)
        assert xp.name != "numpy" or info_alone.newton_steps == info.newton_steps[i]
        alone.append(nodes.sinkhorn_vjp(plan_bar[i], plan_alone, *item)[0])
    summed = [np.stack(z) for z in zip(*alone, strict=True)]
    summed[1] = summed[1].sum(0)
    for got, expected in zip(xp.tuple(bars), summed, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, atol=1e-12 * np.max(np.abs(expected)))
    assert vjp_info.error.shape == (3,)


def test_shared_inputs_of_any_kind(rng):
    """One cost for many marginals, one ε for all: the gradient of a shared array is the sum over the items."""
    cost, p, q = transport(rng, batch=(4,))
    shared = (cost[0], p, q[:1], np.asarray([[0.1], [0.2]]))
    plan, info = nodes.sinkhorn(*shared)
    assert plan.shape == (2, 4, 7, 5)
    assert info.converged.shape == (2, 4)
    bars, _ = nodes.sinkhorn_vjp(np.ones_like(plan) * plan, plan, *shared)
    assert [bar.shape for bar in bars] == [z.shape for z in shared]
    assert_vjp(
        lambda *inputs: nodes.sinkhorn(*inputs)[0],
        lambda plan_bar, plan, *inputs: nodes.sinkhorn_vjp(plan_bar, plan, *inputs)[0],
        *shared,
        needs=(0, 1, 2, 3),
        tangent=("dense", "zero-sum", "zero-sum", "dense"),
    )
    number = nodes.sinkhorn_vjp(plan[0], plan[0], *shared[:3], 0.1)[0][3]
    assert np.shape(number) == ()


def test_infinite_costs(xp, rng):
    """The plan and the gradient are exactly zero where no mass may go, and right elsewhere."""
    cost, p, q = transport(rng)
    closed = rng.uniform(size=cost.shape) < 0.3
    closed[:, 0] = closed[0] = False
    cost[closed] = np.inf
    arrays = [xp.asarray(a) for a in (cost, p, q)]
    plan, info = nodes.sinkhorn(*arrays, 0.1)
    far = xp.numpy(nodes.sinkhorn(*(xp.asarray(a) for a in (np.where(closed, 90.0, cost), p, q)), 0.1)[0])
    np.testing.assert_allclose(xp.numpy(plan), far, atol=1e-14)
    assert np.all(xp.numpy(plan)[closed] == 0)
    plan_bar = rng.standard_normal(cost.shape)
    bars, _ = nodes.sinkhorn_vjp(xp.asarray(plan_bar), plan, *arrays, 0.1)
    assert np.all(xp.numpy(bars[0])[closed] == 0)
    for i in (1, 2):  # changes of a finite cost and of ε, by central differences
        h = np.zeros_like(cost)
        h[i, 0] = 1e-6
        up, down = (nodes.sinkhorn(cost + s * h, p, q, 0.1)[0] for s in (1, -1))
        assert abs(np.sum(plan_bar * (up - down)) / 2e-6 - float(bars[0][i, 0])) <= 1e-7
    up, down = (nodes.sinkhorn(cost, p, q, 0.1 + s * 1e-6)[0] for s in (1, -1))
    assert abs(np.sum(plan_bar * (up - down)) / 2e-6 - float(bars[3])) <= 1e-7
    assert bool(info.feasible)


def test_infinite_costs_without_a_plan(rng):
    cost, p, q = transport(rng, 3, 3, batch=(3,))
    p[:], q[:] = 1 / 3, 1 / 3
    cost[1, 0] = np.inf  # no way for the mass of this row
    cost[2, :2, :2] = np.inf  # two rows for one column: found by the marginals alone
    with pytest.raises(ConvergenceError, match=r"admit no plan for item 1 of the batch"):
        nodes.sinkhorn(cost, p, q, 0.1)
    with pytest.raises(ConvergenceError, match=r"did not converge.*infinite costs that leave no way"):
        nodes.sinkhorn(cost[2], p[2], q[2], 0.1, maxiter=30)
    plan, info = nodes.sinkhorn(cost, p, q, 0.1, maxiter=30, throw=False)
    assert np.array_equal(info.feasible, [True, False, True])
    assert np.array_equal(info.converged, [True, False, False])
    assert np.array_equal(np.isnan(plan).any((-2, -1)), [False, True, False])


def test_empty_bins(xp, rng):
    """Rows and columns without mass are empty, and the rest is the problem without them."""
    cost, p, q = transport(rng)
    p[2], q[1] = 0, 0
    p, q = p / p.sum(), q / q.sum()
    rows, columns = [0, 1, 3, 4, 5, 6], [0, 2, 3, 4]
    arrays = [xp.asarray(a) for a in (cost, p, q)]
    small_arrays = cost[np.ix_(rows, columns)], p[rows], q[columns]
    plan, _ = nodes.sinkhorn(*arrays, 0.1)
    small, _ = nodes.sinkhorn(*small_arrays, 0.1)
    plan_bar = rng.standard_normal((7, 5))
    bars = xp.tuple(nodes.sinkhorn_vjp(xp.asarray(plan_bar), plan, *arrays, 0.1)[0])
    small_bars, _ = nodes.sinkhorn_vjp(plan_bar[np.ix_(rows, columns)], small, *small_arrays, 0.1)
    assert relative(xp.numpy(plan)[np.ix_(rows, columns)], small) <= 1e-13
    assert relative(bars[0][np.ix_(rows, columns)], small_bars[0]) <= 1e-12
    assert relative(bars[1][rows], small_bars[1]) <= 1e-12
    assert relative(bars[2][columns], small_bars[2]) <= 1e-12
    for empty in (xp.numpy(plan)[2], xp.numpy(plan)[:, 1], bars[0][2], bars[0][:, 1], bars[1][2], bars[2][1]):
        assert np.all(empty == 0)


# --- the gradient -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(7, 5), (5, 7), (1, 4), (4, 1)])
def test_sinkhorn_gradient_on_either_side(n, m, rng):
    """The larger side is eliminated: both ways must agree with the unreduced system and its gauge."""
    inputs = transport(rng, n, m)
    plan, _ = nodes.sinkhorn(*inputs, 0.1)
    plan_bar = rng.standard_normal((n, m))
    t = plan_bar * plan
    whole = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]])
    z = np.linalg.pinv(whole) @ np.concat([t.sum(1), t.sum(0)])
    alpha, beta = z[:n], z[n:]
    cost_bar = plan * (alpha[:, None] + beta - plan_bar) / 0.1
    expected = cost_bar, alpha - alpha.mean(), beta - beta.mean(), -np.sum(cost_bar * inputs[0]) / 0.1
    for got, e in zip(nodes.sinkhorn_vjp(plan_bar, plan, *inputs, 0.1)[0], expected, strict=True):
        np.testing.assert_allclose(got, e, atol=1e-12 * np.max(np.abs(cost_bar)) + 1e-14)


def test_sinkhorn_gauge(rng):
    inputs = transport(rng, batch=(3,))
    plan, _ = nodes.sinkhorn(*inputs, 0.1)
    (cost_bar, p_bar, q_bar, _), _ = nodes.sinkhorn_vjp(rng.standard_normal(plan.shape), plan, *inputs, 0.1)
    for bar in (p_bar, q_bar):
        assert np.max(np.abs(bar.sum(-1))) <= 1e-13 * np.max(np.abs(bar)) * 7
    assert np.max(np.abs(cost_bar.sum(-1))) <= 1e-12  # the plan keeps its marginals
    shifted = rng.standard_normal((3, 7, 1)) + rng.standard_normal((3, 1, 5))  # a loss of the marginals alone
    assert np.max(np.abs(nodes.sinkhorn_vjp(shifted, plan, *inputs, 0.1)[0][0])) <= 1e-12


@pytest.mark.parametrize("dtype", EPS)
def test_a_plan_in_blocks(dtype, xp, rng):
    """Clusters that exchange no mass: gradients of cost and ε as if alone, marginals with a gauge for each block."""
    inputs = [transport(rng, 4, 3), transport(rng, 3, 4)]
    cost = np.full((7, 7), 100.0)
    cost[:4, :3], cost[4:, 3:] = inputs[0][0], inputs[1][0]
    p, q = (np.concat([z / 2, y / 2]) for z, y in zip(inputs[0][1:], inputs[1][1:], strict=True))
    order = rng.permutation(7)
    cost, q = cost[:, order], q[order]
    arrays = [xp.asarray(a.astype(dtype)) for a in (cost, p, q)]
    plan, info = nodes.sinkhorn(*arrays, 0.1)
    assert int(info.blocks) == 2
    assert float(info.error) <= 100 * EPS[dtype]
    plan_bar = rng.standard_normal((7, 7))
    bars, vjp_info = nodes.sinkhorn_vjp(xp.asarray(plan_bar.astype(dtype)), plan, *arrays, 0.1)
    assert int(vjp_info.blocks) == 2
    cost_bar, p_bar, q_bar, _ = xp.tuple(bars)
    back = np.argsort(order)
    for (c, a, b), rows, columns in zip(inputs, (slice(4), slice(4, 7)), (back[:3], back[3:]), strict=True):
        alone, _ = nodes.sinkhorn(c, a, b, 0.1)
        expected, _ = nodes.sinkhorn_vjp(plan_bar[rows, columns], alone, c, a, b, 0.1)
        assert relative(xp.numpy(plan)[rows, columns], alone / 2) <= 20 * EPS[dtype]
        assert relative(cost_bar[rows, columns], expected[0] / 2) <= 60 * EPS[dtype]
        assert relative(p_bar[rows], expected[1]) <= 60 * EPS[dtype]
        assert relative(q_bar[columns], expected[2]) <= 60 * EPS[dtype]


def test_every_column_a_block(xp):
    plan, half = xp.asarray(np.diag([0.5, 0.5])), xp.asarray(np.full(2, 0.5))
    bars, info = nodes.sinkhorn_vjp(xp.asarray(np.ones((2, 2))), plan, plan, half, half, 0.1)
    assert int(info.blocks) == 2
    assert all(np.all(xp.numpy(bar) == 0) for bar in bars)


def test_a_rough_plan_has_an_estimate(rng):
    """Without Newton steps the error of the marginals, amplified, is that of the gradient."""
    inputs = transport(rng)
    plan_bar = rng.standard_normal((7, 5))
    right, _ = nodes.sinkhorn(*inputs, 0.03)
    expected, _ = nodes.sinkhorn_vjp(plan_bar, right, *inputs, 0.03)
    for rtol in (1e-3, 1e-5, 1e-7):
        plan, info = nodes.sinkhorn(*inputs, 0.03, newton=False, rtol=rtol)
        assert np.isnan(info.error)
        (_, p_bar, q_bar, _), vjp_info = nodes.sinkhorn_vjp(plan_bar, plan, *inputs, 0.03)
        size = max(np.max(np.abs(z)) for z in expected[1:3])
        error = max(np.max(np.abs(p_bar - expected[1])), np.max(np.abs(q_bar - expected[2]))) / size
        assert error / 2 <= vjp_info.error <= 50 * error


# --- the tangent --------------------------------------------------------------------------------------------------


def tangents(rng, cost, p, q):
    """Random ones of which those of the marginals have sums of zero."""
    dots = [rng.standard_normal(np.shape(z)) for z in (cost, p, q)]
    return dots[0], *(z - z.mean(-1, keepdims=True) for z in dots[1:])


@pytest.mark.parametrize("dtype", EPS)
def test_tangents_of_hostile_problems(dtype):
    """Along cost and ε right to rounding of the terms, along the marginals within the estimate."""
    errors = []
    for seed in range(40 if dtype is np.float64 else 20):
        *arrays, eps, plan_bar = hostile(seed)
        cost, p, q, plan_bar = (a.astype(dtype) for a in (*arrays, plan_bar))
        plan, info = nodes.sinkhorn(cost, p, q, eps)
        if info.blocks > 1:
            continue
        rng = np.random.default_rng(seed)
        c_dot, p_dot, q_dot = (z.astype(dtype) for z in tangents(rng, cost, p, q))
        for dots in ((c_dot, None, None, dtype(0.3)), (None, p_dot, q_dot, None)):
            given = [np.zeros_like(z) if d is None else d for d, z in zip(dots, (cost, p, q, dtype(0)), strict=True)]
            # The mean that rounding leaves in a tangent of float32 is taken out before it moves anything.
            given[1:3] = [z.astype(np.float64) - z.astype(np.float64).mean() for z in given[1:3]]
            true = exact(cost, p, q, eps, plan_bar, plan.astype(np.float64), given)
            plan_dot, jvp_info = nodes.sinkhorn_jvp(*dots, plan, cost, p, q, eps)
            assert plan_dot.dtype == jvp_info.error.dtype == dtype
            assert jvp_info.converged
            error = np.max(np.abs(plan_dot - true.plan_dot)) / true.size_dot
            errors.append([error / EPS[dtype], error / jvp_info.error])
    absolute, relative_to_estimate = np.asarray(errors).T
    assert len(errors) >= 30 if dtype is np.float64 else 15
    assert np.max(absolute[::2]) <= 8
    assert np.median(absolute[1::2]) <= 4
    assert np.max(relative_to_estimate) <= 2


@pytest.mark.parametrize(("n", "m"), [(7, 5), (5, 7), (1, 4), (4, 1), (1, 1)])
def test_tangent_on_either_side(n, m, rng):
    """The larger side is eliminated: both ways must agree with the unreduced system."""
    cost, p, q = transport(rng, n, m)
    plan, _ = nodes.sinkhorn(cost, p, q, 0.1)
    c_dot, p_dot, q_dot = tangents(rng, cost, p, q)
    d = plan * (-c_dot - 0.5 * np.log(plan)) / 0.1
    whole = np.block([[np.diag(plan.sum(1)), plan], [plan.T, np.diag(plan.sum(0))]])
    z = np.linalg.pinv(whole) @ np.concat([p_dot - d.sum(1), q_dot - d.sum(0)])
    expected = d + plan * (z[:n, None] + z[n:])
    plan_dot, info = nodes.sinkhorn_jvp(c_dot, p_dot, q_dot, 0.5, plan, cost, p, q, 0.1)
    np.testing.assert_allclose(plan_dot, expected, atol=1e-12 * np.max(np.abs(d)))
    np.testing.assert_allclose(plan_dot.sum(-1), p_dot, atol=1e-12)
    np.testing.assert_allclose(plan_dot.sum(-2), q_dot, atol=1e-12)
    assert info.error <= 1e-12


def test_tangents_of_shared_inputs(xp, rng):
    """One cost for many marginals: tangents have the shapes of their inputs, and the transpose sums over the items."""
    cost, p, q = transport(rng, batch=(4,))
    shared = (cost[0], p, q[:1], np.asarray([[0.1], [0.2]]))
    plan, _ = nodes.sinkhorn(*shared)
    plan_bar, dots = rng.standard_normal(plan.shape), (*tangents(rng, *shared[:3]), rng.standard_normal((2, 1)))
    bars, vjp_info = nodes.sinkhorn_vjp(plan_bar, plan, *shared)
    plan_dot, info = nodes.sinkhorn_jvp(*map(xp.asarray, (*dots, plan, *shared)))
    plan_dot = xp.numpy(plan_dot)
    assert plan_dot.shape == plan.shape
    assert np.array_equal(xp.numpy(info.blocks), vjp_info.blocks)
    assert info.error.shape == (2, 4)
    error = abs(np.sum(plan_bar * plan_dot) - sum(np.sum(a * b) for a, b in zip(bars, dots, strict=True)))
    assert error <= 1e-12 * np.linalg.norm(plan_bar) * np.linalg.norm(plan_dot)
    if xp.name == "numpy":
        along = lambda t: nodes.sinkhorn(*(z + t[0] * d for z, d in zip(shared, dots, strict=True)))[0]
        assert relative(plan_dot, numerical_jvp(along, np.zeros(1), np.ones(1), step=1e-4)) <= 1e-8


def test_a_number_eps_has_a_number_as_its_tangent(rng):
    for arrays in (transport(rng), single(*transport(rng))):
        plan, _ = nodes.sinkhorn(*arrays, 0.1)
        as_array = np.asarray(0.3, plan.dtype)
        expected, _ = nodes.sinkhorn_jvp(None, None, None, as_array, plan, *arrays, 0.1)
        for eps_dot in (0.3, np.float64(0.3), as_array):
            plan_dot, info = nodes.sinkhorn_jvp(None, None, None, eps_dot, plan, *arrays, 0.1)
            assert plan_dot.dtype == info.error.dtype == plan.dtype
            np.testing.assert_allclose(plan_dot, expected, rtol=1e-6)


def test_a_change_of_the_total_mass_moves_nothing(rng):
    """Only the sum-free parts count, just as the gradients of the marginals have mean zero."""
    inputs = transport(rng, batch=(3,))
    plan, _ = nodes.sinkhorn(*inputs, 0.1)
    _, p_dot, q_dot = tangents(rng, *inputs)
    ones = np.ones((3, 7)), np.ones((3, 5))
    still, _ = nodes.sinkhorn_jvp(None, *ones, None, plan, *inputs, 0.1)
    assert np.max(np.abs(still)) <= 1e-13
    plain, _ = nodes.sinkhorn_jvp(None, p_dot, q_dot, None, plan, *inputs, 0.1)
    shifted, _ = nodes.sinkhorn_jvp(None, p_dot + 2, q_dot - 3, None, plan, *inputs, 0.1)
    np.testing.assert_allclose(shifted, plain, atol=1e-12)


def transposed(xp, dots, arrays, eps, rng):
    """The plan, its tangent, and the error of the transpose identity relative to both factors."""
    plan, _ = nodes.sinkhorn(*map(xp.asarray, arrays), eps)
    plan_bar = rng.standard_normal(plan.shape).astype(arrays[0].dtype)
    bars, _ = nodes.sinkhorn_vjp(xp.asarray(plan_bar), plan, *map(xp.asarray, arrays), eps)
    plan_dot, _ = nodes.sinkhorn_jvp(*map(xp.asarray, dots), 0.7, plan, *map(xp.asarray, arrays), eps)
    plan_dot, dots = xp.numpy(plan_dot), [np.where(np.isfinite(d), d, 0) for d in (*dots, np.asarray(0.7))]
    pairing = sum(np.sum(a * b) for a, b in zip(xp.tuple(bars), dots, strict=True))
    size = np.linalg.norm(plan_bar) * np.linalg.norm(plan_dot)
    return xp.numpy(plan), plan_dot, abs(np.sum(plan_bar * plan_dot) - pairing) / size


def test_tangents_where_no_mass_may_go(xp, rng):
    """Infinite costs and empty bins: zero there, whatever their tangents are, and the rest moves as if without them."""
    cost, p, q = transport(rng)
    closed = rng.uniform(size=cost.shape) < 0.3
    closed[:, 0] = closed[0] = False
    cost[closed] = np.inf
    p[2], q[1] = 0, 0
    p, q = p / p.sum(), q / q.sum()
    c_dot, p_dot, q_dot = tangents(rng, cost, p, q)
    c_dot[closed] = np.inf
    plan, plan_dot, error = transposed(xp, (c_dot, p_dot, q_dot), (cost, p, q), 0.1, rng)
    assert np.all(plan_dot[plan == 0] == 0)
    assert np.all(np.isfinite(plan_dot))
    assert error <= 1e-12
    rows, columns = [0, 1, 3, 4, 5, 6], [0, 2, 3, 4]
    p_dot[rows] -= p_dot[rows].mean()
    q_dot[columns] -= q_dot[columns].mean()
    sums = nodes.sinkhorn_jvp(*map(xp.asarray, (c_dot, p_dot, q_dot)), None, *map(xp.asarray, (plan, cost, p, q)), 0.1)
    np.testing.assert_allclose(xp.numpy(sums[0]).sum(-1)[rows], p_dot[rows], atol=1e-12)


@pytest.mark.parametrize("dtype", EPS)
def test_tangent_of_a_plan_in_blocks(dtype, xp, rng):
    """Clusters that exchange no mass move as if alone, and no mass moves between them."""
    inputs = [transport(rng, 4, 3), transport(rng, 3, 4)]
    cost = np.full((7, 7), 100.0)
    cost[:4, :3], cost[4:, 3:] = inputs[0][0], inputs[1][0]
    p, q = (np.concat([z / 2, y / 2]) for z, y in zip(inputs[0][1:], inputs[1][1:], strict=True))
    order = rng.permutation(7)
    cost, q = cost[:, order], q[order]
    dots = rng.standard_normal((7, 7)), rng.standard_normal(7), rng.standard_normal(7)
    arrays = [a.astype(dtype) for a in (cost, p, q)]
    _, plan_dot, error = transposed(xp, [d.astype(dtype) for d in dots], arrays, 0.1, rng)
    assert error <= (1e-12 if dtype is np.float64 else 1e-5)
    back = np.argsort(order)
    for (c, a, b), rows, columns in zip(inputs, (slice(4), slice(4, 7)), (back[:3], back[3:]), strict=True):
        alone, _ = nodes.sinkhorn(c, a, b, 0.1)
        part = dots[0][rows, columns], 2 * dots[1][rows], 2 * dots[2][columns]
        expected, _ = nodes.sinkhorn_jvp(*part, 0.7, alone, c, a, b, 0.1)
        assert relative(plan_dot[rows, columns], expected / 2) <= 60 * EPS[dtype]


def test_messages_of_the_tangent(rng):
    cost, p, q = transport(rng, batch=(3,))
    plan, _ = nodes.sinkhorn(cost, p, q, 0.1)
    with pytest.raises(TypeError, match="cost_dot and p_dot and q_dot and eps_dot are all None: there is no direction"):
        nodes.sinkhorn_jvp(None, None, None, None, plan, cost, p, q, 0.1)
    with pytest.raises(ValueError, match=r"p_dot has shape \(3, 5\), expected \(3, 7\)"):
        nodes.sinkhorn_jvp(None, q, None, None, plan, cost, p, q, 0.1)
    with pytest.raises(ValueError, match=r"eps_dot has shape \(3,\), expected \(\)"):
        nodes.sinkhorn_jvp(None, None, None, p[:, 0], plan, cost, p, q, 0.1)
    with pytest.raises(TypeError, match="q_dot has dtype float32"):
        nodes.sinkhorn_jvp(None, None, q.astype(np.float32), None, plan, cost, p, q, 0.1)
    plan[1, 0, 0] = np.nan
    with pytest.raises(SingularError, match="sinkhorn_jvp is not finite for item 1 of the batch, so it has no tangent"):
        nodes.sinkhorn_jvp(cost, p, q, None, plan, cost, p, q, 0.1)
    plan_dot, info = nodes.sinkhorn_jvp(cost, p, q, None, plan, cost, p, q, 0.1, throw=False)
    assert np.array_equal(np.isnan(plan_dot).all((-2, -1)), [False, True, False])
    assert np.array_equal(np.isnan(plan_dot).any((-2, -1)), [False, True, False])
    assert np.array_equal(info.converged, [True, False, True])


# --- options, status and messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["sum", "negative", "nan", "zero", "cost", "eps"])
def test_inputs_without_a_plan(change, xp, rng):
    cost, p, q = transport(rng, batch=(3,))
    eps = np.full(3, 0.1)
    good, _ = nodes.sinkhorn(cost, p, q, 0.1)
    bad = {"sum": 1.01 * p[1], "negative": p[1] + [-1, 1, 0, 0, 0, 0, 0], "nan": p[1] * np.nan, "zero": 0 * p[1]}
    p[1] = bad.get(change, p[1])
    cost[1, 2, 3] = {"cost": np.nan}.get(change, 0.5)
    eps[1] = {"eps": -1}.get(change, 0.1)
    cost[[0, 2], 2, 3] = (
        np.random.default_rng(20).uniform(0, 1, (3, 7, 5))[[0, 2], 2, 3] if False else cost[[0, 2], 2, 3]
    )
    arrays = [xp.asarray(a) for a in (cost, p, q, eps)]
    with pytest.raises(ConvergenceError, match="admit no plan for item 1 of the batch"):
        nodes.sinkhorn(*arrays)
    plan, info = nodes.sinkhorn(*arrays, throw=False)
    assert np.array_equal(xp.numpy(info.feasible), [True, False, True])
    assert np.array_equal(xp.numpy(info.converged), [True, False, True])
    assert np.isnan(xp.numpy(info.residual_norm)[1])
    assert np.all(np.isnan(xp.numpy(plan)[1]))
    np.testing.assert_allclose(xp.numpy(plan)[[0, 2]], good[[0, 2]], rtol=1e-12)
    bars, vjp_info = nodes.sinkhorn_vjp(plan, plan, *arrays, throw=False)
    assert np.array_equal(xp.numpy(vjp_info.converged), [True, False, True])
    for bar in bars:
        assert np.array_equal(np.isnan(xp.numpy(bar)).reshape(3, -1).any(-1), [False, True, False])
    with pytest.raises(SingularError, match="is not finite for item 1 of the batch"):
        nodes.sinkhorn_vjp(plan, plan, *arrays)


def test_options_of_sinkhorn(rng):
    inputs = transport(rng)
    rough, info = nodes.sinkhorn(*inputs, 0.05, newton=False, rtol=1e-2)
    fine, fine_info = nodes.sinkhorn(*inputs, 0.05, newton=False)
    assert info.n_iter < fine_info.n_iter
    assert 1e-9 < info.residual_norm <= 1e-2
    assert fine_info.residual_norm <= 1e-9
    assert np.isnan(fine_info.error)
    assert fine_info.newton_steps == fine_info.blocks == 0
    residual = np.abs(rough.sum(1) - inputs[1]).sum() + np.abs(rough.sum(0) - inputs[2]).sum()
    assert abs(residual - info.residual_norm) <= 1e-15
    # Another rhythm of the checks stops within one of its periods, on the same path.
    _, each_info = nodes.sinkhorn(*inputs, 0.05, newton=False, check_every=1)
    assert fine_info.n_iter - 10 < each_info.n_iter <= fine_info.n_iter
    with pytest.raises(ValueError, match="check_every is 0"):
        nodes.sinkhorn(*inputs, 0.05, check_every=0)
    with pytest.raises(ValueError, match="vjp_rtol is given with newton=False"):
        nodes.sinkhorn(*inputs, 0.05, newton=False, vjp_rtol=1e-3)
    # The limit is one of updates, and one of Newton steps.
    with pytest.raises(ConvergenceError, match=r"after 3 updates and 0 Newton steps.*allow Newton steps"):
        nodes.sinkhorn(*inputs, 0.05, newton=False, maxiter=3, check_every=3)
    last, last_info = nodes.sinkhorn(*inputs, 0.05, newton=False, maxiter=3, check_every=3, throw=False)
    assert not last_info.converged
    assert np.max(np.abs(last - fine)) <= 0.1  # the last plan, not NaN
    with pytest.raises(ConvergenceError, match="Raise eps, maxiter or rtol, or pass throw=False to get the last plan"):
        nodes.sinkhorn(*inputs, 1e-3, maxiter=2)
    calls = []

    def loop(cond, body, state):
        while cond(state):
            calls.append(1)
            state = body(state)
        return state

    for newton in (True, False):
        looped, _ = nodes.sinkhorn(*inputs, 0.05, while_loop=loop, newton=newton)
        np.testing.assert_allclose(looped, nodes.sinkhorn(*inputs, 0.05, newton=newton)[0], rtol=1e-13)
    assert len(calls) >= int(fine_info.n_iter) / 10


def test_flags_are_read_every_few_updates(host_reads, rng):
    strict = backend("array-api-strict")
    arrays = [strict.asarray(a) for a in transport(rng)]
    counts = []
    for check_every in (1, 10):
        host_reads.clear()
        _, info = nodes.sinkhorn(*arrays, 0.05, newton=False, check_every=check_every, throw=False)
        counts.append(len(host_reads))
        assert counts[-1] <= int(info.n_iter) / check_every + 4
    assert counts[0] > 5 * counts[1]
    host_reads.clear()
    plan, info = nodes.sinkhorn(*arrays, 0.001, throw=False)  # 100 updates, then Newton steps
    assert len(host_reads) <= 10 + int(info.newton_steps) + 8
    host_reads.clear()
    nodes.sinkhorn_vjp(plan, plan, *arrays, 0.001, throw=False)
    assert not host_reads


def test_static_errors_of_sinkhorn(rng):
    cost, p, q = transport(rng)
    with pytest.raises(ValueError, match=r"p has shape \(5,\), expected \(\.\.\., 7\)"):
        nodes.sinkhorn(cost, q, p, 0.1)
    with pytest.raises(ValueError, match=r"eps is 0\.0"):
        nodes.sinkhorn(cost, p, q, 0.0)
    with pytest.raises(TypeError, match="eps is None"):
        nodes.sinkhorn(cost, p, q, None)
    with pytest.raises(TypeError, match="p has dtype float32"):
        nodes.sinkhorn(cost, p.astype(np.float32), q, 0.1)
    with pytest.raises(TypeError, match="eps has dtype float32"):
        nodes.sinkhorn(cost, p, q, np.full(3, 0.1, np.float32))
    with pytest.raises(ValueError, match=r"do not broadcast.*p \(2,\).*eps \(3,\)"):
        nodes.sinkhorn(cost, np.stack([p, p]), q, np.full(3, 0.1))
    with pytest.raises(ValueError, match="plan_bar has shape"):
        nodes.sinkhorn_vjp(cost[:3], cost, cost, p, q, 0.1)
    assert nodes.sinkhorn(np.empty((0, 7, 5)), p, q, 0.1)[0].shape == (0, 7, 5)


# --- bridges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "jax", "autograd", "tensorflow", "dask"])
def test_bridges_take_a_number_or_an_array(name, request, rng):
    """ε as a number, or as an array, which has a gradient."""
    need(request.config, name)
    bridge = importlib.import_module(f"ddnref.interop.{name}")
    cost, p, q = transport(rng, batch=(2,))
    eps = np.asarray([0.1, 0.1])
    plan, _ = nodes.sinkhorn(cost, p[0], q, eps)
    expected = nodes.sinkhorn_vjp(2 * plan, plan, cost, p[0], q, eps)[0][3]  # of the sum of squares
    if name == "dask":
        da = importlib.import_module("dask.array")
        arrays = [da.from_array(a) for a in (cost, p[0], q)]
        number = bridge.map_items(nodes.sinkhorn, *arrays, 0.1)[0].compute()
        both = bridge.map_gradients(
            nodes.sinkhorn, lambda y: ((y**2).sum((-2, -1)), (2 * y,)), *arrays, da.from_array(eps)
        )
        got = both[1][3].compute()
    else:
        sinkhorn = bridge.differentiable(nodes.sinkhorn)
        if name == "torch":
            torch = importlib.import_module("torch")
            arrays = [torch.asarray(a) for a in (cost, p[0], q)]
            strength = torch.asarray(eps).requires_grad_()
            (sinkhorn(*arrays, strength)[0] ** 2).sum().backward()
            got = strength.grad.numpy()
        elif name == "tensorflow":
            tf = importlib.import_module("tensorflow")
            arrays, strength = [tf.constant(a) for a in (cost, p[0], q)], tf.Variable(eps)
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(sinkhorn(*arrays, strength)[0] ** 2)
            got = tape.gradient(loss, strength).numpy()
        else:
            np_ = importlib.import_module("jax.numpy" if name == "jax" else "autograd.numpy")
            grad = importlib.import_module(name).grad
            if name == "jax":
                backend("jax")  # in 64 bits
            arrays = [np_.asarray(a) for a in (cost, p[0], q)]
            got = np.asarray(grad(lambda e: np_.sum(sinkhorn(*arrays, e)[0] ** 2))(np_.asarray(eps)))
        number = np.asarray(sinkhorn(*arrays, 0.1)[0])
    assert relative(number, plan) <= 1e-13
    assert relative(got, expected) <= 1e-11
