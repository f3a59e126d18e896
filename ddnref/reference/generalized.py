"""The VJP of the generalised eigenproblem through a Cholesky factor, as textbooks and autograd form it."""

from __future__ import annotations

from ddnref._core.arrays import Array, adjoint, as_dtype
from ddnref._core.checks import conform
from ddnref._kernels.cholesky import cholesky
from ddnref._kernels.dense import hermitian_part, identity
from ddnref._kernels.lu import solve_triangular
from ddnref._kernels.public import public


@public
def eigh_generalized_vjp_cholesky(
    w_bar: Array, v_bar: Array, w: Array, v: Array, a: Array, b: Array, /
) -> tuple[Array, Array]:
    r"""Gradients through ``B = L Lᴴ``, ``L⁻¹ A L⁻ᴴ = Y Λ Yᴴ``, ``V = L⁻ᴴ Y``, one step after the other.

    What automatic differentiation of these steps computes: an oracle for simple eigenvalues, and at repeated ones an
    example of what is lost. Nothing is masked, nothing is checked, and the gradient passes through both factors.

    Parameters
    ----------
    w_bar, v_bar, w, v
        Cotangents and outputs of `ddnref.eigh_generalized`.
    a, b : (..., m, m) arrays
        The matrices.

    Returns
    -------
    a_bar, b_bar : (..., m, m) arrays, Hermitian up to rounding

    Notes
    -----
    With :math:`\bar Y = L^{-1} \bar V`, :math:`F_{ij} = 1/(\lambda_j - \lambda_i)` and :math:`\Phi` the lower triangle
    with half of the diagonal,

    .. math::

        \begin{gathered}
        \bar C = Y (\mathrm{diag}(\bar\lambda) + \tfrac12 F \circ (Y^H \bar Y - \bar Y^H Y)) Y^H, \quad
        \bar A = L^{-H} \bar C L^{-1}, \\
        \bar L = -V \bar Y^H - 2 L^{-H} \bar C C, \quad
        \bar B = \mathrm{sym}(L^{-H} \Phi(L^H \bar L) L^{-1})
        \end{gathered}

    References
    ----------
    .. [1] I. Murray, "Differentiation of the Cholesky decomposition" (2016), section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> a, b = np.diag([12.0, 2.0]), np.diag([4.0, 1.0])
    >>> w, v = ddnref.eigh_generalized(a, b)
    >>> w_bar = np.asarray([0.0, 1.0])
    >>> a_bar, b_bar = ddnref.reference.eigh_generalized_vjp_cholesky(w_bar, 0 * v, w, v, a, b)
    >>> float(a_bar[0, 0]), float(b_bar[0, 0])
    (0.25, -0.75)
    """
    xp = conform("(m,m),(m)r,(m)r,(m,m),(m,m),(m,m)", v=v, w=w, w_bar=w_bar, v_bar=v_bar, a=a, b=b).xp
    l_, _ = cholesky(hermitian_part(b))
    l_h = adjoint(l_)

    def to_left(x: Array) -> Array:
        """``L⁻ᴴ X``."""
        return solve_triangular(l_h, x, lower=False)

    def between(x: Array) -> Array:
        """``L⁻ᴴ X L⁻¹``."""
        return adjoint(to_left(adjoint(to_left(x))))

    # V = L⁻ᴴ Y
    y = l_h @ v
    y_bar = solve_triangular(l_, v_bar, lower=True)
    l_bar = -v @ adjoint(y_bar)

    # C = Y Λ Yᴴ
    eye = identity(v.shape[-1], v)
    gap = as_dtype(w[..., None, :] - w[..., :, None], v) + eye
    m_ = adjoint(y) @ y_bar
    inner = eye * as_dtype(w_bar, v)[..., None, :] + (1 - eye) * (m_ - adjoint(m_)) / (2 * gap)
    c_bar = y @ inner @ adjoint(y)

    # C = L⁻¹ A L⁻ᴴ
    c = (y * w[..., None, :]) @ adjoint(y)
    l_bar = l_bar - 2 * to_left(c_bar @ c)

    # B = L Lᴴ
    lower = xp.tril(l_h @ l_bar)
    return between(c_bar), hermitian_part(between(lower - eye * lower / 2))
