"""Dominant eigenpairs by power iteration and by simultaneous iteration, and three VJPs of them.

    power         v ← ± X v / ‖X v‖,      λ = vᵀ X v
    simultaneous  Q R = X Q,              T = Qᵀ X Q

The sign follows that of λ, so that a negative eigenvalue has a fixed point too. Simultaneous iteration stops when
the span of Q is invariant, ``X Q = Q T``, and takes the eigenpairs of the n×n matrix T, so that close or equal
eigenvalues among the n cost no further steps.

The derivatives need the pairs and the matrix alone:

bordered       KKT system of the declarative node ``min −tr(uᵀXu) s.t. uᵀu = 1``, for each pair (λ, y):

                   ⎡ λI − Xᵀ   y ⎤ ⎡ w ⎤   ⎡ ȳ ⎤
                   ⎣    yᵀ     0 ⎦ ⎣ μ ⎦ = ⎣ λ̄ ⎦,          X̄ = w yᵀ

               With X symmetric and n pairs Y: bordered by all of Y, right-hand side ``(I − Y Yᵀ) ȳ``, and the part
               inside span(Y) in closed form, ``X̄ = sym(W Yᵀ + Y (diag(λ̄) + ½ F ∘ (M − Mᵀ)) Yᵀ)`` as in `eigh_vjp`.

fixed point    ``y = X y / λ`` with the signed λ and ``P = I − y yᵀ``; λ = yᵀXy passes its cotangent on to y:

                   (I − XᵀP/λ) q = ȳ + λ̄ (X + Xᵀ) y,       X̄ = (P q / λ + λ̄ y) yᵀ

unrolled       every iterate computed again, kept, and reversed step by step. Memory grows with the number of steps. It
               is the right gradient of an iteration that was stopped early, and the baseline of the other two.

                   power          v ← ± z/‖z‖, z ← X v      reversed: z̄ = ± (v̄ − v vᵀv̄)/‖z‖,  X̄ += z̄ vᵀ,  v̄ = Xᵀ z̄
                   simultaneous   Q R = Z, Z ← X Q          reversed: Z̄ = qr_vjp(Q̄),          X̄ += Z̄ Qᵀ,  Q̄ = Xᵀ Z̄

The matrix ``λI − X`` alone is singular at the solution; bordered, or on the fixed point's complement, it is not.
Systems are built and solved in float64, because an eigenvalue rounded to float32 leaves an error of 3e-5 in the
gradient.
"""

from __future__ import annotations

import math
import operator
from typing import NamedTuple, NoReturn

