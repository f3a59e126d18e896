"""Declarative nodes with a solver: each function is a minimisation, its VJP the closed form at the minimum."""
