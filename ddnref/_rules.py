"""The table of rules: what bridges, ``ddnref verify``, benchmarks and documentation need to know of an operation.

An operation is added here once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

import ddnref._eigh as eigen
import ddnref._matrix_functions as matrix_functions
import ddnref._spectral as spectral
import ddnref._topk as topk
from ddnref import _iteration as iteration
from ddnref import _iteration_vjp as iteration_vjp
from ddnref import _qr as factorisation
from ddnref import _samples as samples
from ddnref._array import Array, nan_where
from ddnref._loops import Info
from ddnref._samples import Convert, Sample


class Rule(NamedTuple):
    """One differentiable operation.

    An iterative one returns ``(result, info)`` where a closed form returns its result: outputs from `function`,
    ``(outputs, saved)`` from `forward`, cotangents from `vjp`.
    """

    name: str
    function: Callable[..., Any]
    forward: Callable[..., Any]
    """Returns ``(outputs, saved)``, each an array or a tuple of arrays."""
    vjp: Callable[..., Any]
    """Takes cotangents, outputs, saved arrays and the inputs that `needs` names; one cotangent per input."""
    sample: Callable[[Convert, np.random.Generator, tuple[int, ...], int, bool], Sample]
    """``sample(convert, rng, batch, m, is_complex)``."""
    outputs: int
    """How many arrays the operation returns."""
    docs: str
    """One line for the capability table."""
    singular: str
    """Where the derivative does not exist, and what is raised there, for the capability table."""
    cost: str
    """Of the VJP, for the capability table."""
    products: Callable[[int, int], float] | None = None
    """Where that is products of m×m matrices (2 m³ flops real): their number for one item and k columns."""
    needs: tuple[int, ...] = ()
    """Positions of the inputs that the VJP takes last."""
    info: type[Any] | None = None
    """The NamedTuple of arrays by which an iterative forward says how it ended."""
    vjp_info: bool = False
    """Whether the VJP iterates too."""
    saved_vjp: Callable[..., Any] | None = None
    """Cotangents of the saved arrays to those of the inputs, called as ``saved_vjp(*saved_bars, *saved)``; second
    derivatives pass through it."""
    undefined: Callable[..., Array] | None = None
    """``undefined(*outputs, *saved, *needed, rtol=...)``: items at which a second derivative through the VJP is
    wrong; ``None`` where it is right."""
    refusal: str = ""
    """What to say where a second derivative is refused."""
    is_complex: bool = True
    """Whether complex input is taken."""
    tangent: str = "dense"
    symmetrises: bool = False


def options_of(rule: Rule, options: dict[str, Any], while_loop: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options between the forward and the VJP; both run with ``throw=False``, as bridges do.

    `while_loop` is handed to those that iterate, unless the options name one.
    """
    forward, vjp = _keywords(rule.forward), _keywords(rule.vjp)
    unknown = set(options) - forward - vjp
    if unknown:
        raise TypeError(
            f"{rule.name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(sorted(forward | vjp))}."
        )
    given = {"while_loop": while_loop, **options, "throw": False}
    return {k: v for k, v in given.items() if k in forward}, {k: v for k, v in given.items() if k in vjp}


@cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


def plain_forward(rule: Rule) -> Callable[..., tuple[tuple[Array, ...], tuple[Array, ...]]]:
    """The forward as ``(outputs, saved)``, two tuples, without the status of an iteration."""
    function, iterates = rule.forward, rule.info is not None

    @wraps(function)
    def forward(*inputs: Array, **options: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        result = function(*inputs, **options)
        outputs, saved = result[0] if iterates else result
        return as_tuple(outputs), saved

    return forward


def plain_vjp(rule: Rule) -> Callable[..., tuple[Array, ...]]:
    """The VJP as a tuple of cotangents, without the status of an iteration."""
    function, iterates = rule.vjp, rule.vjp_info  # torch.compile takes closures over these, not over a rule

    @wraps(function)
    def vjp(*arrays: Array | None, **options: Any) -> tuple[Array, ...]:
        result = function(*arrays, **options)
        return as_tuple(result[0] if iterates else result)

    return vjp


class Bound(NamedTuple):
    """A rule with its options bound, as bridges call it."""

    forward: Callable[..., tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]]
    """Outputs, saved arrays, and the fields of ``rule.info``; outputs that have not converged are NaN."""
    reverse: Callable[..., tuple[Array | None, ...]]
    """``reverse(bars, arrays)``: from cotangents of outputs and saved arrays, or ``None``, to those of the inputs;
    `arrays` are outputs, saved arrays and the inputs that the rule needs."""
    undefined: Callable[..., Array] | None
    result: Callable[..., Any]
    """``result(outputs, info)``: what the operation returns, put together again."""


