"""Executed stories: scripts that the documentation's gallery and ``ddnref report`` both run.

Each ``plot_*.py`` is one story in sphinx-gallery's format. Run one with ``python -m ddnref.examples.plot_whitening``.
The names below are what a story uses to show its results in both places.
"""

from ddnref.examples._look import BLUE, GREEN, GREY, ORANGE, image
from ddnref.examples._peers import autograd_gradients
from ddnref.examples._show import check, compare, headline, picture, settings, table, track

__all__ = ["BLUE", "GREEN", "GREY", "ORANGE", "autograd_gradients", "check", "compare", "headline", "image", "picture"]
__all__ += ["settings", "table", "track"]
