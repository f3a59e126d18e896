"""The operator, pure functions of a flat tuple of arrays, and the helpers that all constructors share."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import array_api_compat

from ddnref._core.arrays import (
    Array,
    conj,
    full,
    is_compiling,
    is_complex,
    is_number,
    namespace,
    namespace_of,
    with_axes,
)
from ddnref._core.checks import check_precision, check_shapes, given
from ddnref._kernels.dense import identity, move_axis
from ddnref._kernels.public import guarded
from ddnref._kernels.scatter import Indices
from ddnref._kernels.vectors import as_complex
from ddnref.errors import DdnrefError

Params = tuple[Array, ...]
Product = Callable[[Params, Array], Array]


class LinearOperator(NamedTuple):
    """A linear map that is applied, never stored, and differentiated with respect to its parameters.

    A vector is ``(..., *domain_shape)``, with batch axes in front. All functions are pure and accept any batch axes;
    those of vectors and parameters broadcast against each other, and several right-hand sides are one more leading
    axis. Real operators take complex vectors too. ``A @ x``, ``A.H``, ``A.T``, ``2 * A``, ``A / 2``, ``A + B``,
    ``A - B``, ``A @ B`` and ``-A`` mean what they do for matrices; the terms of a sum may be arrays ``(..., n, m)``.
    """

    params: Params
    """The arrays that the map depends on; gradients are taken with respect to these."""
    apply: Callable[[Params, Array], Array]
    """``apply(params, x) = A x``, from ``(..., *domain_shape)`` to ``(..., *range_shape)``."""
    adjoint: Callable[[Params, Array], Array]
    """``adjoint(params, y) = Aᴴ y``."""
    params_vjp: Callable[[Params, Array, Array], Params]
    """``params_vjp(params, y_bar, x)``: the gradient of ``Re Σ conj(y_bar) · A x`` with respect to each parameter,
    summed over a batch that shares the parameter."""
    domain_shape: tuple[int, ...]
    range_shape: tuple[int, ...]
    self_adjoint: bool = False
    """Whether ``A = Aᴴ`` for all values of the parameters."""
    positive_definite: bool = False
    """Whether ``⟨x, A x⟩ > 0`` for all x other than 0, at the values that the parameters can take."""
    gram: Callable[[Params, Array | float | None], LinearOperator] | None = None
    """Optional, for operators with a form of ``AᴴA`` that is cheaper than two products: ``gram(params, shift)`` is the
    prepared operator of ``AᴴA + shift · I``, with one shift for each item of the batch or ``None`` for no shift.
    `normal` uses it."""
    prepare: Callable[[Params], LinearOperator] | None = None
    """Optional: ``prepare(params)`` is the same map with everything that does not depend on x computed once, such as
    the spectrum of a kernel; see `prepared`."""
    params_jvp: Callable[[Params, Params, Array], Array] | None = None
    """Optional, for the forward mode: ``params_jvp(params, params_dot, x) = Ȧ x``."""
    adjoint_jvp: Callable[[Params, Params, Array], Array] | None = None
    """Optional, for the forward mode of least squares: ``adjoint_jvp(params, params_dot, y) = Ȧᴴ y``."""
    sparse: Callable[[Params], Any] | None = None
    """Optional: ``sparse(params)`` is the map, of flattened vectors, as a sparse matrix of SciPy or CuPy. Functions
    that factorise a matrix use it; operators of `from_scipy` have it, and on NumPy those of `coo` and `laplacian`."""

    @property
    def size(self) -> int:
        """Entries of a vector of the domain."""
        return math.prod(self.domain_shape)

    @property
    def shape(self) -> tuple[int, int]:
        """Sizes of the matrix: entries of a vector of the range, and of one of the domain."""
        return math.prod(self.range_shape), self.size

    @property
    def dtype(self) -> Any:
        """The dtype of the parameters; ``None`` without parameters."""
        return self.params[0].dtype if self.params else None

    @guarded
    def __call__(self, x: Array) -> Array:
        """Validate the shape and the dtype of `x`, and return ``A x``."""
        check_vector("x", x, self.domain_shape, self.params)
        try:
            return self.apply(self.params, x)
        except (ValueError, RuntimeError) as error:
            if isinstance(error, DdnrefError):
                raise  # it already says what is wrong
            shapes = ", ".join(str(tuple(p.shape)) for p in self.params)
            raise ValueError(
                f"The operator failed for x of shape {tuple(x.shape)} with params of shapes ({shapes}): {error} The "
                "most likely cause is that the batch axes of x do not broadcast against those of the parameters."
            ) from error

    # --- algebra ----------------------------------------------------------------------------------------------------

    @property
    def __array_priority__(self) -> float:
        """NumPy's arrays and numbers leave ``c * A`` and ``M + A`` to the operator."""
        return 1e3

    @property
    def H(self) -> LinearOperator:
        """The adjoint ``Aᴴ``."""
        return ALGEBRA["adjoint"](self)

    @property
    def T(self) -> LinearOperator:
        """The transpose ``Aᵀ``."""
        return ALGEBRA["transpose"](self)

    def __matmul__(self, other: Any) -> Any:
        """``A @ x`` for vectors ``(..., *domain_shape)``, and ``A @ B`` for an operator."""
        return ALGEBRA["compose"](self, other) if isinstance(other, LinearOperator) else self(other)

    def __rmatmul__(self, other: Any) -> NoReturn:
        raise TypeError(
            f"x @ A is not defined for an operator A and a {type(other).__qualname__}: write A.T @ x, or A.H @ x with "
            "the conjugate, for vectors, and ddnref.operators.dense(M) @ A for the product with a matrix."
        )

    def __add__(self, other: Any) -> Any:
        return ALGEBRA["add"](self, other)

    def __radd__(self, other: Any) -> LinearOperator:
        return self if is_number(other) and other == 0 else ALGEBRA["add"](other, self)  # `sum` starts with 0

    def __sub__(self, other: Any) -> LinearOperator:
        return ALGEBRA["add"](self, -1 * other)

    def __rsub__(self, other: Any) -> LinearOperator:
        return ALGEBRA["add"](other, -self)

    def __neg__(self) -> LinearOperator:
        return ALGEBRA["scaled"](self, -1)

    def __mul__(self, other: Any) -> LinearOperator:
        """``A * c`` for a number, or an array with one for each item of the batch."""
        if isinstance(other, LinearOperator):
            raise TypeError("A * B is not defined for operators: write A @ B for their product.")
        return ALGEBRA["scaled"](self, other)

    def __rmul__(self, other: Any) -> LinearOperator:
        return self.__mul__(other)

    def __truediv__(self, other: Any) -> LinearOperator:
        if isinstance(other, LinearOperator):
            raise TypeError("A / B is not defined for operators: ddnref.linear_solve(A, b) solves A x = b.")
        return ALGEBRA["scaled"](self, 1 / other)

    def __repr__(self) -> str:
        kind = "positive definite" if self.positive_definite else "self-adjoint" if self.self_adjoint else ""
        params = ", ".join(str(tuple(p.shape)) for p in self.params)
        parts = f"{self.domain_shape} → {self.range_shape}", str(self.dtype or ""), kind, params and f"params {params}"
        return f"LinearOperator({', '.join(filter(None, parts))})"

    # --- other forms ------------------------------------------------------------------------------------------------

    def with_params(self, *params: Array) -> LinearOperator:
        """The same map with other parameters."""
        if len(params) != len(self.params):
            raise ValueError(f"{len(params)} parameters given; this operator has {len(self.params)}.")
        return self._replace(params=params)

    def prepared(self) -> LinearOperator:
        """The same map for many products, which a solver makes once, before its loop.

        Its ``params`` are the precomputed arrays, which can be traced like any others. Take gradients of the operator
        itself: ``params_vjp`` of a prepared one may raise ``TypeError``.
        """
        return self if self.prepare is None else self.prepare(self.params)

    def matrix(self, like: Array | None = None) -> Array:
        """The map as a matrix ``(..., n, m)``, made by m products, for n equations and m unknowns.

        `like`, an array with the dtype and device, is needed for an operator without parameters.
        """
        if like is None:
            if not self.params:
                raise TypeError("An operator without parameters has no dtype: pass like=, an array that has.")
            like = self.params[0]
        xp = array_api_compat.array_namespace(like)
        batch, _ = batch_axes(self, full(self.domain_shape, 0.0, like))
        # All unit vectors are right-hand sides of one product; their images are the columns.
        eye = xp.reshape(identity(self.size, like), (self.size, *(1,) * len(batch), *self.domain_shape))
        y = self.apply(self.params, eye)
        columns = xp.reshape(y, (self.size, *batch, math.prod(self.range_shape)))
        return move_axis(columns, 0, -1)


