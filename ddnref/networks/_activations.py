"""Activations with their first two derivatives, all elementwise and free of overflow."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array
from ddnref._kernels.public import public
from ddnref._kernels.special import erf

Jet = tuple[Array, Array | None, Array | None]
"""``φ, φ', φ''``: a slope of ``None`` is one everywhere, a curvature of ``None`` zero."""


class Activation(NamedTuple):
    """An elementwise function with its first two derivatives.

    Parameters
    ----------
    value, slope, curvature : callables
        ``z -> φ(z), φ'(z), φ''(z)``, from an array of any shape to one of the same shape and dtype. At a kink the
        derivative of one side, or anything between.
    jet : callable, optional
        ``jet(z, order) -> (φ, φ', φ'')`` up to that order, where the three share work. ``None`` in place of φ' says
        that it is one everywhere, in place of φ'' that it is zero. Default: the three functions.
    kinks : tuple of pairs of float, optional
        The place of each kink, and by how much the slope jumps there, for `smoothed`.

    Examples
    --------
    >>> import numpy as np
    >>> square = ddnref.networks.Activation(lambda z: z * z, lambda z: 2 * z, lambda z: 0 * z + 2)
    >>> layer = ddnref.networks.Dense(np.eye(2), activation=square)
    >>> ddnref.networks.Chain([layer], "mse").output(np.asarray([[3.0, -1.0]]))
    array([[9., 1.]])
    """

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    curvature: Callable[[Array], Array]
    jet: Callable[[Array, int], Jet] | None = None
    kinks: tuple[tuple[float, float], ...] = ()


@public
def smoothed(activation: str | Activation, width: float) -> Activation:
    r"""Return an activation whose kinks count as curvature; its value and its slope do not change.

    Parameters
    ----------
    activation : str or Activation
        With a kink: ``"relu"``, ``"leaky_relu"``, or one of your own that states its `kinks`. To smooth again replaces
        the width.
    width : float, positive
        How far a kink is seen, in units of the pre-activation: about as much as a step changes that. 0.2 suits
        pre-activations of unit size; `Chain.smoothed` takes one for each layer.

    Raises
    ------
    ValueError
        The activation states no kink, or the width is not positive and finite.

    Notes
    -----
    A kink at a, where the slope jumps by J, adds a triangle of width w and area J to the second derivative,

    .. math:: \varphi_w''(s) = \varphi''(s) + \frac Jw \max\left(0,\; 1 - \frac{|s - a|}w\right) .

    For a piecewise linear activation with one kink this is the second difference
    :math:`(\varphi(s + w) - 2 \varphi(s) + \varphi(s - w)) / w^2`, the curvature that a step of that size meets.
    Without it the second derivative is zero almost everywhere and says nothing about the kinks.

    Examples
    --------
    >>> import numpy as np
    >>> phi = ddnref.networks.smoothed("relu", 0.5)
    >>> z = np.asarray([-1.0, -0.25, 0.0, 2.0])
    >>> phi.value(z), phi.curvature(z)
    (array([0., 0., 0., 2.]), array([0., 1., 2., 0.]))
    """
    phi = resolve(activation)
    if not phi.kinks:
        name = repr(activation) if isinstance(activation, str) else "this Activation"
        raise ValueError(f"{name} has no kinks to smooth. Those of your own are stated by Activation(..., kinks=).")
    if not 0 < width < math.inf:
        raise ValueError(f"width is {width}, expected more than 0 and finite.")
    # An activation that was smoothed before keeps the one that it was made of.
    first = phi.jet.args[0] if isinstance(phi.jet, partial) and phi.jet.func is _smoothed else phi
    return from_jet(partial(_smoothed, first, float(width)), phi.kinks)


def _smoothed(phi: Activation, width: float, z: Array, order: int) -> Jet:
    y, slope, curvature = jet(phi, z, order)
    if order < 2:
        return y, slope, None
    xp = array_api_compat.array_namespace(z)
    for place, jump in phi.kinks:
        near = 1 - xp.abs(z - place) / width
        # NaN stays NaN.
        bump = (jump / width) * xp.where(near < 0, xp.zeros_like(near), near)
        curvature = bump if curvature is None else curvature + bump
    return y, slope, curvature


def jet(activation: Activation, z: Array, order: int) -> Jet:
    """Return φ and its derivatives up to `order`; higher ones are ``None``."""
    # One call for all orders, where they share work.
    if activation.jet is not None:
        return activation.jet(z, order)
    y = activation.value(z)
    return y, activation.slope(z) if order > 0 else None, activation.curvature(z) if order > 1 else None


def resolve(activation: str | Activation) -> Activation:
    """Return an activation by its name, or the triple that was given."""
    if isinstance(activation, Activation):
        return activation
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]
    known = ", ".join(f'"{name}"' for name in ACTIVATIONS)
    raise ValueError(f"activation is {activation!r}, expected one of {known}, or a ddnref.networks.Activation.")


def from_jet(jet: Callable[[Array, int], Jet], kinks: tuple[tuple[float, float], ...] = ()) -> Activation:
    """Make an `Activation` whose three functions share the work of one `jet`."""
    # Partial functions of those below, because pickle takes no functions that are defined inside others.
    return Activation(partial(_value, jet), partial(_slope, jet), partial(_curvature, jet), jet, kinks)


def _value(jet: Callable[[Array, int], Jet], z: Array) -> Array:
    return jet(z, 0)[0]


