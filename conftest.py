"""What tests and doctests share; before NumPy is imported, one BLAS thread: the matrices are small, threads spin."""

import importlib.util
import os
from typing import Any

for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import pytest  # noqa: E402

collect_ignore = [
    f"ddnref/interop/{file}.py"
    for name, file in (("torch", "torch"), ("torch", "_torch_batch"), ("jax", "jax"), ("autograd", "autograd"))
    if importlib.util.find_spec(name) is None
]


@pytest.fixture(autouse=True)
def _public_name(doctest_namespace: dict[str, Any]) -> None:
    import ddnref

    doctest_namespace["ddnref"] = ddnref
