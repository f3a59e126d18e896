"""All targets."""

from __future__ import annotations

from functools import cache

from ._bridges import bridge_targets
from ._hard import hard_targets
from ._others import other_targets
from ._targets import Target, rule_targets


@cache
def targets() -> tuple[Target, ...]:
    return (*rule_targets(), *other_targets(), *bridge_targets(), *hard_targets())
