"""Losses of one sample: value, gradient, Hessian, and a square root of it with as few columns as its rank."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple, ParamSpec

import array_api_compat

from ddnref._core.arrays import Array, as_dtype, full, namespace, requires_grad
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._kernels import dense as _linalg
from ddnref.networks._activations import sigmoid

P = ParamSpec("P")


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
    sample_weight : callable, optional
        ``sample_weight(y, t) -> (N,)``: the mean over the samples divides by its sum, as with PyTorch's class weights.
        It is no factor of the loss, which has its own. Default: the mean divides by N.
    """

    value: Callable[[Array, Array], Array]
    gradient: Callable[[Array, Array], Array]
    hessian_sqrt: Callable[[Array, Array], Array]
    hessian: Callable[[Array, Array], Array]
    hessian_product: Callable[[Array, Array, Array], Array] | None = None
    check: Callable[[Array, Array], None] | None = None
    valid: Callable[[Array, Array], Array] | None = None
    sample_weight: Callable[[Array, Array], Array] | None = None


class _MadeLoss(Loss):
    """A loss that one of the functions below has made: pickle stores the call, because it takes no inner functions."""

    call: tuple[Callable[..., Loss], tuple[Any, ...], dict[str, Any]] | None = None

    def __reduce__(self) -> Any:
        return super().__reduce__() if self.call is None else (_made_again, self.call)


def _made_again(make: Callable[..., Loss], args: tuple[Any, ...], options: dict[str, Any]) -> Loss:
    return make(*args, **options)


def _remembered(make: Callable[P, Loss]) -> Callable[P, Loss]:
    """Let the losses that a function makes remember the call."""

    @wraps(make)
    def made(*args: P.args, **options: P.kwargs) -> Loss:
        loss = _MadeLoss(*make(*args, **options))
        loss.call = (made, args, options)
        return loss

    return made


def name_of(loss: Loss) -> str:
    """Return the name of the function that made the loss, or "Loss" for one of the user's functions."""
    call = getattr(loss, "call", None)
    return "Loss" if call is None else str(call[0].__name__)


def count(loss: Loss, y: Array, t: Array) -> int | Array:
    """Return what the mean over the samples divides by: their number, or the sum of their weights."""
    if loss.sample_weight is None:
        return int(y.shape[0])
    return array_api_compat.array_namespace(y).sum(loss.sample_weight(y, t))


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
    # A name stands for a function of whether the outputs are averaged too.
    if isinstance(loss, str) and loss in LOSSES:
        return LOSSES[loss](reduction == "mean")
    known = ", ".join(f'"{name}"' for name in LOSSES)
    raise ValueError(f"loss is {loss!r}, expected one of {known}, or a ddnref.networks.Loss.")


# --- softmax cross-entropy: ℓ = −Σ_c a_c log p_c,  p = softmax(y),  T = Σ_c a_c (one for plain classes) --------------


