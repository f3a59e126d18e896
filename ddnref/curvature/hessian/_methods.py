"""The ways to factor H + εI and to count with it, what each costs, and the rule by which "auto" chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ddnref._core.arrays import Array, is_true
from ddnref._kernels.blocks import lu, lu_slogdet, lu_solve
from ddnref._kernels.dense import eigvalsh, identity
from ddnref._kernels.vectors import norm_of_pieces
from ddnref.curvature.hessian import _active, _joint, _riccati, _tridiagonal
from ddnref.curvature.hessian._expansion import OPEN, Basis, Blocks, Expansion, Layer, NetworkHessian, flat

METHODS = ("auto", "tridiagonal", "riccati", "active", "cholesky", "qr", "dense")
STABLE = ("qr", "dense")
ACTIVE = ("active", "cholesky")  # the sweep on active units, with LU or Cholesky pivots
SINGLE = " in float32"  # ends the name of a factorisation in single precision
INDEPENDENT = 1e-3
"""Smallest diagonal entry of R, relative to the largest, at which the samples of a layer count as independent: their
Gram matrix, which the fast form inverts, then has a condition below 1e6."""
DENSE_LIMIT = 6000  # parameters up to which the whole matrix is formed without being asked for: 0.3 GB

# Measured on two cores with NumPy and OpenBLAS over L in 1..20, a in 4..16, N in 1..16; only ratios matter.
FLOPS_PER_SECOND = 2e10
SECONDS_PER_LAYER = {
    "tridiagonal": 9e-5, "riccati": 1.1e-4, "active": 2e-3, "cholesky": 2e-3, "qr": 4e-4, "dense": 5e-5
}  # fmt: skip
SECONDS_PER_ENTRY = 2e-8  # of the dense matrix, to form it by products with the identity


class Path(NamedTuple):
    """One factorisation of H + εI."""

    solve: Callable[[Blocks], Blocks]
    slogdet: Callable[[], tuple[Array, Array]]
    saved: Any  # the factors; for "dense" the matrix H itself


def check_method(method: str) -> None:
    """Raise ``ValueError`` for a method that does not exist."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, METHODS))}.")


def check_precision(precision: str, method: str) -> None:
    """Raise ``ValueError`` for a precision that does not exist, or that the method does not have."""
    if precision not in ("double", "single"):
        raise ValueError(f'precision is {precision!r}, expected "double" or "single".')
    if precision == "single" and method in STABLE:
        raise ValueError(
            f'precision="single" is for eliminations, and method is {method!r}. Pass another method, or precision='
            '"double".'
        )


def build(name: str, h: NetworkHessian, damping: Array | float) -> Path:
    """Factor by the named method; "cholesky" raises `NotDefiniteError` for what is not positive definite."""
    if name.endswith(SINGLE):
        return _in_single(name.removesuffix(SINGLE), h, damping)
    if name == "dense":
        matrix = h.matrix()
        f = lu(matrix + damping * identity(h.total, matrix))
        return Path(lambda g: h.from_rows(lu_solve(f, flat(g).mT).mT), lambda: lu_slogdet(f), matrix)
    if h.expansion is None:
        raise TypeError(
            f"method is {name!r}, but the chain has a layer of type {h.refused}: the sweeps over the layers take Dense "
            'and Flatten layers and Residual blocks of them. Pass method="dense" if the network is small, or solve '
            "with ddnref.krylov.minres and chain.hvp."
        )
    if name == "tridiagonal":
        t = _tridiagonal.factor(h.bases(), h.expansion, damping)
        return Path(lambda g: _tridiagonal.solve(t, g, damping), lambda: _tridiagonal.slogdet(t, damping), t)
    if name == "riccati":
        r = _riccati.factor(h.bases(), h.expansion, damping)
        return Path(lambda g: _riccati.solve(r, g), lambda: _riccati.slogdet(r), r)
    if name in ACTIVE:
        a = _active.factor(h.bases(), h.expansion, damping, name == "cholesky")
        return Path(lambda g: _active.solve(a, g), lambda: _active.slogdet(a), a)
    q = _joint.factor(h.expansion, damping)
    return Path(lambda g: _joint.solve(*q, g), lambda: _joint.slogdet(*q), q)


