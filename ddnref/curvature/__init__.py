"""Curvature: Gram matrices, the Gauss-Newton matrix and the Hessian of a network."""

from ddnref.curvature._gram import (
    gram_eigh,
    gram_eigh_fwd,
    gram_eigh_jvp,
    gram_eigh_vjp,
    gram_eigvalsh,
    gram_eigvalsh_fwd,
    gram_eigvalsh_jvp,
    gram_eigvalsh_vjp,
)
from ddnref.curvature._reducers import GramState, Reducer, SumState, gram_reducer, sum_reducer
from ddnref.curvature._trust_region import (
    TrustRegionInfo,
    TrustRegionVjpInfo,
    trust_region_step,
    trust_region_step_vjp,
)
from ddnref.curvature.ggn._directional import DirectionalDerivatives, ggn_damped_newton, ggn_directional_derivatives
from ddnref.curvature.ggn._factors import gram_from_factors
from ddnref.curvature.ggn._functions import ggn_eigh, ggn_eigvalsh
from ddnref.curvature.ggn._laplace import Laplace, ggn_laplace
from ddnref.curvature.ggn._state import Ggn, GgnState, ggn_reducer
from ddnref.curvature.hessian._diagonal import hessian_diagonal, hessian_trace
from ddnref.curvature.hessian._solve import (
    HessianFactor,
    HessianSolveInfo,
    Inertia,
    hessian_factor,
    hessian_solve,
    hessian_solve_vjp,
)
from ddnref.curvature.hessian._spectrum import (
    EigvalCountInfo,
    HessianEigvalsInfo,
    hessian_eigval_count,
    hessian_eigvals,
)

__all__ = [
    "DirectionalDerivatives",
    "EigvalCountInfo",
    "Ggn",
    "GgnState",
    "GramState",
    "HessianEigvalsInfo",
    "HessianFactor",
    "HessianSolveInfo",
    "Inertia",
    "Laplace",
    "Reducer",
    "SumState",
    "TrustRegionInfo",
    "TrustRegionVjpInfo",
    "ggn_damped_newton",
    "ggn_directional_derivatives",
    "ggn_eigh",
    "ggn_eigvalsh",
    "ggn_laplace",
    "ggn_reducer",
    "gram_eigh",
    "gram_eigh_fwd",
    "gram_eigh_jvp",
    "gram_eigh_vjp",
    "gram_eigvalsh",
    "gram_eigvalsh_fwd",
    "gram_eigvalsh_jvp",
    "gram_eigvalsh_vjp",
    "gram_from_factors",
    "gram_reducer",
    "hessian_diagonal",
    "hessian_eigval_count",
    "hessian_eigvals",
    "hessian_factor",
    "hessian_solve",
    "hessian_solve_vjp",
    "hessian_trace",
    "sum_reducer",
    "trust_region_step",
    "trust_region_step_vjp",
]
