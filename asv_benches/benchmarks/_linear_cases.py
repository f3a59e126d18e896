"""Linear systems to time: dense ones against SciPy's LU, a ridge-regularised blur against cg written by hand."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.sparse.linalg

import ddnref

from ._common import Call, load_jax, pin_threads

GRID = (256, 256)
RIDGE = 1e-3
RTOL = 1e-6


def dense(n: int, dtype: str) -> tuple[Any, Any, Any]:
    """A matrix, a right-hand side and a cotangent."""
    pin_threads()
    rng = np.random.default_rng(n)
    return tuple(rng.standard_normal(shape).astype(dtype) for shape in ((n, n), n, n))


def dense_forward(n: int, dtype: str) -> Call:
    a, b, _ = dense(n, dtype)
    return lambda: ddnref.solve(a, b)


def dense_both(n: int, dtype: str) -> Call:
    """Solution and gradient."""
    a, b, x_bar = dense(n, dtype)

    def call() -> Any:
        x, saved = ddnref.solve_fwd(a, b)
        return ddnref.solve_vjp(x_bar, x, *saved)

    return call


def dense_scipy(n: int, dtype: str) -> Call:
    a, b, _ = dense(n, dtype)
    return lambda: scipy.linalg.lu_solve(scipy.linalg.lu_factor(a), b)


def kernel() -> Any:
    """A Gaussian blur of 9×9 pixels."""
    line = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
    k = np.outer(line, line)
    return k / k.sum()


def image() -> Any:
    return np.random.default_rng(0).standard_normal(GRID)


def spectrum() -> Any:
    """``|k̂|² + ρ``: all there is to know of the operator."""
    k = kernel()
    padded = np.zeros(GRID)
    padded[: k.shape[0], : k.shape[1]] = k
    return np.abs(scipy.fft.rfft2(padded)) ** 2 + RIDGE


def blur(convert: Callable[[Any], Any] = np.asarray) -> ddnref.operators.LinearOperator:
    return ddnref.operators.normal(ddnref.operators.convolution(convert(kernel()), GRID), convert(np.asarray(RIDGE)))


def blur_forward() -> Call:
    pin_threads()
    operator, b = blur(), image()
    return lambda: ddnref.linear_solve(operator, b, rtol=RTOL)


def blur_backward() -> Call:
    pin_threads()
    operator, b = blur(), image()
    x, _ = ddnref.linear_solve(operator, b, rtol=RTOL)
    return lambda: ddnref.linear_solve_vjp(b, x, operator, rtol=RTOL)


def blur_scipy() -> Call:
    """SciPy's cg with the product that its user would write: one pair of transforms."""
    pin_threads()
    factor, b = spectrum(), image().ravel()

    def product(x: Any) -> Any:
        return scipy.fft.irfft2(factor * scipy.fft.rfft2(x.reshape(GRID)), s=GRID).ravel()

    operator = scipy.sparse.linalg.LinearOperator((b.size, b.size), matvec=product, dtype=b.dtype)
    return lambda: scipy.sparse.linalg.cg(operator, b, rtol=RTOL, atol=0.0)


def blur_jax_scipy() -> Call:
    """``jax.scipy.sparse.linalg.cg``, compiled, with the same product."""
    jax = load_jax()
    factor, b = jax.numpy.asarray(spectrum()), jax.numpy.asarray(image())

    def product(factor: Any, x: Any) -> Any:
        return jax.numpy.fft.irfft2(factor * jax.numpy.fft.rfft2(x), s=GRID)

    solve = jax.jit(lambda factor, b: jax.scipy.sparse.linalg.cg(partial(product, factor), b, tol=RTOL)[0])
    return lambda: jax.block_until_ready(solve(factor, b))


def blur_jax_ours() -> Call:
    """`linear_solve`, compiled, with JAX's own loop."""
    jax = load_jax()
    k, b = jax.numpy.asarray(kernel()), jax.numpy.asarray(image())

    def solution(k: Any, b: Any) -> Any:
        operator = ddnref.operators.normal(ddnref.operators.convolution(k, GRID), RIDGE)
        return ddnref.linear_solve(operator, b, rtol=RTOL, throw=False, while_loop=jax.lax.while_loop)[0]

    solve = jax.jit(solution)
    return lambda: jax.block_until_ready(solve(k, b))


def blur_steps() -> tuple[int, int]:
    """Iterations forward and backward."""
    operator, b = blur(), image()
    x, info = ddnref.linear_solve(operator, b, rtol=RTOL)
    return int(info.n_iter), int(ddnref.linear_solve_vjp(b, x, operator, rtol=RTOL)[1].n_iter)


def without_symmetry() -> dict[str, Any]:
    """Matrices of 289 to 300 columns on which the default for square operators was chosen."""
    rng, n, m = np.random.default_rng(0), 300, 17

    def line(c: float) -> Any:
        return 2 * np.eye(m) - (1 + c) * np.eye(m, k=-1) - (1 - c) * np.eye(m, k=1)

    def grid(c: float) -> Any:
        return np.kron(line(c), np.eye(m)) + np.kron(np.eye(m), line(c))

    def gauss() -> Any:
        return rng.standard_normal((n, n)) / n**0.5

    u, v = np.linalg.qr(gauss())[0], np.linalg.qr(gauss())[0]
    skewed, z = np.eye(n) + 0.3 * gauss(), gauss()
    return {
        "near the identity": np.eye(n) + 0.5 * gauss(),
        "a disc of eigenvalues": 2 * np.eye(n) + gauss(),
        "diffusion": grid(0.1),
        "convection": grid(0.9),
        "two rotations": (u * np.linspace(1, 100, n)) @ v,
        "not normal": np.linalg.solve(skewed, np.geomspace(1, 1e3, n)[:, None] * skewed),
        "skew and identity": z - z.T + np.eye(n),
    }


def products(name: str, solver: Callable[..., Any]) -> float:
    """Products to a residual of 1e-8; NaN where it is not reached."""
    calls = [0]
    operator = ddnref.operators.dense(without_symmetry()[name])
    product = operator.apply

    def counted(params: Any, x: Any) -> Any:
        calls[0] += 1
        return product(params, x)

    b = np.random.default_rng(1).standard_normal(operator.range_shape)
    _, info = solver(operator._replace(apply=counted), b, rtol=1e-8, maxiter=3000, throw=False)
    return float(calls[0]) if info.converged else float("nan")
