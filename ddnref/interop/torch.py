"""PyTorch: ``differentiable(op)`` makes an operation record our VJP instead of PyTorch's own derivative.

Everything runs on the memory of the tensors, on their device, without a copy. It works with ``backward``, every
transform of ``torch.func`` in every nesting, batched gradients, ``torch.autograd.forward_ad``, and
``torch.compile(fullgraph=True)`` of reverse mode. For second derivatives PyTorch differentiates our VJP or JVP. Those
of functions of a matrix are explicit, and exact at repeated eigenvalues; those of eigenvectors would be wrong there, so
they raise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias

from ddnref.interop._extras import needed_by_bridge

with needed_by_bridge("torch"):
    import torch

from ddnref._kernels.torch import call, is_eager, is_forward, is_transformed_in_graph
from ddnref._kernels.torch_versions import COMPILES, uncompiled
from ddnref._rules.binding import (
    NAN,
    Bound,
    Bridged,
    Layout,
    bind,
    flatten,
    input_counts,
    numbers_as_arrays,
    on_arrays,
    own_axes,
    refuse_foreign,
)
from ddnref._rules.contract import Rule
from ddnref._rules.own import by_count, implicit_function, own_function
from ddnref._rules.table import rule_of
from ddnref.implicit import ImplicitFunction
from ddnref.interop._bridge_cache import cached_by_options
from ddnref.interop._held_options import FUNCTIONS, held_by, holding
from ddnref.interop._torch_batched_grads import are_mapped, map_backward
from ddnref.interop._torch_foreign_kernels import computed_by
from ddnref.interop._torch_forward import in_forward_mode, pushing, refuse_graph
from ddnref.interop._torch_ggn import ModuleGgn, ggn
from ddnref.interop._torch_on_numpy import bound_on_numpy, on_numpy
from ddnref.interop._torch_opaque import opaque
from ddnref.interop._torch_second import first_order, linear_map, moves_saved
from ddnref.interop._torch_vmap import align_batch, align_held, mapped_axis_first, one_by_one
from ddnref.interop._torch_warnings import notify, with_warning
from ddnref.linalg import linear_solve
from ddnref.operators import LinearOperator

__all__ = ["ModuleGgn", "differentiable", "ggn"]

Tensor: TypeAlias = Any  # torch is optional, so that types must not depend on it

THIRD = (
    "A third derivative of {} was asked for. The first two are exact at any degeneracy, and the third is not known: "
    "build the function of the matrix from ddnref.eigh, where the eigenvalues are distinct."
)


def differentiable(operation: Callable[..., Any], *, compute: str | None = None, **options: Any) -> Callable[..., Any]:
    """Turn one of ddnref's operations, or a function of yours, into one that PyTorch differentiates with its VJP.

    Operations, options, functions of yours and missing gradients are those of all bridges, see `ddnref.interop`.

    Parameters
    ----------
    compute : {None, "torch", "cupy", "numpy"}
        The library that computes, on the memory of the tensors, without a copy. By default NumPy for CPU tensors
        outside of transforms, compilers and second derivatives, because its functions cost less to call, and
        PyTorch for all others; ``"torch"`` is PyTorch always. ``"cupy"`` is CuPy for CUDA tensors (on PyTorch's
        current stream) and ``"numpy"`` is NumPy for CPU tensors, through DLPack; these break the graph of
        ``torch.compile``, and they have no second derivatives.

    Raises
    ------
    NotImplementedError
        When a second derivative is taken with ``compute="cupy"`` or ``"numpy"``; for a third derivative
        of a function of a matrix; by ``torch.func.linearize`` of an operation that iterates.

    Notes
    -----
    A second derivative through a repeated eigenvalue raises `GaugeError`, and so does a tangent along a direction that
    splits one, unless ``gauge_rtol=inf`` accepts it. Under ``torch.func.vmap``, which cannot raise for one item, it is
    NaN for that item. Functions of a matrix have second derivatives everywhere; `spectral_function` takes ``d2f=`` for
    them. ``torch.compile`` runs an operation uncompiled inside transforms of ``torch.func`` and in forward mode.

    Examples
    --------
    >>> import torch
    >>> from ddnref.interop.torch import differentiable
    >>> x = torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64)).requires_grad_()
    >>> w, v = differentiable(ddnref.eigh)(x)
    >>> w[1].backward()
    >>> x.grad
    tensor([[0., 0.],
            [0., 1.]], dtype=torch.float64)
    """
    if isinstance(operation, ImplicitFunction):
        if compute is not None:
            raise TypeError(f"compute= is not for {operation.__name__}, whose solver and condition PyTorch calls.")
        return implicit(operation, options)
    if "vjp" in options:
        own = own_function(operation, **options)
        given = options if compute is None else {"compute": compute, **options}
        return Bridged(by_count(own, partial(_own, compute)), own, differentiable, given)
    rule = rule_of(operation)
    if compute is None:
        return _bridge(rule, options)
    if compute == "torch":
        return _bridge(rule, {"compute": compute, **options})
    bound = bind(rule, options, notify=partial(notify, rule.name))
    return Bridged(_elsewhere(compute, rule, bound), rule, differentiable, {"compute": compute, **options})


def implicit(function: ImplicitFunction, options: dict[str, Any], names: tuple[str, ...] = ()) -> Callable[..., Any]:
    """A solver with the condition of its solution, whose linear systems this bridge solves.

    `options` of the solver are bound; those in `names` are its last inputs, without derivative.
    """

    def solve(operator: LinearOperator, b: Tensor, **others: Any) -> Any:
        return differentiable(linear_solve, **others)(operator, b)

    own = implicit_function(function, solve, options, names)
    call = by_count(own, partial(_own, None))
    return Bridged(torch.compiler.disable(call), own, differentiable, options)  # its loops read flags


def _own(compute: str | None, rule: Rule) -> Callable[..., Any]:
    """A user's function; tensors go to it as they are, unless `compute` names another library."""
    bound = bind(rule, {})
    if compute in (None, "torch"):
        return _function(rule, bound)
    return _elsewhere(compute, rule, bound, plain=bound if compute == "numpy" else None)


