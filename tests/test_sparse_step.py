"""The step of a masked network is that of the sparse network: of one that multiplies by its masks as it computes."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops

import tf_prune
from tests.test_enforcement import OPTIMIZERS

X = np.random.default_rng(0).standard_normal((48, 8)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 4, 48)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class SparseDense(layers.Dense):
    """The reference: gradients of pruned weights are zero because nothing depends on them."""

    mask = 1.0

    def call(self, x):
        x = ops.matmul(x, self.kernel * self.mask) + self.bias
        return self.activation(x)


def mlp(dense=layers.Dense):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((8,)), dense(16, "tanh", name="hidden"), dense(4, name="head")])


class Late(keras.optimizers.SGD):
    """Writes weights after the step of its parent, and looks at gradients before."""

    def apply(self, grads, trainable_variables=None):
        grads = [g / (1.0 + ops.norm(g)) for g in grads]
        super().apply(grads, trainable_variables)
        for variable in trainable_variables:
            variable.assign(variable * 0.9 + 0.01)


class Lookahead(keras.optimizers.SGD):
    """Keeps slow copies of the weights and goes back to them every second step."""

    def build(self, variables):
        super().build(variables)
        self.slow = self.add_optimizer_variables(variables, "slow")
        for slow, variable in zip(self.slow, variables, strict=True):
            slow.assign(variable)

    def apply(self, grads, trainable_variables=None):
        super().apply(grads, trainable_variables)
        for slow, variable in zip(self.slow, self._trainable_variables, strict=True):
            slow.assign(slow + 0.25 * (variable - slow))
            self.assign(variable, ops.where(self.iterations % 2 == 0, slow, variable))


def multi():
    chosen = {"hidden": keras.optimizers.SGD(0.1, clipnorm=0.01), "head": keras.optimizers.Lion(0.01)}
    return keras.optimizers.MultiOptimizer(lambda variable: chosen["head" if "head" in variable.path else "hidden"])


STEPS = {
    "clipnorm": lambda: keras.optimizers.SGD(0.5, momentum=0.9, clipnorm=0.01),
    "global_clipnorm": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.01),
    "accumulation": lambda: keras.optimizers.SGD(0.5, global_clipnorm=0.01, gradient_accumulation_steps=2),
    "lamb": lambda: keras.optimizers.Lamb(0.05),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.5, global_clipnorm=0.01)),
    "schedule_free": lambda: keras.optimizers.ScheduleFreeAdamW(0.05, clipnorm=0.01),
    "ema": lambda: keras.optimizers.Adam(0.05, global_clipnorm=0.01, use_ema=True, ema_momentum=0.5),
    "late": lambda: Late(0.5),
    "lookahead": lambda: Lookahead(0.5, momentum=0.9, clipnorm=0.1),
}
if hasattr(keras.optimizers, "MultiOptimizer"):
    STEPS["multi"] = multi
if "muon" in OPTIMIZERS:
    STEPS["muon"] = lambda: keras.optimizers.Muon(0.01)
    STEPS["muon_ema"] = lambda: keras.optimizers.Muon(0.01, use_ema=True, ema_momentum=0.5)
# Keras's Adafactor gives NaN for the reference: see below.
SLOW = {f"plain_{name}": optimizer for name, optimizer in OPTIMIZERS.items() if name != "adafactor"}


def masks():
    generator = np.random.default_rng(2)
    return {"hidden/kernel": generator.random((8, 16)) < 0.2, "head/kernel": generator.random((16, 4)) < 0.2}


def reference(optimizer, epochs=2):
    model = mlp(SparseDense)
    for layer, mask in zip(model.layers, masks().values(), strict=True):
        layer.mask = mask.astype(np.float32)
        layer.kernel.assign(layer.kernel * layer.mask)
    model.compile(optimizer, LOSS)
    model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0)
    return [np.asarray(w) * (m if w.ndim > 1 else 1) for w, m in zip(model.get_weights(), doubled(), strict=True)]


def doubled():
    """A mask for each weight of the model; biases have none."""
    return [part for mask in masks().values() for part in (mask, True)]


def fit(model, epochs=2, **options):
    model.fit(X, Y, batch_size=16, epochs=epochs, shuffle=False, verbose=0, **options)


def assert_same_weights(model, expected):
    weights = [w for w in model.get_weights() if w.dtype != bool and not set(np.unique(w)) <= {0.0, 1.0}]
    for weight, mask, own in zip(weights, doubled(), expected, strict=True):
        assert not weight[~np.broadcast_to(mask, weight.shape)].any()
        np.testing.assert_allclose(weight, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [*STEPS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_the_steps_of_fit_are_those_of_the_sparse_network(name):
    optimizer = {**STEPS, **SLOW}[name]
    expected = reference(optimizer())
    model = mlp()
    tf_prune.apply_masks(model, masks())
    model.compile(optimizer(), LOSS)  # after the masks
    fit(model)
    assert_same_weights(model, expected)


@pytest.mark.parametrize("when", ["after compile", "after a fit", "wrapped", "loaded", "eager", "jit"])
def test_it_does_not_matter_when_the_masks_came_or_how_the_step_is_run(when, tmp_path):
    expected = reference(STEPS["global_clipnorm"]())
    model = mlp()
    model.compile(STEPS["global_clipnorm"](), LOSS, run_eagerly=when == "eager", jit_compile=when == "jit")
    if when == "after a fit":
        initial = model.get_weights()
        fit(model, epochs=1)
        model.set_weights(initial)
        model.optimizer = STEPS["global_clipnorm"]()  # no momentum of the dense network
        model.optimizer.build(model.trainable_variables)
    if when in ("wrapped", "loaded"):
        model = tf_prune.wrap(model)
        model.compile(STEPS["global_clipnorm"](), LOSS)
        model.optimizer.build(model.trainable_variables)
    tf_prune.apply_masks(model, masks())
    if when == "loaded":
        model.save(tmp_path / "model.keras")
        model = keras.models.load_model(tmp_path / "model.keras")
    fit(model)
    assert_same_weights(model, expected)


def test_adafactor_trains_a_network_with_dead_rows_and_columns():
    assert np.isnan(reference(keras.optimizers.Adafactor(0.01))[0]).any()
    model = mlp()
    tf_prune.apply_masks(model, masks())
    model.compile(keras.optimizers.Adafactor(0.01), LOSS)
    fit(model)
    for weight, mask in zip(model.get_weights(), doubled(), strict=True):
        assert np.isfinite(weight).all()
        assert not weight[~np.broadcast_to(mask, weight.shape)].any()


def test_a_loop_of_ones_own_takes_the_same_steps():
    expected = reference(STEPS["global_clipnorm"](), epochs=1)
    model, optimizer = mlp(), STEPS["global_clipnorm"]()
    tf_prune.apply_masks(model, masks())

    @tf.function
    def step(x, y):
        with tf.GradientTape() as tape:
            loss = LOSS(y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    for i in range(3):
        step(X[16 * i : 16 * i + 16], Y[16 * i : 16 * i + 16])
    assert_same_weights(model, expected)


KEEPING = ["adam", "schedulefreeadamw", "accumulation", "ema", "loss_scaled_ema", *{"multi"} & set(OPTIMIZERS)]


@pytest.mark.parametrize("optimizer", KEEPING)
def test_what_an_optimizer_keeps_for_pruned_weights_is_cleared_as_masks_come(optimizer):
    model = mlp()
    model.compile(OPTIMIZERS[optimizer](), LOSS)
    model.fit(X[:16], Y[:16], batch_size=16, verbose=0)
    tf_prune.apply_masks(model, masks())
    found = 0
    for layer, mask in zip(model.layers, masks().values(), strict=True):
        slots = [v for v in model.optimizer.variables if v.shape == mask.shape and layer.name in v.path]
        found += len(slots)
        assert not any(np.asarray(slot)[~mask].any() for slot in slots)
    assert found >= 4


def test_optimizers_of_models_without_masks_take_their_own_steps():
    weights = []
    for has_masks_elsewhere in (False, True):
        if has_masks_elsewhere:
            tf_prune.apply_masks(mlp(), masks())
        model = mlp()
        model.compile(STEPS["clipnorm"](), LOSS)
        fit(model)
        weights.append(model.get_weights())
    for a, b in zip(*weights, strict=True):
        np.testing.assert_array_equal(a, b)
