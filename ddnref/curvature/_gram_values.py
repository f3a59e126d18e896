"""Eigenvalues of ``V Vᴴ`` through the Gram matrix ``K = VᴴV = U Λ Uᴴ``, and their VJP: ``V̄ = 2 V U diag(λ̄) Uᴴ``."""

from __future__ import annotations

from typing import Any

import array_api_compat

from ddnref._core.arrays import (
    Array,
    Namespace,
    eps,
    is_true,
    namespace,
    nan_where,
    real_dtype,
    refuse_non_finite,
    refuse_recording,
)
from ddnref._core.checks import check_dtypes, check_shapes, given
from ddnref._core.selection import take
from ddnref._kernels.dense import eigh, eigvalsh
from ddnref._kernels.eigh_vjp import exceeds, jump
from ddnref._kernels.public import public
from ddnref.linalg._eigh import eigh_vjp, neighbours, raise_gauge, ratio
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import Factor, Tall, tall


@public
def gram_eigvalsh(factor: Factor, /, *, check_finite: bool = False) -> Array:
    r"""The eigenvalues of ``V Vᴴ`` for a tall factor V, largest first, from its n×n Gram matrix.

    Parameters
    ----------
    factor : (..., D, n) array, real or complex floating
        V, with as many columns as the Gram matrix shall have. Also a list of pieces ``(..., D_l, n)`` stacked on top
        of each other, such as one for each layer of a network, or a `LinearOperator` from n entries to D.
    check_finite : bool, default False
        Raise `NonFiniteError` if the Gram matrix contains NaN or infinity, reading one flag on the host.

    Returns
    -------
    w : (..., min(D, n)) real array
        Descending. The other ``|D − n|`` eigenvalues of ``V Vᴴ`` or ``Vᴴ V`` are zero. Zero eigenvalues within these
        come out as rounding, of either sign.

    Raises
    ------
    TypeError
        Not floating, mixed libraries or devices; a PyTorch tensor that requires grad.
    ValueError
        Fewer than two axes, pieces that do not fit, an empty list.
    NonFiniteError
        Only with ``check_finite=True``.

    See Also
    --------
    gram_eigvalsh_fwd, gram_eigvalsh_vjp
    gram_eigh : with eigenvectors.
    gram_reducer : for a factor that arrives in shards.

    Notes
    -----
    Cost: D n² flops for the Gram matrix and about 4/3 n³ for its eigenvalues, n² numbers of memory. A piece or a shard
    at a time, V itself need not fit into memory. Forming the Gram matrix squares the condition: an eigenvalue is
    accurate to ``eps * λ_1``, not to ``eps * √(λ_1 λ_i)`` as from a singular value decomposition of V.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.curvature.gram_eigvalsh(np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    array([9., 1.])
    """
    v = ready(factor, "gram_eigvalsh")
    return _largest(eigvalsh(gram_matrix(v, check_finite)), v)


@public
def gram_eigvalsh_fwd(factor: Factor, /, *, check_finite: bool = False) -> tuple[Array, tuple[Array, Array]]:
    """`gram_eigvalsh` and what its reverse pass needs.

    Parameters
    ----------
    factor, check_finite
        As in `gram_eigvalsh`.

    Returns
    -------
    w : (..., min(D, n)) real array
        The output of `gram_eigvalsh`.
    (w_all, u_all) : (..., n) and (..., n, n) arrays
        The decomposition of the Gram matrix, ascending, as from `eigh`.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `gram_eigvalsh`.
    """
    v = ready(factor, "gram_eigvalsh")
    w_all, u_all = eigh(gram_matrix(v, check_finite))
    return _largest(w_all, v), (w_all, u_all)