def bind(rule: Rule, options: dict[str, Any], while_loop: Any = None) -> Bound:
    """Bind options once, or ``TypeError`` naming those that are unknown or missing."""
    _refuse_missing(rule, options)
    forward_options, vjp_options = options_of(rule, options, while_loop)
    rtol = {"rtol": options["rtol"]} if "rtol" in options else {}
    function, undefined, iterates = rule.forward, rule.undefined, rule.info is not None

    def forward(*inputs: Array) -> tuple[tuple[Array, ...], tuple[Array, ...], tuple[Array, ...]]:
        result = function(*inputs, **forward_options)
        if not iterates:
            return as_tuple(result[0]), result[1], ()
        (outputs, saved), info = result
        outputs = tuple(nan_where(~spread(info.converged, y), y) for y in as_tuple(outputs))
        return outputs, saved, tuple(info)

    def result(outputs: tuple[Array, ...], info: tuple[Array, ...]) -> Any:
        value = outputs[0] if rule.outputs == 1 else outputs
        return value if rule.info is None else (value, rule.info(*info))

    return Bound(
        forward,
        _reverse(rule, vjp_options),
        None if undefined is None else lambda *arrays: undefined(*arrays, **rtol),
        result,
    )


def _refuse_missing(rule: Rule, options: dict[str, Any]) -> None:
    required = {
        p.name
        for function in (rule.forward, rule.vjp)
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL)
    }
    if required - set(options):
        missing = ", ".join(f"{name}=..." for name in sorted(required - set(options)))
        raise TypeError(f"Bind the options of {rule.name} once: differentiable(ddnref.{rule.name}, {missing}).")


def _reverse(rule: Rule, options: dict[str, Any]) -> Callable[..., tuple[Array | None, ...]]:
    vjp, n, saved_vjp = plain_vjp(rule), rule.outputs, rule.saved_vjp
    accepting = {**options, "gauge_rtol": float("inf")} if "gauge_rtol" in _keywords(rule.vjp) else options

    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array | None, ...]:
        used = any(bar is not None for bar in bars[:n])
        if saved_vjp is None or all(bar is None for bar in bars[n:]):
            return vjp(*bars[:n], *arrays, **options) if used else ()
        # Second order: outputs and saved arrays hold the same eigenvectors, and only the sum is free of gauge.
        through_saved = as_tuple(saved_vjp(*bars[n:], *arrays[n : len(bars)]))
        if not used:
            return through_saved
        through_outputs = vjp(*bars[:n], *arrays, **accepting)
        return tuple(a + b for a, b in zip(through_saved, through_outputs, strict=True))

    return reverse


def spread(flags: Array, like: Array) -> Array:
    """One flag per item, shaped to broadcast against an array of these items; for one without them, any flag."""
    xp = array_api_compat.array_namespace(flags)
    if flags.ndim > like.ndim:
        return xp.any(flags)
    return xp.reshape(flags, (*flags.shape, *(1,) * (like.ndim - flags.ndim)))


def failed(x_bar: Array) -> Array:
    """Where a gradient is NaN, seen in one column: with ``throw=False`` all entries of a failed item are."""
    xp = array_api_compat.array_namespace(x_bar)
    return xp.isnan(x_bar[..., :1] if x_bar.ndim else x_bar)


WARNING = (
    "A gradient is NaN for at least one item of the batch: the input is not finite, the loss depends on a choice "
    "inside repeated eigenvalues (see ddnref.gauge_residual), the function is not differentiable there (a singular "
    "matrix, a change of activity), or an iteration has not converged (see info). Call the operation and its VJP by "
    "hand with throw=True to see which."
)


def as_tuple(value: Any) -> tuple[Any, ...]:
    """A tuple as it is, anything else as a tuple of one."""
    return value if isinstance(value, tuple) else (value,)


def rule_of(function: Callable[..., Any]) -> Rule:
    """The rule of a public operation, or ``TypeError`` naming those that exist."""
    for rule in RULES.values():
        if function is rule.function:
            return rule
    name = getattr(function, "__name__", repr(function))
    raise TypeError(f"{name} has no rule; pass one of ddnref's operations: {', '.join(RULES)}.")


# --- the table --------------------------------------------------------------------------------------------------


def _repeated(*arrays: Array, rtol: float | None = None) -> Array:
    """Outputs and saved arrays of every rule so far end with the whole spectrum and its eigenvectors."""
    return eigen.has_repeated(arrays[-2], rtol)


def _saved_eigh_vjp(w_bar: Array | None, v_bar: Array | None, w: Array, v: Array) -> Array:
    return eigen.eigh_vjp(w_bar, v_bar, w, v, gauge_rtol=float("inf"), throw=False)


