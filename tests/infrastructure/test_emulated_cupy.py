"""The code for CuPy runs on the CPU, over an emulation of what CuPy does differently from NumPy.

``pytest --backend emulated-cupy -k emulated`` runs all array tests over it, in two minutes. Here are the tests of those
operations that have a separate form for CuPy, in a process that has not imported CuPy itself.
"""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
OWN_FORMS = ("kernels/test_cupy.py", "kernels/test_dense.py", "kernels/test_lu.py")

DIFFERENCES = """
import numpy as np
import pytest
import emulated_cupy
emulated_cupy.install()
import array_api_compat.cupy as xp
import array_api_compat

x = xp.asarray(np.ones((2, 2)))
assert array_api_compat.is_cupy_array(x) and not array_api_compat.is_numpy_array(x)
for refused in (lambda: x + np.ones(2), lambda: np.ones(2) + x, lambda: x * np.float64(2), lambda: np.asarray(x),
                lambda: xp.matmul(x, np.ones((2, 2))), lambda: x.__setitem__(0, np.ones(2))):
    with pytest.raises(TypeError):
        refused()
with pytest.raises(ValueError):
    xp.linalg.solve(x, xp.asarray(np.ones((3, 2, 1))))
w, v = xp.linalg.eigh(xp.asarray(np.full((2, 2), np.nan)))  # NumPy raises
assert np.isnan(w.get()).all()
emulated_cupy.READS.clear()
bool(x[0, 0] > 0), float(x[0, 0]), x[x > 0]
assert emulated_cupy.READS == ["__bool__", "__float__", "mask"]
with xp.cuda.Device(1):
    y = xp.asarray(np.ones(2))
assert x.device != y.device
"""


def run(*command):
    done = subprocess.run([sys.executable, *command], cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_forms_for_cupy():
    command = ("-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", "--backend", "emulated-cupy", "-k", "emulated")
    out = run(*command, *OWN_FORMS)
    assert " passed" in out


def test_the_emulation_differs_from_numpy_where_cupy_does():
    run("-c", DIFFERENCES)
