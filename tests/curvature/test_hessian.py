"""Solve, determinant and inertia of a network's Hessian: every path against the dense matrix, where it is hardest."""

from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hessian_problems import backward_error, dense, flatten, hard_shifts, lists, network, problem

import ddnref
from ddnref import networks
from ddnref._kernels import blocks
from ddnref.curvature.hessian import _expansion, _joint, _methods, _riccati, _tridiagonal
from ddnref.networks import _layers

ACTIVATIONS = ("tanh", "softplus", "gelu", "relu", "identity")
DAMPINGS = (1e-1, 1e-3, 1e-6, 1e-8, -0.05)
GRID = [(n_layers, a, n) for n_layers in (1, 2, 5) for a in (4, 8) for n in (1, 2, a - 1, a, 4 * a)]
GRID += [(20, 4, n) for n in (1, 2, 3, 4, 16)]


def check(q, damping, method):
    """Backward and forward error against the dense matrix, or a flag where the path does not reach them."""
    factor = ddnref.curvature.hessian_factor(q.chain, q.x, q.t, damping=damping, method=method)
    solution, info = factor.solve([z[0] for z in lists(q.b, q.chain)], throw=False)
    if method in ("riccati", "tridiagonal") and not info.converged:
        return factor, False
    condition = np.max(np.abs(q.w + damping)) / np.min(np.abs(q.w + damping))
    exact = np.linalg.solve(q.h + damping * np.eye(len(q.h)), q.b[0])
    x = flatten([z[None] for z in solution])[0]
    assert info.converged, (damping, method, info)
    assert info.backward_error <= 1e-15, (damping, method, info)
    assert backward_error(q, damping, solution) <= 2e-15, (damping, method, info)  # with the oracle's own rounding
    assert np.linalg.norm(x - exact) <= 1e-14 * condition * np.linalg.norm(exact), (damping, method, condition)
    return factor, True


def check_counts(q, damping, factor):
    distance = np.min(np.abs(q.w + damping))
    if distance > 1e-9 * np.max(np.abs(q.w)):
        assert factor.inertia() == (np.sum(q.w + damping < 0), 0, np.sum(q.w + damping > 0)), (damping, factor)
        sign, log = factor.slogdet()
        size = np.sum(np.log(np.abs(q.w + damping)))
        assert sign == np.prod(np.sign(q.w + damping)), (damping, factor)
        rounding = 2.0**-49 * np.sum(np.max(np.abs(q.w)) / np.abs(q.w + damping))  # of the oracle's eigenvalues
        assert abs(log - size) <= 1e-10 * abs(size) + rounding, (damping, factor)


# --- the grid -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_layers", "a", "n"), GRID)
def test_grid(n_layers, a, n, rng, monkeypatch):
    """Each size with all activations in turn, with biases and residual blocks; without the dense form to lean on."""
    large = a * n > 60  # block QR is for few samples: there the dense matrix is what "auto" falls back to
    if not large:
        monkeypatch.setattr(_methods, "DENSE_LIMIT", 0)
    reached = []
    for i, activation in enumerate(ACTIVATIONS[:: 2 if n_layers == 20 or a * n > 50 else 1]):
        kind = {"bias": (i + n) % 2 == 1, "residual": (i + n_layers) % 3 == 0}
        q = problem(rng, n_layers, a, n, activation, **kind)
        for damping in DAMPINGS:
            check_counts(q, damping, check(q, damping, "auto")[0])
            if i % 2 and not large:
                check(q, damping, "qr")
            reached.append(check(q, damping, "riccati")[1])
            if not kind["residual"] and n < a:
                reached.append(check(q, damping, "tridiagonal")[1])
    assert np.mean(reached) > 0.6, "the fast forms alone should do mostly"


@pytest.mark.parametrize(("n_layers", "a", "n"), [(2, 4, 1), (2, 4, 16), (5, 8, 2), (5, 4, 3), (20, 4, 1), (5, 4, 4)])
def test_shifts_that_make_a_layer_singular(n_layers, a, n, rng, monkeypatch):
    monkeypatch.setattr(_methods, "DENSE_LIMIT", 0)
    fell = 0
    for activation, residual in (("tanh", False), ("gelu", n_layers < 20), ("relu", False)):
        q = problem(rng, n_layers, a, n, activation, residual=residual)
        for damping in hard_shifts(q.chain, q.h):
            check_counts(q, damping, check(q, damping, "auto")[0])
            fell += not check(q, damping, "riccati")[1]
    assert fell, "these shifts are hard for the eliminations, or the test is not"


