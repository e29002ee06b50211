import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_prune
from tests import helpers


def by_differences(function, x, step=1e-5):
    """The Jacobian of a function of one example, by central differences in float64: (outputs, inputs)."""
    moves = step * np.eye(x.size).reshape(-1, *x.shape)
    values = np.asarray(function(np.concatenate([x + moves, x - moves])), np.float64).reshape(2, x.size, -1)
    return (values[0] - values[1]).T / (2 * step)


def dense(units, activation=None, name=None):
    return layers.Dense(units, activation, name=name, bias_initializer="random_normal")


def mlp(activation, *units):
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    hidden = [dense(n, activation) for n in units[1:-1]]
    return keras.Sequential([keras.Input((units[0],)), *hidden, dense(units[-1])])


def in_numpy(model, x, derivatives):
    """The Jacobian of an MLP as the product of D W, in float64."""
    jacobian, h = np.eye(len(x)), x
    for layer in model.layers:
        kernel, bias = (np.asarray(w, np.float64) for w in layer.weights)
        h = h @ kernel + bias
        slope = derivatives(h) if layer is not model.layers[-1] else np.ones_like(h)
        jacobian = (kernel * slope).T @ jacobian
        h = np.tanh(h) if derivatives is of_tanh and layer is not model.layers[-1] else h
        h = np.maximum(h, 0) if derivatives is of_relu and layer is not model.layers[-1] else h
    return jacobian


def of_tanh(h):
    return 1 - np.tanh(h) ** 2


def of_relu(h):
    return (h > 0).astype(np.float64)


@pytest.mark.parametrize(("activation", "derivatives"), [("tanh", of_tanh), ("relu", of_relu)])
@pytest.mark.parametrize("units", [(9, 8, 7, 4), (4, 8, 9)])
def test_the_spectrum_is_that_of_the_full_jacobian(activation, derivatives, units):
    model = mlp(activation, *units)
    x = np.random.default_rng(0).standard_normal((6, units[0]))
    spectrum = tf_prune.jacobian_spectrum(model, x, verbose=0)
    expected = [np.linalg.svd(in_numpy(model, one, derivatives), compute_uv=False) for one in x]
    np.testing.assert_allclose(spectrum.values, expected, rtol=1e-6, atol=1e-12)
    assert spectrum.shape == (units[-1], units[0])


@pytest.mark.parametrize("name", helpers.MODELS)
def test_spectra_of_every_model_agree_with_finite_differences(name):
    model = helpers.build(name)
    x, _ = helpers.batch(2)
    if name in helpers.ENDS_IN_SOFTMAX:  # the softmax of the logits is what the model gives
        spectrum = tf_prune.jacobian_spectrum(model, x, verbose=0)
        model.layers[-1].activation = keras.activations.linear
    else:
        spectrum = tf_prune.jacobian_spectrum(model, x, verbose=0)
    if name == "subclassed":  # the same network as the first one
        same = helpers.build("mlp")
        same.set_weights(model.get_weights())
        np.testing.assert_array_equal(spectrum.values, tf_prune.jacobian_spectrum(same, x, verbose=0).values)
    else:
        keras.config.set_dtype_policy("float64")
        try:
            double = type(model).from_config(_in_float64(model.get_config()))
        finally:
            keras.config.set_dtype_policy("float32")
        double.set_weights([np.asarray(w, np.float64) for w in model.get_weights()])
        differences = [by_differences(lambda x: double(x, training=False), one.astype(np.float64)) for one in x]
        expected = np.linalg.svd(np.stack(differences), compute_uv=False)
        np.testing.assert_allclose(spectrum.values, expected, rtol=1e-4, atol=1e-6 * expected.max())
    assert spectrum.values.shape == (2, 4)


