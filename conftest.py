"""Settings that tests and doctests share. BLAS gets one thread: the matrices are small, and idle threads spin."""

import importlib.util
import os
from pathlib import Path
from typing import Any

# Before NumPy is imported, which reads them.
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
# Before JAX is imported. It compiles for most of its time: 3.3 s with this code generator and 1.1 s without (forwards
# and VJPs of six rules). The compiled code is slower, but runs on a few numbers. `ddnref verify` uses the generator.
os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # no log of how TensorFlow was built

import pytest  # noqa: E402

collect_ignore = [
    f"ddnref/interop/{file}.py"
    for name, file in (
        ("torch", "torch"),
        ("torch", "_torch_batch"),
        ("torch", "_dlpack"),
        ("jax", "jax"),
        ("autograd", "autograd"),
        ("tensorflow", "tensorflow"),
        ("dask", "dask"),
        ("dask", "_dask_blocks"),
    )
    if importlib.util.find_spec(name) is None
]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out tests of CuPy's arrays without a backend for them, and Dask, which imports CuPy, with its emulation."""
    backends, name = config.getoption("--backend", None) or [], collection_path.name
    if name in ("test_dask.py", "dask.py", "_dask_blocks.py") and "emulated-cupy" in backends:
        return True
    return True if name == "test_cupy.py" and not {"cupy", "emulated-cupy"} & {*backends} else None


@pytest.fixture(autouse=True)
def _public_name(doctest_namespace: dict[str, Any]) -> None:
    import ddnref

    doctest_namespace["ddnref"] = ddnref