@_remembered
def cross_entropy(
    *, weight: Array | None = None, label_smoothing: float = 0.0, ignore_index: int | None = None
) -> Loss:
    r"""Make a softmax cross-entropy with the options of `torch.nn.CrossEntropyLoss`, for any array library.

    Parameters
    ----------
    weight : (C,) array, optional
        A factor for each class, not negative, in the dtype of the outputs.
    label_smoothing : float, default 0.0
        How much of each target is spread evenly over the C classes, in [0, 1].
    ignore_index : int, optional
        Samples of this class index count as if they were not there. Default: no index is ignored and one outside
        ``[0, C)`` is refused. PyTorch's default is -100.

    Returns
    -------
    loss : Loss
        Of class indices ``(N,)``, an integer dtype, or of probabilities ``(N, C)``, as ``"cross_entropy"`` takes them.

    Raises
    ------
    TypeError, ValueError
        `label_smoothing` outside [0, 1], an `ignore_index` that is not an integer. From a chain: a weight of another
        library, precision or length, a negative weight, or probabilities with an `ignore_index` of at least 0.

    Notes
    -----
    .. math:: \ell_n = -\sum_c a_{nc} \log p_{nc}, \qquad
              a_{nc} = w_c \left((1 - \epsilon)\, t_{nc} + \epsilon / C\right)

    with t one for the class of the sample and zero elsewhere, and :math:`a_n = 0` where the sample is ignored. As in
    PyTorch, the mean over samples of class indices divides by :math:`\sum_n w_{t_n}` over those that are not ignored,
    and it is NaN where there are none. The mean over probabilities divides by N.

    Examples
    --------
    >>> import numpy as np
    >>> loss = ddnref.networks.cross_entropy(weight=np.asarray([1.0, 3.0]), ignore_index=-100)
    >>> chain = ddnref.networks.Chain([ddnref.networks.Dense(np.zeros((2, 1)))], loss)
    >>> chain.gradient(np.ones((3, 1)), np.asarray([0, 1, -100]))
    [array([[ 0.25],
           [-0.25]])]
    """
    chosen: tuple[Any, Any] = label_smoothing, ignore_index
    if not isinstance(chosen[0], numbers.Real):
        raise TypeError(f"label_smoothing is {label_smoothing!r}, expected a number.")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected a number in [0, 1].")
    if not (ignore_index is None or isinstance(chosen[1], numbers.Integral)):
        raise TypeError(f"ignore_index is {ignore_index!r}, expected an integer.")
    smoothing = float(label_smoothing)  # a NumPy scalar would turn float32 into float64

    is_plain = weight is None and ignore_index is None

    def ignored(t: Array) -> Array | None:
        """Return which samples are ignored; ``None`` where none can be."""
        xp = array_api_compat.array_namespace(t)
        if ignore_index is None or not _is_index(t):
            return None
        if ignore_index < 0 and xp.isdtype(t.dtype, "unsigned integer"):
            return None  # whose comparison with a negative number may wrap around
        return t == ignore_index

    def weights(y: Array, t: Array) -> Array:
        """Return a, ``(N, C)``."""
        xp = array_api_compat.array_namespace(y)
        a = _one_hot(y, t) if _is_index(t) else t
        if smoothing:
            a = (1 - smoothing) * a + smoothing / y.shape[-1]
        if weight is not None:
            a = as_dtype(weight, y) * a
        skip = ignored(t)
        return a if skip is None else xp.where(skip[:, None], xp.zeros_like(a), a)

    def total(y: Array, t: Array) -> Array:
        """Return T, ``(N, 1)``."""
        xp = array_api_compat.array_namespace(y)
        if is_plain and _is_index(t):
            return xp.ones_like(y[..., :1])
        return xp.sum(weights(y, t), axis=-1, keepdims=True)

    def value(y: Array, t: Array) -> Array:
        return -array_api_compat.array_namespace(y).sum(weights(y, t) * _log_softmax(y), axis=-1)

    def gradient(y: Array, t: Array) -> Array:
        """Return ``T p − a``."""
        p, a = _softmax(y), weights(y, t)
        # Class indices without options have weights that sum to one, which saves a product.
        return (p if is_plain and _is_index(t) else total(y, t) * p) - a

    def hessian(y: Array, t: Array) -> Array:
        """Return ``T (diag p − p pᵀ)``."""
        p = _softmax(y)
        return total(y, t)[..., None] * (p[..., :, None] * _linalg.identity(y.shape[-1], y) - _linalg.outer(p, p))

    def product(y: Array, t: Array, u: Array) -> Array:
        """Return ``T (p ∘ u − p pᵀu)``, without the matrix."""
        p = _softmax(y)
        pu = p * u
        return total(y, t) * (pu - p * array_api_compat.array_namespace(y).sum(pu, axis=-1, keepdims=True))

    def hessian_sqrt(y: Array, t: Array) -> Array:
        """Return ``√T diag(q) Q`` with q = √p and C − 1 columns Q orthonormal to q.

        Q is the reflection ``I − v vᵀ / (1 + q_C)``, ``v = q + e_C``, without its last column, which is ``−q``:
        nothing cancels, because ``q ≥ 0``.
        """
        xp = array_api_compat.array_namespace(y)
        c = y.shape[-1]
        # Half the logarithm gives the root without losing the smallest probabilities.
        q = xp.exp(_log_softmax(y) / 2)
        eye = _linalg.identity(c, y)
        # Reflect e_C to −q, and drop the last column.
        v = q + eye[-1, :]
        complement = eye[:, : c - 1] - _linalg.outer(v / (1 + q[..., -1:]), q[..., : c - 1])
        return xp.sqrt(total(y, t))[..., None] * q[..., :, None] * complement

    def check(y: Array, t: Array) -> None:
        _check_weight("weight", weight, y)
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
        if ignore_index is not None and ignore_index >= 0:
            raise ValueError(
                f"ignore_index is {ignore_index}, but t holds weights of classes, of which none can be ignored. Give "
                "such samples weights of zero."
            )

    def valid(y: Array, t: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        if not _is_index(t):
            # A NaN among the weights is not valid either, because it compares as false.
            good = xp.all(weights(y, t) >= 0, axis=-1)
            return good & xp.all(t >= 0, axis=-1)
        good = (t >= 0) & (t < y.shape[-1])
        if weight is not None:
            good = good & xp.all(weight >= 0)
        skip = ignored(t)
        return good if skip is None else good | skip

    def sample_weight(y: Array, t: Array) -> Array:
        """Return ``w_t`` of class indices, zero where ignored, and one for probabilities."""
        xp = array_api_compat.array_namespace(y)
        if not _is_index(t):
            return xp.ones_like(y[..., 0])
        of_class = xp.ones_like(y[..., 0]) if weight is None else xp.sum(as_dtype(weight, y) * _one_hot(y, t), axis=-1)
        skip = ignored(t)
        return of_class if skip is None else xp.where(skip, xp.zeros_like(of_class), of_class)

    return Loss(value, gradient, hessian_sqrt, hessian, product, check, valid, None if is_plain else sample_weight)


def _check_weight(name: str, weight: Array | None, y: Array, shared: bool = False) -> None:
    """Raise unless `weight` has one entry for each output (or a `shared` one), their library and their dtype."""
    if weight is None:
        return
    namespace(**{name: weight, "x": y})
    check_dtypes(**{name: (weight, y.dtype)})
    if requires_grad(weight):
        raise TypeError(f"{name} requires grad, and a loss has no gradient with respect to it. Pass {name}.detach().")
    if not (shared and tuple(weight.shape) == (1,)):
        check_shapes(**{name: (weight, (y.shape[-1],))})


def _is_index(t: Array) -> bool:
    return bool(array_api_compat.array_namespace(t).isdtype(t.dtype, "integral"))


def _one_hot(y: Array, t: Array) -> Array:
    """Return one where the class is that of the sample, zero elsewhere, ``(N, C)``."""
    xp = array_api_compat.array_namespace(y)
    classes = xp.arange(y.shape[-1], dtype=t.dtype, device=array_api_compat.device(y))
    return xp.astype(t[:, None] == classes, y.dtype)


def _softmax(y: Array) -> Array:
    return array_api_compat.array_namespace(y).exp(_log_softmax(y))


def _log_softmax(y: Array) -> Array:
    xp = array_api_compat.array_namespace(y)
    # Shift by the largest output, so that no exponential overflows.
    z = y - xp.max(y, axis=-1, keepdims=True)
    return z - xp.log(xp.sum(xp.exp(z), axis=-1, keepdims=True))


# --- one loss for each of several positions, such as the tokens of a text -------------------------------------------


@_remembered
def over_positions(loss: Loss, positions: int) -> Loss:
    """Make the sum of a loss over positions: outputs ``(N, T C)`` of T positions, targets ``(N, T)`` or ``(N, T, C)``.

    The mean divides by the number of positions of all samples, or by the sum of their weights.
    """

    def flat(y: Array, t: Array) -> tuple[Array, Array]:
        """Return every position as a sample."""
        xp = array_api_compat.array_namespace(y)
        count = y.shape[0] * positions
        return xp.reshape(y, (count, y.shape[-1] // positions)), xp.reshape(t, (count, *t.shape[2:]))

    def summed(values: Array) -> Array:
        xp = array_api_compat.array_namespace(values)
        return xp.sum(xp.reshape(values, (-1, positions)), axis=1)

    def on_diagonal(blocks: Array) -> Array:
        """Return ``(N T, C, R)`` as block diagonal matrices ``(N, T C, T R)``."""
        xp = array_api_compat.array_namespace(blocks)
        c, r = blocks.shape[1:]
        eye = _linalg.identity(positions, blocks)
        spread = xp.reshape(blocks, (-1, positions, c, 1, r)) * eye[:, None, :, None]
        return xp.reshape(spread, (-1, positions * c, positions * r))

    def product(y: Array, t: Array, u: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        y_flat, t_flat = flat(y, t)
        u_flat = xp.reshape(u, (*u.shape[:-2], *y_flat.shape))
        return xp.reshape(hessian_product(loss, y_flat, t_flat, u_flat), tuple(u.shape))

    def check(y: Array, t: Array) -> None:
        c = y.shape[-1] // positions
        if tuple(t.shape) not in ((y.shape[0], positions), (y.shape[0], positions, c)):
            raise ValueError(
                f"t has shape {tuple(t.shape)}, expected {(y.shape[0], positions)} or {(y.shape[0], positions, c)}: "
                f"outputs of shape {(y.shape[0], positions, c)} have {positions} positions, and the C = {c} outputs "
                "of each come last. Transpose outputs (N, C, T)."
            )
        if loss.check is not None:
            loss.check(*flat(y, t))

    def valid(y: Array, t: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        good = loss.valid(*flat(y, t))  # type: ignore[misc]
        return xp.all(xp.reshape(good, (-1, positions)), axis=1)

    def sample_weight(y: Array, t: Array) -> Array:
        if loss.sample_weight is not None:
            return summed(loss.sample_weight(*flat(y, t)))
        return positions * array_api_compat.array_namespace(y).ones_like(y[:, 0])

    return Loss(
        value=lambda y, t: summed(loss.value(*flat(y, t))),
        gradient=lambda y, t: array_api_compat.array_namespace(y).reshape(loss.gradient(*flat(y, t)), tuple(y.shape)),
        hessian_sqrt=lambda y, t: on_diagonal(loss.hessian_sqrt(*flat(y, t))),
        hessian=lambda y, t: on_diagonal(loss.hessian(*flat(y, t))),
        hessian_product=product,
        check=check,
        valid=None if loss.valid is None else valid,
        sample_weight=sample_weight,
    )


# --- elementwise losses: ℓ = w Σ_c f(y_c, t_c),  w = 1/C for the mean and 1 for the sum ------------------------------


@_remembered
def mse(mean: bool) -> Loss:
    """Make the squared error ``w Σ_c (y_c − t_c)²``."""
    return _elementwise(
        mean,
        value=lambda y, t: (y - t) ** 2,
        gradient=lambda y, t: 2 * (y - t),
        curvature_sqrt=lambda y, t: full((1, 1), math.sqrt(2), y),
        curvature=lambda y, t: full((1, 1), 2.0, y),
    )


@_remembered
def bce(mean: bool, weight: Array | None = None, pos_weight: Array | None = None) -> Loss:
    """Make the binary cross-entropy of logits ``w Σ_c ω_c ((1 − t_c) log(1 + e^(y_c)) + π_c t_c log(1 + e^(−y_c)))``.

    ω, the `weight`, is a factor for each output, and π, the `pos_weight`, one for its positive targets.
    """

    def factors(y: Array, t: Array) -> tuple[Array, Array]:
        """Return ``ω (1 − t)`` and ``ω π t``."""
        negative, positive = 1 - t, t if pos_weight is None else as_dtype(pos_weight, y) * t
        if weight is None:
            return negative, positive
        omega = as_dtype(weight, y)
        return omega * negative, omega * positive

    def value(y: Array, t: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        negative, positive = factors(y, t)
        # log(1 + e^y) is max(y, 0) and this, without overflow: no term is negative, so that nothing cancels.
        rest, zero = xp.log1p(xp.exp(-xp.abs(y))), xp.zeros_like(y)
        return negative * xp.where(y > 0, y, zero) + positive * xp.where(y < 0, -y, zero) + (negative + positive) * rest

    def gradient(y: Array, t: Array) -> Array:
        negative, positive = factors(y, t)
        xp = array_api_compat.array_namespace(y)
        # Both tails from one exponential, each as a quotient of positive numbers.
        e = xp.exp(-xp.abs(y))
        large, small, right = 1 / (1 + e), e / (1 + e), y >= 0
        return negative * xp.where(right, large, small) - positive * xp.where(right, small, large)

    def curvature_sqrt(y: Array, t: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        # √(p (1 − p)), symmetric in y.
        size, (negative, positive) = xp.abs(y), factors(y, t)
        return xp.sqrt(negative + positive) * xp.exp(-size / 2) / (1 + xp.exp(-size))

    def curvature(y: Array, t: Array) -> Array:
        negative, positive = factors(y, t)
        return (negative + positive) * sigmoid(y, 1)[1]

    def check(y: Array, t: Array) -> None:
        _check_weight("weight", weight, y, shared=True)
        _check_weight("pos_weight", pos_weight, y, shared=True)

    def valid(y: Array, t: Array) -> Array:
        xp = array_api_compat.array_namespace(y)
        good = xp.all((t >= 0) & (t <= 1), axis=-1)
        for given in (weight, pos_weight):
            good = good if given is None else good & xp.all(given >= 0)
        return good

    return _elementwise(
        mean,
        value=value,
        gradient=gradient,
        curvature_sqrt=curvature_sqrt,
        curvature=curvature,
        check=check,
        valid=valid,
    )


def _elementwise(
    mean: bool,
    *,
    value: Callable[[Array, Array], Array],
    gradient: Callable[[Array, Array], Array],
    curvature_sqrt: Callable[[Array, Array], Array],
    curvature: Callable[[Array, Array], Array],
    check: Callable[[Array, Array], None] | None = None,
    valid: Callable[[Array, Array], Array] | None = None,
) -> Loss:
    def w(y: Array) -> float:
        return 1 / y.shape[-1] if mean else 1.0

    def diagonal(d: Array, y: Array) -> Array:
        return (d + 0 * y)[..., None] * _linalg.identity(y.shape[-1], y)  # + 0 y: NaN stays in its sample

    def checked(y: Array, t: Array) -> None:
        if check is not None:
            check(y, t)
        check_dtypes(t=(t, y.dtype))
        check_shapes(t=(t, tuple(y.shape)))

    return Loss(
        lambda y, t: w(y) * array_api_compat.array_namespace(y).sum(value(y, t), axis=-1),
        lambda y, t: w(y) * gradient(y, t),
        lambda y, t: diagonal(math.sqrt(w(y)) * curvature_sqrt(y, t), y),
        lambda y, t: diagonal(w(y) * curvature(y, t), y),
        lambda y, t, u: w(y) * curvature(y, t) * u,
        checked,
        valid,
    )


LOSSES: dict[str, Callable[[bool], Loss]] = {"cross_entropy": lambda mean: cross_entropy(), "mse": mse, "bce": bce}
"""Losses by name; each function takes whether the outputs of a sample are averaged too."""
