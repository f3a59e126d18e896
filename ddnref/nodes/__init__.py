"""Declarative nodes: functions defined as the solution of an optimisation problem, each with its VJP and JVP."""

from ddnref.nodes._least_squares import (
    least_squares_on_sphere,
    least_squares_on_sphere_jvp,
    least_squares_on_sphere_vjp,
    weighted_least_squares,
    weighted_least_squares_jvp,
    weighted_least_squares_vjp,
)
from ddnref.nodes._projections import (
    project_ball,
    project_ball_jvp,
    project_ball_vjp,
    project_simplex,
    project_simplex_jvp,
    project_simplex_vjp,
    project_sphere,
    project_sphere_jvp,
    project_sphere_vjp,
)
from ddnref.nodes._robust_pool import RobustPoolInfo, robust_pool, robust_pool_jvp, robust_pool_vjp
from ddnref.nodes._sinkhorn import SinkhornInfo, sinkhorn, sinkhorn_jvp, sinkhorn_vjp
from ddnref.nodes._sinkhorn_systems import SinkhornVjpInfo

__all__ = [
    "RobustPoolInfo",
    "SinkhornInfo",
    "SinkhornVjpInfo",
    "least_squares_on_sphere",
    "least_squares_on_sphere_jvp",
    "least_squares_on_sphere_vjp",
    "project_ball",
    "project_ball_jvp",
    "project_ball_vjp",
    "project_simplex",
    "project_simplex_jvp",
    "project_simplex_vjp",
    "project_sphere",
    "project_sphere_jvp",
    "project_sphere_vjp",
    "robust_pool",
    "robust_pool_jvp",
    "robust_pool_vjp",
    "sinkhorn",
    "sinkhorn_jvp",
    "sinkhorn_vjp",
    "weighted_least_squares",
    "weighted_least_squares_jvp",
    "weighted_least_squares_vjp",
]
