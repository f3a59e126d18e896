"""The tutorial's forward and backward passes through single eigenvectors and ours, by the tutorial's names.

AT is a framework's autograd through ``eigh``, PI power iteration, SI simultaneous iteration. DDN: the declarative
node, IFT: the fixed point; J: with the Jacobian, E: structured.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

import ddnref
from ddnref import reference
from ddnref.report.matrices import cotangent, matrices

Matrix: TypeAlias = NDArray[Any]
Size: TypeAlias = tuple[int, ...]
"""``(b, m, n)``: n eigenvectors of each of b matrices, m×m."""
Call: TypeAlias = Callable[[], Any]

STEPS = 100  # as in the tutorial; ours stop earlier, where they have converged
GIB = 2**30
MEMORY = 2 * GIB  # what a pass may be expected to take


def forward(name: str, x: Matrix, n: int, *, stop: bool = True) -> tuple[Matrix, Matrix]:
    """The n eigenpairs of largest magnitude by ``eigh``, "PI" (n = 1) or "SI"; all steps unless they may `stop`."""
    options: dict[str, Any] = {"symmetric": True, "maxiter": STEPS, "throw": False, "rtol": None if stop else 0.0}
    if name == "PI":
        (w, v), _ = ddnref.power_iteration(x, **options)
        return w[..., None], v[..., None]
    if name == "SI":
        return ddnref.simultaneous_iteration(x, n, **options)[0]
    w, v = ddnref.eigh(x)
    order = np.argsort(-np.abs(w), axis=-1)[..., :n]
    v = np.take_along_axis(v, order[..., None, :], axis=-1)
    return np.take_along_axis(w, order, axis=-1), np.asarray(ddnref.align_signs(v))


def _implicit(method: str, v_bar: Matrix, x: Matrix, w: Matrix, v: Matrix) -> Matrix:
    return np.asarray(ddnref.simultaneous_iteration_vjp(None, v_bar, w, v, x, method=method, symmetric=True))


def unrolled(name: str, v_bar: Matrix, x: Matrix, w: Matrix, v: Matrix, *, symmetric: bool = True) -> Matrix:
    """The reverse of all steps of "PI" or "SI"; without `symmetric` as it comes, for n = 1."""
    options: dict[str, Any] = {"method": "unrolled", "n_iter": STEPS, "symmetric": symmetric}
    if name == "PI":
        return np.asarray(ddnref.power_iteration_vjp(None, v_bar[..., 0], w[..., 0], v[..., 0], x, **options))
    return np.asarray(ddnref.simultaneous_iteration_vjp(None, v_bar, w, v, x, **options))


class Backward(NamedTuple):
    """A backward pass ``run(v_bar, x, w, v)``."""

    run: Callable[..., Matrix]
    jacobian: int = 0
    """Bytes that it takes for each of the m×m² numbers of a Jacobian, if it stores one: as measured, rounded up."""


BACKWARD: dict[str, Backward] = {
    "DDN-J": Backward(partial(reference.ddn_vjp_jacobian, mode="solve"), jacobian=24),
    "DDN-E": Backward(partial(reference.ddn_vjp_schur, mode="solve")),
    "DDN-E, pinv": Backward(partial(reference.ddn_vjp_schur, mode="pinv")),
    "IFT-J": Backward(reference.ift_vjp_jacobian, jacobian=8),
    "IFT-E, B stored": Backward(partial(reference.ift_vjp_structured, store_b=True), jacobian=8),
    "IFT-E": Backward(reference.ift_vjp_structured),
    "fixed_point": Backward(partial(_implicit, "fixed_point")),
    "bordered": Backward(partial(_implicit, "bordered")),
}
OURS = ("fixed_point", "bordered")


def iteration(n: int) -> str:
    """Which iteration finds n eigenpairs."""
    return "PI" if n == 1 else "SI"


def full_name(backward: str, n: int) -> str:
    """As in the tutorial, "PI-DDN-E"; ours as they are called in the package."""
    return backward if backward in OURS else f"{iteration(n)}-{backward}"


def names(n: int) -> list[str]:
    """All passes whose cost is measured, in the order of the tables: forward passes first."""
    iterations = ["PI", "SI"] if n == 1 else ["SI"]
    unroll = [f"{name}-Unroll" for name in iterations]
    backward = [full_name(name, n) for name in BACKWARD]
    return ["AT forward", *(f"{name} forward" for name in iterations), "AT", *unroll, *backward]


def expected_bytes(name: str, size: Size) -> float:
    """What a pass with a Jacobian takes; nothing to speak of for the others."""
    b, m, n = size
    pairs = n if name.endswith("DDN-J") else 1  # the others take one pair at a time
    each = next((one.jacobian for short, one in BACKWARD.items() if name == full_name(short, n)), 0)
    return float(b * m**3 * pairs * each)


# --- what the process that measures calls -----------------------------------------------------------------------


def numpy_passes(size: Size) -> dict[str, Call]:
    """Every pass in NumPy, float32, on Gaussian matrices; without those whose memory would not do."""
    b, m, n = size
    x = matrices("gaussian", b, m, seed=0)
    w, v = forward("eigh", x, n)
    v_bar = cotangent("random", v.shape, seed=0).astype(x.dtype)
    calls: dict[str, Call] = {}
    for name in ("PI", "SI") if n == 1 else ("SI",):
        calls[f"{name} forward"] = partial(forward, name, x, n)
        calls[f"{name}-Unroll"] = partial(unrolled, name, v_bar, x, w, v)
    for short, one in BACKWARD.items():
        calls[full_name(short, n)] = partial(one.run, v_bar, x, w, v)
    return {name: call for name, call in calls.items() if expected_bytes(name, size) <= MEMORY}


def torch_passes(size: Size) -> dict[str, Call]:
    """PyTorch's ``eigh`` and its autograd."""
    import torch

    b, m, n = size
    torch.set_num_threads(1)
    x = torch.tensor(matrices("gaussian", b, m, seed=0), requires_grad=True)
    v = torch.linalg.eigh(x)[1][..., -n:]
    v_bar = torch.tensor(cotangent("random", (b, m, n), seed=0).astype(np.float32))
    return {
        "AT forward": partial(torch.linalg.eigh, x),
        "AT": partial(torch.autograd.grad, v, x, v_bar, retain_graph=True),
    }


PROCESSES = {"NumPy": f"{__name__}:numpy_passes", "PyTorch": f"{__name__}:torch_passes"}
"""By library, as `ddnref.report.cost` finds them."""
