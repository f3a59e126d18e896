"""The table of rules: an operation is added here once, and bridges, ``ddnref verify`` and documentation follow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

from ddnref import curvature, krylov, linalg, nodes
from ddnref._core.arrays import Array, adjoint, namespace_of
from ddnref._rules.contract import Rule
from ddnref._rules.samples import Trial, eigen, linear
from ddnref._rules.samples import nodes as node_samples
from ddnref._rules.texts import Texts
from ddnref.curvature._gram import has_repeated as has_repeated_in_gram
from ddnref.linalg._complement import complement_solve, complement_solve_jvp, complement_solve_vjp
from ddnref.linalg._determinants import saved_logdet_jvp, saved_logdet_vjp, saved_slogdet_jvp, saved_slogdet_vjp
from ddnref.linalg._eigh import has_repeated
from ddnref.linalg._eigsh import has_repeated as has_repeated_in_eigsh
from ddnref.linalg._lstsq import saved_lstsq_jvp, saved_lstsq_vjp
from ddnref.linalg._pinv import noise
from ddnref.linalg._polar import is_undetermined, polar_system, polar_system_jvp, polar_system_vjp
from ddnref.linalg._solve import saved_solve_jvp, saved_solve_vjp
from ddnref.linalg._svd import has_repeated as has_repeated_in_svd
from ddnref.linalg._svd import has_repeated_value, saved_svdvals_jvp, saved_svdvals_vjp
from ddnref.linalg._svds import has_repeated as has_repeated_in_svds


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
    raise TypeError(
        f"{name} has no rule; pass vjp= with a function of yours, or one of ddnref's operations: {', '.join(RULES)}."
    )


def _rule(module: Any, name: str, signature: str, **fields: Any) -> Rule:
    """The rule of ``module.name`` and ``name_vjp``; its forward is ``name_fwd`` where the operation saves arrays."""
    function = getattr(module, name)
    forward = getattr(module, f"{name}_fwd", None) or _nothing_saved(function, iterates="info" in fields)
    vjp, jvp = getattr(module, f"{name}_vjp"), getattr(module, f"{name}_jvp")
    second = getattr(module, f"{name}_second_derivative", None)
    return Rule(name, function, forward, vjp, jvp, signature, second=second, **fields)


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


def _repeated_in_svd(*arrays: Array, rtol: float | None = None) -> Array:
    """Items with repeated or zero singular values; the last arrays are all values and their right vectors."""
    return has_repeated_in_svd(arrays[-2], rtol)


def _repeated_in_svdvals(*arrays: Array, rtol: float | None = None) -> Array:
    """Return what `_repeated_in_svd` does, for values of which small ones are exact."""
    return has_repeated_value(arrays[-2], rtol)


def _noise_in_pinv(p: Array, u: Array, s: Array, inverse: Array, vh: Array, x: Array) -> Array:  # noqa: ARG001
    """Items of which singular values that are not rounding count as zero."""
    return namespace_of(s).any(noise(s, inverse, x), axis=-1)


def _noise_in_lstsq(x: Array, p: Array, u: Array, s: Array, inverse: Array, vh: Array, a: Array, b: Array) -> Array:  # noqa: ARG001
    """Items of which singular values that are not rounding count as zero."""
    return namespace_of(s).any(noise(s, inverse, a), axis=-1)


def _everywhere(w: Array, *_: Array) -> Array:
    """Flag every item, given its eigenvalues."""
    first = w[..., 0]
    return (first == first) | (first != first)


def _saved_eigh_vjp(w_bar: Array | None, v_bar: Array | None, w: Array, v: Array) -> Array:
    # The gauge of one part alone is not checked: only the sum over all parts is independent of it.
    return linalg.eigh_vjp(w_bar, v_bar, w, v, gauge_rtol=float("inf"), throw=False)


def _saved_eigh_jvp(x_dot: Array, w: Array, v: Array) -> tuple[Array, Array]:
    return linalg.eigh_jvp(x_dot, w, v, gauge_rtol=float("inf"), throw=False)


def _saved_svd_vjp(
    u_bar: Array | None, s_bar: Array | None, vh_bar: Array | None, u: Array, s: Array, vh: Array
) -> Array:
    return linalg.svd_vjp(u_bar, s_bar, vh_bar, u, s, vh, gauge_rtol=float("inf"), throw=False)


def _saved_svd_jvp(x_dot: Array, u: Array, s: Array, vh: Array) -> tuple[Array, Array, Array]:
    return linalg.svd_jvp(x_dot, u, s, vh, gauge_rtol=float("inf"), throw=False)


def _saved_gram_vjp(w_bar: Array | None, u_bar: Array | None, w_all: Array, u_all: Array, factor: Array) -> Array:
    # The saved arrays are the eigenpairs of VᵀV, whose differential is dVᵀV + VᵀdV.
    return factor @ (2 * _saved_eigh_vjp(w_bar, u_bar, w_all, u_all))


def _saved_gram_jvp(v_dot: Array, w_all: Array, u_all: Array, factor: Array) -> tuple[Array, Array]:
    # Of this product `eigh_jvp` takes the Hermitian part.
    return _saved_eigh_jvp(2 * (adjoint(factor) @ v_dot), w_all, u_all)


_MASKED = (
    "A second derivative through repeated eigenvalues was asked for. It would be wrong (11 % in a measured case), "
    "because the masked entries depend on the matrix as well. Use ddnref.spectral_function with d2f=, or sqrtm, "
    "invsqrtm, logm or expm, whose second derivatives are exact at any degeneracy, or separate the eigenvalues, for "
    "example by a small ridge with distinct entries."
)
_MASKED_OR_CUT = (
    "A second derivative through eigsh was asked for where two of the k eigenvalues, or the k-th and the next one, are "
    "equal. It would be wrong, because what is masked there depends on the matrix as well. Use "
    "ddnref.spectral_function for functions of the matrix, a k that cuts no cluster, or separate the eigenvalues."
)
_MASKED_TRIPLES = (
    "A second derivative through repeated or zero singular values was asked for. It would be wrong, because the masked "
    "entries depend on the matrix as well. Use ddnref.spectral_function of XᴴX for a loss that is a function of it, or "
    "separate the singular values."
)
_UNDETERMINED = (
    "A second derivative of the polar factors was asked for where a singular value, or with rotation=True the sum of "
    "two, is zero to working precision. It does not exist there, because W jumps and H has a kink. Add what gives the "
    "matrix full rank, such as a small multiple of its closest orthonormal matrix."
)
_NOISE = (
    "A second derivative of a pseudo-inverse or of least squares was asked for where rtol= drops singular values that "
    "are not rounding. It is not implemented: leave out rtol, which keeps them, or subtract their part of the matrix."
)
# The systems that the derivatives of polar solve, and then those of eigsh; what bridges say of them is said of these.
_POLAR_SYSTEMS = Rule(
    "polar",
    polar_system,
    _nothing_saved(polar_system, iterates=False),
    polar_system_vjp,
    polar_system_jvp,
    "(k,k),(r,k),(k,k),(k)r,(k,k)->(k,k),(r,k)",
    outputs=2,
    needs=(1, 2, 3, 4),
    recursive=True,
)
_MASKED_IN_PENCIL = (
    "A second derivative through eigh_generalized was asked for at repeated eigenvalues. It would be wrong, because "
    "the masked entries depend on the matrices as well. Separate the eigenvalues, for example by a small ridge with "
    "distinct entries, or write a function of both matrices as one of B^-½ A B^-½ by ddnref.invsqrtm and "
    "ddnref.spectral_function, whose second derivatives are exact at any degeneracy."
)
_ONCE = (
    "A second derivative through eigsh_generalized was asked for, which is not implemented. For matrices use "
    "ddnref.eigh_generalized, whose second derivatives are exact at simple eigenvalues."
)
# The systems that the derivatives of eigsh solve; what bridges say of them is said of eigsh.
_EIGSH_SYSTEMS = Rule(
    "eigsh",
    complement_solve,
    _nothing_saved(complement_solve, iterates=True),
    complement_solve_vjp,
    complement_solve_jvp,
    "(m,k),(k)r,(m,k),()r,(r)r,(m,r),(m,m)->(m,k)->->()b,(k)i,(k)r,()b->()b,(k)i,(k)r,()b",
    needs=(1, 2, 3, 4, 5, 6),
    info=linalg.EigshVjpInfo,
    vjp_info=linalg.EigshVjpInfo,
    recursive=True,
)

# Fields that entries share: closed forms of an eigendecomposition, in rule and trial, and those of VᵀV for a tall V.
_EIGEN: dict[str, Any] = {
    "saved_vjp": _saved_eigh_vjp, "saved_jvp": _saved_eigh_jvp, "undefined": _repeated, "refusal": _MASKED,
}  # fmt: skip
_SYMMETRIC: dict[str, Any] = {"tangent": "symmetric", "symmetrises": True}
_GRAM = {
    **_EIGEN,
    "needs": (0,),
    "saved_vjp": _saved_gram_vjp,
    "saved_jvp": _saved_gram_jvp,
    "undefined": _repeated_in_gram,
}
_SOLVE_INFO = "()b,()i,()r,()i,()r,()r"


# --- the table ----------------------------------------------------------------------------------------------------


def _spectral(name: str, docs: str, singular: str, **options: Any) -> Operation:
    """A function of a symmetric matrix."""
    return Operation(
        _rule(linalg, name, "(m,m)->(m,m)->(m)r,(m,m)", **_EIGEN),
        Trial(partial(eigen.spectral, **options), products=lambda m, k: 4.0, **_SYMMETRIC),  # noqa: ARG005
        Texts(docs, singular, "4 products", "spectral"),
    )


def _iteration(name: str, signature: str, docs: str) -> Operation:
    """An iteration to eigenpairs, differentiated at its limit."""
    return Operation(
        _rule(linalg, name, signature, outputs=2, needs=(0,), info=linalg.IterationInfo),
        Trial(getattr(eigen, name), is_complex=False),
        Texts(
            f"{docs}; not only symmetric matrices",
            "repeated eigenvalues: `GaugeError`",
            "a factorisation per pair",
            "iterations",
        ),
    )


# fmt: off
_TABLE = (
    # Eigenvalues and eigenvectors.
    Operation(
        _rule(linalg, "eigh", "(m,m)->(m)r,(m,m)", outputs=2, **_EIGEN),
        Trial(eigen.eigh, products=lambda m, k: 3.0, **_SYMMETRIC),  # noqa: ARG005
        Texts("all eigenpairs; any subset of them with `index=`",
              "losses that depend on a choice among equal eigenvalues, or on phases: `GaugeError`", "3 products",
              "eigen"),
    ),
    Operation(
        _rule(linalg, "eigh_topk", "(m,m)->(k)r,(m,k)->(m)r,(m,m)", outputs=2, **_EIGEN),
        Trial(eigen.eigh_topk, products=lambda m, k: 3.0 * k / m, **_SYMMETRIC),
        Texts("k largest or smallest eigenpairs", "as `eigh`; a cluster cut by the k-th eigenvalue: `GaugeError`",
              "3 k/m products", "eigen"),
    ),
    Operation(
        _rule(linalg, "eigh_generalized", "(m,m),(m,m)->(m)r,(m,m)", outputs=2, undefined=_repeated,
              refusal=_MASKED_IN_PENCIL),
        Trial(eigen.eigh_generalized, tangent=("symmetric", "symmetric"), symmetrises=True,
              products=lambda m, k: 5.0),  # noqa: ARG005
        Texts("all eigenpairs of A v = w B v, or a subset with `index=`: both matrices",
              "as `eigh`; B not positive definite: `SingularError`", "5 products", "generalized"),
    ),
    Operation(
        _rule(linalg, "eigsh", "(m,m)->(k)r,(m,k)->->()b,()i,(k)r,()b,()i->()b,(k)i,(k)r,()b", outputs=2, needs=(0,),
              info=linalg.EigshInfo, vjp_info=linalg.EigshVjpInfo, recursive=True,
              solves_by=_EIGSH_SYSTEMS,
              undefined=has_repeated_in_eigsh, refusal=_MASKED_OR_CUT),
        Trial(eigen.eigsh, **_SYMMETRIC),
        Texts("k largest, smallest or largest-in-magnitude eigenpairs, matrix-free", "as `eigh_topk`",
              "k systems by conjugate gradients", "eigsh"),
    ),
    Operation(
        _rule(linalg, "eigsh_generalized",
              "(m,m),(m,m)->(k)r,(m,k)->->()b,()i,(k)r,()b,()i->()b,(k)i,(k)r,()b", outputs=2, needs=(0, 1),
              info=linalg.EigshInfo, vjp_info=linalg.EigshVjpInfo, undefined=_everywhere, refusal=_ONCE),
        Trial(eigen.eigsh_generalized, tangent=("symmetric", "symmetric"), symmetrises=True),
        Texts("k eigenpairs of A v = w B v, by shift and invert, matrix-free: both matrices or operators",
              "as `eigsh`; a shift that is an eigenvalue: `SingularError`",
              "k systems by conjugate gradients, preconditioned by the factorisation", "generalized"),
    ),
    Operation(
        _rule(curvature, "gram_eigvalsh", "(m,n)->(k)r->(n)r,(n,n)", **_GRAM),
        Trial(eigen.gram_eigvalsh),
        Texts("eigenvalues of V Vᵀ for a tall factor V, through VᵀV",
              "losses that depend on a choice among equal eigenvalues: `GaugeError`", "2 D n² + 2 n³ flops", "ggn"),
    ),
    Operation(
        _rule(linalg, "svd", "(m,n)->(m,k),(k)r,(k,n)", outputs=3, undefined=_repeated_in_svd, refusal=_MASKED_TRIPLES),
        Trial(eigen.svd),
        Texts("thin singular value decomposition of a matrix of any shape",
              "losses that depend on a choice among equal ones, or on phases: `GaugeError`; on zero: `SingularError`",
              "8 m n² flops", "svd"),
    ),
    Operation(
        _rule(linalg, "svd_topk", "(m,n)->(m,k),(k)r,(k,n)->(m,l),(l)r,(l,n)", outputs=3, saved_vjp=_saved_svd_vjp,
              saved_jvp=_saved_svd_jvp, undefined=_repeated_in_svd, refusal=_MASKED_TRIPLES),
        Trial(eigen.svd_topk),
        Texts("k largest singular triples", "as `svd`; a cluster cut by the k-th value: `GaugeError`",
              "14 m n k flops", "svd"),
    ),
    Operation(
        _rule(linalg, "svdvals", "(m,n)->(k)r->(m,k),(k)r,(n,k)", saved_vjp=saved_svdvals_vjp,
              saved_jvp=saved_svdvals_jvp, undefined=_repeated_in_svdvals, refusal=_MASKED_TRIPLES),
        Trial(eigen.svdvals),
        Texts("singular values, small ones included",
              "losses that depend on a choice among equal ones: `GaugeError`; zero: `SingularError`", "2 m n² flops",
              "svd"),
    ),
    Operation(
        _rule(linalg, "svds", "(m,n)->(m,k),(k)r,(k,n)->->()b,()i,(k)r,()b,()i->()b,(k)i,(k)r,()b", outputs=3,
              needs=(0,), info=linalg.EigshInfo, vjp_info=linalg.EigshVjpInfo, recursive=True,
              solves_by=_EIGSH_SYSTEMS._replace(name="svds"), undefined=has_repeated_in_svds,
              refusal=_MASKED_OR_CUT.replace("eigsh", "svds").replace("eigenvalues", "singular values")),
        Trial(eigen.svds),
        Texts("k largest singular triples, matrix-free", "as `eigsh`; singular value zero: `GaugeError`",
              "k systems by conjugate gradients", "eigsh"),
    ),
    Operation(
        _rule(curvature, "gram_eigh", "(m,n)->(k)r,(m,k)->(n)r,(n,n)", outputs=2, **_GRAM),
        Trial(eigen.gram_eigh),
        Texts("k largest eigenpairs of V Vᵀ for a tall factor V", "as `eigh_topk`; eigenvalue zero: `SingularError`",
              "8 D n k flops", "ggn"),
    ),
    # Functions of the singular value decomposition that need no gap.
    Operation(
        _rule(linalg, "polar", "(m,n)->(m,n),(n,n)->(m,k),(k)r,(k,n)", outputs=2, recursive=True,
              solves_by=_POLAR_SYSTEMS, undefined=is_undetermined, refusal=_UNDETERMINED),
        Trial(eigen.polar),
        Texts("closest matrix with orthonormal columns or rows, or closest rotation, and the Hermitian factor",
              "zero singular values that the loss depends on: `SingularError`", "4 m n k + 8 k³ flops", "polar"),
    ),
    Operation(
        _rule(linalg, "pinv", "(m,n)->(n,m)->(m,k),(k)r,(k)r,(k,n)", needs=(0,), undefined=_noise_in_pinv,
              refusal=_NOISE),
        Trial(eigen.tall),
        Texts("pseudo-inverse of any rank, along directions that keep it",
              "a rank that rounding decides, a direction that changes it: `SingularError`", "20 m n k flops", "polar"),
    ),
    # Functions of a symmetric matrix; the first needs an example.
    _spectral("spectral_function", "any real function of the matrix", "where `f` has none: `SingularError`",
              f=eigen.square, df=eigen.twice),
    _spectral("sqrtm", "square root", "singular matrices: `SingularError`"),
    _spectral("invsqrtm", "inverse square root: whitening", "singular matrices: `SingularError`"),
    _spectral("logm", "logarithm", "singular matrices: `SingularError`"),
    _spectral("expm", "exponential", "nowhere; overflow: `SingularError`"),
    # Iterations.
    _iteration("power_iteration", "(m,m)->(),(m)->->()b,()i,()r,()r", "the eigenpair of largest magnitude"),
    _iteration("simultaneous_iteration", "(m,m)->(n),(m,n)->->()b,()i,()r,(n)r",
               "the n eigenpairs of largest magnitude"),
    Operation(
        _rule(linalg, "qr", "(m,n)->(m,n),(n,n)", outputs=2),
        Trial(eigen.tall),
        Texts("orthonormal and triangular factor of a tall matrix", "dependent columns: `SingularError`",
              "6 m n² flops", "factorisations"),
    ),
    Operation(
        _rule(linalg, "cholesky", "(m,m)->(m,m)"),
        Trial(linear.definite, **_SYMMETRIC),
        Texts("triangular factor of a positive definite matrix",
              "matrices that are not positive definite: `SingularError`", "4 m³ flops", "factorisations"),
    ),
    Operation(
        _rule(linalg, "logdet", "(m,m)->()r->(m,m)", saved_vjp=saved_logdet_vjp, saved_jvp=saved_logdet_jvp),
        Trial(linear.definite, **_SYMMETRIC),
        Texts("log-determinant of a positive definite matrix",
              "matrices that are not positive definite: `SingularError`", "2 m³ flops, from the factor of the forward",
              "factorisations"),
    ),
    Operation(
        _rule(linalg, "slogdet", "(m,m)->(),()r->(m,m),(m)i", outputs=2, saved_vjp=saved_slogdet_vjp,
              saved_jvp=saved_slogdet_jvp),
        Trial(linear.square),
        Texts("sign and log-determinant of any square matrix", "singular matrices: `SingularError`",
              "2 m³ flops, from the factors of the forward", "factorisations"),
    ),
    # Declarative nodes.
    Operation(
        _rule(nodes, "project_sphere", "(m)->(m)", needs=(0,)),
        Trial(node_samples.sphere, is_complex=False),
        Texts("nearest point on the L1, L2 or L∞ sphere",
              "points that are not unique (the centre, ties): `SingularError`", "O(m)", "nodes"),
    ),
    Operation(
        _rule(nodes, "project_ball", "(m)->(m)", needs=(0,)),
        Trial(node_samples.sphere, is_complex=False),
        Texts("nearest point in the L1, L2 or L∞ ball", "the sphere itself, where a one-sided derivative is returned",
              "O(m)", "nodes"),
    ),
    Operation(
        _rule(nodes, "project_simplex", "(m)->(m)"),
        Trial(node_samples.simplex, is_complex=False),
        Texts("nearest point of the probability simplex",
              "changes of the support, where a one-sided derivative is returned", "O(m)", "nodes"),
    ),
    Operation(
        _rule(nodes, "least_squares_on_sphere", "(m,n),(m)->(n)", needs=(0, 1)),
        Trial(node_samples.least_squares_on_sphere, is_complex=False),
        Texts("least squares under ‖y‖ = r", "minima that are not unique: `SingularError`", "a factorisation", "nodes"),
    ),
    Operation(
        _rule(nodes, "weighted_least_squares", "(m,n),(m),(m),()->(p)", needs=(0, 1, 2, 3)),
        Trial(node_samples.weighted_least_squares, is_complex=False),
        Texts("weighted least squares with ridge and bias", "dependent columns without a ridge: `SingularError`",
              "a factorisation", "nodes"),
    ),
    Operation(
        _rule(nodes, "sinkhorn", "(n,m),(n),(m),()->(n,m)->->()b,()i,()r,()r,()i,()i,()b->()b,()r,()r,()i",
              needs=(0, 1, 2, 3), info=nodes.SinkhornInfo, vjp_info=nodes.SinkhornVjpInfo, direct=True,
              item_axes=(2, 1, 1, 0)),
        Trial(node_samples.sinkhorn, tangent=("dense", "zero-sum", "zero-sum", "dense"), is_complex=False),
        Texts("entropic optimal transport: cost, both marginals and ε",
              "between blocks of the plan that exchange no mass, those of the marginals: one gauge per block",
              "a factorisation of the smaller side", "nodes"),
    ),
    Operation(
        _rule(nodes, "robust_pool", "(m)->()->->()b,()i,()r", needs=(0,), info=nodes.RobustPoolInfo),
        Trial(node_samples.robust_pool, is_complex=False),
        Texts("robust mean: quadratic, Huber, pseudo-Huber, Welsch, truncated",
              "no curvature, all outliers: `SingularError`", "O(m)", "nodes"),
    ),
    # Linear systems.
    Operation(
        _rule(linalg, "solve", "(n,n),(n)->(n)->(n,n),(n)i", needs=(1,), saved_vjp=saved_solve_vjp,
              saved_jvp=saved_solve_jvp, item_axes=(2, 1)),
        Trial(linear.solve),
        Texts("dense linear systems, many right-hand sides", "singular matrices: `SingularError`",
              "2 n² flops, from the factors of the forward", "linear"),
    ),
    Operation(
        _rule(linalg, "lstsq", "(m,n),(m)->(n)->(n,m),(m,k),(k)r,(k)r,(k,n)", needs=(0, 1), saved_vjp=saved_lstsq_vjp,
              saved_jvp=saved_lstsq_jvp, undefined=_noise_in_lstsq, refusal=_NOISE, item_axes=(2, 1)),
        Trial(linear.lstsq),
        Texts("least squares, the shortest solution, any rank, many right-hand sides",
              "a rank that rounding decides, a direction that changes it: `SingularError`",
              "16 m n flops, from the pseudo-inverse of the forward", "polar"),
    ),
    Operation(
        _rule(linalg, "solve_triangular", "(n,n),(n)->(n)", needs=(0, 1), item_axes=(2, 1)),
        Trial(linear.triangular),
        Texts("triangular systems, many right-hand sides", "a zero on the diagonal: `SingularError`", "2 n² flops",
              "factorisations"),
    ),
    Operation(
        _rule(linalg, "solve_tridiagonal", "(p),(n),(p),(n)->(n)", needs=(0, 1, 2, 3), item_axes=(1, 1, 1, 1)),
        Trial(linear.tridiagonal),
        Texts("tridiagonal systems: the three bands and the right-hand side", "singular matrices: `SingularError`",
              "O(n), one system", "factorisations"),
    ),
    Operation(
        _rule(linalg, "solve_block_tridiagonal", "(p,k,k),(n,k,k),(p,k,k),(n,k)->(n,k)", needs=(0, 1, 2, 3),
              item_axes=(3, 3, 3, 2)),
        Trial(linear.block_tridiagonal),
        Texts("block tridiagonal systems: the three bands and the right-hand side",
              "singular matrices: `SingularError`", "O(n k³), one system", "factorisations"),
    ),
    Operation(
        _rule(linalg, "linear_solve", f"(m,n),(m)->(n)->->{_SOLVE_INFO}->{_SOLVE_INFO}", needs=(0, 1),
              info=krylov.SolveInfo, vjp_info=krylov.SolveInfo, recursive=True, item_axes=(2, 1)),
        Trial(linear.linear_solve),
        Texts("linear systems and least squares with operators, matrix-free: the right-hand side and every parameter",
              "singular operators, which no solver converges on: `ConvergenceError`",
              "one solve of the adjoint system", "linear"),
    ),
)
# fmt: on

OPERATIONS: dict[str, Operation] = {operation.rule.name: operation for operation in _TABLE}
RULES: dict[str, Rule] = {name: operation.rule for name, operation in OPERATIONS.items()}
TRIALS: dict[str, Trial] = {name: operation.trial for name, operation in OPERATIONS.items()}
TEXTS: dict[str, Texts] = {name: operation.texts for name, operation in OPERATIONS.items()}
