"""A user's function and its derivatives as rules, so that bridges take it like one of ddnref's operations."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from ddnref._core.arrays import Array, as_tuple, is_complex, namespace_of
from ddnref._rules.contract import Rule
from ddnref.implicit import ImplicitFunction
from ddnref.implicit._conditions import Minimum
from ddnref.operators import LinearOperator


class Own(NamedTuple):
    """A user's function with its derivatives, as given to ``differentiable(function, vjp=..., jvp=...)``."""

    function: Callable[..., Any]
    vjp: Callable[..., Any]
    jvp: Callable[..., Any] | None = None
    fwd: Callable[..., Any] | None = None
    needs: Sequence[int] | None = None
    outputs: int | None = None
    batched: bool = False
    shapes: Callable[..., Any] | None = None
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    # Of implicit functions.
    iterates: bool = False
    """Whether the derivatives iterate, so that nothing traces them, and are NaN where that fails."""
    once: bool = False
    """Whether the derivatives are not differentiated again."""

    @property
    def name(self) -> str:
        return _name(self.function)


def own_function(
    function: Callable[..., Any],
    *,
    vjp: Callable[..., Any],
    jvp: Callable[..., Any] | None = None,
    fwd: Callable[..., Any] | None = None,
    needs: Sequence[int] | None = None,
    outputs: int | None = None,
    batched: bool = False,
    shapes: Callable[..., Any] | None = None,
    **options: Any,
) -> Own:
    """Collect what was given to ``differentiable``, or raise a ``TypeError`` that names what is wrong.

    An option goes to those of the functions that take a keyword of its name.
    """
    optional = {"jvp": jvp, "fwd": fwd, "shapes": shapes}
    given = {name: f for name, f in optional.items() if f is not None}
    for what, f in {"the function": function, "vjp": vjp, **given}.items():
        if not callable(f):
            raise TypeError(f"{what} is {f!r}, expected a function.")
    taken = (_with_options(f, options)[1] for f in (function, vjp, jvp, fwd))
    unknown = sorted(set(options).difference(*taken))
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)} is no option of differentiable, and neither {_name(function)} nor its derivatives "
            "take a keyword of that name."
        )
    own = Own(function, vjp, jvp, fwd, needs, outputs, batched, shapes, options)
    for count in own_counts(own):
        own_rule(own, count)  # raises where the signatures do not fit
    return own


def implicit_function(
    function: ImplicitFunction, solve: Callable[..., Any], options: dict[str, Any], names: tuple[str, ...] = ()
) -> Own:
    """A solver with the condition of its solution; `solve` is `linear_solve`, made differentiable.

    The last inputs are arrays that are options of the solver, by their `names`; they have no derivative.
    """
    condition, name, held = function.condition, function.__name__, len(names)

    def fwd(*inputs: Array) -> tuple[Array, tuple[()]]:
        given = dict(zip(names, inputs[len(inputs) - held :], strict=True))
        return function.solved(*inputs[: len(inputs) - held], **options, **given), ()

    def vjp(y_bar: Array, y: Array, *inputs: Array) -> tuple[Any, ...]:
        x_bars, _ = condition.vjp(y_bar, y, inputs[: len(inputs) - held], solve, name, False)
        return (*x_bars, *(None,) * held)

    def jvp(*arrays: Array) -> Array:
        n = len(arrays) // 2
        dots, y, inputs = arrays[: n - held], arrays[n], arrays[n + 1 : len(arrays) - held]
        return condition.jvp(dots, y, inputs, solve, name, False)[0]

    def named(*inputs: Array) -> NoReturn:
        raise NotImplementedError  # only its name and its any number of inputs are used

    named.__name__, named.__doc__ = name, function.__doc__
    called = named if names else function
    return Own(called, vjp, jvp, fwd, iterates=True, once=isinstance(condition, Minimum))


def _name(function: Callable[..., Any]) -> str:
    bare = function.func if isinstance(function, partial) else function
    return getattr(bare, "__name__", type(bare).__qualname__)


def _with_options(function: Callable[..., Any] | None, options: dict[str, Any]) -> tuple[Any, set[str]]:
    """A function with those options bound that it takes as keywords, and their names."""
    if function is None or not options:
        return function, set()
    parameters = inspect.signature(function).parameters.values()
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty}
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    own = {name: value for name, value in options.items() if takes_all or name in keywords}
    return partial(function, **own) if own else function, set(own)


