import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import tf_prune
from tests import helpers
from tf_prune.legacy_keras import rebuild, to_tf_keras
from tf_prune.legacy_layers import LAYERS

SEQUENCE, IMAGE, VOLUME = (6, 4), (8, 8, 2), (4, 4, 4, 2)
SHAPES = {1: SEQUENCE, 2: IMAGE, 3: VOLUME}


def of(shape, *args, **options):
    """A model of one layer, made in whichever Keras is given: `lib -> model`."""

    def make(lib, name):
        inputs = lib.Input(shape)
        return lib.Model(inputs, getattr(lib.layers, name)(*args, **options)(inputs))

    return make


def merging(*args, **options):
    def make(lib, name):
        inputs = [lib.Input(SEQUENCE, name="a"), lib.Input(SEQUENCE, name="b")]
        return lib.Model(inputs, getattr(lib.layers, name)(*args, **options)(inputs))

    return make


def embedding(lib, name):
    inputs = lib.Input((5,), dtype="int32")
    x = getattr(lib.layers, name)(7, 4, mask_zero=True)(inputs)  # the mask of time steps goes to the next layer
    return lib.Model(inputs, lib.layers.LSTM(3)(x))


def attention(lib, name):
    inputs = lib.Input(SEQUENCE)
    return lib.Model(inputs, getattr(lib.layers, name)(2, 3)(inputs, inputs))


def distributed(lib, name):
    inputs = lib.Input((3, *IMAGE))
    body = lib.Sequential([lib.Input(IMAGE), lib.layers.Conv2D(2, 3), lib.layers.BatchNormalization()], name="body")
    x = getattr(lib.layers, name)(body)(inputs)
    return lib.Model(inputs, getattr(lib.layers, name)(lib.layers.Flatten())(x))


def bidirectional(lib, name):
    inputs = lib.Input(SEQUENCE)
    layers = lib.layers
    x = getattr(layers, name)(layers.LSTM(3, return_sequences=True), "sum")(inputs)
    x = getattr(layers, name)(layers.LSTM(2), backward_layer=layers.GRU(3, go_backwards=True))(x)
    return lib.Model(inputs, x)


EXAMPLES = {
    "Dense": of((4,), 3, "tanh", kernel_regularizer="l2", kernel_constraint="max_norm"),
    "EinsumDense": of(SEQUENCE, "abc,cd->abd", (None, 5), bias_axes="d"),
    "Embedding": embedding,
    "Conv1D": of(SEQUENCE, 3, 2, dilation_rate=2, padding="causal"),
    "Conv2D": of(IMAGE, 4, 3, 2, "same", groups=2, activation="silu"),
    "Conv3D": of(VOLUME, 3, 2),
    "Conv1DTranspose": of(SEQUENCE, 3, 2, strides=2),
    "Conv2DTranspose": of(IMAGE, 3, 3, 2, "same", output_padding=1),
    "Conv3DTranspose": of(VOLUME, 3, 2),
    "DepthwiseConv1D": of(SEQUENCE, 3, depth_multiplier=2),
    "DepthwiseConv2D": of(IMAGE, 3, depth_multiplier=2, activation="leaky_relu"),
    "SeparableConv1D": of(SEQUENCE, 3, 2),
    "SeparableConv2D": of(IMAGE, 3, 2, activation="relu6"),
    "LSTM": of(SEQUENCE, 3, return_sequences=True, go_backwards=True),
    "GRU": of(SEQUENCE, 3),
    "SimpleRNN": of(SEQUENCE, 3, stateful=False, unroll=True),
    "Bidirectional": bidirectional,
    "TimeDistributed": distributed,
    "MultiHeadAttention": attention,
    "Attention": merging(use_scale=True),
    "AdditiveAttention": merging(use_scale=True),
    "BatchNormalization": of(IMAGE, momentum=0.9, epsilon=1e-2, scale=False),
    "LayerNormalization": of(IMAGE, (1, 2)),
    "GroupNormalization": of(IMAGE, 2),
    "UnitNormalization": of(IMAGE),
    "Normalization": of(IMAGE),
    "Rescaling": of(IMAGE, 1 / 255, -1.0),
    **{f"{kind}Pooling{d}D": of(SHAPES[d], 2, padding="same") for kind in ("Max", "Average") for d in SHAPES},
    **{f"Global{kind}Pooling{d}D": of(SHAPES[d], keepdims=True) for kind in ("Max", "Average") for d in SHAPES},
    "ZeroPadding1D": of(SEQUENCE, (2, 1)),
    "ZeroPadding2D": of(IMAGE, ((1, 0), (2, 1))),
    "ZeroPadding3D": of(VOLUME, 1),
    "Cropping1D": of(SEQUENCE, (2, 1)),
    "Cropping2D": of(IMAGE, ((1, 0), (2, 1))),
    "Cropping3D": of(VOLUME, 1),
    "UpSampling1D": of(SEQUENCE, 2),
    "UpSampling2D": of(IMAGE, 2, interpolation="bilinear"),
    "UpSampling3D": of(VOLUME, 2),
    "Flatten": of(IMAGE),
    "Reshape": of(IMAGE, (4, -1)),
    "Permute": of(IMAGE, (2, 1, 3)),
    "RepeatVector": of((4,), 3),
    "Identity": of(IMAGE),
    "Masking": of(SEQUENCE, 0.5),
    "Activation": of(IMAGE, "gelu"),
    "ReLU": of(IMAGE, 6.0, 0.1, 0.2),
    "LeakyReLU": of(IMAGE, 0.2),
    "PReLU": of(IMAGE, shared_axes=[1, 2]),
    "ELU": of(IMAGE, 0.7),
    "Softmax": of(IMAGE, 1),
    "Dropout": of(IMAGE, 0.3, seed=1),
    **{f"SpatialDropout{d}D": of(SHAPES[d], 0.3) for d in SHAPES},
    "GaussianDropout": of(IMAGE, 0.2),
    "GaussianNoise": of(IMAGE, 0.2),
    "AlphaDropout": of(IMAGE, 0.2),
    "ActivityRegularization": of(IMAGE, l2=0.1),
    **{name: merging() for name in ("Add", "Subtract", "Multiply", "Average", "Maximum", "Minimum", "Concatenate")},
    "Dot": merging(2, normalize=True),
}


