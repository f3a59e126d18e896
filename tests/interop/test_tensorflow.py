"""The bridge to TensorFlow, eagerly and in graphs: every rule, the complex convention, operators, shapes, refusals."""

import subprocess
import sys

import numpy as np
import pytest
from problems import projector_gradient, relative, rotation, symmetric, with_spectrum
from public_names import PUBLIC
from smooth import SMOOTH

import ddnref
from ddnref import krylov, nodes, operators
from ddnref._rules.table import RULES, TRIALS
from ddnref.testing import numerical_jvp

pytestmark = pytest.mark.framework("tensorflow")

TRIPLE = np.asarray([-1.0, 0.3, 0.3, 0.3, 1.1, 2.0])
INSIDE = TRIPLE == 0.3


@pytest.fixture
def tf():
    return pytest.importorskip("tensorflow")


@pytest.fixture
def differentiable(tf):
    from ddnref.interop.tensorflow import differentiable

    return differentiable


@pytest.fixture
def grad(tf):
    """Like ``autograd.grad``, of one tensor or of several."""

    def grad(loss):
        def gradient(*inputs):
            inputs = tuple(map(tf.convert_to_tensor, inputs))
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                value = loss(*inputs)
            bars = tape.gradient(value, inputs)
            return bars[0] if len(bars) == 1 else bars

        return gradient

    return grad


@pytest.fixture(params=["eager", "graph"])
def mode(request, tf):
    """Return a decorator that makes a function run in that mode."""
    return tf.function if request.param == "graph" else lambda function: function


@pytest.mark.parametrize(
    ("name", "is_complex"), [(name, is_complex) for name, rule in RULES.items() for is_complex in (False, True)
                             if TRIALS[rule.name].is_complex or not is_complex],
)  # fmt: skip
def test_agrees_with_finite_differences(name, is_complex, tf, differentiable, grad, rng, monkeypatch, cell):
    """Eagerly, and in a graph that is told the number of items only when it runs."""
    monkeypatch.setattr(tf.Tensor, "swapaxes", lambda x, *axes: tf.experimental.numpy.swapaxes(x, *axes), raising=False)
    monkeypatch.setattr(tf.Tensor, "conj", tf.math.conj, raising=False)
    monkeypatch.setattr(tf.Tensor, "sum", tf.reduce_sum, raising=False)
    inputs, outputs, options = SMOOTH[name]
    op = differentiable(PUBLIC[name], **options)

    def loss(x):
        ys = outputs(op(*inputs(x, tf.cast(np.diag([1.0, 2.0, 3.0]), x.dtype))))
        assert all(y.shape[1:].is_fully_defined() for y in ys)
        ys = [tf.math.real((1 + 1j) * y) if y.dtype.is_complex else y for y in ys]
        weights = np.random.default_rng(0)
        return sum(tf.reduce_sum(y * weights.standard_normal((2, *y.shape[1:]))) for y in ys)

    x = rng.standard_normal((2, 3, 3)) + (1j * rng.standard_normal((2, 3, 3)) if is_complex else 0)
    x_bar = grad(loss)(x).numpy()
    x_dot = x_bar / max(np.linalg.norm(x_bar), 1e-300) + rng.standard_normal(x.shape) / x.size
    f_dot = numerical_jvp(lambda x: loss(tf.constant(x)).numpy(), x, x_dot)
    compiled = tf.function(grad(loss), input_signature=[tf.TensorSpec([None, 3, 3], x.dtype)])
    for column, gradient in (("batched", x_bar), ("graph", compiled(x).numpy())):
        assert abs(f_dot - np.sum(np.real(np.conj(gradient) * x_dot))) <= 1e-7 * np.linalg.norm(x_bar)
        cell("TensorFlow", column, name)
    with tf.autodiff.ForwardAccumulator(x := tf.constant(x), tf.constant(x_dot)) as accumulator:
        value = loss(x)
    assert abs(f_dot - accumulator.jvp(value).numpy()) <= 1e-7 * np.linalg.norm(x_bar)
    cell("TensorFlow", "forward mode", name)


