"""THE TABLE: every method and model that the tests run over, with every scope and structure of the package.

A new one is one row here.
"""

import keras
import numpy as np
from keras import layers

import tf_prune

# name in the string table -> a quick object of it
METHODS = {
    "snip": tf_prune.SNIP(),
    "grasp": tf_prune.GraSP(),
    "force": tf_prune.FORCE(num_steps=4),
    "iterative_snip": tf_prune.IterativeSNIP(num_steps=4, schedule="linear"),
    "grasp_it": tf_prune.GraSPIt(num_steps=4),
    "synflow": tf_prune.SynFlow(num_steps=5),
    "loss_preservation": tf_prune.LossPreservation(magnitude_power=1),
    "gradient_norm_preservation": tf_prune.GradientNormPreservation(),
    "squared_gradient": tf_prune.SquaredGradient(),
    "optimal_brain_damage": tf_prune.OptimalBrainDamage(num_probes=2),
    "magnitude": tf_prune.Magnitude(),
    "random": tf_prune.Random(seed=1),
}


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__(name="subclassed")
        self.hidden = layers.Dense(16, activation="relu", name="hidden")
        self.head = layers.Dense(4, name="head")

    def call(self, x):
        return self.head(self.hidden(layers.Flatten()(x)))


def mlp():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Flatten(),
            layers.Dense(16, "relu", name="hidden"),
            layers.Dense(4, name="head"),
        ],
        name="mlp",
    )


def mlp_softmax():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Flatten(),
            layers.Dense(16, "relu", name="hidden"),
            layers.Dense(4, "softmax", name="head"),
        ],
        name="mlp_softmax",
    )


def conv_bn():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(6, 3, use_bias=False, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Dropout(0.5),
            layers.Flatten(),
            layers.Dense(4, name="head"),
        ],
        name="conv_bn",
    )


def residual():
    x = inputs = keras.Input((6, 6, 1))
    x = layers.Conv2D(8, 3, padding="same", activation="relu", name="stem")(x)
    y = layers.Conv2D(8, 3, padding="same", activation="relu", name="branch")(x)
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(4, name="head")(x), name="residual")


def nested():
    body = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(12, "tanh", name="body")])
    inputs = keras.Input((6, 6, 1))
    return keras.Model(inputs, layers.Dense(4, name="head")(body(inputs)), name="nested")


def recurrent():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Reshape((6, 6)),
            layers.GRU(8, name="gru"),
            layers.Dense(4, name="head"),
        ],
        name="recurrent",
    )


def attention():
    x = inputs = keras.Input((6, 6, 1))
    x = layers.Reshape((6, 6))(x)
    x = layers.LayerNormalization()(layers.MultiHeadAttention(2, 4, name="attention")(x, x))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(4, "softmax", name="head")(x), name="attention_model")


def separable():
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(8, 3, padding="same", activation="relu", name="stem"),
            layers.DepthwiseConv2D(3, name="depthwise"),
            layers.BatchNormalization(name="norm"),
            layers.Conv2D(8, 1, groups=2, activation="relu", name="grouped"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4, name="head"),
        ],
        name="separable",
    )


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 6, 6, 1), np.float32))
    return model


MODELS = {
    "mlp": mlp,
    "mlp_softmax": mlp_softmax,
    "conv_bn": conv_bn,
    "residual": residual,
    "nested": nested,
    "subclassed": subclassed,
    "recurrent": recurrent,
    "attention": attention,
    "separable": separable,
}
ENDS_IN_SOFTMAX = ("mlp_softmax", "attention")


def build(name, seed=0, optimizer="sgd"):
    """A compiled model of the table, the same for the same seed."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    model = MODELS[name]()
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=name not in ENDS_IN_SOFTMAX))
    return model


def batch(size=16, seed=0):
    generator = np.random.default_rng(seed)
    return generator.standard_normal((size, 6, 6, 1)).astype(np.float32), generator.integers(0, 4, size)


def state(model):
    """Every variable of the model, copied."""
    return [np.asarray(variable).copy() for variable in model.variables]


def assert_same_state(before, model):
    after = state(model)
    assert len(before) == len(after)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def assert_pruned_is_zero(model, masks):
    variables = tf_prune.find_prunable(model).prunable
    for path, mask in masks.items():
        assert not np.asarray(variables[path])[~mask].any(), path


def assert_masks_hold(model, masks):
    """Pruned is exactly zero, and kept is not: a kept weight of a random model is zero with probability 0."""
    assert_pruned_is_zero(model, masks)
    variables = tf_prune.find_prunable(model).prunable
    for path, mask in masks.items():
        assert np.asarray(variables[path])[mask].all(), path


def float64_mlp(activation="tanh", units=(5, 7, 3)):
    """A model that computes in float64, for finite differences."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(3)
    dense = [
        layers.Dense(n, activation if i < len(units) - 2 else None, dtype="float64", name=f"dense_{i}")
        for i, n in enumerate(units[1:])
    ]
    model = keras.Sequential([keras.Input((units[0],), dtype="float64"), *dense])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True, dtype="float64"))
    return model
