"""The GGN of two networks: ours, vivit's, curvlinops' with SciPy's eigsh. Peers are optional and skipped by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import ddnref
from ddnref.curvature.ggn import _spectrum

from ._common import Call, Case, kilobytes, load

K = 10
DAMPING = 1.0
NETS = {"784-64-32-10": ((784, 64, 32, 10), 64), "64-128-128-10": ((64, 128, 128, 10), 128)}
TASKS = ("eigvalsh", "eigh", "derivatives", "newton")


class Problem(NamedTuple):
    weights: list[np.ndarray]
    biases: list[np.ndarray]
    x: np.ndarray
    t: np.ndarray


@lru_cache(maxsize=2)
def problem(net: str) -> Problem:
    """Weights as PyTorch draws them, in size, and random data, in float32."""
    widths, n = NETS[net]
    rng = np.random.default_rng(0)

    def draw(bound: float, *shape: int) -> np.ndarray:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    weights = [draw(a_in**-0.5, a_out, a_in) for a_in, a_out in pairwise(widths)]
    biases = [draw(a_in**-0.5, a_out) for a_in, a_out in pairwise(widths)]
    return Problem(weights, biases, rng.random((n, widths[0]), dtype=np.float32), rng.integers(0, widths[-1], n))


# --- ours ---------------------------------------------------------------------------------------------------------


def chain(net: str) -> tuple[ddnref.networks.Chain, np.ndarray, np.ndarray]:
    p = problem(net)
    last = len(p.weights) - 1
    layers = [
        ddnref.networks.Dense(w, b, "identity" if i == last else "relu")
        for i, (w, b) in enumerate(zip(p.weights, p.biases, strict=True))
    ]
    return ddnref.networks.Chain(layers, "cross_entropy"), p.x, p.t


def ours(task: str, net: str) -> Call:
    """Call the public function as a user does, with all checks on."""
    data = chain(net)
    return {
        "eigvalsh": partial(ddnref.curvature.ggn_eigvalsh, *data),
        "eigh": partial(ddnref.curvature.ggn_eigh, *data, k=K),
        "derivatives": partial(ddnref.curvature.ggn_directional_derivatives, *data, k=K),
        "newton": partial(ddnref.curvature.ggn_damped_newton, *data, k=K, damping=DAMPING),
    }[task]


def assembly(net: str) -> Call:
    """The Gram matrix alone: forward, backward, products."""
    network, x, t = chain(net)
    reducer = ddnref.curvature.ggn_reducer(network, gradient=False)
    return lambda: reducer.finalise(reducer.update(reducer.init(), x, t))


def values(net: str) -> Call:
    """The eigenvalues of that Gram matrix alone."""
    gram = assembly(net)().grams[0]
    return partial(_spectrum.values, gram, gram.shape[0])


# --- peers --------------------------------------------------------------------------------------------------------


def _module(torch: Any, net: str) -> tuple[Any, Any, Any]:
    p = problem(net)
    layers: list[Any] = []
    for w, b in zip(p.weights, p.biases, strict=True):
        linear = torch.nn.Linear(w.shape[1], w.shape[0])
        linear.weight.data, linear.bias.data = torch.from_numpy(w.copy()), torch.from_numpy(b.copy())
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1]), torch.from_numpy(p.x), torch.from_numpy(p.t)


def vivit(task: str, net: str) -> Call:
    """One backward pass with its extension, its hook, and its result; `symeig`, which torch removed, put back."""
    torch = load("torch")
    load("vivit")
    from backpack import backpack, extend
    from vivit import DirectionalDampedNewtonComputation, DirectionalDerivativesComputation
    from vivit.linalg.eigh import EighComputation
    from vivit.linalg.eigvalsh import EigvalshComputation

    def symeig(x: Any, eigenvectors: bool = False, upper: bool = True) -> tuple[Any, Any]:  # noqa: ARG001
        return tuple(torch.linalg.eigh(x)) if eigenvectors else (torch.linalg.eigvalsh(x), torch.empty(0))

    torch.Tensor.symeig = symeig
    module, x, t = _module(torch, net)
    module, loss = extend(module), extend(torch.nn.CrossEntropyLoss())
    group: dict[str, Any] = {"params": list(module.parameters())}
    group |= {"criterion": lambda w: list(range(len(w) - K, len(w))), "damping": lambda *_: DAMPING * torch.ones(K)}
    kind = {
        "eigvalsh": EigvalshComputation,
        "eigh": EighComputation,
        "derivatives": DirectionalDerivativesComputation,
        "newton": DirectionalDampedNewtonComputation,
    }[task]

    def call() -> Any:
        options = {} if task == "eigvalsh" else {"warn_small_eigvals": 0.0}
        computation = kind(**options)
        many = hasattr(computation, "get_extensions")
        extensions = computation.get_extensions() if many else [computation.get_extension()]
        module.zero_grad()
        value = loss(module(x), t)
        with backpack(*extensions, extension_hook=computation.get_extension_hook([group])):
            value.backward()
        return computation.get_result(group)

    return call


def curvlinops(net: str) -> Call:
    """The k largest eigenpairs by SciPy's eigsh on its matrix-free GGN, to the tolerance of our single precision."""
    torch = load("torch")
    load("curvlinops")
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import eigsh

    module, x, t = _module(torch, net)
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}

    def call() -> Any:
        try:
            ggn = GGNLinearOperator(module, torch.nn.CrossEntropyLoss(), params, [(x, t)], check_deterministic=False)
        except (TypeError, AttributeError):
            ggn = GGNLinearOperator(
                module, torch.nn.CrossEntropyLoss(), list(params.values()), [(x, t)], check_deterministic=False
            )
        return eigsh(ggn.to_scipy() if hasattr(ggn, "to_scipy") else ggn, k=K, which="LA", tol=1e-6)

    return call


def difference(net: str) -> float:
    """Largest difference of ours and vivit's eigenvalues, relative to the largest: both must compute the same."""
    w, own = np.asarray(vivit("eigvalsh", net)())[::-1], ours("eigvalsh", net)()
    return float(np.max(np.abs(own - w[: len(own)])) / own[0])


# --- memory -------------------------------------------------------------------------------------------------------


def growth(case: Case) -> float:
    """MiB by which the resident memory of a process grows at most during its second call of a case."""
    folders = [Path(__file__).parents[1], Path(ddnref.__file__).parents[1]]
    # large arrays are given back when they are freed, so that the first call leaves none for the second to use
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", f"{__package__}._ggn_cases", json.dumps([*case])]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    answer = output.stdout.strip().splitlines()
    if output.returncode or not answer:
        raise RuntimeError(f"the process that measures {case} failed: {output.stderr[-500:]}")
    value = json.loads(answer[-1])
    if isinstance(value, str):
        raise NotImplementedError(value)
    return float(value)


def _main() -> None:
    name, options = json.loads(sys.argv[1])
    try:
        call = Case(name, options).build()
        call()
        before = kilobytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts from here
        call()
        print(json.dumps((kilobytes("VmHWM") - before) / 1024))
    except NotImplementedError as missing:
        print(json.dumps(str(missing)))


if __name__ == "__main__":
    _main()
