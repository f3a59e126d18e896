"""The calls of a module's parts during one forward pass, recorded by hooks, and which axes count samples.

Two passes over two and over three samples tell the axes: one that has a length of 2 w in the first and of 3 w in the
second counts samples, with w rows for each. No length of the user's data can be mistaken for it.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
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


class Output(NamedTuple):
    """A tensor that a module returned, or was given."""

    shape: tuple[int, ...]
    axis: Axis | None
    edge: Any
    """Its place in the graph; ``None`` without a derivative. What is done to the tensor in place later leaves it."""


class Inner(NamedTuple):
    """A call of a part with trained parameters inside the call of another one, which is not repeated with that one."""

    module: Any
    inputs: tuple[tuple[int, Output], ...]
    """The places and tensors of its arguments that have a derivative."""
    results: tuple[Any, ...]
    """Its results, flat; tensors are detached."""
    structure: Any
    axes: tuple[Axis | None, ...]
    """The axis of each result that counts samples."""


class Call(NamedTuple):
    """One call of a module."""

    module: Any
    leaves: tuple[Any, ...]
    """Its arguments, flat; tensors are detached."""
    structure: Any
    """How they are given back to the module."""
    axes: tuple[Axis | None, ...]
    """The axis of each argument that counts samples."""
    outputs: tuple[Output, ...]
    """The tensors that it returned."""
    inner: tuple[Inner, ...]
    """The calls inside it, without those inside of these."""

    def tensors(self) -> list[Output]:
        """Return its outputs, and then the arguments of inner calls: all that its own parameters act on."""
        return [*self.outputs, *(tensor for part in self.inner for _, tensor in part.inputs)]


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
def hooks(parts: Iterable[Any], after: Callable[..., None], before: Callable[..., Any] | None = None) -> Iterator[None]:
    """Call functions before and after each call of some modules, and remove the hooks at the end, whatever happens."""
    handles = []
    try:
        for part in parts:
            handles.append(part.register_forward_hook(after, with_kwargs=True))
            if before is not None:
                handles.append(part.register_forward_pre_hook(before, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(module: Any, x: Tensor, owners: Container[Any], known: Layout) -> tuple[Any, list[Call]]:
    """Run a module, and return its output and the calls of the parts that own parameters."""
    calls: list[Call] = []
    counts: dict[Any, int] = {}
    n = x.shape[0]
    # For each call that is running: its module, its inner calls, and its inputs where its caller owns parameters.
    frames: list[tuple[Any, list[Inner], list[tuple[int, Any]]]] = []

    def before(part: Any, args: Any, kwargs: Any) -> Any:
        cut: list[tuple[int, Any]] = []
        inside = bool(frames) and frames[-1][0] in owners
        frames.append((part, [], cut))
        if not inside:
            return None
        # A view of each argument has a derivative by this call alone, whatever else its caller does with the argument.
        leaves, structure = pytree.tree_flatten((args, kwargs))
        views: dict[int, Any] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                if id(leaf) not in views:
                    views[id(leaf)] = leaf.view_as(leaf)
                    cut.append((i, get_gradient_edge(views[id(leaf)])))
                leaves[i] = views[id(leaf)]
        return pytree.tree_unflatten(leaves, structure)

    def after(part: Any, args: Any, kwargs: Any, output: Any) -> None:
        _, inner, cut = frames.pop()
        leaves, structure = pytree.tree_flatten((args, kwargs))
        results, shape_of_results = pytree.tree_flatten(output)
        # The axes of the call with the same number; where a branch led elsewhere, the leading axis.
        number = counts[part] = counts.get(part, -1) + 1
        axes, out = (known.axes.get(part, [])[number : number + 1] or [((), ())])[0]
        axes = axes if _fit(axes, leaves, n) else tuple(_leading(leaf, n) for leaf in leaves)
        out = out if _fit(out, results, n) else tuple(_leading(leaf, n) for leaf in results)
        if frames and frames[-1][0] in owners:
            inputs = tuple((i, Output(tuple(leaves[i].shape), axes[i], edge)) for i, edge in cut)
            frames[-1][1].append(Inner(part, inputs, _detached(results), shape_of_results, out))
        if part in owners:
            outputs = tuple(
                Output(tuple(leaf.shape), axis, get_gradient_edge(leaf) if leaf.requires_grad else None)
                for leaf, axis in zip(results, out, strict=True)
                if isinstance(leaf, torch.Tensor)
            )
            calls.append(Call(part, _detached(leaves), structure, axes, outputs, tuple(inner)))

    parts = [part for part in module.modules() if part in owners or known.carries_samples(part)]
    with hooks(parts, after, before):
        return module(x), calls


def _detached(leaves: list[Any]) -> tuple[Any, ...]:
    return tuple(leaf.detach() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)


@contextmanager
def replaced(inner: Sequence[Inner], results: Sequence[Sequence[Any]], inputs: list[Any]) -> Iterator[None]:
    """Let inner calls return given results instead of computing them, and put their inputs into a list."""
    calls = iter(zip(inner, results, strict=True))

    def answer(*args: Any, **kwargs: Any) -> Any:
        for call, result in calls:
            leaves = pytree.tree_leaves((args, kwargs))
            inputs.extend(leaves[i] for i, _ in call.inputs)
            return pytree.tree_unflatten(result, call.structure)
        raise RuntimeError("There are more calls than before.")

    parts = list(dict.fromkeys(call.module for call in inner))
    own = [part.__dict__.get("forward") for part in parts]
    try:
        for part in parts:
            part.__dict__["forward"] = answer
        yield
    finally:
        for part, forward in zip(parts, own, strict=True):
            del part.__dict__["forward"]
            if forward is not None:
                part.__dict__["forward"] = forward


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
