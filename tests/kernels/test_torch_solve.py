"""The short form of `solve` for plain tensors: the numbers of the general form, or ``None``."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import ddnref  # noqa: E402
from ddnref._kernels import torch_solve  # noqa: E402
from ddnref._kernels.lu import lu_factor  # noqa: E402

SHAPES = [(8,), (1, 8), (1, 130), (3, 8), (5, 1), (16, 30)]


def _system(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*lengths):
        x = rng.standard_normal(lengths)
        return torch.from_numpy((x + 1j * rng.standard_normal(lengths) if "complex" in dtype else x).astype(dtype))

    return normal(*shape, shape[-1]), normal(*shape), normal(*shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex64", "complex128"])
def test_the_short_form_gives_the_numbers_of_the_general_one(shape, dtype):
    a, b, x_bar = _system(shape, dtype)
    x, lu, pivots = torch_solve.solve(a, b)
    gradients = torch_solve.solve_vjp((x_bar, None, None), (x, lu, pivots))
    expected, saved = ddnref.solve_fwd(a.numpy(), b.numpy())
    wanted = ddnref.solve_vjp(x_bar.numpy(), expected, *saved)
    scale = np.linalg.cond(a.numpy()).max() * 20 * np.finfo(dtype).eps
    assert lu.shape == a.shape
    assert pivots.dtype == torch.int32
    np.testing.assert_array_equal(pivots.numpy(), saved[1])
    for ours, theirs in zip((x, lu, *gradients), (expected, saved[0], *wanted), strict=True):
        assert np.linalg.norm(ours.numpy() - theirs) <= scale * np.linalg.norm(theirs)


@pytest.mark.parametrize("batch", [(), (4,)])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda a, b: a[..., 0, 0].fill_(torch.nan),
        lambda a, b: a[..., 1, 0].fill_(torch.inf),
        lambda a, b: b[..., 2].fill_(torch.nan),
        lambda a, b: b[..., 2].fill_(torch.inf),
        lambda a, b: a[..., 0, :].mul_(1e-4),
        lambda a, b: a[..., 0, :].copy_(a[..., 1, :]),
        lambda a, b: a[..., :, 0].zero_(),
        lambda a, b: a.mul_(1e-30),
    ],
    ids=["nan", "inf", "nan-b", "inf-b", "units", "equal-rows", "zero-column", "tiny"],
)
def test_what_needs_a_closer_look_is_left_to_the_general_form(batch, spoil):
    a, b, _ = _system((*batch, 6), "float32")
    assert torch_solve.solve(a, b) is not None
    spoil(a[-1:] if batch else a, b[-1:] if batch else b)  # the last item alone
    assert torch_solve.solve(a, b) is None


def test_views_that_numpy_cannot_read_are_left_to_the_general_form():
    a, b, x_bar = _system((4,), "complex64")
    x, lu, pivots = torch_solve.solve(a, b)
    assert torch_solve.solve(a.conj(), b) is None
    assert torch_solve.solve(a, b.conj()) is None
    assert torch_solve.solve_vjp((x_bar.conj(), None, None), (x, lu, pivots)) is None
    assert torch_solve.solve_vjp((None, None, None), (x, lu, pivots)) is None
    assert torch_solve.solve_vjp((x_bar, lu, None), (x, lu, pivots)) is None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("items", [1, 3])
def test_nothing_that_is_singular_passes(dtype, items):
    """The short form must be stricter than the criterion, whatever the condition and the direction that is lost."""
    rng, passed = np.random.default_rng(1), 0
    for exponent in np.linspace(0, 1.2 * -np.log10(np.finfo(dtype).eps), 40):
        q, p = (np.linalg.qr(rng.standard_normal((items, 12, 12)))[0] for _ in range(2))
        sizes = np.ones(12)
        sizes[-1] = 10.0**-exponent
        a = ((q * sizes) @ p).astype(dtype)
        found = torch_solve.solve(torch.from_numpy(a), torch.ones(items, 12, dtype=getattr(torch, dtype)))
        if found is not None:
            passed += 1
            assert np.linalg.cond(a.astype(float)).max() < 1 / (16 * np.finfo(dtype).eps)
            assert not lu_factor(a)[2].any()
    assert 5 < passed < 40