from ddnref._core.arrays import (
    Array,
    Namespace,
    double,
    eps,
    full,
    is_complex,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    power_of_two_below,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square, conform
from ddnref._core.loops import CHECK_EVERY, IterationInfo, WhileLoop, run
from ddnref._core.noise import noise
from ddnref._kernels import singularity
from ddnref._kernels.bordered import bordered, in_chunks, product_in_double, shifted, solve_each, solve_on_complement
from ddnref._kernels.dense import eigh, hermitian_part, hermitian_sum, identity, matvec, outer, symmetrised
from ddnref._kernels.eigh_vjp import exceeds
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, norm, real_dot
from ddnref.errors import ConvergenceError, GaugeError, NonFiniteError
from ddnref.linalg._eigh import RTOL as SAME_RTOL
from ddnref.linalg._eigh import eigh_vjp
from ddnref.linalg._qr import qr, qr_vjp
from ddnref.linalg._residuals import SIGNS, align_signs

RTOL = 16  # in units of eps, with √m more: the rounding of products with m terms reached 18 at m = 512
MAXITER = 1000
METHODS = ("bordered", "fixed_point", "unrolled")


class _Power(NamedTuple):
    """A frozen item keeps its v; all else follows from v and comes out as it was."""

    v: Array
    z: Array
    """``X v``, or the start vector before the first step."""
    w: Array
    size: Array
    """``‖z‖`` with the sign of λ; 1 where it is zero."""
    residual: Array
    n_iter: Array
    active: Array


@public
def power_iteration(
    x: Array,
    /,
    *,
    symmetric: bool = False,
    v0: Array | None = None,
    align: str | None = "positive",
    reference: Array | None = None,
    rtol: float | None = None,
    maxiter: int = MAXITER,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array, Array], IterationInfo]:
    """The eigenvalue of largest magnitude and its eigenvector, by power iteration.

    Parameters
    ----------
    x : (..., m, m) array, float32 or float64
        Need not be symmetric, but its dominant eigenvalue must be real and simple in magnitude. For complex
        Hermitian matrices take `eigsh`.
    symmetric : bool, default False
        Iterate with ``½ (X + Xᵀ)`` instead of `x`. Give the VJP the same value: the gradients differ.
    v0 : (..., m) or (m,) array, optional
        Where to start; default fixed pseudo-random numbers.
    align : {"positive", "negative", None}
        The sign of the eigenvector, as in `align_signs`; ``None`` leaves it as the start vector determines it.
    reference : (..., m) or (m,) array, optional
        As in `align_signs`.
    rtol : float, optional
        Stop when ``‖X v − λ v‖ <= rtol * ‖X v‖``; default ``(16 + √m) * eps``, the rounding
        of the products.
    maxiter : int, default 1000
    check_every : int, default 10
        Steps between two checks of the stopping rule, each of which reads one flag on the host.
    throw : bool, default True
        Raise if an item has not converged, reading one more flag. With ``False`` the last iterate is returned and
        ``info.converged`` says so.
    while_loop : callable, optional
        Such as ``jax.lax.while_loop``, which runs under ``jax.jit`` and reads nothing.

    Returns
    -------
    (w, v) : (...) and (..., m) arrays
        Eigenvalue and eigenvector of unit length.
    info : IterationInfo
        ``converged``, ``n_iter``, ``residual_norm`` (relative), each ``(...)``.

    Raises
    ------
    ConvergenceError
        Not converged within `maxiter`: two eigenvalues of (nearly) the same largest magnitude, such as λ and −λ or a
        complex pair, let the iteration oscillate or converge very slowly; a zero matrix has no dominant eigenvalue.
    NonFiniteError
        An item contains NaN or infinity; with ``throw=False`` it comes out as NaN and the others are not affected.
    TypeError, ValueError
        Complex, integer or mixed input; shapes that do not fit; unknown `align`.

    See Also
    --------
    power_iteration_vjp, simultaneous_iteration
    eigsh : k eigenpairs of a symmetric matrix, for which two close eigenvalues matter less.

    Notes
    -----
    The error of v falls by ``|λ₂/λ₁|`` in each step; a residual r leaves an error of about ``r |λ₁| / gap`` in v.
    Cost: one product with X per step, 2 m² flops.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations" (4th ed., 2013), section 7.3.1.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), info = ddnref.power_iteration(np.asarray([[2.0, 1.0], [1.0, 2.0]]))
    >>> round(float(w), 12), bool(info.converged)
    (3.0, True)
    """
    xp, x, scale, bad, rtol = _prepare("power_iteration", x, symmetric, align, rtol)
    one = full(x.shape[:-2], 1.0, x)  # one number for each item

    def body(state: _Power) -> _Power:
        # v = ± z/‖z‖ and one product with it, by which it is judged.
        v = xp.where(state.active[..., None], state.z / state.size[..., None], state.v)
        z = matvec(x, v)
        w, size = real_dot(v, z), norm(z)
        in_range = size > 0  # or v is in the null space: a zero matrix, or a start without a part in the range
        size = xp.where(in_range, size, one)
        residual = xp.where(in_range, norm(z - w[..., None] * v) / size, one)
        n_iter = state.n_iter + xp.astype(state.active, state.n_iter.dtype)
        active = state.active & in_range & (residual > rtol)  # false for NaN
        return _Power(v, z, w, xp.where(w < 0, -size, size), residual, n_iter, active)

    z = _start(v0, x, ())
    size = norm(z)
    state = _Power(z, z, one, xp.where(size > 0, size, one), one, xp.zeros_like(one, dtype=xp.int32), ~bad)
    state = run(lambda s: s.active, body, state, maxiter=maxiter, check_every=check_every, while_loop=while_loop)

    w, v = scale * state.w, state.v  # undo the scaling; eigenvectors do not change with it
    if align is not None:
        v = align_signs(v, reference, sign=align, axis=-1)  # the start vector determined the sign so far
    info = IterationInfo(~bad & (state.residual <= rtol), state.n_iter, nan_where(bad, state.residual))
    if throw and not is_true(xp.all(info.converged)):
        _raise(bad, info, maxiter, rtol)
    return (nan_where(bad, w), nan_where(bad[..., None], v)), info