def _elsewhere(compute: str, rule: Rule, bound: Bound, plain: Bound | None = None) -> Callable[..., Any]:
    """A function that another library computes; with `plain`, on NumPy arrays, where nothing has to look inside."""
    function = _function(*computed_by(compute, rule, bound), plain=plain)
    return torch.compiler.disable(function) if rule.info is None else function  # no graph can hold its kernels


@cached_by_options
def _bridge(rule: Rule, given: dict[str, Any]) -> Callable[..., Any]:
    """The function of a rule; with ``compute="torch"`` among the options nothing leaves the tensors."""
    options = {name: value for name, value in given.items() if name != "compute"}
    on_tensors = {"compute": "torch"} if "compute" in given else {}
    plain_solve = None if rule.solves_by is None else rule.solves_by.function

    def solve(*inputs: Any, **others: Any) -> Any:
        # Nothing records it, and a compiler differentiates no gradient again.
        unrecorded = is_eager() and not (torch.is_grad_enabled() or is_forward())
        if plain_solve is not None and (unrecorded or torch.compiler.is_compiling()):
            others.pop("on_failure", None)  # the derivative that called this judges what has not converged
            return plain_solve(*inputs, **others)
        return _bridge(rule.inner, {**on_tensors, **others})(*inputs)  # type: ignore[arg-type]

    # A VJP that solves its own systems solves them with this bridge, and so it can be differentiated again.
    warned = partial(notify, rule.name)

    def rebind(changed: dict[str, Any]) -> Bound:
        return bind(rule, {**options, **changed}, solve=solve if rule.recursive else None, notify=warned)

    plain = None if on_tensors else bound_on_numpy(rule, options)
    return Bridged(_function(rule, rebind({}), options, rebind, plain), rule, differentiable, given)


