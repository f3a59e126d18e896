"""Forward mode and second derivatives in the PyTorch bridge, in every nesting of the transforms."""

import numpy as np
import pytest
from problems import rotation, symmetric, with_spectrum
from public_names import PUBLIC
from smooth import bridged, total

import ddnref
from conftest import TRACED
from ddnref._rules.table import RULES

pytestmark = [
    pytest.mark.framework("torch"),
    # PyTorch's own, when forward mode is used first
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

NAMED = ["eigh", "eigh_topk", "sqrtm", "logm", "gram_eigh", "svdvals", "solve", "linear_solve", "sinkhorn", "qr",
         "project_simplex", "weighted_least_squares", "least_squares_on_sphere", "power_iteration"]  # fmt: skip
LOOSE = {"linear_solve": 1e-9, "sinkhorn": 1e-8, "robust_pool": 1e-8, "power_iteration": 1e-7,
         "simultaneous_iteration": 1e-7, "eigsh": 1e-6}  # fmt: skip
"""How closely derivatives agree that take different ways, where the forward ends at a tolerance."""


@pytest.fixture
def differentiable(torch):
    from ddnref.interop.torch import differentiable

    return differentiable


@pytest.fixture
def along(torch, differentiable, rng):
    """A function that makes an operation one of two numbers: the loss at a matrix that moves in two directions."""

    def along(name):
        f = bridged(torch, differentiable, name)
        x, *directions = torch.asarray(rng.standard_normal((3, 3, 3)))
        return lambda s: total(f(x + s[0] * directions[0] + (s[0] * s[1] + torch.sin(s[1])) * directions[1]))

    return along


@pytest.mark.parametrize("name", RULES)
def test_tangents_are_those_of_the_gradient(name, torch, along):
    func, forward_ad = torch.func, torch.autograd.forward_ad
    loss = along(name)
    s = torch.tensor([[0.1, -0.2], [0.0, 0.1]], dtype=torch.float64)
    t = torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64)
    expected = torch.stack([func.grad(loss)(x) @ d for x, d in zip(s, t, strict=True)])
    tolerance = {"rtol": LOOSE.get(name, 1e-10), "atol": LOOSE.get(name, 1e-10)}

    def tangent(x, d):
        return func.jvp(loss, (x,), (d,))[1]

    torch.testing.assert_close(tangent(s[0], t[0]), expected[0], **tolerance)
    torch.testing.assert_close(func.vmap(tangent)(s, t), expected, **tolerance)
    torch.testing.assert_close(func.jvp(func.vmap(loss), (s,), (t,))[1], expected, **tolerance)
    with forward_ad.dual_level():
        y = loss(forward_ad.make_dual(s[0], t[0]))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected[0], **tolerance)


@pytest.mark.parametrize("name", NAMED)
def test_second_derivatives_in_every_nesting(name, torch, along):
    """They are the differences of the gradient, and agree with each other far beyond these."""
    func, loss = torch.func, along(name)
    s, step = torch.tensor([0.1, -0.2], dtype=torch.float64), 1e-4
    gradient = func.grad(loss)
    differences = torch.stack(
        [(gradient(s + step * e) - gradient(s - step * e)) / (2 * step) for e in torch.eye(2, dtype=s.dtype)]
    )
    found = {
        "reverse over reverse": func.jacrev(func.jacrev(loss))(s),
        "forward over reverse": func.hessian(loss)(s),
        "reverse over forward": func.jacrev(func.jacfwd(loss))(s),
        "forward over forward": func.jacfwd(func.jacfwd(loss))(s),
        "vmap": func.vmap(func.hessian(loss))(torch.stack([s, s + 0.01]))[0],
        "vmap of forward over forward": func.vmap(func.jacfwd(func.jacfwd(loss)))(torch.stack([s, s + 0.01]))[0],
    }
    size, first = differences.abs().max(), found["reverse over reverse"]
    assert (first - differences).abs().max() <= max(1e-6, 1e3 * LOOSE.get(name, 0)) * size
    for nesting, hessian in found.items():
        assert (hessian - first).abs().max() <= 10 * LOOSE.get(name, 1e-11) * size, nesting
    # grad of grad, and the forward mode of torch.autograd around and inside its reverse mode
    of_square = func.grad(lambda s: (gradient(s) ** 2).sum())(s)
    assert (of_square - 2 * first @ gradient(s)).abs().max() <= 100 * LOOSE.get(name, 1e-11) * size**2
    forward_ad, x, t = torch.autograd.forward_ad, s.clone().requires_grad_(), torch.ones_like(s)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, t)
        moved = forward_ad.unpack_dual(loss(dual)).tangent
        (slope,) = torch.autograd.grad(loss(dual), dual, create_graph=True)
        forward_over_reverse = forward_ad.unpack_dual(slope).tangent
    (reverse_over_forward,) = torch.autograd.grad(moved, x)
    for product in (forward_over_reverse, reverse_over_forward):
        assert (product - first @ t).abs().max() <= 10 * LOOSE.get(name, 1e-11) * size