@public
def power_iteration_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    x: Array,
    /,
    *,
    method: str = "bordered",
    symmetric: bool = False,
    v0: Array | None = None,
    n_iter: int | None = None,
    throw: bool = True,
) -> Array:
    """Gradient of a loss of the dominant eigenpair, or of any other simple one, with respect to the matrix.

    Parameters
    ----------
    w_bar : (...) array or None
        Cotangent of the eigenvalue; ``None`` where the loss does not use it.
    v_bar : (..., m) array or None
        Cotangent of the eigenvector; ``None`` where the loss does not use it.
    w : (...) array
    v : (..., m) array of unit length
        An eigenpair of `x` from `power_iteration` or from any other solver.
    x : (..., m, m) array
    method : {"bordered", "fixed_point", "unrolled"}
        The KKT system of the declarative node, the linearised fixed point, or the reverse of each step. The first
        two need a converged pair and cost one factorisation; the third differentiates the iteration as it ran.
    symmetric : bool, default False
        The value that the forward was given: whether ``½ (X + Xᵀ)`` was decomposed.
    v0, n_iter
        Only for ``"unrolled"``, which repeats the forward: its start vector and how many steps to reverse.
    throw : bool, default True
        Raise `GaugeError` where the eigenvalue is repeated, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    x_bar : (..., m, m) array
        ``w yᵀ`` for free entries of a general matrix; exactly symmetric with ``symmetric=True``.

    Raises
    ------
    GaugeError
        The eigenvalue is repeated to working precision: its eigenvector is a choice that the matrix does not determine.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; unknown `method`; ``"unrolled"`` without `n_iter`.

    Notes
    -----
    The equations are at the top of the module. An error e of the pair itself leaves about ``e ‖X‖ / gap``. Cost:
    ``⅔ (m+1)³`` flops and two float64 matrices for each item of the batch; unrolled 4 m² flops and m numbers per step.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep declarative networks", TPAMI 44 (2022), proposition 4.5.
    .. [2] J. R. Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1 (1985).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([3.0, 1.0]))
    >>> (w, v), _ = ddnref.power_iteration(x)
    >>> np.round(ddnref.power_iteration_vjp(None, np.asarray([0.0, 1.0]), w, v, x), 12) + 0.0  # of v[1]
    array([[0. , 0. ],
           [0.5, 0. ]])
    """
    _check_vjp("(m,m),(),(m),(),(m)", w_bar, v_bar, w, v, x, method, n_iter, v0)
    if method == "unrolled":
        return _power_unrolled_vjp(w_bar, v_bar, v, x, symmetric, v0, n_iter or 0)
    xp = namespace_of(x)
    w_bar = xp.zeros_like(w) if w_bar is None else w_bar
    v_bar = xp.zeros_like(v) if v_bar is None else v_bar
    return _implicit_vjp(w_bar[..., None], v_bar[..., None], w[..., None], v[..., None], x, method, symmetric, throw)


def _power_unrolled_vjp(
    w_bar: Array | None, v_bar: Array | None, v: Array, x: Array, symmetric: bool, v0: Array | None, n_iter: int
) -> Array:
    """Gradient through `n_iter` steps of power iteration, the last of which gives the eigenvalue ``vᵀXv``."""
    xp = namespace_of(x)
    s = hermitian_part(x) if symmetric else x
    # Repeat the forward and keep every iterate with its signed length.
    start = _start(v0, x, ())
    kept, signed_lengths = [start / norm(start)[..., None]], []
    for _ in range(n_iter - 1):
        z = matvec(s, kept[-1])
        length = norm(z)[..., None]
        length = xp.where(xp.sum(kept[-1] * z, axis=-1, keepdims=True) < 0, -length, length)
        signed_lengths.append(length)
        kept.append(z / length)
    # The last step: v with the sign that was aligned, and λ = vᵀ S v.
    last = kept.pop()
    s_bar, bar = xp.zeros_like(x), xp.zeros_like(last)
    if v_bar is not None:
        # The forward may have flipped the sign.
        bar = xp.where(xp.sum(last * v, axis=-1, keepdims=True) < 0, -v_bar, v_bar)
    if w_bar is not None:
        s_bar = s_bar + outer(w_bar[..., None] * last, last)
        bar = bar + w_bar[..., None] * (matvec(s, last) + matvec(xp.matrix_transpose(s), last))
    for before, length in zip(reversed(kept), reversed(signed_lengths), strict=True):
        # Through the normalisation, then the product.
        z_bar = (bar - last * xp.sum(last * bar, axis=-1, keepdims=True)) / length
        s_bar = s_bar + outer(z_bar, before)
        bar, last = matvec(xp.matrix_transpose(s), z_bar), before
    return hermitian_part(s_bar) if symmetric else s_bar


