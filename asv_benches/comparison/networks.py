"""Curvature of a network: eigenvalues of its Gauss–Newton matrix, and a system with its Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np

import ddnref

from ._oracles import STEP, solve
from ._problem import Inputs, cell, problem

TOP = 5
DAMPING = 0.1


def draw(rng: np.random.Generator, samples: int, width: int, layers: int, classes: int) -> Inputs:
    """Draw samples, labels and weights: `layers` square layers with tanh, and a linear one."""
    hidden = rng.standard_normal((layers, width, width)) / np.sqrt(width)
    last = rng.standard_normal((classes, width)) / np.sqrt(width)
    x, t = rng.standard_normal((samples, width)), rng.integers(0, classes, samples)
    return {"x": x, "t": t, "hidden": hidden, "last": last}


# --- oracles --------------------------------------------------------------------------------------------------------


def outputs(parameters: np.ndarray, i: Inputs) -> np.ndarray:
    size = i["hidden"].size
    y = i["x"]
    for w in parameters[:size].reshape(i["hidden"].shape):
        y = np.tanh(y @ w.T)
    return y @ parameters[size:].reshape(i["last"].shape).T


def gradient_of_loss(parameters: np.ndarray, i: Inputs) -> np.ndarray:
    """Backpropagation by hand, analytic in the parameters."""
    size = i["hidden"].size
    hidden, last = parameters[:size].reshape(i["hidden"].shape), parameters[size:].reshape(i["last"].shape)
    activations = [i["x"]]
    for w in hidden:
        activations.append(np.tanh(activations[-1] @ w.T))
    scores = np.exp(activations[-1] @ last.T)
    error = scores / scores.sum(1, keepdims=True)
    error[np.arange(len(i["t"])), i["t"]] -= 1
    error = error / len(i["t"])
    found, back = [error.T @ activations[-1]], error @ last
    for w, before, after in zip(hidden[::-1], activations[-2::-1], activations[:0:-1], strict=True):
        back = back * (1 - after**2)
        found.insert(0, back.T @ before)
        back = back @ w
    return np.concatenate([part.ravel() for part in found])


def flat(i: Inputs) -> np.ndarray:
    return np.concatenate([i["hidden"].ravel(), i["last"].ravel()])


def jacobian(f: Any, parameters: np.ndarray) -> np.ndarray:
    """All derivatives with respect to the parameters, which are the last axis, by complex steps."""
    steps = 1j * STEP * np.eye(len(parameters), dtype=parameters.dtype)
    return np.stack([f(parameters + step).imag / STEP for step in steps], axis=-1)


def jacobi_eigenvalues(a: np.ndarray) -> np.ndarray:
    """Eigenvalues of a symmetric matrix, descending, by Jacobi's rotations."""
    a = a.copy()
    for _ in range(12):
        for p in range(len(a)):
            for q in range(p + 1, len(a)):
                angle = np.arctan2(2 * a[p, q], a[q, q] - a[p, p]) / 2
                r = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
                a[:, [p, q]] = a[:, [p, q]] @ r
                a[[p, q]] = r.T @ a[[p, q]]
    return np.sort(np.diag(a))[::-1]


def truth_ggn(i: Inputs) -> np.ndarray:
    """Eigenvalues of the Gram matrix of factors: Jacobians by complex steps, times roots of the softmax's Hessians."""
    parameters = flat(i)
    j = jacobian(lambda p: outputs(p, i), parameters)
    scores = np.exp(outputs(parameters, i))
    probability = scores / scores.sum(1, keepdims=True)
    root = np.sqrt(probability)
    # diag(p) − p pᵀ = S Sᵀ with S = diag(√p) − p √pᵀ
    s = root[:, :, None] * np.eye(len(root[0]), dtype=root.dtype) - probability[:, :, None] * root[:, None, :]
    factors = np.sum(s[:, :, :, None] * j[:, :, None, :], axis=1).reshape(-1, len(parameters))
    return jacobi_eigenvalues(factors @ factors.T / len(i["x"]))[:TOP]


def truth_hessian(i: Inputs) -> np.ndarray:
    h = jacobian(lambda p: gradient_of_loss(p, i), flat(i))
    return solve(h + i["damping"] * np.eye(len(h), dtype=h.dtype), i["b"])


