"""Krylov solvers: one algorithm a module, over the pieces in ``_common.py`` and ``_vectors.py``."""
