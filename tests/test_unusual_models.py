"""Models as people have them: without a `call`, with outputs of any kind, and whatever policies they compute in."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_prune
from tests import helpers
from tf_prune.gradients import Derivatives
from tf_prune.precision import computing_in
from tf_prune.prunable import find_prunable

DATA = np.random.default_rng(0).standard_normal((16, 8)).astype("float32"), np.arange(16) % 4


class Gan(keras.Model):
    """Trains by calling its parts; never called itself, it is never built."""

    def __init__(self):
        super().__init__(name="gan")
        self.generator = keras.Sequential([keras.Input((8,)), layers.Dense(12, "relu"), layers.Dense(8)], name="g")
        self.critic = keras.Sequential([keras.Input((8,)), layers.Dense(6), layers.Dropout(0.1), layers.Dense(1)])
        self.noise, self.join = layers.GaussianNoise(0.1), layers.Concatenate()

    def train_step(self, data):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(self.critic(self.generator(data)) ** 2)
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"loss": loss}


def gan():
    model = Gan()
    model.compile("adam")
    return model


@pytest.mark.parametrize(
    "callback",
    [
        lambda: tf_prune.MagnitudePruning(0.5, scope="layerwise"),
        lambda: tf_prune.GradualPruning("random", tf_prune.Linear(0.5), scope="layerwise"),
    ],
    ids=["once", "gradual"],
)
def test_a_model_without_a_call_is_pruned_and_trained_sparse(callback):
    model = gan()
    model.fit(DATA[0], epochs=2, batch_size=4, callbacks=[callback()], verbose=0)
    assert not model.built
    masks = tf_prune.masks_of(model)
    assert (masks.num_weights, masks.num_kept) == (8 * 12 + 12 * 8 + 8 * 6 + 6, (8 * 12 + 12 * 8 + 8 * 6 + 6) // 2)
    helpers.assert_masks_hold(model, masks)


def test_the_outputs_of_each_part_of_a_model_without_a_call_are_left_alone():
    model = gan()
    report = tf_prune.prune(model, "magnitude", 0.5, structure="output_channels", verbose=0)
    first = [part.layers[0].kernel.path for part in (model.generator, model.critic)]
    assert list(report.masks) == first


@pytest.mark.parametrize(
    "use",
    [
        lambda model: tf_prune.prune(model, "snip", 0.5, DATA, verbose=0),
        lambda model: tf_prune.score(model, "grasp", DATA, "mse"),
        lambda model: tf_prune.score(model, "synflow"),
        lambda model: tf_prune.jacobian_spectrum(model, DATA, verbose=0),
        lambda model: tf_prune.explain(model),
        lambda model: tf_prune.export(model, "unused", DATA),
        lambda model: model.fit(*DATA, callbacks=[tf_prune.SnipPruning(0.5, DATA)], verbose=0),
    ],
    ids=["prune", "score", "synflow", "jacobian", "explain", "export", "callback"],
)
def test_what_needs_a_call_says_so_and_names_what_is_inside(use):
    model = gan()
    before = helpers.state(model.generator)
    with pytest.raises(ValueError, match=r"'gan' \(Gan\) has no `call` of its own.*model\.generator, model\.critic"):
        use(model)
    helpers.assert_same_state(before, model.generator)


def test_parts_of_a_model_without_a_call_are_scored_by_themselves():
    model = gan()
    masks = tf_prune.prune(model.generator, "snip", 0.5, (DATA[0], DATA[0]), loss="mse", verbose=0).masks
    model.fit(DATA[0], verbose=0)
    helpers.assert_masks_hold(model.generator, masks)
    assert tf_prune.masks_of(model).num_kept == masks.num_kept


def test_a_model_of_which_a_part_is_not_built_is_not_pruned_in_part():
    class Half(Gan):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(3, name="unborn")

    with pytest.raises(ValueError, match=r"layers without weights yet \(unborn\).*its sub-models"):
        tf_prune.prune(Half(), "magnitude", 0.5)


class Ends(keras.Model):
    """Ends in anything."""

    def __init__(self, end):
        super().__init__()
        self.hidden, self.head, self.end = layers.Dense(16, "tanh"), layers.Dense(4), end

    def call(self, x):
        return self.end(self.head(self.hidden(x)))


ENDS = {
    "loss": lambda z: tf.reduce_mean(z**2),
    "class": lambda z: tf.argmax(0 * z, -1),
    "truth": lambda z: z > 100,
    "text": lambda z: tf.strings.as_string(tf.argmax(0 * z, -1)),
    "of the batch": lambda z: tf.reduce_mean(z, 0),
    "ragged": lambda z: tf.RaggedTensor.from_row_lengths(tf.reshape(z, [-1]), tf.fill(tf.shape(z)[:1], 4)),
    "sparse": lambda z: tf.sparse.from_dense(z),
    "unknown rank": lambda z: tf.py_function(lambda t: t, [z], tf.float32),
    "array": np.asarray,
    "nothing": lambda z: (),
    "none beside it": lambda z: (z, None),
    "zeros beside it": lambda z: (0 * z, z),
    "dict": lambda z: {"loss": tf.reduce_mean(z), "logits": z},
}


@pytest.mark.parametrize("data", [None, DATA], ids=["without data", "on data"])
@pytest.mark.parametrize("end", ENDS)
def test_outputs_of_any_kind_are_looked_through_without_a_false_alarm(end, data):
    model = Ends(ENDS[end])
    model(DATA[0][:2])
    method = "magnitude" if data is None else MagnitudeOfOneBatch()
    assert tf_prune.prune(model, method, 0.5, data).sparsity == 0.5


class MagnitudeOfOneBatch(tf_prune.Criterion):
    """Reads a batch, which a subclassed model is then tried on."""

    def scores(self, derivatives, batches, masks, groups):
        list(batches.take(1))
        return {path: np.abs(weight) for path, weight in derivatives.weights().items()}


@pytest.mark.parametrize("end", ["none beside it", "ragged", "array", "dict"])
def test_a_cut_network_is_seen_where_it_can_be(end):
    model = Ends(ENDS[end])
    model(DATA[0][:2])
    # What is kept of the head reads units of which nothing is kept.
    model.hidden.kernel.assign(0.5 * np.eye(8, 16))
    model.head.kernel.assign(np.concatenate([np.full((8, 4), 1e-3), np.full((8, 4), 1.0)]))
    can_be_told = end != "array"
    with pytest.warns(UserWarning, match="no longer depend") if can_be_told else contextlib.nullcontext():
        masks = tf_prune.prune(model, MagnitudeOfOneBatch(), 1 - 40 / 192, DATA).masks
    assert [mask.sum() for mask in masks.values()] == [8, 32]


def test_inputs_of_which_only_the_second_differs_are_looked_through():
    one, other = keras.Input((3,)), keras.Input((8,))
    hidden = layers.Dense(16, "tanh", name="hidden")(other)
    model = keras.Model([one, other], layers.Dense(4, name="head")(hidden) + keras.ops.mean(one))
    model.get_layer("hidden").kernel.assign(0.5 * np.eye(8, 16))
    model.get_layer("head").kernel.assign(np.concatenate([np.full((8, 4), 1e-3), np.full((8, 4), 1.0)]))
    with pytest.warns(UserWarning, match="no longer depend"):
        tf_prune.prune(model, MagnitudeOfOneBatch(), 1 - 40 / 192, ([np.ones((16, 3), "float32"), DATA[0]], DATA[1]))


class InInference(layers.Layer):
    """Passes its input on in inference alone."""

    def call(self, x, training=False):
        return 0 * x if training else x


@pytest.mark.parametrize("norm", [layers.BatchNormalization(epsilon=1e-30), InInference()])
def test_a_network_that_sees_its_input_in_training_or_in_inference_alone_raises_no_alarm(norm):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, name="hidden"), norm, layers.Dense(4, name="head")])
    if isinstance(norm, layers.BatchNormalization):  # by its moving statistics the signal is lost beside the bias
        model.layers[0].kernel.assign(model.layers[0].kernel * 1e-12)
        model.layers[-1].bias.assign(np.ones(4))
    outputs = [np.ptp(np.asarray(model(DATA[0], training=training)), axis=0).max() > 0 for training in (False, True)]
    assert outputs in ([False, True], [True, False])
    assert tf_prune.prune(model, MagnitudeOfOneBatch(), 0.25, DATA, scope="layerwise").sparsity == 0.25


def test_inputs_of_different_lengths_raise_no_alarm():
    class Beside(Ends):
        def call(self, pair):
            return super().call(pair[0]) + tf.reduce_mean(pair[1])

    model = Beside(lambda z: z)
    model((DATA[0], np.ones((3, 3), "float32")))
    differing = Derivatives(model, find_prunable(model).prunable)
    masks = {path: np.ones(v.shape, bool) for path, v in differing.variables.items()}
    assert differing.sees_its_input(masks, (DATA[0], np.ones((3, 3), "float32")))
    assert differing.sees_its_input(masks, "nonsense")


def test_a_network_whose_output_is_its_loss_is_scored():
    inputs = keras.Input((8,))
    loss = layers.Lambda(lambda z: tf.reduce_mean(z**2), output_shape=())(layers.Dense(4, name="d")(inputs))
    model = keras.Model(inputs, loss)
    assert tf_prune.prune(model, "synflow", 0.5, verbose=0).sparsity == 0.5
    with pytest.raises(ValueError, match=r"^No output of '.*' is of floats"):
        tf_prune.score(
            keras.Model(inputs, layers.Lambda(lambda z: tf.argmax(z, -1))(layers.Dense(4)(inputs))), "synflow"
        )


# -- policies ---------------------------------------------------------------------------------------


def of_a_map():
    policy = keras.dtype_policies.DTypePolicyMap(default_policy="mixed_bfloat16")
    policy["b"] = keras.dtype_policies.DTypePolicy("float32")
    return keras.Sequential(
        [keras.Input((8,)), layers.Dense(16, "tanh", dtype=policy, name="a"), layers.Dense(4, dtype=policy, name="b")]
    )


def of_one_object():
    policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    return keras.Sequential([keras.Input((8,)), layers.Dense(8, dtype=policy), layers.Dense(4, dtype=policy)])


def quantized():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8, name="a"), layers.Dense(4, name="b")])
    model.quantize("int8", filters=["a"])
    return model


def policies_of(model):
    maps = [layer.dtype_policy for layer in model.layers if hasattr(layer.dtype_policy, "default_policy")]
    return (
        [id(layer.dtype_policy) for layer in model.layers],
        [(layer.compute_dtype, layer.variable_dtype, layer.quantization_mode) for layer in model.layers],
        [dict(one) for one in maps],
        [tensor.dtype for tensor in model.inputs],
        keras.config.floatx(),
        keras.config.dtype_policy().name,
    )


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
@pytest.mark.parametrize("build", [of_a_map, of_one_object, quantized])
def test_policies_stay_what_they_were_also_after_an_error(build):
    model = build()
    before = policies_of(model)
    with computing_in(model, "float64"):
        inside = [layer.compute_dtype for layer in model.layers if not layer.quantization_mode]
        assert {*inside, keras.config.floatx(), keras.config.dtype_policy().name} == {"float64"}
    assert policies_of(model) == before
    with pytest.raises(RuntimeError), computing_in(model, "float64"):
        raise RuntimeError
    assert policies_of(model) == before


def test_a_model_of_a_map_is_measured_in_float64_and_computes_as_before():
    model = of_a_map()
    before, outputs = policies_of(model), np.asarray(model(DATA[0]))
    spectrum = tf_prune.jacobian_spectrum(model, DATA[0][:2], verbose=0)
    assert policies_of(model) == before
    np.testing.assert_array_equal(np.asarray(model(DATA[0])), outputs)
    weights = [np.asarray(w, "float64") for w in model.get_weights()]
    slope = 1 - np.tanh(DATA[0][:2] @ weights[0] + weights[1]) ** 2
    expected = [np.linalg.svd(weights[0] * s @ weights[2], compute_uv=False) for s in slope]
    np.testing.assert_allclose(spectrum.values, expected, rtol=1e-12)


class Constant(keras.Layer):
    """Multiplies by constants of the type that Keras takes where none is named."""

    def call(self, x):
        return x * (keras.ops.ones((8,)) / 3)


def test_constants_that_are_made_in_a_call_are_of_float64_too():
    model = keras.Sequential([keras.Input((8,)), Constant(), layers.Dense(4)])
    spectrum = tf_prune.jacobian_spectrum(model, DATA[0][:1], verbose=0)
    expected = np.linalg.svd(model.layers[-1].get_weights()[0].astype("float64") / 3, compute_uv=False)
    np.testing.assert_allclose(spectrum.values[0], expected, rtol=1e-12)
    assert keras.config.floatx() == "float32"


@pytest.mark.parametrize("insists", [True, False])
def test_a_flow_that_is_beyond_float32_says_what_insists_on_it(insists, recwarn):
    end = layers.Lambda(lambda z: tf.cast(z, tf.float32) if insists else z, name="insists")
    model = keras.Sequential([keras.Input((8,)), layers.Dense(8), end, layers.Dense(4)])
    model.layers[-1].kernel.assign(np.full((8, 4), 1e38))
    tf_prune.score(model, "synflow")
    said = [str(one.message) for one in recwarn]
    assert len(said) == insists
    assert all("'sequential/insists" in text.replace("_1", "") and "computes in float32" in text for text in said)


def test_a_negative_flow_beyond_float32_is_ranked_as_its_size():
    factors = [layers.Rescaling(-1e30), layers.Rescaling(1e30)]
    model = keras.Sequential([keras.Input((8,)), *factors, layers.Dense(4, use_bias=False)])
    (scores,) = tf_prune.score(model, "synflow").values()
    kernel = np.abs(model.get_weights()[0])
    np.testing.assert_allclose(scores, kernel / kernel.sum(), rtol=1e-5)