@pytest.mark.parametrize(("a", "damping"), [(4, 1e-6), (4, 1e-8), (16, 1e-6)])
def test_deep_and_exploding(a, damping, rng):
    """80 layers, gain 1.4, where an elimination alone loses all digits: against exact products, not a dense matrix."""
    chain, x, t = network(rng, 80, a, 4, gain=1.4)
    b = [rng.standard_normal(p.shape) for p in chain.params]
    solution, info = ddnref.curvature.hessian_solve(chain, x, t, b, damping=damping)
    assert info.backward_error <= 1e-15
    hx = chain.hvp(x, t, solution)
    r = flatten([(z - y - damping * v)[None] for z, y, v in zip(b, hx, solution, strict=True)])
    size = np.linalg.norm(flatten([v[None] for v in solution])) * float(info.amplification)
    assert np.linalg.norm(r) <= 1e-14 * size


def test_method_dense_and_auto_agree_and_small_ones_are_dense(rng):
    q = problem(rng, 2, 4, 2)
    for damping in (*DAMPINGS, *hard_shifts(q.chain, q.h)):
        check_counts(q, damping, check(q, damping, "dense")[0])
    small, large = (ddnref.curvature.hessian_factor(*network(rng, n, 8, 1), damping=0.1) for n in (1, 30))
    assert (small.path, large.path) == ("dense", "tridiagonal")


# --- what the forms rest on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("bias", "residual"), [(False, False), (True, False), (False, True), (True, True)])
def test_the_expansion_has_the_networks_products(activation, bias, residual, rng):
    chain, x, t = network(rng, 6, 5, 3, activation, bias, residual)
    v = [rng.standard_normal((2, *p.shape)) for p in chain.params]
    for curvature, times in (("hessian", chain.hvp), ("ggn", chain.ggnvp)):
        s = _expansion.hessian_of(chain, x, t, curvature)
        for ours, theirs in zip(s.params(s.product(s.blocks(v))), times(x, t, v), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-13)


def test_the_matrix_is_the_derivative_of_the_gradient(rng):
    chain, x, t = network(rng, 4, 4, 3, bias=True, residual=True)
    h, p = dense(chain, x, t), sum(z.size for z in chain.params)
    step, v = 1e-4, rng.standard_normal((1, p))

    def gradient(size):
        moved = [z + size * d[0] for z, d in zip(chain.params, lists(v, chain), strict=True)]
        return flatten([g[None] for g in chain.with_params(moved).gradient(x, t)])[0]

    coarse, fine = ((gradient(s) - gradient(-s)) / (2 * s) for s in (step, step / 2))
    np.testing.assert_allclose(h @ v[0], (4 * fine - coarse) / 3, rtol=0, atol=1e-9 * np.linalg.norm(h @ v[0]))


@pytest.mark.parametrize("n", [1, 3])
def test_inertia_and_determinant_of_the_tridiagonal_matrix(n, rng):
    """The identities of the fast form, its matrix assembled."""
    chain, x, t = network(rng, 4, 5, n)
    h, system = dense(chain, x, t), _expansion.hessian_of(chain, x, t, "hessian")
    terms, bases = system.expansion, system.bases()
    inputs = [_tridiagonal.inputs(b) for b in bases]
    for damping in (0.1, -0.05, -0.3, 1e-3):
        offsets = np.cumsum([0] + [layer.c.size for layer in terms.layers])
        matrix = np.zeros((offsets[-1], offsets[-1]))
        for i, here in enumerate(inputs):
            diagonal, below = _tridiagonal.row(
                np, here, inputs[i + 1] if i + 1 < len(inputs) else None, terms.curvature, damping
            )
            own = slice(offsets[i], offsets[i + 1])
            matrix[own, own] = diagonal
            if below is not None:
                after = slice(offsets[i + 1], offsets[i + 2])
                matrix[after, own], matrix[own, after] = below, below.T
        np.testing.assert_allclose(matrix, matrix.T, atol=1e-13 * np.max(np.abs(matrix)))
        rest = sum(b.rest for b in bases)
        w, w_t = np.linalg.eigvalsh(h) + damping, np.linalg.eigvalsh(matrix)
        assert np.sum(w < 0) == np.sum(w_t < 0) + (damping < 0) * rest
        gram = sum(z.weight.shape[0] * np.linalg.slogdet(z.z @ z.z.T)[1] for z in terms.layers)
        log = np.sum(np.log(np.abs(w_t))) + rest * np.log(abs(damping)) + gram
        np.testing.assert_allclose(np.sum(np.log(np.abs(w))), log, rtol=1e-11)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("m", "k", "n"), [(5, 6, 7), (70, 80, 90), (1, 600, 600)])
