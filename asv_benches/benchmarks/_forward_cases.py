"""Derivatives along a direction and second derivatives, each beside the VJP of the same problem, and two peers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

import ddnref
from ddnref._rules import table as _rules
from ddnref.verify._backends import backend as arrays_of
from ddnref.verify._problem import Case, pose

from ._common import Call, backend, load, load_jax, prepared, problem

RULES = tuple(name for name, rule in _rules.RULES.items() if rule.jvp)
FUNCTIONS = tuple(name for name, rule in _rules.RULES.items() if rule.second)
PEERS = ("torch", "jax")


def pair(name: str, size: tuple[int, int], dtype: str) -> tuple[Call, Call]:
    """JVP and VJP of a rule on NumPy arrays, of the problem that ``ddnref verify`` poses, without reads on the host."""
    with arrays_of("numpy") as numpy:
        p = pose(numpy, Case(_rules.RULES[name], dtype, size[1], size[:1]), seed=0)
    return lambda: p.push(p.dots), lambda: p.pull(p.bars)


def second_pair(name: str, size: tuple[int, int], dtype: str) -> tuple[Call, Call]:
    """Second derivative and VJP of a function of a matrix."""
    p, m = problem(*size, dtype), size[1]
    scalars = {"f": np.exp, "df": np.exp, "d2f": np.exp} if name == "spectral_function" else {}
    forward, vjp, second = (
        partial(getattr(ddnref, f"{name}_{end}"), **{key: scalars[key] for key in ("f", "df", "d2f")[:n] if scalars})
        for n, end in ((1, "fwd"), (2, "vjp"), (3, "second_derivative"))
    )
    y, saved = forward(p.x @ p.x.mT / m + np.eye(m, dtype=dtype))  # positive definite, eigenvalues from 1 to about 5
    return lambda: second(p.v_bar, p.x, y, *saved), lambda: vjp(p.v_bar, y, *saved)


def ours(library: str, batch: int, m: int, dtype: str) -> Call:
    """`eigh` and `eigh_jvp` on arrays of a library, compiled where it compiles."""
    on = backend(library)
    p = problem(batch, m, dtype)

    def forward_and_tangent(x: Any, x_dot: Any) -> Any:
        w, v = ddnref.eigh(x)
        return w, v, ddnref.eigh_jvp(x_dot, w, v, **on.options)

    return prepared(on, forward_and_tangent, on.array(p.x), on.array(p.v_bar + p.v_bar.mT))


def peer(library: str, batch: int, m: int, dtype: str) -> Call:
    """The library's own forward mode of its ``eigh``, which includes the decomposition too."""
    p = problem(batch, m, dtype)
    x_dot = p.v_bar + p.v_bar.mT
    if library == "torch":
        torch = load("torch")
        x, moved = torch.from_numpy(p.x.copy()), torch.from_numpy(x_dot)
        return lambda: torch.func.jvp(torch.linalg.eigh, (x,), (moved,))
    jax = load_jax()
    push = jax.jit(lambda x, x_dot: jax.jvp(jax.numpy.linalg.eigh, (x,), (x_dot,)))
    arguments = jax.numpy.asarray(p.x), jax.numpy.asarray(x_dot)
    return lambda: jax.block_until_ready(push(*arguments))
