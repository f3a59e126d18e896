"""A point that claims to solve a problem: its correction by a Newton step, the derivative there, and the error of that.

All steps and all solves use one factorisation, that of the matrix K at the given point z = (y, ν):

    z₁ = z − K⁻¹ F(z)           w₁ = −K₁⁻ᵀ ȳ,  or ż₁ = −K₁⁻¹ Ḟ₁   by two refinements     what is returned
    z₂ = z₁ − K⁻¹ F(z₁)         w₂ = −K₂⁻ᵀ ȳ,  or ż₂ = −K₂⁻¹ Ḟ₂   by one more            the difference is the error

with Ḟ the derivative of F along the tangents of the inputs. Each step contracts the error by a factor that is
proportional to the first step, so that the second derivative is so much more exact than the first one that their
difference measures the error of the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeAlias

import array_api_compat

from ddnref._core.arrays import Array, among, as_tuple, eps, full, is_true, namespace_of, nan_where, with_axes
from ddnref._core.checks import check_dtypes, check_shapes, conform, given
from ddnref._kernels import singularity
from ddnref._kernels.dense import matvec
from ddnref._kernels.vectors import safe_norm
from ddnref.errors import ConvergenceError, OptimalityError, SingularError
from ddnref.implicit._active import Found, certainty, held, multipliers, search
from ddnref.implicit._bordered import Bordered, ConjugateGradients, Direct, lengths_of, stiffness
from ddnref.implicit._structures import Structure, as_structure

Bars: TypeAlias = Array | tuple[Array, ...]

STEP = 1e-2
"""Longest Newton step that is taken, relative to the point: a longer one hints at a wrong problem, not at a solver that
stopped early."""
CONTRACTION = 0.5
"""A second step that is longer than this part of the first shows that Newton's method does not converge there."""
LARGEST_CHANGE = 0.1
"""Largest relative change of the linear system's solution by the correction of the point."""
LARGEST_ERROR = 0.1
"""A derivative with a larger relative error is refused."""
ROUNDING = 1.0
"""Rounding errors of the residual, in units of half an eps of its terms, with the worst of all signs."""
ZERO = 1e3
"""A derivative below this many eps of its natural size is zero up to rounding, and its error is relative to that."""


class NodeInfo(NamedTuple):
    """Whether and how well the derivative of each item, a gradient or a tangent, is known."""

    converged: Array
    """(...) flags: whether the point could be corrected, and the derivative is right to `error`."""
    n_iter: Array
    """(...) integers: steps of the search for the active inequalities; 0 without inequalities."""
    residual_norm: Array
    """(...): length of the Newton step from the given point, relative to the length of the point."""
    error: Array
    """(...): estimate of the relative error of the returned derivative, for a gradient the largest over the inputs; 1
    where a constraint is touched with a zero multiplier, so that the derivative is one of two; infinite where there is
    none."""
    rcond: Array
    """(...): reciprocal condition number of the matrix, its rows and columns scaled. `Products` count as one."""


class Functions(NamedTuple):
    """The functions by which a user states ``min f`` subject to ``h``."""

    gradient: Callable[..., Array]
    hessian: Callable[..., Array | Structure]
    constraint: Callable[..., Array]
    constraint_jacobian: Callable[..., Array]
    derivative: Callable[..., Any]
    """``residual_vjp`` or ``residual_jvp``, as the mode needs it."""


class Mode(NamedTuple):
    """One of the two derivatives: which linear system it solves, and what comes out of a solution."""

    adjoint: bool
    """Whether the system has the adjoint of K."""
    right: Callable[[Array], Array]
    """The right-hand side at a point z: ``−(ȳ, 0)``, or ``−Ḟ(z)``."""
    result: Callable[[Array, Array], Any]
    """``result(w, z)``: the gradients of all inputs, or the tangent of y, for a solution w; linear in w."""


class Equations(NamedTuple):
    """The equations ``F(z) = 0`` of a point z = (y, ν), (..., n + p)."""

    matrix: Callable[[Array], Bordered]
    """``K = ∂F/∂z``, up to the sign of the second column of blocks."""
    residual: Callable[[Array, Bordered], tuple[Array, Array]]
    """``F`` with the constraints that `matrix` holds, and the size of the terms that make it up."""
    mode: Mode
    softness: Array | None = None
    holds: Callable[[Array, Array, Array, Direct | ConjugateGradients], tuple[Array, Array]] | None = None
    """`certainty` of the active set, at z_1 with its next step and the rounding of that."""