def to_keras(model):
    return rebuild(model, keras)[0]


BOTH_WAYS = ((keras, to_tf_keras), (tf_keras, to_keras))
both_ways = pytest.mark.parametrize(("lib", "bring"), BOTH_WAYS, ids=["to_tf_keras", "to_keras"])
# One of each kind: plain, with several kernels, a mask of time steps, statistics, layers inside, a renamed argument.
# fmt: off
QUICK = (
    "Dense", "Embedding", "Conv2D", "Conv2DTranspose", "DepthwiseConv2D", "SeparableConv1D", "Bidirectional",
    "TimeDistributed", "MultiHeadAttention", "BatchNormalization", "Normalization", "LeakyReLU", "Dot",
)
# fmt: on
SLOW = [name for name in EXAMPLES if name not in QUICK]


def inputs_of(model, seed=0, size=3):
    generator = np.random.default_rng(seed)
    leaves = [
        generator.integers(0, 5, (size, *tensor.shape[1:])).astype("int32")
        if "int" in str(tensor.dtype)
        else generator.standard_normal((size, *tensor.shape[1:])).astype("float32")
        for tensor in model.inputs
    ]
    is_one = isinstance(model, (keras.Sequential, tf_keras.Sequential))
    return leaves[0] if is_one else tf.nest.pack_sequence_as(model.input, leaves)


def randomize(model, seed=0):
    """Random values in all weights, also in those that are initialized with zeros or ones."""
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        value = generator.uniform(0.1, 0.9, tuple(weight.shape))
        weight.assign(value.astype(getattr(weight.dtype, "name", weight.dtype)))
    for layer in model.layers:
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()


def assert_same_outputs(one, other, seed=1, **options):
    x = inputs_of(one, seed)
    outputs = [tf.nest.flatten(model(x, training=False)) for model in (one, other)]
    assert len(outputs[0]) == len(outputs[1])
    for a, b in zip(*outputs, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), **{"atol": 1e-5, "rtol": 1e-5, **options})


def test_every_layer_of_the_table_has_an_example():
    assert set(EXAMPLES) == LAYERS


