"""Systems for the Krylov solvers: a user's own products on a grid, a dense matrix, and the peers that solve them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np

import ddnref
from ddnref.operators import LinearOperator
from ddnref.reference import cg_unrolled, cg_unrolled_vjp

from ._accuracy import extra_arrays
from ._common import Call, load_jax

PRODUCTS = ("laplacian", "convolution")
RTOL = 1e-6
SHIFT = 1e-3  # of the Laplacian and of the blur: 441 and 232 steps on 256×256


def _laplacian(params: tuple[Any, ...], x: Any) -> Any:
    y = params[0] * x
    y[..., 1:, :] -= x[..., :-1, :]
    y[..., :-1, :] -= x[..., 1:, :]
    y[..., :, 1:] -= x[..., :, :-1]
    y[..., :, :-1] -= x[..., :, 1:]
    return y


def _convolution(params: tuple[Any, ...], x: Any) -> Any:
    from scipy import fft

    return fft.irfft2(params[0] * fft.rfft2(x), s=x.shape[-2:])


def _spectrum(n: int) -> np.ndarray:
    """``|k̂|² + 1e-3`` of a 9×9 Hann window."""
    kernel = np.hanning(9)[:, None] * np.hanning(9)
    return np.abs(np.fft.rfft2(kernel / kernel.sum(), (n, n))) ** 2 + SHIFT


def _no_vjp(*_: Any) -> Any:
    raise NotImplementedError("solved only")


def operator(product: str, n: int) -> LinearOperator:
    """Build the operator as a user would, from a function of a few lines and nothing else."""
    apply, parameter = {
        "laplacian": (_laplacian, np.asarray(4 + SHIFT)),
        "convolution": (_convolution, _spectrum(n)),
    }[product]
    return LinearOperator((parameter,), apply, apply, _no_vjp, (n, n), (n, n), self_adjoint=True)


@lru_cache(maxsize=4)
def images(n: int, count: int = 1) -> np.ndarray:
    b = np.random.default_rng(0).standard_normal((count, n, n))
    return b[0] if count == 1 else b


def ours(product: str, n: int) -> Call:
    return partial(ddnref.krylov.cg, operator(product, n), images(n), rtol=RTOL)


def scipy_cg(product: str, n: int) -> Call:
    """SciPy's, with the same product and the same stopping rule."""
    from scipy.sparse import linalg

    a = operator(product, n)
    wrapped = linalg.LinearOperator((n * n, n * n), matvec=lambda v: a(v.reshape(n, n)).ravel(), dtype=np.float64)
    return partial(linalg.cg, wrapped, images(n).ravel(), rtol=RTOL)


def _jax_product(product: str) -> Callable[..., Any]:
    jnp = load_jax().numpy
    if product == "convolution":
        return lambda params, x: jnp.fft.irfft2(params[0] * jnp.fft.rfft2(x), s=x.shape[-2:])

    def laplacian(params: tuple[Any, ...], x: Any) -> Any:
        q = jnp.pad(x, 1)
        return params[0] * x - q[2:, 1:-1] - q[:-2, 1:-1] - q[1:-1, 2:] - q[1:-1, :-2]

    return laplacian


def jax_pair(product: str, n: int) -> tuple[Call, Call]:
    """Ours under ``jax.jit`` with ``jax.lax.while_loop``, and ``jax.scipy``'s, compiled too."""
    jax = load_jax()
    apply, plain = _jax_product(product), operator(product, n)
    b, parameter = jax.numpy.asarray(images(n)), jax.numpy.asarray(plain.params[0])

    @jax.jit
    def our_cg(parameter: Any, b: Any) -> Any:
        a = plain._replace(params=(parameter,), apply=apply, adjoint=apply)
        return ddnref.krylov.cg(a, b, rtol=RTOL, throw=False, while_loop=jax.lax.while_loop)[0]

    @jax.jit
    def theirs(parameter: Any, b: Any) -> Any:
        return jax.scipy.sparse.linalg.cg(partial(apply, (parameter,)), b, tol=RTOL, maxiter=20_000)[0]

    calls = (partial(call, parameter, b) for call in (our_cg, theirs))
    first, second = (lambda call=call: jax.block_until_ready(call()) for call in calls)
    return first, second


# --- many right-hand sides ----------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _dense(n: int) -> np.ndarray:
    z = np.random.default_rng(1).standard_normal((n, n))
    return 4 * np.eye(n) + (z + z.T) / n**0.5 / 2


def many(kind: str, n: int, count: int = 64) -> tuple[Call, Call]:
    """All right-hand sides at once, and one after the other."""
    if kind == "dense":
        matrix = _dense(n)
        a = LinearOperator(
            (matrix,), lambda p, x: x @ p[0], lambda p, y: y @ p[0], _no_vjp, (n,), (n,), self_adjoint=True
        )
        b = np.random.default_rng(2).standard_normal((count, n))
    else:
        a, b = operator(kind, n), images(n, count)
    solve = partial(ddnref.krylov.cg, a, rtol=RTOL)
    return partial(solve, b), lambda: [solve(one) for one in b]


# --- memory and accuracy against the number of steps --------------------------------------------------------------


def memory(steps: int, n: int = 64) -> float:
    """Peak memory of that many steps, in images."""
    a, b = operator("laplacian", n), images(n)
    return extra_arrays(lambda: ddnref.krylov.cg(a, b, rtol=0.0, maxiter=steps, throw=False), b)


def _products(_: tuple[Any, ...], y_bar: Any, x: Any) -> tuple[Any, ...]:
    return (y_bar * x,)


def _diagonal(n: int) -> LinearOperator:
    """The eigenvalues of the blur with its ridge, as parameters."""
    half = _spectrum(n)
    full = np.concatenate([half, half[:, 1 : n - half.shape[1] + 1]], axis=1)

    def apply(params: tuple[Any, ...], x: Any) -> Any:
        return params[0] * x

    return LinearOperator((full,), apply, apply, _products, (n, n), (n, n), True)


def unrolled_memory(steps: int, n: int = 64) -> float:
    """Peak memory of the steps and their reverse, in images."""
    a, b = _diagonal(n), images(n)

    def call() -> Any:
        return cg_unrolled_vjp(b, b, cg_unrolled(a, b, steps)[1], a)

    return extra_arrays(call, b)


def unrolled_error(steps: int, n: int = 64) -> float:
    """Relative error of the gradient of the eigenvalues, reversed through that many steps."""
    a = _diagonal(n)
    b, x_bar = images(n, 2)
    (bar,), _ = cg_unrolled_vjp(x_bar, b, cg_unrolled(a, b, steps)[1], a)
    return _error(bar, a, b, x_bar)


def implicit_error(steps: int, n: int = 64) -> float:
    """Relative error of the same gradient from one solve and its adjoint, each stopped after that many steps."""
    a = _diagonal(n)
    b, x_bar = images(n, 2)
    x, adjoint = (ddnref.krylov.cg(a, v, rtol=0.0, maxiter=steps, throw=False)[0] for v in (b, x_bar))
    return _error(-adjoint * x, a, b, x_bar)


def _error(bar: np.ndarray, a: LinearOperator, b: np.ndarray, x_bar: np.ndarray) -> float:
    exact = -x_bar * b / a.params[0] ** 2
    return float(np.linalg.norm(bar - exact) / np.linalg.norm(exact))
