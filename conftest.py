"""What tests and doctests share; before NumPy is imported, one BLAS thread for each of pytest's workers."""

import importlib.util
import os
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest

collect_ignore = [
    f"ddnref/interop/{file}.py"
    for name, file in (("torch", "torch"), ("torch", "_torch_batch"), ("jax", "jax"))
    if importlib.util.find_spec(name) is None
]


@pytest.fixture(autouse=True)
def _public_name(doctest_namespace: dict[str, Any]) -> None:
    import ddnref

    doctest_namespace["ddnref"] = ddnref