@pytest.mark.parametrize("name", ["eigh", "solve"])
def test_third_derivatives_in_every_nesting(name, torch, along):
    func, loss = torch.func, along(name)
    s = torch.tensor([0.1, -0.2], dtype=torch.float64)
    modes = {"f": func.jacfwd, "r": func.jacrev}
    third = {way: modes[way[0]](modes[way[1]](modes[way[2]](loss)))(s) for way in ("rrr", "frf", "rfr", "ffr", "fff")}
    for way, found in third.items():
        torch.testing.assert_close(found, third["rrr"], rtol=1e-10, atol=1e-9, msg=lambda m, way=way: f"{way}: {m}")


@pytest.mark.parametrize("solver", ["cg", "lsmr"])
def test_operators_and_what_options_hold_move(solver, torch, differentiable, rng):
    """A preconditioner that depends on the matrix, under vmap; and least squares, whose operator moves twice."""
    func = torch.func
    a, b = torch.asarray(symmetric(rng, 3) / 4 + 3 * np.eye(3)), torch.asarray(rng.standard_normal(3))
    d = torch.asarray(symmetric(rng, 3, (2,)))

    def moved(s):
        return a + torch.sin(s[0]) * d[0] + s[0] * s[1] * d[1], b * (1 + s[1] ** 2)

    def own(s):
        m, right = moved(s)
        if solver == "cg":
            jacobi = ddnref.operators.diagonal(1 / torch.diagonal(m))
            solve = differentiable(ddnref.linear_solve, solver="cg", rtol=1e-13, preconditioner=jacobi)
            operator = ddnref.operators.dense(m, self_adjoint=True, positive_definite=True)
            return (solve(operator, right)[0] ** 2).sum()
        solve = differentiable(ddnref.linear_solve, solver="lsmr", rtol=1e-14)
        return (solve(torch.cat([m, torch.eye(3).double()]), torch.cat([right, right]))[0] ** 2).sum()

    def plain(s):
        m, right = moved(s)
        if solver == "cg":
            return ((torch.linalg.inv(m) @ right) ** 2).sum()
        return ((torch.linalg.inv(m.mT @ m + torch.eye(3)) @ (m.mT @ right + right)) ** 2).sum()

    s = torch.tensor([[0.1, 0.2], [-0.3, 0.1]], dtype=torch.float64)
    for nesting in (func.hessian, lambda f: func.jacfwd(func.jacfwd(f)), lambda f: func.jacrev(func.jacfwd(f))):
        torch.testing.assert_close(func.vmap(nesting(own))(s), func.vmap(func.hessian(plain))(s), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("spectrum", [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0], [1.0, 1.0, 3.0], [1.0, 1.0 + 1e-9, 3.0]])
def test_second_derivatives_of_functions_are_exact_at_repeated_eigenvalues(spectrum, torch, differentiable, rng):
    """log exp X = X and (√X)² = X, whatever the eigenvalues, and tr X³ is known."""
    func = torch.func
    x = torch.asarray(with_spectrum(rotation(rng, 3), np.asarray(spectrum)))
    c, *directions = torch.asarray(symmetric(rng, 3, (3,)))
    sqrtm, logm, expm = (differentiable(f) for f in (ddnref.sqrtm, ddnref.logm, ddnref.expm))
    cube = differentiable(ddnref.spectral_function, f=lambda w: w**3, df=lambda w: 3 * w**2, d2f=lambda w: 6 * w)
    pairs = (
        (lambda x: (c * logm(expm(x)) ** 2).sum(), lambda x: (c * x**2).sum()),
        (lambda x: (c * (sqrtm(x) @ sqrtm(x)) ** 2).sum(), lambda x: (c * x**2).sum()),
        (lambda x: (c * differentiable(ddnref.invsqrtm)(x)).sum(), lambda x: (c * torch.linalg.inv(sqrtm(x))).sum()),
        (lambda x: torch.trace(cube(x)), lambda x: torch.trace(x @ x @ x)),
    )
    s = torch.zeros(2, dtype=torch.float64)
    for own, plain in pairs:
        ours, theirs = (lambda s, f=f: f(x + s[0] * directions[0] + s[1] * directions[1]) for f in (own, plain))
        expected = func.hessian(theirs)(s)
        for nesting in (
            func.hessian,
            lambda f: func.jacrev(func.jacrev(f)),
            lambda f: func.jacfwd(func.jacfwd(f)),
            lambda f: func.jacrev(func.jacfwd(f)),
            lambda f: lambda s: func.vmap(func.hessian(f))(s[None])[0],
        ):
            assert (nesting(ours)(s) - expected).abs().max() <= 1e-10 * expected.abs().max()
        twice = torch.autograd.functional.hessian(ours, s)
        assert (twice - expected).abs().max() <= 1e-10 * expected.abs().max()
    with pytest.raises(NotImplementedError, match="third derivative of sqrtm"):
        func.grad(lambda t: func.hessian(lambda s: torch.trace(sqrtm(x + s[0] * c)))(t).sum())(s[:1])


