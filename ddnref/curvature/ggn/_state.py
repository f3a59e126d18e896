"""Shards of samples: their factored columns, and the Gram matrices and products of all shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, is_true, keep, library, quiet
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.gram import hadamard_gram
from ddnref._kernels.public import public
from ddnref.curvature._reducers import Reducer, assemble, reduce_shards
from ddnref.curvature.ggn._columns import AffineColumns, Columns, collect
from ddnref.curvature.ggn._options import Options, check_seen, chosen_here, options, rows, signs
from ddnref.errors import NonFiniteError
from ddnref.networks._checks import bad_targets, marked
from ddnref.networks._protocol import Params

Blocks = tuple[tuple[Array, ...], ...]


class Shard(NamedTuple):
    """The factored columns of some samples."""

    columns: tuple[Columns, ...]
    """One entry for each layer with parameters; empty where no sample was chosen."""
    gradient: tuple[Columns, ...]
    """Columns of the gradients of the samples, with a single factor m."""
    m: int
    n: int
    n_gradient: int


class GgnState(NamedTuple):
    """The data that `ggn_reducer` accumulates, which may be sent from one process to another."""

    blocks: tuple[Blocks, ...] = ()
    """The block rows of each group's Gram matrix."""
    shards: tuple[Shard, ...] = ()
    first: int = 0
    """The number of the first sample."""
    end: int = 0
    """The number of the sample that comes next."""


class Ggn(NamedTuple):
    """Gram matrices of all data, which the functions of the GGN take in place of a chain and its data."""

    options: Options
    grams: tuple[Array, ...]
    """``VᵀV`` of each group, without the factor of the mean."""
    shards: tuple[Shard, ...]
    scale: float
    """The factor of the mean over the samples of the curvature."""
    scale_gradient: float


@public
def ggn_reducer(
    chain: Any,
    *,
    groups: Sequence[Sequence[int]] | None = None,
    subsampling: Iterable[int] | None = None,
    subsampling_gradient: Iterable[int] | None = None,
    mc_samples: int | None = None,
    seed: int = 0,
    gradient: bool = True,
    throw: bool = True,
) -> Reducer:
    """Accumulate the GGN's Gram matrix over batches of data, in one process or in several.

    Parameters
    ----------
    chain, groups, subsampling, mc_samples, seed, throw
        As in `ggn_eigvalsh`. Samples are counted across all batches.
    subsampling_gradient : iterable of int, optional
        As in `ggn_directional_derivatives`.
    gradient : bool, default True
        Whether directional derivatives and Newton steps are wanted, which need the gradients of the samples.

    Returns
    -------
    reducer : Reducer
        ``init(first=0)`` takes the number of the first sample, for a process that does not begin with the first one;
        ``update(state, x, t)`` one batch. ``finalise(state)`` returns a `Ggn`, which every function of the GGN takes
        in place of chain, x and t.

    Raises
    ------
    TypeError, ValueError, NonFiniteError
        As `ggn_eigvalsh`; from its functions, states that do not follow each other.

    Notes
    -----
    A state holds, for N samples with M factors each (C − 1 for the cross-entropy), the inputs and backpropagated
    factors of all layers, ``N (Σ a_in + M Σ a_out)`` numbers, and the blocks of the Gram matrix, ``(N M)² / 2``: these
    are more as soon as N M² exceeds twice ``Σ a_in + M Σ a_out``. The data itself is held through the inputs of the
    first layer, as a copy, so that the next batch may come in the same buffer; a batch cut from a file that is
    memory-mapped for reading (``mode="r"``) is held by reference, and read from the disk where it is used. Passing
    over every batch needs it once forward and M times backward, and one product with every batch before it.

    Where ``(N M)²`` numbers are too many, sub-sample, take fewer factors by `mc_samples`, or ask for k eigenpairs by
    products alone, as shown for `sum_reducer` on the page on the GGN.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.mlp(3, 4, 2, 2)
    >>> x, t = np.random.default_rng(0).random((6, 3)), np.asarray([0, 1, 0, 1, 1, 0])
    >>> reducer = ddnref.curvature.ggn_reducer(chain)
    >>> one = reducer.update(reducer.init(), x[:4], t[:4])
    >>> two = reducer.update(reducer.init(4), x[4:], t[4:])
    >>> w = ddnref.curvature.ggn_eigvalsh(reducer.finalise(reducer.merge(one, two)))
    >>> bool(np.allclose(w, ddnref.curvature.ggn_eigvalsh(chain, x, t)))
    True
    """
    given = options(chain, groups, subsampling, subsampling_gradient, mc_samples, seed, gradient, throw)
    return reducer_of(given)


