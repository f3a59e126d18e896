"""Operators can be pickled and copied, and those of one structure have equal functions."""

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import scipy.sparse
from operator_cases import NAMES, case, vectors

from ddnref import operators
from ddnref.krylov._lsmr import damped
from ddnref.linalg._svds import _bordered
from ddnref.operators import LinearOperator, _operator

CASES = pytest.mark.parametrize("name", NAMES)


def doubled(params, x):
    return 2 * params[0] * x


def doubled_vjp(params, y_bar, x):
    return (np.sum(2 * y_bar * x, axis=tuple(range(y_bar.ndim - 1))),)


def own(d):
    """An operator of functions of a module, as a user may write one."""
    return LinearOperator((d,), doubled, doubled, doubled_vjp, d.shape, d.shape)


def bare(operator):
    return operator._replace(params=())


def assert_same(operator, other):
    assert bare(operator) == bare(other)
    assert hash(bare(operator)) == hash(bare(other))
    x, y = vectors(operator, (2,), False)
    np.testing.assert_array_equal(operator(x), other(x))
    np.testing.assert_array_equal(operator.adjoint(operator.params, y), other.adjoint(other.params, y))


@CASES
def test_every_operator_is_known_until_it_has_a_function_of_the_user(name):
    operator = case(name)
    assert _operator.is_known(bare(operator))
    for other in (
        operators.block_diagonal(operator, own(np.ones(2))),
        operators.scaled(operator._replace(apply=doubled), 2.0),
        operators.block_diagonal(operator, operators.from_scipy(scipy.sparse.eye_array(3))),
    ):
        assert not _operator.is_known(bare(other))


@CASES
def test_pickled_copied_and_made_again(name):
    operator = case(name)
    for other in (pickle.loads(pickle.dumps(operator)), copy.deepcopy(operator), case(name)):
        assert_same(operator, other)
        assert_same(operator.prepared(), other.prepared())
    fast = operator.prepared()
    assert_same(fast, pickle.loads(pickle.dumps(fast)))


@pytest.mark.parametrize("make", [
    lambda d: operators.compose(own(d), operators.diagonal(d)),
    lambda d: 2 * own(d).H - own(d).T,
    lambda d: operators.normal(operators.stack(own(d), operators.dense(np.outer(d, d))), 0.5),
    lambda d: damped(own(d), 0.5),
    lambda d: _bordered(own(d)),
])  # fmt: skip
def test_around_functions_of_the_user(make):
    d = np.asarray([1.0, 2.0, 4.0])
    assert_same(make(d), pickle.loads(pickle.dumps(make(d))))


@pytest.mark.framework("torch")
@CASES
def test_saved_by_joblib_and_pytorch(name, tmp_path):
    import joblib
    import torch

    operator, theirs = case(name), case(name, torch.asarray)
    joblib.dump(operator, tmp_path / "operator")
    assert_same(operator, joblib.load(tmp_path / "operator"))
    file = io.BytesIO()
    torch.save(theirs, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert bare(loaded) == bare(theirs)
    assert all(map(torch.equal, loaded.params, theirs.params))


def test_a_function_that_cannot_be_pickled_is_the_error():
    operator = own(np.ones(3))._replace(apply=lambda params, x: doubled(params, x))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(operators.normal(operator))


def test_operators_that_differ_compare_unequal():
    d, kernel = np.ones(3), np.ones(2)
    points = operators.diagonal(d)
    different = [
        points, operators.mask(d), operators.dense(np.eye(3)), points.T, points.H, 2 * points, 2.0 * points,
        (2 + 0j) * points, -0.0 * points, 0.0 * points, np.asarray(2.0) * points, points + points, points @ points,
        operators.stack(points, points), operators.stack(points, points, points), operators.normal(points),
        operators.normal(points, 0.5), operators.normal(points, 1.5), operators.normal(points, np.asarray(0.5)),
        operators.convolution(kernel, 3), operators.convolution(kernel, 4), operators.convolution(np.ones(3), 3),
        operators.convolution(kernel, 3, self_adjoint=True), operators.difference(3), operators.difference((3,), 0),
        operators.difference(3, boundary="zero"), own(d), 2 * own(d),
        operators.convolution(kernel, 3, boundary="zero"), operators.convolution(np.ones(3), 3, boundary="reflect"),
        operators.convolution(np.ones(3), 3, boundary="zero"), operators.toeplitz(d), operators.toeplitz(d, d),
        operators.block_diagonal(points, points), operators.kronecker(points, points), operators.kronecker(points),
        operators.coo(d, [0, 1, 2], [0, 1, 2], (3, 3)), operators.coo(d, [0, 1, 2], [0, 2, 1], (3, 3)),
        operators.coo(d, [0, 1, 2], [0, 1, 2], (4, 3)), operators.coo(d, [0, 1, 2], [0, 1, 2], (3, 4)),
        operators.laplacian([(0, 1), (1, 2), (2, 0)], d, 3), operators.laplacian([(1, 0), (1, 2), (2, 0)], d, 3),
        operators.toeplitz(d, kernel), operators.toeplitz(d, positive_definite=True),
    ]  # fmt: skip
    seen = {}
    for i, operator in enumerate(different):
        j = seen.setdefault(bare(operator), i)
        # A real diagonal is its own mask, and numbers of two types are two constants.
        assert i == j or {i, j} == {0, 1}, (i, j)


def test_a_function_without_a_hash_is_used_as_it_is():
    class Product:
        __hash__ = None

        def __call__(self, params, x):
            return doubled(params, x)

    operator = operators.normal(own(np.ones(3))._replace(apply=Product()))
    np.testing.assert_array_equal(operator(np.ones(3)), np.full(3, 4.0))


def test_structures_live_as_long_as_their_operators():
    gc.collect()
    before = len(_operator._structures)
    made = [operators.normal(operators.convolution(np.ones(3), 1000 + i), 0.5 + i) for i in range(5)]
    assert len(_operator._structures) == before + 10
    del made
    gc.collect()
    assert len(_operator._structures) == before
