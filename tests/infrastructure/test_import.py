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


WITHOUT_LINUX = """
import mmap, os, pathlib, signal, sys
for module, name in (
    (os, "fork"), (os, "sched_getaffinity"), (mmap, "MAP_PRIVATE"), (mmap, "MAP_ANONYMOUS"), (signal, "SIGKILL"),
):
    if hasattr(module, name):
        delattr(module, name)
sys.modules.update(dict.fromkeys(("fcntl", "resource", "pwd", "grp")))  # importing one of these fails
read = pathlib.Path.read_text
def read_text(path, *args, **options):
    if path.as_posix().startswith("/proc"):
        raise FileNotFoundError(path)
    return read(path, *args, **options)
pathlib.Path.read_text = read_text
import numpy as np
np.longdouble, np.clongdouble = np.float64, np.complex128  # as on Windows, and on Macs with Apple's processors
import ddnref
x = np.random.default_rng(0).standard_normal((2000, 16, 16))
w, v = ddnref.eigh(x)
assert np.isfinite(ddnref.eigh_vjp(w, v, w, v)).all()
from ddnref.examples import _measure
assert _measure.peak(lambda: None) is None
import ddnref.verify._cli, ddnref.verify._hard, ddnref.report
"""


def test_nothing_needs_linux():
    """Takes away forks, affinity, /proc, modules of Unix and extended precision, which other systems lack."""
    subprocess.run([sys.executable, "-W", "error", "-c", WITHOUT_LINUX], check=True)
