"""Bridges: one short module per framework, importing it only when used. Each has ``differentiable(op)``."""
