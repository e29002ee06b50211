import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_prune
from tests import helpers

GENERATOR = tf.random.Generator.from_seed(0)


class DrawsNoise(keras.Layer):
    def __init__(self, draw, **options):
        super().__init__(**options)
        self.draw = draw

    def call(self, x):
        return x + tf.cast(self.draw(tf.shape(x)), x.dtype)


class Counts(keras.Layer):
    """Counts its calls in a variable of TensorFlow, which Keras does not know."""

    def build(self, shape):
        self.calls = tf.Variable(0.0)

    def call(self, x):
        self.calls.assign_add(1.0)
        return x


def around(layer, shape=(6, 6, 1)):
    model = keras.Sequential([keras.Input(shape), layer, layers.Flatten(), layers.Dense(4, name="head")])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.mark.parametrize("criterion", ["snip", "grasp"])
@pytest.mark.parametrize(
    "draw",
    [
        tf.random.normal,
        tf.random.uniform,
        tf.random.truncated_normal,
        lambda shape: tf.random.gamma(shape, 1.0),
        lambda shape: GENERATOR.normal(shape),
        lambda shape: tf.ensure_shape(tf.numpy_function(np.zeros, [shape], tf.float64), (None, 6, 6, 1)),
    ],
    ids=["normal", "uniform", "truncated", "gamma", "generator", "numpy"],
)
def test_a_layer_that_draws_noise_without_a_seed_is_an_error(criterion, draw):
    model = around(DrawsNoise(draw, name="noisy"))
    with pytest.raises(ValueError, match=r"^A layer draws random numbers that cannot be drawn again.*noisy"):
        tf_prune.score(model, criterion, helpers.batch())


def test_a_layer_inside_of_a_loop_is_looked_at_too():
    class Cell(layers.SimpleRNNCell):
        def call(self, inputs, states, training=False):
            return super().call(inputs + tf.random.normal(tf.shape(inputs)), states, training=training)

    model = around(layers.RNN(Cell(3), name="loop"), shape=(6, 2))
    with pytest.raises(ValueError, match=r"^A layer draws random numbers that cannot be drawn again"):
        tf_prune.score(model, "snip", (np.ones((4, 6, 2), np.float32), np.arange(4)))


def test_a_layer_that_writes_a_variable_is_an_error_before_it_writes():
    layer = Counts(name="counter")
    model = around(layer)
    before = float(layer.calls)
    with pytest.raises(ValueError, match=r"^A layer writes a variable while it is called \(AssignAdd.*counter"):
        tf_prune.score(model, "snip", helpers.batch())
    assert float(layer.calls) == before


class Sampling(keras.Layer):
    """The noise of a variational autoencoder, which is no noise of training."""

    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1)

    def call(self, x):
        return x + keras.random.normal(keras.ops.shape(x), seed=self.seed_generator)


class StochasticDepth(keras.Layer):
    """As in the networks that drop whole paths; its rate has no name that is known."""

    def __init__(self, drop_path_rate):
        super().__init__()
        self.seeds, self.drop_path_rate = keras.random.SeedGenerator(1), drop_path_rate

    def call(self, x, training=None):
        if not training:
            return x
        keep = 1 - self.drop_path_rate
        shape = (keras.ops.shape(x)[0],) + (1,) * (len(x.shape) - 1)
        return x / keep * keras.ops.floor(keep + keras.random.uniform(shape, seed=self.seeds))


def test_a_layer_with_a_seed_of_keras_is_repeatable():
    model = around(Sampling())
    one, other = (tf_prune.score(model, "snip", helpers.batch()) for _ in range(2))
    for a, b in zip(one.values(), other.values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_stateful_layer_is_an_error_that_names_it():
    model = keras.Sequential(
        [keras.Input(batch_shape=(4, 6, 2)), layers.GRU(3, stateful=True, name="memory"), layers.Dense(4)]
    )
    model.compile("sgd", "mse")
    data = np.ones((4, 6, 2), np.float32), np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match=r"'memory' is stateful.*stateful = False"):
        tf_prune.prune(model, "snip", 0.5, data)
    assert tf_prune.prune(keras.models.clone_model(model), "magnitude", 0.5).masks.num_kept == 57 // 2
    model.get_layer("memory").stateful = False
    assert tf_prune.prune(model, "snip", 0.5, data).masks.num_kept == 57 // 2


