"""Random problems of the implicit nodes at inexact points, with gradients from extended precision.

One family serves all nodes: ``½ yᵀSy + ¼ β Σ y⁴ − xᵀy`` (for a root with S not symmetric) under constraints
``C y + ½ k ‖y‖² = t`` or ``≤ t``. S has condition numbers up to 1e7, constraints have any units, multipliers and slacks
of inequalities spread over six decades, and points are wrong by 1e-12 to 1e-2 of their length. Nothing is filtered.
"""

import array_api_compat
import numpy as np

from ddnref import implicit

from ._results import Promise, joined, of_batch

KINDS = ("root", "argmin", "equality", "linear", "inequality")
NAMES = ("root_vjp", "argmin_vjp", "eq_argmin_vjp", "lineq_argmin_vjp", "ineq_argmin_vjp")
GROUP = 50
"""Problems of one shape, which are solved at once."""


def dot(a, x):
    return (a @ x[..., None])[..., 0]


def transpose(a):
    return array_api_compat.array_namespace(a).matrix_transpose(a)


def outer(u, v):
    return u[..., :, None] * v[..., None, :]


def diagonal_matrix(d):
    xp = array_api_compat.array_namespace(d)
    i = xp.arange(d.shape[-1], device=array_api_compat.device(d))
    return xp.where(i[:, None] == i, d[..., None], xp.zeros_like(d[..., None]))


def log_uniform(rng, low, high, shape):
    return np.exp(rng.uniform(np.log(low), np.log(high), shape))