ALGEBRA: dict[str, Callable[..., LinearOperator]] = {}
"""Functions behind ``A + B`` and the like. The modules above fill it, because they make operators."""

Motion = Callable[[Params, Params, Array], Array]


# --- structures -------------------------------------------------------------------------------------------------


class Structure:
    """Everything about an operator but its parameters. The functions of the operator are its methods.

    `shared` makes it, once for equal fields, so that operators of equal structure have the same functions. They compare
    equal, and bridges use again what they have made for one of them. Unlike closures, methods can be pickled.
    Structures are dataclasses without ``==``: methods of two objects are only equal if these are the same one.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return shared, (type(self), *(getattr(self, field.name) for field in fields(self)))  # type: ignore[arg-type]


_structures: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()


def shared(kind: type[Any], *values: Any) -> Any:
    """Make a structure, or return the one with these fields if it exists."""
    if is_compiling():  # a compiler cannot trace weak references
        return kind(*values)
    # Numbers of different types compare equal, and so do zeros of different signs.
    key = (kind, *(repr(value) if is_number(value) else value for value in values))
    try:
        found = _structures.get(key)
    except TypeError:  # a function of the user's that has no hash
        return kind(*values)
    if found is None:
        found = _structures.setdefault(key, kind(*values))
    return found


def is_known(value: Any, seen: set[int] | None = None) -> bool:
    """Return whether an operator, or a part of one, is made of structures alone, without a function of the user's.

    What such an operator does depends on nothing but its structure and its parameters, so that it can be compiled once.
    """
    seen = set() if seen is None else seen
    value = getattr(value, "__self__", value)  # the structure of a method
    if id(value) in seen:
        return True
    seen.add(id(value))
    if isinstance(value, Structure):
        return all(is_known(getattr(value, field.name), seen) for field in fields(value))  # type: ignore[arg-type]
    if isinstance(value, tuple):
        return all(is_known(item, seen) for item in value)
    return value is None or isinstance(value, (int, float, complex, str, Indices))


class Linear(Structure):
    """A structure whose map is linear in its parameters, so that its forward modes are products."""

    apply: Product
    adjoint: Product

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:  # noqa: ARG002
        return self.apply(params_dot, x)

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:  # noqa: ARG002
        return self.adjoint(params_dot, y)


class Constant(Structure):
    """A structure without parameters, so that all derivatives are zero."""

    apply: Product
    adjoint: Product

    def params_vjp(self, params: Params, y_bar: Array, x: Array) -> Params:  # noqa: ARG002
        return ()

    def params_jvp(self, params: Params, params_dot: Params, x: Array) -> Array:  # noqa: ARG002
        # The product is taken for the shape of its result.
        return namespace_of(x).zeros_like(self.apply(params, x))

    def adjoint_jvp(self, params: Params, params_dot: Params, y: Array) -> Array:  # noqa: ARG002
        return namespace_of(y).zeros_like(self.adjoint(params, y))


def motions(of: Any) -> dict[str, Any]:
    """The forward modes of a structure, as fields of its operator."""
    return {"params_jvp": of.params_jvp, "adjoint_jvp": of.adjoint_jvp}


def motions_of(of: Any, *parts: LinearOperator) -> dict[str, Any]:
    """Forward modes of an operator made of others, which exist if those of all parts do."""
    return motions(of) if all(a.params_jvp is not None and a.adjoint_jvp is not None for a in parts) else {}


def no_params_vjp(params: Params, y_bar: Array, x: Array) -> NoReturn:  # noqa: ARG001
    """The ``params_vjp`` of a prepared operator, which raises."""
    raise TypeError(
        "A prepared operator has no params_vjp: its arrays are not the parameters. Call that of the operator itself."
    )


# --- validation -------------------------------------------------------------------------------------------------


def check_vector(name: str, x: Array, shape: tuple[int, ...], params: Params) -> None:
    """Raise unless `x` is ``(..., *shape)``, floating, and of the precision of the parameters."""
    named = {f"params[{i}]": parameter for i, parameter in enumerate(params)}
    given(**{name: x}, **named)
    xp = namespace(**{name: x}, **named)
    check_ending(name, x, shape)
    if any(parameter.dtype != x.dtype for parameter in params):
        check_precision(xp, **{name: x}, **named)


def check_ending(name: str, x: Array, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless `x` has the shape ``(..., *shape)``."""
    if tuple(x.shape[max(0, x.ndim - len(shape)) :]) != tuple(shape):
        wanted = ", ".join(["...", *map(str, shape)])
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({wanted}): batch axes lead.")


