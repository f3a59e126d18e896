"""Is an operator what it says? `check_operator` holds every statement it makes against products."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ddnref._core.arrays import Array, is_complex, namespace
from ddnref._kernels.public import public
from ddnref.errors import OperatorError
from ddnref.operators._operator import LinearOperator, zeros
from ddnref.operators._statements import STATEMENTS, Given, OperatorCheck

RTOL = 1e-11
VJP_RTOL = 1e-7


class OperatorReport(NamedTuple):
    """What `check_operator` found; ``str(report)`` is a table."""

    passed: bool
    """Whether every statement holds."""
    checks: tuple[OperatorCheck, ...]
    """Every statement that was looked at; none follow one that the others rest on."""

    def __str__(self) -> str:
        return "\n".join(
            f"{c.name:<24}{'passed' if c.passed else 'FAILED':<8}{c.error:>9.1e}  {c.message}".rstrip()
            for c in self.checks
        )


@public
def check_operator(
    operator: LinearOperator,
    x: Array | None = None,
    /,
    *,
    rtol: float = RTOL,
    vjp_rtol: float = VJP_RTOL,
    seed: int = 0,
    throw: bool = True,
) -> OperatorReport:
    r"""Hold every statement of an operator, yours or ours, against products with random vectors.

    Parameters
    ----------
    operator : LinearOperator
        Its parameters float64 or complex128.
    x : (..., \*domain_shape) array, optional
        Tells library, device, dtype and batch axes of the vectors to try. Default: those of the parameters, no batch
        axes; needed for an operator without parameters.
    rtol : float, default 1e-11
        Largest relative error of what holds up to rounding.
    vjp_rtol : float, default 1e-7
        As ``rtol`` of `ddnref.testing.check_vjp`.
    seed : int
    throw : bool, default True
        Raise what fails. With ``False`` it is in the report alone.

    Returns
    -------
    report : OperatorReport

    Raises
    ------
    OperatorError
        A statement does not hold; the message names it and what to look at.
    TypeError, ValueError
        Single precision, in which finite differences show nothing; no `x` where there are no parameters; `x` of another
        shape.

    Notes
    -----
    In this order: shapes; dtypes; arguments left as they are; linearity; the dot-product test
    ``⟨A x, y⟩ = ⟨x, Aᴴ y⟩``; a batch equals its items one by one; ``params_vjp`` against finite differences; the flags
    self-adjoint (``⟨A x, z⟩ = ⟨x, A z⟩``) and positive definite (the smallest eigenvalue that a few power iterations
    find); ``prepare`` and ``gram`` against the products they stand for. A random vector meets a fault of one entry in
    m with about ``1/m`` of its length: far above `rtol`, so that one wrong entry is found. That an indefinite operator
    has passed as positive definite is possible, where the eigenvalues below zero are very few and very small.

    Examples
    --------
    >>> import numpy as np
    >>> twice = lambda params, x: 2 * x
    >>> wrong = lambda params, y: -2 * y
    >>> operator = ddnref.operators.LinearOperator((), twice, wrong, lambda params, y_bar, x: (), (3,), (3,))
    >>> report = ddnref.operators.check_operator(operator, np.zeros(3), throw=False)
    >>> [check.name for check in report.checks if not check.passed]
    ['adjoint']
    """
    given = _given(operator, x, np.random.default_rng(seed), rtol, vjp_rtol)
    checks: list[OperatorCheck] = []
    for statement, decides in STATEMENTS:
        found = [check for check in statement(given) if check is not None]
        checks.extend(found)
        if decides and not all(check.passed for check in found):
            break
    report = OperatorReport(all(check.passed for check in checks), tuple(checks))
    if throw and not report.passed:
        failed = " ".join(f"{c.name}: {c.message}" for c in checks if not c.passed)
        raise OperatorError(f"The operator is not what it says. {failed}")
    return report


def _given(a: LinearOperator, x: Array | None, rng: np.random.Generator, rtol: float, vjp_rtol: float) -> Given:
    xp = namespace(**{f"params[{i}]": p for i, p in enumerate(a.params)}, x=x)
    n = len(a.domain_shape)
    if x is not None and tuple(x.shape[max(0, x.ndim - n) :]) != tuple(a.domain_shape):
        raise ValueError(f"x has shape {tuple(x.shape)}, expected (..., *{tuple(a.domain_shape)}).")
    arrays = [*a.params, *([] if x is None else [x])]
    if any(p.dtype not in (xp.float64, xp.complex128) for p in arrays):
        raise TypeError(
            "check_operator needs params and x of dtype float64 or complex128, got "
            f"{', '.join(str(p.dtype) for p in arrays)}: finite differences in single precision show nothing. Check "
            "the same operator in double precision."
        )
    if x is None:
        x = zeros(tuple(a.domain_shape), a.params[0])
    if any(is_complex(p) for p in arrays):
        x = xp.astype(x, xp.complex128)
    given = Given(a, x, x, rng, rtol, vjp_rtol)
    return given._replace(x=given.random(x))
