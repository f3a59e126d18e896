"""VJPs of dominant eigenpairs, from the pairs and the matrix alone: three ways to one gradient.

bordered       KKT system of the declarative node ``min −tr(uᵀXu) s.t. uᵀu = 1``, for each pair (λ, y):

                   ⎡ λI − Xᵀ   y ⎤ ⎡ w ⎤   ⎡ ȳ ⎤
                   ⎣    yᵀ     0 ⎦ ⎣ μ ⎦ = ⎣ λ̄ ⎦,          X̄ = w yᵀ

               With X symmetric and n pairs Y: bordered by all of Y, right-hand side ``(I − Y Yᵀ) ȳ``, and the part
               inside span(Y) in closed form, ``X̄ = sym(W Yᵀ + Y (diag(λ̄) + ½ F ∘ (M − Mᵀ)) Yᵀ)`` as in `eigh_vjp`.

fixed point    ``y = X y / λ`` with the signed λ and ``P = I − y yᵀ``; λ = yᵀXy passes its cotangent on to y:

                   (I − XᵀP/λ) q = ȳ + λ̄ (X + Xᵀ) y,       X̄ = (P q / λ + λ̄ y) yᵀ

unrolled       every iterate recomputed, kept and reversed, in `ddnref.linalg._unrolled`.

               On NumPy by Cholesky, where the n are the dominant ones: ``σ (λI − X) + 2 |λ_max| Y Yᵀ``, ``σ = sign λ``,
               is positive definite then, and equal to ``σ (λI − X)`` on the complement of Y, where W lies.

The matrix ``λI − X`` alone is singular at the solution; bordered, or on the fixed point's complement, it is not.
Systems are built and solved in float64: an eigenvalue rounded to float32 leaves an error of 3e-5 in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, Namespace, double, eps, is_complex, is_true, namespace, nan_where
from ddnref._core.checks import check_dtypes, check_shapes, check_square
from ddnref._kernels import numpy as _numpy
from ddnref._kernels.dense import bordered, hermitian_sum, identity, solve, symmetrised, with_diagonal
from ddnref._kernels.public import public
from ddnref.errors import GaugeError
from ddnref.linalg._gauge import RTOL, exceeds, largest
from ddnref.linalg._iterations import check_start
from ddnref.linalg._unrolled import power_unrolled_vjp, simultaneous_unrolled_vjp

METHODS = ("bordered", "fixed_point", "unrolled")
CHUNK = 2**16  # entries of the systems that NumPy holds at once: 4 items at m = 128, one from 256 on


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
    >>> np.round(ddnref.power_iteration_vjp(None, np.asarray([0.0, 1.0]), w, v, x), 12) + 0.0  # of v[1]
    array([[0. , 0. ],
           [0.5, 0. ]])
    """
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, x=x)
    check_square("x", x)
    shape = tuple(x.shape[:-1])
    check_shapes(w_bar=(w_bar, shape[:-1]), v_bar=(v_bar, shape), w=(w, shape[:-1]), v=(v, shape))
    steps = _check(w_bar, v_bar, w, v, x, method, n_iter, v0)
    if method == "unrolled":
        return power_unrolled_vjp(w_bar, v_bar, v, x, symmetric, v0, steps)
    w_bar = xp.zeros_like(w) if w_bar is None else w_bar
    v_bar = xp.zeros_like(v) if v_bar is None else v_bar
    return _vjp(xp, w_bar[..., None], v_bar[..., None], w[..., None], v[..., None], x, method, symmetric, throw)


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
    As `power_iteration_vjp`, n factorisations of matrices of order m + 1, or m + n with ``symmetric=True``; on NumPy
    then half the flops, ``⅓ m³`` each, if the n are the dominant ones.

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
    xp = namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, x=x)
    check_square("x", x)
    shape, n = tuple(x.shape[:-1]), v.shape[-1:]
    check_shapes(
        w_bar=(w_bar, (*shape[:-1], *n)), v_bar=(v_bar, (*shape, *n)), w=(w, (*shape[:-1], *n)), v=(v, (*shape, *n))
    )
    steps = _check(w_bar, v_bar, w, v, x, method, n_iter, v0)
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

    z = symmetrised(x) if symmetric else x
    if not array_api_compat.is_numpy_array(z):  # NumPy converts where it needs to, a chunk at a time
        z = double(xp, z)
    y = double(xp, v)
    y = y / xp.sqrt(xp.sum(y * y, axis=-2, keepdims=True))
    z_y = _numpy.product_in_double(z, y) if array_api_compat.is_numpy_array(z) else z @ y
    rayleigh = xp.sum(y * z_y, axis=-2)
    size = xp.max(xp.abs(rayleigh), axis=-1, keepdims=True)
    left, bad = algorithm(xp, double(xp, w_bar), double(xp, v_bar), rayleigh, y, z, z_y, size, eps(xp, w.dtype))
    left = nan_where(bad[..., None, None], left / 2 if symmetric else left)  # NaN in each factor: in all of X̄
    left, y = (xp.astype(a, x.dtype, copy=False) for a in (left, y))
    if throw and is_true(xp.any(bad & xp.isfinite(w[..., 0]))):
        raise GaugeError(
            "An eigenvalue is repeated to working precision, or the n-th cuts a cluster of equal ones, so that its "
            "eigenvector is a choice that the matrix does not determine. Take more columns, so that the cluster is "
            'whole, with symmetric=True and method="bordered" and a loss of its projector; or separate the '
            "eigenvalues, or pass throw=False to get NaN for these items."
        )
    return hermitian_sum(left, y) if symmetric else left @ xp.matrix_transpose(y)