@pytest.mark.parametrize(
    "names",
    [QUICK, *(pytest.param(SLOW[i::5], marks=pytest.mark.slow) for i in range(5))],
    ids=lambda names: f"{names[0]} and others",
)
def test_a_layer_computes_the_same_in_both_and_keeps_its_name(names):
    for name, (lib, bring) in itertools.product(names, BOTH_WAYS):
        layer = EXAMPLES[name](lib, name)
        # A Dense layer beside it: a model without weights is none that can be pruned.
        beside = lib.layers.Dense(2, name="beside")(lib.layers.Flatten()(lib.layers.Rescaling(1.0)(layer.inputs[0])))
        model = lib.Model(layer.input, [layer.output, beside])
        randomize(model)
        brought = bring(model)
        assert_same_outputs(model, brought, err_msg=name)
        for old in model.layers:
            if type(old).__name__ != "InputLayer":
                assert type(brought.get_layer(old.name)).__name__ == type(old).__name__


def topology(lib):
    """Several inputs and outputs in dictionaries, a shared layer, a model used twice, operators, an initial state."""
    layers = lib.layers
    shared = layers.Dense(6, "relu", name="shared")
    inside = lib.Input((6,))
    body = lib.Model(inside, layers.Add(name="sum")([inside, shared(inside)]), name="body")
    rows = layers.LSTM(6, return_sequences=True, return_state=True, name="rows")
    a, b = lib.Input((6,), name="a"), lib.Input((5, 6), name="b")
    x = body(shared(a) / 2.0 - 1.0)
    y, h, c = rows(b)
    y = layers.GRU(6, name="gru")(y, initial_state=h)
    z = layers.Concatenate(name="join")([x * y, body(x + c)])
    return lib.Model({"a": a, "b": b}, {"one": layers.Dense(2, name="one")(z), "two": x}, name="topology")


@both_ways
def test_branches_shared_layers_and_models_inside_are_kept(lib, bring):
    model = topology(lib)
    randomize(model)
    brought = bring(model)
    assert_same_outputs(model, brought)
    assert len(brought.weights) == len(model.weights)
    assert brought.get_layer("body").get_layer("shared") is brought.get_layer("shared")
    assert set(brought.output) == {"one", "two"}
    assert {"shared", "body", "gru", "join", "one"} <= {layer.name for layer in brought.layers}


@both_ways
def test_a_batch_has_a_size_only_where_a_layer_keeps_a_state_of_each_example(lib, bring):
    inputs = lib.Input(batch_shape=(3, *SEQUENCE))
    x = lib.layers.Dense(3)(inputs)
    assert bring(lib.Model(inputs, x)).inputs[0].shape[0] is None
    model = lib.Model(inputs, lib.layers.Bidirectional(lib.layers.GRU(2, stateful=True))(x))
    brought = bring(model)
    assert brought.inputs[0].shape[0] == 3
    assert_same_outputs(model, brought)
    assert_same_outputs(model, brought)  # from the state that the first call left


def test_names_that_keras_3_does_not_take_are_changed():
    inputs = tf_keras.Input((4,))
    x = tf_keras.layers.Dense(4, name="block/dense")(inputs)
    outputs = tf_keras.layers.Multiply(name="multiply")([x * 2.0, x * 3.0])  # Keras 3 calls its operator so too
    legacy = tf_keras.Model(inputs, outputs, name="a/model")
    model = to_keras(legacy)
    assert model.name == "a_model"
    assert_same_outputs(legacy, model)
    assert [layer.name for layer in model.layers][1] == "block_dense"


def test_what_is_frozen_stays_frozen_and_what_computes_in_half_precision_too():
    inputs = keras.Input((4,))
    x = keras.layers.Dense(3, trainable=False, name="frozen", dtype="mixed_float16")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2, name="head", kernel_initializer=tf_prune.GlorotNormal())(x))
    legacy = to_tf_keras(model)
    back = to_keras(legacy)
    for one in (legacy, back):
        assert not one.get_layer("frozen").trainable
        assert one.get_layer("frozen").compute_dtype == "float16"
        assert len(one.trainable_weights) == 2
    assert_same_outputs(model, legacy, atol=1e-2)