def reducer_of(given: Options, *, copied: bool = True) -> Reducer:
    """Bind the options to the four functions of a reducer; `copied` batches may be overwritten after `update`."""

    def init(first: int = 0) -> GgnState:
        return GgnState(tuple(() for _ in given.groups), (), first, first)

    return Reducer(
        init,
        lambda state, x, t: _update(given, state, *_looked_at(x, t, copied)),
        lambda a, b: _merge(given, a, b),
        lambda state: _finalise(given, state),
    )


def accumulated(
    given: Options, x: Array | None, t: Array | None, batches: Any, progress: Callable[..., object] | None
) -> Ggn:
    """Accumulate all data: one batch, or an iterable of several."""
    reducer = reducer_of(given, copied=batches is not None)
    if batches is not None:
        if x is not None or t is not None:
            raise TypeError("x, t and batches= were all given: pass the data either as a whole or in batches.")
        result: Ggn = reducer.finalise(reduce_shards(reducer, batches, progress))
        return result
    if x is None or t is None:
        raise TypeError("x and t must be given, or batches=, an iterable of pairs (x, t).")
    whole: Ggn = reducer.finalise(reduce_shards(reducer, [(x, t)], progress))
    return whole


def _looked_at(x: Array, t: Array, copied: bool) -> tuple[Array, Array]:
    library(x=x, t=t)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, features): one row for each sample.")
    return (keep(x), keep(t)) if copied else (x, t)


@quiet()
def _update(given: Options, state: GgnState, x: Array, t: Array) -> GgnState:
    shard = _shard(given, x, t, state.end)
    blocks = tuple(((_gram(shard, shard, group),),) if shard.n else () for group in given.groups)
    return _merge(given, state, GgnState(blocks, (shard,), state.end, state.end + x.shape[0]))


@quiet()
def _merge(given: Options, a: GgnState, b: GgnState) -> GgnState:
    if not a.shards or not b.shards:
        return b if not a.shards else a
    if a.end != b.first:
        raise ValueError(
            f"The first state ends before sample {a.end}, the second begins with {b.first}: start a process that does "
            "not begin with the first sample by reducer.init(first), and merge states in their order."
        )
    blocks = []
    for i, group in enumerate(given.groups):
        # Below the blocks of a come those of b, each preceded by its products with all shards of a.
        before = [shard for shard in a.shards if shard.n]
        rows_b = [shard for shard in b.shards if shard.n]
        below = ((*(_gram(v, w, group) for w in before), *row) for v, row in zip(rows_b, b.blocks[i], strict=True))
        blocks.append(a.blocks[i] + tuple(below))
    return GgnState(tuple(blocks), a.shards + b.shards, a.first, b.end)


@quiet()
def _finalise(given: Options, state: GgnState) -> Ggn:
    if not state.shards:
        raise ValueError("There was no batch: the GGN of no data. Is batches= an iterator that was used up before?")
    check_seen("subsampling", given.subsampling, state.first, state.end)
    check_seen("subsampling_gradient", given.subsampling_gradient, state.first, state.end)
    grams = tuple(assemble(blocks) for blocks in state.blocks)
    if given.throw:
        _refuse_non_finite(grams[0], [shard for shard in state.shards if shard.n])
    n = sum(shard.n for shard in state.shards)
    n_gradient = sum(shard.n_gradient for shard in state.shards)
    chain = given.chain
    return Ggn(given, grams, state.shards, chain.scale(n), chain.scale(max(n_gradient, 1)))