def test_complex_gradients_follow_tensorflow(tf, differentiable, grad, mode, rng):
    """The same loss through TensorFlow's own eigenvalues: its convention is ours."""
    x = symmetric(rng, 4, (), True)
    theirs = grad(lambda x: tf.reduce_sum(tf.linalg.eigvalsh(x) ** 3))(x).numpy()
    ours = mode(grad(lambda x: tf.reduce_sum(differentiable(ddnref.eigh)(x)[0] ** 3)))(x)
    assert relative(ours.numpy(), (theirs + theirs.conj().T) / 2) <= 1e-12


def test_exact_at_repeated_eigenvalues(tf, differentiable, grad, mode, rng):
    v = rotation(rng, 6)
    x, c = with_spectrum(v, TRIPLE), rng.standard_normal((6, 6))
    c = (c + c.T) / 2
    eigh = differentiable(ddnref.eigh)

    def loss(x):
        v = tf.boolean_mask(eigh(x)[1], INSIDE, axis=1)
        return tf.reduce_sum(c * tf.matmul(v, v, transpose_b=True))

    assert relative(mode(grad(loss))(x).numpy(), projector_gradient(v, TRIPLE, INSIDE, c)) <= 1e-12


def test_a_gauge_dependent_loss_is_nan_with_a_warning(tf, differentiable, grad, mode, rng):
    """Only the item whose loss depends on the gauge is NaN."""
    x = np.stack([with_spectrum(rotation(rng, 6), TRIPLE), np.diag(np.arange(6.0))])
    eigh = differentiable(ddnref.eigh)
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        x_bar = mode(grad(lambda x: tf.reduce_sum(eigh(x)[1] ** 3)))(x).numpy()
    assert np.isnan(x_bar).all(axis=(-2, -1)).tolist() == [True, False]
    assert np.isfinite(x_bar[1]).all()


def test_what_has_not_converged_is_nan_and_warns(tf, differentiable, grad, mode):
    operator, b = operators.diagonal(np.logspace(0, 3, 12), positive_definite=True), np.ones((2, 12))
    b[0, 1:] = 0
    solve = differentiable(ddnref.linear_solve, maxiter=3)
    x, info = mode(lambda b: solve(operator, b))(b)
    assert info.converged.numpy().tolist() == [True, False]
    assert np.isnan(x.numpy()).all(axis=-1).tolist() == [False, True]
    with pytest.warns(RuntimeWarning, match="A gradient is NaN"):
        b_bar = mode(grad(lambda b: tf.reduce_sum(solve(operator, b)[0] ** 2)))(b)
    assert np.isnan(b_bar.numpy()).all(axis=-1).tolist() == [False, True]


def test_an_operator_and_its_status(tf, differentiable, grad, mode, rng):
    """Gradients reach the parameters of an operator; the status has none."""
    d, b = 1 + rng.random(5), rng.standard_normal(5)
    operator, solve = (
        operators.diagonal(d, positive_definite=True),
        differentiable(ddnref.linear_solve, rtol=1e-14),
    )

    def loss(d, b):
        x, info = solve(operator.with_params(d), b)
        assert isinstance(info, krylov.SolveInfo)
        return tf.reduce_sum(x**2) + tf.cast(info.n_iter, x.dtype) * 0 + info.residual_norm * 0

    d_bar, b_bar = mode(grad(loss))(d, b)
    assert relative(d_bar.numpy(), -2 * b**2 / d**3) <= 1e-12
    assert relative(b_bar.numpy(), 2 * b / d**2) <= 1e-12
    assert mode(grad(lambda b: solve(operator, b)[1].residual_norm))(b) is None


@pytest.mark.parametrize("batch", [(), (None,)])
def test_operators_and_batches(batch, tf, differentiable, grad, rng):
    """A kernel or several, shared by right-hand sides or not, in a graph that does not know how many."""
    kernel, rho = 0.1 * rng.standard_normal((*(4 for _ in batch), 3, 3)), np.asarray(0.5)
    operator, solve = (
        operators.normal(operators.convolution(kernel, (3, 5)), rho),
        differentiable(ddnref.linear_solve),
    )
    loss = lambda b, *params: tf.reduce_sum(solve(operator.with_params(*params), b)[0] ** 3)
    signature = [tf.TensorSpec(s, tf.float64) for s in ((None, 3, 5), (*batch, 3, 3), ())]
    assert [p.ndim for p in operator.params] == [len(batch) + 2, 0]
    for b in (rng.standard_normal((4, 3, 5)), rng.standard_normal((1, 3, 5))):
        eager = grad(loss)(b, *operator.params)
        compiled = tf.function(grad(loss), input_signature=signature)(b, *operator.params)
        for ours, graph in zip(eager, compiled, strict=True):
            assert relative(graph.numpy(), ours.numpy()) <= 1e-12


