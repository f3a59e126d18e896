"""Krylov methods for linear systems and least squares.

`cg` describes the arguments, the results and the errors that all methods share, and when the residual is computed
afresh. The docstrings of the others say what differs.
"""

from ddnref.krylov._bicgstab import bicgstab
from ddnref.krylov._cg import cg
from ddnref.krylov._gmres import gmres
from ddnref.krylov._lsmr import LeastSquaresInfo, lsmr
from ddnref.krylov._minres import minres
from ddnref.krylov._system import Progress, SolveInfo

__all__ = [
    "LeastSquaresInfo",
    "Progress",
    "SolveInfo",
    "bicgstab",
    "cg",
    "gmres",
    "lsmr",
    "minres",
]
