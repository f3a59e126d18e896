"""Derivatives of solutions: the general nodes against finite differences, closed forms, each other and wrong rules."""

from functools import partial

import array_api_compat
import numpy as np
import pytest
from problems import relative, symmetric
from singular_problems import SQUARE_REGULAR, SQUARE_SINGULAR, stack

import ddnref
from conftest import backend
from ddnref import ConvergenceError, OptimalityError, SingularError, implicit
from ddnref._kernels import singularity
from ddnref.testing import assert_vjp, check_vjp, numerical_jvp

N = 5


def dot(a, x):
    return (a @ x[..., None])[..., 0]


def outer(u, v):
    return u[..., :, None] * v[..., None, :]


def transpose(a):
    return array_api_compat.array_namespace(a).matrix_transpose(a)


def diagonal_matrix(d):
    xp = array_api_compat.array_namespace(d)
    i = xp.arange(d.shape[-1], device=array_api_compat.device(d))
    return xp.where(i[:, None] == i, d[..., None], xp.zeros_like(d[..., None]))


def newton(step, y, count=20):
    for _ in range(count):
        y = y + step(y)
    return y


class Problem:
    """Its node in both modes, and the gradients or the tangent alone."""

    @classmethod
    def vjp(cls, *arrays, **options):
        return cls.node(*arrays, **options)[0]

    @classmethod
    def jvp(cls, *arrays, **options):
        return cls.moving(*arrays, **options)[0]

    @classmethod
    def moving(cls, *arrays, **options):
        """The forward mode of the node, for the multipliers that are an option of the node."""
        if "nu" in options or cls.has_multipliers:
            k = (len(arrays) - 1) // 2
            arrays = (*arrays[: k + 1], options.pop("nu", None), *arrays[k + 1 :])
        return cls.forward_mode(*arrays, **{**cls.stated_for_jvp(), **options})

    has_multipliers = True


class Root(Problem):
    """``M y + 0.3 tanh(y) = x``, M not symmetric; inputs (M, x)."""

    @staticmethod
    def inputs(rng, batch=()):
        return rng.standard_normal((*batch, N, N)) + 4 * np.eye(N), rng.standard_normal((*batch, N))

    @staticmethod
    def residual(y, m, x):
        return dot(m, y) + 0.3 * array_api_compat.array_namespace(y).tanh(y) - x

    @staticmethod
    def jacobian(y, m, x):
        t = array_api_compat.array_namespace(y).tanh(y)
        return m + diagonal_matrix(0.3 * (1 - t * t))

    @classmethod
    def solve(cls, m, x):
        return newton(lambda y: -dot(np.linalg.inv(cls.jacobian(y, m, x)), cls.residual(y, m, x)), 0 * x)

    @classmethod
    def node(cls, y_bar, y, m, x, **options):
        stated = {
            "residual": cls.residual,
            "jacobian": cls.jacobian,
            "residual_vjp": lambda w, y, m, x: (outer(w, y), -w),
        }
        return implicit.root_vjp(y_bar, y, m, x, **{**stated, **options})

    forward_mode, has_multipliers = staticmethod(implicit.root_jvp), False

    @classmethod
    def stated_for_jvp(cls):
        tangent = lambda m_dot, x_dot, y, m, x: dot(m_dot, y) - x_dot
        return {"residual": cls.residual, "jacobian": cls.jacobian, "residual_jvp": tangent}


class Argmin(Problem):
    """``½ yᵀ S y + ¼ Σ y⁴ − xᵀy``; inputs (S, x), S taken as it is."""

    @staticmethod
    def inputs(rng, batch=()):
        s = symmetric(rng, N, batch)
        return s @ s + np.eye(N), rng.standard_normal((*batch, N))

    @staticmethod
    def gradient(y, s, x):
        return (dot(s, y) + dot(transpose(s), y)) / 2 + y**3 - x

    @staticmethod
    def hessian(y, s, x):
        return (s + transpose(s)) / 2 + diagonal_matrix(3 * y * y)

    @classmethod
    def solve(cls, s, x):
        return newton(lambda y: -dot(np.linalg.inv(cls.hessian(y, s, x)), cls.gradient(y, s, x)), 0 * x)

    @classmethod
    def node(cls, y_bar, y, s, x, **options):
        stated = {
            "gradient": cls.gradient,
            "hessian": cls.hessian,
            "gradient_vjp": lambda w, y, s, x: ((outer(w, y) + outer(y, w)) / 2, -w),
        }
        return implicit.argmin_vjp(y_bar, y, s, x, **{**stated, **options})

    forward_mode, has_multipliers = staticmethod(implicit.argmin_jvp), False

    @classmethod
    def stated_for_jvp(cls):
        tangent = lambda s_dot, x_dot, y, s, x: (dot(s_dot, y) + dot(transpose(s_dot), y)) / 2 - x_dot
        return {"gradient": cls.gradient, "hessian": cls.hessian, "gradient_jvp": tangent}


