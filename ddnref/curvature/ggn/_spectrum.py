"""Eigenpairs of one Gram matrix: all values, or the k largest pairs by the fastest method."""

from __future__ import annotations

from ddnref._core.arrays import Array, is_true
from ddnref._core.selection import take
from ddnref._kernels import dense as _linalg
from ddnref.curvature._gram import not_negative
from ddnref.linalg._eigsh import eigsh

METHODS = ("auto", "full", "iterative")
FULL_UP_TO = 512  # order up to which the full decomposition is as fast
SHARE = 32  # Lanczos pays where at most one eigenpair in 32 is wanted
SPARE = 3  # and fewer than a third of the rank, which bounds the Krylov space
MAXITER = 20  # restart cycles before the full decomposition; measured cases took one to three


def values(gram: Array, count: int) -> Array:
    """Return the largest `count` eigenvalues, descending and never negative."""
    w = not_negative(_linalg.eigvalsh(gram))
    return take(w, range(gram.shape[-1] - 1, gram.shape[-1] - 1 - count, -1), -1)


def pairs(gram: Array, k: int, method: str, count: int) -> tuple[Array, Array]:
    """Return the k largest of at most `count` non-zero eigenvalues, descending, and their eigenvectors.

    "auto" uses Lanczos for large matrices and few pairs, and LAPACK where it does not converge early; the page on
    tuning has the measurements.
    """
    n = gram.shape[-1]
    if method == "iterative":
        w, u = eigsh(gram, k, method="iterative")[0]
        return not_negative(w), u
    if method == "auto" and n > FULL_UP_TO and k * SHARE <= n and k * SPARE <= count:
        (w, u), info = eigsh(gram, k, method="iterative", maxiter=MAXITER, throw=False)
        if is_true(info.converged & ~info.cut):
            return not_negative(w), u
    w, u = _linalg.eigh_largest(gram, k)
    return not_negative(w), u