class Point:
    """The given point with its multipliers, how far from a solution it may be, and a cotangent or tangents.

    The cotangent is that of y; where it is ``None``, there are tangents `dots`, one for each input.
    """

    def __init__(
        self,
        name: str,
        y: Array,
        nu: Array | None,
        rtol: float | None,
        atol: float,
        throw: bool,
        *,
        y_bar: Array | None = None,
        dots: tuple[Array, ...] = (),
    ) -> None:
        given(y=y)
        xp = conform("(n+),(n),(p)", real_only=True, y=y, y_bar=y_bar, nu=nu).xp
        self.name, self.y_bar, self.y, self.nu, self.throw, self.dots = name, y_bar, y, nu, throw, dots
        self.rtol, self.atol = STEP if rtol is None else rtol, atol
        self.unit = eps(xp, y.dtype)

    def size_of(self, x: Array, k: Bordered, size: Array) -> Array:
        """The length of w and of ``Cᵀη``, to which nothing adds by which equal constraints share η differently."""
        xp, n = namespace_of(x), self.y.shape[-1]
        force = matvec(xp.matrix_transpose(k.c), x[..., n:]) / size[..., None]
        return safe_norm(xp.concat([x[..., :n], force], axis=-1))

    def lengths(self, k: Bordered) -> tuple[Array, Array]:
        """Factors that make multipliers comparable with entries of y, ``‖C_j‖ / ‖H‖``, and ``‖H‖``."""
        xp = namespace_of(self.y)
        size = stiffness(k.h, self.y)
        return xp.concat([xp.ones_like(self.y), lengths_of(k.c) / size[..., None]], axis=-1), size

    def error_of(self, bars: Any, better: Any, natural: Any, zero: float) -> Array:
        """The largest relative difference of two derivatives over the inputs, per item.

        One shorter than `zero` times its natural size counts as that long. A gradient without the batch axes belongs to
        all items: its difference counts for each of them.
        """
        xp = namespace_of(self.y)
        error = xp.zeros_like(self.y[..., 0])
        for bar, other, size in zip(*map(as_tuple, (bars, better, natural)), strict=True):
            shared = not self._has_batch(bar)
            difference, length, floor = (self._norm(x, shared) for x in (other - bar, bar, size))
            scale = xp.maximum(length, zero * floor)
            part = difference / xp.where(scale > 0, scale, xp.ones_like(scale))
            part = xp.where(xp.isnan(part), xp.zeros_like(part), part) if shared else part
            error = xp.maximum(error, part)
        return error

    def _has_batch(self, bar: Array) -> bool:
        batch = tuple(self.y.shape[:-1])
        return tuple(bar.shape[: len(batch)]) == batch

    def _norm(self, x: Array, shared: bool) -> Array:
        xp, batch = namespace_of(x), () if shared else tuple(self.y.shape[:-1])
        return safe_norm(xp.reshape(x, (*batch, math.prod(x.shape[len(batch) :]))))

    def masked(self, bars: Any, bad: Array) -> Bars:
        """Make the derivative NaN where none exists."""
        xp = namespace_of(self.y)

        def one(bar: Array) -> Array:
            if self._has_batch(bar):
                return nan_where(with_axes(bad, bar.ndim - bad.ndim), bar)
            return nan_where(xp.any(bad), bar)

        return tuple(map(one, bars)) if isinstance(bars, tuple) else one(bars)

    def refuse(self, bad: Array, singular: Array, limited: Array, rcond: Array, split: Array) -> NoReturn:
        xp, derivative = namespace_of(self.y), "gradient" if self.y_bar is not None else "tangent"
        # The causes in their order: a singular system also spoils the iteration and the Newton step.
        if is_true(xp.any(singular & ~limited)):
            smallest = float(xp.min(xp.where(singular & ~xp.isnan(rcond), rcond, xp.zeros_like(rcond) + 1)))
            number = f" (rcond {smallest:.1e})" if smallest < 1 else ""
            raise SingularError(
                f"The linear system of {self.name} is singular to working precision{number}, or not finite"
                f"{among(singular)}. The most likely causes: the solution is not isolated (a flat direction), "
                "constraints repeat each other there, or a structured Hessian is singular although the bordered matrix "
                "is not (then pass it as an array). Pass throw=False to get NaN for these items."
            )
        if is_true(xp.any(limited)):
            raise ConvergenceError(
                f"The conjugate gradients of {self.name} reached their limit{among(limited)}. The most likely cause "
                "is a badly conditioned Hessian: raise maxiter or rtol of Products, or pass a structured Hessian. Pass "
                "throw=False to get NaN for these items."
            )
        if is_true(xp.any(split)):
            raise SingularError(
                f"The direction given to {self.name} moves constraints apart that repeat each other at the "
                f"solution{among(split)}, so only a one-sided derivative exists: which of them stay active depends on "
                "its sign. Drop the repeated constraints or move them together, or pass throw=False to get NaN for "
                "these items."
            )
        raise OptimalityError(
            f"The point given to {self.name} does not solve its problem, and a Newton step does not help{among(bad)}: "
            f"it is longer than {self.rtol:.1e} of the point, or the next one is not half as long, or the {derivative} "
            "there is still wrong by more than a tenth, or it is not clear which constraints are active. The most "
            "likely causes: the solver stopped early, or the callables state another problem (ℒ = f − νᵀh; "
            "inequalities h ≤ 0 have ν ≤ 0). Solve further, raise rtol (or atol, for a solution at zero), or pass "
            "throw=False to get NaN for these items."
        )