def _bordered(
    xp: Namespace, w_bar: Array, v_bar: Array, w: Array, y: Array, x: Array, _: Array, size: Array, unit: float
) -> tuple[Array, Array]:
    """W of ``X̄ = W Yᵀ`` for any real matrix, one pair at a time; the border is scaled like the matrix."""
    right = xp.concat([v_bar, (size * w_bar)[..., None, :]], axis=-2)

    def solutions(w: Array, y: Array, size: Array, right: Array, x: Array) -> tuple[Array, Array]:
        x_t, diagonal = xp.matrix_transpose(x), xp.linalg.diagonal(x)
        y = size[..., None] * y
        systems = (
            with_diagonal(bordered(x_t, y[..., i : i + 1]), w[..., i, None] - diagonal) for i in range(w.shape[-1])
        )
        return _solve_each(xp, systems, right, size, unit)

    left, bad = _in_chunks(solutions, w, y, size, right, x)
    return left[..., :-1, :], bad


def _bordered_symmetric(
    xp: Namespace, w_bar: Array, v_bar: Array, w: Array, y: Array, x: Array, _: Array, size: Array, unit: float
) -> tuple[Array, Array]:
    """``W + Y K`` of ``X̄ = sym((W + Y K) Yᵀ)`` for a symmetric matrix."""
    m_ = xp.matrix_transpose(y) @ v_bar
    right = v_bar - y @ m_

    def solutions(w: Array, y: Array, size: Array, right: Array, x: Array) -> tuple[Array, Array]:
        a, diagonal = bordered(x, size[..., None] * y), xp.linalg.diagonal(x)
        systems = (with_diagonal(a, w[..., i, None] - diagonal) for i in range(w.shape[-1]))
        below = xp.zeros_like(right[..., : y.shape[-1], :])
        left, bad = _solve_each(xp, systems, xp.concat([right, below], axis=-2), size, unit)
        return left[..., : x.shape[-1], :], bad

    if array_api_compat.is_numpy_array(x):
        left, bad = _dominant(solutions, w, y, size, right, x, unit)
    else:
        left, bad = solutions(w, y, size, right, x)
    k, split = _inside(xp, w_bar, m_, w, size, unit)
    return left + y @ k, bad | split


def _dominant(
    others: Callable[..., tuple[Array, Array]], w: Array, y: Array, size: Array, right: Array, x: Array, unit: float
) -> tuple[Array, Array]:
    """What ``others(w, y, size, right, x)`` returns, on NumPy: by Cholesky where the n pairs are the dominant ones."""
    m, n = y.shape[-2:]
    flat = [a.reshape(-1, *a.shape[w.ndim - 1 :]) for a in (w, y, size, right, x)]
    both = np.empty((len(flat[-1]), n, 2, m))
    both[:, :, 0], both[:, :, 1] = flat[3].mT, _probe(np.arange(m, dtype=w.dtype))
    both, failed = _numpy.dominant_solve(flat[0], flat[1], flat[2], both, flat[4])
    left = both[:, :, 0].mT
    bad = _grows(np.abs(both[:, :, 1]).max(axis=(-2, -1)), flat[2], m, unit)
    if failed.any():
        left[failed], bad[failed] = _in_chunks(others, *(a[failed] for a in flat))
    return left.reshape(y.shape), bad.reshape(w.shape[:-1])


def _inside(xp: Namespace, w_bar: Array, m_: Array, w: Array, size: Array, unit: float) -> tuple[Array, Array]:
    """``K = diag(λ̄) + ½ F ∘ (M − Mᵀ)``, and whether the loss tells equal eigenvalues or their vectors apart."""
    if w.shape[-1] == 1:  # no other inside: a third of the whole time at m = 32 on NumPy
        return w_bar[..., None], w[..., 0] != w[..., 0]
    gap = w[..., None, :] - w[..., :, None]
    same = xp.abs(gap) <= RTOL * unit * size[..., None]
    skew = (m_ - xp.matrix_transpose(m_)) / 2
    k = xp.where(same, xp.zeros_like(skew), skew / xp.where(same, xp.ones_like(gap), gap))
    k = k + w_bar[..., None, :] * identity(w.shape[-1], w)
    jump = xp.where(same, w_bar[..., None, :] - w_bar[..., :, None], xp.zeros_like(gap))
    inside = largest(xp.where(same, skew, xp.zeros_like(skew)), 2)
    bad = exceeds(inside, largest(m_, 2), unit**0.5)
    return k, bad | exceeds(largest(jump, 2), largest(w_bar, 1), unit**0.5)


