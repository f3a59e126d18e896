"""Losses of one sample: value, gradient, Hessian, and a square root of it with as few columns as its rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, full
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._kernels import dense as _linalg
from ddnref.networks._activations import sigmoid


class Loss(NamedTuple):
    """A loss of one sample's outputs ``y (N, C)`` and targets, without the mean or sum over the samples.

    Parameters
    ----------
    value : callable
        ``value(y, t) -> (N,)``.
    gradient : callable
        ``gradient(y, t) -> (N, C)``, with respect to the outputs.
    hessian_sqrt : callable
        ``hessian_sqrt(y, t) -> (N, C, R)``: S with ``S Sᵀ = ∇²ℓ``, for a loss that is convex in its outputs.
    hessian : callable
        ``hessian(y, t) -> (N, C, C)``.
    hessian_product : callable, optional
        ``hessian_product(y, t, u) -> (..., N, C)``: ``∇²ℓ u`` for vectors with any leading axes. Default: `hessian`
        times u.
    check : callable, optional
        ``check(y, t)`` raises for targets of the wrong shape or dtype. Default: nothing is checked.
    valid : callable, optional
        ``valid(y, t) -> (N,)`` flags: whether the values of a sample's targets make sense. Default: all do.
    """

    value: Callable[[Array, Array], Array]
    gradient: Callable[[Array, Array], Array]
    hessian_sqrt: Callable[[Array, Array], Array]
    hessian: Callable[[Array, Array], Array]
    hessian_product: Callable[[Array, Array, Array], Array] | None = None
    check: Callable[[Array, Array], None] | None = None
    valid: Callable[[Array, Array], Array] | None = None


def hessian_product(loss: Loss, y: Array, t: Array, u: Array) -> Array:
    """Return ``∇²ℓ u`` sample by sample."""
    if loss.hessian_product is not None:
        return loss.hessian_product(y, t, u)
    return _linalg.matvec(loss.hessian(y, t), u)


def resolve(loss: str | Loss, reduction: str) -> Loss:
    """Return the loss that was given, or the one of that name, as PyTorch reduces it over the outputs of a sample."""
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is {reduction!r}, expected "mean" or "sum".')
    if isinstance(loss, Loss):
        return loss
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss](reduction == "mean")
    known = ", ".join(f'"{name}"' for name in LOSSES)
    raise ValueError(f"loss is {loss!r}, expected one of {known}, or a ddnref.networks.Loss.")


# --- softmax cross-entropy: ℓ = −Σ_c t_c log p_c,  p = softmax(y),  T = Σ_c t_c (one for classes) --------------------


def cross_entropy(mean: bool) -> Loss:
    """Make the cross-entropy of class indices ``(N,)`` or weights ``(N, C)``, summed over the outputs."""
    return Loss(_ce_value, _ce_gradient, _ce_hessian_sqrt, _ce_hessian, _ce_product, _ce_check, _ce_valid)


def _ce_value(y: Array, t: Array) -> Array:
    xp = array_api_compat.array_namespace(y)
    return -xp.sum(_weights(y, t) * _log_softmax(y), axis=-1)


def _ce_gradient(y: Array, t: Array) -> Array:
    """Return ``T p − t``."""
    xp = array_api_compat.array_namespace(y)
    # Class indices have weights that sum to one, which saves a sum.
    p = xp.exp(_log_softmax(y))
    weights = _weights(y, t)
    return (p if _is_index(t) else _total(weights) * p) - weights


def _ce_hessian(y: Array, t: Array) -> Array:
    """Return ``T (diag p − p pᵀ)``."""
    p, total = _softmax_and_total(y, t)
    return total[..., None] * (p[..., :, None] * _linalg.identity(y.shape[-1], y) - _linalg.outer(p, p))


def _ce_product(y: Array, t: Array, u: Array) -> Array:
    xp = array_api_compat.array_namespace(y)
    p, total = _softmax_and_total(y, t)
    pu = p * u
    return total * (pu - p * xp.sum(pu, axis=-1, keepdims=True))


def _ce_hessian_sqrt(y: Array, t: Array) -> Array:
    """Return ``√T diag(q) Q`` with q = √p and C − 1 columns Q orthonormal to q.

    Q is the reflection ``I − v vᵀ / (1 + q_C)``, ``v = q + e_C``, without its last column, which is ``−q``: nothing
    cancels, because ``q ≥ 0``.
    """
    xp = array_api_compat.array_namespace(y)
    c = y.shape[-1]
    # Half the logarithm gives the root without losing the smallest probabilities.
    q = xp.exp(_log_softmax(y) / 2)
    total = xp.ones_like(q[..., :1]) if _is_index(t) else _total(_weights(y, t))
    eye = _linalg.identity(c, y)
    # Reflect e_C to −q, and drop the last column.
    v = q + eye[-1, :]
    complement = eye[:, : c - 1] - _linalg.outer(v / (1 + q[..., -1:]), q[..., : c - 1])
    return xp.sqrt(total)[..., None] * q[..., :, None] * complement


def _ce_check(y: Array, t: Array) -> None:
    xp = array_api_compat.array_namespace(y, t)
    # Integers are class indices, numbers of the outputs' dtype are weights.
    if xp.isdtype(t.dtype, "integral"):
        check_shapes(t=(t, (y.shape[0],)))
        return
    if t.dtype != y.dtype:
        raise TypeError(
            f"t has dtype {t.dtype}; cross_entropy takes class indices (N,) of an integer dtype, or one weight for "
            f"each class (N, C) of the outputs' dtype {y.dtype}."
        )
    check_shapes(t=(t, tuple(y.shape)))


def _ce_valid(y: Array, t: Array) -> Array:
    xp = array_api_compat.array_namespace(y)
    if _is_index(t):
        return (t >= 0) & (t < y.shape[-1])
    return xp.all(t >= 0, axis=-1)


def _is_index(t: Array) -> bool:
    return bool(array_api_compat.array_namespace(t).isdtype(t.dtype, "integral"))


def _weights(y: Array, t: Array) -> Array:
    """Return targets as weights ``(N, C)``."""
    if not _is_index(t):
        return t
    xp = array_api_compat.array_namespace(y)
    classes = xp.arange(y.shape[-1], dtype=t.dtype, device=array_api_compat.device(y))
    return xp.astype(t[:, None] == classes, y.dtype)


def _total(weights: Array) -> Array:
    return array_api_compat.array_namespace(weights).sum(weights, axis=-1, keepdims=True)


def _softmax_and_total(y: Array, t: Array) -> tuple[Array, Array]:
    xp = array_api_compat.array_namespace(y)
    p = xp.exp(_log_softmax(y))
    return p, xp.ones_like(p[..., :1]) if _is_index(t) else _total(t)


def _log_softmax(y: Array) -> Array:
    xp = array_api_compat.array_namespace(y)
    # Shift by the largest output, so that no exponential overflows.
    z = y - xp.max(y, axis=-1, keepdims=True)
    return z - xp.log(xp.sum(xp.exp(z), axis=-1, keepdims=True))


# --- elementwise losses: ℓ = w Σ_c f(y_c, t_c),  w = 1/C for the mean and 1 for the sum ------------------------------


def mse(mean: bool) -> Loss:
    """Make the squared error ``w Σ_c (y_c − t_c)²``."""
    return _elementwise(
        mean,
        value=lambda y, t: (y - t) ** 2,
        gradient=lambda y, t: 2 * (y - t),
        curvature_sqrt=lambda y: full((1, 1), math.sqrt(2), y),
        curvature=lambda y: full((1, 1), 2.0, y),
    )


def bce(mean: bool) -> Loss:
    """Make the binary cross-entropy of logits ``w Σ_c log(1 + e^(y_c)) − t_c y_c``."""

    def value(y: Array, t: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        # log(1 + e^y) − t y without overflow.
        return xp.where(y > 0, y, xp.zeros_like(y)) - t * y + xp.log1p(xp.exp(-xp.abs(y)))

    def curvature_sqrt(y: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        # √(p (1 − p)), symmetric in y.
        size = xp.abs(y)
        return xp.exp(-size / 2) / (1 + xp.exp(-size))

    def valid(y: Array, t: Array) -> Array:
        return array_api_compat.array_namespace(y).all((t >= 0) & (t <= 1), axis=-1)

    loss = _elementwise(
        mean,
        value=value,
        gradient=lambda y, t: sigmoid(y, 0)[0] - t,
        curvature_sqrt=curvature_sqrt,
        curvature=lambda y: sigmoid(y, 1)[1],
    )
    return loss._replace(valid=valid)


def _elementwise(
    mean: bool,
    *,
    value: Callable[[Array, Array], Array],
    gradient: Callable[[Array, Array], Array],
    curvature_sqrt: Callable[[Array], Array],
    curvature: Callable[[Array], Array],
) -> Loss:
    def w(y: Array) -> float:
        return 1 / y.shape[-1] if mean else 1.0

    def diagonal(d: Array, y: Array) -> Array:
        return (d + 0 * y)[..., None] * _linalg.identity(y.shape[-1], y)  # + 0 y: NaN stays in its sample

    def check(y: Array, t: Array) -> None:
        check_dtypes(t=(t, y.dtype))
        check_shapes(t=(t, tuple(y.shape)))

    return Loss(
        lambda y, t: w(y) * array_api_compat.array_namespace(y).sum(value(y, t), axis=-1),
        lambda y, t: w(y) * gradient(y, t),
        lambda y, t: diagonal(math.sqrt(w(y)) * curvature_sqrt(y), y),
        lambda y, t: diagonal(w(y) * curvature(y), y),
        lambda y, t, u: w(y) * curvature(y) * u,
        check,
    )


LOSSES = {"cross_entropy": cross_entropy, "mse": mse, "bce": bce}
"""Losses by name; each function takes whether the outputs of a sample are averaged too."""
