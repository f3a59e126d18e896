"""Declarative nodes: Sinkhorn's gradient against its forward pass, on every backend."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import numpy as np

import ddnref

from . import _transport
from ._accuracy import extra_arrays
from ._common import BACKENDS, Backend, Call, Ratio, backend, interleaved, load_jax, prepared


def transport(n: int, eps: float = 0.05) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Two clouds of n points in the unit square, squared distances up to 1, equal masses."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(n, 1, 2)), rng.uniform(size=(1, n, 2))
    cost = np.sum((x - y) ** 2, axis=-1)
    return cost / np.max(cost), np.full(n, 1 / n), np.full(n, 1 / n), eps


def solve(*arrays: Any, eps: float, **options: Any) -> Any:
    """`sinkhorn`, on commits before ε was an input too."""
    if _EPS_IS_OPTION:
        return ddnref.nodes.sinkhorn(*arrays, eps=eps, **options)
    return ddnref.nodes.sinkhorn(*arrays, eps, **options)


def pull(plan_bar: Any, plan: Any, *arrays: Any, eps: float, **options: Any) -> Any:
    """`sinkhorn_vjp`, likewise."""
    if _EPS_IS_OPTION:
        return ddnref.nodes.sinkhorn_vjp(plan_bar, plan, eps=eps, **options)
    return ddnref.nodes.sinkhorn_vjp(plan_bar, plan, *arrays, eps, **options)


_EPS_IS_OPTION = inspect.signature(ddnref.nodes.sinkhorn).parameters["eps"].kind is inspect.Parameter.KEYWORD_ONLY


def calls(on: Backend, n: int) -> tuple[Call, Call]:
    """Forward pass to a marginal error of 1e-9 and the VJP at its plan, every check on that the backend allows."""
    *inputs, eps = transport(n)
    arrays = [on.array(a) for a in inputs]
    options: dict[str, Any] = dict(on.options)
    if on.name == "jax":
        options["while_loop"] = load_jax().lax.while_loop
    plan, _ = solve(*arrays, eps=eps, rtol=1e-9)
    plan_bar = on.array(np.random.default_rng(1).standard_normal((n, n)))
    return (
        prepared(on, partial(solve, eps=eps, rtol=1e-9), *arrays, **options),
        prepared(on, partial(pull, eps=eps), plan_bar, plan, *arrays, **on.options),
    )


class Sinkhorn:
    """Time of the forward pass and of the VJP."""

    params = (BACKENDS, (50, 200))
    param_names = ("backend", "n")

    def setup(self, name: str, n: int) -> None:
        self.forward, self.vjp = calls(backend(name), n)
        self.forward()
        self.vjp()

    def time_forward(self, *_: object) -> None:
        self.forward()

    def time_vjp(self, *_: object) -> None:
        self.vjp()


class SinkhornRatio:
    """time(VJP) / time(forward) and the memory of the VJP, at eps 0.05 and a marginal error of 1e-9."""

    params = (50, 200)
    param_names = ("n",)
    unit = "ratio"

    def track_vjp_over_forward(self, n: int) -> float:
        forward, vjp = calls(backend("numpy"), n)
        return interleaved(vjp, forward).median

    def track_extra_arrays(self, n: int) -> float:
        *inputs, eps = transport(n)
        plan, _ = solve(*inputs, eps=eps)
        return extra_arrays(partial(pull, plan, plan, *inputs, eps=eps), plan)

    track_extra_arrays.unit = "n×n arrays"  # type: ignore[attr-defined]
    track_extra_arrays.version = "e14d5c14b7024f452f820e553ff60c061a676987495bda4c9824f2fe431a941b"  # type: ignore[attr-defined]


class SinkhornAgainstTextbook:
    """Time of the forward pass over that of the two textbook loops, all to an error of 1e-9, on one thread of NumPy."""

    params = (("plain", "in_logarithms"), (True, False), (0.05, 0.01))
    param_names = ("textbook", "newton", "eps")
    unit = "ratio"

    def track_time(self, textbook: str, newton: bool, eps: float) -> float:
        return against_textbook(textbook, newton, eps).median


def against_textbook(textbook: str, newton: bool, eps: float, n: int = 200) -> Ratio:
    from threadpoolctl import threadpool_limits

    *arrays, eps = transport(n, eps)
    ours = partial(solve, *arrays, eps=eps, rtol=1e-9, newton=newton)
    with threadpool_limits(1):
        return interleaved(ours, partial(getattr(_transport, textbook), *arrays, eps))
