import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tests import helpers

# Every optimizer of Keras, as it comes.
OPTIMIZERS = {
    name.lower(): value
    for name, value in vars(keras.optimizers).items()
    if isinstance(value, type)
    and issubclass(value, keras.optimizers.Optimizer)
    and name not in ("Optimizer", "LossScaleOptimizer", "MultiOptimizer")
}
assert len(OPTIMIZERS) >= 11
if keras.__version__.startswith("3.12."):
    del OPTIMIZERS["muon"]  # asks a variable of TensorFlow for its path there
OPTIMIZERS |= {
    "sgd_momentum_decay": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9),
    "ema_overwrite": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=2),
    "ema_of_each": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=1),
    "loss_scaled_ema": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01, use_ema=True)),
}
if hasattr(keras.optimizers, "MultiOptimizer"):
    OPTIMIZERS["multi"] = lambda: keras.optimizers.MultiOptimizer(
        keras.optimizers.OptimizerMap(
            keras.optimizers.SGD(0.1, momentum=0.9), {".*head.*": keras.optimizers.Adam(0.1, use_ema=True)}
        )
    )


class Watch(keras.callbacks.Callback):
    """Checks after every step of the optimizer."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        masks = tf_prune.masks_of(self.model)
        assert masks.num_weights
        helpers.assert_pruned_is_zero(self.model, masks)
        self.steps += 1


def fit(model, epochs=2, callbacks=(), **options):
    x, y = helpers.batch(48)
    model.fit(x, y, batch_size=16, epochs=epochs, callbacks=list(callbacks), verbose=0, **options)


def compiled(name, optimizer, **options):
    model = helpers.build(name)
    model.compile(optimizer, model.loss, **options)
    return model


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_pruned_weights_are_zero_after_every_step_and_after_fit(optimizer):
    model = compiled("conv_bn", optimizer())
    before = tf_prune.prune(model, "snip", 0.8, helpers.batch()).masks
    kept = [np.asarray(v)[before[p]] for p, v in tf_prune.find_prunable(model).prunable.items()]
    watch = Watch()
    fit(model, callbacks=[watch])
    assert watch.steps == 6
    assert tf_prune.masks_of(model) == before
    helpers.assert_pruned_is_zero(model, before)
    for old, (path, variable) in zip(kept, tf_prune.find_prunable(model).prunable.items(), strict=True):
        assert (np.asarray(variable)[before[path]] != old).mean() > 0.5, "kept weights must not be frozen"


@pytest.mark.parametrize("options", [{"jit_compile": True}, {"run_eagerly": True}, {"steps_per_execution": 3}], ids=str)
def test_masks_hold_however_the_step_is_run(options):
    model = compiled("mlp", OPTIMIZERS["sgd_momentum_decay"](), **options)
    masks = tf_prune.prune(model, "magnitude", 0.8).masks
    fit(model, callbacks=[Watch()])
    helpers.assert_masks_hold(model, masks)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd_momentum_decay", "ema"])
def test_masks_hold_in_mixed_precision(policy, optimizer):
    keras.config.set_dtype_policy(policy)
    model = compiled("conv_bn", OPTIMIZERS[optimizer]())
    masks = tf_prune.prune(model, "snip", 0.8, helpers.batch()).masks
    fit(model, callbacks=[Watch()])
    helpers.assert_masks_hold(model, masks)


@pytest.mark.parametrize("name", helpers.MODELS)
def test_masks_hold_in_every_kind_of_model(name):
    model = compiled(name, OPTIMIZERS["sgd_momentum_decay"]())
    masks = tf_prune.prune(model, "magnitude", 0.6).masks
    fit(model, callbacks=[Watch()])
    helpers.assert_masks_hold(model, masks)


@pytest.mark.parametrize("optimizer", ["adam", "ema"])
def test_masks_that_come_after_a_first_fit_hold_in_the_second(optimizer):
    # Keras keeps the train function that it traced in the first fit, before there was a constraint.
    model = compiled("mlp", OPTIMIZERS[optimizer]())
    fit(model)
    masks = tf_prune.prune(model, "snip", 0.8, helpers.batch()).masks
    fit(model, callbacks=[Watch()])
    helpers.assert_masks_hold(model, masks)


def test_new_masks_take_the_place_of_old_ones():
    model = compiled("mlp", "adam")
    tf_prune.prune(model, "magnitude", 0.5)
    fit(model)
    masks = tf_prune.prune(model, "magnitude", 0.9).masks
    fit(model, callbacks=[Watch()])
    assert tf_prune.masks_of(model) == masks
    helpers.assert_masks_hold(model, masks)


def test_the_users_own_constraint_applies_before_the_mask():
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4, kernel_constraint="non_neg")])
    model.compile("sgd", "mse")
    masks = tf_prune.prune(model, "random", 0.5).masks
    x = np.random.default_rng(0).standard_normal((32, 5)).astype(np.float32)
    model.fit(x, x[:, :4], verbose=0)
    kernel = np.asarray(model.layers[0].kernel)
    assert (kernel >= 0).all()
    assert not kernel[~next(iter(masks.values()))].any()
    tf_prune.remove_masks(model)
    assert isinstance(model.layers[0].kernel.constraint, keras.constraints.NonNeg)


def test_a_loop_of_ones_own_keeps_the_masks_through_the_optimizer():
    model = compiled("mlp", "adam")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    x, y = helpers.batch()

    @tf.function
    def step():
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        model.optimizer.apply_gradients(
            zip(tape.gradient(loss, model.trainable_variables), model.trainable_variables, strict=True)
        )

    for _ in range(3):
        step()
        helpers.assert_masks_hold(model, masks)


def test_removed_masks_leave_zeros_that_grow_again():
    model = compiled("mlp", "adam")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    fit(model)
    tf_prune.remove_masks(model)
    helpers.assert_masks_hold(model, masks)
    assert not tf_prune.masks_of(model)
    fit(model)
    assert np.count_nonzero(np.asarray(model.get_layer("hidden").kernel)) > 36 * 16 * 0.5


def test_weights_set_from_outside_are_masked_from_the_next_step_on():
    model = compiled("mlp", "adam")
    dense = model.get_weights()
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    model.set_weights(dense)
    fit(model, epochs=1)
    helpers.assert_masks_hold(model, masks)


def test_loaded_weights_are_masked_from_the_next_step_on(tmp_path):
    model = compiled("mlp", "adam")
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "dense.weights.h5")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    fit(model)
    model.load_weights(tmp_path / "dense.weights.h5")
    fit(model, callbacks=[Watch()])
    helpers.assert_masks_hold(model, masks)


def test_a_swap_of_averages_at_each_validation_keeps_the_masks():
    model = compiled("mlp", OPTIMIZERS["ema"]())
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    fit(model, callbacks=[Watch(), swap], validation_data=helpers.batch(seed=1))
    helpers.assert_masks_hold(model, masks)


class OwnStep(keras.Sequential):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"loss": loss}


def test_masks_hold_in_a_train_step_of_ones_own():
    model = OwnStep(helpers.mlp().layers)
    model.build((None, 6, 6, 1))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    masks = tf_prune.prune(model, "snip", 0.7, helpers.batch()).masks
    fit(model, callbacks=[Watch()])
    helpers.assert_masks_hold(model, masks)


def test_layers_that_are_frozen_and_trained_again_keep_their_masks():
    model = compiled("residual", "adam")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    branch = model.get_layer("branch")
    branch.trainable = False
    model.compile("adam", model.loss)
    before = np.asarray(branch.kernel).copy()
    fit(model)
    np.testing.assert_array_equal(branch.kernel, before)
    branch.trainable = True
    model.compile("adam", model.loss)
    fit(model, callbacks=[Watch()])
    assert tf_prune.masks_of(model) == masks


def test_regularized_and_shared_layers_keep_their_masks():
    inputs = keras.Input((6, 6, 1))
    shared = keras.layers.Dense(16, "relu", kernel_regularizer="l2", name="shared")
    left, right = (shared(keras.layers.Flatten()(x)) for x in (inputs, keras.layers.ReLU()(inputs)))
    model = keras.Model(inputs, keras.layers.Dense(4)(keras.layers.Concatenate()([left, right])))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    masks = tf_prune.prune(model, "snip", 0.8, helpers.batch()).masks
    fit(model, callbacks=[Watch()])
    helpers.assert_masks_hold(model, masks)


def test_masked_gradients_keep_the_masks_in_an_update_without_an_optimizer():
    model = compiled("mlp", "sgd")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    x, y = helpers.batch()
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        for gradient, variable in zip(
            tf_prune.mask_gradients(gradients, model.trainable_variables), model.trainable_variables, strict=True
        ):
            variable.assign_sub(0.1 * gradient)
    helpers.assert_masks_hold(model, masks)
    assert tf_prune.mask_gradients([None] * 4, model.trainable_variables) == [None] * 4
    with pytest.raises(ValueError, match="got 1 for 4"):
        tf_prune.mask_gradients([None], model.trainable_variables)
    with pytest.raises(TypeError, match="variables of Keras"):
        tf_prune.mask_gradients([None], [tf.Variable(1.0)])


def saved_as_keras(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


def saved_as_h5(model, folder):
    model.save_weights(folder / "model.weights.h5")
    again = compiled("mlp", "adam")
    again.optimizer.build(again.trainable_variables)
    again.load_weights(folder / "model.weights.h5")
    return again


def saved_as_checkpoint(model, folder):
    path = tf.train.Checkpoint(model=model).write(str(folder / "model"))
    again = compiled("mlp", "adam")
    tf.train.Checkpoint(model=again).read(path).expect_partial()
    return again


def copied_by_hand(model, folder):
    again = compiled("mlp", "adam")
    again.set_weights(model.get_weights())
    return again


@pytest.mark.parametrize(
    ("way", "options", "policy"),
    [
        (saved_as_keras, {}, "float32"),
        (saved_as_keras, {"jit_compile": True}, "float32"),
        (saved_as_keras, {"jit_compile": True}, "mixed_float16"),
        (saved_as_keras, {}, "bfloat16"),
        (saved_as_h5, {}, "mixed_float16"),
        (saved_as_checkpoint, {}, "float32"),
        (copied_by_hand, {}, "float32"),
    ],
)
def test_the_weights_alone_tell_the_masks_however_they_were_saved(way, options, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    _ = tf.constant([1.0]) * 0.0, tf.constant([1.0], "bfloat16") * 0.0  # TensorFlow keeps such a number, and gave it
    model = compiled("mlp", keras.optimizers.Adam(0.01), **options)
    hidden = model.get_layer("hidden").kernel
    hidden.assign(keras.ops.where(hidden > 0, hidden, 0.0))  # zeros that are not pruned, and stay in part zero
    hidden.constraint = keras.constraints.NonNeg()  # gives -0.0 for what was negative
    masks = tf_prune.prune(model, "random", 0.5).masks
    fit(model)
    assert (np.asarray(hidden)[masks[hidden.path]] == 0).any()
    again = way(model, tmp_path)
    assert all(np.array_equal(a, b) for a, b in zip(tf_prune.masks_of(again).values(), masks.values(), strict=True))
    tf_prune.apply_masks(again, tf_prune.masks_of(again))
    fit(again, callbacks=[Watch()])


@pytest.mark.parametrize("initializer", ["zeros", "identity", "ones"])
def test_zeros_of_an_initializer_are_no_masks(initializer):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5, kernel_initializer=initializer)])
    assert not tf_prune.masks_of(model)
    zeros = tf_prune.masks_of(model, from_zeros=True)
    assert zeros.num_kept == {"zeros": 0, "identity": 5, "ones": 25}[initializer]


def test_masks_leave_the_zeros_of_others_alone():
    model = compiled("mlp", "adam")
    tf_prune.prune(model, "magnitude", 0.7)
    assert not np.signbit(tf.maximum(tf.constant([-1.0]), 0.0)).any()


def test_masks_of_kernels_that_are_not_pruned_again_are_told_and_held_too(tmp_path):
    model = compiled("residual", "adam")
    first = tf_prune.prune(model, "snip", 0.8, helpers.batch()).masks
    fit(model)
    loaded = saved_as_keras(model, tmp_path)
    tf_prune.prune(loaded, "magnitude", 0.9, filters="stem")
    masks = tf_prune.masks_of(loaded)
    assert all(np.array_equal(masks[path], first[path]) for path in first if "stem" not in path)
    fit(loaded, callbacks=[Watch()])
    helpers.assert_masks_hold(loaded, masks)


def test_removed_masks_of_a_loaded_model_are_told_no_more(tmp_path):
    model = compiled("mlp", "adam")
    tf_prune.prune(model, "magnitude", 0.7)
    fit(model)
    loaded = saved_as_keras(model, tmp_path)
    assert tf_prune.masks_of(loaded)
    tf_prune.remove_masks(loaded)
    assert not tf_prune.masks_of(loaded)
    assert tf_prune.prune(loaded, "random", 0.5).sparsity == 0.5


def test_removed_masks_are_told_no_more():
    model = compiled("mlp", OPTIMIZERS["ema"]())
    fit(model)
    tf_prune.prune(model, "magnitude", 0.7)
    tf_prune.remove_masks(model)
    assert not tf_prune.masks_of(model)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    assert not tf_prune.masks_of(model)


def test_masks_of_the_same_network_under_other_names_fit_and_of_another_one_do_not():
    masks = tf_prune.prune(keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)]), "random", 0.5).masks
    same = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)])
    tf_prune.apply_masks(same, masks)
    assert tf_prune.masks_of(same).num_kept == 10
    wider = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5)])
    with pytest.raises(ValueError, match=r"has shape \(5, 4\), but the variable has \(5, 5\)"):
        tf_prune.apply_masks(wider, masks)
    deeper = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="1 masks, and 2 variables"):
        tf_prune.apply_masks(deeper, masks)


def test_a_saved_model_holds_no_mask(tmp_path):
    model, plain = compiled("mlp", "adam"), compiled("mlp", "adam")
    tf_prune.prune(model, "magnitude", 0.7)
    names = []
    for i, one in enumerate((model, plain)):
        one.save_weights(tmp_path / f"{i}.weights.h5")
        with h5py.File(tmp_path / f"{i}.weights.h5") as file:
            names.append([])
            file.visit(names[-1].append)
    assert names[0] == names[1]


def outer_of(body):
    inputs = keras.Input((6, 6, 1))
    outer = keras.Model(inputs, keras.layers.Dense(4, name="last")(body(inputs)))
    outer.compile(OPTIMIZERS["ema"](), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return outer


def test_masks_of_a_model_inside_hold_when_the_outer_one_is_trained_with_averages():
    body = helpers.mlp()
    masks = tf_prune.prune(body, "magnitude", 0.6).masks
    fit(outer_of(body))
    helpers.assert_masks_hold(body, masks)


def test_masks_for_the_outer_model_hold_after_its_first_fit_though_the_inner_one_had_them():
    body = helpers.mlp()
    outer = outer_of(body)
    fit(outer)
    tf_prune.prune(body, "magnitude", 0.6)
    masks = tf_prune.prune(outer, "magnitude", 0.8, filters="hidden|head").masks
    fit(outer)
    helpers.assert_masks_hold(outer, masks)


def test_masks_hold_in_the_averages_of_an_optimizer_that_the_model_does_not_know():
    model = helpers.build("mlp")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    optimizer = keras.optimizers.Adam(0.01, use_ema=True)
    x, y = helpers.batch()
    for _ in range(3):
        with tf.GradientTape() as tape:
            loss = model.compute_loss(x, y, model(x, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    optimizer.finalize_variable_values(model.trainable_variables)
    helpers.assert_masks_hold(model, masks)


def test_an_average_from_before_the_pruning_is_masked_at_once():
    model = compiled("mlp", OPTIMIZERS["ema"]())
    fit(model)
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    model.optimizer.finalize_variable_values(model.trainable_variables)
    for path, variable in tf_prune.find_prunable(model).prunable.items():
        assert not np.asarray(variable)[~masks[path]].any()


def test_masks_are_told_also_of_frozen_layers():
    model = compiled("mlp", "adam")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    model.trainable = False
    assert tf_prune.masks_of(model) == masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda masks: {**masks, "no/such/kernel": np.ones(3, bool)},
            r"name 'no/such/kernel'.*It has: .*hidden/kernel",
        ),
        (
            lambda masks: {path: mask.T for path, mask in masks.items()},
            r"has shape \(16, 36\), but the variable has \(36, 16\)",
        ),
        (lambda masks: {path: mask * 0.5 for path, mask in masks.items()}, "only True and False"),
        (lambda masks: list(masks), "a mapping of variable.path to array of booleans, got list"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(change, message):
    model = helpers.build("mlp")
    masks = {path: np.zeros(v.shape, bool) for path, v in tf_prune.find_prunable(model).prunable.items()}
    before = helpers.state(model)
    if "only True" in message:
        masks = {path: ~mask for path, mask in masks.items()}
    with pytest.raises(ValueError, match=message):
        tf_prune.apply_masks(model, change(masks))
    helpers.assert_same_state(before, model)
    assert not tf_prune.masks_of(model)