class Problems:
    """A batch of problems of one kind: inputs, exact points and gradients, and the node at any point."""

    def __init__(self, kind, rng, count, dtype=np.float64):
        n = int(rng.integers(2, 9))
        p = {"root": 0, "argmin": 0, "inequality": 2 * n}.get(kind, int(rng.integers(1, n)))
        self.kind, self.n, self.p, self.dtype = kind, n, p, dtype
        self.least = 1e-6 if dtype == np.float64 else 1e-3  # above the rounding of the inputs
        self.beta = float(rng.choice([0.0, 0.3, 3.0]))
        self.k = np.zeros(p) if kind == "linear" else rng.choice([0.0, 1.0], p)
        # The matrix, of any condition that a float32 gradient survives in part.
        power = 7 if dtype == np.float64 else 3
        u, v = (np.linalg.qr(rng.standard_normal((count, n, n)))[0] for _ in range(2))
        values = 10.0 ** -(rng.uniform(0, power, (count, 1)) * np.linspace(0, 1, n))
        s = (u * values[..., None, :]) @ transpose(v if kind == "root" else u)
        y = rng.standard_normal((count, n)) * log_uniform(rng, 0.1, 10, (count, 1))
        c = rng.standard_normal((count, p, n)) * log_uniform(rng, 0.1, 10, (count, p, 1))
        nu, slack = rng.standard_normal((count, p)), np.zeros((count, p))
        if kind == "inequality":
            # At most n − 1 are active.
            self.active = np.argsort(rng.uniform(size=(count, p)), axis=-1) < rng.integers(0, n, (count, 1))
            size = np.linalg.norm(c, axis=-1)
            force, length = (np.linalg.norm(a, axis=-1, keepdims=True) for a in (self.gradient(y, s, 0 * y), y))
            nu = np.where(self.active, -log_uniform(rng, self.least, 1, (count, p)) * force / size, 0)
            slack = np.where(self.active, 0, log_uniform(rng, self.least, 1, (count, p)) * length * size)
        else:
            self.active = np.ones((count, p), dtype=bool)
        s, c = s.astype(dtype), c.astype(dtype)
        x = (self.gradient(y, s, 0 * y) - dot(transpose(self.slopes(y, s, y, c)), nu)).astype(dtype)
        t = (self.constraint(y, s, x, c, 0 * slack) + slack).astype(dtype)
        self.inputs = (s, x) if p == 0 else (s, x, c, t)
        if kind == "linear":
            self.inputs = (c, t, s, x)
        self.parts = (s, x, c, t)
        self.solve(y, nu)
        self.y_bar = rng.standard_normal((count, n)).astype(dtype)
        self.bars = self.exact_gradient()
        direction = rng.standard_normal((count, n))
        self.distance = log_uniform(rng, 1e-12 if dtype == np.float64 else 1e-7, 1e-2, (count, 1))
        step = self.distance * np.linalg.norm(y, axis=-1, keepdims=True) * direction
        self.y = (self.exact_y + step / np.linalg.norm(direction, axis=-1, keepdims=True)).astype(dtype)

    # The callables, for arrays of any library and precision

    def gradient(self, y, s, x, *_):
        product = dot(s, y) if self.kind == "root" else (dot(s, y) + dot(transpose(s), y)) / 2
        return product + self.beta * y**3 - x

    def hessian(self, y, nu, s, x, c, t):
        xp = array_api_compat.array_namespace(y)
        matrix = (s if self.kind == "root" else (s + transpose(s)) / 2) + diagonal_matrix(3 * self.beta * y * y)
        if self.p == 0 or self.kind == "linear":
            return matrix
        curvature = xp.sum(self.like(self.k, nu) * nu, axis=-1, keepdims=True)
        return matrix - diagonal_matrix(curvature + xp.zeros_like(y))

    def constraint(self, y, s, x, c, t):
        xp = array_api_compat.array_namespace(y)
        return dot(c, y) + self.like(self.k, y) * xp.sum(y * y, axis=-1, keepdims=True) / 2 - t

    def slopes(self, y, s, x, c, *_):
        return c + self.like(self.k, y)[:, None] * y[..., None, :]

    def residual_vjp(self, w, eta, y, nu, s, x, c, t):
        s_bar = outer(w, y) if self.kind == "root" else (outer(w, y) + outer(y, w)) / 2
        return s_bar, -w, outer(eta, y) - outer(nu, w), -eta

    @staticmethod
    def like(k, y):
        xp = array_api_compat.array_namespace(y)
        return xp.asarray(k, dtype=y.dtype, device=array_api_compat.device(y))

    # Extended precision

    def matrix(self, y, nu):
        """The bordered matrix, with ones for constraints that are not active."""
        c = np.where(self.active[..., None], self.slopes(y, *self.parts), 0)
        free = diagonal_matrix((~self.active).astype(y.dtype))
        top = np.concat([self.hessian(y, nu, *self.parts), -transpose(c)], axis=-1)
        return np.concat([top, np.concat([c, free], axis=-1)], axis=-2)

    def solve(self, y, nu):
        """Newton's method with residuals in extended precision, from the point that the inputs were made for."""
        z = np.concat([y, nu], axis=-1).astype(np.longdouble)
        for _ in range(30):
            y, nu = z[..., : self.n], z[..., self.n :]
            k = self.matrix(y, nu)
            h = np.where(self.active, self.constraint(y, *self.parts), 0)
            c = np.where(self.active[..., None], self.slopes(y, *self.parts), 0)
            r = np.concat([self.gradient(y, *self.parts) - dot(transpose(c), nu), h], axis=-1)
            z = z - np.linalg.solve(k.astype(float), r.astype(float)[..., None])[..., 0]
        self.exact_y, self.exact_nu = z[..., : self.n], z[..., self.n :]

    def exact_gradient(self):
        y, nu = self.exact_y, self.exact_nu
        k = self.matrix(y, nu)
        k = transpose(k) if self.kind == "root" else k
        a = np.concat([self.y_bar, 0 * nu], axis=-1).astype(np.longdouble)
        inverse, w = np.linalg.inv(k.astype(float)), 0 * a
        for _ in range(12):
            w = w + dot(inverse, (a - dot(k, w)).astype(float))
        bars = self.residual_vjp(w[..., : self.n], -w[..., self.n :], y, nu, *self.parts)
        bars = {2: bars[:2], 4: bars}[len(self.inputs)]
        return tuple(-b for b in ((bars[2], bars[3], bars[0], bars[1]) if self.kind == "linear" else bars))

    def residual_jvp(self, s_dot, x_dot, c_dot, t_dot, y, nu, s, x, c, t):
        s_dot = s_dot if self.kind == "root" else (s_dot + transpose(s_dot)) / 2
        return dot(s_dot, y) - x_dot - dot(transpose(c_dot), nu), dot(c_dot, y) - t_dot

    def exact_tangent(self, dots):
        """The tangent of y along those of the inputs."""
        zeros = (0 * self.parts[2], 0 * self.parts[3])
        dots = (dots[2], dots[3], dots[0], dots[1]) if self.kind == "linear" else (*dots, *zeros)[:4]
        f_dot, h_dot = self.residual_jvp(
            *(d.astype(np.longdouble) for d in dots), self.exact_y, self.exact_nu, *self.parts
        )
        a = -np.concat([f_dot, np.where(self.active, h_dot, 0)], axis=-1)
        k, u = self.matrix(self.exact_y, self.exact_nu), 0 * a
        inverse = np.linalg.inv(k.astype(float))
        for _ in range(12):
            u = u + dot(inverse, (a - dot(k, u)).astype(float))
        return u[..., : self.n]

    def jvp(self, *arrays, **options):
        """The forward mode of the node at a point, for ``(*tangents, y, *inputs)``."""
        count = len(self.inputs)
        dots, y, inputs = arrays[:count], arrays[count], arrays[count + 1 :]
        objective = {"gradient": self.gradient, "hessian": lambda y, s, x: self.hessian(y, None, s, x, None, None)}
        moved = lambda s_dot, x_dot, y, s, x: (
            (dot(s_dot, y) if self.kind == "root" else (dot(s_dot, y) + dot(transpose(s_dot), y)) / 2) - x_dot
        )
        if self.kind == "root":
            stated = dict(zip(("residual", "jacobian"), objective.values(), strict=True))
            return implicit.root_jvp(*dots, y, *inputs, **stated, residual_jvp=moved, **options)
        objective["gradient_jvp"] = moved
        if self.kind == "argmin":
            return implicit.argmin_jvp(*dots, y, *inputs, **objective, **options)
        if self.kind == "linear":
            return implicit.lineq_argmin_jvp(*dots, y, None, *inputs, **objective, **options)
        stated = {
            "gradient": self.gradient, "hessian": self.hessian, "constraint": self.constraint,
            "constraint_jacobian": self.slopes, "residual_jvp": self.residual_jvp,
        }  # fmt: skip
        node = implicit.eq_argmin_jvp if self.kind == "equality" else implicit.ineq_argmin_jvp
        return node(*dots, y, None, *inputs, **stated, **options)

    def vjp(self, y_bar, y, *inputs, **options):
        """The node at a point."""
        objective = {"gradient": self.gradient, "hessian": lambda y, s, x: self.hessian(y, None, s, x, None, None)}
        if self.kind == "root":
            stated = dict(zip(("residual", "jacobian"), objective.values(), strict=True))
            return implicit.root_vjp(
                y_bar, y, *inputs, **stated, residual_vjp=lambda w, y, s, x: (outer(w, y), -w), **options
            )
        objective["gradient_vjp"] = lambda w, y, s, x: ((outer(w, y) + outer(y, w)) / 2, -w)
        if self.kind == "argmin":
            return implicit.argmin_vjp(y_bar, y, *inputs, **objective, **options)
        if self.kind == "linear":
            return implicit.lineq_argmin_vjp(y_bar, y, None, *inputs, **objective, **options)
        stated = {
            "gradient": self.gradient, "hessian": self.hessian, "constraint": self.constraint,
            "constraint_jacobian": self.slopes, "residual_vjp": self.residual_vjp,
        }  # fmt: skip
        node = implicit.eq_argmin_vjp if self.kind == "equality" else implicit.ineq_argmin_vjp
        return node(y_bar, y, None, *inputs, **stated, **options)

    def errors(self, bars):
        """The relative error of a gradient, the largest over the inputs, per problem."""
        found = np.zeros(len(self.y))
        for bar, exact in zip(bars, self.bars, strict=True):
            axes = tuple(range(1, exact.ndim))
            norm = lambda a, axes=axes: np.sqrt(np.sum(a.astype(np.longdouble) ** 2, axis=axes)).astype(float)
            size = norm(exact)
            found = np.maximum(found, norm(bar - exact) / np.where(size > 0, size, 1))
        return found


def measured(kind, rng, problems, dtype):
    """Gradients at points that are nearly right, and in every fourth group at points that are right to rounding."""
    parts = []
    for first in range(0, problems, GROUP):
        drawn = Problems(kind, rng, min(GROUP, problems - first), dtype)
        if first // GROUP % 4 == 3:
            drawn.y = drawn.exact_y.astype(dtype)
        bars, info = drawn.vjp(drawn.y_bar, drawn.y, *drawn.inputs, throw=False)
        error = np.where(info.converged, drawn.errors(bars), np.nan)
        parts.append(of_batch(NAMES[KINDS.index(kind)], dtype, Promise(), error, info.error, info.converged))
    return [joined(parts)]