class Equality(Problem):
    """``½ ‖y − x‖² + ¼ Σ y⁴`` subject to ``yᵀ D y = t`` and ``cᵀ y = 0.1``; inputs (x, t, c)."""

    d = np.linspace(1.0, 2.0, N)

    @staticmethod
    def inputs(rng, batch=()):
        return rng.standard_normal((*batch, N)), rng.uniform(0.5, 1.5, (*batch, 1)), rng.standard_normal((*batch, N))

    @classmethod
    def metric(cls, y):
        xp = array_api_compat.array_namespace(y)
        return xp.asarray(cls.d, dtype=y.dtype, device=array_api_compat.device(y))

    @staticmethod
    def gradient(y, x, t, c):
        return y - x + y**3

    @classmethod
    def hessian(cls, y, nu, x, t, c):
        return diagonal_matrix(cls.diagonal(y, nu, x, t, c).d)

    @classmethod
    def diagonal(cls, y, nu, x, t, c):
        return implicit.Diagonal(1 + 3 * y * y - 2 * nu[..., :1] * cls.metric(y))

    @classmethod
    def products(cls, y, nu, x, t, c):
        d = cls.diagonal(y, nu, x, t, c).d
        return implicit.Products(lambda v: d * v)

    @classmethod
    def constraint(cls, y, x, t, c):
        xp = array_api_compat.array_namespace(y)
        parts = [xp.sum(cls.metric(y) * y * y, axis=-1, keepdims=True) - t, xp.sum(c * y, axis=-1, keepdims=True) - 0.1]
        return xp.concat(parts, axis=-1)

    @classmethod
    def constraint_jacobian(cls, y, x, t, c):
        return array_api_compat.array_namespace(y).stack([2 * cls.metric(y) * y, c], axis=-2)

    @staticmethod
    def residual_vjp(w, eta, y, nu, x, t, c):
        return -w, -eta[..., :1], -nu[..., 1:] * w + eta[..., 1:] * y

    @classmethod
    def multipliers(cls, y, *inputs):
        return dot(np.linalg.pinv(transpose(cls.constraint_jacobian(y, *inputs))), cls.gradient(y, *inputs))

    @classmethod
    def solve(cls, x, t, c):
        """Gradient flow to a minimum, then Newton steps on the optimality conditions."""
        y, eye = x, np.eye(N)
        for _ in range(150):
            h_y = cls.constraint_jacobian(y, x, t, c)
            onto = transpose(h_y) @ np.linalg.inv(h_y @ transpose(h_y))  # the pseudo-inverse, in a third of its time
            f_y = cls.gradient(y, x, t, c)
            y = y - dot(onto, cls.constraint(y, x, t, c)) - 0.1 * dot(eye - onto @ h_y, f_y)
        nu = cls.multipliers(y, x, t, c)
        for _ in range(8):
            h_y = cls.constraint_jacobian(y, x, t, c)
            k = np.concat([cls.hessian(y, nu, x, t, c), -transpose(h_y)], axis=-1)
            k = np.concat([k, np.concat([h_y, np.zeros((*x.shape[:-1], 2, 2))], axis=-1)], axis=-2)
            r = np.concat([cls.gradient(y, x, t, c) - dot(transpose(h_y), nu), cls.constraint(y, x, t, c)], axis=-1)
            z = -dot(np.linalg.inv(k), r)
            y, nu = y + z[..., :N], nu + z[..., N:]
        return y

    @classmethod
    def node(cls, y_bar, y, x, t, c, nu=None, **options):
        names = ("gradient", "hessian", "constraint", "constraint_jacobian", "residual_vjp")
        stated = {name: getattr(cls, name) for name in names}
        return implicit.eq_argmin_vjp(y_bar, y, nu, x, t, c, **{**stated, **options})

    forward_mode = staticmethod(implicit.eq_argmin_jvp)

    @staticmethod
    def residual_jvp(x_dot, t_dot, c_dot, y, nu, x, t, c):
        xp = array_api_compat.array_namespace(y)
        h_dot = xp.concat([-t_dot, xp.sum(c_dot * y, axis=-1, keepdims=True)], axis=-1)
        return -x_dot - nu[..., 1:] * c_dot, h_dot

    @classmethod
    def stated_for_jvp(cls):
        names = ("gradient", "hessian", "constraint", "constraint_jacobian", "residual_jvp")
        return {name: getattr(cls, name) for name in names}


class Linear(Problem):
    """``¼ Σ y⁴ + ½ ‖y − x‖²`` subject to ``A y = b``; inputs (A, b, x)."""

    @staticmethod
    def inputs(rng, batch=()):
        return rng.standard_normal((*batch, 2, N)), rng.standard_normal((*batch, 2)), rng.standard_normal((*batch, N))

    @classmethod
    def solve(cls, a, b, x):
        y, nu = 0 * x, 0 * b
        for _ in range(20):
            k = np.concat([diagonal_matrix(1 + 3 * y * y), -transpose(a)], axis=-1)
            k = np.concat([k, np.concat([a, np.zeros((*b.shape, 2))], axis=-1)], axis=-2)
            r = np.concat([y - x + y**3 - dot(transpose(a), nu), dot(a, y) - b], axis=-1)
            z = -dot(np.linalg.inv(k), r)
            y, nu = y + z[..., :N], nu + z[..., N:]
        return y

    @staticmethod
    def node(y_bar, y, a, b, x, nu=None, **options):
        stated = {
            "gradient": lambda y, x: y - x + y**3,
            "hessian": lambda y, x: implicit.Diagonal(1 + 3 * y * y),
            "gradient_vjp": lambda w, y, x: -w,
        }
        return implicit.lineq_argmin_vjp(y_bar, y, nu, a, b, x, **{**stated, **options})

    forward_mode = staticmethod(implicit.lineq_argmin_jvp)

    @staticmethod
    def stated_for_jvp():
        return {
            "gradient": lambda y, x: y - x + y**3,
            "hessian": lambda y, x: implicit.Diagonal(1 + 3 * y * y),
            "gradient_jvp": lambda x_dot, y, x: -x_dot,
        }


class Inequality(Problem):
    """``½ (y − x)ᵀ S (y − x)`` subject to ``Σ y = t`` and ``y ≥ 0``; inputs (x, t); S fixed."""

    s = np.eye(N) + 0.3 * np.ones((N, N)) + np.diag(np.linspace(0.0, 1.0, N))

    @staticmethod
    def inputs(rng, batch=()):
        return rng.standard_normal((*batch, N)), rng.uniform(1.0, 2.0, (*batch, 1))

    @classmethod
    def metric(cls, y):
        xp = array_api_compat.array_namespace(y)
        return xp.asarray(cls.s, dtype=y.dtype, device=array_api_compat.device(y))

    @classmethod
    def constraint(cls, y, x, t):
        xp = array_api_compat.array_namespace(y)
        return xp.concat([xp.sum(y, axis=-1, keepdims=True) - t, -y], axis=-1)

    @classmethod
    def constraint_jacobian(cls, y, x, t):
        xp = array_api_compat.array_namespace(y)
        return xp.concat([xp.ones_like(y)[..., None, :], diagonal_matrix(-xp.ones_like(y))], axis=-2)

    @classmethod
    def one(cls, x, t):
        """Solve one item by enumeration of the supports."""
        best = (np.inf, None)
        for bits in range(1, 2**N):
            on = np.asarray([bool(bits >> i & 1) for i in range(N)])
            k = np.block([[cls.s[np.ix_(on, on)], -np.ones((on.sum(), 1))], [np.ones((1, on.sum())), np.zeros((1, 1))]])
            y = np.zeros(N)
            y[on] = np.linalg.solve(k, np.concat([(cls.s @ x)[on], t]))[:-1]
            value = (y - x) @ cls.s @ (y - x)
            if np.all(y >= 0) and value < best[0]:
                best = (value, y)
        return best[1]

    @classmethod
    def solve(cls, x, t):
        flat = zip(x.reshape(-1, N), t.reshape(-1, 1), strict=True)
        return np.stack([cls.one(*rows) for rows in flat]).reshape(x.shape)

    @classmethod
    def node(cls, y_bar, y, x, t, nu=None, **options):
        stated = {
            "gradient": lambda y, x, t: dot(cls.metric(y), y - x),
            "hessian": lambda y, nu, x, t: cls.metric(y) + 0 * y[..., None],
            "constraint": cls.constraint,
            "constraint_jacobian": cls.constraint_jacobian,
            "residual_vjp": lambda w, eta, y, nu, x, t: (-dot(cls.metric(y), w), -eta[..., :1]),
            "equalities": 1,
        }
        return implicit.ineq_argmin_vjp(y_bar, y, nu, x, t, **{**stated, **options})

    forward_mode = staticmethod(implicit.ineq_argmin_jvp)

    @classmethod
    def residual_jvp(cls, x_dot, t_dot, y, nu, x, t):
        xp = array_api_compat.array_namespace(y)
        return -dot(cls.metric(y), x_dot), xp.concat([-t_dot, xp.zeros_like(y)], axis=-1)

    @classmethod
    def stated_for_jvp(cls):
        return {
            "gradient": lambda y, x, t: dot(cls.metric(y), y - x),
            "hessian": lambda y, nu, x, t: cls.metric(y) + 0 * y[..., None],
            "constraint": cls.constraint,
            "constraint_jacobian": cls.constraint_jacobian,
            "residual_jvp": cls.residual_jvp,
            "equalities": 1,
        }


