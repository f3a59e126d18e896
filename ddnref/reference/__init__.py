"""Textbook forms from the literature: oracles for the tests and the slow rungs of the benchmark ladder.

Nothing here is fast, and nothing else in the package calls it.
"""

from ddnref.reference.eigh import eigh_vjp_v1, eigh_vjp_v2, eigh_vjp_v3

__all__ = ["eigh_vjp_v1", "eigh_vjp_v2", "eigh_vjp_v3"]
