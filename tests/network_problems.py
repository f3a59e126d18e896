"""Random networks, and their derivatives as dense matrices."""

from itertools import pairwise

import numpy as np

from ddnref import networks


def targets(rng, loss, n, c):
    return rng.integers(0, c, n) if loss == "cross_entropy" else rng.uniform(size=(n, c))


def random_chain(rng, loss="cross_entropy", activation="tanh", reduction="mean", bias=True, sizes=(4, 3, 5, 3)):
    """Widths that differ, biases that are not zero."""
    layers = []
    for i, (a_in, a_out) in enumerate(pairwise(sizes)):
        phi = activation if i < len(sizes) - 2 else "identity"
        layers.append(
            networks.Dense(rng.standard_normal((a_out, a_in)), rng.standard_normal(a_out) if bias else None, phi)
        )
    return networks.Chain(layers, loss, reduction)


def block_chain(arrays, loss="cross_entropy"):
    """Convolution with stride and padding, a residual block, a plain activation, dense layers, one of them frozen."""
    k, b, w1, b1, w2, w3, b3, w4 = arrays
    block = networks.Residual([networks.Dense(w1, b1, "tanh"), networks.Dense(w2)])
    return networks.Chain(
        [
            networks.Conv2d(k, b, stride=(2, 1), padding=1, activation="softplus"),
            networks.Flatten(),
            block,
            networks.Frozen(networks.Dense(w4, activation="sigmoid")),
            networks.Dense(w3, b3),
        ],
        loss,
    )


def block_arrays(rng, convert=np.asarray):
    shapes = [(2, 1, 3, 2), (2,), (5, 24), (5,), (24, 5), (3, 4), (3,), (4, 24)]
    return [convert(rng.standard_normal(shape) / max(1, shape[-1]) ** 0.5) for shape in shapes]


def flat(arrays, lead=()):
    return np.concatenate([np.reshape(a, (*lead, -1)) for a in arrays], axis=-1)


def unit_vectors(params):
    """The columns of the identity as several vectors at once."""
    size = sum(p.size for p in params)
    offsets = np.cumsum([0] + [p.size for p in params])
    eye = np.eye(size)
    return [eye[:, a:b].reshape(size, *p.shape) for (a, b), p in zip(pairwise(offsets), params, strict=True)]


def dense(product, chain, *data):
    """The matrix behind a product with vectors."""
    size = sum(p.size for p in chain.params)
    return flat(product(*data, unit_vectors(chain.params)), (size,))


def richardson(f, h=3e-4):
    """Derivative at zero of a function of one number."""
    coarse, fine = ((f(d) - f(-d)) / (2 * d) for d in (h, h / 2))
    return (4 * fine - coarse) / 3
