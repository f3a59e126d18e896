"""ddnref: forward solvers and explicit, verified derivatives on the Python array API.

The top level has everything of `ddnref.linalg` and the error classes. All else is in the subject modules.
"""

from ddnref import curvature, errors, implicit, interop, krylov, linalg, networks, nodes, operators, reference, testing
from ddnref.errors import *  # noqa: F403
from ddnref.linalg import *  # noqa: F403

__version__ = "0.1.0"
__all__ = [
    "curvature",
    "errors",
    "implicit",
    "interop",
    "krylov",
    "linalg",
    "networks",
    "nodes",
    "operators",
    "reference",
    "testing",
]
__all__ += errors.__all__
__all__ += linalg.__all__