PROBLEMS = [Root, Argmin, Equality, Linear, Inequality]
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.__name__)


def needs(problem):
    return range({Root: 2, Argmin: 2, Equality: 3, Linear: 3, Inequality: 2}[problem])


@problems
@pytest.mark.parametrize("batch", [(), (3,)])
def test_agrees_with_finite_differences(problem, batch, rng):
    report = assert_vjp(problem.solve, problem.vjp, *problem.inputs(rng, batch), needs=needs(problem), gap=0.1)
    assert report.error <= 1e-9, report


@problems
def test_every_library_agrees_traced_and_not(problem, xp, rng):
    inputs = problem.inputs(rng, (2, 3))
    y = problem.solve(*inputs)
    y_bar = rng.standard_normal(y.shape)
    expected = problem.vjp(y_bar, y, *inputs)
    arrays = [xp.asarray(a) for a in (y_bar, y, *inputs)]
    for vjp in (problem.vjp, xp.jit(partial(problem.vjp, throw=False))):
        for got, e in zip(vjp(*arrays), expected, strict=True):
            assert relative(xp.numpy(got), e) <= 1e-12


@problems
def test_structure(problem, rng):
    inputs = problem.inputs(rng, (4,))
    y = problem.solve(*inputs)
    y_bar = rng.standard_normal(y.shape)
    bars = problem.vjp(y_bar, y, *inputs)
    assert all(np.all(g == 0) for g in problem.vjp(0 * y_bar, y, *inputs))
    loop = zip(*(problem.vjp(y_bar[i], y[i], *(a[i] for a in inputs)) for i in range(4)), strict=True)
    for g, twice, alone in zip(bars, problem.vjp(2.5 * y_bar, y, *inputs), loop, strict=True):
        assert relative(twice, 2.5 * g) <= 1e-13
        assert relative(np.stack(alone), g) <= 1e-13


@problems
def test_float32_stays_float32(problem, xp, rng):
    inputs = problem.inputs(rng, (2,))
    y = problem.solve(*inputs)
    y_bar = rng.standard_normal(y.shape)
    arrays = [a.astype(np.float32) for a in (y_bar, y, *inputs)]
    bars = xp.jit(partial(problem.vjp, atol=1e-6, throw=xp.name != "jax"))(*(xp.asarray(a) for a in arrays))
    exact = problem.vjp(y_bar, y, *inputs)
    for got, e in zip(bars, exact, strict=True):
        assert xp.numpy(got).dtype == np.float32
        assert relative(xp.numpy(got), e) <= 1e-4


@problems
def test_a_point_far_from_a_solution_is_refused_and_harms_no_other(problem, xp, rng):
    inputs = problem.inputs(rng, (2, 3))
    y = problem.solve(*inputs)
    y_bar = rng.standard_normal(y.shape)
    others = np.asarray([[True, False, True], [True, True, True]])
    good = problem.vjp(y_bar, y, *inputs)
    traced = xp.jit(partial(problem.vjp, throw=False))
    for bad, error in ((y[0, 1] + 0.3 * rng.standard_normal(N), OptimalityError), (np.full(N, np.nan), Exception)):
        wrong = y.copy()
        wrong[0, 1] = bad
        arrays = [xp.asarray(a) for a in (y_bar, wrong, *inputs)]
        with pytest.raises(error, match="throw=False"):
            problem.vjp(*arrays)
        for g, got in zip(good, traced(*arrays), strict=True):
            got = xp.numpy(got)
            assert np.all(np.isnan(got[0, 1]))
            np.testing.assert_allclose(got[others], g[others], rtol=1e-10, atol=1e-12)


@problems
def test_rtol_and_atol_say_what_a_solution_is(problem, rng):
    inputs = problem.inputs(rng)
    y = problem.solve(*inputs)
    near = y * (1 + 1e-4 * np.cos(np.arange(N)))
    y_bar = rng.standard_normal(N)
    problem.vjp(y_bar, near, *inputs)
    for tight in ({"rtol": 1e-6}, {"rtol": 0.0}):
        with pytest.raises(OptimalityError):
            problem.vjp(y_bar, near, *inputs, **tight)
    problem.vjp(y_bar, near, *inputs, rtol=0.0, atol=1e-2)


@problems
def test_mutants_are_rejected(problem, rng):
    inputs = problem.inputs(rng)
    check = partial(check_vjp, problem.solve, needs=needs(problem), gap=0.1, directions=2)

    def each(change):
        return lambda *a: tuple(change(g) for g in problem.vjp(*a))

    assert check(problem.vjp, *inputs).passed
    for mutant in (each(lambda g: -g), each(lambda g: 2 * g), each(lambda g: g * (1 + 1e-6))):
        assert not check(mutant, *inputs).passed


@pytest.mark.parametrize("change", ["plus", "no eta", "no nu"])
def test_the_bordered_formula_cannot_be_varied(change, rng):
    """The sign in front of ηᵀh is the one that finite differences confirm."""
    changes = {
        "plus": lambda w, eta, y, nu, *x: Equality.residual_vjp(w, -eta, y, nu, *x),
        "no eta": lambda w, eta, y, nu, *x: Equality.residual_vjp(w, 0 * eta, y, nu, *x),
        "no nu": lambda w, eta, y, nu, *x: Equality.residual_vjp(w, eta, y, 0 * nu, *x),
    }
    wrong = partial(Equality.vjp, residual_vjp=changes[change])
    assert not check_vjp(Equality.solve, wrong, *Equality.inputs(rng), needs=range(3), gap=0.1).passed


# --- the forward mode ---------------------------------------------------------------------------------------------


def random_tangents(rng, inputs):
    return [rng.standard_normal(a.shape) for a in inputs]


def pairing(a, b):
    return sum(np.sum(x * y) for x, y in zip(a, b, strict=True))


def transpose_error(y_bar, y_dot, bars, dots):
    return abs(np.sum(y_bar * y_dot) - pairing(bars, dots)) / (np.linalg.norm(y_bar) * np.linalg.norm(y_dot))


@problems
@pytest.mark.parametrize("batch", [(), (3,)])
def test_jvp_is_the_derivative_and_the_transpose_of_the_vjp(problem, batch, rng):
    """Along all inputs together, and along each alone with ``None`` for the others."""
    inputs = problem.inputs(rng, batch)
    y, dots = problem.solve(*inputs), random_tangents(rng, inputs)
    y_bar = rng.standard_normal(y.shape)
    bars = problem.vjp(y_bar, y, *inputs)
    for given in [dots] + [[d if i == j else None for j, d in enumerate(dots)] for i in range(len(dots))]:
        moved = [np.zeros_like(a) if d is None else d for a, d in zip(inputs, given, strict=True)]
        y_dot, info = problem.moving(*given, y, *inputs)
        assert y_dot.shape == y.shape
        assert np.all(info.converged)
        assert np.all(info.error <= 1e-11)
        assert transpose_error(y_bar, y_dot, bars, moved) <= 1e-12
        along = lambda t, moved=moved: problem.solve(*(a + t[0] * d for a, d in zip(inputs, moved, strict=True)))
        assert relative(y_dot, numerical_jvp(along, np.zeros(1), np.ones(1), step=1e-4)) <= 1e-9


