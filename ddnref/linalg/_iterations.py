"""Dominant eigenpairs by power iteration and by simultaneous iteration, and three forms of both derivatives.

    power         v ← ± X v / ‖X v‖,      λ = vᵀ X v
    simultaneous  Q R = X Q,              T = Qᵀ X Q

The sign follows that of λ, so that a negative eigenvalue has a fixed point too. Simultaneous iteration stops when
the span of Q is invariant, ``X Q = Q T``, and takes the eigenpairs of the n×n matrix T, so that close or equal
eigenvalues among the n cost no further steps.

A matrix that is not symmetric is balanced first: ``D⁻¹XD`` has the same eigenvalues, D holds powers of two, and
``v = D y``. Its eigenvalues may still be badly conditioned, whatever the residual ``r = X y − λ y`` says. So each pair
is judged at the end by its left eigenvector, which one step of inverse iteration gives,

    (λ⁺ I − Xᵀ) u = α y,  uᵀy = 1,      δ = uᵀr,      λ* = λ + δ + O(κ ‖(λI − X)⁺‖ ‖r‖ |δ|),    κ = ‖u‖

with λ⁺ a few rounding errors outside λ, so that equal eigenvalues count as one. δ is the error of λ to first order.
Where the iteration has come down to rounding, δ is rounding too, and is added to λ; and where D is not the identity, y
takes a step of inverse iteration as well, because entries that are rounding in y may be the largest ones of ``D y``.

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

The JVPs solve the transposes of these systems, from the motion ``b = Ẋ y`` of the matrix:

bordered       ⎡ λI − X   y ⎤ ⎡ ẏ ⎤   ⎡ b ⎤
               ⎣   yᵀ     0 ⎦ ⎣ λ̇ ⎦ = ⎣ 0 ⎦

               With X symmetric and n pairs: ``S = Yᵀ sym(Ẋ) Y``, ``λ̇ = diag S`` and ``Ẏ = Y (F ∘ S) + U``, where U
               solves the system bordered by all of Y with right-hand side ``(I − Y Yᵀ) sym(Ẋ) Y``.

fixed point    (λI − P X) ẏ = P b,       λ̇ = yᵀb + ẏᵀ (X + Xᵀ) y

unrolled       each step moves along with its iterate, so that nothing is kept.

The matrix ``λI − X`` alone is singular at the solution; bordered, or on the fixed point's complement, it is not.
Systems are built and solved in float64, because an eigenvalue rounded to float32 leaves an error of 3e-5 in the
gradient.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

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
    namespace,
    namespace_of,
    nan_where,
    power_of_two_below,
    refuse_recording,
    with_axes,
)
from ddnref._core.checks import check_dtypes, check_shapes, check_square, conform
from ddnref._core.loops import CHECK_EVERY, IterationInfo, LoopOptions, WhileLoop, run
from ddnref._core.noise import noise
from ddnref._kernels import singularity
from ddnref._kernels.bordered import (
    bordered,
    in_chunks,
    inverse_iteration,
    product_in_double,
    shifted,
    solve_each,
    solve_on_complement,
)
from ddnref._kernels.dense import eigh, hermitian_part, hermitian_sum, identity, matvec, outer, symmetrised
from ddnref._kernels.eigh_vjp import exceeds
from ddnref._kernels.public import public
from ddnref._kernels.vectors import largest, norm, normalised, on_host, power_of_two, quotient, real_dot, safe_norm
from ddnref.errors import ConvergenceError, GaugeError, NonFiniteError
from ddnref.linalg._eigh import RTOL as SAME_RTOL
from ddnref.linalg._eigh import eigh_vjp
from ddnref.linalg._qr import qr, qr_jvp, qr_vjp
from ddnref.linalg._residuals import SIGNS, align_signs

RTOL = 16  # in units of eps, with √m more: the rounding of products with m terms reached 18 at m = 512
ERROR_RTOL = {2.0**-52: 1e-12, 2.0**-23: 3e-6}
"""The largest error of an eigenvalue that counts as converged by default, by machine epsilon."""
ROUNDING = 0.5  # of a product, in units of eps times the root of the sum of its squared terms: see `_judge`
STALLED = 60  # steps without a smaller residual, after which one near rounding is as small as it gets
SWEEPS = 10  # of balancing: each removes half of an imbalance in powers of two, five or six are enough for 1e±16
MAXITER = 1000
METHODS = ("bordered", "fixed_point", "unrolled")


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
    align, reference
        ``sign`` and ``reference`` of `align_signs`; ``align=None`` leaves the sign as the start vector determines it.
    rtol : float, optional
        The largest accepted error of the eigenvalue, ``info.error <= rtol``; default 1e-12, and 3e-6 in single
        precision, and then the iteration goes on down to rounding. With ``symmetric=True`` of the residual, which
        bounds the error: ``‖X v − λ v‖ <= rtol * ‖X v‖``, default ``(16 + √m) * eps``, the rounding of the products.
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
        ``converged``, ``n_iter``, ``residual_norm`` (relative) and ``error``, an estimate of the relative error of w,
        each ``(...)``.

    Raises
    ------
    ConvergenceError
        Not converged within `maxiter`: two eigenvalues of (nearly) the same largest magnitude, such as λ and −λ or a
        complex pair, let the iteration oscillate or converge very slowly; a zero matrix has no dominant eigenvalue. Or
        the matrix is so far from normal that rounding alone moves its eigenvalue by more than `rtol`.
    NonFiniteError
        An item contains NaN or infinity; with ``throw=False`` it comes out as NaN and the others are not affected.
    TypeError, ValueError
        Complex, integer or mixed input; shapes that do not fit; unknown `align`.

    See Also
    --------
    eigsh : k eigenpairs of a symmetric matrix, for which two close eigenvalues matter less.

    Notes
    -----
    The error of v falls by ``|λ₂/λ₁|`` in each step; a residual r leaves an error of about ``r |λ₁| / gap`` in v. A
    matrix that is not symmetric is balanced first [2]_, and its eigenvalue is judged by left and right eigenvectors
    from a step of inverse iteration, as described at the top of the module: where it is far from normal, a small
    residual says nothing. Cost: one product with X per step, 2 m² flops; balancing up to 40 m², and a factorisation or
    two of ``⅔ m³`` at the end, neither for a symmetric matrix if `symmetric` says so (or, on NumPy, if it is one).

    References
    ----------
    .. [1] G. H. Golub and C. F. Van Loan, "Matrix Computations" (4th ed., 2013), sections 7.3.1 and 7.2.2 (condition).
    .. [2] B. N. Parlett and C. Reinsch, "Balancing a matrix for calculation of eigenvalues and eigenvectors", Numer.
       Math. 13 (1969).

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), info = ddnref.power_iteration(np.asarray([[2.0, 1.0], [1.0, 2.0]]))
    >>> round(float(w), 12), bool(info.converged)
    (3.0, True)
    """
    g = _prepare("power_iteration", x, symmetric, align, rtol, while_loop)
    xp = namespace_of(x)

    def step(state: _State) -> tuple[Array, ...]:
        # v = ± z/‖z‖ and one product with it, by which it is judged.
        signed = xp.where(state.t < 0, -state.size, state.size)
        v = xp.where(state.active[..., None], state.z / signed[..., None], state.y)
        z = matvec(g.x, v)
        w = real_dot(v, z)
        return v, z, w, norm(z), norm(z - w[..., None] * v)

    def pairs(state: _State) -> tuple[Array, Array, Array]:
        return state.t[..., None], state.y[..., None], state.z[..., None]

    start, t = _start(v0, g.x, g.d, ()), full(x.shape[:-2], 1.0, x)
    options = LoopOptions(g.rtol, maxiter, check_every, while_loop, throw)
    (w, y), info = _iterate(step, pairs, normalised(start, norm(start)), t, g, options)
    v = _unbalanced(y, g)[..., 0]
    if align is not None:
        v = align_signs(v, reference, sign=align, axis=-1)  # the start vector determined the sign so far
    w, info = g.scale * w[..., 0], info._replace(error=info.error[..., 0])  # undo the scaling
    return (nan_where(g.bad, w), nan_where(g.bad[..., None], v)), info


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
    w_bar, v_bar : (...) array and (..., m) array, or None
        Cotangents of eigenvalue and eigenvector; ``None`` for one that the loss does not use.
    w, v, x : (...), (..., m) and (..., m, m) arrays
        An eigenpair of `x`, from `power_iteration` or any other solver, the vector of unit length; the matrix.
    method : {"bordered", "fixed_point", "unrolled"}
        The KKT system of the declarative node, the linearised fixed point, or the reverse of each step. The first
        two need a converged pair and cost one factorisation; the third differentiates the iteration as it ran.
    symmetric : bool, default False
        The value that the forward was given: whether ``½ (X + Xᵀ)`` was decomposed.
    v0, n_iter
        Only for ``"unrolled"``, which repeats the forward: its start vector and how many steps to reverse.
    throw : bool, default True
        Raise `GaugeError`, reading one flag. With ``False`` such an item is NaN.

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
    The equations are at the top of the module. An error e of the pair itself leaves about ``e ‖X‖ / gap``. A matrix
    that is not symmetric is balanced first, with the pair and the cotangent in its coordinates. Cost:
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
    _check("(m,m),(),(m),(),(m)", w, v, x, method, n_iter, v0, w_bar=w_bar, v_bar=v_bar)
    w_bar, v_bar = _cotangents(w_bar, v_bar, w, v)
    if method == "unrolled":
        return _power_unrolled_vjp(w_bar, v_bar, v, x, symmetric, v0, n_iter or 0)
    return _implicit_vjp(w_bar[..., None], v_bar[..., None], w[..., None], v[..., None], x, method, symmetric, throw)