def corrected(point: Point, of: Equations, z: Array, searched: Array | None = None) -> tuple[Bars, NodeInfo]:
    """Correct the point, and return the derivative there and its `NodeInfo`."""
    xp, n, mode = namespace_of(z), point.y.shape[-1], of.mode
    # The Newton step from the given point, by the only factorisation.
    k = of.matrix(z)
    inverse = k.inverse(of.softness)
    r, terms = of.residual(z, k)
    step = inverse.solve(-r)
    z_1 = z + step
    # The solution of the linear system, refined with the matrix at the corrected point.
    k_1, a = of.matrix(z_1), mode.right(z_1)
    solve = inverse.solve_adjoint if mode.adjoint else inverse.solve

    def left(k: Bordered, a: Array, w: Array) -> Array:
        return a - (k.adjoint_times(w) if mode.adjoint else k.times(w))

    w = solve(a)
    first = solve(left(k_1, a, w), rough=True)
    w = w + first
    second = solve(left(k_1, a, w), rough=True)
    w = w + second
    # One more step of both, and what rounding may do to them.
    lengths, size = point.lengths(k)
    r_1, terms_1 = of.residual(z_1, k_1)
    next_step = inverse.solve(-r_1, rough=True)
    blur = rounding(inverse, point.unit / 2 * (k_1.size_times(z_1) + terms_1), lengths, n)
    z_2 = z_1 + next_step + _along(next_step, blur, lengths)
    change = solve(left(of.matrix(z_2), mode.right(z_2), w), rough=True)
    size_w = k_1.size_times(w, transposed=mode.adjoint) + xp.abs(a)
    blur_w = rounding(inverse, point.unit / 2 * size_w, lengths, n, adjoint=mode.adjoint)
    # Judge the point by the length of the steps.
    y_length = safe_norm(point.y)
    if z.shape[-1] > n:  # under constraints the gradient of f does not vanish, and has a scale for points at zero
        y_length = y_length + safe_norm(terms[..., :n]) / size
    length, next_length, blurred = (safe_norm(s[..., :n]) for s in (step, next_step, blur))
    singular = ~(inverse.rcond > singularity.SINGULAR * point.unit) | xp.any(xp.isnan(w), axis=-1)
    # A few roundings need not contract: what they do to the derivative is part of its error.
    few = point.unit**0.75
    optimal = length <= point.rtol * y_length + point.atol
    optimal = optimal & (next_length <= CONTRACTION * length + 4 * blurred + few * y_length)
    w_1, w_2, w_blur, w_length = (point.size_of(x, k, size) for x in (first, second, blur_w, w))
    optimal = optimal & (w_2 <= CONTRACTION * w_1 + 4 * w_blur + few * w_length)
    optimal = optimal & (w_1 <= LARGEST_CHANGE * w_length + 4 * w_blur)
    touched, split = xp.zeros_like(optimal), xp.zeros_like(optimal)
    if of.holds is not None:
        sure, touched = of.holds(z_1, next_step, blur, inverse)
        optimal = optimal & sure
        if not mode.adjoint:
            split = _splits(left(k_1, a, w), a, k_1, w_length)
    bad = singular | inverse.limited | ~optimal | split
    # Compare both derivatives, on the scale of what a right-hand side of this size can cause.
    w = nan_where(bad[..., None], w)
    bars = mode.result(w, z_1)
    natural = safe_norm(a / (lengths * size[..., None]))
    natural = natural[..., None] * (z.shape[-1] / 2) ** 0.5 * singularity.probe(z) / lengths
    natural = xp.concat([natural[..., :n], natural[..., n:] * (1 - k.free)], axis=-1)
    better, natural_bars = mode.result(w + change + _along(change, blur_w, lengths), z_2), mode.result(natural, z_1)
    error = point.error_of(bars, better, natural_bars, ZERO * point.unit)
    # A derivative that cancels to rounding has no digits, but is right: zero.
    bad = bad | ~(point.error_of(bars, better, natural_bars, point.unit**0.5) <= LARGEST_ERROR)
    if point.throw and is_true(xp.any(bad)):
        point.refuse(bad, singular, inverse.limited, inverse.rcond, split)
    one = xp.ones_like(length)
    error = xp.where(touched, xp.maximum(error, one), error)
    y_length = safe_norm(z_1[..., :n])
    info = NodeInfo(
        ~bad,
        xp.zeros_like(bad, dtype=xp.int32) if searched is None else searched,
        length / xp.where(y_length > 0, y_length, one),
        xp.where(xp.isnan(error) | bad, full((), float("inf"), error), error),
        inverse.rcond,
    )
    return point.masked(bars, bad), info