@problems
def test_jvp_on_every_library_traced_and_not(problem, xp, rng):
    inputs = problem.inputs(rng, (2, 3))
    y, dots = problem.solve(*inputs), random_tangents(rng, inputs)
    expected, report = problem.moving(*dots, y, *inputs)
    arrays = [xp.asarray(a) for a in (*dots, y, *inputs)]
    for moving in (problem.moving, xp.jit(partial(problem.moving, throw=False))):
        got, info = moving(*arrays)
        assert relative(xp.numpy(got), expected) <= 1e-12
        assert np.array_equal(xp.numpy(info.converged), report.converged)
        np.testing.assert_allclose(xp.numpy(info.rcond), report.rcond, rtol=1e-6)


@problems
def test_structure_of_the_jvp(problem, rng):
    inputs = problem.inputs(rng, (4,))
    y, dots = problem.solve(*inputs), random_tangents(rng, inputs)
    y_dot = problem.jvp(*dots, y, *inputs)
    assert np.all(problem.jvp(*(0 * d for d in dots), y, *inputs) == 0)
    assert relative(problem.jvp(*(2.5 * d for d in dots), y, *inputs), 2.5 * y_dot) <= 1e-13
    alone = [problem.jvp(*(d[i] for d in dots), y[i], *(a[i] for a in inputs)) for i in range(4)]
    assert relative(np.stack(alone), y_dot) <= 1e-13


@problems
def test_jvp_in_float32_stays_float32(problem, xp, rng):
    inputs = problem.inputs(rng, (2,))
    y, dots = problem.solve(*inputs), random_tangents(rng, inputs)
    arrays = [xp.asarray(a.astype(np.float32)) for a in (*dots, y, *inputs)]
    got = xp.numpy(xp.jit(partial(problem.jvp, atol=1e-6, throw=xp.name != "jax"))(*arrays))
    assert got.dtype == np.float32
    assert relative(got, problem.jvp(*dots, y, *inputs)) <= 1e-4


@problems
def test_tangents_at_a_point_far_from_a_solution_are_refused(problem, xp, rng):
    inputs = problem.inputs(rng, (2, 3))
    y, dots = problem.solve(*inputs), random_tangents(rng, inputs)
    good = problem.jvp(*dots, y, *inputs)
    others = np.asarray([[True, False, True], [True, True, True]])
    for bad, error in ((y[0, 1] + 0.3 * rng.standard_normal(N), OptimalityError), (np.full(N, np.nan), Exception)):
        wrong = y.copy()
        wrong[0, 1] = bad
        arrays = [xp.asarray(a) for a in (*dots, wrong, *inputs)]
        with pytest.raises(error, match=f"{problem.forward_mode.__name__}.*throw=False"):
            problem.jvp(*arrays)
        got, info = problem.moving(*arrays, throw=False)
        got = xp.numpy(got)
        assert np.all(np.isnan(got[0, 1]))
        np.testing.assert_allclose(got[others], good[others], rtol=1e-10, atol=1e-12)
        assert np.array_equal(xp.numpy(info.converged), others)
        assert np.all(np.isinf(xp.numpy(info.error)) == ~others)


@problems
def test_rtol_and_atol_of_the_jvp(problem, rng):
    inputs = problem.inputs(rng)
    y, dots = problem.solve(*inputs), random_tangents(rng, inputs)
    near = y * (1 + 1e-4 * np.cos(np.arange(N)))
    y_dot, info = problem.moving(*dots, near, *inputs)
    error = relative(y_dot, problem.jvp(*dots, y, *inputs))
    assert error <= 1e-5
    assert error / 2 <= info.error <= 3 * error + 1e-14
    for tight in ({"rtol": 1e-6}, {"rtol": 0.0}):
        with pytest.raises(OptimalityError):
            problem.jvp(*dots, near, *inputs, **tight)
    problem.jvp(*dots, near, *inputs, rtol=0.0, atol=1e-2)


@pytest.mark.parametrize("change", ["plus h", "no h", "plus nu", "no nu", "plus f"])
def test_the_bordered_formula_of_the_jvp_cannot_be_varied(change, rng):
    changes = {
        "plus h": lambda f, h, c: (f, -h),
        "no h": lambda f, h, c: (f, 0 * h),
        "plus nu": lambda f, h, c: (f + 2 * c, h),
        "no nu": lambda f, h, c: (f + c, h),
        "plus f": lambda f, h, c: (-f, h),
    }

    def wrong(x_dot, t_dot, c_dot, y, nu, x, t, c):
        f, h = Equality.residual_jvp(x_dot, t_dot, c_dot, y, nu, x, t, c)
        return changes[change](f, h, nu[..., 1:] * c_dot)

    inputs = Equality.inputs(rng)
    y, dots = Equality.solve(*inputs), random_tangents(rng, inputs)
    y_bar = rng.standard_normal(N)
    bars = Equality.vjp(y_bar, y, *inputs)
    assert transpose_error(y_bar, Equality.jvp(*dots, y, *inputs, residual_jvp=wrong), bars, dots) > 1e-6


