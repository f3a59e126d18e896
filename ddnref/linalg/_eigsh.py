"""The k most wanted eigenpairs of a matrix or an operator, without the other m − k, and their VJP.

The gradient comes from solves on the complement of the eigenvectors. With ``P = I − V Vᴴ``, ``M = Vᴴ V̄`` and
``F_ij = 1 / (λ_j − λ_i)`` between distinct ones of the k, 0 elsewhere,

    (λ_j I − X) w_j = P v̄_j   on range(P),        X̄ = sym(W Vᴴ + V (F ∘ M) Vᴴ) + V diag(λ̄) Vᴴ.

All other eigenvalues lie on one side of each λ_j, so each system is definite, for the largest magnitudes too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import (
    Array,
    as_dtype,
    conj,
    eps,
    full,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    power_of_two_below,
    real_dtype,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, given
from ddnref._core.loops import CHECK_EVERY, LoopOptions, WhileLoop
from ddnref._core.noise import noise
from ddnref._core.selection import take
from ddnref._kernels.dense import eigh, hermitian_sum, identity
from ddnref._kernels.dense import solve as dense_solve
from ddnref._kernels.eigh_vjp import exceeds, masked
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, norm, power_of_two
from ddnref.errors import ConvergenceError, GaugeError
from ddnref.krylov._cg import solve_from_zero
from ddnref.krylov._system import ITERATION_LIMIT
from ddnref.linalg._lanczos import Plan, lanczos, preference
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import SelfAdjoint, inner, self_adjoint, without

WHICH = ("LA", "SA", "LM")
METHODS = ("auto", "iterative", "full")
SOLVERS = ("auto", "cg", "direct")
MAXITER = 1000  # cycles
CLUSTER_RTOL = 32  # · eps · ‖A‖: exact repeats come out split by at most 10, with LAPACK (see _eigh.py) by 1
FULL_UP_TO = 512  # measured: see `cheaper`
DIRECT_UP_TO = 256  # columns of a matrix whose systems are factorised
ALONE = 16
"""Times `CLUSTER_RTOL`, the bound on a gap that is known only from the size of a solution, of whose right-hand side
only a part lies in the cluster. In 300 random cut clusters the two differed by up to 10."""


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
        "full" computes the whole spectrum (an operator as a matrix); "auto" takes the faster way by the rule in Notes.
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

    See Also
    --------
    eigsh_fwd : also returns what speeds up the derivative.
    eigsh_vjp : the reverse-mode derivative.

    Notes
    -----
    Thick-restart Lanczos [1]_ with every vector orthogonalised twice. *Repeated eigenvalues* come with their
    multiplicity: when k pairs have converged, the iteration is continued in their orthogonal complement from a new
    random vector, and ends only when that finds nothing that belongs to them. That is a probabilistic statement: a
    copy whose component in that vector is below rounding would be missed. Prototypes with blocks of 2 and 4, and
    with Chebyshev filters, took longer.

    Measured with its derivative against NumPy's full decomposition and the closed form, by
    ``python asv_benches/figures.py --only eigsh`` (float64, k = 4, an idle machine): 1.09 of its time for a Gaussian
    matrix with m = 1024, whose largest eigenvalues lie close together, 0.11 for the spectrum 1/i with m = 2048.

    Cost: (2 m² + 8 m basis) flops per product, ``basis * m`` numbers of memory. An eigenvalue that is very close to
    its neighbours, relative to the whole spectrum, takes many cycles.

    "auto": the whole spectrum for a dense matrix with m ≤ 512 or k > m / 128, and wherever ``basis >= m``.

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
    r"""Compute `eigsh` and what its reverse pass can use.

    Parameters
    ----------
    x, k, which, v0, rtol, cluster_rtol, maxiter, basis, method, check_every, throw, while_loop
        As in `eigsh`.

    Returns
    -------
    (w, v)
        The outputs of `eigsh`.
    (w_rest, v_rest) : (..., r) and (..., m, r) or (..., \*domain_shape, r) arrays
        Leftover Ritz pairs, most wanted first; the first value is that of the eigenvalue next to the k. After a full
        decomposition all others, ``r = m - k``: then the derivative needs no solve.
    info : EigshInfo

    Raises
    ------
    ConvergenceError, GaugeError, TypeError, ValueError
        As `eigsh`.
    """
    if isinstance(x, LinearOperator):  # PyTorch would record the iteration
        for parameter in x.params:
            refuse_recording("eigsh", parameter)
    a = self_adjoint(x, "eigsh", v0)  # one form for matrices and operators
    refuse_recording("eigsh", a.like)
    xp = namespace_of(a.like)
    p = _basis_size(operator.index(k), which, method, basis, a.m)
    tol = (1e-12 if eps(xp, a.like.dtype) < 1e-10 else 1e-6) if rtol is None else rtol
    if method == "full" or (method == "auto" and cheaper(a.m, k, p, isinstance(x, LinearOperator))):
        (w, v), (w_rest, v_rest), scale, n_iter = _full(a, k, which)
        y = a.rows(v)
        residual = norm(a.apply(y) - as_dtype(w, y)[..., None] * y)  # recomputed, as the iteration does
        residual = residual / xp.where(scale > 0, scale, xp.ones_like(scale))[..., None]
        converged = xp.all(residual < float("inf"), axis=-1)  # false for NaN
        n_products = n_iter + a.m
    else:
        # Iterate with A over a power of two, because squares of ‖A v‖ could leave the range of exponents.
        image = a.apply(xp.broadcast_to(noise(0, a.m, a.like), (*a.batch, 1, a.m)))
        size = power_of_two(image, 2)
        unit = a._replace(apply=lambda q: a.apply(q) / as_dtype(size, q)[..., None, None])
        plan = Plan(k, which, p, (p + k) // 2, tol)  # a restart keeps half of the vectors beside the k
        options = LoopOptions(tol, MAXITER if maxiter is None else maxiter, check_every, while_loop)
        found = lanczos(unit, plan, v0, options)
        w, w_rest = found.w * size[..., None], found.w_rest * size[..., None]  # undo the scaling
        v, v_rest, scale = a.columns(found.rows), a.columns(found.rest), found.scale * size
        residual, converged, n_iter = found.residual, found.done, found.n_iter
        n_products = n_iter * (p - plan.l) + k + 2
    info = EigshInfo(converged, n_iter, residual, is_cut(w, w_rest, scale, which, cluster_rtol), n_products)
    if throw:
        _raise_forward(info, tol, k)
    return ((w, v), (w_rest, v_rest)), info


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


def _full(a: SelfAdjoint, k: int, which: str) -> tuple[tuple[Array, Array], tuple[Array, Array], Array, Array]:
    """Return the pairs, the others, ‖A‖ and zero iterations, from the whole spectrum."""
    w, v = eigh(a.matrix())
    xp = namespace_of(w)
    scale = xp.max(xp.abs(w), axis=-1)  # ‖A‖
    if which == "LM":
        order = xp.argsort(xp.abs(w), axis=-1, descending=True, stable=True)
        w = xp.take_along_axis(w, order, axis=-1)
        v = xp.take_along_axis(v, xp.broadcast_to(order[..., None, :], v.shape), axis=-1)
    # Eigh is ascending; "SA" and the order above are first to last.
    columns = range(a.m - 1, -1, -1) if which == "LA" else range(a.m)
    wanted, others = (
        (take(w, part, -1), xp.reshape(take(v, part, -1), (*a.batch, *a.shape, len(part))))
        for part in (columns[:k], columns[k:])
    )
    return wanted, others, scale, xp.zeros(a.batch, dtype=xp.int32, device=array_api_compat.device(w))


def _raise_forward(info: EigshInfo, rtol: float, k: int) -> None:
    """Raise what `info` says, reading one flag where all is well."""
    xp = namespace_of(info.cut)
    if is_true(xp.all(info.converged & ~info.cut)):
        return
    if is_true(xp.all(info.converged)):
        raise GaugeError(
            f"Eigenvalue {k} equals the next one, which is left out: which eigenvectors of that cluster come back is "
            "arbitrary, and no gradient exists. The most likely cause is a symmetric problem, a zero matrix or a k "
            "inside a multiplet. Pass a k that takes in the whole cluster or none of it; or pass throw=False to take "
            "them as they are (info.cut says where)."
        )
    failed = int(xp.sum(xp.astype(~info.converged, xp.int32)))
    raise ConvergenceError(
        f"eigsh did not converge for {failed} item(s) of the batch: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {rtol:.1e}) after {int(xp.max(info.n_iter))} cycles. The most "
        "likely cause is that the wanted eigenvalues are close to each other or to the next ones relative to the "
        "whole spectrum, that rtol is below rounding, or that the input is not finite. Pass a larger basis= or "
        'maxiter=, a larger rtol=, or method="full"; or pass throw=False to get the present values and info.converged.'
    )


# --- the derivative -------------------------------------------------------------------------------------------------


class EigshVjpInfo(NamedTuple):
    """Status of the solves of `eigsh_vjp`."""

    converged: Array
    """Per item, whether every solve reached `rtol`, or rounding, and the pairs given are eigenpairs, ``(...)``."""
    n_iter: Array
    """Iterations of conjugate gradients, ``(..., k)``; 0 where none were needed."""
    residual_norm: Array
    """``‖P v̄ − (λ I − X) w‖ / ‖P v̄‖``, recomputed, ``(..., k)``."""
    cut: Array
    """Per item, whether the loss depends on a cluster of equal eigenvalues that the k-th one cuts, ``(...)``."""


class _Problem(NamedTuple):
    """The arguments of the derivative, with vectors as rows."""

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
    while_loop: WhileLoop | None = None,
) -> tuple[Array | tuple[Array, ...], EigshVjpInfo]:
    r"""Gradient of a loss of k extremal eigenpairs, without the other m − k.

    Parameters
    ----------
    w_bar : (..., k) real array or None
    v_bar : (..., m, k) or (..., \*domain_shape, k) array or None
    w, v
        The outputs of `eigsh`.
    *saved_and_x
        Either ``x`` alone, the array or operator given to `eigsh`, or ``w_rest, v_rest, x`` with what `eigsh_fwd`
        saved. These halve the iterations or better, need none after a full decomposition, and show a cut cluster in
        `w_bar` too.
    which : {"LA", "SA", "LM"}
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

    Returns
    -------
    x_bar : (..., m, m) array, exactly Hermitian; for an operator a tuple, one cotangent for each of its parameters
    info : EigshVjpInfo

    Raises
    ------
    ConvergenceError
        If a solve failed or the pairs given are not eigenpairs of `x`.
    GaugeError
        As `eigh_vjp`, and if the k-th eigenvalue cuts a cluster that the loss depends on.
    TypeError, ValueError
        As `eigh_vjp`.

    See Also
    --------
    eigh_vjp : notes on what masking inside a cluster can and cannot do, which hold here as well.

    Notes
    -----
    With :math:`P = I - V V^H` and F zero between equal eigenvalues,

    .. math:: (\lambda_j I - X) w_j = P \bar v_j, \qquad
        \bar X = \mathrm{sym}(W V^H + V (F \circ V^H \bar V) V^H) + V \mathrm{diag}(\bar\lambda) V^H

    Cost: one product with a block of k vectors per iteration, and about ``sqrt(‖A‖ / gap)`` iterations, where gap is
    that from the k-th to the next eigenvalue, or to the last saved one. Without the saved pairs and without `v_bar`, a
    cut cluster cannot be seen here, but in ``info.cut`` of `eigsh`, which raises by default.

    References
    ----------
    .. [1] J. R. Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1 (1985), Theorem 1.
    .. [2] S.-K. Xie, H.-J. Liao and L. Wang, "Automatic differentiation of dominant eigensolver and its applications
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
    g = _problem(w_bar, v_bar, w, v, saved_and_x, which, solver)  # validated, vectors as rows
    xp = namespace_of(w)
    unit = eps(xp, w.dtype)
    tol = _Tolerances(
        (1e-10 if unit < 1e-10 else 1e-6) if rtol is None else rtol,
        CLUSTER_RTOL * unit if cluster_rtol is None else cluster_rtol,
        unit**0.5 if gauge_rtol is None else gauge_rtol,
        unit**0.5 if check_rtol is None else check_rtol,
    )
    x = saved_and_x[-1]
    if solver == "auto":
        solver = "direct" if g.a.m <= DIRECT_UP_TO and not isinstance(x, LinearOperator) else "cg"
    loop = LoopOptions(tol.solve, max(1000, g.a.m) if maxiter is None else maxiter, check_every, while_loop)

    # Cotangents over a power of two for each item, because their squares could leave the range of exponents.
    size = largest(g.w_bar) if g.v_bar is None else xp.maximum(largest(g.w_bar), largest(g.v_bar, 2))
    size = power_of_two_below(size)
    unit_v_bar = None if g.v_bar is None else g.v_bar / as_dtype(size, g.v_bar)[..., None, None]
    g = g._replace(w_bar=g.w_bar / size[..., None], v_bar=unit_v_bar)
    half, info, bad = _half(g, tol, solver, loop)  # X̄ = B Vᴴ + V Bᴴ
    if throw:
        _raise_reverse(info, bad, tol)
    half = nan_where((bad | info.cut | ~info.converged)[..., None, None], half * as_dtype(size, half)[..., None, None])

    if not isinstance(x, LinearOperator):
        return hermitian_sum(xp.matrix_transpose(half), xp.matrix_transpose(g.v)), info
    # Re Σ_j ⟨2 b_j, Ẋ v_j⟩: as Ẋ is self-adjoint, X̄ need not be symmetrised. The k are one more leading axis.
    shape = (half.shape[-2], *g.a.batch, *g.a.shape)
    y_bar, y = (xp.reshape(xp.moveaxis(rows, -2, 0), shape) for rows in (2 * half, g.v))
    return x.params_vjp(x.params, y_bar, y), info


