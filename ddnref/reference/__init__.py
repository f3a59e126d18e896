"""Textbook forms from the literature: oracles for the tests and the slow rungs of the benchmark ladder.

They are written for clarity, not for speed. Only examples, tests and benchmarks use them.
"""

from ddnref.reference.declarative import ddn_vjp_jacobian, ddn_vjp_schur, ift_vjp_jacobian, ift_vjp_structured
from ddnref.reference.eigh import eigh_vjp_v1, eigh_vjp_v2, eigh_vjp_v3
from ddnref.reference.factorisations import cholesky_vjp_unrolled, thomas_solve
from ddnref.reference.generalized import eigh_generalized_vjp_cholesky
from ddnref.reference.ggn import ggn_dense_derivatives, ggn_dense_newton, ggn_power_iteration
from ddnref.reference.krylov import cg_unrolled, cg_unrolled_vjp
from ddnref.reference.network import network_ggn, network_hessian, network_jacobian
from ddnref.reference.polar import lstsq_normal_equations, polar_through_gram, polar_vjp_through_gram
from ddnref.reference.svd import svd_gram, svd_vjp_squares
from ddnref.reference.tall_skinny import LayerMatrices, tall_skinny_derivatives, tall_skinny_product, tall_skinny_solve
from ddnref.reference.trust_region import trust_region_dense

__all__ = [
    "LayerMatrices",
    "cg_unrolled",
    "cg_unrolled_vjp",
    "cholesky_vjp_unrolled",
    "ddn_vjp_jacobian",
    "ddn_vjp_schur",
    "eigh_generalized_vjp_cholesky",
    "eigh_vjp_v1",
    "eigh_vjp_v2",
    "eigh_vjp_v3",
    "ggn_dense_derivatives",
    "ggn_dense_newton",
    "ggn_power_iteration",
    "ift_vjp_jacobian",
    "ift_vjp_structured",
    "lstsq_normal_equations",
    "network_ggn",
    "network_hessian",
    "network_jacobian",
    "polar_through_gram",
    "polar_vjp_through_gram",
    "svd_gram",
    "svd_vjp_squares",
    "tall_skinny_derivatives",
    "tall_skinny_product",
    "tall_skinny_solve",
    "thomas_solve",
    "trust_region_dense",
]
