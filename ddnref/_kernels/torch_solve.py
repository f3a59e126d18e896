"""`solve` and its VJP on plain CPU tensors in few calls, for systems that need no closer look.

On small matrices a call takes longer than its arithmetic. So the usual case goes straight to LAPACK: finite numbers,
rows in one unit, certainly regular matrices. A single matrix goes to SciPy, whose calls cost the least, and a batch to
PyTorch, which factors all of it in one call. In all other cases these functions return ``None``, and the general form
decides.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ddnref._kernels.lu import factor_one, in_one_unit, lapack_functions, probe_and_limit
from ddnref._kernels.torch import ALONE

Solved: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Solutions, packed factors, and pivots from 0."""
DTYPES = {getattr(torch, name): getattr(np, name) for name in ("float32", "float64", "complex64", "complex128")}
"""The dtypes of LAPACK."""


def solve(a: Tensor, b: Tensor) -> Solved | None:
    """Solve for one right-hand side per matrix."""
    shape, dtype = a.shape, DTYPES.get(a.dtype)
    if dtype is None or a.dtype != b.dtype or len(shape) < 2 or shape[-1] != shape[-2] or shape[:-1] != b.shape:
        return None
    if a.is_conj() or a.is_neg() or b.is_conj() or b.is_neg() or not a.numel():
        return None
    if math.prod(shape[:-2]) == 1:
        return _solve_one(a, b)
    return _solve_batch(a, b, dtype) if len(shape) == 3 and shape[-1] <= ALONE else None  # see `torch.lu_factor`


def solve_vjp(bars: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]) -> tuple[Tensor, Tensor] | None:
    """Return the cotangents of the matrices and the right-hand sides from that of the solution.

    `saved` begins with what `solve` returned, and `bars` has a cotangent or ``None`` for each.
    """
    x_bar, *others = bars
    x, lu, pivots = saved[:3]
    if x_bar is None or any(bar is not None for bar in others):
        return None
    if x_bar.dtype != x.dtype or x_bar.is_conj() or x_bar.is_neg():
        return None
    if math.prod(x.shape[:-1]) == 1:
        return _solve_one_vjp(x_bar, x, lu, pivots)
    y = torch.linalg.lu_solve(lu, pivots + 1, x_bar[..., None], adjoint=True)
    if not math.isfinite(abs(y.sum().item())):
        return None
    return -y * x.conj()[..., None, :], y[..., 0]


def _solve_one(a: Tensor, b: Tensor) -> Solved | None:
    n = a.shape[-1]
    matrix = a.detach().numpy().reshape(n, n)
    rows = np.vecdot(matrix, matrix).real  # squared lengths
    if not in_one_unit(rows.min(), rows.max(), matrix.dtype):
        return None
    lu, pivots, regular = factor_one(matrix, rows.sum())
    if not regular:
        return None
    _, getrs, length = lapack_functions(matrix.dtype)
    x = getrs(lu, pivots, b.detach().numpy().reshape(n))[0]
    if not math.isfinite(length(x)):
        return None
    # NumPy gives the shapes: autograd would take a view of PyTorch's for another tensor than the output.
    factors = lu.T.reshape(a.shape).mT
    return torch.from_numpy(x.reshape(b.shape)), torch.from_numpy(factors), torch.from_numpy(pivots.reshape(b.shape))


def _solve_one_vjp(x_bar: Tensor, x: Tensor, lu: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor] | None:
    n = x.shape[-1]
    _, getrs, length = lapack_functions((factors := lu.mT.numpy().reshape(n, n).T).dtype)
    y = getrs(factors, pivots.numpy().reshape(n), x_bar.detach().numpy().reshape(n), trans=2)[0]
    if not math.isfinite(length(y)):
        return None
    a_bar = np.outer(-y, x.numpy().conj())
    return torch.from_numpy(a_bar.reshape(lu.shape)), torch.from_numpy(y.reshape(x.shape))


def _solve_batch(a: Tensor, b: Tensor, dtype: Any) -> Solved | None:
    rows = torch.linalg.vecdot(a, a).real
    low, high = torch.aminmax(rows)
    if not in_one_unit(low.item(), high.item(), dtype):
        return None
    lu, pivots, _ = torch.linalg.lu_factor_ex(a)
    # The criterion of `lu._factor_and_screen`.
    start, limit = _start(a.dtype, a.shape[-1])
    probe = torch.linalg.lu_solve(lu, pivots, start.expand_as(b)[..., None])
    back = torch.linalg.lu_solve(lu, pivots, probe, adjoint=True)
    before, after = _square(probe[..., 0]), _square(back[..., 0])
    growth = after / before
    if not (growth * rows.sum(-1)).max().item() < limit:
        product = a @ start
        growth = 4 * growth * _square((a.mH @ product[..., None])[..., 0]) / _square(product)
        if not growth.max().item() < limit:
            return None
    exact = min(before.min().item(), after.min().item()) > np.finfo(dtype).tiny
    x = torch.linalg.lu_solve(lu, pivots, b[..., None])[..., 0].clone()  # no view, as in `_solve_one`
    if not (exact and math.isfinite(abs(x.sum().item()))):
        return None
    return x, lu, pivots - 1


def _square(x: Tensor) -> Tensor:
    """Return the squared lengths of vectors."""
    return torch.linalg.vecdot(x, x).real


@lru_cache(maxsize=64)
def _start(dtype: torch.dtype, n: int) -> tuple[Tensor, float]:
    """Return what `probe_and_limit` does, with a tensor."""
    probe, limit = probe_and_limit(np.dtype(DTYPES[dtype]), n)
    return torch.tensor(probe), limit