def _power_unrolled_vjp(
    w_bar: Array, v_bar: Array, v: Array, x: Array, symmetric: bool, v0: Array | None, n_iter: int
) -> Array:
    """Gradient through `n_iter` steps of power iteration, the last of which gives the eigenvalue ``vᵀXv``."""
    xp, (s, d) = namespace_of(x), _in_coordinates(x, symmetric)
    # Repeat the forward and keep every iterate with its signed length.
    start = _start(v0, x, d, ())
    kept, signed_lengths = [start / norm(start)[..., None]], []
    for _ in range(n_iter - 1):
        z = matvec(s, kept[-1])
        length = norm(z)[..., None]
        length = xp.where(xp.sum(kept[-1] * z, axis=-1, keepdims=True) < 0, -length, length)
        signed_lengths.append(length)
        kept.append(z / length)
    # The last step: v = D y / ‖D y‖ with the sign that was aligned, and λ = yᵀ S y.
    last = kept.pop()
    scaled = last if d is None else d * last
    bar = xp.where(xp.sum(scaled * v, axis=-1, keepdims=True) < 0, -v_bar, v_bar)  # the forward may have flipped it
    if d is not None:
        size = safe_norm(scaled)[..., None]
        unit = scaled / size
        bar = d * ((bar - unit * xp.sum(unit * bar, axis=-1, keepdims=True)) / size)
    bar = bar + w_bar[..., None] * (matvec(s, last) + matvec(xp.matrix_transpose(s), last))
    s_bar = outer(w_bar[..., None] * last, last)
    for before, length in zip(reversed(kept), reversed(signed_lengths), strict=True):
        # Through the normalisation, then the product.
        z_bar = (bar - last * xp.sum(last * bar, axis=-1, keepdims=True)) / length
        s_bar = s_bar + outer(z_bar, before)
        bar, last = matvec(xp.matrix_transpose(s), z_bar), before
    return hermitian_part(s_bar) if d is None else s_bar / d[..., :, None] * d[..., None, :]


