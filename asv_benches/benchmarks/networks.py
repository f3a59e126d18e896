"""Networks: gradient and products with curvature against the loss's own pass, and against PyTorch's autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

import ddnref

from ._common import BACKENDS, Backend, Call, backend, interleaved, load

NETWORKS = {
    "784-64-32-10": ((784, 64, 32, 10), 64),
    "64-128-128-10": ((64, 128, 128, 10), 128),
    "20 layers of 32": ((32,) * 20 + (10,), 64),
}
"""Widths, and how many samples."""
NAMES = tuple(NETWORKS)
PRODUCTS = ("loss", "gradient", "ggnvp", "hvp")


class Problem(NamedTuple):
    """A tanh network, its data, and a vector, as NumPy arrays."""

    params: list[np.ndarray]
    x: np.ndarray
    t: np.ndarray
    v: list[np.ndarray]


def problem(network: str, dtype: str) -> Problem:
    sizes, n = NETWORKS[network]
    rng = np.random.default_rng(0)
    params = []
    for a_in, a_out in pairwise(sizes):
        params += [rng.standard_normal((a_out, a_in)) / a_in**0.5, np.zeros(a_out)]
    x = rng.standard_normal((n, sizes[0])).astype(dtype)
    v = [rng.standard_normal(p.shape).astype(dtype) for p in params]
    return Problem([p.astype(dtype) for p in params], x, rng.integers(0, sizes[-1], n), v)


def call(on: Backend, product: str, network: str, dtype: str) -> Call:
    """One method of a chain on arrays of the backend, compiled where it compiles; no flag is read."""
    p = problem(network, dtype)
    params, v = ([on.array(a) for a in arrays] for arrays in (p.params, p.v))
    x, t = on.array(p.x), on.array(p.t)
    chain = ddnref.networks.Chain.from_arrays(params)

    def compute(params: list[Any], x: Any, t: Any, v: list[Any]) -> Any:
        method = getattr(chain.with_params(params) if on.name == "jax" else chain, product)
        return method(x, t, v, throw=False) if product in ("ggnvp", "hvp") else method(x, t, throw=False)

    compiled = on.compile(compute)
    return lambda: on.wait(compiled(params, x, t, v))


def autograd(product: str, network: str, dtype: str) -> Call:
    """The same by PyTorch's graph: reverse for the gradient, reverse over reverse for the Hessian's product."""
    torch = load("torch")
    p = problem(network, dtype)
    params = [torch.from_numpy(a).requires_grad_() for a in p.params]
    x, t, v = torch.from_numpy(p.x), torch.from_numpy(p.t), [torch.from_numpy(a) for a in p.v]

    def loss() -> Any:
        z = x
        for i in range(0, len(params), 2):
            z = torch.nn.functional.linear(z, params[i], params[i + 1])
            z = torch.tanh(z) if i < len(params) - 2 else z
        return torch.nn.functional.cross_entropy(z, t)

    def hvp() -> Any:
        gradient = torch.autograd.grad(loss(), params, create_graph=True)
        return torch.autograd.grad(gradient, params, v)

    def without_graph() -> Any:
        with torch.no_grad():
            return loss()

    calls: dict[str, Callable[[], Any]] = {
        "loss": without_graph,
        "gradient": lambda: torch.autograd.grad(loss(), params),
        "hvp": hvp,
    }
    return calls[product]


class Networks:
    """Time of one call."""

    params = (BACKENDS, PRODUCTS, NAMES[:2], ("float32",))
    param_names = ("backend", "product", "network", "dtype")

    def setup(self, name: str, product: str, network: str, dtype: str) -> None:
        self.call = call(backend(name), product, network, dtype)
        self.call()

    def time_call(self, *_: object) -> None:
        self.call()


class NetworksOverLoss:
    """Time of the derivatives over that of the loss, NumPy, interleaved."""

    params = (PRODUCTS[1:], NAMES, ("float64",))
    param_names = ("product", "network", "dtype")
    unit = "ratio"

    def track_over_loss(self, product: str, network: str, dtype: str) -> float:
        on = backend("numpy")
        return interleaved(call(on, product, network, dtype), call(on, "loss", network, dtype)).median


class NetworksOverTorch:
    """Time on NumPy's arrays, or on torch's, over that of PyTorch's autograd, interleaved in one process."""

    params = (("numpy", "torch"), ("loss", "gradient", "hvp"), NAMES, ("float32",))
    param_names = ("backend", "product", "network", "dtype")
    unit = "ratio"

    def setup(self, name: str, product: str, network: str, dtype: str) -> None:
        self.calls = call(backend(name), product, network, dtype), autograd(product, network, dtype)

    def track_over_autograd(self, *_: object) -> float:
        return interleaved(*self.calls).median


class NetworksErrors:
    """Largest difference of the Hessian's product from PyTorch's, relative to its largest entry."""

    params = NAMES
    param_names = ("network",)
    unit = "relative error"

    def setup(self, network: str) -> None:
        self.theirs = [a.numpy() for a in autograd("hvp", network, "float64")()]

    def track_hvp(self, network: str) -> float:
        ours = call(backend("numpy"), "hvp", network, "float64")()
        largest = max(np.max(np.abs(a)) for a in self.theirs)
        return float(max(np.max(np.abs(a - b)) for a, b in zip(ours, self.theirs, strict=True)) / largest)
