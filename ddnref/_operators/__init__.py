"""Linear operators with their parameters in the open: what they are, how to build, combine, check and wrap them."""

from ddnref._operators._algebra import adjoint, normal, scaled
from ddnref._operators._check import OperatorReport, check_operator
from ddnref._operators._convolution import convolution
from ddnref._operators._difference import difference
from ddnref._operators._elementary import as_operator, dense, diagonal, mask
from ddnref._operators._foreign import from_scipy, to_scipy
from ddnref._operators._operator import LinearOperator, Params
from ddnref._operators._several import add, compose, stack
from ddnref._operators._statements import OperatorCheck

__all__ = [
    "LinearOperator",
    "OperatorCheck",
    "OperatorReport",
    "Params",
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