def test_eigenpairs_of_an_operator_alone(tf, differentiable, grad, mode):
    """No array beside the operator, of which a graph could make an empty batch."""
    d = np.asarray([1.0, 3.0, 2.0, 5.0, 4.0])
    operator, eigsh = operators.diagonal(d)._replace(self_adjoint=True), differentiable(ddnref.eigsh, k=2)

    def loss(d):
        (w, v), _ = eigsh(operator.with_params(d))
        assert (w.shape, v.shape) == ((2,), (5, 2))
        return tf.reduce_sum(w**2)

    assert np.allclose(mode(grad(loss))(d), [0, 0, 0, 10, 8], rtol=0, atol=1e-10)


def test_an_unused_result_costs_nothing_and_gives_zero(tf, differentiable, grad, mode, rng, monkeypatch):
    eigh, x = differentiable(ddnref.eigh), symmetric(rng, 4)
    monkeypatch.setattr(ddnref.linalg._eigh, "eigenpairs_vjp", None)  # what is called would raise
    assert np.all(mode(grad(lambda x: tf.reduce_sum(0 * eigh(x)[0])))(x) == 0)


def test_a_sparse_cotangent(tf, differentiable, grad, mode, rng):
    eigh, x = differentiable(ddnref.eigh), symmetric(rng, 4)
    picked = mode(grad(lambda x: tf.reduce_sum(tf.gather(eigh(x)[0], [0, 2]))))(x)
    assert relative(picked.numpy(), grad(lambda x: eigh(x)[0][0] + eigh(x)[0][2])(x).numpy()) <= 1e-14


def test_what_is_taken_as_input(tf, differentiable, mode):
    eigh = mode(differentiable(ddnref.eigh))
    for dtype in (np.float32, np.complex64):
        x = np.diag(np.asarray([1, 2], dtype))
        for given in (x, tf.constant(x), tf.Variable(x)):
            w, v = eigh(given)
            assert (w.dtype, v.dtype) == (tf.float32, dtype)
            assert w.numpy().tolist() == [1, 2]
    for wrong, message in (
        ([[1.0]], "x is a builtins.list; pass a tensor"),
        (1.0, "x is a builtins.float"),
        (tf.constant([[1]]), "x has dtype int32"),
        (tf.constant([[1.0]], tf.bfloat16), "x has dtype bfloat16"),
    ):
        with pytest.raises(TypeError, match=message):
            differentiable(ddnref.eigh)(wrong)
    with pytest.raises(TypeError, match="x has dtype int32"):
        eigh(tf.constant([[1]]))
    with pytest.raises(ValueError, match=r"x has shape \(3, 4\), expected \(\.\.\., m, m\)"):
        eigh(tf.zeros((3, 4)))


def test_a_gradient_reaches_a_variable(tf, differentiable, rng):
    x, eigh = tf.Variable(symmetric(rng, 3)), differentiable(ddnref.eigh)
    with tf.GradientTape() as tape:
        square = tf.reduce_sum(eigh(x)[0] ** 2)
    assert relative(tape.gradient(square, x).numpy(), 2 * x.numpy()) <= 1e-13