def _refuse_non_finite(gram: Array, shards: list[Shard]) -> None:
    """Raise, naming the samples whose columns are not finite, which shows on the diagonal of the Gram matrix."""
    xp = array_api_compat.array_namespace(gram)
    n = gram.shape[0]
    # Column norms are on the diagonal: NaN or infinity there names the sample.
    diagonal = xp.reshape(gram, (n * n,))[:: n + 1]
    if not is_true(xp.any(~xp.isfinite(diagonal))):
        return
    bad, start, before = [], 0, 0
    for shard in shards:
        size = shard.m * shard.n
        flags = ~xp.isfinite(xp.reshape(diagonal[start : start + size], (shard.m, shard.n)))
        where = xp.any(flags, axis=0)
        bad += [before + i for i in range(shard.n) if is_true(where[i])]
        start, before = start + size, before + shard.n
    some = ", ".join(map(str, bad[:5])) + (", …" if len(bad) > 5 else "")
    raise NonFiniteError(
        f"{len(bad)} of {before} samples (numbers {some}) have activations or derivatives that are NaN or infinite, "
        "and with them the Gram matrix. The most likely cause is NaN in x, or weights that have diverged. Leave these "
        "samples out by subsampling=, or pass throw=False to get NaN."
    )


# --- one batch ----------------------------------------------------------------------------------------------------


def _shard(given: Options, x: Array, t: Array, start: int) -> Shard:
    """Run forward, and backward from the factors of the loss's Hessian and from its gradient."""
    if x.shape[0] == 0:
        raise ValueError("x holds no samples, and an empty batch has no curvature. Leave it out.")
    curved = chosen_here(given.subsampling, start, x.shape[0])
    sloped = chosen_here(given.subsampling_gradient, start, x.shape[0]) if given.gradient else []
    columns: tuple[Columns, ...] = ()
    gradient: tuple[Columns, ...] = ()
    m = n = n_gradient = 0
    if curved != []:
        y, saved, factors = _factors(given, x, t, curved, start)
        (m, n), xp = factors.shape[:2], array_api_compat.array_namespace(y)
        if curved == sloped:
            # The gradient is one more factor of the same samples: one pass for both.
            slope = given.chain.criterion.gradient(y, rows(t, curved))
            both = _columns(given, saved, xp.concat([factors, slope[None, ...]], axis=0))
            columns, gradient = (tuple(c.part(part) for c in both) for part in (slice(0, m), slice(m, m + 1)))
            return Shard(columns, gradient, m, n, n)
        columns = _columns(given, saved, factors)
    if sloped != []:
        t = rows(t, sloped)
        y, saved = given.chain.forward(rows(x, sloped), 1)
        bad = bad_targets(given.chain.criterion, "sum", y, t, given.throw)
        slope = marked(given.chain.criterion.gradient(y, t), bad)
        gradient, n_gradient = _columns(given, saved, slope[None, ...]), y.shape[0]
    return Shard(columns, gradient, m, n, n_gradient)


def _factors(
    given: Options, x: Array, t: Array, chosen: list[int] | None, start: int
) -> tuple[Array, list[Any], Array]:
    """Return outputs, saved values, and the columns of S_n, ``(M, N, C)``, or random combinations of them."""
    t = rows(t, chosen)
    y, saved = given.chain.forward(rows(x, chosen), 1)
    bad = bad_targets(given.chain.criterion, "sum", y, t, given.throw)
    xp = array_api_compat.array_namespace(y)
    s = given.chain.criterion.hessian_sqrt(y, t)
    if s.shape[-1] == 0:
        raise ValueError(
            f"The loss of C = {y.shape[-1]} output(s) has no curvature: the square root of its Hessian has no column. "
            'A cross-entropy of one output is constant: for two classes end with two outputs, or take loss="bce".'
        )
    factors = marked(xp.moveaxis(s, -1, 0), bad)
    if given.mc_samples is None:
        return y, saved, factors
    r, m = s.shape[-1], given.mc_samples
    # Random signs mix the r columns of S_n into m, whose products have the same expectation.
    epsilon = rows_of_signs(given, m, start, x.shape[0], r, y, chosen)
    mixed = xp.permute_dims(epsilon, (1, 0, 2)) @ xp.permute_dims(factors, (1, 0, 2))  # (N, m, C)
    return y, saved, xp.permute_dims(mixed, (1, 0, 2)) / math.sqrt(m)


