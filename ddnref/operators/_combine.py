"""Operators made of several; their parameters follow one another in one flat tuple.

The gradient of ``Re ⟨ȳ, B x⟩`` follows from ``Re ⟨ȳ, Ḃ x⟩``; vjp_i(ȳ, x) is that of A_i:

    add        B = Σ A_i         ⟨ȳ, Σ Ȧ_i x⟩                    vjp_i(ȳ, x)
    compose    B = A_1 A_2       ⟨ȳ, Ȧ_1 A_2 x + A_1 Ȧ_2 x⟩      vjp_1(ȳ, A_2 x),  vjp_2(A_1ᴴ ȳ, x)
    stack      B = [A_i]         Σ ⟨ȳ_i, Ȧ_i x⟩                  vjp_i(ȳ_i, x)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import array_api_compat

from ddnref._core.arrays import Array
from ddnref._kernels.public import public
from ddnref.operators._algebra import bare_of, normal
from ddnref.operators._elementary import as_operator
from ddnref.operators._operator import LinearOperator, Params, broadcast_shape, check_params, motions_of


@public
def add(*operators: Array | LinearOperator, positive_definite: bool | None = None) -> LinearOperator:
    """The sum of operators.

    Parameters
    ----------
    *operators : LinearOperators, or arrays (..., n, m)
        With equal domains and equal ranges; their batch axes broadcast.
    positive_definite : bool, optional
        What is known; default: whether all of them are. One that is, and others that are at least semidefinite, are
        positive definite together.

    Returns
    -------
    operator : LinearOperator
        With the parameters of all, one after the other. Self-adjoint if all are.

    Raises
    ------
    TypeError, ValueError
        Nothing to add; parameters of several libraries, devices or precisions; shapes that differ.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.add(np.eye(2), ddnref.operators.diagonal(np.asarray([1.0, 2.0])))(np.ones(2))
    array([2., 3.])
    """
    parts = _parts("add", operators)
    first = parts.operators[0]
    for i, a in enumerate(parts.operators):
        _same(f"operators[{i}]", "domain_shape", a.domain_shape, first.domain_shape)
        _same(f"operators[{i}]", "range_shape", a.range_shape, first.range_shape)
    bare = parts.bare()

    def apply(params: Params, x: Array) -> Array:
        return _sum(a.apply(p, x) for a, p in bare.of(params))

    def adjoint(params: Params, y: Array) -> Array:
        return _sum(a.adjoint(p, y) for a, p in bare.of(params))

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:
        return tuple(p_bar for a, p in bare.of(params) for p_bar in a.params_vjp(p, y_bar, x))

    def params_jvp(params: Params, params_dot: Params, x: Array) -> Array:
        return _sum(a.params_jvp(p, d, x) for a, p, d in bare.moving(params, params_dot))

    def adjoint_jvp(params: Params, params_dot: Params, y: Array) -> Array:
        return _sum(a.adjoint_jvp(p, d, y) for a, p, d in bare.moving(params, params_dot))

    flag = all(a.self_adjoint for a in parts.operators)
    positive = all(a.positive_definite for a in parts.operators) if positive_definite is None else positive_definite

    def prepare(params: Params) -> LinearOperator:
        return add(*bare.prepared(params))._replace(positive_definite=positive)

    shapes = first.domain_shape, first.range_shape
    motions = motions_of(parts.operators, params_jvp, adjoint_jvp)
    return LinearOperator(parts.params, apply, adjoint, params_vjp, *shapes, flag, positive, prepare=prepare, **motions)


@public
def compose(
    *operators: Array | LinearOperator, self_adjoint: bool = False, positive_definite: bool = False
) -> LinearOperator:
    """The product of operators, the last one applied first: ``compose(a, b)(x) = a(b(x))``.

    Parameters
    ----------
    *operators : LinearOperators, or arrays (..., n, m)
        The domain of each is the range of the next.
    self_adjoint, positive_definite : bool, default False
        What is known of the product; one operator alone keeps its own flags. ``AᴴA`` is `normal`.

    Returns
    -------
    operator : LinearOperator
        With the parameters of all, one after the other.

    Raises
    ------
    TypeError, ValueError
        Nothing to compose; parameters of several libraries, devices or precisions; shapes that do not follow.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.compose(ddnref.operators.mask(np.asarray([1.0, 0.0])), np.ones((2, 2)))(np.ones(2))
    array([2., 0.])
    """
    parts = _parts("compose", operators)
    for i, (a, b) in enumerate(zip(parts.operators, parts.operators[1:], strict=False)):
        _same(f"operators[{i}]", "domain_shape", a.domain_shape, b.range_shape)
    bare, last = parts.bare(), parts.operators[-1]

    def apply(params: Params, x: Array) -> Array:
        for a, p in reversed(bare.of(params)):
            x = a.apply(p, x)
        return x

    def adjoint(params: Params, y: Array) -> Array:
        for a, p in bare.of(params):
            y = a.adjoint(p, y)
        return y

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:
        return _bars(bare.of(params), y_bar, x)

    def params_jvp(params: Params, params_dot: Params, x: Array) -> Array:
        parts = reversed(bare.moving(params, params_dot))
        return _moved([(partial(a.params_jvp, p, d), partial(a.apply, p)) for a, p, d in parts], x)

    def adjoint_jvp(params: Params, params_dot: Params, y: Array) -> Array:
        parts = bare.moving(params, params_dot)
        return _moved([(partial(a.adjoint_jvp, p, d), partial(a.adjoint, p)) for a, p, d in parts], y)

    alone = len(parts.operators) == 1
    flag = self_adjoint or positive_definite or (alone and last.self_adjoint)
    positive = positive_definite or (alone and last.positive_definite)

    def prepare(params: Params) -> LinearOperator:
        return compose(*bare.prepared(params))._replace(self_adjoint=flag, positive_definite=positive)

    shapes = last.domain_shape, parts.operators[0].range_shape
    motions = motions_of(parts.operators, params_jvp, adjoint_jvp)
    return LinearOperator(parts.params, apply, adjoint, params_vjp, *shapes, flag, positive, prepare=prepare, **motions)


def _bars(pairs: list[tuple[LinearOperator, Params]], y_bar: Array, x: Array) -> Params:
    """Cotangents of the parameters of a product: x goes up to each factor, ȳ down."""
    given = [x]
    for a, p in reversed(pairs[1:]):
        given.append(a.apply(p, given[-1]))
    bars: list[Array] = []
    for i, (a, p) in enumerate(pairs):
        bars.extend(a.params_vjp(p, y_bar, given[-1 - i]))
        y_bar = y_bar if i + 1 == len(pairs) else a.adjoint(p, y_bar)
    return tuple(bars)


def _moved(steps: list[tuple[Callable[[Array], Array], Callable[[Array], Array]]], x: Array) -> Array:
    """How a product of maps moves, each given as ``x -> Ȧ x`` and ``x -> A x``, the first one applied first."""
    moved = None
    for motion, product in steps:
        here = motion(x)
        moved = here if moved is None else here + product(moved)
        x = product(x)
    return moved


@public
def stack(*operators: Array | LinearOperator) -> LinearOperator:
    r"""Several operators of one vector, their results side by side.

    Parameters
    ----------
    *operators : LinearOperators, or arrays (..., n, m)
        With equal domains.

    Returns
    -------
    operator : LinearOperator
        With the parameters of all, one after the other. Where the ranges have equal shapes, the range is
        ``(j, *range_shape)`` for j operators: one more axis, behind the batch axes. Where they differ, all results are
        flattened and follow one another in one axis.

    Raises
    ------
    TypeError, ValueError
        Nothing to stack; parameters of several libraries, devices or precisions; domains that differ.

    Notes
    -----
    ``normal(stack(A, B), ρ)`` is ``AᴴA + BᴴB + ρ``.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.stack(np.eye(2), 2 * np.eye(2))(np.ones(2))
    array([[1., 1.],
           [2., 2.]])
    """
    parts = _parts("stack", operators)
    domain = parts.operators[0].domain_shape
    for i, a in enumerate(parts.operators):
        _same(f"operators[{i}]", "domain_shape", a.domain_shape, domain)
    bare, ranges = parts.bare(), [a.range_shape for a in parts.operators]
    equal = len(set(ranges)) == 1

    def apply(params: Params, x: Array) -> Array:
        return _joined([a.apply(p, x) for a, p in bare.of(params)], ranges, equal)

    def adjoint(params: Params, y: Array) -> Array:
        return _sum(a.adjoint(p, y_i) for (a, p), y_i in zip(bare.of(params), _parted(y, ranges, equal), strict=True))

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:
        bars = zip(bare.of(params), _parted(y_bar, ranges, equal), strict=True)
        return tuple(p_bar for (a, p), y_bar_i in bars for p_bar in a.params_vjp(p, y_bar_i, x))

    def params_jvp(params: Params, params_dot: Params, x: Array) -> Array:
        return _joined([a.params_jvp(p, d, x) for a, p, d in bare.moving(params, params_dot)], ranges, equal)

    def adjoint_jvp(params: Params, params_dot: Params, y: Array) -> Array:
        moving = zip(bare.moving(params, params_dot), _parted(y, ranges, equal), strict=True)
        return _sum(a.adjoint_jvp(p, d, y_i) for (a, p, d), y_i in moving)

    def gram(params: Params, shift: Array | float | None) -> LinearOperator:
        """``Σ A_iᴴ A_i + shift``, each in its own cheapest form, the shift in the first."""
        terms = [(a._replace(params=p), None) for a, p in bare.of(params)]
        first = terms[0][0], shift
        return _prepared_normals([first, *terms[1:]], positive_definite=shift is not None)

    def prepare(params: Params) -> LinearOperator:
        return stack(*bare.prepared(params))

    target = (len(ranges), *ranges[0]) if equal else (sum(map(math.prod, ranges)),)
    some = any(a.gram is not None for a in parts.operators)
    return LinearOperator(
        parts.params, apply, adjoint, params_vjp, domain, target, gram=gram if some else None, prepare=prepare,
        **motions_of(parts.operators, params_jvp, adjoint_jvp),
    )  # fmt: skip


# --- parts and their parameters -----------------------------------------------------------------------------


class _Parts:
    """Several operators and where the parameters of each begin in the tuple of all."""

    def __init__(self, operators: tuple[LinearOperator, ...], starts: tuple[int, ...]) -> None:
        self.operators, self.starts = operators, starts

    @property
    def params(self) -> Params:
        return tuple(p for a in self.operators for p in a.params)

    def bare(self) -> _Parts:
        return _Parts(tuple(bare_of(a) for a in self.operators), self.starts)

    def of(self, params: Params) -> list[tuple[LinearOperator, Params]]:
        """Each operator with its parameters."""
        return [(a, params[i:j]) for a, i, j in zip(self.operators, self.starts, self.starts[1:], strict=False)]

    def moving(self, params: Params, params_dot: Params) -> list[tuple[Any, Params, Params]]:
        """And with what they move by."""
        return [(a, p, d) for (a, p), (_, d) in zip(self.of(params), self.of(params_dot), strict=True)]

    def prepared(self, params: Params) -> list[LinearOperator]:
        return [a._replace(params=p).prepared() for a, p in self.of(params)]


def _parts(function: str, given: tuple[Array | LinearOperator, ...]) -> _Parts:
    if not given:
        raise TypeError(f"{function} needs at least one operator.")
    operators = tuple(as_operator(a, f"operators[{i}]") for i, a in enumerate(given))
    check_params(**{f"operators[{i}].params[{j}]": p for i, a in enumerate(operators) for j, p in enumerate(a.params)})
    counts = [len(a.params) for a in operators]
    return _Parts(operators, tuple(sum(counts[:i]) for i in range(len(counts) + 1)))


def _sum(terms: Iterator[Array]) -> Array:
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def _joined(parts: list[Array], ranges: list[tuple[int, ...]], equal: bool) -> Array:
    """Results side by side, after their batch axes are made alike."""
    xp = array_api_compat.array_namespace(*parts)
    leads = [tuple(y.shape[: y.ndim - len(shape)]) for y, shape in zip(parts, ranges, strict=True)]
    lead = broadcast_shape(*leads)
    whole = [xp.broadcast_to(y, (*lead, *shape)) for y, shape in zip(parts, ranges, strict=True)]
    if equal:
        return xp.stack(whole, axis=len(lead))
    return xp.concat([xp.reshape(y, (*lead, math.prod(s))) for y, s in zip(whole, ranges, strict=True)], axis=-1)


def _parted(y: Array, ranges: list[tuple[int, ...]], equal: bool) -> list[Array]:
    """The results again."""
    if equal:
        return [y[(..., i, *(slice(None),) * len(ranges[0]))] for i in range(len(ranges))]
    xp, sizes = array_api_compat.array_namespace(y), [math.prod(shape) for shape in ranges]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        xp.reshape(y[..., start : start + size], (*y.shape[:-1], *shape))
        for start, size, shape in zip(starts, sizes, ranges, strict=True)
    ]


def _prepared_normals(
    terms: list[tuple[LinearOperator, Array | float | None]], positive_definite: bool
) -> LinearOperator:
    normals = [normal(a, shift).prepared() for a, shift in terms]
    return add(*normals)._replace(positive_definite=positive_definite)


def _same(name: str, field: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name}.{field} is {tuple(shape)}, expected {tuple(wanted)}: the operators do not fit.")
