"""Patches and the transposed convolution: what PyTorch computes, and that they are adjoints of each other."""

import array_api_compat
import numpy as np
import pytest

from ddnref._kernels import convolution

CASES = [((3, 3), (1, 1), (1, 1), (5, 6)), ((2, 3), (2, 1), (0, 2), (7, 4)), ((3, 1), (3, 2), (2, 0), (6, 5))]


@pytest.mark.parametrize("lead", [(2,), (3, 2)])
@pytest.mark.parametrize("case", CASES)
def test_every_library_has_numpy_s_patches(case, lead, xp, rng):
    kernel, stride, margin, size = case
    x, w = rng.standard_normal((*lead, 2, *size)), rng.standard_normal((3, 2, *kernel))
    out = convolution.positions(size, kernel, stride, margin)
    image = rng.standard_normal((*lead, 3, *out))
    expected = convolution.patches(x, kernel, stride, margin)
    back = convolution.transposed(w, image, stride, margin, size)
    got = xp.numpy(convolution.patches(xp.asarray(x), kernel, stride, margin))
    assert np.array_equal(got, expected)
    got = xp.numpy(convolution.transposed(xp.asarray(w), xp.asarray(image), stride, margin, size))
    assert np.max(np.abs(got - back)) <= 1e-14 * np.max(np.abs(back)) * w.size
    # ⟨W * x, δ⟩ = ⟨x, Wᵀ δ⟩
    y = (convolution.kernels(w) @ expected).reshape(image.shape)
    assert abs(np.sum(y * image) - np.sum(x * back)) <= 1e-12 * np.sum(np.abs(y * image))


@pytest.mark.framework("torch")
@pytest.mark.parametrize("case", CASES)
def test_the_form_of_the_standard_is_pytorch_s(case, torch, rng, monkeypatch):
    """Weights with leading axes too, which a tangent of several directions has."""
    kernel, stride, margin, size = case
    w = torch.asarray(rng.standard_normal((4, 3, 2, *kernel)))
    image = torch.asarray(rng.standard_normal((4, 2, 3, *convolution.positions(size, kernel, stride, margin))))
    got = convolution.transposed(w, image, stride, margin, size)
    monkeypatch.setattr(array_api_compat, "is_torch_array", lambda _: False)
    assert torch.allclose(got, convolution.transposed(w, image, stride, margin, size), rtol=0, atol=1e-13)
