"""Linear operators whose parameters are visible arrays: constructors, combinations, checks and wrappers.

Each constructor returns a `LinearOperator`. Combinations also take arrays ``(..., n, m)``, which count as `dense`.
Their parameters are those of their parts, one after the other, and at the end the coefficient if that is an array; a
Python number is a constant. The flags ``self_adjoint`` and ``positive_definite``, which implies the other, state
properties that only `check_operator` tests.

They raise ``TypeError`` for parameters that are not floating arrays of one library, device and precision, or are
complex where a real number is expected, and ``ValueError`` for shapes that do not fit, for an unknown option, and for a
flag that the shape rules out.
"""

from ddnref.operators._check import OperatorCheck, OperatorReport, check_operator
from ddnref.operators._combine import (
    add,
    adjoint,
    block_diagonal,
    compose,
    kronecker,
    normal,
    scaled,
    stack,
    transpose,
)
from ddnref.operators._elementary import as_operator, dense, diagonal, mask
from ddnref.operators._grid import convolution, difference, toeplitz
from ddnref.operators._indexed import coo, from_sparse, laplacian
from ddnref.operators._operator import LinearOperator
from ddnref.operators._scipy import from_scipy, to_scipy

__all__ = [
    "LinearOperator",
    "OperatorCheck",
    "OperatorReport",
    "add",
    "adjoint",
    "as_operator",
    "block_diagonal",
    "check_operator",
    "compose",
    "convolution",
    "coo",
    "dense",
    "diagonal",
    "difference",
    "from_scipy",
    "from_sparse",
    "kronecker",
    "laplacian",
    "mask",
    "normal",
    "scaled",
    "stack",
    "to_scipy",
    "toeplitz",
    "transpose",
]
