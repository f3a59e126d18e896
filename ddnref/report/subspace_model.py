"""Learn to recognise damaged digits by gradient descent through the eigenvectors of their class covariances.

Every digit class is described by the subspace of the top k eigenvectors of its second moments. An image belongs
to the class whose subspace holds most of it. What is learned is one weight per pixel, ``s = exp(θ)``:

    C_c(s) = diag(s) C_c diag(s),   P_c = V_c V_cᵀ of its top k eigenvectors
    u_n = s∘x_n / ‖s∘x_n‖,          a_nc = ‖P_c u_n‖²
    L = mean_n −log softmax_c(τ a_nc)[label of n]

The loss depends on the eigenvectors only through the projectors P_c, so it has a gradient whatever the
eigenvalues inside and outside the subspace do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import array_api_compat
import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref._core.arrays import Array
from ddnref.report import digits, peers
from ddnref.report.digits import Digits
from ddnref.verify._backends import Backend

COMPONENTS = 6  # k
SHARPNESS = 20.0  # τ
STEP, ITERATIONS = 2.0, 60
BLOCK = np.zeros((8, 8), dtype=bool)
BLOCK[2:5, 2:5] = True  # the damaged pixels
NOISE = 1.5  # standard deviation; pixels lie between 0 and 1


class Data(NamedTuple):
    """Arrays of the backend."""

    c: Array
    """Second moments of every class, ``(10, 64, 64)``."""
    x: Array
    """Images, ``(n, 64)``."""
    labels: Array
    """1 where image n is of class c, else 0, ``(n, 10)``."""


class State(NamedTuple):
    """One forward pass, with what the reverse pass needs."""

    loss: Array
    s: Array
    u: Array
    length: Array
    w: Array
    v: Array
    saved: tuple[Array, ...]


def damage(clean: Digits, rng: np.random.Generator) -> Digits:
    """Noise on the same nine pixels of every image: a sensor with a bad spot."""
    images = clean.images.copy()
    images[:, BLOCK.ravel()] += NOISE * rng.standard_normal((len(images), int(BLOCK.sum())))
    return Digits(images, clean.labels)


def prepare(backend: Backend, images: Digits) -> Data:
    """Move the images to the backend and form the second moments of all classes as one batch."""
    labels = (images.labels[:, None] == np.arange(digits.CLASSES)).astype(np.float64)
    x, labels = backend.convert(images.images), backend.convert(labels)
    xp = array_api_compat.array_namespace(x)
    per_class = xp.matrix_transpose(labels)
    x_t = xp.matrix_transpose(x) * per_class[:, None, :]
    return Data((x_t @ x) / xp.sum(per_class, axis=1)[:, None, None], x, labels)


def beside(v: Array) -> Array:
    """The bases of all classes side by side, ``(64, 10 k)``: one product instead of ten."""
    xp = array_api_compat.array_namespace(v)
    return xp.reshape(xp.permute_dims(v, (1, 0, 2)), (v.shape[1], -1))


def scores(p: Array) -> Array:
    """``a_nc = ‖V_cᵀ u_n‖²`` from the coordinates ``(n, 10 k)`` of all images in all bases."""
    xp = array_api_compat.array_namespace(p)
    return xp.sum(xp.reshape(p * p, (p.shape[0], digits.CLASSES, -1)), axis=-1)


def log_softmax(a: Array) -> Array:
    """Of ``τ a``, over the classes."""
    xp = array_api_compat.array_namespace(a)
    a = SHARPNESS * a
    a = a - xp.max(a, axis=1, keepdims=True)
    return a - xp.log(xp.sum(xp.exp(a), axis=1, keepdims=True))


def subspace_loss(w: Array, v: Array, u: Array, labels: Array) -> Array:  # noqa: ARG001
    """``L`` as a function of the eigenpairs of ``C_c(s)``, the last k of which count."""
    xp = array_api_compat.array_namespace(v)
    v_k = v[..., v.shape[-1] - COMPONENTS :]
    return -xp.sum(labels * log_softmax(scores(u @ beside(v_k)))) / u.shape[0]


def subspace_gradient(w: Array, v: Array, u: Array, labels: Array) -> tuple[None, Array]:  # noqa: ARG001
    """``V̄_c = 2 P̄_c V_c`` with ``P̄_c = Σ_n g_nc u_n u_nᵀ``; the eigenvalues do not enter."""
    xp = array_api_compat.array_namespace(v)
    v_bar = xp.matrix_transpose(u) @ p_bar(u @ beside(v), labels)
    return None, xp.permute_dims(xp.reshape(v_bar, (v.shape[1], v.shape[0], v.shape[2])), (1, 0, 2))


def p_bar(p: Array, labels: Array) -> Array:
    """``2 g_nc p_nc``, with ``g_nc = ∂L/∂a_nc = τ (softmax − label) / n``."""
    xp = array_api_compat.array_namespace(p)
    g = SHARPNESS * (xp.exp(log_softmax(scores(p))) - labels) / p.shape[0]
    by_class = xp.reshape(p, (p.shape[0], digits.CLASSES, -1))
    return xp.reshape(2 * g[..., None] * by_class, p.shape)


def forward(theta: Array, data: Data) -> State:
    """The loss of the pixel weights ``exp(θ)``."""
    xp = array_api_compat.array_namespace(theta)
    s = xp.exp(theta)
    (w, v), saved = ddnref.eigh_topk_fwd(data.c * s[:, None] * s[None, :], COMPONENTS)
    z = data.x * s
    length = xp.sqrt(xp.sum(z * z, axis=1, keepdims=True))
    u = z / length
    return State(subspace_loss(w, v, u, data.labels), s, u, length, w, v, saved)


def reverse(state: State, data: Data) -> Array:
    """``θ̄``: through the eigenvectors by `ddnref.eigh_topk_vjp`, the rest by the chain rule, written out."""
    xp = array_api_compat.array_namespace(state.s)
    s, u, v = state.s, state.u, state.v
    _, v_bar = subspace_gradient(state.w, v, u, data.labels)
    c_bar = ddnref.eigh_topk_vjp(None, v_bar, state.w, v, *state.saved)  # of C_c(s)
    s_bar = 2 * xp.sum((c_bar * data.c) @ s[:, None], axis=(0, 2))  # of diag(s) C_c diag(s)
    bases = beside(v)
    u_bar = p_bar(u @ bases, data.labels) @ xp.matrix_transpose(bases)
    z_bar = (u_bar - u * xp.sum(u * u_bar, axis=1, keepdims=True)) / state.length
    return (s_bar + xp.sum(z_bar * data.x, axis=0)) * s


def accuracy(state: State, held_out: Data) -> float:
    """Share of held-out images whose nearest subspace is that of their class."""
    xp = array_api_compat.array_namespace(state.v)
    a = scores((held_out.x * state.s) @ beside(state.v))  # the length of an image changes nothing here
    right = xp.argmax(a, axis=1) == xp.argmax(held_out.labels, axis=1)
    return float(xp.mean(xp.astype(right, held_out.x.dtype)))


class Learned(NamedTuple):
    """The course of gradient descent; index 0 is before the first step."""

    first: State
    last: State
    losses: list[float]
    accuracies: list[float]


def learn(data: Data, held_out: Data, steps: Iterable[Any]) -> Learned:
    """Plain gradient descent on θ from equal weights, with a constant step."""
    xp = array_api_compat.array_namespace(data.x)
    theta = xp.zeros(digits.PIXELS, dtype=data.x.dtype, device=array_api_compat.device(data.x))
    first = state = forward(theta, data)
    losses, accuracies = [float(state.loss)], [accuracy(state, held_out)]
    for _ in steps:
        theta = theta - STEP * reverse(state, data)
        state = forward(theta, data)
        losses.append(float(state.loss))
        accuracies.append(accuracy(state, held_out))
    return Learned(first, state, losses, accuracies)


class Checked(NamedTuple):
    """How right the gradients are, at equal weights."""

    matrix: float
    """`ddnref.eigh_topk_vjp`, against finite differences of the ten matrices."""
    chain: float
    """The gradient of the pixel weights, against finite differences."""
    nan: int
    """For how many of the ten matrices the first of these is not finite."""
    repeated: int
    """Neighbouring eigenvalues that are equal to rounding, in all ten matrices."""


class Compared(NamedTuple):
    """Another library's gradient of the ten matrices."""

    nan: int
    """For how many of them it is not finite."""
    difference: float
    """For the others, the relative difference from ddnref; NaN where there are none."""


