"""ddnref: forward solvers and explicit, verified VJPs on the Python array API."""

from ddnref import testing
from ddnref._bordered import BlockDiagonal, Diagonal, DiagonalPlusLowRank, Products
from ddnref._eigh import eigh, eigh_vjp, gauge_residual
from ddnref._eigsh import EigshInfo, eigsh, eigsh_fwd
from ddnref._eigsh_vjp import EigshVjpInfo, eigsh_vjp
from ddnref._errors import (
    ConvergenceError,
    DdnrefError,
    GaugeError,
    NonFiniteError,
    OperatorError,
    OptimalityError,
    SingularError,
)
from ddnref._ggn._directional import DirectionalDerivatives, ggn_damped_newton, ggn_directional_derivatives
from ddnref._ggn._functions import ggn_eigh, ggn_eigvalsh
from ddnref._ggn._state import Ggn, GgnState, ggn_reducer
from ddnref._gram import gram_eigh, gram_eigh_fwd, gram_eigh_vjp
from ddnref._gram_values import gram_eigvalsh, gram_eigvalsh_fwd, gram_eigvalsh_vjp
from ddnref._hessian._factor import HessianFactor, Inertia
from ddnref._hessian._result import HessianSolveInfo
from ddnref._hessian._solve import hessian_factor, hessian_solve, hessian_solve_vjp
from ddnref._hessian._spectrum import EigvalCountInfo, hessian_eigval_count, hessian_eigvals
from ddnref._implicit import argmin_vjp, eq_argmin_vjp, ineq_argmin_vjp, lineq_argmin_vjp, root_vjp
from ddnref._iteration import power_iteration, simultaneous_iteration
from ddnref._iteration_vjp import power_iteration_vjp, simultaneous_iteration_vjp
from ddnref._krylov._bicgstab import bicgstab
from ddnref._krylov._cg import cg
from ddnref._krylov._common import Progress, SolveInfo
from ddnref._krylov._gmres import gmres
from ddnref._krylov._lsmr import LeastSquaresInfo, lsmr
from ddnref._krylov._minres import minres
from ddnref._linear_solve import linear_solve, linear_solve_vjp
from ddnref._linear_solve_jvp import linear_solve_jvp
from ddnref._loops import IterationInfo
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
from ddnref._network._activations import Activation
from ddnref._network._blocks import Frozen, Residual
from ddnref._network._chain import Chain
from ddnref._network._convolution import Conv2d
from ddnref._network._layers import Dense, Flatten
from ddnref._network._losses import Loss
from ddnref._network._user import Layer
from ddnref._nodes._least_squares import (
    least_squares_on_sphere,
    least_squares_on_sphere_vjp,
    weighted_least_squares,
    weighted_least_squares_vjp,
)
from ddnref._nodes._projections import (
    project_ball,
    project_ball_vjp,
    project_simplex,
    project_simplex_vjp,
    project_sphere,
    project_sphere_vjp,
)
from ddnref._nodes._robust_pool import RobustPoolInfo, robust_pool, robust_pool_vjp
from ddnref._nodes._sinkhorn import SinkhornInfo, sinkhorn, sinkhorn_vjp
from ddnref._operators import (
    LinearOperator,
    OperatorCheck,
    OperatorReport,
    add,
    adjoint,
    as_operator,
    check_operator,
    compose,
    convolution,
    dense,
    diagonal,
    difference,
    from_scipy,
    mask,
    normal,
    scaled,
    stack,
    to_scipy,
)
from ddnref._pairs import align_signs, eigen_residual, fixed_point_residual
from ddnref._qr import qr, qr_vjp
from ddnref._reducers import GramState, Reducer, SumState, gram_reducer, sum_reducer
from ddnref._solve import solve, solve_fwd, solve_vjp
from ddnref._spectral import spectral_function, spectral_function_fwd, spectral_function_vjp
from ddnref._topk import eigh_topk, eigh_topk_fwd, eigh_topk_vjp

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "BlockDiagonal",
    "Chain",
    "Conv2d",
    "ConvergenceError",
    "DdnrefError",
    "Dense",
    "Diagonal",
    "DiagonalPlusLowRank",
    "DirectionalDerivatives",
    "EigshInfo",
    "EigshVjpInfo",
    "EigvalCountInfo",
    "Flatten",
    "Frozen",
    "GaugeError",
    "Ggn",
    "GgnState",
    "GramState",
    "HessianFactor",
    "HessianSolveInfo",
    "Inertia",
    "IterationInfo",
    "Layer",
    "LeastSquaresInfo",
    "LinearOperator",
    "Loss",
    "NonFiniteError",
    "OperatorCheck",
    "OperatorError",
    "OperatorReport",
    "OptimalityError",
    "Products",
    "Progress",
    "Reducer",
    "Residual",
    "RobustPoolInfo",
    "SingularError",
    "SinkhornInfo",
    "SolveInfo",
    "SumState",
    "add",
    "adjoint",
    "align_signs",
    "argmin_vjp",
    "as_operator",
    "bicgstab",
    "cg",
    "check_operator",
    "compose",
    "convolution",
    "dense",
    "diagonal",
    "difference",
    "eigen_residual",
    "eigh",
    "eigh_topk",
    "eigh_topk_fwd",
    "eigh_topk_vjp",
    "eigh_vjp",
    "eigsh",
    "eigsh_fwd",
    "eigsh_vjp",
    "eq_argmin_vjp",
    "expm",
    "expm_fwd",
    "expm_vjp",
    "fixed_point_residual",
    "from_scipy",
    "gauge_residual",
    "ggn_damped_newton",
    "ggn_directional_derivatives",
    "ggn_eigh",
    "ggn_eigvalsh",
    "ggn_reducer",
    "gmres",
    "gram_eigh",
    "gram_eigh_fwd",
    "gram_eigh_vjp",
    "gram_eigvalsh",
    "gram_eigvalsh_fwd",
    "gram_eigvalsh_vjp",
    "gram_reducer",
    "hessian_eigval_count",
    "hessian_eigvals",
    "hessian_factor",
    "hessian_solve",
    "hessian_solve_vjp",
    "ineq_argmin_vjp",
    "invsqrtm",
    "invsqrtm_fwd",
    "invsqrtm_vjp",
    "least_squares_on_sphere",
    "least_squares_on_sphere_vjp",
    "linear_solve",
    "linear_solve_jvp",
    "linear_solve_vjp",
    "lineq_argmin_vjp",
    "logm",
    "logm_fwd",
    "logm_vjp",
    "lsmr",
    "mask",
    "minres",
    "normal",
    "power_iteration",
    "power_iteration_vjp",
    "project_ball",
    "project_ball_vjp",
    "project_simplex",
    "project_simplex_vjp",
    "project_sphere",
    "project_sphere_vjp",
    "qr",
    "qr_vjp",
    "robust_pool",
    "robust_pool_vjp",
    "root_vjp",
    "scaled",
    "simultaneous_iteration",
    "simultaneous_iteration_vjp",
    "sinkhorn",
    "sinkhorn_vjp",
    "solve",
    "solve_fwd",
    "solve_vjp",
    "spectral_function",
    "spectral_function_fwd",
    "spectral_function_vjp",
    "sqrtm",
    "sqrtm_fwd",
    "sqrtm_vjp",
    "stack",
    "sum_reducer",
    "testing",
    "to_scipy",
    "weighted_least_squares",
    "weighted_least_squares_vjp",
]