class _Simultaneous(NamedTuple):
    """A frozen item keeps its q, as in `_Power`."""

    q: Array
    z: Array
    """``X q``, or the start before the first step."""
    t: Array
    residual: Array
    n_iter: Array
    active: Array


@public
def simultaneous_iteration(
    x: Array,
    /,
    n: int,
    *,
    symmetric: bool = False,
    v0: Array | None = None,
    align: str | None = "positive",
    reference: Array | None = None,
    rtol: float | None = None,
    maxiter: int = MAXITER,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array, Array], IterationInfo]:
    """The n eigenvalues of largest magnitude and their eigenvectors, by simultaneous (orthogonal, QR) iteration.

    Parameters
    ----------
    x : (..., m, m) array, float32 or float64
    n : int
        How many, ``1 <= n <= m``. Only n columns are ever multiplied and orthogonalised.
    symmetric : bool, default False
        Iterate with ``½ (X + Xᵀ)``, and rely on its symmetry. With ``False`` the matrix may be any with n real
        dominant eigenvalues of distinct magnitude, and each must converge by itself.
    v0 : (..., m, n) or (m, n) array, optional
        Where to start; default fixed pseudo-random numbers.
    align, reference, rtol, maxiter, check_every, throw, while_loop
        As in `power_iteration`; the residual is that of the subspace, ``‖X Q − Q T‖ <= rtol * ‖T‖``.

    Returns
    -------
    (w, v) : (..., n) and (..., m, n) arrays
        Eigenvalues, largest magnitude first, and eigenvectors of unit length in the columns (right ones if `x` is not
        symmetric, and then not orthogonal).
    info : IterationInfo
        ``converged``, ``n_iter``, ``residual_norm`` (relative), each ``(...)``.

    Raises
    ------
    ConvergenceError, NonFiniteError, TypeError, ValueError
        As `power_iteration`; n out of range.

    See Also
    --------
    simultaneous_iteration_vjp

    Notes
    -----
    In each step the error falls by ``|λ_{n+1}/λ_n|`` for a symmetric matrix, otherwise by the largest
    ``|λ_{i+1}/λ_i|``, ``i <= n``. Cost of a step: 2 m² n flops for the product and 8 m n² for the orthogonalisation.

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations" (4th ed., 2013), sections 7.3.2 and 8.2.4.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), info = ddnref.simultaneous_iteration(np.diag(np.asarray([1.0, -5.0, 3.0])), 2)
    >>> np.round(w, 12)
    array([-5.,  3.])
    """
    xp, x, scale, bad, rtol = _prepare("simultaneous_iteration", x, symmetric, align, rtol)
    n = operator.index(n)
    if not 1 <= n <= x.shape[-1]:
        raise ValueError(f"n is {n}, expected 1 <= n <= {x.shape[-1]} for a matrix with {x.shape[-1]} columns.")
    one = full(x.shape[:-2], 1.0, x)

    def body(state: _Simultaneous) -> _Simultaneous:
        q = xp.where(state.active[..., None, None], qr(state.z)[0], state.q)  # a frozen item keeps its basis
        z = x @ q
        t = xp.matrix_transpose(q) @ z  # X in the basis q
        size, left = norm(t, 2), norm(z - q @ t, 2)
        if not symmetric:
            left = left + norm(xp.tril(t, k=-1), 2)  # each column by itself: T is triangular
        in_range = size > 0
        residual = xp.where(in_range, left / xp.where(in_range, size, one), one)
        n_iter = state.n_iter + xp.astype(state.active, state.n_iter.dtype)
        return _Simultaneous(q, z, t, residual, n_iter, state.active & in_range & (residual > rtol))

    z, t = _start(v0, x, (n,)), xp.zeros_like(x[..., :n, :n])
    state = _Simultaneous(z, z, t, float("inf") * one, xp.zeros_like(one, dtype=xp.int32), ~bad)
    state = run(lambda s: s.active, body, state, maxiter=maxiter, check_every=check_every, while_loop=while_loop)

    w, u = _eigenpairs_of_t(xp, state.t, symmetric)  # Rayleigh–Ritz in the basis
    v = state.q @ u
    if align is not None:
        v = align_signs(v, reference, sign=align)
    info = IterationInfo(~bad & (state.residual <= rtol), state.n_iter, nan_where(bad, state.residual))
    if throw and not is_true(xp.all(info.converged)):
        _raise(bad, info, maxiter, rtol)
    return (nan_where(bad[..., None], scale[..., None] * w), nan_where(bad[..., None, None], v)), info