def _in_float64(config):
    if isinstance(config, dict):
        return {key: _in_float64(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return type(config)(_in_float64(value) for value in config)
    return "float64" if config == "float32" else config


@pytest.mark.parametrize("number", [1e4, 1e10, 1e12])
def test_large_condition_numbers_of_analytic_networks_are_true(number):
    generator = np.random.default_rng(0)
    left, right = (np.linalg.qr(generator.standard_normal((n, n)))[0] for n in (6, 9))
    values = np.geomspace(1, 1 / number, 6)
    # Two exact factors in float32: powers of 2 along a diagonal, between rotations that only permute.
    order = generator.permutation(9)
    powers = 2.0 ** np.round(np.log2(values))
    first = np.eye(9)[order] * (2.0 ** generator.integers(-2, 3, 9))
    second = np.linalg.pinv(first) @ np.eye(9, 6) * powers
    model = keras.Sequential([keras.Input((9,)), layers.Dense(9, use_bias=False), layers.Dense(6, use_bias=False)])
    model.set_weights([first, second])
    spectrum = tf_prune.jacobian_spectrum(model, generator.standard_normal((3, 9)), verbose=0)
    np.testing.assert_allclose(spectrum.values, np.broadcast_to(np.sort(powers)[::-1], (3, 6)), rtol=1e-9)
    assert spectrum.pooled_condition_number == pytest.approx(powers.max() / powers.min(), rel=1e-9)
    # And one that is not diagonal, in a layer that holds float64.
    model = keras.Sequential([keras.Input((9,), dtype="float64"), layers.Dense(6, use_bias=False, dtype="float64")])
    model.set_weights([(right[:, :6] * values) @ left.T])
    spectrum = tf_prune.jacobian_spectrum(model, generator.standard_normal((3, 9)), verbose=0)
    assert spectrum.pooled_condition_number == pytest.approx(number, rel=0.01)


def test_rank_deficiency_is_reported_and_not_a_number():
    model = mlp("relu", 8, 6, 3)
    kernel, _ = model.layers[0].get_weights()
    model.layers[0].set_weights([kernel, np.array([-1e3, -1e3, -1e3, -1e3, 1e3, 1e3], np.float32)])  # two units live
    spectrum = tf_prune.jacobian_spectrum(model, np.random.default_rng(0).standard_normal((5, 8)), verbose=0)
    assert (spectrum.values[:, 2] == 0).all()
    assert (spectrum.values[:, :2] > 0).all()
    assert spectrum.num_rank_deficient == 5
    assert spectrum.pooled_condition_number == spectrum.condition_number_of_means == np.inf
    assert "5 examples are rank deficient" in str(spectrum)


def test_summaries_are_those_of_numpy():
    values = np.array([[4.0, 2.0], [3.0, 0.0], [8.0, 1.0]])
    spectrum = tf_prune.Spectrum(values, (2, 5))
    assert (spectrum.mean, spectrum.std) == (values.mean(), values.std())
    assert (spectrum.largest, spectrum.smallest, spectrum.num_rank_deficient) == (8.0, 0.0, 1)
    np.testing.assert_array_equal(spectrum.condition_numbers, [2.0, np.inf, 8.0])
    assert (spectrum.mean_condition_number, spectrum.pooled_condition_number) == (np.inf, np.inf)
    assert spectrum.condition_number_of_means == 15 / 3
    assert spectrum.isometry_gap == pytest.approx(np.sqrt(np.mean((values**2 - 1) ** 2)))
    matrix = np.random.default_rng(0).standard_normal((4, 4))
    one = tf_prune.Spectrum(np.linalg.svd(matrix, compute_uv=False)[None], (4, 4))
    assert one.isometry_gap == pytest.approx(np.linalg.norm(matrix.T @ matrix - np.eye(4)) / 2)


def test_data_is_streamed_and_every_form_of_it_gives_the_same():
    model = mlp("tanh", 5, 6, 3)
    x = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32)
    forms = [
        x,
        (x, np.zeros(7)),
        [(x[:3], np.zeros(3)), (x[3:], np.zeros(4))],
        ((x[i : i + 1], np.zeros(1)) for i in range(7)),
    ]
    first, *others = [tf_prune.jacobian_spectrum(model, form, verbose=0).values for form in forms]
    assert first.shape == (7, 3)
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-12)


