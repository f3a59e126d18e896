"""Operators made of one or several operators; their parameters follow one another in one flat tuple.

A coefficient that is an array is the last parameter. The gradient of ``Re ⟨ȳ, B x⟩`` follows from ``Re ⟨ȳ, Ḃ x⟩``;
vjp(ȳ, x) is that of A, and vjp_i(ȳ, x) that of A_i:

    scaled     B = c A           ⟨ȳ, ċ A x + c Ȧ x⟩              c̄ = Σ ȳ conj(A x),  vjp(conj(c) ȳ, x)
    adjoint    B = Aᴴ            ⟨ȳ, Ȧᴴ x⟩ = conj ⟨x, Ȧ ȳ⟩       vjp(x, ȳ)
    transpose  B = Aᵀ            ⟨ȳ, Ȧᵀ x⟩ = ⟨conj x, Ȧ conj ȳ⟩  vjp(conj x, conj ȳ)
    normal     B = AᴴA + ρ       ⟨A ȳ, Ȧ x⟩ + conj ⟨A x, Ȧ ȳ⟩    vjp(A ȳ, x) + vjp(A x, ȳ),  ρ̄ = Re Σ ȳ conj(x)
    add        B = Σ A_i         ⟨ȳ, Σ Ȧ_i x⟩                    vjp_i(ȳ, x)
    compose    B = A_1 A_2       ⟨ȳ, Ȧ_1 A_2 x + A_1 Ȧ_2 x⟩      vjp_1(ȳ, A_2 x),  vjp_2(A_1ᴴ ȳ, x)
    stack      B = [A_i]         Σ ⟨ȳ_i, Ȧ_i x⟩                  vjp_i(ȳ_i, x)
    block      B = diag(A_i)     Σ ⟨ȳ_i, Ȧ_i x_i⟩                vjp_i(ȳ_i, x_i)
    kronecker  B = A_1 ⊗ A_2     the product of A_1 ⊗ I and I ⊗ A_2, each along its own axes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add as plus
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

from ddnref._core.arrays import Array, conj, full, is_complex, namespace
from ddnref._core.checks import check_precision
from ddnref._kernels.public import public
from ddnref.operators._elementary import as_operator, coefficient
from ddnref.operators._operator import (
    ALGEBRA,
    LinearOperator,
    Params,
    Structure,
    coefficient_bar,
    is_array,
    motions_of,
    shared,
    times,
)


@public
def scaled(
    operator: Array | LinearOperator, c: Array | float | complex, /, *, positive_definite: bool | None = None
) -> LinearOperator:
    """An operator times a number.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)
    c : (...) array, or a number
        One number for each item of the batch; its gradient is ``Σ ȳ conj(A x)``, real for real `c`.
    positive_definite : bool, optional
        Whether the product is known to be positive definite, which is not read from the values of an array `c`.
        Default: as `operator` for a positive number, else False.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.scaled(np.eye(2), np.asarray(3.0))(np.ones(2))
    array([3., 3.])
    """
    a = as_operator(operator)
    c = coefficient("c", c, a.params)
    parameter = is_array(c)
    # A real multiple of a self-adjoint operator is self-adjoint.
    flag = a.self_adjoint and not (is_complex(c) if parameter else isinstance(c, complex))
    # Only a Python number has a sign that is known without reading a value.
    known = a.positive_definite and isinstance(c, (int, float)) and c > 0
    positive = known if positive_definite is None else positive_definite
    # Structures hold no arrays, so that parameters can be traced and replaced.
    of = shared(_Scaled, a._replace(params=()), None if parameter else c, flag, positive)
    params = (*a.params, c) if parameter else a.params
    return LinearOperator(
        params, of.apply, of.adjoint, of.params_vjp, a.domain_shape, a.range_shape, flag, positive, prepare=of.prepare,
        **motions_of(of, a),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Scaled(Structure):
    a: LinearOperator
    constant: float | complex | None
    """The coefficient; ``None`` if it is a parameter."""
    self_adjoint: bool
    positive_definite: bool

    def apply(self, params: Params, x: Array) -> Array:
        p, c = _split(params, self.constant)
        return times(c, self.a.apply(p, x), len(self.a.range_shape))

    def adjoint(self, params: Params, y: Array) -> Array:
        p, c = _split(params, self.constant)
        return self.a.adjoint(p, times(_conj(c), y, len(self.a.range_shape)))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        (p, c), n = _split(params, self.constant), len(self.a.range_shape)
        # vjp(conj(c) ȳ, x),  c̄ = Σ ȳ conj(A x)
        p_bar = self.a.params_vjp(p, times(_conj(c), y_bar, n), x)
        return p_bar if self.constant is not None else (*p_bar, coefficient_bar(y_bar, self.a.apply(p, x), c, n))

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        (p, c), (p_dot, c_dot) = _split(params, self.constant), _split(params_dot, self.constant)
        n = len(self.a.range_shape)
        # c Ȧ x + ċ A x
        moved = times(c, self.a.params_jvp(p, p_dot, x), n)  # type: ignore[misc]
        return moved if self.constant is not None else moved + times(c_dot, self.a.apply(p, x), n)

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        (p, c), (p_dot, c_dot) = _split(params, self.constant), _split(params_dot, self.constant)
        n = len(self.a.range_shape)
        # conj(c) Ȧᴴ y + conj(ċ) Aᴴ y
        moved = self.a.adjoint_jvp(p, p_dot, times(_conj(c), y, n))  # type: ignore[misc]
        return moved if self.constant is not None else moved + self.a.adjoint(p, times(_conj(c_dot), y, n))

    def prepare(self, params: Params) -> LinearOperator:
        p, c = _split(params, self.constant)
        fast = scaled(self.a._replace(params=p).prepared(), c)
        return fast._replace(self_adjoint=self.self_adjoint, positive_definite=self.positive_definite)


@public
def adjoint(operator: Array | LinearOperator, /) -> LinearOperator:
    """The adjoint ``Aᴴ`` as an operator; its ``params_vjp(ȳ, x)`` is that of A with the two vectors exchanged.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.adjoint(np.asarray([[1.0, 2.0], [0.0, 1.0]]))(np.asarray([1.0, 1.0]))
    array([1., 3.])
    """
    a = as_operator(operator)
    of = shared(_Adjoint, a._replace(params=()))
    # A and Aᴴ exchange their products, shapes and forward modes.
    flags = a.self_adjoint, a.positive_definite
    return LinearOperator(
        a.params, a.adjoint, a.apply, of.params_vjp, a.range_shape, a.domain_shape, *flags, prepare=of.prepare,
        params_jvp=a.adjoint_jvp, adjoint_jvp=a.params_jvp,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Adjoint(Structure):
    a: LinearOperator

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        return self.a.params_vjp(params, x, y_bar)

    def prepare(self, params: Params) -> LinearOperator:
        return adjoint(self.a._replace(params=params).prepared())


@public
def transpose(operator: Array | LinearOperator, /) -> LinearOperator:
    """The transpose ``Aᵀ`` as an operator: ``Aᵀ x`` is the conjugate of ``Aᴴ`` times that of x.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.transpose(np.asarray([[1.0, 2.0j], [0.0, 1.0]]))(np.asarray([1.0 + 0j, 0.0]))
    array([1.+0.j, 0.+2.j])
    """
    a = as_operator(operator)
    of = shared(_Transpose, a._replace(params=()))
    flags = a.self_adjoint, a.positive_definite  # those of the conjugate
    return LinearOperator(
        a.params, of.apply, of.adjoint, of.params_vjp, a.range_shape, a.domain_shape, *flags, prepare=of.prepare,
        **motions_of(of, a),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Transpose(Structure):
    a: LinearOperator

    def apply(self, params: Params, x: Array) -> Array:
        return conj(self.a.adjoint(params, conj(x)))

    def adjoint(self, params: Params, y: Array) -> Array:
        return conj(self.a.apply(params, conj(y)))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        return self.a.params_vjp(params, conj(x), conj(y_bar))

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        return conj(self.a.adjoint_jvp(params, params_dot, conj(x)))  # type: ignore[misc]

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        return conj(self.a.params_jvp(params, params_dot, conj(y)))  # type: ignore[misc]

    def prepare(self, params: Params) -> LinearOperator:
        return transpose(self.a._replace(params=params).prepared())


@public
def normal(
    operator: Array | LinearOperator,
    damping: Array | float | None = None,
    /,
    *,
    positive_definite: bool | None = None,
) -> LinearOperator:
    """The self-adjoint operator of the normal equations, ``AᴴA + ρ I``.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)
    damping : (...) real array, or a real number, optional
        ρ, one number for each item of the batch.
    positive_definite : bool, optional
        Whether the operator is known to be positive definite. Default: True with damping, which is assumed to be
        positive (`ddnref.krylov.cg` reports where it is not); False without, because A may have a null space.

    Notes
    -----
    The gradient with respect to the parameters of A is ``vjp(A ȳ, x) + vjp(A x, ȳ)``, with respect to the damping
    ``ρ̄ = Re Σ ȳ conj(x)``. If A has a cheaper form of ``AᴴA`` in ``A.gram``, as `convolution` does, that is used. For
    several data terms use ``normal(stack(A, B), ρ)``, for a weighted regulariser D
    ``add(normal(A), scaled(normal(D), w), positive_definite=True)``.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.normal(np.asarray([[1.0, 2.0]]), np.asarray(0.5))(np.asarray([1.0, 1.0]))
    array([3.5, 6.5])
    """
    a = as_operator(operator)
    damping = None if damping is None else coefficient("damping", damping, a.params, real=True)
    parameter = is_array(damping)
    positive = damping is not None if positive_definite is None else positive_definite
    of = shared(_Normal, a._replace(params=()), parameter, None if parameter else damping, positive)
    params = (*a.params, damping) if parameter else a.params
    return LinearOperator(
        params, of.apply, of.apply, of.params_vjp, a.domain_shape, a.domain_shape, True, positive, prepare=of.prepare,
        **motions_of(of, a),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Normal(Structure):
    a: LinearOperator
    parameter: bool
    """Whether the damping is a parameter."""
    constant: float | None
    """The damping if it is none; ``None`` for no damping."""
    positive_definite: bool

    def split(self, params: Params) -> tuple[Params, Any]:
        return _split(params, None) if self.parameter else (params, self.constant)

    def apply(self, params: Params, x: Array) -> Array:
        p, rho = self.split(params)
        # AᴴA x + ρ x, by the cheaper form where A has one
        if self.a.gram is not None:
            fast = self.a.gram(p, rho)
            return fast.apply(fast.params, x)
        y = self.a.adjoint(p, self.a.apply(p, x))
        return y if rho is None else y + times(rho, x, len(self.a.domain_shape))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        (p, rho), a = self.split(params), self.a
        # vjp(A ȳ, x) + vjp(A x, ȳ)
        left, right = a.params_vjp(p, a.apply(p, y_bar), x), a.params_vjp(p, a.apply(p, x), y_bar)
        p_bar = tuple(u + v for u, v in zip(left, right, strict=True))
        # ρ̄ = Re Σ ȳ conj(x)
        return (*p_bar, coefficient_bar(y_bar, x, rho, len(a.domain_shape))) if self.parameter else p_bar

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        # Aᴴ Ȧ x + Ȧᴴ A x + ρ̇ x
        ((p, _), (p_dot, rho_dot)), a = (self.split(params), self.split(params_dot)), self.a
        moved = a.adjoint(p, a.params_jvp(p, p_dot, x))  # type: ignore[misc]
        moved = moved + a.adjoint_jvp(p, p_dot, a.apply(p, x))  # type: ignore[misc]
        return moved + times(rho_dot, x, len(a.domain_shape)) if self.parameter else moved

    adjoint_jvp = params_jvp

    def prepare(self, params: Params) -> LinearOperator:
        p, rho = self.split(params)
        fast = normal(self.a._replace(params=p).prepared(), rho) if self.a.gram is None else self.a.gram(p, rho)
        return fast._replace(positive_definite=self.positive_definite)


@public
def add(*operators: Array | LinearOperator, positive_definite: bool | None = None) -> LinearOperator:
    """The sum of operators, self-adjoint if all are.

    Parameters
    ----------
    *operators : LinearOperators, or arrays (..., n, m)
        With equal domains and equal ranges; their batch axes broadcast.
    positive_definite : bool, optional
        Whether the sum is known to be positive definite; default: whether all operators are. It is if one operator is
        and all others are at least semidefinite.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.add(np.eye(2), ddnref.operators.diagonal(np.asarray([1.0, 2.0])))(np.ones(2))
    array([2., 3.])
    """
    given, parts = _parts("add", operators)
    first = parts.operators[0]
    for i, a in enumerate(parts.operators):
        _same(f"operators[{i}]", "domain_shape", a.domain_shape, first.domain_shape)
        _same(f"operators[{i}]", "range_shape", a.range_shape, first.range_shape)

    # A sum has a property if all terms have it.
    flag = all(a.self_adjoint for a in parts.operators)
    positive = all(a.positive_definite for a in parts.operators) if positive_definite is None else positive_definite
    of = shared(_Sum, parts, positive)
    return LinearOperator(
        given, of.apply, of.adjoint, of.params_vjp, first.domain_shape, first.range_shape, flag, positive,
        prepare=of.prepare, **motions_of(of, *parts.operators),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Sum(Structure):
    parts: _Parts
    positive_definite: bool

    def apply(self, params: Params, x: Array) -> Array:
        return reduce(plus, (a.apply(p, x) for a, p in self.parts.of(params)))

    def adjoint(self, params: Params, y: Array) -> Array:
        return reduce(plus, (a.adjoint(p, y) for a, p in self.parts.of(params)))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        return tuple(p_bar for a, p in self.parts.of(params) for p_bar in a.params_vjp(p, y_bar, x))

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        return reduce(plus, (a.params_jvp(p, d, x) for a, p, d in self.parts.moving(params, params_dot)))

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        return reduce(plus, (a.adjoint_jvp(p, d, y) for a, p, d in self.parts.moving(params, params_dot)))

    def prepare(self, params: Params) -> LinearOperator:
        return add(*self.parts.prepared(params))._replace(positive_definite=self.positive_definite)


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
        Properties of the product; a single operator keeps its own. For ``AᴴA`` use `normal`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.compose(ddnref.operators.mask(np.asarray([1.0, 0.0])), np.ones((2, 2)))(np.ones(2))
    array([2., 0.])
    """
    given, parts = _parts("compose", operators)
    for i, (a, b) in enumerate(zip(parts.operators, parts.operators[1:], strict=False)):
        _same(f"operators[{i}]", "domain_shape", a.domain_shape, b.range_shape)
    # Flags of the factors say nothing about a product of several.
    last, alone = parts.operators[-1], len(parts.operators) == 1
    flag = self_adjoint or positive_definite or (alone and last.self_adjoint)
    positive = positive_definite or (alone and last.positive_definite)
    of = shared(_Product, parts, flag, positive)
    return LinearOperator(
        given, of.apply, of.adjoint, of.params_vjp, last.domain_shape, parts.operators[0].range_shape, flag, positive,
        prepare=of.prepare, **motions_of(of, *parts.operators),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Product(Structure):
    parts: _Parts
    self_adjoint: bool
    positive_definite: bool

    def apply(self, params: Params, x: Array) -> Array:
        for a, p in reversed(self.parts.of(params)):
            x = a.apply(p, x)
        return x

    def adjoint(self, params: Params, y: Array) -> Array:
        for a, p in self.parts.of(params):
            y = a.adjoint(p, y)
        return y

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        # The argument of each factor, for the last factor x itself
        pairs, arguments = self.parts.of(params), [x]
        for a, p in reversed(pairs[1:]):
            arguments.append(a.apply(p, arguments[-1]))
        # ȳ goes down through the adjoints, from the first factor to the last.
        bars: list[Array] = []
        for i, (a, p) in enumerate(pairs):
            bars.extend(a.params_vjp(p, y_bar, arguments[-1 - i]))
            y_bar = y_bar if i + 1 == len(pairs) else a.adjoint(p, y_bar)
        return tuple(bars)

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        moving = reversed(self.parts.moving(params, params_dot))
        return _product_rule([(a.apply, a.params_jvp, p, d) for a, p, d in moving], x)

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        moving = self.parts.moving(params, params_dot)
        return _product_rule([(a.adjoint, a.adjoint_jvp, p, d) for a, p, d in moving], y)

    def prepare(self, params: Params) -> LinearOperator:
        fast = compose(*self.parts.prepared(params))
        return fast._replace(self_adjoint=self.self_adjoint, positive_definite=self.positive_definite)


def _product_rule(factors: list[tuple[Callable[..., Array], Callable[..., Array], Params, Params]], x: Array) -> Array:
    """The tangent of a product of maps, each given as ``A(p, x)``, ``Ȧ(p, p_dot, x)``, p and p_dot, the first first."""
    x_dot = None
    for product, motion, p, p_dot in factors:
        moved = motion(p, p_dot, x)
        x_dot = moved if x_dot is None else moved + product(p, x_dot)
        x = product(p, x)
    return x_dot


@public
def stack(*operators: Array | LinearOperator) -> LinearOperator:
    r"""Several operators of one vector, their results side by side.

    Parameters
    ----------
    *operators : LinearOperators, or arrays (..., n, m)
        With equal domains.

    Notes
    -----
    Where the ranges have equal shapes, the range is ``(j, *range_shape)`` for j operators: one more axis, behind the
    batch axes. Where they differ, all results are flattened and follow one another in one axis.
    ``normal(stack(A, B), ρ)`` is ``AᴴA + BᴴB + ρ``.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.stack(np.eye(2), 2 * np.eye(2))(np.ones(2))
    array([[1., 1.],
           [2., 2.]])
    """
    given, parts = _parts("stack", operators)
    domain = parts.operators[0].domain_shape
    for i, a in enumerate(parts.operators):
        _same(f"operators[{i}]", "domain_shape", a.domain_shape, domain)
    of = shared(_Stack, parts, _Side.of(a.range_shape for a in parts.operators))
    # The sum of Gram operators is worth it if one of them is cheaper than two products.
    some = any(a.gram is not None for a in parts.operators)
    return LinearOperator(
        given, of.apply, of.adjoint, of.params_vjp, domain, of.side.shape, gram=of.gram if some else None,
        prepare=of.prepare, **motions_of(of, *parts.operators),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Stack(Structure):
    parts: _Parts
    side: _Side

    def apply(self, params: Params, x: Array) -> Array:
        return self.side.join([a.apply(p, x) for a, p in self.parts.of(params)])

    def adjoint(self, params: Params, y: Array) -> Array:
        pairs = zip(self.parts.of(params), self.side.part(y), strict=True)
        return reduce(plus, (a.adjoint(p, y_i) for (a, p), y_i in pairs))

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        pairs = zip(self.parts.of(params), self.side.part(y_bar), strict=True)
        return tuple(p_bar for (a, p), y_bar_i in pairs for p_bar in a.params_vjp(p, y_bar_i, x))

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        return self.side.join([a.params_jvp(p, d, x) for a, p, d in self.parts.moving(params, params_dot)])

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        moving = zip(self.parts.moving(params, params_dot), self.side.part(y), strict=True)
        return reduce(plus, (a.adjoint_jvp(p, d, y_i) for (a, p, d), y_i in moving))

    def gram(self, params: Params, shift: Array | float | None) -> LinearOperator:
        # Σ A_iᴴ A_i + shift, each term in its own cheapest form, the shift in the first
        filled = [a._replace(params=p) for a, p in self.parts.of(params)]
        normals = [normal(a, None if i else shift).prepared() for i, a in enumerate(filled)]
        return add(*normals)._replace(positive_definite=shift is not None)

    def prepare(self, params: Params) -> LinearOperator:
        return stack(*self.parts.prepared(params))


@public
def block_diagonal(*operators: Array | LinearOperator) -> LinearOperator:
    """Several operators of one vector each, side by side; self-adjoint or positive definite if all of them are.

    Parameters
    ----------
    *operators : LinearOperators, or arrays (..., n, m)
        Their batch axes broadcast.

    Raises
    ------
    TypeError
        Without operators, or if their parameters differ in library, device or precision.

    Notes
    -----
    Where the domains of j operators have equal shapes, the domain is ``(j, *domain_shape)``: one more axis, behind the
    batch axes. Where they differ, all vectors are flattened and follow one another in one axis. The same holds for the
    ranges, as in `stack`: ``compose(block_diagonal(A, B), stack(C, D))`` is ``stack(A C, B D)``. A product takes one
    of each operator.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.block_diagonal(np.eye(2), np.ones((1, 3)))(np.asarray([1.0, 2.0, 3.0, 4.0, 5.0]))
    array([ 1.,  2., 12.])
    """
    given, parts = _parts("block_diagonal", operators)
    sides = (_Side.of(a.domain_shape for a in parts.operators), _Side.of(a.range_shape for a in parts.operators))
    of = shared(_Blocks, parts, *sides)
    flags = all(a.self_adjoint for a in parts.operators), all(a.positive_definite for a in parts.operators)
    some = any(a.gram is not None for a in parts.operators)  # as in `stack`
    return LinearOperator(
        given, of.apply, of.adjoint, of.params_vjp, sides[0].shape, sides[1].shape, *flags,
        gram=of.gram if some else None, prepare=of.prepare, **motions_of(of, *parts.operators),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Blocks(Structure):
    parts: _Parts
    domain: _Side
    target: _Side

    def apply(self, params: Params, x: Array) -> Array:
        pairs = zip(self.parts.of(params), self.domain.part(x), strict=True)
        return self.target.join([a.apply(p, x_i) for (a, p), x_i in pairs])

    def adjoint(self, params: Params, y: Array) -> Array:
        pairs = zip(self.parts.of(params), self.target.part(y), strict=True)
        return self.domain.join([a.adjoint(p, y_i) for (a, p), y_i in pairs])

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        vectors = zip(self.parts.of(params), self.target.part(y_bar), self.domain.part(x), strict=True)
        return tuple(p_bar for (a, p), y_bar_i, x_i in vectors for p_bar in a.params_vjp(p, y_bar_i, x_i))

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        moving = zip(self.parts.moving(params, params_dot), self.domain.part(x), strict=True)
        return self.target.join([a.params_jvp(p, d, x_i) for (a, p, d), x_i in moving])

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        moving = zip(self.parts.moving(params, params_dot), self.target.part(y), strict=True)
        return self.domain.join([a.adjoint_jvp(p, d, y_i) for (a, p, d), y_i in moving])

    def gram(self, params: Params, shift: Array | float | None) -> LinearOperator:
        # Each block in its own cheapest form
        normals = [normal(a._replace(params=p), shift).prepared() for a, p in self.parts.of(params)]
        return block_diagonal(*normals)._replace(positive_definite=shift is not None)

    def prepare(self, params: Params) -> LinearOperator:
        return block_diagonal(*self.parts.prepared(params))


@public
def kronecker(*operators: Array | LinearOperator) -> LinearOperator:
    r"""The Kronecker product ``A ⊗ B ⊗ …``, each operator along axes of the vector that belong to it.

    It is self-adjoint or positive definite if all operators are.

    Parameters
    ----------
    *operators : LinearOperators, or arrays (..., n, m)
        Their batch axes broadcast.

    Raises
    ------
    TypeError
        Without operators, or if their parameters differ in library, device or precision.

    Notes
    -----
    A vector has the axes of all domains, one after the other: for two matrices it is a matrix X, and the image is
    ``A X Bᵀ``. Flattened in this order the map is that of `numpy.kron`. The matrix of the product is never formed. With
    the domain of A of m entries and the range of B of n entries, a product takes m products with B, and then n with A,
    all in one call each, and one more of each where a vector has fewer batch axes than parameters may have.

    Examples
    --------
    >>> import numpy as np
    >>> a = ddnref.operators.kronecker(np.asarray([[1.0, 1.0]]), np.asarray([[1.0, 0.0], [0.0, 2.0]]))
    >>> a(np.asarray([[1.0, 2.0], [3.0, 4.0]]))
    array([[ 4., 12.]])
    """
    parts = [as_operator(a, f"operators[{i}]") for i, a in enumerate(operators)]
    if not parts:
        raise TypeError("kronecker needs at least one operator.")
    # Operator i finds the ranges of those behind it, which come first, and the domains of those in front.
    factors = []
    for i, a in enumerate(parts):
        before = sum((tuple(b.domain_shape) for b in parts[:i]), ())
        factors.append(_along(a, before, sum((tuple(b.range_shape) for b in parts[i + 1 :]), ())))
    flags = all(a.self_adjoint for a in parts), all(a.positive_definite for a in parts)
    return compose(*factors, self_adjoint=flags[0], positive_definite=flags[1])


def _along(a: LinearOperator, before: tuple[int, ...], after: tuple[int, ...]) -> LinearOperator:
    """The operator ``I ⊗ A ⊗ I`` of vectors with more axes in front of those of A and behind."""
    of = shared(_Along, a._replace(params=()), before, after)
    shapes = (*before, *a.domain_shape, *after), (*before, *a.range_shape, *after)
    return LinearOperator(
        a.params, of.apply, of.adjoint, of.params_vjp, *shapes, a.self_adjoint, a.positive_definite,
        prepare=of.prepare, **motions_of(of, a),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Along(Structure):
    a: LinearOperator
    before: tuple[int, ...]
    after: tuple[int, ...]

    def apply(self, params: Params, x: Array) -> Array:
        return self.map(self.a.apply, params, x, self.a.domain_shape, self.a.range_shape)

    def adjoint(self, params: Params, y: Array) -> Array:
        return self.map(self.a.adjoint, params, y, self.a.range_shape, self.a.domain_shape)

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:
        # The vectors along A are right-hand sides that share its parameters.
        n, m = (len(self.before) + len(shape) + len(self.after) for shape in (self.a.range_shape, self.a.domain_shape))
        lead = np.broadcast_shapes(tuple(y_bar.shape[: y_bar.ndim - n]), tuple(x.shape[: x.ndim - m]))
        xp = array_api_compat.array_namespace(y_bar)
        y_bar = xp.broadcast_to(y_bar, (*lead, *y_bar.shape[y_bar.ndim - n :]))
        x = xp.broadcast_to(x, (*lead, *x.shape[x.ndim - m :]))
        vectors = self.rows(y_bar, self.a.range_shape), self.rows(x, self.a.domain_shape)
        return self.a.params_vjp(params, *vectors)

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:
        motion = self.a.params_jvp
        return self.map(
            lambda p, z: motion(p, params_dot, z),  # type: ignore[misc]
            params, x, self.a.domain_shape, self.a.range_shape,
        )  # fmt: skip

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:
        motion = self.a.adjoint_jvp
        return self.map(
            lambda p, z: motion(p, params_dot, z),  # type: ignore[misc]
            params, y, self.a.range_shape, self.a.domain_shape,
        )  # fmt: skip

    def prepare(self, params: Params) -> LinearOperator:
        return _along(self.a._replace(params=params).prepared(), self.before, self.after)

    def map(
        self,
        product: Callable[[Params, Array], Array],
        params: Params,
        x: Array,
        shape: tuple[int, ...],
        target: tuple[int, ...],
    ) -> Array:
        """A product along the axes of A, from vectors of `shape` to those of `target`."""
        xp, count = array_api_compat.array_namespace(x), math.prod(self.before) * math.prod(self.after)
        rows = self.rows(x, shape)
        lead = tuple(rows.shape[1 : rows.ndim - len(shape)])
        # Vectors in front must not meet a batch axis of the parameters. Their first one shows how many there are.
        if len(lead) < max((p.ndim for p in params), default=0):
            first = rows[0, ...] if count else full((*lead, *shape), 0.0, x)
            image = product(params, first)
            batch = image.ndim - len(target)
            rows = xp.reshape(rows, (count, *(1,) * (batch - len(lead)), *lead, *shape))
        y = product(params, rows)
        # Bring the axes back: those of the batch, those before A, of A, and after A
        lead = tuple(y.shape[1 : y.ndim - len(target)])
        y = xp.reshape(y, (*self.before, *self.after, *lead, *target))
        b, c, k = len(self.before), len(self.after), len(lead)
        own = range(b + c + k, b + c + k + len(target))
        return xp.permute_dims(y, (*range(b + c, b + c + k), *range(b), *own, *range(b, b + c)))

    def rows(self, x: Array, shape: tuple[int, ...]) -> Array:
        """Vectors ``(..., *before, *shape, *after)`` as ``(count, ..., *shape)``."""
        xp, b, c, m = array_api_compat.array_namespace(x), len(self.before), len(self.after), len(shape)
        k = x.ndim - b - m - c
        lead, own = range(k), range(k + b, k + b + m)
        x = xp.permute_dims(x, (*range(k, k + b), *range(k + b + m, x.ndim), *lead, *own))
        return xp.reshape(x, (math.prod(self.before) * math.prod(self.after), *x.shape[b + c :]))


# --- parts and their parameters -----------------------------------------------------------------------------


class _Parts(NamedTuple):
    """Several operators without their parameters, and where these start in the tuple of all parameters."""

    operators: tuple[LinearOperator, ...]
    starts: tuple[int, ...]

    def of(self, params: Params) -> list[tuple[LinearOperator, Params]]:
        """Pairs of an operator and its parameters."""
        return [(a, params[i:j]) for a, i, j in zip(self.operators, self.starts, self.starts[1:], strict=False)]

    def moving(self, params: Params, params_dot: Params) -> list[tuple[Any, Params, Params]]:
        """Each operator with its parameters and their tangents."""
        return [(a, p, d) for (a, p), (_, d) in zip(self.of(params), self.of(params_dot), strict=True)]

    def prepared(self, params: Params) -> list[LinearOperator]:
        return [a._replace(params=p).prepared() for a, p in self.of(params)]


def _parts(function: str, given: tuple[Array | LinearOperator, ...]) -> tuple[Params, _Parts]:
    """All parameters, and the operators without them."""
    if not given:
        raise TypeError(f"{function} needs at least one operator.")
    operators = tuple(as_operator(a, f"operators[{i}]") for i, a in enumerate(given))
    named = {f"operators[{i}].params[{j}]": p for i, a in enumerate(operators) for j, p in enumerate(a.params)}
    if named:
        check_precision(namespace(**named), **named)
    # The parameters of operator i start at the sum of the counts before it.
    counts = [len(a.params) for a in operators]
    starts = tuple(sum(counts[:i]) for i in range(len(counts) + 1))
    return tuple(named.values()), _Parts(tuple(a._replace(params=()) for a in operators), starts)


class _Side(NamedTuple):
    """Vectors of several operators side by side: one more axis for equal shapes, all in one axis for others."""

    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, shapes: Iterable[tuple[int, ...]]) -> _Side:
        return cls(tuple(tuple(shape) for shape in shapes))

    @property
    def equal(self) -> bool:
        return len(set(self.shapes)) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of all vectors together."""
        return (len(self.shapes), *self.shapes[0]) if self.equal else (sum(map(math.prod, self.shapes)),)

    def join(self, parts: list[Array]) -> Array:
        """The vectors side by side, after they are broadcast to the same batch axes."""
        xp = array_api_compat.array_namespace(*parts)
        leads = [tuple(y.shape[: y.ndim - len(shape)]) for y, shape in zip(parts, self.shapes, strict=True)]
        lead = np.broadcast_shapes(*leads)
        whole = [xp.broadcast_to(y, (*lead, *shape)) for y, shape in zip(parts, self.shapes, strict=True)]
        if self.equal:
            return xp.stack(whole, axis=len(lead))
        flat = [xp.reshape(y, (*lead, math.prod(shape))) for y, shape in zip(whole, self.shapes, strict=True)]
        return xp.concat(flat, axis=-1)

    def part(self, y: Array) -> list[Array]:
        """The inverse of `join`."""
        if self.equal:
            return [y[(..., i, *(slice(None),) * len(self.shapes[0]))] for i in range(len(self.shapes))]
        # Cut the last axis into vectors, and give each its shape.
        xp, sizes = array_api_compat.array_namespace(y), [math.prod(shape) for shape in self.shapes]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [
            xp.reshape(y[..., start : start + size], (*y.shape[:-1], *shape))
            for start, size, shape in zip(starts, sizes, self.shapes, strict=True)
        ]


def _same(name: str, field: str, shape: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    if tuple(shape) != tuple(wanted):
        raise ValueError(f"{name}.{field} is {tuple(shape)}, expected {tuple(wanted)}: the operators do not fit.")


def _split(params: Params, constant: Any) -> tuple[Params, Any]:
    """The parameters of A and the coefficient, the last one unless it is a constant."""
    return (params[:-1], params[-1]) if constant is None else (params, constant)


def _conj(c: Array | float | complex) -> Array | float | complex:
    return conj(c) if is_array(c) else c.conjugate()


ALGEBRA.update(adjoint=adjoint, transpose=transpose, compose=compose, add=add, scaled=scaled)