def _splits(left: Array, a: Array, k: Bordered, length: Array) -> Array:
    """Whether a direction moves constraints apart that repeat each other, so that no ẏ satisfies all of them.

    `left` is the rest of the right-hand side after the solution, of which ẏ and ``Cᵀν̇`` have the given length.
    """
    xp, n = namespace_of(left), k.c.shape[-1]
    norms = lengths_of(k.c)
    gap, moved = (xp.max(xp.abs(x[..., n:]) / norms, axis=-1) for x in (left, a))
    return gap > eps(xp, left.dtype) ** 0.5 * (moved + length)


def rounding(inverse: Direct | ConjugateGradients, b: Array, lengths: Array, n: int, *, adjoint: bool = False) -> Array:
    """Return a change of a solution by which rounding errors of size b on the right may blur it.

    The signs are those that change the entry most that reacts most (one step of Hager's norm estimator).
    """
    xp = namespace_of(b)
    solve, back = inverse.solve, inverse.solve_adjoint
    if adjoint:
        solve, back = back, solve
    blur = solve(xp.where(singularity.probe(b) < 0, -b, b), rough=True)
    if isinstance(inverse, ConjugateGradients):  # where each solve is a run, signs without structure must do
        return 2 * ROUNDING * blur
    size = xp.abs(blur) * lengths
    is_y = xp.arange(b.shape[-1], device=array_api_compat.device(b)) < n
    # The entries of y and the multipliers enter different gradients, and so have separate signs.
    for part in (is_y, ~is_y)[: 1 if b.shape[-1] == n else 2]:
        own = xp.where(part, size, -xp.ones_like(size))
        # The row of the inverse that belongs to the largest entry; the adjoint has −η for η.
        row = back(xp.astype(own == xp.max(own, axis=-1, keepdims=True), b.dtype) / lengths, rough=True)
        signs = xp.where(is_y == (row < 0), -xp.ones_like(row), xp.ones_like(row))
        blur = xp.where(part, solve(b * signs, rough=True), blur)
    return ROUNDING * blur


def _along(step: Array, blur: Array, lengths: Array) -> Array:
    """`blur` with the sign with which it adds to a step, so that the two cannot hide each other."""
    xp = namespace_of(step)
    return xp.where(xp.sum(step * blur * lengths**2, axis=-1, keepdims=True) < 0, -blur, blur)


# --- the problems ---------------------------------------------------------------------------------------------------


def unconstrained(
    point: Point,
    residual: Callable[..., Array],
    hessian: Callable[..., Array | Structure],
    derivative: Callable[..., Any],
    inputs: tuple[Array, ...],
    names: tuple[str, str, str],
) -> tuple[Bars, NodeInfo]:
    """The derivative of a root of `residual`, or of the gradient of a function, in the mode of the point."""
    y, xp = point.y, namespace_of(point.y)
    nothing, rows = y[..., :0], xp.matrix_transpose(y[..., None][..., :0])

    def matrix(y: Array) -> Bordered:
        return Bordered(as_structure(hessian(y, *inputs), y, names[1]), rows, nothing)

    def value(y: Array, k: Bordered) -> tuple[Array, Array]:  # noqa: ARG001
        r = of_shape(names[0], residual(y, *inputs), y, tuple(y.shape))
        return r, xp.abs(r)

    def right(y: Array) -> Array:
        return -of_shape(names[2], derivative(*point.dots, y, *inputs), y, tuple(y.shape))

    if point.y_bar is None:
        mode = Mode(False, right, lambda w, y: w)  # noqa: ARG005
    else:
        a = -point.y_bar
        mode = Mode(True, lambda y: a, lambda w, y: derivative(w, y, *inputs))  # noqa: ARG005
    return corrected(point, Equations(matrix, value, mode), y)


