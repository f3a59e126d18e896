"""k eigenpairs of a pencil by shift and invert: stiffness and mass on a grid, operators, equal values, bad input."""

from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
from problems import adjoint, relative, rotation, symmetric
from scipy.sparse.linalg import eigsh as scipy_eigsh
from scipy.sparse.linalg import splu

import ddnref
from ddnref import ConvergenceError, GaugeError, SingularError, operators

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, *np.linspace(2, 4, 15)])


def pencil(rng, w, batch=(), is_complex=False):
    m = len(w)
    v = (rotation(rng, m, batch, is_complex) * np.exp(rng.uniform(0, 1, (*batch, 1, m)))) @ rotation(rng, m)
    left = np.linalg.inv(v)
    both = adjoint(left) @ (np.asarray(w)[:, None] * left), adjoint(left) @ left
    return v, *((x + adjoint(x)) / 2 for x in both)


# --- a grid of finite elements ----------------------------------------------------------------------------------


class Grid:
    """Stiffness and mass of bilinear elements on a rectangle that is held at its border, one weight per element."""

    def __init__(self, rows, columns, length=2.3):
        width, height = length / (columns + 1), 1 / (rows + 1)
        elements = np.arange((rows + 1) * (columns + 1))
        at = elements // (columns + 1) * (columns + 2) + elements % (columns + 1)
        corners = np.stack([at, at + 1, at + columns + 3, at + columns + 2], axis=1)
        x = np.asarray([[2, -2, -1, 1], [-2, 2, 1, -1], [-1, 1, 2, -2], [1, -1, -2, 2]]) * height / width / 6
        y = np.asarray([[2, 1, -1, -2], [1, 2, -2, -1], [-1, -2, 2, 1], [-2, -1, 1, 2]]) * width / height / 6
        mass = np.asarray([[4, 2, 1, 2], [2, 4, 2, 1], [1, 2, 4, 2], [2, 1, 2, 4]]) * width * height / 36
        inside = np.zeros((rows + 2, columns + 2), dtype=bool)
        inside[1:-1, 1:-1] = True
        number = np.where(inside.ravel(), np.cumsum(inside) - 1, -1)
        i, j = (number[np.repeat(corners, 4, axis=1).ravel()], number[np.tile(corners, (1, 4)).ravel()])
        kept = (i >= 0) & (j >= 0)
        of = np.repeat(elements, 16)[kept]
        # The stored entries of both matrices are linear in the weights.
        shape = rows * columns, rows * columns
        entry = sp.coo_array((np.ones(kept.sum()), (i[kept], j[kept])), shape=shape).tocsr()
        entry.sort_indices()
        entry.data[:] = np.arange(entry.nnz)
        place = np.asarray(entry[i[kept], j[kept]], dtype=int).ravel()
        self.frame = entry
        self.maps = [
            sp.csr_array((np.tile(local.ravel(), len(elements))[kept], (place, of)), shape=(entry.nnz, len(elements)))
            for local in (x + y, mass)
        ]
        self.count = len(elements)

    def matrices(self, weights):
        """Return both matrices for the weights of stiffness and mass, (2, elements)."""
        found = []
        for linear, w in zip(self.maps, weights, strict=True):
            matrix = self.frame.copy()
            matrix.data = linear @ w
            found.append(matrix)
        return found

    def operators(self, weights):
        stiffness, mass = self.matrices(weights)
        return operators.from_scipy(stiffness, self_adjoint=True), operators.from_scipy(mass, positive_definite=True)


def mode_loss(rng, m, k):
    """A loss of eigenvalues and of vectors whose signs do not matter, and its cotangents."""
    c, p, q = rng.standard_normal(k), rng.standard_normal((m, k)), rng.standard_normal((m, k))

    def value(w, v):
        return np.sum(c * w) + np.sum(np.sum(p * v, axis=0) * np.sum(q * v, axis=0))

    return value, lambda w, v: (c, p * np.sum(q * v, axis=0) + q * np.sum(p * v, axis=0))