@public
def simultaneous_iteration_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    x: Array,
    /,
    *,
    method: str = "bordered",
    symmetric: bool = False,
    v0: Array | None = None,
    n_iter: int | None = None,
    throw: bool = True,
) -> Array:
    """Gradient of a loss of n eigenpairs with respect to the matrix.

    Parameters
    ----------
    w_bar : (..., n) array or None
    v_bar : (..., m, n) array or None
    w, v : (..., n) and (..., m, n) arrays
        Eigenpairs of `x` from `simultaneous_iteration` or any other solver, columns of unit length.
    x, method, symmetric, v0, n_iter, throw
        As in `power_iteration_vjp`. ``"unrolled"`` with n > 1 needs ``symmetric=True``.

    Returns
    -------
    x_bar : (..., m, m) array
        Exactly symmetric with ``symmetric=True``.

    Raises
    ------
    GaugeError
        An eigenvalue is repeated to working precision, and the loss depends on how its eigenvectors were chosen (with
        ``method="bordered", symmetric=True``) or at all (otherwise); or a cluster is cut by the n-th.
    TypeError, ValueError
        As `power_iteration_vjp`.

    Notes
    -----
    Cost: n factorisations of matrices of order m + 1 as in `power_iteration_vjp`, of order m + n with
    ``symmetric=True``. On NumPy these take half the flops, ``⅓ m³`` each, if the n pairs are the dominant ones.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([3.0, 1.0, -2.0]))
    >>> (w, v), _ = ddnref.simultaneous_iteration(x, 2, symmetric=True)
    >>> w_bar = np.asarray([0.0, 1.0])
    >>> np.round(ddnref.simultaneous_iteration_vjp(w_bar, None, w, v, x, symmetric=True), 12) + 0.0
    array([[0., 0., 0.],
           [0., 0., 0.],
           [0., 0., 1.]])
    """
    _check_vjp("(m,m),(n),(m,n),(n),(m,n)", w_bar, v_bar, w, v, x, method, n_iter, v0)
    if method == "unrolled":
        if not symmetric and v.shape[-1] > 1:
            raise ValueError('method "unrolled" with n > 1 columns needs symmetric=True; "bordered" does not.')
        return _simultaneous_unrolled_vjp(w_bar, v_bar, w, v, x, symmetric, v0, n_iter or 0)
    xp = namespace_of(x)
    w_bar = xp.zeros_like(w) if w_bar is None else w_bar
    v_bar = xp.zeros_like(v) if v_bar is None else v_bar
    return _implicit_vjp(w_bar, v_bar, w, v, x, method, symmetric, throw)