def test_products_by_either_pool(m, k, n, dtype, rng):
    """The large ones are SciPy's, whatever the order of the factors in memory."""
    a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
    for left in (a, np.asfortranarray(a), a[::-1], np.repeat(a, 2, axis=1)[:, ::2]):
        for right in (b, np.asfortranarray(b), b[:, ::-1]):
            c = blocks.matmul(left, right)
            assert c.dtype == dtype
            np.testing.assert_allclose(c, left @ right, rtol=0, atol=20 * k * np.finfo(dtype).eps)


@pytest.mark.parametrize("method", ["tridiagonal", "riccati"])
def test_blocks_wide_enough_for_threads(method, rng):
    chain, x, t = network(rng, 3, 96, 1)
    b = [rng.standard_normal(p.shape) for p in chain.params]
    _, info = ddnref.curvature.hessian_solve(chain, x, t, b, damping=0.1, method=method)
    assert info.backward_error <= 1e-15


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_factors_and_solution_in_one_call(dtype, rng):
    d, b = rng.standard_normal((6, 6)), rng.standard_normal((6, 3)).astype(dtype)
    d = (d + d.T).astype(dtype)
    for order in ("C", "F"):
        factors, x = blocks.lu_and_solution(np.array(d, order=order), b)
        assert x.dtype == dtype
        np.testing.assert_allclose(d @ x, b, rtol=0, atol=1e3 * np.finfo(dtype).eps)
        np.testing.assert_array_equal(blocks.lu_solve(factors, b), x)
    d[:, 2] = d[2, :] = 0
    factors, x = blocks.lu_and_solution(d, b)
    assert np.isnan(x).all()
    assert blocks.lu_slogdet(factors)[1] == -np.inf


@pytest.mark.parametrize("order", ["C", "F"])
def test_add_diagonal_whatever_the_order_in_memory(order, rng):
    m, d = np.array(rng.standard_normal((4, 4)), order=order), rng.standard_normal(4)
    expected = m + np.diag(d)
    np.testing.assert_array_equal(blocks.add_diagonal(m, d), expected)


MUTANTS = {
    "coupling": (_riccati, "coupling", lambda f, xp, b: -f(xp, b)),
    "free": (_riccati, "_free", lambda f, xp, b, e: 0.9 * f(xp, b, e)),
    "behind": (_riccati, "_behind", lambda f, xp, layer, v: f(xp, layer._replace(c=0 * layer.c), v)),
    "weights": (_riccati, "_weights", lambda f, xp, b, u, x, g, e: f(xp, b, u, None, g, e)),
    "pull": (_riccati, "_pull_rows", lambda f, xp, s, p, n: f(xp, s, p, n) * (1 + 1e-6)),
    "next": (_tridiagonal, "_next", lambda f, xp, a, e: (f(xp, a, e)[0], -f(xp, a, e)[1])),
    "pseudo": (_tridiagonal, "inputs", lambda f, b: f(b)._replace(k=2 * f(b).k)),
    "joint": (_joint, "_quadratic", lambda f, xp, a, n: (*f(xp, a, n)[:2], 0 * f(xp, a, n)[2])),
    "back": (
        _expansion,
        "_back",
        lambda f, xp, layer, v, ds, dz, q: f(xp, layer._replace(beta=0 * layer.beta), v, ds, dz, q),
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_term_is_noticed(name, rng, monkeypatch):
    module, attribute, wrong = MUTANTS[name]
    monkeypatch.setattr(module, attribute, partial(wrong, getattr(module, attribute)))
    seen = False
    for residual in (False, True):
        q = problem(rng, 5, 5, 2, residual=residual)
        for method in ("riccati", "qr", *(() if residual else ("tridiagonal",))):
            solution, _ = ddnref.curvature.hessian_solve(
                q.chain, q.x, q.t, [z[0] for z in lists(q.b, q.chain)], damping=0.1, method=method, refine=0,
                throw=False,
            )  # fmt: skip
            seen |= not backward_error(q, 0.1, solution) <= 1e-9
            if name == "back":  # a wrong product: the residual no longer is what the network says
                s = _expansion.hessian_of(q.chain, q.x, q.t, "hessian")
                seen |= not np.allclose(s.matrix(), q.h, rtol=1e-9)
    assert seen


def test_cost_estimates_follow_the_sizes(rng):
    def flops(n_layers, a, n):
        return ddnref.curvature.hessian_factor(*network(rng, n_layers, a, n), damping=0.1, method="tridiagonal").flops

    depth, width = np.asarray([10, 20, 40]), np.asarray([16, 32, 64])
    by_depth, by_width = [flops(d, 8, 1) for d in depth], [flops(6, a, 1) for a in width]
    assert abs(np.polyfit(np.log(depth), np.log(by_depth), 1)[0] - 1) <= 0.1
    assert abs(np.polyfit(np.log(width), np.log(by_width), 1)[0] - 3) <= 0.1
    small, large = (
        ddnref.curvature.hessian_factor(*network(rng, n, 8, 1), damping=0.1, method="tridiagonal") for n in (10, 40)
    )
    assert 3.5 < large.nbytes / small.nbytes < 4.5


COUNTED = {
    "samples": lambda xp, r, m: 2 * r.shape[0] * m.size,
    "units": lambda xp, w, m: 2 * w.shape[0] * m.size,
    "units_right": lambda xp, m, w: 2 * m.size * w.shape[1],
    "matmul": lambda a, b: 2 * a.size * b.shape[1],
    "lu": lambda d: 2 / 3 * len(d) ** 3,
    "lu_and_solution": lambda d, b: 2 / 3 * len(d) ** 3 + 2 * len(d) * b.size,
}
"""Operations of the sweeps, and the flops that they take."""


def _counting(counted, flops, run, *args):
    counted.append(flops(*args))
    return run(*args)


@pytest.mark.parametrize(
    ("method", "n", "shape", "residual"),
    [
        ("riccati", 16, (60, 8, 4, 3), False),  # a wide input: almost all of the work would be in what no one forms
        ("riccati", 16, (8, 8, 4, 5), False),
        ("riccati", 3, (40, 12, 4, 4), False),
        ("riccati", 8, (12, 12, 12, 5), True),
        ("tridiagonal", 4, (60, 8, 8, 3), False),
        ("tridiagonal", 2, (9, 16, 4, 6), False),
    ],
)
def test_cost_estimates_are_the_counted_flops(method, n, shape, residual, rng, monkeypatch):
    chain = networks.Chain.mlp(*shape)
    if residual:
        chain = networks.Chain(
            [*chain.layers[:1], networks.Residual(chain.layers[1:-1]), chain.layers[-1]], "cross_entropy"
        )
    x, t = rng.standard_normal((n, shape[0])), rng.integers(0, shape[2], n)
    counted = []
    for name, flops in COUNTED.items():
        for module in (_riccati, _tridiagonal):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, partial(_counting, counted, flops, getattr(module, name)))
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1, method=method)
    assert 0.8 * sum(counted) <= factor.flops <= 1.25 * sum(counted)
    # What is kept are the pivots and their gains.
    saved = factor._path(method).saved
    kept = [step for step in getattr(saved, "steps", saved) if not isinstance(step, str)]
    numbers = sum(step.lu.factors.size + (0 if step.gain is None else step.gain.size) for step in kept)
    assert 0.99 * numbers <= factor.nbytes / 8 <= 1.01 * numbers


