"""Conjugate gradients reversed through their stored iterates, as automatic differentiation of the solver computes it.

    forward   q = A p,  σ = p·q,  α = ρ/σ,  x ← x + α p,  r' = r − α q,  ρ' = r'·r',  β = ρ'/ρ,  p' = r' + β p
    reverse   β̄ = p̄'·p,  ρ̄' += β̄/ρ,  r̄' += p̄' + 2 ρ̄' r',  ᾱ = x̄·p − r̄'·q,  σ̄ = −ᾱ α/σ,  q̄ = σ̄ p − α r̄',
              p̄ = β p̄' + α x̄ + σ̄ q + Aᵀ q̄,  ρ̄ = ᾱ/σ − β̄ β/ρ,  θ̄ += vjp_θ[A p](q̄),  r̄ = r̄'

Memory grows by three vectors per step, and the gradient of the parameters is unstable. Conjugate gradients lose the
orthogonality of their residuals to rounding without harm to x, but the reverse pass amplifies the loss. For a blur
with a ridge the gradient is off by a factor of 10,000 after 180 steps, when x has seven correct digits. The implicit
gradient, one solve with Aᴴ, stores nothing and has the accuracy of that solve.
"""

from __future__ import annotations

from typing import NamedTuple

from ddnref._core.arrays import Array, namespace, namespace_of
from ddnref._core.checks import check_dtypes, check_real, check_shapes
from ddnref.operators import LinearOperator
from ddnref.operators._operator import Params


class Step(NamedTuple):
    """The vectors before one step and its numbers, which the reverse pass needs."""

    r: Array
    p: Array
    q: Array
    rho: Array
    sigma: Array


def cg_unrolled(operator: LinearOperator, b: Array, /, n_iter: int) -> tuple[Array, tuple[Step, ...]]:
    r"""Take `n_iter` steps of conjugate gradients from zero, and keep every iterate.

    Parameters
    ----------
    operator : LinearOperator
        A real operator, symmetric positive definite.
    b : (..., \*domain_shape) array, real
    n_iter : int

    Returns
    -------
    x : (..., \*domain_shape) array
    saved : tuple of Step
        Three vectors per step, for `cg_unrolled_vjp`.

    Raises
    ------
    TypeError, ValueError
        Complex arrays, mixed libraries or dtypes; shapes that do not fit.
    """
    xp = namespace(b=b, **{f"params[{i}]": parameter for i, parameter in enumerate(operator.params)})
    check_real(b=b)
    k = len(operator.domain_shape)
    check_shapes(b=(b, (*b.shape[: b.ndim - k], *operator.domain_shape)))
    x, r, p, rho = xp.zeros_like(b), b, b, _dots(b, b, k)
    saved = []
    for _ in range(n_iter):
        q = operator(p)  # the only product with A
        sigma = _dots(p, q, k)
        saved.append(Step(r, p, q, rho, sigma))
        alpha = rho / sigma
        x, r = x + alpha * p, r - alpha * q
        rho_next = _dots(r, r, k)
        p, rho = r + rho_next / rho * p, rho_next
    return x, tuple(saved)


def cg_unrolled_vjp(
    x_bar: Array, b: Array, saved: tuple[Step, ...], operator: LinearOperator, /
) -> tuple[Params, Array]:
    """Gradient with respect to the operator's parameters and b, ``(params_bar, b_bar)``, through every step.

    `b`, `saved` and `operator` are the arguments and the result of `cg_unrolled`. Errors are the same, with
    ``ValueError`` also where nothing is saved.
    """
    xp = namespace(x_bar=x_bar, b=b)
    check_dtypes(x_bar=(x_bar, b.dtype))
    check_shapes(x_bar=(x_bar, tuple(b.shape)))
    if not saved:
        raise ValueError("saved is empty: without a step x does not depend on anything.")
    k = len(operator.domain_shape)
    r_bar, p_bar, rho_bar = xp.zeros_like(b), xp.zeros_like(b), xp.zeros_like(saved[0].rho)
    params_bar = tuple(xp.zeros_like(parameter) for parameter in operator.params)
    for step in reversed(saved):
        r, p, q, rho, sigma = step
        # Recompute the numbers of the step that were not kept.
        alpha = rho / sigma
        r_next = r - alpha * q
        beta = _dots(r_next, r_next, k) / rho
        # Reverse the assignments of the step, last to first.
        beta_bar = _dots(p_bar, p, k)
        r_bar = r_bar + p_bar + 2 * (rho_bar + beta_bar / rho) * r_next
        alpha_bar = _dots(x_bar, p, k) - _dots(r_bar, q, k)
        sigma_bar = -alpha_bar * alpha / sigma
        q_bar = sigma_bar * p - alpha * r_bar
        p_bar = beta * p_bar + alpha * x_bar + sigma_bar * q + operator.adjoint(operator.params, q_bar)
        rho_bar = alpha_bar / sigma - beta_bar * beta / rho
        # The step reads the parameters in its product; the contributions of all steps add up.
        more = operator.params_vjp(operator.params, q_bar, p)
        params_bar = tuple(total + part for total, part in zip(params_bar, more, strict=True))
    # At the start r, p and ρ = b·b all come from b.
    return params_bar, r_bar + p_bar + 2 * rho_bar * b


def _dots(y: Array, z: Array, k: int) -> Array:
    """``y · z`` over the last k axes, kept with length one."""
    return namespace_of(y).sum(y * z, axis=tuple(range(-k, 0)), keepdims=True)
