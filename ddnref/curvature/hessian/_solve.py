"""Solve with the Hessian of a network's loss, damped, in time linear in depth; its determinant, inertia, derivative."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple, NoReturn

import array_api_compat

from ddnref._core.arrays import Array, Namespace, double, eps, is_true, namespace, namespace_of, quiet
from ddnref._core.checks import check_real, check_shapes
from ddnref._core.noise import noise
from ddnref._kernels.dense import eigvalsh
from ddnref._kernels.public import public
from ddnref._kernels.singularity import HESSIAN_AMPLIFICATION
from ddnref._kernels.vectors import norm_of_pieces
from ddnref.curvature.hessian import _methods, _operator
from ddnref.curvature.hessian._active import NotDefiniteError
from ddnref.curvature.hessian._expansion import Blocks, NetworkHessian, combine, exact_copy, hessian_of
from ddnref.curvature.hessian._joint import count_below
from ddnref.errors import ConvergenceError, NonFiniteError, SingularError
from ddnref.networks._chain import Chain
from ddnref.networks._checks import like_params
from ddnref.operators import LinearOperator

REFINEMENTS = 8  # most refinement steps that "auto" takes
ZERO = 3e-10  # eigenvalues of H + εI below this, relative to ‖H‖, count as zero
# Largest backward error, relative to ‖H‖, at which an elimination's pivots are trusted: well below `ZERO`.
BACKWARD = 1e-11
# Smallest damping, relative to ‖H‖, at which the fast forms count: they divide by it, and an error of eps ‖H‖²/ε in
# what they leave of the Hessian must stay well below `ZERO`.
LEAST = 1e-5
SLOGDET = 1e-11  # largest error of a solution at which the determinant of that factorisation is trusted
COUNT = 1e-3  # largest error of a solution at which the signs of the pivots are trusted


class HessianSolveInfo(NamedTuple):
    """How a solve ended; arrays have one entry for each right-hand side."""

    converged: Array
    """(...) bool: the backward error is within `HessianFactor.rtol`, the system not singular to working precision."""
    n_iter: Array
    """(...) int32: refinement steps taken."""
    residual_norm: Array
    """(...): ``‖b − (H + εI) x‖ / ‖b‖``, from an exact product."""
    backward_error: Array
    """(...): ``‖b − (H + εI) x‖ / (‖H‖ ‖x‖ + ‖b‖)``, with a lower estimate of ‖H‖ from a few products."""
    amplification: Array
    """(...): ``(‖H‖ + |ε|) ‖x‖ / ‖b‖``, a lower bound of the condition number."""
    path: str
    """The factorisation that gave the solution."""


class Inertia(NamedTuple):
    """Signs of the eigenvalues of H + εI."""

    negative: int
    zero: int
    """Number of eigenvalues within 3e-10 ‖H‖ of zero."""
    positive: int


class _Solution(NamedTuple):
    """A solution that refinement may improve."""

    x: Blocks
    r: Blocks  # ``b − (H + εI) x``
    size_x: Array
    size_r: Array
    error: Array  # backward error
    steps: Array
    path: str


def _select(first: Array, a: _Solution, b: _Solution) -> _Solution:
    """Take `a` for the right-hand sides in `first`, `b` for the others."""
    xp, flags = namespace_of(first), first[:, None, None]
    x, r = ([xp.where(flags, p, q) for p, q in zip(u, v, strict=True)] for u, v in ((a.x, b.x), (a.r, b.r)))
    return _Solution._make([x, r, *(xp.where(first, p, q) for p, q in zip(a[2:6], b[2:6], strict=True)), a.path])


def _nonzero(xp: Namespace, size: Array) -> Array:
    """Replace zeros by ones, to divide by."""
    return xp.where(size > 0, size, xp.ones_like(size))


def _finite(xp: Namespace, ratio: Array) -> Array:
    """Replace NaN by infinity, which compares as too large."""
    return xp.where(xp.isfinite(ratio), ratio, xp.full_like(ratio, math.inf))


class HessianFactor:
    """``H + εI`` of a network's loss, factored; made by `hessian_factor`.

    It copies the weights, data and damping that it is made with: after a change in place, make another. Pickle stores
    these copies, and the factors are computed again where they are first needed.

    Attributes
    ----------
    damping : float or array without axes
        ε.
    path : str
        The factorisation that is tried first: a method, with " in float32" behind it in single precision.
    total : int
        Parameters of the network.
    flops, nbytes : float
        What that factorisation takes and holds, estimated from the shapes.
    rtol : float
        Largest backward error of a solution that counts as converged: 1e-15 in double precision (5e-7 where only
        single precision is available) up to 20 layers, growing as the square root of their number beyond.
    """

    def __init__(
        self, hessian: NetworkHessian, damping: Array | float, method: str = "auto", precision: str = "double"
    ) -> None:
        self._hessian, self.damping, self.total = hessian, damping, hessian.total
        self._xp = namespace_of(hessian.like)
        self._eps = eps(self._xp, hessian.like.dtype)
        self._options, self._order = (method, precision), _methods.order(hessian, method, damping, precision)
        # Every factorisation is built when it is first asked for.
        self._path: Callable[[str], _methods.Path] = cache(self._built)
        self.path = self._first()
        self.flops, numbers = _methods.cost(self.path, hessian)
        self.nbytes = numbers * (4 if self.path.endswith(_methods.SINGLE) else 8)
        # The rounding of the products that measure the error grows with the square root of the number of layers.
        self.rtol = 4.5 * self._eps * math.sqrt(max(1.0, len(hessian.shapes) / 20))

    def _built(self, name: str) -> _methods.Path:
        """Factor by the named path."""
        try:
            return _methods.build(name, self._hessian, self.damping)
        except NotDefiniteError as error:
            layers = len(self._hessian.shapes)
            raise SingularError(
                "H + damping·I is not positive definite: the elimination, which begins at the last layer, met a pivot "
                f"without a Cholesky factor in layer {layers - error.eliminated} of {layers}. The most likely cause is "
                "an eigenvalue of the Hessian below minus the damping. Pass a larger damping, "
                'curvature="ggn", or method="active" or "auto", which take indefinite matrices.'
            ) from None

    def _first(self) -> str:
        """Factor by the first path that can."""
        name = self._order[0]
        try:
            self._path(name)
        except SingularError:
            if not name.endswith(_methods.SINGLE):
                raise
            # What was not positive may be the rounding of float32.
            self._order = self._order[1:]
            return self._first()
        return name

    def __repr__(self) -> str:
        shapes = list(dict.fromkeys(tuple(p.shape) for p in self._hessian.weights))
        arrays = ", ".join(map(str, shapes[:4])) + (", …" if len(shapes) > 4 else "")
        return (
            f"HessianFactor({self.total} parameters in {len(self._hessian.weights)} arrays {arrays}, "
            f"{self._hessian.weights[0].dtype}; {self.path}, damping={float(self.damping)})"
        )

    def __reduce__(self) -> Any:
        return _factored_again, (*self._hessian.given(), self.damping, *self._options)

    @cached_property
    def norm(self) -> Array:
        """``‖H‖₂``, a lower estimate from two products."""
        xp, h = self._xp, self._hessian
        # Start from noise and the gradient, which leans towards the largest eigenvectors.
        v = h.from_rows(noise(0, self.total, h.like)[None, :])
        if h.expansion is not None:
            gradient = [(layer.beta.mT @ layer.z)[None, :, :] for layer in h.expansion.layers]
            v = combine(v, 1 / _nonzero(xp, norm_of_pieces(gradient, 2)), gradient)
        # Two steps of the power method.
        v = h.product(v)
        size, after = norm_of_pieces(v, 2), norm_of_pieces(h.product(v), 2)
        return (after / _nonzero(xp, size))[0]

    @public
    def solve(
        self, b: Sequence[Array], *, refine: str | int = "auto", throw: bool = True
    ) -> tuple[list[Array], HessianSolveInfo]:
        """Solve as `hessian_solve` does, with the same parameters, results and errors, but without factoring again."""
        # Validate, and convert to blocks in double precision with one leading axis.
        self.check("b", b, finite=throw)
        if refine != "auto" and not (isinstance(refine, int) and refine >= 0):
            raise ValueError(f'refine is {refine!r}, expected "auto" or a number of steps.')
        single = b[0].ndim == self._hessian.weights[0].ndim
        g = self._hessian.blocks([entry[None, ...] for entry in b] if single else b)
        # Solve and refine, then judge by the backward error and by how much the right-hand side is amplified.
        size_g = norm_of_pieces(g, 2)
        found, safe = self._best(g, size_g, refine), _nonzero(self._xp, size_g)
        amplification = _finite(self._xp, (self.norm + abs(self.damping)) * found.size_x / safe)
        good = (found.error <= self.rtol) & (amplification < HESSIAN_AMPLIFICATION / self._eps)
        info = HessianSolveInfo(good, found.steps, found.size_r / safe, found.error, amplification, found.path)
        if throw and not is_true(self._xp.all(info.converged)):
            _raise_failed(info, self.rtol, self._eps)
        x = self._hessian.params(found.x)
        if single:
            x = [entry[0, ...] for entry in x]
            info = HessianSolveInfo._make([*(array[0] for array in info[:5]), info.path])
        return x, info

    def inverse(self, g: Blocks) -> Blocks:
        """Return ``(H + εI)⁻¹`` of blocks, refined as `solve` does, whether converged or not."""
        return self.solved(g).x

    def solved(self, g: Blocks) -> _Solution:
        """Return the solution that `inverse` returns with its residual and its backward error."""
        return self._best(g, norm_of_pieces(g, 2), "auto")

    def as_operator(self, *, inverse: bool = False) -> LinearOperator:
        """Return ``H + εI``, or its inverse, as a self-adjoint operator on vectors ``(..., p)`` of all p parameters.

        A vector holds the arrays of the chain's parameters one after the other, as `Chain.flatten` joins them, in their
        dtype. The inverse is refined as `solve` does, whether converged or not: pass it to `eigsh` for
        eigenvalues near −ε, or to a solver as a preconditioner. There is no gradient with respect to the parameters.

        Examples
        --------
        >>> import numpy as np
        >>> chain = ddnref.networks.Chain.mlp(8, 8, 3, 10)
        >>> x, t = np.ones((1, 8)), np.asarray([2])
        >>> factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1)
        >>> v = np.ones(factor.total)
        >>> a = factor.as_operator()
        >>> bool(np.allclose(a(factor.as_operator(inverse=True)(v)), v))
        True
        """
        return _operator.operator(self, inverse)

    def product(self, v: Blocks) -> Blocks:
        """Return ``(H + εI) v`` of blocks, by an exact product."""
        epsilon = self.damping if isinstance(self.damping, float) else self.damping[None]
        return combine(self._hessian.product(v), epsilon, v)

    def _best(self, g: Blocks, size_g: Array, refine: str | int) -> _Solution:
        """Solve by the first path, then by the stable ones while the backward error is too large."""
        xp = self._xp
        found = self._refined(self.path, g, size_g, refine)
        for name in self._order[1:] if refine == "auto" else ():
            if is_true(xp.all(found.error <= self.rtol)):
                break
            # Of two solutions keep the one with the smaller backward error; the new path is named if it gave any.
            new = self._refined(name, g, size_g, refine)
            better = new.error < found.error
            path = name if is_true(xp.any(better)) else found.path
            found = _select(better, new, found)._replace(path=path)
        return found

    def _refined(self, name: str, g: Blocks, size_g: Array, refine: str | int) -> _Solution:
        """Repeat ``x ← x + (H + εI)⁻¹ r`` with exact residuals r while the backward error falls."""
        xp, path = self._xp, self._path(name)
        state = self._measured(path.solve(g), g, size_g, name)
        auto = refine == "auto"
        for _ in range(REFINEMENTS if auto else int(refine)):
            if auto and is_true(xp.all(state.error <= 4 * self._eps)):
                break
            new = self._measured(combine(state.x, 1.0, path.solve(state.r)), g, size_g, name)
            new = new._replace(steps=state.steps + 1)
            fallen, halved = new.error < state.error, xp.any(new.error < state.error / 2)
            # Usually all errors have fallen, and no pass over memory is needed to choose.
            state = new if auto and is_true(xp.all(fallen)) else _select(fallen, new, state)
            if auto and not is_true(halved):
                break
        return state

    def _measured(self, x: Blocks, g: Blocks, size_g: Array, path: str) -> _Solution:
        """Measure the backward error of a solution by an exact product."""
        xp = self._xp
        hx = self.product(x)
        # ‖r‖ / (‖H‖ ‖x‖ + ‖g‖) with r = g − (H + εI) x; infinite where anything is not finite
        r = [a - b for a, b in zip(g, hx, strict=True)]
        size_x, size_r = norm_of_pieces(x, 2), norm_of_pieces(r, 2)
        error = _finite(xp, size_r / _nonzero(xp, self.norm * size_x + size_g))
        steps = xp.zeros(error.shape, dtype=xp.int32, device=array_api_compat.device(error))
        return _Solution(x, r, size_x, size_r, error, steps, path)

    def check(self, name: str, v: Sequence[Array], finite: bool = False) -> None:
        """Raise unless `v` is a list like the chain's parameters, with or without one leading axis."""
        like_params(name, list(v), self._hessian.weights, leading=True)
        xp = self._xp
        if finite and not is_true(xp.all(xp.stack([xp.all(xp.isfinite(entry)) for entry in v]))):
            raise NonFiniteError(f"{name} contains NaN or infinity. Pass throw=False to get the other solutions.")

    @public
    def slogdet(self) -> tuple[Array, Array]:
        """Sign and ``log|det(H + εI)|``, arrays without axes, in double precision where the library has it.

        They are those of the factorisation that solved a random system to 1e-11, or of a stable one. No solver knows
        them better than ``eps Σ ‖H‖ / |λ|`` over the eigenvalues of ``H + εI``.
        """
        return self._path(self._trusted(SLOGDET)).slogdet()

    @public
    def inertia(self) -> Inertia:
        """Counts of negative, zero and positive eigenvalues of H + εI.

        Counts are taken at both ends of the interval that counts as zero, from the pivots of an elimination that has
        solved a random system well, else from blocks with delayed pivots (see the page on the Hessian).
        """
        # Count the eigenvalues below both ends of the interval around zero.
        width, damping, name = ZERO * float(self.norm), float(self.damping), self.counted_by
        if name == "dense":
            below, not_above = (count_below(self._w, -damping - shift) for shift in (width, -width))
        else:
            shifted = (damping + width, damping - width)
            below, not_above = (_methods.count_negative(name, self._hessian, shift) for shift in shifted)
        return Inertia(below, not_above - below, self.total - not_above)

    @cached_property
    def _w(self) -> Array:
        """Eigenvalues of the dense matrix H."""
        return eigvalsh(self._path("dense").saved)

    @cached_property
    def counted_by(self) -> str:
        """The factorisation whose pivots are counted."""
        # The fast forms divide by the damping, and do not count where it is small.
        name = self._trusted(COUNT)
        if name in _methods.STABLE or abs(float(self.damping)) >= LEAST * float(self.norm):
            return name
        return next((stable for stable in self._order if stable in _methods.STABLE), "qr")

    def _trusted(self, rtol: float) -> str:
        """Return the first path that is stable by construction, or whose unrefined solution is right to `rtol`."""
        g = self._hessian.from_rows(noise(1, self.total, self._hessian.like)[None, :])
        for name in self._order:
            if name in _methods.STABLE:
                return name
            with quiet():
                path = self._path(name)
                found = self._measured(path.solve(g), g, norm_of_pieces(g, 2), name)
                # The residual says how far the factors are from the matrix; one more solve turns it into an error.
                backward = found.size_r <= BACKWARD * (self.norm + abs(self.damping)) * found.size_x
                forward = norm_of_pieces(path.solve(found.r), 2) <= rtol * found.size_x
            if is_true(self._xp.all(backward & forward)):
                return name
        return "qr"