def _problem(
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
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    if isinstance(w_rest, LinearOperator) or isinstance(v_rest, LinearOperator):
        raise TypeError("x, the operator, comes last, after w_rest and v_rest.")
    of_x = {f"params[{i}]": p for i, p in enumerate(x.params)} if isinstance(x, LinearOperator) else {"x": x}
    given(w=w, v=v, **of_x)  # they follow *, so that `public` cannot know them
    if len(saved_and_x) == 3:
        given(w_rest=w_rest, v_rest=v_rest)
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, w_rest=w_rest, v_rest=v_rest, **of_x)
    if w_rest is not None and w_rest.ndim < 1:
        raise ValueError(f"w_rest has shape {tuple(w_rest.shape)}, expected (..., r).")
    if v.ndim < 2 or v.shape[-1] < 1:
        raise ValueError(f"v has shape {tuple(v.shape)}, expected (..., m, k) with k at least 1.")
    number = real_dtype(xp, v.dtype)
    check_dtypes(
        w=(w, number), w_bar=(w_bar, number), v_bar=(v_bar, v.dtype), w_rest=(w_rest, number), v_rest=(v_rest, v.dtype)
    )
    # An operator's vectors may have several axes, and its batch axes show only when it is applied.
    a = self_adjoint(x, "eigsh_vjp", v[..., 0])
    k, shape = v.shape[-1], (*a.batch, *a.shape)
    r = 0 if w_rest is None else w_rest.shape[-1]
    check_shapes(
        w=(w, (*a.batch, k)), v=(v, (*shape, k)), w_bar=(w_bar, (*a.batch, k)), v_bar=(v_bar, (*shape, k)),
        w_rest=(w_rest, (*a.batch, r)), v_rest=(v_rest, (*shape, r)),
    )  # fmt: skip
    some = xp.zeros_like(w) if w_bar is None else w_bar  # every later step may use it
    rows = [None if u is None else a.rows(u) for u in (v_bar, v_rest)]
    return _Problem(a, which, w, a.rows(v), some, rows[0], w_rest, rows[1])