@public
def power_iteration_jvp(
    x_dot: Array,
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
) -> tuple[Array, Array]:
    """Derivative of the dominant eigenpair, or of any other simple one, along a direction of the matrix.

    Parameters
    ----------
    x_dot : (..., m, m) array
        The direction; with ``symmetric=True`` its symmetric part counts.
    w, v, x, method, symmetric, v0, n_iter
        As in `power_iteration_vjp`.
    throw : bool, default True
        Raise `GaugeError`, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    w_dot, v_dot : (...) array and (..., m) array
        ``v_dot`` is orthogonal to the eigenvector, whose length stays one.

    Raises
    ------
    GaugeError, TypeError, ValueError
        As `power_iteration_vjp`; `x_dot` is ``None``.

    Notes
    -----
    The equations are at the top of the module; each is the transpose of the VJP's, and costs as much. ``"unrolled"``
    takes 8 m² flops per step and keeps nothing.

    References
    ----------
    .. [1] J. R. Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1 (1985).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([3.0, 1.0]))
    >>> (w, v), _ = ddnref.power_iteration(x)
    >>> w_dot, v_dot = ddnref.power_iteration_jvp(np.asarray([[1.0, 0.0], [1.0, 0.0]]), w, v, x)
    >>> round(float(w_dot), 12), (np.round(v_dot, 12) + 0.0).tolist()
    (1.0, [0.0, 0.5])
    """
    _check("(m,m),(),(m),(m,m)", w, v, x, method, n_iter, v0, x_dot=x_dot)
    if method == "unrolled":
        return _power_unrolled_jvp(x_dot, v, x, symmetric, v0, n_iter or 0)
    w_dot, v_dot = _implicit_jvp(x_dot, w[..., None], v[..., None], x, method, symmetric, None, throw)
    return w_dot[..., 0], v_dot[..., 0]


