"""Gram matrices and sums over shards of data: pure ``init``, ``update``, ``merge`` and ``finalise``.

A shard of *rows* of V (the parameters of one layer, one machine's part of them) adds to the Gram matrix. A shard of
*columns* (samples) adds blocks: its own and those with every shard before it,

    K = [[V_1ᴴV_1, V_1ᴴV_2, …], [V_2ᴴV_1, V_2ᴴV_2, …], …]

so that a state must keep what the later ones are multiplied with. Everything else is a sum over the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, adjoint, as_dtype, namespace
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.public import guarded, public
from ddnref.operators._blocks import Pieces, tall


class Reducer(NamedTuple):
    """Four pure functions that give the same result however the data is split, ordered in time, or spread out."""

    init: Callable[[], Any]
    """The state of no data."""
    update: Callable[..., Any]
    """``update(state, *shard)``: the state with one more shard; the old one stays valid."""
    merge: Callable[[Any, Any], Any]
    """``merge(a, b)``: one state of the data of a followed by that of b, for processes that work in parallel."""
    finalise: Callable[[Any], Any]
    """The result of a state."""


class GramState(NamedTuple):
    """Blocks of a Gram matrix, and the shards that later ones need."""

    blocks: tuple[tuple[Array, ...], ...] = ()
    """Block rows: row i has the blocks (i, 0) to (i, i)."""
    shards: tuple[Pieces, ...] = ()
    """The factor of each shard: nothing of the others is kept."""


class SumState(NamedTuple):
    """A weighted sum over the shards so far."""

    total: Any = None
    weight: float = 0.0


@public
def gram_reducer(shards: str = "columns") -> Reducer:
    r"""The Gram matrix ``VᴴV`` of a factor that arrives in shards.

    Parameters
    ----------
    shards : {"columns", "rows"}
        What a shard is: some of the columns of V (samples), or some of its rows (parameters, features).

    Returns
    -------
    reducer : Reducer
        ``update(state, factor)`` takes an array ``(..., D, n)`` or a list of pieces ``(..., D_l, n)``. ``finalise``
        returns the Gram matrix ``(..., n, n)``, exactly Hermitian, columns in the order of the shards.

    Raises
    ------
    ValueError
        Unknown `shards`; from its functions: shards that do not fit each other, no shard at all.
    TypeError
        From its functions, as `gram_eigvalsh`.

    See Also
    --------
    sum_reducer : products with V, gradients, losses.
    ggn_reducer : for a network, whose columns are kept as factors.

    Notes
    -----
    Rows add up: a state is one n×n matrix, an update D n² flops, and nothing of a shard is kept. With columns the state
    keeps the shards, D n numbers by reference, because the next one is multiplied with each of them. This is of use
    where V fits into memory (or is mapped into it, which is not undone here) but what it is computed from does not;
    where V does not fit, split the rows.

    Examples
    --------
    >>> import numpy as np
    >>> reducer = ddnref.curvature.gram_reducer()
    >>> state = reducer.init()
    >>> for shard in (np.asarray([[3.0], [4.0]]), np.asarray([[1.0], [0.0]])):
    ...     state = reducer.update(state, shard)
    >>> reducer.finalise(state)
    array([[25.,  3.],
           [ 3.,  1.]])
    """
    if shards not in ("columns", "rows"):
        raise ValueError(f'shards is {shards!r}, expected "columns" (samples) or "rows" (parameters).')
    merge = _merge_rows if shards == "rows" else _merge_columns
    return Reducer(GramState, partial(_update, merge), merge, lambda state: assemble(state.blocks))


@public
def sum_reducer(function: Callable[..., Any], *, weight: Callable[..., float] | None = None) -> Reducer:
    """The sum of a function over shards, or with `weight` its mean.

    Parameters
    ----------
    function : callable
        ``function(*shard)`` returns an array, or a list or tuple of arrays: a gradient, a Hessian- or GGN-vector
        product, ``V u``, a loss.
    weight : callable, optional
        ``weight(*shard)``, such as the number of samples: then the result is ``Σ weight · function / Σ weight``, which
        for functions of a `Chain` with ``reduction="mean"`` is that of the whole data set.

    Returns
    -------
    reducer : Reducer
        ``update(state, *shard)``.

    Raises
    ------
    ValueError
        From its functions: no shard at all, weights that add up to zero.

    Examples
    --------
    >>> import numpy as np
    >>> reducer = ddnref.curvature.sum_reducer(lambda x: np.mean(x, axis=0), weight=len)
    >>> state = reducer.update(reducer.update(reducer.init(), np.asarray([1.0, 2.0, 3.0])), np.asarray([10.0]))
    >>> float(reducer.finalise(state))
    4.0
    """

    def update(state: SumState, *shard: Any) -> SumState:
        # A weighted sum is divided by the sum of the weights at the end.
        share = 1.0 if weight is None else float(weight(*shard))
        value = function(*shard)
        return _add(state, SumState(value if weight is None else _map(lambda a: a * share, value), share))

    def finalise(state: SumState) -> Any:
        if state.total is None:
            raise ValueError("There was no shard: nothing to add up. Update the state with at least one.")
        if weight is None:
            return state.total
        if state.weight == 0:
            raise ValueError("The weights of all shards add up to zero.")
        return _map(lambda a: a / state.weight, state.total)

    return Reducer(SumState, update, _add, finalise)


# --- Gram matrices ----------------------------------------------------------------------------------------------------


@guarded
def _update(merge: Callable[..., GramState], state: GramState, factor: Any) -> GramState:
    pieces = tuple(factor) if isinstance(factor, (list, tuple)) else (factor,)
    # Shards of rows add up, those of columns are needed by later ones.
    v = tall(factor)
    return merge(state, GramState(((as_dtype(v.gram(), v.like),),), () if merge is _merge_rows else (pieces,)))


@guarded
def _merge_rows(a: GramState, b: GramState) -> GramState:
    if not (a.blocks and b.blocks):
        return a if a.blocks else b
    (k_a,), (k_b,) = a.blocks[0], b.blocks[0]
    check_shapes(**{"The Gram matrix of a shard of rows": (k_b, tuple(k_a.shape))})
    return GramState(((k_a + k_b,),))


@guarded
def _merge_columns(a: GramState, b: GramState) -> GramState:
    """Append the block rows of b, after the products of each of its shards with those of a."""
    below = tuple((*(_cross(v_i, v_j) for v_j in a.shards), *row) for v_i, row in zip(b.shards, b.blocks, strict=True))
    return GramState(a.blocks + below, a.shards + b.shards)


def _cross(v: Pieces, w: Pieces) -> Array:
    """Return ``VᴴW``, the sum over the pieces."""
    if len(v) != len(w):
        raise ValueError(f"The factor of a shard has {len(v)} pieces, another {len(w)}: all need the same rows.")
    for v_l, w_l in zip(v, w, strict=True):
        namespace(**{"factor of a shard": v_l, "factor of another": w_l})
        # Rows and batch axes must agree; the number of columns may differ.
        if tuple(v_l.shape[:-1]) != tuple(w_l.shape[:-1]):
            raise ValueError(
                f"The factor of a shard has shape {tuple(v_l.shape)}, of another {tuple(w_l.shape)}: only the last "
                "axis may differ, the number of columns."
            )
        check_dtypes(**{"factor of a shard": (v_l, w_l.dtype)})
    return reduce(add, (adjoint(v_l) @ w_l for v_l, w_l in zip(v, w, strict=True)))


@guarded
def assemble(blocks: tuple[tuple[Array, ...], ...]) -> Array:
    """Return the whole matrix from its lower block triangle, exactly Hermitian."""
    if not blocks:
        raise ValueError("There was no shard: the Gram matrix of nothing. Update the state with at least one.")
    if len(blocks) == 1:
        return blocks[0][0]
    xp = array_api_compat.array_namespace(blocks[0][0])
    # The blocks right of the diagonal are the adjoints of those below it.
    right = [[adjoint(row[i]) for row in blocks[i + 1 :]] for i in range(len(blocks))]
    rows = [xp.concat([*row, *rest], axis=-1) for row, rest in zip(blocks, right, strict=True)]
    return hermitian_part(xp.concat(rows, axis=-2))


@guarded
def _add(a: SumState, b: SumState) -> SumState:
    if a.total is None or b.total is None:
        return b if a.total is None else a
    return SumState(_map(add, a.total, b.total), a.weight + b.weight)


def _map(function: Callable[..., Any], *values: Any) -> Any:
    """Apply a function of arrays to each entry of lists and tuples of them."""
    first = values[0]
    if isinstance(first, (list, tuple)):
        entries = [_map(function, *entry) for entry in zip(*values, strict=True)]
        # A NamedTuple takes its entries one by one.
        return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
    return function(*values)