def _in_single(name: str, h: NetworkHessian, damping: Array | float) -> Path:
    """Factor in float32 what was expanded in double precision; right-hand sides and solutions are in the latter."""
    if h.expansion is None:
        return build(name, h, damping)
    xp, dtype = h.expansion.xp, h.like.dtype

    def single(array: Array) -> Array:
        return xp.astype(array, xp.float32, copy=False)

    bases = [Basis(_mapped(single, b.layer), single(b.q), single(b.r)) for b in h.bases()]
    layers_of = iter(bases)
    steps = tuple(next(layers_of).layer if isinstance(step, Layer) else step for step in h.expansion.steps)
    expansion = Expansion(steps, tuple(b.layer for b in bases), single(h.expansion.curvature), xp)
    epsilon = damping if isinstance(damping, float) else single(damping)
    path = build(name, h._replace(expansion=expansion, bases=lambda: bases), epsilon)

    def solve(g: Blocks) -> Blocks:
        # Residuals of refined solutions are tiny: scaled to unit length they keep within the range of float32.
        size = norm_of_pieces(g, 2)
        size = xp.where(size > 0, size, xp.ones_like(size))[:, None, None]
        return [size * xp.astype(x, dtype) for x in path.solve([single(block / size) for block in g])]

    def slogdet() -> tuple[Array, Array]:
        sign, log = path.slogdet()
        return xp.astype(sign, dtype), xp.astype(log, dtype)

    return Path(solve, slogdet, path.saved)


def _mapped(convert: Callable[[Array], Array], layer: Layer) -> Layer:
    return Layer._make(map(convert, layer))


def count_negative(name: str, h: NetworkHessian, damping: float) -> int:
    """Count the eigenvalues of H + εI below zero from the pivots of one elimination."""
    if h.expansion is None:
        raise TypeError("Only the dense form counts here.")
    if name not in ("tridiagonal", "riccati"):
        return _joint.count_delayed(h.expansion, damping)
    if name in ACTIVE:
        if name == "cholesky" and _active.is_definite(h.bases(), h.expansion, damping):
            return 0
        swept = [(k, pivot) for k, pivot in _active.sweep(h.bases(), h.expansion, damping, False) if pivot is not None]
        rest = sum(k.controls.rest for k, _ in swept if isinstance(k, _active.Kept))
        return sum(_joint.count_below(eigvalsh(p), 0.0) for _, p in swept) + (damping < 0) * rest
    sweep: Callable[..., Any] = _tridiagonal.sweep if name == "tridiagonal" else _riccati.sweep
    pivots = (pivot for _, pivot in sweep(h.bases(), h.expansion, damping) if pivot is not None)
    # The weights that meet no input have the eigenvalue ε.
    return sum(_joint.count_below(eigvalsh(p), 0.0) for p in pivots) + (damping < 0) * sum(b.rest for b in h.bases())


# --- the rule ---------------------------------------------------------------------------------------------------------


def cost(name: str, h: NetworkHessian) -> tuple[float, float]:
    """Estimate the flops of a factorisation and the numbers that it keeps, from shapes and active units alone."""
    name = name.removesuffix(SINGLE)
    if name == "dense" or h.expansion is None:
        return 2 / 3 * h.total**3 + 8.0 * h.total**2, 2.0 * h.total**2
    flops = numbers = 0.0
    if name in ACTIVE:
        half = 0.5 if name == "cholesky" else 1.0
        for layer, (u, m, x) in zip(h.expansion.layers, _active.sizes(h.expansion), strict=True):
            n, a = layer.c.shape
            # T M Tᵀ unit by unit, and products with W sample by sample
            formed = 2.0 * u * m * (m + u) / a + 2.0 * m * x * (u + m + x) / n
            flops += 4.0 * min(layer.z.shape) * layer.z.shape[0] * layer.z.shape[1] + formed
            flops += half * (2 / 3 * u**3 + 2.0 * u * u * x + 2.0 * u * x * x)
            numbers += u * u + u * x
        return flops, numbers
    for layer, kept in _with_kept(h.expansion):
        (a, a_in), (n, width) = layer.weight.shape, layer.z.shape
        r, outputs = min(n, width), n * a
        # The input of the first layer does not move: its pivot is coupled to nothing before it.
        x = 0 if layer is h.expansion.layers[0] else n * a_in + kept
        if name == "qr":
            # Householder QR of two stacked blocks of weights, tangents and multipliers
            block = r * a + min(n, a) * (width - r) + 2 * outputs
            flops, numbers = flops + 16.0 * block**3, numbers + 7.0 * block**2
            continue
        if name == "tridiagonal":
            u, formed = outputs, 2.0 * a * a_in * a_in if x else 0.0  # WᵀW
        else:
            u = r * a
            # (R⊗I) M (R⊗I)ᵀ, then (R⊗I) M (I⊗W) and (I⊗W)ᵀ M (I⊗W)
            formed = 2.0 * r * outputs * (outputs + kept + u)
            formed += 2.0 * outputs * a_in * (u + outputs + x) if x else 0.0
        # QR of the inputs, LU of the pivot, solution of its coupling, Schur complement, and the products above
        flops += 4.0 * r * n * width + 2 / 3 * u**3 + 2.0 * u * u * x + 2.0 * u * x * x + formed
        numbers += u * u + u * x
    return flops, numbers


