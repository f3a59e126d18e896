"""The GGN of PyTorch modules: ours by hooks, curvlinops with SciPy's eigsh, and a `Chain` where there is one."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import ddnref

from ._common import Call, load

K = 10
MODULES = ("vit", "resnet", "cnn")


@lru_cache(maxsize=4)
def problem(name: str) -> tuple[Any, Any, Any]:
    """A module in evaluation mode with random weights, and 32 images of 16 x 16 with their classes, in float32."""
    torch = load("torch")
    torch.manual_seed(0)
    module = {"vit": _vit, "resnet": _resnet, "cnn": _cnn}[name](torch.nn)
    x, t = torch.randn(32, 1, 16, 16), torch.randint(0, 10, (32,))
    with torch.no_grad():
        module(x)  # running statistics of batch normalisation
    return module.eval(), x, t


def ours(name: str) -> Call:
    """Find the parts and the k largest eigenpairs, from the module alone."""
    module, x, t = problem(name)
    from ddnref.interop.torch import ggn

    return lambda: ddnref.curvature.ggn_eigh(ggn(module), x, t, k=K)


def chain(name: str) -> Call:
    """Return the eigenpairs by a `Chain`, which takes a Sequential of convolutions."""
    module, x, t = problem(name)
    return partial(ddnref.curvature.ggn_eigh, ddnref.networks.Chain.from_torch(module), x, t, k=K)


def curvlinops(name: str) -> Call:
    """The k largest eigenpairs by SciPy's eigsh on its matrix-free GGN, to the tolerance of our single precision."""
    module, x, t = problem(name)
    torch = load("torch")
    load("curvlinops")
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import eigsh

    params, loss = list(module.parameters()), torch.nn.CrossEntropyLoss()

    def call() -> Any:
        ggn = GGNLinearOperator(module, loss, params, [(x, t)], check_deterministic=False)
        return eigsh(ggn.to_scipy() if hasattr(ggn, "to_scipy") else ggn, k=K, which="LA", tol=1e-6)

    return call


def difference(name: str) -> float:
    """Largest difference of ours and curvlinops' eigenvalues, relative to the largest."""
    theirs, own = curvlinops(name)()[0][::-1], ours(name)()[0].numpy()
    return float(abs(own - theirs).max() / own[0])


def _cnn(nn: Any) -> Any:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1),
        nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip


def _resnet(nn: Any) -> Any:
    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.one, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
            self.two, self.norm_two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Any) -> Any:
            y = self.norm_two(self.two(self.relu(self.norm(self.one(x)))))
            return self.relu(y + self.shortcut(x))

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


def _vit(nn: Any) -> Any:
    import torch

    class Attention(nn.Module):  # type: ignore[misc]
        """Written out, because forward mode, which curvlinops uses, has no rule for PyTorch's own."""

        def __init__(self, d: int, heads: int) -> None:
            super().__init__()
            self.heads, self.inputs, self.outputs = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)

        def forward(self, x: Any) -> Any:
            n, tokens, d = x.shape
            q, k, v = self.inputs(x).reshape(n, tokens, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
            z = torch.softmax(q @ k.mT / (d // self.heads) ** 0.5, -1) @ v
            return self.outputs(z.transpose(1, 2).reshape(n, tokens, d))

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, d: int) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(d), Attention(d, 4)
            self.mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm(x))
            return x + self.mlp(x)

    class VisionTransformer(nn.Module):  # type: ignore[misc]
        def __init__(self, d: int) -> None:
            super().__init__()
            self.patches, self.position = nn.Conv2d(1, d, 4, 4), nn.Parameter(0.1 * torch.randn(1, 16, d))
            self.blocks, self.head = nn.Sequential(Block(d), Block(d)), nn.Linear(d, 10)

        def forward(self, x: Any) -> Any:
            return self.head(self.blocks(self.patches(x).flatten(2).mT + self.position).mean(1))

    return VisionTransformer(32)
