"""Every operation as a smooth function of one random square matrix, for bridges: no gauge, no close eigenvalues.

Written in what PyTorch's, JAX's and autograd's arrays have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from public_names import PUBLIC

from ddnref._rules.table import RULES


class Smooth(NamedTuple):
    inputs: Callable[[Any, Any], tuple[Any, ...]]
    """Map a random matrix, and diag(1, …, m) of its dtype, to the inputs of the operation."""
    outputs: Callable[[Any], tuple[Any, ...]]
    """Map its result to arrays that are differentiable functions of the inputs."""
    options: dict[str, Any] = {}


def positive(x: Any, steps: Any) -> tuple[Any, ...]:
    """Positive definite, with distinct eigenvalues."""
    return (x @ x.swapaxes(-1, -2).conj() / 4 + steps,)


def two_positive(x: Any, steps: Any) -> tuple[Any, ...]:
    """Two positive definite matrices, whose generalised eigenvalues are distinct."""
    return (*positive(x, steps @ steps), x.swapaxes(-1, -2).conj() @ x / 8 + steps)


def pairs(result: Any) -> tuple[Any, ...]:
    w, v = result
    return w, abs(v) ** 2, v[..., :1, :] * v[..., 1:2, :].conj()


def triples(result: Any) -> tuple[Any, ...]:
    u, s, vh = result
    return s, abs(u) ** 2, u[..., 0, :] * vh[..., :, 1], vh[..., :, 0] * vh[..., :, 1].conj()


def whole(result: Any) -> tuple[Any, ...]:
    return result if isinstance(result, tuple) else (result,)


def without_info(result: Any) -> tuple[Any, ...]:
    return whole(result[0])


def cube(w: Any) -> Any:
    return w**3


def cube_derivative(w: Any) -> Any:
    return 3 * w**2


def histogram(x: Any) -> Any:
    weights = 1 + x * x
    return weights / weights.sum(-1)[..., None]


def column(x: Any, steps: Any) -> tuple[Any, ...]:
    """A vector longer than one."""
    return (positive(x, steps)[0][..., 0],)


def factor(x: Any, steps: Any) -> tuple[Any, ...]:
    """Tall, with squared singular values well apart."""
    return (positive(x, steps)[0][..., :2],)


def regression(x: Any, steps: Any) -> tuple[Any, ...]:
    return positive(x, steps)[0][..., :2], x[..., 0], 1 + x[..., 1] ** 2, 1 + x[..., 0, 0] ** 2


def transport(x: Any, steps: Any) -> tuple[Any, ...]:
    return x * x, histogram(x[..., 0]), histogram(x[..., 1]), 0.5 + 0.1 * x[..., 0, 1] ** 2


def system(x: Any, steps: Any) -> tuple[Any, ...]:
    """A matrix without symmetry, and a vector."""
    return x / 2 + 2 * steps, x[..., 0]


def bands(x: Any, steps: Any) -> tuple[Any, ...]:
    """Three bands without symmetry, and a vector."""
    return x[..., 0, 1:] / 4, x[..., 1, :] / 4 + steps.sum(-1) + 2, x[..., 2, :-1] / 4, x[..., 0]


def block_bands(x: Any, steps: Any) -> tuple[Any, ...]:
    """Bands of two blocks, those on the diagonal different, and a vector of two parts."""
    weights = steps.sum(-1)[:2, None, None]
    diagonal = x[..., None, :, :] / 8 + weights * (steps + 1)
    return x[..., None, :, :] / 8, diagonal, x[..., None, :, :].swapaxes(-1, -2) / 8, x[..., :2, :]


SMOOTH = {
    "eigh": Smooth(positive, pairs),
    "eigh_topk": Smooth(positive, pairs, {"k": 2}),
    "eigh_generalized": Smooth(two_positive, pairs),
    "eigsh": Smooth(positive, lambda result: pairs(result[0]), {"k": 2}),
    "eigsh_generalized": Smooth(two_positive, lambda result: pairs(result[0]), {"k": 2, "sigma": -1.0}),
    "gram_eigvalsh": Smooth(factor, whole),
    "svd": Smooth(factor, triples),
    "svd_topk": Smooth(factor, triples, {"k": 1}),
    "svdvals": Smooth(factor, whole),
    "polar": Smooth(factor, whole),
    "pinv": Smooth(factor, whole),
    "lstsq": Smooth(lambda x, steps: (*factor(x, steps), x[..., 0]), whole),
    "svds": Smooth(factor, lambda result: (result[0][1], result[0][0] @ result[0][2]), {"k": 1}),
    "gram_eigh": Smooth(factor, pairs, {"k": 1}),
    "spectral_function": Smooth(positive, whole, {"f": cube, "df": cube_derivative}),
    **{name: Smooth(positive, whole) for name in ("sqrtm", "invsqrtm", "logm", "expm")},
    "power_iteration": Smooth(positive, without_info),
    "simultaneous_iteration": Smooth(positive, without_info, {"n": 2}),
    **{name: Smooth(column, whole) for name in ("project_sphere", "project_ball", "project_simplex")},
    "least_squares_on_sphere": Smooth(lambda x, steps: (*positive(x, steps), 9 + x[..., 0]), whole),
    "weighted_least_squares": Smooth(regression, whole),
    "sinkhorn": Smooth(transport, without_info),
    "robust_pool": Smooth(column, without_info, {"rtol": 1e-14}),
    "solve": Smooth(system, whole),
    "solve_triangular": Smooth(system, whole),
    "solve_tridiagonal": Smooth(bands, whole),
    "solve_block_tridiagonal": Smooth(block_bands, whole),
    "linear_solve": Smooth(system, without_info, {"solver": "gmres", "rtol": 1e-13}),
    "qr": Smooth(factor, whole),
    "cholesky": Smooth(positive, whole),
    "logdet": Smooth(positive, whole),
    "slogdet": Smooth(lambda x, steps: system(x, steps)[:1], whole),
}

assert set(SMOOTH) == set(RULES), "every rule needs a line here"


def bridged(np_: Any, differentiable: Callable[..., Any], name: str) -> Callable[[Any], tuple[Any, ...]]:
    """The bridged operation as a smooth function of any square matrix; `np_` is the framework's NumPy."""
    inputs, outputs, options = SMOOTH[name]
    op = differentiable(PUBLIC[name], **options)

    def function(x: Any) -> tuple[Any, ...]:
        steps = np_.diag(np_.asarray(np.arange(1.0, x.shape[-1] + 1)))
        return outputs(op(*inputs(x, steps if x.dtype == steps.dtype else steps * (1 + 0j))))

    return function


def total(out: tuple[Any, ...]) -> Any:
    """A sum of the outputs that weights every entry differently."""
    return sum((abs(y) ** 2 * (1 + 0.1 * i) + y.real).sum() + y.sum().real ** 2 for i, y in enumerate(out))