@pytest.mark.parametrize("layer", [lambda: layers.GaussianNoise(1), lambda: layers.SpatialDropout2D(0.5)])
def test_noise_is_off_also_where_its_size_is_an_integer(layer):
    noisy, plain = around(layer()), around(layers.Dropout(0.0))
    plain.layers[-1].set_weights(noisy.layers[-1].get_weights())
    one, other = (tf_prune.score(model, "snip", helpers.batch()).popitem()[1] for model in (noisy, plain))
    np.testing.assert_allclose(one, other, rtol=1e-6)


def test_dropout_acts_while_scoring_only_if_it_is_asked_for():
    with_dropout = around(layers.Dropout(0.9, seed=1))
    without = around(layers.Dropout(0.0))
    without.set_weights([w for w in with_dropout.get_weights() if w.dtype == np.float32])
    off, on, again = (
        tf_prune.score(with_dropout, "snip", helpers.batch(), dropout=asked).popitem()[1]
        for asked in (False, True, True)
    )
    plain = tf_prune.score(without, "snip", helpers.batch()).popitem()[1]
    np.testing.assert_allclose(off, plain, rtol=1e-6)
    np.testing.assert_array_equal(on, again)
    assert (on != off).mean() > 0.5
    assert with_dropout.layers[0].rate == 0.9


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.RandomFlip(seed=1),
        lambda: layers.RandomCrop(4, 4, seed=1),
        lambda: layers.RandomRotation(0.3, seed=1),
        lambda: layers.MixUp(seed=1),
        lambda: layers.RandAugment((-2, 2), seed=1),
        lambda: layers.Pipeline([layers.RandomTranslation(0.3, 0.3, seed=1)]),
        lambda: layers.AlphaDropout(0.5, seed=1),
        lambda: StochasticDepth(0.5),
    ],
    ids=["flip", "crop", "rotation", "mixup", "randaugment", "pipeline", "alpha dropout", "stochastic depth"],
)
def test_what_only_training_draws_is_off_unless_it_is_asked_for(layer):
    """The scores are those of the network behind it, on what it gives in inference."""
    layer, (x, y) = layer(), helpers.batch()
    x = np.tile(x, (1, 1, 1, 3))
    model = around(layer, (6, 6, 3))
    seen = x[:, 1:5, 1:5] if isinstance(layer, layers.RandomCrop) else x
    plain = around(layers.Activation("linear"), seen.shape[1:])
    plain.get_layer("head").set_weights(model.get_layer("head").get_weights())
    before = dict(vars(layer))
    (off,) = tf_prune.score(model, "snip", (x, y)).values()
    (expected,) = tf_prune.score(plain, "snip", (seen, y)).values()
    np.testing.assert_allclose(off, expected, rtol=1e-5, atol=1e-7)
    on, again = (tf_prune.score(model, "snip", (x, y), dropout=True).popitem()[1] for _ in range(2))
    np.testing.assert_array_equal(on, again)
    assert (on != off).mean() > 0.5
    assert "call" not in vars(layer)
    assert vars(layer).keys() >= before.keys()


def test_augmentation_is_on_again_after_an_error_and_batch_statistics_stay_on():
    flip = layers.RandomFlip(seed=1)
    model = keras.Sequential([keras.Input((6, 6, 1)), flip, layers.BatchNormalization(), layers.Flatten()])
    model.add(layers.Dense(4, name="head"))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = helpers.batch()
    with pytest.raises(ValueError, match="cannot be computed on this batch"):
        tf_prune.score(model, "snip", (x[:, :5], y))
    assert "call" not in vars(flip)
    own = flip.call = functools.partial(flip.call)
    tf_prune.score(model, "snip", (x, y))
    assert vars(flip)["call"] is own  # somebody else's
    (scores,) = tf_prune.score(model, "snip", (10 * x, y)).values()
    (of_smaller,) = tf_prune.score(model, "snip", (x, y)).values()
    np.testing.assert_allclose(scores, of_smaller, rtol=1e-2, atol=1e-3 * scores.max())


def test_spectral_normalization_is_scored_the_same_each_time_and_stays_as_it_was():
    model = around(layers.SpectralNormalization(layers.Conv2D(3, 3)))
    before = helpers.state(model)
    one, other = (tf_prune.score(model, "snip", helpers.batch()) for _ in range(2))
    for a, b in zip(one.values(), other.values(), strict=True):
        np.testing.assert_array_equal(a, b)
    helpers.assert_same_state(before, model)
    masks = tf_prune.prune(model, "snip", 0.5, helpers.batch(), verbose=0).masks
    model.fit(*helpers.batch(), verbose=0)
    helpers.assert_masks_hold(model, masks)