def check(backend: Backend, data: Data, state: State, seed: int) -> Checked:
    """Check the gradient of the matrices, and the one of the pixel weights that contains it."""
    w_all = backend.to_numpy(state.saved[0])
    gap = float(np.min(w_all[:, -COMPONENTS] - w_all[:, -COMPONENTS - 1]))
    options: dict[str, Any] = {"directions": 4, "gap": gap, "seed": seed}
    on_images = {"u": state.u, "labels": data.labels}
    matrix = ddnref.testing.check_vjp(
        partial(ddnref.eigh_topk_fwd, k=COMPONENTS), ddnref.eigh_topk_vjp, data.c, saves=True,
        loss=(partial(subspace_loss, **on_images), partial(subspace_gradient, **on_images)),
        tangent="symmetric", symmetrises=True, **options,
    )  # fmt: skip
    chain = ddnref.testing.check_vjp(
        lambda theta: forward(theta, data).loss,
        lambda loss_bar, loss, theta: loss_bar * reverse(forward(theta, data), data),  # noqa: ARG005
        0.0 * state.s, needs=(0,), **options,
    )  # fmt: skip
    equal = w_all[:, 1:] - w_all[:, :-1] <= 16 * np.finfo(w_all.dtype).eps * w_all[:, -1:]
    nan = _not_finite(gradient_of_matrices(backend, data, state))
    return Checked(matrix.error, chain.error, int(nan.sum()), int(equal.sum()))


