"""Check derivatives against finite differences and each other: yours or ours, on any array library."""

from ddnref.testing._differences import TANGENTS, Tangent, numerical_jvp
from ddnref.testing._jvp import assert_jvp, assert_transpose, check_jvp, check_transpose
from ddnref.testing._report import Direction, Pairing, Report, TransposeReport
from ddnref.testing._vjp import assert_vjp, check_vjp

__all__ = [
    "TANGENTS",
    "Direction",
    "Pairing",
    "Report",
    "Tangent",
    "TransposeReport",
    "assert_jvp",
    "assert_transpose",
    "assert_vjp",
    "check_jvp",
    "check_transpose",
    "check_vjp",
    "numerical_jvp",
]
