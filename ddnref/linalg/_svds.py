"""The k largest singular triples of a matrix or an operator, without the others, and their derivatives.

Singular values are eigenvalues of a self-adjoint operator of twice the size,

    [ 0   A ] [u]       [u]
    [ Aᴴ  0 ] [v]  =  s [v],

so that `eigsh` computes them and differentiates them: all of its eigenvalues but the k lie on one side, with ``-s`` and
the null spaces among them. One phase of (u, v) is free, which is the joint gauge of both vectors. No product ``AᴴA`` is
formed, so that the digits of small singular values are not lost.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ddnref._core.arrays import Array, adjoint, named_arrays, namespace, namespace_of, real_dtype, refuse_recording
from ddnref._core.checks import check_dtypes, check_shapes, given
from ddnref._core.loops import CHECK_EVERY, WhileLoop
from ddnref._kernels.public import public
from ddnref._kernels.vectors import norm, normalised
from ddnref.errors import DdnrefError
from ddnref.linalg._complement import EigshVjpInfo, Solve
from ddnref.linalg._eigsh import EigshInfo, eigsh_fwd, eigsh_jvp, eigsh_vjp
from ddnref.linalg._eigsh import has_repeated as has_repeated_eigenvalues
from ddnref.operators import LinearOperator
from ddnref.operators._elementary import as_operator
from ddnref.operators._operator import Params, Structure, check_ending, motions_of, shared

HALF = 0.5**0.5  # the eigenvector of a triple is (u, v) / √2


@public
def svds(
    a: Array | LinearOperator,
    /,
    k: int,
    *,
    v0: Array | None = None,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    maxiter: int | None = None,
    basis: int | None = None,
    method: str = "auto",
    check_every: int = 1,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[Array, Array, Array], EigshInfo]:
    r"""The k largest singular values and their vectors, largest first, without the others.

    Parameters
    ----------
    a : (..., m, n) array, real or complex floating, or LinearOperator
        Tall or wide.
    k : int
        How many, ``1 <= k <= min(m, n)``.
    v0 : (..., n) or (..., \*domain_shape) array, optional
        Where to start: a guess of the first right vector. Default: a random vector with a fixed seed.
    rtol : float, optional
        Largest accepted residual ``(‖A v − s u‖² + ‖Aᴴ u − s v‖²)^½ / (√2 s_1)``; default 1e-12, and 1e-6 in single
        precision.
    cluster_rtol, maxiter, basis, method, check_every, throw, while_loop
        As in `eigsh`, for an eigenproblem with ``m + n`` entries.

    Returns
    -------
    (u, s, vh) : (..., m, k), (..., k) real and (..., k, n) arrays
        ``A ≈ U diag(s) Vᴴ``. For an operator the vectors are ``(..., *range_shape, k)`` and
        ``(..., k, *domain_shape)``.
    info : EigshInfo

    Raises
    ------
    ConvergenceError
        If `rtol` was not reached within `maxiter`, or `a` is not finite.
    GaugeError
        If the k-th singular value equals the next one, or is zero: which of its vectors come back is arbitrary.
    TypeError, ValueError
        As `eigsh`; `k` is out of range.

    See Also
    --------
    svd, svd_topk : for dense matrices of moderate size.
    eigsh : the iteration.

    Notes
    -----
    By `eigsh` of the operator :math:`\begin{pmatrix} 0 & A \\ A^H & 0 \end{pmatrix}`, not through :math:`A^H A`, which
    would lose half of the digits of small values. A singular value has an error of about ``rtol**2 * s_1`` or rounding,
    ``eps * s_1``, and its vectors one of ``rtol * s_1 / gap``, where the distance to ``-s`` counts as a gap as well.

    Cost: one product with `a` and one with its adjoint per step, and ``basis * (m + n)`` numbers of memory.

    References
    ----------
    .. [1] C. Lanczos, "Linear Differential Operators" (1961), chapter 3.

    Examples
    --------
    >>> import numpy as np
    >>> (u, s, vh), info = ddnref.svds(np.asarray([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]]), 1)
    >>> s
    array([5.])
    """
    options = {"v0": v0, "rtol": rtol, "cluster_rtol": cluster_rtol, "maxiter": maxiter, "basis": basis}
    options |= {"method": method, "check_every": check_every, "while_loop": while_loop}
    (outputs, _), info = svds_fwd(a, k, throw=throw, **options)  # type: ignore[arg-type]
    return outputs, info


@public
def svds_fwd(
    a: Array | LinearOperator,
    /,
    k: int,
    *,
    v0: Array | None = None,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    maxiter: int | None = None,
    basis: int | None = None,
    method: str = "auto",
    check_every: int = 1,
    throw: bool = True,
    while_loop: WhileLoop | None = None,
) -> tuple[tuple[tuple[Array, Array, Array], tuple[Array, Array]], EigshInfo]:
    r"""Compute `svds` and what its reverse pass can use: ``((u, s, vh), (s_rest, uv_rest)), info``.

    Parameters and errors are those of `svds`. The arrays ``(..., r)`` and ``(..., m + n, r)`` are leftover Ritz pairs
    of the eigenproblem, as `eigsh_fwd` returns them.
    """
    both = _Both(a)
    refuse_recording("svds", **named_arrays(a=a, v0=v0))  # PyTorch would record the iteration
    if not 1 <= operator.index(k) <= min(both.m, both.n):
        raise ValueError(f"k is {k}, expected 1 <= k <= {min(both.m, both.n)}, the smaller side of the matrix.")
    options: dict[str, Any] = {"rtol": rtol, "cluster_rtol": cluster_rtol, "maxiter": maxiter, "basis": basis}
    options |= {"method": method, "check_every": check_every, "throw": throw, "while_loop": while_loop}
    with _named("svds"):
        ((s, z), rest), info = eigsh_fwd(both.operator, k, v0=both.start(v0), **options)
    u, vh = both.parted(z / HALF)
    return ((u, s, vh), rest), info


@public
def svds_vjp(
    u_bar: Array | None,
    s_bar: Array | None,
    vh_bar: Array | None,
    u: Array,
    s: Array,
    vh: Array,
    /,
    *saved_and_a: Array | LinearOperator,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    gauge_rtol: float | None = None,
    check_rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    on_failure: str = "nan",
    while_loop: WhileLoop | None = None,
    solve: Solve | None = None,
) -> tuple[Array | tuple[Array, ...], EigshVjpInfo]:
    r"""Gradient of a loss of the k largest singular triples, without the others.

    Parameters
    ----------
    u_bar, s_bar, vh_bar, u, s, vh
        Cotangents of the outputs of `svds`, ``None`` for one that the loss does not use, and the outputs themselves.
    *saved_and_a
        Either ``a`` alone, the array or operator given to `svds`, or ``s_rest, uv_rest, a`` with what `svds_fwd` saved.
    rtol, cluster_rtol, gauge_rtol, check_rtol, maxiter, check_every, throw, on_failure, while_loop, solve
        As in `eigsh_vjp`.

    Returns
    -------
    a_bar : (..., m, n) array; for an operator a tuple, one cotangent for each of its parameters
    info : EigshVjpInfo

    Raises
    ------
    ConvergenceError
        If a solve failed, or the triples given are not those of `a`.
    GaugeError
        If the loss depends on the basis inside a cluster of equal singular values, on the common phase of a pair of
        vectors, or on a cluster that the k-th one cuts.
    TypeError, ValueError
        As `eigsh_vjp`.

    Notes
    -----
    The derivative of the eigenproblem of `svds` along its two off-diagonal blocks. Cost: as `eigsh_vjp`, with one
    product with `a` and one with its adjoint for each vector and iteration.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.asarray([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]])
    >>> (u, s, vh), info = ddnref.svds(a, 1)
    >>> a_bar, info = ddnref.svds_vjp(None, np.ones(1), None, u, s, vh, a)  # of the largest one
    >>> np.round(a_bar, 12) + 0.0
    array([[0.6, 0. ],
           [0. , 0. ],
           [0.8, 0. ]])
    """
    if u_bar is None and s_bar is None and vh_bar is None:
        raise TypeError("u_bar, s_bar and vh_bar are all None: there is nothing to differentiate.")
    both, saved = _arguments(u, s, vh, saved_and_a, u_bar=u_bar, s_bar=s_bar, vh_bar=vh_bar)
    xp = namespace_of(u)
    z_bar = None
    if u_bar is not None or vh_bar is not None:
        some_u = xp.zeros_like(u) if u_bar is None else u_bar
        some_vh = xp.zeros_like(vh) if vh_bar is None else vh_bar
        z_bar = both.joined(some_u, some_vh) / HALF
    options: dict[str, Any] = {"rtol": rtol, "cluster_rtol": cluster_rtol, "gauge_rtol": gauge_rtol, "solve": solve}
    options |= {"check_rtol": check_rtol, "maxiter": maxiter, "check_every": check_every, "while_loop": while_loop}
    with _named("svds_vjp"):
        bars, info = eigsh_vjp(
            s_bar, z_bar, s, both.joined(u, vh) * HALF, *saved, both.operator,
            throw=throw, on_failure=on_failure, **options,
        )  # fmt: skip
    return bars if isinstance(saved_and_a[-1], LinearOperator) else bars[0], info


@public
def svds_jvp(
    a_dot: Array | tuple[Array | None, ...],
    u: Array,
    s: Array,
    vh: Array,
    /,
    *saved_and_a: Array | LinearOperator,
    rtol: float | None = None,
    cluster_rtol: float | None = None,
    gauge_rtol: float | None = None,
    check_rtol: float | None = None,
    maxiter: int | None = None,
    check_every: int = CHECK_EVERY,
    throw: bool = True,
    on_failure: str = "nan",
    while_loop: WhileLoop | None = None,
    solve: Solve | None = None,
) -> tuple[tuple[Array, Array, Array], EigshVjpInfo]:
    r"""Derivative of the k largest singular triples along a direction, without the others.

    Parameters
    ----------
    a_dot : (..., m, n) array, or a tuple of arrays
        The direction; for an operator one direction for each of its parameters, ``None`` for one that does not move.
    u, s, vh, *saved_and_a
        The outputs of `svds`, then ``a`` alone or ``s_rest, uv_rest, a``, as in `svds_vjp`.
    rtol, cluster_rtol, gauge_rtol, check_rtol, maxiter, check_every, throw, on_failure, while_loop, solve
        As in `eigsh_jvp`.

    Returns
    -------
    (u_dot, s_dot, vh_dot) : arrays of the shapes of `u`, `s` and `vh`
        The vector ``(u_dot, v_dot)`` is orthogonal to ``(u, v)``, which fixes the phase of a complex pair.
    info : EigshVjpInfo

    Raises
    ------
    ConvergenceError, GaugeError, TypeError, ValueError
        As `eigsh_jvp`.

    Notes
    -----
    Cost: one product with the direction and one with its adjoint for each pair, and the solves of `svds_vjp`.

    Examples
    --------
    >>> import numpy as np
    >>> a = np.asarray([[3.0, 0.0], [0.0, 1.0], [4.0, 0.0]])
    >>> (u, s, vh), info = ddnref.svds(a, 1)
    >>> (u_dot, s_dot, vh_dot), info = ddnref.svds_jvp(np.ones((3, 2)), u, s, vh, a)
    >>> np.round(s_dot, 12)
    array([1.4])
    """
    if a_dot is None:
        raise TypeError("a_dot is None: there is no direction.")
    both, saved = _arguments(u, s, vh, saved_and_a)
    if isinstance(saved_and_a[-1], LinearOperator):
        dots = tuple(a_dot)
    else:
        namespace(a_dot=a_dot, a=saved_and_a[-1])
        check_dtypes(a_dot=(a_dot, saved_and_a[-1].dtype))
        check_shapes(a_dot=(a_dot, tuple(saved_and_a[-1].shape)))
        dots = (a_dot,)
    options: dict[str, Any] = {"rtol": rtol, "cluster_rtol": cluster_rtol, "gauge_rtol": gauge_rtol, "solve": solve}
    options |= {"check_rtol": check_rtol, "maxiter": maxiter, "check_every": check_every, "while_loop": while_loop}
    with _named("svds_jvp"):
        (s_dot, z_dot), info = eigsh_jvp(
            dots, s, both.joined(u, vh) * HALF, *saved, both.operator, throw=throw, on_failure=on_failure, **options
        )
    u_dot, vh_dot = both.parted(z_dot / HALF)
    return (u_dot, s_dot, vh_dot), info


class _Both:
    """A map and its adjoint as one self-adjoint operator on flat vectors ``(u, v)``."""

    def __init__(self, a: Array | LinearOperator) -> None:
        self.a = as_operator(a, "a")
        self.m, self.n = math.prod(self.a.range_shape), math.prod(self.a.domain_shape)
        self.operator = _bordered(self.a)

    def start(self, v0: Array | None) -> Array | None:
        """The vector ``(A v, v)``, both parts of length 1, from a guess of v."""
        if v0 is None:
            return None
        namespace(v0=v0, **{f"a.params[{i}]": p for i, p in enumerate(self.a.params)})
        check_ending("v0", v0, self.a.domain_shape)
        xp, u = namespace_of(v0), _flat(self.a(v0), self.a.range_shape)
        v = xp.broadcast_to(_flat(v0, self.a.domain_shape), (*u.shape[:-1], self.n))
        return xp.concat([normalised(x, norm(x)) for x in (u, v)], axis=-1)

    def joined(self, u: Array, vh: Array) -> Array:
        """Columns ``(u, v)``, ``(..., m + n, k)``, of vectors in the user's form."""
        xp, k = namespace_of(u), u.shape[-1]
        batch = tuple(u.shape[: u.ndim - len(self.a.range_shape) - 1])
        return xp.concat([xp.reshape(u, (*batch, self.m, k)), adjoint(xp.reshape(vh, (*batch, k, self.n)))], axis=-2)

    def parted(self, z: Array) -> tuple[Array, Array]:
        """The inverse of `joined`."""
        xp, batch, k = namespace_of(z), tuple(z.shape[:-2]), z.shape[-1]
        u = xp.reshape(z[..., : self.m, :], (*batch, *self.a.range_shape, k))
        return u, xp.reshape(adjoint(z[..., self.m :, :]), (*batch, k, *self.a.domain_shape))


