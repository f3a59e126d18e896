"""The Laplace approximation with the Gauss–Newton matrix of all parameters, by its Gram matrix.

With the precision ``H = V Vᵀ + δ I`` of the posterior, ``K = VᵀV``, and the Jacobian J of new outputs:

    log |H| = D log δ + Σ log(1 + λ_i(K) / δ)
    J H⁻¹ Jᵀ = (J Jᵀ − J V (K + δ I)⁻¹ Vᵀ Jᵀ) / δ
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import array_api_compat

from ddnref._core.arrays import Array, full, library
from ddnref._kernels.dense import eigh, hermitian_part, identity
from ddnref._kernels.public import public
from ddnref.curvature._gram import not_negative
from ddnref.curvature.ggn._columns import Columns
from ddnref.curvature.ggn._network import Network, network_of
from ddnref.curvature.ggn._state import Shard, cross, refuse_non_finite_samples
from ddnref.networks._checks import bad_targets, marked

SAMPLES = 64  # new samples whose covariances are computed at once: more take more memory, fewer more passes


class Laplace(NamedTuple):
    """The Laplace approximation of a network's posterior, as far as it was asked for."""

    log_evidence: Array
    """(): the logarithm of the marginal likelihood."""
    mean: Array | None
    """(N', C): the outputs of new samples."""
    covariance: Array | None
    """(N', C, C): their covariance."""


@public
def ggn_laplace(
    chain: Any, x: Array, t: Array, *, precision: float, x_new: Array | None = None, throw: bool = True
) -> Laplace:
    r"""Return evidence and predictive covariance of the Laplace approximation with the full Gauss–Newton matrix.

    Parameters
    ----------
    chain : Chain, or object from `ddnref.interop.torch.ggn`
        A network whose parameters are at a minimum of the penalised loss, which is not checked. The loss of a sample is
        its negative log-likelihood, and is summed whatever the reduction: under ``reduction="mean"`` the squared error
        is a mean over the outputs, so pass "sum".
    x, t
        Samples and targets, as in `ggn_eigvalsh`.
    precision : float
        Precision δ of the prior, a normal distribution of mean zero for each parameter.
    x_new : (N', ...) array, optional
        Samples whose outputs are predicted. Default: the evidence alone.
    throw : bool, default True
        As in `ggn_eigvalsh`.

    Returns
    -------
    laplace : Laplace
        ``log_evidence``, and for `x_new` ``mean (N', C)`` and ``covariance (N', C, C)``, of the outputs linearised in
        the parameters, without the noise of an observation. Outputs ``(N', T, C)`` come as ``(N', T C)``.

    Raises
    ------
    ValueError
        `precision` is not positive. Otherwise as `ggn_eigvalsh`.
    TypeError, NonFiniteError
        As `ggn_eigvalsh`.

    See Also
    --------
    ggn_eigvalsh

    Notes
    -----
    .. math::

       \begin{gathered}
       \log p(t) = -\sum_n \ell_n - \tfrac{\delta}{2} |\theta|^2 - \tfrac12 \sum_i \log(1 + \lambda_i / \delta), \\
       \Sigma = \tfrac1\delta \left( J J^T - J V (V^T V + \delta I)^{-1} V^T J^T \right)
       \end{gathered}

    with the eigenvalues λ of :math:`V^T V`. Both are exact for the Gauss–Newton matrix of all D parameters, and no D×D
    matrix is formed. The covariance has an absolute error of eps times that of the prior, :math:`J J^T / \delta`.

    Cost, with n = N M columns: that of `ggn_eigh`, and about ``n C Σ a_out + 2 n² C`` flops for each new sample.

    References
    ----------
    .. [1] E. Daxberger et al., "Laplace Redux - Effortless Bayesian Deep Learning", NeurIPS (2021), sections 2 and 3.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain([ddnref.networks.Dense(np.asarray([[0.5]]))], "mse", "sum")
    >>> x = np.asarray([[1.0]])
    >>> found = ddnref.curvature.ggn_laplace(chain, x, x, precision=2.0, x_new=x)
    >>> found.covariance  # 1 / (2 + 2), because the second derivative of a square is 2
    array([[[0.25]]])
    """
    if isinstance(precision, bool) or not isinstance(precision, (int, float)):
        raise TypeError(f"precision is a {type(precision).__name__}, expected a number.")
    if not 0 < precision < math.inf:
        raise ValueError(f"precision is {precision}, expected a finite number above 0: that of the prior.")
    library(x=x, t=t, x_new=x if x_new is None else x_new)
    if x.shape[0] == 0:
        raise ValueError("x holds no samples, and the evidence of no data is that of the prior.")
    network = network_of(chain)
    xp = array_api_compat.array_namespace(x)
    group = tuple(range(len(network.params)))
    # The columns of V, without a factor of the mean
    y, loss, back = network.linearised(x)
    bad = bad_targets(loss, "sum", y, t, throw)
    s = xp.moveaxis(loss.hessian_sqrt(y, t), -1, 0)
    columns = back(marked(s, bad))
    gram = cross(columns, columns, group, symmetric=True)
    if throw:
        refuse_non_finite_samples(gram, (Shard(columns, (), s.shape[0], s.shape[1]),))
    w, u = eigh(gram)
    w = not_negative(w)
    size = sum((xp.sum(p * p) for p in network.params), full((), 0.0, y))
    misfit = xp.sum(marked(loss.value(y, t), bad))
    log_evidence = -misfit - precision / 2 * size - xp.sum(xp.log1p(w / precision)) / 2
    if x_new is None:
        return Laplace(log_evidence, None, None)
    # A few new samples at a time
    parts = [
        _predicted(network, x_new[i : min(i + SAMPLES, x_new.shape[0]), ...], columns, group, w, u, precision)
        for i in range(0, x_new.shape[0], SAMPLES)
    ]
    if not parts:
        c = y.shape[1]
        return Laplace(log_evidence, y[:0, :], xp.reshape(y[:0, :], (0, c, 1)) * xp.reshape(y[:0, :], (0, 1, c)))
    mean, covariance = (xp.concat(some, axis=0) for some in zip(*parts, strict=True))
    return Laplace(log_evidence, mean, covariance)


def _predicted(
    network: Network, x: Array, columns: tuple[Columns, ...], group: tuple[int, ...], w: Array, u: Array,
    precision: float,
) -> tuple[Array, Array]:  # fmt: skip
    """Return the outputs of some samples and their covariances."""
    y, _, back = network.linearised(x)
    xp, (n, c) = array_api_compat.array_namespace(y), y.shape
    # The rows of J: a cotangent of one for each output of each sample
    unit = xp.broadcast_to(identity(c, y)[:, None, :], (c, n, c))
    rows = back(unit)
    # J Jᵀ and J V, of which the blocks of each sample are needed
    whole = xp.reshape(cross(rows, rows, group, symmetric=True), (c, n, c, n))
    prior = xp.stack([whole[:, i, :, i] for i in range(n)], axis=0)
    mixed = xp.reshape(cross(rows, columns, group) @ (u / xp.sqrt(w + precision)), (c, n, -1))
    mixed = xp.moveaxis(mixed, 1, 0)
    return y, hermitian_part(prior - mixed @ xp.matrix_transpose(mixed)) / precision
