"""Shards of samples: their factored columns, the blocks of the Gram matrices, and what is made of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, is_true, library, own, quiet
from ddnref._kernels.public import public
from ddnref.curvature._reducers import Reducer, assemble, reduce_shards
from ddnref.curvature.ggn import _numpy
from ddnref.curvature.ggn._columns import Columns, collect
from ddnref.curvature.ggn._options import Options, check_seen, chosen_here, options, rows, signs
from ddnref.errors import NonFiniteError
from ddnref.networks import _checks
from ddnref.networks._protocol import Params

Blocks = tuple[tuple[Array, ...], ...]


class Shard(NamedTuple):
    """The factored columns of some samples."""

    columns: tuple[Columns, ...]
    """One entry for each layer with parameters; empty where no sample was chosen."""
    gradient: tuple[Columns, ...]
    """The same for the gradients of the samples, a single factor m."""
    m: int
    n: int
    n_gradient: int


class GgnState(NamedTuple):
    """What `ggn_reducer` accumulates; pure data, which may be sent from one process to another."""

    blocks: tuple[Blocks, ...] = ()
    """For each group the block rows of its Gram matrix."""
    shards: tuple[Shard, ...] = ()
    first: int = 0
    """The number of the first sample."""
    end: int = 0
    """The number of the sample that comes next."""


class Ggn(NamedTuple):
    """Gram matrices of all data; the functions of the GGN take it in place of a chain and its data."""

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
    """The GGN's Gram matrix over batches of data, which may come one after the other or from several processes.

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
    """The four functions, with their options bound; `copied`: batches may be overwritten after `update`."""

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
    """All of the data: one batch, or an iterator over several."""
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
    return (_kept(x), _kept(t)) if copied else (x, t)


def _kept(array: Array) -> Array:
    """A copy, because the caller may fill its buffer again; not of what is mapped from a file for reading."""
    if array_api_compat.is_torch_array(array):
        return array.clone()  # asarray would hide that it requires grad, which is refused later
    if array_api_compat.is_numpy_array(array) and _numpy.is_read_from_file(array):
        return array
    return own(array)


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
    """Name the samples whose columns are not finite, seen on the diagonal of the Gram matrix."""
    xp = array_api_compat.array_namespace(gram)
    n = gram.shape[0]
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
        "and with them the Gram matrix. Likely NaN in x, or weights that have diverged. Leave them out by "
        "subsampling=, or pass throw=False to get NaN."
    )


# --- one batch ----------------------------------------------------------------------------------------------------


def _shard(given: Options, x: Array, t: Array, start: int) -> Shard:
    """Forward, and backward from the factors of the loss's Hessian and from its gradient."""
    if x.shape[0] == 0:
        raise ValueError("x holds no samples: an empty batch has no curvature. Leave it out.")
    curved = chosen_here(given.subsampling, start, x.shape[0])
    sloped = chosen_here(given.subsampling_gradient, start, x.shape[0]) if given.gradient else []
    if curved == sloped:  # one pass for both
        return _together(given, x, t, curved, start)
    columns, m, n = _curvature(given, x, t, curved, start)
    gradient, n_gradient = _slopes(given, x, t, sloped)
    return Shard(columns, gradient, m, n, n_gradient)


def _together(given: Options, x: Array, t: Array, chosen: list[int] | None, start: int) -> Shard:
    if chosen == []:
        return Shard((), (), 0, 0, 0)
    y, saved, factors = _factors(given, x, t, chosen, start)
    xp = array_api_compat.array_namespace(y)
    m = factors.shape[0]
    slope = given.chain.criterion.gradient(y, rows(t, chosen))
    both = _columns(given, saved, xp.concat([factors, slope[None, ...]], axis=0))
    n = y.shape[0]
    return Shard(tuple(c.part(slice(0, m)) for c in both), tuple(c.part(slice(m, m + 1)) for c in both), m, n, n)