def _flat(x: Array, shape: tuple[int, ...]) -> Array:
    return namespace_of(x).reshape(x, (*x.shape[: x.ndim - len(shape)], math.prod(shape)))


def _bordered(a: LinearOperator) -> LinearOperator:
    """The operator ``(u, v) ↦ (A v, Aᴴ u)``, with the parameters of A."""
    of = shared(_Bordered, a._replace(params=()))
    shape = (math.prod(a.range_shape) + a.size,)
    return LinearOperator(
        a.params, of.apply, of.apply, of.params_vjp, shape, shape, self_adjoint=True, prepare=of.prepare,
        **motions_of(of, a),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Bordered(Structure):
    a: LinearOperator

    def parts(self, z: Array) -> tuple[Array, Array]:
        xp, lead, rows = namespace_of(z), tuple(z.shape[:-1]), math.prod(self.a.range_shape)
        u, v = z[..., :rows], z[..., rows:]
        return xp.reshape(u, (*lead, *self.a.range_shape)), xp.reshape(v, (*lead, *self.a.domain_shape))

    def join(self, u: Array, v: Array) -> Array:
        return namespace_of(u).concat([_flat(u, self.a.range_shape), _flat(v, self.a.domain_shape)], axis=-1)

    def apply(self, params: Params, z: Array) -> Array:
        u, v = self.parts(z)
        return self.join(self.a.apply(params, v), self.a.adjoint(params, u))

    def params_vjp(self, params: Params, z_bar: Array, z: Array) -> Params:
        # Re ⟨ū, Ȧ v⟩ + Re ⟨v̄, Ȧᴴ u⟩, and the second one is Re ⟨u, Ȧ v̄⟩
        (u_bar, v_bar), (u, v) = self.parts(z_bar), self.parts(z)
        both = self.a.params_vjp(params, u_bar, v), self.a.params_vjp(params, u, v_bar)
        return tuple(p + q for p, q in zip(*both, strict=True))

    def params_jvp(self, params: Params, params_dot: Params, z: Array) -> Array:
        (u, v), a = self.parts(z), self.a
        return self.join(a.params_jvp(params, params_dot, v), a.adjoint_jvp(params, params_dot, u))  # type: ignore[misc]

    adjoint_jvp = params_jvp

    def prepare(self, params: Params) -> LinearOperator:
        return _bordered(self.a._replace(params=params).prepared())


def _arguments(
    u: Array, s: Array, vh: Array, saved_and_a: tuple[Array | LinearOperator, ...], **bars: Array | None
) -> tuple[_Both, tuple[Any, ...]]:
    """Validate the shapes of the triples, and return the operator and what was saved."""
    if len(saved_and_a) not in (1, 3):
        raise TypeError(f"after u, s, vh come a, or s_rest, uv_rest, a; got {len(saved_and_a)} arguments.")
    both = _Both(saved_and_a[-1])
    saved: dict[str, Any] = dict(zip(("s_rest", "uv_rest"), saved_and_a[:-1], strict=False))
    of_a = {f"a.params[{i}]": p for i, p in enumerate(both.a.params)}
    given(**saved, **of_a)  # they follow *, so that `public` cannot know them
    xp = namespace(u=u, s=s, vh=vh, **bars, **saved, **of_a)
    if s.ndim < 1 or s.shape[-1] < 1:
        raise ValueError(f"s has shape {tuple(s.shape)}, expected (..., k) with k at least 1.")
    batch, k = tuple(s.shape[:-1]), s.shape[-1]
    r = saved["s_rest"].shape[-1] if saved and saved["s_rest"].ndim else 0
    number = real_dtype(xp, u.dtype)
    expected = {
        "u": (u.dtype, (*batch, *both.a.range_shape, k)),
        "s": (number, (*batch, k)),
        "vh": (u.dtype, (*batch, k, *both.a.domain_shape)),
        "s_rest": (number, (*batch, r)),
        "uv_rest": (u.dtype, (*batch, both.m + both.n, r)),
    }
    for name, array in {"u": u, "s": s, "vh": vh, **bars, **saved}.items():
        dtype, shape = expected[name.removesuffix("_bar")]
        check_dtypes(**{name: (array, dtype)})
        check_shapes(**{name: (array, shape)})
    return both, saved_and_a[:-1]


@contextmanager
def _named(function: str) -> Iterator[None]:
    """Say in messages of `eigsh` which eigenproblem it solved."""
    try:
        yield
    except DdnrefError as error:
        raise type(error)(
            f"{function} takes the singular values of A as eigenvalues of [[0, A], [Aᴴ, 0]], with eigenvectors (u, v): "
            f"{error}"
        ) from None


def has_repeated(
    u: Array,
    s: Array,
    vh: Array,
    s_rest: Array,
    uv_rest: Array,
    a: Array | LinearOperator,
    /,
    *,
    cluster_rtol: float | None = None,
) -> Array:
    """Whether two of the k singular values, or the k-th and the next one, are equal: second derivatives are wrong."""
    both = _Both(a)
    z = both.joined(u, vh) * HALF
    return has_repeated_eigenvalues(s, z, s_rest, uv_rest, both.operator, cluster_rtol=cluster_rtol)