def _simultaneous_unrolled_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    x: Array,
    symmetric: bool,
    v0: Array | None,
    n_iter: int,
) -> Array:
    """Gradient through `n_iter` steps of simultaneous iteration and the eigenpairs of ``T = QᵀXQ`` after the last."""
    xp = namespace_of(x)
    s = hermitian_part(x) if symmetric else x
    s_t = xp.matrix_transpose(s)
    # Repeat the forward and keep every factorisation.
    kept = [qr(_start(v0, x, v.shape[-1:]))]
    for _ in range(n_iter - 1):
        kept.append(qr(s @ kept[-1][0]))
    q, _ = kept[-1]
    q_t = xp.matrix_transpose(q)

    # T U = U Λ and V = Q U, in the order and with the signs of (w, v).
    values, u = eigh(hermitian_part(q_t @ s @ q))
    ascending = xp.argsort(w, axis=-1)  # as eigh orders them
    ordered_v = xp.take_along_axis(v, ascending[..., None, :], axis=-1)
    u = xp.where(xp.sum((q @ u) * ordered_v, axis=-2, keepdims=True) >= 0, u, -u)  # signs as in v
    values_bar = None if w_bar is None else xp.take_along_axis(w_bar, ascending, axis=-1)
    u_bar, q_bar = None, xp.zeros_like(q)
    if v_bar is not None:
        ordered = xp.take_along_axis(v_bar, ascending[..., None, :], axis=-1)
        u_bar, q_bar = q_t @ ordered, ordered @ xp.matrix_transpose(u)
    t_bar = eigh_vjp(values_bar, u_bar, values, u, gauge_rtol=float("inf"), throw=False)
    q_bar, s_bar = q_bar + (s @ q + s_t @ q) @ t_bar, q @ t_bar @ q_t

    for (q, r), (before, _) in zip(reversed(kept[1:]), reversed(kept[:-1]), strict=True):
        z_bar = qr_vjp(q_bar, None, q, r, throw=False)  # through the orthogonalisation, then the product
        s_bar = s_bar + z_bar @ xp.matrix_transpose(before)
        q_bar = s_t @ z_bar
    return hermitian_part(s_bar) if symmetric else s_bar


# --- the forward passes: preparation and ends -----------------------------------------------------------------------


def _prepare(
    function: str, x: Array, symmetric: bool, align: str | None, rtol: float | None
) -> tuple[Namespace, Array, Array, Array, float]:
    """Return the matrix to iterate with over a power of two, that power, which items are not finite, the tolerance.

    The power is the one below the largest entry of each matrix, 1 for zero. Scaled so, squares neither overflow nor
    vanish, and nothing is rounded; items that are not finite become zero.
    """
    xp = namespace(x=x)
    check_square("x", x)
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: a matrix without entries has no eigenvalue.")
    refuse_recording(function, x)
    if is_complex(x):
        raise TypeError(f"{function} takes real matrices, got {x.dtype}: use ddnref.eigsh for Hermitian ones.")
    if align is not None and align not in SIGNS:
        raise ValueError(f'align is {align!r}, expected "positive", "negative" or None.')
    size = largest(x, 2)
    bad = ~xp.isfinite(size)  # the maximum keeps NaN and infinity, which saves a pass over x
    x = xp.where(bad[..., None, None], full((), 0.0, x), x)  # they are inactive from the start
    if symmetric:
        x = symmetrised(x)
        size = largest(x, 2)
    scale = power_of_two_below(nan_where(bad, size))
    default = (RTOL + x.shape[-1] ** 0.5) * eps(xp, x.dtype)
    return xp, x / scale[..., None, None], scale, bad, default if rtol is None else rtol


def _start(v0: Array | None, x: Array, columns: tuple[int, ...]) -> Array:
    """The given start, or fixed pseudo-random vectors, for every item of the batch: ``(..., m, *columns)``."""
    xp = namespace_of(x)
    if v0 is None:
        v0 = noise(0, x.shape[-1], x)  # the same for every library
        if columns:
            v0 = xp.stack([noise(j, x.shape[-1], x) for j in range(*columns)], axis=-1)
    else:
        _check_start(v0, x, columns)
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
    """Unit eigenvectors of an upper triangular matrix with distinct diagonal entries, by back substitution.

    For column k, ``u_k = 1`` and ``u_i = Σ_{i<j<=k} t_ij u_j / (t_kk − t_ii)`` upwards.
    """
    n = t.shape[-1]
    zero, one = xp.zeros_like(t[..., 0, 0]), xp.ones_like(t[..., 0, 0])
    columns = []
    for k in range(n):
        u = [zero] * n
        u[k] = one  # the entry that fixes the scale
        for i in range(k - 1, -1, -1):
            total = zero
            for j in range(i + 1, k + 1):
                total = total + t[..., i, j] * u[j]
            gap = t[..., k, k] - t[..., i, i]  # NaN for equal eigenvalues, which have no unique vectors
            u[i] = total / xp.where(gap == 0, full((), float("nan"), gap), gap)
        column = xp.stack(u, axis=-1)
        columns.append(column / norm(column)[..., None])
    return xp.stack(columns, axis=-1)


