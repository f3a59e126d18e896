"""Value facts that a caller must hear about: each says what happened, why it is likely, what to pass instead."""

__all__ = [
    "ConvergenceError",
    "DdnrefError",
    "GaugeError",
    "NonFiniteError",
    "OperatorError",
    "OptimalityError",
    "SingularError",
]


class DdnrefError(ArithmeticError):
    """Base of the errors raised for the *values* of the inputs; static facts raise TypeError or ValueError."""


class GaugeError(DdnrefError):
    """The loss depends on a choice inside an eigenspace that the matrix does not determine."""


class SingularError(DdnrefError):
    """A function or its derivative is not finite at the given matrix."""


class NonFiniteError(DdnrefError):
    """An input contains NaN or infinity, and the caller asked to hear about it."""


class ConvergenceError(DdnrefError):
    """An iteration did not reach its tolerance within its limit."""


class OperatorError(DdnrefError):
    """A linear operator is not what it says, such as an adjoint that is not one."""


class OptimalityError(DdnrefError):
    """A point handed to a declarative node does not solve the problem that the node states."""
