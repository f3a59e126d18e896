"""A factorisation that its user holds on to: solves refined with exact products, determinant, inertia."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, double, full, is_true, quiet
from ddnref._core.noise import noise
from ddnref._kernels.dense import eigvalsh
from ddnref._kernels.public import public
from ddnref.curvature.hessian import _choice as _paths
from ddnref.curvature.hessian import _inertia
from ddnref.curvature.hessian._choice import Path
from ddnref.curvature.hessian._dense_blocks import space, t
from ddnref.curvature.hessian._expansion import Blocks, combine, norm
from ddnref.curvature.hessian._network import System
from ddnref.curvature.hessian._result import (
    HessianSolveInfo,
    Result,
    better_of,
    chosen,
    described,
    goal,
    precision,
    raise_failed,
)
from ddnref.errors import NonFiniteError
from ddnref.networks._checks import like_params

REFINEMENTS = 8
NORM_PRODUCTS = 2
ZERO = 3e-10
"""Eigenvalues of H + εI below this, relative to ‖H‖, count as zero."""
BACKWARD = 1e-11
"""Largest backward error, relative to ‖H‖, at which an elimination's pivots are trusted: well below `ZERO`."""


class Inertia(NamedTuple):
    """Signs of the eigenvalues of H + εI."""

    negative: int
    zero: int
    """Those within 3e-10 ‖H‖ of zero."""
    positive: int


