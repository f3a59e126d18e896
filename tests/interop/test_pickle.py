"""Bridged functions, and modules of PyTorch that hold them, are pickled and copied as what they were made of."""

import copy
import importlib
import io
import pickle

import numpy as np
import pytest

import ddnref


@pytest.mark.parametrize(
    "framework",
    [pytest.param(name, marks=pytest.mark.framework(name)) for name in ("torch", "jax", "autograd", "tensorflow")],
)
def test_pickle(framework):
    differentiable = importlib.import_module(f"ddnref.interop.{framework}").differentiable
    op = differentiable(ddnref.eigh_topk, k=2)
    assert repr(op) == f"ddnref.interop.{framework}.differentiable(eigh_topk, k=2)"
    assert (op.__name__, op.__doc__) == ("eigh_topk", ddnref.eigh_topk.__doc__)
    array = {"torch": "torch", "jax": "jax.numpy", "autograd": "numpy", "tensorflow": "tensorflow"}[framework]
    x = getattr(importlib.import_module(array), "constant" if framework == "tensorflow" else "asarray")(
        np.diag([3.0, 1.0, 2.0])
    )
    for other in (pickle.loads(pickle.dumps(op)), copy.deepcopy(op)):
        assert type(other) is type(op)
        for found, expected in zip(other(x), op(x), strict=True):
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.framework("torch")
@pytest.mark.parametrize("compute", ["torch", "numpy"])
def test_the_library_that_computes_is_kept(compute, torch):
    from ddnref.interop.torch import differentiable

    op = differentiable(ddnref.sqrtm, compute=compute)
    assert pickle.loads(pickle.dumps(op)).options == {"compute": compute}


@pytest.mark.framework("torch")
def test_a_module_is_saved_and_loaded(torch):
    from ddnref.interop.torch import differentiable

    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model[0].op = differentiable(ddnref.eigh)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded[0].op is model[0].op  # the bridge that the cache holds
    w, _ = loaded[0].op(torch.eye(3))
    torch.testing.assert_close(w, torch.ones(3))


@pytest.mark.framework("torch")
def test_an_option_that_cannot_be_pickled_is_the_error(torch):
    from ddnref.interop.torch import differentiable

    op = differentiable(ddnref.spectral_function, f=lambda w: w**2, df=lambda w: 2 * w)
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(op)
