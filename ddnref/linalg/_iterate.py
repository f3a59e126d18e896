"""The loop of power and of simultaneous iteration: balancing before it, the judgement of the pairs after it.

`ddnref.linalg._iterations` has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from ddnref._core.arrays import (
    Array,
    Namespace,
    among,
    clip,
    double,
    eps,
    full,
    is_complex,
    is_true,
    named_arrays,
    namespace,
    namespace_of,
    nan_where,
    power_of_two_below,
    refuse_recording,
    with_axes,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._core.loops import IterationInfo, LoopOptions, WhileLoop, run
from ddnref._core.noise import noise
from ddnref._kernels.bordered import inverse_iteration, product_in_double
from ddnref._kernels.dense import eigh, hermitian_part, identity, matvec, symmetrised
from ddnref._kernels.vectors import largest, norm, on_host, power_of_two, quotient, safe_norm
from ddnref.errors import ConvergenceError, NonFiniteError
from ddnref.linalg._residuals import SIGNS

RTOL = 16  # in units of eps, with √m more: the rounding of products with m terms reached 18 at m = 512
ERROR_RTOL = {2.0**-52: 1e-12, 2.0**-23: 3e-6}
"""The largest error of an eigenvalue that counts as converged by default, by machine epsilon."""
ROUNDING = 0.5  # of a product, in units of eps times the root of the sum of its squared terms: see `_judge`
STALLED = 60  # steps without a smaller residual, after which one near rounding is as small as it gets
SWEEPS = 10  # of balancing: each removes half of an imbalance in powers of two, five or six are enough for 1e±16


class _State(NamedTuple):
    """A frozen item keeps its y; all else follows from y and comes out as it was."""

    y: Array
    """The vector, or the columns of Q."""
    z: Array
    """``X y``, or the start before the first step."""
    t: Array
    """``yᵀ X y``: λ, or the matrix T."""
    size: Array
    """``‖X v‖`` or ``‖T‖``; 1 where it is zero, and before the first step."""
    residual: Array
    best: Array
    """The smallest residual so far."""
    since: Array
    """Steps since then."""
    n_iter: Array
    active: Array


class _Given(NamedTuple):
    """Everything that both iterations start from."""

    x: Array
    """The matrix over a power of two, balanced or symmetrised; zero for items that are not finite."""
    d: Array | None
    """The diagonal of D of the balanced matrix ``D⁻¹XD``, ``(..., m)``; ``None`` for a symmetric one."""
    moved: bool
    """Whether D may differ from the identity."""
    scale: Array
    """The power of two below the largest entry of each matrix, 1 for zero, so that squares stay in range."""
    bad: Array
    """Flags of items that are not finite, ``(...)``."""
    rtol: float
    """The tolerance that decides on convergence: of the residual, or of the error where X is not symmetric."""
    rounding: float
    """The relative residual that rounding leaves."""
    given: bool
    """Whether the caller gave `rtol`."""


def _prepare(
    function: str,
    x: Array,
    v0: Array | None,
    symmetric: bool,
    align: str | None,
    rtol: float | None,
    while_loop: WhileLoop | None,
) -> _Given:
    """Validate, scale, and symmetrise or balance the matrix."""
    xp = namespace(x=x)
    check_square("x", x)
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: a matrix without entries has no eigenvalue.")
    refuse_recording(function, **named_arrays(x=x, v0=v0))
    if is_complex(x):
        raise TypeError(f"x has dtype {x.dtype}, but {function} takes real matrices: use ddnref.eigsh.")
    if align is not None and align not in SIGNS:
        raise ValueError(f'align is {align!r}, expected "positive", "negative" or None.')
    size = largest(x, 2)
    bad = ~xp.isfinite(size)  # the maximum keeps NaN and infinity, which saves a pass over x
    x = xp.where(bad[..., None, None], full((), 0.0, x), x)  # they are inactive from the start
    if symmetric:
        x = symmetrised(x)
        size = largest(x, 2)
    else:  # a symmetric matrix needs no left eigenvectors, which counts only where looking at it is free
        symmetric = on_host(x) and is_true(xp.all(x == xp.matrix_transpose(x)))
    scale = power_of_two_below(nan_where(bad, size))
    x, d, moved = x / scale[..., None, None], None, False
    if not symmetric:
        x, d, moved = _balanced(x, while_loop)
        smaller = power_of_two(x, 2)  # without entries that balancing took away
        x, scale = x / smaller[..., None, None], scale * smaller
    unit = eps(xp, x.dtype)
    rounding = (RTOL + x.shape[-1] ** 0.5) * unit
    default = rounding if symmetric else ERROR_RTOL[unit]
    return _Given(x, d, moved, scale, bad, default if rtol is None else float(rtol), rounding, rtol is not None)


def _balanced(x: Array, while_loop: WhileLoop | None = None) -> tuple[Array, Array, bool]:
    """Return ``D⁻¹XD`` with rows and columns of about the same size, the diagonal of D, powers of two, and a flag.

    The flag is false where D is known to be the identity.

    All entries of D move at once, by a quarter of the imbalance in powers of two, because an entry of X is moved from
    both sides. With eps times the diagonal in each sum, triangular matrices become diagonal up to rounding. Reads
    nothing on the host, except on NumPy, where it stops as soon as nothing moves.
    """
    xp = namespace_of(x)
    # Only sizes off the diagonal matter.
    size, diagonal = xp.abs(x), largest(xp.linalg.diagonal(x))
    size = xp.where(identity(x.shape[-1], x) > 0, xp.zeros_like(size), size)
    size_t, least = xp.matrix_transpose(size), (eps(xp, x.dtype) * diagonal)[..., None]
    limit = 60.0 if x.dtype == xp.float32 else 500.0  # no power of two overflows, nor its square in a norm

    def sweep(state: tuple[Array, Array]) -> tuple[Array, Array]:
        exponents = state[0]
        d = 2.0**exponents
        row, column = matvec(size, d) / d + least, d * matvec(size_t, 1 / d) + least
        usable = (row > 0) & (column > 0)
        one = xp.ones_like(row)
        ratio = xp.log2(xp.where(usable, row, one)) - xp.log2(xp.where(usable, column, one))
        moved = clip(exponents + xp.round(ratio / 4), limit)
        return moved, xp.any(moved != exponents, axis=-1)

    state = (xp.zeros_like(x[..., 0]), diagonal >= 0)
    if while_loop is not None:
        state = run(lambda state: state[1], sweep, state, maxiter=SWEEPS, while_loop=while_loop)
    else:
        for done in range(SWEEPS):
            state = sweep(state)
            if on_host(x) and not is_true(xp.any(state[1])):
                if done == 0:  # nothing moved at all
                    return x, 2.0 ** state[0], False
                break
    d = 2.0 ** state[0]
    return x * (d[..., None, :] / d[..., :, None]), d, True


def _unbalanced(y: Array, g: _Given) -> Array:
    """Return unit eigenvectors of X from those of ``D⁻¹XD``, in the columns."""
    if g.d is None:
        return y
    v = g.d[..., None] * y
    return v / safe_norm(namespace_of(v).matrix_transpose(v))[..., None, :]


def _iterate(
    step: Callable[[_State], tuple[Array, ...]],
    pairs: Callable[[_State], tuple[Array, Array, Array]],
    start: Array,
    t: Array,
    g: _Given,
    options: LoopOptions,
) -> tuple[tuple[Array, Array], IterationInfo]:
    """Repeat `step` until the eigenvalues are as exact as asked for; return eigenpairs and how it went.

    A step returns y, z, t, its size and what is left, `pairs` n eigenvalues, unit vectors, and X times these. Items
    that are not finite or have not converged raise if the options say so.
    """
    xp, one = namespace_of(start), full(g.bad.shape, 1.0, start)
    # Where X is not normal, the rounding of products may be large beside an eigenvalue, and that of one step is
    # amplified by the next one.
    n = t.shape[-1] if t.ndim > one.ndim else 1
    whole = 0 * one if g.d is None else norm(g.x, 2)
    unit = eps(xp, start.dtype)
    floor = 2 * n**0.5 * unit * whole

    def settled(size: Array, left: Array, since: Array) -> Array:
        """Whether what is left has come down to rounding."""
        stalled = (since >= STALLED) & (left * size <= 10 * floor * whole) & (left <= 10 * unit**-0.5 * floor)
        return (left <= xp.maximum(g.rounding * size, floor)) | stalled

    def loop(state: _State, tolerance: Array) -> _State:
        """Continue until the relative residual is within the tolerance, or rounding."""

        def body(state: _State) -> _State:
            y, z, t, size, left = step(state)
            in_range = size > 0  # or y is in the null space: a zero matrix, or a start without a part in the range
            size = xp.where(in_range, size, one)
            residual = xp.where(in_range, left / size, one)
            n_iter = state.n_iter + xp.astype(state.active, state.n_iter.dtype)
            active = state.active & in_range & (residual > tolerance) & (n_iter < options.maxiter)  # false for NaN
            best, since = state.best, state.since
            if g.d is not None:
                since = xp.where(residual < best, 0 * since, since + 1)
                best = xp.minimum(best, residual)
                active = active & ~settled(size, left, since)
            return _State(y, z, t, size, residual, best, since, n_iter, active)

        return run(
            lambda state: state.active, body, state,
            maxiter=options.maxiter, check_every=options.check_every, while_loop=options.while_loop,
        )  # fmt: skip

    def judged(state: _State) -> tuple[Array, ...]:
        done = settled(state.size, state.residual * state.size, state.since)
        w, y, absolute = _judged(g, done, *pairs(state))
        # The error is relative to the eigenvalue, which may be as small as this.
        least = xp.abs(w) - absolute
        error = xp.where(least > 0, quotient(absolute, least, least > 0), full((), float("inf"), least))
        return w, y, error, xp.max(absolute, axis=-1) / largest(w), done

    none, never = xp.zeros_like(one, dtype=xp.int32), float("inf") * one
    state = loop(
        _State(start, start, t, one, never, never, none, none, ~g.bad),
        (g.rtol if g.given or g.d is None else 0.0) * one,
    )
    w, y, error, worst, done = judged(state)
    if g.d is not None and g.given:
        # Only now the condition of the eigenvalues is known. Go on to rounding where the residual is too large for it.
        again = (worst > g.rtol) & ~done & (state.n_iter < options.maxiter) & ~g.bad
        if options.while_loop is not None or is_true(xp.any(again)):
            state = loop(state._replace(active=again), 0.0 * one)
            w, y, error, worst, done = judged(state)
    converged = ~g.bad & ((state.residual if g.d is None else worst) <= g.rtol)
    info = IterationInfo(converged, state.n_iter, nan_where(g.bad, state.residual), nan_where(g.bad[..., None], error))
    if options.throw and not is_true(xp.all(converged)):
        _raise(g, done, worst, info, options)
    return (w, y), info


def _judged(g: _Given, settled: Array, w: Array, y: Array, x_y: Array) -> tuple[Array, Array, Array]:
    """Return eigenpairs, corrected where the iteration has `settled` at rounding, and the absolute error of each w.

    The formulas are at the top of the module. Random signs of the rounding errors of a product make it
    ``½ eps (Σ u_i² x_ij² y_j²)^½`` in ``uᵀXy``, which no diagonal scaling changes. How much of δ the second order is
    follows from the amplification of directions other than u; the factors are measured, and hold for 99 in 100
    matrices.
    """
    xp, unit = namespace_of(w), eps(namespace_of(w), w.dtype)
    if g.d is None:  # the residual of a symmetric matrix bounds the error
        absolute = norm(xp.matrix_transpose(x_y - w[..., None, :] * y)) + unit * largest(w)[..., None]
    else:
        settled, w_, y_ = settled[..., None], double(xp, w), double(xp, y)
        y_ = y_ / xp.sqrt(xp.sum(y_ * y_, axis=-2, keepdims=True))
        outside = 16 * unit * largest(w_)[..., None] * xp.where(w_ < 0, -xp.ones_like(w_), xp.ones_like(w_))
        v, u, beyond = inverse_iteration(w_ + outside, y_, g.x, both=g.moved)
        r = product_in_double(g.x, y_) - y_ * w_[..., None, :]
        delta = xp.sum(u * r, axis=-2)
        bound = xp.sqrt(xp.sum(u * u, axis=-2) * xp.sum(r * r, axis=-2))
        share = xp.sqrt(bound * beyond)  # of the second order
        one, first = xp.ones_like(share), xp.abs(delta)
        left = xp.where(settled, first * xp.minimum(one, 4 * share), first + bound * xp.minimum(one, share))
        squares = xp.sum(u * u * product_in_double(g.x * g.x, y_ * y_), axis=-2)
        absolute = xp.astype(left + ROUNDING * eps(xp, y_.dtype) * xp.sqrt(squares), w.dtype, copy=False)
        # Take over what is better.
        improves = settled & xp.isfinite(delta)
        w = xp.where(improves, xp.astype(w_ + delta, w.dtype, copy=False), w)
        if g.moved:  # item by item, so that no item depends on the others
            improves = improves & xp.any(g.d != 1, axis=-1, keepdims=True)
            y = xp.where(improves[..., None, :], xp.astype(v, y.dtype, copy=False), y)
    absolute = absolute + unit * xp.abs(w)
    return w, y, xp.where(xp.isfinite(absolute), absolute, full((), float("inf"), absolute))


def _start(v0: Array | None, x: Array, d: Array | None, columns: tuple[int, ...]) -> Array:
    """The given start, or fixed pseudo-random vectors, for every item of the batch: ``(..., m, *columns)``.

    A given one is brought to the coordinates of the balanced matrix ``D⁻¹XD``.
    """
    xp = namespace_of(x)
    if v0 is None:
        v0 = noise(0, x.shape[-1], x)  # the same for every library
        if columns:
            v0 = xp.stack([noise(j, x.shape[-1], x) for j in range(*columns)], axis=-1)
    else:
        _check_start(v0, x, columns)
        if d is not None:
            v0 = v0 / (d[..., None] if columns else d)
            v0 = v0 / with_axes(power_of_two(v0, 1 + len(columns)), 1 + len(columns))
    return xp.broadcast_to(v0, (*x.shape[:-1], *columns))


def _check_start(v0: Array, x: Array, columns: tuple[int, ...]) -> None:
    """Raise unless `v0` is a start for every item of the batch, or one for all."""
    shape = (*x.shape[:-1], *columns)
    namespace(x=x, v0=v0)
    check_dtypes(v0=(v0, x.dtype))
    check_shapes(v0=(v0, shape if v0.ndim == len(shape) else shape[x.ndim - 2 :]))


def _eigenpairs_of_t(xp: Namespace, t: Array, symmetric: bool) -> tuple[Array, Array]:
    """Eigenpairs of the n×n matrix T, largest magnitude first."""
    if not symmetric:
        return xp.linalg.diagonal(t), _triangular_eigenvectors(xp, t)  # T is triangular, and ordered by the iteration
    w, u = eigh(hermitian_part(t))
    order = xp.argsort(-xp.abs(w), axis=-1, stable=True)
    return xp.take_along_axis(w, order, axis=-1), xp.take_along_axis(u, order[..., None, :], axis=-1)


def _triangular_eigenvectors(xp: Namespace, t: Array) -> Array:
    """Unit eigenvectors of an upper triangular matrix, by back substitution.

    For column k, ``u_k = 1`` and ``u_i = Σ_{i<j<=k} t_ij u_j / (t_kk − t_ii)`` upwards. Between equal eigenvalues the
    difference counts as the rounding of the largest entry: independent vectors still come out as such, and the vectors
    of a defective matrix become parallel.
    """
    n = t.shape[-1]
    zero, one = xp.zeros_like(t[..., 0, 0]), xp.ones_like(t[..., 0, 0])
    least = largest(t, 2) * eps(xp, t.dtype)
    least = xp.where(least > 0, least, one)
    columns = []
    for k in range(n):
        u = [zero] * n
        u[k] = one  # the entry that fixes the scale
        for i in range(k - 1, -1, -1):
            total = sum((t[..., i, j] * u[j] for j in range(i + 1, k + 1)), zero)
            gap = t[..., k, k] - t[..., i, i]
            u[i] = total / xp.where(xp.abs(gap) < least, least, gap)
        column = xp.stack(u, axis=-1)
        columns.append(column / safe_norm(column)[..., None])
    return xp.stack(columns, axis=-1)


def _raise(g: _Given, settled: Array, worst: Array, info: IterationInfo, options: LoopOptions) -> NoReturn:
    """Raise for items that are not finite, or else for those that have not converged."""
    xp = namespace_of(g.bad)
    if is_true(xp.any(g.bad)):
        raise NonFiniteError(
            f"x contains NaN or infinity{among(g.bad)}. The most likely cause is a diverged step or a division by zero "
            "before this call. Pass throw=False to get NaN for these items of the batch and the right results for the "
            "others."
        )
    # For the message.
    failed, items = int(xp.sum(xp.astype(~info.converged, xp.int32))), math.prod(info.converged.shape)
    zero = xp.zeros_like(worst)
    residual, worst = (float(xp.max(xp.where(info.converged, zero, a))) for a in (info.residual_norm, worst))
    if g.d is not None and is_true(xp.all(info.converged | settled)):
        raise ConvergenceError(
            f"{failed} of {items} items have not converged{among(~info.converged)}: the iteration came down to "
            f"rounding, a relative residual of {residual:.1e}, but an eigenvalue may be off by {worst:.1e} of the "
            f"largest, more than rtol {options.rtol:.1e}. The most likely cause is a matrix that is far from normal, "
            "or nearly repeated eigenvalues without independent eigenvectors: rounding alone moves such eigenvalues "
            "that far. Pass a larger rtol, float64, symmetric=True if the matrix is symmetric, or throw=False to get "
            "the last iterate and info.error."
        )
    raise ConvergenceError(
        f"The iteration has not converged for {failed} of {items} items{among(~info.converged)} after at most "
        f"{options.maxiter} steps: relative residual {residual:.1e}, rtol {options.rtol:.1e}. The most likely cause is "
        "that two eigenvalues have nearly the same largest magnitude (λ and −λ, a complex pair, a small gap behind "
        "the last one wanted), or that the matrix is zero. Use ddnref.eigsh or ddnref.eigh for symmetric matrices, "
        "pass a larger maxiter or rtol, a shifted matrix, or throw=False to get the last iterate and info."
    )
