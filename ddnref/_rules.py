"""The table of rules: what bridges, ``ddnref verify``, benchmarks and documentation need to know of an operation.

An operation is added here once. `sample` draws a problem on which its VJP can be checked: inputs, a loss that has
a gradient (no gauge), and the smallest gap that the loss can tell apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import array_api_compat
import numpy as np

import ddnref._eigh as eigen
import ddnref._matrix_functions as matrix_functions
import ddnref._spectral as spectral
import ddnref._topk as topk
from ddnref._array import Array, Namespace

Convert = Callable[[Any], Array]
Loss = tuple[Callable[..., Array], Callable[..., Any]]


class Sample(NamedTuple):
    """One random problem for a rule."""

    inputs: tuple[Array, ...]
    options: dict[str, Any]
    loss: Loss | None
    gap: float
    condition: float
    """``‖A‖ / gap``: float32 may differ from float64 by 20·eps times this."""


class Rule(NamedTuple):
    """One differentiable operation."""

    name: str
    function: Callable[..., Any]
    forward: Callable[..., Any]
    """Returns ``(outputs, saved)``, each an array or a tuple of arrays."""
    vjp: Callable[..., Any]
    saved_vjp: Callable[..., Any]
    """Cotangents of the saved arrays to those of the inputs, called as ``saved_vjp(*saved_bars, *saved)``; second
    derivatives pass through it."""
    undefined: Callable[..., Array]
    """``undefined(*outputs, *saved, rtol=...)``: items at which a second derivative through the VJP is wrong."""
    sample: Callable[[Convert, np.random.Generator, tuple[int, ...], int, bool], Sample]
    """``sample(convert, rng, batch, m, is_complex)``."""
    kind: str
    """``"closed form"``, ``"linear"``, ``"iterative"`` or ``"forward-only"``."""
    tangent: str
    symmetrises: bool
    products: Callable[[int, int], float]
    """Cost of the VJP of one item in products of m×m matrices (2 m³ flops real), for k columns."""
    outputs: int
    """How many arrays the operation returns."""
    docs: str
    """One line for the capability table."""
    singular: str
    """Where the derivative does not exist, and what is raised there, for the capability table."""


def options_of(rule: Rule, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword options between the forward and the VJP; both run with ``throw=False``, as bridges do."""
    forward, vjp = _keywords(rule.forward), _keywords(rule.vjp)
    unknown = set(options) - forward - vjp
    if unknown:
        raise TypeError(
            f"{rule.name} has no option {', '.join(sorted(unknown))}; it takes {', '.join(sorted(forward | vjp))}."
        )
    given = {**options, "throw": False}
    return {k: v for k, v in given.items() if k in forward}, {k: v for k, v in given.items() if k in vjp}


@cache
def _keywords(function: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in parameters if p.kind is not p.POSITIONAL_ONLY)


class Bound(NamedTuple):
    """A rule with its options bound, as bridges call it."""

    forward: Callable[..., Any]
    reverse: Callable[..., Array | None]
    """``reverse(bars, arrays)``: from cotangents of outputs and saved arrays, or ``None``, to the input's."""
    undefined: Callable[..., Array]