def _power_unrolled_jvp(
    x_dot: Array, v: Array, x: Array, symmetric: bool, v0: Array | None, n_iter: int
) -> tuple[Array, Array]:
    """Derivative of `n_iter` steps of power iteration, the last of which gives the eigenvalue ``vᵀXv``."""
    xp, (s, d) = namespace_of(x), _in_coordinates(x, symmetric)
    s_dot = hermitian_part(x_dot) if d is None else x_dot / d[..., :, None] * d[..., None, :]
    # y ← ± z/‖z‖ with z = S y, and both tangents.
    y = _start(v0, x, d, ())
    y = y / norm(y)[..., None]
    y_dot = xp.zeros_like(y)
    for _ in range(n_iter - 1):
        z, z_dot = matvec(s, y), matvec(s_dot, y) + matvec(s, y_dot)
        length = norm(z)[..., None]
        length = xp.where(xp.sum(y * z, axis=-1, keepdims=True) < 0, -length, length)
        y = z / length
        y_dot = (z_dot - y * xp.sum(y * z_dot, axis=-1, keepdims=True)) / length
    # The last step: λ = yᵀ S y, and v = D y / ‖D y‖ with the sign that was aligned.
    both = matvec(s, y) + matvec(xp.matrix_transpose(s), y)
    w_dot = xp.sum(y * matvec(s_dot, y) + y_dot * both, axis=-1)
    scaled = y if d is None else d * y
    if d is not None:
        size = safe_norm(scaled)[..., None]
        unit, y_dot = scaled / size, d * y_dot / size
        y_dot = y_dot - unit * xp.sum(unit * y_dot, axis=-1, keepdims=True)
    return w_dot, xp.where(xp.sum(scaled * v, axis=-1, keepdims=True) < 0, -y_dot, y_dot)


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
        dominant eigenvalues, no two of them of opposite sign and the same magnitude; each must converge by itself.
    v0 : (..., m, n) or (m, n) array, optional
        Where to start; default fixed pseudo-random numbers.
    align, reference, rtol, maxiter, check_every, throw, while_loop
        As in `power_iteration`. The error of each eigenvalue must be at most `rtol` times the largest magnitude; the
        residual is that of the subspace, ``‖X Q − Q T‖ <= rtol * ‖T‖``.

    Returns
    -------
    (w, v) : (..., n) and (..., m, n) arrays
        Eigenvalues, largest magnitude first, and eigenvectors of unit length in the columns (right ones if `x` is not
        symmetric, and then not orthogonal).
    info : IterationInfo
        As of `power_iteration`; ``error`` is ``(..., n)``, each relative to its own eigenvalue.

    Raises
    ------
    ConvergenceError, NonFiniteError, TypeError, ValueError
        As `power_iteration`; n out of range.

    Notes
    -----
    In each step the error falls by ``|λ_{n+1}/λ_n|`` for a symmetric matrix, otherwise by the largest
    ``|λ_{i+1}/λ_i|``, ``i <= n``. Cost of a step: 2 m² n flops for the product and 8 m n² for the orthogonalisation; of
    a matrix that is not symmetric a factorisation or two for each pair at the end.

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
    g = _prepare("simultaneous_iteration", x, symmetric, align, rtol, while_loop)
    xp, n = namespace_of(x), operator.index(n)
    if not 1 <= n <= x.shape[-1]:
        raise ValueError(f"n is {n}, expected 1 <= n <= {x.shape[-1]} for a matrix with {x.shape[-1]} columns.")

    def step(state: _State) -> tuple[Array, ...]:
        q = xp.where(state.active[..., None, None], qr(state.z)[0], state.y)
        z = g.x @ q
        t = xp.matrix_transpose(q) @ z  # X in the basis q
        left = norm(z - q @ t, 2)
        if not symmetric:
            left = left + norm(xp.tril(t, k=-1), 2)  # each column by itself: T is triangular
        return q, z, t, norm(t, 2), left

    def pairs(state: _State) -> tuple[Array, Array, Array]:
        w, u = _eigenpairs_of_t(xp, state.t, symmetric)  # Rayleigh–Ritz in the basis
        return w, state.y @ u, state.z @ u

    options = LoopOptions(g.rtol, maxiter, check_every, while_loop, throw)
    start, t = _start(v0, g.x, g.d, (n,)), xp.zeros_like(x[..., :n, :n])
    (w, y), info = _iterate(step, pairs, start, t, g, options)
    v = _unbalanced(y, g)
    if align is not None:
        v = align_signs(v, reference, sign=align)
    return (nan_where(g.bad[..., None], g.scale[..., None] * w), nan_where(g.bad[..., None, None], v)), info


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
    w_bar, v_bar, w, v : (..., n) and (..., m, n) arrays
        Cotangents, one of which may be ``None``, and eigenpairs of `x` from `simultaneous_iteration` or any other
        solver, columns of unit length.
    x, method, symmetric, v0, n_iter, throw
        As in `power_iteration_vjp`. ``"unrolled"`` with n > 1 needs ``symmetric=True``.

    Returns
    -------
    x_bar : (..., m, m) array, exactly symmetric with ``symmetric=True``

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
    _check("(m,m),(n),(m,n),(n),(m,n)", w, v, x, method, n_iter, v0, w_bar=w_bar, v_bar=v_bar)
    w_bar, v_bar = _cotangents(w_bar, v_bar, w, v)
    if method == "unrolled":
        _check_unrolled(v, symmetric)
        if not symmetric:  # a single column is a power iteration
            start = None if v0 is None else v0[..., 0]
            return _power_unrolled_vjp(w_bar[..., 0], v_bar[..., 0], v[..., 0], x, False, start, n_iter or 0)
        return _simultaneous_unrolled_vjp(w_bar, v_bar, w, v, x, v0, n_iter or 0)
    return _implicit_vjp(w_bar, v_bar, w, v, x, method, symmetric, throw)


def _simultaneous_unrolled_vjp(
    w_bar: Array, v_bar: Array, w: Array, v: Array, x: Array, v0: Array | None, n_iter: int
) -> Array:
    """Gradient through `n_iter` steps with a symmetric matrix and the eigenpairs of ``T = QᵀXQ`` after the last."""
    xp, s = namespace_of(x), hermitian_part(x)
    # Repeat the forward and keep every factorisation.
    kept = [qr(_start(v0, x, None, v.shape[-1:]))]
    for _ in range(n_iter - 1):
        kept.append(qr(s @ kept[-1][0]))
    q, _ = kept[-1]
    q_t = xp.matrix_transpose(q)

    # T U = U Λ and V = Q U, in the order and with the signs of (w, v).
    values, u = eigh(hermitian_part(q_t @ s @ q))
    ascending = xp.argsort(w, axis=-1)  # as eigh orders them
    w_bar = xp.take_along_axis(w_bar, ascending, axis=-1)
    v, v_bar = (xp.take_along_axis(a, ascending[..., None, :], axis=-1) for a in (v, v_bar))
    u = xp.where(xp.sum((q @ u) * v, axis=-2, keepdims=True) >= 0, u, -u)  # signs as in v
    t_bar = eigh_vjp(w_bar, q_t @ v_bar, values, u, gauge_rtol=float("inf"), throw=False)
    q_bar = v_bar @ xp.matrix_transpose(u) + 2 * s @ q @ t_bar
    s_bar = q @ t_bar @ q_t

    for (q, r), (before, _) in zip(reversed(kept[1:]), reversed(kept[:-1]), strict=True):
        z_bar = qr_vjp(q_bar, None, q, r, throw=False)  # through the orthogonalisation, then the product
        s_bar = s_bar + z_bar @ xp.matrix_transpose(before)
        q_bar = s @ z_bar
    return hermitian_part(s_bar)


