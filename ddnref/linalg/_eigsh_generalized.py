"""k eigenpairs of ``A v = w B v`` for large matrices and operators, by shift and invert, and their derivatives.

With a shift, ``C = (A − σ B)⁻¹ B`` has the same vectors and the eigenvalues ``θ = 1 / (λ − σ)``, largest near the
shift; without one, ``C = B⁻¹ A`` has ``θ = λ``. Both are self-adjoint in the inner product of B, in which Lanczos
iterates.

For the derivative let V hold the k vectors, ``Vᴴ B V = I``, and ``M = Vᴴ V̄``. The part inside their span is that of
`eigh_generalized`, with a k×k matrix T. The other part comes from solves on the complement,

    (λ_j B − A) u_j = v̄_j − B V M_j,   Vᴴ B u_j = 0,
    Ā = sym(U Vᴴ) + V T Vᴴ,        B̄ = −sym(U Λ Vᴴ) − V (½ (T Λ + Λ T) + ¼ (M + Mᴴ)) Vᴴ.

``(θ_j − C) u_j = f_j`` is the same system, with ``f_j = −θ_j (A − σ B)⁻¹ (v̄_j − B V M_j)``, or ``B⁻¹`` of that without
a shift. It is definite in the inner product of B if all other θ are on one side of θ_j, or smaller. The JVP solves it
for ``Ȧ v_j − λ_j Ḃ v_j``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ddnref._core.arrays import (
    Array,
    adjoint,
    among,
    as_dtype,
    eps,
    full,
    is_true,
    named_arrays,
    namespace,
    namespace_of,
    nan_where,
    power_of_two_below,
    real,
    refuse_recording,
)
from ddnref._core.checks import conform, given
from ddnref._core.loops import CHECK_EVERY, LoopOptions, WhileLoop
from ddnref._core.noise import noise
from ddnref._kernels.cholesky import cholesky
from ddnref._kernels.dense import hermitian_part, hermitian_sum, identity, infinity, move_axis
from ddnref._kernels.eigh_vjp import antisymmetric_part, close_gap, exceeds, is_rounding, left_out, masked
from ddnref._kernels.lu import lu_factor, lu_solve
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, norm, power_of_two
from ddnref.errors import ConvergenceError, GaugeError, SingularError
from ddnref.linalg._complement import Complement, EigshVjpInfo, Method, motion, solved
from ddnref.linalg._eigh import raise_split
from ddnref.linalg._eigsh import (
    MAXITER,
    EigshInfo,
    _basis_size,
    _same,
    _tolerances,
    are_unequal,
    cheaper,
    check_pair_dtypes,
    check_pair_shapes,
    is_cut,
    split_among,
    uses_last_cluster,
)
from ddnref.linalg._generalized import _decomposed
from ddnref.linalg._lanczos import Found, Plan, lanczos, preference
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import SelfAdjoint, inner, self_adjoint
from ddnref.operators._scipy import factorised

Operand = Array | LinearOperator
Solve = Callable[[Array], Array]
EXTRA = 8
"""Vectors of the default basis beyond twice k: after shift and invert, few are needed, and each costs a solve."""


@public
def eigsh_generalized(
    a: Array | LinearOperator,
    b: Array | LinearOperator,
    /,
    k: int,
    *,
    sigma: float | None = None,
    which: str = "LM",
    solve: Solve | None = None,
    v0: Array | None = None,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    maxiter: int | None = None,
    basis: int | None = None,
    method: str = "auto",
    check_every: int = 1,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array, Array], EigshInfo]:
    r"""The k eigenpairs of ``A v = w B v`` next to a number, or the largest or smallest, most wanted first.

    Parameters
    ----------
    a, b : (..., m, m) arrays, or LinearOperators, both of one kind
        A Hermitian, B Hermitian positive definite; of arrays the Hermitian parts count. Operators must say so:
        ``self_adjoint=True`` and ``positive_definite=True``, which is not checked.
    k : int
        How many, ``1 <= k <= m``.
    sigma : float, optional
        Find the eigenvalues next to this number, by shift and invert: what to use for the smallest ones, and for
        interior ones. It must not be an eigenvalue. Without it, B is inverted in place of ``A − σ B``, and the largest
        eigenvalues are found quickly.
    which : {"LM", "LA", "SA"}
        With `sigma`: on both sides of it, the nearest first; only above it; only below it. (For "LA" and "SA" at least
        k eigenvalues must lie there.) Without: the largest magnitudes; the largest; the smallest.
    solve : callable, optional
        ``solve(y)`` is ``(A − σ B)⁻¹ y``, or ``B⁻¹ y`` without `sigma`, for right-hand sides ``(j, ..., \*shape)``. By
        default arrays are factorised by LU, and operators by a sparse LU if they are those of
        ``operators.from_scipy(sparse matrix)`` or have a ``sparse`` field. It must be as exact as a factorisation.
    v0 : (..., m) or (..., \*domain_shape) array, optional
        As in `eigsh`.
    rtol : float, optional
        Largest accepted residual of the map that is iterated, relative to its norm, in the norm of B; default 1e-12,
        and 1e-6 in single precision.
    cluster_rtol, maxiter, check_every, while_loop
        As in `eigsh`, for the eigenvalues of the map that is iterated, ``1 / (w - sigma)`` or w.
    basis : int, optional
        Vectors held at once; default ``max(20, 2 k + 8)`` and up to m.
    method : {"auto", "iterative", "full"}
        "full", for arrays, computes all pairs. "auto" does so where `eigsh` does.
    throw : bool, default True
        Raise what is listed below, reading one flag. With ``False`` the values are returned as they are.

    Returns
    -------
    (w, v) : (..., k) real array, and (..., m, k) array or (..., \*domain_shape, k) for operators
        Eigenvalues, and eigenvectors that are orthonormal in the inner product of B.
    info : EigshInfo
        ``residual_norm`` is that of ``A v − w B v``, relative to ``‖A v‖ + (|w| + |σ|) ‖B v‖``; ``n_products`` counts
        solves.

    Raises
    ------
    SingularError
        If `sigma` is an eigenvalue to working precision, or an array `b` is not positive definite.
    ConvergenceError
        If `rtol` was not reached within `maxiter`, an input is not finite, or `solve` does not fit.
    GaugeError
        If the k-th eigenvalue equals the next one.
    TypeError, ValueError
        As `eigsh`; no way to solve is known.

    See Also
    --------
    eigh_generalized : all pairs of matrices.

    Notes
    -----
    Lanczos with the map :math:`(A - \sigma B)^{-1} B` in the inner product of B, which reads each of them once per step
    and B four times. What `eigsh` says of repeated eigenvalues holds. Cost: a factorisation, about 20 to 60 solves, and
    ``basis * m`` numbers of memory.

    References
    ----------
    .. [1] T. Ericsson and A. Ruhe, "The spectral transformation Lanczos method for the numerical solution of large
       sparse generalized symmetric eigenvalue problems", Mathematics of Computation 35 (1980).

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.diag([12.0, 2.0, 9.0]), np.diag([4.0, 1.0, 1.0])
    >>> (w, v), info = ddnref.eigsh_generalized(a, b, 2, sigma=0.0)
    >>> np.round(w, 12)
    array([2., 3.])
    """
    options = {"sigma": sigma, "which": which, "solve": solve, "v0": v0, "rtol": rtol, "cluster_rtol": cluster_rtol}
    options |= {"maxiter": maxiter, "basis": basis, "method": method, "check_every": check_every}
    (outputs, _), info = eigsh_generalized_fwd(a, b, k, throw=throw, while_loop=while_loop, **options)  # type: ignore[arg-type]
    return outputs, info


@public
def eigsh_generalized_fwd(
    a: Array | LinearOperator,
    b: Array | LinearOperator,
    /,
    k: int,
    *,
    sigma: float | None = None,
    which: str = "LM",
    solve: Solve | None = None,
    v0: Array | None = None,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    maxiter: int | None = None,
    basis: int | None = None,
    method: str = "auto",
    check_every: int = 1,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[tuple[Array, Array], tuple[Array, Array]], EigshInfo]:
    r"""Compute `eigsh_generalized` and what its reverse pass can use: ``((w, v), (w_rest, v_rest)), info``.

    Parameters and errors are those of `eigsh_generalized`. The arrays ``(..., r)`` and ``(..., m, r)`` or
    ``(..., \*domain_shape, r)`` are leftover Ritz pairs, most wanted first, as in `eigsh_fwd`.
    """
    refuse_recording("eigsh_generalized", **named_arrays(a=a, b=b, v0=v0))
    g = _pencil("eigsh_generalized", a, b, sigma, v0)
    xp, k = namespace_of(g.a.like), operator.index(k)
    p = _basis_size(k, which, method, basis, g.a.m)
    if basis is None:
        p = min(g.a.m, max(20, 2 * k + EXTRA))
    unit = eps(xp, g.a.like.dtype)
    tol = (1e-12 if unit < 1e-10 else 1e-6) if rtol is None else rtol
    arrays = not isinstance(a, LinearOperator)
    if method == "full" and not arrays:
        raise ValueError('method is "full", which needs arrays: pass operator.matrix() for a and b.')
    if arrays and (method == "full" or (method == "auto" and cheaper(g.a.m, k, p, False))):
        found, w, w_rest, singular = _full(g, a, b, k, which)
    else:
        if p < k + 3:
            raise ValueError(f"{g.a.m} entries leave no room for an iteration with k = {k}.")
        invert, singular = _solver(g, a, b, solve)
        if arrays and solve is None:
            singular = singular | _indefinite(b)
        c = _inverted(g, invert)
        plan = Plan(k, which, p, (p + k) // 2, tol)
        options = LoopOptions(tol, MAXITER if maxiter is None else maxiter, check_every, while_loop)
        found = _purified(c, _iterated(c, plan, v0, options))
        w, w_rest = (_back(theta, sigma) for theta in (found.w, found.w_rest))
    n_products = found.n_iter * (p - (p + k) // 2) + k + 2
    residual = _residual(g, w, found.rows)
    converged = found.done & xp.all(residual <= unit**0.5, axis=-1)
    cut = is_cut(found.w, found.w_rest, found.scale, which, cluster_rtol)
    info = EigshInfo(converged, found.n_iter, residual, cut, n_products)
    if throw:
        _raise_forward(info, singular, tol, k)
    return ((w, g.a.columns(found.rows)), (w_rest, g.a.columns(found.rest))), info


class _Pencil(NamedTuple):
    """Both matrices or operators as self-adjoint maps of rows, and the shift."""

    a: SelfAdjoint
    b: SelfAdjoint
    sigma: float | None

    @property
    def shift(self) -> float:
        """The shift, and zero where there is none."""
        return 0.0 if self.sigma is None else float(self.sigma)


def _pencil(function: str, a: Operand, b: Operand, sigma: float | None, like: Array | None) -> _Pencil:
    """Validate both matrices or operators."""
    kinds = [isinstance(x, LinearOperator) for x in (a, b)]
    if not any(kinds):
        conform("(m,m),(m,m)", a=a, b=b)
    elif not all(kinds):
        raise TypeError(
            f"a is a {type(a).__name__} and b a {type(b).__name__}: pass two arrays or two operators. "
            "ddnref.operators.dense makes an operator of an array, from_scipy one of a sparse matrix."
        )
    elif not b.positive_definite:
        raise ValueError("b is not marked as positive definite: pass an operator with positive_definite=True.")
    elif a.domain_shape != b.domain_shape:
        raise ValueError(f"a maps vectors of shape {a.domain_shape}, but b those of shape {b.domain_shape}.")
    maps = [self_adjoint(x, function, like) for x in (a, b)]
    if maps[0].batch != maps[1].batch:
        raise ValueError(f"a has the batch axes {maps[0].batch}, but b {maps[1].batch}.")
    if maps[0].like.dtype != maps[1].like.dtype:
        raise TypeError(f"b has dtype {maps[1].like.dtype}, expected {maps[0].like.dtype}, that of a.")
    return _Pencil(maps[0], maps[1], sigma)


def _inverted(g: _Pencil, invert: Solve) -> SelfAdjoint:
    """The map C, self-adjoint in the inner product of B, from what solves with the matrix to invert."""
    inside = g.a.apply if g.sigma is None else g.b.apply
    return g.a._replace(apply=lambda q: invert(inside(q)), metric=g.b.apply)


def _indefinite(b: Array) -> Array:
    """Return which matrices are finite, but not positive definite."""
    xp, matrix = namespace_of(b), hermitian_part(b)
    return cholesky(xp.where(xp.isfinite(matrix), matrix, identity(b.shape[-1], b)))[1]


def _solver(g: _Pencil, a: Operand, b: Operand, solve: Solve | None) -> tuple[Solve, Array]:
    """Solve with ``A − σ B``, or B without a shift, for rows; and which items are singular."""
    xp, size = namespace_of(g.a.like), g.a.m
    none = xp.sum(real(xp.zeros_like(g.a.like)), axis=tuple(range(len(g.a.batch), g.a.like.ndim))) > 0
    if solve is not None:

        def by_user(rows: Array) -> Array:
            solution = solve(g.a.vectors(rows))
            return move_axis(xp.reshape(solution, (rows.shape[-2], *g.a.batch, size)), 0, -2)

        return by_user, none
    if not isinstance(a, LinearOperator):
        mass = hermitian_part(b)
        lu, pivots, singular = lu_factor(mass if g.sigma is None else hermitian_part(a) - g.sigma * mass)
        return lambda rows: xp.matrix_transpose(lu_solve(lu, pivots, xp.matrix_transpose(rows))), singular
    if a.sparse is None or b.sparse is None or g.a.batch:
        inverse = "B" if g.sigma is None else "A - sigma B"
        raise ValueError(
            f"eigsh_generalized needs to solve systems with {inverse}, but these operators do not say how: pass "
            "solve=, operators of sparse matrices by ddnref.operators.from_scipy or coo, or arrays."
        )
    left, right = a.sparse(a.params), b.sparse(b.params)
    shifted = left - g.sigma * right if g.sigma else left
    direct = factorised(right if g.sigma is None else shifted)
    if direct is None:
        return lambda rows: xp.zeros_like(rows) / 0, ~none
    return direct, none


def _iterated(c: SelfAdjoint, plan: Plan, v0: Array | None, options: LoopOptions) -> Found:
    """`lanczos` for a map and an inner product of any size, whose squares could leave the range of exponents."""
    xp = namespace_of(c.like)
    start = xp.broadcast_to(noise(0, c.m, c.like), (*c.batch, 1, c.m))
    metric: Any = c.metric
    # Powers of two, so that nothing is rounded: of ‖z‖_B² and of ‖C z‖
    mass = power_of_two(metric(start), 2) / power_of_two(start, 2)
    size = power_of_two(c.apply(start), 2) / power_of_two(start, 2)
    unit = c._replace(
        apply=lambda q: c.apply(q) / as_dtype(size, q)[..., None, None],
        metric=lambda q: metric(q) / as_dtype(mass, q)[..., None, None],
    )
    found = lanczos(unit, plan, v0, options)
    length = as_dtype(mass**0.5, found.rows)[..., None, None]
    return found._replace(
        w=found.w * size[..., None], w_rest=found.w_rest * size[..., None], scale=found.scale * size,
        rows=found.rows / length, rest=found.rest / length,
    )  # fmt: skip


def _purified(c: SelfAdjoint, found: Found) -> Found:
    """Apply C once more, which damps the rough parts of the vectors.

    The iteration sees their errors in the norm of B, but A multiplies the rough ones by the largest eigenvalues.
    """
    theta = as_dtype(found.w, found.rows)[..., None]
    xp = namespace_of(theta)
    y = c.apply(found.rows) / xp.where(theta == 0, xp.ones_like(theta), theta)
    y = xp.where(theta == 0, found.rows, y)
    return found._replace(rows=1.5 * y - c.inner(y, y) @ y / 2)  # orthonormal again, by a Newton step


def _back(theta: Array, sigma: float | None) -> Array:
    """Eigenvalues of the pencil from those of C."""
    return theta if sigma is None else float(sigma) + 1 / theta


def _forth(w: Array, sigma: float | None) -> Array:
    """Eigenvalues of C from those of the pencil."""
    return w if sigma is None else 1 / (w - float(sigma))


def _full(g: _Pencil, a: Array, b: Array, k: int, which: str) -> tuple[Found, Array, Array, Array]:
    """Return what the iteration would, from all pairs of two arrays, and the eigenvalues of the pencil."""
    w, v, indefinite = _decomposed(hermitian_part(a), hermitian_part(b))
    xp, theta = namespace_of(w), _forth(w, g.sigma)
    order = xp.argsort(preference(theta, which), axis=-1, descending=True, stable=True)
    # Wanted and other pairs apart, so that neither is a part of a larger array.
    parts = order[..., :k], order[..., k:]
    wanted, others = (xp.take_along_axis(w, part, axis=-1) for part in parts)
    places = (xp.broadcast_to(part[..., None, :], (*v.shape[:-1], part.shape[-1])) for part in parts)
    rows, rest = (xp.matrix_transpose(xp.take_along_axis(v, place, axis=-1)) for place in places)
    done = xp.all(xp.isfinite(w), axis=-1)
    found = Found(
        _forth(wanted, g.sigma), rows, _forth(others, g.sigma), rest, wanted, largest(theta), done,
        xp.zeros_like(done, dtype=xp.int32),
    )  # fmt: skip
    return found, wanted, others, indefinite


def _residual(g: _Pencil, w: Array, rows: Array) -> Array:
    """``‖A v − w B v‖`` relative to ``‖A v‖ + (|w| + |σ|) ‖B v‖``, (..., k)."""
    xp = namespace_of(w)
    left, right = g.a.apply(rows), g.b.apply(rows)
    whole = norm(left) + (xp.abs(w) + abs(g.shift)) * norm(right)
    part = norm(left - as_dtype(w, rows)[..., None] * right)
    return part / xp.where(whole > 0, whole, xp.ones_like(whole))


def _raise_forward(info: EigshInfo, singular: Array, rtol: float, k: int) -> None:
    """Raise what `info` says, reading one flag where all is well."""
    xp = namespace_of(info.cut)
    if is_true(xp.all(info.converged & ~info.cut & ~singular)):
        return
    if is_true(xp.any(singular)):
        raise SingularError(
            f"A - sigma B is singular to working precision, or b is not positive definite{among(singular)}. The most "
            "likely cause is a sigma that is an eigenvalue, such as 0 for a structure that is not held, or a b with "
            "unknowns without mass. Pass another sigma, a little below the wanted eigenvalues; or pass throw=False to "
            "get NaN for these items."
        )
    if is_true(xp.all(info.converged)):
        raise GaugeError(
            f"Eigenvalue {k} equals the next one, which is left out{among(info.cut)}: which eigenvectors of that "
            "cluster come back is arbitrary, and no gradient exists. Pass a k that takes in the whole cluster or none "
            "of it; or pass throw=False to take them as they are (info.cut says where)."
        )
    raise ConvergenceError(
        f"eigsh_generalized did not converge{among(~info.converged)}: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {rtol:.1e}) after {int(xp.max(info.n_iter))} cycles. The most "
        "likely cause is that sigma is far from the wanted eigenvalues, that solve= is not the inverse of A - sigma B, "
        "that b is not positive definite, or that the input is not finite. Pass a closer sigma=, a larger basis= or "
        "maxiter=; or pass throw=False to get the present values and info.converged."
    )


# --- the derivative -------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """The arguments of a derivative, with vectors as rows."""

    pencil: _Pencil
    w: Array
    v: Array
    mass: Array
    """``B v``."""
    w_rest: Array | None
    rest: Array | None


@public
def eigsh_generalized_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    /,
    *saved_and_a_b: Array | LinearOperator,
    sigma: float | None = None,
    which: str = "LM",
    solve: Solve | None = None,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    gauge_rtol: float | None = None,
    check_rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    on_failure: str = "nan",
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array | tuple[Array, ...], Array | tuple[Array, ...]], EigshVjpInfo]:
    r"""Gradients of a loss of k eigenpairs with respect to both matrices, or the parameters of both operators.

    Parameters
    ----------
    w_bar, v_bar, w, v
        Cotangents of the outputs of `eigsh_generalized`, ``None`` for one that the loss does not use, and the outputs.
    *saved_and_a_b
        Either ``a, b`` alone, as given to `eigsh_generalized`, or ``w_rest, v_rest, a, b`` with what
        `eigsh_generalized_fwd` saved, which saves iterations.
    sigma, which, solve
        As given to `eigsh_generalized`.
    rtol, cluster_rtol, gauge_rtol, check_rtol, maxiter, check_every, throw, on_failure, while_loop
        As in `eigsh_vjp`. What counts as equal are eigenvalues no further apart than ``cluster_rtol`` times the largest
        of ``|w|`` and ``|sigma|``.

    Returns
    -------
    (a_bar, b_bar) : exactly Hermitian arrays (..., m, m), or for operators a tuple each, one cotangent per parameter
    info : EigshVjpInfo

    Raises
    ------
    ConvergenceError
        If a solve failed or the pairs given are not eigenpairs.
    GaugeError
        As `eigsh_vjp`.
    TypeError, ValueError
        As `eigsh_vjp`.

    Notes
    -----
    .. math::

        \begin{gathered}
        (\lambda_j B - A) u_j = \bar v_j - B V M_j, \quad V^H B u_j = 0, \quad M = V^H \bar V, \\
        \bar A = \mathrm{sym}(U V^H) + V T V^H, \\
        \bar B = -\mathrm{sym}(U \Lambda V^H) - V (\tfrac12 (T \Lambda + \Lambda T) + \tfrac14 (M + M^H)) V^H
        \end{gathered}

    with T as in `eigh_generalized_vjp`. The systems are solved by conjugate gradients in the inner product of B, each
    step of which takes k solves with the matrix that the forward factorises. With `w_bar` alone nothing is solved.
    Rounding between close eigenvalues is left out as in `eigh_vjp`, with sizes of vectors in the units that they have.

    References
    ----------
    .. [1] R. B. Nelson, "Simplified calculation of eigenvector derivatives", AIAA Journal 14 (1976).

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.diag([12.0, 2.0, 9.0]), np.diag([4.0, 1.0, 1.0])
    >>> (w, v), info = ddnref.eigsh_generalized(a, b, 1, sigma=0.0)
    >>> (a_bar, b_bar), info = ddnref.eigsh_generalized_vjp(np.ones(1), None, w, v, a, b, sigma=0.0)
    >>> np.round(np.diag(a_bar), 12), np.round(np.diag(b_bar), 12)
    (array([0., 1., 0.]), array([ 0., -2.,  0.]))
    """
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    g, v_bar = _problem("eigsh_generalized_vjp", w_bar, v_bar, w, v, saved_and_a_b, sigma, which)
    xp, (a, b) = namespace_of(w), saved_and_a_b[-2:]
    tol = _tolerances(eps(xp, w.dtype), rtol, cluster_rtol, gauge_rtol, check_rtol)
    loop = LoopOptions(tol.solve, max(1000, g.pencil.a.m) if maxiter is None else maxiter, check_every, while_loop)

    # Cotangents over a power of two for each item, because their squares could leave the range of exponents.
    size = full(w.shape[:-1], 0.0, w) if w_bar is None else largest(w_bar)
    size = power_of_two_below(size if v_bar is None else xp.maximum(size, largest(v_bar, 2)))
    v_bar = None if v_bar is None else v_bar / as_dtype(size, v_bar)[..., None, None]
    w_bar = xp.zeros_like(w) if w_bar is None else w_bar / size[..., None]

    # Equal ones of the k must have equal cotangents.
    eigen = xp.all(_residual(g.pencil, g.w, g.v) <= max(tol.check, tol.solve), axis=-1)
    scale = _scale(g)
    same = _same(g.w, tol.cluster * scale)
    bad = are_unequal(w_bar, same, tol.gauge)
    none = xp.zeros_like(w, dtype=xp.int32)
    cut = uses_last_cluster(w_bar, v_bar, same, tol.gauge) & _is_cut(g, scale, tol.cluster, which)
    info = EigshVjpInfo(eigen, none, xp.zeros_like(w), cut)
    diagonal = w_bar / 2
    left, right = (as_dtype(x, g.v)[..., None] * g.v for x in (diagonal, -g.w * diagonal))
    if v_bar is not None:
        m_ = xp.matrix_transpose(inner(v_bar, g.v))
        columns = range(w.shape[-1])
        gap = g.w[..., None, :] - g.w[..., :, None]
        part = antisymmetric_part(m_, columns)
        small = is_rounding(part, norm(v_bar), gap, close_gap(g.w, scale[..., None]), columns, norm(g.v))
        part = left_out(part, small)
        bad = bad | exceeds(*masked(part, m_, same), tol.gauge)
        # Half of each matrix inside the span: P with V P Vᴴ + V Pᴴ Vᴴ, then the part in the complement.
        t = part / as_dtype(4 * xp.where(same, infinity(gap), gap), part)
        mean = as_dtype((g.w[..., None, :] + g.w[..., :, None]) / 2, t)
        u, solves = _solve(g, a, b, v_bar, solve, Method(which, "cg", tol.cluster, loop))
        info = solves._replace(converged=solves.converged & eigen, cut=solves.cut | info.cut)
        left = left + xp.matrix_transpose(t) @ g.v + u / 2
        right = right - xp.matrix_transpose(t * mean + (m_ + adjoint(m_)) / 8) @ g.v
        right = right - as_dtype(g.w, u)[..., None] * u / 2
    if throw:
        _raise_reverse("eigsh_generalized_vjp", info, bad, tol.gauge, tol.solve)
    failed = bad | info.cut if on_failure == "iterate" else bad | info.cut | ~info.converged
    halves = [nan_where(failed[..., None, None], x * as_dtype(size, x)[..., None, None]) for x in (left, right)]
    bars = tuple(_cotangent(x, half, g) for x, half in zip((a, b), halves, strict=True))
    return (bars[0], bars[1]), info


def _cotangent(x: Operand, half: Array, g: _Problem) -> Any:
    """The cotangent ``H Vᴴ + V Hᴴ`` of a matrix, or those of the parameters of an operator."""
    xp, maps = namespace_of(half), g.pencil.a
    if not isinstance(x, LinearOperator):
        return hermitian_sum(xp.matrix_transpose(half), xp.matrix_transpose(g.v))
    # Re Σ_j ⟨2 h_j, Ẋ v_j⟩: as Ẋ is self-adjoint, X̄ need not be symmetrised.
    return x.params_vjp(x.params, maps.vectors(2 * half), maps.vectors(g.v))


@public
def eigsh_generalized_jvp(
    a_dot: Array | tuple[Array | None, ...] | None,
    b_dot: Array | tuple[Array | None, ...] | None,
    w: Array,
    v: Array,
    /,
    *saved_and_a_b: Array | LinearOperator,
    sigma: float | None = None,
    which: str = "LM",
    solve: Solve | None = None,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    gauge_rtol: float | None = None,
    check_rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    on_failure: str = "nan",
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array, Array], EigshVjpInfo]:
    r"""Derivative of k eigenpairs along a direction of both matrices or operators.

    Parameters
    ----------
    a_dot, b_dot : (..., m, m) array, or a tuple of arrays, or None
        Directions as in `eigsh_jvp`; ``None`` for what does not move.
    w, v, *saved_and_a_b, sigma, which, solve
        As in `eigsh_generalized_vjp`.
    rtol, cluster_rtol, gauge_rtol, check_rtol, maxiter, check_every, throw, on_failure, while_loop
        As in `eigsh_jvp`.

    Returns
    -------
    w_dot, v_dot : (..., k) real array and (..., \*shape, k) array
    info : EigshVjpInfo

    Raises
    ------
    ConvergenceError, GaugeError, TypeError, ValueError
        As `eigsh_jvp`.

    Notes
    -----
    With R and Q of `eigh_generalized_jvp` for the k vectors,

    .. math::

        \begin{gathered}
        (\lambda_j B - A) u_j = (I - B V V^H)(\dot A - \lambda_j \dot B) v_j, \\
        \dot\lambda = \mathrm{diag}(R), \qquad \dot V = V (F \circ R - \tfrac12 Q) + U
        \end{gathered}

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.diag([12.0, 2.0, 9.0]), np.diag([4.0, 1.0, 1.0])
    >>> (w, v), info = ddnref.eigsh_generalized(a, b, 1, sigma=0.0)
    >>> (w_dot, v_dot), info = ddnref.eigsh_generalized_jvp(None, np.eye(3), w, v, a, b, sigma=0.0)  # 2 / (1 + t)
    >>> np.round(w_dot, 12)
    array([-2.])
    """
    if a_dot is None and b_dot is None:
        raise TypeError("a_dot and b_dot are both None: there is no direction.")
    g, _ = _problem("eigsh_generalized_jvp", None, None, w, v, saved_and_a_b, sigma, which)
    xp, (a, b) = namespace_of(w), saved_and_a_b[-2:]
    tol = _tolerances(eps(xp, w.dtype), rtol, cluster_rtol, gauge_rtol, check_rtol)
    loop = LoopOptions(tol.solve, max(1000, g.pencil.a.m) if maxiter is None else maxiter, check_every, while_loop)

    # Directions over a power of two for each item, because squares could leave the range of exponents.
    images = []
    for name, dot, x in (("a_dot", a_dot, a), ("b_dot", b_dot, b)):
        moves = dot is not None
        images.append(motion(dot, x, v, name, "eigsh_generalized_jvp").apply(g.v) if moves else xp.zeros_like(g.v))
    size = power_of_two_below(xp.maximum(*(largest(x, 2) for x in images)))
    left, right = (x / as_dtype(size, x)[..., None, None] for x in images)
    moved = left - as_dtype(g.w, left)[..., None] * right
    eigen = xp.all(_residual(g.pencil, g.w, g.v) <= max(tol.check, tol.solve), axis=-1)
    scale = _scale(g)
    same = _same(g.w, tol.cluster * scale)
    gap = g.w[..., None, :] - g.w[..., :, None]
    q = hermitian_part(xp.matrix_transpose(inner(right, g.v)))
    r = hermitian_part(xp.matrix_transpose(inner(moved, g.v)) + q * as_dtype(gap / 2, q))
    w_dot = real(xp.linalg.diagonal(r))

    # Equal ones of the k must move together, and the k-th must not equal the next one.
    whole = xp.maximum(largest(inner(left, g.v), 2), largest(g.w) * largest(q, 2))
    split = split_among(r, same, whole, tol.gauge)
    cut = scale < 0
    if g.w_rest is not None and tol.gauge < float("inf"):
        cut = _is_cut(g, scale, tol.cluster, which)
    omega = r / as_dtype(xp.where(same, infinity(gap), gap), r) - q / 2
    u, info = _solve(g, a, b, moved, solve, Method(which, "cg", tol.cluster, loop))
    info = info._replace(converged=info.converged & eigen, cut=info.cut | cut)
    if throw and is_true(xp.any(split.bad | info.cut | ~info.converged)):
        if is_true(xp.any(split.bad)) and not is_true(xp.any(info.cut)):
            raise_split(split, g.w, tol.gauge)
        _raise_reverse("eigsh_generalized_jvp", info, split.bad, tol.gauge, tol.solve)
    failed = split.bad | info.cut
    failed = failed if on_failure == "iterate" else failed | ~info.converged
    rows = xp.matrix_transpose(omega) @ g.v + u
    v_dot = g.pencil.a.columns(nan_where(failed[..., None, None], rows * as_dtype(size, rows)[..., None, None]))
    return (nan_where(failed[..., None], w_dot * size[..., None]), v_dot), info


def _problem(
    function: str,
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    saved_and_a_b: tuple[Operand, ...],
    sigma: float | None,
    which: str,
) -> tuple[_Problem, Array | None]:
    """Validate the arguments and bring all vectors into rows, those of `v_bar` too."""
    if len(saved_and_a_b) not in (2, 4):
        raise TypeError(f"after w, v come a, b, or w_rest, v_rest, a, b; got {len(saved_and_a_b)} arguments.")
    if which not in ("LM", "LA", "SA"):
        raise ValueError(f'which is {which!r}, expected "LM", "LA" or "SA".')
    a, b = saved_and_a_b[-2:]
    w_rest, v_rest = saved_and_a_b[:2] if len(saved_and_a_b) == 4 else (None, None)
    if isinstance(w_rest, LinearOperator) or isinstance(v_rest, LinearOperator):
        raise TypeError("a and b, the operators, come last, after w_rest and v_rest.")
    named: dict[str, Any] = {}
    for name, x in (("a", a), ("b", b)):
        params = x.params if isinstance(x, LinearOperator) else (x,)
        named |= {f"{name}.params[{i}]" if isinstance(x, LinearOperator) else name: p for i, p in enumerate(params)}
    given(w=w, v=v, **named)  # they follow *, so that `public` cannot know them
    if len(saved_and_a_b) == 4:
        given(w_rest=w_rest, v_rest=v_rest)
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, w_rest=w_rest, v_rest=v_rest, **named)
    check_pair_dtypes(xp, w_bar, v_bar, w, v, w_rest, v_rest)
    pencil = _pencil(function, a, b, sigma, v[..., 0])
    maps = pencil.a
    check_pair_shapes(maps, w_bar, v_bar, w, v, w_rest, v_rest)
    rows = maps.rows(v)
    bar, rest = (None if x is None else maps.rows(x) for x in (v_bar, v_rest))
    return _Problem(pencil, w, rows, pencil.b.apply(rows), w_rest, rest), bar


def _scale(g: _Problem) -> Array:
    """The largest of the k magnitudes and of the shift, to which gaps are compared."""
    return namespace_of(g.w).maximum(largest(g.w), full((), abs(g.pencil.shift), g.w))


def _is_cut(g: _Problem, scale: Array, cluster_rtol: float, which: str) -> Array:
    """Whether the k-th eigenvalue equals the next one."""
    if g.w_rest is None or g.w_rest.shape[-1] == 0:
        return scale < 0
    theta, rest = (_forth(x, g.pencil.sigma) for x in (g.w, g.w_rest))
    return is_cut(theta, rest, largest(theta), which, cluster_rtol)


def _solve(
    g: _Problem, a: Operand, b: Operand, vectors: Array, solve: Solve | None, method: Method
) -> tuple[Array, EigshVjpInfo]:
    """Rows ``u_j`` with ``(λ_j B − A) u_j = r_j − B V Vᴴ r_j`` and ``Vᴴ B u_j = 0``."""
    xp, outside = namespace_of(g.w), vectors
    for _ in range(2):
        outside = outside - inner(outside, g.v) @ g.mass
    # Only rounding counts as zero.
    small = norm(outside) <= 8 * eps(xp, vectors.dtype) * xp.maximum(norm(vectors), norm(vectors - outside))
    outside = xp.where(small[..., None], xp.zeros_like(outside), outside)
    if g.rest is not None and g.w_rest is not None and g.rest.shape[-2] == g.pencil.a.m - g.w.shape[-1]:
        # All other pairs are known.
        gap = g.w[..., :, None] - g.w_rest[..., None, :]
        near = xp.abs(gap) <= method.cluster_rtol * _scale(g)[..., None, None]
        parts = inner(outside, g.rest)
        u = (parts / as_dtype(xp.where(near, infinity(gap), gap), parts)) @ g.rest
        done = xp.all(xp.isfinite(g.w), axis=-1)
        return u, EigshVjpInfo(done, xp.zeros_like(g.w, dtype=xp.int32), xp.zeros_like(g.w), ~done & done)
    invert, _ = _solver(g.pencil, a, b, solve)
    c = _inverted(g.pencil, invert)
    theta = _forth(g.w, g.pencil.sigma)
    f = invert(outside)
    f = f if g.pencil.sigma is None else -as_dtype(theta, f)[..., None] * f
    rest = None if g.w_rest is None else _forth(g.w_rest, g.pencil.sigma)
    return solved(c.without(f, g.v), Complement(c, theta, g.v, largest(theta), rest, g.rest), method)


def _raise_reverse(function: str, info: EigshVjpInfo, bad: Array, gauge_rtol: float, rtol: float) -> None:
    """Raise what the flags say, reading one where all is well."""
    xp = namespace_of(bad)
    if not is_true(xp.any(bad | info.cut | ~info.converged)):
        return
    if is_true(xp.any(info.cut)):
        raise GaugeError(
            f"What {function} differentiates depends on a cluster of equal eigenvalues{among(info.cut)} of which the "
            "k-th is inside and the next outside: it has no derivative. Pass a k that takes in the whole cluster or "
            "none of it; or pass throw=False to get NaN for these items."
        )
    if is_true(xp.any(bad)):
        raise GaugeError(
            f"The loss given to {function} depends on a choice that the matrices do not determine{among(bad)}, by more "
            f"than gauge_rtol {gauge_rtol:.1e}. The most likely cause is that it treats eigenpairs inside a cluster of "
            "equal eigenvalues individually, or depends on the phase of a complex eigenvector; no gradient exists "
            "there. Write it through V_c V_cᴴ; or pass throw=False to get NaN for these items, gauge_rtol=inf to "
            "accept the masked gradient."
        )
    _raise_unsolved(function, info, rtol)


def _raise_unsolved(function: str, info: EigshVjpInfo, rtol: float) -> NoReturn:
    xp = namespace_of(info.converged)
    raise ConvergenceError(
        f"{function} did not converge{among(~info.converged)}: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {rtol:.1e}) after {int(xp.max(info.n_iter))} iterations. The "
        "most likely cause is that w and v are not the eigenpairs of a and b that sigma= and which= say, that solve= "
        "is not exact, that the k-th eigenvalue is very close to the next, or that the input is not finite. Pass the "
        "pairs that eigsh_generalized_fwd saved, a larger maxiter= or rtol=; or pass throw=False to get NaN for these "
        "items and info.converged."
    )
