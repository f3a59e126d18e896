"""Systems for the Krylov solvers: matrices with a known spectrum, operators of a user, and how a solver is called."""

from functools import partial

import numpy as np
from problems import rotation, with_spectrum
from public_names import PUBLIC

from ddnref.operators import LinearOperator

SOLVERS = {name: PUBLIC[name] for name in ("cg", "minres", "bicgstab", "gmres", "lsmr")}
TIGHT = {"rtol": 1e-12}


def definite(rng, n, batch=(), is_complex=False, condition=10.0):
    """Self-adjoint positive definite, eigenvalues evenly spread on a logarithmic scale."""
    return with_spectrum(rotation(rng, n, batch, is_complex), np.geomspace(1.0, 1 / condition, n))


def indefinite(rng, n, batch=(), is_complex=False):
    w = np.concatenate([-np.linspace(1.0, 2.0, n // 3), np.linspace(0.5, 3.0, n - n // 3)])
    return with_spectrum(rotation(rng, n, batch, is_complex), w)


def general(rng, n, batch=(), is_complex=False):
    """Not self-adjoint, with all eigenvalues to the right of zero."""
    z = rng.standard_normal((*batch, n, n))
    z = z + 1j * rng.standard_normal(z.shape) if is_complex else z
    return 3 * np.eye(n) + z / n**0.5


def tall(rng, n, batch=(), is_complex=False):
    z = rng.standard_normal((*batch, 2 * n, n))
    return z + 1j * rng.standard_normal(z.shape) if is_complex else z


MATRICES = {"cg": definite, "minres": indefinite, "bicgstab": general, "gmres": general, "lsmr": tall}


def vectors(rng, shape, is_complex=False):
    z = rng.standard_normal(shape)
    return z + 1j * rng.standard_normal(shape) if is_complex else z


def direct(a, b):
    """By LAPACK: the solution, or that of least squares."""
    return (np.linalg.pinv(a) @ b[..., None])[..., 0]


def solve(xp, name, *arrays, **options):
    """A solver with ``throw=False``; on JAX compiled, with JAX's own loop."""
    options = {"throw": False, "while_loop": xp.while_loop} | options
    return xp.jit(partial(SOLVERS[name], **options))(*arrays)


def diagonal(d):
    """A user's own operator on vectors of one axis: it returns a buffer that it writes again in the next call."""
    buffers = {}

    def apply(params, x):
        shape = np.broadcast_shapes(params[0].shape, x.shape)
        out = buffers.setdefault(shape, np.empty(shape, x.dtype))
        return np.multiply(params[0], x, out=out)

    def params_vjp(params, y_bar, x):
        return (np.sum(y_bar * x, axis=tuple(range(x.ndim - params[0].ndim))),)

    return LinearOperator((d,), apply, apply, params_vjp, d.shape[-1:], d.shape[-1:], self_adjoint=True)


def stencil(weight):
    """``(4 + w) x`` less its four neighbours: a plain function of slices, alike for one image and for many."""

    def apply(params, x):
        y = (4 + params[0]) * x
        y[..., 1:, :] -= x[..., :-1, :]
        y[..., :-1, :] -= x[..., 1:, :]
        y[..., :, 1:] -= x[..., :, :-1]
        y[..., :, :-1] -= x[..., :, 1:]
        return y

    def params_vjp(params, y_bar, x):
        return (np.sum(y_bar * x, axis=tuple(range(x.ndim - params[0].ndim))),)

    shape = weight.shape
    return LinearOperator((weight,), apply, apply, params_vjp, shape, shape, self_adjoint=True)