def _function(
    rule: Rule,
    bound: Bound,
    options: dict[str, Any] | None = None,
    rebind: Callable[[dict[str, Any]], Bound] | None = None,
    plain: Bound | None = None,
) -> Callable[..., Any]:
    """The function that the user calls: it takes operators apart and puts the results together.

    `rebind` binds other values of those options that hold tensors, which transforms must see. `plain` is the operation
    on NumPy arrays, for plain tensors.
    """
    names, held, extra = held_by(options or {})
    functions = [(name, f) for name in FUNCTIONS if callable(f := (options or {}).get(name)) and name not in names]
    # Where all inputs are arrays, their number says which operation it is. Operators get one for each structure.
    operations = {}
    for count in input_counts(rule):
        layout = Layout((None,) * count, (1,) * count)
        operations[count] = _operation(rule, bound, layout, plain=plain)
    with_operators = lru_cache(maxsize=16)(partial(_operation, rule, bound))
    n, fields = rule.outputs, rule.info_fields

    def function(*inputs: Any) -> Any:
        inputs = numbers_as_arrays(rule.forward, inputs, _like)
        operation, arrays = operations.get(len(inputs)), inputs
        if operation is None or any(isinstance(x, LinearOperator) for x in inputs):
            layout, arrays = flatten(inputs)
            operation = with_operators(layout)
        if not all(isinstance(x, torch.Tensor) for x in arrays):
            refuse_foreign(rule, inputs, lambda x: isinstance(x, torch.Tensor), "a PyTorch tensor")
        eager = is_eager()
        if not eager and (functions or extra):
            for name, f in functions:
                _refuse_mapped(name, f)
            if extra and rebind is not None:
                layout, _ = flatten(inputs)
                operation = _holding_operation(rule, rebind, layout, names, held)
                arrays = (*arrays, *(x.detach() for x in extra))
        if is_forward():
            if rule.info is not None or rule.opaque:
                refuse_graph(rule)
            apply = operation.forms["nested" if moves_saved(tuple(arrays)) else "forward"].apply
        else:
            apply = operation.eager if eager else operation.apply
        flat = call(apply, tuple(arrays), {})
        return bound.result(flat[:n], flat[len(flat) - fields :])

    if rule.info is not None:  # it iterates
        reason = (
            f"{rule.name} iterates until a flag that it reads on the host is clear, which no graph can hold: leave out "
            f"fullgraph=True, and {rule.name} runs between two compiled parts"
        )
        return uncompiled(function, reason)
    if not COMPILES:
        return uncompiled(function, f"ddnref compiles {rule.name} with PyTorch 2.13 or later: leave out fullgraph=True")
    reason = (
        f"torch.compile would drop the derivative of {rule.name} inside a transform of torch.func that it traces: "
        f"leave out fullgraph=True, or compile the loss and transform the compiled function"
    )
    between_graphs = uncompiled(function, reason)

    def guarded(*inputs: Any) -> Any:
        return (between_graphs if is_transformed_in_graph() else function)(*inputs)

    return guarded


def _like(number: float, x: Any) -> Any:
    return torch.tensor(number, dtype=x.dtype, device=x.device) if isinstance(x, torch.Tensor) else number


def _refuse_mapped(name: str, f: Any) -> None:
    """Raise ``TypeError`` for a function whose closure holds a tensor that ``vmap`` maps."""
    for cell in getattr(f, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch.Tensor) and _is_mapped(cell.cell_contents):
            raise TypeError(
                f"{name} is a function that holds a tensor which torch.func.vmap maps, and that cannot be seen from "
                "outside. Pass a LinearOperator with this tensor as a parameter, such as ddnref.operators.diagonal(d)."
            )


