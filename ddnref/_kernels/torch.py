"""LU factors on PyTorch, which avoid the batched CPU kernels that can hang or return wrong numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddnref._kernels.lu_vjp import packed_lu_vjp

ALONE = 128  # order from which matrices are factored one by one; MKL uses several threads from 151

# PyTorch's own test for active transforms. Without it, everything counts as transformed, which is right but slower.
_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def is_eager() -> bool:
    """Return whether neither a compiler nor a transform of ``torch.func`` is active."""
    return not (torch.compiler.is_compiling() or _transforms_are_active())


def lu_factor(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``torch.linalg.lu_factor_ex``, for large matrices on the CPU once per matrix.

    PyTorch factors several matrices at once on its own threads. Where MKL uses threads for each of them too, the call
    does not return, or the factors are wrong (PyTorch 2.13, five matrices of order 160, two threads or more; PyTorch
    issues 141358 and 142815).
    """
    if not _several_large(a):
        return torch.linalg.lu_factor_ex(a)  # type: ignore[no-any-return]
    return _Factor.apply(a)  # type: ignore[no-any-return]


def solve(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Call ``torch.linalg.solve_ex``, for large matrices on the CPU with factors computed one by one."""
    if not _several_large(a):
        return torch.linalg.solve_ex(a, b)  # type: ignore[no-any-return]
    lu, pivots, info = _Factor.apply(a)
    return torch.linalg.lu_solve(lu, pivots, b), info


def _several_large(a: Tensor) -> bool:
    several = a.ndim > 2 or not is_eager()  # `torch.func.vmap` hides a batch axis
    return several and a.shape[-1] >= ALONE and a.device.type == "cpu"


class _Factor(torch.autograd.Function):
    """Factor one by one: packed factors stored by columns, pivots counted from 1, and the first zero pivot."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ddnref.lu_factor(a)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:  # noqa: ARG004
        ctx.save_for_backward(*output[:2])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, lu_bar: Tensor, *_: object) -> Tensor:
        lu, pivots = ctx.saved_tensors
        lower = torch.tril(lu, -1) + torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
        return packed_lu_vjp(
            lu_bar,
            lower,
            torch.triu(lu),
            lambda u, b: torch.linalg.solve_triangular(u, b, upper=True),
            lambda b: torch.linalg.lu_solve(lu, pivots, b, adjoint=True),
        )


# A custom operation, because `torch.func.vmap` hides a batch axis from a loop in Python, and `torch.compile` would
# unroll the loop.
torch.library.define("ddnref::lu_factor", "(Tensor a) -> (Tensor lu, Tensor pivots, Tensor info)")


@torch.library.impl("ddnref::lu_factor", "CPU")
def _one_by_one(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lu, pivots, info = _empty(a)
    n = a.shape[-1]
    flat = lu.mT.view(-1, n, n).mT, pivots.view(-1, n), info.view(-1)
    for item, *out in zip(a.reshape(-1, n, n), *flat, strict=True):
        torch.linalg.lu_factor_ex(item, out=out)
    return lu, pivots, info


@torch.library.register_fake("ddnref::lu_factor")
def _empty(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lu = torch.empty(a.shape, dtype=a.dtype, device=a.device).mT
    pivots = torch.empty(a.shape[:-1], dtype=torch.int32, device=a.device)
    return lu, pivots, torch.empty(a.shape[:-2], dtype=torch.int32, device=a.device)


@torch.library.register_vmap("ddnref::lu_factor")
def _(info: Any, in_dims: tuple[int], a: Tensor) -> tuple[tuple[Tensor, ...], int]:  # noqa: ARG001
    return torch.ops.ddnref.lu_factor(a.movedim(in_dims[0], 0)), 0