class HessianFactor:
    """``H + εI`` of a network's loss, factored; made by `hessian_factor`.

    Of the weights, data and damping it was made with, which it copied: after a change in place, make another.

    Attributes
    ----------
    damping : float or array without axes
        ε.
    path : str
        The factorisation that is tried first: "tridiagonal", "riccati", "qr" or "dense".
    total : int
        Parameters of the network.
    flops, nbytes : float
        What that factorisation takes and holds, estimated from the shapes.
    counted_by : str
        The factorisation whose pivots `inertia` counts.
    norm : array without axes
        ``‖H‖₂``, a lower estimate from two products.
    rtol : float
        Largest backward error of a solution that counts as converged: 1e-15 in double precision (5e-7 where only
        single precision is to be had) up to 20 layers, growing as the square root of their number beyond.
    """

    def __init__(self, s: System, damping: Array | float, method: str, like: Array, params: Sequence[Array]) -> None:
        self._system, self.damping, self._like, self._params = s, damping, like, list(params)
        self._order = _paths.order(s, method, damping)
        self._built: dict[str, Path] = {}
        self._norm: Array | None = None
        self._w: Array | None = None
        self._path(self._order[0])

    def __repr__(self) -> str:
        return f"HessianFactor({self.total} parameters, {self.path}, damping={self.damping})"

    @property
    def path(self) -> str:
        """The factorisation tried first."""
        return self._order[0]

    @property
    def total(self) -> int:
        """Parameters of the network."""
        return self._system.total

    @property
    def flops(self) -> float:
        """Estimated floating-point operations of the factorisation."""
        return _paths.cost(self.path, self._system).flops

    @property
    def nbytes(self) -> float:
        """Estimated bytes that the factorisation holds."""
        return _paths.cost(self.path, self._system).numbers * 8

    @property
    def rtol(self) -> float:
        """Largest backward error of a solution that counts as converged.

        1e-15 in double precision up to 20 layers; beyond them the rounding of the products by which it is measured
        grows with the square root of their number.
        """
        return 4.5 * precision(self._like) * math.sqrt(max(1.0, len(self._system.sizes) / 20))

    def _path(self, name: str) -> Path:
        if name not in self._built:
            with quiet():
                self._built[name] = _paths.build(name, self._system, self.damping, self._like)
        return self._built[name]

    # --- solve ------------------------------------------------------------------------------------------------------

    @public
    def solve(
        self, b: Sequence[Array], *, refine: str | int = "auto", throw: bool = True
    ) -> tuple[list[Array], HessianSolveInfo]:
        """``(H + εI)⁻¹ b``, refined.

        Parameters
        ----------
        b : list of arrays, shaped like the chain's parameters
            Right-hand side; several with one leading axis on every entry.
        refine : "auto" or int
            "auto" refines with exact Hessian-vector products while the backward error falls, and falls back to a
            stable factorisation where "auto" chose the method; a number takes that many steps and no other path.
        throw : bool, default True
            Raise for a right-hand side that did not converge; with ``False`` its best solution is returned.

        Returns
        -------
        x : list of arrays like `b`
        info : HessianSolveInfo
            Its arrays have one entry for each right-hand side.

        Raises
        ------
        ConvergenceError
            A backward error above `rtol`.
        SingularError
            ``H + εI`` is singular to working precision.
        NonFiniteError
            `b` is not finite.
        TypeError, ValueError
            `b` is not shaped like the parameters, of another dtype or library; `refine` is neither.

        Notes
        -----
        Cost: ``4 p`` flops and a product for each step, p the parameters, and ``O(L (N a)²)``. A right-hand side that
        is zero gives exact zeros.
        """
        self.check("b", b, finite=throw)
        if refine != "auto" and not (isinstance(refine, int) and refine >= 0):
            raise ValueError(f'refine is {refine!r}, expected "auto" or a number of steps.')
        single = b[0].ndim == self._params[0].ndim
        g = self._system.blocks([entry[None, ...] for entry in b] if single else b)
        xp = space(g[0])
        result = self._best(g, refine)
        info = described(result, self.norm + abs(self.damping), self.rtol)
        if throw and not is_true(xp.all(info.converged)):
            raise_failed(info, self.rtol)
        x = self._system.params(result.x)
        if single:
            x = [entry[0, ...] for entry in x]
            info = info._replace(
                converged=info.converged[0], n_iter=info.n_iter[0], residual_norm=info.residual_norm[0],
                backward_error=info.backward_error[0], amplification=info.amplification[0],
            )  # fmt: skip
        return x, info

    def _best(self, g: Blocks, refine: str | int) -> Result:
        """By the first path, then by the stable ones while the backward error is too large."""
        xp = space(g[0])
        result = self._refined(self.path, g, refine)
        for name in self._order[1:] if refine == "auto" else ():
            if is_true(xp.all(result.error <= self.rtol)):
                break
            result = better_of(result, self._refined(name, g, refine))
        return result

    def _refined(self, name: str, g: Blocks, refine: str | int) -> Result:
        """``x ← x + (H + εI)⁻¹ r`` with exact residuals r, while the backward error falls."""
        with quiet():
            return self._refined_quietly(self._path(name), g, refine)

    def _refined_quietly(self, path: Path, g: Blocks, refine: str | int) -> Result:
        xp = space(g[0])
        size_g = norm(g)
        state = self._measured(path.solve(g), g, size_g, path.name)
        limit = REFINEMENTS if refine == "auto" else int(refine)
        for _ in range(limit):
            if refine == "auto" and is_true(xp.all(state.error <= goal(self._like))):
                break
            change = path.solve(state.r)
            new = self._measured(combine(state.x, 1.0, change), g, size_g, path.name)
            fallen = new.error < state.error
            new = new._replace(steps=state.steps + 1)
            halved = xp.any(new.error < state.error / 2)
            all_fallen = refine == "auto" and is_true(xp.all(fallen))  # the rule, and no pass over memory to choose
            state = new if all_fallen else chosen(fallen, new, state)
            if refine == "auto" and not is_true(halved):
                break
        return state

    def _measured(self, x: Blocks, g: Blocks, size_g: Array, name: str) -> Result:
        xp = space(g[0])
        hx = combine(self._system.product(x), self._epsilon, x)
        r = [a - b for a, b in zip(g, hx, strict=True)]
        size_x, size_r = norm(x), norm(r)
        size = self.norm * size_x + size_g
        error = size_r / xp.where(size > 0, size, xp.ones_like(size))
        error = xp.where(xp.isfinite(error), error, full((), float("inf"), error))
        steps = xp.zeros(error.shape, dtype=xp.int32, device=array_api_compat.device(error))
        return Result(x, r, (size_x, size_r, size_g), error, steps, name)

    @property
    def _epsilon(self) -> Array | float:
        """ε as `combine` takes it."""
        return self.damping if isinstance(self.damping, float) else self.damping[None]

    @property
    def norm(self) -> Array:
        """``‖H‖₂``, a lower estimate from a few products."""
        if self._norm is None:
            xp = space(self._like)
            v = self._start()
            size = norm(v)
            for _ in range(NORM_PRODUCTS):
                v, before = self._system.product(v), size
                size = norm(v)
                self._norm = (size / xp.where(before > 0, before, xp.ones_like(before)))[0]
        return self._norm

    def _start(self) -> Blocks:
        """Noise and the gradient, which leans towards the largest eigenvectors."""
        v = self._system.split(noise(0, self.total, self._like)[None, :])
        if self._system.terms is None:
            return v
        gradient = [(t(layer.beta) @ layer.z)[None, :, :] for layer in self._system.terms.layers]
        size = norm(gradient)
        return combine(v, 1 / space(size).where(size > 0, size, space(size).ones_like(size)), gradient)

    def inverse(self, g: Blocks) -> Blocks:
        """``(H + εI)⁻¹`` of blocks, refined as `solve` does, whatever came of it."""
        return self._best(g, "auto").x

    def check(self, name: str, v: Sequence[Array], finite: bool = False) -> None:
        """Raise unless `v` is a list like the chain's parameters, with or without one leading axis."""
        like_params(name, list(v), self._params, leading=True)
        xp = space(v[0])
        if finite and not is_true(xp.all(xp.stack([xp.all(xp.isfinite(entry)) for entry in v]))):
            raise NonFiniteError(f"{name} contains NaN or infinity. Pass throw=False to get the other solutions.")

    def paired(self, u: Sequence[Array], v: Sequence[Array]) -> Array:
        """``Σ ⟨u, v⟩`` over all vectors, in the dtype of the parameters."""
        xp = space(u[0])
        total = xp.sum(xp.stack([xp.sum(double(xp, a) * double(xp, b)) for a, b in zip(u, v, strict=True)]))
        return xp.astype(total, u[0].dtype, copy=False)

    # --- determinant and inertia ------------------------------------------------------------------------------------

    @public
    def slogdet(self) -> tuple[Array, Array]:
        """Sign and ``log|det(H + εI)|``.

        Returns
        -------
        sign, log : arrays without axes
            In double precision where the library has it. From the factorisation that solved a random system to 1e-11,
            or a stable one. No solver knows it better than ``eps Σ ‖H‖ / |λ|`` over the eigenvalues of ``H + εI``.
        """
        return self._path(self._trusted(SLOGDET)).slogdet()

    @public
    def inertia(self) -> Inertia:
        """Counts of negative, zero and positive eigenvalues of H + εI.

        Returns
        -------
        Inertia
            Three integers. Zero are those within 3e-10 ‖H‖ of it: counts are taken at both ends of that interval, from
            the pivots of an elimination that has solved a random system well, else from blocks with delayed pivots
            (see the page on the Hessian).
        """
        width, damping, name = ZERO * float(self.norm), float(self.damping), self.counted_by
        below, not_above = (self._negative(name, damping + shift) for shift in (width, -width))
        return Inertia(below, not_above - below, self.total - not_above)

    @property
    def counted_by(self) -> str:
        """The factorisation whose pivots are counted."""
        name = self._trusted(COUNT)
        if name in STABLE or abs(float(self.damping)) >= LEAST * float(self.norm):
            return name
        return next((stable for stable in self._order if stable in STABLE), "qr")

    def _negative(self, name: str, damping: float) -> int:
        if name == "dense":
            return _inertia.below(self._spectrum(), -damping)
        with quiet():
            return _paths.count_negative(name, self._system, damping)

    def _spectrum(self) -> Array:
        self._w = eigvalsh(self._path("dense").saved) if self._w is None else self._w
        return self._w

    def _trusted(self, rtol: float) -> str:
        """The first path that is stable by construction, or whose unrefined solution is right to `rtol`."""
        xp = space(self._like)
        g = self._system.split(noise(1, self.total, self._like)[None, :])
        for name in self._order:
            if name in STABLE:
                return name
            path = self._path(name)
            with quiet():
                x = path.solve(g)
                found = self._measured(x, g, norm(g), name)
                size_x, size_r, _ = found.sizes
                size = BACKWARD * (self.norm + abs(self.damping)) * size_x
                small = (size_r <= size) & (norm(path.solve(found.r)) <= rtol * size_x)
            if is_true(xp.all(small)):
                return name
        return "qr"


STABLE = ("qr", "dense")
LEAST = 1e-5
"""Smallest damping, relative to ‖H‖, at which the fast forms count: they divide by it, and an error of eps ‖H‖²/ε in
what they leave of the Hessian must stay well below `ZERO`."""
SLOGDET = 1e-11
COUNT = 1e-3
