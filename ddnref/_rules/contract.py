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
    jvp: Callable[..., Any]
    """Takes tangents of the inputs (``None`` for one that does not move), outputs, saved arrays and the inputs that
    `needs` names; one tangent per output, an array where there is one output. Returns ``(tangents, info)`` where the
    VJP returns ``(cotangents, info)``."""
    signature: str
    """Axes of one item, as of a generalised ufunc: ``inputs->outputs->saved->info->info of the VJP``, the last ones
    only where they exist. A letter behind an array gives its dtype (r: the real one, b: flags, i, l: integers of 32
    and 64 bits); without one it is the dtype of the inputs. Empty for a function of a user, whose axes are unknown."""
    outputs: int = 1
    """How many arrays the operation returns."""
    needs: tuple[int, ...] = ()
    """Positions of the inputs that the VJP takes last."""
    info: type[Any] | None = None
    """The NamedTuple of arrays by which an iterative forward says how it ended."""
    vjp_info: type[Any] | None = None
    """The NamedTuple by which an iterative VJP says how it ended."""
    direct: bool = False
    """Whether the VJP solves directly although it has a `vjp_info`, so that it can be differentiated again as it is."""
    # Second derivatives.
    saved_vjp: Callable[..., Any] | None = None
    """Maps cotangents of the saved arrays to those of the inputs, ``saved_vjp(*saved_bars, *saved, *needed)``;
    second derivatives pass through it."""
    saved_jvp: Callable[..., Any] | None = None
    """The other way, ``saved_jvp(*tangents, *saved, *needed)``: one tangent per saved array, ``None`` for one that
    never moves."""
    second: Callable[..., Any] | None = None
    """``second(x_dot, y_bar, *outputs, *saved)``: the derivative of the VJP and of the JVP along `x_dot`, for a rule of
    one input whose derivative is a self-adjoint map. Bridges use it in place of the other fields of this group, unless
    it has an option that is not given."""
    undefined: Callable[..., Array] | None = None
    """``undefined(*outputs, *saved, *needed, rtol=...)``: flags of the items at which a second derivative through the
    VJP is wrong; ``None`` where it is right everywhere."""
    refusal: str = ""
    """The message where a second derivative is refused."""
    # How bridges call it.
    item_axes: tuple[int, ...] = ()
    """How many axes of each input are those of one item, where the inputs' batch axes broadcast."""
    recursive: bool = False
    """Whether the VJP and the JVP take ``solve=``, the function by which they solve their own systems. A bridge passes
    `inner` made differentiable, so that they can be differentiated again although they iterate."""
    solves_by: Rule | None = None
    """The operation that solves them, if it is not this very one."""
    # Functions of a user.
    judged: bool = True
    """Whether NaN in a derivative is a failure, of which bridges warn."""
    one_by_one: bool = False
    """Whether functions that cannot be traced run once for each item that ``vmap`` maps, not once for all of them."""
    shapes: Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]] | None = None
    """Outputs and saved arrays for inputs of NumPy whose values mean nothing; ``None`` where the forward tells them."""

    @property
    def info_fields(self) -> int:
        """How many arrays say how an iterative forward ended."""
        return 0 if self.info is None else len(self.info._fields)

    @property
    def inner(self) -> Rule | None:
        """The operation by which the derivatives of a recursive rule solve their systems."""
        return (self.solves_by or self) if self.recursive else None

    @property
    def is_own(self) -> bool:
        """Whether the functions are a user's, which may change, and whose axes are unknown."""
        return not self.signature

    @property
    def opaque(self) -> bool:
        """Whether the VJP iterates and is not differentiated again."""
        return self.vjp_info is not None and not (self.recursive or self.direct)
