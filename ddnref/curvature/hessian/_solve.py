"""Solve with the Hessian of a network's loss, damped, and the derivative of that."""

from __future__ import annotations

from collections.abc import Sequence

import array_api_compat

from ddnref._core.arrays import Array, double, is_true, library, namespace
from ddnref._core.checks import check_real, check_shapes
from ddnref._kernels.public import public
from ddnref.curvature.hessian import _choice as _paths
from ddnref.curvature.hessian._dense_blocks import space
from ddnref.curvature.hessian._factor import HessianFactor
from ddnref.curvature.hessian._network import System, exact_copy, system
from ddnref.curvature.hessian._result import HessianSolveInfo
from ddnref.errors import NonFiniteError, SingularError
from ddnref.networks._chain import Chain

CURVATURES = ("hessian", "ggn")


@public
def hessian_factor(
    chain: Chain,
    x: Array,
    t: Array,
    /,
    *,
    damping: float | Array,
    curvature: str = "hessian",
    method: str = "auto",
) -> HessianFactor:
    r"""Factor ``H + damping·I``, H the Hessian of a network's loss in all its weights, in time linear in its depth.

    Parameters
    ----------
    chain : Chain
        Of `Dense` and `Flatten` layers and `Residual` blocks of them; with other layers only while the matrix is
        small enough to be formed (6000 parameters).
    x : (N, ...) array
        Samples, in the dtype of the weights.
    t : array
        Targets, as `Chain.loss` takes them.
    damping : float or array without axes
        ε: a positive number damps a Newton step, minus a number shifts the spectrum.
    curvature : {"hessian", "ggn"}
        The Hessian, or the generalised Gauss–Newton matrix.
    method : {"auto", "tridiagonal", "riccati", "qr", "dense"}
        "tridiagonal" eliminates pre-activations and needs a plain chain with linearly independent samples in every
        layer, fewer than its inputs; "riccati" eliminates weights and takes every chain; "qr" is stable for every
        damping and two to fifteen times slower; "dense" forms the matrix. "auto" takes the fastest and falls back to a
        stable one for a solution that is not good enough (see `Notes`).

    Returns
    -------
    HessianFactor
        With ``solve(b) -> (x, info)``, ``slogdet()``, ``inertia()``, and estimates ``flops`` and ``nbytes``.

    Raises
    ------
    NonFiniteError
        Weights or data are not finite.
    SingularError
        `damping` is zero and some weights have no influence: more inputs than samples.
    TypeError, ValueError
        Mixed libraries or dtypes, shapes that do not fit, a damping that is complex or not finite, unknown options,
        an empty batch, a layer that the sweeps do not take, tensors that require grad.

    See Also
    --------
    hessian_solve : one solve.
    hessian_eigvals : eigenvalues and eigenvectors.
    hessian_eigval_count : how many eigenvalues lie in an interval.

    Notes
    -----
    The second-order expansion of the loss is a linear-quadratic control problem: the weights of a layer steer the
    tangents of the activations. Eliminating layer by layer, from the last to the first, solves it exactly. A layer of
    N samples and width a costs ``(14/3) (N a)³`` flops where N < a (the weights' a² dimensions shrink to 2 N a), not
    a⁶; memory is ``2 (N a)²`` numbers per layer.

    Arithmetic is in float64 wherever the library has it, whatever the dtype of the weights: the inverse at small
    damping has no digits in float32. Solutions come back in the dtype of the weights.

    Rule of "auto", by estimated time: the fast elimination ("tridiagonal" where it applies, else "riccati") or the
    dense matrix, whichever is cheaper; a solution whose backward error stays above ``factor.rtol`` (1e-15) after
    refinement is solved for again by the cheaper of "qr" and "dense". ``damping=0`` starts there.

    References
    ----------
    .. [1] A. Rahimi, "The Hessian of tall-skinny networks is easy to invert" (2025).
    .. [2] J. C. Dunn, D. P. Bertsekas, "Efficient dynamic programming implementations of Newton's method for
       unconstrained optimal control problems", J. Optim. Theory Appl. 63 (1989).

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.mlp(8, 8, 3, 30, bias=False)
    >>> x, t = np.ones((1, 8)), np.asarray([2])
    >>> factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1)
    >>> step, info = factor.solve(chain.gradient(x, t))
    >>> bool(info.backward_error < 1e-15), factor.inertia().zero
    (True, 0)
    """
    if curvature not in CURVATURES:
        raise ValueError(f'curvature is {curvature!r}, expected "hessian" or "ggn".')
    check_method(method)
    epsilon = _damping(damping, x)
    s = prepared(chain, x, t, curvature)
    if s.terms is not None and is_true(epsilon == 0):
        refuse_null_space(s, "damping", "Pass a damping, such as 1e-3 times the largest eigenvalue.")
    if s.terms is not None and method == "tridiagonal":
        _paths.check_tridiagonal(s.terms)
    return HessianFactor(s, epsilon, method, double(space(x), x), chain.params)


def check_method(method: str) -> None:
    """``ValueError`` for a path that does not exist."""
    if method not in _paths.METHODS:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, _paths.METHODS))}.")


def prepared(chain: Chain, x: Array, t: Array, curvature: str) -> System:
    """The terms of the expansion, after all checks of chain and data."""
    library(x=x, t=t)
    if x.ndim and x.shape[0] == 0:
        raise ValueError("x holds no samples: there is no Hessian to factor.")
    chain.loss(x, t)  # static facts and targets
    s = system(chain, x, t, curvature)
    if s.terms is not None:
        xp = space(x)
        arrays = [s.terms.curvature, *(layer.beta for layer in s.terms.layers), *(z.z for z in s.terms.layers)]
        if not is_true(xp.all(xp.stack([xp.all(xp.isfinite(array)) for array in arrays]))):
            raise NonFiniteError(
                "The derivatives of the loss contain NaN or infinity. Likely NaN in weights, data or targets, or "
                "activations that overflow with depth. Look at chain.loss(x, t) first."
            )
    return s


