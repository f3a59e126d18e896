"""Substitutes for what older versions of JAX lack."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax

typeof = getattr(jax, "typeof", None) or jax.core.get_aval  # JAX 0.5 has only the second
"""Shape and dtype of an array or a traced value, as JAX knows them."""


@cache
def batching_keeps_effects() -> bool:
    """Return whether a callback survives in a function with ``custom_vmap``; JAX 0.5 to 0.7 drop it under ``jit``."""

    @jax.custom_batching.custom_vmap
    def report(x: Any) -> Any:
        jax.debug.callback(lambda: None)
        return x

    @report.def_vmap
    def _(size: int, batched: Any, x: Any) -> Any:  # noqa: ARG001
        return report(x), batched[0]

    return bool(jax.make_jaxpr(report)(0.0).effects)
