"""Calls from which PyTorch or JAX alone would not return on a CPU with several threads, in separate processes."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from conftest import TRACED

SEVERAL = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "NPROC": "2"}


def run(code: str) -> None:
    """Two threads, whatever the tests have; a call that hangs is an error."""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, **SEVERAL}, timeout=120, check=True)


@pytest.mark.framework("torch")
def test_torch_factors_batches_of_large_matrices():
    run(
        "import numpy as np, torch, ddnref\n"
        "torch.set_num_threads(2)\n"
        "rng = np.random.default_rng(0)\n"
        "for n in (128, 150, 160, 300):\n"
        "    a, b = rng.standard_normal((5, n, n)), rng.standard_normal((5, n))\n"
        "    found = ddnref.solve(torch.asarray(a), torch.asarray(b)).numpy()\n"
        "    wanted = np.linalg.solve(a, b[..., None])[..., 0]\n"
        "    assert abs(found - wanted).max() <= 1e-8 * abs(wanted).max()\n"
        "    a = a + a.mT\n"
        "    w, v = np.linalg.eigh(a)\n"
        "    arrays = np.ones((5, 2)), v[:, :, :2] @ np.ones((2, 2)), w[:, -2:], v[:, :, -2:], a\n"
        "    found = ddnref.simultaneous_iteration_vjp(*map(torch.asarray, arrays))\n"
        "    wanted = ddnref.simultaneous_iteration_vjp(*arrays)\n"
        "    assert abs(found.numpy() - wanted).max() <= 1e-8 * abs(wanted).max()\n"
    )


@pytest.mark.framework("jax")
def test_jax_solves_several_systems_at_once():
    run(
        "import functools, jax, numpy as np, ddnref\n"
        "jax.config.update('jax_enable_x64', True)\n"
        "x = np.random.default_rng(0).standard_normal((5, 128, 128))\n"
        "x = x + x.mT\n"
        "w, v = np.linalg.eigh(x)\n"
        "arrays = [jax.numpy.asarray(z) for z in (w[:, -4:], v[:, :, -4:], w[:, -4:], v[:, :, -4:], x)]\n"
        "options = {'method': 'fixed_point', 'symmetric': True, 'throw': False}\n"
        "vjp = jax.jit(functools.partial(ddnref.simultaneous_iteration_vjp, **options))\n"
        "for _ in range(60):\n"
        "    jax.block_until_ready(vjp(*arrays))\n"
    )


# --- what PyTorch's way is replaced by -------------------------------------------------------------------------


@pytest.fixture
def ours(torch, monkeypatch):
    """`ddnref._kernels.torch`, for matrices of every size."""
    from ddnref._kernels import torch as _torch_lu

    monkeypatch.setattr(_torch_lu, "ALONE", 0)
    return _torch_lu


def draw(rng, torch, shape, dtype):
    a = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if dtype.startswith("complex") else 0)
    return torch.asarray(a, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
def test_factors_are_those_of_torch(batch, dtype, ours, torch, rng):
    a, b = draw(rng, torch, (*batch, 6, 6), dtype), draw(rng, torch, (*batch, 6, 2), dtype)
    for found, wanted in zip(ours.lu_factor(a), torch.linalg.lu_factor_ex(a), strict=True):
        assert found.dtype == wanted.dtype
        assert torch.equal(found, wanted)
    rtol = 1e3 * torch.finfo(a.dtype).eps
    assert torch.allclose(ours.solve(a, b)[0], torch.linalg.solve(a, b), rtol=rtol, atol=rtol)


def test_singular_items_are_told(ours, torch, rng):
    a = draw(rng, torch, (3, 4, 4), "float64")
    a[1] = 1
    assert ours.lu_factor(a)[2].tolist() == torch.linalg.lu_factor_ex(a)[2].tolist() != [0, 0, 0]


def test_derivatives(ours, torch, rng):
    a = draw(rng, torch, (3, 4, 4), "float64").requires_grad_()
    b = draw(rng, torch, (3, 4, 2), "float64").requires_grad_()
    solve = lambda a, b: ours.solve(a, b)[0]
    assert torch.autograd.gradcheck(solve, (a, b))
    assert torch.autograd.gradgradcheck(solve, (a, b))


@pytest.mark.graphs
@pytest.mark.filterwarnings(*TRACED)
def test_transforms_and_graphs(ours, torch, rng):
    a, b = draw(rng, torch, (3, 4, 4), "float64"), draw(rng, torch, (3, 4, 2), "float64")
    solve = lambda a, b: ours.solve(a, b)[0]
    x = torch.linalg.solve(a, b)
    assert torch.allclose(torch.func.vmap(solve)(a, b), x)
    assert torch.allclose(torch.func.vmap(solve, in_dims=(1, None))(a.movedim(0, 1), b[0]), torch.linalg.solve(a, b[0]))
    assert torch.allclose(torch.compile(solve, fullgraph=True)(a, b), x)
    loss = lambda solve: lambda a, b: (solve(a, b) ** 2).sum()
    of_each = torch.func.vmap(torch.func.grad(loss(solve)))(a, b)
    assert torch.allclose(of_each, torch.func.vmap(torch.func.grad(loss(torch.linalg.solve)))(a, b))
    assert np.isfinite(of_each.numpy()).all()


def test_the_operation_is_well_made(ours, torch, rng):
    a = draw(rng, torch, (2, 4, 4), "float64")
    ours.lu_factor(a)
    assert set(torch.library.opcheck(torch.ops.ddnref.lu_factor.default, (a,)).values()) == {"SUCCESS"}