def draw_hessian(rng: np.random.Generator, samples: int, width: int, layers: int, classes: int) -> Inputs:
    drawn = draw(rng, samples, width, layers, classes)
    return {**drawn, "b": rng.standard_normal(flat(drawn).size), "damping": DAMPING}


GGN = problem(
    name="ggn",
    title="Spectrum of the Gauss–Newton matrix",
    text="The five largest eigenvalues for the cross-entropy of a network 5-5-3 with tanh and four samples. The result "
    "is the value itself.",
    draw=lambda rng, _: draw(rng, 4, 5, 1, 3),
    truth=truth_ggn,
    large=lambda rng: draw(rng, 32, 32, 2, 10),
    large_text="a network 32-32-32-10, 32 samples",
    is_gradient=False,
)
HESSIAN = problem(
    name="hessian",
    title="System with the Hessian of a network",
    text="(H + 0.1)⁻¹ b, H the Hessian of the cross-entropy of a network 4-4-4-3 with tanh and three samples. "
    "Iterative solvers (curvlinops with SciPy's minres, lineax with GMRES) stop at a relative residual of 1e-10 in "
    "float64 and 1e-5 in float32. The result is the value itself.",
    draw=lambda rng, _: draw_hessian(rng, 3, 4, 2, 3),
    truth=truth_hessian,
    large=lambda rng: draw_hessian(rng, 2, 8, 8, 4),
    large_text="8 layers of width 8, 2 samples, 544 parameters",
    is_gradient=False,
    hard=lambda: {
        **draw_hessian(np.random.default_rng(1), 3, 4, 2, 3), "hidden": np.zeros((2, 4, 4)), "damping": 0.0
    },
    hard_text="the weights are zero and there is no damping: the Hessian is singular",
)  # fmt: skip


# --- PyTorch ----------------------------------------------------------------------------------------------------------


def torch_module(hidden: Any, last: Any) -> Any:
    import torch

    layers = [
        layer
        for w in hidden
        for layer in (torch.nn.utils.skip_init(torch.nn.Linear, *w.shape, bias=False), torch.nn.Tanh())
    ]
    module = torch.nn.Sequential(*layers, torch.nn.utils.skip_init(torch.nn.Linear, *last.shape[::-1], bias=False))
    for parameter, value in zip(module.parameters(), [*hidden, last], strict=True):
        parameter.data = value.clone()
    return module


def torch_outputs(x: Any, t: Any, hidden: Any, last: Any) -> Any:
    """The outputs as a function of all parameters in one vector, and that vector."""
    import torch

    def f(parameters):
        y = x
        for w in parameters[: hidden.numel()].reshape(hidden.shape):
            y = torch.tanh(y @ w.T)
        return y @ parameters[hidden.numel() :].reshape(last.shape).T

    return f, torch.cat([hidden.flatten(), last.flatten()])


@cell("torch", GGN)
def _torch_ggn():
    import torch

    def spectrum(x, t, hidden, last):
        f, parameters = torch_outputs(x, t, hidden, last)
        j = torch.func.jacrev(f)(parameters)
        p = torch.softmax(f(parameters), 1)
        h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        ggn = torch.einsum("nci,ncd,ndj->ij", j, h, j) / len(x)
        return torch.linalg.eigvalsh(ggn).flip(0)[:TOP]

    return spectrum


@cell("curvlinops", GGN)
def _curvlinops_ggn():
    import torch
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import eigsh

    def spectrum(x, t, hidden, last):
        module = torch_module(hidden, last)
        parameters = list(module.parameters())
        operator = GGNLinearOperator(
            module, torch.nn.CrossEntropyLoss(), parameters, [(x, t)], check_deterministic=False
        )  # fmt: skip
        return eigsh(operator.to_scipy(), k=TOP, which="LA", v0=np.ones(operator.shape[0]))[0][::-1].copy()

    return spectrum


@cell("vivit", GGN)
def _vivit_ggn():
    import torch
    from backpack import backpack, extend
    from vivit import EigvalshComputation

    def spectrum(x, t, hidden, last):
        module, criterion = extend(torch_module(hidden, last)), extend(torch.nn.CrossEntropyLoss())
        computation = EigvalshComputation()
        group = {"params": list(module.parameters())}
        with backpack(computation.get_extension(), extension_hook=computation.get_extension_hook([group])):
            criterion(module(x), t).backward()
        return computation.get_result(group).flip(0)[:TOP]

    return spectrum