def _half(g: _Problem, tol: _Tolerances, solver: str, loop: LoopOptions) -> tuple[Array, EigshVjpInfo, Array]:
    """Rows ``B`` of ``X̄ = B Vᴴ + V Bᴴ``, how the solves went, and which items have a gauge-dependent loss."""
    xp = namespace_of(g.w)
    scale, eigen = _check_pairs(g, max(tol.check, tol.solve))

    # Equal ones of the k must have equal cotangents, and the k-th must not equal the next one, if the loss uses it.
    same = _same(g.w, tol.cluster * scale)
    jump = xp.where(same, g.w_bar[..., :, None] - g.w_bar[..., None, :], full((), 0.0, g.w))
    bad = exceeds(largest(jump, 2), largest(g.w_bar), tol.gauge)
    cut = _depends_on_cut(g, same, scale, tol)
    half = as_dtype(g.w_bar / 2, g.v)[..., None] * g.v
    none = xp.zeros(g.w.shape, dtype=xp.int32, device=array_api_compat.device(g.w))
    if g.v_bar is None:
        return half, EigshVjpInfo(eigen, none, xp.zeros_like(g.w), cut), bad

    # The part inside the span of V in closed form, that in its complement from solves.
    m_ = xp.matrix_transpose(inner(g.v_bar, g.v))
    bad = bad | exceeds(*masked(m_, same, range(g.w.shape[-1])), tol.gauge)
    gap = 2 * (g.w[..., None, :] - g.w[..., :, None])
    block = m_ / as_dtype(xp.where(same, full((), float("inf"), gap), gap), m_)  # ½ F ∘ M
    x, info = _solve(g, tol, solver, loop, scale)
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