def _raise_failed(info: HessianSolveInfo, rtol: float, eps: float) -> NoReturn:
    """Report which of the two ways of not converging it was."""
    xp = namespace_of(info.converged)
    if is_true(xp.any(info.amplification >= HESSIAN_AMPLIFICATION / eps)):
        raise SingularError(
            "H + damping·I is singular to working precision: its inverse amplifies this right-hand side by "
            f"{float(xp.max(info.amplification)):.1e}. The most likely cause is (a) a damping that is minus an "
            "eigenvalue of the Hessian, or zero where weights do not matter, or (b) a singular pivot, which methods "
            'other than "auto" and "qr" may meet. Pass another damping or method="auto", or throw=False to get the '
            "solution with its info.amplification."
        )
    raise ConvergenceError(
        f"The solution by {info.path} has backward error {float(xp.max(info.backward_error)):.1e}, above {rtol:.1e}, "
        f"after {int(xp.max(info.n_iter))} refinement steps. The most likely cause is (a) NaN in weights or data, (b) "
        'activations that explode with depth, or (c) a method that cannot take this damping. Pass method="auto" or '
        '"qr", a larger damping, or throw=False to get the solution with its info.backward_error.'
    )


@public
def hessian_factor(
    chain: Chain,
    x: Array,
    t: Array,
    /,
    *,
    damping: float | Array,
    curvature: str = "hessian",
    method: str = "auto",
    precision: str = "double",
) -> HessianFactor:
    r"""Factor ``H + damping·I``, H the Hessian of a network's loss in all its weights, in time linear in its depth.

    Parameters
    ----------
    chain : Chain
        Made of `Dense` and `Flatten` layers and `Residual` blocks of them. Other layers are taken only while the
        matrix is small enough to be formed (6000 parameters).
    x : (N, ...) array
        Samples, in the dtype of the weights.
    t : array
        Targets, as `Chain.loss` takes them.
    damping : float or array without axes
        ε: a positive number damps a Newton step, minus a number shifts the spectrum.
    curvature : {"hessian", "ggn"}
        The Hessian, or the generalised Gauss–Newton matrix.
    method : {"auto", "tridiagonal", "riccati", "active", "cholesky", "qr", "dense"}
        "tridiagonal" eliminates pre-activations, and needs a plain chain whose samples are linearly independent in
        every layer and fewer than its inputs. "riccati" eliminates weights, and takes every chain. "active" does so for
        the units alone whose activation has a slope or a curvature, half of them with ReLU. "cholesky" is the same with
        Cholesky pivots: it takes half of the flops, and raises at the first pivot that shows that the matrix is not
        positive definite. "qr" is stable for every damping, and two to fifteen times slower. "dense" forms the matrix.
        "auto" takes the fastest of all but "cholesky" by estimated time. It solves again by the cheaper of "qr" and
        "dense" where a solution's backward error stays above ``factor.rtol`` after refinement, and begins with these
        for a damping of zero.
    precision : {"double", "single"}, default "double"
        "single" factors in float32, in half of the time and memory. Solutions are refined by residuals in double
        precision to the same backward error. They are solved for again in double precision where that fails, as it
        does where the condition of ``H + damping·I`` is near 1e7. `slogdet` and `inertia` factor in double precision.
        Not with "qr" and "dense"; where "auto" takes one of these, they are in double precision.

    Returns
    -------
    HessianFactor
        With ``solve(b) -> (x, info)``, ``slogdet()`` and ``inertia()``.

    Raises
    ------
    NonFiniteError
        Weights or data are not finite.
    SingularError
        `damping` is zero and some weights have no influence: more inputs than samples. With ``method="cholesky"`` the
        matrix is not positive definite. Rounding decides where an eigenvalue is within about p eps ‖H‖ of zero, for p
        parameters, and `solve` then reports the amplification. With ``precision="single"`` the verdict is checked in
        double precision, but an eigenvalue within 1e-5 ‖H‖ below zero may go unnoticed.
    TypeError, ValueError
        Mixed libraries or dtypes, shapes that do not fit, a damping that is complex or not finite, unknown options,
        an empty batch, a layer that the sweeps do not take, tensors that require grad.

    See Also
    --------
    hessian_solve : one solve.
    hessian_eigvals : eigenvalues and eigenvectors.
    hessian_eigval_count : how many eigenvalues lie in an interval.

    Notes
    -----
    The second-order expansion of the loss is a linear-quadratic control problem: the weights of a layer steer the
    tangents of the activations. Eliminating layer by layer, from the last to the first, solves it exactly. A layer of
    N samples and width a costs ``(14/3) (N a)³`` flops where N < a (the weights' a² dimensions shrink to 2 N a), not
    a⁶; memory is ``2 (N a)²`` numbers per layer.

    Arithmetic is in float64 wherever the library has it, whatever the dtype of the weights, because the inverse at
    small damping has no digits in float32. Solutions come back in the dtype of the weights.

    References
    ----------
    .. [1] A. Rahimi, "The Hessian of tall-skinny networks is easy to invert" (2025).
    .. [2] J. C. Dunn, D. P. Bertsekas, "Efficient dynamic programming implementations of Newton's method for
       unconstrained optimal control problems", J. Optim. Theory Appl. 63 (1989).

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.mlp(8, 8, 3, 30, bias=False)
    >>> x, t = np.ones((1, 8)), np.asarray([2])
    >>> factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1)
    >>> step, info = factor.solve(chain.gradient(x, t))
    >>> bool(info.backward_error < 1e-15), factor.inertia().zero
    (True, 0)
    """
    _methods.check_method(method)
    _methods.check_precision(precision, method)
    if array_api_compat.is_array_api_obj(damping):
        namespace(damping=damping, x=x)
        check_real(damping=damping)
        check_shapes(damping=(damping, ()))
    elif not isinstance(damping, (int, float)):
        raise TypeError(f"damping is a {type(damping).__name__}, expected a number or an array without axes.")
    if not math.isfinite(damping):
        raise ValueError(f"damping is {float(damping)}, expected a finite number.")
    # Zero is refused where the Hessian is singular by its shape.
    hessian = hessian_of(chain, x, t, curvature)
    if is_true(damping == 0):
        refuse_null_space(hessian, "damping", "Pass a damping, such as 1e-3 times the largest eigenvalue.")
    epsilon = float(damping) if isinstance(damping, (int, float)) else exact_copy(damping)
    return HessianFactor(hessian, epsilon, method, precision)


