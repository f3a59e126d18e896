"""Settings that tests and doctests share. BLAS gets one thread: the matrices are small, and idle threads spin."""

import importlib.util
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Before NumPy is imported, which reads them.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
# Before JAX is imported. It compiles for most of its time: 3.3 s with this code generator and 1.1 s without (forwards
# and VJPs of six rules). The compiled code is slower, but runs on a few numbers. `ddnref verify` uses the generator.
# JAX before 0.6 does not know the option, and ends the process that gives it one.
if importlib.util.find_spec("jax") and not version("jax").startswith(("0.4.", "0.5.")):
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no log of how TensorFlow was built

import pytest  # noqa: E402

# Modules that import a framework have doctests only where it is installed.
NEEDED_BY = {
    "torch": ["interop/torch.py", "interop/_torch_*.py", "_kernels/torch*.py"],
    "jax": ["interop/jax.py", "interop/_jax_*.py", "_kernels/jax*.py"],
    "autograd": ["interop/autograd.py"],
    "tensorflow": ["interop/tensorflow.py"],
    "dask": ["interop/dask.py", "interop/_dask_signatures.py"],
}
collect_ignore_glob = [
    f"ddnref/{path}" for name, paths in NEEDED_BY.items() if importlib.util.find_spec(name) is None for path in paths
]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests of CuPy's arrays without a backend for them, and Dask, which imports CuPy, with its emulation."""
    backends, name = config.getoption("--backend", None) or [], collection_path.name
    if name in ("test_dask.py", "dask.py", "_dask_signatures.py") and "emulated-cupy" in backends:
        return True
    return True if name == "test_cupy.py" and not {"cupy", "emulated-cupy"} & {*backends} else None


@pytest.fixture(autouse=True)
def _public_name(doctest_namespace: dict[str, Any]) -> None:
    import ddnref

    doctest_namespace["ddnref"] = ddnref
