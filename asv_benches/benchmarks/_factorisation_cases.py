"""Cholesky factors and tridiagonal systems to time: ours, products of the same size, LAPACK, PyTorch and JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import scipy.linalg

import ddnref

from ._common import Call, load, load_jax, pin_threads


def definite(batch: int, m: int, dtype: str) -> tuple[Any, Any]:
    """Covariances of twice as many samples as features, and cotangents of their factors."""
    pin_threads()
    rng = np.random.default_rng(m)
    z = rng.standard_normal((batch, 2 * m, m))
    return (z.mT @ z / (2 * m)).astype(dtype), rng.standard_normal((batch, m, m)).astype(dtype)


def cholesky(batch: int, m: int, dtype: str) -> Call:
    """The factor and its gradient, all checks on."""
    a, l_bar = definite(batch, m, dtype)
    return lambda: ddnref.cholesky_vjp(l_bar, ddnref.cholesky(a))


def cholesky_in_torch(batch: int, m: int, dtype: str) -> Call:
    """Factor and gradient by PyTorch, which neither symmetrises nor refuses what is singular but for rounding."""
    torch = load("torch")
    a, l_bar = map(torch.from_numpy, definite(batch, m, dtype))
    a.requires_grad_()
    return lambda: torch.autograd.grad(torch.linalg.cholesky(a), a, l_bar)


def products(batch: int, m: int, dtype: str) -> Call:
    """The stated limit: two products, as many flops as the gradient takes."""
    a, l_bar = definite(batch, m, dtype)

    def call() -> None:
        for _ in range(2):
            a @ l_bar

    return call


def bands(n: int, dtype: str) -> tuple[Any, ...]:
    """Bands without dominance, and a right-hand side."""
    pin_threads()
    rng = np.random.default_rng(n)
    return tuple(rng.standard_normal(count).astype(dtype) for count in (n - 1, n, n - 1, n))


def tridiagonal(n: int, dtype: str) -> Call:
    return partial(ddnref.solve_tridiagonal, *bands(n, dtype))


def tridiagonal_both(n: int, dtype: str) -> Call:
    """Solution and gradient."""
    lower, diagonal, upper, b = bands(n, dtype)

    def call() -> Any:
        x = ddnref.solve_tridiagonal(lower, diagonal, upper, b)
        return ddnref.solve_tridiagonal_vjp(b, x, lower, diagonal, upper)

    return call


def tridiagonal_in_scipy(n: int, dtype: str) -> Call:
    """The stated limit: LAPACK's elimination alone, which does not notice a matrix that is nearly singular."""
    lower, diagonal, upper, b = bands(n, dtype)
    gtsv = scipy.linalg.get_lapack_funcs("gtsv", (diagonal,))
    return lambda: gtsv(lower, diagonal, upper, b)


def tridiagonal_in_jax(n: int, dtype: str, gradient: bool) -> Call:
    """``jax.lax.linalg.tridiagonal_solve``, compiled, alone or with JAX's own gradient."""
    jax = load_jax()
    lower, diagonal, upper, b = map(jax.numpy.asarray, bands(n, dtype))
    zero = jax.numpy.zeros_like(b[:1])
    given = jax.numpy.concatenate([zero, lower]), diagonal, jax.numpy.concatenate([upper, zero]), b[:, None]
    solve = jax.lax.linalg.tridiagonal_solve
    call = jax.jit(lambda *arrays: jax.vjp(solve, *arrays)[1](arrays[-1]) if gradient else solve(*arrays))
    return lambda: jax.block_until_ready(call(*given))


def block_tridiagonal(n: int, k: int) -> Call:
    pin_threads()
    rng = np.random.default_rng(n)
    given = [rng.standard_normal((count, k, k)) for count in (n - 1, n, n - 1)]
    return partial(ddnref.solve_block_tridiagonal, *given, rng.standard_normal((n, k)))
