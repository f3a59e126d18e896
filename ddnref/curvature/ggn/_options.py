"""Options of the GGN functions: parameter groups, samples and Monte-Carlo signs, with their checks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array
from ddnref.curvature.ggn._network import Network, network_of


class Options(NamedTuple):
    """The data and options from which Gram matrices are computed."""

    chain: Network
    groups: tuple[tuple[int, ...], ...]
    grouped: bool  # whether the caller named groups, and gets a tuple of results
    subsampling: tuple[int, ...] | None
    subsampling_gradient: tuple[int, ...] | None
    mc_samples: int | None
    seed: int
    gradient: bool  # whether the gradients of the samples are wanted too
    throw: bool


def options(
    chain: Any, groups: Any, subsampling: Any, subsampling_gradient: Any, mc_samples: int | None, seed: int,
    gradient: bool, throw: bool,
) -> Options:  # fmt: skip
    """Check the options and gather them."""
    network = network_of(chain)
    return Options(
        network,
        _groups(groups, len(network.params), network.names),
        groups is not None,
        _indices("subsampling", subsampling),
        _indices("subsampling_gradient", subsampling_gradient),
        mc_samples,
        operator.index(seed),
        gradient,
        throw,
    )


def _groups(
    groups: Sequence[Sequence[int | str]] | None, n: int, names: tuple[str, ...] | None
) -> tuple[tuple[int, ...], ...]:
    if groups is None:
        return (tuple(range(n)),)
    if not groups:
        raise ValueError("groups is empty: name at least one list of positions in chain.params, or pass None.")
    # Each parameter may belong to one group.
    named: dict[int, int] = {}
    chosen = []
    for i, group in enumerate(groups):
        if isinstance(group, (int, str, np.integer)) or not hasattr(group, "__iter__"):
            raise TypeError(f"groups[{i}] is {group!r}, expected a list of positions in chain.params.")
        positions = tuple(sorted(_position(i, p, n, names) for p in group))
        if not positions:
            raise ValueError(f"groups[{i}] has no parameters. Leave it out. A parameter in no group stays as it is.")
        for p in positions:
            if p in named:
                raise ValueError(
                    f"groups[{i}] and groups[{named[p]}] overlap in parameter {p}: the blocks of a block-diagonal "
                    "matrix share none."
                )
            named[p] = i
        chosen.append(positions)
    return tuple(chosen)


def _position(i: int, p: Any, n: int, names: tuple[str, ...] | None) -> int:
    if isinstance(p, str) and names is not None:
        if p not in names:
            raise ValueError(
                f"groups[{i}] names the parameter {p!r}, which the module does not train. Its parameters are "
                f"{', '.join(names)}."
            )
        return names.index(p)
    try:
        position = operator.index(p)
    except TypeError:
        raise TypeError(
            f"groups[{i}] contains {type(p).__name__}, expected positions in chain.params, integers."
        ) from None
    if not 0 <= position < n:
        raise ValueError(
            f"groups[{i}] names parameter {position}, but chain.params has {n}, counted from 0. Parameters of a Frozen "
            "layer are constants and not among them."
        )
    return position


def _indices(name: str, indices: Iterable[int] | None) -> tuple[int, ...] | None:
    if indices is None:
        return None
    given = tuple(operator.index(i) for i in indices)
    if not given:
        raise ValueError(f"{name} is empty: name at least one sample, or pass None for all.")
    if min(given) < 0:
        raise ValueError(f"{name} contains {min(given)}: samples are counted from 0, across all batches.")
    if len(set(given)) < len(given):
        repeated = next(i for i in given if given.count(i) > 1)
        raise ValueError(f"{name} names sample {repeated} twice: it would count twice in the mean. Name it once.")
    return given


def check_seen(name: str, indices: tuple[int, ...] | None, first: int, end: int) -> None:
    """Raise for named samples that never came; samples `first` to `end` did."""
    if indices is not None and max(indices) >= end:
        raise ValueError(f"{name} names sample {max(indices)}, but there are {end - first}, counted from {first}.")


def chosen_here(indices: tuple[int, ...] | None, start: int, n: int) -> list[int] | None:
    """Return the positions of chosen samples among the n that begin at `start`; ``None`` for all."""
    if indices is None:
        return None
    return [i - start for i in sorted(indices) if start <= i < start + n]


def rows(x: Array, positions: list[int] | None) -> Array:
    """Return the samples at some positions."""
    if positions is None:
        return x
    xp = array_api_compat.array_namespace(x)
    return xp.take(x, xp.asarray(positions, dtype=xp.int32, device=array_api_compat.device(x)), axis=0)


def signs(seed: int, m: int, start: int, n: int, r: int, like: Array) -> Array:
    """Draw random signs ``(n, m, r)`` that depend on the seed and on the number of each sample alone, not on shards."""
    # Skip the numbers of all samples before this shard.
    generator = np.random.PCG64(seed)
    generator.advance(start * m * r)
    drawn = np.random.Generator(generator).random((n, m, r))  # one step of the generator each
    xp = array_api_compat.array_namespace(like)
    return xp.asarray(np.where(drawn < 0.5, -1.0, 1.0), dtype=like.dtype, device=array_api_compat.device(like))
