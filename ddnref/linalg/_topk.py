"""The k largest or smallest eigenpairs of a full decomposition, with a VJP at O(m²k)."""

from __future__ import annotations

import operator

from ddnref._core.arrays import Array, namespace
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.selection import take
from ddnref._kernels.public import public
from ddnref.linalg._eigh import eigh, eigh_vjp


@public
def eigh_topk(x: Array, /, k: int, *, which: str = "LA", check_finite: bool = False) -> tuple[Array, Array]:
    """The k largest or smallest eigenpairs, most wanted first, from a full decomposition.

    Parameters
    ----------
    x : (..., m, m) array, real or complex floating
        Symmetrised as in `eigh`.
    k : int
        How many, ``1 <= k <= m``.
    which : {"LA", "SA"}
        The largest eigenvalues, descending, or the smallest, ascending.
    check_finite : bool, default False
        As in `eigh`.

    Returns
    -------
    w : (..., k) real array
    v : (..., m, k) array

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `eigh`; `k` out of range; unknown `which`.

    See Also
    --------
    eigh_topk_fwd, eigh_topk_vjp

    Examples
    --------
    >>> import numpy as np
    >>> w, v = ddnref.eigh_topk(np.diag(np.asarray([1.0, 4.0, 2.0])), 2)
    >>> w
    array([4., 2.])
    """
    return eigh_topk_fwd(x, k, which=which, check_finite=check_finite)[0]


@public
def eigh_topk_fwd(
    x: Array, /, k: int, *, which: str = "LA", check_finite: bool = False
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """`eigh_topk` and what its reverse pass needs.

    Parameters
    ----------
    x, k, which, check_finite
        As in `eigh_topk`.

    Returns
    -------
    (w, v) : (..., k) and (..., m, k) arrays
        The outputs of `eigh_topk`.
    (w_all, v_all) : (..., m) and (..., m, m) arrays
        The whole decomposition, as from `eigh`.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `eigh_topk`.
    """
    w, v = eigh(x, check_finite=check_finite)
    columns = _top(k, which, w.shape[-1])
    return (take(w, columns, -1), take(v, columns, -1)), (w, v)


@public
def eigh_topk_vjp(
    w_bar: Array | None,
    v_bar: Array | None,
    w: Array,
    v: Array,
    w_all: Array,
    v_all: Array,
    /,
    *,
    which: str = "LA",
    rtol: float | None = None,
    gauge_rtol: float | None = None,
    throw: bool = True,
) -> Array:
    """Gradient of a loss of the top k eigenpairs, at O(m²k).

    Parameters
    ----------
    w_bar : (..., k) real array or None
    v_bar : (..., m, k) array or None
    w, v
        The outputs of `eigh_topk_fwd`, ``(..., k)`` and ``(..., m, k)``.
    w_all, v_all
        What it saved, ``(..., m)`` and ``(..., m, m)``.
    which, rtol, gauge_rtol, throw
        As in `eigh_topk` and `eigh_vjp`. A cluster of equal eigenvalues that the k-th one cuts has no derivative:
        it shows as a gauge-dependent loss.

    Returns
    -------
    x_bar : (..., m, m) array, exactly Hermitian

    Raises
    ------
    GaugeError, TypeError, ValueError
        As `eigh_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> (w, v), saved = ddnref.eigh_topk_fwd(np.diag(np.asarray([1.0, 4.0, 2.0])), 1)
    >>> ddnref.eigh_topk_vjp(np.ones(1), None, w, v, *saved)  # of the largest eigenvalue
    array([[0., 0., 0.],
           [0., 1., 0.],
           [0., 0., 0.]])
    """
    namespace(w_bar=w_bar, v_bar=v_bar, w=w, v=v, w_all=w_all, v_all=v_all)
    if w.ndim < 1 or w_all.ndim < 1:
        raise ValueError(
            f"w has shape {tuple(w.shape)} and w_all {tuple(w_all.shape)}, expected (..., k) and (..., m)."
        )
    k, m = w.shape[-1], w_all.shape[-1]
    check_dtypes(w=(w, w_all.dtype), v=(v, v_all.dtype))
    check_shapes(w=(w, (*w_all.shape[:-1], k)), v=(v, (*w_all.shape, k)))
    return eigh_vjp(w_bar, v_bar, w_all, v_all, index=_top(k, which, m), rtol=rtol, gauge_rtol=gauge_rtol, throw=throw)


def _top(k: int, which: str, m: int) -> range:
    k = operator.index(k)
    if which not in ("LA", "SA"):
        raise ValueError(f'which is {which!r}, expected "LA" (largest) or "SA" (smallest).')
    if not 1 <= k <= m:
        raise ValueError(f"k is {k}, expected 1 <= k <= {m} for a matrix with {m} columns.")
    return range(m - 1, m - 1 - k, -1) if which == "LA" else range(k)
