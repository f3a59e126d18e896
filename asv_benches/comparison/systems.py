"""Linear systems: dense ones of high condition, least squares, and deblurring with an operator that is not stored."""

from __future__ import annotations

from typing import Any

import numpy as np

import ddnref

from ._oracles import gradient, identity, solve
from ._problem import Inputs, cell, problem

CONDITION = {"float64": 1e8, "float32": 1e3}
FLATNESS = {"float64": 1e4, "float32": 10.0}


def with_singular_values(rng: np.random.Generator, m: int, n: int, condition: float) -> np.ndarray:
    """Draw a matrix whose singular values are log-uniform from 1 down to one over its condition."""
    u, v = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (m, n))
    return (u * np.geomspace(1, 1 / condition, n)) @ v.T


def draw_solve(rng: np.random.Generator, dtype: str, n: int = 8) -> Inputs:
    x = with_singular_values(rng, n, n, CONDITION[dtype])
    return {"x": x, "b": rng.standard_normal(n), "c": rng.standard_normal(n)}


SOLVE = problem(
    name="solve",
    title="Linear solve",
    text="cᵀ A⁻¹ b, A an 8×8 matrix of condition 1e8 in float64 and 1e3 in float32; the gradient of A.",
    draw=draw_solve,
    truth=lambda i: gradient(lambda a: i["c"] @ solve(a, i["b"] + 0 * a[0]), i["x"]),
    large=lambda rng: {
        "x": rng.standard_normal((256, 256)), "b": rng.standard_normal(256), "c": rng.standard_normal(256)
    },
    large_text="256×256",
    hard=lambda: {"x": np.ones((8, 8)), "b": np.arange(8.0), "c": np.ones(8)},
    hard_text="all entries of A are 1, so that A is singular",
)  # fmt: skip


def draw_lstsq(rng: np.random.Generator, dtype: str) -> Inputs:
    x = with_singular_values(rng, 10, 4, FLATNESS[dtype])
    return {"x": x, "b": rng.standard_normal(10), "c": rng.standard_normal(4)}


def truth_lstsq(i: Inputs) -> np.ndarray:
    """Solve [[1, A], [Aᵀ, 0]] (r, y) = (b, 0)."""

    def loss(a: np.ndarray) -> np.ndarray:
        m, n = a.shape
        corner = np.zeros((n, n), dtype=a.dtype)
        system = np.concatenate([np.concatenate([identity(m, a), a], 1), np.concatenate([a.T, corner], 1)])
        return i["c"] @ solve(system, np.concatenate([i["b"] + 0 * a[:, 0], corner[0]]))[m:]

    return gradient(loss, i["x"])


LSTSQ = problem(
    name="least-squares",
    title="Least squares",
    text="cᵀ y, y the solution of min ‖A y − b‖, A a 10×4 matrix of condition 1e4 in float64 and 10 in float32; the "
    "gradient of A.",
    draw=draw_lstsq,
    truth=truth_lstsq,
    large=lambda rng: {
        "x": rng.standard_normal((512, 64)), "b": rng.standard_normal(512), "c": rng.standard_normal(64)
    },
    large_text="512×64",
    hard=lambda: {"x": np.ones((10, 4)), "b": np.arange(10.0), "c": np.arange(4.0)},
    hard_text="all columns of A are equal, and the loss depends on directions in which the rank changes",
)  # fmt: skip


# --- dense systems ------------------------------------------------------------------------------------------------


def dense_solve(solve: Any) -> Any:
    def loss(x, b, c):
        return (c * solve(x, b)).sum()

    return loss


@cell("torch", SOLVE)
def _torch():
    import torch

    return dense_solve(torch.linalg.solve)


@cell("xitorch", SOLVE)
def _xitorch():
    import xitorch
    from xitorch.linalg import solve

    return dense_solve(lambda x, b: solve(xitorch.LinearOperator.m(x), b[:, None])[:, 0])


@cell("ddnref-torch", SOLVE)
def _ddnref_torch():
    from ddnref.interop.torch import differentiable

    return dense_solve(differentiable(ddnref.solve))


@cell("jax", SOLVE)
def _jax():
    import jax.numpy as jnp

    return dense_solve(jnp.linalg.solve)


@cell("lineax", SOLVE)
def _lineax():
    import lineax as lx

    def loss(x, b, c):
        solution = lx.linear_solve(lx.MatrixLinearOperator(x), b, lx.AutoLinearSolver(well_posed=True))
        return (c * solution.value).sum(), solution.result == lx.RESULTS.successful

    return loss


@cell("ddnref-jax", SOLVE)
def _ddnref_jax():
    from ddnref.interop.jax import differentiable

    return dense_solve(differentiable(ddnref.solve))


@cell("autograd", SOLVE)
def _autograd():
    import autograd.numpy as np

    return dense_solve(np.linalg.solve)


@cell("ddnref-autograd", SOLVE)
def _ddnref_autograd():
    from ddnref.interop.autograd import differentiable

    return dense_solve(differentiable(ddnref.solve))


