"""Arrays that are not on the default device, and values read on the host: over what no other test comes through."""

from itertools import pairwise

import numpy as np
import pytest
from public_names import PUBLIC

import ddnref
from conftest import backend
from ddnref import curvature, networks, operators
from ddnref._rules.binding import options_of, plain_forward, plain_vjp
from ddnref._rules.table import RULES, TRIALS


@pytest.fixture
def there():
    """array-api-strict's second device, on which NumPy cannot look, and whose arrays mix with no others."""
    import array_api_strict

    return backend("array-api-strict", array_api_strict.Device("device1"))


def arrays_in(result):
    if hasattr(result, "device") and hasattr(result, "dtype"):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from arrays_in(part)


def all_there(result, there):
    arrays = list(arrays_in(result))
    assert arrays
    assert all(array.device == there.device for array in arrays)


def chain(rng, there, loss="cross_entropy"):
    sizes = (4, 5, 3)
    params = []
    for a_in, a_out in pairwise(sizes):
        params += [rng.standard_normal((a_out, a_in)), rng.standard_normal(a_out)]
    network = networks.Chain.from_arrays([there.asarray(p) for p in params], loss=loss)
    return network, there.asarray(rng.standard_normal((6, 4))), there.asarray(rng.integers(0, 3, 6))


@pytest.mark.parametrize("name", ["cg", "minres", "bicgstab", "gmres", "lsmr"])
def test_solvers_stay_on_the_device(name, there, rng):
    a = rng.standard_normal((5, 5))
    operator = operators.dense(there.asarray(a @ a.T + np.eye(5)), positive_definite=True)
    all_there(PUBLIC[name](operator, there.asarray(rng.standard_normal((3, 5)))), there)


def test_eigsh_stays_on_the_device(there, rng):
    a = rng.standard_normal((30, 30))
    operator = operators.dense(there.asarray(a + a.T), self_adjoint=True)
    (w, v), info = result = ddnref.eigsh(operator, 2, v0=there.asarray(rng.standard_normal(30)))
    all_there(result, there)
    all_there(ddnref.eigsh_vjp(w, None, w, v, operator), there)
    assert info.converged


def test_the_gauss_newton_functions_stay_on_the_device(there, rng):
    data = chain(rng, there)
    all_there(curvature.ggn_eigvalsh(*data), there)
    all_there(curvature.ggn_eigh(*data, k=2), there)
    all_there(curvature.ggn_directional_derivatives(*data, k=2), there)
    all_there(curvature.ggn_damped_newton(*data, k=2, damping=0.1), there)
    all_there(curvature.ggn_damped_newton(*data, k=2, damping=lambda d: d.w), there)


def test_reducers_stay_on_the_device(there, rng):
    network, x, t = chain(rng, there)
    reducer = curvature.ggn_reducer(network, mc_samples=1, subsampling=[0, 2])
    state = reducer.update(reducer.init(), x, t)
    all_there(
        curvature.ggn_eigvalsh(reducer.finalise(reducer.merge(state, reducer.update(reducer.init(6), x, t)))),
        there,
    )
    gram = curvature.gram_reducer()
    v = there.asarray(rng.standard_normal((7, 3)))
    all_there(gram.finalise(gram.merge(gram.update(gram.init(), v), gram.update(gram.init(), v))), there)


def test_derivatives_of_a_network_stay_on_the_device(there, rng):
    network, x, t = chain(rng, there)
    all_there(network.hvp(x, t, network.params), there)
    all_there(network.ggnvp(x, t, network.params), there)
    all_there(network.per_sample_gradients(x, t), there)


@pytest.mark.parametrize("name", RULES)
def test_closed_forms_read_nothing_and_loops_read_flags(name, host_reads, rng):
    """With ``throw=False``; a loop reads one flag every few steps, and no other value."""
    rule, strict = RULES[name], backend("array-api-strict")
    sample = TRIALS[rule.name].sample(np.asarray, rng, (3,), 5, False)
    forward, vjp = options_of(rule, sample.options)
    inputs = [strict.asarray(x) for x in sample.inputs]
    outputs, saved = plain_forward(rule)(*sample.inputs, **forward)
    bars = sample.loss[1](*outputs) if sample.loss else outputs
    bars = bars if isinstance(bars, tuple) else (bars,)
    arrays = [strict.asarray(np.ascontiguousarray(a)) for a in (*bars, *outputs, *saved)]
    host_reads.clear()
    plain_forward(rule)(*inputs, **forward)
    assert set(host_reads) <= ({"__bool__"} if rule.info is not None else set())
    host_reads.clear()
    plain_vjp(rule)(*arrays, *(inputs[i] for i in rule.needs), **vjp)
    assert set(host_reads) <= ({"__bool__"} if rule.vjp_info else set())
