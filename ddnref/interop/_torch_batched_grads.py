"""Many cotangents at once: ``is_grads_batched=True`` of PyTorch's gradient, ``vectorize=True`` of its Jacobian.

They map a backward pass by a ``vmap`` older than that of ``torch.func``, which has no rules for most functions. So
cotangents leave it, and the pass is mapped by ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = Any

_is_mapped = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda x: False)  # noqa: ARG005


def are_mapped(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether the older ``vmap`` hides an axis of one of these tensors."""
    return any(x is not None and _is_mapped(x) for x in tensors)


def map_backward(backward: Callable[..., tuple[Tensor | None, ...]], bars: Sequence[Tensor | None]) -> Any:
    """Call ``backward(*bars)`` for each of the hidden cotangents."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = tuple(0 if are_mapped((bar,)) else None for bar in bars)
    open_bars = tuple(
        bar if dim is None else torch._remove_batch_dim(bar, level, 1, 0) for bar, dim in zip(bars, dims, strict=True)
    )
    missing: list[bool] = []

    def found(*bars: Tensor) -> tuple[Tensor, ...]:
        gradients = backward(*bars)
        missing[:] = (gradient is None for gradient in gradients)
        return tuple(gradient for gradient in gradients if gradient is not None)

    present = iter(torch.func.vmap(found, in_dims=dims)(*open_bars))
    return tuple(None if none else torch._add_batch_dim(next(present), 0, level) for none in missing)
