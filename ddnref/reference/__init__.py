"""Textbook forms from the literature: oracles for the tests and the slow rungs of the benchmark ladder.

They are written for clarity, not for speed. Only examples, tests and benchmarks use them.
"""

from ddnref.reference.declarative import ddn_vjp_jacobian, ddn_vjp_schur, ift_vjp_jacobian, ift_vjp_structured
from ddnref.reference.eigh import eigh_vjp_v1, eigh_vjp_v2, eigh_vjp_v3
from ddnref.reference.ggn import ggn_dense_derivatives, ggn_dense_newton, ggn_power_iteration
from ddnref.reference.krylov import cg_unrolled, cg_unrolled_vjp
from ddnref.reference.network import network_ggn, network_hessian, network_jacobian
from ddnref.reference.tall_skinny import LayerMatrices, tall_skinny_derivatives, tall_skinny_product, tall_skinny_solve

__all__ = [
    "LayerMatrices",
    "cg_unrolled",
    "cg_unrolled_vjp",
    "ddn_vjp_jacobian",
    "ddn_vjp_schur",
    "eigh_vjp_v1",
    "eigh_vjp_v2",
    "eigh_vjp_v3",
    "ggn_dense_derivatives",
    "ggn_dense_newton",
    "ggn_power_iteration",
    "ift_vjp_jacobian",
    "ift_vjp_structured",
    "network_ggn",
    "network_hessian",
    "network_jacobian",
    "tall_skinny_derivatives",
    "tall_skinny_product",
    "tall_skinny_solve",
]
