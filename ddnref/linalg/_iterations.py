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

import operator

from ddnref._core.arrays import Array, eps, full, namespace_of, nan_where
from ddnref._core.loops import CHECK_EVERY, IterationInfo, LoopOptions, WhileLoop
from ddnref._kernels.dense import eigh, hermitian_part, matvec, outer
from ddnref._kernels.public import public
from ddnref._kernels.vectors import norm, normalised, real_dot, safe_norm
from ddnref.linalg._eigh import eigh_vjp
from ddnref.linalg._iterate import _eigenpairs_of_t, _iterate, _prepare, _start, _State, _unbalanced
from ddnref.linalg._iterations_implicit import (
    _check,
    _check_unrolled,
    _cotangents,
    _implicit_jvp,
    _implicit_vjp,
    _in_coordinates,
    _rotation,
)
from ddnref.linalg._qr import qr, qr_jvp, qr_vjp
from ddnref.linalg._residuals import align_signs

MAXITER = 1000


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
    g = _prepare("power_iteration", x, v0, symmetric, align, rtol, while_loop)
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
    g = _prepare("simultaneous_iteration", x, v0, symmetric, align, rtol, while_loop)
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
