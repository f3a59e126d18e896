"""Derivatives of the solution of a problem, whatever solved it."""

from ddnref.implicit._custom import ImplicitFunction, custom_argmin, custom_root
from ddnref.implicit._derivatives import (
    argmin_jvp,
    argmin_vjp,
    eq_argmin_jvp,
    eq_argmin_vjp,
    ineq_argmin_jvp,
    ineq_argmin_vjp,
    lineq_argmin_jvp,
    lineq_argmin_vjp,
    root_jvp,
    root_vjp,
)
from ddnref.implicit._point import NodeInfo
from ddnref.implicit._structures import BlockDiagonal, Diagonal, DiagonalPlusLowRank, Products

__all__ = [
    "BlockDiagonal",
    "Diagonal",
    "DiagonalPlusLowRank",
    "ImplicitFunction",
    "NodeInfo",
    "Products",
    "argmin_jvp",
    "argmin_vjp",
    "custom_argmin",
    "custom_root",
    "eq_argmin_jvp",
    "eq_argmin_vjp",
    "ineq_argmin_jvp",
    "ineq_argmin_vjp",
    "lineq_argmin_jvp",
    "lineq_argmin_vjp",
    "root_jvp",
    "root_vjp",
]