@cell("tensorflow", SOLVE)
def _tensorflow():
    import tensorflow as tf

    def loss(x, b, c):
        return tf.reduce_sum(c * tf.linalg.solve(x, b[:, None])[:, 0])

    return loss


@cell("ddnref-tensorflow", SOLVE)
def _ddnref_tensorflow():
    import tensorflow as tf

    from ddnref.interop.tensorflow import differentiable

    solve = differentiable(ddnref.solve)

    def loss(x, b, c):
        return tf.reduce_sum(c * solve(x, b))

    return loss


# --- least squares ------------------------------------------------------------------------------------------------


@cell("torch", LSTSQ)
def _torch_lstsq():
    import torch

    return dense_solve(lambda x, b: torch.linalg.lstsq(x, b[:, None]).solution[:, 0])


@cell("ddnref-torch", LSTSQ)
def _ddnref_torch_lstsq():
    from ddnref.interop.torch import differentiable

    return dense_solve(differentiable(ddnref.lstsq))


@cell("jax", LSTSQ)
def _jax_lstsq():
    import jax.numpy as jnp

    return dense_solve(lambda x, b: jnp.linalg.lstsq(x, b)[0])


@cell("lineax", LSTSQ)
def _lineax_lstsq():
    import lineax as lx

    def loss(x, b, c):
        solution = lx.linear_solve(lx.MatrixLinearOperator(x), b, lx.QR())
        return (c * solution.value).sum(), solution.result == lx.RESULTS.successful

    return loss


@cell("optimistix", LSTSQ)
def _optimistix_lstsq():
    import jax.numpy as jnp
    import optimistix as optx

    def loss(x, b, c):
        tol = 1e-10 if x.dtype == jnp.float64 else 1e-5
        start = jnp.zeros(x.shape[1], x.dtype)
        found = optx.least_squares(lambda y, a: a[0] @ y - a[1], optx.GaussNewton(tol, tol), start, args=(x, b))
        return (c * found.value).sum(), found.result == optx.RESULTS.successful

    return loss


@cell("ddnref-jax", LSTSQ)
def _ddnref_jax_lstsq():
    from ddnref.interop.jax import differentiable

    return dense_solve(differentiable(ddnref.lstsq))


@cell("autograd", LSTSQ)
def _autograd_lstsq():
    import autograd.numpy as np

    return dense_solve(lambda x, b: np.linalg.solve(x.T @ x, x.T @ b))


@cell("ddnref-autograd", LSTSQ)
def _ddnref_autograd_lstsq():
    from ddnref.interop.autograd import differentiable

    return dense_solve(differentiable(ddnref.lstsq))


@cell("tensorflow", LSTSQ)
def _tensorflow_lstsq():
    import tensorflow as tf

    def loss(x, b, c):
        return tf.reduce_sum(c * tf.linalg.lstsq(x, b[:, None])[:, 0])

    return loss


# --- deblurring ---------------------------------------------------------------------------------------------------

SQUARES = np.add.outer(np.arange(-2.0, 3.0) ** 2, np.arange(-2.0, 3.0) ** 2)  # squared distances from the centre


def draw_deblurring(rng: np.random.Generator, _: str, n: int = 8) -> Inputs:
    return {
        "x": np.asarray([rng.uniform(0.6, 1.5), rng.uniform(0.02, 0.2)]),
        "y": rng.random((n, n)),
        "m": (rng.random((n, n)) < 0.8).astype(np.float64),
        "c": rng.standard_normal((n, n)),
        "r2": SQUARES,
    }


def truth_deblurring(i: Inputs) -> np.ndarray:
    """Solve the system with a stored matrix."""
    n, m = len(i["y"]), i["m"].ravel()
    shifts = {}
    for a in range(-2, 3):
        for b in range(-2, 3):
            unit = np.eye(n * n, dtype=i["x"].dtype).reshape(n * n, n, n)
            shifts[a, b] = np.roll(unit, (a, b), (1, 2)).reshape(n * n, n * n)
    laplacian = 4 * shifts[0, 0] - sum(shifts[s] for s in ((1, 0), (-1, 0), (0, 1), (0, -1)))

    def loss(theta: np.ndarray) -> np.ndarray:
        kernel = np.exp(-i["r2"] / (2 * theta[0] ** 2))
        kernel = kernel / kernel.sum()
        blur = sum(kernel[a + 2, b + 2] * shift for (a, b), shift in shifts.items())
        system = blur.T @ (m[:, None] * blur) + theta[1] * laplacian
        return i["c"].ravel() @ solve(system, blur.T @ (m * i["y"].ravel()))

    return gradient(loss, i["x"])


