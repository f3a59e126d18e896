"""Check whether an operator is what it claims to be: `check_operator` tests each claim with random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, Namespace, full, is_complex, namespace
from ddnref._kernels.public import public
from ddnref._kernels.vectors import column, dot, norm, normalised, quotient, real_dot
from ddnref.errors import OperatorError
from ddnref.operators._operator import LinearOperator, batch_axes, check_ending, times
from ddnref.testing import check_vjp

RTOL = 1e-11
VJP_RTOL = 1e-7
STEPS = 20  # of the power iterations that look for a negative eigenvalue
ZERO = 1e-15  # an eigenvalue that small, relative to the largest, is no more than rounding


class OperatorCheck(NamedTuple):
    """Whether one claim about an operator holds."""

    name: str
    passed: bool
    error: float
    """The relative error; NaN where the claim is either true or false."""
    message: str
    """The fault and where to look for it; empty if the claim holds."""


class OperatorReport(NamedTuple):
    """Whether all claims of an operator hold, by `check_operator`; ``str(report)`` is a table."""

    passed: bool
    checks: tuple[OperatorCheck, ...]
    """Every claim that was checked. Where a basic claim fails, those that depend on it are left out."""

    def __str__(self) -> str:
        return "\n".join(
            f"{c.name:<24}{'passed' if c.passed else 'FAILED':<8}{c.error:>9.1e}  {c.message}".rstrip()
            for c in self.checks
        )


@public
def check_operator(
    operator: LinearOperator,
    x: Array | None = None,
    /,
    *,
    rtol: float = RTOL,
    vjp_rtol: float = VJP_RTOL,
    seed: int = 0,
    throw: bool = True,
) -> OperatorReport:
    r"""Check every claim of an operator, yours or ours, with products of random vectors.

    Parameters
    ----------
    operator : LinearOperator
        With parameters of dtype float64 or complex128.
    x : (..., \*domain_shape) array, optional
        An example of the vectors to try, with their library, device, dtype and batch axes. By default they are taken
        from the parameters, without batch axes. An operator without parameters needs an example.
    rtol : float, default 1e-11
        Largest relative error of claims that hold up to rounding.
    vjp_rtol : float, default 1e-7
        The ``rtol`` of `ddnref.testing.check_vjp`.
    seed : int
    throw : bool, default True
        Raise if a claim fails. With ``False`` the failure is only in the report.

    Raises
    ------
    OperatorError
        A claim does not hold; the message names it and where to look for the fault.
    TypeError, ValueError
        Single precision, in which finite differences show nothing; no `x` where there are no parameters; `x` of another
        shape.

    Notes
    -----
    These are checked in order: shapes; dtypes; that arguments are not changed; linearity; the dot-product test
    ``⟨A x, y⟩ = ⟨x, Aᴴ y⟩``; that a batch equals its items one by one; the flags self-adjoint (apply equals adjoint)
    and positive definite (the smallest eigenvalue that a few power iterations find); ``prepare``, ``gram`` and
    ``sparse`` against the products that they replace; ``params_vjp`` against finite differences; the forward modes
    against ``params_vjp``. One wrong entry in m changes the product with a random vector by about ``1/m`` of its
    length, which is far above `rtol`, so it is found. An indefinite operator may pass as positive definite if its
    negative eigenvalues are very few and very small.

    Examples
    --------
    >>> import numpy as np
    >>> twice = lambda params, x: 2 * x
    >>> wrong = lambda params, y: -2 * y
    >>> operator = ddnref.operators.LinearOperator((), twice, wrong, lambda params, y_bar, x: (), (3,), (3,))
    >>> report = ddnref.operators.check_operator(operator, np.zeros(3), throw=False)
    >>> [check.name for check in report.checks if not check.passed]
    ['adjoint']
    """
    given = _given(operator, x, np.random.default_rng(seed), rtol, vjp_rtol)
    # Stop where a basic claim fails: the checks of later ones would raise.
    checks: list[OperatorCheck] = []
    for claim, is_basic in CLAIMS:
        found = list(claim(given))
        checks.extend(found)
        if is_basic and not all(check.passed for check in found):
            break
    report = OperatorReport(all(check.passed for check in checks), tuple(checks))
    if throw and not report.passed:
        failed = " ".join(f"{c.name}: {c.message}" for c in checks if not c.passed)
        raise OperatorError(f"The operator is not what it says. {failed}")
    return report


def _given(a: LinearOperator, x: Array | None, rng: np.random.Generator, rtol: float, vjp_rtol: float) -> Given:
    xp = namespace(**{f"params[{i}]": p for i, p in enumerate(a.params)}, x=x)
    if x is not None:
        check_ending("x", x, a.domain_shape)
    arrays = [*a.params, *([] if x is None else [x])]
    if any(p.dtype not in (xp.float64, xp.complex128) for p in arrays):
        raise TypeError(
            "check_operator needs params and x of dtype float64 or complex128, got "
            f"{', '.join(str(p.dtype) for p in arrays)}: finite differences in single precision show nothing. Check "
            "the same operator in double precision."
        )
    # Vectors are complex if a parameter is, and random in any case.
    if x is None:
        x = full(tuple(a.domain_shape), 0.0, a.params[0])
    if any(is_complex(p) for p in arrays):
        x = xp.astype(x, xp.complex128)
    given = Given(a, x, rng, rtol, vjp_rtol)
    return given._replace(x=given.random(x))


# --- the claims -----------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """An operator, a random vector of its domain, and a source of others."""

    a: LinearOperator
    x: Array
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
        return self.xp.asarray(values, dtype=like.dtype, device=array_api_compat.device(like))

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
    return float(norm(array_api_compat.array_namespace(z).reshape(z, (-1,))))


def _off(z: Array, wanted: Array, size: float | None = None) -> float:
    """``‖z − wanted‖`` relative to `size`, or to the larger of both."""
    # Relative to zero there is only an absolute error.
    size = max(_norm(z), _norm(wanted)) if size is None else size
    difference = _norm(z - wanted)
    return difference / size if size > 0 else difference


def _dot(x: Array, y: Array) -> complex:
    xp = array_api_compat.array_namespace(x)
    return complex(dot(xp.reshape(x, (-1,)), xp.reshape(y, (-1,))))


def _shapes(g: Given) -> Iterator[OperatorCheck]:
    """Both products have the stated shapes behind their batch axes."""
    x = g.x
    targets = ("apply", g.apply, g.a.range_shape), ("adjoint", g.adjoint, g.a.domain_shape)
    for name, product, target in targets:
        y = product(x)
        held = tuple(y.shape[max(0, y.ndim - len(target)) :]) == tuple(target)
        field = "range_shape" if name == "apply" else "domain_shape"
        message = (
            f"{name}(params, ·) returned shape {tuple(y.shape)} for {tuple(x.shape)}, expected "
            f"(..., *{tuple(target)}): look at {name} and {field}."
        )
        yield _fact(f"shape of {name}", held, message)
        if not held:
            return
        x = y  # a vector of the range, with the batch axes of an image


def _dtypes(g: Given) -> Iterator[OperatorCheck]:
    """Products keep the library and the precision, and complex vectors stay complex."""
    y = g.apply(g.x)
    for name, product, x in (("apply", g.apply, g.x), ("adjoint", g.adjoint, y)):
        # A real vector may have a complex image, not the other way round.
        z = product(x)
        wanted = (g.xp.complex128,) if is_complex(x) else (g.xp.float64, g.xp.complex128)
        held = type(z) is type(x) and z.dtype in wanted
        message = (
            f"{name}(params, ·) returned {type(z).__name__} of {z.dtype} for {type(x).__name__} of {x.dtype}: nothing "
            "may be converted; create arrays with the dtype of the argument."
        )
        yield _fact(f"dtype of {name}", held, message)


def _arguments(g: Given) -> Iterator[OperatorCheck]:
    """No function writes to its arguments."""
    xp = g.xp

    def same(z: Array, b: Array) -> bool:
        return bool(xp.all((z == b) | ((z != z) & (b != b))))  # NaN is not a change

    # Compare all arguments with copies from before the products.
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
        # Relative to the terms, because their sum may cancel.
        z = g.random(x)
        p, q = product(x), product(z)
        error = _off(product(times(alpha, x, 0) + times(beta, z, 0)), times(alpha, p, 0) + times(beta, q, 0),
                     _norm(p) + _norm(q))  # fmt: skip
        message = (
            f"{name} is off by {{error:.1e}} (rtol {{rtol:.0e}}): it has a constant part, is not linear, conjugates "
            "its argument, or returns values that are not finite."
        )
        yield _check(f"linearity of {name}", error, g.rtol, message)


def _adjoint(g: Given) -> Iterator[OperatorCheck]:
    """``⟨A x, y⟩ = ⟨x, Aᴴ y⟩``."""
    a_x = g.apply(g.x)
    y = g.random(a_x)
    x = _in_batch(g)
    a_y = g.adjoint(y)
    # Relative to the lengths, because both inner products may be small.
    size = _norm(a_x) * _norm(y) + _norm(x) * _norm(a_y)
    error = abs(_dot(a_x, y) - _dot(x, a_y))
    message = (
        "adjoint is not the adjoint of apply: ⟨A x, y⟩ and ⟨x, Aᴴ y⟩ differ by {error:.1e} of their size (rtol "
        "{rtol:.0e}). The most likely cause is a missing transpose or conjugate, a sign, a shift to the wrong side, or "
        "a border that is treated differently."
    )
    yield _check("adjoint", error / size if size > 0 else error, g.rtol, message)


def _in_batch(g: Given) -> Array:
    """The vector x with the batch axes that the parameters give to its image."""
    return g.xp.broadcast_to(g.x, (*batch_axes(g.a, g.x)[0], *g.a.domain_shape))


def _batch(g: Given) -> Iterator[OperatorCheck]:
    """The products of three right-hand sides at once equal those of each alone."""
    xp = g.xp
    a_x = g.apply(g.x)
    x = _in_batch(g)
    three, images = xp.stack([x, g.random(x), g.random(x)]), xp.stack([a_x, g.random(a_x), g.random(a_x)])
    message = "{name} of several right-hand sides, one more leading axis, is not that of each: off by {{error:.1e}}."
    for name, product, many in (("apply", g.apply, three), ("adjoint", g.adjoint, images)):
        # One product for all, and one for each
        alone = xp.stack([product(many[i, ...]) for i in range(3)])
        together = product(many)
        error = _off(together, alone) if together.shape == alone.shape else math.inf
        yield _check(f"batch of {name}", error, g.rtol, message.format(name=name))
    # A parameter that the right-hand sides share gets the sum of their gradients.
    alone_bars = [g.a.params_vjp(g.a.params, images[i, ...], three[i, ...]) for i in range(3)]
    for i, bar in enumerate(g.a.params_vjp(g.a.params, images, three)):
        wanted = alone_bars[0][i] + alone_bars[1][i] + alone_bars[2][i]
        error = _off(bar, wanted) if bar.shape == wanted.shape else math.inf
        message = (
            f"the gradient to params[{i}] of several right-hand sides is not the sum of those of each: off by "
            "{error:.1e}. Sum over the leading axes that the parameter lacks."
        )
        yield _check(f"batch of params_vjp[{i}]", error, g.rtol, message)


def _params_vjp(g: Given) -> Iterator[OperatorCheck]:
    """The gradient agrees with finite differences, one parameter at a time."""
    y = g.apply(g.x)
    bars = g.a.params_vjp(g.a.params, y, g.x)
    counted = isinstance(bars, tuple) and len(bars) == len(g.a.params)
    yield _fact(
        "params_vjp", counted, f"params_vjp must return a tuple with {len(g.a.params)} cotangents, one per parameter."
    )
    if not counted:
        return
    for i, (p, bar) in enumerate(zip(g.a.params, bars, strict=True)):
        # The gradient has the shape and the dtype of the parameter.
        name = f"params_vjp[{i}]"
        if tuple(bar.shape) != tuple(p.shape) or bar.dtype != p.dtype:
            message = (
                f"it has shape {tuple(bar.shape)} and dtype {bar.dtype}, the parameter {tuple(p.shape)}, {p.dtype}: "
                "sum over a batch, and take the real part for a real parameter."
            )
            yield _fact(name, False, message)
            continue

        # The finite differences of the product as a function of this parameter alone
        def product(p: Array, i: int = i) -> Array:
            return g.a.apply((*g.a.params[:i], p, *g.a.params[i + 1 :]), g.x)

        def product_vjp(y_bar: Array, y: Array, i: int = i) -> Array:  # noqa: ARG001
            return g.a.params_vjp(g.a.params, y_bar, g.x)[i]

        seed = int(g.rng.integers(2**31))  # of cotangents that are independent of x
        report = check_vjp(product, product_vjp, p, rtol=g.vjp_rtol, seed=seed)
        message = (
            f"the gradient to params[{i}] differs from finite differences by {{error:.1e}} of its length (rtol "
            "{rtol:.0e}). The most likely cause is a missing conjugate, a factor, or a dependence that was left out."
        )
        yield _check(name, report.error, g.vjp_rtol, message)


def _self_adjoint(g: Given) -> Iterator[OperatorCheck]:
    """``A = Aᴴ`` if the flag says so."""
    if not (g.a.self_adjoint or g.a.positive_definite):
        return
    held = g.a.self_adjoint and tuple(g.a.domain_shape) == tuple(g.a.range_shape)
    message = (
        f"positive_definite is {g.a.positive_definite}, self_adjoint {g.a.self_adjoint}, domain_shape "
        f"{g.a.domain_shape}, range_shape {g.a.range_shape}; both flags need equal shapes, the first the second."
    )
    yield _fact("self_adjoint", held, message)
    # As the adjoint has been checked, it suffices to compare both products.
    if held:
        y = g.random(g.apply(g.x))
        message = "self_adjoint is True, but apply and adjoint differ by {error:.1e} (rtol {rtol:.0e})."
        yield _check("self_adjoint", _off(g.apply(y), g.adjoint(y)), g.rtol, message)


def _positive_definite(g: Given) -> Iterator[OperatorCheck]:
    """The smallest Rayleigh quotient that power iterations with ``A`` and ``‖A‖ − A`` find, over ``‖A‖``."""
    if not (g.a.positive_definite and g.a.self_adjoint) or g.a.size == 0:
        return
    batch, image = batch_axes(g.a, g.x)

    def apply(v: Array) -> Array:
        y = g.apply(g.xp.reshape(v, (*batch, *g.a.domain_shape)))
        return g.xp.reshape(y, (*batch, g.a.size))

    # ‖A‖ by power iterations
    v = g.xp.reshape(g.random(image), (*batch, g.a.size))
    for _ in range(STEPS):
        v = apply(v)
        v = normalised(v, norm(v))
    scale = norm(apply(v))

    # The same with 1.05 ‖A‖ − A, whose largest eigenvalues are the smallest of A
    shift, v, smallest = column(1.05 * scale, v), g.random(v), math.inf
    for _ in range(STEPS):
        v = normalised(v, norm(v))
        a_v = apply(v)
        smallest = min(smallest, float(g.xp.min(quotient(real_dot(v, a_v), scale, scale > 0))))
        v = shift * v - a_v
    message = f"positive_definite is True, but a vector has ⟨x, A x⟩ = {smallest:.1e} ‖A‖ ‖x‖²."
    yield _fact("positive_definite", smallest > ZERO, message)


def _hooks(g: Given) -> Iterator[OperatorCheck]:
    """``prepare``, ``gram`` and ``sparse`` agree with the products that they replace."""
    # The prepared operator: both products
    a_x = g.apply(g.x)
    if g.a.prepare is not None:
        fast = g.a.prepare(g.a.params)
        error = max(_off(fast.apply(fast.params, g.x), a_x), _off(fast.adjoint(fast.params, a_x), g.adjoint(a_x)))
        yield _check("prepare", error, g.rtol, "the prepared operator differs by {error:.1e} (rtol {rtol:.0e}).")
    # AᴴA with and without a shift, against two products
    if g.a.gram is not None:
        wanted = g.adjoint(a_x)
        for shift in (None, 0.75):
            fast = g.a.gram(g.a.params, shift)
            slow = wanted if shift is None else wanted + shift * g.x
            error = _off(fast.apply(fast.params, g.x), slow)
            yield _check("gram", error, g.rtol, f"gram(params, {shift}) differs from AᴴA + shift by {{error:.1e}}.")
    # The sparse matrix, of flattened vectors
    if g.a.sparse is not None and a_x.ndim == len(g.a.range_shape):
        y = g.a.sparse(g.a.params) @ g.xp.reshape(g.x, (-1,))
        error = _off(g.xp.reshape(y, tuple(a_x.shape)), a_x)
        yield _check("sparse", error, g.rtol, "the sparse matrix differs by {error:.1e} (rtol {rtol:.0e}).")


def _forward(g: Given) -> Iterator[OperatorCheck]:
    """``Re ⟨ȳ, Ȧ x⟩ = Re ⟨Ȧᴴ ȳ, x⟩ = Re Σ conj(p̄) ṗ``: the forward modes are transposes of ``params_vjp``."""
    y, x = g.random(g.apply(g.x)), _in_batch(g)
    dots = tuple(g.random(p) for p in g.a.params)
    bars = g.a.params_vjp(g.a.params, y, x)
    terms = [_dot(bar, dot).real for bar, dot in zip(bars, dots, strict=True)]
    for name, motion, given, other in (("params_jvp", g.a.params_jvp, x, y), ("adjoint_jvp", g.a.adjoint_jvp, y, x)):
        if motion is None:
            continue
        moved = motion(g.a.params, dots, given)
        # Relative to the lengths, because the inner product may be small
        size = _norm(moved) * _norm(other) + sum(map(abs, terms))
        error = abs(_dot(moved, other).real - sum(terms))
        message = (
            f"{name} is not the transpose of params_vjp: off by {{error:.1e}} of its size (rtol {{rtol:.0e}}). The "
            "most likely cause is a missing conjugate, or a parameter that was left out."
        )
        yield _check(name, error / size if size > 0 else error, g.rtol, message)


CLAIMS: tuple[tuple[Callable[[Given], Iterator[OperatorCheck]], bool], ...] = (
    (_shapes, True), (_dtypes, True), (_arguments, True), (_linear, True), (_adjoint, False), (_batch, False),
    (_self_adjoint, False), (_positive_definite, False), (_hooks, False), (_params_vjp, True), (_forward, False),
)  # fmt: skip
"""The claims in order, each with a flag whether the following claims depend on it."""
