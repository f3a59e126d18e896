"""A deep narrow network that learns ten digits, its Hessian counted, timed and solved with."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref.report import digits
from ddnref.report.content import Context
from ddnref.verify._backends import Backend

LAYERS, WIDTH, GAIN = 20, 8, 1.2
KEPT = (0, 60, 600)  # steps after which the spectrum is counted
RATE, DECAYS, OFFSET = 1e-3, (0.9, 0.999), 1e-8  # of Adam
SIZES = (0.1, 1.0, 10.0)  # edges of the bins, on both sides of zero
EDGES = (-math.inf, *(-size for size in reversed(SIZES)), *SIZES, math.inf)

DEPTHS, DEPTH_WIDTH, DAMPING = (25, 50, 100, 200), 16, 1e-3
DAMPINGS = (1e-8, 1e-6, 1e-4, 1e-2)
HARD_LAYERS, HARD_WIDTH, HARD_SAMPLES, HARD_GAIN = 10, 8, 4, 1.4
PATHS = ("tridiagonal", "riccati", "qr")  # those that work layer by layer


class Problem(NamedTuple):
    """A network with its data, in one array library."""

    chain: ddnref.networks.Chain
    x: Any
    t: Any


class Snapshot(NamedTuple):
    """The network after some steps of training."""

    steps: int
    loss: float
    counts: tuple[int, ...]
    uncertain: int
    problem: Problem


def size(backend: Backend) -> tuple[int, int]:
    """Layers and width of the network that learns: few where every operation is checked, which is slow."""
    return (min(LAYERS, 3), min(WIDTH, 3)) if backend.name == "array-api-strict" else (LAYERS, WIDTH)


def one_of_each(seed: int, layers: int, width: int) -> Problem:
    """The network before training and one image of each digit, on the host."""
    train, _ = digits.split(seed)
    places = digits.one_of_each(train)
    x = train.images[places]
    chain = ddnref.networks.Chain.mlp(digits.PIXELS, width, digits.CLASSES, layers, gain=GAIN, seed=seed)
    return Problem(chain, x - np.mean(x, axis=0), train.labels[places])


def on(backend: Backend, problem: Problem) -> Problem:
    """The same in the backend's arrays."""
    arrays = [backend.convert(p) for p in problem.chain.params]
    moved = ddnref.networks.Chain.from_arrays(arrays, activation="tanh", loss="cross_entropy")
    return Problem(moved, backend.convert(problem.x), backend.convert(problem.t))


def learn(context: Context, problem: Problem) -> list[tuple[int, Problem]]:
    """Adam on the host; the network after the steps that are kept."""
    chain, found = problem.chain, []
    m = v = [0 * p for p in chain.params]
    for k in context.track(range(max(KEPT) + 1), "Training a deep network"):
        if k in KEPT:
            found.append((k, problem._replace(chain=chain)))
        g = chain.gradient(problem.x, problem.t)
        m, v = (
            [decay * a + (1 - decay) * b**power for a, b in zip(average, g, strict=True)]
            for decay, power, average in zip(DECAYS, (1, 2), (m, v), strict=True)
        )
        first, second = (1 - decay ** (k + 1) for decay in DECAYS)
        chain = chain.with_params(
            [
                p - RATE * (a / first) / (np.sqrt(b / second) + OFFSET)
                for p, a, b in zip(chain.params, m, v, strict=True)
            ]
        )
    return found


def count(backend: Backend, steps: int, problem: Problem) -> Snapshot:
    """The spectrum by inertia, in the backend's arrays."""
    moved = on(backend, problem)
    counts, info = ddnref.curvature.hessian_eigval_count(*moved, EDGES, method="riccati", throw=False)
    return Snapshot(steps, float(problem.chain.loss(problem.x, problem.t)), counts, sum(info.uncertain), problem)


def count_densely(problem: Problem) -> tuple[int, ...]:
    """The same from the eigenvalues of the dense matrix, by LAPACK on the host."""
    params = problem.chain.params
    total = sum(p.size for p in params)
    ends = np.cumsum([p.size for p in params])[:-1]
    rows = np.split(np.eye(total), ends, axis=1)
    vectors = [row.reshape(total, *p.shape) for row, p in zip(rows, params, strict=True)]
    product = problem.chain.hvp(problem.x, problem.t, vectors)
    h = np.concatenate([p.reshape(total, -1) for p in product], axis=1)
    return tuple(map(int, np.histogram(np.linalg.eigvalsh((h + h.T) / 2), EDGES)[0]))


# --- time and accuracy --------------------------------------------------------------------------------------------


def random(layers: int, width: int, samples: int, gain: float, seed: int) -> Problem:
    """Without biases, random inputs and classes."""
    rng = np.random.default_rng(seed)
    chain = ddnref.networks.Chain.mlp(width, width, width, layers, bias=False, gain=gain, seed=seed)
    return Problem(chain, rng.standard_normal((samples, width)), np.arange(samples) % width)


def timed(backend: Backend) -> bool:
    """Whether times mean something: not where every operation is checked or compiled on its own."""
    return backend.name != "array-api-strict" and not backend.compiles


def seconds(backend: Backend, layers: int, seed: int) -> float:
    """Of factoring and a refined solve, with the gradient; the best of three."""
    problem = on(backend, random(layers, DEPTH_WIDTH, 1, 1.0, seed))
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        g = problem.chain.gradient(problem.x, problem.t)
        factor = ddnref.curvature.hessian_factor(*problem, damping=DAMPING, method="tridiagonal")
        float(factor.solve(g)[1].backward_error)  # waits for the device
        times.append(time.perf_counter() - begun)
    return min(times)


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The exponent of a power law, by least squares of the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def backward_errors(backend: Backend, seed: int) -> dict[str, NDArray[Any]]:
    """For each path ``(2, dampings)``: as the factorisation solves, and refined."""
    problem = random(HARD_LAYERS, HARD_WIDTH, HARD_SAMPLES, HARD_GAIN, seed)
    rng = np.random.default_rng(seed)
    b = [backend.convert(rng.standard_normal(p.shape)) for p in problem.chain.params]
    moved, found = on(backend, problem), {}
    for path in PATHS:
        factors = [ddnref.curvature.hessian_factor(*moved, damping=damping, method=path) for damping in DAMPINGS]
        found[path] = np.asarray([
            [float(factor.solve(b, refine=refine, throw=False)[1].backward_error) for factor in factors]
            for refine in (0, "auto")
        ])  # fmt: skip
    return found
