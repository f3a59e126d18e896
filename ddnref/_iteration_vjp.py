"""VJPs of dominant eigenpairs, from the pairs and the matrix alone: three ways to one gradient.

bordered       KKT system of the declarative node ``min −tr(uᵀXu) s.t. uᵀu = 1``, for each pair (λ, y):

                   ⎡ λI − Xᵀ   y ⎤ ⎡ w ⎤   ⎡ ȳ ⎤
                   ⎣    yᵀ     0 ⎦ ⎣ μ ⎦ = ⎣ λ̄ ⎦,          X̄ = w yᵀ

               With X symmetric and n pairs Y: bordered by all of Y, right-hand side ``(I − Y Yᵀ) ȳ``, and the part
               inside span(Y) in closed form, ``X̄ = sym(W Yᵀ + Y (diag(λ̄) + ½ F ∘ (M − Mᵀ)) Yᵀ)`` as in `eigh_vjp`.

fixed point    ``y = X y / λ`` with the signed λ and ``P = I − y yᵀ``; λ = yᵀXy passes its cotangent on to y:

                   (I − XᵀP/λ) q = ȳ + λ̄ (X + Xᵀ) y,       X̄ = (P q / λ + λ̄ y) yᵀ

unrolled       every iterate recomputed, kept and reversed, in `ddnref._unrolled`.

The matrix ``λI − X`` alone is singular at the solution; bordered, or on the fixed point's complement, it is not.
Systems are built and solved in float64: an eigenvalue rounded to float32 leaves an error of 3e-5 in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import array_api_compat
import numpy as np

from ddnref._array import (
    Array,
    Namespace,
    check_dtypes,
    check_shapes,
    check_square,
    double,
    eps,
    full,
    is_true,
    namespace,
    nan_where,
)
from ddnref._errors import GaugeError
from ddnref._gauge import RTOL
from ddnref._linalg import hermitian_part, identity, solve
from ddnref._unrolled import power_unrolled_vjp, simultaneous_unrolled_vjp

METHODS = ("bordered", "fixed_point", "unrolled")
CHUNK = 2**18  # entries of the bordered matrices that are solved at once on NumPy: the cache, and peak memory


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
    The equations are at the top of the module. The pair's own error e comes through as about ``e ‖X‖ / gap``. Cost:
    ``⅔ (m+1)³`` flops and two float64 matrices for each item of the batch; unrolled 4 m² flops and m numbers a step.

    References
    ----------
    .. [1] S. Gould, R. Hartley, D. Campbell, "Deep declarative networks", TPAMI 44 (2022), proposition 4.5.
    .. [2] J. R. Magnus, "On differentiating eigenvalues and eigenvectors", Econometric Theory 1 (1985).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([3.0, 1.0]))
    >>> (w, v), _ = ddnref.power_iteration(x)
    >>> np.round(ddnref.power_iteration_vjp(None, np.asarray([0.0, 1.0]), w, v, x), 12)  # of v[1]
    array([[0. , 0. ],
           [0.5, 0. ]])
    """
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, x=x)
    check_square("x", x)
    shape = tuple(x.shape[:-1])
    check_shapes(w_bar=(w_bar, shape[:-1]), v_bar=(v_bar, shape), w=(w, shape[:-1]), v=(v, shape))
    steps = _check(w_bar, v_bar, w, v, x, method, n_iter)
    if method == "unrolled":
        return power_unrolled_vjp(w_bar, v_bar, v, x, symmetric, v0, steps)
    w_bar = xp.zeros_like(w) if w_bar is None else w_bar
    v_bar = xp.zeros_like(v) if v_bar is None else v_bar
    return _vjp(xp, w_bar[..., None], v_bar[..., None], w[..., None], v[..., None], x, method, symmetric, throw)


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
    As `power_iteration_vjp`, n factorisations of matrices of order m + 1, or m + n with ``symmetric=True``.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.diag(np.asarray([3.0, 1.0, -2.0]))
    >>> (w, v), _ = ddnref.simultaneous_iteration(x, 2, symmetric=True)
    >>> np.round(ddnref.simultaneous_iteration_vjp(np.asarray([0.0, 1.0]), None, w, v, x, symmetric=True), 12)
    array([[0., 0., 0.],
           [0., 0., 0.],
           [0., 0., 1.]])
    """
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, x=x)
    check_square("x", x)
    shape, n = tuple(x.shape[:-1]), v.shape[-1:]
    check_shapes(
        w_bar=(w_bar, (*shape[:-1], *n)), v_bar=(v_bar, (*shape, *n)), w=(w, (*shape[:-1], *n)), v=(v, (*shape, *n))
    )
    steps = _check(w_bar, v_bar, w, v, x, method, n_iter)
    if method == "unrolled":
        if not symmetric and n[0] > 1:
            raise ValueError('method "unrolled" with n > 1 columns needs symmetric=True; "bordered" does not.')
        return simultaneous_unrolled_vjp(w_bar, v_bar, w, v, x, symmetric, v0, steps)
    w_bar = xp.zeros_like(w) if w_bar is None else w_bar
    v_bar = xp.zeros_like(v) if v_bar is None else v_bar
    return _vjp(xp, w_bar, v_bar, w, v, x, method, symmetric, throw)


# --- below: the algorithms, without validation -----------------------------------------------------------------


def _vjp(
    xp: Namespace, w_bar: Array, v_bar: Array, w: Array, v: Array, x: Array, method: str, symmetric: bool, throw: bool
) -> Array:
    if 0 in v.shape:
        return xp.zeros_like(x)
    algorithm = {"fixed_point": _fixed_point, "bordered": _bordered_symmetric if symmetric else _bordered}[method]

    def part(w_bar: Array, v_bar: Array, w: Array, v: Array, x: Array) -> tuple[Array, Array]:
        z = double(xp, hermitian_part(x) if symmetric else x)
        y = double(xp, v)
        y = y / xp.sqrt(xp.sum(y * y, axis=-2, keepdims=True))
        rayleigh = xp.sum(y * (z @ y), axis=-2)
        size = xp.max(xp.abs(rayleigh), axis=-1, keepdims=True)
        z_bar, bad = algorithm(xp, double(xp, w_bar), double(xp, v_bar), rayleigh, y, z, size, eps(xp, w.dtype))
        return xp.astype(hermitian_part(z_bar) if symmetric else z_bar, x.dtype), bad

    x_bar, bad = _in_chunks(part, w_bar, v_bar, w, v, x)
    if throw and is_true(xp.any(bad & xp.isfinite(w[..., 0]))):
        raise GaugeError(
            "An eigenvalue is repeated to working precision, or the n-th cuts a cluster of equal ones, so that its "
            "eigenvector is a choice that the matrix does not determine. Take more columns, so that the cluster is "
            'whole, with symmetric=True and method="bordered" and a loss of its projector; or separate the '
            "eigenvalues, or pass throw=False to get NaN for these items."
        )
    return nan_where(bad[..., None, None], x_bar)


def _in_chunks(part: Callable[..., tuple[Array, Array]], *arrays: Array) -> tuple[Array, Array]:
    """``part(*arrays)``; on NumPy in chunks of the batch, so that the float64 copies stay small."""
    x = arrays[-1]
    m = x.shape[-1]
    if not array_api_compat.is_numpy_array(x) or x.size <= CHUNK:
        return part(*arrays)
    batch = x.shape[:-2]
    flat = [a.reshape(-1, *a.shape[len(batch) :]) for a in arrays]
    items, step = flat[-1].shape[0], max(1, CHUNK // m**2)
    x_bar, bad = np.empty_like(flat[-1]), np.empty(items, dtype=bool)
    for start in range(0, items, step):
        chunk = slice(start, start + step)
        x_bar[chunk], bad[chunk] = part(*(a[chunk] for a in flat))
    return x_bar.reshape(x.shape), bad.reshape(batch)


def _bordered(
    xp: Namespace, w_bar: Array, v_bar: Array, w: Array, y: Array, x: Array, size: Array, unit: float
) -> tuple[Array, Array]:
    """Any real matrix, one pair at a time; the border is scaled like the matrix."""
    x_t, eye = xp.matrix_transpose(x), identity(x.shape[-1], x)
    x_bar, bad = xp.zeros_like(x), w[..., 0] != w[..., 0]
    for i in range(w.shape[-1]):
        y_i = y[..., i : i + 1]
        border = size[..., None] * y_i
        right = xp.concat([v_bar[..., i : i + 1], (size * w_bar[..., i : i + 1])[..., None]], axis=-2)
        w_i, singular = _solve_bordered(xp, w[..., i, None, None] * eye - x_t, border, right, size, unit)
        x_bar = x_bar + w_i @ xp.matrix_transpose(y_i)
        bad = bad | singular
    return x_bar, bad


def _bordered_symmetric(
    xp: Namespace, w_bar: Array, v_bar: Array, w: Array, y: Array, x: Array, size: Array, unit: float
) -> tuple[Array, Array]:
    """A symmetric matrix: ``W Yᵀ + Y K Yᵀ``, to be symmetrised by the caller."""
    y_t, eye = xp.matrix_transpose(y), identity(x.shape[-1], x)
    m_ = y_t @ v_bar
    outside = v_bar - y @ m_
    gap = w[..., None, :] - w[..., :, None]
    same = xp.abs(gap) <= RTOL * unit * size[..., None]
    skew = (m_ - xp.matrix_transpose(m_)) / 2
    k = xp.where(same, xp.zeros_like(skew), skew / xp.where(same, xp.ones_like(gap), gap))
    k = k + w_bar[..., None, :] * identity(w.shape[-1], x)
    jump = xp.where(same, w_bar[..., None, :] - w_bar[..., :, None], xp.zeros_like(gap))
    bad = _exceeds(xp, xp.where(same, skew, xp.zeros_like(skew)), m_, unit) | _exceeds(xp, jump, w_bar[..., None], unit)
    x_bar = y @ (k @ y_t)
    zero = full((*w.shape[:-1], w.shape[-1], 1), 0.0, w)
    for i in range(w.shape[-1]):
        right = xp.concat([outside[..., i : i + 1], zero], axis=-2)
        w_i, singular = _solve_bordered(xp, w[..., i, None, None] * eye - x, size[..., None] * y, right, size, unit)
        x_bar = x_bar + w_i @ y_t[..., i : i + 1, :]
        bad = bad | singular
    return x_bar, bad


def _solve_bordered(
    xp: Namespace, a: Array, border: Array, right: Array, size: Array, unit: float
) -> tuple[Array, Array]:
    """The first m rows of the solution, and whether the system is singular to working precision."""
    m, n = border.shape[-2:]
    corner = full((*border.shape[:-2], n, n), 0.0, a)
    above = xp.concat([a, border], axis=-1)
    below = xp.concat([xp.matrix_transpose(border), corner], axis=-1)
    solution, singular = _solve_and_probe(xp, xp.concat([above, below], axis=-2), right, size, unit)
    return solution[..., :m, :], singular


def _fixed_point(
    xp: Namespace, w_bar: Array, v_bar: Array, w: Array, y: Array, x: Array, size: Array, unit: float
) -> tuple[Array, Array]:
    """Each pair by itself: the equation holds for every eigenvector, whether the iteration would find it or not."""
    x_t, eye = xp.matrix_transpose(x), identity(x.shape[-1], x)
    v_bar = v_bar + w_bar[..., None, :] * (x @ y + x_t @ y)
    x_bar, bad = xp.zeros_like(x), w[..., 0] != w[..., 0]
    for i in range(w.shape[-1]):
        y_i, w_i = y[..., i : i + 1], w[..., i, None, None]
        y_t = xp.matrix_transpose(y_i)
        a = eye - (x_t - (x_t @ y_i) @ y_t) / w_i
        q, singular = _solve_and_probe(xp, a, v_bar[..., i : i + 1], size / xp.abs(w[..., i : i + 1]), unit)
        x_bar = x_bar + ((q - y_i @ (y_t @ q)) / w_i + w_bar[..., i, None, None] * y_i) @ y_t
        bad = bad | singular
    return x_bar, bad


def _solve_and_probe(xp: Namespace, a: Array, right: Array, size: Array, unit: float) -> tuple[Array, Array]:
    """Solve, with a second right-hand side, a fixed one without structure, that shows a nearly singular matrix.

    Such a unit vector has a part of about ``1/√n`` along the direction that A nearly annihilates, so that its
    solution grows like ``1 / (√n gap)``. The matrix counts as singular where that says ``gap <= 16 eps size``.
    """
    n = a.shape[-1]
    i = xp.arange(n, dtype=a.dtype, device=array_api_compat.device(a))
    probe = (2 / n) ** 0.5 * xp.cos(i * i)[:, None]  # as good as random, of length about one, and it traces
    both = solve(a, xp.concat([right, xp.broadcast_to(probe, right.shape)], axis=-1))
    growth = xp.max(xp.abs(both[..., 1]), axis=-1)
    singular = ~(growth * size[..., 0] * (RTOL * unit * n**0.5) < 1)
    return both[..., :1], singular


def _exceeds(xp: Namespace, part: Array, whole: Array, unit: float) -> Array:
    return xp.max(xp.abs(part), axis=(-2, -1)) > unit**0.5 * xp.max(xp.abs(whole), axis=(-2, -1))


def _check(
    w_bar: Array | None, v_bar: Array | None, w: Array, v: Array, x: Array, method: str, n_iter: int | None
) -> int:
    check_dtypes(w_bar=(w_bar, x.dtype), v_bar=(v_bar, x.dtype), w=(w, x.dtype), v=(v, x.dtype))
    xp = array_api_compat.array_namespace(x)
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(f"The iterations and their VJPs take real matrices, got {x.dtype}: use ddnref.eigh or eigsh.")
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    if method == "unrolled" and n_iter is None:
        raise ValueError('method "unrolled" needs n_iter, the number of steps to repeat and reverse.')
    return n_iter or 0