def test_large_batches_are_cut(monkeypatch):
    model = mlp("tanh", 5, 6, 3)
    x = np.random.default_rng(0).standard_normal((10, 5))
    whole = tf_prune.jacobian_spectrum(model, x, verbose=0).values
    monkeypatch.setattr("tf_prune.jacobian._MOST_ENTRIES", 3 * 15)
    np.testing.assert_allclose(tf_prune.jacobian_spectrum(model, x, verbose=0).values, whole, rtol=1e-12)


@pytest.mark.parametrize("name", ["mlp_softmax", "conv_bn", "nested", "recurrent"])
def test_nothing_of_the_model_changes_and_it_computes_as_before(name):
    model = helpers.build(name)
    data = helpers.batch()
    before, prediction = helpers.state(model), model.predict(data[0], verbose=0)
    tf_prune.jacobian_spectrum(model, data, verbose=0)
    tf_prune.layerwise_spectra(model, (data[0][:2], data[1][:2]), verbose=0)
    helpers.assert_same_state(before, model)
    np.testing.assert_array_equal(model.predict(data[0], verbose=0), prediction)
    assert all("call" not in layer.__dict__ for layer in model._flatten_layers())
    assert {layer.dtype_policy.name for layer in model._flatten_layers()} == {"float32"}
    assert keras.config.dtype_policy().name == "float32"


def test_a_model_of_low_precision_is_measured_in_float64():
    keras.utils.set_random_seed(0)
    half = keras.Sequential([keras.Input((6,)), layers.Dense(5, "tanh", dtype="mixed_float16"), layers.Dense(3)])
    full = keras.Sequential([keras.Input((6,)), layers.Dense(5, "tanh"), layers.Dense(3)])
    full.set_weights(half.get_weights())
    x = np.random.default_rng(0).standard_normal((4, 6))
    one, other = (tf_prune.jacobian_spectrum(model, x, verbose=0).values for model in (half, full))
    np.testing.assert_allclose(one, other, rtol=1e-12)


def test_batch_normalization_is_that_of_inference_and_dropout_is_off():
    model = helpers.build("conv_bn")
    norm = model.get_layer("norm")
    norm.set_weights([2 * np.ones(6), np.ones(6), np.full(6, 0.5), np.full(6, 4.0)])
    x, _ = helpers.batch(3)
    alone = tf_prune.jacobian_spectrum(model, x[:1], verbose=0).values
    together = tf_prune.jacobian_spectrum(model, x, verbose=0).values
    np.testing.assert_allclose(together[:1], alone, rtol=1e-9)


@pytest.mark.parametrize("wrap", [False, True])
def test_masks_count(wrap):
    model = helpers.build("mlp")
    masks = tf_prune.prune(model, "random", 0.7, verbose=0).masks
    x, _ = helpers.batch(3)
    plain = keras.models.clone_model(model)
    plain.set_weights([w * masks.get(v.path, 1) for v, w in zip(model.variables, model.get_weights(), strict=True)])
    measured = tf_prune.jacobian_spectrum(tf_prune.wrap(model) if wrap else model, x, verbose=0)
    np.testing.assert_allclose(measured.values, tf_prune.jacobian_spectrum(plain, x, verbose=0).values, rtol=1e-9)


# -- from one layer to another -------------------------------------------------------------------------


def test_layerwise_jacobians_multiply_to_the_whole_one():
    model = mlp("tanh", 6, 6, 6, 6)
    x = np.random.default_rng(0).standard_normal((3, 6))
    spectra = tf_prune.layerwise_spectra(model, x, verbose=0)
    assert list(spectra) == [layer.name for layer in model.layers]
    whole = tf_prune.jacobian_spectrum(model, x, verbose=0)
    # Of square matrices the determinants multiply.
    products = np.prod([spectrum.values.prod(1) for spectrum in spectra.values()], axis=0)
    np.testing.assert_allclose(products, whole.values.prod(1), rtol=1e-9)