def test_shapes_in_a_graph(tf, differentiable):
    """Known as far as they follow from those of the inputs."""
    qr, sinkhorn = differentiable(ddnref.qr), differentiable(nodes.sinkhorn)

    def shapes(function, *inputs):
        signature = [tf.TensorSpec(shape, tf.float32) for shape in inputs]
        outputs = tf.function(function, input_signature=signature).get_concrete_function().structured_outputs
        return [tuple(y.shape) for y in tf.nest.flatten(outputs)]

    assert shapes(qr, (5, 2)) == [(5, 2), (2, 2)]
    assert shapes(qr, (None, 5, 2)) == [(None, 5, 2), (None, 2, 2)]
    assert shapes(qr, (3, None, 2)) == [(3, None, 2), (3, 2, 2)]
    assert shapes(lambda *inputs: sinkhorn(*inputs, 0.5)[1].converged, (7, 4, 3), (7, 4), (7, 3)) == [(7,)]
    for solve in (differentiable(ddnref.solve), lambda a, b: differentiable(ddnref.linear_solve)(a, b)[0]):
        assert shapes(solve, (3, 3), (7, 3)) == [(7, 3)]  # several right-hand sides
        assert shapes(solve, (None, 3, 3), (3,)) == [(None, 3)]
        assert shapes(solve, (4, 3, 3), (None, 1, 3)) == [(None, 4, 3)]
    with pytest.raises(ValueError, match="no known rank"):
        shapes(qr, None)
    with pytest.raises(ValueError, match=r"sinkhorn returns do not follow from \[None, None, 3\], \[4\], \[3\], \[\]"):
        shapes(sinkhorn, (None, None, 3), (4,), (3,), ())
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        shapes(differentiable(ddnref.eigh), (3, 4))


def test_mapped_and_repeated(tf, differentiable, grad, rng):
    """``vectorized_map`` and ``jacobian`` call the operation once per item; a persistent tape is asked twice."""
    eigh, x = differentiable(ddnref.eigh), symmetric(rng, 3, (4,))
    loss = lambda x: tf.reduce_sum(eigh(x)[0] ** 3)
    whole = grad(loss)(x).numpy()
    assert relative(tf.vectorized_map(grad(loss), x).numpy(), whole) <= 1e-14
    assert relative(tf.map_fn(grad(loss), tf.constant(x)).numpy(), whole) <= 1e-14
    x = tf.constant(x[0])
    for function in (loss, tf.function(loss)):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            w, value = eigh(x)[0], function(x)
        assert relative(tape.gradient(value, x).numpy(), whole[0]) <= 1e-14
        assert relative(tape.gradient(value, x).numpy(), whole[0]) <= 1e-14
        rows = tape.jacobian(w, x).numpy()
        assert relative(np.tensordot(3 * w.numpy() ** 2, rows, 1), whole[0]) <= 1e-14


def test_second_derivatives_are_refused(tf, differentiable, grad, mode, rng):
    """Through the cotangent, through the input alone, and in every order of the modes: never None or zero."""
    eigh, x = differentiable(ddnref.eigh), tf.constant(symmetric(rng, 3))
    cubes, linear = (lambda x: tf.reduce_sum(eigh(x)[0] ** 3)), lambda x: eigh(x)[0][0]
    for loss in (cubes, linear, mode(cubes), mode(linear)):
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            mode(grad(lambda x, loss=loss: tf.reduce_sum(grad(loss)(x))))(x)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            mode(tangent(tf, grad(loss)))(x)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            mode(grad(tangent(tf, loss)))(x)
        with pytest.raises(NotImplementedError, match="first derivatives only"):
            tangent(tf, tangent(tf, loss))(x)  # in a graph, TensorFlow fails already at the call


def tangent(tf, loss):
    """The tangent of a loss along its own argument."""

    def along(x):
        with tf.autodiff.ForwardAccumulator(x, x) as accumulator:
            value = loss(x)
        return accumulator.jvp(value)

    return along


def test_forward_mode(tf, differentiable, grad, rng):
    """In eager mode tangents are the transpose of gradients; a graph refuses, where TensorFlow would find zero."""
    eigh = differentiable(ddnref.eigh)

    def loss(x):
        w, v = eigh(x)
        return tf.reduce_sum(w**3) + tf.reduce_sum(abs(v) ** 3)

    for is_complex in (False, True):
        x = symmetric(rng, 4, (), is_complex)
        moved = tangent(tf, loss)(tf.constant(x)).numpy()
        assert relative(moved, np.sum(np.real(np.conj(grad(loss)(x)) * x))) <= 1e-12
    for traced in (tf.function(tangent(tf, loss)), tangent(tf, tf.function(loss))):
        with pytest.raises(NotImplementedError, match=r"Forward mode of eigh.*in eager mode"):
            traced(tf.constant(symmetric(rng, 4)))


