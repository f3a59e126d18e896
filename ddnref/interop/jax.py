"""JAX: ``differentiable(op)`` makes an operation use our JVP and VJP instead of JAX's own derivatives.

It works with ``jit``, ``vmap``, ``grad``, ``jvp`` and what is made of them, at every order: see `_jax_linear`. A
complex gradient of JAX is the conjugate of ours; the bridge converts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial, reduce, wraps
from typing import Any, NoReturn

import numpy as np

from ddnref.interop._extras import needed_by_bridge

with needed_by_bridge("jax"):
    import jax
    import jax.numpy as jnp
    from jax.custom_derivatives import SymbolicZero, zero_from_primal

from ddnref._core.arrays import Array
from ddnref._kernels.jax import TracedError, in_full_precision
from ddnref._kernels.jax_versions import batching_keeps_effects
from ddnref._rules.binding import (
    ITERATE,
    NAN,
    NAN_TANGENT,
    Bound,
    Bridged,
    Layout,
    bind,
    failed,
    failed_items,
    flatten,
    keywords,
    numbers_as_arrays,
    on_arrays,
    output_axes,
    own_axes,
    refuse_foreign,
    spread,
    warn,
    widest,
)
from ddnref._rules.contract import Rule
from ddnref._rules.own import by_count, implicit_function, own_function
from ddnref._rules.table import rule_of
from ddnref.implicit import ImplicitFunction
from ddnref.interop._bridge_cache import cached_by_options, is_constant
from ddnref.interop._held_options import FUNCTIONS, held_by, holding
from ddnref.interop._jax_linear import Flags, LinearMap, Some, differentiated, linear, shape_of
from ddnref.interop._jax_on_host import on_host
from ddnref.linalg import linear_solve
from ddnref.operators import LinearOperator, as_operator

Plain = Callable[[Some, Some, Flags], Some]
Axes = tuple[int | None, ...]


def differentiable(operation: Callable[..., Any], *, compute: str | None = None, **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations, or a function of yours, into one that JAX differentiates with its JVP and VJP.

    Operations, options, functions of yours and missing gradients are those of all bridges, see `ddnref.interop`.
    Gradients follow the convention of ``jax.grad``.

    Parameters
    ----------
    compute : {None, "numpy"}
        With ``"numpy"`` a function of yours and its derivatives get NumPy arrays: at once where the arrays have
        values, and through ``jax.pure_callback`` inside ``jit``. It then has no second derivatives.

    Raises
    ------
    NotImplementedError
        When a third derivative of a function of a matrix is taken, or a second one of a function that NumPy computes.

    Notes
    -----
    ``jax.jvp``, ``jacfwd``, ``hessian`` and ``linearize`` use the JVP. A tangent that splits repeated eigenvalues is
    NaN, unless ``gauge_rtol=float("inf")`` accepts it, and so is a second derivative of eigenpairs there. Those of
    functions of a matrix are exact at every spectrum: of ``ddnref.sqrtm``, ``invsqrtm``, ``logm`` and ``expm``, and of
    ``spectral_function`` with ``d2f=``. Calling ``ddnref.eigh`` itself under ``jax.grad`` would use JAX's derivative of
    ``jnp.linalg.eigh``, which is NaN or wrong at repeated eigenvalues.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> from ddnref.interop.jax import differentiable
    >>> eigh = differentiable(ddnref.eigh)
    >>> jax.grad(lambda x: eigh(x)[0][1])(jnp.diag(jnp.asarray([1.0, 2.0]))).tolist()
    [[0.0, 0.0], [0.0, 1.0]]
    """
    if isinstance(operation, ImplicitFunction):
        if compute is not None:
            raise TypeError(f"compute= is not for {operation.__name__}, whose solver and condition JAX calls.")
        return implicit(operation, options)
    if "vjp" in options:
        own = own_function(operation, **options)
        given = options if compute is None else {"compute": compute, **options}
        return Bridged(by_count(own, partial(_own, compute)), own, differentiable, given)
    if compute is not None:
        raise TypeError("compute= is for functions of yours, with vjp=: JAX itself computes ddnref's operations.")
    return _bridge(rule_of(operation), options)


def implicit(function: ImplicitFunction, options: dict[str, Any], names: tuple[str, ...] = ()) -> Callable[..., Any]:
    """A solver with the condition of its solution, whose linear systems this bridge solves.

    `options` of the solver are bound; those in `names` are its last inputs, without derivative.
    """

    def solve(operator: LinearOperator, b: Array, **others: Any) -> Any:
        return differentiable(linear_solve, **others)(operator, b)

    own = implicit_function(function, solve, options, names)
    return Bridged(by_count(own, partial(_own, None)), own, differentiable, options)