def test_layerwise_jacobians_are_d_times_w():
    model = mlp("tanh", 5, 7, 3)
    x = np.random.default_rng(0).standard_normal((2, 5))
    first, last = tf_prune.layerwise_spectra(model, x, verbose=0).values()
    kernel, bias = (np.asarray(w, np.float64) for w in model.layers[0].weights)
    expected = [np.linalg.svd(kernel * of_tanh(one @ kernel + bias), compute_uv=False) for one in x]
    np.testing.assert_allclose(first.values, expected, rtol=1e-9)
    np.testing.assert_allclose(last.values[0], np.linalg.svd(model.layers[1].get_weights()[0].astype(float))[1])


def test_activation_and_normalization_behind_a_layer_belong_to_it():
    model = helpers.build("conv_bn")
    spectra = tf_prune.layerwise_spectra(model, helpers.batch(2)[0], verbose=0)
    assert [(name, s.shape, s.end) for name, s in spectra.items()] == [
        ("conv", (96, 36), "the input of head"),
        ("head", (4, 96), "logits"),
    ]


def test_a_layer_beside_a_shortcut_is_measured_to_its_own_output():
    inputs = keras.Input((5,))
    one, other = layers.Dense(4, name="one")(inputs), layers.Dense(4, name="other")(inputs)
    model = keras.Model(inputs, layers.Dense(3, name="head")(layers.Add()([one, other])))
    spectra = tf_prune.layerwise_spectra(model, np.ones((2, 5)), verbose=0)
    ends = {name: spectrum.end for name, spectrum in spectra.items()}
    assert ends == {"one": "its own output", "other": "the input of head", "head": "logits"}


def test_a_layer_that_is_called_twice_is_there_twice():
    shared = layers.Dense(5, "tanh", name="shared")
    model = keras.Sequential([keras.Input((5,)), shared, shared, layers.Dense(2, name="head")])
    spectra = tf_prune.layerwise_spectra(model, np.ones((2, 5)), verbose=0)
    assert list(spectra) == ["shared", "shared@2", "head"]
    with pytest.raises(ValueError, match="'shared' is called 2 times when the model is called"):
        tf_prune.jacobian_spectrum(model, np.ones((2, 5)), start="shared", verbose=0)


def test_a_softmax_head_is_measured_to_its_logits_layer_by_layer_too():
    model = helpers.build("mlp_softmax")
    head = tf_prune.layerwise_spectra(model, helpers.batch(2)[0], verbose=0)["head"]
    expected = np.linalg.svd(model.get_layer("head").get_weights()[0].astype(float))[1]
    assert head.end == "logits"
    np.testing.assert_allclose(head.values, np.broadcast_to(expected, (2, 4)), rtol=1e-9)


def test_all_that_a_layer_reads_counts_and_nothing_twice():
    query, value, mask = keras.Input((3, 4)), keras.Input((5, 4)), keras.Input((3, 5), dtype="bool")
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    model = keras.Model([query, value, mask], attention(query=query, value=value, attention_mask=mask))
    generator = np.random.default_rng(0)
    x = [generator.standard_normal((2, 3, 4)), generator.standard_normal((2, 5, 4)), np.ones((2, 3, 5), bool)]
    spectrum = tf_prune.layerwise_spectra(model, (tuple(x), None), verbose=0)["attention"]
    assert spectrum.shape == (12, 12 + 20)
    assert spectrum.mean > 0
    same = keras.Sequential([keras.Input((3, 4)), layers.GRU(4, return_sequences=True, name="gru")])
    assert tf_prune.layerwise_spectra(same, x[0], verbose=0)["gru"].shape == (12, 12)


def test_layers_with_several_outputs_are_measured_and_layers_can_be_left_out():
    inputs = keras.Input((5, 3))
    sequence, state = layers.GRU(4, return_state=True, return_sequences=True, name="encoder")(inputs)
    outputs = layers.Dense(2, name="head")(layers.GRU(4, name="decoder")(sequence, initial_state=state))
    model = keras.Model(inputs, outputs)
    x = np.random.default_rng(0).standard_normal((2, 5, 3))
    shapes = {name: s.shape for name, s in tf_prune.layerwise_spectra(model, x, verbose=0).items()}
    assert shapes == {"encoder": (24, 15), "decoder": (4, 24), "head": (2, 4)}
    without = tf_prune.layerwise_spectra(model, x, filters="coder", verbose=0)
    assert (without["decoder"].shape, without["decoder"].end) == ((2, 24), "logits")
    assert tf_prune.jacobian_spectrum(model, x, start="encoder", verbose=0).shape == (2, 24)


