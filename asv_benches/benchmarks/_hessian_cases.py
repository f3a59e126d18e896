"""Networks, data and rungs of the ladder for what is measured of the Hessian."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import blas, lapack

import ddnref
from ddnref import reference

from ._common import Call, Ratio, burst, seconds


class Problem(NamedTuple):
    """A chain of tanh layers without bias, its data, and a right-hand side."""

    chain: ddnref.networks.Chain
    x: np.ndarray
    t: np.ndarray
    b: list[np.ndarray]


def problem(n_layers: int, a: int, n: int, gain: float = 1.0, classes: int = 10, seed: int = 0) -> Problem:
    rng = np.random.default_rng(seed)
    widths = [a] * n_layers + [classes]
    layers = [
        ddnref.networks.Dense(
            gain * rng.standard_normal((o, i)) / i**0.5, None, "tanh" if k < n_layers - 1 else "identity"
        )
        for k, (i, o) in enumerate(pairwise(widths))
    ]
    chain = ddnref.networks.Chain(layers, "cross_entropy")
    x, t = rng.standard_normal((n, a)), rng.integers(0, classes, n)
    return Problem(chain, x, t, [rng.standard_normal(p.shape) for p in chain.params])


def ours(p: Problem, damping: float = 1e-3, method: str = "auto") -> Call:
    """Derivatives, factorisation and one refined solve."""
    return lambda: ddnref.curvature.hessian_solve(p.chain, p.x, p.t, p.b, damping=damping, method=method, throw=False)


def wide(activation: str) -> Problem:
    """768-24×7-10 with 64 samples, more than units: 22,128 weights."""
    rng = np.random.default_rng(0)
    chain = ddnref.networks.Chain.mlp(768, 24, 10, 8, activation=activation, bias=False)
    x, t = rng.standard_normal((64, 768)), rng.integers(0, 10, 64)
    return Problem(chain, x, t, [rng.standard_normal(p.shape) for p in chain.params])


def factored(p: Problem, damping: float, method: str, precision: str = "double") -> Call:
    """Derivatives and factorisation."""
    return lambda: ddnref.curvature.hessian_factor(
        p.chain, p.x, p.t, damping=damping, method=method, precision=precision
    )


def textbook(p: Problem, damping: float = 1e-3) -> Call:
    """The same by explicit matrices: not refined, for nothing there says that it should be."""
    flat = [b.reshape(-1) for b in p.b]

    def run() -> list[np.ndarray]:
        return reference.tall_skinny_solve(reference.tall_skinny_derivatives(p.chain, p.x, p.t), flat, damping)

    return run


def second(p: Problem, damping: float = 1e-3) -> Call:
    """A solve with what is factored already."""
    factor = ddnref.curvature.hessian_factor(p.chain, p.x, p.t, damping=damping)
    factor.solve(p.b, throw=False)
    return lambda: factor.solve(p.b, throw=False)


def bare(n_layers: int, block: int) -> Call:
    """LU, solve and product of each block, which is what no implementation with LAPACK can do without.

    All by SciPy's BLAS: NumPy's product beside its LU made two pools of threads wait for each other.
    """
    rng = np.random.default_rng(0)
    d, e = (np.asfortranarray(rng.standard_normal((block, block))) for _ in range(2))

    def run() -> None:
        for _ in range(n_layers):
            factors, swaps, _ = lapack.dgetrf(d)
            blas.dgemm(1.0, e, lapack.dgetrs(factors, swaps, e)[0], trans_a=1)

    return run


def fastest(call: Call, repeat: int = 3) -> float:
    """Seconds of the fastest of a few calls."""
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def quotient(a: Call, b: Call) -> Ratio:
    """time(a) / time(b) for calls too slow to interleave in bursts."""
    ratios = [burst(a, min(0.02, seconds())) / burst(b, min(0.02, seconds())) for _ in range(3)]
    return Ratio(float(np.median(ratios)), min(ratios), max(ratios))


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of a straight line through logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def peak(call: Callable[[], Any]) -> float:
    """Bytes allocated at the peak of a call, NumPy's included."""
    tracemalloc.start()
    call()
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return float(found)
