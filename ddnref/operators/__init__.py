"""Linear operators whose parameters are visible arrays: constructors, combinations, checks and wrappers."""

from ddnref.operators._check import OperatorCheck, OperatorReport, check_operator
from ddnref.operators._combine import add, adjoint, compose, normal, scaled, stack
from ddnref.operators._elementary import as_operator, dense, diagonal, mask
from ddnref.operators._grid import convolution, difference
from ddnref.operators._operator import LinearOperator
from ddnref.operators._scipy import from_scipy, to_scipy

__all__ = [
    "LinearOperator",
    "OperatorCheck",
    "OperatorReport",
    "add",
    "adjoint",
    "as_operator",
    "check_operator",
    "compose",
    "convolution",
    "dense",
    "diagonal",
    "difference",
    "from_scipy",
    "mask",
    "normal",
    "scaled",
    "stack",
    "to_scipy",
]