def _own(compute: str | None, rule: Rule) -> Callable[..., Any]:
    """A user's function, which may change, so that no part of it is compiled here."""
    if compute not in (None, "numpy"):
        raise ValueError(f'compute is {compute!r}, expected "numpy", or None for JAX itself.')
    if compute is None:
        refusal = rule.refusal if rule.opaque else None
        forward = wraps(rule.forward)(_on_jax(rule.forward, None))
        rule = rule._replace(forward=forward, vjp=_on_jax(rule.vjp, refusal), jvp=_on_jax(rule.jvp, refusal))
    else:
        rule = on_host(rule)
    return _function(rule, {}, bind(rule, {}), None, False, partial(bind, rule))


def _on_jax(function: Callable[..., Any], refusal: str | None) -> Callable[..., Any]:
    """A function that gets arrays of JAX also where JAX holds constants as those of NumPy, or as numbers.

    With a `refusal` it cannot be differentiated again.
    """

    def call(*arrays: Array | None) -> Any:
        foreign = (x is not None and not isinstance(x, jax.Array | LinearOperator) for x in arrays)
        return function(*(jnp.asarray(x) if other else x for x, other in zip(arrays, foreign, strict=True)))

    if refusal is None:
        return call
    once = jax.custom_jvp(lambda *arrays: call(*arrays)[0])

    @once.defjvp
    def _(*_: Any) -> NoReturn:
        raise NotImplementedError(refusal)

    return lambda *arrays: (once(*arrays), ())


@cached_by_options
def _bridge(rule: Rule, options: dict[str, Any]) -> Callable[..., Any]:
    def solve(*inputs: Any, **others: Any) -> Any:
        return _bridge(rule.inner, others)(*inputs)  # type: ignore[arg-type]

    # A VJP that solves its own systems solves them with this bridge, and so it can be differentiated again.
    def notify(flags: Array) -> None:
        _warn(ITERATE, rule.name, jnp.any(flags), flags)

    bind_rule = partial(
        bind, rule, while_loop=jax.lax.while_loop, solve=solve if rule.recursive else None, notify=notify
    )
    bound = bind_rule(options)
    checked = "gauge_rtol" in keywords(rule.vjp) | keywords(rule.jvp)
    unchecked = bind_rule({**options, "gauge_rtol": float("inf")}) if checked else None
    is_fixed = all(map(is_constant, options.values()))
    function = _function(rule, options, bound, unchecked, is_fixed, bind_rule)
    return Bridged(function, rule, differentiable, options)


def _function(
    rule: Rule,
    options: dict[str, Any],
    bound: Bound,
    unchecked: Bound | None,
    is_fixed: bool,
    bind_rule: Callable[[dict[str, Any]], Bound],
) -> Callable[..., Any]:
    """The function that the user calls: it takes operators apart and puts the results together.

    `is_fixed` says that no option can change. `bind_rule` binds other values of those options that hold arrays.
    """
    operate = lru_cache(maxsize=16)(partial(_operation, rule, bound, unchecked, is_fixed))

    def function(*inputs: Array) -> Any:
        inputs = numbers_as_arrays(rule.forward, inputs, lambda number, x: jnp.asarray(number, jnp.result_type(x)))
        layout, arrays = flatten(inputs)
        if not all(isinstance(x, jax.Array) for x in arrays):
            # JAX's constants may be NumPy arrays, or of a private type.
            own = jax.Array | np.ndarray | np.generic
            refuse_foreign(
                rule, inputs, lambda x: isinstance(x, own) or type(x).__module__.startswith("jax."),
                "an array of JAX or NumPy",
            )  # fmt: skip
            arrays = tuple(map(jnp.asarray, arrays))
        held = None if is_fixed else _held(options, inputs)
        if held is None:
            outputs, _, info = operate(layout)(*arrays)
        else:
            more, rebuild = held

            def bind_with(arrays: tuple[Array, ...]) -> Bound:
                return bind_rule({**options, **rebuild(arrays)})

            own = holding(bind_with, rule, layout, len(more))
            outputs, _, info = _operation(rule, own, None, False, layout, len(more))(*arrays, *more)
        return bound.result(outputs, info)

    return function