def rows_of_signs(given: Options, m: int, start: int, n: int, r: int, like: Array, chosen: list[int] | None) -> Array:
    """Return the signs ``(m, N, r)`` of the chosen samples."""
    drawn = signs(given.seed, m, start, n, r, like)
    if chosen is None:
        return drawn
    xp = array_api_compat.array_namespace(drawn)
    return xp.moveaxis(rows(xp.moveaxis(drawn, 1, 0), chosen), 0, 1)


def _columns(given: Options, saved: list[Any], y_bar: Array) -> tuple[Columns, ...]:
    chain = given.chain
    return collect(chain.layers, chain.split(chain.params), saved, y_bar)[0]


# --- products of all shards ---------------------------------------------------------------------------------------


def choices(columns: tuple[Columns, ...], group: tuple[int, ...]) -> list[tuple[Columns, tuple[int, ...]]]:
    """Return the columns of the layers in a group, each with the positions of its parameters in the group."""
    pairs, first = [], 0
    # Positions count parameters across layers; keep those of each layer that the group names.
    for c in columns:
        local = tuple(i - first for i in group if first <= i < first + c.n_params)
        first += c.n_params
        if local:
            pairs.append((c, local))
    return pairs


def _gram(v: Shard, w: Shard, group: tuple[int, ...]) -> Array:
    """Return a block ``VᵀW`` of a group's Gram matrix, exactly symmetric where w is v."""
    return cross(v.columns, w.columns, group, v is w)


def cross(v: tuple[Columns, ...], w: tuple[Columns, ...], group: tuple[int, ...], symmetric: bool = False) -> Array:
    """Return ``VᵀW`` summed over the layers of a group, exactly symmetric if `symmetric` says that w is v."""
    dense, others = [], []
    for (a, local), (b, _) in zip(choices(v, group), choices(w, group), strict=True):
        if isinstance(a, AffineColumns) and isinstance(b, AffineColumns) and a.is_dense:
            dense.append(a.factors(b, local))
        else:
            others.append(a.cross(b, local))
    # All dense layers together: one pass over the Gram matrix.
    k = hadamard_gram(dense, symmetric) if dense else None
    for here in others:
        part = hermitian_part(here) if symmetric else here
        k = part if k is None else k + part
    return k


def apply(ggn: Ggn, group: tuple[int, ...], c: Array) -> list[Array]:
    """Return ``V c`` of coefficients ``(n, k)``: one array ``(k, *shape)`` for each parameter of the group."""
    xp = array_api_compat.array_namespace(c)
    total: list[Array] | None = None
    start = 0
    for shard in ggn.shards:
        if not shard.n:
            continue
        size = shard.m * shard.n
        here = xp.reshape(xp.matrix_transpose(c[start : start + size, :]), (c.shape[1], shard.m, shard.n))
        start += size
        vectors = [v for columns, local in choices(shard.columns, group) for v in columns.apply(here, local)]
        total = vectors if total is None else [a + b for a, b in zip(total, vectors, strict=True)]
    return total or []


def adjoint(ggn: Ggn, group: tuple[int, ...], vectors: list[Array]) -> Array:
    """Return ``Vᵀ v``, ``(n, k)``, of arrays ``(k, *shape)``, one for each parameter of the group."""
    xp = array_api_compat.array_namespace(vectors[0])
    parts = []
    for shard in ggn.shards:
        if not shard.n:
            continue
        c, start = None, 0
        for columns, local in choices(shard.columns, group):
            own: Params = tuple(vectors[start : start + len(local)])
            here = columns.adjoint(own, local)
            start += len(local)
            c = here if c is None else c + here
        parts.append(xp.matrix_transpose(xp.reshape(c, (vectors[0].shape[0], shard.m * shard.n))))
    return xp.concat(parts, axis=0)
