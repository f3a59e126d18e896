"""The k most wanted eigenpairs of a matrix or an operator, without the other m − k."""

from __future__ import annotations

import operator
from typing import NamedTuple, NoReturn

import array_api_compat

from ddnref._core.arrays import Array, as_dtype, eps, full, is_true, power_of_two_below, refuse_recording
from ddnref._core.loops import WhileLoop
from ddnref._core.noise import noise
from ddnref._core.selection import take
from ddnref._kernels.dense import eigh
from ddnref._kernels.public import public
from ddnref._kernels.vectors import norm
from ddnref.errors import ConvergenceError, GaugeError
from ddnref.linalg._lanczos import Plan, lanczos, wish
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import SelfAdjoint, self_adjoint

WHICH = ("LA", "SA", "LM")
METHODS = ("auto", "iterative", "full")
MAXITER = 1000  # cycles
CLUSTER_RTOL = 32  # · eps · ‖A‖: exact repeats come out split by at most 10, with LAPACK (see _gauge.py) by 1
FULL_UP_TO = 512  # measured: see `cheaper`


class EigshInfo(NamedTuple):
    """How far `eigsh` came, per item of the batch."""

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
        An array is symmetrised as in `eigh`. An operator is taken at its word: it must be self-adjoint for all values
        of its parameters.
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
        "full" computes the whole spectrum (an operator as a matrix); "auto" takes what `Notes` say is faster.
    check_every : int, default 1
        Cycles between two looks at the flag that ends the loop.
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
    eigsh_vjp : its reverse-mode derivative.

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

    Cost: (2 m² + 8 m basis) flops a product, ``basis * m`` numbers of memory. An eigenvalue that is hard to tell from
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
    r"""`eigsh` and what its reverse pass can use.

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
    if isinstance(x, LinearOperator):
        for parameter in x.params:
            refuse_recording("eigsh", parameter)
    a = self_adjoint(x, "eigsh", v0)
    refuse_recording("eigsh", a.like)
    p = _basis(operator.index(k), which, method, basis, a.m)
    tol = tolerance(a.like) if rtol is None else rtol
    if method == "full" or (method == "auto" and cheaper(a.m, k, p, isinstance(x, LinearOperator))):
        (w, v), (w_rest, v_rest), scale, n_iter = _full(a, k, which)
        residual = _residual(a, w, v, scale)
        converged = array_api_compat.array_namespace(w).all(residual < float("inf"), axis=-1)
        n_products = n_iter + a.m
    else:
        plan = Plan(k, which, p, (p + k) // 2, tol)
        limit = MAXITER if maxiter is None else maxiter
        unit, size = _of_unit_size(a)
        found = lanczos(unit, plan, v0, maxiter=limit, check_every=check_every, while_loop=while_loop)
        w, w_rest = found.w * size[..., None], found.w_rest * size[..., None]
        v, v_rest, scale = a.columns(found.rows), a.columns(found.rest), found.scale * size
        residual, converged, n_iter = found.residual, found.done, found.n_iter
        n_products = n_iter * (p - plan.l) + k + 2
    cut = is_cut(w, w_rest, scale, which, cluster_rtol)
    info = EigshInfo(converged, n_iter, residual, cut, n_products)
    if throw:
        _raise(info, tol, k)
    return ((w, v), (w_rest, v_rest)), info


# --- below: the algorithm, without validation ----------------------------------------------------------------


def cheaper(m: int, k: int, p: int, is_operator: bool) -> bool:
    """Whether the whole spectrum takes less time than k pairs and their derivative: the one place that decides."""
    return p >= m or (not is_operator and (m <= FULL_UP_TO or 128 * k > m))


def tolerance(like: Array) -> float:
    """Largest residual, relative to ‖A‖."""
    return 1e-12 if eps(array_api_compat.array_namespace(like), like.dtype) < 1e-10 else 1e-6


def is_cut(w: Array, w_rest: Array, scale: Array, which: str, cluster_rtol: float | None) -> Array:
    """Whether the k-th eigenvalue cannot be told from the next one."""
    xp = array_api_compat.array_namespace(w)
    if w_rest.shape[-1] == 0:
        return w[..., -1] != w[..., -1]
    rtol = CLUSTER_RTOL * eps(xp, w.dtype) if cluster_rtol is None else cluster_rtol
    return wish(w, which)[..., -1] - wish(w_rest, which)[..., 0] <= rtol * scale


def _of_unit_size(a: SelfAdjoint) -> tuple[SelfAdjoint, Array]:
    """A over a power of two for each item, and that: the squares of ‖A v‖ could leave the range of exponents."""
    xp = array_api_compat.array_namespace(a.like)
    image = a.apply(xp.broadcast_to(noise(0, a.m, a.like), (*a.batch, 1, a.m)))
    size = power_of_two_below(xp.max(xp.abs(image), axis=(-2, -1)))
    return a._replace(apply=lambda q: a.apply(q) / as_dtype(size, q)[..., None, None]), size


def _full(a: SelfAdjoint, k: int, which: str) -> tuple[tuple[Array, Array], tuple[Array, Array], Array, Array]:
    """From the whole spectrum: the pairs, the others, ‖A‖, and no iterations."""
    w, v = eigh(a.matrix())
    xp = array_api_compat.array_namespace(w)
    scale = xp.max(xp.abs(w), axis=-1)
    if which == "LM":
        order = xp.argsort(xp.abs(w), axis=-1, descending=True, stable=True)
        w = xp.take_along_axis(w, order, axis=-1)
        v = xp.take_along_axis(v, xp.broadcast_to(order[..., None, :], v.shape), axis=-1)
    columns = range(a.m - 1, -1, -1) if which == "LA" else range(a.m)
    parts = [
        (take(w, part, -1), xp.reshape(take(v, part, -1), (*a.batch, *a.shape, len(part))))
        for part in (columns[:k], columns[k:])
    ]
    none = xp.zeros(a.batch, dtype=xp.int32, device=array_api_compat.device(w))
    return parts[0], parts[1], scale, none


def _residual(a: SelfAdjoint, w: Array, v: Array, scale: Array) -> Array:
    y = a.rows(v)
    size = norm(a.apply(y) - as_dtype(w, y)[..., None] * y)
    return size / array_api_compat.array_namespace(w).where(scale > 0, scale, full((), 1.0, scale))[..., None]


def _raise(info: EigshInfo, rtol: float, k: int) -> None:
    xp = array_api_compat.array_namespace(info.cut)
    if is_true(xp.all(info.converged & ~info.cut)):
        return
    if is_true(xp.all(info.converged)):
        raise GaugeError(
            f"Eigenvalue {k} equals the next one, which is left out: which eigenvectors of that cluster come back is "
            "arbitrary, and no gradient exists. Likely a symmetric problem, a zero matrix or a k inside a multiplet. "
            "Pass a k that takes in the whole cluster or none of it; or pass throw=False to take them as they are "
            "(info.cut says where)."
        )
    _raise_convergence(info, rtol)


def _raise_convergence(info: EigshInfo, rtol: float) -> NoReturn:
    xp = array_api_compat.array_namespace(info.cut)
    failed = int(xp.sum(xp.astype(~info.converged, xp.int32)))
    raise ConvergenceError(
        f"eigsh did not converge for {failed} item(s) of the batch: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {rtol:.1e}) after {int(xp.max(info.n_iter))} cycles. Likely "
        "the wanted eigenvalues are close to each other or to the next ones relative to the whole spectrum, rtol is "
        "below rounding, or the input is not finite. Pass a larger basis= or maxiter=, a larger rtol=, or "
        'method="full"; or pass throw=False to get what there is and info.converged.'
    )


def _basis(k: int, which: str, method: str, basis: int | None, m: int) -> int:
    """Rows of the basis, after a look at the static options."""
    if which not in WHICH:
        raise ValueError(f'which is {which!r}, expected "LA" (largest), "SA" (smallest) or "LM" (largest magnitude).')
    if method not in METHODS:
        raise ValueError(f'method is {method!r}, expected "auto", "iterative" or "full".')
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}, expected 1 <= k <= {m} for vectors with {m} entries.")
    if basis is not None and not k + 3 <= basis:
        raise ValueError(f"basis is {basis}, expected at least k + 3 = {k + 3}.")
    p = min(m, max(32, 3 * k) if basis is None else basis)
    if method == "iterative" and p < k + 3:
        raise ValueError(f'{m} entries leave no room for an iteration with k = {k}; pass method="full".')
    return p