_MASKED = (
    "A second derivative through repeated eigenvalues was asked for. It would be wrong (11 % in a measured case), "
    "because the masked entries depend on the matrix as well. Use ddnref.spectral_function for first derivatives of "
    "functions of the matrix, or separate the eigenvalues, for example by a small ridge with distinct entries."
)
_CLOSED: dict[str, Any] = {
    "tangent": "symmetric", "symmetrises": True, "saved_vjp": _saved_eigh_vjp, "undefined": _repeated,
    "refusal": _MASKED,
}  # fmt: skip


def _nothing_saved(function: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a closed form that needs nothing but inputs and outputs."""

    @wraps(function)
    def forward(*inputs: Array, **options: Any) -> tuple[Any, tuple[()]]:
        return function(*inputs, **options), ()

    return forward


def _nothing_saved_iterative(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def forward(*inputs: Array, **options: Any) -> tuple[tuple[Any, tuple[()]], Any]:
        outputs, info = function(*inputs, **options)
        return (outputs, ()), info

    return forward


def _spectral_rule(name: str, docs: str, singular: str, **options: Any) -> Rule:
    module = spectral if hasattr(spectral, name) else matrix_functions
    return Rule(
        name=name,
        function=getattr(module, name),
        forward=getattr(module, f"{name}_fwd"),
        vjp=getattr(module, f"{name}_vjp"),
        sample=partial(samples.spectral, **options),
        outputs=1,
        cost="4 products",
        products=lambda m, k: 4.0,  # noqa: ARG005
        docs=docs,
        singular=singular,
        **_CLOSED,
    )


def _iteration_rule(name: str, docs: str) -> Rule:
    function = getattr(iteration, name)
    return Rule(
        name=name,
        function=function,
        forward=_nothing_saved_iterative(function),
        vjp=getattr(iteration_vjp, f"{name}_vjp"),
        sample=getattr(samples, name),
        outputs=2,
        needs=(0,),
        info=Info,
        docs=docs + "; not only symmetric matrices",
        singular="repeated eigenvalues: `GaugeError`",
        cost="a factorisation per pair",
        is_complex=False,
    )


_TABLE = (
    Rule(
        name="eigh",
        function=eigen.eigh,
        forward=_nothing_saved(eigen.eigh),
        vjp=eigen.eigh_vjp,
        sample=samples.eigh,
        outputs=2,
        cost="3 products",
        products=lambda m, k: 3.0,  # noqa: ARG005
        docs="all eigenpairs; any subset of them with `index=`",
        singular="losses that tell equal eigenvalues apart, or phases: `GaugeError`",
        **_CLOSED,
    ),
    Rule(
        name="eigh_topk",
        function=topk.eigh_topk,
        forward=topk.eigh_topk_fwd,
        vjp=topk.eigh_topk_vjp,
        sample=samples.eigh_topk,
        outputs=2,
        cost="3 k/m products",
        products=lambda m, k: 3.0 * k / m,
        docs="k largest or smallest eigenpairs",
        singular="as `eigh`; a cluster cut by the k-th eigenvalue: `GaugeError`",
        **_CLOSED,
    ),
    _spectral_rule(
        "spectral_function",
        "any real function of the matrix",
        "where `f` has none: `SingularError`",
        f=samples.square,
        df=samples.twice,
    ),
    _spectral_rule("sqrtm", "square root", "singular matrices: `SingularError`"),
    _spectral_rule("invsqrtm", "inverse square root: whitening", "singular matrices: `SingularError`"),
    _spectral_rule("logm", "logarithm", "singular matrices: `SingularError`"),
    _spectral_rule("expm", "exponential", "nowhere; overflow: `SingularError`"),
    _iteration_rule("power_iteration", "the eigenpair of largest magnitude"),
    _iteration_rule("simultaneous_iteration", "the n eigenpairs of largest magnitude"),
    Rule(
        name="qr",
        function=factorisation.qr,
        forward=_nothing_saved(factorisation.qr),
        vjp=factorisation.qr_vjp,
        sample=samples.tall,
        outputs=2,
        docs="orthonormal and triangular factor of a tall matrix",
        singular="dependent columns: `SingularError`",
        cost="6 m n² flops",
    ),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _TABLE}


def capability_table() -> str:
    """The table of README and documentation, in Markdown: one row for each rule."""
    rows = [
        "| operation | differentiates | cost of the VJP | where it has no derivative |",
        "|---|---|---|---|",
    ]
    rows += [
        f"| `{rule.name}`, `{rule.name}_vjp` | {rule.docs} | {rule.cost} | {rule.singular} |" for rule in RULES.values()
    ]
    return "\n".join(rows) + "\n"
