"""What tests and doctests share; before NumPy is imported, one BLAS thread: the matrices are small, threads spin."""

import importlib.util
import os
from pathlib import Path
from typing import Any

for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")
# Before JAX: most of its time is compilation, which takes 3.3 s with this code generator where 1.1 s do without
# (forwards and VJPs of six rules; the code is slower, but runs on a few numbers). `ddnref verify` runs with it.
os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow, which logs what it was built for

import pytest  # noqa: E402

collect_ignore = [
    f"ddnref/interop/{file}.py"
    for name, file in (
        ("torch", "torch"),
        ("torch", "_torch_vmap"),
        ("torch", "_torch_foreign_kernels"),
        ("jax", "jax"),
        ("autograd", "autograd"),
        ("tensorflow", "tensorflow"),
        ("dask", "dask"),
        ("dask", "_dask_signatures"),
    )
    if importlib.util.find_spec(name) is None
]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """What is about CuPy's arrays alone is for ``--backend cupy`` and its emulation; Dask imports CuPy itself."""
    backend, name = config.getoption("--backend", None) or "", collection_path.name
    if name in ("test_dask.py", "dask.py", "_dask_signatures.py") and backend == "emulated-cupy":
        return True
    return True if name == "test_cupy.py" and "cupy" not in backend else None


@pytest.fixture(autouse=True)
def _public_name(doctest_namespace: dict[str, Any]) -> None:
    import ddnref

    doctest_namespace["ddnref"] = ddnref