def _slope(jet: Callable[[Array, int], Jet], z: Array) -> Array:
    d = jet(z, 1)[1]
    return array_api_compat.array_namespace(z).ones_like(z) if d is None else d


def _curvature(jet: Callable[[Array, int], Jet], z: Array) -> Array:
    d = jet(z, 2)[2]
    return array_api_compat.array_namespace(z).zeros_like(z) if d is None else d


# --- the functions ------------------------------------------------------------------------------------------------


def _identity(z: Array, order: int) -> Jet:
    return z, None, None


def _relu(z: Array, order: int) -> Jet:
    """Return max(z, 0), with derivative 0 at the kink as in PyTorch."""
    xp = array_api_compat.array_namespace(z)
    # The first condition alone would turn NaN into zero.
    positive = z > 0
    y = xp.where(positive | xp.isnan(z), z, xp.zeros_like(z))
    return y, xp.astype(positive, z.dtype) if order else None, None


def leaky_relu(negative_slope: float) -> Activation:
    """Return ``z`` above zero and ``negative_slope · z`` elsewhere."""
    return from_jet(partial(_leaky_relu, negative_slope), ((0.0, 1.0 - negative_slope),))


def _leaky_relu(negative_slope: float, z: Array, order: int) -> Jet:
    xp = array_api_compat.array_namespace(z)
    slope = xp.where(z > 0, xp.ones_like(z), xp.full_like(z, negative_slope))
    return slope * z, slope if order else None, None


def _tanh(z: Array, order: int) -> Jet:
    xp = array_api_compat.array_namespace(z)
    y = xp.tanh(z)
    if not order:
        return y, None, None
    # tanh' = 1 − tanh², tanh'' = −2 tanh tanh'.
    slope = 1 - y * y
    return y, slope, -2 * y * slope if order > 1 else None


def sigmoid(z: Array, order: int) -> Jet:
    """Return ``1 / (1 + e^(−z))`` with derivatives that are relatively accurate in both tails."""
    xp = array_api_compat.array_namespace(z)
    # e never overflows, and each tail is a quotient of positive numbers.
    e = xp.exp(-xp.abs(z))
    inverse = 1 / (1 + e)
    y = xp.where(z >= 0, inverse, e * inverse)
    if not order:
        return y, None, None
    slope = e * inverse * inverse
    return y, slope, -xp.sign(z) * (1 - e) * inverse * slope if order > 1 else None


def _softplus(z: Array, order: int) -> Jet:
    xp = array_api_compat.array_namespace(z)
    # log(1 + e^z) = max(z, 0) + log(1 + e^−|z|), whose slope is the sigmoid.
    y = xp.where(z > 0, z, xp.zeros_like(z)) + xp.log1p(xp.exp(-xp.abs(z)))
    return (y, *sigmoid(z, order - 1)[:2]) if order else (y, None, None)


def _gelu(z: Array, order: int) -> Jet:
    """Return ``z Φ(z)`` with the normal distribution Φ and its density."""
    xp = array_api_compat.array_namespace(z)
    # φ(z) = z Φ(z), φ' = Φ + z Φ', φ'' = (2 − z²) Φ'.
    cdf = (1 + erf(z * math.sqrt(0.5))) / 2
    if not order:
        return z * cdf, None, None
    density = xp.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return z * cdf, cdf + z * density, (2 - z * z) * density if order > 1 else None


def _gelu_tanh(z: Array, order: int) -> Jet:
    """Return ``z (1 + tanh g) / 2 = z σ(2 g)`` with ``g = √(2/π) (z + 0.044715 z³)``; σ keeps the tail's digits."""
    c = 2 * math.sqrt(2 / math.pi)
    s, s1, s2 = sigmoid(c * z * (1 + 0.044715 * z * z), order)
    if s1 is None:
        return z * s, None, None
    # The chain rule through 2 g(z): g1 is its first derivative, 6 · 0.044715 c z its second.
    g1 = c * (1 + 3 * 0.044715 * z * z)
    slope = s + z * s1 * g1
    if s2 is None:
        return z * s, slope, None
    return z * s, slope, 2 * s1 * g1 + z * (s2 * g1 * g1 + s1 * (6 * 0.044715 * c) * z)


def _silu(z: Array, order: int) -> Jet:
    # φ = z σ, φ' = σ + z σ', φ'' = 2 σ' + z σ''.
    y, slope, curvature = sigmoid(z, order)
    if slope is None:
        return z * y, None, None
    return z * y, y + z * slope, None if curvature is None else 2 * slope + z * curvature


def _sin(z: Array, order: int) -> Jet:
    xp = array_api_compat.array_namespace(z)
    y = xp.sin(z)
    return y, xp.cos(z) if order else None, -y if order > 1 else None


ACTIVATIONS = {
    "identity": from_jet(_identity),
    "relu": from_jet(_relu, ((0.0, 1.0),)),
    "leaky_relu": leaky_relu(0.01),
    "tanh": from_jet(_tanh),
    "sigmoid": from_jet(sigmoid),
    "softplus": from_jet(_softplus),
    "gelu": from_jet(_gelu),
    "gelu_tanh": from_jet(_gelu_tanh),
    "silu": from_jet(_silu),
    "sin": from_jet(_sin),
}
"""By name; ``"gelu"`` is the exact one, ``"leaky_relu"`` has slope 0.01 below zero, as in PyTorch."""
