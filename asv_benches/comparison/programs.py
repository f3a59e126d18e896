"""Solutions of optimisation problems: entropic optimal transport, a quadratic program."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

import ddnref

from ._oracles import gradient, solve
from ._problem import Inputs, cell, problem

# --- optimal transport ----------------------------------------------------------------------------------------------


def draw_transport(rng: np.random.Generator, _: str, n: int = 6) -> Inputs:
    a, b = rng.random((2, n, 2))
    cost = np.sum((a[:, None] - b[None]) ** 2, axis=-1)
    p, q = rng.uniform(0.5, 1.5, (2, n))
    return {"x": cost, "p": p / p.sum(), "q": q / q.sum(), "c": rng.standard_normal((n, n)), "eps": 0.05}


def truth_transport(i: Inputs) -> np.ndarray:
    """Newton's method for both potentials, the last of which is zero, from a solution of the iteration of Sinkhorn."""
    # Marginals that were rounded do not have the same sum, and no plan has both: all libraries get the first exactly.
    p, q, eps = i["p"], i["q"] * (i["p"].sum() / i["q"].sum()), np.longdouble(i["eps"])
    n = len(p)
    f, g = np.zeros_like(p), np.zeros_like(q)
    kernel = i["x"] / eps
    for _ in range(500):
        f = np.log(p) - np.log(np.sum(np.exp(g[None] - kernel), axis=1))
        g = np.log(q) - np.log(np.sum(np.exp(f[:, None] - kernel), axis=0))

    def plan(z: np.ndarray, cost: np.ndarray) -> np.ndarray:
        return np.exp(z[:n, None] + np.concatenate([z[n:], 0 * z[:1]])[None] - cost / eps)

    def improved(z: np.ndarray, cost: np.ndarray) -> np.ndarray:
        pi = plan(z, cost)
        residual = np.concatenate([pi.sum(1) - p, (pi.sum(0) - q)[:-1]])
        top = np.concatenate([np.diag(pi.sum(1)), pi[:, :-1]], axis=1)
        bottom = np.concatenate([pi[:, :-1].T, np.diag(pi.sum(0)[:-1])], axis=1)
        return z - solve(np.concatenate([top, bottom]), residual)

    potentials = np.concatenate([f + g[-1], (g - g[-1])[:-1]])
    for _ in range(4):
        potentials = improved(potentials, i["x"])
    # From a solution, one step of Newton's method is exact to first order in the complex step of the cost.
    return gradient(lambda cost: np.sum(i["c"] * plan(improved(potentials, cost), cost)), i["x"])


TRANSPORT = problem(
    name="sinkhorn",
    title="Entropic optimal transport",
    text="⟨C, P⟩, P the plan between two sets of six random points in a square with ε = 0.05; the gradient of the "
    "cost. Iterations stop at errors of the marginals of 1e-10 in float64 and 1e-6 in float32; loops without a "
    "rule take 200 steps.",
    draw=draw_transport,
    truth=truth_transport,
    large=lambda rng: draw_transport(rng, "float64", 64),
    large_text="64 points",
    hard=lambda: {**draw_transport(np.random.default_rng(1), "float64"), "p": np.asarray([1.0, 0, 0, 0, 0, 1.0])},
    hard_text="the masses of the two sets differ, so that there is no plan",
)


@cell("torch", TRANSPORT)
def _torch_transport():
    import torch

    def loss(x, p, q, c, eps):
        kernel = -x / eps
        g = torch.zeros_like(q)
        for _ in range(200):
            f = p.log() - torch.logsumexp(kernel + g[None], 1)
            g = q.log() - torch.logsumexp(kernel + f[:, None], 0)
        return (c * torch.exp(f[:, None] + g[None] + kernel)).sum()

    return loss


@cell("POT", TRANSPORT)
def _pot():
    import ot
    import torch

    def loss(x, p, q, c, eps):
        goal = 1e-10 if x.dtype == torch.float64 else 1e-6
        plan = ot.sinkhorn(p, q, x, eps, method="sinkhorn_log", numItermax=10_000, stopThr=goal)
        return (c * plan).sum()

    return loss


