"""The k most wanted eigenpairs of a matrix or an operator, without the other m − k, and their derivatives.

The gradient comes from solves on the complement of the eigenvectors. With ``P = I − V Vᴴ``, ``M = Vᴴ V̄`` and
``F_ij = 1 / (λ_j − λ_i)`` between distinct ones of the k, 0 elsewhere,

    (λ_j I − X) w_j = P v̄_j   on range(P),        X̄ = sym(W Vᴴ + V (F ∘ M) Vᴴ) + V diag(λ̄) Vᴴ.

All other eigenvalues lie on one side of each λ_j, so each system is definite, for the largest magnitudes too. The JVP
solves the same systems, with ``Ẋ V`` for V̄, and with ``S = Vᴴ Ẋ V``

    (λ_j I − X) u_j = P Ẋ v_j   on range(P),        λ̇ = diag(S),        V̇ = V (F ∘ S) + U.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple, NoReturn

from ddnref._core.arrays import (
    Array,
    Namespace,
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
    real_dtype,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, given
from ddnref._core.loops import CHECK_EVERY, LoopOptions, WhileLoop
from ddnref._core.noise import noise
from ddnref._core.selection import take
from ddnref._kernels.dense import constant, eigh, hermitian_part, hermitian_sum, identity, infinity
from ddnref._kernels.eigh_jvp import Split, cluster_means
from ddnref._kernels.eigh_vjp import antisymmetric_part, close_gap, exceeds, is_rounding, left_out, masked
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, norm, power_of_two
from ddnref.errors import ConvergenceError, GaugeError
from ddnref.linalg._complement import (
    Complement,
    EigshVjpInfo,
    Method,
    Solve,
    in_complement,
    motion,
    raise_unsolved,
    solved,
)
from ddnref.linalg._eigh import raise_split
from ddnref.linalg._lanczos import Found, Plan, lanczos, preference
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import SelfAdjoint, inner, self_adjoint

WHICH = ("LA", "SA", "LM")
METHODS = ("auto", "iterative", "full")
SOLVERS = ("auto", "cg", "direct")
MAXITER = 1000  # cycles
CLUSTER_RTOL = 32  # · eps · ‖A‖: exact repeats come out split by at most 10, with LAPACK (see _eigh.py) by 1
FULL_UP_TO = 512  # measured: see `cheaper`
DIRECT_UP_TO = 256  # columns of a matrix whose systems are factorised


class EigshInfo(NamedTuple):
    """Status of `eigsh`, for each item of the batch."""

    converged: Array
    """Whether all k residuals reached `rtol` and a last check found no further copy, ``(...)``."""
    n_iter: Array
    """Cycles of the iteration, ``(...)``; 0 where the whole spectrum was computed."""
    residual_norm: Array
    """``‖A v − λ v‖`` relative to ‖A‖, recomputed, ``(..., k)``."""
    cut: Array
    """Whether the k-th eigenvalue equals the next one, which is left out, ``(...)``: no derivative exists there."""
    n_products: Array
    """Products of A with one vector, ``(...)``."""


@public
def eigsh(
    x: Array | LinearOperator,
    /,
    k: int,
    *,
    which: str = "LA",
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
    r"""The k largest, smallest or largest-in-magnitude eigenpairs, most wanted first.

    Parameters
    ----------
    x : (..., m, m) array, real or complex floating, or self-adjoint LinearOperator
        An array is symmetrised as in `eigh`. An operator must be self-adjoint for all values of its parameters, which
        is not checked.
    k : int
        How many, ``1 <= k <= m``.
    which : {"LA", "SA", "LM"}
        The largest eigenvalues, descending; the smallest, ascending; the largest magnitudes, descending.
    v0 : (..., m) or (..., \*domain_shape) array, optional
        Where to start; default a random vector with a fixed seed. An operator's batch axes are those of `v0`, or
        else those that its parameters give to the image of one vector.
    rtol : float, optional
        Largest accepted residual ``‖A v − λ v‖ / ‖A‖``; default 1e-12, and 1e-6 in single precision. An eigenvector
        is then as accurate as ``rtol * ‖A‖ / gap``, an eigenvalue twice as many digits.
    cluster_rtol : float, optional
        Eigenvalues no further apart than ``cluster_rtol * ‖A‖`` count as equal; default ``32 * eps``,
        twice that of `eigh_vjp`: an iteration splits exact repeats by up to 10 eps.
    maxiter : int, optional
        Most cycles of ``(basis - k) / 2`` products; default 1000.
    basis : int, optional
        Vectors held at once; default ``max(32, 3 k)`` and up to m. Larger: fewer products, more memory.
    method : {"auto", "iterative", "full"}
        "full" computes the whole spectrum (an operator as a matrix). "auto" does so where that is usually faster: for a
        dense matrix with m ≤ 512 or k > m / 128, and wherever ``basis >= m``.
    check_every : int, default 1
        Cycles between two checks of the flag that ends the loop, each of which reads it on the host.
    throw : bool, default True
        Raise what `info` says. With ``False`` the values are returned as they are.
    while_loop : callable, optional
        ``jax.lax.while_loop`` under ``jax.jit`` (with ``throw=False``).

    Returns
    -------
    (w, v) : (..., k) real array, and (..., m, k) array or (..., \*domain_shape, k) for an operator
        Eigenvalues and orthonormal eigenvectors.
    info : EigshInfo

    Raises
    ------
    ConvergenceError
        If `rtol` was not reached within `maxiter`, or `x` is not finite.
    GaugeError
        If the k-th eigenvalue equals the next one: which of its eigenvectors come back is arbitrary.
    TypeError, ValueError
        As `eigh`; `k`, `which`, `method`, `basis` out of range; an operator not marked as self-adjoint.

    Notes
    -----
    Thick-restart Lanczos [1]_ with every vector orthogonalised twice. *Repeated eigenvalues* come with their
    multiplicity: when k pairs have converged, the iteration is continued in their orthogonal complement from a new
    random vector, and ends only when that finds nothing that belongs to them. That is a probabilistic statement: a
    copy whose component in that vector is below rounding would be missed.

    Cost: (2 m² + 8 m basis) flops per product, ``basis * m`` numbers of memory. An eigenvalue that is very close to
    its neighbours, relative to the whole spectrum, takes many cycles.

    References
    ----------
    .. [1] K. Wu and H. Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
       Anal. Appl. 22 (2000), algorithm 1.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), info = ddnref.eigsh(np.diag(np.asarray([1.0, 4.0, 2.0])), 2)
    >>> w
    array([4., 2.])
    """
    options = {"which": which, "v0": v0, "rtol": rtol, "cluster_rtol": cluster_rtol, "maxiter": maxiter}
    options |= {"basis": basis, "method": method, "check_every": check_every, "while_loop": while_loop}
    (outputs, _), info = eigsh_fwd(x, k, throw=throw, **options)  # type: ignore[arg-type]
    return outputs, info


@public
def eigsh_fwd(
    x: Array | LinearOperator,
    /,
    k: int,
    *,
    which: str = "LA",
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
    r"""Compute `eigsh` and what its reverse pass can use: ``((w, v), (w_rest, v_rest)), info``.

    Parameters and errors are those of `eigsh`. The arrays ``(..., r)`` and ``(..., m, r)`` or
    ``(..., \*domain_shape, r)`` are leftover Ritz pairs, most wanted first; the first value is that of the eigenvalue
    next to the k. After a full decomposition they are all others, ``r = m - k``, and the derivative needs no solve.
    """
    refuse_recording("eigsh", **named_arrays(x=x, v0=v0))  # PyTorch would record the iteration
    a = self_adjoint(x, "eigsh", v0)  # one form for matrices and operators
    xp = namespace_of(a.like)
    p = _basis_size(operator.index(k), which, method, basis, a.m)
    tol = (1e-12 if eps(xp, a.like.dtype) < 1e-10 else 1e-6) if rtol is None else rtol
    if method == "full" or (method == "auto" and cheaper(a.m, k, p, isinstance(x, LinearOperator))):
        found = _full(a, k, which)
        n_products = found.n_iter + a.m
    else:
        # Iterate with A over a power of two, because squares of ‖A v‖ could leave the range of exponents.
        image = a.apply(xp.broadcast_to(noise(0, a.m, a.like), (*a.batch, 1, a.m)))
        size = power_of_two(image, 2)
        unit = a._replace(apply=lambda q: a.apply(q) / as_dtype(size, q)[..., None, None])
        plan = Plan(k, which, p, (p + k) // 2, tol)  # a restart keeps half of the vectors beside the k
        options = LoopOptions(tol, MAXITER if maxiter is None else maxiter, check_every, while_loop)
        found = lanczos(unit, plan, v0, options)
        w, w_rest = found.w * size[..., None], found.w_rest * size[..., None]  # undo the scaling
        found = found._replace(w=w, w_rest=w_rest, scale=found.scale * size)
        n_products = found.n_iter * (p - plan.l) + k + 2
    cut = is_cut(found.w, found.w_rest, found.scale, which, cluster_rtol)
    info = EigshInfo(found.done, found.n_iter, found.residual, cut, n_products)
    if throw:
        _raise_forward(info, tol, k)
    return ((found.w, a.columns(found.rows)), (found.w_rest, a.columns(found.rest))), info


def _basis_size(k: int, which: str, method: str, basis: int | None, m: int) -> int:
    """Validate the static options; return the number of vectors that the iteration holds."""
    if which not in WHICH:
        raise ValueError(f'which is {which!r}, expected "LA" (largest), "SA" (smallest) or "LM" (largest magnitude).')
    if method not in METHODS:
        raise ValueError(f'method is {method!r}, expected "auto", "iterative" or "full".')
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}, expected 1 <= k <= {m} for vectors with {m} entries.")
    if basis is not None and not k + 3 <= basis:
        raise ValueError(f"basis is {basis}, expected at least k + 3 = {k + 3}.")
    p = min(m, max(32, 3 * k) if basis is None else basis)  # the default of `basis`
    if method == "iterative" and p < k + 3:
        raise ValueError(f'{m} entries leave no room for an iteration with k = {k}; pass method="full".')
    return p


def cheaper(m: int, k: int, p: int, is_operator: bool) -> bool:
    """Whether the whole spectrum takes less time than k pairs and their derivative; nothing else decides on that."""
    return p >= m or (not is_operator and (m <= FULL_UP_TO or 128 * k > m))


def is_cut(w: Array, w_rest: Array, scale: Array, which: str, cluster_rtol: float | None) -> Array:
    """Whether the k-th eigenvalue equals the next one within `cluster_rtol`."""
    if w_rest.shape[-1] == 0:  # all eigenvalues are among the k: never, even for NaN
        return w[..., -1] != w[..., -1]
    rtol = CLUSTER_RTOL * eps(namespace_of(w), w.dtype) if cluster_rtol is None else cluster_rtol
    return preference(w, which)[..., -1] - preference(w_rest, which)[..., 0] <= rtol * scale


def _full(a: SelfAdjoint, k: int, which: str) -> Found:
    """Return what `lanczos` would, from the whole spectrum."""
    w, v = eigh(a.matrix())
    xp = namespace_of(w)
    scale = xp.max(xp.abs(w), axis=-1)  # ‖A‖
    if which == "LM":
        order = xp.argsort(xp.abs(w), axis=-1, descending=True, stable=True)
        w = xp.take_along_axis(w, order, axis=-1)
        v = xp.take_along_axis(v, xp.broadcast_to(order[..., None, :], v.shape), axis=-1)
    # Eigh is ascending; "SA" and the order above are first to last.
    columns = range(a.m - 1, -1, -1) if which == "LA" else range(a.m)
    wanted, others = columns[:k], columns[k:]
    w, w_rest, rows, rest = take(w, wanted, -1), take(w, others, -1), take(v, wanted, -1), take(v, others, -1)
    rows, rest = xp.matrix_transpose(rows), xp.matrix_transpose(rest)
    residual = norm(a.apply(rows) - as_dtype(w, rows)[..., None] * rows)  # recomputed, as the iteration does
    residual = residual / xp.where(scale > 0, scale, xp.ones_like(scale))[..., None]
    done = xp.all(residual < float("inf"), axis=-1)  # false for NaN
    return Found(w, rows, w_rest, rest, residual, scale, done, xp.zeros_like(done, dtype=xp.int32))


def _raise_forward(info: EigshInfo, rtol: float, k: int) -> None:
    """Raise what `info` says, reading one flag where all is well."""
    xp = namespace_of(info.cut)
    if is_true(xp.all(info.converged & ~info.cut)):
        return
    if is_true(xp.all(info.converged)):
        raise GaugeError(
            f"Eigenvalue {k} equals the next one, which is left out{among(info.cut)}: which eigenvectors of that "
            "cluster come back is arbitrary, and no gradient exists. The most likely cause is a symmetric problem, a "
            "zero matrix or a k inside a multiplet. Pass a k that takes in the whole cluster or none of it; or pass "
            "throw=False to take them as they are (info.cut says where)."
        )
    failed = int(xp.sum(xp.astype(~info.converged, xp.int32)))
    raise ConvergenceError(
        f"eigsh did not converge for {failed} item(s) of the batch{among(~info.converged)}: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {rtol:.1e}) after {int(xp.max(info.n_iter))} cycles. The most "
        "likely cause is that the wanted eigenvalues are close to each other or to the next ones relative to the "
        "whole spectrum, that rtol is below rounding, or that the input is not finite. Pass a larger basis= or "
        'maxiter=, a larger rtol=, or method="full"; or pass throw=False to get the present values and info.converged.'
    )


# --- the derivative -------------------------------------------------------------------------------------------------


class _Problem(NamedTuple):
    """The arguments of the derivative, with vectors as rows."""

    x: Array | LinearOperator
    a: SelfAdjoint
    which: str
    w: Array
    v: Array
    w_bar: Array
    v_bar: Array | None
    w_rest: Array | None
    rest: Array | None


class _Tolerances(NamedTuple):
    """Relative tolerances, as in the options of `eigsh_vjp`."""

    solve: float
    cluster: float
    gauge: float
    check: float


@public
def eigsh_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    /,
    *saved_and_x: Array | LinearOperator,
    which: str = "LA",
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    gauge_rtol: float | None = None,
    check_rtol: float | None = None,
    maxiter: int | None = None,
    solver: str = "auto",
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    on_failure: str = "nan",
    while_loop: WhileLoop | None = None,
    solve: Solve | None = None,
) -> tuple[Array | tuple[Array, ...], EigshVjpInfo]:
    r"""Gradient of a loss of k extremal eigenpairs, without the other m − k.

    Parameters
    ----------
    w_bar, v_bar, w, v
        Cotangents of the outputs of `eigsh`, ``None`` for one that the loss does not use, and the outputs themselves.
    *saved_and_x
        Either ``x`` alone, the array or operator given to `eigsh`, or ``w_rest, v_rest, x`` with what `eigsh_fwd`
        saved. These halve the iterations or better, need none after a full decomposition, and show a cut cluster in
        `w_bar` too.
    which
        As given to `eigsh`.
    rtol : float, optional
        Largest accepted residual of a solve, relative to its right-hand side; default 1e-10, and 1e-6 in single
        precision. A residual at rounding level of the solution is accepted as well.
    cluster_rtol, gauge_rtol : float, optional
        ``rtol`` (default ``32 * eps``, as in `eigsh`) and ``gauge_rtol`` of `eigh_vjp`.
    check_rtol : float, optional
        Pairs with a residual above ``check_rtol * ‖A‖`` are refused: they are not those of `x`; default ``sqrt(eps)``.
    maxiter : int, optional
        Most iterations of conjugate gradients; default ``max(1000, m)``.
    solver : {"auto", "cg", "direct"}
        "cg" needs only products with `x`; "direct" solves k dense systems. "auto": nothing to solve if all other
        pairs were saved, "direct" for a dense matrix with m ≤ 256, else "cg".
    check_every, while_loop
        As in `eigsh`, counting iterations.
    throw : bool, default True
        Raise what `info` says, reading one flag. With ``False`` the gradient of a failed item is NaN.
    on_failure : {"nan", "iterate"}
        With ``throw=False``: what becomes of an item whose solves have not converged. "iterate" goes on with the last
        iterate, as if it had converged.
    solve : callable, optional
        For bridges: the function that solves the systems, made differentiable, so that this derivative can be
        differentiated again.

    Returns
    -------
    x_bar : (..., m, m) array, exactly Hermitian; for an operator a tuple, one cotangent for each of its parameters
    info : EigshVjpInfo

    Raises
    ------
    ConvergenceError
        If a solve failed or the pairs given are not eigenpairs of `x`.
    GaugeError
        As `eigh_vjp`, whose note on equal eigenvalues holds here as well; and if the k-th eigenvalue cuts a cluster
        that the loss depends on.
    TypeError, ValueError
        As `eigh_vjp`.

    Notes
    -----
    With :math:`P = I - V V^H` and F zero between equal eigenvalues,

    .. math:: (\lambda_j I - X) w_j = P \bar v_j, \qquad
        \bar X = \mathrm{sym}(W V^H + V (F \circ V^H \bar V) V^H) + V \mathrm{diag}(\bar\lambda) V^H

    Rounding between close ones of the k is left out as in `eigh_vjp`.

    Cost: one product with a block of k vectors per iteration, and about ``sqrt(‖A‖ / gap)`` iterations, where gap is
    that from the k-th to the next eigenvalue, or to the last saved one. Without the saved pairs and without `v_bar`, a
    cut cluster cannot be seen here, but in ``info.cut`` of `eigsh`, which raises by default.

    References
    ----------
    .. [1] S.-K. Xie, H.-J. Liao and L. Wang, "Automatic differentiation of dominant eigensolver and its applications
       in quantum physics", Phys. Rev. B 101 (2020), section III.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([1.0, 4.0, 2.0]))
    >>> (w, v), info = ddnref.eigsh(x, 1)
    >>> ddnref.eigsh_vjp(np.ones(1), None, w, v, x)[0]  # of the largest eigenvalue
    array([[0., 0., 0.],
           [0., 1., 0.],
           [0., 0., 0.]])
    """
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    g = _problem("eigsh_vjp", w_bar, v_bar, w, v, saved_and_x, which, solver)  # validated, vectors as rows
    xp, x = namespace_of(w), saved_and_x[-1]
    tol = _tolerances(eps(xp, w.dtype), rtol, cluster_rtol, gauge_rtol, check_rtol)
    loop = LoopOptions(tol.solve, max(1000, g.a.m) if maxiter is None else maxiter, check_every, while_loop)
    method = Method(which, _chosen_solver(solver, g.a, x), tol.cluster, loop)

    # Cotangents over a power of two for each item, because their squares could leave the range of exponents.
    size = largest(g.w_bar) if g.v_bar is None else xp.maximum(largest(g.w_bar), largest(g.v_bar, 2))
    size = power_of_two_below(size)
    unit_v_bar = None if g.v_bar is None else g.v_bar / as_dtype(size, g.v_bar)[..., None, None]
    g = g._replace(w_bar=g.w_bar / size[..., None], v_bar=unit_v_bar)
    half, info, bad = _half(g, tol, method, solve)  # X̄ = B Vᴴ + V Bᴴ
    if throw:
        _raise_reverse(info, bad, tol)
    failed = bad | info.cut if on_failure == "iterate" else bad | info.cut | ~info.converged
    half = nan_where(failed[..., None, None], half * as_dtype(size, half)[..., None, None])

    if not isinstance(x, LinearOperator):
        return hermitian_sum(xp.matrix_transpose(half), xp.matrix_transpose(g.v)), info
    # Re Σ_j ⟨2 b_j, Ẋ v_j⟩: as Ẋ is self-adjoint, X̄ need not be symmetrised.
    return x.params_vjp(x.params, g.a.vectors(2 * half), g.a.vectors(g.v)), info


@public
def eigsh_jvp(
    x_dot: Array | tuple[Array | None, ...],
    w: Array,
    v: Array,
    /,
    *saved_and_x: Array | LinearOperator,
    which: str = "LA",
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    gauge_rtol: float | None = None,
    check_rtol: float | None = None,
    maxiter: int | None = None,
    solver: str = "auto",
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    on_failure: str = "nan",
    while_loop: WhileLoop | None = None,
    solve: Solve | None = None,
) -> tuple[tuple[Array, Array], EigshVjpInfo]:
    r"""Derivative of k extremal eigenpairs along a direction, without the other m − k.

    Parameters
    ----------
    x_dot : (..., m, m) array, or a tuple of arrays
        The direction of a matrix, whose Hermitian part counts; for an operator one direction for each of its
        parameters, ``None`` for one that does not move.
    w, v, *saved_and_x
        The outputs of `eigsh`, then ``x`` alone or ``w_rest, v_rest, x``, as in `eigsh_vjp`.
    which, rtol, cluster_rtol, check_rtol, maxiter, solver, check_every, on_failure, while_loop, solve
        As in `eigsh_vjp`.
    gauge_rtol : float, optional
        By how much the direction may split equal ones of the k, as in `eigh_jvp`.
    throw : bool, default True
        Raise what `info` says, and `GaugeError`, reading one flag. With ``False`` the derivatives of a failed item are
        NaN.

    Returns
    -------
    w_dot, v_dot : (..., k) real array and (..., \*shape, k) array
        Derivatives of the outputs of `eigsh`, each ``v_dot[..., i]`` orthogonal to its eigenvector.
    info : EigshVjpInfo
        Of the systems below.

    Raises
    ------
    ConvergenceError
        If a solve failed or the pairs given are not eigenpairs of `x`.
    GaugeError
        If the direction splits equal ones of the k, or the k-th one cuts a cluster.
    TypeError, ValueError
        As `eigsh_vjp`; nothing moves; an operator without ``params_jvp``.

    Notes
    -----
    With :math:`P = I - V V^H`, :math:`S = V^H \dot X V`, and F as in `eigh_jvp`,

    .. math:: (\lambda_j I - X) u_j = P \dot X v_j, \qquad \dot\lambda = \mathrm{diag}(S), \qquad
        \dot V = V (F \circ S) + U

    Cost: one product with the direction for each pair, and the solves of `eigsh_vjp`. With the saved pairs a cluster
    that the k-th one cuts is refused whatever the direction, because what moves its other part is not seen here.
    Without them it is noticed only where the direction couples both parts, but ``info.cut`` of `eigsh`, which raises by
    default, shows it.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([1.0, 4.0, 2.0]))
    >>> (w, v), info = ddnref.eigsh(x, 1)
    >>> (w_dot, v_dot), info = ddnref.eigsh_jvp(np.diag(np.asarray([5.0, 6.0, 7.0])), w, v, x)
    >>> np.round(w_dot, 12)
    array([6.])
    """
    if x_dot is None:
        raise TypeError("x_dot is None: there is no direction.")
    g = _problem("eigsh_jvp", None, None, w, v, saved_and_x, which, solver)
    xp, x = namespace_of(w), saved_and_x[-1]
    tol = _tolerances(eps(xp, w.dtype), rtol, cluster_rtol, gauge_rtol, check_rtol)
    loop = LoopOptions(tol.solve, max(1000, g.a.m) if maxiter is None else maxiter, check_every, while_loop)
    method = Method(which, _chosen_solver(solver, g.a, x), tol.cluster, loop)

    # Ẋ V over a power of two for each item, because squares could leave the range of exponents.
    image = motion(x_dot, x, v).apply(g.v)
    size = power_of_two(image, 2)
    g = g._replace(v_bar=image / as_dtype(size, image)[..., None, None])
    w_dot, rows, info, split = _tangents(g, tol, method, solve)
    if throw and is_true(xp.any(split.bad | info.cut | ~info.converged)):
        _raise_tangents(info, split, g.w, tol)
    failed = split.bad | info.cut
    failed = failed if on_failure == "iterate" else failed | ~info.converged
    v_dot = g.a.columns(nan_where(failed[..., None, None], rows * as_dtype(size, rows)[..., None, None]))
    return (nan_where(failed[..., None], w_dot * size[..., None]), v_dot), info


def _tangents(
    g: _Problem, tol: _Tolerances, method: Method, solve: Solve | None
) -> tuple[Array, Array, EigshVjpInfo, Split]:
    """Tangents of the eigenvalues and, as rows, of the eigenvectors; how the solves went, and what was split."""
    xp = namespace_of(g.w)
    scale, eigen = _check_pairs(g, max(tol.check, tol.solve))
    same = _same(g.w, tol.cluster * scale)
    s = hermitian_part(xp.matrix_transpose(inner(g.v_bar, g.v)))
    w_dot = real(xp.linalg.diagonal(s))

    # Equal ones of the k must move together, and the k-th must not equal the next one.
    split = split_among(s, same, largest(norm(g.v_bar)), tol.gauge)
    cut = scale < 0
    if g.w_rest is not None and math.isfinite(tol.gauge):
        cut = is_cut(g.w, g.w_rest, scale, g.which, tol.cluster)

    # The part inside the span of V in closed form, that in its complement from solves.
    gap = g.w[..., None, :] - g.w[..., :, None]
    block = s / as_dtype(xp.where(same, infinity(gap), gap), s)
    u, info = _solve(g, method, scale, solve)
    info = info._replace(converged=info.converged & eigen, cut=info.cut | cut)
    return w_dot, xp.matrix_transpose(block) @ g.v + u, info, split


def split_among(s: Array, same: Array, whole: Array, gauge_rtol: float) -> Split:
    """How far a direction splits equal ones of the k, from its block ``S``, ``(..., k, k)``, and a size to compare."""
    xp = namespace_of(s)
    mean = cluster_means(real(xp.linalg.diagonal(s)), same)
    own = identity(s.shape[-1], s) * as_dtype(mean, s)[..., None, :]
    part = xp.max(xp.abs(xp.where(same, s - own, full((), 0.0, s))), axis=-2)
    return Split(part, whole, xp.any(part > gauge_rtol * whole[..., None], axis=-1))


def _tolerances(
    unit: float, rtol: float | None, cluster_rtol: float | None, gauge_rtol: float | None, check_rtol: float | None
) -> _Tolerances:
    """The options, or their defaults in a precision."""
    return _Tolerances(
        (1e-10 if unit < 1e-10 else 1e-6) if rtol is None else rtol,
        CLUSTER_RTOL * unit if cluster_rtol is None else cluster_rtol,
        unit**0.5 if gauge_rtol is None else gauge_rtol,
        unit**0.5 if check_rtol is None else check_rtol,
    )


def _chosen_solver(solver: str, a: SelfAdjoint, x: Array | LinearOperator) -> str:
    """Replace "auto" by the solver that it stands for."""
    if solver != "auto":
        return solver
    return "direct" if a.m <= DIRECT_UP_TO and not isinstance(x, LinearOperator) else "cg"


def _problem(
    function: str,
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    saved_and_x: tuple[Array | LinearOperator, ...],
    which: str,
    solver: str,
) -> _Problem:
    """Validate the arguments and bring all vectors into rows."""
    if len(saved_and_x) not in (1, 3):
        raise TypeError(f"after w, v come x, or w_rest, v_rest, x; got {len(saved_and_x)} arguments.")
    if which not in WHICH:
        raise ValueError(f'which is {which!r}, expected "LA", "SA" or "LM".')
    x, (w_rest, v_rest) = saved_and_x[-1], (saved_and_x[:2] if len(saved_and_x) == 3 else (None, None))
    if solver not in SOLVERS or (solver == "direct" and isinstance(x, LinearOperator)):
        raise ValueError(f'solver is {solver!r}, expected "auto", "cg" or, for a dense x, "direct".')
    if isinstance(w_rest, LinearOperator) or isinstance(v_rest, LinearOperator):
        raise TypeError("x, the operator, comes last, after w_rest and v_rest.")
    of_x = {f"params[{i}]": p for i, p in enumerate(x.params)} if isinstance(x, LinearOperator) else {"x": x}
    given(w=w, v=v, **of_x)  # they follow *, so that `public` cannot know them
    if len(saved_and_x) == 3:
        given(w_rest=w_rest, v_rest=v_rest)
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, w_rest=w_rest, v_rest=v_rest, **of_x)
    check_pair_dtypes(xp, w_bar, v_bar, w, v, w_rest, v_rest)
    # An operator's vectors may have several axes, and its batch axes show only when it is applied.
    a = self_adjoint(x, function, v[..., 0])
    check_pair_shapes(a, w_bar, v_bar, w, v, w_rest, v_rest)
    some = xp.zeros_like(w) if w_bar is None else w_bar  # every later step may use it
    rows = [None if u is None else a.rows(u) for u in (v_bar, v_rest)]
    return _Problem(x, a, which, w, a.rows(v), some, rows[0], w_rest, rows[1])


def check_pair_dtypes(
    xp: Namespace,
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    w_rest: Array | None,
    v_rest: Array | None,
) -> None:
    """Raise unless pairs, their cotangents and those that were saved have the dtypes that belong to `v`."""
    if w_rest is not None and w_rest.ndim < 1:
        raise ValueError(f"w_rest has shape {tuple(w_rest.shape)}, expected (..., r).")
    if v.ndim < 2 or v.shape[-1] < 1:
        raise ValueError(f"v has shape {tuple(v.shape)}, expected (..., m, k) with k at least 1.")
    number = real_dtype(xp, v.dtype)
    check_dtypes(
        w=(w, number), w_bar=(w_bar, number), v_bar=(v_bar, v.dtype), w_rest=(w_rest, number), v_rest=(v_rest, v.dtype)
    )


def check_pair_shapes(
    a: SelfAdjoint,
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    w_rest: Array | None,
    v_rest: Array | None,
) -> None:
    """Raise unless their shapes are those of a map."""
    k, shape = v.shape[-1], (*a.batch, *a.shape)
    r = 0 if w_rest is None else w_rest.shape[-1]
    check_shapes(
        w=(w, (*a.batch, k)), v=(v, (*shape, k)), w_bar=(w_bar, (*a.batch, k)), v_bar=(v_bar, (*shape, k)),
        w_rest=(w_rest, (*a.batch, r)), v_rest=(v_rest, (*shape, r)),
    )  # fmt: skip


def _half(g: _Problem, tol: _Tolerances, method: Method, solve: Solve | None) -> tuple[Array, EigshVjpInfo, Array]:
    """Rows ``B`` of ``X̄ = B Vᴴ + V Bᴴ``, how the solves went, and which items have a gauge-dependent loss."""
    xp = namespace_of(g.w)
    scale, eigen = _check_pairs(g, max(tol.check, tol.solve))

    # Equal ones of the k must have equal cotangents, and the k-th must not equal the next one, if the loss uses it.
    same = _same(g.w, tol.cluster * scale)
    bad = are_unequal(g.w_bar, same, tol.gauge)
    cut = _depends_on_cut(g, same, scale, tol)
    half = as_dtype(g.w_bar / 2, g.v)[..., None] * g.v
    none = xp.zeros_like(g.w, dtype=xp.int32)
    if g.v_bar is None:
        return half, EigshVjpInfo(eigen, none, xp.zeros_like(g.w), cut), bad

    # The part inside the span of V in closed form, that in its complement from solves.
    m_ = xp.matrix_transpose(inner(g.v_bar, g.v))
    columns = range(g.w.shape[-1])
    a = antisymmetric_part(m_, columns)
    bad = bad | exceeds(*masked(a, m_, same), tol.gauge)
    gap = 2 * (g.w[..., None, :] - g.w[..., :, None])
    # Rounding errors of M are those of all of v̄ but its component along v, also outside of the span.
    own = xp.linalg.diagonal(m_)[..., None] * g.v
    small = is_rounding(a, norm(g.v_bar - own), gap, 2 * close_gap(g.w, scale[..., None]), columns)
    block = left_out(m_, small) / as_dtype(xp.where(same, infinity(gap), gap), m_)  # ½ F ∘ M
    x, info = _solve(g, method, scale, solve)
    info = info._replace(converged=info.converged & eigen, cut=info.cut | cut)
    return half + xp.matrix_transpose(block) @ g.v + x / 2, info, bad


def _check_pairs(g: _Problem, rtol: float) -> tuple[Array, Array]:
    """A lower bound of ‖A‖, and whether the pairs are eigenpairs, at the price of one iteration."""
    xp, m, k = namespace_of(g.w), g.a.m, g.w.shape[-1]
    u = xp.broadcast_to(noise(0, m, g.v), (*g.a.batch, 1, m))  # the size of A u bounds ‖A‖ from below
    image = g.a.apply(xp.concat([g.v, u], axis=-2))
    scale = xp.maximum(largest(g.w), norm(image[..., k:, :])[..., 0])
    if g.w_rest is not None:
        scale = xp.maximum(scale, largest(g.w_rest))
    residual = norm(image[..., :k, :] - as_dtype(g.w, g.v)[..., None] * g.v)
    return scale, xp.all(residual <= rtol * scale[..., None], axis=-1)


def _same(w: Array, tol: Array) -> Array:
    """Return which of the k are equal, ``(..., k, k)``, chained through neighbours in any order."""
    xp = namespace_of(w)
    same = xp.abs(w[..., :, None] - w[..., None, :]) <= tol[..., None, None]
    # Each product doubles the length of the chains.
    for _ in range((w.shape[-1] - 1).bit_length()):
        paths = xp.astype(same, w.dtype)
        same = (paths @ paths) > 0.5
    return same


def are_unequal(w_bar: Array, same: Array, gauge_rtol: float) -> Array:
    """Whether cotangents of equal eigenvalues differ."""
    xp = namespace_of(w_bar)
    jump = xp.where(same, w_bar[..., :, None] - w_bar[..., None, :], full((), 0.0, w_bar))
    return exceeds(largest(jump, 2), largest(w_bar), gauge_rtol)


def _depends_on_cut(g: _Problem, same: Array, scale: Array, tol: _Tolerances) -> Array:
    """Whether the next eigenvalue belongs to the cluster of the k-th, and a cotangent in it is not zero."""
    if g.w_rest is None or g.w_rest.shape[-1] == 0:
        return scale < 0
    return uses_last_cluster(g.w_bar, g.v_bar, same, tol.gauge) & is_cut(g.w, g.w_rest, scale, g.which, tol.cluster)


def uses_last_cluster(w_bar: Array, v_bar: Array | None, same: Array, gauge_rtol: float) -> Array:
    """Whether a cotangent of an eigenpair in the cluster of the k-th is more than `gauge_rtol` of the largest."""
    xp, inside, zero = namespace_of(w_bar), same[..., -1, :], full((), 0.0, w_bar)
    uses = exceeds(largest(xp.where(inside, w_bar, zero)), largest(w_bar), gauge_rtol)
    if v_bar is not None:
        size = norm(v_bar)
        uses = uses | exceeds(largest(xp.where(inside, size, zero)), largest(size), gauge_rtol)
    return uses


def _solve(g: _Problem, method: Method, scale: Array, solve: Solve | None) -> tuple[Array, EigshVjpInfo]:
    """``W``, and how well its rows solve ``(λ_j I − X) w_j = P v̄_j``."""
    b = in_complement(g.v_bar, g.v)
    if solve is None:
        return solved(b, Complement(g.a, g.w, g.v, scale, g.w_rest, g.rest), method)
    # What has its own derivative takes the user's form of vectors, and the loop of its bridge.
    b, v, v_rest = (None if rows is None else g.a.columns(rows) for rows in (b, g.v, g.rest))
    method = method._replace(loop=method.loop._replace(while_loop=None))
    columns, info = solve(b, g.w, v, constant(scale), g.w_rest, v_rest, g.x, method=method)
    return g.a.rows(columns), info


def has_repeated(
    w: Array,
    v: Array,
    w_rest: Array,
    v_rest: Array,
    x: Array | LinearOperator,
    /,
    *,
    which: str = "LA",
    cluster_rtol: float | None = None,
) -> Array:
    """Whether two of the k eigenvalues, or the k-th and the next one, are equal: second derivatives are wrong there."""
    g = _problem("eigsh", None, None, w, v, (w_rest, v_rest, x), which, "auto")
    scale, _ = _check_pairs(g, 0.0)
    xp, rtol = namespace_of(w), _tolerances(eps(namespace_of(w), w.dtype), None, cluster_rtol, None, None).cluster
    pairs = xp.sum(xp.astype(_same(w, rtol * scale), w.dtype), axis=(-2, -1))
    return (pairs > w.shape[-1]) | is_cut(w, w_rest, scale, which, rtol)


def _raise_reverse(info: EigshVjpInfo, bad: Array, tol: _Tolerances) -> None:
    """Raise what the flags say, reading one where all is well."""
    xp = namespace_of(bad)
    if not is_true(xp.any(bad | info.cut | ~info.converged)):
        return
    if is_true(xp.any(info.cut)):
        raise GaugeError(
            f"The loss given to eigsh_vjp depends on a cluster of equal eigenvalues{among(info.cut)} of which the k-th "
            "is inside and the next outside: it has no gradient. Pass a k that takes in the whole cluster or none of "
            "it, or leave its eigenpairs out of the loss; or pass throw=False to get NaN for these items."
        )
    if is_true(xp.any(bad)):
        raise GaugeError(
            f"The loss given to eigsh_vjp depends on a choice that the matrix does not determine{among(bad)}, by more "
            f"than gauge_rtol {tol.gauge:.1e}. The most likely cause is that it treats eigenpairs inside a cluster of "
            "equal eigenvalues individually, or depends on the phase of a complex eigenvector; no gradient exists "
            "there. Write it through the cluster's projector V_c V_cᴴ; or pass throw=False to get NaN for these "
            "items, gauge_rtol=inf to accept the masked gradient."
        )
    raise_unsolved("eigsh_vjp", info, tol.solve)


def _raise_tangents(info: EigshVjpInfo, split: Split, w: Array, tol: _Tolerances) -> NoReturn:
    """Raise what the flags of a JVP say, one of which is set."""
    xp = namespace_of(w)
    if is_true(xp.any(info.cut)):
        raise GaugeError(
            f"The k-th eigenvalue given to eigsh_jvp cuts a cluster of equal ones{among(info.cut)}, of which the next "
            "is left out: which eigenpairs of it come back is arbitrary, and they have no derivative. Pass a k that "
            "takes in the whole cluster or none of it; or pass throw=False to get NaN for these items."
        )
    if is_true(xp.any(split.bad)):
        raise_split(split, w, tol.gauge)
    raise_unsolved("eigsh_jvp", info, tol.solve)
