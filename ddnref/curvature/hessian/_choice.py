"""The ways to factor H + εI behind one interface, what each costs, and the one rule that chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, is_true
from ddnref._kernels.dense import identity
from ddnref.curvature.hessian import _inertia, _qr, _riccati, _tridiagonal
from ddnref.curvature.hessian._expansion import Blocks, Terms, flat
from ddnref.curvature.hessian._lu import lu, lu_slogdet, lu_solve
from ddnref.curvature.hessian._network import System

METHODS = ("auto", "tridiagonal", "riccati", "qr", "dense")
INDEPENDENT = 1e-3
"""Smallest diagonal entry of R, relative to the largest, at which the samples of a layer count as independent: their
Gram matrix, which the fast form inverts, then has a condition below 1e6."""


class Path(NamedTuple):
    """One factorisation of H + εI."""

    name: str
    solve: Callable[[Blocks], Blocks]
    slogdet: Callable[[], tuple[Array, Array]]
    saved: Any


def build(name: str, s: System, damping: Array | float, like: Array) -> Path:
    """Factor by the named method."""
    if name == "dense":
        return _dense(s, damping, like)
    terms = s.terms
    if terms is None:
        raise TypeError(
            f"method is {name!r}, but the chain has a layer of type {s.refused}: the sweeps over the layers take Dense "
            'and Flatten layers and Residual blocks of them. Pass method="dense" if the network is small, or solve '
            "with ddnref.krylov.minres and chain.hvp."
        )
    if name == "tridiagonal":
        f = _tridiagonal.factor(s.bases(), terms, damping)
        return Path(name, lambda g: _tridiagonal.solve(f, g), lambda: _tridiagonal.slogdet(f), f)
    if name == "riccati":
        r = _riccati.factor(terms, damping)
        return Path(name, lambda g: _riccati.solve(r, g), lambda: _riccati.slogdet(r), r)
    q = _qr.factor(terms, damping)
    return Path(name, lambda g: _qr.solve(q, g), lambda: _qr.slogdet(q), q)


def _dense(s: System, damping: Array | float, like: Array) -> Path:
    xp = array_api_compat.array_namespace(like)
    h = s.dense(like)
    factors = lu(h + damping * identity(s.total, h))

    def solve(g: Blocks) -> Blocks:
        return s.split(xp.matrix_transpose(lu_solve(factors, xp.matrix_transpose(flat(g)))))

    return Path("dense", solve, lambda: lu_slogdet(factors), h)


# --- the rule ---------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """What a path takes."""

    flops: float
    """Of the factorisation."""
    numbers: float
    """Floating-point numbers kept."""


def cost(name: str, s: System) -> Cost:
    """An estimate from the shapes alone."""
    if name == "dense" or s.terms is None:
        return Cost(2 / 3 * s.total**3 + 8.0 * s.total**2, 2.0 * s.total**2)
    flops = numbers = 0.0
    for layer in s.terms.layers:
        a, n, width = layer.weight.shape[0], layer.z.shape[0], layer.z.shape[1]
        r, x = min(n, width), n * width
        u = r * a
        if name == "qr":
            block = u + min(n, a) * (width - r) + 2 * n * a
            flops, numbers = flops + 16.0 * block**3, numbers + 7.0 * block**2
        else:
            products = 2.0 * a * width * (width if name == "tridiagonal" else n * n * (a + 2 * width))
            flops += 2 / 3 * u**3 + 2.0 * u * u * x + 2.0 * u * x * x + products
            numbers += u * u + u * x
    return Cost(flops, numbers)


# Measured on two cores with NumPy and OpenBLAS over L in 1..20, a in 4..16, N in 1..16; only ratios matter.
FLOPS_PER_SECOND = 2e10
SECONDS_PER_LAYER = {"tridiagonal": 9e-5, "riccati": 1.1e-4, "qr": 4e-4, "dense": 5e-5}
SECONDS_PER_ENTRY = 2e-8  # of the dense matrix, to form it by products with the identity


def seconds(name: str, s: System) -> float:
    """Estimated time of a factorisation."""
    formed = SECONDS_PER_ENTRY * s.total**2 if name == "dense" else 0.0
    return cost(name, s).flops / FLOPS_PER_SECOND + SECONDS_PER_LAYER[name] * len(s.sizes) + formed


DENSE_LIMIT = 6000
"""Parameters up to which the whole matrix is ever formed without being asked for: 0.3 GB."""


def order(s: System, method: str, damping: Array | float) -> list[str]:
    """The paths to try, first the one expected to be fastest; the rule in one place.

    A fast elimination (pre-activations where the samples are independent in every layer and fewer than its inputs,
    the general form elsewhere) unless forming the matrix is cheaper; then, where its refined solution misses the
    backward error, the cheaper of block QR and the dense matrix. Without damping only these two.
    """
    if method != "auto":
        return [method]
    stable = [name for name in ("qr", "dense") if _allowed(name, s)]
    stable.sort(key=lambda name: seconds(name, s))
    if not stable:
        raise TypeError(
            f"The chain has a layer of type {s.refused}, which the sweeps over the layers do not take, and "
            f"{s.total} parameters, too many for the dense matrix (at most {DENSE_LIMIT}). Use Dense, Flatten and "
            "Residual layers, or solve with ddnref.krylov.minres and chain.hvp."
        )
    if s.terms is None or is_true(damping == 0):
        return stable
    limit = seconds("dense", s) if stable[0] == "dense" else float("inf")
    fast = [name for name in ("tridiagonal", "riccati") if seconds(name, s) <= limit]
    if "tridiagonal" in fast and _independent(s, s.terms):
        return ["tridiagonal", *stable]
    return ["riccati", *stable] if "riccati" in fast else stable


def _allowed(name: str, s: System) -> bool:
    return s.total <= DENSE_LIMIT if name == "dense" else s.terms is not None


def _independent(s: System, terms: Terms) -> bool:
    if not _tridiagonal.supported(terms):
        return False
    return is_true(_tridiagonal.independent(s.bases(), INDEPENDENT))


def check_tridiagonal(terms: Terms) -> None:
    """Raise where the fast form does not apply, which shapes alone can tell."""
    if not _tridiagonal.supported(terms):
        raise ValueError(
            'method="tridiagonal" needs a chain without Residual blocks and, in every layer, fewer samples than inputs '
            '(a bias counts as one). Pass method="riccati", which takes every chain, or "auto".'
        )


def count_negative(name: str, s: System, damping: float) -> int:
    """Eigenvalues of H + εI below zero from the pivots of one elimination."""
    if s.terms is None:
        raise TypeError("Only the dense form counts here.")
    if name == "tridiagonal":
        return _inertia.by_tridiagonal(s.bases(), s.terms, damping)
    if name == "riccati":
        return _inertia.by_riccati(s.terms, damping)
    return _inertia.delayed(s.terms, damping)