def test_a_wide_input_is_eliminated_and_not_formed(rng):
    """4,000 parameters and 64 samples: the sweep takes a tenth of the time of the dense matrix, and a fifteenth of
    its memory."""
    chain = networks.Chain.mlp(200, 16, 10, 5)
    x, t = rng.standard_normal((64, 200)), rng.integers(0, 10, 64)
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1)
    assert factor.path == "riccati"


# --- options ------------------------------------------------------------------------------------------------------


def test_gauss_newton(rng):
    chain, x, t = network(rng, 5, 6, 2, bias=True)
    g = dense(chain, x, t, "ggnvp")
    b = rng.standard_normal((1, len(g)))
    for method in ("auto", "tridiagonal", "riccati", "qr", "dense"):
        factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1, curvature="ggn", method=method)
        solution, info = factor.solve([z[0] for z in lists(b, chain)])
        assert info.path == method or method == "auto"
        exact = np.linalg.solve(g + 0.1 * np.eye(len(g)), b[0])
        np.testing.assert_allclose(flatten([z[None] for z in solution])[0], exact, rtol=0, atol=1e-12)
        assert factor.inertia() == (0, 0, len(g))


@pytest.mark.parametrize("method", ["tridiagonal", "riccati", "qr", "dense"])
def test_several_right_hand_sides_and_zero(method, rng):
    chain, x, t = network(rng, 5, 6, 2)
    rows = rng.standard_normal((3, sum(p.size for p in chain.params)))
    rows[1] = 0
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=1e-2, method=method)
    together, info = factor.solve(lists(rows, chain))
    assert info.backward_error.shape == (3,)
    assert all(np.array_equal(z[1], np.zeros(z.shape[1:])) for z in together)
    for i in (0, 2):
        alone, info_i = factor.solve([z[i] for z in lists(rows, chain)])
        assert info_i.converged.shape == ()
        for u, v in zip(together, alone, strict=True):
            np.testing.assert_allclose(u[i], v, rtol=0, atol=1e-11 * np.max(np.abs(v)))