def test_the_smallest_modes_of_a_grid(rng):
    """A grid of 100×200 points, k = 6: residual, agreement with ARPACK, and the gradient to the element weights."""
    grid = Grid(100, 200)
    weights = rng.uniform(0.5, 2, (2, grid.count))
    a, b = grid.operators(weights)
    ((w, v), saved), info = ddnref.eigsh_generalized_fwd(a, b, 6, sigma=0.0)
    stiffness, mass = grid.matrices(weights)
    residual = np.linalg.norm(stiffness @ v - mass @ v * w, axis=0) / np.linalg.norm(stiffness @ v, axis=0)
    assert np.max(residual) <= 1e-10
    assert np.max(info.residual_norm) <= 1e-10
    assert np.max(np.abs(v.T @ (mass @ v) - np.eye(6))) <= 1e-12
    theirs = np.sort(scipy_eigsh(stiffness, 6, M=mass, sigma=0.0, return_eigenvectors=False))
    np.testing.assert_allclose(w, theirs, rtol=1e-12)

    value, cotangents = mode_loss(rng, a.size, 6)
    bars, info = ddnref.eigsh_generalized_vjp(*cotangents(w, v), w, v, *saved, a, b, sigma=0.0)
    gradient = np.stack([linear.T @ bar for linear, (bar,) in zip(grid.maps, bars, strict=True)])
    direction = rng.standard_normal(weights.shape) + gradient / np.linalg.norm(gradient) * weights.size**0.5

    def at(s):
        (w, v), _ = ddnref.eigsh_generalized(*grid.operators(weights + s * direction), 6, sigma=0.0, rtol=1e-14)
        return value(w, v)

    h = 2e-3
    slopes = [(at(s) - at(-s)) / (2 * s) for s in (h, h / 2)]
    numerical, analytic = (4 * slopes[1] - slopes[0]) / 3, np.sum(gradient * direction)
    assert abs(numerical - analytic) <= 1e-6 * abs(analytic)


