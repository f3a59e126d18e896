r"""The whole spectrum of a network's Hessian, from the subspace that holds all eigenvectors but those of zero.

A layer's block of ``H V`` is ``σᵀ z + βᵀ dz``: its rows lie in the span of the inputs, or its columns in that of β. So
H lives on the span of

    { u qᵀ : q in range(zᵀ) }  and  { b pᵀ : b in range(βᵀ), p ⟂ range(zᵀ) }     for every layer,

and is zero on what is left, which is most of the space with few samples. With an orthonormal basis B of the span,
``BᵀHB`` has all other eigenvalues. The orthonormal bases of both ranges come from singular value decompositions.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array, Namespace, eps, full, namespace_of
from ddnref._kernels.dense import eigh, hermitian_part, identity
from ddnref.curvature.hessian._expansion import Blocks, Layer, NetworkHessian, flat, unflat

WIDE = 4096  # inputs or outputs of a layer from which its bases, square matrices, are not formed
CHUNK = 2**22  # numbers in the vectors of one product


class Part(NamedTuple):
    """Orthonormal bases of one layer's inputs and of its β, and of their complements."""

    z: Array  # (ã, r)
    z_rest: Array  # (ã, ã − r)
    b: Array  # (o, q)
    b_rest: Array  # (o, o − q)

    @property
    def sizes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the two coordinate arrays."""
        return (
            (int(self.b.shape[0]), int(self.z.shape[1])),
            (int(self.b.shape[1]), int(self.z_rest.shape[1])),
        )


class Subspace(NamedTuple):
    """Coordinates in which the Hessian is small."""

    hessian: NetworkHessian
    parts: list[Part] | None  # ``None`` where the whole space is taken
    d: int

    @property
    def null(self) -> int:
        """Dimensions outside, where the Hessian is zero."""
        return self.hessian.total - self.d

    def rows(self, c: Array) -> Array:
        """Vectors of all parameters ``(k, p)`` from coordinates ``(k, d)``."""
        if self.parts is None:
            return c
        shapes = [size for part in self.parts for size in part.sizes]
        pieces, found = iter(unflat(c, shapes)), []
        for part in self.parts:
            u, v = next(pieces), next(pieces)
            found.append(u @ part.z.mT + part.b @ v @ part.z_rest.mT)
        return flat(found)

    def coordinates(self, v: Blocks) -> Array:
        """Coordinates ``(k, d)`` of vectors of all parameters: the transpose of `rows`."""
        if self.parts is None:
            return flat(v)
        found = []
        for part, block in zip(self.parts, v, strict=True):
            found += [block @ part.z, part.b.mT @ block @ part.z_rest]
        return flat(found)

    def matrix(self) -> Array:
        """Return ``BᵀHB`` by products with all basis vectors, a few at a time."""
        h, eye = self.hessian, identity(self.d, self.hessian.like)
        xp, width = namespace_of(h.like), max(1, CHUNK // h.total)
        parts = (self.rows(eye[i : min(i + width, self.d), :]) for i in range(0, self.d, width))
        return hermitian_part(xp.concat([self.coordinates(h.product(h.from_rows(part))) for part in parts]))

    def null_rows(self, first: int, last: int) -> Array:
        """Orthonormal vectors with the eigenvalue zero, numbers `first` to `last` of those outside the subspace."""
        xp, found, start = namespace_of(self.hessian.like), [], 0
        for i, part in enumerate(self.parts or []):
            # Number every pair of a direction that β does not see and one that no input sees.
            wide = int(part.z_rest.shape[1])
            count = int(part.b_rest.shape[1]) * wide
            for j in range(max(first, start), min(last, start + count)):
                a, b = divmod(j - start, wide)
                blocks = [full((1, *shape), 0.0, self.hessian.like) for shape in self.hessian.shapes]
                blocks[i] = (part.b_rest[:, a, None] * part.z_rest[None, :, b])[None, ...]
                found.append(flat(blocks))
            start += count
        return xp.concat(found) if found else full((0, self.hessian.total), 0.0, self.hessian.like)


def subspace_of(hessian: NetworkHessian, limit: int) -> Subspace | None:
    """Return the subspace if it has at most `limit` dimensions; reads the ranks of all layers on the host."""
    xp = namespace_of(hessian.like)
    if hessian.total <= limit and (hessian.expansion is None or hessian.total <= 64):
        return Subspace(hessian, None, hessian.total)  # nothing to save, or nothing known
    if hessian.expansion is None:
        return None
    if max(max(shape) for shape in hessian.shapes) > WIDE:
        return None
    parts, d = [], 0
    for layer in hessian.expansion.layers:
        parts.append(_part(xp, layer))
        d += sum(a * b for a, b in parts[-1].sizes)
        if d > limit:
            return None
    return Subspace(hessian, parts, d)


def _part(xp: Namespace, layer: Layer) -> Part:
    z, z_rest = _range(xp, layer.z)
    return Part(z, z_rest, *_range(xp, layer.beta))


def _range(xp: Namespace, rows: Array) -> tuple[Array, Array]:
    """Orthonormal bases of the span of rows ``(N, a)``, and of its complement.

    Too high a rank costs time alone, and what is left out is rounding of H.
    """
    if rows.shape[0] > rows.shape[1]:
        rows = xp.linalg.qr(rows, mode="reduced")[1]
    _, s, v_t = xp.linalg.svd(rows, full_matrices=True)
    rank = int(xp.sum(xp.astype(s > eps(xp, s.dtype) * s[0], xp.int64)))
    return v_t[:rank, :].mT, v_t[rank:, :].mT


def spectrum(space: Subspace) -> tuple[Array, Array]:
    """Return the eigenvalues ``(d,)`` of H on the subspace, ascending, and coordinates of eigenvectors in rows."""
    w, c = eigh(space.matrix())
    return w, c.mT
