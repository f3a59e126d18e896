"""The gradient of a loss of k extremal eigenpairs, from solves on the complement of their eigenvectors.

With ``P = I − V Vᴴ`` and ``M = Vᴴ V̄``, ``F_ij = 1 / (λ_j − λ_i)`` between distinct ones of the k, 0 elsewhere,

    (λ_j I − X) w_j = P v̄_j   on range(P),        X̄ = sym(W Vᴴ + V (F ∘ M) Vᴴ) + V diag(λ̄) Vᴴ.

All other eigenvalues lie on one side of each λ_j, so each system is definite, for the largest magnitudes too.
"""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import array_api_compat

from ddnref._core.arrays import (
    Array,
    as_dtype,
    eps,
    full,
    is_true,
    namespace,
    nan_where,
    power_of_two_below,
    real_dtype,
)
from ddnref._core.checks import check_dtypes, check_shapes, given
from ddnref._core.loops import CHECK_EVERY, WhileLoop
from ddnref._core.noise import noise
from ddnref._kernels import numpy as _numpy
from ddnref._kernels.dense import hermitian_product
from ddnref._kernels.eigh_vjp import exceeds, masked
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, norm
from ddnref.errors import ConvergenceError, GaugeError
from ddnref.linalg._deflated import Shifted, cg, direct, shifted
from ddnref.linalg._eigsh import CLUSTER_RTOL, WHICH, is_cut
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import SelfAdjoint, inner, self_adjoint, without

SOLVERS = ("auto", "cg", "direct")
ALONE = 16
"""Times `CLUSTER_RTOL`: what a gap is compared with where the size of a solution alone tells of it, of whose right-hand
side only a part lies in the cluster. In 300 random cut clusters the two differed by up to 10."""
DIRECT_UP_TO = 256


class EigshVjpInfo(NamedTuple):
    """How the solves went."""

    converged: Array
    """Per item, whether every solve reached `rtol`, or rounding, and the pairs given are eigenpairs, ``(...)``."""
    n_iter: Array
    """Iterations of conjugate gradients, ``(..., k)``; 0 where none were needed."""
    residual_norm: Array
    """``‖P v̄ − (λ I − X) w‖ / ‖P v̄‖``, recomputed, ``(..., k)``."""
    cut: Array
    """Per item, whether the loss depends on a cluster of equal eigenvalues that the k-th one cuts, ``(...)``."""


class Given(NamedTuple):
    """What the algorithm works on, vectors as rows."""

    a: SelfAdjoint
    which: str
    w: Array
    v: Array
    w_bar: Array
    v_bar: Array | None
    w_rest: Array | None
    rest: Array | None


class Tolerances(NamedTuple):
    """Relative ones."""

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
        saved: half the iterations or fewer, none after a full decomposition, and a cut cluster is seen in `w_bar` too.
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
    eigh_vjp : its notes on what masking inside a cluster can and cannot do hold here as well.

    Notes
    -----
    With :math:`P = I - V V^H` and F zero between equal eigenvalues,

    .. math:: (\lambda_j I - X) w_j = P \bar v_j, \qquad
        \bar X = \mathrm{sym}(W V^H + V (F \circ V^H \bar V) V^H) + V \mathrm{diag}(\bar\lambda) V^H

    Cost: one product with a block of k vectors an iteration, about ``sqrt(‖A‖ / gap)`` of them, gap from the k-th to
    the next eigenvalue, or to the last saved one. Without the saved pairs and without `v_bar`, a cut cluster
    cannot be seen here: heed ``info.cut`` of `eigsh`, which raises by default.

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
    given = _given(w_bar, v_bar, w, v, saved_and_x, which, solver)
    xp = array_api_compat.array_namespace(w)
    unit = eps(xp, w.dtype)
    tol = Tolerances(
        (1e-10 if unit < 1e-10 else 1e-6) if rtol is None else rtol,
        CLUSTER_RTOL * unit if cluster_rtol is None else cluster_rtol,
        unit**0.5 if gauge_rtol is None else gauge_rtol,
        unit**0.5 if check_rtol is None else check_rtol,
    )
    is_operator = isinstance(saved_and_x[-1], LinearOperator)
    if solver == "auto":
        solver = "direct" if given.a.m <= DIRECT_UP_TO and not is_operator else "cg"
    loop = {"maxiter": max(1000, given.a.m) if maxiter is None else maxiter, "check_every": check_every}
    unit_given, size = _of_unit_size(given)
    half, info, bad = _eigsh_vjp(unit_given, tol, solver, {**loop, "while_loop": while_loop})
    if throw:
        _raise(info, bad, tol)
    half = nan_where((bad | info.cut | ~info.converged)[..., None, None], half * as_dtype(size, half)[..., None, None])
    return (_of_params(given, half, saved_and_x[-1]) if is_operator else _of_matrix(given, half)), info


# --- below: the algorithm, without validation ----------------------------------------------------------------


