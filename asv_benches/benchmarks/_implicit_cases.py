"""An equilibrium layer and a function of a user's with its VJP in PyTorch, beside what PyTorch offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ._common import Call, load

STEPS = 40


def equilibrium(ours: bool, batch: int, n: int) -> Call:
    """Gradient of ``Σ z²`` at ``z = tanh(W z + U x + b)`` in float32, W of norm 0.8: implicit, or of recorded steps."""
    torch = load("torch")
    from ddnref.implicit import custom_root

    rng = np.random.default_rng(0)
    w = rng.standard_normal((n, n))
    arrays = rng.standard_normal((batch, n)), 0.8 * w / np.linalg.norm(w, 2), np.eye(n), rng.standard_normal(n)
    x, *weights = (torch.from_numpy(a.astype(np.float32)) for a in arrays)
    for weight in weights:
        weight.requires_grad_()

    def cell(z: Any, x: Any, w: Any, u: Any, b: Any) -> Any:
        return torch.tanh(z @ w.mT + x @ u.mT + b)

    def solver(x: Any, w: Any, u: Any, b: Any) -> Any:
        z = torch.zeros_like(x)
        for _ in range(STEPS):
            z = cell(z, x, w, u, b)
        return z

    layer = custom_root(lambda z, *p: z - cell(z, *p), axes=1)(solver) if ours else solver
    return lambda: torch.autograd.grad((layer(x, *weights) ** 2).sum(), weights)


def own_pair(ours: bool, n: int) -> Call:
    """Softmax of n numbers and its VJP, forward and backward: through our bridge, or in the barest Function."""
    torch = load("torch")
    from ddnref.interop.torch import differentiable

    def forward(x: Any) -> Any:
        return torch.softmax(x, -1)

    def vjp(y_bar: Any, y: Any) -> Any:
        return y * (y_bar - (y * y_bar).sum())

    class Barest(torch.autograd.Function):  # type: ignore[misc, name-defined]
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            y = forward(x)
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, y_bar: Any) -> Any:
            return vjp(y_bar, *ctx.saved_tensors)

    function: Callable[..., Any] = differentiable(forward, vjp=vjp, needs=()) if ours else Barest.apply
    x = torch.linspace(-1, 1, n).requires_grad_()
    y_bar = torch.linspace(0, 1, n)
    return lambda: torch.autograd.grad(function(x), x, y_bar)