def as_shape(name: str, shape: Any) -> tuple[int, ...]:
    """A shape as a tuple of ints, or ``ValueError``; an int is a shape of one axis."""
    # An int is a grid with one axis.
    sizes = tuple(int(k) for k in ((shape,) if isinstance(shape, int) else shape))
    if any(k < 0 for k in sizes):
        raise ValueError(f"{name} is {sizes}; sizes cannot be negative.")
    return sizes


def is_array(c: Any) -> bool:
    """Return whether a coefficient is an array, which makes it a parameter; a Python number is a constant."""
    return c is not None and not is_number(c)


def over(c: Array, ndim: int) -> Array:
    """Numbers ``(...)``, one for each item of a batch, shaped to multiply vectors with `ndim` axes."""
    return c if isinstance(c, (int, float, complex)) else with_axes(c, ndim)


def times(c: Array | float | complex, y: Array, ndim: int) -> Array:
    """``c y``, one number for each item of a batch times vectors with `ndim` axes."""
    if isinstance(c, complex) and not is_complex(y):
        y = as_complex(y)  # a complex constant makes a real vector complex
    return over(c, ndim) * y


def cotangent(gradient: Array, like: Array) -> Array:
    """Sum a broadcast gradient over the axes that the parameter `like` lacks or broadcasts.

    As the pairing is ``Re Σ conj(ȳ) · ẏ``, a real parameter gets the real part.
    """
    xp = array_api_compat.array_namespace(like)
    # A real parameter gets the real part, a complex one a complex gradient.
    if is_complex(gradient) != is_complex(like):
        gradient = xp.astype(gradient, like.dtype) if is_complex(like) else xp.real(gradient)
    if gradient.shape == like.shape:
        return gradient
    # Leading axes that the parameter lacks, or that only the parameter has
    extra = gradient.ndim - like.ndim
    if extra > 0:
        gradient = xp.sum(gradient, axis=tuple(range(extra)))
    elif extra < 0:
        gradient = xp.reshape(gradient, (*(1,) * -extra, *gradient.shape))
    # Axes of length one that were broadcast
    axes = tuple(i for i, k in enumerate(like.shape) if k == 1 and gradient.shape[i] != 1)
    if axes:
        gradient = xp.sum(gradient, axis=axes, keepdims=True)
    return gradient if gradient.shape == like.shape else xp.broadcast_to(gradient, like.shape)