def _raise(bad: Array, info: IterationInfo, maxiter: int, rtol: float) -> NoReturn:
    """Raise for items that are not finite, or else for those that have not converged."""
    xp = namespace_of(bad)
    if is_true(xp.any(bad)):
        raise NonFiniteError(
            "x contains NaN or infinity. The most likely cause is a diverged step or a division by zero before this "
            "call. Pass throw=False to get NaN for these items of the batch and the right results for the others."
        )
    # For the message.
    failed, items = int(xp.sum(xp.astype(~info.converged, xp.int32))), math.prod(info.converged.shape)
    worst = float(xp.max(info.residual_norm))
    raise ConvergenceError(
        f"{failed} of {items} items have not converged after at most {maxiter} steps: relative "
        f"residual {worst:.1e} > rtol {rtol:.1e}. The most likely cause is that two eigenvalues have nearly the same "
        "largest magnitude (λ and −λ, a complex pair, a small gap behind the last one wanted), or that the matrix is "
        "zero. Use ddnref.eigsh or ddnref.eigh for symmetric matrices, pass a larger maxiter or rtol, a shifted "
        "matrix, or throw=False to get the last iterate and info."
    )


# --- the implicit VJPs ----------------------------------------------------------------------------------------------


def _check_vjp(
    signature: str,
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    x: Array,
    method: str,
    n_iter: int | None,
    v0: Array | None,
) -> None:
    """Validate the arguments of a VJP."""
    namespace(x=x)
    if is_complex(x):
        raise TypeError(
            f"The iterations and their VJPs take real matrices, got dtype {x.dtype}: use ddnref.eigh or ddnref.eigsh."
        )
    conform(signature, x=x, w=w, v=v, w_bar=w_bar, v_bar=v_bar)
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    if method == "unrolled" and n_iter is None:
        raise ValueError('method "unrolled" needs n_iter, the number of steps to repeat and reverse.')
    if v0 is not None:
        _check_start(v0, x, tuple(v.shape[x.ndim - 1 :]))


class _Refined(NamedTuple):
    """Cotangents, eigenvalues and unit eigenvectors in float64, and their matrix as it was given."""

    w_bar: Array
    v_bar: Array
    w: Array
    y: Array
    x: Array
    x_y: Array
    """``X Y``."""
    size: Array
    """The largest |λ| of each item, ``(..., 1)``."""
    unit: float
    """Machine epsilon of the dtype that was given."""


def _implicit_vjp(
    w_bar: Array, v_bar: Array, w: Array, v: Array, x: Array, method: str, symmetric: bool, throw: bool
) -> Array:
    """X̄ of n pairs, ``X̄ = L Yᵀ`` or its Hermitian part, with L from one of the systems."""
    xp = namespace_of(x)
    if 0 in v.shape:  # no pairs, no gradient
        return xp.zeros_like(x)
    form = _fixed_point if method == "fixed_point" else _bordered_symmetric if symmetric else _bordered
    z, unit = symmetrised(x) if symmetric else x, eps(xp, x.dtype)  # on NumPy x itself where it is symmetric

    # Refine the pairs in float64: unit vectors, and Rayleigh quotients instead of rounded eigenvalues.
    y = double(xp, v)
    y = y / xp.sqrt(xp.sum(y * y, axis=-2, keepdims=True))
    z_y = product_in_double(z, y)
    rayleigh = xp.sum(y * z_y, axis=-2)
    size = xp.max(xp.abs(rayleigh), axis=-1, keepdims=True)
    left, growth, gauge = form(_Refined(double(xp, w_bar), double(xp, v_bar), rayleigh, y, z, z_y, size, unit))
    bad = singularity.amplification(growth, size[..., 0], unit) | gauge
    if throw and is_true(xp.any(bad & xp.isfinite(w[..., 0]))):
        raise GaugeError(
            "An eigenvalue is repeated to working precision, or the n-th cuts a cluster of equal ones, so that its "
            "eigenvector is a choice that the matrix does not determine. Take more columns, so that the cluster is "
            'whole, with symmetric=True and method="bordered" and a loss of its projector; or separate the '
            "eigenvalues, or pass throw=False to get NaN for these items."
        )
    left = nan_where(bad[..., None, None], left)  # NaN in a whole factor makes all of X̄ NaN
    left, y = (xp.astype(a, x.dtype, copy=False) for a in (left / 2 if symmetric else left, y))
    return hermitian_sum(left, y) if symmetric else left @ xp.matrix_transpose(y)