@pytest.mark.filterwarnings("ignore:A tangent is NaN")
def test_a_direction_that_splits_equal_eigenvalues(torch, differentiable, rng):
    func = torch.func
    x = torch.diag(torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))
    t = torch.asarray(symmetric(rng, 3))

    def tangent(x, t, **options):
        return func.jvp(lambda x: (differentiable(ddnref.eigh, **options)(x)[0] ** 3).sum(), (x,), (t,))[1]

    with pytest.raises(ddnref.GaugeError, match="splits equal eigenvalues"):
        tangent(x, t)
    torch.testing.assert_close(tangent(x, t, gauge_rtol=float("inf")), (3 * x @ x * t).sum())
    torch.testing.assert_close(tangent(x, x @ x), (3 * x @ x * (x @ x)).sum())
    found = func.vmap(tangent)(torch.stack([x, torch.diag(torch.arange(3.0)).double()]), torch.stack([t, t]))
    assert found.isnan().tolist() == [True, False]
    # Second derivatives move the eigenvectors, along whichever direction.
    with pytest.raises(ddnref.GaugeError, match="second derivative through repeated"):
        func.jvp(func.grad(lambda x: (differentiable(ddnref.eigh)(x)[0] ** 3).sum()), (x,), (x @ x,))
    with pytest.raises(ddnref.GaugeError, match="second derivative through repeated"):
        func.grad(lambda x: tangent(x, x @ x))(x)


@pytest.mark.parametrize("name", ["eigh", "sqrtm", "solve", "svd", "logdet", "linear_solve"])
def test_another_library_pushes_tangents_too(name, torch, differentiable, rng):
    """Forward mode, alone and mapped, and a Jacobian, with the numbers of PyTorch itself."""
    x = torch.tensor(rng.standard_normal((2, 3, 3)))
    x = x @ x.mT + torch.eye(3)
    extra = (torch.tensor(rng.standard_normal(3)),) if name.endswith("solve") else ()

    def first(**options):
        op = differentiable(getattr(ddnref, name), **options)

        def value(x):
            y = op(x, *extra)
            return y[name == "svd"] if isinstance(y, tuple) else y  # values, not vectors, whose signs are free

        return value

    there, here, func = first(compute="numpy"), first(), torch.func
    for transform in (
        lambda f: func.jvp(f, (x[0],), (x[1],))[1],
        lambda f: func.jacfwd(f)(x[0]),
        lambda f: func.vmap(lambda x: func.jvp(f, (x,), (x @ x,))[1])(x),
    ):
        torch.testing.assert_close(transform(there), transform(here))


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_what_has_no_forward_mode_says_so(torch, differentiable, monkeypatch):
    func, x = torch.func, torch.diag(torch.arange(1.0, 4)).double()
    b = torch.ones(3, dtype=torch.float64)
    solve = differentiable(ddnref.linear_solve, solver="gmres")
    with pytest.raises(NotImplementedError, match=r"linearize records linear_solve as a graph.*torch\.func\.jvp"):
        func.linearize(lambda x: solve(x, b)[0], x)
    there = differentiable(ddnref.sqrtm, compute="numpy")
    with pytest.raises(NotImplementedError, match=r"linearize records sqrtm.*another library computes sqrtm"):
        func.linearize(there, x)
    eigh = differentiable(ddnref.eigh)
    torch.testing.assert_close(func.linearize(lambda x: eigh(x)[0], x)[1](x), torch.arange(1.0, 4).double())
    monkeypatch.setattr("ddnref.interop._torch_forward.nests", lambda: False)
    with pytest.raises(NotImplementedError, match="loses the outer derivative of a tangent of eigh"):
        func.jacfwd(func.jacfwd(lambda x: eigh(x)[0]))(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning", "ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("name", ["eigh", "sqrtm", "solve", "svd", "least_squares_on_sphere"])
def test_linearize_records_at_tangents_that_mean_nothing(name, torch, differentiable, rng, monkeypatch):
    """PyTorch leaves them uninitialised; where they are NaN nobody needs to hear of it."""
    op, x = bridged(torch, differentiable, name), torch.tensor(rng.standard_normal((3, 3)))
    _, expected = torch.func.jvp(op, (x,), (x,))
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda y, *args, **kwargs: empty(y, *args, **kwargs).fill_(torch.nan)
    )
    _, push = torch.func.linearize(op, x)
    monkeypatch.undo()
    torch.testing.assert_close(push(x), expected)
    with pytest.warns(RuntimeWarning, match="A tangent is NaN"):
        push(torch.full_like(x, torch.nan))


