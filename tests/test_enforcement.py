import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tests import helpers

OPTIMIZERS = {
    "sgd_momentum_decay": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    "ema": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.9),
    "ema_overwrite": lambda: keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True, ema_overwrite_frequency=2),
    "loss_scaled_ema": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01, use_ema=True)),
}


class Watch(keras.callbacks.Callback):
    """Checks after every step of the optimizer."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def on_train_batch_end(self, batch, logs=None):
        masks = tf_prune.masks_of(self.model)
        assert masks.num_weights
        helpers.assert_masks_hold(self.model, masks)
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
    helpers.assert_masks_hold(model, before)
    for old, (path, variable) in zip(kept, tf_prune.find_prunable(model).prunable.items(), strict=True):
        assert (np.asarray(variable)[before[path]] != old).all(), "kept weights must not be frozen"


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


def test_a_saved_and_rebuilt_model_takes_its_masks_from_a_file(tmp_path):
    model = compiled("mlp", "adam")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    fit(model)
    model.save(tmp_path / "model.keras")
    masks.save(tmp_path / "masks.npz")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    tf_prune.apply_masks(loaded, tf_prune.Masks.load(tmp_path / "masks.npz"))
    again = tf_prune.masks_of(loaded)
    assert all(np.array_equal(a, b) for a, b in zip(again.values(), masks.values(), strict=True))
    fit(loaded)
    helpers.assert_masks_hold(loaded, again)


def test_masks_of_the_same_network_under_other_names_fit_and_of_another_one_do_not():
    masks = tf_prune.prune(keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)]), "random", 0.5).masks
    same = keras.Sequential([keras.Input((5,)), keras.layers.Dense(4)])
    tf_prune.apply_masks(same, masks)
    assert tf_prune.masks_of(same).num_kept == 10
    wider = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5)])
    with pytest.raises(ValueError, match="not a prunable variable of this model"):
        tf_prune.apply_masks(wider, masks)


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