def _damping(damping: float | Array, x: Array) -> float | Array:
    if array_api_compat.is_array_api_obj(damping):
        namespace(damping=damping, x=x)
        check_real(damping=damping)
        check_shapes(damping=(damping, ()))
        if not is_true(space(x).isfinite(damping)):
            raise ValueError(f"damping is {float(damping)}, expected a finite number.")
        return exact_copy(damping)
    if not isinstance(damping, (int, float)):
        raise TypeError(f"damping is a {type(damping).__name__}, expected a number or an array without axes.")
    if not abs(float(damping)) < float("inf"):
        raise ValueError(f"damping is {damping}, expected a finite number.")
    return float(damping)


def refuse_null_space(s: System, name: str, instead: str) -> None:
    """`SingularError` for a shift of zero where there are fewer samples than a layer has inputs and outputs."""
    if s.terms is None:
        return
    free = 0
    for layer in s.terms.layers:
        n, width = layer.z.shape
        free += max(0, layer.weight.shape[0] - n) * max(0, width - n)
    if free:
        raise SingularError(
            f"{name} is zero and the Hessian is singular: with {s.terms.curvature.shape[0]} samples at least {free} "
            f"of its {s.total} eigenvalues are zero, those of weights that no sample sees. {instead}"
        )


@public
def hessian_solve(
    chain: Chain,
    x: Array,
    t: Array,
    b: Sequence[Array],
    /,
    *,
    damping: float | Array,
    curvature: str = "hessian",
    method: str = "auto",
    refine: str | int = "auto",
    throw: bool = True,
) -> tuple[list[Array], HessianSolveInfo]:
    r"""``(H + damping·I)⁻¹ b``, H the Hessian of a network's loss, in time linear in its depth.

    Parameters
    ----------
    chain, x, t, damping, curvature, method
        As in `hessian_factor`.
    b : list of arrays, shaped like ``chain.params``
        Right-hand side; several with one leading axis on every entry.
    refine, throw
        As in `HessianFactor.solve`.

    Returns
    -------
    solution : list of arrays like `b`
    info : HessianSolveInfo

    Raises
    ------
    ConvergenceError
        The backward error stayed above 1e-15 (double precision, up to 20 layers; see `HessianFactor`).
    SingularError
        ``H + damping·I`` is singular to working precision.
    NonFiniteError
        Weights, data or `b` are not finite.
    TypeError, ValueError
        As `hessian_factor`; `b` is not shaped like the parameters.

    See Also
    --------
    hessian_factor : factor once, solve often.
    hessian_solve_vjp : its derivative with respect to `b` and `damping`.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.from_arrays([np.asarray([[2.0]])], activation="identity", loss="mse")
    >>> x, t = np.asarray([[1.0]]), np.asarray([[1.0]])  # the loss (w - 1)² has the Hessian 2
    >>> ddnref.curvature.hessian_solve(chain, x, t, [np.asarray([[5.0]])], damping=0.5)[0]
    [array([[2.]])]
    """
    factor = hessian_factor(chain, x, t, damping=damping, curvature=curvature, method=method)
    return factor.solve(b, refine=refine, throw=throw)


@public
def hessian_solve_vjp(
    x_bar: Sequence[Array],
    x: Sequence[Array],
    factor: HessianFactor,
    /,
    *,
    refine: str | int = "auto",
    throw: bool = True,
) -> tuple[tuple[list[Array], Array], HessianSolveInfo]:
    r"""Cotangents of the right-hand side and the damping of a solve with the Hessian: one more solve.

    Parameters
    ----------
    x_bar : list of arrays
        Cotangent of the solution.
    x : list of arrays
        The solution; both shaped like the parameters, or with one leading axis on every entry.
    factor : HessianFactor
        That gave the solution.
    refine, throw
        As in `HessianFactor.solve`.

    Returns
    -------
    (b_bar, damping_bar) : list of arrays like `x_bar`, and an array without axes
        The damping is shared by all right-hand sides: its cotangent is summed over them.
    info : HessianSolveInfo
        Of that solve.

    Raises
    ------
    ConvergenceError, SingularError, NonFiniteError, TypeError, ValueError
        As `hessian_solve`.

    Notes
    -----
    .. math:: \bar b = (H + \varepsilon I)^{-1} \bar x, \qquad \bar\varepsilon = -\langle \bar b, x \rangle

    There is no cotangent of weights and data: it would take third derivatives of the network.

    Examples
    --------
    >>> import numpy as np
    >>> chain = ddnref.networks.Chain.from_arrays([np.asarray([[2.0]])], activation="identity", loss="mse")
    >>> factor = ddnref.curvature.hessian_factor(chain, np.asarray([[1.0]]), np.asarray([[1.0]]), damping=0.5)
    >>> x, _ = factor.solve([np.asarray([[5.0]])])
    >>> ddnref.curvature.hessian_solve_vjp([np.asarray([[1.0]])], x, factor)[0]
    ([array([[0.4]])], np.float64(-0.8))
    """
    factor.check("x", x)
    factor.check("x_bar", x_bar, finite=throw)
    if x[0].ndim != x_bar[0].ndim:
        raise ValueError(f"x_bar[0] has shape {tuple(x_bar[0].shape)}, expected {tuple(x[0].shape)} of x[0].")
    b_bar, info = factor.solve(x_bar, refine=refine, throw=throw)
    return (b_bar, -factor.paired(b_bar, x)), info