@pytest.mark.parametrize("name", ["eigh", "sqrtm", "solve"])
def test_gradcheck_with_forward_mode(name, torch, differentiable, rng):
    a = torch.asarray(symmetric(rng, 3) / 4 + np.diag([1.0, 2.0, 3.0])).requires_grad_()
    b = torch.asarray(rng.standard_normal(3)).requires_grad_()
    op = differentiable(PUBLIC[name])
    inputs = (a, b) if name == "solve" else (a,)

    def f(*x):
        return op(*x)[0] if name == "eigh" else op(*x)

    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("batch", [(), (1,), (2,), (2, 1)])
def test_second_derivatives_of_solve_in_every_form(batch, torch, differentiable, rng):
    """One matrix, a batch and several batch axes are solved in different ways; all outputs must stay connected."""
    a = torch.asarray(rng.standard_normal((*batch, 3, 3)) + 4 * np.eye(3)).requires_grad_()
    b = torch.asarray(rng.standard_normal((*batch, 3))).requires_grad_()
    assert torch.autograd.gradgradcheck(differentiable(PUBLIC["solve"]), (a, b))


@pytest.mark.graphs
@pytest.mark.filterwarnings(*TRACED)
@pytest.mark.parametrize("name", ["eigh", "sqrtm", "solve"])
def test_reverse_mode_compiles_without_a_graph_break(name, torch, differentiable, rng):
    """The classes of forward mode, and explicit second derivatives, are out of a compiler's sight."""
    torch._dynamo.reset()
    f, x = bridged(torch, differentiable, name), torch.asarray(rng.standard_normal((3, 3))).requires_grad_()
    compiled = torch.compile(lambda x: total(f(x)), backend="aot_eager", fullgraph=True)
    gradients = [torch.autograd.grad(loss(x), x)[0] for loss in (compiled, lambda x: total(f(x)))]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings(*TRACED)
def test_a_compiler_does_not_drop_the_tangent(torch, differentiable):
    torch._dynamo.reset()
    func, eigh = torch.func, differentiable(ddnref.eigh)
    x, c = torch.eye(3, dtype=torch.float64), torch.arange(9.0, dtype=torch.float64).reshape(3, 3)

    def tangent(x, t):
        return func.jvp(lambda x: (eigh(x)[0] * 2).sum(), (x,), (t,))[1]

    direction = x * 2 + 0 * c
    torch.testing.assert_close(torch.compile(tangent, backend="aot_eager")(x, direction), tangent(x, direction))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(tangent, backend="aot_eager", fullgraph=True)(x, direction)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_solves_inside_rules_are_right_in_every_nesting(adjoint, dtype, torch, rng):
    """PyTorch's own solve is wrong where forward mode is nested; its inverse is right."""
    from ddnref._kernels import torch as kernels

    func = torch.func
    shapes = ((4, 4), (4, 2), (2, 4, 4), (2, 4, 2))
    a, b, a_dot, b_dot = (torch.asarray(rng.standard_normal(n)).to(getattr(torch, dtype)) for n in shapes)
    a = a + 4 * torch.eye(4)

    def loss(solve):
        def value(s):
            c = s.to(a.dtype)[:, None, None]
            x = solve(a + (torch.sin(c) * a_dot).sum(0), b + (c**2 * b_dot).sum(0))
            return (x.abs() ** 2).sum()

        return value

    def own(a, b):
        lu, pivots, _ = kernels.lu_factor(a)
        return kernels.lu_solve(lu, pivots, b, True) if adjoint else kernels.solve(a, b)[0]

    ours, theirs = loss(own), loss(lambda a, b: (torch.linalg.inv(a).mH if adjoint else torch.linalg.inv(a)) @ b)
    s = torch.tensor([[0.3, -0.2], [0.1, 0.5]], dtype=torch.float64)
    for outer in (func.jacrev, func.jacfwd):
        for inner in (func.jacrev, func.jacfwd):
            expected = torch.stack([func.hessian(theirs)(item) for item in s])
            torch.testing.assert_close(outer(inner(ours))(s[0]), expected[0])
            torch.testing.assert_close(func.vmap(outer(inner(ours)))(s), expected)