def _with_kept(e: Expansion) -> Iterator[tuple[Layer, int]]:
    """Yield each layer with the number of tangents that open residual blocks keep while it is passed."""
    kept: list[int] = []
    current = 0  # numbers in the tangent that moves, which is none before the first layer
    for step in e.steps:
        if isinstance(step, Layer):
            yield step, sum(kept)
            current = step.c.shape[0] * step.c.shape[1]
        elif step == OPEN:
            kept.append(current)
        else:
            kept.pop()


def seconds(name: str, h: NetworkHessian) -> float:
    """Estimate the time of a factorisation."""
    formed = SECONDS_PER_ENTRY * h.total**2 if name == "dense" else 0.0
    return cost(name, h)[0] / FLOPS_PER_SECOND + SECONDS_PER_LAYER[name] * len(h.shapes) + formed


def order(h: NetworkHessian, method: str, damping: Array | float, precision: str = "double") -> list[str]:
    """List the methods to try; in single precision the first of them comes before all, if it is an elimination."""
    names = _order(h, method, damping)
    return [names[0] + SINGLE, *names] if precision == "single" and names[0] not in STABLE else names


def _order(h: NetworkHessian, method: str, damping: Array | float) -> list[str]:
    """List the methods to try, the one expected to be fastest first.

    A fast elimination unless forming the matrix is cheaper, then, for solutions that miss the backward error, the
    cheaper of block QR and the dense matrix. Without damping only these two.
    """
    e = h.expansion
    if method == "tridiagonal" and e is not None and not _tridiagonal.supported(e):
        raise ValueError(
            'method="tridiagonal" needs a chain without Residual blocks and, in every layer, fewer samples than inputs '
            '(a bias counts as one). Pass method="riccati", which takes every chain, or "auto".'
        )
    if method != "auto":
        return [method]
    possible = {"qr": e is not None, "dense": h.total <= DENSE_LIMIT}
    stable = sorted((name for name in STABLE if possible[name]), key=lambda name: seconds(name, h))
    if not stable:
        raise TypeError(
            f"The chain has a layer of type {h.refused}, which the sweeps over the layers do not take, and "
            f"{h.total} parameters, too many for the dense matrix (at most {DENSE_LIMIT}). Use Dense, Flatten and "
            "Residual layers, or solve with ddnref.krylov.minres and chain.hvp."
        )
    if e is None or is_true(damping == 0):
        return stable
    # Fast forms are tried only where forming the matrix would take longer.
    limit = seconds("dense", h) if stable[0] == "dense" else float("inf")
    fast = [name for name in ("tridiagonal", "riccati") if seconds(name, h) <= limit]
    if not fast:
        return stable
    plain = "tridiagonal" in fast and _tridiagonal.supported(e)
    if plain and is_true(_tridiagonal.independent(h.bases(), INDEPENDENT)):
        chosen = "tridiagonal"
    elif "riccati" in fast:
        chosen = "riccati"
    else:
        return stable
    # Active units are counted only where dropping the others could pay.
    limit = seconds(chosen, h)
    if SECONDS_PER_LAYER["active"] * len(h.shapes) < limit and seconds("active", h) < limit:
        chosen = "active"
    return [chosen, *stable]
