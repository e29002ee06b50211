import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_prune
from tests import helpers
from tf_prune.batches import Batches
from tf_prune.gradients import Derivatives
from tf_prune.prunable import find_prunable


def derivatives_of(model, loss=None):
    return Derivatives(model, find_prunable(model).prunable, loss)


def logits_of(weights, x):
    """A tanh network without biases, in NumPy."""
    for i, w in enumerate(weights):
        x = x @ w
        if i < len(weights) - 1:
            x = np.tanh(x)
    return x


def cross_entropy(logits, y):
    shifted = logits - logits.max(1, keepdims=True)
    return -(shifted[np.arange(len(y)), y] - np.log(np.exp(shifted).sum(1))).mean()


def numeric_gradient(function, weights, step=1e-5):
    """Central differences, every weight by itself, in float64."""
    gradients = []
    for i, w in enumerate(weights):
        gradient = np.zeros_like(w)
        for index in np.ndindex(w.shape):
            values = []
            for sign in (1, -1):
                moved = [v.copy() for v in weights]
                moved[i][index] += sign * step
                values.append(function(moved))
            gradient[index] = (values[0] - values[1]) / (2 * step)
        gradients.append(gradient)
    return gradients


@pytest.fixture
def case():
    model = helpers.float64_mlp()
    generator = np.random.default_rng(1)
    x, y = generator.standard_normal((9, 5)), generator.integers(0, 3, 9)
    weights = [np.asarray(v) for v in find_prunable(model).prunable.values()]
    return model, (x, y), weights