def _depends_on_cut(g: _Problem, same: Array, scale: Array, tol: _Tolerances) -> Array:
    """Whether the next eigenvalue belongs to the cluster of the k-th, and a cotangent in it is not zero."""
    xp = namespace_of(g.w)
    if g.w_rest is None or g.w_rest.shape[-1] == 0:
        return scale < 0
    inside = same[..., -1, :]  # the cluster of the k-th
    zero = full((), 0.0, g.w)
    uses = exceeds(largest(xp.where(inside, g.w_bar, zero)), largest(g.w_bar), tol.gauge)
    if g.v_bar is not None:
        size = norm(g.v_bar)
        uses = uses | exceeds(largest(xp.where(inside, size, zero)), largest(size), tol.gauge)
    return uses & is_cut(g.w, g.w_rest, scale, g.which, tol.cluster)


def _solve(g: _Problem, tol: _Tolerances, solver: str, loop: LoopOptions, scale: Array) -> tuple[Array, EigshVjpInfo]:
    """``W``, and how well its rows solve ``(λ_j I − X) w_j = P v̄_j``."""
    xp = namespace_of(g.w)
    sign = xp.sign(g.w) if g.which == "LM" else full(g.w.shape, 1.0 if g.which == "LA" else -1.0, g.w)

    def shifted(x: Array) -> Array:
        """``σ_i P (λ_i I − A) x_i``, positive definite on range(P) with this sign: see the top."""
        return as_dtype(sign, x)[..., None] * without(as_dtype(g.w, x)[..., None] * x - g.a.apply(x), g.v)

    # Right-hand sides that are only rounding count as zero.
    b = without(without(g.v_bar, g.v), g.v)
    b = xp.where((norm(b) > 8 * eps(xp, g.w.dtype) * norm(g.v_bar))[..., None], b, xp.zeros_like(b))
    n_iter = xp.zeros(g.w.shape, dtype=xp.int32, device=array_api_compat.device(g.w))
    positive = n_iter == 0
    if g.rest is not None and g.rest.shape[-2] == g.a.m - g.w.shape[-1]:
        # All other eigenpairs are known. The solution is 0 across a cut cluster, which is reported elsewhere.
        gap = sign[..., None] * (g.w[..., :, None] - g.w_rest[..., None, :])  # type: ignore[index]
        gap = xp.where(gap > 0, gap, full((), float("inf"), gap))
        y = (inner(b, g.rest) / as_dtype(gap, b)) @ g.rest
    elif solver == "direct":
        y = _direct(g, sign, b)  # k factorisations
    else:
        found = solve_from_zero(shifted, b, loop, precondition=_preconditioner(g), project=lambda r: without(r, g.v))
        y, n_iter, positive = found.x, found.n_iter, found.status <= ITERATION_LIMIT

    # A residual at rounding level of the solution is as good as one at the tolerance.
    size, residual = norm(b), norm(b - shifted(y))
    rounding = 2 * tol.cluster * scale[..., None] * norm(y)
    converged = positive & (residual <= 2 * tol.solve * size + rounding)
    # ‖y‖ ≤ ‖b‖ / gap: a solution this large says that the next eigenvalue is the k-th.
    least = tol.cluster if g.w_rest is not None else ALONE * tol.cluster
    cut = xp.any((size > 0) & (size <= least * scale[..., None] * norm(y)), axis=-1)
    relative = residual / xp.where(size > 0, size, xp.ones_like(size))  # 0 for a right-hand side of 0
    return as_dtype(sign, y)[..., None] * y, EigshVjpInfo(xp.all(converged, axis=-1), n_iter, relative, cut)