def bind(rule: Rule, options: dict[str, Any]) -> Bound:
    """Bind options once, or ``TypeError`` naming those that are unknown or missing."""
    forward, vjp = options_of(rule, options)
    required = {
        p.name
        for function in (rule.forward, rule.vjp)
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind is not p.POSITIONAL_ONLY
    }
    if required - set(options):
        missing = ", ".join(f"{name}=..." for name in sorted(required - set(options)))
        raise TypeError(f"Bind the options of {rule.name} once: differentiable(ddnref.{rule.name}, {missing}).")
    rtol = {"rtol": options["rtol"]} if "rtol" in options else {}
    accepting = {"gauge_rtol": float("inf")} if "gauge_rtol" in _keywords(rule.vjp) else {}
    first, second = _bound(rule.vjp, vjp), _bound(rule.vjp, {**vjp, **accepting})
    n, saved_vjp = rule.outputs, rule.saved_vjp

    def reverse(bars: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> Array | None:
        used = any(bar is not None for bar in bars[:n])
        if all(bar is None for bar in bars[n:]):
            return first(*bars[:n], *arrays) if used else None
        # Second order: outputs and saved arrays hold the same eigenvectors, and only the sum is free of gauge.
        x_bar = saved_vjp(*bars[n:], *arrays[n:])
        return x_bar + second(*bars[:n], *arrays) if used else x_bar

    return Bound(_bound(rule.forward, forward), reverse, _bound(rule.undefined, rtol))


def _bound(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A closure, not a ``functools.partial``: torch.compile traces through the one and not the other."""

    def call(*arrays: Array | None) -> Any:
        return function(*arrays, **options)

    return call


def failed(x_bar: Array) -> Array:
    """Which items of a gradient are NaN: with ``throw=False`` all entries of a failed item are."""
    xp = array_api_compat.array_namespace(x_bar)
    return xp.isnan(x_bar[..., :1, :1])


WARNING = (
    "A gradient is NaN for at least one item of the batch: the input is not finite, the loss depends on a choice "
    "inside repeated eigenvalues (see ddnref.gauge_residual), or the function is not differentiable there (a "
    "singular matrix). Call the VJP by hand with throw=True to see which."
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


# --- problems to check a rule on --------------------------------------------------------------------------------


def random_spectrum(rng: np.random.Generator, batch: tuple[int, ...], spectrum: Any, is_complex: bool = False) -> Any:
    """A random Hermitian matrix with the given eigenvalues, its eigenvectors uniformly distributed."""
    w = np.asarray(spectrum, dtype=np.float64)
    shape = (*batch, w.shape[-1], w.shape[-1])
    z = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)
    q, _ = np.linalg.qr(z)
    x = (q * w[..., None, :]) @ np.conj(np.swapaxes(q, -1, -2))
    return (x + np.conj(np.swapaxes(x, -1, -2))) / 2


def eigen_loss(convert: Convert, rng: np.random.Generator, shape: tuple[int, ...], k: int, is_complex: bool) -> Loss:
    """``Σ c_i λ_i + Re Σ (a_iᴴ y_i)(y_iᴴ b_i)``: every first-order loss of simple eigenpairs, free of gauge."""

    def draw() -> Array:
        z = rng.standard_normal((*shape, k))
        return convert(z + 1j * rng.standard_normal(z.shape) if is_complex else z)

    a, b, c = draw(), draw(), convert(rng.standard_normal((*shape[:-1], k)))

    def parts(v: Array) -> tuple[Namespace, Array, Array]:
        xp = array_api_compat.array_namespace(v)
        conj = xp.conj if is_complex else (lambda z: z)
        return xp, xp.sum(conj(a) * v, axis=-2, keepdims=True), xp.sum(conj(v) * b, axis=-2, keepdims=True)

    def value(w: Array, v: Array) -> Array:
        xp, alpha, beta = parts(v)
        product = alpha * beta
        return xp.sum(c * w) + xp.sum(xp.real(product) if is_complex else product)

    def gradient(w: Array, v: Array) -> tuple[Array, Array]:  # noqa: ARG001
        xp, alpha, beta = parts(v)
        return c, a * (xp.conj(beta) if is_complex else beta) + b * alpha

    return value, gradient


def _sample_eigh(
    convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool, k: int = 0
) -> Sample:
    gaps = rng.uniform(0.05, 0.15, (*batch, m))
    w = np.cumsum(gaps, axis=-1) - 0.05 * m
    x = convert(random_spectrum(rng, batch, w, is_complex))
    size = float(np.max(np.abs(w))) if w.size else 1.0
    loss = eigen_loss(convert, rng, (*batch, m), k or m, is_complex)
    return Sample((x,), {"k": k} if k else {}, loss, 0.05, size / 0.05)


def _sample_topk(
    convert: Convert, rng: np.random.Generator, batch: tuple[int, ...], m: int, is_complex: bool
) -> Sample:
    return _sample_eigh(convert, rng, batch, m, is_complex, k=max(1, m // 3))


def _sample_spectral(
    convert: Convert,
    rng: np.random.Generator,
    batch: tuple[int, ...],
    m: int,
    is_complex: bool,
    **options: Any,
) -> Sample:
    """Positive definite, with a triple eigenvalue where there is room: degeneracy is no obstacle here."""
    w = rng.uniform(0.5, 2.0, (*batch, m))
    w[..., 1 : min(3, m - 1)] = w[..., :1]
    return Sample((convert(random_spectrum(rng, batch, w, is_complex)),), options, None, 0.5, 40.0)


def _square(w: Array) -> Array:
    return w * w


def _twice(w: Array) -> Array:
    return 2 * w


# --- the table --------------------------------------------------------------------------------------------------


def _eigh_forward(x: Array, /, *, check_finite: bool = False) -> tuple[tuple[Array, Array], tuple[()]]:
    return eigen.eigh(x, check_finite=check_finite), ()


def _repeated(*arrays: Array, rtol: float | None = None) -> Array:
    """Outputs and saved arrays of every rule so far end with the whole spectrum and its eigenvectors."""
    return eigen.has_repeated(arrays[-2], rtol)


def _saved_eigh_vjp(w_bar: Array | None, v_bar: Array | None, w: Array, v: Array) -> Array:
    return eigen.eigh_vjp(w_bar, v_bar, w, v, gauge_rtol=float("inf"), throw=False)


_CLOSED: dict[str, Any] = {
    "kind": "closed form", "tangent": "symmetric", "symmetrises": True,
    "saved_vjp": _saved_eigh_vjp, "undefined": _repeated,
}  # fmt: skip


def _spectral_rule(name: str, docs: str, singular: str, **options: Any) -> Rule:
    module = spectral if hasattr(spectral, name) else matrix_functions
    return Rule(
        name=name,
        function=getattr(module, name),
        forward=getattr(module, f"{name}_fwd"),
        vjp=getattr(module, f"{name}_vjp"),
        sample=partial(_sample_spectral, **options),
        outputs=1,
        products=lambda m, k: 4.0,  # noqa: ARG005
        docs=docs,
        singular=singular,
        **_CLOSED,
    )


_TABLE = (
    Rule(
        name="eigh",
        function=eigen.eigh,
        forward=_eigh_forward,
        vjp=eigen.eigh_vjp,
        sample=_sample_eigh,
        outputs=2,
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
        sample=_sample_topk,
        outputs=2,
        products=lambda m, k: 3.0 * k / m,
        docs="k largest or smallest eigenpairs",
        singular="as `eigh`; a cluster cut by the k-th eigenvalue: `GaugeError`",
        **_CLOSED,
    ),
    _spectral_rule(
        "spectral_function",
        "any real function of the matrix",
        "where `f` has none: `SingularError`",
        f=_square,
        df=_twice,
    ),
    _spectral_rule("sqrtm", "square root", "singular matrices: `SingularError`"),
    _spectral_rule("invsqrtm", "inverse square root: whitening", "singular matrices: `SingularError`"),
    _spectral_rule("logm", "logarithm", "singular matrices: `SingularError`"),
    _spectral_rule("expm", "exponential", "nowhere; overflow: `SingularError`"),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _TABLE}


def capability_table() -> str:
    """The table of README and documentation, in Markdown: one row for each rule."""
    rows = [
        "| operation | differentiates | cost of the VJP (m×m products) | where it has no derivative |",
        "|---|---|---|---|",
    ]
    for rule in RULES.values():
        whole, half = rule.products(2, 2), rule.products(2, 1)
        cost = f"{whole:.0f}" if half == whole else f"{whole:.0f} k/m"
        rows.append(f"| `{rule.name}`, `{rule.name}_vjp` | {rule.docs} | {cost} | {rule.singular} |")
    return "\n".join(rows) + "\n"
