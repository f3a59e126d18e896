"""PyTorch: modes that are active, calls in the precision of the tensors, LU factors whose derivatives are right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ddnref._kernels.lu_vjp import packed_lu_jvp, packed_lu_vjp
from ddnref._kernels.torch_versions import COMPILES, fp32_precision

ALONE = 128  # order from which matrices are factored one by one; MKL uses several threads from 151

# PyTorch's own tests for active transforms and for autocast on any device. Without them everything counts as
# transformed, or as inside autocast, which is right but slower.
_transforms_are_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_autocast_is_active = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
# The property ``torch.backends.cuda.matmul.fp32_precision`` is the same, but takes five times as long.
_fp32_precision = getattr(torch._C, "_get_fp32_precision_getter", fp32_precision)
SINGLE = (torch.float32, torch.complex64)


def is_eager() -> bool:
    """Return whether neither a compiler nor a transform of ``torch.func`` is active."""
    return not (torch.compiler.is_compiling() or _transforms_are_active())


def is_transformed_in_graph() -> bool:
    """Return whether ``torch.compile`` traces a transform of ``torch.func`` or forward-mode differentiation.

    There it replaces an ``autograd.Function`` by its forward and drops its derivative (PyTorch issues 193279, 192985).
    """
    return torch.compiler.is_compiling() and (_transforms_are_active() or is_forward())


def is_forward() -> bool:
    """Return whether forward mode is active: ``torch.func.jvp`` or ``torch.autograd.forward_ad``, at any level."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def tangents(function: Callable[..., Any], ctx: Any, *dots: Tensor | None) -> Any:
    """Call ``function(dots, saved)`` in the ``jvp`` of an ``autograd.Function`` so that outer levels differentiate it.

    PyTorch runs `jvp` with forward mode switched off at every level (PyTorch issue 197867), and hands it tensors that
    still carry the tangents of this one. So this level is taken off first, and then the others are switched on.
    """
    saved = tuple(map(primal, ctx.saved_tensors))
    with forward_ad._set_fwd_grad_enabled(True):
        return function(dots, saved)


def primal(x: Tensor) -> Tensor:
    """Return a tensor without its tangent, for which PyTorch has no rule under ``vmap``."""
    internals = torch._C._functorch
    if internals.is_functorch_wrapped_tensor(x) and internals.is_batchedtensor(x):
        inner = primal(internals.get_unwrapped(x))
        return internals._add_batch_dim(inner, internals.maybe_get_bdim(x), internals.maybe_get_level(x))
    return forward_ad.unpack_dual(x).primal


# --- precision ----------------------------------------------------------------------------------------------------


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], in_backward: bool = False) -> Any:
    """Call `function` in the precision of its tensors, whatever ``torch.autocast`` asks for.

    As ``torch.linalg`` does, autocast converts tensors of half precision to float32. The conversion is recorded, so
    that their gradients are in half precision again.
    """
    # A compiler traces a backward pass where autocast is off, and runs it where it may be on.
    suspected = in_backward and torch.compiler.is_compiling()
    if not (suspected or _autocast_is_active()):
        if not torch.compiler.is_compiling():
            _warn_of_low_precision(args)
        return function(*args, **kwargs)
    devices = {x.device.type for x in _tensors((args, tuple(kwargs.values())))}
    enabled = sorted(device for device in devices if suspected or torch.is_autocast_enabled(device))
    args = _in_single_precision(args, enabled)
    kwargs = {name: _in_single_precision(x, enabled) for name, x in kwargs.items()}
    return _without_autocast(enabled, function, args, kwargs)


if not COMPILES:
    call = torch.compiler.disable(call)