@public
def gram_eigvalsh_vjp(
    w_bar: Array,
    w: Array,
    w_all: Array,
    u_all: Array,
    factor: Factor,
    /,
    *,
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Any:
    r"""Gradient of a loss of the eigenvalues with respect to the factor.

    Parameters
    ----------
    w_bar : (..., min(D, n)) real array
        Cotangent of the eigenvalues.
    w, w_all, u_all
        What `gram_eigvalsh_fwd` returned.
    factor
        As in `gram_eigvalsh`.
    rtol, gauge_rtol, throw
        As in `eigh_vjp`.

    Returns
    -------
    factor_bar : (..., D, n) array, a tuple of pieces, or a tuple with one cotangent for each parameter
        As the factor was given.

    Raises
    ------
    GaugeError
        If the loss tells equal eigenvalues apart (only with ``throw=True``).
    TypeError, ValueError
        As `gram_eigvalsh`; shapes that do not fit.

    Notes
    -----
    With :math:`V^H V = U \Lambda U^H`, :math:`\bar V = 2 V U \mathrm{diag}(\bar\lambda) U^H`. It exists at zero
    eigenvalues too, where it vanishes along their eigenvectors. Cost: 2 D n² + 2 n³ flops.

    Examples
    --------
    >>> import numpy as np
    >>> v = np.asarray([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    >>> w, saved = ddnref.curvature.gram_eigvalsh_fwd(v)
    >>> ddnref.curvature.gram_eigvalsh_vjp(np.asarray([1.0, 0.0]), w, *saved, v)  # of the largest, 3² = 9
    array([[6., 0.],
           [0., 0.],
           [0., 0.]])
    """
    v = tall(factor)
    given(w_bar=w_bar, w=w)
    xp = namespace(w_bar=w_bar, w=w, w_all=w_all, u_all=u_all, factor=v.like)
    real = real_dtype(xp, v.like.dtype)
    check_dtypes(w_bar=(w_bar, real), w=(w, real), w_all=(w_all, real), u_all=(u_all, v.like.dtype))
    check_shapes(w=(w, (*v.batch, count(v))), w_all=(w_all, (*v.batch, v.n)), u_all=(u_all, (*v.batch, v.n, v.n)))
    index = columns_of(count(v), v)
    k_bar = 2 * eigh_vjp(w_bar, None, w_all, u_all, index=index, gauge_rtol=float("inf"), throw=False)
    zero = w <= zero_tolerance(xp, w, v.n, None) * w[..., :1]  # equal, but with a gradient: V u = 0
    check = jump(xp.where(zero, xp.zeros_like(w_bar), w_bar), neighbours(xp, w_all, rtol), index)
    bad = gauge_check([check], gauge_rtol, throw)
    return v.join_bar(v.times(nan_where(bad[..., None, None], k_bar)))


def has_repeated(w_all: Array, rtol: float | None = None) -> Array:
    """Per item, whether eigenvalues other than zero are equal: there a second derivative is wrong.

    Those that are zero stay equal, because ``V u = 0`` for their eigenvectors.
    """
    xp = array_api_compat.array_namespace(w_all)
    zero = w_all <= zero_tolerance(xp, w_all, w_all.shape[-1], None) * w_all[..., -1:]
    return xp.any(neighbours(xp, w_all, rtol) & ~zero[..., 1:], axis=-1)


# --- shared with the eigenvectors --------------------------------------------------------------------------------


def ready(factor: Factor, function: str) -> Tall:
    """The factor in pieces, unless PyTorch records it."""
    arrays = factor.params if isinstance(factor, LinearOperator) else factor
    v = tall(factor)
    for array in arrays if isinstance(arrays, (list, tuple)) else (arrays,):
        refuse_recording(function, array)
    return v


def gram_matrix(v: Tall, check_finite: bool) -> Array:
    """``Vᴴ V``; `NonFiniteError` if asked for."""
    k = v.gram()
    if check_finite:
        refuse_non_finite("the Gram matrix of factor", k)
    return k


def count(v: Tall) -> int:
    """The most eigenvalues that are not zero: the smaller of D and n."""
    return min(v.rows, v.n)


def columns_of(k: int, v: Tall) -> range:
    """The k largest of n ascending eigenvalues."""
    if not (1 <= k <= count(v) or k == count(v)):
        raise ValueError(
            f"k is {k}, expected 1 <= k <= {count(v)}: a factor with {v.rows} rows and {v.n} columns has at most that "
            "many non-zero eigenvalues."
        )
    return range(v.n - 1, v.n - 1 - k, -1)


def zero_tolerance(xp: Namespace, w: Array, n: int, zero_rtol: float | None) -> float:
    """Eigenvalues of an n×n Gram matrix up to this multiple of the largest are rounding."""
    return max(16, n) * eps(xp, w.dtype) if zero_rtol is None else zero_rtol


def gauge_check(residuals: list[tuple[Array, Array]], gauge_rtol: float | None, throw: bool) -> Array:
    """Items whose loss is not well defined, each residual ``(part, whole)``; or `GaugeError`."""
    xp = array_api_compat.array_namespace(residuals[0][0])
    rtol = eps(xp, residuals[0][0].dtype) ** 0.5 if gauge_rtol is None else gauge_rtol
    bad, worst = exceeds(*residuals[0], rtol), ratio(*residuals[0])
    for residual in residuals[1:]:
        bad, worst = bad | exceeds(*residual, rtol), xp.maximum(worst, ratio(*residual))
    if throw and is_true(xp.any(bad)):
        raise_gauge(worst, rtol)
    return bad


def _largest(w_all: Array, v: Tall) -> Array:
    return take(w_all, columns_of(count(v), v), -1)
