"""The table of rules: an operation is added here once, and bridges, ``ddnref verify`` and documentation follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import array_api_compat

import ddnref.linalg._eigh as eigen
import ddnref.linalg._functions as spectral
from ddnref._core.arrays import Array
from ddnref._core.loops import IterationInfo
from ddnref._rules.contract import Rule
from ddnref._rules.samples import common as samples
from ddnref._rules.samples import linear as linear_samples
from ddnref._rules.samples import nodes as node_samples
from ddnref.curvature import _gram as gram
from ddnref.curvature import _gram_values as gram_values
from ddnref.krylov._common import SolveInfo
from ddnref.linalg import _eigsh as kpairs
from ddnref.linalg import _eigsh_vjp as kpairs_vjp
from ddnref.linalg import _iterations as iteration
from ddnref.linalg import _linear_solve as linear
from ddnref.linalg import _qr as factorisation
from ddnref.linalg import _solve as dense
from ddnref.nodes import _least_squares as least_squares
from ddnref.nodes import _projections as projections
from ddnref.nodes import _robust_pool as robust
from ddnref.nodes import _sinkhorn as transport


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


def _repeated_in_gram(*arrays: Array, rtol: float | None = None) -> Array:
    return gram_values.has_repeated(arrays[-3], rtol)


def _saved_gram_vjp(w_bar: Array | None, u_bar: Array | None, w_all: Array, u_all: Array, factor: Array) -> Array:
    return factor @ (2 * _saved_eigh_vjp(w_bar, u_bar, w_all, u_all))


def _always(*arrays: Array, rtol: float | None = None) -> Array:  # noqa: ARG001
    xp = array_api_compat.array_namespace(arrays[0])
    return xp.any(xp.isfinite(arrays[0])) | True


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
    return Rule(
        name=name,
        function=getattr(spectral, name),
        forward=getattr(spectral, f"{name}_fwd"),
        vjp=getattr(spectral, f"{name}_vjp"),
        sample=partial(samples.spectral, **options),
        outputs=1,
        cost="4 products",
        products=lambda m, k: 4.0,  # noqa: ARG005
        docs=docs,
        signature="(m,m)->(m,m)->(m)r,(m,m)",
        singular=singular,
        **_CLOSED,
    )


def _iteration_rule(name: str, signature: str, docs: str) -> Rule:
    function = getattr(iteration, name)
    return Rule(
        name=name,
        function=function,
        forward=_nothing_saved_iterative(function),
        vjp=getattr(iteration, f"{name}_vjp"),
        sample=getattr(samples, name),
        outputs=2,
        needs=(0,),
        info=IterationInfo,
        signature=signature,
        docs=docs + "; not only symmetric matrices",
        singular="repeated eigenvalues: `GaugeError`",
        cost="a factorisation per pair",
        is_complex=False,
    )


def _gram_rule(module: Any, name: str, **fields: Any) -> Rule:
    return Rule(
        name=name,
        function=getattr(module, name),
        forward=getattr(module, f"{name}_fwd"),
        vjp=getattr(module, f"{name}_vjp"),
        sample=getattr(samples, name),
        needs=(0,),
        saved_vjp=_saved_gram_vjp,
        undefined=_repeated_in_gram,
        refusal=_MASKED,
        **fields,
    )


def _node_rule(module: Any, name: str, **fields: Any) -> Rule:
    """A declarative node: real arrays, one output, a VJP in closed form."""
    function = getattr(module, name)
    return Rule(
        name=name,
        function=function,
        forward=(_nothing_saved_iterative if "info" in fields else _nothing_saved)(function),
        vjp=getattr(module, f"{name}_vjp"),
        outputs=1,
        is_complex=False,
        **fields,
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
        signature="(m,m)->(m)r,(m,m)",
        docs="all eigenpairs; any subset of them with `index=`",
        singular="losses that tell equal eigenvalues apart, or phases: `GaugeError`",
        **_CLOSED,
    ),
    Rule(
        name="eigh_topk",
        function=eigen.eigh_topk,
        forward=eigen.eigh_topk_fwd,
        vjp=eigen.eigh_topk_vjp,
        sample=samples.eigh_topk,
        outputs=2,
        cost="3 k/m products",
        products=lambda m, k: 3.0 * k / m,
        signature="(m,m)->(k)r,(m,k)->(m)r,(m,m)",
        docs="k largest or smallest eigenpairs",
        singular="as `eigh`; a cluster cut by the k-th eigenvalue: `GaugeError`",
        **_CLOSED,
    ),
    Rule(
        name="eigsh",
        function=kpairs.eigsh,
        forward=kpairs.eigsh_fwd,
        vjp=kpairs_vjp.eigsh_vjp,
        sample=samples.eigsh,
        outputs=2,
        needs=(0,),
        info=kpairs.EigshInfo,
        vjp_info=kpairs_vjp.EigshVjpInfo,
        undefined=_always,
        refusal=(
            "A second derivative through eigsh was asked for. Its gradient comes from an iterative solve, which is not "
            "differentiated again: use ddnref.eigh_topk, whose gradient is a closed form."
        ),
        tangent="symmetric",
        symmetrises=True,
        signature="(m,m)->(k)r,(m,k)->->()b,()i,(k)r,()b,()i->()b,(k)i,(k)r,()b",
        docs="k largest, smallest or largest-in-magnitude eigenpairs, matrix-free",
        singular="as `eigh_topk`",
        cost="k systems by conjugate gradients",
    ),
    _gram_rule(
        gram_values,
        "gram_eigvalsh",
        outputs=1,
        signature="(m,n)->(k)r->(n)r,(n,n)",
        docs="eigenvalues of V Vᵀ for a tall factor V, through VᵀV",
        singular="losses that tell equal eigenvalues apart: `GaugeError`",
        cost="2 D n² + 2 n³ flops",
    ),
    _gram_rule(
        gram,
        "gram_eigh",
        outputs=2,
        signature="(m,n)->(k)r,(m,k)->(n)r,(n,n)",
        docs="k largest eigenpairs of V Vᵀ for a tall factor V",
        singular="as `eigh_topk`; eigenvalue zero: `SingularError`",
        cost="8 D n k flops",
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
    _iteration_rule("power_iteration", "(m,m)->(),(m)->->()b,()i,()r", "the eigenpair of largest magnitude"),
    _iteration_rule(
        "simultaneous_iteration",
        "(m,m)->(n),(m,n)->->()b,()i,()r",
        "the n eigenpairs of largest magnitude",
    ),
    Rule(
        name="qr",
        function=factorisation.qr,
        forward=_nothing_saved(factorisation.qr),
        vjp=factorisation.qr_vjp,
        sample=samples.tall,
        outputs=2,
        signature="(m,n)->(m,n),(n,n)",
        docs="orthonormal and triangular factor of a tall matrix",
        singular="dependent columns: `SingularError`",
        cost="6 m n² flops",
    ),
    _node_rule(
        projections,
        "project_sphere",
        sample=node_samples.sphere,
        needs=(0,),
        signature="(m)->(m)",
        docs="nearest point on the L1, L2 or L∞ sphere",
        singular="points that are not unique (the centre, ties): `SingularError`",
        cost="O(m)",
    ),
    _node_rule(
        projections,
        "project_ball",
        sample=node_samples.sphere,
        needs=(0,),
        signature="(m)->(m)",
        docs="nearest point in the L1, L2 or L∞ ball",
        singular="the sphere itself, where one side's derivative comes back",
        cost="O(m)",
    ),
    _node_rule(
        projections,
        "project_simplex",
        sample=node_samples.simplex,
        signature="(m)->(m)",
        docs="nearest point of the probability simplex",
        singular="changes of the support, where one side's derivative comes back",
        cost="O(m)",
    ),
    _node_rule(
        least_squares,
        "least_squares_on_sphere",
        sample=node_samples.least_squares_on_sphere,
        needs=(0, 1),
        signature="(m,n),(m)->(n)",
        docs="least squares under ‖y‖ = r",
        singular="minima that are not unique: `SingularError`",
        cost="a factorisation",
    ),
    _node_rule(
        least_squares,
        "weighted_least_squares",
        sample=node_samples.weighted_least_squares,
        needs=(0, 1, 2, 3),
        signature="(m,n),(m),(m),()->(p)",
        docs="weighted least squares with ridge and bias",
        singular="dependent columns without a ridge: `SingularError`",
        cost="a factorisation",
    ),
    _node_rule(
        transport,
        "sinkhorn",
        sample=node_samples.sinkhorn,
        info=transport.SinkhornInfo,
        tangent=("dense", "zero-sum", "zero-sum"),
        signature="(n,m),(n),(m)->(n,m)->->()b,()l,()r,()b",
        docs="entropic optimal transport: cost and both marginals",
        singular="a plan in parts that exchange no mass: `SingularError`",
        cost="a factorisation of the smaller side",
    ),
    _node_rule(
        robust,
        "robust_pool",
        sample=node_samples.robust_pool,
        needs=(0,),
        info=robust.RobustPoolInfo,
        signature="(m)->()->->()b,()l,()r",
        docs="robust mean: quadratic, Huber, pseudo-Huber, Welsch, truncated",
        singular="no curvature, all outliers: `SingularError`",
        cost="O(m)",
    ),
    Rule(
        name="solve",
        function=dense.solve,
        forward=dense.solve_fwd,
        vjp=dense.solve_vjp,
        sample=linear_samples.solve,
        outputs=1,
        needs=(1,),
        saved_vjp=dense.saved_solve_vjp,
        item_axes=(2, 1),
        signature="(n,n),(n)->(n)->(n,n),(n)i",
        docs="dense linear systems, many right-hand sides",
        singular="singular matrices: `SingularError`",
        cost="2 n² flops, from the factors of the forward",
    ),
    Rule(
        name="linear_solve",
        function=linear.linear_solve,
        forward=_nothing_saved_iterative(linear.linear_solve),
        vjp=linear.linear_solve_vjp,
        sample=linear_samples.linear_solve,
        outputs=1,
        needs=(0, 1),
        info=SolveInfo,
        vjp_info=SolveInfo,
        recursive=True,
        item_axes=(2, 1),
        signature="(m,n),(m)->(n)->->()b,()i,()r,()i->()b,()i,()r,()i",
        docs="linear systems and least squares with operators, matrix-free: the right-hand side and every parameter",
        singular="singular operators, which no solver converges on: `ConvergenceError`",
        cost="one solve of the adjoint system",
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