def test_refine(rng):
    chain, x, t = network(rng, 20, 8, 4)
    b = [rng.standard_normal(p.shape) for p in chain.params]
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=1e-5, method="riccati")
    infos = [factor.solve(b, refine=steps, throw=False)[1] for steps in (0, 1, 2)]
    assert infos[0].n_iter == 0
    assert infos[0].backward_error > 1e-14
    assert not infos[0].converged
    assert infos[1].n_iter == 1
    assert infos[1].backward_error < infos[0].backward_error / 10
    assert factor.solve(b)[1].converged


def test_damping_as_an_array_of_its_own(rng):
    chain, x, t = network(rng, 5, 6, 2)
    b = [rng.standard_normal(p.shape) for p in chain.params]
    for method in ("tridiagonal", "riccati", "qr", "dense", "auto"):
        one, _ = ddnref.curvature.hessian_solve(chain, x, t, b, damping=-0.05, method=method)
        other, _ = ddnref.curvature.hessian_solve(chain, x, t, b, damping=np.asarray(-0.05), method=method)
        for u, v in zip(one, other, strict=True):
            np.testing.assert_allclose(u, v, rtol=1e-12, atol=1e-12 * np.max(np.abs(v)))
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=np.asarray(-0.05))
    assert factor.inertia() == ddnref.curvature.hessian_factor(chain, x, t, damping=-0.05).inertia()


@pytest.mark.parametrize("kind", ["tridiagonal", "riccati", "qr", "dense", "auto", "residual", "frozen"])
def test_a_factor_stays_that_of_the_weights_it_was_made_at(kind, rng):
    """Later changes to weights or data affect neither the factor nor the paths that it builds later."""
    chain, x, t = network(rng, 5, 4, 3, residual=kind == "residual")
    damping = np.asarray(hard_shifts(chain, dense(chain, x, t))[0])
    if kind == "frozen":
        first = networks.Dense(rng.standard_normal((4, 4)), None, "tanh")
        chain = networks.Chain([networks.Frozen(first), *chain.layers], "cross_entropy")
    method = kind if kind in _methods.METHODS else "auto"
    b = [rng.standard_normal(p.shape) for p in chain.params]
    before = ddnref.curvature.hessian_factor(chain, x, t, damping=damping, method=method)
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=damping, method=method)
    (expected, info), counts = before.solve(b, throw=False), before.inertia()
    arrays = [x, damping, *chain.params, *([first.weight] if kind == "frozen" else [])]
    for array in arrays:
        array *= 1.3
    t[...] = (t + 1) % 3
    solution, found = factor.solve(b, throw=False)
    assert found.path == info.path
    for u, v in zip(solution, expected, strict=True):
        np.testing.assert_array_equal(u, v)
    assert factor.inertia() == counts
    assert factor.damping == pytest.approx(float(damping) / 1.3)
    moved, _ = ddnref.curvature.hessian_solve(chain, x, t, b, damping=damping, method=method, throw=False)
    assert not np.allclose(moved[0], expected[0])


@pytest.mark.parametrize("damping", [1e-1, 1e-8, -0.05])
def test_single_precision(damping, rng):
    """In and out; the work is done in double precision, so that rounding the solution is all that is lost."""

    def rounded(z):
        return z if z.dtype.kind == "i" else z.astype(np.float32)

    chain, x, t = network(rng, 10, 8, 2, asarray=rounded)
    b = [rng.standard_normal(p.shape).astype(np.float32) for p in chain.params]
    solution, _ = ddnref.curvature.hessian_solve(chain, x, t, b, damping=damping)
    assert all(z.dtype == np.float32 for z in solution)
    exact = networks.Chain.from_arrays([p.astype(np.float64) for p in chain.params])
    exact = networks.Chain([*exact.layers[:-1], networks.Dense(exact.params[-1])], "cross_entropy")
    h = dense(exact, x.astype(np.float64), t)
    q = SimpleNamespace(h=h, w=np.linalg.eigvalsh(h), b=flatten([z[None].astype(np.float64) for z in b]))
    assert backward_error(q, damping, [z.astype(np.float64) for z in solution]) <= 1e-6


