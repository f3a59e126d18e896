"""The calls of a module's parts during one forward pass, recorded by hooks, and which axes of their tensors count samples.

Two passes over two and over three samples tell the axes: one that has a length of 2 w in the first and of 3 w in the
second counts samples, with w rows for each. No length of the user's data can be mistaken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from ddnref._core.arrays import Array

Tensor = Any  # torch is optional, so that types must not depend on it


class Axis(NamedTuple):
    """The axis of a tensor that counts samples."""

    place: int
    width: int
    """How many neighbouring rows belong to one sample: 1, or the number of windows that were merged with the axis."""

    def apart(self, x: Array, lead: int = 0) -> Array:
        """Return a tensor with the samples as axis `lead`, and the rows of one sample where they were."""
        place = self.place + lead
        return x.unflatten(place, (-1, self.width)).movedim(place, lead)


class Call(NamedTuple):
    """One call of a module."""

    module: Any
    leaves: tuple[Any, ...]
    """Its arguments, flat; tensors are detached."""
    structure: Any
    """How they are given back to the module."""
    axes: tuple[Axis | None, ...]
    """The axis of each argument that counts samples."""
    outputs: tuple[Any, ...]
    """For each tensor of its output: shape, axis, and its place in the graph, or ``None`` for one without derivative."""


class Output(NamedTuple):
    """A tensor that a module returned."""

    shape: tuple[int, ...]
    axis: Axis | None
    edge: Any
    """Its place in the graph; ``None`` without a derivative. What is done to the tensor in place later leaves it."""


Shapes = list[tuple[tuple[tuple[int, ...] | None, ...], tuple[tuple[int, ...] | None, ...]]]


class Layout(NamedTuple):
    """The axes that count samples, for each call of each module in the order of its calls."""

    axes: dict[Any, list[tuple[tuple[Axis | None, ...], tuple[Axis | None, ...]]]]

    def carries_samples(self, module: Any) -> bool:
        """Whether a module was called, each time with tensors of samples, and returned such tensors."""
        calls = self.axes.get(module)
        return bool(calls) and all(any(inputs) and any(outputs) for inputs, outputs in calls or ())


def layout(module: Any, x: Tensor) -> Layout:
    """Run a module on two and on three samples, and compare the shapes in its calls."""
    n = x.shape[0]
    two, three = (_shapes(module, x[[i % n for i in range(count)]]) for count in (2, 3))
    axes: dict[Any, list[tuple[tuple[Axis | None, ...], tuple[Axis | None, ...]]]] = {}
    for part, calls in two.items():
        others = three.get(part, [])
        # Branches that depend on data may call a module in one pass only.
        axes[part] = [
            tuple(tuple(map(_axis, a, b)) if len(a) == len(b) else () for a, b in zip(first, second, strict=True))  # type: ignore[misc]
            for first, second in zip(calls, others, strict=False)
        ]
    return Layout(axes)


def _axis(two: tuple[int, ...] | None, three: tuple[int, ...] | None) -> Axis | None:
    if two is None or three is None or len(two) != len(three):
        return None
    places = [i for i, (a, b) in enumerate(zip(two, three, strict=True)) if a != b]
    if len(places) != 1:
        return None
    width = three[places[0]] - two[places[0]]
    return Axis(places[0], width) if width > 0 and two[places[0]] == 2 * width else None


def _shapes(module: Any, x: Tensor) -> dict[Any, Shapes]:
    found: dict[Any, Shapes] = {}

    def hook(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs, results = pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(output)
        shapes = tuple(tuple(_shape(leaf) for leaf in leaves) for leaves in (inputs, results))
        found.setdefault(part, []).append(shapes)  # type: ignore[arg-type]

    with hooks([part for part in module.modules() if any(p.requires_grad for p in part.parameters())], hook):
        module(x)
    return found


def _shape(leaf: Any) -> tuple[int, ...] | None:
    return tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None


@contextmanager
def hooks(modules: Any, hook: Callable[..., None]) -> Iterator[None]:
    """Call `hook` after each call of some modules, and remove it at the end, whatever happens."""
    handles = [part.register_forward_hook(hook, with_kwargs=True) for part in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(module: Any, x: Tensor, parts: Any, known: Layout) -> tuple[Any, list[Call]]:
    """Run a module, and return its output and the calls of some of its parts."""
    calls: list[Call] = []
    counts: dict[Any, int] = {}

    def hook(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        results = [leaf for leaf in pytree.tree_leaves(output)]
        # The axes of the call with the same number; where a branch led elsewhere, the leading axis.
        number = counts[part] = counts.get(part, -1) + 1
        axes, out = (known.axes.get(part, [])[number : number + 1] or [((), ())])[0]
        axes = axes if _fit(axes, leaves, x.shape[0]) else tuple(_leading(leaf, x.shape[0]) for leaf in leaves)
        out = out if _fit(out, results, x.shape[0]) else tuple(_leading(leaf, x.shape[0]) for leaf in results)
        outputs = tuple(
            Output(tuple(leaf.shape), axis, get_gradient_edge(leaf) if leaf.requires_grad else None)
            for leaf, axis in zip(results, out, strict=True)
            if isinstance(leaf, torch.Tensor)
        )
        detached = tuple(leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        calls.append(Call(part, detached, structure, axes, outputs))

    with hooks(parts, hook):
        return module(x), calls


def _fit(axes: tuple[Axis | None, ...], leaves: list[Any], n: int) -> bool:
    """Whether axes are those of n samples in these tensors."""
    return len(axes) == len(leaves) and all(
        axis is None or (isinstance(leaf, torch.Tensor) and _length(leaf, axis.place) == n * axis.width)
        for axis, leaf in zip(axes, leaves, strict=True)
    )


def _length(leaf: Tensor, place: int) -> int:
    return int(leaf.shape[place]) if leaf.ndim > place else -1


def _leading(leaf: Any, n: int) -> Axis | None:
    if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0 or leaf.shape[0] == 0 or leaf.shape[0] % n:
        return None
    return Axis(0, leaf.shape[0] // n)