def test_jvp_with_every_structure_and_without_symmetry(xp, rng):
    """The solve is that of the matrix itself, where the gradient takes the transpose."""
    d, u, v = rng.uniform(1, 2, (2, 6)), rng.standard_normal((2, 6, 2)), 0.1 * rng.standard_normal((2, 6, 2))
    blocks = rng.standard_normal((2, 3, 2, 2)) + 3 * np.eye(2)
    whole = np.zeros((2, 6, 6))
    for i in range(3):
        whole[:, 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = blocks[:, i]
    b = rng.standard_normal((2, 6))
    for h, matrix in (
        (implicit.Diagonal(xp.asarray(d)), diagonal_matrix(d)),
        (implicit.BlockDiagonal(xp.asarray(blocks)), whole),
        (implicit.DiagonalPlusLowRank(*map(xp.asarray, (d, u, v))), diagonal_matrix(d) + u @ transpose(v)),
        (xp.asarray(whole), whole),
    ):
        y_dot, _ = implicit.root_jvp(
            xp.asarray(b), xp.asarray(0 * b), xp.asarray(0 * b), residual=lambda y, x: y - x,
            jacobian=lambda y, x, h=h: h, residual_jvp=lambda x_dot, y, x: -x_dot,
        )  # fmt: skip
        assert relative(xp.numpy(y_dot), np.linalg.solve(matrix, b[..., None])[..., 0]) <= 1e-13
    inputs = Equality.inputs(rng, (3,))
    y, dots = Equality.solve(*inputs), random_tangents(rng, inputs)
    expected = Equality.jvp(*dots, y, *inputs)
    for structure in (Equality.diagonal, Equality.products):
        got = Equality.jvp(*(xp.asarray(a) for a in (*dots, y, *inputs)), hessian=structure)
        assert relative(xp.numpy(got), expected) <= 1e-11


def test_products_of_the_jvp_have_their_options(rng):
    s, x = Argmin.inputs(rng)
    y, dots = Argmin.solve(s, x), random_tangents(rng, (s, x))
    products = lambda **options: {
        "hessian": lambda *a: implicit.Products(lambda v: Argmin.hessian(y, s, x) @ v, **options)
    }
    exact = Argmin.jvp(*dots, y, s, x)
    assert relative(Argmin.jvp(*dots, y, s, x, **products()), exact) <= 1e-12
    with pytest.raises(ConvergenceError, match="argmin_jvp reached their limit"):
        Argmin.jvp(*dots, y, s, x, **products(maxiter=2))
    assert np.all(np.isnan(Argmin.jvp(*dots, y, s, x, **products(maxiter=2), throw=False)))
    assert 1e-9 < relative(Argmin.jvp(*dots, y, s, x, **products(rtol=1e-2)), exact) < 0.1


def test_multipliers_given_to_the_jvp(rng):
    inputs = Equality.inputs(rng)
    y, dots = Equality.solve(*inputs), random_tangents(rng, inputs)
    nu, expected = Equality.multipliers(y, *inputs), Equality.jvp(*dots, y, *inputs)
    assert relative(Equality.jvp(*dots, y, *inputs, nu=nu), expected) <= 1e-10
    assert relative(Equality.jvp(*dots, y, *inputs, nu=1.001 * nu), expected) <= 1e-8
    with pytest.raises(OptimalityError, match="does not help"):
        Equality.jvp(*dots, y, *inputs, nu=30 * nu)


HALF_SPACES = {
    "gradient": lambda y, x: y - x,
    "hessian": lambda y, nu, x: np.eye(2),
    "constraint": lambda y, x: -y,
    "constraint_jacobian": lambda y, x: -np.eye(2),
    "residual_jvp": lambda x_dot, y, nu, x: (-x_dot, 0 * y),
}


def test_tangent_at_a_touched_constraint():
    """It counts as inactive, and the error says that the tangent is one of two."""
    y_dot, info = implicit.ineq_argmin_jvp(np.ones(2), np.asarray([0, 2.0]), None, np.asarray([0, 2.0]), **HALF_SPACES)
    assert np.array_equal(y_dot, np.ones(2))
    assert info.error == 1


def test_constraints_that_are_not_active_may_move(xp):
    """Bounds b of ``y ≥ b``: only the one that holds y moves it."""
    x, b = (xp.asarray(np.asarray(z)) for z in ([-1.0, 2.0], [0.0, 0.5]))
    y, b_dot, eye = (xp.asarray(np.asarray(z)) for z in ([0.0, 2.0], [3.0, 7.0], np.eye(2)))
    y_dot, _ = implicit.ineq_argmin_jvp(
        None, b_dot, y, None, x, b, gradient=lambda y, x, b: y - x, hessian=lambda y, nu, x, b: eye,
        constraint=lambda y, x, b: b - y, constraint_jacobian=lambda y, x, b: -eye,
        residual_jvp=lambda x_dot, b_dot, y, nu, x, b: (-x_dot, b_dot),
    )  # fmt: skip
    np.testing.assert_allclose(xp.numpy(y_dot), [3.0, 0.0], atol=1e-15)


def test_a_tangent_of_zero_is_no_failure(rng):
    """At a vertex nothing moves, however the objective does."""
    s = rng.standard_normal((2, 2))
    s = s @ s.T + np.eye(2)
    stated = HALF_SPACES | {
        "gradient": lambda y, x: s @ (y - x),
        "hessian": lambda y, nu, x: s,
        "residual_jvp": lambda x_dot, y, nu, x: (-s @ x_dot, 0 * y),
    }
    y_dot, info = implicit.ineq_argmin_jvp(
        rng.standard_normal(2), np.zeros(2), None, np.linalg.solve(s, [-1, -2]), **stated
    )
    assert np.max(abs(y_dot)) <= 1e-15
    assert info.converged


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_direction_that_moves_repeated_constraints_apart_is_reported(dtype, xp, rng):
    """``y ≥ b_1`` and ``y ≥ b_2`` with equal bounds, in other units: together they move y, apart it has no tangent."""
    units = np.asarray([[1.0, 1.0], [1.0, 1e3], [3.0, 0.2]], dtype)

    def moving(b_dot, **options):
        b, y = xp.asarray(np.ones((3, 2), dtype)), xp.asarray(np.ones((3, 1), dtype))
        c, x = xp.asarray(-units), xp.asarray(np.zeros((3, 1), dtype))
        return implicit.ineq_argmin_jvp(
            None, xp.asarray(b_dot.astype(dtype)), y, None, x, b, gradient=lambda y, x, b: y - x,
            hessian=lambda y, nu, x, b: xp.asarray(np.ones((3, 1, 1), dtype)),
            constraint=lambda y, x, b: c * (y - b), constraint_jacobian=lambda y, x, b: c[..., None],
            residual_jvp=lambda x_dot, b_dot, y, nu, x, b: (-x_dot, -c * b_dot), **options,
        )  # fmt: skip

    together = np.asarray([[1.0, 1.0], [-2.0, -2.0], [0.5, 0.5]])
    y_dot, _ = moving(together)
    np.testing.assert_allclose(xp.numpy(y_dot), together[:, :1], rtol=1e3 * np.finfo(dtype).eps)
    for apart in (1.0, -1e-2):
        direction = together.copy()
        direction[1, 1] += apart
        with pytest.raises(SingularError, match=r"moves constraints apart.*\(item 1 of 3\)"):
            moving(direction)
        y_dot, info = moving(direction, throw=False)
        assert np.array_equal(np.isnan(xp.numpy(y_dot)[:, 0]), [False, True, False])
        assert np.array_equal(xp.numpy(info.converged), [True, False, True])


@problems
def test_jvp_reads_nothing_on_the_host(problem, host_reads, rng):
    strict = backend("array-api-strict")
    inputs = problem.inputs(rng, (2,))
    arrays = [strict.asarray(a) for a in (*inputs, problem.solve(*inputs), *inputs)]
    host_reads.clear()
    problem.jvp(*arrays, throw=False)
    assert [r for r in host_reads if r not in ("__array__", "__buffer__")] == []


@problems
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_tangents_of_empty_batches(problem, batch, rng, xp):
    inputs = [xp.asarray(np.zeros((*batch, *a.shape))) for a in problem.inputs(rng)]
    y_dot = problem.jvp(*inputs, xp.asarray(np.zeros((*batch, N))), *inputs)
    assert tuple(y_dot.shape) == (*batch, N)


@problems
def test_bad_tangents(problem, rng):
    inputs = problem.inputs(rng)
    y, none = problem.solve(*inputs), [None] * len(inputs)
    with pytest.raises(TypeError, match="are all None: there is no direction"):
        problem.jvp(*none, y, *inputs)
    with pytest.raises(TypeError, match="y is None"):
        problem.jvp(*inputs, None, *inputs)
    with pytest.raises(TypeError, match="is None: an array must be given"):
        problem.jvp(*inputs, y, *inputs[:-1], None)
    with pytest.raises(TypeError, match="one tangent for each input"):
        problem.forward_mode(*inputs, y, *[None] * problem.has_multipliers, *inputs[1:], **problem.stated_for_jvp())
    for i, a in enumerate(inputs):
        for wrong, error, says in (
            (a.astype(np.float32), TypeError, r"_dot.*float32"),
            (a[..., :-1], ValueError, r"_dot.*has shape"),
            (a.tolist(), TypeError, r"_dot.*list"),
        ):
            with pytest.raises(error, match=says):
                problem.jvp(*none[:i], wrong, *none[i + 1 :], y, *inputs)
    name = next(name for name in problem.stated_for_jvp() if name.endswith("_jvp"))
    with pytest.raises(TypeError, match=f"{name} is 3, expected a function"):
        problem.jvp(*inputs, y, *inputs, **{name: 3})
    with pytest.raises((TypeError, ValueError), match=r"residual_jvp must return|the result of .*_jvp has shape"):
        problem.jvp(*inputs, y, *inputs, **{name: lambda *a: np.ones(4)})


def test_what_the_jvp_of_linear_constraints_needs(rng):
    a, b, x = Linear.inputs(rng)
    y = Linear.solve(a, b, x)
    with pytest.raises(TypeError, match="gradient_jvp must be given"):
        Linear.jvp(a, b, x, y, a, b, x, gradient_jvp=None)
    with pytest.raises(TypeError, match=r"a_dot, b_dot, \*x_dots, y, nu, a, b, \*inputs"):
        implicit.lineq_argmin_jvp(a, y, None, a, gradient=lambda y: y, hessian=lambda y: np.eye(N))


# --- structured Hessians ------------------------------------------------------------------------------------------


def test_every_structure_is_the_dense_matrix(xp, rng):
    d, u, v = rng.uniform(1, 2, (2, 6)), rng.standard_normal((2, 6, 2)), 0.1 * rng.standard_normal((2, 6, 2))
    blocks = rng.standard_normal((2, 3, 2, 2)) + 3 * np.eye(2)
    whole = np.zeros((2, 6, 6))
    for i in range(3):
        whole[:, 2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = blocks[:, i]
    pairs = [
        (implicit.Diagonal(xp.asarray(d)), diagonal_matrix(d)),
        (implicit.BlockDiagonal(xp.asarray(blocks)), whole),
        (implicit.DiagonalPlusLowRank(xp.asarray(d), xp.asarray(u)), diagonal_matrix(d) + u @ transpose(u)),
        (
            implicit.DiagonalPlusLowRank(xp.asarray(d), xp.asarray(u), xp.asarray(v)),
            diagonal_matrix(d) + u @ transpose(v),
        ),
    ]
    b = rng.standard_normal((2, 6, 3))
    for h, matrix in pairs:
        inverse = h.inverse()
        assert relative(xp.numpy(inverse.solve(xp.asarray(b))), np.linalg.solve(matrix, b)) <= 1e-13
        for back in (inverse.solve_transposed, h.transpose().inverse().solve):
            assert relative(xp.numpy(back(xp.asarray(b))), np.linalg.solve(transpose(matrix), b)) <= 1e-13
        assert relative(xp.numpy(h.times(xp.asarray(b))), matrix @ b) <= 1e-14
        size, exact = xp.numpy(h.size_times(xp.asarray(b))), np.abs(matrix) @ np.abs(b)
        assert np.all(size >= exact * (1 - 1e-14))
        assert np.all(size <= 20 * exact)
        gradient, _ = implicit.root_vjp(
            xp.asarray(b[..., 0]), xp.asarray(0 * b[..., 0]),
            residual=lambda y: y, jacobian=lambda y, h=h: h, residual_vjp=lambda w, y: w,
        )  # fmt: skip
        assert relative(-xp.numpy(gradient), np.linalg.solve(transpose(matrix), b[..., :1])[..., 0]) <= 1e-13


@pytest.mark.parametrize("structure", ["diagonal", "products"])
def test_structured_constrained_nodes_agree_with_the_dense_one(structure, xp, rng):
    inputs = Equality.inputs(rng, (3,))
    y = Equality.solve(*inputs)
    y_bar = rng.standard_normal(y.shape)
    arrays = [xp.asarray(a) for a in (y_bar, y, *inputs)]
    for got, e in zip(
        Equality.vjp(*arrays, hessian=getattr(Equality, structure)), Equality.vjp(y_bar, y, *inputs), strict=True
    ):
        assert relative(xp.numpy(got), e) <= 1e-11


def test_products_need_curvature_only_in_the_tangent(rng):
    """Indefinite across the constraint, as at many constrained minima."""
    y, x, y_bar = np.asarray([1.0, 0.5, 0.2]), np.asarray([1.0, 0.0, 0.0]), rng.standard_normal(3)
    h = np.diag([-5.0, 1.0, 2.0])
    stated = {
        "gradient": lambda y, x: h @ (y - x) - x * 0 + h @ (x - y),
        "constraint": lambda y, x: y[:1] - x[:1],
        "constraint_jacobian": lambda y, x: np.asarray([[1.0, 0.0, 0.0]]),
        "residual_vjp": lambda w, eta, y, nu, x: np.concat([-eta, w[1:]]),
    }
    dense, _ = implicit.eq_argmin_vjp(y_bar, y, None, x, hessian=lambda y, nu, x: h, **stated)
    products = implicit.Products(lambda v: h @ v)
    got, info = implicit.eq_argmin_vjp(y_bar, y, None, x, hessian=lambda *a: products, **stated)
    assert relative(got, dense) <= 1e-13
    assert info.error <= 1e-13


def test_options_of_products(rng):
    s, x = Argmin.inputs(rng)
    y, y_bar = Argmin.solve(s, x), rng.standard_normal(N)
    calls = []

    def products(**options):
        def apply(v):
            calls.append(1)
            return Argmin.hessian(y, s, x) @ v

        return {"hessian": lambda *a: implicit.Products(apply, **options)}

    exact = Argmin.vjp(y_bar, y, s, x)
    assert relative(Argmin.vjp(y_bar, y, s, x, **products())[1], exact[1]) <= 1e-12
    with pytest.raises(ConvergenceError, match="raise maxiter"):
        Argmin.vjp(y_bar, y, s, x, **products(maxiter=2))
    assert np.all(np.isnan(Argmin.vjp(y_bar, y, s, x, **products(maxiter=2), throw=False)[1]))
    assert 1e-9 < relative(Argmin.vjp(y_bar, y, s, x, **products(rtol=1e-2))[1], exact[1]) < 0.1
    counts = []
    for check_every in (1, 10):
        calls.clear()
        Argmin.vjp(y_bar, y, s, x, **products(check_every=check_every))
        counts.append(len(calls))
    assert counts[0] < counts[1]
    with pytest.raises(SingularError):
        Argmin.vjp(y_bar, y, s, x, hessian=lambda *a: implicit.Products(lambda v: -v))


def test_products_under_tracing(rng):
    jax = pytest.importorskip("jax")
    xp = backend("jax")
    s, x = Argmin.inputs(rng, (2,))
    y, y_bar = Argmin.solve(s, x), rng.standard_normal((2, N))

    def vjp(y_bar, y, s, x):
        h = Argmin.hessian(y, s, x)
        products = implicit.Products(lambda v: dot(h, v), while_loop=jax.lax.while_loop)
        return Argmin.vjp(y_bar, y, s, x, hessian=lambda *a: products, throw=False)

    got = jax.jit(vjp)(*(xp.asarray(a) for a in (y_bar, y, s, x)))
    assert relative(xp.numpy(got[1]), Argmin.vjp(y_bar, y, s, x)[1]) <= 1e-12


# --- where the theory bites ---------------------------------------------------------------------------------------


def test_eigenvectors_as_a_node_with_a_singular_hessian(xp, rng):
    """min −½ uᵀXu s.t. uᵀu = 1: ℒ_yy is exactly singular at the solution, the bordered matrix is not."""
    x = symmetric(rng, 6, (3,))
    w, v = np.linalg.eigh(x)
    y, y_bar = v[..., -1], rng.standard_normal((3, 6))
    y_bar -= np.sum(y * y_bar, axis=-1, keepdims=True) * y
    eye = xp.asarray(np.eye(6))
    stated = {
        "gradient": lambda y, x: -dot(x, y),
        "hessian": lambda y, nu, x: -x - 2 * nu[..., None] * eye,
        "constraint": lambda y, x: dot(y[..., None, :], y) - 1,
        "constraint_jacobian": lambda y, x: 2 * y[..., None, :],
        "residual_vjp": lambda w, eta, y, nu, x: -outer(w, y),
    }
    got, _ = implicit.eq_argmin_vjp(xp.asarray(y_bar), xp.asarray(y), None, xp.asarray(x), **stated)
    got = xp.numpy(got)
    expected = ddnref.eigh_vjp(None, y_bar[..., None], w, v, index=[5])
    assert relative((got + transpose(got)) / 2, expected) <= 1e-12


def test_multipliers_given_are_used_and_checked(rng):
    inputs = Equality.inputs(rng)
    y, y_bar = Equality.solve(*inputs), rng.standard_normal(N)
    nu = Equality.multipliers(y, *inputs)
    for got, e in zip(Equality.vjp(y_bar, y, *inputs, nu=nu), Equality.vjp(y_bar, y, *inputs), strict=True):
        assert relative(got, e) <= 1e-10
    for got, e in zip(Equality.vjp(y_bar, y, *inputs, nu=1.001 * nu), Equality.vjp(y_bar, y, *inputs), strict=True):
        assert relative(got, e) <= 1e-8  # corrected
    with pytest.raises(OptimalityError, match="does not help"):
        Equality.vjp(y_bar, y, *inputs, nu=30 * nu)


def test_activity_follows_the_multiplier_on_both_sides_of_a_change(rng):
    """A step below a tenth of the distance to the change sees one side; the other side has another gradient."""
    t = np.asarray([1.0])
    x = np.asarray([0.9, 0.6, 0.2, -0.6, -0.8])
    lo, hi = 0.0, 1.0  # bisect the third entry for the change of activity
    at = lambda s: np.concat([x[:2], [s - 0.5], x[3:]])
    for _ in range(60):
        mid = (lo + hi) / 2
        lo, hi = (mid, hi) if Inequality.one(at(mid), t)[2] == 0 else (lo, mid)
    gradients = []
    for side in (-1e-3, 1e-3):
        report = assert_vjp(Inequality.solve, Inequality.vjp, at(lo + side), t, needs=(0, 1), step=1e-4)
        assert report.error <= 1e-9
        gradients.append(
            Inequality.vjp(np.ones(N) * np.arange(N), Inequality.one(at(lo + side), t), at(lo + side), t)[0]
        )
    assert relative(*gradients) > 1e-2


@pytest.mark.parametrize("noise", [1e-17, -1e-17, 1e-12, -1e-12])
def test_rounding_at_a_touched_constraint_is_no_error(noise):
    """The gradient of f is rounding itself there, and its sign means nothing: one of both sides comes back."""
    bars, _ = implicit.ineq_argmin_vjp(
        np.ones(2), np.asarray([0.0, 2.0]), None, np.asarray([noise, 2.0]),
        gradient=lambda y, x: y - x, hessian=lambda y, nu, x: np.eye(2), constraint=lambda y, x: -y,
        constraint_jacobian=lambda y, x: -np.eye(2), residual_vjp=lambda w, eta, y, nu, x: -w,
    )  # fmt: skip
    assert bars[1] == 1
    assert min(abs(bars[0]), abs(bars[0] - 1)) <= 1e-15


def test_a_touched_constraint_counts_as_inactive():
    bars, info = implicit.ineq_argmin_vjp(
        np.ones(2), np.asarray([0.0, 2.0]), None, np.asarray([0.0, 2.0]),
        gradient=lambda y, x: y - x, hessian=lambda y, nu, x: np.eye(2), constraint=lambda y, x: -y,
        constraint_jacobian=lambda y, x: -np.eye(2), residual_vjp=lambda w, eta, y, nu, x: -w,
    )  # fmt: skip
    assert np.array_equal(bars, np.ones(2))
    assert info.error == 1  # the gradient of the other side is as right


def test_a_multiplier_of_the_wrong_sign_and_a_violated_constraint_are_refused():
    half = {"hessian": lambda y, nu, x: np.eye(2), "constraint_jacobian": lambda y, x: -np.eye(2)}
    half |= {"constraint": lambda y, x: -y, "residual_vjp": lambda w, eta, y, nu, x: -w, "gradient": lambda y, x: y - x}
    for y, x in (([0.0, 2.0], [1.0, 2.0]), ([-1.0, 2.0], [-1.0, 2.0])):
        with pytest.raises(OptimalityError):
            implicit.ineq_argmin_vjp(np.ones(2), np.asarray(y), None, np.asarray(x), **half)


def test_equalities_are_counted(rng):
    """The option matters: as inequality, Σ y ≤ t may be inactive."""
    x, t = np.full(N, 0.1), np.asarray([2.0])
    y = Inequality.one(x, t)
    Inequality.vjp(np.ones(N), y, x, t)
    with pytest.raises(OptimalityError):
        Inequality.vjp(np.ones(N), y, x, t, equalities=0)


def test_singular_systems_are_reported(xp, rng):
    a = np.ones((1, 2, N))
    a[0, 1] = 2
    x = np.ones((1, N))
    arrays = [xp.asarray(z) for z in (x, x, a, np.asarray([[float(N), 2.0 * N]]), x)]
    stated = {"gradient": lambda y, x: y - x, "hessian": lambda y, x: implicit.Diagonal(y * 0 + 1)}
    with pytest.raises(SingularError, match="constraints repeat each other"):
        Linear.vjp(*arrays, **stated)
    for bar in Linear.vjp(*arrays, **stated, throw=False):
        assert np.all(np.isnan(xp.numpy(bar)))
    flat = {"gradient": lambda y, s, x: 0 * y, "hessian": lambda y, s, x: s}
    q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    nearly = (q * np.asarray([1, 1, 1, 1, 0.0])) @ q.T  # singular up to rounding only: no pivot is exactly zero
    with pytest.raises(SingularError, match="singular to working precision"):
        Argmin.vjp(xp.asarray(np.ones(N)), xp.asarray(np.ones(N)), xp.asarray(nearly), xp.asarray(np.ones(N)), **flat)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hessians_are_judged_whatever_the_units(dtype, xp, rng):
    """Singular but for rounding: always refused. Regular, in any units: never."""

    @xp.jit  # JAX compiles once for each shape, and not each of the hundred operations
    def vjp(one, h):
        stated = {"gradient": lambda y: 0 * y, "hessian": lambda y: h, "gradient_vjp": lambda w, y: w}
        return implicit.argmin_vjp(one, one, **stated, throw=False)[0]

    for kinds, expected in ((SQUARE_SINGULAR, True), (SQUARE_REGULAR, False)):
        for name, kind in kinds.items():
            h = xp.asarray(stack(kind, rng, dtype, 50, xp.name))
            one = xp.asarray(np.ones(h.shape[:-1], dtype))
            assert np.all(np.any(np.isnan(xp.numpy(vjp(one, h))), axis=-1) == expected), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_structured_hessians_are_judged_whatever_the_units(dtype, xp, rng):
    n, eps = 6, np.finfo(dtype).eps
    unit = 10.0 ** rng.uniform(-6, 6, n)
    d, u = rng.uniform(1, 2, n), rng.standard_normal((n, 2))
    null = np.where(np.arange(n) == 2, 0.0, 1.0)
    x = rng.standard_normal(n)
    x = x / np.linalg.norm(x)  # I − x xᵀ is singular
    blocks = rng.standard_normal((3, 2, 2)) + 3 * np.eye(2)
    dependent = blocks.copy()
    dependent[1] = [[1, 3], [0.1, 0.3]]
    forms = [
        (implicit.Diagonal, (unit**3,), False),
        (implicit.Diagonal, (unit * null,), True),
        (implicit.BlockDiagonal, (blocks * np.asarray([1e-12, 1, 1e12])[:, None, None],), False),
        (implicit.BlockDiagonal, (dependent,), True),
        (implicit.DiagonalPlusLowRank, (d * unit**2, u * unit[:, None]), False),
        (implicit.DiagonalPlusLowRank, (unit * unit, -(x * unit)[:, None], (x * unit)[:, None]), True),
        (implicit.DiagonalPlusLowRank, (d * null, 1e-3 * eps * u), True),
    ]
    for form, arrays, expected in forms:
        h = form(*(xp.asarray(z.astype(dtype)) for z in arrays))
        assert bool(singularity.is_singular(h.inverse().rcond)) == expected, form


# --- static facts -------------------------------------------------------------------------------------------------


@problems
def test_host_reads(problem, host_reads, rng):
    strict = backend("array-api-strict")
    inputs = problem.inputs(rng, (2,))
    y = problem.solve(*inputs)
    arrays = [strict.asarray(a) for a in (y, y, *inputs)]
    host_reads.clear()
    problem.vjp(*arrays, throw=False)
    assert [r for r in host_reads if r not in ("__array__", "__buffer__")] == []


@problems
@pytest.mark.parametrize("batch", [(0,), (2, 0)])
def test_empty_batches(problem, batch, rng, xp):
    inputs = [np.zeros((*batch, *a.shape)) for a in problem.inputs(rng)]
    y = np.zeros((*batch, N))
    bars = xp.jit(partial(problem.vjp, throw=xp.name != "jax"))(*(xp.asarray(a) for a in (y, y, *inputs)))
    assert [tuple(g.shape) for g in bars] == [a.shape for a in inputs]


def test_static_errors(rng):
    s, x = Argmin.inputs(rng)
    y = Argmin.solve(s, x)
    with pytest.raises(ValueError, match=r"y_bar has shape \(4,\), expected \(5,\)"):
        Argmin.vjp(y[:4], y, s, x)
    with pytest.raises(TypeError, match="y_bar has dtype float32"):
        Argmin.vjp(y.astype(np.float32), y, s, x)
    with pytest.raises(TypeError, match="y_bar has dtype int64"):
        Argmin.vjp(np.ones(N, dtype=np.int64), y, s, x)
    with pytest.raises(TypeError, match="defined for real arrays"):
        Argmin.vjp(y + 0j, y + 0j, s, x)
    with pytest.raises(ValueError, match=r"y has shape \(\)"):
        Argmin.vjp(np.asarray(1.0), np.asarray(1.0), s, x)
    with pytest.raises(ValueError, match=r"hessian has shape \(4, 4\), expected \(5, 5\)"):
        Argmin.vjp(y, y, s, x, hessian=lambda *a: np.eye(4))
    with pytest.raises(ValueError, match=r"hessian\.d has shape"):
        Argmin.vjp(y, y, s, x, hessian=lambda *a: implicit.Diagonal(np.ones(4)))
    with pytest.raises(ValueError, match=r"hessian\.blocks has shape"):
        Argmin.vjp(y, y, s, x, hessian=lambda *a: implicit.BlockDiagonal(np.ones((2, 2, 2))))
    with pytest.raises(ValueError, match=r"hessian\.u has shape"):
        Argmin.vjp(y, y, s, x, hessian=lambda *a: implicit.DiagonalPlusLowRank(np.ones(5), np.ones((4, 1))))
    with pytest.raises(ValueError, match="the result of gradient has shape"):
        Argmin.vjp(y, y, s, x, gradient=lambda *a: np.ones(4))
    inputs = Equality.inputs(rng)
    y = Equality.solve(*inputs)
    with pytest.raises(ValueError, match="the result of constraint_jacobian has shape"):
        Equality.vjp(y, y, *inputs, constraint_jacobian=lambda *a: np.ones((2, 4)))
    with pytest.raises(ValueError, match="nu has shape"):
        Equality.vjp(y, y, *inputs, nu=np.ones(3))
    a, b, x = Linear.inputs(rng)
    with pytest.raises(ValueError, match="a has shape"):
        Linear.vjp(x, x, a[:, :3], b, x)
    with pytest.raises(TypeError, match="gradient_vjp must be given"):
        Linear.vjp(x, x, a, b, x, gradient_vjp=None)
