"""One step of a trust region for a network: time, error, and SciPy's trust-krylov on the same model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.optimize import minimize

import ddnref
from ddnref.reference import trust_region_dense

from ._common import Call
from ._hessian_cases import Problem, problem, quotient

RADIUS = 0.5
NETWORKS = ((4, 8, 8), (8, 24, 64), (100, 16, 8))  # layers, width, samples


def step(p: Problem, k: int = 30, model: str = "exact", rtol: float | None = None) -> Call:
    """Products from one pass through the network, and the minimum on the space."""
    g = p.chain.flatten(p.chain.gradient(p.x, p.t))
    h = p.chain.hessian_operator(p.x, p.t)
    return lambda: ddnref.curvature.trust_region_step(h, g, RADIUS, k=k, model=model, rtol=rtol)


def residual(p: Problem, v: np.ndarray) -> float:
    """Residual of a step on the boundary, relative to the gradient."""
    g = p.chain.flatten(p.chain.gradient(p.x, p.t))
    right = p.chain.hessian_operator(p.x, p.t)(v) + g
    return float(np.linalg.norm(right - (v @ right) / (v @ v) * v) / np.linalg.norm(g))


def krylov_of_scipy(p: Problem) -> Callable[[], Any]:
    """One iteration of SciPy's minimiser on the quadratic model itself: one subproblem, to its stricter tolerance."""
    g = p.chain.flatten(p.chain.gradient(p.x, p.t))
    h = p.chain.hessian_operator(p.x, p.t).prepared()
    options = {"maxiter": 1, "initial_trust_radius": RADIUS, "max_trust_radius": 2 * RADIUS, "inexact": False}

    def run() -> object:
        return minimize(
            lambda v: float(g @ v + v @ h(v) / 2),
            np.zeros_like(g),
            jac=lambda v: g + h(v),
            hessp=lambda _, v: h(v),
            method="trust-krylov",
            options=options,
        )

    return run


class TrustRegionStep:
    """A step from products, by either model, and the same model for another radius."""

    params = (NETWORKS,)
    param_names = ("network",)
    unit = "relative"

    def setup(self, network: tuple[int, int, int]) -> None:
        self.problem = problem(*network)
        self.exact, self.absolute = step(self.problem), step(self.problem, model="absolute")
        self.info = self.exact()[1]

    def time_exact(self, *_: object) -> None:
        self.exact()

    def time_absolute(self, *_: object) -> None:
        self.absolute()

    def time_retry(self, *_: object) -> None:
        self.info.retry(RADIUS / 4)

    def track_residual(self, *_: object) -> float:
        return float(self.info.residual_norm)

    def track_products(self, *_: object) -> int:
        return int(self.info.n_products)


class TrustRegionPeers:
    """Ratios inside one process, at which a change of the machine cancels."""

    params = (NETWORKS,)
    param_names = ("network",)
    unit = "ratio"

    def track_scipy_over_ours(self, network: tuple[int, int, int]) -> float:
        """Both to the residual that SciPy's step has."""
        p = problem(*network)
        theirs = krylov_of_scipy(p)
        return quotient(theirs, step(p, rtol=residual(p, theirs().x))).median


class TrustRegionError:
    """Distance from the dense answer, of a space of 30 dimensions and of all."""

    unit = "relative error"
    params = ((30, 1000),)
    param_names = ("k",)

    def track_error(self, k: int) -> float:
        p = problem(4, 8, 8)
        size = sum(w.size for w in p.chain.params)
        h = p.chain.hessian_operator(p.x, p.t)
        dense = h(np.eye(size))
        exact, _, _ = trust_region_dense((dense + dense.T) / 2, p.chain.flatten(p.chain.gradient(p.x, p.t)), RADIUS)
        return float(np.linalg.norm(step(p, k)()[0] - exact) / np.linalg.norm(exact))
