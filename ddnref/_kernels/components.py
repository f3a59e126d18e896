"""Connected components of graphs that are given by their edges as a dense array of flags."""

from __future__ import annotations

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array


def components(edges: Array) -> Array:
    """Return a number for each vertex that is the same for all vertices of its component.

    `edges` is ``(..., m, m)``, symmetric flags. The number, ``(..., m)`` int32, is that of one vertex of the component.
    NumPy arrays are searched item by item; for all others the matrix of what is reachable is squared ``log₂ m`` times,
    which reads nothing on the host.
    """
    xp = array_api_compat.array_namespace(edges)
    m = edges.shape[-1]
    i = xp.arange(m, dtype=xp.int32, device=array_api_compat.device(edges))
    if array_api_compat.is_numpy_array(edges):
        labels = np.zeros(edges.shape[:-1], dtype=np.int32)
        # Most graphs of a batch of small plans have every edge.
        for item in map(tuple, np.argwhere(~edges.all(axis=(-2, -1)))):
            if not _is_connected(edges[item]):
                from scipy.sparse import csr_array
                from scipy.sparse.csgraph import connected_components

                kinds = connected_components(csr_array(edges[item]), directed=False)[1]
                labels[item] = np.unique(kinds, return_index=True)[1][kinds]  # the first vertex of each component
        return labels
    # The flags as numbers, because the standard multiplies no matrices of flags.
    reach = xp.astype(edges | (i[:, None] == i), xp.float32)
    for _ in range((m - 1).bit_length()):
        reach = xp.astype(reach @ reach > 0, xp.float32)
    return xp.min(xp.where(reach > 0, i, xp.full_like(i, m)), axis=-1)


def _is_connected(edges: Array) -> bool:
    """Whether all vertices of one graph can be reached from the first, without the sparse matrix that SciPy needs."""
    reached = np.zeros(len(edges), dtype=bool)
    new = reached.copy()
    new[0] = True
    while new.any():
        reached |= new
        new = edges[new].any(axis=0) & ~reached
    return bool(reached.all())
