"""Every operation through every bridge and transform; each test records its cells of the documentation's matrix."""

from functools import partial

import matrix
import numpy as np
import pytest
from smooth import bridged, total

from conftest import TRACED
from ddnref._rules.table import RULES, TRIALS
from ddnref.testing import numerical_jvp

names = pytest.mark.parametrize("name", RULES)
ITERATIVE = [name for name, rule in RULES.items() if rule.info is not None]
CLOSED = [name for name in RULES if name not in ITERATIVE]
domains = pytest.mark.parametrize(
    ("name", "is_complex"), [(name, is_complex) for name, rule in RULES.items() for is_complex in (False, True)
                             if TRIALS[rule.name].is_complex or not is_complex],
)  # fmt: skip


def random(rng, is_complex, *shape):
    return rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if is_complex else 0)


# --- PyTorch ----------------------------------------------------------------------------------------------------


@pytest.fixture
def in_torch(torch):
    from ddnref.interop.torch import differentiable

    return partial(bridged, torch, differentiable)


@pytest.mark.framework("torch")
@domains
def test_torch_first_and_second_order(name, is_complex, torch, in_torch, rng, cell):
    op = in_torch(name)
    for shape, column in (((3, 3), "first order"), ((2, 3, 3), "batched")):
        x = torch.tensor(random(rng, is_complex, *shape), requires_grad=True)
        assert torch.autograd.gradcheck(op, x)
        cell("PyTorch", column, name)
    if not RULES[name].opaque:
        assert torch.autograd.gradgradcheck(op, x)
        cell("PyTorch", "reverse over reverse", name)
        return
    with pytest.raises(NotImplementedError, match="second derivative through") as refusal:
        torch.autograd.gradgradcheck(op, x)
    cell("PyTorch", "reverse over reverse", name, f"`NotImplementedError`: {refusal.value}")


@pytest.mark.framework("torch")
@names
def test_torch_functorch(name, torch, in_torch, rng, cell):
    x, op = torch.tensor(random(rng, False, 3, 4, 4)), in_torch(name)
    loss = lambda x: total(op(x))
    each = torch.stack([torch.func.grad(loss)(item) for item in x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), each)
    cell("PyTorch", "vmap", name)
    for row, same in zip(torch.func.jacrev(op)(x[0]), torch.autograd.functional.jacobian(op, x[0]), strict=True):
        torch.testing.assert_close(row, same)
    if not RULES[name].opaque:  # a second derivative is refused, see above
        hessian = torch.func.jacrev(torch.func.jacrev(loss))(x[0])
        torch.testing.assert_close(hessian, torch.autograd.functional.hessian(loss, x[0]))
    cell("PyTorch", "jacrev", name)


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning", "ignore:Attempted to insert a get_attr Node")
@names
def test_torch_forward_mode(name, torch, in_torch, rng, cell):
    op, x, x_dot = in_torch(name), *torch.tensor(random(rng, False, 2, 3, 3))
    rows = torch.func.jacrev(op)(x)
    moved = tuple(torch.tensordot(row, x_dot, 2) for row in rows)
    torch.testing.assert_close(torch.func.jvp(op, (x,), (x_dot,))[1], moved)
    cell("PyTorch", "jvp", name)
    torch.testing.assert_close(torch.func.jacfwd(op)(x), rows)
    cell("PyTorch", "jacfwd", name)
    if name in CLOSED:
        torch.testing.assert_close(torch.func.linearize(op, x)[1](x_dot), moved)
        cell("PyTorch", "linearize", name)
    else:
        with pytest.raises(NotImplementedError, match=f"linearize records {name} as a graph"):
            torch.func.linearize(op, x)
        cell("PyTorch", "linearize", name, "`NotImplementedError`: the graph that it records cannot hold an iteration.")
    loss = lambda x: total(op(x))
    if RULES[name].opaque:
        with pytest.raises(NotImplementedError, match="second derivative through") as refusal:
            torch.func.hessian(loss)(x)
        cell("PyTorch", "hessian", name, f"`NotImplementedError`: {refusal.value}")
        return
    torch.testing.assert_close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))
    cell("PyTorch", "hessian", name)