def _of_unit_size(g: Given) -> tuple[Given, Array]:
    """Cotangents over a power of two for each item, and that: their squares could leave the range of exponents."""
    xp = array_api_compat.array_namespace(g.w)
    size = largest(g.w_bar, 1) if g.v_bar is None else xp.maximum(largest(g.w_bar, 1), largest(g.v_bar, 2))
    size = power_of_two_below(size)
    v_bar = None if g.v_bar is None else g.v_bar / as_dtype(size, g.v_bar)[..., None, None]
    return g._replace(w_bar=g.w_bar / size[..., None], v_bar=v_bar), size


def _eigsh_vjp(g: Given, tol: Tolerances, solver: str, loop: dict[str, object]) -> tuple[Array, EigshVjpInfo, Array]:
    """Rows ``B`` of ``X̄ = B Vᴴ + V Bᴴ``, what happened, and which items have a gauge-dependent loss."""
    xp = array_api_compat.array_namespace(g.w)
    scale, eigen = _checked_pairs(g, max(tol.check, tol.solve))
    same = _same(g.w, tol.cluster * scale)
    jump = xp.where(same, g.w_bar[..., :, None] - g.w_bar[..., None, :], full((), 0.0, g.w))
    bad = exceeds(largest(jump, 2), largest(g.w_bar, 1), tol.gauge)
    cut = _depends_on_cut(g, same, scale, tol)
    half = as_dtype(g.w_bar / 2, g.v)[..., None] * g.v
    none = xp.zeros(g.w.shape, dtype=xp.int32, device=array_api_compat.device(g.w))
    if g.v_bar is None:
        return half, EigshVjpInfo(eigen, none, xp.zeros_like(g.w), cut), bad
    m_ = xp.matrix_transpose(inner(g.v_bar, g.v))
    bad = bad | exceeds(*masked(m_, same, range(g.w.shape[-1])), tol.gauge)
    gap = 2 * (g.w[..., None, :] - g.w[..., :, None])
    block = m_ / as_dtype(xp.where(same, full((), float("inf"), gap), gap), m_)  # ½ F ∘ M
    x, info = _solve(g, tol, solver, loop, scale)
    info = info._replace(converged=info.converged & eigen, cut=info.cut | cut)
    return half + xp.matrix_transpose(block) @ g.v + x / 2, info, bad


def _checked_pairs(g: Given, rtol: float) -> tuple[Array, Array]:
    """A lower bound of ‖A‖, and whether the pairs are eigenpairs, at the price of one iteration."""
    xp = array_api_compat.array_namespace(g.w)
    m = g.a.m
    u = xp.broadcast_to(noise(0, m, g.v), (*g.a.batch, 1, m))
    image = g.a.apply(xp.concat([g.v, u], axis=-2))
    k = g.w.shape[-1]
    scale = xp.maximum(largest(g.w, 1), norm(image[..., k:, :])[..., 0])
    if g.w_rest is not None:
        scale = xp.maximum(scale, largest(g.w_rest, 1))
    residual = norm(image[..., :k, :] - as_dtype(g.w, g.v)[..., None] * g.v)
    return scale, xp.all(residual <= rtol * scale[..., None], axis=-1)


def _same(w: Array, tol: Array) -> Array:
    """Which of the k are equal, chained through neighbours in any order: ``(..., k, k)``."""
    xp = array_api_compat.array_namespace(w)
    same = xp.abs(w[..., :, None] - w[..., None, :]) <= tol[..., None, None]
    for _ in range((w.shape[-1] - 1).bit_length()):
        paths = xp.astype(same, w.dtype)
        same = (paths @ paths) > 0.5
    return same


def _depends_on_cut(g: Given, same: Array, scale: Array, tol: Tolerances) -> Array:
    """Whether the next eigenvalue belongs to the cluster of the k-th, and a cotangent in it is not zero."""
    xp = array_api_compat.array_namespace(g.w)
    if g.w_rest is None or g.w_rest.shape[-1] == 0:
        return scale < 0
    inside = same[..., -1, :]
    zero = full((), 0.0, g.w)
    uses = exceeds(largest(xp.where(inside, g.w_bar, zero), 1), largest(g.w_bar, 1), tol.gauge)
    if g.v_bar is not None:
        size = norm(g.v_bar)
        uses = uses | exceeds(largest(xp.where(inside, size, zero), 1), largest(size, 1), tol.gauge)
    return uses & is_cut(g.w, g.w_rest, scale, g.which, tol.cluster)


