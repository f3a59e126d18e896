"""Derivatives of the solution of a problem, whatever solved it."""

from ddnref.implicit._bordered import (
    BlockDiagonal,
    Diagonal,
    DiagonalPlusLowRank,
    Products,
)
from ddnref.implicit._derivatives import (
    argmin_vjp,
    eq_argmin_vjp,
    ineq_argmin_vjp,
    lineq_argmin_vjp,
    root_vjp,
)

__all__ = [
    "BlockDiagonal",
    "Diagonal",
    "DiagonalPlusLowRank",
    "Products",
    "argmin_vjp",
    "eq_argmin_vjp",
    "ineq_argmin_vjp",
    "lineq_argmin_vjp",
    "root_vjp",
]