@both_ways
def test_what_is_frozen_inside_a_layer_or_a_model_is_brought_with_its_weights(lib, bring):
    """tf_keras then lists weights in another order, and Keras 3 makes the layers inside as trainable ones."""
    inputs = lib.Input(SEQUENCE)
    attention = lib.layers.MultiHeadAttention(2, 2, name="attention")
    x = attention(inputs, inputs)
    body = lib.Sequential([lib.Input(SEQUENCE), lib.layers.SpatialDropout1D(0.1), lib.layers.Dense(4)], name="body")
    two = lib.layers.Bidirectional(lib.layers.LSTM(3), name="two")
    model = lib.Model(inputs, lib.layers.Dense(2)(two(body(x))))
    attention.trainable = body.trainable = two.forward_layer.trainable = False
    randomize(model)
    brought = bring(model)
    assert_same_outputs(model, brought)
    assert len(brought.trainable_weights) == len(model.trainable_weights) == 5
    assert not brought.get_layer("two").forward_layer.trainable


def test_training_that_a_call_was_given_counts_in_tf_keras_only():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.BatchNormalization()(inputs, training=True)))
    randomize(model)
    legacy = to_tf_keras(model)
    x = inputs_of(model)
    np.testing.assert_allclose(model.predict(x, verbose=0), legacy.predict(x, verbose=0), atol=1e-5)
    inputs = tf_keras.Input((4,))
    x = tf_keras.layers.Dropout(0.5, name="always")(tf_keras.layers.Dense(4)(inputs), training=True)
    with pytest.raises(
        ValueError, match=r"always \(Dropout\): called with training=True, which holds in tf_keras only"
    ):
        to_keras(tf_keras.Model(inputs, x))
    x = tf_keras.layers.BatchNormalization()(inputs, training=False)
    legacy = tf_keras.Model(inputs, tf_keras.layers.Dense(2)(x))
    randomize(legacy)
    assert_same_outputs(legacy, to_keras(legacy))


def test_masked_layers_leave_their_wrappers_behind():
    model = helpers.build("mlp")
    tf_prune.prune(model, "magnitude", 0.5)
    legacy = to_tf_keras(tf_prune.wrap(model))
    assert [type(layer).__name__ for layer in legacy.layers] == ["Flatten", "Dense", "Dense"]
    assert_same_outputs(model, legacy)


class Own(keras.layers.Dense):
    pass


class OwnLegacy(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.head = tf_keras.layers.Dense(2)

    def call(self, x):
        return self.head(x)


def chain(lib, *layers):
    return lib.Sequential([lib.Input((4,)), lib.layers.Dense(4), *layers])


@pytest.mark.parametrize(
    ("bring", "make", "messages"),
    [
        (
            to_tf_keras,
            lambda: chain(
                keras,
                Own(4, name="own"),
                keras.layers.Lambda(abs, name="lam"),
                keras.layers.RMSNormalization(name="rms"),
            ),
            [r"own \(Own\): of the class tests.test_legacy_keras.Own", r"lam \(Lambda\)", r"rms \(RMSNormalization\)"],
        ),
        (
            to_tf_keras,
            lambda: chain(keras, keras.layers.Dense(4, "hard_sigmoid", name="hard"), keras.layers.Activation("celu")),
            [r"hard \(Dense\): activation='hard_sigmoid' is not one of elu", "activation='celu'"],
        ),
        (
            to_keras,
            lambda: chain(
                tf_keras, tf_keras.layers.Dense(4, "hard_sigmoid", name="hard"), tf_keras.layers.ThresholdedReLU(1.0)
            ),
            [r"hard \(Dense\): activation='hard_sigmoid'", r"\(ThresholdedReLU\)", "brought to Keras 3"],
        ),
        (to_tf_keras, lambda: helpers.build("subclassed"), [r"subclassed \(Subclassed\): a class of its own"]),
    ],
)
def test_what_has_no_counterpart_is_refused_with_all_names_and_reasons(bring, make, messages):
    with pytest.raises(ValueError, match="Without a counterpart there") as error:
        bring(make())
    for message in messages:
        assert error.match(message)


def test_a_legacy_model_that_is_subclassed_or_not_built_is_refused():
    model = OwnLegacy()
    model(np.zeros((1, 3), np.float32))
    with pytest.raises(ValueError, match="does not say how its layers are connected"):
        to_keras(model)
    with pytest.raises(ValueError, match="not built yet: call it once on a batch"):
        to_keras(tf_keras.Sequential([tf_keras.layers.Dense(2)]))