def test_forward_mode_of_an_operator_and_its_status(tf, differentiable, rng):
    d, b, d_dot = 1 + rng.random(5), rng.standard_normal(5), rng.standard_normal(5)
    operator, solve = operators.diagonal(d, positive_definite=True), differentiable(ddnref.linear_solve, rtol=1e-14)
    parameter = tf.constant(d)
    with tf.autodiff.ForwardAccumulator(parameter, tf.constant(d_dot)) as accumulator:
        x, info = solve(operator.with_params(parameter), b)
    assert bool(info.converged)
    assert relative(accumulator.jvp(x).numpy(), -d_dot * b / d**2) <= 1e-12


def test_the_derivative_along_a_cotangent(tf, differentiable, grad, mode, rng):
    """A gradient is linear in the cotangent: its derivative is the JVP."""
    eigh, x = differentiable(ddnref.eigh), tf.constant(symmetric(rng, 3))
    scaled = mode(grad(lambda c: tf.reduce_sum(grad(lambda x: c * eigh(x)[0][0])(x))))
    if mode is not tf.function:
        v = np.linalg.eigh(x.numpy())[1][:, 0]
        assert relative(scaled(tf.constant(2.0, tf.float64)).numpy(), np.sum(np.outer(v, v))) <= 1e-12
        return
    with pytest.raises(NotImplementedError, match="bridge to TensorFlow"):
        scaled(tf.constant(2.0, tf.float64))


def test_a_layer_of_keras_learns(tf, differentiable, rng):
    """Its shapes are asked for before there is a batch; XLA, which Keras may choose, cannot call the operation."""
    eigh, keras = differentiable(ddnref.eigh), tf.keras

    class Spectrum(keras.layers.Layer):
        def call(self, x):
            return eigh(tf.matmul(x, x, transpose_a=True))[0]

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(4), keras.layers.Reshape((2, 2)), Spectrum(), keras.layers.Dense(1)]
    )
    assert model.output_shape == (None, 1)
    x, y = rng.standard_normal((16, 3)), np.abs(rng.standard_normal((16, 1)))
    model.compile(optimizer=keras.optimizers.SGD(0.01), loss="mse", jit_compile=False)
    losses = model.fit(x, y, batch_size=8, epochs=8, verbose=0, shuffle=False).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    model.compile(optimizer="sgd", loss="mse", jit_compile=True)
    with pytest.raises(tf.errors.InvalidArgumentError, match="PyFuncStateless"):
        model.fit(x, y, verbose=0)


def test_xla_is_refused(tf, differentiable, rng):
    with pytest.raises(tf.errors.InvalidArgumentError, match="No registered 'PyFuncStateless' OpKernel for XLA"):
        tf.function(differentiable(ddnref.eigh), jit_compile=True)(symmetric(rng, 3))


def test_options(differentiable, tf):
    w, v = differentiable(ddnref.eigh_topk, k=2)(np.diag([1.0, 2.0, 3.0]))
    assert (w.shape, v.shape) == ((2,), (3, 2))
    with pytest.raises(TypeError, match="has no option rtl"):
        differentiable(ddnref.eigsh, k=2, rtl=1e-3)
    with pytest.raises(TypeError, match=r"differentiable\(ddnref.eigsh, k=\.\.\.\)"):
        differentiable(ddnref.eigsh)
    with pytest.raises(TypeError, match="has no rule"):
        differentiable(np.sin)


def test_another_process(tf, differentiable, tmp_path):
    """It imports TensorFlow only when used, and cannot run a saved model: the operation is a function of Python."""
    module = tf.Module()
    module.eigh = tf.function(differentiable(ddnref.eigh), input_signature=[tf.TensorSpec([2, 2])])
    tf.saved_model.save(module, str(tmp_path))
    code = f"""
import sys, ddnref
assert "tensorflow" not in sys.modules
import ddnref.interop.tensorflow, tensorflow as tf
model = tf.saved_model.load({str(tmp_path)!r})
try:
    model.eigh(tf.eye(2))
except tf.errors.InvalidArgumentError as error:
    assert "Could not find callback" in str(error)
else:
    raise AssertionError
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
