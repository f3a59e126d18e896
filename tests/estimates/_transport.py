"""Gradients through transport plans, of the marginals, against solutions with 110 digits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mpmath
import numpy as np

from ddnref import nodes
from ddnref._rules.table import RULES, TRIALS
from ddnref.verify._hard import splitting

from ._results import TRANSPORT, Results, of_batch


def exact(cost, p, q, eps, plan_bar, start, dots=None):
    """Plan, gradients and tangent with 110 digits: Newton's method on γ from a nearly right plan."""
    with mpmath.workdps(110):
        n, m = cost.shape
        k = [[-mpmath.mpf(float(c)) / mpmath.mpf(float(eps)) for c in row] for row in cost]
        p, q = ([mpmath.mpf(float(x)) for x in z] for z in (p, q))
        q = [x * mpmath.fsum(p) / mpmath.fsum(q) for x in q]
        # Potentials by least squares on the logarithm, in which weak couplings count too.
        weight = (start.ravel() + 1e-300) ** 0.15
        design = np.concat([np.kron(np.eye(n), np.ones((m, 1))), np.kron(np.ones((n, 1)), np.eye(m))], axis=1)
        log = np.log(start.ravel() + 1e-300) + cost.ravel() / eps
        z = np.linalg.lstsq(design * weight[:, None], log * weight)[0]
        gamma = [mpmath.mpf(x) for x in z[n:]]
        for _ in range(80):
            plan = mpmath.matrix(n, m)
            for i in range(n):
                e = [mpmath.exp(gamma[j] + k[i][j]) for j in range(m)]
                for j in range(m):
                    plan[i, j] = p[i] * e[j] / mpmath.fsum(e)
            c = [mpmath.fsum(plan[:, j]) for j in range(m)]
            laplacian = mpmath.matrix(m, m)
            for a in range(m):
                for b in range(m):
                    laplacian[a, b] = c[a] * c[b] - mpmath.fsum(plan[i, a] * plan[i, b] / p[i] for i in range(n))
                laplacian[a, a] += c[a]
            missing = [q[j] - c[j] for j in range(m)]
            wrong = max(abs(missing[j] / q[j]) for j in range(m))
            if wrong < mpmath.mpf(10) ** -90:
                break
            damped = laplacian.copy()
            for j in range(m):
                damped[j, j] += c[j] * wrong / 8 if wrong > mpmath.mpf(10) ** -25 else 0
            step = mpmath.lu_solve(damped, mpmath.matrix(missing))
            size = max(abs(x) for x in step)
            gamma = [gamma[j] + step[j] * min(1, 8 / size) for j in range(m)]
        else:
            return None
        mean = [mpmath.fsum(plan_bar[i, j] * plan[i, j] for j in range(m)) / p[i] for i in range(n)]
        t = [mpmath.fsum((plan_bar[i, j] - mean[i]) * plan[i, j] for i in range(n)) for j in range(m)]
        beta = mpmath.lu_solve(laplacian, mpmath.matrix(t))
        alpha = [mean[i] - mpmath.fsum(plan[i, j] * beta[j] for j in range(m)) / p[i] for i in range(n)]
        cost_bar = [[plan[i, j] * (alpha[i] + beta[j] - plan_bar[i, j]) / eps for j in range(m)] for i in range(n)]
        eps_bar = mpmath.fsum(cost_bar[i][j] * k[i][j] for i in range(n) for j in range(m))
        plan_dot = size_dot = None
        if dots is not None:  # tangents of the marginals must have sums of zero
            c_dot, p_dot, q_dot, eps_dot = (np.vectorize(lambda x: mpmath.mpf(float(x)))(z) for z in dots)
            e = mpmath.mpf(float(eps))
            d = [[plan[i, j] * (-c_dot[i, j] - k[i][j] * eps_dot) / e for j in range(m)] for i in range(n)]
            own = [(p_dot[i] - mpmath.fsum(d[i])) / p[i] for i in range(n)]
            right = [q_dot[j] - mpmath.fsum(d[i][j] + plan[i, j] * own[i] for i in range(n)) for j in range(m)]
            gamma_dot = mpmath.lu_solve(laplacian, mpmath.matrix(right))
            phi_dot = [own[i] - mpmath.fsum(plan[i, j] * gamma_dot[j] for j in range(m)) / p[i] for i in range(n)]
            plan_dot = np.asarray(
                [[d[i][j] + plan[i, j] * (phi_dot[i] + gamma_dot[j]) for j in range(m)] for i in range(n)], dtype=float
            )
            size_dot = max(float(max(abs(x) for row in d for x in row)), np.max(abs(plan_dot)))
        p_bar = [float(x - mpmath.fsum(alpha) / n) for x in alpha]
        q_bar = [float(x - mpmath.fsum(beta) / m) for x in beta]
        return SimpleNamespace(
            plan=np.asarray([[float(plan[i, j]) for j in range(m)] for i in range(n)]),
            cost_bar=np.asarray(cost_bar, dtype=np.float64),
            p_bar=np.asarray(p_bar),
            q_bar=np.asarray(q_bar),
            eps_bar=float(eps_bar),
            plan_dot=plan_dot,
            size_dot=size_dot,
        )


