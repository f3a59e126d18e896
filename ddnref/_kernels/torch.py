"""What PyTorch's kernels for the CPU cannot be trusted with, done another way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ALONE = 128  # order of a matrix; MKL factors by several threads from 151

# PyTorch's own test of what `autograd.Function.apply` has to do; should it ever go, so do the shorter ways.
_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)


def is_eager() -> bool:
    """Whether neither a compiler nor a transform of ``torch.func`` is at work."""
    return not (torch.compiler.is_compiling() or _transforms_are_active())


def lu_factor(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``torch.linalg.lu_factor_ex``, on the CPU one matrix after the other once they are large.

    PyTorch factors several matrices at once, on threads of its own. Where MKL takes threads for each of them too, the
    call does not return, or the factors are wrong (PyTorch 2.13, five matrices of order 160, two threads or more; its
    issues 141358 and 142815).
    """
    if not _several_large(a):
        return torch.linalg.lu_factor_ex(a)  # type: ignore[no-any-return]
    return _Factor.apply(a)  # type: ignore[no-any-return]


def solve(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.solve_ex``, likewise."""
    if not _several_large(a):
        return torch.linalg.solve_ex(a, b)  # type: ignore[no-any-return]
    lu, pivots, info = _Factor.apply(a)
    return torch.linalg.lu_solve(lu, pivots, b), info


def _several_large(a: Tensor) -> bool:
    several = a.ndim > 2 or not is_eager()  # `torch.func.vmap` hides an axis
    return several and a.shape[-1] >= ALONE and a.device.type == "cpu"


class _Factor(torch.autograd.Function):
    """Packed factors stored by columns, as LAPACK has them, pivots counted from 1, and the first one that is zero."""

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
        from ddnref._kernels.lu import lu_factor_vjp

        lu, pivots = ctx.saved_tensors
        return lu_factor_vjp(lu_bar, lu, pivots - 1)


# One operation for `torch.func.vmap`, which hides an axis of the batch from a loop in Python, and for `torch.compile`,
# which would unroll one.
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
