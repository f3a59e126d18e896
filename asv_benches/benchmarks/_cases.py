"""Calls that are measured against each other: ours, the stated limit, the peers, the ladder.

Each function builds its problem in the library's own arrays, runs the forward pass, and returns a call without
arguments that computes the backward pass and nothing else. `k` asks for the k largest eigenpairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ddnref
from ddnref import reference

from . import _ggn_cases, _module_cases, _polar_cases
from ._common import Call, load, load_jax, problem


def ours(batch: int, m: int, dtype: str, k: int = 0) -> Call:
    """``ddnref.eigh_vjp`` on NumPy arrays as a user calls it: all checks on, the gauge check included."""
    p = problem(batch, m, dtype)
    if not k:
        return partial(ddnref.eigh_vjp, p.w_bar, p.v_bar, p.w, p.v)
    outputs, saved = ddnref.eigh_topk_fwd(p.x, k)
    return partial(ddnref.eigh_topk_vjp, p.w_bar[..., :k], p.v_bar[..., :k].copy(), *outputs, *saved)


def products(batch: int, m: int, dtype: str, count: int = 3) -> Call:
    """The stated limit: that many NumPy products of the same matrices."""
    p = problem(batch, m, dtype)

    def call() -> None:
        for _ in range(count):
            p.v @ p.v_bar

    return call


def torch_eigh(batch: int, m: int, dtype: str, k: int = 0) -> Call:
    """``torch.linalg.eigh`` backward through a graph that is kept; with `k` through a slice of the outputs.

    PyTorch is not asked to symmetrise the gradient, which ours always does.
    """
    torch = load("torch")
    p = problem(batch, m, dtype)
    x = torch.from_numpy(p.x.copy()).requires_grad_()
    w, v = torch.linalg.eigh(x)
    columns = slice(-k, None) if k else slice(None)
    bars = tuple(torch.from_numpy(a[..., columns].copy()) for a in (p.w_bar, p.v_bar))
    outputs = (w[..., columns], v[..., columns]) if k else (w, v)
    return partial(torch.autograd.grad, outputs, x, bars, retain_graph=True)


def jax_eigh(batch: int, m: int, dtype: str, k: int = 0) -> Call:
    """The VJP of ``jax.numpy.linalg.eigh`` under jit, what the forward pass can prepare prepared."""
    jax = load_jax()
    p = problem(batch, m, dtype)
    columns = slice(-k, None) if k else slice(None)

    def forward(x: Any) -> tuple[Any, Any]:
        w, v = jax.numpy.linalg.eigh(x)
        return w[..., columns], v[..., columns]

    _, vjp = jax.vjp(forward, jax.numpy.asarray(p.x))
    bars = tuple(jax.numpy.asarray(a[..., columns]) for a in (p.w_bar, p.v_bar))
    compiled = jax.jit(lambda pull, bars: pull(bars))
    return lambda: jax.block_until_ready(compiled(vjp, bars))


def autograd_eigh(batch: int, m: int, dtype: str, k: int = 0) -> Call:
    """The VJP of HIPS autograd; like the others, of the whole decomposition or of a slice of it."""
    load("autograd")
    import autograd.numpy as anp
    from autograd import make_vjp

    p = problem(batch, m, dtype)
    columns = slice(-k, None) if k else slice(None)

    def forward(x: Any) -> Any:
        pair = anp.linalg.eigh(x)
        return anp.concatenate([pair[0][..., None, columns], pair[1][..., columns]], axis=-2) if k else pair

    vjp, _ = make_vjp(forward)(p.x)
    bars: Any = (p.w_bar, p.v_bar)
    if k:
        bars = anp.concatenate([p.w_bar[..., None, columns], p.v_bar[..., columns]], axis=-2)
    return lambda: vjp(bars)


def rung(batch: int, m: int, dtype: str, name: str) -> Call:
    """A rung of the tutorial's ladder on NumPy arrays: the cotangent of the eigenvectors alone, as there."""
    p = problem(batch, m, dtype)
    calls: dict[str, Call] = {
        "v1": partial(reference.eigh_vjp_v1, p.v_bar, p.x, p.w, p.v),
        "v2": partial(reference.eigh_vjp_v2, p.v_bar, p.w, p.v),
        "v3": partial(reference.eigh_vjp_v3, p.v_bar, p.w, p.v),
        "final": partial(ddnref.eigh_vjp, None, p.v_bar, p.w, p.v),
    }
    return calls[name]


PEERS: dict[str, Callable[..., Call]] = {"torch": torch_eigh, "jax": jax_eigh, "autograd": autograd_eigh}
GGN: dict[str, Callable[..., Call]] = {
    "ggn": _ggn_cases.ours,
    "vivit": _ggn_cases.vivit,
    "curvlinops": _ggn_cases.curvlinops,
    "module": _module_cases.ours,
    "module_chain": _module_cases.chain,
    "module_curvlinops": _module_cases.curvlinops,
}
POLAR: dict[str, Callable[..., Call]] = {
    name: getattr(_polar_cases, name) for name in ("polar_both", "polar_torch", "lstsq_both", "lstsq_torch")
}
CASES: dict[str, Callable[..., Call]] = {"ours": ours, "products": products, "rung": rung, **PEERS, **GGN, **POLAR}