@public
def simultaneous_iteration_jvp(
    x_dot: Array,
    w: Array,
    v: Array,
    x: Array,
    /,
    *,
    method: str = "bordered",
    symmetric: bool = False,
    v0: Array | None = None,
    n_iter: int | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> tuple[Array, Array]:
    """Derivative of n eigenpairs along a direction of the matrix.

    Parameters
    ----------
    x_dot : (..., m, m) array
        The direction; with ``symmetric=True`` its symmetric part counts.
    w, v, x, method, symmetric, v0, n_iter
        As in `simultaneous_iteration_vjp`.
    gauge_rtol : float, optional
        By how much a direction may split equal eigenvalues among the n, relative to the longest column of
        ``sym(Ẋ) Y``; default ``sqrt(eps)``. Pass ``float("inf")`` to accept the masked derivative for an output that
        you know to be a function of the cluster's projector and of symmetric functions of its eigenvalues. Only for
        ``method="bordered", symmetric=True``; the other forms refuse all repeated eigenvalues.
    throw : bool, default True
        Raise `GaugeError`, reading one flag. With ``False`` such an item is NaN.

    Returns
    -------
    w_dot, v_dot : (..., n) and (..., m, n) arrays
        Each column of ``v_dot`` is orthogonal to its eigenvector.

    Raises
    ------
    GaugeError
        As `simultaneous_iteration_vjp`, where instead of the loss it is the direction that splits equal eigenvalues:
        single ones have no derivative there that is linear in the direction.
    TypeError, ValueError
        As `simultaneous_iteration_vjp`; `x_dot` is ``None``.

    Notes
    -----
    Cost: as `simultaneous_iteration_vjp`, by the transposes of its systems. ``"unrolled"`` keeps nothing.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([3.0, 1.0, -2.0]))
    >>> (w, v), _ = ddnref.simultaneous_iteration(x, 2, symmetric=True)
    >>> w_dot, _ = ddnref.simultaneous_iteration_jvp(np.diag(np.asarray([0.0, 5.0, 1.0])), w, v, x, symmetric=True)
    >>> np.round(w_dot, 12) + 0.0
    array([0., 1.])
    """
    _check("(m,m),(n),(m,n),(m,m)", w, v, x, method, n_iter, v0, x_dot=x_dot)
    if method == "unrolled":
        _check_unrolled(v, symmetric)
        if not symmetric:  # a single column is a power iteration
            start = None if v0 is None else v0[..., 0]
            w_dot, v_dot = _power_unrolled_jvp(x_dot, v[..., 0], x, False, start, n_iter or 0)
            return w_dot[..., None], v_dot[..., None]
        return _simultaneous_unrolled_jvp(x_dot, w, v, x, v0, n_iter or 0)
    return _implicit_jvp(x_dot, w, v, x, method, symmetric, gauge_rtol, throw)


def _simultaneous_unrolled_jvp(
    x_dot: Array, w: Array, v: Array, x: Array, v0: Array | None, n_iter: int
) -> tuple[Array, Array]:
    """Derivative of `n_iter` steps with a symmetric matrix and of the eigenpairs of ``T = QᵀXQ`` after the last."""
    xp, s, s_dot = namespace_of(x), hermitian_part(x), hermitian_part(x_dot)
    q, _ = qr(_start(v0, x, None, v.shape[-1:]))
    q_dot = xp.zeros_like(q)
    for _ in range(n_iter - 1):
        # Through the product, then the orthogonalisation.
        z_dot = s_dot @ q + s @ q_dot
        q, r = qr(s @ q)
        q_dot, _ = qr_jvp(z_dot, q, r, throw=False)
    q_t, s_q = xp.matrix_transpose(q), s @ q
    t_dot = hermitian_part(q_t @ (s_dot @ q) + 2 * xp.matrix_transpose(s_q) @ q_dot)

    # T U = U Λ and V = Q U, in the order and with the signs of (w, v).
    values, u = eigh(hermitian_part(q_t @ s_q))
    rank = xp.argsort(xp.argsort(w, axis=-1), axis=-1)  # among the ascending eigenvalues of eigh
    values, u = xp.take_along_axis(values, rank, axis=-1), xp.take_along_axis(u, rank[..., None, :], axis=-1)
    u = xp.where(xp.sum((q @ u) * v, axis=-2, keepdims=True) >= 0, u, -u)
    inside = hermitian_part(xp.matrix_transpose(u) @ t_dot @ u)
    return xp.linalg.diagonal(inside), q_dot @ u + q @ (u @ _rotation(values, inside, eps(xp, x.dtype)))


# --- the forward passes: preparation and ends -----------------------------------------------------------------------


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
    function: str, x: Array, symmetric: bool, align: str | None, rtol: float | None, while_loop: WhileLoop | None
) -> _Given:
    """Validate, scale, and symmetrise or balance the matrix."""
    xp = namespace(x=x)
    check_square("x", x)
    if x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}: a matrix without entries has no eigenvalue.")
    refuse_recording(function, x=x)
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


# --- the implicit derivatives ---------------------------------------------------------------------------------------


def _check(
    signature: str,
    w: Array,
    v: Array,
    x: Array,
    method: str,
    n_iter: int | None,
    v0: Array | None,
    **arrays: Any,
) -> None:
    """Validate the arguments of a derivative; the named arrays are its cotangents or its direction."""
    namespace(x=x)
    if is_complex(x):
        raise TypeError(
            f"x has dtype {x.dtype}, but the iterations and their derivatives take real matrices: use ddnref.eigh or "
            "eigsh."
        )
    conform(signature, x=x, w=w, v=v, **arrays)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    if method == "unrolled" and n_iter is None:
        raise ValueError('method "unrolled" needs n_iter, the number of steps to repeat.')
    if v0 is not None:
        _check_start(v0, x, tuple(v.shape[x.ndim - 1 :]))


