"""Operators made of one operator; their parameters are its own, and one more for a coefficient.

The gradient of ``Re ⟨ȳ, B x⟩`` follows from ``Re ⟨ȳ, Ḃ x⟩``; vjp(ȳ, x) is that of A:

    scaled     B = c A           ⟨ȳ, ċ A x + c Ȧ x⟩              c̄ = Σ ȳ conj(A x),  vjp(conj(c) ȳ, x)
    adjoint    B = Aᴴ            ⟨ȳ, Ȧᴴ x⟩ = conj ⟨x, Ȧ ȳ⟩       vjp(x, ȳ)
    normal     B = AᴴA + ρ       ⟨A ȳ, Ȧ x⟩ + conj ⟨A x, Ȧ ȳ⟩    vjp(A ȳ, x) + vjp(A x, ȳ),  ρ̄ = Re Σ ȳ conj(x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddnref._core.arrays import Array, conj, is_complex
from ddnref._kernels.public import public
from ddnref.operators._elementary import as_operator, coefficient
from ddnref.operators._operator import LinearOperator, Params, coefficient_bar, is_array, motions_of, times


@public
def scaled(
    operator: Array | LinearOperator, c: Array | float | complex, /, *, positive_definite: bool | None = None
) -> LinearOperator:
    """An operator times a number.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)
    c : (...) array, or a number
        One for each item of the batch. An array is a parameter, the last one; a Python number is a constant.
    positive_definite : bool, optional
        What is known, which for an array `c` is not read from its values. Default: as `operator` for a positive
        number, else False.

    Returns
    -------
    operator : LinearOperator

    Raises
    ------
    TypeError
        If `c` is of another library, device or precision than the parameters.

    Notes
    -----
    ``c̄ = Σ ȳ conj(A x)``, real for real `c`.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.scaled(np.eye(2), np.asarray(3.0))(np.ones(2))
    array([3., 3.])
    """
    a = as_operator(operator)
    c = coefficient("c", c, a.params)
    n, parameter = len(a.range_shape), is_array(c)
    bare, split = bare_of(a), _splitter(c)

    def apply(params: Params, x: Array) -> Array:
        p, c = split(params)
        return times(c, bare.apply(p, x), n)

    def adjoint(params: Params, y: Array) -> Array:
        p, c = split(params)
        return bare.adjoint(p, times(_conj(c), y, n))

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:
        p, c = split(params)
        p_bar = bare.params_vjp(p, times(_conj(c), y_bar, n), x)
        return (*p_bar, coefficient_bar(y_bar, bare.apply(p, x), c, n)) if parameter else p_bar

    def params_jvp(params: Params, params_dot: Params, x: Array) -> Array:
        (p, c), (p_dot, c_dot) = split(params), split(params_dot)
        moved = times(c, bare.params_jvp(p, p_dot, x), n)  # type: ignore[misc]
        return moved + times(c_dot, bare.apply(p, x), n) if parameter else moved

    def adjoint_jvp(params: Params, params_dot: Params, y: Array) -> Array:
        (p, c), (p_dot, c_dot) = split(params), split(params_dot)
        moved = bare.adjoint_jvp(p, p_dot, times(_conj(c), y, n))  # type: ignore[misc]
        return moved + bare.adjoint(p, times(_conj(c_dot), y, n)) if parameter else moved

    def prepare(params: Params) -> LinearOperator:
        p, c = split(params)
        return scaled(bare._replace(params=p).prepared(), c)._replace(self_adjoint=flag, positive_definite=positive)

    flag = a.self_adjoint and not (is_complex(c) if parameter else isinstance(c, complex))
    known = a.positive_definite and isinstance(c, (int, float)) and c > 0
    positive = known if positive_definite is None else positive_definite
    params = (*a.params, c) if parameter else a.params
    return LinearOperator(
        params, apply, adjoint, params_vjp, a.domain_shape, a.range_shape, flag, positive, prepare=prepare,
        **motions_of((a,), params_jvp, adjoint_jvp),
    )  # fmt: skip


@public
def adjoint(operator: Array | LinearOperator, /) -> LinearOperator:
    """The adjoint ``Aᴴ`` as an operator, with the parameters of A.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)

    Returns
    -------
    operator : LinearOperator

    Notes
    -----
    ``Re ⟨ȳ, Ȧᴴ x⟩ = Re ⟨x, Ȧ ȳ⟩``: its ``params_vjp(ȳ, x)`` is that of A with the two exchanged.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.adjoint(np.asarray([[1.0, 2.0], [0.0, 1.0]]))(np.asarray([1.0, 1.0]))
    array([1., 3.])
    """
    a = as_operator(operator)
    bare = bare_of(a)

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:
        return bare.params_vjp(params, x, y_bar)

    def prepare(params: Params) -> LinearOperator:
        return adjoint(bare._replace(params=params).prepared())

    flags = a.self_adjoint, a.positive_definite
    return LinearOperator(
        a.params, a.adjoint, a.apply, params_vjp, a.range_shape, a.domain_shape, *flags, prepare=prepare,
        params_jvp=a.adjoint_jvp, adjoint_jvp=a.params_jvp,
    )  # fmt: skip


@public
def normal(
    operator: Array | LinearOperator,
    damping: Array | float | None = None,
    /,
    *,
    positive_definite: bool | None = None,
) -> LinearOperator:
    """The operator of the normal equations, ``AᴴA + ρ I``.

    Parameters
    ----------
    operator : LinearOperator, or array (..., n, m)
    damping : (...) real array, or a real number, optional
        ρ, one for each item of the batch. An array is a parameter, the last one; a number is a constant.
    positive_definite : bool, optional
        What is known. Default: True with damping, which is taken to be positive (CG reports where it is not); False
        without, because A may have a null space.

    Returns
    -------
    operator : LinearOperator
        Self-adjoint, from ``(..., *domain_shape)`` to the same.

    Raises
    ------
    TypeError
        If `damping` is complex, or of another library, device or precision than the parameters.

    Notes
    -----
    The gradient with respect to the parameters of A is ``vjp(A ȳ, x) + vjp(A x, ȳ)``, that to the damping
    ``ρ̄ = Re Σ ȳ conj(x)``. Where A has a cheaper form of ``AᴴA`` (``A.gram``), as `convolution` has, that is used.
    Several data terms: ``normal(stack(A, B), ρ)``; a weighted regulariser D:
    ``add(normal(A), scaled(normal(D), w), positive_definite=True)``.

    Examples
    --------
    >>> import numpy as np
    >>> ddnref.operators.normal(np.asarray([[1.0, 2.0]]), np.asarray(0.5))(np.asarray([1.0, 1.0]))
    array([3.5, 6.5])
    """
    a = as_operator(operator)
    damping = None if damping is None else coefficient("damping", damping, a.params, real=True)
    n, parameter = len(a.domain_shape), is_array(damping)
    bare, split = bare_of(a), _splitter(damping)

    def apply(params: Params, x: Array) -> Array:
        p, rho = split(params)
        if bare.gram is not None:
            fast = bare.gram(p, rho)
            return fast.apply(fast.params, x)
        y = bare.adjoint(p, bare.apply(p, x))
        return y if rho is None else y + times(rho, x, n)

    def params_vjp(params: Params, y_bar: Array, x: Array) -> Params:
        p, rho = split(params)
        pairs = zip(
            bare.params_vjp(p, bare.apply(p, y_bar), x), bare.params_vjp(p, bare.apply(p, x), y_bar), strict=True
        )
        p_bar = tuple(left + right for left, right in pairs)
        return (*p_bar, coefficient_bar(y_bar, x, rho, n)) if parameter else p_bar

    def params_jvp(params: Params, params_dot: Params, x: Array) -> Array:
        (p, _), (p_dot, rho_dot) = split(params), split(params_dot)
        moved = bare.adjoint(p, bare.params_jvp(p, p_dot, x))  # type: ignore[misc]
        moved = moved + bare.adjoint_jvp(p, p_dot, bare.apply(p, x))  # type: ignore[misc]
        return moved + times(rho_dot, x, n) if parameter else moved

    positive = damping is not None if positive_definite is None else positive_definite

    def prepare(params: Params) -> LinearOperator:
        p, rho = split(params)
        fast = normal(bare._replace(params=p).prepared(), rho) if bare.gram is None else bare.gram(p, rho)
        return fast._replace(positive_definite=positive)

    params = (*a.params, damping) if parameter else a.params
    return LinearOperator(
        params, apply, apply, params_vjp, a.domain_shape, a.domain_shape, True, positive, prepare=prepare,
        **motions_of((a,), params_jvp, params_jvp),
    )  # fmt: skip


# --- operators without their arrays -----------------------------------------------------------------------------


def bare_of(a: LinearOperator) -> LinearOperator:
    """The functions alone: what is closed over must hold no arrays."""
    return a._replace(params=())


def _splitter(c: Any) -> Callable[[Params], tuple[Params, Any]]:
    """From all parameters to those of A and the coefficient, the last one where it is an array."""
    if is_array(c):
        return lambda params: (params[:-1], params[-1])
    return lambda params: (params, c)


def _conj(c: Array | float | complex) -> Array | float | complex:
    return conj(c) if is_array(c) else c.conjugate()
