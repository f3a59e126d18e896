"""``import ddnref`` brings in neither a framework nor what it does not need yet."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

OPTIONAL = {
    "array_api_strict",
    "autograd",
    "cupy",
    "dask",
    "docutils",
    "jax",
    "matplotlib",
    "sklearn",
    "tensorflow",
    "threadpoolctl",
    "torch",
}
HEAVY = {"array_api_compat.numpy", "scipy.fft", "scipy.linalg", "scipy.special"}
"""Loaded where first used: together they take several times as long as all of ddnref (``figures.py --only import``)."""


def loaded_by(program: str) -> set[str]:
    """Names of the modules in a fresh interpreter after a program."""
    report = f"{program}; import json, sys; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(json.loads(run.stdout))


@pytest.mark.parametrize("program", ["import ddnref", "import ddnref.verify._cli, ddnref.reference"])
def test_no_framework_is_imported(program):
    loaded = loaded_by(program)
    assert "ddnref" in loaded
    assert not loaded & OPTIONAL


def test_heavy_parts_wait_for_their_first_use():
    assert not loaded_by("import ddnref") & HEAVY
    used = "import numpy as np, ddnref; x = np.eye(3); ddnref.solve(x, x[0]); "
    used += "ddnref.operators.convolution(x, (4, 4))(np.eye(4))"
    assert loaded_by(used) >= HEAVY - {"scipy.special"}  # the names are not misspelt
