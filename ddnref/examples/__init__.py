"""Executed stories: scripts that the documentation's gallery and ``ddnref report`` both run.

Each ``plot_*.py`` is one story in sphinx-gallery's format. Run one with ``python -m ddnref.examples.plot_whitening``.
The names below are what a story uses to show its results in both places.
"""

from ddnref.examples._look import BLUE, GREEN, GREY, ORANGE, image
from ddnref.examples._show import card, check, compare, picture, settings, table, track

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "card", "check", "compare", "image", "picture", "settings", "table"]
__all__ += ["track"]