def test_layers_of_a_wrapped_model_are_named_as_before():
    model = helpers.build("mlp")
    x, _ = helpers.batch(2)
    one, other = (
        tf_prune.jacobian_spectrum(m, x, start="hidden", end="head", verbose=0) for m in (model, tf_prune.wrap(model))
    )
    np.testing.assert_allclose(one.values, other.values, rtol=1e-12)


def test_inputs_alone_come_in_every_form():
    model = mlp("tanh", 5, 6, 3)
    x = np.random.default_rng(0).integers(0, 9, (6, 5))
    expected = tf_prune.jacobian_spectrum(model, x.astype(np.float64), verbose=0).values
    for data in (x, x.astype(np.uint8), [x[:3], x[3:]], tf.data.Dataset.from_tensor_slices(x).batch(4)):
        values = tf_prune.jacobian_spectrum(model, data, verbose=0).values
        np.testing.assert_allclose(values, expected, rtol=1e-8)


def test_examples_of_several_shapes_are_refused():
    model = keras.Sequential([keras.Input((None, 4)), layers.GRU(3, return_sequences=True)])
    with pytest.raises(ValueError, match=r"have one shape. Pad the examples"):
        tf_prune.jacobian_spectrum(model, [np.ones((2, 5, 4)), np.ones((2, 3, 4))], verbose=0)


class Counts(layers.Layer):
    def __init__(self):
        super().__init__()
        self.count = tf.Variable(0.0)

    def call(self, x):
        self.count.assign_add(1.0)
        return x


class Noisy(layers.Layer):
    def call(self, x):
        return x + tf.random.normal(tf.shape(x), dtype=x.dtype)


def test_any_two_layers_can_be_named():
    model = mlp("tanh", 4, 5, 6, 3)
    a, b, _ = (layer.name for layer in model.layers)
    x = np.random.default_rng(0).standard_normal((2, 4))
    spectrum = tf_prune.jacobian_spectrum(model, x, start=a, end=b, verbose=0)
    assert (spectrum.shape, spectrum.start, spectrum.end) == ((6, 5), a, b)
    layerwise = tf_prune.layerwise_spectra(model, x, verbose=0)[b]
    np.testing.assert_allclose(spectrum.values, layerwise.values, rtol=1e-12)


def test_integers_are_derived_by_behind_their_lookup():
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(10, 4, name="table"), layers.Flatten(), layers.Dense(3)]
    )
    x = np.random.default_rng(0).integers(0, 10, (5, 6))
    with pytest.raises(
        ValueError, match=r"takes integers or booleans, and nothing can be derived by them.*start=its name"
    ):
        tf_prune.jacobian_spectrum(model, x, verbose=0)
    spectrum = tf_prune.jacobian_spectrum(model, x, start="table", verbose=0)
    assert spectrum.shape == (3, 24)
    np.testing.assert_allclose(
        spectrum.values[0], np.linalg.svd(model.layers[-1].get_weights()[0].astype(float))[1], rtol=1e-9
    )
    assert list(tf_prune.layerwise_spectra(model, x, verbose=0)) == [model.layers[-1].name]


def test_several_inputs_are_one_long_vector():
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    model = keras.Model({"a": a, "b": b}, layers.Dense(4, use_bias=False)(layers.Concatenate()([a, b])))
    x = {"a": np.ones((2, 3)), "b": np.ones((2, 2))}
    spectrum = tf_prune.jacobian_spectrum(model, (x, np.zeros(2)), verbose=0)
    assert spectrum.shape == (4, 5)
    np.testing.assert_allclose(spectrum.values[0], np.linalg.svd(model.get_weights()[0].astype(float))[1], rtol=1e-9)


