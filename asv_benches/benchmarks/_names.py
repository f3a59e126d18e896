"""Benchmarks of commits from before the subject modules: their names under the present ones.

The history of a figure must not end where a name moved, so benchmarks are written in the present names alone. asv
distinguishes benchmarks by a hash of their source; where only names changed in it, `version` keeps the hash.
Commits before d63c10d cannot be measured, because the rules had another form there.
"""

from __future__ import annotations

import sys
from importlib import import_module

SUBJECTS = ("linalg", "operators", "krylov", "implicit", "nodes", "networks", "curvature")
"""Subject modules, whose names were all at the top level."""

PRIVATE = {
    "ddnref._rules.binding": "ddnref._rule",
    "ddnref._rules.contract": "ddnref._rule",
    "ddnref._rules.table": "ddnref._rules",
    "ddnref._rules.samples": "ddnref._samples",
    "ddnref.linalg._eigh": "ddnref._eigh",
    "ddnref.curvature.ggn": "ddnref._ggn",
    "ddnref.curvature.ggn._spectrum": "ddnref._ggn._spectrum",
}
"""Private modules that benchmarks import: where they are, and where they were."""


def use_present_names() -> None:
    """Make the present names work with an older ddnref; nothing to do with the present one."""
    import ddnref

    if hasattr(ddnref, "linalg"):
        return
    for subject in SUBJECTS:
        sys.modules[f"ddnref.{subject}"] = ddnref
        setattr(ddnref, subject, ddnref)
    for present, former in PRIVATE.items():
        try:
            module = sys.modules[present] = import_module(former)
        except ModuleNotFoundError:  # older than that module: what imports it cannot be measured
            continue
        parent, _, name = present.rpartition(".")
        setattr(import_module(parent), name, module)
    # One record once held the present three: what benchmarks ask of a trial is found in the rule.
    rules = sys.modules["ddnref._rules.table"]
    rules.TRIALS = rules.RULES  # type: ignore[attr-defined]