def _fixed_point(
    xp: Namespace, w_bar: Array, v_bar: Array, w: Array, y: Array, x: Array, x_y: Array, size: Array, unit: float
) -> tuple[Array, Array]:
    """``P q / λ + λ̄ y``, each pair by itself, from λ times its equation.

    It holds for every eigenvector, whether the iteration would find it or not.
    """
    x_t_y = xp.matrix_transpose(x) @ y
    right = v_bar + w_bar[..., None, :] * (x_y + x_t_y)

    def solutions(w: Array, y: Array, x_t_y: Array, size: Array, right: Array, x: Array) -> tuple[Array, Array]:
        y_t, x_t = xp.matrix_transpose(y), xp.matrix_transpose(x)
        x_p = (x_t - x_t_y[..., i : i + 1] @ y_t[..., i : i + 1, :] for i in range(w.shape[-1]))
        systems = (with_diagonal(-b, w[..., i, None] - xp.linalg.diagonal(b)) for i, b in enumerate(x_p))
        return _solve_each(xp, systems, right, size, unit)

    q, bad = _in_chunks(solutions, w, y, x_t_y, size, right, x)
    return q - y * xp.sum(y * q, axis=-2, keepdims=True) + w_bar[..., None, :] * y, bad


def _in_chunks(part: Callable[..., tuple[Array, Array]], *arrays: Array) -> tuple[Array, Array]:
    """``part(*arrays)``; on NumPy in chunks of the batch, so that the float64 systems stay small."""
    x = arrays[-1]
    if not array_api_compat.is_numpy_array(x) or x.size <= CHUNK:
        return part(*arrays)
    m, batch = x.shape[-1], x.shape[:-2]
    flat = [a.reshape(-1, *a.shape[len(batch) :]) for a in arrays]
    step = max(1, CHUNK // m**2)
    parts = [part(*(a[i : i + step] for a in flat)) for i in range(0, len(flat[-1]), step)]
    left, bad = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
    return left.reshape(*batch, *left.shape[1:]), bad.reshape(batch)


def _solve_each(xp: Namespace, systems: Iterable[Array], right: Array, size: Array, unit: float) -> tuple[Array, Array]:
    """Column i from the i-th matrix, and whether any of them is singular to working precision."""
    n = right.shape[-2]
    probe = _probe(xp.arange(n, dtype=right.dtype, device=array_api_compat.device(right)))
    probe = xp.broadcast_to(probe[:, None], (*right.shape[:-1], 1))
    rights = (xp.concat([right[..., i : i + 1], probe], axis=-1) for i in range(right.shape[-1]))
    if array_api_compat.is_jax_array(right):
        # At once: XLA runs separate ones side by side, and batches of LAPACK that do may wait for each other for good.
        both = solve(xp.stack(list(systems), axis=0), xp.stack(list(rights), axis=0))
        solved = [both[i, ...] for i in range(right.shape[-1])]
    else:
        solved = [solve(a, b) for a, b in zip(systems, rights, strict=True)]
    columns, growth = (xp.concat([x[..., j : j + 1] for x in solved], axis=-1) for j in range(2))
    largest = xp.max(xp.abs(growth), axis=(-2, -1))
    return columns, _grows(largest, size, n, unit)


def _probe(i: Array) -> Array:
    """One more right-hand side, which shows whether a matrix is singular: i is 0, 1, … n − 1.

    Without structure, and of length about one, it has a part of about ``1/√n`` along the direction that A nearly
    annihilates, so that its solution grows like ``1 / (√n gap)``.
    """
    return (2 / i.shape[0]) ** 0.5 * array_api_compat.array_namespace(i).cos(i * i)


def _grows(largest: Array, size: Array, n: int, unit: float) -> Array:
    """Whether the largest entry of such a solution says ``gap <= 16 eps size``; also for NaN."""
    return ~(largest * size[..., 0] * (RTOL * unit * n**0.5) < 1)


def _check(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    x: Array,
    method: str,
    n_iter: int | None,
    v0: Array | None,
) -> int:
    check_dtypes(w_bar=(w_bar, x.dtype), v_bar=(v_bar, x.dtype), w=(w, x.dtype), v=(v, x.dtype))
    if is_complex(x):
        raise TypeError(f"The iterations and their VJPs take real matrices, got {x.dtype}: use ddnref.eigh or eigsh.")
    if w_bar is None and v_bar is None:
        raise TypeError("w_bar and v_bar are both None: there is nothing to differentiate.")
    if method not in METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(METHODS)}.")
    if method == "unrolled" and n_iter is None:
        raise ValueError('method "unrolled" needs n_iter, the number of steps to repeat and reverse.')
    if v0 is not None:
        check_start(v0, x, tuple(v.shape[x.ndim - 1 :]))
    return n_iter or 0
