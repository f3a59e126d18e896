"""The protocol of networks whose GGN can be taken, and a `Chain` as one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from ddnref._core.arrays import Array
from ddnref.curvature.ggn._columns import Columns, collect
from ddnref.networks._chain import Chain
from ddnref.networks._losses import Loss


class Linearised(NamedTuple):
    """A network at the inputs of N samples."""

    y: Array
    """(N, C): the outputs."""
    criterion: Loss
    """The loss of one sample, for outputs of this shape."""
    back: Callable[[Array], tuple[Columns, ...]]
    """Turn cotangents ``(M, N, C)`` into the columns of all parameters, in the order of `Network.params`."""


class Network(Protocol):
    """A network whose GGN can be taken: its parameters, its loss, and its columns."""

    @property
    def params(self) -> list[Array]:
        """The parameters."""

    @property
    def names(self) -> tuple[str, ...] | None:
        """Their names, by which results are given; ``None`` for results that are lists."""

    def scale(self, n: int | Array) -> Any:
        """Return the factor of the sum over samples whose weights add up to n."""

    def linearised(self, x: Array) -> Linearised:
        """Run forward, and keep what the way back needs."""


class OfChain(NamedTuple):
    """A chain as a `Network`."""

    chain: Chain

    @property
    def params(self) -> list[Array]:
        return self.chain.params

    @property
    def names(self) -> None:
        return None

    def scale(self, n: int | Array) -> Any:
        return self.chain.scale(n)

    def linearised(self, x: Array) -> Linearised:
        chain = self.chain
        y, saved = chain.forward(x, 1)
        params = chain.split(chain.params)
        return Linearised(y, chain.criterion, lambda y_bar: collect(chain.layers, params, saved, y_bar)[0])


def network_of(chain: Any) -> Network:
    """Return what was given in place of a chain as a `Network`."""
    if isinstance(chain, Chain):
        return OfChain(chain)
    if all(hasattr(chain, name) for name in ("params", "names", "scale", "linearised")):
        return chain  # type: ignore[no-any-return]
    raise TypeError(
        f"chain is a {type(chain).__name__}, expected a ddnref.networks.Chain: build one, or use Chain.from_torch. "
        "For any PyTorch module there is ddnref.interop.torch.ggn(module, loss), for factors from elsewhere "
        "ddnref.curvature.gram_from_factors and gram_eigh."
    )


def named(network: Network, group: tuple[int, ...], arrays: list[Array]) -> Any:
    """Return one array for each parameter of a group as the network gives its results: a list, or by name."""
    names = network.names
    return arrays if names is None else {names[i]: array for i, array in zip(group, arrays, strict=True)}