def test_operators_with_their_own_parameters(rng):
    """Element weights as parameters, with the field ``sparse`` or the user's solver, and modes inside the spectrum."""
    grid = Grid(9, 13)
    weights = rng.uniform(0.5, 2, (2, grid.count))

    def operator(i, sparse):
        def filled(params):
            return grid.matrices((params[0], params[0]))[i]

        def apply(params, x):
            return (filled(params) @ x.reshape(-1, x.shape[-1]).T).T.reshape(x.shape)

        def params_vjp(params, y_bar, x):
            rows, columns = grid.frame.tocoo().row, grid.frame.tocoo().col
            entries = np.sum(y_bar[..., rows] * x[..., columns], axis=tuple(range(x.ndim - 1)))
            return (grid.maps[i].T @ entries,)

        n = grid.frame.shape[0]
        return operators.LinearOperator(
            (weights[i],), apply, apply, params_vjp, (n,), (n,), self_adjoint=True, positive_definite=True,
            params_jvp=lambda params, params_dot, x: apply(params_dot, x), sparse=filled if sparse else None,
        )  # fmt: skip

    sigma, k = 60.0, 4
    stiffness, mass = grid.matrices(weights)
    factors = splu((stiffness - sigma * mass).tocsc())
    solve = lambda y: factors.solve(y.reshape(-1, y.shape[-1]).T).T.reshape(y.shape)
    dense = stiffness.toarray(), mass.toarray()
    (w, v), _ = ddnref.eigsh_generalized(*dense, k, sigma=sigma, method="full")
    _, cotangents = mode_loss(rng, len(v), k)
    bars = cotangents(w, v)
    exact = ddnref.eigsh_generalized_vjp(*bars, w, v, *dense, sigma=sigma)[0]
    dots = rng.standard_normal(weights.shape)
    dense_dots = [x.toarray() for x in grid.matrices(dots)]
    tangents = ddnref.eigsh_generalized_jvp(*dense_dots, w, v, *dense, sigma=sigma)[0]
    for options, sparse in (({"solve": solve}, False), ({}, True)):
        a, b = operator(0, sparse), operator(1, sparse)
        ((w_2, v_2), saved), _ = ddnref.eigsh_generalized_fwd(a, b, k, sigma=sigma, **options)
        np.testing.assert_allclose(w_2, w, rtol=1e-11)
        signs = np.sign(np.sum(v_2 * (mass @ v), axis=0))
        for more in (saved, ()):
            found, _ = ddnref.eigsh_generalized_vjp(
                *cotangents(w_2, v_2), w_2, v_2, *more, a, b, sigma=sigma, **options
            )
            for i, (bar,) in enumerate(found):
                expected = grid.maps[i].T @ exact[i][grid.frame.tocoo().row, grid.frame.tocoo().col]
                assert relative(bar, expected) <= 1e-8
            (w_dot, v_dot), _ = ddnref.eigsh_generalized_jvp(
                (dots[0],), (dots[1],), w_2, v_2, *more, a, b, sigma=sigma, **options
            )
            assert relative(w_dot, tangents[0]) <= 1e-8
            assert relative(v_dot * signs, tangents[1]) <= 1e-8
        alone, _ = ddnref.eigsh_generalized_vjp(bars[0], None, w_2, v_2, a, b, sigma=sigma, **options)
        expected = grid.maps[1].T @ (-((v * (w * bars[0])) @ v.T))[grid.frame.tocoo().row, grid.frame.tocoo().col]
        assert relative(alone[1][0], expected) <= 1e-10
    with pytest.raises(ValueError, match="pass solve="):
        ddnref.eigsh_generalized(operator(0, False), operator(1, True), k, sigma=sigma)
    with pytest.raises(ConvergenceError, match="solve= is not the inverse"):
        ddnref.eigsh_generalized(operator(0, True), operator(1, True), k, sigma=sigma, solve=lambda y: 2 * solve(y) + y)


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize(
    ("sigma", "which"), [(None, "LM"), (None, "LA"), (None, "SA"), (1.6, "LM"), (1.6, "LA"), (5.0, "SA"), (-2.0, "LM")]
)
def test_every_choice_of_eigenvalues(sigma, which, is_complex, xp, rng):
    """Values, order and gradients are those of all pairs, by iteration and from the whole spectrum."""
    w_all = np.sort(rng.uniform(-1, 4, 24))
    _, a, b = pencil(rng, w_all, (2,), is_complex)
    theta = w_all if sigma is None else 1 / (w_all - sigma)
    order = np.argsort({"LM": -np.abs(theta), "LA": -theta, "SA": theta}[which])[:3]
    full = [ddnref.eigh_generalized(a[i], b[i]) for i in range(2)]
    for method in ("iterative", "full"):
        options = {"sigma": sigma, "which": which}
        ((w, v), saved), _ = ddnref.eigsh_generalized_fwd(
            xp.asarray(a), xp.asarray(b), 3, method=method, basis=14, while_loop=xp.while_loop,
            throw=xp.name != "jax", **options,
        )  # fmt: skip
        np.testing.assert_allclose(xp.numpy(w), np.broadcast_to(w_all[order], (2, 3)), rtol=1e-10, atol=1e-11)
        v = xp.numpy(v)
        c = symmetric(rng, 24, (), is_complex)
        weights = np.asarray([1.0, -2.0, 0.5])
        bars = weights * np.ones((2, 3)), 2 * c @ v * weights
        found, _ = ddnref.eigsh_generalized_vjp(
            *map(xp.asarray, bars), w, xp.asarray(v), *saved, xp.asarray(a), xp.asarray(b), throw=False,
            while_loop=xp.while_loop, **options,
        )  # fmt: skip
        for i in range(2):
            phases = np.sum(np.conj(full[i][1][:, order]) * (b[i] @ v[i]), axis=0)
            expected = ddnref.eigh_generalized_vjp(
                bars[0][i], bars[1][i] * np.conj(phases), *full[i], index=order.tolist()
            )
            for x, y in zip(found, expected, strict=True):
                assert np.array_equal(xp.numpy(x), adjoint(xp.numpy(x)))
                assert relative(xp.numpy(x)[i], y) <= 1e-8


