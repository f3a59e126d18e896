"""Substitutes for what older versions of PyTorch lack; each one names the version from which it is not needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
COMPILES = VERSION >= (2, 13)
"""Whether ``torch.compile`` traces our functions. It was tried with 2.13: 2.6 and 2.9 raise, or drop a derivative."""


def uncompiled(function: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """``torch.compiler.disable(function, reason=...)``; before 2.8 the error of the compiler cannot give a reason."""
    return torch.compiler.disable(function, **({"reason": reason} if VERSION >= (2, 8) else {}))  # type: ignore[no-any-return]


def infinity_of(dtype: torch.dtype) -> float:
    """Return infinity, or for 2.6, which divides complex numbers by infinity to NaN, a number near the largest one."""
    return float("inf") if VERSION >= (2, 7) else torch.finfo(dtype).max / 16


def for_transform(x: torch.Tensor) -> torch.Tensor:
    """Return an array for a Fourier transform, which before 2.9 fails where ``expand`` repeats memory."""
    return x if VERSION >= (2, 9) else x.clone(memory_format=torch.contiguous_format)


def fp32_precision(backend: str, operation: str) -> str:
    """Return the precision of products of float32, which PyTorch tells for each backend since 2.9."""
    del operation  # products are the only one that older versions know
    if backend == "cuda":
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "bf16" if torch.get_float32_matmul_precision() == "medium" else "ieee"