def hostile(seed):
    """Costs without structure, on a line, of two clusters, of Gumbel noise, and a nearly free diagonal."""
    rng = np.random.default_rng([16, seed])
    n, m = rng.integers(2, 7, 2)
    p, q = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(m))
    match seed % 5:
        case 0:
            cost = rng.uniform(0, 1, (n, m))
        case 1:
            cost = (np.sort(rng.uniform(size=n))[:, None] - np.sort(rng.uniform(size=m))) ** 2
        case 2:
            n = m = max(n, 3)
            cost, p = rng.uniform(0, 0.3, (n, n)), np.full(n, 1 / n)
            cost[: n // 2, n // 2 :] += 1
            cost[n // 2 :, : n // 2] += 1
            q = p
        case 3:
            cost = -rng.gumbel(size=(n, m))
            cost = (cost - cost.min()) / np.ptp(cost)
        case _:
            n = m = max(n, 3)
            cost, p = rng.uniform(0.5, 1, (n, n)), rng.dirichlet(np.ones(n))
            cost[np.arange(n), np.arange(n)] = 0
            q = p
    return cost, p, q, float(np.float32(10 ** rng.uniform(-2.3, -0.3))), rng.standard_normal((n, m))


# --- blocks ---------------------------------------------------------------------------------------------------------


def blocks_of(plan: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the `count` blocks that exchange the least mass, for each row and each column of a plan."""
    p, c = plan.sum(axis=1, keepdims=True), plan.sum(axis=0)
    inside = c > 0
    root = np.sqrt(np.where(inside, c, 1))
    edges = (plan / np.where(p > 0, p, 1)).T @ plan / root / root[:, None]
    label = np.arange(len(c))
    # Join columns along the strongest edges until so many blocks are left; columns without mass belong to none.
    for i, j in sorted(zip(*np.triu_indices(len(c), 1), strict=True), key=lambda pair: -edges[pair]):
        if len(np.unique(label[inside])) <= count:
            break
        label = np.where(label == label[j], label[i], label)
    return label[np.argmax(plan, axis=1)], label


def centred(bar: np.ndarray, block: np.ndarray, marginal: np.ndarray) -> np.ndarray:
    """The gradient with mean zero over the entries of each block that have mass; all else is a gauge."""
    bar = np.where(marginal > 0, bar, 0)
    for number in np.unique(block):
        inside = (block == number) & (marginal > 0)
        bar = np.where(inside, bar - bar[inside].mean() if inside.any() else bar, bar)
    return bar


# --- the measurement ------------------------------------------------------------------------------------------------


def problem(rng: np.random.Generator, number: int, dtype: Any) -> tuple[Any, ...]:
    """Cost, marginals, strength and cotangent: hostile, in blocks as ``ddnref verify`` makes them, or easy."""
    if number % 8 == 6:
        cost, p, q, eps, plan_bar = splitting(RULES["sinkhorn"], rng, dtype).arrays
    elif number % 8 == 7:
        sample = TRIALS["sinkhorn"].sample(np.asarray, rng, (), int(rng.integers(2, 6)), False)
        cost, p, q, eps = sample.inputs
        plan_bar = rng.standard_normal(cost.shape)
    else:
        cost, p, q, eps, plan_bar = hostile(int(rng.integers(2**31)))
    return *(a.astype(dtype) for a in (cost, p, q)), float(np.float32(eps)), plan_bar.astype(dtype)


def measured(rng: np.random.Generator, problems: int, dtype: Any) -> list[Results]:
    """The estimates of the forward and of the reverse pass, both of the gradients of p and q."""
    rows = []
    for number in range(problems):
        cost, p, q, eps, plan_bar = problem(rng, number, dtype)
        plan, info = nodes.sinkhorn(cost, p, q, eps, throw=False)
        (_, *bars, _), more = nodes.sinkhorn_vjp(plan_bar, plan, cost, p, q, eps, throw=False)
        said = (info.error, info.converged, more.error, more.converged)
        if not all(np.all(np.isfinite(bar)) for bar in bars):
            rows.append((np.nan, *said))
            continue
        true = exact(cost, p, q, eps, plan_bar, plan.astype(np.float64))
        where = blocks_of(true.plan, int(more.blocks))
        right = [centred(*each) for each in zip((true.p_bar, true.q_bar), where, (p, q), strict=True)]
        size = max(np.max(np.abs(bar)) for bar in right)
        error = max(np.max(np.abs(bar - exact)) for bar, exact in zip(bars, right, strict=True)) / (size or 1)
        rows.append((error, *said))
    error, *said = zip(*rows, strict=True)
    names = ("sinkhorn", "sinkhorn_vjp")
    return [of_batch(name, dtype, TRANSPORT, error, *said[2 * i : 2 * i + 2]) for i, name in enumerate(names)]