@pytest.mark.framework("torch")
@pytest.mark.graphs
@pytest.mark.filterwarnings(*TRACED)
@names
def test_torch_compile(name, torch, in_torch, rng, cell):
    """Closed forms compile without a graph break. Iterations refuse that, and run between two compiled parts."""
    torch._dynamo.reset()
    x, op = torch.tensor(random(rng, False, 2, 4, 4), requires_grad=True), in_torch(name)
    loss = lambda x: total(op(x))
    (eager,) = torch.autograd.grad(loss(x), x)
    (traced,) = torch.autograd.grad(torch.compile(loss, fullgraph=name in CLOSED, backend="aot_eager")(x), x)
    torch.testing.assert_close(traced, eager)
    if name in CLOSED:
        cell("PyTorch", "compile", name)
        return
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{name} iterates until a flag that it reads") as refusal:
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    assert "leave out fullgraph=True" in str(refusal.value)
    outcome = "`fullgraph=True` is refused: an iteration reads flags. Without it, it runs between compiled parts."
    cell("PyTorch", "compile", name, outcome)


# --- JAX --------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_jax(jax):
    from ddnref.interop.jax import differentiable

    return partial(bridged, jax.numpy, differentiable)


@pytest.mark.framework("jax")
@names
def test_jax_eager(name, jax, in_jax, rng, cell):
    from jax.test_util import check_grads

    check_grads(in_jax(name), (jax.numpy.asarray(random(rng, False, 3, 3)),), order=1, modes=["rev"])
    cell("JAX", "first order", name)


@pytest.mark.framework("jax")
@pytest.mark.filterwarnings("ignore:A gradient is NaN")
@domains
def test_jax_to_second_order_under_jit(name, is_complex, jax, in_jax, rng, cell):
    from jax.test_util import check_grads

    x, op = jax.numpy.asarray(random(rng, is_complex, 2, 3, 3)), in_jax(name)
    check_grads(jax.jit(op), (x,), order=1 if RULES[name].opaque else 2, modes=["rev"])
    cell("JAX", "batched", name)
    cell("JAX", "jit", name)
    if not RULES[name].opaque:
        cell("JAX", "reverse over reverse", name)
        return
    hessian = jax.jit(jax.jacrev(jax.grad(lambda x: op(x)[1].sum())))(x[0].real)
    assert np.all(np.isnan(hessian))
    cell("JAX", "reverse over reverse", name, f"NaN: {RULES[name].refusal}")


@pytest.mark.framework("jax")
@names
def test_jax_vmap_and_jacrev(name, jax, in_jax, rng, cell):
    op, x = in_jax(name), jax.numpy.asarray(rng.standard_normal((3, 4, 4)))

    @jax.jit
    def gradient(x):
        return jax.grad(lambda x: sum(jax.numpy.sum(jax.numpy.sin(y)) for y in op(x)))(x)

    each = jax.numpy.stack([gradient(item) for item in x])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(x), each, atol=1e-12)
    cell("JAX", "vmap", name)
    rows = jax.jit(jax.jacrev(op))(x[0])
    chained = sum(jax.numpy.tensordot(jax.numpy.cos(y), row, y.ndim) for y, row in zip(op(x[0]), rows, strict=True))
    np.testing.assert_allclose(chained, each[0], atol=1e-12)
    cell("JAX", "jacrev", name)


@pytest.mark.framework("jax")
@pytest.mark.filterwarnings("ignore:A (gradient|tangent) is NaN")
@names
def test_jax_forward_mode(name, jax, in_jax, rng, cell):
    """Against finite differences of the operation and of the gradient; one compilation for all that is tested."""
    op, x, x_dot = in_jax(name), *jax.numpy.asarray(random(rng, False, 2, 3, 3))
    loss = lambda x: total(op(x))

    @jax.jit
    def differentiated(x, x_dot):
        return (
            jax.jvp(op, (x,), (x_dot,))[1],
            tuple(jax.numpy.tensordot(row, x_dot, 2) for row in jax.jacfwd(op)(x)),
            jax.linearize(op, x)[1](x_dot),
            jax.numpy.tensordot(jax.hessian(loss)(x), x_dot, 2),
        )

    @jax.jit
    def plain(x):
        return op(x), jax.grad(loss)(x)

    *tangents, gradient_dot = differentiated(x, x_dot)
    parts = lambda x: np.concatenate([np.ravel(part) for part in jax.tree.leaves(plain(x))])
    f_dot = numerical_jvp(parts, np.asarray(x), np.asarray(x_dot))
    count = f_dot.size - x.size
    for column, found in zip(("jvp", "jacfwd", "linearize"), tangents, strict=True):
        found = np.concatenate([np.ravel(part) for part in found])
        np.testing.assert_allclose(found, f_dot[:count], rtol=0, atol=1e-7 * np.max(np.abs(f_dot)))
        cell("JAX", column, name)
    if RULES[name].opaque:
        assert np.all(np.isnan(gradient_dot))
        cell("JAX", "hessian", name, f"NaN: {RULES[name].refusal}")
        return
    np.testing.assert_allclose(np.ravel(gradient_dot), f_dot[count:], rtol=0, atol=1e-7 * np.max(np.abs(f_dot)))
    cell("JAX", "hessian", name)


