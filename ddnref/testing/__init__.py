"""Check derivatives against finite differences: yours or ours, on any array library."""

from ddnref.testing._checker import TANGENTS, Direction, Report, Tangent, assert_vjp, check_vjp, numerical_jvp

__all__ = ["TANGENTS", "Direction", "Report", "Tangent", "assert_vjp", "check_vjp", "numerical_jvp"]
