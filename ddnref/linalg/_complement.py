"""Systems on the complement of k extremal eigenvectors, which the derivatives of `eigsh` solve, and their derivatives.

With ``P = I − V Vᴴ``, the solution of ``(λ_j I − X) u_j = b_j`` in range(P), for b_j in range(P), is ``u_j = G_j b_j``.
All other eigenvalues lie on one side of each λ_j, so that each system is definite. As the pairs move with X,

    u̇_j = G_j P (ḃ_j + Ẋ u_j − λ̇_j u_j) − V V̇ᴴ u_j,

and with the solutions ``z_j = G_j P ū_j``, of the same systems,

    b̄ = Z,        λ̄_j = −Re ⟨z_j, u_j⟩,        X̄ = sym(Z Uᴴ),        V̄ = −U (Vᴴ Ū)ᴴ.

Solutions of systems differentiated once more are solutions of the same systems, so that every order is defined.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from ddnref._core.arrays import (
    Array,
    among,
    as_dtype,
    conj,
    eps,
    full,
    namespace,
    namespace_of,
    real,
)
from ddnref._core.arrays import adjoint as matrix_adjoint
from ddnref._core.checks import check_dtypes, check_shapes
from ddnref._core.loops import LoopOptions, WhileLoop
from ddnref._kernels.dense import constant, hermitian_sum, identity, infinity
from ddnref._kernels.dense import solve as dense_solve
from ddnref._kernels.vectors import norm, power_of_two
from ddnref.errors import ConvergenceError
from ddnref.krylov._cg import solve_from_zero
from ddnref.krylov._system import ITERATION_LIMIT
from ddnref.operators import LinearOperator
from ddnref.operators._blocks import SelfAdjoint, inner, self_adjoint, without

ALONE = 16
"""Times `CLUSTER_RTOL`, the bound on a gap that is known only from the size of a solution, of whose right-hand side
only a part lies in the cluster. In 300 random cut clusters the two differed by up to 10."""


class EigshVjpInfo(NamedTuple):
    """Status of the solves of `eigsh_vjp` and `eigsh_jvp`."""

    converged: Array
    """Per item, whether every solve reached `rtol`, or rounding, and the pairs given are eigenpairs, ``(...)``."""
    n_iter: Array
    """Iterations of conjugate gradients, ``(..., k)``; 0 where none were needed."""
    residual_norm: Array
    """``‖P v̄ − (λ I − X) w‖ / ‖P v̄‖``, recomputed, ``(..., k)``."""
    cut: Array
    """Per item, whether the loss depends on a cluster of equal eigenvalues that the k-th one cuts; for a
    direction whether there is such a cluster, ``(...)``."""


class Complement(NamedTuple):
    """A self-adjoint map and its k extremal eigenpairs, with vectors as rows."""

    a: SelfAdjoint
    w: Array
    v: Array
    scale: Array
    """A lower bound of ‖A‖, ``(...)``."""
    w_rest: Array | None
    rest: Array | None
    """Other eigenpairs, if known, or Ritz pairs."""


class Method(NamedTuple):
    """How the systems are solved."""

    which: str
    """The option of `eigsh`, which says where the k eigenvalues are."""
    solver: str
    """``"cg"`` or ``"direct"``; without effect where all eigenpairs are known."""
    cluster_rtol: float
    loop: LoopOptions
    """Its `rtol` is that of the solutions."""


# --- solutions ------------------------------------------------------------------------------------------------------


def in_complement(b: Array, v: Array) -> Array:
    """Rows ``P b``, where only rounding counts as zero, but its derivative does not."""
    xp, part = namespace_of(b), without(without(b, v), v)
    small = norm(part) <= 8 * eps(xp, b.dtype) * norm(b)
    return part - constant(xp.where(small[..., None], part, xp.zeros_like(part)))


def solved(b: Array, g: Complement, method: Method) -> tuple[Array, EigshVjpInfo]:
    """Rows ``(λ_j I − A)⁻¹ b_j`` in range(P), for b in range(P), and how well they solve the systems."""
    xp = namespace_of(g.w)
    sign = xp.sign(g.w) if method.which == "LM" else full(g.w.shape, 1.0 if method.which == "LA" else -1.0, g.w)

    def shifted(x: Array) -> Array:
        """``σ_i P (λ_i I − A) x_i``, positive definite on range(P) with this sign: see the top."""
        return as_dtype(sign, x)[..., None] * g.a.without(as_dtype(g.w, x)[..., None] * x - g.a.apply(x), g.v)

    n_iter = xp.zeros_like(g.w, dtype=xp.int32)
    positive = n_iter == 0
    if g.rest is not None and g.rest.shape[-2] == g.a.m - g.w.shape[-1]:
        # All other eigenpairs are known. The solution is 0 across a cut cluster, which is reported elsewhere.
        gap = sign[..., None] * (g.w[..., :, None] - g.w_rest[..., None, :])  # type: ignore[index]
        gap = xp.where(gap > 0, gap, infinity(gap))
        y = (g.a.inner(b, g.rest) / as_dtype(gap, b)) @ g.rest
    elif method.solver == "direct":
        y = _direct(g, sign, b)  # k factorisations
    else:
        precondition = _preconditioner(g)
        found = solve_from_zero(
            shifted, b, method.loop, precondition=precondition, project=lambda r: g.a.without(r, g.v), metric=g.a.metric
        )
        y, n_iter, positive = found.x, found.n_iter, found.status <= ITERATION_LIMIT

    # A residual at rounding level of the solution is as good as one at the tolerance.
    size, residual, length = g.a.norm(b), g.a.norm(b - shifted(y)), g.a.norm(y)
    rounding = 2 * method.cluster_rtol * g.scale[..., None] * length
    converged = positive & (residual <= 2 * method.loop.rtol * size + rounding)
    # ‖y‖ ≤ ‖b‖ / gap: a solution this large says that the next eigenvalue is the k-th.
    least = method.cluster_rtol * (1 if g.w_rest is not None else ALONE)
    cut = xp.any((size > 0) & (size <= least * g.scale[..., None] * length), axis=-1)
    relative = residual / xp.where(size > 0, size, xp.ones_like(size))  # 0 for a right-hand side of 0
    return as_dtype(sign, y)[..., None] * y, EigshVjpInfo(xp.all(converged, axis=-1), n_iter, relative, cut)


def _preconditioner(g: Complement) -> Callable[[Array], Array] | None:
    """``z = r + Σ_j u_j (c_i / |λ_i − θ_j| − 1) ⟨u_j, r⟩`` with leftover Ritz pairs: they move to the far end c_i."""
    if g.rest is None or g.w_rest is None or g.rest.shape[-2] == 0:
        return None
    xp, u = namespace_of(g.v), g.rest
    gap = xp.abs(g.w[..., :, None] - g.w_rest[..., None, :])
    c = xp.max(gap, axis=-1, keepdims=True)
    factor = as_dtype(xp.where(gap > 0, c / xp.where(gap > 0, gap, xp.ones_like(gap)), xp.ones_like(gap)) - 1, u)
    return lambda r: r + (factor * g.a.inner(r, u)) @ u


def _direct(g: Complement, sign: Array, b: Array) -> Array:
    """Solve the same systems by factorisations: ``λ_i I − A + σ_i c VᴴV`` is regular and keeps range(P)."""
    xp, matrix = namespace_of(b), g.a.matrix()
    w, sign = (as_dtype(x, b)[..., None] for x in (g.w, sign))
    c = xp.max(xp.sum(xp.abs(matrix), axis=-1), axis=-1)[..., None, None, None]  # at least ‖A‖
    span = xp.matrix_transpose(g.v) @ conj(g.v)
    shift = sign[..., None] * as_dtype(c, b) * span[..., None, :, :]
    x = dense_solve(w[..., None] * identity(g.a.m, b) - matrix[..., None, :, :] + shift, b[..., None])
    return sign * without(x[..., 0], g.v)


def raise_unsolved(function: str, info: EigshVjpInfo, rtol: float) -> NoReturn:
    """Raise `ConvergenceError` for the items whose systems were not solved."""
    xp = namespace_of(info.converged)
    failed = int(xp.sum(xp.astype(~info.converged, xp.int32)))
    raise ConvergenceError(
        f"{function} did not converge for {failed} item(s) of the batch{among(~info.converged)}: largest residual "
        f"{float(xp.max(info.residual_norm)):.1e} (rtol {rtol:.1e}) after {int(xp.max(info.n_iter))} iterations. "
        "The most likely cause is that w and v are not the extremal eigenpairs that which= says, that the k-th "
        "eigenvalue is very close to the next, or that the input is not finite. Pass the pairs that eigsh_fwd saved, "
        'a larger maxiter= or rtol=, or solver="direct"; or pass throw=False to get NaN for these items and '
        "info.converged."
    )


# --- a separate operation, which bridges differentiate ---------------------------------------------------------------

Solve = Callable[..., tuple[Array, EigshVjpInfo]]


def complement_solve(
    b: Array,
    w: Array,
    v: Array,
    scale: Array,
    w_rest: Array | None,
    v_rest: Array | None,
    x: Array | LinearOperator,
    /,
    *,
    method: Method,
    while_loop: WhileLoop | None = None,
) -> tuple[Array, EigshVjpInfo]:
    r"""The solution u of ``(λ_j I − X) u_j = b_j`` orthogonal to V, for b orthogonal to V.

    Vectors are columns ``(..., \*shape, k)`` as from `eigsh`, whose outputs and saved arrays the next ones are; `scale`
    is a lower bound of ‖X‖. Nothing but b, w, v and x has a derivative: the others only say how to solve. Nothing is
    validated, and a solution that was not found is returned as it is.
    """
    g = _complement(w, v, scale, w_rest, v_rest, x)
    rows, info = solved(g.a.rows(b), g, method._replace(loop=method.loop._replace(while_loop=while_loop)))
    return g.a.columns(rows), info


def complement_solve_vjp(
    u_bar: Array,
    u: Array,
    w: Array,
    v: Array,
    scale: Array,
    w_rest: Array | None,
    v_rest: Array | None,
    x: Array | LinearOperator,
    /,
    *,
    method: Method,
    solve: Solve = complement_solve,
) -> tuple[tuple[Any, ...], EigshVjpInfo]:
    """Cotangents of all arguments of `complement_solve`, ``None`` for those without a derivative, from one solve.

    `solve` is `complement_solve`, or the same made differentiable.
    """
    xp, g = namespace_of(w), _complement(w, v, scale, w_rest, v_rest, x)
    rows_bar, rows = g.a.rows(u_bar), g.a.rows(u)
    z_columns, info = _scaled(solve, in_complement(rows_bar, g.v), g, v, v_rest, x, method)
    z = g.a.rows(z_columns)

    w_bar = -real(xp.sum(conj(z) * rows, axis=-1))
    v_bar = -(matrix_adjoint(inner(rows_bar, g.v)) @ rows)
    if isinstance(x, LinearOperator):
        # As Ẋ is self-adjoint, X̄ need not be symmetrised.
        x_bar = x.params_vjp(x.params, g.a.vectors(z), g.a.vectors(rows))
    else:
        x_bar = hermitian_sum(xp.matrix_transpose(z) / 2, xp.matrix_transpose(rows))
    return (z_columns, w_bar, g.a.columns(v_bar), None, None, None, x_bar), info


def complement_solve_jvp(
    b_dot: Array | None,
    w_dot: Array | None,
    v_dot: Array | None,
    scale_dot: Array | None,  # noqa: ARG001
    w_rest_dot: Array | None,  # noqa: ARG001
    v_rest_dot: Array | None,  # noqa: ARG001
    x_dot: Any,
    u: Array,
    w: Array,
    v: Array,
    scale: Array,
    w_rest: Array | None,
    v_rest: Array | None,
    x: Array | LinearOperator,
    /,
    *,
    method: Method,
    solve: Solve = complement_solve,
) -> tuple[Array, EigshVjpInfo]:
    """Tangent of the solution, from one solve; a tangent is ``None`` for what does not move."""
    g = _complement(w, v, scale, w_rest, v_rest, x)
    rows = g.a.rows(u)
    # How the right-hand side moves, less what the matrix of the system does
    b = namespace_of(u).zeros_like(rows) if b_dot is None else g.a.rows(b_dot)
    if w_dot is not None:
        b = b - as_dtype(w_dot, rows)[..., None] * rows
    if x_dot is not None:
        b = b + motion(x_dot, x, v).apply(rows)
    u_dot, info = _scaled(solve, in_complement(b, g.v), g, v, v_rest, x, method)
    if v_dot is not None:
        u_dot = u_dot - g.a.columns(inner(rows, g.a.rows(v_dot)) @ g.v)
    return u_dot, info


def _complement(
    w: Array, v: Array, scale: Array, w_rest: Array | None, v_rest: Array | None, x: Array | LinearOperator
) -> Complement:
    a = self_adjoint(x, "eigsh", v[..., 0])
    return Complement(a, w, a.rows(v), scale, w_rest, None if v_rest is None else a.rows(v_rest))


def _scaled(
    solve: Solve, b: Array, g: Complement, v: Array, v_rest: Array | None, x: Any, method: Method
) -> tuple[Array, EigshVjpInfo]:
    """Columns of the solution, solved over a power of two for each item, because squares could overflow."""
    size = as_dtype(power_of_two(constant(b), 2), b)[..., None, None]
    columns, info = solve(g.a.columns(b / size), g.w, v, g.scale, g.w_rest, v_rest, x, method=method)
    return g.a.columns(g.a.rows(columns) * size), info


# --- directions -----------------------------------------------------------------------------------------------------


def motion(
    x_dot: Any, x: Array | LinearOperator, v: Array, name: str = "x_dot", function: str = "eigsh_jvp"
) -> SelfAdjoint:
    """The tangent of a matrix or operator as a self-adjoint map; `v` are columns, which it may be applied to."""
    if not isinstance(x, LinearOperator):
        (x_dot,) = checked_tangents(name, (x_dot,), (x,))
        return self_adjoint(x_dot, function)
    dots = x_dot if isinstance(x_dot, tuple) else (x_dot,)
    dots = checked_tangents(f"{name}[{{}}]", dots, x.params)
    if x.params_jvp is None:
        raise TypeError(
            "The operator has no params_jvp, which computes Ẋ v. Pass one: "
            "LinearOperator(..., params_jvp=lambda params, params_dot, v: ...)."
        )
    params, params_jvp = x.params, x.params_jvp
    motion = x._replace(params=dots, apply=lambda params_dot, y: params_jvp(params, params_dot, y))
    return self_adjoint(motion, function, v[..., 0])


def checked_tangents(name: str, dots: tuple[Array | None, ...], arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """Validate one tangent for each array, and replace those that are ``None`` by zeros.

    `name` is that of each tangent, with ``{}`` for its number.
    """
    whole = name.partition("[")[0]
    if len(dots) != len(arrays):
        raise ValueError(f"{whole} has {len(dots)} entries, expected {len(arrays)}: one for each array that may move.")
    if all(dot is None for dot in dots):
        raise TypeError(f"The entries of {whole} are all None: there is no direction.")
    named = {name.format(i): dot for i, dot in enumerate(dots)}
    xp = namespace(**named, beside=arrays[0])
    pairs = list(zip(named.items(), arrays, strict=True))
    check_shapes(**{key: (dot, tuple(array.shape)) for (key, dot), array in pairs})
    check_dtypes(**{key: (dot, array.dtype) for (key, dot), array in pairs})
    return tuple(xp.zeros_like(array) if dot is None else dot for dot, array in zip(dots, arrays, strict=True))
