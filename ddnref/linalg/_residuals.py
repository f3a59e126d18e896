"""Residuals of eigenpairs from any solver, and a choice of their signs."""

from __future__ import annotations

from ddnref._core.arrays import Array, Namespace, full, namespace, nan_where
from ddnref._core.checks import check_dtypes, check_precision, check_real, check_shapes, check_square
from ddnref._kernels.public import public
from ddnref._kernels.vectors import safe_norm

SIGNS = ("positive", "negative")


@public
def align_signs(v: Array, reference: Array | None = None, /, *, sign: str = "positive", axis: int = -2) -> Array:
    """Flip eigenvectors so that their inner product with a reference has a given sign.

    Parameters
    ----------
    v : array of real vectors, ``(..., m, n)`` in columns (``axis=-2``) or ``(..., m)`` (``axis=-1``)
    reference : array, optional
        One vector ``(m,)`` for all, or one for each in an array that broadcasts against `v`. Default
        ``(1, 0, …, 0)``, by which the sign is that of the first component.
    sign : {"positive", "negative"}
    axis : {-2, -1}
        Along which axis the vectors lie.

    Returns
    -------
    v : array of the same shape
        A vector that is orthogonal to its reference is left as it is.

    Raises
    ------
    ValueError
        Unknown `sign` or `axis`; a reference that does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.align_signs(np.asarray([[-0.6, 0.8], [0.8, 0.6]])).tolist()
    [[0.6, 0.8], [-0.8, 0.6]]
    """
    xp = namespace(v=v, reference=reference)
    check_real(v=v, reference=reference)
    check_dtypes(reference=(reference, v.dtype))
    if sign not in SIGNS or axis not in (-1, -2):
        raise ValueError(f'sign is {sign!r} and axis {axis!r}, expected "positive" or "negative" and -2 or -1.')
    if reference is None:
        inner = v[..., :1, :] if axis == -2 else v[..., :1]  # the product with (1, 0, …, 0)
    else:
        if reference.ndim < 1:
            raise ValueError("reference has shape (), expected a vector (m,) or one for each of v.")
        along = reference[:, None] if axis == -2 and reference.ndim == 1 else reference  # one vector for all columns
        if along.ndim > v.ndim or any(a not in (1, b) for a, b in zip(along.shape[::-1], v.shape[::-1], strict=False)):
            raise ValueError(f"reference has shape {tuple(reference.shape)}, which does not fit v: {tuple(v.shape)}.")
        inner = xp.sum(along * v, axis=axis, keepdims=True)
    # A NaN in the product must not look like a vector whose sign is right.
    return xp.where(inner < 0 if sign == "positive" else inner > 0, -v, nan_where(xp.isnan(inner), v))


@public
def eigen_residual(x: Array, w: Array, v: Array, /) -> Array:
    """``‖X v − λ v‖`` of each eigenpair, the "eigen gap" of the declarative-network papers.

    Parameters
    ----------
    x : (..., m, m) array
    w : (...) or (..., n) array
    v : (..., m) array, or (..., m, n) array of columns

    Returns
    -------
    residual : (...) or (..., n) real array
        Absolute: divide by ``|w|`` or ``‖X‖`` to compare matrices of different size.

    Raises
    ------
    TypeError, ValueError
        Mixed libraries, devices or dtypes; shapes that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> float(ddnref.eigen_residual(2 * np.eye(2), np.asarray(2.0), np.asarray([1.0, 0.0])))
    0.0
    """
    _, y, z, w = _rows_and_images(x, w, v)
    residual = safe_norm(z - w * y)
    return residual[..., 0] if v.ndim < x.ndim else residual


@public
def fixed_point_residual(x: Array, w: Array, v: Array, /) -> Array:
    """Distance of each eigenvector from a fixed point of power iteration, ``‖v − sign(λ) X v / ‖X v‖‖``.

    Parameters, errors and the shape of the result are those of `eigen_residual`. The result is NaN where ``X v = 0``.

    Examples
    --------
    >>> import numpy as np
    >>> float(ddnref.fixed_point_residual(-2 * np.eye(2), np.asarray(-2.0), np.asarray([1.0, 0.0])))
    0.0
    """
    xp, y, z, w = _rows_and_images(x, w, v)
    size = safe_norm(z)[..., None]
    size = xp.where(w < 0, -size, nan_where(xp.isnan(w), size))  # the sign of the eigenvalue, NaN if that is NaN
    residual = safe_norm(y - z / xp.where(size == 0, full((), float("nan"), size), size))
    return residual[..., 0] if v.ndim < x.ndim else residual


def _rows_and_images(x: Array, w: Array, v: Array) -> tuple[Namespace, Array, Array, Array]:
    """The vectors as rows, X times each of them, and the eigenvalues as a column for each matrix."""
    xp = namespace(x=x, w=w, v=v)
    check_precision(xp, x=x, w=w, v=v)  # not one dtype: eigenvalues of a Hermitian matrix are real
    check_square("x", x)
    n = v.shape[-1:] if v.ndim == x.ndim else ()
    check_shapes(v=(v, (*x.shape[:-1], *n)), w=(w, (*x.shape[:-2], *n)))
    y = v if n else v[..., None]  # one vector is a matrix of one column
    rows, images = (xp.matrix_transpose(columns) for columns in (y, x @ y))
    return xp, rows, images, w[..., :, None] if n else w[..., None, None]