def assert_close(got, expected, tolerance=1e-6):
    for a, b in zip(got.values(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


def test_gradient_equals_finite_differences(case):
    model, data, weights = case
    expected = numeric_gradient(lambda w: cross_entropy(logits_of(w, data[0]), data[1]), weights)
    assert_close(derivatives_of(model).gradient(Batches(data)), expected)


def test_gradient_at_a_mask_is_dense_and_at_the_masked_weights(case):
    model, data, weights = case
    generator = np.random.default_rng(2)
    derivatives = derivatives_of(model)
    masks = {path: generator.random(w.shape) < 0.5 for path, w in derivatives.weights().items()}
    masked = [w * m for w, m in zip(weights, masks.values(), strict=True)]
    expected = numeric_gradient(lambda w: cross_entropy(logits_of(w, data[0]), data[1]), masked)
    got = derivatives.gradient(Batches(data), masks)
    assert_close(got, expected)
    assert all(g[~masks[path]].any() for path, g in got.items())


@pytest.mark.parametrize("temperature", [1.0, 3.0, 200.0])
def test_hessian_gradient_equals_finite_differences_of_the_gradient_norm(case, temperature):
    # d/dw (1/2 |g|^2) = Hg, with g itself taken by finite differences: first from NumPy's loss, then by w.
    model, data, weights = case

    def loss(w):
        return cross_entropy(logits_of(w, data[0]) / temperature, data[1]) * temperature

    def half_norm(w):
        return 0.5 * sum((g**2).sum() for g in numeric_gradient(loss, w, step=1e-4))

    expected = [g / temperature**2 for g in numeric_gradient(half_norm, weights, step=1e-3)]
    got = derivatives_of(model).hessian_gradient(Batches(data), temperature=temperature)
    assert_close(got, expected, tolerance=2e-4)


def test_hessian_gradient_of_a_linear_softmax_is_its_closed_form():
    model = helpers.float64_mlp(units=(4, 3))
    generator = np.random.default_rng(5)
    x, y = generator.standard_normal((6, 4)), generator.integers(0, 3, 6)
    (weight,) = (np.asarray(v) for v in find_prunable(model).prunable.values())
    p = np.exp(x @ weight)
    p /= p.sum(1, keepdims=True)
    gradient = x.T @ (p - np.eye(3)[y]) / 6
    direction = x @ gradient  # how the logits move along g
    expected = x.T @ (p * (direction - (p * direction).sum(1, keepdims=True))) / 6
    assert_close(derivatives_of(model).gradient(Batches((x, y))), [gradient])
    assert_close(derivatives_of(model).hessian_gradient(Batches((x, y))), [expected])


@pytest.mark.parametrize("kind", ["gradient", "hessian_gradient"])
def test_several_batches_of_any_size_equal_one_big_batch(case, kind):
    model, (x, y), _ = case
    parts = [(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])]
    one = getattr(derivatives_of(model), kind)(Batches((x, y)))
    many = getattr(derivatives_of(model), kind)(Batches(parts))
    assert_close(many, one.values())


def test_a_sample_weight_weighs(case):
    model, (x, y), _ = case
    zero = np.arange(9) < 4
    weighted = derivatives_of(model).gradient(Batches((x, y, zero.astype(float))))
    half = derivatives_of(model).gradient(Batches((x[:4], y[:4])))
    assert_close(weighted, [g * 4 / 9 for g in half.values()])


@pytest.mark.parametrize("kind", ["gradient", "hessian_gradient"])
def test_a_softmax_at_the_end_gives_what_logits_give(kind):
    softmax, logits = helpers.build("mlp_softmax"), helpers.build("mlp")
    logits.set_weights(softmax.get_weights())
    options = {"temperature": 200.0} if kind == "hessian_gradient" else {}
    a = getattr(derivatives_of(softmax), kind)(Batches(helpers.batch()), **options)
    b = getattr(derivatives_of(logits), kind)(Batches(helpers.batch()), **options)
    for one, other in zip(a.values(), b.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-9)


def test_probabilities_that_hide_their_softmax_give_what_logits_give():
    class Softmax(keras.Layer):
        def call(self, z):
            e = keras.ops.exp(z)
            return e / keras.ops.sum(e, axis=-1, keepdims=True)

    logits = helpers.build("mlp")
    hidden = keras.Sequential([*helpers.mlp().layers, Softmax()])
    hidden.build((None, 6, 6, 1))
    hidden.set_weights(logits.get_weights())
    hidden.compile("sgd", "sparse_categorical_crossentropy")
    a = derivatives_of(hidden).hessian_gradient(Batches(helpers.batch()), temperature=50.0)
    b = derivatives_of(logits).hessian_gradient(Batches(helpers.batch()), temperature=50.0)
    for one, other in zip(a.values(), b.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-3, atol=np.abs(other).max() * 1e-4)


def test_a_saturated_softmax_still_has_its_gradient():
    # Keras clips probabilities at 1e-7, where a softmax this sure has no gradient left.
    model = helpers.build("mlp_softmax")
    kernel = model.get_layer("head").kernel
    kernel.assign(kernel * 200.0)
    assert all(g.any() for g in derivatives_of(model).gradient(Batches(helpers.batch())).values())


@pytest.mark.parametrize(
    ("last", "loss", "labels"),
    [
        ("sigmoid", "binary_crossentropy", (0, 1)),
        (None, keras.losses.BinaryCrossentropy(from_logits=True), (0, 1)),
        ("softmax", "categorical_crossentropy", None),
        (None, "mse", (0, 1)),
        (None, lambda y, z: keras.ops.square(y - z), (0, 1)),
    ],
)
def test_other_losses_equal_a_plain_gradient_tape(last, loss, labels):
    model = keras.Sequential([keras.Input((5,)), layers.Dense(6, "tanh"), layers.Dense(3, last)])
    model.compile("sgd", loss)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((8, 5)).astype(np.float32)
    y = (
        np.eye(3, dtype=np.float32)[generator.integers(0, 3, 8)]
        if labels is None
        else generator.integers(0, 2, (8, 3)).astype(np.float32)
    )
    variables = list(find_prunable(model).prunable.values())
    with tf.GradientTape() as tape:
        value = model.compute_loss(x, y, model(x, training=True))
    expected = tape.gradient(value, [v.value for v in variables])
    for a, b in zip(derivatives_of(model).gradient(Batches((x, y))).values(), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", ["float32", "int32"])
@pytest.mark.parametrize("given", ["compiled", "given"])
def test_a_function_as_loss_gets_the_casts_and_ranks_that_fit_gives_it(labels, given):
    def square(y, z):
        return keras.ops.square(y - z)

    model = keras.Sequential([keras.Input((5,)), layers.Dense(1)])
    model.compile("sgd", square if given == "compiled" else "mae")
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((8, 5)).astype(np.float32), generator.integers(0, 5, 8).astype(labels)
    kernel = np.asarray(model.layers[0].kernel)
    expected = 2 * x.T @ (x @ kernel - y[:, None]) / 8
    (got,) = derivatives_of(model, None if given == "compiled" else square).gradient(Batches((x, y))).values()
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@pytest.mark.parametrize("wrap", [list, lambda losses: {"head": losses[0]}], ids=["list", "dict"])
def test_one_loss_in_a_list_or_dict_is_that_loss(wrap):
    model, plain = helpers.build("residual"), helpers.build("residual")
    model.compile("sgd", wrap([keras.losses.SparseCategoricalCrossentropy(from_logits=True)]))
    a, b = (derivatives_of(m).hessian_gradient(Batches(helpers.batch()), temperature=200.0) for m in (model, plain))
    for one, other in zip(a.values(), b.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_loss_whose_kind_keras_finds_out_is_taken_as_keras_takes_it():
    model, plain = helpers.build("mlp_softmax"), helpers.build("mlp_softmax")
    model.compile("sgd", "crossentropy")
    a, b = (derivatives_of(m).gradient(Batches(helpers.batch())) for m in (model, plain))
    for one, other in zip(a.values(), b.values(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)
    hot = (derivatives_of(m).hessian_gradient(Batches(helpers.batch()), temperature=200.0) for m in (model, plain))
    for one, other in zip(*(values.values() for values in hot), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * np.abs(other).max())


def test_regularizers_are_not_part_of_the_score():
    def build(regularizer):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        hidden = layers.Dense(6, "tanh", kernel_regularizer=regularizer)(inputs)
        model = keras.Model(inputs, [layers.Dense(2)(hidden), layers.Dense(1)(hidden)])
        model.compile("sgd", ["mse", "mae"])
        return model

    x = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    data = (x, [x[:, :2], x[:, :1]])
    plain, regularized = (derivatives_of(build(r)).gradient(Batches(data)) for r in (None, "l2"))
    for a, b in zip(plain.values(), regularized.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_a_loss_method_of_the_models_own_is_used():
    class Own(helpers.Subclassed):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return 3.0 * keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True))

    plain = helpers.build("subclassed")
    own = Own()
    own(np.zeros((1, 6, 6, 1), np.float32))
    own.set_weights(plain.get_weights())
    own.compile("sgd")
    a, b = (derivatives_of(model).gradient(Batches(helpers.batch())) for model in (own, plain))
    for one, other in zip(a.values(), b.values(), strict=True):
        np.testing.assert_allclose(one, 3 * other, rtol=1e-4, atol=1e-7)


def test_dropout_is_off_and_batch_normalization_uses_the_batch():
    model = helpers.build("conv_bn")
    without = keras.Sequential(
        [keras.Input((6, 6, 1)), *(layer for layer in model.layers if not isinstance(layer, layers.Dropout))]
    )
    without.compile("sgd", model.loss)
    data = Batches(helpers.batch())
    got = derivatives_of(model).gradient(data)
    expected = derivatives_of(without).gradient(data)
    for a, b in zip(got.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.get_layer(index=3).rate == 0.5
    inference = derivatives_of(model).gradient(data, training=False)
    assert not np.allclose(next(iter(inference.values())), next(iter(got.values())))


@pytest.mark.parametrize("name", helpers.MODELS)
def test_the_model_stays_exactly_as_it_was(name):
    model = helpers.build(name)
    before = helpers.state(model)
    derivatives = derivatives_of(model)
    derivatives.gradient(Batches(helpers.batch()))
    derivatives.hessian_gradient(Batches(helpers.batch()), temperature=200.0)
    derivatives.synaptic_flow(example=helpers.batch()[0])
    helpers.assert_same_state(before, model)


@pytest.mark.parametrize(("kind", "options"), [("gradient", {}), ("hessian_gradient", {"temperature": 200.0})])
def test_float16_does_not_underflow(kind, options):
    results = []
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        model = helpers.build("conv_bn")
        values = getattr(derivatives_of(model), kind)(Batches(helpers.batch()), **options)
        results.append(np.concatenate([v.ravel() for v in values.values()]))
    assert np.corrcoef(*results)[0, 1] > 0.999
    np.testing.assert_allclose(np.linalg.norm(results[1]), np.linalg.norm(results[0]), rtol=0.02)


def test_nothing_is_traced_twice():
    model = helpers.build("conv_bn")
    derivatives = derivatives_of(model)
    masks = {path: np.ones(w.shape, bool) for path, w in derivatives.weights().items()}
    for seed in range(4):
        derivatives.gradient(Batches(helpers.batch(seed=seed)), masks)
    (function,) = derivatives._functions.values()
    assert function.experimental_get_tracing_count() == 1


def test_synaptic_flow_of_a_linear_chain_is_the_product_of_absolute_weights():
    model = helpers.float64_mlp(activation="relu", units=(3, 4, 2))
    a, b = (np.abs(np.asarray(v)) for v in find_prunable(model).prunable.values())
    got = derivatives_of(model).synaptic_flow()
    assert_close(got, [np.outer(np.ones(3), b.sum(1)), np.outer(a.sum(0), np.ones(2))])


@pytest.mark.parametrize("last", ["softmax", "sigmoid"])
def test_synaptic_flow_goes_through_to_the_logits(last):
    model = keras.Sequential([keras.Input((3,)), layers.Dense(4, last, use_bias=False)])
    np.testing.assert_allclose(next(iter(derivatives_of(model).synaptic_flow().values())), np.ones((3, 4)))


@pytest.mark.parametrize("factor", [1e6, 1e-6, 1e12, 1e-12])
def test_synaptic_flow_beyond_float32_keeps_its_ranking_and_its_conservation(factor):
    def network(scale):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        chain = [layers.Dense(6, "relu") for _ in range(8)]
        model = keras.Sequential([keras.Input((6,)), *chain])
        for i, layer in enumerate(chain):
            layer.kernel.assign(layer.kernel * scale)
            if i < 3:  # an offset that scales as what it is added to
                layer.bias.assign(np.full(6, 0.1 * scale ** (i + 1)))
        return derivatives_of(model)

    plain, extreme = network(1.0), network(factor)
    one, other = plain.synaptic_flow(), extreme.synaptic_flow()
    ratios = []
    for path, weight in plain.weights().items():
        a, b = np.abs(weight * one[path]), np.abs(weight * other[path])
        ratios.append(b.sum(dtype=np.float64) / a.sum(dtype=np.float64))
        np.testing.assert_allclose(b / b.sum(dtype=np.float64), a / a.sum(dtype=np.float64), rtol=1e-3)
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-3)


def test_synaptic_flow_asks_for_a_shape_it_cannot_know():
    with pytest.raises(ValueError, match=r"does not say of what shape.*Pass data"):
        derivatives_of(helpers.build("subclassed")).synaptic_flow()


def test_a_temperature_needs_a_cross_entropy():
    model = helpers.build("mlp")
    with pytest.raises(ValueError, match=r"temperature of 200 divides the logits.*temperature=1\.0"):
        derivatives_of(model, "mse").hessian_gradient(Batches(helpers.batch()), temperature=200.0)


def test_a_generator_cannot_be_read_twice_and_says_so():
    model = helpers.build("mlp")

    def score(criterion, num_batches):
        return tf_prune.score(model, criterion, (helpers.batch(seed=i) for i in range(num_batches)))

    probes = tf_prune.OptimalBrainDamage
    for criterion, times in ((tf_prune.GraSP(), "twice"), (probes(num_probes=2), "2 times")):
        with pytest.raises(ValueError, match=f"reads the data {times}, but data is a generator"):
            score(criterion, 2)
    for criterion, num_batches in ((tf_prune.GraSP(), 1), (probes(num_probes=2), 1), (probes(num_probes=1), 3)):
        assert score(criterion, num_batches)


def test_a_layer_without_gradient_scores_0_and_is_named():
    inputs = keras.Input((6, 6, 1))
    x = layers.Flatten()(inputs)
    model = keras.Model(inputs, layers.Dense(4, name="used")(x))
    stopped = layers.Dense(4, name="stopped")
    lost = layers.Lambda(lambda t: keras.ops.stop_gradient(t))(stopped(x))
    model = keras.Model(inputs, layers.Add()([model(inputs), lost]))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.warns(UserWarning, match=r"does not depend on stopped/kernel\."):
        gradients = derivatives_of(model).gradient(Batches(helpers.batch()))
    assert [path for path, gradient in gradients.items() if not gradient.any()] == ["stopped/kernel"]


@pytest.mark.parametrize(
    ("y", "loss"),
    [
        (np.full(16, 7), None),
        (np.full(16, -1), None),
        (np.zeros((16, 3)), None),
        (np.zeros(16), keras.losses.CategoricalCrossentropy(from_logits=True)),
    ],
)
def test_labels_that_do_not_fit_are_described(y, loss):
    model = helpers.build("mlp")
    before = helpers.state(model)
    with pytest.raises(
        ValueError, match=r"cannot be computed on this batch: x is float32\[16, 6, 6, 1\].*y is .*the loss is"
    ):
        derivatives_of(model, loss).gradient(Batches((helpers.batch()[0], y)))
    helpers.assert_same_state(before, model)


def test_a_model_without_loss_says_how_to_give_one():
    model = helpers.mlp()
    with pytest.raises(ValueError, match=r"is not compiled and no loss was given"):
        derivatives_of(model).gradient(Batches(helpers.batch()))
    model.compile("sgd")
    with pytest.raises(ValueError, match=r"was compiled without a loss"):
        derivatives_of(model).gradient(Batches(helpers.batch()))