@pytest.mark.parametrize("method", ["iterative", "full"])
def test_a_triple_eigenvalue(method, rng):
    """All copies are found, losses of their space are exact, others and a cut through it are refused."""
    _, a, b = pencil(rng, TRIPLE)
    options = {"sigma": -1.2}
    ((w, v), saved), _ = ddnref.eigsh_generalized_fwd(a, b, 4, method=method, basis=14, **options)
    np.testing.assert_allclose(w, TRIPLE[:4], atol=1e-12)
    c = symmetric(rng, 20)
    inside = np.asarray([False, True, True, True])
    full = ddnref.eigh_generalized(a, b)
    expected = ddnref.eigh_generalized_vjp(None, 2 * c @ full[1][:, 1:4], *full, index=(1, 2, 3))
    for more in (saved, ()):
        found, _ = ddnref.eigsh_generalized_vjp(None, np.where(inside, 2 * c @ v, 0), w, v, *more, a, b, **options)
        for x, y in zip(found, expected, strict=True):
            assert relative(x, y) <= 1e-8
        with pytest.raises(GaugeError, match="depends on a choice that the matrices do not determine"):
            ddnref.eigsh_generalized_vjp(None, rng.standard_normal(v.shape), w, v, *more, a, b, **options)
        with pytest.raises(GaugeError, match="splits equal eigenvalues"):
            ddnref.eigsh_generalized_jvp(symmetric(rng, 20), None, w, v, *more, a, b, **options)
    with pytest.raises(GaugeError, match="Eigenvalue 2 equals the next one"):
        ddnref.eigsh_generalized(a, b, 2, method=method, basis=14, **options)
    ((w, v), saved), info = ddnref.eigsh_generalized_fwd(a, b, 2, method=method, basis=14, throw=False, **options)
    assert info.cut
    with pytest.raises(GaugeError, match="the next outside"):
        ddnref.eigsh_generalized_vjp(np.ones(2), None, w, v, *saved, a, b, **options)
    for rounding in (0.0, 1e-17):
        ddnref.eigsh_generalized_vjp(np.asarray([1.0, rounding]), None, w, v, *saved, a, b, **options)


@pytest.mark.parametrize("power", [-200, 200])
def test_any_size(power, rng):
    """Squares of either matrix leave the range of exponents."""
    w_all = np.linspace(1, 3, 24)
    _, a, b = pencil(rng, w_all)
    size = 2.0**power
    for method in ("iterative", "full"):
        for scales in ((size, 1.0), (1.0, size), (size, size)):
            (w, v), _ = ddnref.eigsh_generalized(
                scales[0] * a, scales[1] * b, 3, sigma=0.5 * scales[0] / scales[1], method=method, basis=14
            )
            np.testing.assert_allclose(w / (scales[0] / scales[1]), w_all[:3], rtol=1e-12)
            np.testing.assert_allclose(v.T @ (scales[1] * b) @ v, np.eye(3), atol=1e-12)


# --- bad input --------------------------------------------------------------------------------------------------


def test_items_that_have_no_solution(xp, rng):
    _, a, b = pencil(rng, np.arange(20.0), (3,))
    broken = b.copy()
    broken[1] = -b[1]
    missing = a.copy()
    missing[0, 3, 4] = np.nan
    for method in ("iterative", "full"):
        options = {"k": 2, "which": "LA", "while_loop": xp.while_loop, "sigma": 2.5, "method": method}
        quiet = xp.jit(partial(ddnref.eigsh_generalized, throw=False, **options))
        alone = xp.numpy(quiet(xp.asarray(a), xp.asarray(b))[0][0])
        for matrices, bad, error in [((a, broken), 1, SingularError), ((missing, b), 0, ConvergenceError)]:
            given = tuple(map(xp.asarray, matrices))
            with pytest.raises(error, match=rf"\(item {bad} of 3\)"):
                ddnref.eigsh_generalized(*given, **options)
            (w, _), info = quiet(*given)
            good = [i for i in range(3) if i != bad]
            assert not xp.numpy(info.converged)[bad]
            np.testing.assert_allclose(xp.numpy(w)[good], alone[good], rtol=1e-12)


def test_a_shift_that_is_an_eigenvalue(rng):
    with pytest.raises(SingularError, match="a sigma that is an eigenvalue"):
        ddnref.eigsh_generalized(np.diag(np.arange(20.0)), np.eye(20), 2, sigma=3.0, method="iterative", basis=14)
    free = sp.diags_array([np.full(39, -1.0), [1.0, *[2.0] * 38, 1.0], np.full(39, -1.0)], offsets=[-1, 0, 1]).tocsr()
    a = operators.from_scipy(free, self_adjoint=True)
    b = operators.from_scipy(sp.eye_array(40).tocsr(), positive_definite=True)
    with pytest.raises((SingularError, ConvergenceError)):
        ddnref.eigsh_generalized(a, b, 3, sigma=0.0)
    (w, _), _ = ddnref.eigsh_generalized(a, b, 3, sigma=-0.1)
    np.testing.assert_allclose(w, 2 - 2 * np.cos(np.pi * np.arange(3) / 40), atol=1e-13)