def _held(
    options: dict[str, Any], inputs: tuple[Any, ...]
) -> tuple[tuple[Array, ...], Callable[[tuple[Array, ...]], dict[str, Any]]] | None:
    """The arrays that options hold, and the options from these arrays; ``None`` where there are none."""
    names, layout, found = held_by(options)
    arrays = tuple(map(jnp.asarray, found))
    # Functions give up the traced values in their closures. They are traced with a vector of the solve's shape.
    functions: list[tuple[str, int, Callable[..., Any]]] = []
    for name in FUNCTIONS:
        f = options.get(name)
        if f is None or isinstance(f, LinearOperator) or is_constant(f):
            continue
        a, b = as_operator(inputs[0]), inputs[1]
        image = jax.eval_shape(lambda a=a, b=b: b + a.apply(a.params, jnp.zeros(a.domain_shape, b.dtype)))
        lead = image.shape[: len(image.shape) - len(a.range_shape)]
        converted, values = jax.closure_convert(f, jax.ShapeDtypeStruct((*lead, *a.domain_shape), image.dtype))
        arrays += tuple(values)
        functions.append((name, len(values), converted))

    def rebuild(own: tuple[Array, ...]) -> dict[str, Any]:
        cut = sum(layout.counts)
        rebuilt = dict(zip(names, layout.join(own[:cut]), strict=True))
        for name, count, f in functions:
            rebuilt[name] = partial(_with_values, f, own[cut : cut + count])
            cut += count
        return rebuilt

    return (tuple(map(jax.lax.stop_gradient, arrays)), rebuild) if arrays else None


# Operators are trees of their parameters, so that jax.jit, grad and vmap take them as arguments.
jax.tree_util.register_pytree_node(
    LinearOperator,
    lambda a: (a.params, a._replace(params=())),
    lambda bare, params: bare._replace(params=tuple(params)),
)


def _with_values(f: Callable[..., Array], values: tuple[Array, ...], r: Array) -> Array:
    """A function of one vector that is given the values of its closure."""
    return f(r, *values)


def _operation(
    rule: Rule, bound: Bound, unchecked: Bound | None, is_constant: bool, layout: Layout, held: int = 0
) -> Callable[..., tuple[tuple[Array, ...], ...]]:
    """A function of the arrays of a layout, with our JVP and VJP, that returns outputs, saved arrays and status.

    `unchecked` is bound without the check of the gauge, where the rule has one. The last `held` arrays are those that
    options hold, which have no derivative.
    """
    own = bound if held else on_arrays(bound, rule, layout)
    # Compile each step where no option and no function of the user can change.
    compile_step = _compiled if is_constant and layout.known else lambda function: function
    forward, tangent_map = compile_step(own.forward), _tangent_map(rule, own, compile_step, layout, held)
    if unchecked is not None:
        # A second derivative has two parts, and only their sum does not depend on the gauge.
        other = _tangent_map(rule, on_arrays(unchecked, rule, layout), compile_step, layout, held)
        tangent_map.unchecked, tangent_map.transpose.unchecked = other, other.transpose
    needs, count = layout.places(rule.needs), sum(layout.counts)
    needs += tuple(range(count, count + held))
    if own.second is not None:
        needs += (0,)  # the input itself, of which this derivative is one

    def call(*inputs: Array) -> tuple[tuple[Array, ...], ...]:
        return forward(*inputs)  # type: ignore[no-any-return]

    # The caller sees outputs alone. What a derivative has saved is differentiated by the next one, which therefore
    # needs an operation whose saved arrays have tangents.
    operate, again = jax.custom_jvp(call), jax.custom_jvp(call)

    def operate_jvp(inputs: tuple[Array, ...], tangents: tuple[Any, ...], moves_saved: bool) -> tuple[Any, Any]:
        # A number of Python comes as a private type of JAX.
        inputs = tuple(x if isinstance(x, jax.Array) else jnp.asarray(x) for x in inputs)
        # Traced values may be differentiated once more; others can skip JAX's tracing.
        outputs, saved, info = (again if _traced(inputs) else forward)(*inputs)
        results = (*outputs, *saved)
        # Tangents that are symbolically zero are absent, so that nothing computes with them.
        dots = tuple(None if isinstance(t, SymbolicZero) else t for t in tangents)
        dots = (*dots[:count], *(None,) * held)
        # Integers never move.
        moving = tuple(jnp.issubdtype(y.dtype, jnp.inexact) for y in results)
        wanted = moving[: len(outputs)] + tuple(moves_saved and moves for moves in moving[len(outputs) :])
        found = linear(
            tangent_map, dots, (*results, *(inputs[i] for i in needs)), [shape_of(x) for x in inputs],
            [shape_of(y) for y in results], wanted,
        )  # fmt: skip
        moved = tuple(zero_from_primal(y, True) if t is None else t for y, t in zip(results, found, strict=True))
        n = len(outputs)
        return (outputs, saved, info), (moved[:n], moved[n:], zero_from_primal(info, symbolic_zeros=True))

    moves_saved = own.push_saved is not None and own.second is None
    operate.defjvp(lambda inputs, tangents: operate_jvp(inputs, tangents, False), symbolic_zeros=True)
    again.defjvp(lambda inputs, tangents: operate_jvp(inputs, tangents, moves_saved), symbolic_zeros=True)
    return operate  # type: ignore[no-any-return]