def _preconditioner(g: _Problem) -> Callable[[Array], Array] | None:
    """``z = r + Σ_j u_j (c_i / |λ_i − θ_j| − 1) ⟨u_j, r⟩`` with leftover Ritz pairs: they move to the far end c_i."""
    if g.rest is None or g.w_rest is None or g.rest.shape[-2] == 0:
        return None
    xp, u = namespace_of(g.v), g.rest
    gap = xp.abs(g.w[..., :, None] - g.w_rest[..., None, :])
    c = xp.max(gap, axis=-1, keepdims=True)
    factor = as_dtype(xp.where(gap > 0, c / xp.where(gap > 0, gap, xp.ones_like(gap)), xp.ones_like(gap)) - 1, u)
    return lambda r: r + (factor * inner(r, u)) @ u


def _direct(g: _Problem, sign: Array, b: Array) -> Array:
    """Solve the same systems by factorisations: ``λ_i I − A + σ_i c VᴴV`` is regular and keeps range(P)."""
    xp, matrix = namespace_of(b), g.a.matrix()
    w, sign = (as_dtype(x, b)[..., None] for x in (g.w, sign))
    c = xp.max(xp.sum(xp.abs(matrix), axis=-1), axis=-1)[..., None, None, None]  # at least ‖A‖
    span = xp.matrix_transpose(g.v) @ conj(g.v)
    shift = sign[..., None] * as_dtype(c, b) * span[..., None, :, :]
    x = dense_solve(w[..., None] * identity(g.a.m, b) - matrix[..., None, :, :] + shift, b[..., None])
    return sign * without(x[..., 0], g.v)


