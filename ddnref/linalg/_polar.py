"""Polar decomposition and the closest rotation, with derivatives that need no gap.

``X = W H`` for a tall X: W has orthonormal columns, and H is Hermitian. With ``U diag(s) Vᴴ`` the singular value
decomposition, ``W = U Vᴴ`` and ``H = V diag(s) Vᴴ``. From ``Ẋ = Ẇ H + W Ḣ``, where Ḣ is Hermitian and ``Ω = WᴴẆ`` is
skew-Hermitian,

    H Ω + Ω H = S − Sᴴ,   S = WᴴẊ,       Ẇ = W Ω + (Ẋ − W S) H⁻¹,       Ḣ = ½ (S + Sᴴ) + ½ (H Ω − Ω H)

In the basis V, where H is diagonal, ``Ω_ij = (S_ij − conj S_ji) / (s_i + s_j)``: sums, where the derivative of singular
vectors has differences. Transposed, with ``G = ½ (H̄ + H̄ᴴ)`` and ``C = WᴴW̄ + H G``,

    H K + K H = C − Cᴴ,      X̄ = W (K + G) + (W̄ − W WᴴW̄) H⁻¹

A wide X is the adjoint of a tall one, ``Xᴴ = Wᴴ P`` with ``P = W H Wᴴ = U diag(s) Uᴴ``, and has ``H = Wᴴ P W``.

The closest rotation has the determinant 1. Where U Vᵀ has −1, the last column of U and the last singular value change
their signs. All of the above holds for these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddnref._core.arrays import (
    Array,
    Namespace,
    adjoint,
    among,
    as_dtype,
    eps,
    full,
    is_complex,
    is_true,
    namespace,
    namespace_of,
    nan_where,
    refuse_recording,
)
from ddnref._core.checks import check_shapes, conform
from ddnref._kernels.dense import hermitian_part, hermitian_product, identity, matvec, svd
from ddnref._kernels.eigh_jvp import needs_check
from ddnref._kernels.eigh_vjp import exceeds
from ddnref._kernels.public import public
from ddnref._kernels.singularity import SINGULAR
from ddnref._kernels.vectors import largest, quotient, without_structure
from ddnref.errors import SingularError

Pair = tuple[Array, Array]
Saved = tuple[Array, Array, Array]
Solve = Callable[..., Pair]


@public
def polar(x: Array, /, *, rotation: bool = False) -> Pair:
    r"""Polar decomposition ``X = W H``: the closest matrix with orthonormal columns or rows, and a Hermitian factor.

    Parameters
    ----------
    x : (..., m, n) array, real or complex floating
        Tall, square or wide.
    rotation : bool, default False
        For real square matrices: W is the closest rotation, whose determinant is 1. Without it W may be a reflection,
        which is closer where the determinant of X is negative. Choose it where W must be a rotation, as in the
        alignment of points in space. It costs one more product and one more factorisation.

    Returns
    -------
    w : (..., m, n) array
        With orthonormal columns, or rows where X is wide: the closest such matrix to X in the Frobenius norm.
    h : (..., n, n) array
        Exactly Hermitian and positive semidefinite, the square root of ``XᴴX``. With `rotation` its last eigenvalue is
        negative where the determinant of X is.

    Raises
    ------
    TypeError
        Not floating; a PyTorch tensor that requires grad; complex input with `rotation`.
    ValueError
        Fewer than two axes; not square with `rotation`.

    See Also
    --------
    sqrtm : H alone from ``XᴴX``, with half of the digits of small singular values.

    Notes
    -----
    From the singular value decomposition. Small singular values do not disturb W: ``‖WᴴW − I‖`` is a few eps at every
    condition. A matrix without full rank has a unique H, but not a unique W; one of them is returned. An item with NaN
    or infinity comes out as NaN. The factorisation with H on the left is that of the adjoint. Cost: the decomposition,
    and ``2 m n k + 2 n² k`` flops, with k the smaller of m and n.

    References
    ----------
    .. [1] N. J. Higham, "Computing the polar decomposition - with applications", SIAM Journal on Scientific and
       Statistical Computing 7 (1986).
    .. [2] S. Umeyama, "Least-squares estimation of transformation parameters between two point patterns", IEEE
       Transactions on Pattern Analysis and Machine Intelligence 13 (1991), for the closest rotation.

    Examples
    --------
    >>> import numpy as np
    >>> w, h = ddnref.polar(np.asarray([[0.0, -2.0], [3.0, 0.0]]))
    >>> np.round(w, 12) + 0.0
    array([[ 0., -1.],
           [ 1.,  0.]])
    >>> np.round(h, 12) + 0.0
    array([[3., 0.],
           [0., 2.]])
    """
    return polar_fwd(x, rotation=rotation)[0]


@public
def polar_fwd(x: Array, /, *, rotation: bool = False) -> tuple[Pair, Saved]:
    """Compute `polar` and what its derivatives need, with the same parameters and errors.

    Returns
    -------
    (w, h) : (..., m, n) and (..., n, n) arrays
    (u, s, vh) : (..., m, k), (..., k) real and (..., k, n) arrays
        The thin singular value decomposition, descending. With `rotation` the last column of u and the last value have
        changed their signs where this makes the determinant of W one.
    """
    xp = namespace(x=x)
    refuse_recording("polar", x=x)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., m, n).")
    if rotation and x.shape[-1] != x.shape[-2]:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., n, n): only square matrices have rotations.")
    if rotation and is_complex(x):
        raise TypeError(f"x has dtype {x.dtype}: rotation=True is for real matrices. Leave it out for complex ones.")
    u, s, vh = _decomposed(x)
    if rotation and 0 not in x.shape:
        last = identity(s.shape[-1], s)[-1, :]
        sign = xp.where((xp.linalg.det(u @ vh) < 0)[..., None], 1 - 2 * last, xp.ones_like(s))
        u, s = u * sign[..., None, :], s * sign
    v = adjoint(vh)
    return (u @ vh, hermitian_product(v * as_dtype(s, v)[..., None, :], v)), (u, s, vh)


def _decomposed(x: Array) -> Saved:
    """The thin singular value decomposition, of empty matrices too."""
    if 0 not in x.shape:
        return svd(x)
    *batch, m, n = x.shape
    k = min(m, n)
    # Of zero columns or items nothing is there to decompose.
    u, vh = (full((*batch, *shape), 0.0, x) for shape in ((m, k), (k, n)))
    return u, largest(full((*batch, k, 0), 0.0, x)), vh


@public
def polar_vjp(
    w_bar: Array | None,
    h_bar: Array | None,
    w: Array,
    h: Array,
    u: Array,
    s: Array,
    vh: Array,
    /,
    *,
    rotation: bool = False,
    gauge_rtol: float | None = None,
    throw: bool = True,
    solve: Solve | None = None,
) -> Array:
    r"""Gradient of a loss of the polar factors with respect to the matrix, right at every repeated singular value.

    Parameters
    ----------
    w_bar, h_bar : (..., m, n) and (..., n, n) arrays, or None
        Cotangents of the factors; ``None`` for one that the loss does not use. Of `h_bar` the Hermitian part counts.
    w, h, u, s, vh
        What `polar_fwd` returned.
    rotation : bool, default False
        As in `polar_fwd`.
    gauge_rtol : float, optional
        Largest accepted part of a cotangent where a factor is not determined or has a kink, relative to its largest
        entry. Default ``sqrt(eps)``. Pass ``float("inf")`` for a loss that you know to be smooth there: that part is
        left out.
    throw : bool, default True
        Raise `SingularError`, reading one flag. With ``False`` such an item is NaN.
    solve : callable, optional
        For bridges: the function that solves for K, made differentiable, so that this derivative can be differentiated
        itself.

    Returns
    -------
    x_bar : (..., m, n) array

    Raises
    ------
    SingularError
        A singular value is zero, up to ``16 eps`` times the largest, and the loss depends on W there, which is not
        determined, or on H, which has a kink there as ``abs`` has. With `rotation` the same holds for the sum of two
        singular values, the last one signed, and not for a value alone: a matrix of rank ``n - 1`` has a derivative.
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit; both cotangents are ``None``.

    Notes
    -----
    For a tall matrix, with :math:`G = \tfrac12 (\bar H + \bar H^H)`, :math:`C = W^H \bar W + H G` and K the solution of
    :math:`H K + K H = C - C^H`, which is found in the basis of the right singular vectors, by a division of entry i, j
    by :math:`s_i + s_j`,

    .. math:: \bar X = W (K + G) + (\bar W - W W^H \bar W) H^{-1}

    For the pairing :math:`\mathrm{Re} \sum \mathrm{conj}(\bar y)\,\dot y`. No difference of singular values is a
    denominator. The relative error is about eps times the largest singular value over the smallest denominator: the
    smallest sum of two singular values of a square matrix, the smallest value of others. Cost: ``4 m n k + 8 k³`` flops
    real, and as much again for the part outside the columns of a tall or the rows of a wide matrix.

    At a matrix without full rank W jumps. That the cotangents have no part there is necessary for a gradient, not
    sufficient.

    References
    ----------
    .. [1] C. Kenney and A. J. Laub, "Polar decomposition and matrix sign function condition estimates", SIAM Journal on
       Scientific and Statistical Computing 12 (1991).

    Examples
    --------
    >>> import numpy as np
    >>> (w, h), saved = ddnref.polar_fwd(2 * np.eye(2))  # a double singular value
    >>> ddnref.polar_vjp(np.asarray([[0.0, 1.0], [0.0, 0.0]]), None, w, h, *saved)  # of w[0, 1]
    array([[ 0.  ,  0.25],
           [-0.25,  0.  ]])
    """
    if w_bar is None and h_bar is None:
        raise TypeError("w_bar and h_bar are both None: there is nothing to differentiate.")
    xp, gauge_rtol = _checked(w, h, u, s, vh, gauge_rtol, w_bar=w_bar, h_bar=h_bar)
    if 0 in w.shape:
        return xp.zeros_like(w)
    wide, square = w.shape[-1] > w.shape[-2], w.shape[-1] == w.shape[-2]
    g = None if h_bar is None else hermitian_part(h_bar)
    t, p, frame = _as_tall(w, h, u, vh)
    c, outside = xp.zeros_like(p), t[..., :0, :]
    # The cotangent of W inside the space of its columns, and outside.
    if w_bar is not None:
        t_bar = adjoint(w_bar) if wide else w_bar
        c = adjoint(t) @ t_bar
        outside = outside if square else t_bar - t @ c
    # H = WᴴX adds X G to it. For a wide X this has the part P W G (I − WᴴW) outside, of which P⁻¹ leaves W G (I − WᴴW).
    if g is not None:
        w_g = w @ g
        inner = w_g @ adjoint(w) if wide else g
        c = c + (inner @ p if wide else p @ inner)
    k, z = (polar_system if solve is None else solve)(c, outside, p, s, frame)
    x_bar = t @ k
    x_bar = x_bar if square or w_bar is None else x_bar + z
    x_bar = adjoint(x_bar) if wide else x_bar
    if g is not None:
        x_bar = x_bar + (2 * w_g - inner @ w if wide else w_g)

    check = _rotations_bar if rotation else _factors_bar
    bad = check(xp, w_bar, g, u, s, vh, gauge_rtol)
    if throw and bad is not None and is_true(xp.any(bad)):
        what, undetermined = "the loss depends on", "W is not determined there, and H has a kink"
        _raise_singular(bad, rotation, f"{what} the factors there: {undetermined}", "losses")
    return x_bar if bad is None else nan_where(bad[..., None, None], x_bar)


@public
def polar_jvp(
    x_dot: Array,
    w: Array,
    h: Array,
    u: Array,
    s: Array,
    vh: Array,
    /,
    *,
    rotation: bool = False,
    gauge_rtol: float | None = None,
    throw: bool = True,
    solve: Solve | None = None,
) -> Pair:
    r"""Derivative of the polar factors along a direction of the matrix.

    Parameters
    ----------
    x_dot : (..., m, n) array
        The direction.
    w, h, u, s, vh
        What `polar_fwd` returned.
    rotation, throw, solve
        As in `polar_vjp`.
    gauge_rtol : float, optional
        How far a direction may move singular values that are zero, relative to its largest entry. Default
        ``sqrt(eps)``. Pass ``float("inf")`` for a result that is smooth there.

    Returns
    -------
    w_dot, h_dot : (..., m, n) and (..., n, n) arrays
        ``h_dot`` is exactly Hermitian. At a matrix without full rank, ``w_dot`` is that of the W at hand, carried along
        by the direction.

    Raises
    ------
    SingularError
        The direction moves a singular value that is zero, or with `rotation` the sum of two: neither W nor H has a
        derivative along it.
    TypeError, ValueError
        As `polar_vjp`; `x_dot` is ``None``.

    Notes
    -----
    For a tall matrix, with :math:`S = W^H \dot X` and Ω the solution of :math:`H \Omega + \Omega H = S - S^H`,

    .. math:: \dot W = W \Omega + (\dot X - W S) H^{-1}, \qquad
              \dot H = \tfrac12 (S + S^H) + \tfrac12 (H \Omega - \Omega H)

    The adjoint of `polar_vjp`. Cost: ``4 m n k + 10 k³`` flops real, and twice as much for tall and wide matrices.

    Examples
    --------
    >>> import numpy as np
    >>> (w, h), saved = ddnref.polar_fwd(2 * np.eye(2))
    >>> w_dot, h_dot = ddnref.polar_jvp(np.asarray([[0.0, 1.0], [0.0, 0.0]]), w, h, *saved)
    >>> w_dot
    array([[ 0.  ,  0.25],
           [-0.25,  0.  ]])
    >>> h_dot
    array([[0. , 0.5],
           [0.5, 0. ]])
    """
    xp, gauge_rtol = _checked(w, h, u, s, vh, gauge_rtol, x_dot=x_dot)
    if 0 in w.shape:
        return xp.zeros_like(w), xp.zeros_like(h)
    wide, square = w.shape[-1] > w.shape[-2], w.shape[-1] == w.shape[-2]
    t, p, frame = _as_tall(w, h, u, vh)
    moved = adjoint(x_dot) if wide else x_dot
    s_ = adjoint(t) @ moved
    outside = t[..., :0, :] if square else moved - t @ s_
    omega, z = (polar_system if solve is None else solve)(s_, outside, p, s, frame)
    t_dot = t @ omega if square else t @ omega + z
    turned = hermitian_part(p @ omega)  # ½ (P Ω − Ω P)
    if wide:
        side = outside @ w
        h_dot = hermitian_part(adjoint(w) @ (hermitian_part(s_) - turned) @ w) + side + adjoint(side)
    else:
        h_dot = hermitian_part(s_) + turned
    w_dot = adjoint(t_dot) if wide else t_dot

    bad = (_rotations_dot if rotation else _factors_dot)(xp, x_dot, u, s, vh, gauge_rtol)
    if bad is None:
        return w_dot, h_dot
    if throw and is_true(xp.any(bad)):
        _raise_singular(bad, rotation, "the direction moves it, along which the factors have no derivative", "results")
    bad = bad[..., None, None]
    return nan_where(bad, w_dot), nan_where(bad, h_dot)


def _checked(
    w: Array, h: Array, u: Array, s: Array, vh: Array, gauge_rtol: float | None, **directions: Any
) -> tuple[Namespace, float]:
    """Validate the arguments of a derivative; return their namespace and the tolerance."""
    shapes = {"w_bar": "(m,n)", "h_bar": "(n,n)", "x_dot": "(m,n)"}
    signature = ",".join(["(m,n),(n,n),(k)r,(m,k),(k,n)", *(shapes[name] for name in directions)])
    xp, batch, sizes = conform(signature, w=w, h=h, s=s, u=u, vh=vh, **directions)
    check_shapes(s=(s, (*batch, min(sizes["m"], sizes["n"]))))
    return xp, eps(xp, w.dtype) ** 0.5 if gauge_rtol is None else gauge_rtol


def _as_tall(w: Array, h: Array, u: Array, vh: Array) -> tuple[Array, Array, Array]:
    """W, or its adjoint where it is wide; the Hermitian factor of that form, and the basis in which it is diagonal."""
    if w.shape[-1] > w.shape[-2]:
        return adjoint(w), w @ h @ adjoint(w), u
    return w, h, adjoint(vh)


# --- where there is no derivative -------------------------------------------------------------------------------------


def _limit(s: Array) -> Array:
    """The size up to which singular values, or sums of two, are rounding, ``(..., 1)``."""
    return SINGULAR * eps(namespace_of(s), s.dtype) * largest(s)[..., None]


def _probe(flags: Array, like: Array) -> Array:
    """Entries without structure where there are flags, 0 elsewhere, ``(..., k)``."""
    return namespace_of(like).where(flags, without_structure(tuple(flags.shape[-1:]), like), full((), 0.0, like))


def _kept(zero: Array, u: Array) -> Array:
    """The columns of `u` whose singular values are not zero, and 0 in place of the others."""
    return namespace_of(u).where(zero[..., None, :], full((), 0.0, u), u)


def _of_null_space(zero: Array, vh: Array) -> Array:
    """One vector without structure in the null space of the matrix, ``(..., n)``."""
    kept = _kept(zero, adjoint(vh))
    z = without_structure(tuple(vh.shape[-1:]), vh)
    return z - matvec(kept, matvec(adjoint(kept), z + namespace_of(vh).zeros_like(kept[..., :, 0])))


def _factors_bar(
    xp: Namespace, w_bar: Array | None, g: Array | None, u: Array, s: Array, vh: Array, rtol: float
) -> Array | None:
    """Items whose cotangents have a part where a singular value is zero, seen by one vector in each space."""
    zero = s <= _limit(s)
    if not needs_check(zero, rtol):
        return None
    bad = xp.any(zero, axis=-1) & False
    if w_bar is not None:
        e = _probe(zero, u)
        columns, rows = matvec(w_bar, matvec(adjoint(vh), e)), matvec(adjoint(w_bar), matvec(u, e))
        bad = exceeds(xp.maximum(largest(columns), largest(rows)), largest(w_bar, 2), rtol)
    if g is not None:
        image = matvec(g, _of_null_space(zero, vh))
        kept = _kept(zero, adjoint(vh))
        kink = exceeds(largest(image - matvec(kept, matvec(adjoint(kept), image))), largest(g, 2), rtol)
        bad = bad | (kink & xp.any(zero, axis=-1))
    return bad


def _factors_dot(xp: Namespace, x_dot: Array, u: Array, s: Array, vh: Array, rtol: float) -> Array | None:  # noqa: ARG001
    """Items whose direction moves a singular value that is zero."""
    return moves_zero(x_dot, s <= _limit(s), u, vh, rtol)


def moves_zero(x_dot: Array, zero: Array, u: Array, vh: Array, rtol: float) -> Array | None:
    """Items whose direction maps the null space of the matrix out of its range; ``None`` where no value is `zero`."""
    if not needs_check(zero, rtol):
        return None
    image, kept = matvec(x_dot, _of_null_space(zero, vh)), _kept(zero, u)
    moved = exceeds(largest(image - matvec(kept, matvec(adjoint(kept), image))), largest(x_dot, 2), rtol)
    return moved & namespace_of(zero).any(zero, axis=-1)


def _opposite(xp: Namespace, s: Array) -> tuple[Array, Array]:
    """Pairs of a rotation with ``s_i + s_j = 0``: flags of the negative and zero values j, and of their partners i."""
    limit = _limit(s)
    other = ~xp.astype(identity(s.shape[-1], s), xp.bool)
    last = s <= limit
    pairs = (xp.abs(s[..., :, None] + s[..., None, :]) <= limit[..., None]) & other & last[..., None, :]
    return xp.any(pairs, axis=-2), xp.any(pairs, axis=-1)


def _rotations_bar(
    xp: Namespace, w_bar: Array | None, g: Array | None, u: Array, s: Array, vh: Array, rtol: float
) -> Array | None:
    """Items whose cotangents turn a plane in which the closest rotation is not determined."""
    last, partner = _opposite(xp, s)
    if not needs_check(last, rtol):
        return None
    e, bad, none = _probe(last, u), xp.any(last, axis=-1) & False, full((), 0.0, u)
    left, right = matvec(u, e), matvec(adjoint(vh), e)
    if w_bar is not None:
        turn = matvec(adjoint(u), matvec(w_bar, right)) - matvec(vh, matvec(adjoint(w_bar), left))
        bad = bad | exceeds(largest(xp.where(partner, turn, none)), largest(w_bar, 2), rtol)
    if g is not None:
        bad = bad | exceeds(largest(xp.where(partner, matvec(vh, matvec(g, right)), none)), largest(g, 2), rtol)
    return bad


def _rotations_dot(xp: Namespace, x_dot: Array, u: Array, s: Array, vh: Array, rtol: float) -> Array | None:
    """Items whose direction turns a plane in which the closest rotation is not determined."""
    return _rotations_bar(xp, x_dot, None, u, s, vh, rtol)


def _raise_singular(bad: Array, rotation: bool, what: str, smooth: str) -> None:
    zero = "The sum of two singular values, the last one signed," if rotation else "A singular value"
    cause = "a reflection or a plane without a preferred rotation" if rotation else "a matrix without full rank"
    raise SingularError(
        f"{zero} is zero to working precision{among(bad)}, and {what}. The most likely cause is {cause}. Add what "
        "makes the closest factor unique, or pass throw=False to get NaN for these items, gauge_rtol=inf if the "
        f"{smooth} are smooth there."
    )


def is_undetermined(*arrays: Array, rotation: bool = False) -> Array:
    """Whether a singular value, or a sum of two, is zero: a second derivative is wrong there.

    The arrays are outputs and what `polar_fwd` saved.
    """
    s = arrays[-2]
    xp = namespace_of(s)
    return xp.any(_opposite(xp, s)[0] if rotation else s <= _limit(s), axis=-1)


# --- the system of both derivatives, which bridges differentiate ------------------------------------------------------


def polar_system(c: Array, b: Array, p: Array, s: Array, frame: Array, /) -> Pair:
    """The solutions of ``P K + K P = C − Cᴴ`` and of ``Z P = B``, for a Hermitian P and b with any number of rows.

    The eigenvalues s and eigenvectors `frame` of P only say how to solve; they have no derivative. Where a sum
    ``s_i + s_j``, or s_i, is zero the solution is 0. Nothing is validated.
    """
    xp, back = namespace_of(p), adjoint(frame)
    sums, limit = s[..., :, None] + s[..., None, :], _limit(s)
    k = back @ c @ frame
    k = quotient(k - adjoint(k), as_dtype(sums, p), ~(xp.abs(sums) <= limit[..., None]))  # NaN stays NaN
    k = frame @ k @ back
    if 0 in b.shape:
        return k, b + 0.0
    row = as_dtype(s, p)[..., None, :]
    inverse = quotient(xp.ones_like(row), row, ~(xp.abs(s) <= limit)[..., None, :])
    return k, ((b @ frame) * inverse) @ back


def polar_system_vjp(
    k_bar: Array | None,
    z_bar: Array | None,
    k: Array,
    z: Array,
    b: Array,
    p: Array,
    s: Array,
    frame: Array,
    /,
    *,
    solve: Solve = polar_system,
) -> tuple[Array | None, ...]:
    """Cotangents of all arguments of `polar_system`, ``None`` for those without a derivative, from one solve.

    The map of c and b is its own transpose. `solve` is `polar_system`, or the same made differentiable.
    """
    xp = namespace_of(p)
    k_bar = xp.zeros_like(p) if k_bar is None else k_bar
    c_bar, b_bar = solve(k_bar, xp.zeros_like(z) if z_bar is None else z_bar, p, s, frame)
    # The right-hand side of K moves by −Ṗ K − K Ṗ, which as C − Cᴴ has half of it for C; that of Z by −Z Ṗ.
    p_bar = (c_bar @ k + k @ c_bar) / 2
    return c_bar, b_bar, p_bar if 0 in b.shape else p_bar - adjoint(z) @ b_bar, None, None


def polar_system_jvp(
    c_dot: Array | None,
    b_dot: Array | None,
    p_dot: Array | None,
    s_dot: Array | None,  # noqa: ARG001
    frame_dot: Array | None,  # noqa: ARG001
    k: Array,
    z: Array,
    b: Array,
    p: Array,
    s: Array,
    frame: Array,
    /,
    *,
    solve: Solve = polar_system,
) -> Pair:
    """Tangents of both solutions, from one solve; a tangent is ``None`` for what does not move."""
    xp = namespace_of(p)
    c_dot = xp.zeros_like(p) if c_dot is None else c_dot
    b_dot = xp.zeros_like(b) if b_dot is None else b_dot
    if p_dot is not None:
        c_dot = c_dot - (p_dot @ k + k @ p_dot) / 2
        b_dot = b_dot if 0 in b.shape else b_dot - z @ p_dot
    return solve(c_dot, b_dot, p, s, frame)