def _tangent_map(rule: Rule, own: Bound, compile_step: Callable[[Any], Any], layout: Layout, held: int) -> LinearMap:
    """The map from tangents of the inputs to those of outputs and saved arrays; its transpose is our VJP."""
    count = sum(layout.counts)
    frame = None if own.second is None else -1  # the last array is the input

    def push(dots: Some, arrays: Some, wanted: Flags) -> Some:
        found = own.push(dots, arrays[:frame])  # type: ignore[misc]
        saved = wanted[len(found) :]
        more = own.push_saved(dots, arrays) if own.push_saved and any(saved) else (None,) * len(saved)
        return (*found, *more)

    # The VJP in JAX's convention; arrays that options hold have no gradient.
    def pull(bars: Some, arrays: Some, wanted: Flags) -> Some:  # noqa: ARG001
        bars = tuple(None if bar is None else jnp.conj(bar) for bar in bars)
        gradients = own.reverse(bars, arrays[:frame])[:count] or (None,) * count
        return (*(None if g is None else jnp.conj(g) for g in gradients), *(None,) * held)

    def direction(plain: Plain, axes: Axes, message: str, along: LinearMap | None) -> LinearMap:
        def moved(dots: Some, arrays: Some, moves: Some, wanted: Flags) -> Some:
            if along is not None:
                return _moved_with_input(along, dots, arrays, moves, wanted)
            found = differentiated(in_full_precision(plain), dots, arrays, moves, wanted)
            if own.undefined is None:
                return found
            # A factor, which the transpose keeps, as a selection would not.
            wrong = own.undefined(*arrays)
            return tuple(None if t is None else t * _nan_or_one(spread(wrong, t), t) for t in found)

        return LinearMap(_with_warning(plain, axes, message, rule, compile_step), moved, compile_step is _compiled)

    forth, back = (None, None) if own.second is None else _second_derivatives(rule, own.second, compile_step)
    outputs, inputs = output_axes(rule, layout), own_axes(rule, layout)
    return direction(push, outputs, NAN_TANGENT, forth).transposed_by(direction(pull, inputs, NAN, back))


# --- second derivatives in closed form ------------------------------------------------------------------------------


def _second_derivatives(
    rule: Rule, second: Callable[..., Array], compile_step: Callable[[Any], Any]
) -> tuple[LinearMap, LinearMap]:
    """How the JVP and the VJP, in JAX's convention, change along a direction of the input.

    ``S(a, t) = D²f(X)[a, t]`` is symmetric in a, t and the cotangent of its value. With the pairing of JAX, which does
    not conjugate, three maps of a are therefore all that there is, with t among their arrays: ``S(a, t)``, its
    transpose ``conj S(conj a, t)``, and ``conj S(a, conj t)``, which is its own transpose. As t moves, each becomes one
    of them, with a and t exchanged.
    """

    def make(plain: Callable[[Array, Array, Some], Array], exchanged: str) -> LinearMap:
        def apply(dots: Some, arrays: Some, wanted: Flags) -> Some:  # noqa: ARG001
            t, *frame, _ = arrays
            return (plain(dots[0], t, frame),)  # type: ignore[arg-type]

        def moved(dots: Some, arrays: Some, moves: Some, wanted: Flags) -> Some:
            if moves[-1] is not None:
                raise NotImplementedError(
                    f"A third derivative of {rule.name} was asked for. Its first two are in closed form."
                )
            return _exchanged(maps[exchanged], dots, arrays, moves, wanted)

        return LinearMap(_with_warning(apply, (2,), NAN, rule, compile_step), moved, compile_step is _compiled)

    conj = jnp.conj
    maps = {
        "forth": make(lambda a, t, frame: second(a, t, *frame), "forth"),
        "transposed": make(lambda a, t, frame: conj(second(conj(a), t, *frame)), "back"),
        "back": make(lambda a, t, frame: conj(second(a, conj(t), *frame)), "transposed"),
    }
    maps["back"].transposed_by(maps["back"])
    return maps["forth"].transposed_by(maps["transposed"]), maps["back"]