def _raise_reverse(info: EigshVjpInfo, bad: Array, tol: _Tolerances) -> None:
    """Raise what the flags say, reading one where all is well."""
    xp = namespace_of(bad)
    if not is_true(xp.any(bad | info.cut | ~info.converged)):
        return
    if is_true(xp.any(info.cut)):
        raise GaugeError(
            "The loss depends on a cluster of equal eigenvalues of which the k-th is inside and the next outside: it "
            "has no gradient. Pass a k that takes in the whole cluster or none of it, or leave its eigenpairs out of "
            "the loss; or pass throw=False to get NaN for these items."
        )
    if is_true(xp.any(bad)):
        raise GaugeError(
            "The loss depends on a choice that the matrix does not determine, by more than gauge_rtol "
            f"{tol.gauge:.1e}. The most likely cause is that it treats eigenpairs inside a cluster of equal "
            "eigenvalues individually, or depends on the phase of a complex eigenvector; no gradient exists there. "
            "Write it through the cluster's projector V_c V_cᴴ; or pass throw=False to get NaN for these items, "
            "gauge_rtol=inf to accept the masked gradient."
        )
    failed = int(xp.sum(xp.astype(~info.converged, xp.int32)))
    raise ConvergenceError(
        f"eigsh_vjp did not converge for {failed} item(s) of the batch: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {tol.solve:.1e}) after {int(xp.max(info.n_iter))} iterations. "
        "The most likely cause is that w and v are not the extremal eigenpairs that which= says, that the k-th "
        "eigenvalue is very close to the next, or that the input is not finite. Pass the pairs that eigsh_fwd saved, "
        'a larger maxiter= or rtol=, or solver="direct"; or pass throw=False to get NaN for these items and '
        "info.converged."
    )
