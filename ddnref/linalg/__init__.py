"""Decompositions, functions of matrices and linear systems, each with its derivatives."""

from ddnref._core.loops import IterationInfo
from ddnref.linalg._eigh import eigh, eigh_topk, eigh_topk_fwd, eigh_topk_vjp, eigh_vjp, gauge_residual
from ddnref.linalg._eigsh import EigshInfo, EigshVjpInfo, eigsh, eigsh_fwd, eigsh_vjp
from ddnref.linalg._functions import (
    expm,
    expm_fwd,
    expm_vjp,
    invsqrtm,
    invsqrtm_fwd,
    invsqrtm_vjp,
    logm,
    logm_fwd,
    logm_vjp,
    spectral_function,
    spectral_function_fwd,
    spectral_function_vjp,
    sqrtm,
    sqrtm_fwd,
    sqrtm_vjp,
)
from ddnref.linalg._iterations import (
    power_iteration,
    power_iteration_vjp,
    simultaneous_iteration,
    simultaneous_iteration_vjp,
)
from ddnref.linalg._linear_solve import linear_solve, linear_solve_jvp, linear_solve_vjp
from ddnref.linalg._qr import qr, qr_vjp
from ddnref.linalg._residuals import align_signs, eigen_residual, fixed_point_residual
from ddnref.linalg._solve import solve, solve_fwd, solve_vjp

__all__ = [
    "EigshInfo",
    "EigshVjpInfo",
    "IterationInfo",
    "align_signs",
    "eigen_residual",
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
    "fixed_point_residual",
    "gauge_residual",
    "invsqrtm",
    "invsqrtm_fwd",
    "invsqrtm_vjp",
    "linear_solve",
    "linear_solve_jvp",
    "linear_solve_vjp",
    "logm",
    "logm_fwd",
    "logm_vjp",
    "power_iteration",
    "power_iteration_vjp",
    "qr",
    "qr_vjp",
    "simultaneous_iteration",
    "simultaneous_iteration_vjp",
    "solve",
    "solve_fwd",
    "solve_vjp",
    "spectral_function",
    "spectral_function_fwd",
    "spectral_function_vjp",
    "sqrtm",
    "sqrtm_fwd",
    "sqrtm_vjp",
]
