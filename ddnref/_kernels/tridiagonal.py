"""Systems with a block tridiagonal matrix, in one form for every array library; blocks of order one are numbers.

NumPy arrays use LAPACK's elimination with row exchanges, in the order of the unknowns. All other libraries use a form
that takes ``log₂ n`` steps and is as stable, whatever the pivots of the blocks are:

Two neighbouring block rows couple the unknowns around them, ``z = (x_{2j−1}, x_{2j})``, with those around the next two:

    A_j z_j + C_j z_{j+1} = f_j

Of two such equations that are neighbours, only their own z_{j+1} is in both and in no other. An orthogonal matrix Q
turns their 4k rows so that the upper 2k hold all of z_{j+1},

    Qᴴ [ C_j      A_j   0       f_j     ]     [ R  G  H  g ]
       [ A_{j+1}  0     C_{j+1} f_{j+1} ]  =  [ 0  A  C  f ]

and the lower 2k are one equation of the same kind for z_j and z_{j+2}. So the number of equations halves, until one is
left for the first and the last unknown. Then ``z_{j+1} = R⁻¹ (g − G z_j − H z_{j+2})`` gives all the others. Orthogonal
transformations are backward stable without a choice of pivots. R is regular if the matrix is, because the columns of an
unknown are linearly independent and Q keeps their lengths and angles.

Derivatives of the solution pass through this form itself, as second derivatives need: Q is a constant there, as pivots
are, and a multiple of the upper rows is subtracted that is zero in value, but not in its derivative. That is exact,
because any Q leads to the same solution.

    S. J. Wright, "Stable parallel algorithms for two-point boundary value problems", SIAM Journal on Scientific and
    Statistical Computing 13 (1992)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import array_api_compat
import numpy as np
import scipy

from ddnref._core.arrays import Array, adjoint, as_dtype, eps, full, nan_where, power_of_two_below
from ddnref._kernels import singularity
from ddnref._kernels.compiled import compiled
from ddnref._kernels.dense import constant, identity
from ddnref._kernels.dense import solve as dense_solve

Bands: TypeAlias = tuple[Array, Array, Array]
"""The blocks below, on and above the diagonal: ``(..., n − 1, k, k)``, ``(..., n, k, k)``, ``(..., n − 1, k, k)``."""

UNITS = 16
"""Rows whose sizes differ by more are in different units: they are scaled before pivots are chosen."""
MARGIN = 4
"""How much closer to regular than the criterion the quick test of NumPy must be."""


def adjoint_bands(bands: Bands) -> Bands:
    """Return the bands of the adjoint matrix."""
    lower, diagonal, upper = map(adjoint, bands)
    return upper, diagonal, lower


def product(bands: Bands, x: Array) -> Array:
    """Return the product with vectors ``(..., n k)``, whose leading axes broadcast."""
    lower, diagonal, upper = bands
    xp = array_api_compat.array_namespace(x)
    n, k = diagonal.shape[-3:-1]
    x = xp.reshape(x, (*x.shape[:-1], n, k, 1))
    y = diagonal @ x
    if n > 1:
        none = xp.zeros_like(y[..., :1, :, :])
        y = y + xp.concat([none, lower @ x[..., :-1, :, :]], axis=-3)
        y = y + xp.concat([upper @ x[..., 1:, :, :], none], axis=-3)
    return xp.reshape(y, (*y.shape[:-3], n * k))


def solve(lower: Array, diagonal: Array, upper: Array, b: Array) -> Array:
    """Return ``A⁻¹ B`` of ``(..., n k, r)`` with the batch axes of the bands.

    Items with NaN or infinity in a band come out as NaN, and so do exactly singular ones. One that is singular only up
    to rounding is for `solve_and_judge` to notice. Reads nothing on the host, except on NumPy.
    """
    bands, bad = _finite((lower, diagonal, upper))
    if array_api_compat.is_numpy_array(diagonal):
        x = _solve_numpy(bands, b, bad, judges=False)[0]
    else:
        x = _solve_standard(*bands, b)
    return nan_where(bad[..., None, None], x)


def solve_and_judge(lower: Array, diagonal: Array, upper: Array, b: Array) -> tuple[Array, Array]:
    """Return `solve`, and which items are singular to working precision, which are NaN: by `scaled_rcond`."""
    bands, bad = _finite((lower, diagonal, upper))
    if array_api_compat.is_numpy_array(diagonal):
        x, singular = _solve_numpy(bands, b, bad, judges=True)
    else:
        x, singular = _solve_and_judge_standard(*bands, b)
    singular = singular & ~bad
    return nan_where((bad | singular)[..., None, None], x), singular


def _finite(bands: Bands) -> tuple[Bands, Array]:
    """Return the bands with the identity in place of items that are not finite, and flags of these items."""
    xp = array_api_compat.array_namespace(bands[1])
    finite = [xp.all(xp.isfinite(band), axis=(-3, -2, -1)) for band in bands]
    bad = ~(finite[0] & finite[1] & finite[2])
    lower, diagonal, upper = bands
    flags = bad[..., None, None, None]
    zero = full((), 0.0, diagonal)
    eye = identity(diagonal.shape[-1], diagonal)
    return (xp.where(flags, zero, lower), xp.where(flags, eye, diagonal), xp.where(flags, zero, upper)), bad


def _rcond(bands: Bands, inverse: singularity.Product) -> Array:
    """Estimate the reciprocal condition, rows and columns scaled, from products and from solves."""
    xp = array_api_compat.array_namespace(bands[1])
    size: Bands = tuple(map(xp.abs, bands))
    turned, size_turned = adjoint_bands(bands), adjoint_bands(size)
    n, k = bands[1].shape[-3:-1]
    like = xp.reshape(bands[1][..., 0], (*bands[1].shape[:-3], n * k))
    return singularity.scaled_rcond(
        lambda x, is_adjoint: product(size_turned if is_adjoint else size, x),
        lambda x, is_adjoint: product(turned if is_adjoint else bands, x),
        inverse,
        like,
    )


def row_scale(size: Array) -> Array:
    """Return powers of two that bring rows of these sizes to about one, as far as the exponents allow."""
    xp = array_api_compat.array_namespace(size)
    high = 2.0**120 if eps(xp, size.dtype) > 2.0**-52 else 2.0**1000
    size = xp.minimum(xp.maximum(size, full((), 1 / high, size)), full((), high, size))
    return 1 / power_of_two_below(size)


# --- NumPy: LAPACK, item by item --------------------------------------------------------------------------------

Factored: TypeAlias = Callable[[Any, bool], Any]
"""``f(b, adjoint)``: solve with the factors of one matrix, or with those of its adjoint."""


def _solve_numpy(bands: Bands, b: Any, bad: Any, *, judges: bool) -> tuple[Any, Any]:
    """Solve item by item; with `judges` return also which items are singular to working precision."""
    batch, (n, k) = b.shape[:-2], bands[1].shape[-3:-1]
    singular = np.zeros(batch, dtype=bool)
    if 0 in b.shape:
        return b.copy(), singular
    bands, b = _in_units(bands, b)
    lower, diagonal, upper = bands
    x = np.empty(b.shape, b.dtype)
    is_regular = _screen(b.dtype, n * k) if judges else None
    suspects = []
    for item in np.ndindex(batch):
        factored = (_factor_numbers if k == 1 else _factor_blocks)(lower[item], diagonal[item], upper[item])
        if factored is None:
            x[item], singular[item] = np.nan, True
            continue
        x[item] = factored(b[item], False)
        if is_regular is not None and not bad[item]:
            size = sum(np.vdot(band, band).real for band in (lower[item], diagonal[item], upper[item])) ** 0.5
            if not is_regular(size, factored):
                suspects.append(item)
    if suspects:
        chosen = tuple(np.asarray(suspects).T) if batch else ()
        own: Bands = (lower[chosen], diagonal[chosen], upper[chosen])
        turned = adjoint_bands(own)
        none = np.zeros(own[1].shape[:-3], dtype=bool)

        def inverse(x: Any, is_adjoint: bool) -> Any:
            return _solve_numpy(turned if is_adjoint else own, x[..., None], none, judges=False)[0][..., 0]

        singular[chosen] = singularity.is_singular(_rcond(own, inverse))
    return x, singular


def _in_units(bands: Bands, b: Any) -> tuple[Bands, Any]:
    """Return systems whose rows have about one size, where they have not yet."""
    lower, diagonal, upper = bands
    size = np.abs(diagonal).sum(axis=-1)
    size[..., 1:, :] += np.abs(lower).sum(axis=-1)
    size[..., :-1, :] += np.abs(upper).sum(axis=-1)
    graded = ~(np.max(size, axis=(-2, -1)) <= UNITS * np.min(size, axis=(-2, -1)))
    if not graded.any():
        return bands, b
    scale = np.where(graded[..., None, None], row_scale(size), 1).astype(size.dtype)[..., None]
    own = lower * scale[..., 1:, :, :], diagonal * scale, upper * scale[..., :-1, :, :]
    return own, b * scale.reshape(*b.shape[:-1], 1)


def _factor_numbers(lower: Any, diagonal: Any, upper: Any) -> Factored | None:
    """Factor a tridiagonal matrix; ``None`` if a pivot is exactly zero."""
    n = diagonal.shape[0]
    d, lo, up = diagonal[:, 0, 0], lower[:, 0, 0], upper[:, 0, 0]
    if n < 3:  # LAPACK's interface wants three rows: those that are missing are of the identity
        more = np.zeros(3 - n, d.dtype)
        d, lo, up = np.concatenate([d, more + 1]), np.concatenate([lo, more]), np.concatenate([up, more])
    functions: Any = scipy.linalg.get_lapack_funcs(("gttrf", "gttrs"), (d,))
    gttrf, gttrs = functions
    *factors, zero_pivot = gttrf(lo, d, up)
    if zero_pivot > 0:
        return None

    def solve(b: Any, is_adjoint: bool) -> Any:
        if n < 3:
            b = np.concatenate([b, np.zeros((3 - n, *b.shape[1:]), b.dtype)])
        return gttrs(*factors, b, trans="C" if is_adjoint else "N")[0][:n]

    return solve


def _factor_blocks(lower: Any, diagonal: Any, upper: Any) -> Factored | None:
    """Factor a block tridiagonal matrix as a band; ``None`` if a pivot is exactly zero.

    Entry (i, j) lies in the row ``2 w + i − j`` of the band, where w is its width below and above the diagonal.
    """
    n, k = diagonal.shape[:2]
    width = 2 * k - 1 if n > 1 else k - 1
    columns = np.zeros((n, k, 3 * width + 1), diagonal.dtype)  # those of the band, which LAPACK reads by columns
    i, j = np.indices((k, k))
    columns[:, j, 2 * width + i - j] = diagonal
    if n > 1:
        columns[:-1, j, 2 * width + i - j + k] = lower
        columns[1:, j, 2 * width + i - j - k] = upper
    functions: Any = scipy.linalg.get_lapack_funcs(("gbtrf", "gbtrs"), (diagonal,))
    gbtrf, gbtrs = functions
    lu, pivots, zero_pivot = gbtrf(columns.reshape(n * k, 3 * width + 1).T, width, width)
    if zero_pivot > 0:
        return None
    return lambda b, is_adjoint: gbtrs(lu, width, width, b, pivots, trans=2 if is_adjoint else 0)[0]


@lru_cache(maxsize=64)
def _screen(dtype: Any, size: int) -> Callable[[float, Factored], bool]:
    """Return a test that recognises matrices which are certainly regular, at the price of two solves.

    Two steps of inverse iteration find the smallest singular value of a nearly singular matrix, and the Frobenius norm
    bounds the largest.
    """
    start = singularity.probe(np.empty(size, dtype))
    limit = 1 / (MARGIN * singularity.SINGULAR * float(np.finfo(dtype).eps))

    def is_regular(norm: float, factored: Factored) -> bool:
        x = factored(start, False)
        before = float(np.linalg.norm(x))
        if not 0 < before < math.inf:
            return False
        return bool(float(np.linalg.norm(factored(x, True))) * norm < limit * before)

    return is_regular


# --- any other library: nothing but the standard -------------------------------------------------------------


class Level(NamedTuple):
    """How one halving turns and combines the rows of P pairs of equations."""

    q_h: Array  # Qᴴ, (..., P, 4k, 4k)
    pivot: Array  # R, (..., P, 2k, 2k)
    below: Array  # what is left below R: zero in value, not in its derivative
    left: Array  # R⁻¹ G
    right: Array  # R⁻¹ H


class Reduced(NamedTuple):
    """A matrix, halved until one equation is left."""

    scale: Array  # of the rows, (..., n, k)
    levels: tuple[Level, ...]
    last: Array  # of the first and the last unknown, (..., 2k, 2k)


@compiled
def _solve_standard(lower: Array, diagonal: Array, upper: Array, b: Array) -> Array:
    return b if 0 in b.shape else _substitute(_reduce((lower, diagonal, upper)), b)


@compiled
def _solve_and_judge_standard(lower: Array, diagonal: Array, upper: Array, b: Array) -> tuple[Array, Array]:
    xp = array_api_compat.array_namespace(diagonal)
    bands = lower, diagonal, upper
    if 0 in b.shape:
        return b, xp.any(diagonal != diagonal, axis=(-3, -2, -1))
    reduced = _reduce(bands)
    turned = _reduce(adjoint_bands(bands))

    def inverse(x: Array, is_adjoint: bool) -> Array:
        return _substitute(turned if is_adjoint else reduced, x[..., None])[..., 0]

    return _substitute(reduced, b), singularity.is_singular(_rcond(bands, inverse))


def _reduce(bands: Bands) -> Reduced:
    """Halve the number of equations until one is left."""
    lower, diagonal, upper = bands
    xp = array_api_compat.array_namespace(diagonal)
    n, k = diagonal.shape[-3:-1]
    none = xp.zeros_like(diagonal[..., :1, :, :])
    # Every row with three blocks, the rows brought to one size, and an even number of them: the last may be x = 0.
    lower, upper = xp.concat([none, lower], axis=-3), xp.concat([upper, none], axis=-3)
    size = constant(xp.max(xp.abs(xp.concat([lower, diagonal, upper], axis=-1)), axis=-1))
    scale = row_scale(size)
    lower, diagonal, upper = (as_dtype(scale, diagonal)[..., None] * band for band in (lower, diagonal, upper))
    if n % 2:
        eye = xp.zeros_like(none) + identity(k, none)
        lower, upper = (xp.concat([band, none], axis=-3) for band in (lower, upper))
        diagonal = xp.concat([diagonal, eye], axis=-3)
    # A z_j + C z_{j+1} for each pair of rows.
    zero = xp.zeros_like(diagonal[..., 0::2, :, :])
    even, odd = ([band[..., i::2, :, :] for band in (lower, diagonal, upper)] for i in (0, 1))
    a = _blocks([[even[0], even[1]], [zero, odd[0]]])
    c = _blocks([[even[2], zero], [odd[1], odd[2]]])
    levels = []
    while a.shape[-3] > 1:
        level, a, c = _halve(a, c)
        levels.append(level)
    return Reduced(scale, tuple(levels), xp.concat([a[..., 0, :, k:], c[..., 0, :, :k]], axis=-1))


def _halve(a: Array, c: Array) -> tuple[Level, Array, Array]:
    """Eliminate what two neighbouring equations share; a last one without a neighbour stays as it is."""
    xp = array_api_compat.array_namespace(a)
    width = a.shape[-1]
    (a1, a2), (c1, c2) = _pairs(a), _pairs(c)
    shared = xp.concat([c1, a2], axis=-2)
    q_h = adjoint(xp.linalg.qr(constant(shared), mode="complete")[0])
    pivot, below = _halves(q_h @ shared)
    g, a_next = _halves(q_h[..., :width] @ a1)
    h, c_next = _halves(q_h[..., width:] @ c2)
    solved = dense_solve(pivot, xp.concat([g, h], axis=-1))
    left, right = solved[..., :width], solved[..., width:]
    a_next, c_next = a_next - below @ left, c_next - below @ right
    if a.shape[-3] % 2:
        a_next, c_next = (xp.concat([m, rest[..., -1:, :, :]], axis=-3) for m, rest in ((a_next, a), (c_next, c)))
    return Level(q_h, pivot, below, left, right), a_next, c_next


def _substitute(reduced: Reduced, b: Array) -> Array:
    """Solve for right-hand sides ``(..., n k, r)``."""
    xp = array_api_compat.array_namespace(b)
    scale, levels, last = reduced
    (n, k), r = scale.shape[-2:], b.shape[-1]
    lead = tuple(b.shape[:-2])
    f = as_dtype(scale, b)[..., None] * xp.reshape(b, (*lead, n, k, r))
    if n % 2:
        f = xp.concat([f, xp.zeros_like(f[..., :1, :, :])], axis=-3)
    f = xp.reshape(f, (*lead, (n + 1) // 2, 2 * k, r))
    # Down: the right-hand side of one equation per pair.
    solved = []
    for level in levels:
        g, f_next = _halves(level.q_h @ xp.concat(list(_pairs(f)), axis=-2))
        solved.append(dense_solve(level.pivot, g))
        f_next = f_next - level.below @ solved[-1]
        f = xp.concat([f_next, f[..., -1:, :, :]], axis=-3) if f.shape[-3] % 2 else f_next
    # The first and the last unknown; those beyond the ends are zero.
    ends = dense_solve(last, f[..., 0, :, :])
    none = xp.zeros_like(ends[..., :k, :])
    first, final = xp.concat([none, ends[..., :k, :]], axis=-2), xp.concat([ends[..., k:, :], none], axis=-2)
    z = xp.stack([first, final], axis=-3)
    # Up: what each pair shares, between its neighbours.
    for level, own in zip(reversed(levels), reversed(solved), strict=True):
        count = own.shape[-3]
        middle = own - level.left @ z[..., :count, :, :] - level.right @ z[..., 1 : count + 1, :, :]
        both = xp.stack([z[..., :count, :, :], middle], axis=-3)
        both = xp.reshape(both, (*lead, 2 * count, 2 * k, r))
        z = xp.concat([both, z[..., count:, :, :]], axis=-3)
    x = xp.reshape(z, (*lead, 2 * z.shape[-3], k, r))[..., 1 : n + 1, :, :]
    return xp.reshape(x, (*lead, n * k, r))


def _pairs(m: Array) -> tuple[Array, Array]:
    """Return the first and the second of each pair along the third axis from the end."""
    even = m.shape[-3] - m.shape[-3] % 2
    return m[..., 0:even:2, :, :], m[..., 1:even:2, :, :]


def _halves(m: Array) -> tuple[Array, Array]:
    """Return the upper and the lower half of the rows."""
    half = m.shape[-2] // 2
    return m[..., :half, :], m[..., half:, :]


def _blocks(rows: list[list[Array]]) -> Array:
    """Join blocks to matrices."""
    xp = array_api_compat.array_namespace(rows[0][0])
    return xp.concat([xp.concat(row, axis=-1) for row in rows], axis=-2)