def test_static_facts(rng):
    _, a, b = pencil(rng, np.arange(20.0))
    forward, vjp, jvp = ddnref.eigsh_generalized, ddnref.eigsh_generalized_vjp, ddnref.eigsh_generalized_jvp
    (w, v), _ = forward(a, b, 2, sigma=-1.0)
    operator = operators.dense(a, self_adjoint=True)
    for function, args, options, error, match in [
        (forward, (a, b.astype("float32"), 2), {}, TypeError, "b has dtype float32, expected float64"),
        (forward, (a, b[:5, :5], 2), {}, ValueError, "b has shape"),
        (forward, (a, None, 2), {}, TypeError, "b is None"),
        (forward, (operator, b, 2), {}, TypeError, "two arrays or two operators"),
        (forward, (operator, operator, 2), {}, ValueError, "b is not marked as positive definite"),
        (forward, (a, b, 0), {}, ValueError, "k is 0"),
        (forward, (a, b, 21), {}, ValueError, "k is 21"),
        (forward, (a, b, 2), {"which": "LE"}, ValueError, "which is 'LE'"),
        (forward, (a, b, 2), {"sigma": float("nan")}, ValueError, "sigma is NaN"),
        (forward, (a, b, 2), {"method": "qz"}, ValueError, "method is 'qz'"),
        (forward, (a, b, 2), {"basis": 3}, ValueError, "basis is 3"),
        (vjp, (None, None, w, v, a, b), {}, TypeError, "both None"),
        (vjp, (w, None, w, v, a), {}, TypeError, "after w, v come a, b"),
        (vjp, (w, v[:, :1], w, v, a, b), {}, ValueError, "v_bar has shape"),
        (vjp, (w, None, w, v, a, b), {"which": "SM"}, ValueError, "which is 'SM'"),
        (jvp, (None, None, w, v, a, b), {}, TypeError, "both None"),
        (jvp, (a[:5], None, w, v, a, b), {}, ValueError, "a_dot has shape"),
        (jvp, (None, (a,), w, v, a, b), {}, TypeError, "b_dot"),
    ]:  # fmt: skip
        with pytest.raises(error, match=match):
            function(*args, **options)
    with pytest.raises(ConvergenceError, match="are not the eigenpairs"):
        vjp(w, None, w + 0.1, v, a, b, sigma=-1.0)


@pytest.mark.framework("torch")
def test_second_derivatives_are_refused(torch, rng):
    from ddnref.interop.torch import differentiable

    _, a, b = pencil(rng, np.arange(8.0))
    a, b = (torch.asarray(x).requires_grad_() for x in (a, b))
    (w, _), _ = differentiable(ddnref.eigsh_generalized, k=2, sigma=-1.0)(a, b)
    (a_bar,) = torch.autograd.grad((w**3).sum(), a, create_graph=True)
    with pytest.raises(NotImplementedError, match="through eigsh_generalized"):
        a_bar.sum().backward()


@pytest.mark.framework("torch")
@pytest.mark.parametrize("options", [{}, {"on_failure": "iterate"}])
def test_operators_through_the_bridge(options, torch):
    """Diagonal operators with the user's solver, whose eigenpairs and gradients are known."""
    from ddnref.interop.torch import differentiable

    x = torch.linspace(1, 4, 30, dtype=torch.float64).requires_grad_()
    y = (1 + torch.cos(x.detach()) ** 2).requires_grad_()
    a, b = (operators.diagonal(z, positive_definite=True) for z in (x, y))
    solve = lambda r: r / (x.detach() - 0.1 * y.detach())
    function = differentiable(ddnref.eigsh_generalized, k=3, sigma=0.1, solve=solve, basis=14, rtol=1e-14, **options)
    (w, v), _ = function(a, b)
    found = torch.autograd.grad(w.sum() + (v[:, :2] ** 2).sum(), (x, y))
    # λ = x / y, v = 1 / √y at one entry
    wanted = torch.argsort((x / y).detach())[:3]
    expected = torch.zeros(2, 30, dtype=torch.float64)
    expected[0, wanted], expected[1, wanted] = (1 / y)[wanted].detach(), -(x / y**2)[wanted].detach()
    expected[1, wanted[:2]] -= (1 / y**2)[wanted[:2]].detach()
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-10, atol=1e-10)