DEBLURRING = problem(
    name="deblurring",
    title="Deblurring",
    text="⟨c, u⟩, u the restored image: (KᵀMK + ρ DᵀD) u = KᵀM y with a Gaussian blur K of width σ, a mask M of "
    "missing pixels and differences D, by conjugate gradients to a relative residual of 1e-10 in float64 and 1e-5 "
    "in float32. The gradient of σ and ρ, for 8×8 pixels.",
    draw=draw_deblurring,
    truth=truth_deblurring,
    large=lambda rng: draw_deblurring(rng, "float64", 64),
    large_text="64×64 pixels",
    hard=lambda: {**draw_deblurring(np.random.default_rng(1), "float64"), "x": np.asarray([1.0, -0.3])},
    hard_text="ρ is negative and the system indefinite, which conjugate gradients are not made for",
)


@cell("torch", DEBLURRING)
def _torch_deblurring():
    import torch
    from torch.nn.functional import conv2d, pad

    def cg(apply, b, rtol, steps=200):
        u, r = torch.zeros_like(b), b
        p, rr = r, (b * b).sum()
        goal = rtol**2 * rr
        for _ in range(steps):
            ap = apply(p)
            alpha = rr / (p * ap).sum()
            u, r = u + alpha * p, r - alpha * ap
            last, rr = rr, (r * r).sum()
            if rr <= goal:
                break
            p = r + (rr / last) * p
        return u

    def loss(x, y, m, c, r2):
        kernel = torch.exp(-r2 / (2 * x[0] ** 2))
        kernel = kernel / kernel.sum()

        def blur(u):
            return conv2d(pad(u[None, None], (2, 2, 2, 2), mode="circular"), kernel[None, None])[0, 0]

        def apply(u):
            roughness = 4 * u - u.roll(1, 0) - u.roll(-1, 0) - u.roll(1, 1) - u.roll(-1, 1)
            return blur(m * blur(u)) + x[1] * roughness

        return (c * cg(apply, blur(m * y), 1e-10 if x.dtype == torch.float64 else 1e-5)).sum()

    return loss


def restored(differentiable: Any, exp: Any) -> Any:
    """The loss by `ddnref.linear_solve`, which applies conjugate gradients to positive definite operators."""
    from ddnref import operators

    def loss(x, y, m, c, r2):
        rtol = 1e-10 if "64" in str(x.dtype) else 1e-5
        kernel = exp(-r2 / (2 * x[0] ** 2))
        seen = operators.compose(operators.mask(m, y.shape), operators.convolution(kernel / kernel.sum(), y.shape))
        roughness = operators.scaled(operators.normal(operators.difference(y.shape)), x[1])
        system = operators.add(operators.normal(seen), roughness, positive_definite=True)
        u, info = differentiable(ddnref.linear_solve, rtol=rtol)(system, operators.adjoint(seen)(m * y))
        return (c * u).sum()

    return loss


@cell("ddnref-torch", DEBLURRING)
def _ddnref_torch_deblurring():
    import torch

    from ddnref.interop.torch import differentiable

    return restored(differentiable, torch.exp)


@cell("ddnref-jax", DEBLURRING)
def _ddnref_jax_deblurring():
    import jax.numpy as jnp

    from ddnref.interop.jax import differentiable

    return restored(differentiable, jnp.exp)


def matrix_free(solve: Any) -> Any:
    """The loss in JAX for a function that solves with a product, a right-hand side and a tolerance."""
    import jax.numpy as jnp
    from jax.scipy.signal import convolve2d

    def loss(x, y, m, c, r2):
        kernel = jnp.exp(-r2 / (2 * x[0] ** 2))
        kernel = kernel / kernel.sum()

        def blur(u):
            return convolve2d(jnp.pad(u, 2, mode="wrap"), kernel, mode="valid")

        def apply(u):
            roughness = 4 * u - jnp.roll(u, 1, 0) - jnp.roll(u, -1, 0) - jnp.roll(u, 1, 1) - jnp.roll(u, -1, 1)
            return blur(m * blur(u)) + x[1] * roughness

        u, ok = solve(apply, blur(m * y), 1e-10 if x.dtype == jnp.float64 else 1e-5)
        return (c * u).sum(), ok

    return loss


@cell("jax", DEBLURRING)
def _jax_deblurring():
    from jax.scipy.sparse.linalg import cg

    return matrix_free(lambda apply, b, rtol: (cg(apply, b, tol=rtol)[0], True))


@cell("jaxopt", DEBLURRING)
def _jaxopt_deblurring():
    from jaxopt.linear_solve import solve_cg

    return matrix_free(lambda apply, b, rtol: (solve_cg(apply, b, tol=rtol, maxiter=1000), True))


@cell("lineax", DEBLURRING)
def _lineax_deblurring():
    import jax
    import lineax as lx

    def solve(apply, b, rtol):
        structure = jax.ShapeDtypeStruct(b.shape, b.dtype)
        operator = lx.FunctionLinearOperator(apply, structure, lx.positive_semidefinite_tag)
        solution = lx.linear_solve(operator, b, lx.CG(rtol=rtol, atol=0.0))
        return solution.value, solution.result == lx.RESULTS.successful

    return matrix_free(solve)