@pytest.mark.parametrize("widths", [(7, 3, 5, 4), (2, 9, 2, 9, 3), (3, 12, 2)])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
def test_different_widths_and_losses(widths, loss, rng):
    """Bottlenecks: more samples than units in some layers, fewer in others; an activation on the outputs."""
    dense_layers = [
        networks.Dense(rng.standard_normal((o, i)) / i**0.5, 0.1 * rng.standard_normal(o), "tanh")
        for i, o in pairwise(widths)
    ]
    chain = networks.Chain([networks.Flatten(), *dense_layers], loss, reduction="sum")
    x = rng.standard_normal((4, 1, widths[0]))
    t = rng.integers(0, widths[-1], 4) if loss == "cross_entropy" else rng.standard_normal((4, widths[-1]))
    h = dense(chain, x, t)
    q = SimpleNamespace(chain=chain, x=x, t=t, h=h, w=np.linalg.eigvalsh(h), b=rng.standard_normal((1, len(h))))
    for method in ("auto", "riccati", "qr", "dense"):
        factor, reached = check(q, 0.05, method)
        assert reached
        check_counts(q, 0.05, factor)


def test_another_layer_is_solved_densely_or_refused(rng, monkeypatch):
    inside = networks.Residual([networks.Dense(rng.standard_normal((4, 4)), None, "tanh")])
    layers = [_layer_of_its_own(rng), inside, networks.Dense(rng.standard_normal((3, 4)))]
    chain = networks.Chain(layers, "cross_entropy")
    x, t = rng.standard_normal((2, 4)), np.asarray([0, 2])
    h = dense(chain, x, t)
    q = SimpleNamespace(chain=chain, x=x, t=t, h=h, w=np.linalg.eigvalsh(h), b=rng.standard_normal((1, len(h))))
    factor, _ = check(q, 0.1, "auto")
    assert factor.path == "dense"
    check_counts(q, 0.1, factor)
    with pytest.raises(TypeError, match="layer of type Own"):
        ddnref.curvature.hessian_factor(chain, x, t, damping=0.1, method="riccati")
    monkeypatch.setattr(_methods, "DENSE_LIMIT", 5)
    with pytest.raises(TypeError, match="layer of type Own"):
        ddnref.curvature.hessian_factor(chain, x, t, damping=0.1)


def _layer_of_its_own(rng):
    class Own(_layers.Dense):
        pass

    return Own(rng.standard_normal((4, 4)), None, "tanh")


# --- bad input ----------------------------------------------------------------------------------------------------


def test_identical_samples_and_dead_units(rng):
    """Inputs of rank one, or zero, in every layer: the fast form is not tried, and asked for says what is wrong."""
    for activation in ("tanh", "relu"):
        chain, x, t = network(rng, 5, 6, 3, activation)
        x = np.repeat(x[:1], 3, axis=0) if activation == "tanh" else -np.abs(x) * 0
        h = dense(chain, x, t)
        q = SimpleNamespace(chain=chain, x=x, t=t, h=h, w=np.linalg.eigvalsh(h), b=rng.standard_normal((1, len(h))))
        for damping in (0.1, 1e-6):
            factor, reached = check(q, damping, "riccati")
            assert reached
            check(q, damping, "auto")
            check_counts(q, damping, factor)
        with pytest.raises(ddnref.DdnrefError):
            ddnref.curvature.hessian_solve(chain, x, t, chain.params, damping=0.1, method="tridiagonal")


def test_singular_systems(rng):
    chain, x, t = network(rng, 4, 6, 1)
    for zero in (0.0, 0, np.asarray(0.0)):
        with pytest.raises(ddnref.SingularError, match=r"damping is zero.*at least 85 of its 126"):
            ddnref.curvature.hessian_factor(chain, x, t, damping=zero)
    wide, x_w, t_w = network(rng, 2, 4, 16)
    assert ddnref.curvature.hessian_factor(wide, x_w, t_w, damping=np.asarray(0.0)).path in ("qr", "dense")
    # Cross-entropy does not see a shift of all outputs: singular all the same.
    with pytest.raises(ddnref.SingularError, match="singular to working precision"):
        ddnref.curvature.hessian_solve(wide, x_w, t_w, wide.params, damping=0.0)
    largest = float(np.linalg.eigvalsh(dense(chain, x, t))[-1])
    for method in ("auto", "qr", "dense"):
        factor = ddnref.curvature.hessian_factor(chain, x, t, damping=-largest, method=method)
        with pytest.raises(ddnref.SingularError, match=r"minus an eigenvalue"):
            factor.solve(chain.gradient(x, t))
        _, info = factor.solve(chain.gradient(x, t), throw=False)
        assert not info.converged
        assert info.amplification > 1e12
        assert factor.inertia().zero == 1


def test_a_solution_that_is_not_good_enough_raises(rng):
    q = problem(rng, 5, 4, 3)
    failed = 0
    for damping in hard_shifts(q.chain, q.h):
        factor = ddnref.curvature.hessian_factor(q.chain, q.x, q.t, damping=damping, method="riccati")
        if not factor.solve(q.chain.params, throw=False)[1].converged:
            with pytest.raises((ddnref.ConvergenceError, ddnref.SingularError), match='method="auto"'):
                factor.solve(q.chain.params)
            failed += 1
    assert failed


