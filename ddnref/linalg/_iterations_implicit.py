"""Derivatives of eigenpairs through the equations that they fulfil: refined pairs, and the systems of both forms.

`ddnref.linalg._iterations` has the equations.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from ddnref._core.arrays import Array, among, double, eps, is_complex, is_true, namespace, namespace_of, nan_where
from ddnref._core.checks import conform
from ddnref._kernels import singularity
from ddnref._kernels.bordered import bordered, in_chunks, product_in_double, shifted, solve_each, solve_on_complement
from ddnref._kernels.dense import hermitian_part, hermitian_sum, identity, symmetrised
from ddnref._kernels.eigh_vjp import exceeds
from ddnref._kernels.vectors import largest, power_of_two, safe_norm
from ddnref.errors import GaugeError
from ddnref.linalg._eigh import RTOL as SAME_RTOL
from ddnref.linalg._iterate import _balanced, _check_start

METHODS = ("bordered", "fixed_point", "unrolled")


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