def _check_unrolled(v: Array, symmetric: bool) -> None:
    """Raise where the unrolled form does not exist."""
    if not symmetric and v.shape[-1] > 1:
        raise ValueError('method "unrolled" with n > 1 columns needs symmetric=True; "bordered" does not.')


def _cotangents(w_bar: Array | None, v_bar: Array | None, w: Array, v: Array) -> tuple[Array, Array]:
    """Both cotangents, zero for one that is not given."""
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    xp = namespace_of(w)
    return (xp.zeros_like(w) if w_bar is None else w_bar), (xp.zeros_like(v) if v_bar is None else v_bar)


class _Refined(NamedTuple):
    """Eigenvalues and unit eigenvectors in float64, and their matrix: symmetric, or balanced, ``D⁻¹XD``."""

    w: Array
    """Rayleigh quotients."""
    y: Array
    x: Array
    x_y: Array
    """``X Y``."""
    size: Array
    """The largest |λ| of each item, ``(..., 1)``."""
    unit: float
    """Machine epsilon of the dtype that was given."""
    v: Array
    """The eigenvectors of the matrix as it was given, of unit length in float64."""
    d: Array | None
    """The diagonal of D, ``(..., m, 1)``; ``None`` for a symmetric matrix."""
    length: Array | None
    """``‖D⁻¹ v‖`` of each vector, ``(..., 1, n)``, so that ``v = length · D y``."""


def _refined(v: Array, x: Array, symmetric: bool) -> _Refined:
    """Refine eigenpairs in float64: unit vectors, and Rayleigh quotients instead of rounded eigenvalues."""
    xp = namespace_of(x)
    v = double(xp, v)
    v = v / xp.sqrt(xp.sum(v * v, axis=-2, keepdims=True))
    z, d = _in_coordinates(x, symmetric)
    y, length = v, None
    if d is not None:
        d = double(xp, d)[..., None]
        y = v / d
        length = safe_norm(xp.matrix_transpose(y))[..., None, :]
        y = y / length
    z_y = product_in_double(z, y)
    rayleigh = xp.sum(y * z_y, axis=-2)
    size = xp.max(xp.abs(rayleigh), axis=-1, keepdims=True)
    return _Refined(rayleigh, y, z, z_y, size, eps(xp, x.dtype), v, d, length)


def _in_coordinates(x: Array, symmetric: bool) -> tuple[Array, Array | None]:
    """The symmetric part, or ``D⁻¹XD`` balanced and the diagonal of D, ``(..., m)``."""
    if symmetric:
        return symmetrised(x), None  # on NumPy x itself where it is symmetric
    scale = power_of_two(x, 2)[..., None, None]
    z, d, _ = _balanced(x / scale)
    return z * scale, d


def _implicit_vjp(
    w_bar: Array, v_bar: Array, w: Array, v: Array, x: Array, method: str, symmetric: bool, throw: bool
) -> Array:
    """X̄ of n pairs, ``X̄ = L Yᵀ`` or its Hermitian part, with L from one of the systems."""
    xp = namespace_of(x)
    if 0 in v.shape:  # no pairs, no gradient
        return xp.zeros_like(x)
    form = _fixed_point if method == "fixed_point" else _bordered_symmetric if symmetric else _bordered
    p, w_bar, v_bar = _refined(v, x, symmetric), double(xp, w_bar), double(xp, v_bar)
    if p.d is not None:  # ȳ = D P v̄ · length with P = I − v vᵀ
        v_bar = p.d * p.length * _without(p.v, v_bar)
    left, growth, gauge = form(p, w_bar, v_bar)
    bad = singularity.amplification(growth, p.size[..., 0], p.unit) | gauge
    if throw and is_true(xp.any(bad & xp.isfinite(w[..., 0]))):
        _raise_repeated(bad, " and a loss of its projector")
    left, y = nan_where(bad[..., None, None], left), p.y  # NaN in a whole factor makes all of X̄ NaN
    if p.d is not None:
        left, y = left / p.d, y * p.d
    left, y = (xp.astype(a, x.dtype, copy=False) for a in (left / 2 if symmetric else left, y))
    return hermitian_sum(left, y) if symmetric else left @ xp.matrix_transpose(y)