def transported(sinkhorn: Any) -> Any:
    def loss(x, p, q, c, eps):
        plan, info = sinkhorn(x, p, q, eps)
        return (c * plan).sum()

    return loss


@cell("ddnref-torch", TRANSPORT)
def _ddnref_torch_transport():
    from ddnref.interop.torch import differentiable

    return transported(differentiable(ddnref.nodes.sinkhorn))


@cell("jax", TRANSPORT)
def _jax_transport():
    import jax
    import jax.numpy as jnp
    from jax.scipy.special import logsumexp

    def loss(x, p, q, c, eps):
        kernel = -x / eps

        def step(g, _):
            f = jnp.log(p) - logsumexp(kernel + g[None], axis=1)
            return jnp.log(q) - logsumexp(kernel + f[:, None], axis=0), f

        g, f = jax.lax.scan(step, jnp.zeros_like(q), length=200)
        return (c * jnp.exp(f[-1][:, None] + g[None] + kernel)).sum()

    return loss


@cell("ott", TRANSPORT)
def _ott():
    import jax.numpy as jnp
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    def loss(x, p, q, c, eps):
        goal = 1e-10 if x.dtype == jnp.float64 else 1e-6
        solver = sinkhorn.Sinkhorn(threshold=goal, max_iterations=10_000)
        found = solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=x, epsilon=eps), p, q))
        return (c * found.matrix).sum(), found.converged

    return loss


@cell("ddnref-jax", TRANSPORT)
def _ddnref_jax_transport():
    from ddnref.interop.jax import differentiable

    return transported(differentiable(ddnref.nodes.sinkhorn))


# --- quadratic program ----------------------------------------------------------------------------------------------


def draw_program(rng: np.random.Generator, _: str, n: int = 5, m: int = 4) -> Inputs:
    root = rng.standard_normal((n, n))
    return {
        "x": 2 * rng.standard_normal(n),
        "quadratic": root @ root.T / n + 0.5 * np.eye(n),
        "g": rng.standard_normal((m, n)),
        "h": rng.uniform(0.1, 0.5, m),
        "c": rng.standard_normal(n),
    }


def truth_program(i: Inputs) -> np.ndarray:
    """Solve for every set of active constraints, and keep the one whose solution and multipliers are admissible."""
    n, m = len(i["x"]), len(i["h"])

    def point(x: np.ndarray, active: tuple[int, ...]) -> np.ndarray:
        g, h = i["g"][list(active)], i["h"][list(active)]
        corner = np.zeros((len(active), len(active)), dtype=g.dtype)
        system = np.concatenate([np.concatenate([i["quadratic"], g.T], 1), np.concatenate([g, corner], 1)])
        return solve(system + 0 * x[0], np.concatenate([x, h]))

    for count in range(m + 1):
        for active in combinations(range(m), count):
            z = point(i["x"], active)
            if np.all(z[n:] >= 0) and np.all(i["g"] @ z[:n] <= i["h"] + 1e-12):
                return gradient(lambda x, active=active: np.sum(i["c"] * point(x, active)[:n] ** 2), i["x"])
    raise RuntimeError("No set of active constraints is admissible.")


PROGRAM = problem(
    name="qp",
    title="Layer of a quadratic program",
    text="Σ cᵢ yᵢ², y the solution of min ½ yᵀQ y − xᵀy under G y ≤ h, with 5 unknowns and 4 constraints; the gradient "
    "of x. ddnref differentiates the solution of any solver, here of the dual problem by SciPy's nnls in PyTorch, "
    "and of qpax in JAX. By design qpax gives the gradient of a relaxed problem, which ``target_kappa`` brings "
    "closer to the exact one: 1e-8 here in float64 and 1e-4 in float32.",
    draw=draw_program,
    truth=truth_program,
    large=lambda rng: draw_program(rng, "float64", 40, 20),
    large_text="40 unknowns, 20 constraints",
    hard=lambda: {
        **draw_program(np.random.default_rng(1), "float64"),
        "g": np.concatenate([np.eye(2, 5), -np.eye(2, 5)]),
        "h": -np.ones(4),
    },
    hard_text="the constraints contradict each other",
)