@cell("ddnref-torch", GGN)
def _ddnref_torch_ggn():
    def spectrum(x, t, hidden, last):
        chain = ddnref.networks.Chain.from_torch(torch_module(hidden, last))
        return ddnref.curvature.ggn_eigvalsh(chain, x, t)[:TOP]

    return spectrum


@cell("torch", HESSIAN)
def _torch_hessian():
    import torch

    def step(x, t, hidden, last, b, damping):
        f, parameters = torch_outputs(x, t, hidden, last)
        h = torch.func.hessian(lambda p: torch.nn.functional.cross_entropy(f(p), t))(parameters)
        return torch.linalg.solve(h + damping * torch.eye(len(b), dtype=b.dtype), b)

    return step


@cell("curvlinops", HESSIAN)
def _curvlinops_hessian():
    import torch
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import LinearOperator, minres

    def step(x, t, hidden, last, b, damping):
        module = torch_module(hidden, last)
        parameters = list(module.parameters())
        hessian = HessianLinearOperator(
            module, torch.nn.CrossEntropyLoss(), parameters, [(x, t)], check_deterministic=False
        ).to_scipy()
        damped = LinearOperator(hessian.shape, lambda v: hessian @ v + damping * v, dtype=hessian.dtype)
        found, status = minres(damped, b.numpy(), rtol=1e-10 if b.dtype == torch.float64 else 1e-5, maxiter=1000)
        return found, status == 0

    return step


@cell("ddnref-torch", HESSIAN)
def _ddnref_torch_hessian():
    import torch

    def step(x, t, hidden, last, b, damping):
        chain = ddnref.networks.Chain.from_torch(torch_module(hidden, last))
        parts = [
            part.reshape(p.shape)
            for part, p in zip(b.split([p.numel() for p in chain.params]), chain.params, strict=True)
        ]
        solution, info = ddnref.curvature.hessian_solve(chain, x, t, parts, damping=damping)
        return torch.cat([part.flatten() for part in solution])

    return step


# --- JAX --------------------------------------------------------------------------------------------------------------


def jax_outputs(x: Any, hidden: Any, last: Any) -> Any:
    import jax.numpy as jnp

    def f(parameters):
        y = x
        for w in parameters[: hidden.size].reshape(hidden.shape):
            y = jnp.tanh(y @ w.T)
        return y @ parameters[hidden.size :].reshape(last.shape).T

    return f, jnp.concatenate([hidden.ravel(), last.ravel()])


@cell("jax", GGN)
def _jax_ggn():
    import jax
    import jax.numpy as jnp

    def spectrum(x, t, hidden, last):
        f, parameters = jax_outputs(x, hidden, last)
        j = jax.jacrev(f)(parameters)
        p = jax.nn.softmax(f(parameters), axis=1)
        h = p[:, :, None] * jnp.eye(p.shape[1], dtype=p.dtype) - p[:, :, None] * p[:, None, :]
        ggn = jnp.einsum("nci,ncd,ndj->ij", j, h, j, optimize=True) / len(x)
        return jnp.linalg.eigvalsh(ggn)[::-1][:TOP]

    return spectrum


def jax_loss(f: Any, t: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return lambda p: -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(f(p), axis=1), t[:, None], axis=1))


@cell("jax", HESSIAN)
def _jax_hessian():
    import jax
    import jax.numpy as jnp

    def step(x, t, hidden, last, b, damping):
        f, parameters = jax_outputs(x, hidden, last)
        h = jax.hessian(jax_loss(f, t))(parameters)
        return jnp.linalg.solve(h + damping * jnp.eye(len(b), dtype=b.dtype), b)

    return step


@cell("lineax", HESSIAN)
def _lineax_hessian():
    import jax
    import jax.numpy as jnp
    import lineax as lx

    def step(x, t, hidden, last, b, damping):
        f, parameters = jax_outputs(x, hidden, last)
        gradient = jax.grad(jax_loss(f, t))

        def product(v):
            return jax.jvp(gradient, (parameters,), (v,))[1] + damping * v

        tol = 1e-10 if b.dtype == jnp.float64 else 1e-5
        operator = lx.FunctionLinearOperator(product, jax.ShapeDtypeStruct(b.shape, b.dtype), lx.symmetric_tag)
        solution = lx.linear_solve(operator, b, lx.GMRES(rtol=tol, atol=0.0, restart=len(b)))
        return solution.value, solution.result == lx.RESULTS.successful

    return step
