"""Loops that rarely make a GPU wait: one flag is read every few steps, or none where the library has its own loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import array_api_compat

from ddnref._core.arrays import Array, is_true, namespace_of

State = TypeVar("State", bound=tuple[Any, ...])
WhileLoop: TypeAlias = Callable[[Callable[[Any], Array], Callable[[Any], Any], Any], Any]
"""``while_loop(cond, body, state) -> state``, such as ``jax.lax.while_loop``."""

CHECK_EVERY = 10


class LoopOptions(NamedTuple):
    """The options that every iterative solver has."""

    rtol: float
    """Relative tolerance on the stated residual."""
    maxiter: int
    """Steps after which an item that has not converged is given up."""
    check_every: int = CHECK_EVERY
    """Steps between two looks at the flag of active items; each look waits for the device."""
    while_loop: WhileLoop | None = None
    """The library's own loop, such as ``jax.lax.while_loop``, with which nothing is read on the host."""
    throw: bool = True
    """Whether an item that has not converged raises."""


def run(
    active: Callable[[State], Array],
    body: Callable[[State], State],
    state: State,
    *,
    maxiter: int,
    check_every: int = CHECK_EVERY,
    while_loop: WhileLoop | None = None,
) -> State:
    """Apply `body` while any flag of ``active(state)`` is set, at most `maxiter` times.

    `state` is a flat tuple of arrays. ``active`` returns one flag per item, ``(...)``. `body` must not change items
    that are no longer active, because up to ``check_every - 1`` more steps follow before their flags are read. With
    `while_loop` nothing is read on the host: the library's own loop evaluates the condition after each step.
    """
    if maxiter < 0 or check_every < 1:
        raise ValueError(f"maxiter is {maxiter} and check_every {check_every}; expected at least 0 and 1.")
    if while_loop is None:
        xp = namespace_of(state[0])
        for step in range(maxiter):
            # Only now and then is a flag read, because that waits for the device.
            if step % check_every == 0 and not is_true(xp.any(active(state))):
                break
            state = body(state)
        return state

    # The library's own loop is traced once, and so counts its steps with the state.
    flags = active(state)
    xp = array_api_compat.array_namespace(flags)
    first = xp.zeros((), dtype=xp.int32, device=array_api_compat.device(flags))

    def cond(carry: tuple[Array, State]) -> Array:
        return (carry[0] < maxiter) & xp.any(active(carry[1]))

    def counted(carry: tuple[Array, State]) -> tuple[Array, State]:
        return carry[0] + 1, body(carry[1])

    return while_loop(cond, counted, (first, state))[1]  # type: ignore[no-any-return]


class IterationInfo(NamedTuple):
    """How an iteration ended for each item of the batch."""

    converged: Array
    """(...) bool: whether the stated residual or error reached its tolerance."""
    n_iter: Array
    """(...) int32: steps taken by the item before it was frozen."""
    residual_norm: Array
    """(...) real: the relative residual of the pair, or of the subspace."""
    error: Array
    """(...) or (..., n) real: an estimate of the relative error of each eigenvalue, large where a matrix is non-normal,
    whatever the residual is; infinite where the iteration found no eigenvalue."""
