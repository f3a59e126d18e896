"""Shards of samples: their factored columns, and the Gram matrices and products of all shards."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, is_true, keep, library
from ddnref._kernels.dense import hermitian_part
from ddnref._kernels.gram import hadamard_gram
from ddnref._kernels.public import guarded, public
from ddnref.curvature._reducers import Reducer, assemble
from ddnref.curvature.ggn._columns import AffineColumns, Columns
from ddnref.curvature.ggn._options import Options, check_seen, chosen_here, options, rows, signs
from ddnref.errors import NonFiniteError
from ddnref.networks._checks import bad_targets, marked
from ddnref.networks._losses import Loss, count


class Shard(NamedTuple):
    """The factored columns of some samples."""

    columns: tuple[Columns, ...] = ()  # one entry for each layer with parameters; empty where no sample was chosen
    gradient: tuple[Columns, ...] = ()  # of the gradients of the samples, with a single factor m
    m: int = 0
    n: int = 0
    n_gradient: int = 0
    divisor: int | Array = 0  # what the mean over these samples divides by: n, or the sum of the samples' weights
    divisor_gradient: int | Array = 0


class GgnState(NamedTuple):
    """The data that `ggn_reducer` accumulates, which may be sent from one process to another."""

    blocks: tuple[tuple[tuple[Array, ...], ...], ...] = ()
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
    scale: float | Array
    """The factor of the mean over the samples of the curvature."""
    scale_gradient: float | Array


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
    A state holds, for N samples with M factors each, the inputs and backpropagated factors of all layers,
    ``N (Σ a_in + M Σ a_out)`` numbers, and the blocks of the Gram matrix, ``(N M)² / 2``. Where these are too many,
    sub-sample, take fewer factors by `mc_samples`, or ask for k eigenpairs by products alone, as shown for
    `sum_reducer` on the page on the GGN. Each batch is passed once forward and M times backward, and multiplied with
    every batch before it.

    The data is held through the inputs of the first layer, as a copy, so that the next batch may come in the same
    buffer; a batch cut from a file that is memory-mapped for reading (``mode="r"``) is held by reference.

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

    def init(first: int = 0) -> GgnState:
        return GgnState(tuple(() for _ in given.groups), (), first, first)

    return Reducer(init, partial(_update, given, True), partial(_merge, given), partial(_finalise, given))


def accumulated(
    given: Options, x: Array | None, t: Array | None, batches: Any, progress: Callable[..., object] | None
) -> Ggn:
    """Accumulate all data: one batch, or an iterable of several; `progress` is called after each."""
    several = batches is not None
    if not several:
        if x is None or t is None:
            raise TypeError("x and t must be given, or batches=, an iterable of pairs (x, t).")
        batches = [(x, t)]
    elif x is not None or t is not None:
        raise TypeError("x, t and batches= were all given: pass the data either as a whole or in batches.")
    total = len(batches) if hasattr(batches, "__len__") else None
    state = GgnState(tuple(() for _ in given.groups))
    for done, (x_i, t_i) in enumerate(batches, 1):
        state = _update(given, several, state, x_i, t_i)
        if progress is not None:
            progress(done, total)
    return _finalise(given, state)


@guarded
def _update(given: Options, copied: bool, state: GgnState, x: Array, t: Array) -> GgnState:
    """Add a batch, `copied` where the next one may come in the same buffer."""
    library(x=x, t=t)
    if x.ndim < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (N, features): one row for each sample.")
    x, t = (keep(x), keep(t)) if copied else (x, t)
    shard = _shard(given, x, t, state.end)
    own = shard.columns
    blocks = tuple(((cross(own, own, group, symmetric=True),),) if shard.n else () for group in given.groups)
    return _merge(given, state, GgnState(blocks, (shard,), state.end, state.end + x.shape[0]))


@guarded
def _merge(given: Options, a: GgnState, b: GgnState) -> GgnState:
    if not a.shards or not b.shards:
        return b if not a.shards else a
    if a.end != b.first:
        raise ValueError(
            f"The first state ends before sample {a.end}, the second begins with {b.first}: start a process that does "
            "not begin with the first sample by reducer.init(first), and merge states in their order."
        )
    before, after = ([shard.columns for shard in state.shards if shard.n] for state in (a, b))
    blocks = []
    for group, rows_a, rows_b in zip(given.groups, a.blocks, b.blocks, strict=True):
        # Below the blocks of a come those of b, each preceded by its products with all shards of a.
        below = ((*(cross(v, w, group) for w in before), *row) for v, row in zip(after, rows_b, strict=True))
        blocks.append(rows_a + tuple(below))
    return GgnState(tuple(blocks), a.shards + b.shards, a.first, b.end)


@guarded
def _finalise(given: Options, state: GgnState) -> Ggn:
    if not state.shards:
        raise ValueError("There was no batch: the GGN of no data. Is batches= an iterator that was used up before?")
    check_seen("subsampling", given.subsampling, state.first, state.end)
    check_seen("subsampling_gradient", given.subsampling_gradient, state.first, state.end)
    grams = tuple(assemble(blocks) for blocks in state.blocks)
    if given.throw:
        refuse_non_finite_samples(grams[0], state.shards)
    n, n_gradient = (
        sum(counts) for counts in zip(*((s.divisor, s.divisor_gradient) for s in state.shards), strict=True)
    )
    sloped = any(shard.n_gradient for shard in state.shards)
    return Ggn(given, grams, state.shards, given.chain.scale(n), given.chain.scale(n_gradient if sloped else 1))


def refuse_non_finite_samples(gram: Array, shards: tuple[Shard, ...]) -> None:
    """Raise, naming the samples whose columns are not finite, which shows on the diagonal of the Gram matrix."""
    xp = array_api_compat.array_namespace(gram)
    # Column norms are on the diagonal: NaN or infinity there names the sample.
    diagonal = xp.linalg.diagonal(gram)
    if not is_true(xp.any(~xp.isfinite(diagonal))):
        return
    bad, before = [], 0
    for shard, place in placed(shards):
        flags = xp.any(~xp.isfinite(xp.reshape(diagonal[place], (shard.m, shard.n))), axis=0)
        bad += [before + i for i in range(shard.n) if is_true(flags[i])]
        before += shard.n
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
    shard = Shard()
    if curved != []:
        y, targets, loss, back = _forward(given, x, t, curved)
        factors = _factors(given, loss, y, targets, curved, start, x.shape[0])
        (m, n), xp = factors.shape[:2], array_api_compat.array_namespace(y)
        if curved == sloped:
            # The gradient is one more factor of the same samples: one pass for both.
            both = back(xp.concat([factors, loss.gradient(y, targets)[None, ...]], axis=0))
            columns, gradient = (tuple(c.part(part) for c in both) for part in (slice(0, m), slice(m, m + 1)))
            return Shard(columns, gradient, m, n, n, *2 * (count(loss, y, targets),))
        shard = Shard(back(factors), (), m, n, divisor=count(loss, y, targets))
    if sloped != []:
        y, targets, loss, back = _forward(given, x, t, sloped)
        gradient = back(loss.gradient(y, targets)[None, ...])
        shard = shard._replace(gradient=gradient, n_gradient=y.shape[0], divisor_gradient=count(loss, y, targets))
    return shard


def _forward(
    given: Options, x: Array, t: Array, chosen: list[int] | None
) -> tuple[Array, Array, Loss, Callable[[Array], tuple[Columns, ...]]]:
    """Return outputs, targets and loss of the chosen samples, and the function from cotangents to columns."""
    t = rows(t, chosen)
    y, loss, back = given.chain.linearised(rows(x, chosen))
    bad = bad_targets(loss, "sum", y, t, given.throw)
    return y, t, loss, lambda y_bar: back(marked(y_bar, bad))


def _factors(given: Options, loss: Loss, y: Array, t: Array, chosen: list[int] | None, start: int, n: int) -> Array:
    """Return the columns of S_n, ``(M, N, C)``, or random combinations of them; n samples from `start` were given."""
    xp = array_api_compat.array_namespace(y)
    s = loss.hessian_sqrt(y, t)  # (N, C, r)
    r, m = s.shape[-1], given.mc_samples
    if r == 0:
        raise ValueError(
            f"The loss of C = {y.shape[-1]} output(s) has no curvature: the square root of its Hessian has no column. "
            'A cross-entropy of one output is constant: for two classes end with two outputs, or take loss="bce".'
        )
    if m is None:
        return xp.moveaxis(s, -1, 0)
    # Random signs mix the r columns of S_n into m, whose products have the same expectation.
    epsilon = rows(signs(given.seed, m, start, n, r, y), chosen)  # (N, m, r)
    return xp.moveaxis(epsilon @ xp.matrix_transpose(s), 1, 0) / math.sqrt(m)


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


def cross(v: tuple[Columns, ...], w: tuple[Columns, ...], group: tuple[int, ...], symmetric: bool = False) -> Array:
    """Return ``VᵀW`` summed over the layers of a group, exactly symmetric if `symmetric` says that w is v."""
    dense, parts = [], []
    for (a, local), (b, _) in zip(choices(v, group), choices(w, group), strict=True):
        if isinstance(a, AffineColumns) and isinstance(b, AffineColumns) and a.is_dense:
            dense.append(a.factors(b, local))
        else:
            part = a.cross(b, local)
            parts.append(hermitian_part(part) if symmetric else part)
    # All dense layers together: one pass over the Gram matrix.
    return reduce(add, [hadamard_gram(dense, symmetric), *parts] if dense else parts)


def placed(shards: tuple[Shard, ...]) -> Iterator[tuple[Shard, slice]]:
    """Yield each shard that has columns, and their places among those of all shards."""
    start = 0
    for shard in shards:
        if shard.n:
            end = start + shard.m * shard.n
            yield shard, slice(start, end)
            start = end


def combined(group: tuple[int, ...], parts: Iterable[tuple[tuple[Columns, ...], Array]]) -> list[Array]:
    """Return ``Σ V c`` over shards with coefficients ``(k, M, N)``: ``(k, *shape)`` for each parameter of the group."""
    total: list[Array] = []
    for shard, c in parts:
        vectors = [v for columns, local in choices(shard, group) for v in columns.apply(c, local)]
        total = [a + b for a, b in zip(total, vectors, strict=True)] if total else vectors
    return total


def apply(ggn: Ggn, group: tuple[int, ...], c: Array) -> list[Array]:
    """Return ``V c`` of coefficients ``(n, k)``: one array ``(k, *shape)`` for each parameter of the group."""
    xp = array_api_compat.array_namespace(c)
    c = xp.matrix_transpose(c)
    parts = ((v.columns, xp.reshape(c[:, place], (c.shape[0], v.m, v.n))) for v, place in placed(ggn.shards))
    return combined(group, parts)


def adjoint(ggn: Ggn, group: tuple[int, ...], vectors: list[Array]) -> Array:
    """Return ``Vᵀ v``, ``(n, k)``, of arrays ``(k, *shape)``, one for each parameter of the group."""
    xp = array_api_compat.array_namespace(vectors[0])
    parts = []
    for shard, _ in placed(ggn.shards):
        own = iter(vectors)
        pairs = choices(shard.columns, group)
        c = reduce(add, (columns.adjoint([next(own) for _ in local], local) for columns, local in pairs))
        parts.append(xp.matrix_transpose(xp.reshape(c, (vectors[0].shape[0], shard.m * shard.n))))
    return xp.concat(parts, axis=0)