def refuse_null_space(hessian: NetworkHessian, name: str, instead: str) -> None:
    """Raise `SingularError` for a shift of zero where a layer has more inputs and outputs than there are samples."""
    layers = () if hessian.expansion is None else hessian.expansion.layers
    # Weights between directions that no sample's input and no sample's β sees have the eigenvalue zero.
    free = sum(max(0, z.weight.shape[0] - z.z.shape[0]) * max(0, z.z.shape[1] - z.z.shape[0]) for z in layers)
    if free:
        raise SingularError(
            f"{name} is zero and the Hessian is singular: with {layers[0].z.shape[0]} samples at least {free} of its "
            f"{hessian.total} eigenvalues are zero, those of weights that no sample sees. {instead}"
        )


@public
def hessian_solve(
    chain: Chain,
    x: Array,
    t: Array,
    b: Sequence[Array],
    /,
    *,
    damping: float | Array,
    curvature: str = "hessian",
    method: str = "auto",
    precision: str = "double",
    refine: str | int = "auto",
    throw: bool = True,
) -> tuple[list[Array], HessianSolveInfo]:
    r"""``(H + damping·I)⁻¹ b``, H the Hessian of a network's loss, in time linear in its depth.

    Parameters
    ----------
    chain, x, t, damping, curvature, method, precision
        As in `hessian_factor`.
    b : list of arrays, shaped like ``chain.params``
        Right-hand side; several with one leading axis on every entry.
    refine : "auto" or int
        "auto" refines with exact Hessian-vector products while the backward error falls, and falls back to a stable
        factorisation where "auto" chose the method; a number takes that many steps and no other path.
    throw : bool, default True
        Raise for a right-hand side that did not converge; with ``False`` its best solution is returned.

    Returns
    -------
    solution : list of arrays like `b`
    info : HessianSolveInfo

    Raises
    ------
    ConvergenceError
        A backward error above `HessianFactor.rtol`.
    SingularError
        ``H + damping·I`` is singular to working precision.
    NonFiniteError, TypeError, ValueError
        As `hessian_factor`; `b` is not finite, not shaped like the parameters, or of another dtype or library.

    See Also
    --------
    hessian_factor : factor once, solve often.
    hessian_solve_vjp : its derivative with respect to `b` and `damping`.

    Notes
    -----
    Cost beyond that of `hessian_factor`, with p parameters and L layers: ``4 p`` flops, ``O(L (N a)²)`` and a product
    for each step. A right-hand side that is zero gives exact zeros.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.from_arrays([np.asarray([[2.0]])], activation="identity", loss="mse")
    >>> x, t = np.asarray([[1.0]]), np.asarray([[1.0]])  # the loss (w - 1)² has the Hessian 2
    >>> ddnref.curvature.hessian_solve(chain, x, t, [np.asarray([[5.0]])], damping=0.5)[0]
    [array([[2.]])]
    """
    factor = hessian_factor(chain, x, t, damping=damping, curvature=curvature, method=method, precision=precision)
    return factor.solve(b, refine=refine, throw=throw)