def _positions(function: Callable[..., Any]) -> list[inspect.Parameter] | None:
    """The parameters that a function takes by position; ``None`` if it takes any number, or does not say."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some built-in functions have no signature
        return None
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return None
    return [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def own_counts(own: Own) -> tuple[int, ...]:
    """How many inputs the function may have, where its signature says so: its defaults are options."""
    count = _taken(_with_options(own.function, own.options)[0])
    return () if count is None else (count,)


def _taken(function: Callable[..., Any] | None) -> int | None:
    """How many arrays a function takes; ``None`` if it takes any number."""
    found = None if function is None else _positions(function)
    return None if found is None else len([p for p in found if p.default is p.empty])


def own_rule(own: Own, count: int) -> Rule:
    """The rule of a user's function of `count` inputs."""
    function, vjp, jvp, fwd = (_with_options(f, own.options)[0] for f in (own.function, own.vjp, own.jvp, own.fwd))
    name = own.name
    needs = tuple(range(count)) if own.needs is None else own.needs
    if not isinstance(needs, Sequence):
        raise TypeError(f"needs is {needs!r}, expected a sequence of positions, such as (0,).")
    needs = tuple(needs)
    if any(not 0 <= i < count for i in needs):
        raise ValueError(f"needs is {needs}, but {name} has {count} input(s): it names positions from 0.")
    n = _outputs(own, count, needs, vjp, jvp)
    # Zeros for an input that does not move have its shape.
    kept = tuple(range(count)) if jvp is not None and count > 1 else needs

    def needed(rest: tuple[Any, ...]) -> tuple[tuple[Any, ...], dict[int, Any]]:
        """Outputs, saved arrays and the inputs that the user asked for; and all inputs that are there."""
        results, inputs = rest[: len(rest) - len(kept)], dict(zip(kept, rest[len(rest) - len(kept) :], strict=True))
        return (*results, *(inputs[i] for i in needs)), inputs

    def forward(*inputs: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        result, saved = (function(*inputs), ()) if fwd is None else fwd(*inputs)
        outputs = as_tuple(result)
        if isinstance(result, list):
            raise TypeError(f"{name} returned a list, expected an array or a tuple of arrays.")
        if len(outputs) != n:
            raise TypeError(
                f"{name} returned {len(outputs)} array(s), expected {n}: pass outputs={len(outputs)} if that is right."
            )
        for y in (*outputs, *as_tuple(saved)):
            if not hasattr(y, "dtype"):
                raise TypeError(f"{name} returned a {type(y).__qualname__}, expected an array or a tuple of arrays.")
        return outputs, as_tuple(saved)

    def reverse(*arrays: Any) -> tuple[Any, ...]:
        rest = arrays[n:]
        # A loss need not use all outputs.
        bars = tuple(_zeros(y) if bar is None else bar for bar, y in zip(arrays[:n], rest[:n], strict=True))
        arguments, inputs = needed(rest)
        x_bars = as_tuple(vjp(*bars, *arguments))
        if len(x_bars) != count:
            raise TypeError(
                f"The VJP of {name} returned {len(x_bars)} cotangents for {count} inputs: return one for each, None "
                "for an input without a gradient."
            )
        found = dict(enumerate(x_bars))
        for i, x in inputs.items():
            found[i] = _fitted(f"The VJP of {name}", f"the cotangent of input {i}", x_bars[i], x)
        return tuple(found.values())

    def push(*arrays: Any) -> tuple[Any, ...]:
        if jvp is None:
            raise NotImplementedError(
                f"A tangent of {name} was asked for, in forward mode or by a second derivative: pass "
                f"differentiable({name}, vjp=..., jvp=...)."
            )
        rest = arrays[count:]
        arguments, inputs = needed(rest)
        dots = tuple(_zeros(inputs[i]) if dot is None else dot for i, dot in enumerate(arrays[:count]))
        moved = as_tuple(jvp(*dots, *arguments))
        if len(moved) != n:
            raise TypeError(f"The JVP of {name} returned {len(moved)} tangents for {n} outputs: return one for each.")
        pairs = enumerate(zip(moved, rest, strict=False))
        return tuple(_fitted(f"The JVP of {name}", f"the tangent of output {i}", y_dot, y) for i, (y_dot, y) in pairs)

    def refuse(*_: Any) -> NoReturn:
        raise NotImplementedError(
            f"A second derivative was taken through {name}, whose fwd= saves arrays with unknown derivatives: leave "
            "out fwd=, and let the VJP compute what it needs from inputs and outputs."
        )

    found = _positions(function)
    names = [p.name for p in found[:count]] if found is not None else [f"inputs[{i}]" for i in range(count)]
    parameters = [
        inspect.Parameter(x if x.isidentifier() else f"input_{i}", inspect.Parameter.POSITIONAL_ONLY)
        for i, x in enumerate(names)
    ]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    saves = fwd is not None
    rule = Rule(
        name, own.function, forward, reverse, push, signature="", outputs=n, needs=kept,
        saved_vjp=refuse if saves else None, saved_jvp=refuse if saves else None, judged=own.iterates,
        one_by_one=not own.batched, shapes=partial(own_shapes, own, forward), refusal=_REFUSED.format(name),
    )  # fmt: skip
    if not own.once:
        return rule
    # A rule with an `info` of its VJP is not differentiated again.
    return rule._replace(
        vjp=lambda *arrays: (reverse(*arrays), ()), jvp=lambda *arrays: (push(*arrays), ()), vjp_info=tuple,
        refusal=_CONSTRAINED.format(name),
    )  # fmt: skip


_REFUSED = "A second derivative was taken through {}, whose derivatives another library computes: leave out compute=."
_CONSTRAINED = (
    "A second derivative was taken through {}, a minimum under constraints, of which only first derivatives are known. "
    "State it as a root of its conditions, with multipliers among the unknowns: ddnref.implicit.custom_root."
)


def _outputs(own: Own, count: int, needs: tuple[int, ...], vjp: Any, jvp: Any) -> int:
    """How many arrays the function returns, as the signatures of its derivatives say it."""
    total, total_jvp = _taken(vjp), _taken(jvp)
    k = len(needs)
    if total is None:
        return own.outputs or 1
    if own.outputs is not None:
        n = own.outputs
    elif own.fwd is None:
        n = (total - k) // 2
    elif total_jvp is not None:
        n = total - total_jvp + count
    else:
        n = 1
    saved = total - 2 * n - k
    if n < 1 or saved < 0 or (saved and own.fwd is None):
        expected = "cotangents, as many outputs" + (", saved arrays" if own.fwd is not None else "")
        raise TypeError(
            f"The VJP of {own.name} takes {total} arrays. It is called with {expected} and {k} of {count} input(s), "
            "those that needs= names, by default all."
        )
    if total_jvp is not None and total_jvp != count + n + saved + k:
        raise TypeError(
            f"The JVP of {own.name} takes {total_jvp} arrays, expected {count + n + saved + k}: {count} tangent(s), "
            f"{n} output(s), {saved} saved array(s) and {k} input(s)."
        )
    return n


def _zeros(x: Any) -> Any:
    return None if isinstance(x, LinearOperator) else namespace_of(x).zeros_like(x)


def _fitted(function: str, what: str, found: Any, x: Any) -> Any:
    """A derivative with the shape and the dtype of the array to which it belongs.

    A real array has the real part, since the pairing of derivatives is ``Re Σ conj(ȳ) · ẏ``.
    """
    if found is None or isinstance(x, LinearOperator):
        return found
    if not hasattr(found, "dtype"):
        raise TypeError(f"{function} returned {what} as a {type(found).__qualname__}, expected an array.")
    if tuple(found.shape) != tuple(x.shape):
        raise ValueError(f"{function} returned {what} with shape {tuple(found.shape)}, expected {tuple(x.shape)}.")
    if found.dtype == x.dtype:
        return found
    xp = namespace_of(x)
    if not xp.isdtype(x.dtype, ("real floating", "complex floating")):
        return found
    if is_complex(found) and not is_complex(x):
        found = xp.real(found)
    return xp.astype(found, x.dtype)


def own_shapes(own: Own, forward: Callable[..., Any], *inputs: Array) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Outputs and saved arrays of NumPy for inputs that only have the right shapes and dtypes.

    Graphs ask for these before there are values. They come from ``shapes=``, or from a call with random numbers.
    """
    if own.shapes is not None:
        result = own.shapes(*inputs)
        outputs, saved = (result, ()) if own.fwd is None else result
        return as_tuple(outputs), as_tuple(saved)
    rng = np.random.default_rng(0)
    trial = [(rng.random(x.shape) + 0.5).astype(x.dtype) for x in inputs]
    try:
        with np.errstate(all="ignore"):
            return forward(*trial)  # type: ignore[no-any-return]
    except Exception as error:
        raise ValueError(
            f"A graph has to know the shapes that {own.name} returns before it runs. They were to be found by a call "
            f"with random numbers between 0.5 and 1.5, which failed: {error} Pass shapes=, a function of such inputs "
            "that returns arrays of the right shapes and dtypes."
        ) from error


def by_count(own: Own, build: Callable[[Rule], Callable[..., Any]]) -> Callable[..., Any]:
    """A function of any number of inputs that calls the one which `build` makes of the rule for that number.

    The number that the signature shows is built at once: a compiler that traces the first call need not look inside.
    """
    built = {count: build(own_rule(own, count)) for count in own_counts(own)}

    def call(*inputs: Any) -> Any:
        function = built.get(len(inputs))
        if function is None:
            function = built[len(inputs)] = build(own_rule(own, len(inputs)))
        return function(*inputs)

    return call