def _implicit_jvp(
    x_dot: Array,
    w: Array,
    v: Array,
    x: Array,
    method: str,
    symmetric: bool,
    gauge_rtol: float | None,
    throw: bool,
) -> tuple[Array, Array]:
    """Derivatives of n pairs from the columns ``Ẋ Y``, by the transpose of the VJP's system."""
    xp = namespace_of(x)
    if 0 in v.shape:
        return xp.zeros_like(w), xp.zeros_like(v)
    form = _fixed_point_jvp if method == "fixed_point" else _bordered_symmetric_jvp if symmetric else _bordered_jvp
    p = _refined(v, x, symmetric)
    # The direction enters by n columns alone, brought to the coordinates of the refined pairs.
    moved = product_in_double(x_dot, p.v)
    if p.d is None:
        moved = (moved + product_in_double(xp.matrix_transpose(x_dot), p.v)) / 2
    else:
        moved = moved / (p.d * p.length)  # D⁻¹ Ẋ D y
    w_dot, y_dot, growth, split = form(p, moved)
    # An eigenvalue has equals outside the n, or the direction splits equals among them.
    bad = singularity.amplification(growth, p.size[..., 0], p.unit)
    gauge_rtol = p.unit**0.5 if gauge_rtol is None else gauge_rtol
    is_split = exceeds(split, xp.ones_like(split), gauge_rtol)
    # What is not finite comes out as NaN, and says nothing about eigenvalues.
    finite = xp.isfinite(w[..., 0]) & xp.all(xp.isfinite(moved), axis=(-2, -1))
    if throw and is_true(xp.any((bad | is_split) & finite)):
        if is_true(xp.any(bad & finite)):
            _raise_repeated(bad & finite, "")
        _raise_split(is_split & finite, split, gauge_rtol)
    if p.d is not None:  # v = D y / ‖D y‖
        y_dot = _without(p.v, p.d * p.length * y_dot)
    bad = (bad | is_split | ~finite)[..., None]
    w_dot, v_dot = nan_where(bad, w_dot), nan_where(bad[..., None], y_dot)
    return xp.astype(w_dot, x.dtype, copy=False), xp.astype(v_dot, x.dtype, copy=False)


def _without(y: Array, b: Array) -> Array:
    """Columns ``b_i − y_i (y_iᵀ b_i)``, without their parts along unit vectors.

    Where ``y_i`` is close to an axis the difference cancels in that component, which would keep the rounding of
    ``b_i``. It follows from the others, because the result is orthogonal to ``y_i``.
    """
    xp = namespace_of(y)
    rest = b - y * xp.sum(y * b, axis=-2, keepdims=True)
    close = y * y > 0.5  # at most one component of each
    others = xp.where(close, xp.zeros_like(rest), rest)
    missing = -xp.sum(y * others, axis=-2, keepdims=True) / xp.where(close, y, xp.ones_like(y))
    return xp.where(close, missing, others)


def _raise_repeated(bad: Array, purpose: str) -> NoReturn:
    """Raise `GaugeError` for items whose eigenvectors the matrix does not determine."""
    raise GaugeError(
        f"An eigenvalue is repeated to working precision{among(bad)}, or the n-th cuts a cluster of equal ones, so "
        "that its eigenvector is a choice that the matrix does not determine. Take more columns, so that the "
        f'cluster is whole, with symmetric=True and method="bordered"{purpose}; or separate the eigenvalues, or pass '
        "throw=False to get NaN for these items."
    )


def _raise_split(bad: Array, split: Array, gauge_rtol: float) -> NoReturn:
    """Raise `GaugeError` for items whose direction splits equal eigenvalues, and say by how much."""
    xp = namespace_of(split)
    worst = float(xp.max(xp.where(bad, split, xp.zeros_like(split))))
    raise GaugeError(
        f"The direction splits equal eigenvalues{among(bad)}, by {worst:.1e} > gauge_rtol {gauge_rtol:.1e} of its "
        "size. Their derivatives are those of the projected direction, different ones on both sides, so that no "
        "derivative is linear in the direction. Separate the eigenvalues; or pass throw=False to get NaN for these "
        "items, gauge_rtol=inf to accept the masked derivative if the result depends on the projector only."
    )


# --- their systems, for both derivatives ----------------------------------------------------------------------------


def _bordered(p: _Refined, w_bar: Array, v_bar: Array) -> tuple[Array, Array, bool]:
    """W of ``X̄ = W Yᵀ`` for any real matrix, one pair at a time, and how much its systems amplify."""
    x_t = namespace_of(p.x).matrix_transpose(p.x)  # left eigenvectors are those of Xᵀ
    left, _, growth = _solve_bordered(p, x_t, v_bar, w_bar)
    return left, growth, False


def _bordered_jvp(p: _Refined, moved: Array) -> tuple[Array, Array, Array, Array]:
    """``λ̇`` and Ẏ for any real matrix, how much the systems amplify, and zero: there are no clusters."""
    xp = namespace_of(p.x)
    y_dot, w_dot, growth = _solve_bordered(p, p.x, moved, xp.zeros_like(p.w))
    return w_dot, y_dot, growth, xp.zeros_like(growth)


def _solve_bordered(p: _Refined, x: Array, right: Array, below: Array) -> tuple[Array, Array, Array]:
    """Solve ``[[λ_i I − X, y_i], [y_iᵀ, 0]] (a_i; μ_i) = (b_i; c_i)``; the third result is the amplification."""
    xp = namespace_of(x)

    def solutions(w: Array, border: Array, right: Array, x: Array) -> tuple[Array, Array]:
        systems = (bordered(shifted(x, w[..., i]), border[..., i : i + 1]) for i in range(w.shape[-1]))
        return solve_each(systems, right)

    # The border is scaled like the matrix, and so are c and 1 / μ.
    right = xp.concat([right, (p.size * below)[..., None, :]], axis=-2)
    left, growth = in_chunks(solutions, p.w, p.size[..., None] * p.y, right, x)
    return left[..., :-1, :], p.size * left[..., -1, :], growth


