"""Bridges: one short module per framework, importing it only when used; ``differentiable(op)``, and for Dask maps."""
