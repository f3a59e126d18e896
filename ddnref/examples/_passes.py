"""Provide the forward and backward passes that `_measure` times in fresh processes, and the matrices they run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref import reference
from ddnref.examples._measure import THREADS, Call, Size

Matrix: TypeAlias = NDArray[Any]

# --- all eigenvectors: the ladder ---------------------------------------------------------------------------------


def problem(size: Size, seed: int = 0) -> tuple[Matrix, Matrix, Matrix, Matrix]:
    """Draw symmetric float32 matrices x and a cotangent of their eigenvectors; return ``x, w, v, v_bar``."""
    b, m = size
    x, v_bar = np.random.default_rng(seed).standard_normal((2, b, m, m)).astype(np.float32)
    x = (x + np.swapaxes(x, -1, -2)) / 2
    return x, *ddnref.eigh(x), v_bar


def numpy_ladder(size: Size) -> dict[str, Call]:
    """Return the four rungs and the forward pass in NumPy."""
    x, w, v, v_bar = problem(size)
    return {
        "NumPy forward": partial(ddnref.eigh, x),
        "v1": partial(reference.eigh_vjp_v1, v_bar, x, w, v),
        "v2": partial(reference.eigh_vjp_v2, v_bar, w, v),
        "v3": partial(reference.eigh_vjp_v3, v_bar, w, v),
        "final": partial(ddnref.eigh_vjp, None, v_bar, w, v),
    }


def torch_ladder(size: Size) -> dict[str, Call]:
    """Return PyTorch's ``eigh`` and its autograd."""
    x, _, _, v_bar = problem(size)
    return _torch("PyTorch", x, v_bar)


def _torch(name: str, x: Matrix, v_bar: Matrix) -> dict[str, Call]:
    import torch

    torch.set_num_threads(THREADS)
    leaf = torch.tensor(x, requires_grad=True)
    v = torch.linalg.eigh(leaf)[1][..., -v_bar.shape[-1] :]
    backward = partial(torch.autograd.grad, v, leaf, torch.tensor(v_bar), retain_graph=True)
    return {f"{name} forward": partial(torch.linalg.eigh, leaf), name: backward}


def jax_ladder(size: Size) -> dict[str, Call]:
    """Return JAX's ``eigh`` and its autograd, compiled."""
    import jax

    x, _, _, v_bar = map(jax.numpy.asarray, problem(size))
    forward = jax.jit(lambda x: jax.numpy.linalg.eigh(x)[1])
    pull_back = jax.vjp(forward, x)[1]  # holds what the forward pass saved
    backward = jax.jit(lambda pull_back, v_bar: pull_back(v_bar))
    return {
        "JAX forward": lambda: jax.block_until_ready(forward(x)),
        "JAX": lambda: jax.block_until_ready(backward(pull_back, v_bar)),
    }


LADDER = {"NumPy": f"{__name__}:numpy_ladder", "PyTorch": f"{__name__}:torch_ladder", "JAX": f"{__name__}:jax_ladder"}

# --- the tutorial's random matrices -------------------------------------------------------------------------------

EDGE = 16  # pixels of a patch


def _photographs(rng: np.random.Generator, b: int, m: int) -> Matrix:
    """Return Gram matrices of m random patches each, from the two photographs that ship with scikit-learn."""
    from sklearn.datasets import load_sample_images  # not at the top: most processes that measure do without it

    pixels = np.stack(load_sample_images().images) / 255  # (2, height, width, 3)
    patches = np.lib.stride_tricks.sliding_window_view(pixels, (EDGE, EDGE), axis=(1, 2))
    which, row, column = (rng.integers(size, size=(b, m)) for size in patches.shape[:3])
    features = patches[which, row, column].reshape(b, m, -1)
    return np.asarray(features @ np.swapaxes(features, -1, -2) / (2 * features.shape[-1]))


DISTRIBUTIONS: dict[str, Callable[[np.random.Generator, int, int], Matrix]] = {
    "gaussian": lambda rng, b, m: rng.standard_normal((b, m, m)),
    "uniform": lambda rng, b, m: rng.random((b, m, m)),
    "von Mises": lambda rng, b, m: rng.vonmises(0.0, 1.0, (b, m, m)),
    "integers 0–10": lambda rng, b, m: rng.integers(0, 11, (b, m, m)),
    "photographs": _photographs,
}
COTANGENTS = ("ones", "random")


def matrices(distribution: str, b: int, m: int, seed: int) -> Matrix:
    """Draw b matrices, m×m, in float32: the same numbers for every precision that computes with them."""
    x = np.abs(DISTRIBUTIONS[distribution](np.random.default_rng([seed, m]), b, m))
    # A symmetric matrix with positive entries has a positive, simple dominant eigenvalue, which power iteration finds
    # in a few steps.
    return (x + np.swapaxes(x, -1, -2)).astype(np.float32)


def cotangent(kind: str, shape: tuple[int, ...], seed: int) -> Matrix:
    """Return ones, which are the derivative of a sum, or random numbers."""
    if kind == "ones":
        return np.ones(shape)
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# --- n of m eigenvectors, by the names of the tutorial ------------------------------------------------------------

