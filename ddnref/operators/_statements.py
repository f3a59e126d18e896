"""The statements of an operator, each held against products with random vectors; `check_operator` asks for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, Namespace, conj, is_complex
from ddnref.operators._operator import LinearOperator, times, zeros
from ddnref.testing import check_vjp

STEPS = 20  # of the power iterations that look for a negative eigenvalue
ZERO = 1e-15  # an eigenvalue that small, relative to the largest, is no more than rounding


class OperatorCheck(NamedTuple):
    """One statement about an operator."""

    name: str
    """Which."""
    passed: bool
    """Whether it holds."""
    error: float
    """By how much it does not, relative; NaN where it is no matter of degree."""
    message: str
    """What is wrong and what to look at, empty where it holds."""


class Given(NamedTuple):
    """An operator and random vectors of its domain and range."""

    a: LinearOperator
    x: Array
    y: Array
    rng: np.random.Generator
    rtol: float
    vjp_rtol: float

    @property
    def xp(self) -> Namespace:
        return array_api_compat.array_namespace(self.x)

    def random(self, like: Array) -> Array:
        values = self.rng.standard_normal(tuple(like.shape))
        if is_complex(like):
            values = values + 1j * self.rng.standard_normal(tuple(like.shape))
        xp = self.xp
        return xp.asarray(values, dtype=like.dtype, device=array_api_compat.device(like))

    def apply(self, x: Array) -> Array:
        return self.a.apply(self.a.params, x)

    def adjoint(self, y: Array) -> Array:
        return self.a.adjoint(self.a.params, y)


def _check(name: str, error: float, rtol: float, message: str) -> OperatorCheck:
    passed = error <= rtol  # false for NaN
    return OperatorCheck(name, passed, error, "" if passed else message.format(error=error, rtol=rtol))


def _fact(name: str, holds: bool, message: str) -> OperatorCheck:
    return OperatorCheck(name, holds, math.nan, "" if holds else message)


def _norm(z: Array) -> float:
    xp = array_api_compat.array_namespace(z)
    return math.sqrt(float(xp.sum(xp.abs(z) ** 2)))


def _off(z: Array, wanted: Array, size: float | None = None) -> float:
    """``‖z − wanted‖`` relative to `size`, or to the larger of both."""
    size = max(_norm(z), _norm(wanted)) if size is None else size
    difference = _norm(z - wanted)
    return difference / size if size > 0 else difference


def _dot(x: Array, y: Array) -> complex:
    xp = array_api_compat.array_namespace(x)
    return complex(xp.sum(conj(x) * y))


def _shapes(g: Given) -> Iterator[OperatorCheck]:
    """Of both products, batch axes included."""
    n, batch = len(g.a.range_shape), ()
    for name, product, x, target in (
        ("apply", g.apply, g.x, g.a.range_shape),
        ("adjoint", g.adjoint, None, g.a.domain_shape),
    ):
        x = zeros((*batch, *g.a.range_shape), g.x) if x is None else x
        y = product(x)
        held = tuple(y.shape[max(0, y.ndim - len(target)) :]) == tuple(target)
        field = "range_shape" if name == "apply" else "domain_shape"
        yield _fact(
            f"shape of {name}",
            held,
            f"{name}(params, ·) returned shape {tuple(y.shape)} for {tuple(x.shape)}, expected "
            f"(..., *{tuple(target)}): look at {name} and {field}.",
        )
        if not held:
            return
        batch = tuple(y.shape[: y.ndim - n])


def _dtypes(g: Given) -> Iterator[OperatorCheck]:
    """One library and double precision out; complex from complex."""
    y = g.apply(g.x)
    for name, product, x in (("apply", g.apply, g.x), ("adjoint", g.adjoint, y)):
        z = product(x)
        wanted = (g.xp.complex128,) if is_complex(x) else (g.xp.float64, g.xp.complex128)
        held = type(z) is type(x) and z.dtype in wanted
        yield _fact(
            f"dtype of {name}",
            held,
            f"{name}(params, ·) returned {type(z).__name__} of {z.dtype} for {type(x).__name__} of {x.dtype}: nothing "
            "may be converted; create arrays with the dtype of the argument.",
        )


def _arguments(g: Given) -> Iterator[OperatorCheck]:
    """Left as they are."""
    xp = g.xp

    def same(z: Array, b: Array) -> bool:
        return bool(xp.all((z == b) | ((z != z) & (b != b))))  # NaN is another matter

    y = g.apply(g.x)
    arrays = (*g.a.params, g.x, y)
    before = [xp.asarray(z, copy=True) for z in arrays]
    g.apply(g.x), g.adjoint(y), g.a.params_vjp(g.a.params, y, g.x)
    names = [*(f"params[{i}]" for i in range(len(g.a.params))), "x", "y"]
    changed = [name for name, z, b in zip(names, arrays, before, strict=True) if not same(z, b)]
    yield _fact("pure functions", not changed, f"{', '.join(changed)} changed during a product: write to a copy.")


def _linear(g: Given) -> Iterator[OperatorCheck]:
    """``A (αx + βz) = α A x + β A z``, α and β complex where vectors are."""
    alpha, beta = (0.7 - 0.4j, -1.3 + 0.2j) if is_complex(g.x) else (0.7, -1.3)
    for name, product, x in (("apply", g.apply, g.x), ("adjoint", g.adjoint, g.random(g.apply(g.x)))):
        z = g.random(x)
        p, q = product(x), product(z)
        error = _off(product(times(alpha, x, 0) + times(beta, z, 0)), times(alpha, p, 0) + times(beta, q, 0),
                     _norm(p) + _norm(q))  # fmt: skip
        yield _check(
            f"linearity of {name}",
            error,
            g.rtol,
            f"{name} is off by {{error:.1e}} (rtol {{rtol:.0e}}): it has a constant part, is not linear, conjugates "
            "its argument, or returns values that are not finite.",
        )


def _adjoint(g: Given) -> Iterator[OperatorCheck]:
    """``⟨A x, y⟩ = ⟨x, Aᴴ y⟩``."""
    a_x = g.apply(g.x)
    y = g.random(a_x)
    x = broadcast_to(g.x, a_x, g.a)
    a_y = g.adjoint(y)
    size = _norm(a_x) * _norm(y) + _norm(x) * _norm(a_y)
    error = abs(_dot(a_x, y) - _dot(x, a_y))
    yield _check(
        "adjoint",
        error / size if size > 0 else error,
        g.rtol,
        "adjoint is not the adjoint of apply: ⟨A x, y⟩ and ⟨x, Aᴴ y⟩ differ by {error:.1e} of their size (rtol "
        "{rtol:.0e}). Likely a missing transpose or conjugate, a sign, a shift to the wrong side, or a border that is "
        "treated differently.",
    )


def broadcast_to(x: Array, a_x: Array, a: LinearOperator) -> Array:
    """`x` with the batch axes that the parameters give to its image."""
    xp = array_api_compat.array_namespace(x)
    lead = tuple(a_x.shape[: a_x.ndim - len(a.range_shape)])
    return xp.broadcast_to(x, (*lead, *a.domain_shape))


def _batch(g: Given) -> Iterator[OperatorCheck]:
    """Three right-hand sides at once are these one by one."""
    xp = g.xp
    a_x = g.apply(g.x)
    x = broadcast_to(g.x, a_x, g.a)
    three, images = xp.stack([x, g.random(x), g.random(x)]), xp.stack([a_x, g.random(a_x), g.random(a_x)])
    message = "{name} of several right-hand sides, one more leading axis, is not that of each: off by {{error:.1e}}."
    for name, product, many in (("apply", g.apply, three), ("adjoint", g.adjoint, images)):
        alone = xp.stack([product(many[i, ...]) for i in range(3)])
        together = product(many)
        error = _off(together, alone) if together.shape == alone.shape else math.inf
        yield _check(f"batch of {name}", error, g.rtol, message.format(name=name))
    alone_bars = [g.a.params_vjp(g.a.params, images[i, ...], three[i, ...]) for i in range(3)]
    for i, bar in enumerate(g.a.params_vjp(g.a.params, images, three)):
        wanted = alone_bars[0][i] + alone_bars[1][i] + alone_bars[2][i]
        error = _off(bar, wanted) if bar.shape == wanted.shape else math.inf
        yield _check(
            f"batch of params_vjp[{i}]",
            error,
            g.rtol,
            f"the gradient to params[{i}] of several right-hand sides is not the sum of those of each: off by "
            "{error:.1e}. Sum over the leading axes that the parameter lacks.",
        )


def _params_vjp(g: Given) -> Iterator[OperatorCheck]:
    """Against finite differences, one parameter at a time."""
    y = g.apply(g.x)
    bars = g.a.params_vjp(g.a.params, y, g.x)
    counted = isinstance(bars, tuple) and len(bars) == len(g.a.params)
    yield _fact(
        "params_vjp", counted, f"params_vjp must return a tuple with {len(g.a.params)} cotangents, one per parameter."
    )
    if not counted:
        return
    for i, (p, bar) in enumerate(zip(g.a.params, bars, strict=True)):
        fits = tuple(bar.shape) == tuple(p.shape) and bar.dtype == p.dtype
        name = f"params_vjp[{i}]"
        if not fits:
            message = (
                f"it has shape {tuple(bar.shape)} and dtype {bar.dtype}, the parameter {tuple(p.shape)}, {p.dtype}"
            )
            yield _fact(name, False, f"{message}: sum over a batch, and take the real part for a real parameter.")
            continue
        seed = int(g.rng.integers(2**31))  # cotangents that have nothing to do with x
        report = check_vjp(*_partial(g, i), p, rtol=g.vjp_rtol, seed=seed)
        yield _check(
            name,
            report.error,
            g.vjp_rtol,
            f"the gradient to params[{i}] differs from finite differences by {{error:.1e}} of its length (rtol "
            "{rtol:.0e}). Likely a missing conjugate, a factor, or a dependence that was left out.",
        )


def _partial(g: Given, i: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    params = g.a.params

    def f(p: Array) -> Array:
        return g.a.apply((*params[:i], p, *params[i + 1 :]), g.x)

    def f_vjp(y_bar: Array, y: Array) -> Array:  # noqa: ARG001
        return g.a.params_vjp(params, y_bar, g.x)[i]

    return f, f_vjp


def _self_adjoint(g: Given) -> Iterator[OperatorCheck]:
    """``A = Aᴴ`` where it says so."""
    if not (g.a.self_adjoint or g.a.positive_definite):
        return
    held = g.a.self_adjoint and tuple(g.a.domain_shape) == tuple(g.a.range_shape)
    yield _fact(
        "self_adjoint",
        held,
        f"positive_definite is {g.a.positive_definite}, self_adjoint {g.a.self_adjoint}, domain_shape "
        f"{g.a.domain_shape}, range_shape {g.a.range_shape}; both flags need equal shapes, the first the second.",
    )
    if held:
        y = g.random(g.apply(g.x))
        yield _check(
            "self_adjoint",
            _off(g.apply(y), g.adjoint(y)),
            g.rtol,
            "self_adjoint is True, but apply and adjoint differ by {error:.1e} (rtol {rtol:.0e}).",
        )


def _positive_definite(g: Given) -> Iterator[OperatorCheck]:
    """The smallest Rayleigh quotient that power iterations with ``A`` and ``‖A‖ − A`` find, over ``‖A‖``."""
    if not (g.a.positive_definite and g.a.self_adjoint) or g.a.size == 0:
        return
    xp = g.xp
    v = g.random(g.apply(g.x))
    axes = tuple(range(-len(g.a.domain_shape), 0)) or None

    def size(z: Array) -> Array:
        squares = xp.abs(z) ** 2
        return squares if axes is None else xp.sum(squares, axis=axes, keepdims=True)

    def unit(z: Array) -> Array:
        length = size(z) ** 0.5
        return z / xp.astype(xp.where(length > 0, length, xp.ones_like(length)), z.dtype)

    for _ in range(STEPS):
        v = unit(g.apply(v))
    scale = size(g.apply(unit(v))) ** 0.5
    shift, v, smallest = xp.astype(1.05 * scale, v.dtype), g.random(v), math.inf
    for _ in range(STEPS):
        v = unit(v)
        a_v = g.apply(v)
        products = xp.real(conj(v) * a_v) if is_complex(v) else v * a_v
        quotient = products if axes is None else xp.sum(products, axis=axes, keepdims=True)
        smallest = min(smallest, float(xp.min(quotient / xp.where(scale > 0, scale, xp.ones_like(scale)))))
        v = shift * v - a_v
    yield _fact(
        "positive_definite",
        smallest > ZERO,
        f"positive_definite is True, but a vector has ⟨x, A x⟩ = {smallest:.1e} ‖A‖ ‖x‖².",
    )


def _hooks(g: Given) -> Iterator[OperatorCheck]:
    """``prepare`` and ``gram`` against what they stand for."""
    a_x = g.apply(g.x)
    if g.a.prepare is not None:
        fast = g.a.prepare(g.a.params)
        error = max(_off(fast.apply(fast.params, g.x), a_x), _off(fast.adjoint(fast.params, a_x), g.adjoint(a_x)))
        yield _check("prepare", error, g.rtol, "the prepared operator differs by {error:.1e} (rtol {rtol:.0e}).")
    if g.a.gram is not None:
        wanted = g.adjoint(a_x)
        for shift in (None, 0.75):
            fast = g.a.gram(g.a.params, shift)
            slow = wanted if shift is None else wanted + shift * g.x
            error = _off(fast.apply(fast.params, g.x), slow)
            yield _check("gram", error, g.rtol, f"gram(params, {shift}) differs from AᴴA + shift by {{error:.1e}}.")


STATEMENTS: tuple[tuple[Callable[[Given], Iterator[OperatorCheck]], bool], ...] = (
    (_shapes, True), (_dtypes, True), (_arguments, True), (_linear, True), (_adjoint, False), (_batch, False),
    (_params_vjp, False), (_self_adjoint, False), (_positive_definite, False), (_hooks, False),
)  # fmt: skip
"""In order, and whether the following ones rest on it."""
