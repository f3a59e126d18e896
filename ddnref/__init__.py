"""ddnref: forward solvers and explicit, verified VJPs on the Python array API."""

from ddnref import testing
from ddnref._eigh import eigh, eigh_vjp, gauge_residual
from ddnref._eigsh import EigshInfo, eigsh, eigsh_fwd
from ddnref._eigsh_vjp import EigshVjpInfo, eigsh_vjp
from ddnref._errors import (
    ConvergenceError,
    DdnrefError,
    GaugeError,
    NonFiniteError,
    OptimalityError,
    SingularError,
)
from ddnref._matrix_functions import (
    expm,
    expm_fwd,
    expm_vjp,
    invsqrtm,
    invsqrtm_fwd,
    invsqrtm_vjp,
    logm,
    logm_fwd,
    logm_vjp,
    sqrtm,
    sqrtm_fwd,
    sqrtm_vjp,
)
from ddnref._spectral import spectral_function, spectral_function_fwd, spectral_function_vjp
from ddnref._topk import eigh_topk, eigh_topk_fwd, eigh_topk_vjp

__version__ = "0.1.0.dev0"
__all__ = [
    "ConvergenceError",
    "DdnrefError",
    "EigshInfo",
    "EigshVjpInfo",
    "GaugeError",
    "NonFiniteError",
    "OptimalityError",
    "SingularError",
    "eigh",
    "eigh_topk",
    "eigh_topk_fwd",
    "eigh_topk_vjp",
    "eigh_vjp",
    "eigsh",
    "eigsh_fwd",
    "eigsh_vjp",
    "expm",
    "expm_fwd",
    "expm_vjp",
    "gauge_residual",
    "invsqrtm",
    "invsqrtm_fwd",
    "invsqrtm_vjp",
    "logm",
    "logm_fwd",
    "logm_vjp",
    "spectral_function",
    "spectral_function_fwd",
    "spectral_function_vjp",
    "sqrtm",
    "sqrtm_fwd",
    "sqrtm_vjp",
    "testing",
]