def _curvature(
    given: Options, x: Array, t: Array, chosen: list[int] | None, start: int
) -> tuple[tuple[Columns, ...], int, int]:
    if chosen == []:
        return (), 0, 0
    y, saved, factors = _factors(given, x, t, chosen, start)
    return _columns(given, saved, factors), factors.shape[0], y.shape[0]


def _slopes(given: Options, x: Array, t: Array, chosen: list[int] | None) -> tuple[tuple[Columns, ...], int]:
    if chosen == []:
        return (), 0
    t = rows(t, chosen)
    y, saved = given.chain.forward(rows(x, chosen), 1)
    bad = _checks.bad_targets(given.chain.criterion, "sum", y, t, given.throw)
    slope = _checks.marked(given.chain.criterion.gradient(y, t), bad)
    return _columns(given, saved, slope[None, ...]), y.shape[0]


def _factors(
    given: Options, x: Array, t: Array, chosen: list[int] | None, start: int
) -> tuple[Array, list[Any], Array]:
    """Outputs, what was saved, and the columns of S_n, ``(M, N, C)``, or random combinations of them."""
    t = rows(t, chosen)
    y, saved = given.chain.forward(rows(x, chosen), 1)
    bad = _checks.bad_targets(given.chain.criterion, "sum", y, t, given.throw)
    xp = array_api_compat.array_namespace(y)
    s = given.chain.criterion.hessian_sqrt(y, t)
    if s.shape[-1] == 0:
        raise ValueError(
            f"The loss of C = {y.shape[-1]} output(s) has no curvature: the square root of its Hessian has no column. "
            'A cross-entropy of one output is constant: for two classes end with two outputs, or take loss="bce".'
        )
    factors = _checks.marked(xp.moveaxis(s, -1, 0), bad)
    if given.mc_samples is None:
        return y, saved, factors
    r, m = s.shape[-1], given.mc_samples
    epsilon = rows_of_signs(given, m, start, x.shape[0], r, y, chosen)
    mixed = xp.permute_dims(epsilon, (1, 0, 2)) @ xp.permute_dims(factors, (1, 0, 2))  # (N, m, C)
    return y, saved, xp.permute_dims(mixed, (1, 0, 2)) / math.sqrt(m)


def rows_of_signs(given: Options, m: int, start: int, n: int, r: int, like: Array, chosen: list[int] | None) -> Array:
    """Signs ``(m, N, r)`` of the chosen samples."""
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
    """Columns of the layers in a group, each with the positions of its parameters that belong to it."""
    pairs, first = [], 0
    for c in columns:
        local = tuple(i - first for i in group if first <= i < first + c.n_params)
        first += c.n_params
        if local:
            pairs.append((c, local))
    return pairs


def _gram(v: Shard, w: Shard, group: tuple[int, ...]) -> Array:
    """A block ``VᵀW`` of the Gram matrix of a group, exactly symmetric where w is v."""
    return cross(v.columns, w.columns, group, v is w)


def cross(v: tuple[Columns, ...], w: tuple[Columns, ...], group: tuple[int, ...], symmetric: bool = False) -> Array:
    """The sum over the layers of a group."""
    pairs = list(zip(choices(v, group), choices(w, group), strict=True))
    if array_api_compat.is_numpy_array(v[0].like):
        return _numpy.cross(pairs, symmetric)
    k = None
    for (a, local), (b, _) in pairs:
        here = a.cross(b, local)
        k = here if k is None else k + here
    return (k + array_api_compat.array_namespace(k).matrix_transpose(k)) / 2 if symmetric else k


def apply(ggn: Ggn, group: tuple[int, ...], c: Array) -> list[Array]:
    """``V c`` of coefficients ``(n, k)``: vectors ``(k, *shape)``, one array for each parameter of the group."""
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
    """``Vᵀ v`` of vectors ``(k, *shape)``, one array for each parameter of the group: coefficients ``(n, k)``."""
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