def constrained(
    point: Point, inputs: tuple[Array, ...], of: Functions, equalities: int | None = None
) -> tuple[Bars, NodeInfo]:
    """The derivative under constraints, in the mode of the point.

    The first `equalities` of the constraints are equalities, with ``None`` all of them.
    """
    y, xp, n = point.y, namespace_of(point.y), point.y.shape[-1]

    def objective(y: Array) -> Array:
        return of_shape("gradient", of.gradient(y, *inputs), y, tuple(y.shape))

    def constraint(y: Array) -> Array:
        h = of.constraint(y, *inputs)
        return of_shape("constraint", h, y, (*y.shape[:-1], h.shape[-1] if h.ndim else 0))

    def jacobian(y: Array, p: int) -> Array:
        return of_shape("constraint_jacobian", of.constraint_jacobian(y, *inputs), y, (*y.shape[:-1], p, n))

    def hessian(y: Array, nu: Array) -> Structure:
        return as_structure(of.hessian(y, nu, *inputs), y, "hessian")

    h = constraint(y)
    p = h.shape[-1]
    h_y, f_y = jacobian(y, p), objective(y)
    check_shapes(nu=(point.nu, tuple(h.shape)))
    equal = xp.arange(p, device=array_api_compat.device(h)) < (p if equalities is None else equalities)
    equal = equal | xp.isnan(h)  # NaN spreads from constraints that are kept
    if equalities is None or equalities >= p:
        nu = multipliers(f_y, h_y, equal, None) if point.nu is None else point.nu
        found = Found(equal, nu)
    else:
        found = search(y, point.nu, f_y, h, h_y, equal, hessian, stop=point.throw)
    free = xp.astype(~found.active, y.dtype)

    def matrix(z: Array) -> Bordered:
        return Bordered(hessian(z[..., :n], z[..., n:]), held(jacobian(z[..., :n], p), found.active[..., None]), free)

    def residual(z: Array, k: Bordered) -> tuple[Array, Array]:
        f_y, h = objective(z[..., :n]), held(constraint(z[..., :n]), found.active)
        r = xp.concat([f_y - matvec(xp.matrix_transpose(k.c), z[..., n:]), h], axis=-1)
        return r, xp.concat([xp.abs(f_y), xp.abs(h)], axis=-1)

    def vjp(w: Array, z: Array) -> Any:
        return of.derivative(w[..., :n], -w[..., n:], z[..., :n], z[..., n:], *inputs)

    def right(z: Array) -> Array:
        parts = of.derivative(*point.dots, z[..., :n], z[..., n:], *inputs)
        if not isinstance(parts, tuple) or len(parts) != 2:
            raise TypeError("residual_jvp must return a tuple of two arrays: the tangents of ∇_yℒ and of h.")
        f_dot, h_dot = (of_shape("residual_jvp", x, y, tuple(at.shape)) for x, at in zip(parts, (y, h), strict=True))
        return -xp.concat([f_dot, held(h_dot, found.active)], axis=-1)

    def certain(z: Array, step: Array, blur: Array, inverse: Direct | ConjugateGradients) -> tuple[Array, Array]:
        return certainty(found, equal, z, step, blur, constraint(z[..., :n]), h_y, inverse)

    if point.y_bar is None:
        mode = Mode(False, right, lambda w, z: w[..., :n])  # noqa: ARG005
    else:
        a = -xp.concat([point.y_bar, xp.zeros_like(h)], axis=-1)
        mode = Mode(True, lambda z: a, vjp)  # noqa: ARG005
    holds = None if found.softness is None else certain
    equations = Equations(matrix, residual, mode, found.softness, holds)
    return corrected(point, equations, xp.concat([y, found.nu], axis=-1), found.n_iter)


def of_shape(name: str, array: Array, y: Array, shape: tuple[int, ...]) -> Array:
    """Check the array that a callable returned; infinities become NaN, which spreads without a warning."""
    check_shapes(**{f"the result of {name}": (array, shape)})
    check_dtypes(**{f"the result of {name}": (array, y.dtype)})
    return nan_where(~namespace_of(array).isfinite(array), array)