def test_a_sequence_of_outputs_is_one_long_vector():
    model = keras.Sequential([keras.Input((5, 3)), layers.GRU(2, return_sequences=True)])
    spectrum = tf_prune.jacobian_spectrum(model, np.ones((2, 5, 3)), verbose=0)
    assert (spectrum.shape, spectrum.values.shape) == ((10, 15), (2, 10))


def test_a_model_of_one_batch_size_is_fed_with_it():
    model = keras.Sequential([keras.Input(batch_shape=(4, 5)), layers.Dense(3)])
    assert tf_prune.jacobian_spectrum(model, np.ones((6, 5)), verbose=0).values.shape == (6, 3)


class Casts(layers.Layer):
    def call(self, x):
        return keras.ops.cast(x, "float32")


def two_outputs():
    inputs = keras.Input((4,))
    return keras.Model(inputs, [layers.Dense(2, name="a")(inputs), layers.Dense(3, name="b")(inputs)])


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (two_outputs, {}, "has 2 outputs, and a Jacobian is of one. Name the layer that makes it by end="),
        (two_outputs, {"start": "a", "end": "b"}, "b does not depend on a.*Choose a start that comes before"),
        (two_outputs, {"end": "c"}, "has no layers called 'c'. Start and end name one of: .*a, b"),
        (lambda: keras.Sequential([keras.Input((4,)), layers.Dense(3), Casts()]), {}, r"\(Cast\) computes in float"),
        (
            lambda: keras.Sequential([keras.Input((4,)), Casts(), layers.Dense(3)]),
            {},
            "computes in float32, and what comes out of it is not exact enough",
        ),
        (lambda: keras.Sequential([keras.Input((4,)), Counts(), layers.Dense(3)]), {}, "writes a variable"),
        (lambda: keras.Sequential([keras.Input((4,)), Noisy(), layers.Dense(3)]), {}, "draws random numbers"),
        (
            lambda: keras.Sequential([keras.Input((9,)), layers.Dense(3)]),
            {},
            "Check that x fits the model|incompatible",
        ),
    ],
)
def test_what_has_no_jacobian_is_refused_with_what_to_do(model, options, message):
    keras.utils.clear_session()
    model = model()
    before = helpers.state(model)
    with pytest.raises(ValueError, match=message):
        tf_prune.jacobian_spectrum(model, np.ones((2, 4), np.float32), verbose=0, **options)
    helpers.assert_same_state(before, model)
    assert {layer.dtype_policy.name for layer in model._flatten_layers()} == {"float32"}


def test_a_signal_that_overflows_is_named():
    deep = keras.Sequential([keras.Input((4,)), *[layers.Dense(4) for _ in range(9)]])
    deep.set_weights([np.full(w.shape, 1e37) for w in deep.get_weights()])
    with pytest.raises(ValueError, match=r"is not finite at 2 of 2 examples: the signal of .* overflows"):
        tf_prune.jacobian_spectrum(deep, np.ones((2, 4)), verbose=0)


def test_a_jacobian_that_is_too_large_says_so(monkeypatch):
    monkeypatch.setattr("tf_prune.jacobian._MOST_OF_ONE", 19)
    with pytest.raises(ValueError, match="is 4 x 5 for each example, which is too large to decompose"):
        tf_prune.jacobian_spectrum(mlp("tanh", 5, 4), np.ones((2, 5)), verbose=0)


def test_progress_is_shown_by_examples(capsys):
    tf_prune.jacobian_spectrum(mlp("tanh", 4, 3), np.ones((5, 4)))
    assert "5/5" in capsys.readouterr().out


def test_an_interrupted_measurement_leaves_the_model_as_it_was(monkeypatch):
    model = helpers.build("mlp")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("tf_prune.jacobian.singular_values", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tf_prune.jacobian_spectrum(model, helpers.batch(), verbose=0)
    assert model.layers[0].compute_dtype == "float32"
    assert "call" not in model.get_layer("head").__dict__