def gradient_of_matrices(backend: Backend, data: Data, state: State) -> NDArray[Any]:
    """By `ddnref.eigh_topk_vjp`, with respect to ``C_c(s)``."""
    _, v_bar = subspace_gradient(state.w, state.v, state.u, data.labels)
    return backend.to_numpy(ddnref.eigh_topk_vjp(None, v_bar, state.w, state.v, *state.saved))


def _not_finite(gradient: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(~np.isfinite(gradient).all(axis=(-2, -1)))


def compare(backend: Backend, data: Data, state: State) -> dict[str, Compared | None]:
    """The gradient of the matrices by PyTorch's and JAX's autograd, on the same numbers; ``None``: not installed."""
    ours = gradient_of_matrices(backend, data, state)
    arrays = (backend.to_numpy(array) for array in (data.c, state.u, data.labels))
    found: dict[str, Compared | None] = {}
    for name, gradient in peers.gradients(subspace_loss, *arrays).items():
        found[name] = None if gradient is None else _compared(gradient, ours)
    return found


def _compared(gradient: NDArray[Any], ours: NDArray[Any]) -> Compared:
    finite = ~_not_finite(gradient)
    if not finite.any():
        return Compared(len(gradient), math.nan)
    difference = np.linalg.norm(gradient[finite] - ours[finite]) / np.linalg.norm(ours[finite])
    return Compared(int(np.sum(~finite)), float(difference))


def repaired(train: Digits, held_out: Digits, backend: Backend) -> float:
    """Held-out accuracy of someone who knows the damaged pixels and removes them."""
    keep = ~BLOCK.ravel()
    kept_train, kept_test = (Digits(d.images * keep, d.labels) for d in (train, held_out))
    return plain(kept_train, kept_test, backend)


def plain(train: Digits, held_out: Digits, backend: Backend) -> float:
    """Held-out accuracy with equal weights."""
    data = prepare(backend, train)
    return accuracy(forward(0.0 * data.x[0, :], data), prepare(backend, held_out))