# --- HIPS autograd ----------------------------------------------------------------------------------------------


@pytest.mark.framework("autograd")
@domains
def test_autograd(name, is_complex, rng, monkeypatch, cell):
    import autograd
    from autograd.numpy.numpy_boxes import ArrayBox

    from ddnref.interop.autograd import differentiable

    monkeypatch.setattr(ArrayBox, "conj", autograd.numpy.conj, raising=False)  # the one method that boxes lack
    np_, op = autograd.numpy, bridged(autograd.numpy, differentiable, name)

    def loss(x):
        weights = np.random.default_rng(0)
        return sum(np_.sum(np_.real((1 + 1j) * y) * weights.standard_normal(y.shape)) for y in op(x))

    for shape, column in (((3, 3), "first order"), ((2, 3, 3), "batched")):
        x = random(rng, is_complex, *shape)
        x_bar = np.conj(autograd.grad(loss)(x))  # autograd's convention is the conjugate of ours
        x_dot = x_bar / max(np.linalg.norm(x_bar), 1e-300) + rng.standard_normal(x.shape) / x.size
        f_dot = numerical_jvp(lambda x: np.asarray(loss(x)), x, x_dot)
        assert abs(f_dot - np.sum(np.real(np.conj(x_bar) * x_dot))) <= 1e-7 * np.linalg.norm(x_bar)
        cell("HIPS autograd", column, name)
        assert abs(f_dot - autograd.make_jvp(loss)(x)(x_dot)[1]) <= 1e-7 * np.linalg.norm(x_bar)
    cell("HIPS autograd", "make_jvp", name)
    with pytest.raises(NotImplementedError, match="gives first derivatives only") as refusal:
        autograd.grad(lambda x: np_.sum(np_.real(autograd.grad(loss)(x)) ** 2))(x)
    cell("HIPS autograd", "second order", name, f"`NotImplementedError`: {refusal.value}")


# --- the file ---------------------------------------------------------------------------------------------------


@pytest.fixture
def outcomes(request):
    if request.config.getoption("--matrix-out") is not None:
        pytest.skip("the file is about to be written")  # columns may have changed
    return matrix.parse(matrix.FILE.read_text(encoding="utf-8"))


def test_the_file_has_every_cell_and_is_as_it_would_be_written(outcomes):
    assert set(outcomes) == set(matrix.CELLS)
    assert matrix.FILE.read_text(encoding="utf-8") == matrix.render(outcomes)
    assert {cell.operation for cell in outcomes} == set(RULES)


def test_a_matrix_with_a_gap_or_a_failure_is_not_written(tmp_path, outcomes):
    record, path = matrix.Record(), tmp_path / "matrix.md"
    for cell, outcome in outcomes.items():
        record.add([("matrix", [*cell, outcome]), ("other", 1)])
    assert "tests failed" in record.write(path, 1)
    assert not path.exists()
    assert f"{len(matrix.CELLS)} cells" in record.write(path, 0)
    assert path.read_text(encoding="utf-8") == matrix.FILE.read_text(encoding="utf-8")
    record.outcomes.popitem()
    path.unlink()
    assert "1 cells did not run" in record.write(path, 0)
    assert not path.exists()


def test_a_cell_that_the_file_does_not_tell_fails(request, cell):
    if request.config.getoption("--matrix-out") is None:
        with pytest.raises(AssertionError, match="--matrix-out"):
            cell("PyTorch", "first order", "eigh", "refused")


def test_refused_are_only_those_that_say_why(outcomes):
    refused = {(cell.section, cell.column): set() for cell in outcomes if outcomes[cell] != matrix.HOLDS}
    for found, outcome in outcomes.items():
        if outcome != matrix.HOLDS:
            refused[found.section, found.column].add(found.operation)
            assert len(outcome) > 20, found
    assert refused == {
        ("PyTorch", "compile"): set(ITERATIVE),
        ("PyTorch", "linearize"): set(ITERATIVE),
        ("HIPS autograd", "second order"): set(RULES),
        **{
            (framework, column): {"eigsh_generalized"}
            for framework in ("PyTorch", "JAX")
            for column in ("hessian", "reverse over reverse")
        },
    }