def _is_mapped(x: Tensor) -> bool:
    """Whether one of the transforms around a tensor is ``vmap``."""
    internals = torch._C._functorch
    while internals.is_functorch_wrapped_tensor(x):
        if internals.is_batchedtensor(x):
            return True
        x = internals.get_unwrapped(x)
    return False


def _holding_operation(
    rule: Rule, rebind: Callable[[dict[str, Any]], Bound], layout: Layout, names: tuple[str, ...], held: Layout
) -> Any:
    """An operation whose last arrays are those that options hold; these have no gradient."""

    def bind_with(arrays: tuple[Tensor, ...]) -> Bound:
        return rebind(dict(zip(names, held.join(arrays), strict=True)))

    count = sum(held.counts)

    def mapped(arrays: tuple[Tensor, ...], form: str) -> tuple[Tensor, ...]:
        whole, own, lead = align_batch(layout, rule.item_axes, arrays[: len(arrays) - count])
        axes = next((len(part.domain_shape) for part in layout.parts if part is not None), 1)
        aligned, more = align_held(held, arrays[len(arrays) - count :], lead, axes)
        operation = _holding_operation(rule, rebind, whole, names, aligned)
        return operation.forms[form].apply(*own, *more)  # type: ignore[no-any-return]

    return _operation(rule, holding(bind_with, rule, layout, count), layout, count, mapped)