ITERATIONS = ("PI", "SI")  # the first for a single eigenvector only
STEPS = 100  # of an iteration, as in the tutorial; ddnref's own passes stop when they have converged
GIB = 2**30
MEMORY = 2 * GIB  # a pass that is expected to take more is skipped


def forward(name: str, x: Matrix, n: int, *, stop: bool = True) -> tuple[Matrix, Matrix]:
    """Return the n eigenpairs of largest magnitude by "eigh", "PI" (n = 1) or "SI"; all `STEPS` unless `stop`."""
    options: dict[str, Any] = {"symmetric": True, "maxiter": STEPS, "throw": False, "rtol": None if stop else 0.0}
    if name == "PI":
        (w, v), _ = ddnref.power_iteration(x, **options)
        return w[..., None], v[..., None]
    if name == "SI":
        return ddnref.simultaneous_iteration(x, n, **options)[0]
    w, v = ddnref.eigh(x)
    order = np.argsort(-np.abs(w), axis=-1)[..., :n]
    v = np.take_along_axis(v, order[..., None, :], axis=-1)
    return np.take_along_axis(w, order, axis=-1), np.asarray(ddnref.align_signs(v))


def unrolled(name: str, v_bar: Matrix, x: Matrix, w: Matrix, v: Matrix, *, symmetric: bool = True) -> Matrix:
    """Reverse all steps of "PI" or "SI"; without `symmetric` (n = 1) the gradient is not symmetrised."""
    options: dict[str, Any] = {"method": "unrolled", "n_iter": STEPS, "symmetric": symmetric}
    if name == "PI":
        return np.asarray(ddnref.power_iteration_vjp(None, v_bar[..., 0], w[..., 0], v[..., 0], x, **options))
    return np.asarray(ddnref.simultaneous_iteration_vjp(None, v_bar, w, v, x, **options))


def _implicit(method: str, v_bar: Matrix, x: Matrix, w: Matrix, v: Matrix) -> Matrix:
    return np.asarray(ddnref.simultaneous_iteration_vjp(None, v_bar, w, v, x, method=method, symmetric=True))


BACKWARD: dict[str, Callable[..., Matrix]] = {  # ``run(v_bar, x, w, v)``
    "DDN-J": partial(reference.ddn_vjp_jacobian, mode="solve"),
    "DDN-E": partial(reference.ddn_vjp_schur, mode="solve"),
    "DDN-E, pinv": partial(reference.ddn_vjp_schur, mode="pinv"),
    "IFT-J": reference.ift_vjp_jacobian,
    "IFT-E, B stored": partial(reference.ift_vjp_structured, store_b=True),
    "IFT-E": reference.ift_vjp_structured,
    "fixed_point": partial(_implicit, "fixed_point"),
    "bordered": partial(_implicit, "bordered"),
}
# Bytes for each of the m×m² numbers of a Jacobian, in the passes that store one: measured, rounded up.
JACOBIANS = {"DDN-J": 24, "IFT-J": 8, "IFT-E, B stored": 8}


def full_name(backward: str, n: int) -> str:
    """Return "PI-DDN-E" and the like, as in the tutorial; ddnref's methods keep their names."""
    return backward if backward in ("fixed_point", "bordered") else f"{'PI' if n == 1 else 'SI'}-{backward}"


def names(n: int) -> list[str]:
    """List all passes whose cost is measured, forward passes first."""
    forward, unroll = ([f"{name}{end}" for name in ITERATIONS[n > 1 :]] for end in (" forward", "-Unroll"))
    return ["AT forward", *forward, "AT", *unroll, *(full_name(name, n) for name in BACKWARD)]


def expected_bytes(name: str, size: Size) -> float:
    """Estimate the memory of a pass that stores a Jacobian; 0 for the others."""
    b, m, n = size
    pairs = n if name.endswith("DDN-J") else 1  # the others take one pair at a time
    return float(b * m**3 * pairs * JACOBIANS.get(name[3:], 0))


def numpy_passes(size: Size) -> dict[str, Call]:
    """Return every pass in NumPy, float32, on Gaussian matrices, except those that need more than `MEMORY`."""
    b, m, n = size
    x = matrices("gaussian", b, m, seed=0)
    w, v = forward("eigh", x, n)
    v_bar = cotangent("random", v.shape, seed=0).astype(x.dtype)
    calls: dict[str, Call] = {full_name(short, n): partial(run, v_bar, x, w, v) for short, run in BACKWARD.items()}
    for name in ITERATIONS[n > 1 :]:
        calls[f"{name} forward"] = partial(forward, name, x, n)
        calls[f"{name}-Unroll"] = partial(unrolled, name, v_bar, x, w, v)
    return {name: call for name, call in calls.items() if expected_bytes(name, size) <= MEMORY}


def torch_passes(size: Size) -> dict[str, Call]:
    """Return PyTorch's ``eigh`` and its autograd, called AT in the tutorial."""
    b, m, n = size
    v_bar = cotangent("random", (b, m, n), seed=0).astype(np.float32)
    return _torch("AT", matrices("gaussian", b, m, seed=0), v_bar)


PASSES = {"NumPy": f"{__name__}:numpy_passes", "PyTorch": f"{__name__}:torch_passes"}
