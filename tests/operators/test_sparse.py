"""Sparse matrices by their entries: of each framework, with gradients to the stored values."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg

import ddnref
from ddnref import operators

ROWS, COLUMNS = np.asarray([2, 0, 2, 1, 2, 0]), np.asarray([1, 3, 0, 1, 1, 0])  # unsorted, and one place twice


def dense(values, n=3, m=4):
    a = np.zeros((*values.shape[:-1], n, m), values.dtype)
    np.add.at(a, (..., ROWS, COLUMNS), values)
    return a


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_against_the_dense_matrix(is_complex, batch, xp, rng):
    values = rng.standard_normal((*batch, 6)) * (1 + 1j if is_complex else 1)
    values[..., 0] *= 2
    a = operators.coo(xp.asarray(values), xp.namespace.asarray(ROWS), list(COLUMNS), (3, 4))
    np.testing.assert_allclose(xp.numpy(a.matrix()), dense(values), atol=1e-15)
    x, y = rng.standard_normal((5, *batch, 4)), rng.standard_normal((5, *batch, 3))
    (bar,) = a.params_vjp(a.params, xp.asarray(y), xp.asarray(x))
    whole = np.einsum("r...i,r...j->...ij", y, x)
    np.testing.assert_allclose(xp.numpy(bar), whole[..., ROWS, COLUMNS], atol=1e-14)
    assert xp.numpy(bar).dtype == values.dtype


def test_entries_without_order_and_in_order_are_the_same_matrix(rng):
    values = rng.standard_normal(6)
    order = np.lexsort((COLUMNS, ROWS))
    first = operators.coo(values, ROWS, COLUMNS, (3, 4))
    second = operators.coo(values[order], ROWS[order], COLUMNS[order], (3, 4))
    np.testing.assert_allclose(first.matrix(), second.matrix(), atol=1e-15)
    assert first.apply != second.apply


def test_the_values_of_an_operator_are_not_kept(rng):
    """The pattern is made once, and no product sees the values of another one."""
    values = rng.standard_normal((2, 6))
    operator, x = operators.coo(values[0], ROWS, COLUMNS, (3, 4)), rng.standard_normal(4)
    for _ in range(2):
        for v in values:
            np.testing.assert_allclose(operator.with_params(v)(x), dense(v) @ x, atol=1e-15)
            np.testing.assert_allclose(operator.with_params(v).H(x[:3]), dense(v).T @ x[:3], atol=1e-15)


def test_as_sparse_matrices_of_scipy(rng):
    values, w = rng.standard_normal(6), rng.uniform(0.5, 2.0, 5)
    a = operators.coo(values, ROWS, COLUMNS, (3, 4))
    np.testing.assert_allclose(a.sparse(a.params).toarray(), dense(values), atol=1e-15)
    graph = operators.laplacian([(0, 1), (1, 2), (2, 0), (2, 2), (1, 0)], w, 4)
    np.testing.assert_allclose(graph.sparse(graph.params).toarray(), graph.matrix(), atol=1e-15)
    assert operators.coo(values[None], ROWS, COLUMNS, (3, 4)).sparse is None


def test_gradients_of_systems_and_eigenpairs_of_a_graph(rng):
    """NumPy by hand: the gradient to a weight is a product of differences along its edge."""
    i, j = np.asarray([[0, 1], [1, 2], [2, 3], [3, 4], [4, 0], [1, 4], [0, 5]]).T
    w, b, x_bar = rng.uniform(0.5, 2.0, 7), rng.standard_normal(6), rng.standard_normal(6)
    graph, ridge = operators.laplacian((i, j), w, 6), operators.diagonal(np.full(6, 0.3), positive_definite=True)
    system = operators.add(graph, ridge, positive_definite=True)
    x, _ = ddnref.linear_solve(system, b, rtol=1e-13)
    np.testing.assert_allclose(x, np.linalg.solve(system.matrix(), b), rtol=1e-10)
    ((w_bar, d_bar), _), _ = ddnref.linear_solve_vjp(x_bar, x, system, rtol=1e-13)
    y = np.linalg.solve(system.matrix(), x_bar)
    np.testing.assert_allclose(w_bar, -(y[i] - y[j]) * (x[i] - x[j]), rtol=1e-9)
    np.testing.assert_allclose(d_bar, -y * x, rtol=1e-9)
    ((values, v), saved), _ = ddnref.eigsh_fwd(graph, 2)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(graph.matrix())[:-3:-1], rtol=1e-12)
    (w_bar,), _ = ddnref.eigsh_vjp(np.asarray([1.0, 0.0]), None, values, v, *saved, graph)
    np.testing.assert_allclose(w_bar, (v[i, 0] - v[j, 0]) ** 2, rtol=1e-10, atol=1e-14)


def test_generalized_eigenpairs_of_a_graph_by_shift_and_invert(rng):
    n = 30
    edges = np.stack([np.arange(n - 1), np.arange(1, n)], axis=1)
    graph = operators.laplacian(edges, rng.uniform(0.5, 2.0, n - 1), n)
    mass = rng.uniform(1.0, 2.0, n)
    b = operators.coo(mass, np.arange(n), np.arange(n), (n, n), positive_definite=True)
    (w, _), _ = ddnref.eigsh_generalized(graph, b, 3, sigma=-0.1)
    wanted = np.sort(scipy.linalg.eigh(graph.matrix(), np.diag(mass), eigvals_only=True))[:3]
    np.testing.assert_allclose(np.sort(w), wanted, atol=1e-10)


@pytest.mark.parametrize("kind", ["coo_array", "csr_array", "csc_matrix", "dia_array"])
def test_matrices_of_scipy(kind, rng):
    a = dense(rng.standard_normal(6))
    operator = operators.from_sparse(getattr(scipy.sparse, kind)(a))
    np.testing.assert_allclose(operator.matrix(), a)
    assert operators.from_sparse(scipy.sparse.eye_array(3), positive_definite=True)[6:8] == (True, True)


# --- PyTorch ----------------------------------------------------------------------------------------------------


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta state:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "coalesced", "csr", "csc"])
def test_tensors_of_pytorch(layout, torch, rng):
    values = torch.asarray(rng.standard_normal(6)).requires_grad_()

    def matrix(values):
        a = torch.sparse_coo_tensor(np.stack([ROWS, COLUMNS]), values, (3, 4), check_invariants=False)
        return {"coo": a, "coalesced": a.coalesce(), "csr": a.to_sparse_csr(), "csc": a.to_sparse_csc()}[layout]

    operator = operators.from_sparse(matrix(values.detach()))
    np.testing.assert_allclose(operator.matrix().numpy(), dense(values.detach().numpy()), atol=1e-15)
    if layout in ("coo", "coalesced"):  # PyTorch does not differentiate the conversion to the other two
        solve = ddnref.interop.torch.differentiable(ddnref.linear_solve, rtol=1e-13)
        b = torch.asarray(rng.standard_normal(4))
        x = lambda values: solve(operators.normal(operators.from_sparse(matrix(values)), 0.5), b)[0]
        assert torch.autograd.gradcheck(x, (values,))


@pytest.mark.framework("torch")
@pytest.mark.filterwarnings("ignore:Sparse CS[RC] tensor support is in beta state:UserWarning")
def test_gradients_to_the_values_of_a_csr_tensor(torch, rng):
    a = torch.asarray(dense(rng.standard_normal(6))).to_sparse_csr()
    values, b = a.values().clone().requires_grad_(), torch.asarray(rng.standard_normal(4))
    solve = ddnref.interop.torch.differentiable(ddnref.linear_solve, rtol=1e-13)

    def x(values):
        return solve(operators.normal(operators.from_sparse(a).with_params(values), 0.5), b)[0]

    assert torch.autograd.gradcheck(x, (values,))


@pytest.mark.framework("torch")
def test_eigenpairs_of_a_sparse_tensor(torch, rng):
    n = 8
    i, j = np.arange(n), (np.arange(n) + 1) % n
    index = np.stack([np.concatenate([i, i, j]), np.concatenate([i, j, i])])
    eigsh = ddnref.interop.torch.differentiable(ddnref.eigsh, k=2)

    def values(d):
        a = torch.sparse_coo_tensor(index, torch.cat([d, -d / 3, -d / 3]), (n, n), check_invariants=False)
        return eigsh(operators.from_sparse(a, self_adjoint=True))[0][0]

    assert torch.autograd.gradcheck(values, (torch.asarray(rng.uniform(1.0, 3.0, n)).requires_grad_(),))


# --- JAX --------------------------------------------------------------------------------------------------------


@pytest.mark.framework("jax")
@pytest.mark.parametrize("kind", ["BCOO", "BCSR"])
def test_matrices_of_jax(kind, jax, rng):
    from jax.experimental import sparse
    from jax.test_util import check_grads

    a = dense(rng.standard_normal(6))
    stored = getattr(sparse, kind).fromdense(jax.numpy.asarray(a), nse=9)  # more than there are entries: padding
    assert stored.data.shape == (9,)
    np.testing.assert_allclose(operators.from_sparse(stored).matrix(), a)
    solve = ddnref.interop.jax.differentiable(ddnref.linear_solve, rtol=1e-13)
    b = jax.numpy.asarray(rng.standard_normal(4))

    def x(data):
        places = (data, stored.indices) if kind == "BCOO" else (data, stored.indices, stored.indptr)
        matrix = getattr(sparse, kind)(places, shape=stored.shape)
        return solve(operators.normal(operators.from_sparse(matrix), 0.5), b)[0]

    check_grads(jax.jit(x), (stored.data,), order=1, rtol=1e-6, atol=1e-6)
    with pytest.raises(TypeError, match="is traced by JAX, but indices are fixed"):
        jax.jit(lambda matrix: operators.from_sparse(matrix)(b))(stored)


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: operators.coo(np.ones(2), [0, 1], [0], (2, 2)), ValueError, r"values has shape \(2,\).* as columns"),
        (lambda: operators.coo(np.ones(3), [0, 1], [0, 1], (2, 2)), ValueError, r"expected \(..., 2\) as rows"),
        (
            lambda: operators.coo(np.ones(1), [2], [0], (2, 2)),
            ValueError,
            "rows has values from 2 to 2, expected 0",
        ),
        (lambda: operators.coo(np.ones(1), [1], [-1], (2, 2)), ValueError, "columns has values from -1"),
        (lambda: operators.coo(np.ones(1), [[1]], [1], (2, 2)), ValueError, r"rows has shape \(1, 1\), expected one"),
        (lambda: operators.coo(np.ones(1), [1.0], [1], (2, 2)), TypeError, "rows has dtype float64"),
        (lambda: operators.coo(np.ones(1), [1], [1], 2), ValueError, "shape is 2, expected the numbers"),
        (lambda: operators.coo(np.ones(1), [1], [1], (2, 2.0)), TypeError, r"shape\[1\] is 2.0, expected an integer"),
        (lambda: operators.coo(np.ones(1), [1], [1], (2, 3), self_adjoint=True), ValueError, "only a square matrix"),
        (lambda: operators.coo(np.ones(1, int), [1], [1], (2, 2)), TypeError, "values has dtype int64"),
        (lambda: operators.from_sparse(np.eye(2)), TypeError, "matrix is a numpy.ndarray.*ddnref.operators.dense"),
    ],
)
def test_bad_entries(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.framework("torch")
def test_bad_tensors(torch):
    with pytest.raises(TypeError, match=r"matrix is a torch\.Tensor, expected a sparse matrix"):
        operators.from_sparse(torch.eye(2))
    with pytest.raises(ValueError, match=r"matrix has shape \(2, 2\) and 1 dense axes"):
        operators.from_sparse(torch.eye(2).to_sparse(1))


@pytest.mark.framework("jax")
def test_bad_matrices_of_jax(jax):
    from jax.experimental import sparse

    with pytest.raises(ValueError, match="1 batch axes and 0 dense axes"):
        operators.from_sparse(sparse.BCOO.fromdense(jax.numpy.ones((2, 2, 2)), n_batch=1))