def _operation(
    rule: Rule,
    bound: Bound,
    layout: Layout,
    held: int = 0,
    mapped: Callable[[tuple[Tensor, ...], str], tuple[Tensor, ...]] | None = None,
    plain: Bound | None = None,
) -> Any:
    """An operation as ``autograd.Function`` of the arrays of a layout, and of `held` arrays that options hold.

    Its ``forms`` are this class and those for forward mode. ``eager(*arrays)`` is cheaper outside of ``torch.func``,
    and computes with `plain` where it can. ``mapped(arrays, form)`` runs a form on arrays whose first axis is mapped by
    ``vmap``.
    """
    flat = bound if held else on_arrays(bound, rule, layout)
    reverse = opaque(rule, bound, layout, "reverse") if rule.opaque else flat.reverse
    # Where a second derivative would be wrong it must be refused; an opaque VJP refuses all of them by itself.
    undefined = None if rule.opaque else flat.undefined
    refused = None if undefined is None else first_order(undefined, rule.refusal)
    needs, count = layout.places(rule.needs), sum(layout.counts)
    needs += tuple(range(count, count + held))
    linear = None
    if flat.second is not None:
        # The explicit second derivative belongs to the matrix, which is saved for it.
        linear = linear_map(_of_one(reverse), flat.second, THIRD.format(rule.name))
        needs = (0,)
    axes = own_axes(rule, layout)
    # torch.compile takes closures over these, not over a rule.
    name, fields = rule.name, rule.info_fields

    def pull(arrays: tuple[Tensor, ...], *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = reverse(bars, arrays)
        return with_warning(gradients[:count], axes, NAN, name) if gradients else ()

    def pull_linear(arrays: tuple[Tensor, ...], *bars: Tensor | None) -> tuple[Tensor | None, ...]:
        *arrays, x = arrays  # type: ignore[assignment]
        if bars[0] is None:  # the eigenpairs are constants
            return ()
        if linear is not None and (torch.is_grad_enabled() or is_forward()):
            gradients: tuple[Tensor | None, ...] = (linear(bars[0], x, *arrays),)
        else:
            gradients = reverse(bars[:1], arrays)
        return with_warning(gradients, axes, NAN, name)

    pulled = pull if linear is None else pull_linear

    class Operation(torch.autograd.Function):
        """Outputs, saved arrays and status; saved ones are outputs too, so that second derivatives pass through."""

        generate_vmap_rule = rule.info is None and not rule.opaque

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            ctx.set_materialize_grads(False)
            results = output[: len(output) - fields]
            if fields:
                ctx.mark_non_differentiable(*output[len(results) :])
            ctx.save_for_backward(*results, *(inputs[i] for i in needs))

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            arrays = ctx.saved_tensors
            gradients = call(pulled, (arrays, *bars[: len(bars) - fields]), {}, in_backward=True)
            if not gradients:  # no cotangent was given
                return (None,) * len(ctx.needs_input_grad)
            if refused is not None and linear is None and (torch.is_grad_enabled() or is_forward()):
                gradients = tuple(refused(x_bar, *arrays) for x_bar in gradients)
            return (*gradients, *(None,) * held)

    Operation.forward = staticmethod(_forward(flat, count + held, may_share=rule.is_own))

    # vmap cannot trace loops and other libraries, so they run on the whole batch, whose axis leads, or item by item.
    if mapped is None and (rule.info is not None or rule.opaque):

        def mapped(arrays: tuple[Tensor, ...], form: str) -> tuple[Tensor, ...]:
            if rule.one_by_one:
                return one_by_one(Operation.forms[form].apply, arrays)  # type: ignore[no-any-return]
            whole, arrays, _ = align_batch(layout, rule.item_axes, arrays)
            operation = Operation if whole is layout else _operation(rule, bound, whole)
            return operation.forms[form].apply(*arrays)  # type: ignore[no-any-return]

    push = pushing(rule, bound, layout, flat, refused, linear)
    forms = {"plain": Operation}
    for form in ("forward", "nested"):
        forms[form] = in_forward_mode(
            Operation, push, needs, fields, flat.push_saved if form == "nested" and linear is None else None
        )
    if mapped is not None:
        for form, operation in forms.items():
            operation.vmap = staticmethod(_vmap(mapped, form))
    eager = _eager(Operation)
    Operation.eager = staticmethod(eager.apply)
    if plain is not None:
        unused = 0 if linear is None else 1  # the matrix that only the second derivative needs
        Operation.eager = staticmethod(on_numpy(eager, Operation.setup_context, rule, plain, layout, unused))
    Operation.forms = forms
    return Operation


def _of_one(reverse: Callable[..., Any]) -> Callable[..., Tensor]:
    """The VJP of an operation of one input and one output, as a function that returns an array."""
    return lambda y_bar, *arrays: reverse((y_bar,), arrays)[0]


def _vmap(mapped: Callable[..., tuple[Tensor, ...]], form: str) -> Callable[..., Any]:
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Tensor) -> tuple[tuple[Tensor, ...], int]:
        return mapped(mapped_axis_first(info.batch_size, in_dims, inputs), form), 0

    return vmap


def _forward(flat: Bound, count: int, may_share: bool) -> Callable[..., Any]:
    """A function of `count` inputs that returns outputs, saved arrays and status in one tuple.

    Functions of a user may return an input, or one tensor twice, which PyTorch could not tell apart: `may_share`.
    """
    run = flat.forward

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs, saved, info = run(*inputs)
        results = (*outputs, *saved, *info)
        return _distinct(results, inputs) if may_share else results

    # torch.compile counts parameters to see whether the first one is a context.
    parameters = [inspect.Parameter(f"input_{i}", inspect.Parameter.POSITIONAL_ONLY) for i in range(count)]
    forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return forward


def _distinct(results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The results, with copies of those that are an input or an earlier result."""
    earlier, found = list(inputs), []
    for x in results:
        own = x.clone() if any(x is other for other in earlier) else x
        earlier.append(own)
        found.append(own)
    return tuple(found)


def _eager(operation: Any) -> Any:
    """A cheaper form of an operation outside ``torch.func``, where PyTorch does not bind a signature at every call."""
    forward, setup_context = operation.forward, operation.setup_context

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, *bars: Tensor | None) -> Any:
            if are_mapped(bars):
                return map_backward(partial(operation.backward, ctx), bars)
            return operation.backward(ctx, *bars)

    return Eager
