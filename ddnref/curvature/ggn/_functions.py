"""Eigenpairs of the GGN from those of its Gram matrix: ``K = VᵀV = Ẽ Λ Ẽᵀ``, ``e_k = V ẽ_k / √λ_k``."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ddnref._core.arrays import Array
from ddnref._kernels.public import public
from ddnref.curvature._gram import inverse_roots
from ddnref.curvature.ggn import _spectrum
from ddnref.curvature.ggn._network import named
from ddnref.curvature.ggn._options import options
from ddnref.curvature.ggn._state import Ggn, accumulated, apply

Batches = Iterable[tuple[Array, Array]]
Progress = Callable[[int, int | None], object]


@public
def ggn_eigvalsh(
    chain: Any,
    x: Array | None = None,
    t: Array | None = None,
    *,
    batches: Batches | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    subsampling: Iterable[int] | None = None,
    mc_samples: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    throw: bool = True,
) -> Any:
    r"""Return the eigenvalues of the generalised Gauss–Newton matrix of a network, largest first.

    Parameters
    ----------
    chain : Chain, object from `ddnref.interop.torch.ggn`, or Ggn
        The network and its loss; or what `ggn_reducer` made of them, then without any other argument.
    x, t : (N, ...) and (N,) or (N, C) arrays
        Samples and targets, as `Chain.loss` takes them.
    batches : iterable of (x, t), optional
        The data in several parts, in place of `x` and `t`: nothing but the shards' factors and the Gram matrix is held.
    groups : sequence of sequences of int, optional
        Positions in ``chain.params``, or names of a module's parameters: the matrix is approximated by one diagonal
        block for each group. Parameters in no group are constants. Default: one group of all.
    subsampling : iterable of int, optional
        Numbers of the samples to use, counted across all batches; the mean is over these. Default: all.
    mc_samples : int, optional
        Replace the columns of ``S_n`` by that many random combinations: an unbiased estimate whose error falls as one
        over the root of `mc_samples`. Default: exact.
    seed : int
        Of the random signs; a sample's depend on its number alone, not on the batches.
    progress : callable, optional
        Called as ``progress(done, total)`` after each batch, total ``None`` where `batches` does not know its length.
    throw : bool, default True
        Raise for targets out of range and for values that are not finite, reading a few flags on the host. With
        ``False`` the result is NaN.

    Returns
    -------
    w : (r,) array, or with `groups` a tuple of one for each group
        Descending and never negative, ``r = min(D, N M)``: D parameters, and for each of the N samples M columns: C − 1
        for the cross-entropy, the rank of its Hessian, else C, or `mc_samples`. All other eigenvalues are zero. In
        single precision each is right to ``eps λ_1``, because that is how exactly V itself is computed.

    Raises
    ------
    TypeError
        `chain` is none of these; arrays of another library, device or dtype; groups that are not positions.
    ValueError
        Shapes that do not fit; no samples; a cross-entropy of one output; targets out of range; samples named twice or
        that do not exist; groups that overlap, are empty, or name parameters that do not exist.
    NonFiniteError
        Activations or derivatives of some samples are NaN or infinite; it names them.

    See Also
    --------
    ggn_eigh, ggn_directional_derivatives, ggn_damped_newton
    ggn_reducer : for several of these from one Gram matrix, or over several processes.
    ddnref.networks.Chain.ggnvp : products with the matrix.

    Notes
    -----
    .. math:: G = \tfrac1N \sum_n J_n^T \, \nabla^2 \ell_n \, J_n = V V^T, \qquad
              V = \tfrac{1}{\sqrt N} [J_n^T S_n], \qquad S_n S_n^T = \nabla^2 \ell_n ,

    without 1/N under ``reduction="sum"``. The eigenvalues are those of ``VᵀV``, to which a dense layer with inputs U
    and backpropagated factors Δ adds ``(UUᵀ [+ 1 with bias]) ∘ (ΔΔᵀ)``, and a convolution a sum over pairs of
    positions. V, with D rows, is never stored. Cost, with n = N M: one pass forward, M backward; ``n² Σ a_out`` flops
    for the Gram matrix, about 4/3 n³ for the eigenvalues; ``n² + N Σ a_in + n Σ a_out`` numbers.

    References
    ----------
    .. [1] F. Dangel, L. Tatzel and P. Hennig, "ViViT: Curvature access through the generalized Gauss-Newton's low-rank
       structure", TMLR (2022), section 2.
    .. [2] N. N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
       Computation 14 (2002).

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain([ddnref.networks.Dense(np.asarray([[1.0, 2.0]]))], "mse")
    >>> ddnref.curvature.ggn_eigvalsh(chain, np.asarray([[1.0, 0.0], [0.0, 3.0]]), np.asarray([[1.0], [1.0]]))
    array([9., 1.])
    """
    ggn = resolve(chain, x, t, batches, progress, groups, subsampling, None, mc_samples, seed, False, throw)
    return each(ggn, lambda i: _spectrum.values(ggn.grams[i], count(ggn, i)) * ggn.scale)


@public
def ggn_eigh(
    chain: Any,
    x: Array | None = None,
    t: Array | None = None,
    *,
    k: int | None = None,
    batches: Batches | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    subsampling: Iterable[int] | None = None,
    mc_samples: int | None = None,
    seed: int = 0,
    method: str = "auto",
    zero_rtol: float | None = None,
    progress: Progress | None = None,
    throw: bool = True,
) -> Any:
    r"""Return the k largest eigenpairs of the generalised Gauss–Newton matrix of a network.

    Parameters
    ----------
    chain, x, t, batches, groups, subsampling, mc_samples, seed, progress, throw
        As in `ggn_eigvalsh`.
    k : int, optional
        How many, ``1 <= k <= min(D, N M)``; default all of these, which must not be zero.
    method : {"auto", "full", "iterative"}
        How the Gram matrix is decomposed: in full, or by Lanczos (`eigsh`), which "auto" takes for n = N M > 512 and
        k ≤ n / 32. Lanczos reads values on the host: under ``jax.jit`` pass "full".
    zero_rtol : float, optional
        Eigenvalues up to ``zero_rtol * λ_1`` count as zero; default ``16 * eps``.

    Returns
    -------
    w : (k,) array
        Descending.
    v : list of arrays (k, \*shape)
        Orthonormal eigenvectors, one array for each parameter of ``chain.params``; for a PyTorch module a dictionary
        by the names of its parameters. With `groups` a tuple of pairs ``(w, v)``, v for the parameters of the group.

    Raises
    ------
    SingularError
        If k exceeds the rank: the eigenvector of a zero eigenvalue is refused. With ``throw=False`` it is NaN.
    TypeError, ValueError, NonFiniteError
        As `ggn_eigvalsh`; `k` or `method` out of range.
    ConvergenceError, GaugeError
        As `eigsh`, with ``method="iterative"``.

    Notes
    -----
    ``e = V ẽ / √λ`` with the eigenvectors ẽ of the Gram matrix: one pass over the layers, k D N flops, without V. An
    eigenvalue is accurate to ``eps λ_1``, an eigenvector to ``eps λ_1`` over its gap.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain([ddnref.networks.Dense(np.asarray([[1.0, 2.0]]))], "mse")
    >>> x, t = np.asarray([[1.0, 0.0], [0.0, 3.0]]), np.asarray([[1.0], [1.0]])
    >>> w, (v,) = ddnref.curvature.ggn_eigh(chain, x, t, k=1)
    >>> np.abs(v)
    array([[[0., 1.]]])
    """
    ggn = resolve(chain, x, t, batches, progress, groups, subsampling, None, mc_samples, seed, False, throw)

    def pairs(i: int) -> tuple[Array, Any]:
        w, u, scale = top(ggn, i, k, method, zero_rtol, throw)
        group = ggn.options.groups[i]
        return w * ggn.scale, named(ggn.options.chain, group, apply(ggn, group, u * scale))  # e = V ẽ / √λ

    return each(ggn, pairs)


# --- what all functions share -------------------------------------------------------------------------------------


def resolve(
    chain: Any, x: Any, t: Any, batches: Any, progress: Any, groups: Any, subsampling: Any, subsampling_gradient: Any,
    mc_samples: Any, seed: int, gradient: bool, throw: bool,
) -> Ggn:  # fmt: skip
    """Return the Gram matrices of the data, or those that were accumulated before."""
    if isinstance(chain, Ggn):
        data = (x, t, batches, progress, groups, subsampling, subsampling_gradient, mc_samples)
        if any(option is not None for option in data) or seed:
            raise TypeError("A Ggn holds its data and options: pass those to ggn_reducer, and none of them here.")
        if gradient and not chain.options.gradient:
            raise ValueError("The Ggn was accumulated with gradient=False; pass gradient=True to ggn_reducer.")
        return chain
    given = options(chain, groups, subsampling, subsampling_gradient, mc_samples, seed, gradient, throw)
    return accumulated(given, x, t, batches, progress)


def each(ggn: Ggn, function: Callable[[int], Any]) -> Any:
    """Return the result of each group, or of the only one if the caller named none."""
    results = tuple(function(i) for i in range(len(ggn.options.groups)))
    return results if ggn.options.grouped else results[0]


def count(ggn: Ggn, i: int) -> int:
    """Return the rank bound of a group, ``min(D, N M)``."""
    params = ggn.options.chain.params
    d: int = sum(math.prod(params[p].shape) for p in ggn.options.groups[i])
    return min(d, int(ggn.grams[i].shape[-1]))


def top(
    ggn: Ggn, i: int, k: int | None, method: str, zero_rtol: float | None, throw: bool
) -> tuple[Array, Array, Array]:
    """Check k and the method, and return the k largest eigenpairs of one group's Gram matrix, and ``1/√λ``."""
    if method not in _spectrum.METHODS:
        raise ValueError(f'method is {method!r}, expected "auto", "full" or "iterative".')
    bound, n = count(ggn, i), ggn.grams[i].shape[-1]
    wanted = bound if k is None else operator.index(k)
    if not 1 <= wanted <= bound:
        where = f" of group {i}" if ggn.options.grouped else ""
        raise ValueError(
            f"k is {wanted}, expected 1 <= k <= {bound}: the GGN{where} has at most min(D, N M) non-zero eigenvalues, "
            f"for n = N M = {n} columns."
        )
    w, u = _spectrum.pairs(ggn.grams[i], wanted, method, bound)
    return w, u, inverse_roots(w, w[:1], zero_rtol, throw)