def _exchanged(of: LinearMap, dots: Some, arrays: Some, moves: Some, wanted: Flags) -> Some:
    """Apply a map to the move of the first array, with what it was linear in in that place."""
    shapes = (shape_of(arrays[0]),)
    return linear(of, moves[:1], (*dots, *arrays[1:]), shapes, shapes, wanted)


def _moved_with_input(along: LinearMap, dots: Some, arrays: Some, moves: Some, wanted: Flags) -> Some:
    """The change of a self-adjoint map with its input, the last array; what else was saved is only a frame."""
    shapes = (shape_of(arrays[-1]),)
    (found,) = linear(along, moves[-1:], (*dots[:1], *arrays), shapes, shapes, (True,))
    return (found, *(None,) * (len(wanted) - 1))


# --- values that are NaN --------------------------------------------------------------------------------------------


def _with_warning(
    plain: Plain, axes: Axes, message: str, rule: Rule, compile_step: Callable[[Any], Any]
) -> Callable[[Some, Some, Flags], Some]:
    """A map that warns where a result is NaN, and is compiled for each set of results that are wanted."""
    flagged = cache(lambda wanted: compile_step(in_full_precision(partial(_flagged, plain, axes, wanted))))

    def apply(dots: Some, arrays: Some, wanted: Flags) -> Some:
        found, flag, items = flagged(wanted)(dots, arrays)
        if flag is not None:
            _warn(message, rule.name, flag, items)
        return found  # type: ignore[no-any-return]

    return apply


def _nan_or_one(flags: Array, like: Array) -> Array:
    return jnp.where(flags, jnp.nan, 1.0).astype(like.real.dtype)


def _flagged(
    plain: Plain, axes: Axes, wanted: Flags, dots: Some, arrays: Some
) -> tuple[Some, Array | None, Array | None]:
    """The results of a map, whether any is NaN, and which items of the batch are; `axes` are those of one item."""
    found = plain(dots, arrays, wanted)
    flags = {i: failed(jax.lax.stop_gradient(y), axes[i]) for i, y in enumerate(found[: len(axes)]) if y is not None}
    if not flags:
        return found, None, None
    i = widest(found, axes)
    items = failed_items(flags[i], axes[i]) if i in flags else None
    return found, reduce(jnp.logical_or, map(jnp.any, flags.values())), items


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit`` of a function, or the function itself if it reads values, as with ``check_finite=True``."""
    jitted = jax.jit(function, inline=True)

    def call(*arrays: Any) -> Any:
        try:
            return jitted(*arrays)
        except (jax.errors.JAXTypeError, TracedError):  # it asked a tracer for its value
            return function(*arrays)

    return call


def _traced(arrays: tuple[Array | None, ...]) -> bool:
    return any(isinstance(array, jax.core.Tracer) for array in arrays)


def _warn(message: str, name: str, flag: Array, items: Array | None) -> None:
    """Warn if the flag is set: at once if it is on a CPU, else from the stream of its device, without waiting."""
    if isinstance(flag, jax.core.Tracer):
        _in_stream(message, name)(flag, items)
    elif flag.is_fully_addressable and all(device.platform == "cpu" for device in flag.devices()):
        if flag.any():
            _say(message, name, items)
    else:
        jax.jit(_in_stream(message, name))(flag, items)


def _say(message: str, name: str, items: Array | None) -> None:
    warn(message, name, None if items is None else np.asarray(items))


def _say_if(message: str, name: str, flag: Any, items: Array | None) -> None:
    if flag:
        _say(message, name, items)


@cache
def _in_stream(message: str, name: str) -> Callable[[Array, Array | None], Array]:
    """A function that warns when it runs; under ``vmap`` it does so once, for the whole batch."""
    if not batching_keeps_effects():

        def report_item(flag: Array, items: Array | None) -> Array:
            jax.debug.callback(partial(_say_if, message, name), flag, items)
            return flag

        return report_item

    @jax.custom_batching.custom_vmap
    def report(flag: Array, items: Array | None) -> Array:
        jax.lax.cond(flag, lambda i: jax.debug.callback(partial(_say, message, name), i), lambda i: None, items)  # noqa: ARG005
        return flag

    @report.def_vmap
    def _(size: int, batched: tuple[bool, bool], flag: Array, items: Array | None) -> tuple[Array, bool]:  # noqa: ARG001
        return report(jnp.any(flag), items), False

    return report  # type: ignore[no-any-return]
