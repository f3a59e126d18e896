"""PyTorch's patches of images, and the sum of patches into images; as products they have the precision of matrices."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import fold, unfold

Pair = tuple[int, int]


def patches(x: Tensor, kernel: Pair, stride: Pair, margin: Pair) -> Tensor:
    """Return the patches ``(..., c kh kw, positions)`` of images ``(..., c, height, width)``."""
    lead = x.shape[:-3]
    found = unfold(x.reshape(lead.numel(), *x.shape[-3:]), kernel, padding=margin, stride=stride)
    return found.reshape(*lead, *found.shape[1:])


def transposed(kernels: Tensor, image: Tensor, kernel: Pair, stride: Pair, margin: Pair, size: Pair) -> Tensor:
    """Return ``Wᵀ δ``, ``(..., c_in, *size)``: one product for each patch, then the sum of all patches."""
    products = kernels.mT @ image.flatten(-2)
    lead = products.shape[:-2]
    x_bar = fold(products.reshape(lead.numel(), *products.shape[-2:]), size, kernel, padding=margin, stride=stride)
    return x_bar.reshape(*lead, *x_bar.shape[1:])