def _without_autocast(
    devices: list[str], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if not devices:
        return function(*args, **kwargs)
    with torch.autocast(devices[0], enabled=False):
        return _without_autocast(devices[1:], function, args, kwargs)


def _in_single_precision(value: Any, devices: list[str]) -> Any:
    """Convert tensors of half precision on these devices to float32, also inside tuples, operators and lists."""
    if isinstance(value, Tensor):
        is_half = value.dtype in (torch.bfloat16, torch.float16) and value.device.type in devices
        return value.float() if is_half else value
    if isinstance(value, (tuple, list)):
        items = [_in_single_precision(x, devices) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors among arguments, also those inside tuples, operators, lists and chains."""
    if isinstance(value, Tensor):
        yield value
    value = getattr(value, "params", value)
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


_warned = False


def _warn_of_low_precision(args: tuple[Any, ...]) -> None:
    """Warn once where PyTorch has been told to multiply single precision in TensorFloat-32 or bfloat16.

    The setting is global and not safe to change for the time of a call, because other threads see the change.
    """
    global _warned
    if _warned:
        return
    for x in args:
        if isinstance(x, Tensor):
            break
    else:
        return
    if x.dtype not in SINGLE:
        return
    precision = _fp32_precision("cuda" if x.is_cuda else "mkldnn", "matmul")
    if precision in ("tf32", "bf16"):
        _warned = True
        warnings.warn(
            f"PyTorch multiplies float32 matrices in {precision} on {x.device.type}, which has 3 digits: results "
            'of ddnref in float32 will not be right to more. Call torch.set_float32_matmul_precision("highest"), or '
            "pass float64 tensors. This warning is given once.",
            RuntimeWarning,
            stacklevel=5,
        )


# --- LU factors ---------------------------------------------------------------------------------------------------


def lu_factor(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Call ``torch.linalg.lu_factor_ex``, for large matrices on the CPU once per matrix.

    PyTorch factors several matrices at once on its own threads. Where MKL uses threads for each of them too, the call
    does not return, or the factors are wrong (PyTorch 2.13, five matrices of order 160, two threads or more; PyTorch
    issues 141358 and 142815).
    """
    if not (_several_large(a) or is_forward()):
        return torch.linalg.lu_factor_ex(a)  # type: ignore[no-any-return]
    return (_FactorForward if is_forward() else _Factor).apply(a)  # type: ignore[no-any-return]


def lu_solve(lu: Tensor, pivots: Tensor, b: Tensor, adjoint: bool) -> Tensor:
    """Call ``torch.linalg.lu_solve``, under ``torch.func`` and in forward mode by a function of our own.

    That function is wrong where the factors have a batch axis of length one that `b` has not (PyTorch 2.13, on the
    CPU), and two nested ``torch.func.vmap`` bring about just that. Its derivatives are wrong where forward mode is
    nested in another one.
    """
    if _transforms_are_active() or is_forward():
        if torch.compiler.is_compiling():
            # A compiler drops the vmap of `_Solve`, but zeros have the axes that it hides.
            zeros = torch.zeros_like(lu[..., :1]) + torch.zeros_like(b[..., :1])
            lu, b = lu + zeros, b + zeros
            pivots = pivots + zeros[..., 0].to(pivots.dtype)
            return torch.linalg.lu_solve(lu, pivots, b, adjoint=adjoint)
        return (_SolveForward if is_forward() else _Solve).apply(lu, pivots, b, adjoint)
    return _lu_solve(lu, pivots, b, adjoint)


def _lu_solve(lu: Tensor, pivots: Tensor, b: Tensor, adjoint: bool) -> Tensor:
    """Call ``torch.linalg.lu_solve`` with one batch axis.

    With several it walks through the factors by the stride of the last one alone (PyTorch 2.13, on the CPU). Where that
    axis has length one its stride means nothing, and the results are those of other items.
    """
    if lu.ndim <= 3:
        return torch.linalg.lu_solve(lu, pivots, b, adjoint=adjoint)
    n, k = b.shape[-2:]
    x = torch.linalg.lu_solve(lu.reshape(-1, n, n), pivots.reshape(-1, n), b.reshape(-1, n, k), adjoint=adjoint)
    return x.reshape(b.shape)


def solve(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Call ``torch.linalg.solve_ex``; by `lu_factor` and `lu_solve` where PyTorch's solve could hang or err."""
    if not (_several_large(a) or _transforms_are_active() or is_forward()):
        return torch.linalg.solve_ex(a, b)  # type: ignore[no-any-return]
    lu, pivots, info = lu_factor(a)
    return lu_solve(lu, pivots, b, False), info


def _several_large(a: Tensor) -> bool:
    several = a.ndim > 2 or not is_eager()  # `torch.func.vmap` hides a batch axis
    return several and a.shape[-1] >= ALONE and a.device.type == "cpu"


class _Solve(torch.autograd.Function):
    """``A⁻¹ B`` or ``A⁻ᴴ B`` with ``P A = L U``, whose ``vmap`` gives all arguments the mapped axis.

    With ``X = A⁻¹ B``, ``T = U⁻ᴴ X̄`` and ``S = L⁻ᴴ T``:

        B̄ = A⁻ᴴ X̄,   Ū = −triu(T Xᴴ),   L̄ = −tril(S (U X)ᴴ, −1).

    For ``X = A⁻ᴴ B`` the same holds with B in place of X̄ and ``B̄ = A⁻¹ X̄`` in place of X.
    """

    @staticmethod
    def forward(lu: Tensor, pivots: Tensor, b: Tensor, adjoint: bool) -> Tensor:
        return _lu_solve(lu, pivots, b, adjoint)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        lu, pivots, b, ctx.adjoint = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(lu, pivots, b, output)

    @staticmethod
    def backward(ctx: Any, x_bar: Tensor | None) -> tuple[Tensor | None, None, Tensor | None, None]:
        if x_bar is None:
            return None, None, None, None
        lu, pivots, b, x = ctx.saved_tensors
        b_bar = lu_solve(lu, pivots, x_bar, not ctx.adjoint)
        if not ctx.needs_input_grad[0]:
            return None, None, b_bar, None
        left, right = (b, b_bar) if ctx.adjoint else (x_bar, x)
        t = torch.linalg.solve_triangular(lu.mH, left, upper=False)  # only the triangle of Uᴴ is read
        s = torch.linalg.solve_triangular(lu.mH, t, upper=True, unitriangular=True)
        lu_bar = torch.tril(s @ (torch.triu(lu) @ right).mH, -1) + torch.triu(t @ right.mH)
        return -lu_bar, None, b_bar, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], lu: Tensor, pivots: Tensor, b: Tensor, adjoint: bool
    ) -> tuple[Tensor, int]:
        lu, pivots, b = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((lu, pivots, b), in_dims, strict=False)
        )
        return lu_solve(lu, pivots, b, adjoint), 0