def test_one_layer_is_the_loss_layer(rng):
    q = problem(rng, 1, 5, 2)
    for method in ("auto", "tridiagonal", "riccati", "qr"):
        factor, reached = check(q, 0.1, method)
        assert reached
        check_counts(q, 0.1, factor)


def test_static_errors(rng):
    chain, x, t = network(rng, 3, 4, 2)
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1)
    b = list(chain.params)
    bad = [p.copy() for p in b]
    bad[1][0, 0] = np.nan
    call = partial(ddnref.curvature.hessian_factor, chain, x, t, damping=0.1)
    for run, error, match in [
        (lambda: call(method="lu"), ValueError, "method is 'lu'"),
        (lambda: call(curvature="fisher"), ValueError, "curvature is 'fisher'"),
        (lambda: call(damping="much"), TypeError, "damping is a str"),
        (lambda: call(damping=np.inf), ValueError, "damping is inf"),
        (lambda: call(damping=np.asarray(0.1 + 1j)), TypeError, "damping has dtype complex128"),
        (lambda: call(damping=np.asarray(np.nan)), ValueError, "damping is nan, expected a finite number"),
        (lambda: call(damping=np.asarray(-np.inf)), ValueError, "damping is -inf, expected a finite number"),
        (lambda: call(damping=np.ones(2)), ValueError, r"damping has shape \(2,\)"),
        (lambda: factor.solve(b[:2]), ValueError, "b has 2 arrays, expected 3"),
        (lambda: factor.solve([b[0], b[1].T[:2], b[2]]), ValueError, r"b\[1\] has shape \(2, 4\), expected \(4, 4\)"),
        (lambda: factor.solve([z.astype(np.float32) for z in b]), TypeError, "float32"),
        (lambda: factor.solve(bad), ddnref.NonFiniteError, "^b contains NaN"),
        (lambda: ddnref.curvature.hessian_solve_vjp(bad, b, factor), ddnref.NonFiniteError, "^x_bar contains NaN"),
        (lambda: factor.solve(b, refine=-1), ValueError, "refine is -1"),
        (lambda: factor.solve(b, refine="some"), ValueError, "refine is 'some'"),
        (lambda: ddnref.curvature.hessian_factor(chain, x[:0], t[:0], damping=0.1), ValueError, "no samples"),
        (lambda: ddnref.curvature.hessian_factor(chain, x, t + 3, damping=0.1), ValueError, "out of range"),
        (lambda: ddnref.curvature.hessian_factor(chain, x, t * 1.0, damping=0.1), ValueError, "t has shape"),
        (lambda: ddnref.curvature.hessian_factor(chain, x[:, :3], t, damping=0.1), ValueError, "layers"),
        (
            lambda: ddnref.curvature.hessian_factor(chain, x + np.nan, t, damping=0.1),
            ddnref.NonFiniteError,
            "NaN or infinity",
        ),
        (
            lambda: ddnref.curvature.hessian_factor(chain.with_params(bad), x, t, damping=0.1),
            ddnref.NonFiniteError,
            "overflow",
        ),
        (lambda: ddnref.curvature.hessian_solve_vjp(b, b[:1], factor), ValueError, "x has 1 arrays"),
        (lambda: ddnref.curvature.hessian_solve_vjp([z[None] for z in b], b, factor), ValueError, "x_bar"),
    ]:
        with pytest.raises(error, match=match):
            run()
    many = network(rng, 3, 4, 9)
    with pytest.raises(ValueError, match="fewer samples than inputs"):
        ddnref.curvature.hessian_factor(*many, damping=0.1, method="tridiagonal")
    solutions, info = factor.solve([np.stack([u, v]) for u, v in zip(b, bad, strict=True)], throw=False)
    assert info.converged.tolist() == [True, False]
    assert all(np.all(np.isfinite(z[0])) for z in solutions)
    assert "18" in repr(factor) or "44" in repr(factor)


def test_targets_fit_the_dtype_of_the_weights(rng):
    """Not that of the double precision copies, with which the outputs are computed."""
    layer = networks.Dense(rng.standard_normal((2, 3)).astype(np.float32), activation="tanh")
    chain, x = networks.Chain([layer], "mse"), rng.standard_normal((4, 3)).astype(np.float32)
    ddnref.curvature.hessian_factor(chain, x, np.ones((4, 2), dtype=np.float32), damping=0.1)
    with pytest.raises(TypeError, match="t has dtype float64, expected float32"):
        ddnref.curvature.hessian_factor(chain, x, np.ones((4, 2)), damping=0.1)
    with pytest.raises(TypeError, match="x has dtype float64"):
        ddnref.curvature.hessian_factor(chain, x.astype(np.float64), np.ones((4, 2), dtype=np.float32), damping=0.1)


