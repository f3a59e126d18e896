"""Linear operators with their parameters in the open: what they are, how to build, combine, check and wrap them."""

from ddnref.operators._algebra import adjoint, normal, scaled
from ddnref.operators._check import OperatorReport, check_operator
from ddnref.operators._combine import add, compose, stack
from ddnref.operators._convolution import convolution
from ddnref.operators._difference import difference
from ddnref.operators._elementary import as_operator, dense, diagonal, mask
from ddnref.operators._operator import LinearOperator
from ddnref.operators._scipy import from_scipy, to_scipy
from ddnref.operators._statements import OperatorCheck

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
