"""Derivatives of the solution of a problem, whatever solved it."""

from ddnref.implicit._derivatives import argmin_vjp, eq_argmin_vjp, ineq_argmin_vjp, lineq_argmin_vjp, root_vjp
from ddnref.implicit._structures import BlockDiagonal, Diagonal, DiagonalPlusLowRank, Products

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