@cell("cvxpylayers", PROGRAM)
def _cvxpylayers():
    import cvxpy as cp
    import torch
    from cvxpylayers.torch import CvxpyLayer

    layers = {}

    def layer(m, n):
        y, x, root, g, h = cp.Variable(n), cp.Parameter(n), cp.Parameter((n, n)), cp.Parameter((m, n)), cp.Parameter(m)
        objective = cp.Minimize(cp.sum_squares(root @ y) / 2 - x @ y)
        return CvxpyLayer(cp.Problem(objective, [g @ y <= h]), parameters=[x, root, g, h], variables=[y])

    def loss(x, quadratic, g, h, c):
        if g.shape not in layers:
            layers[g.shape] = layer(*g.shape)
        (y,) = layers[g.shape](
            x, torch.linalg.cholesky(quadratic).T, g, h, solver_args={"eps": 1e-10}
        )  # fmt: skip
        return (c * y**2).sum()

    return loss


def objective(y, x, quadratic, g, h):
    return (y * (quadratic @ y)).sum() / 2 - (x * y).sum()


def excess(y, x, quadratic, g, h):
    return g @ y - h


@cell("ddnref-torch", PROGRAM)
def _ddnref_torch_program():
    import scipy.optimize
    import torch

    from ddnref.implicit import custom_argmin

    @custom_argmin(objective, inequality=excess)
    def program(x, quadratic, g, h):  # any solver will do: here the dual problem by SciPy's nnls
        a, q, g, h = (v.double().numpy() for v in (x, quadratic, g, h))
        root = np.linalg.cholesky(g @ np.linalg.solve(q, g.T))
        multipliers, _ = scipy.optimize.nnls(root.T, np.linalg.solve(root, g @ np.linalg.solve(q, a) - h))
        return torch.from_numpy(np.linalg.solve(q, a - g.T @ multipliers)).to(x.dtype)

    def loss(x, quadratic, g, h, c):
        return (c * program(x, quadratic, g, h) ** 2).sum()

    return loss


@cell("qpax", PROGRAM)
def _qpax():
    import jax.numpy as jnp
    import qpax

    def loss(x, quadratic, g, h, c):
        none = jnp.zeros((0, len(x)), x.dtype), jnp.zeros(0, x.dtype)
        tol, kappa = (1e-10, 1e-8) if x.dtype == jnp.float64 else (1e-5, 1e-4)
        y = qpax.solve_qp_primal(quadratic, -x, *none, g, h, solver_tol=tol, target_kappa=kappa)
        return (c * y**2).sum()

    return loss


@cell("jaxopt", PROGRAM)
def _jaxopt():
    import jax.numpy as jnp
    from jaxopt import OSQP

    def loss(x, quadratic, g, h, c):
        solver = OSQP(tol=1e-10 if x.dtype == jnp.float64 else 1e-5, maxiter=20_000)
        found, state = solver.run(params_obj=(quadratic, -x), params_ineq=(g, h))
        return (c * found.primal**2).sum(), state.status == 1

    return loss


@cell("ddnref-jax", PROGRAM)
def _ddnref_jax_program():
    import jax.numpy as jnp
    import qpax

    from ddnref.implicit import custom_argmin

    @custom_argmin(objective, inequality=excess)
    def program(x, quadratic, g, h):
        none = jnp.zeros((0, len(x)), x.dtype), jnp.zeros(0, x.dtype)
        return qpax.solve_qp(quadratic, -x, *none, g, h, solver_tol=1e-10 if x.dtype == jnp.float64 else 1e-5)[0]

    def loss(x, quadratic, g, h, c):
        return (c * program(x, quadratic, g, h) ** 2).sum()

    return loss