def _solve(g: Given, tol: Tolerances, solver: str, loop: dict[str, object], scale: Array) -> tuple[Array, EigshVjpInfo]:
    """``W``, and how well its rows solve ``(λ_j I − X) w_j = P v̄_j``."""
    xp = array_api_compat.array_namespace(g.w)
    sign = xp.sign(g.w) if g.which == "LM" else full(g.w.shape, 1.0 if g.which == "LA" else -1.0, g.w)
    s = Shifted(g.a, g.w, g.v, sign, g.w_rest, g.rest)
    b = without(without(g.v_bar, g.v), g.v)
    b = xp.where((norm(b) > 8 * eps(xp, g.w.dtype) * norm(g.v_bar))[..., None], b, xp.zeros_like(b))  # only rounding
    n_iter = xp.zeros(g.w.shape, dtype=xp.int32, device=array_api_compat.device(g.w))
    positive = n_iter == 0
    if g.rest is not None and g.rest.shape[-2] == g.a.m - g.w.shape[-1]:
        y = _expanded(g, sign, b)
    elif solver == "direct":
        y = direct(s, b)
    else:
        y, n_iter, positive = cg(s, b, rtol=tol.solve, **loop)  # type: ignore[arg-type]
    size, residual = norm(b), norm(b - shifted(s, y))
    rounding = 2 * tol.cluster * scale[..., None] * norm(y)
    converged = positive & (residual <= 2 * tol.solve * size + rounding)
    # ‖y‖ ≤ ‖b‖ / gap: a solution this large says that the next eigenvalue is the k-th.
    least = tol.cluster if g.w_rest is not None else ALONE * tol.cluster
    cut = xp.any((size > 0) & (size <= least * scale[..., None] * norm(y)), axis=-1)
    relative = residual / xp.where(size > 0, size, xp.ones_like(size))
    return as_dtype(sign, y)[..., None] * y, EigshVjpInfo(xp.all(converged, axis=-1), n_iter, relative, cut)


def _expanded(g: Given, sign: Array, b: Array) -> Array:
    """The solution when all other eigenpairs are known; 0 across a cut cluster, which is reported elsewhere."""
    xp = array_api_compat.array_namespace(g.w)
    gap = sign[..., None] * (g.w[..., :, None] - g.w_rest[..., None, :])  # type: ignore[index]
    gap = xp.where(gap > 0, gap, full((), float("inf"), gap))
    return (inner(b, g.rest) / as_dtype(gap, b)) @ g.rest


def _of_matrix(g: Given, half: Array) -> Array:
    xp = array_api_compat.array_namespace(half)
    if array_api_compat.is_numpy_array(half):
        return _numpy.hermitian_sum(xp.matrix_transpose(half), xp.matrix_transpose(g.v))
    left, right = (xp.matrix_transpose(xp.concat(pair, axis=-2)) for pair in ([half, g.v], [g.v, half]))
    return hermitian_product(left, right)


def _of_params(g: Given, half: Array, operator: LinearOperator) -> tuple[Array, ...]:
    """``Re Σ_j ⟨2 b_j, Ẋ v_j⟩``: as Ẋ is self-adjoint, X̄ need not be symmetrised. The k are one more leading axis."""
    xp = array_api_compat.array_namespace(half)
    shape = (half.shape[-2], *g.a.batch, *g.a.shape)
    y_bar, y = (xp.reshape(xp.moveaxis(rows, -2, 0), shape) for rows in (2 * half, g.v))
    return operator.params_vjp(operator.params, y_bar, y)


def _raise(info: EigshVjpInfo, bad: Array, tol: Tolerances) -> None:
    xp = array_api_compat.array_namespace(bad)
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
            f"{tol.gauge:.1e}. Likely it treats eigenpairs inside a cluster of equal eigenvalues individually, or "
            "depends on the phase of a complex eigenvector; no gradient exists there. Write it through the cluster's "
            "projector V_c V_cᴴ; or pass throw=False to get NaN for these items, gauge_rtol=inf to accept the masked "
            "gradient."
        )
    _raise_convergence(info, tol)


def _raise_convergence(info: EigshVjpInfo, tol: Tolerances) -> NoReturn:
    xp = array_api_compat.array_namespace(info.converged)
    failed = int(xp.sum(xp.astype(~info.converged, xp.int32)))
    raise ConvergenceError(
        f"eigsh_vjp did not converge for {failed} item(s) of the batch: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {tol.solve:.1e}) after {int(xp.max(info.n_iter))} iterations. "
        "Likely w and v are not the extremal eigenpairs that which= says, the k-th eigenvalue is very close to the "
        "next, or the input is not finite. Pass the pairs that eigsh_fwd saved, a larger maxiter= or rtol=, or "
        'solver="direct"; or pass throw=False to get NaN for these items and info.converged.'
    )


# --- static facts ---------------------------------------------------------------------------------------------


def _given(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    saved_and_x: tuple[Array | LinearOperator, ...],
    which: str,
    solver: str,
) -> Given:
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
    given(w=w, v=v, **of_x)
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
    a = self_adjoint(x, "eigsh_vjp", v[..., 0])
    k, shape = v.shape[-1], (*a.batch, *a.shape)
    r = 0 if w_rest is None else w_rest.shape[-1]
    check_shapes(
        w=(w, (*a.batch, k)), v=(v, (*shape, k)), w_bar=(w_bar, (*a.batch, k)), v_bar=(v_bar, (*shape, k)),
        w_rest=(w_rest, (*a.batch, r)), v_rest=(v_rest, (*shape, r)),
    )  # fmt: skip
    some = xp.zeros_like(w) if w_bar is None else w_bar
    rows = [None if u is None else a.rows(u) for u in (v_bar, v_rest)]
    return Given(a, which, w, a.rows(v), some, rows[0], w_rest, rows[1])