def test_a_factor_takes_one_pass_forward(rng):
    """The targets are validated, and the loss is expanded, from the same activations."""
    calls = []

    def jet(z, order):
        calls.append(order)
        return np.tanh(z), 1 - np.tanh(z) ** 2, -2 * np.tanh(z) * (1 - np.tanh(z) ** 2)

    tanh = networks.Activation(*(lambda z, i=i: jet(z, 2)[i] for i in range(3)), jet)
    layers = [networks.Dense(rng.standard_normal((3, 3)), activation=tanh) for _ in range(4)]
    chain = networks.Chain([*layers[:2], networks.Residual(layers[2:])], "cross_entropy")
    ddnref.curvature.hessian_factor(chain, rng.standard_normal((2, 3)), np.asarray([0, 2]), damping=0.1)
    assert calls == [2, 2, 2, 2]


@pytest.mark.framework("torch")
def test_gradients_to_weights_and_data_are_refused_by_name(rng):
    """They would take third derivatives: only the right-hand side and the damping have cotangents."""
    import torch

    chain, x, t = network(rng, 3, 4, 2, asarray=torch.asarray)
    with pytest.raises(TypeError, match="x requires grad"):
        ddnref.curvature.hessian_factor(chain, x.requires_grad_(), t, damping=0.1)
    with pytest.raises(TypeError, match=r"params\[1\] requires grad"):
        chain.with_params([chain.params[0], chain.params[1].clone().requires_grad_(), chain.params[2]])


# --- the derivative of a solve --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 2])
def test_vjp(k, rng):
    """Linear in b; the damping by central differences with Richardson's extrapolation."""
    chain, x, t = network(rng, 4, 5, 2)
    lead = () if k is None else (k,)
    b, x_bar = ([rng.standard_normal((*lead, *p.shape)) for p in chain.params] for _ in range(2))
    factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.2)
    solution, _ = factor.solve(b)
    (b_bar, damping_bar), info = ddnref.curvature.hessian_solve_vjp(x_bar, solution, factor)
    assert np.all(info.converged)
    b_dot = [rng.standard_normal(z.shape) for z in b]
    x_dot, _ = factor.solve(b_dot)
    left, right = (sum(np.sum(p * q) for p, q in zip(u, v, strict=True)) for u, v in ((x_bar, x_dot), (b_bar, b_dot)))
    assert abs(left - right) <= 1e-12 * abs(left)

    def loss(damping):
        moved, _ = ddnref.curvature.hessian_solve(chain, x, t, b, damping=damping)
        return sum(np.sum(p * q) for p, q in zip(x_bar, moved, strict=True))

    coarse, fine = ((loss(0.2 + h) - loss(0.2 - h)) / (2 * h) for h in (1e-4, 5e-5))
    assert abs((4 * fine - coarse) / 3 - damping_bar) <= 1e-7 * abs(damping_bar)


# --- every library ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tridiagonal", "riccati", "qr", "dense"])
def test_every_library(xp, method):
    """The same numbers as NumPy, whose own are held to the dense matrix above."""
    found = []
    for asarray, numpy in ((np.asarray, np.asarray), (xp.asarray, xp.numpy)):
        rng = np.random.default_rng(3)
        residual = method in ("riccati", "qr")
        chain, x, t = network(rng, 3, 3, 2, residual=residual, asarray=asarray)
        b = [asarray(rng.standard_normal(p.shape)) for p in chain.params]
        factor = ddnref.curvature.hessian_factor(chain, x, t, damping=-0.05, method=method)
        solution, info = factor.solve(b)
        sign, log = factor.slogdet()
        found.append([*map(numpy, solution), numpy(sign), numpy(log), np.asarray(factor.inertia())])
        assert info.path == method
        assert numpy(info.converged)
        assert type(solution[0]) is type(b[0])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)


def test_nothing_leaves_the_device(second):
    """All work stays on a device that NumPy cannot read; values are read for flags alone."""
    if second.name == "torch":
        return  # the meta device has no values to compare errors with
    rng = np.random.default_rng(3)
    chain, x, t = network(rng, 4, 4, 2, asarray=second.asarray)
    b = [second.asarray(rng.standard_normal(p.shape)) for p in chain.params]
    for method in ("auto", "tridiagonal", "riccati", "qr", "dense"):
        factor = ddnref.curvature.hessian_factor(chain, x, t, damping=0.1, method=method)
        solution, _ = factor.solve(b)
        assert str(solution[0].device) == str(x.device)
        factor.slogdet()
        assert sum(factor.inertia()) == factor.total