def coefficient_bar(y_bar: Array, z: Array, c: Array, ndim: int) -> Array:
    """``Σ ȳ conj(z)``, the gradient of ``Re Σ conj(ȳ) · c z`` with respect to one number c for each item."""
    xp = array_api_compat.array_namespace(z)
    # Sum over the axes of a vector, then over the batch axes that the coefficient lacks.
    product = y_bar * conj(z)
    shape = tuple(product.shape[: product.ndim - ndim])
    product = xp.reshape(product, (*shape, math.prod(product.shape[product.ndim - ndim :])))
    return cotangent(xp.sum(product, axis=-1), c)


def batch_axes(a: LinearOperator, x: Array | None = None, name: str = "operator") -> tuple[tuple[int, ...], Array]:
    """The batch axes of the image of one vector, and the image, by one product with `x` or with zeros.

    The shapes of the parameters do not show the batch axes, so this takes a product. By default x is zero, in the dtype
    of the first parameter. Raises ``ValueError`` if the image does not end with ``range_shape``.
    """
    image = a(full(a.domain_shape, 0.0, a.params[0]) if x is None else x)
    batch = tuple(image.shape[: max(0, image.ndim - len(a.range_shape))])
    check_shapes(**{f"{name}.apply(params, x)": (image, (*batch, *a.range_shape))})
    return batch, image
