"""The table of rules: an operation is added here once, and bridges, ``ddnref verify`` and documentation follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

from ddnref import curvature, krylov, linalg, nodes
from ddnref._core.arrays import Array, namespace_of
from ddnref._rules.contract import Rule
from ddnref._rules.samples import Trial, eigen, linear
from ddnref._rules.samples import nodes as node_samples
from ddnref._rules.texts import Texts
from ddnref.curvature._gram import has_repeated as has_repeated_in_gram
from ddnref.linalg._eigh import has_repeated
from ddnref.linalg._solve import saved_solve_vjp


class Operation(NamedTuple):
    """One entry of the table."""

    rule: Rule  # for bridges
    trial: Trial  # for tests, `ddnref verify` and benchmarks
    texts: Texts  # for pages


def rule_of(function: Callable[..., Any]) -> Rule:
    """The rule of a public operation, or ``TypeError`` naming those that exist."""
    for rule in RULES.values():
        if function is rule.function:
            return rule
    name = getattr(function, "__name__", repr(function))
    raise TypeError(f"{name} has no rule; pass one of ddnref's operations: {', '.join(RULES)}.")


def _rule(module: Any, name: str, signature: str, **fields: Any) -> Rule:
    """The rule of ``module.name`` and ``name_vjp``; its forward is ``name_fwd`` where the operation saves arrays."""
    function = getattr(module, name)
    forward = getattr(module, f"{name}_fwd", None) or _nothing_saved(function, iterates="info" in fields)
    return Rule(name, function, forward, getattr(module, f"{name}_vjp"), signature, **fields)


def _nothing_saved(function: Callable[..., Any], iterates: bool) -> Callable[..., Any]:
    """The forward of an operation whose derivative needs nothing but inputs and outputs."""

    @wraps(function)
    def forward(*inputs: Array, **options: Any) -> Any:
        # Either ``outputs, info`` or the outputs alone.
        result = function(*inputs, **options)
        return ((result[0], ()), result[1]) if iterates else (result, ())

    return forward


# --- second derivatives -------------------------------------------------------------------------------------------


def _repeated(*arrays: Array, rtol: float | None = None) -> Array:
    """Items with repeated eigenvalues; the last saved arrays are the whole spectrum and its eigenvectors."""
    return has_repeated(arrays[-2], rtol)


def _repeated_in_gram(*arrays: Array, rtol: float | None = None) -> Array:
    """Items with repeated singular values; the factor, which the VJP needs, follows the saved arrays."""
    return has_repeated_in_gram(arrays[-3], rtol)


def _always(*arrays: Array, rtol: float | None = None) -> Array:  # noqa: ARG001
    # A flag computed from the arrays, and so on their device and traced with them.
    xp = namespace_of(arrays[0])
    return xp.any(xp.isfinite(arrays[0])) | True


def _saved_eigh_vjp(w_bar: Array | None, v_bar: Array | None, w: Array, v: Array) -> Array:
    # The gauge of one part alone is not checked: only the sum over all parts is independent of it.
    return linalg.eigh_vjp(w_bar, v_bar, w, v, gauge_rtol=float("inf"), throw=False)


def _saved_gram_vjp(w_bar: Array | None, u_bar: Array | None, w_all: Array, u_all: Array, factor: Array) -> Array:
    # The saved arrays are the eigenpairs of VᵀV, whose differential is dVᵀV + VᵀdV.
    return factor @ (2 * _saved_eigh_vjp(w_bar, u_bar, w_all, u_all))


_MASKED = (
    "A second derivative through repeated eigenvalues was asked for. It would be wrong (11 % in a measured case), "
    "because the masked entries depend on the matrix as well. Use ddnref.spectral_function for first derivatives of "
    "functions of the matrix, or separate the eigenvalues, for example by a small ridge with distinct entries."
)
_ITERATIVE = (
    "A second derivative through eigsh was asked for. Its gradient comes from an iterative solve, which is not "
    "differentiated again: use ddnref.eigh_topk, whose gradient is a closed form."
)

# Fields that entries share: closed forms of an eigendecomposition, in rule and trial, and those of VᵀV for a tall V.
_EIGEN: dict[str, Any] = {"saved_vjp": _saved_eigh_vjp, "undefined": _repeated, "refusal": _MASKED}
_SYMMETRIC: dict[str, Any] = {"tangent": "symmetric", "symmetrises": True}
_GRAM = {**_EIGEN, "needs": (0,), "saved_vjp": _saved_gram_vjp, "undefined": _repeated_in_gram}


# --- the table ----------------------------------------------------------------------------------------------------


def _spectral(name: str, docs: str, singular: str, **options: Any) -> Operation:
    """A function of a symmetric matrix."""
    return Operation(
        _rule(linalg, name, "(m,m)->(m,m)->(m)r,(m,m)", **_EIGEN),
        Trial(partial(eigen.spectral, **options), products=lambda m, k: 4.0, **_SYMMETRIC),  # noqa: ARG005
        Texts(docs, singular, "4 products"),
    )


def _iteration(name: str, signature: str, docs: str) -> Operation:
    """An iteration to eigenpairs, differentiated at its limit."""
    return Operation(
        _rule(linalg, name, signature, outputs=2, needs=(0,), info=linalg.IterationInfo),
        Trial(getattr(eigen, name), is_complex=False),
        Texts(f"{docs}; not only symmetric matrices", "repeated eigenvalues: `GaugeError`", "a factorisation per pair"),
    )


# fmt: off
_TABLE = (
    # Eigenvalues and eigenvectors.
    Operation(
        _rule(linalg, "eigh", "(m,m)->(m)r,(m,m)", outputs=2, **_EIGEN),
        Trial(eigen.eigh, products=lambda m, k: 3.0, **_SYMMETRIC),  # noqa: ARG005
        Texts("all eigenpairs; any subset of them with `index=`",
              "losses that depend on a choice among equal eigenvalues, or on phases: `GaugeError`", "3 products"),
    ),
    Operation(
        _rule(linalg, "eigh_topk", "(m,m)->(k)r,(m,k)->(m)r,(m,m)", outputs=2, **_EIGEN),
        Trial(eigen.eigh_topk, products=lambda m, k: 3.0 * k / m, **_SYMMETRIC),
        Texts("k largest or smallest eigenpairs", "as `eigh`; a cluster cut by the k-th eigenvalue: `GaugeError`",
              "3 k/m products"),
    ),
    Operation(
        _rule(linalg, "eigsh", "(m,m)->(k)r,(m,k)->->()b,()i,(k)r,()b,()i->()b,(k)i,(k)r,()b", outputs=2, needs=(0,),
              info=linalg.EigshInfo, vjp_info=linalg.EigshVjpInfo, undefined=_always, refusal=_ITERATIVE),
        Trial(eigen.eigsh, **_SYMMETRIC),
        Texts("k largest, smallest or largest-in-magnitude eigenpairs, matrix-free", "as `eigh_topk`",
              "k systems by conjugate gradients"),
    ),
    Operation(
        _rule(curvature, "gram_eigvalsh", "(m,n)->(k)r->(n)r,(n,n)", **_GRAM),
        Trial(eigen.gram_eigvalsh),
        Texts("eigenvalues of V Vᵀ for a tall factor V, through VᵀV",
              "losses that depend on a choice among equal eigenvalues: `GaugeError`", "2 D n² + 2 n³ flops"),
    ),
    Operation(
        _rule(curvature, "gram_eigh", "(m,n)->(k)r,(m,k)->(n)r,(n,n)", outputs=2, **_GRAM),
        Trial(eigen.gram_eigh),
        Texts("k largest eigenpairs of V Vᵀ for a tall factor V", "as `eigh_topk`; eigenvalue zero: `SingularError`",
              "8 D n k flops"),
    ),
    # Functions of a symmetric matrix; the first needs an example.
    _spectral("spectral_function", "any real function of the matrix", "where `f` has none: `SingularError`",
              f=eigen.square, df=eigen.twice),
    _spectral("sqrtm", "square root", "singular matrices: `SingularError`"),
    _spectral("invsqrtm", "inverse square root: whitening", "singular matrices: `SingularError`"),
    _spectral("logm", "logarithm", "singular matrices: `SingularError`"),
    _spectral("expm", "exponential", "nowhere; overflow: `SingularError`"),
    # Iterations.
    _iteration("power_iteration", "(m,m)->(),(m)->->()b,()i,()r", "the eigenpair of largest magnitude"),
    _iteration("simultaneous_iteration", "(m,m)->(n),(m,n)->->()b,()i,()r", "the n eigenpairs of largest magnitude"),
    Operation(
        _rule(linalg, "qr", "(m,n)->(m,n),(n,n)", outputs=2),
        Trial(eigen.tall),
        Texts("orthonormal and triangular factor of a tall matrix", "dependent columns: `SingularError`",
              "6 m n² flops"),
    ),
    # Declarative nodes.
    Operation(
        _rule(nodes, "project_sphere", "(m)->(m)", needs=(0,)),
        Trial(node_samples.sphere, is_complex=False),
        Texts("nearest point on the L1, L2 or L∞ sphere",
              "points that are not unique (the centre, ties): `SingularError`", "O(m)"),
    ),
    Operation(
        _rule(nodes, "project_ball", "(m)->(m)", needs=(0,)),
        Trial(node_samples.sphere, is_complex=False),
        Texts("nearest point in the L1, L2 or L∞ ball", "the sphere itself, where a one-sided derivative is returned",
              "O(m)"),
    ),
    Operation(
        _rule(nodes, "project_simplex", "(m)->(m)"),
        Trial(node_samples.simplex, is_complex=False),
        Texts("nearest point of the probability simplex",
              "changes of the support, where a one-sided derivative is returned", "O(m)"),
    ),
    Operation(
        _rule(nodes, "least_squares_on_sphere", "(m,n),(m)->(n)", needs=(0, 1)),
        Trial(node_samples.least_squares_on_sphere, is_complex=False),
        Texts("least squares under ‖y‖ = r", "minima that are not unique: `SingularError`", "a factorisation"),
    ),
    Operation(
        _rule(nodes, "weighted_least_squares", "(m,n),(m),(m),()->(p)", needs=(0, 1, 2, 3)),
        Trial(node_samples.weighted_least_squares, is_complex=False),
        Texts("weighted least squares with ridge and bias", "dependent columns without a ridge: `SingularError`",
              "a factorisation"),
    ),
    Operation(
        _rule(nodes, "sinkhorn", "(n,m),(n),(m)->(n,m)->->()b,()l,()r,()b", info=nodes.SinkhornInfo),
        Trial(node_samples.sinkhorn, tangent=("dense", "zero-sum", "zero-sum"), is_complex=False),
        Texts("entropic optimal transport: cost and both marginals",
              "a plan in parts that exchange no mass: `SingularError`", "a factorisation of the smaller side"),
    ),
    Operation(
        _rule(nodes, "robust_pool", "(m)->()->->()b,()l,()r", needs=(0,), info=nodes.RobustPoolInfo),
        Trial(node_samples.robust_pool, is_complex=False),
        Texts("robust mean: quadratic, Huber, pseudo-Huber, Welsch, truncated",
              "no curvature, all outliers: `SingularError`", "O(m)"),
    ),
    # Linear systems.
    Operation(
        _rule(linalg, "solve", "(n,n),(n)->(n)->(n,n),(n)i", needs=(1,), saved_vjp=saved_solve_vjp, item_axes=(2, 1)),
        Trial(linear.solve),
        Texts("dense linear systems, many right-hand sides", "singular matrices: `SingularError`",
              "2 n² flops, from the factors of the forward"),
    ),
    Operation(
        _rule(linalg, "linear_solve", "(m,n),(m)->(n)->->()b,()i,()r,()i->()b,()i,()r,()i", needs=(0, 1),
              info=krylov.SolveInfo, vjp_info=krylov.SolveInfo, recursive=True, item_axes=(2, 1)),
        Trial(linear.linear_solve),
        Texts("linear systems and least squares with operators, matrix-free: the right-hand side and every parameter",
              "singular operators, which no solver converges on: `ConvergenceError`",
              "one solve of the adjoint system"),
    ),
)
# fmt: on

OPERATIONS: dict[str, Operation] = {operation.rule.name: operation for operation in _TABLE}
RULES: dict[str, Rule] = {name: operation.rule for name, operation in OPERATIONS.items()}
TRIALS: dict[str, Trial] = {name: operation.trial for name, operation in OPERATIONS.items()}
TEXTS: dict[str, Texts] = {name: operation.texts for name, operation in OPERATIONS.items()}