def _bordered_symmetric(p: _Refined, w_bar: Array, v_bar: Array) -> tuple[Array, Array, Array | bool]:
    """``W + Y K`` of ``X̄ = sym((W + Y K) Yᵀ)`` for a symmetric matrix, ``K = diag(λ̄) + ½ F ∘ (M − Mᵀ)``.

    The third result says where the loss depends on the gauge of equal eigenvalues among the n.
    """
    xp, w, y = namespace_of(p.x), p.w, p.y
    m_ = xp.matrix_transpose(y) @ v_bar  # the part of the cotangent inside span(Y)
    left, growth = solve_on_complement(w, y, v_bar - y @ m_, p.size, p.x)
    if w.shape[-1] == 1:  # no others inside: a third of the whole time at m = 32 on NumPy
        return left + y * w_bar[..., None, :], growth, False

    # Inside span(Y): F is zero between equal eigenvalues, where neither M nor λ̄ may differ.
    gap, same = _gaps(w, p.unit)
    zero, skew = xp.zeros_like(gap), (m_ - xp.matrix_transpose(m_)) / 2
    k = xp.where(same, zero, skew / xp.where(same, xp.ones_like(gap), gap))
    k = k + w_bar[..., None, :] * identity(w.shape[-1], w)
    jump = xp.where(same, w_bar[..., None, :] - w_bar[..., :, None], zero)  # equal eigenvalues have no order
    gauge = exceeds(largest(xp.where(same, skew, zero), 2), largest(m_, 2), p.unit**0.5)
    return left + y @ k, growth, gauge | exceeds(largest(jump, 2), largest(w_bar), p.unit**0.5)


def _bordered_symmetric_jvp(p: _Refined, moved: Array) -> tuple[Array, Array, Array, Array]:
    """``λ̇ = diag S`` and ``Ẏ = Y (F ∘ S) + U`` for a symmetric matrix, and how much its systems amplify.

    The fourth result is by how much the direction splits equal eigenvalues among the n, relative to its size.
    """
    xp, w, y = namespace_of(p.x), p.w, p.y
    s = xp.matrix_transpose(y) @ moved  # the part of the direction inside span(Y)
    y_dot, growth = solve_on_complement(w, y, moved - y @ s, p.size, p.x)
    if w.shape[-1] == 1:
        return s[..., 0], y_dot, growth, xp.zeros_like(growth)
    s = hermitian_part(s)
    # Equal eigenvalues stay together where S is a multiple of the identity for them.
    _, same = _gaps(w, p.unit)
    size, own = largest(safe_norm(xp.matrix_transpose(moved))), xp.linalg.diagonal(s)
    other = xp.where(identity(w.shape[-1], w) > 0, xp.zeros_like(s), s)
    part = xp.maximum(xp.abs(other), xp.abs(own[..., None, :] - own[..., :, None]) / 2)
    part = largest(xp.where(same, part, xp.zeros_like(s)), 2)
    split = part / xp.where(size > 0, size, xp.ones_like(size))
    return own, y_dot + y @ _rotation(w, s, p.unit), growth, split


def _gaps(w: Array, unit: float) -> tuple[Array, Array]:
    """``λ_j − λ_i``, and which eigenvalues count as equal."""
    gap = w[..., None, :] - w[..., :, None]
    return gap, namespace_of(w).abs(gap) <= SAME_RTOL * unit * largest(w)[..., None, None]


def _rotation(w: Array, s: Array, unit: float) -> Array:
    """``F ∘ S``, by which eigenvectors turn among themselves; zero between equal eigenvalues."""
    xp, (gap, same) = namespace_of(w), _gaps(w, unit)
    return xp.where(same, xp.zeros_like(gap), s / xp.where(same, xp.ones_like(gap), gap))


def _fixed_point(p: _Refined, w_bar: Array, v_bar: Array) -> tuple[Array, Array, bool]:
    """``P q / λ + λ̄ y``, each pair by itself, from λ times its equation.

    It holds for every eigenvector, whether the iteration would find it or not.
    """
    x_t = namespace_of(p.x).matrix_transpose(p.x)
    x_t_y = product_in_double(x_t, p.y)
    # XᵀP = Xᵀ − Xᵀy yᵀ
    right = v_bar + w_bar[..., None, :] * (p.x_y + x_t_y)
    q, growth = _solve_projected(p, x_t, x_t_y, p.y, right)
    return _without(p.y, q) + w_bar[..., None, :] * p.y, growth, False


def _fixed_point_jvp(p: _Refined, moved: Array) -> tuple[Array, Array, Array, Array]:
    """``λ̇`` and Ẏ, each pair by itself, how much the systems amplify, and zero: there are no clusters."""
    xp = namespace_of(p.x)
    x_t_y = product_in_double(xp.matrix_transpose(p.x), p.y)
    # P X = X − y (Xᵀy)ᵀ
    y_dot, growth = _solve_projected(p, p.x, p.y, x_t_y, _without(p.y, moved))
    w_dot = xp.sum(p.y * moved + y_dot * (p.x_y + x_t_y), axis=-2)
    return w_dot, y_dot, growth, xp.zeros_like(growth)


def _solve_projected(p: _Refined, x: Array, left: Array, right: Array, b: Array) -> tuple[Array, Array]:
    """Solve ``(λ_i I − (X − l_i r_iᵀ)) a_i = b_i``; the second result is the amplification."""

    def solutions(w: Array, left: Array, right: Array, b: Array, x: Array) -> tuple[Array, Array]:
        r_t = namespace_of(x).matrix_transpose(right)
        projected = (x - left[..., i : i + 1] @ r_t[..., i : i + 1, :] for i in range(w.shape[-1]))
        return solve_each((shifted(a, w[..., i]) for i, a in enumerate(projected)), b)

    return in_chunks(solutions, p.w, left, right, b, x)
