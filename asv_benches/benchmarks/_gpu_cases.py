"""Every operation as calls on the arrays of one library, and what a GPU takes for a call."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import ddnref
from ddnref._rules.binding import options_of, plain_forward, plain_vjp
from ddnref._rules.table import RULES, TRIALS

from . import _hessian_cases, networks
from ._common import Backend, Call, load, seconds

SOLVERS = ("cg", "minres", "bicgstab", "gmres", "lsmr", "eigsh")
NETWORK = (*networks.PRODUCTS, "ggn_eigvalsh", "ggn_eigh", "ggn_damped_newton")
MIB = 2**20


def rule(on: Backend, name: str, batch: int, m: int, dtype: str) -> tuple[Call, Call]:
    """Forward and VJP of a rule in the table, with its own sample; no flag is read but by what iterates."""

    def convert(values: Any) -> np.ndarray:
        values = np.asarray(values)
        return values.astype(dtype) if values.dtype.kind == "f" else values

    sample = TRIALS[name].sample(convert, np.random.default_rng(0), (batch,), m, False)
    forward_options, vjp_options = options_of(RULES[name], sample.options)
    inputs = tuple(on.array(x) for x in sample.inputs)
    forward = partial(plain_forward(RULES[name]), *inputs, **forward_options)
    outputs, saved = plain_forward(RULES[name])(*sample.inputs, **forward_options)  # on the host: they are NumPy's
    bars = sample.loss[1](*outputs) if sample.loss else outputs
    bars = bars if isinstance(bars, tuple) else (bars,)
    kept = (*outputs, *saved, *(sample.inputs[i] for i in RULES[name].needs))
    arrays = [on.array(np.ascontiguousarray(a)) for a in (*map(convert, bars), *kept)]
    return forward, partial(plain_vjp(RULES[name]), *arrays, **vjp_options)


def solver(on: Backend, name: str, n: int, dtype: str) -> Call:
    """A Krylov method on a blur with a ridge over an n×n grid; `eigsh`: its four largest eigenpairs."""
    rng = np.random.default_rng(0)
    kernel = on.array(np.full((5, 5), 1 / 25, dtype))
    operator = ddnref.operators.normal(ddnref.operators.convolution(kernel, (n, n)), on.array(np.asarray(0.1, dtype)))
    if name == "eigsh":
        start = on.array(rng.standard_normal((n, n)).astype(dtype))
        return lambda: ddnref.eigsh(operator, 4, v0=start, rtol=1e-3, throw=False)
    b = on.array(rng.standard_normal((n, n)).astype(dtype))
    return lambda: getattr(ddnref.krylov, name)(operator, b, rtol=1e-3, throw=False)


def network(on: Backend, name: str, net: str, dtype: str) -> Call:
    """A product with a network's derivatives, or its Gauss–Newton matrix by way of the Gram matrix."""
    if name in networks.PRODUCTS:
        return networks.call(on, name, net, dtype)
    p = networks.problem(net, dtype)
    chain = ddnref.networks.Chain.from_arrays([on.array(a) for a in p.params])
    x, t = on.array(p.x), on.array(p.t)
    calls: dict[str, Callable[[], Any]] = {
        "ggn_eigvalsh": lambda: ddnref.curvature.ggn_eigvalsh(chain, x, t, throw=False),
        "ggn_eigh": lambda: ddnref.curvature.ggn_eigh(chain, x, t, k=10, throw=False),
        "ggn_damped_newton": lambda: ddnref.curvature.ggn_damped_newton(chain, x, t, k=10, damping=1.0, throw=False),
    }
    return calls[name]


def hessian(on: Backend, layers: int, width: int, samples: int) -> Call:
    """Derivatives, factorisation of the damped Hessian and one refined solve, in double precision."""
    p = _hessian_cases.problem(layers, width, samples)
    layers = [ddnref.networks.Dense(on.array(layer.weight), None, layer.activation) for layer in p.chain.layers]
    chain = ddnref.networks.Chain(layers, "cross_entropy")
    x, t, b = on.array(p.x), on.array(p.t), [on.array(a) for a in p.b]
    return lambda: ddnref.curvature.hessian_solve(chain, x, t, b, damping=1e-3, throw=False)


# --- the instruments ----------------------------------------------------------------------------------------------


def gpu_time(call: Call) -> float:
    """Median time between two events on the current stream, in ms: what the GPU takes, whatever the host does."""
    load("cupy")
    from cupyx.profiler import benchmark

    times = benchmark(call, n_repeat=1000, n_warmup=3, max_duration=seconds()).gpu_times
    return 1e3 * float(np.median(times))


def gpu_memory(call: Call) -> float:
    """Peak of what a second call holds of CuPy's memory pool above what is held before, in MiB.

    Counted request by request: the pool's own total only says what it has ever taken from the device.
    """
    hook_type = load("cupy").cuda.MemoryHook

    class Peak(hook_type):  # type: ignore[misc, valid-type]
        name = "Peak"
        held = 0
        peak = 0

        def malloc_postprocess(self, **given: Any) -> None:
            self.held += given["mem_size"]
            self.peak = max(self.peak, self.held)

        def free_postprocess(self, **given: Any) -> None:
            self.held -= given["mem_size"]

    call()  # kernels, plans and handles are made once
    with Peak() as hook:
        call()
    return hook.peak / MIB