@public
def hessian_solve_vjp(
    x_bar: Sequence[Array],
    x: Sequence[Array],
    factor: HessianFactor,
    /,
    *,
    refine: str | int = "auto",
    throw: bool = True,
) -> tuple[tuple[list[Array], Array], HessianSolveInfo]:
    r"""Cotangents of the right-hand side and the damping of a solve with the Hessian, by one more solve.

    Parameters
    ----------
    x_bar, x : lists of arrays
        Cotangent of the solution, and the solution, as `hessian_solve` returned it.
    factor : HessianFactor
        The factorisation that gave the solution.
    refine, throw
        As in `hessian_solve`, with its errors.

    Returns
    -------
    (b_bar, damping_bar) : list of arrays like `x_bar`, and an array without axes
        The damping is shared by all right-hand sides: its cotangent is summed over them.
    info : HessianSolveInfo

    Notes
    -----
    .. math:: \bar b = (H + \varepsilon I)^{-1} \bar x, \qquad \bar\varepsilon = -\langle \bar b, x \rangle

    There is no cotangent of weights and data, because it would take third derivatives of the network.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.from_arrays([np.asarray([[2.0]])], activation="identity", loss="mse")
    >>> factor = ddnref.curvature.hessian_factor(chain, np.asarray([[1.0]]), np.asarray([[1.0]]), damping=0.5)
    >>> x, _ = factor.solve([np.asarray([[5.0]])])
    >>> ddnref.curvature.hessian_solve_vjp([np.asarray([[1.0]])], x, factor)[0]
    ([array([[0.4]])], np.float64(-0.8))
    """
    factor.check("x", x)
    factor.check("x_bar", x_bar, finite=throw)
    if x[0].ndim != x_bar[0].ndim:
        raise ValueError(f"x_bar[0] has shape {tuple(x_bar[0].shape)}, expected {tuple(x[0].shape)} of x[0].")
    # b̄ = (H + εI)⁻¹ x̄
    b_bar, info = factor.solve(x_bar, refine=refine, throw=throw)
    # ε̄ = −⟨b̄, x⟩, summed in double precision
    xp = namespace_of(x[0])
    products = [xp.sum(double(xp, a) * double(xp, b)) for a, b in zip(b_bar, x, strict=True)]
    return (b_bar, -xp.astype(xp.sum(xp.stack(products)), x[0].dtype, copy=False)), info


def _factored_again(
    chain: Chain, x: Array, t: Array, curvature: str, damping: Array | float, method: str, precision: str
) -> HessianFactor:
    return HessianFactor(hessian_of(chain, x, t, curvature), damping, method, precision)
