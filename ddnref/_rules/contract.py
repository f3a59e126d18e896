"""The record by which bridges know an operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ddnref._core.arrays import Array


class Rule(NamedTuple):
    """One differentiable operation.

    An iterative one returns ``(result, info)`` where a closed form returns its result: outputs from `function`,
    ``(outputs, saved)`` from `forward`, cotangents from `vjp`.
    """

    name: str
    function: Callable[..., Any]  # the public operation
    forward: Callable[..., Any]
    """Returns ``(outputs, saved)``, each an array or a tuple of arrays."""
    vjp: Callable[..., Any]
    """Takes cotangents, outputs, saved arrays and the inputs that `needs` names; one cotangent per input."""
    signature: str
    """Axes of one item, as of a generalised ufunc: ``inputs->outputs->saved->info->info of the VJP``, the last ones
    only where they exist. A letter behind an array gives its dtype (r: the real one, b: flags, i, l: integers of 32
    and 64 bits); without one it is the dtype of the inputs."""
    outputs: int = 1
    """How many arrays the operation returns."""
    needs: tuple[int, ...] = ()
    """Positions of the inputs that the VJP takes last."""
    info: type[Any] | None = None
    """The NamedTuple of arrays by which an iterative forward says how it ended."""
    vjp_info: type[Any] | None = None
    """The NamedTuple by which an iterative VJP says how it ended."""
    # Second derivatives.
    saved_vjp: Callable[..., Any] | None = None
    """Maps cotangents of the saved arrays to those of the inputs, ``saved_vjp(*saved_bars, *saved, *needed)``;
    second derivatives pass through it."""
    undefined: Callable[..., Array] | None = None
    """``undefined(*outputs, *saved, *needed, rtol=...)``: flags of the items at which a second derivative through the
    VJP is wrong; ``None`` where it is right everywhere."""
    refusal: str = ""
    """The message where a second derivative is refused."""
    # How bridges call it.
    item_axes: tuple[int, ...] = ()
    """How many axes of each input are those of one item, where the inputs' batch axes broadcast."""
    recursive: bool = False
    """Whether the VJP takes ``solve=``, the function by which it solves its own systems. A bridge passes this very
    operation made differentiable, so that the VJP can be differentiated again although it iterates."""

    @property
    def info_fields(self) -> int:
        """How many arrays say how an iterative forward ended."""
        return 0 if self.info is None else len(self.info._fields)

    @property
    def opaque(self) -> bool:
        """Whether the VJP iterates and is not differentiated again."""
        return self.vjp_info is not None and not self.recursive