def _bordered(p: _Refined) -> tuple[Array, Array, bool]:
    """W of ``X̄ = W Yᵀ`` for any real matrix, one pair at a time, and how much its systems amplify."""
    xp = namespace_of(p.x)

    def solutions(w: Array, border: Array, right: Array, x: Array) -> tuple[Array, Array]:
        x_t = xp.matrix_transpose(x)  # left eigenvectors are those of Xᵀ
        systems = (bordered(shifted(x_t, w[..., i]), border[..., i : i + 1]) for i in range(w.shape[-1]))
        return solve_each(systems, right)

    # The border is scaled like the matrix.
    right = xp.concat([p.v_bar, (p.size * p.w_bar)[..., None, :]], axis=-2)
    left, growth = in_chunks(solutions, p.w, p.size[..., None] * p.y, right, p.x)
    return left[..., :-1, :], growth, False


def _bordered_symmetric(p: _Refined) -> tuple[Array, Array, Array | bool]:
    """``W + Y K`` of ``X̄ = sym((W + Y K) Yᵀ)`` for a symmetric matrix, ``K = diag(λ̄) + ½ F ∘ (M − Mᵀ)``.

    The third result says where the loss depends on the gauge of equal eigenvalues among the n.
    """
    xp, w_bar, w, y = namespace_of(p.x), p.w_bar, p.w, p.y
    m_ = xp.matrix_transpose(y) @ p.v_bar  # the part of the cotangent inside span(Y)
    left, growth = solve_on_complement(w, y, p.v_bar - y @ m_, p.size, p.x)
    if w.shape[-1] == 1:  # no others inside: a third of the whole time at m = 32 on NumPy
        return left + y * w_bar[..., None, :], growth, False

    # Inside span(Y): F is zero between equal eigenvalues, where neither M nor λ̄ may differ.
    gap = w[..., None, :] - w[..., :, None]
    same = xp.abs(gap) <= SAME_RTOL * p.unit * p.size[..., None]
    zero, skew = xp.zeros_like(gap), (m_ - xp.matrix_transpose(m_)) / 2
    k = xp.where(same, zero, skew / xp.where(same, xp.ones_like(gap), gap))
    k = k + w_bar[..., None, :] * identity(w.shape[-1], w)
    jump = xp.where(same, w_bar[..., None, :] - w_bar[..., :, None], zero)  # equal eigenvalues have no order
    gauge = exceeds(largest(xp.where(same, skew, zero), 2), largest(m_, 2), p.unit**0.5)
    return left + y @ k, growth, gauge | exceeds(largest(jump, 2), largest(w_bar), p.unit**0.5)


def _fixed_point(p: _Refined) -> tuple[Array, Array, bool]:
    """``P q / λ + λ̄ y``, each pair by itself, from λ times its equation.

    It holds for every eigenvector, whether the iteration would find it or not.
    """
    xp = namespace_of(p.x)

    def solutions(w: Array, y: Array, x_t_y: Array, right: Array, x: Array) -> tuple[Array, Array]:
        x_t, y_t = xp.matrix_transpose(x), xp.matrix_transpose(y)
        # λ I − XᵀP = λ I − (Xᵀ − Xᵀy yᵀ)
        x_t_p = (x_t - x_t_y[..., i : i + 1] @ y_t[..., i : i + 1, :] for i in range(w.shape[-1]))
        return solve_each((shifted(a, w[..., i]) for i, a in enumerate(x_t_p)), right)

    x_t_y = product_in_double(xp.matrix_transpose(p.x), p.y)  # Xᵀy
    right = p.v_bar + p.w_bar[..., None, :] * (p.x_y + x_t_y)
    q, growth = in_chunks(solutions, p.w, p.y, x_t_y, right, p.x)
    return q - p.y * xp.sum(p.y * q, axis=-2, keepdims=True) + p.w_bar[..., None, :] * p.y, growth, False
