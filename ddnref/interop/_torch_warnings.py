"""Warnings of the PyTorch bridge of derivatives that are NaN: at once where values can be read, else in the graph."""

from __future__ import annotations

from contextvars import ContextVar
from functools import reduce
from operator import or_
from typing import Any, TypeAlias

import numpy as np
import torch

from ddnref._rules.binding import ITERATE, failed, failed_items, warn, widest

Tensor: TypeAlias = Any

_silent = ContextVar("_silent", default=False)
"""Whether the operator of PyTorch that warns keeps quiet."""


def with_warning(
    results: tuple[Tensor | None, ...], axes: tuple[int | None, ...], message: str, name: str
) -> tuple[Tensor | None, ...]:
    """The derivatives, with a warning if one is NaN: at once where values can be read, else when the graph runs.

    `axes` says how many axes of each are those of one item, and is empty for functions of a user, which may return NaN.
    """
    if not axes:
        return results
    if torch.compiler.is_compiling():
        return _with_warnings_in_graph(results, axes, message, name)
    try:
        found = any_failed(results, axes)
    except RuntimeError:  # under vmap, or while a graph is recorded, no value can be read
        pass
    else:
        if found:
            i = widest(results, axes)
            _warn(failed(results[i], axes[i]), message, name, axes[i])
        return results
    # The values at which a graph is recorded need not mean anything: those of ``torch.func.linearize`` are whatever was
    # in memory.
    token = _silent.set(_is_recorded())
    try:
        return _with_warnings_in_graph(results, axes, message, name)
    finally:
        _silent.reset(token)


def _with_warnings_in_graph(
    results: tuple[Tensor | None, ...], axes: tuple[int | None, ...], message: str, name: str
) -> tuple[Tensor | None, ...]:
    pairs = zip(results, axes, strict=True)
    return tuple(None if x is None else _with_warning_in_graph(x, n, message, name) for x, n in pairs)


def _is_recorded() -> bool:
    """Return whether ``make_fx`` records a graph of what runs."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def any_failed(results: tuple[Tensor | None, ...], axes: tuple[int | None, ...]) -> bool:
    """Return whether a derivative is NaN. One read for all of them: on a GPU, each read would wait for it."""
    pairs = zip(results, axes, strict=True)
    return bool(reduce(or_, (failed(x, n).any() for x, n in pairs if x is not None)))


def _with_warning_in_graph(x: Tensor, axes: int | None, message: str, name: str) -> Tensor:
    """The derivative, computed from the result of the warning, which a compiler would otherwise drop as unused."""
    flags = torch.ops.ddnref.warn(failed(x, axes), message, name, axes)
    # A derivative that something else uses must not be changed in place.
    if torch.is_grad_enabled():
        return torch.where(flags, torch.nan, x)
    # Where the flags are those of one column, it is enough to write that one.
    column = x[..., :1] if x.ndim and axes is not None else x
    column.copy_(torch.where(flags, torch.nan, column))
    return x


def notify(name: str, flags: Tensor) -> None:
    """Warn of the items whose gradient is that of an iterate."""
    flags = torch.as_tensor(flags)  # another library may have computed
    torch.ops.ddnref.warn(flags, ITERATE, name, 0)


def _warn(flags: Tensor, message: str, name: str, axes: int | None) -> None:
    """Warn of items, whose own axes are the last ones of the flags; the others count them."""
    items = failed_items(flags, axes)
    # Flag by flag, because tensors inside a transform give no array.
    read = None if items is None else np.asarray([bool(flag) for flag in items.reshape(-1)]).reshape(items.shape)
    warn(message, name, read)


@torch.library.custom_op(
    "ddnref::warn", mutates_args=(), schema="(Tensor flags, str message, str name, int? axes) -> Tensor"
)
def _warn_if(flags: Tensor, message: str, name: str, axes: int | None) -> Tensor:
    """Warn if a flag is set, when it runs, also inside a compiled graph."""
    if flags.any() and not _silent.get():
        _warn(flags, message, name, axes)
    return flags.clone()


_warn_if.register_fake(lambda flags, message, name, axes: torch.empty_like(flags))  # noqa: ARG005


@_warn_if.register_vmap
def _(info: Any, in_dims: tuple[int, ...], flags: Tensor, message: str, name: str, axes: int | None) -> Any:  # noqa: ARG001
    return torch.ops.ddnref.warn(flags.movedim(in_dims[0], 0), message, name, axes), 0