class _SolveForward(_Solve):
    """The solution in forward mode, a separate class because ``torch.compile`` refuses one with a `jvp`.

    Its tangent is ``Ẋ = A⁻¹ Ḃ − U⁻¹ (L⁻¹ L̇ U X + U̇ X)``, or ``Ẋ = A⁻ᴴ (Ḃ − U̇ᴴ T − Uᴴ L̇ᴴ L⁻ᴴ T)`` with ``T = U⁻ᴴ B``.
    """

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Solve.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3], output)

    @staticmethod
    def jvp(ctx: Any, lu_dot: Tensor | None, _: None, b_dot: Tensor | None, __: None) -> Tensor:
        return tangents(_solve_jvp_adjoint if ctx.adjoint else _solve_jvp, ctx, lu_dot, b_dot)


def _solve_jvp(dots: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]) -> Tensor:
    (lu_dot, b_dot), (lu, pivots, _, x) = dots, saved
    x_dot = None if b_dot is None else lu_solve(lu, pivots, b_dot, False)
    if lu_dot is None:
        return x_dot
    moved = torch.tril(lu_dot, -1) @ (torch.triu(lu) @ x)
    moved = torch.linalg.solve_triangular(lu, moved, upper=False, unitriangular=True) + torch.triu(lu_dot) @ x
    through_factors = torch.linalg.solve_triangular(lu, moved, upper=True)
    return -through_factors if x_dot is None else x_dot - through_factors


def _solve_jvp_adjoint(dots: tuple[Tensor | None, ...], saved: tuple[Tensor, ...]) -> Tensor:
    (lu_dot, right), (lu, pivots, b, _) = dots, saved
    if lu_dot is not None:
        t = torch.linalg.solve_triangular(lu.mH, b, upper=False)
        s = torch.linalg.solve_triangular(lu.mH, t, upper=True, unitriangular=True)
        moved = torch.triu(lu_dot).mH @ t + torch.triu(lu).mH @ (torch.tril(lu_dot, -1).mH @ s)
        right = -moved if right is None else right - moved
    return lu_solve(lu, pivots, right, True)


class _Factor(torch.autograd.Function):
    """Packed factors stored by columns, pivots counted from 1, and the first zero pivot; large ones one by one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        factor = torch.ops.ddnref.lu_factor if _several_large(a) else torch.linalg.lu_factor_ex
        return tuple(factor(a))

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
            lambda b: lu_solve(lu, pivots, b, True),
        )


class _FactorForward(_Factor):
    """The factors in forward mode."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _Factor.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*output[:2])

    @staticmethod
    def jvp(ctx: Any, a_dot: Tensor) -> tuple[Tensor, None, None]:
        def moved(dots: tuple[Tensor], saved: tuple[Tensor, Tensor]) -> Tensor:
            lu, pivots = saved
            lower = torch.tril(lu, -1) + torch.eye(lu.shape[-1], dtype=lu.dtype, device=lu.device)
            return packed_lu_jvp(
                dots[0],
                lower,
                torch.triu(lu),
                lambda l_, b: torch.linalg.solve_triangular(l_, b, upper=False),
                lambda b: lu_solve(lu, pivots, b, False),
            )

        return tangents(moved, ctx, a_dot), None, None


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
