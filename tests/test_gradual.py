import csv
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tests import helpers
from tf_prune.schedules import SCHEDULES

STEPS, EPOCHS = 4, 5


class Watch(keras.callbacks.Callback):
    """Notes how many weights are kept after each step, and that pruned ones are zero."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def on_train_batch_end(self, batch, logs=None):
        masks = tf_prune.masks_of(self.model)
        helpers.assert_pruned_is_zero(self.model, masks)
        self.kept.append(masks.num_kept)


def fit(model, *callbacks, epochs=EPOCHS, **options):
    x, y = helpers.batch(16 * STEPS)
    return model.fit(x, y, batch_size=16, epochs=epochs, callbacks=list(callbacks), verbose=0, **options)


def kept_of(schedule, progress, total):
    return total - int(np.ceil(schedule(progress) * total - 1e-9))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("criterion", ["magnitude", "snip"])
def test_the_model_has_after_each_step_just_the_weights_of_the_schedule(name, criterion):
    model = helpers.build("mlp", optimizer="adam")
    total = tf_prune.find_prunable(model).prunable
    total = sum(int(np.prod(v.shape)) for v in total.values())
    schedule = SCHEDULES[name](0.9, 0.2)
    watch = Watch()
    callback = tf_prune.GradualPruning(criterion, schedule, begin=2, end=14, frequency=3, data=helpers.batch())
    fit(model, callback, watch)
    times = [2, 5, 8, 11, 14]
    expected = []
    for step in range(1, STEPS * EPOCHS + 1):
        time = max((t for t in times if t <= step), default=None)
        expected.append(total if time is None else kept_of(schedule, (time - 2) / 12, total))
    assert watch.kept == expected
    assert tf_prune.masks_of(model).num_kept == kept_of(schedule, 1.0, total)


def test_fractions_of_the_run_are_steps_of_it():
    kept = []
    for options in ({"begin": 0.1, "end": 0.7, "frequency": 0.15}, {"begin": 2, "end": 14, "frequency": 3}):
        watch = Watch()
        fit(helpers.build("mlp"), tf_prune.GradualPruning("magnitude", tf_prune.Linear(0.9), **options), watch)
        kept.append(watch.kept)
    assert kept[0] == kept[1]


@pytest.mark.parametrize("end", [0.75, 1.0, STEPS * EPOCHS])
@pytest.mark.parametrize("frequency", [1000, 7, 0.9])
def test_the_target_is_met_at_the_end_whatever_the_frequency(end, frequency):
    model = helpers.build("mlp")
    fit(model, tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), end=end, frequency=frequency))
    masks = tf_prune.masks_of(model)
    assert masks.num_kept == kept_of(tf_prune.Cubic(0.9), 1.0, masks.num_weights)


def test_a_weight_that_was_pruned_stays_so():
    model = helpers.build("mlp", optimizer="adam")

    class Keep(keras.callbacks.Callback):
        masks = ()

        def on_train_batch_end(self, batch, logs=None):
            self.masks = [*self.masks, tf_prune.masks_of(self.model)]

    keep = Keep()
    fit(model, tf_prune.GradualPruning("random", tf_prune.Linear(0.9), frequency=1), keep)
    for before, after in itertools.pairwise(keep.masks):
        assert all((after[path] <= before[path]).all() for path in before)


def test_rounds_prune_after_each_epoch_the_fraction_of_gradient_flows_code():
    model = helpers.build("mlp", optimizer="adam")
    watch = Watch()
    fit(model, tf_prune.PruneAndTrain("loss_preservation", 0.8, 3, data=helpers.batch()), watch)
    total = watch.kept[0]
    densities, density = [], 1.0
    for i in (1, 2, 3):
        density *= 1 - 0.8 / (i * 0.8 + 3 * 0.2)
        densities.append(density)
    # Callbacks run in their order, so the pruning of a step is seen after it.
    after_epochs = [watch.kept[i * STEPS - 1] for i in (1, 2, 3, 4, 5)]
    assert after_epochs == [total - int(np.ceil((1 - d) * total - 1e-9)) for d in [*densities, 0.2, 0.2]]
    assert watch.kept[STEPS - 2] == total


def test_rounds_of_filters_prune_the_fraction_of_filters():
    model = helpers.build("residual", optimizer="adam")
    callback = tf_prune.PruneAndTrain("magnitude", 0.5, 2, structure="output_channels", scope="uniform")
    fit(model, callback)
    assert callback.report.groups.num_kept == callback.report.groups.num_weights // 2


def test_the_sparsity_of_each_kernel_is_in_the_logs_the_history_and_a_csv_file(tmp_path):
    model = helpers.build("mlp")
    callback = tf_prune.GradualPruning(
        "magnitude", tf_prune.Linear(0.9), begin=STEPS * 2, end=STEPS * 4, frequency=STEPS
    )
    history = fit(model, callback, keras.callbacks.CSVLogger(tmp_path / "log.csv")).history
    assert [round(s, 2) for s in history["sparsity"]] == [0, 0, 0.45, 0.9, 0.9]
    masks = tf_prune.masks_of(model)
    for path, mask in masks.items():
        assert history[f"sparsity/{path}"][-1] == pytest.approx(1 - mask.mean())
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [round(float(row["sparsity"]), 2) for row in rows] == [0, 0, 0.45, 0.9, 0.9]
    assert all(f"sparsity/{path}" in rows[0] for path in masks)


@pytest.mark.parametrize("options", [{"steps_per_execution": 3}, {"jit_compile": True}, {"run_eagerly": True}], ids=str)
def test_the_schedule_comes_to_its_end_however_the_step_is_run(options):
    model = helpers.build("mlp")
    model.compile("adam", model.loss, **options)
    fit(model, tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), frequency=2))
    assert tf_prune.masks_of(model).num_kept == kept_of(tf_prune.Cubic(0.9), 1.0, tf_prune.masks_of(model).num_weights)


def test_a_model_that_is_sparser_already_waits_for_the_schedule():
    model = helpers.build("mlp")
    first = tf_prune.prune(model, "random", 0.5).masks
    watch = Watch()
    fit(model, tf_prune.GradualPruning("magnitude", tf_prune.Linear(0.9), end=18, frequency=2), watch)
    assert watch.kept[7] == first.num_kept > watch.kept[-1]
    with pytest.raises(ValueError, match="Ask for a higher sparsity"):
        fit(model, tf_prune.GradualPruning("magnitude", tf_prune.Linear(0.6)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), end=21),
            "step 21 .end=21., but the run has 20",
        ),
        (
            lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), begin=30, end=40),
            "never begin",
        ),
        (lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), begin=0.8, end=0.2), "begin <= end"),
        (lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), end=1.5), r"end must be steps .* got 1\.5"),
        (lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), frequency=-1), "frequency must be steps"),
        (lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), frequency=0), "frequency must be above 0"),
        (lambda: tf_prune.GradualPruning("magnitude", "cubic"), r"such as tf_prune\.Cubic\(0\.9\); got 'cubic'"),
        (lambda: tf_prune.GradualPruning("size", tf_prune.Cubic(0.9)), "method must be one of"),
        (lambda: tf_prune.PruneAndTrain("magnitude", 0.9, 6), "6 rounds takes an epoch, but fit runs 5"),
        (lambda: tf_prune.PruneAndTrain("magnitude", 0.9, 0), "rounds must be an integer of at least 1"),
    ],
)
def test_a_schedule_that_does_not_fit_into_the_run_is_an_error_before_it(make, message):
    model = helpers.build("mlp")
    before = helpers.state(model)
    with pytest.raises(ValueError, match=message):
        fit(model, make())
    helpers.assert_same_state(before, model)


def test_data_of_unknown_length_is_an_error_that_says_what_to_do():
    x, y = helpers.batch(64)
    data = tf.data.Dataset.from_tensor_slices((x, y)).filter(lambda *_: True).batch(16)
    model = helpers.build("mlp")
    callback = tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9))
    with pytest.raises(ValueError, match="steps_per_epoch"):
        model.fit(data, epochs=2, callbacks=[callback], shuffle=False, verbose=0)


def test_a_run_that_is_stopped_before_the_schedules_end_is_an_error_that_says_how_far_it_came():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    model = helpers.build("mlp")
    with pytest.raises(RuntimeError, match=r"before step 15.*sparsity of 0\.9.*last pruned after step 8.*It keeps"):
        fit(model, tf_prune.GradualPruning("magnitude", tf_prune.Linear(0.9), frequency=2), Stop())
    assert 0.3 < tf_prune.masks_of(model).sparsity < 0.6


def test_best_weights_that_another_callback_restores_are_masked():
    class Restore(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.weights = self.model.get_weights()

        def on_train_end(self, logs=None):
            self.model.set_weights(self.weights)

    model = helpers.build("mlp")
    with pytest.warns(UserWarning, match="an epoch that was less sparse were restored"):
        fit(model, Restore(), tf_prune.GradualPruning("magnitude", tf_prune.Linear(0.9)))
    helpers.assert_masks_hold(model, tf_prune.masks_of(model))
    assert tf_prune.masks_of(model).sparsity == pytest.approx(0.9, abs=1e-2)


@pytest.mark.parametrize("order", [1, -1])
def test_early_stopping_that_restores_the_best_weights_leaves_a_pruned_model(order):
    x, y = helpers.batch(64)
    model = helpers.build("mlp", optimizer="adam")
    model.compile("adam", model.loss)
    gradual = tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), end=0.5)
    best = keras.callbacks.EarlyStopping("loss", patience=99, mode="max", restore_best_weights=True)
    with (
        pytest.warns(UserWarning, match=r"EarlyStopping\(start_from_epoch=4\)"),
        pytest.warns(UserWarning, match="an epoch that was less sparse were restored"),
    ):
        model.fit(x, y, epochs=8, callbacks=[gradual, best][::order], verbose=0)
    masks = tf_prune.masks_of(model)
    assert masks.num_kept == kept_of(tf_prune.Cubic(0.9), 1.0, masks.num_weights)
    helpers.assert_pruned_is_zero(model, masks)


def test_best_weights_of_epochs_after_the_last_pruning_are_restored_without_a_word():
    x, y = helpers.batch(64)
    model = helpers.build("mlp", optimizer="adam")
    gradual = tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), end=0.5)
    best = keras.callbacks.EarlyStopping("loss", mode="max", patience=99, restore_best_weights=True, start_from_epoch=4)
    model.fit(x, y, epochs=8, callbacks=[gradual, best], verbose=0)
    assert best.best_epoch == 4
    helpers.assert_masks_hold(model, tf_prune.masks_of(model))


def test_a_model_that_only_fit_builds_is_pruned_gradually_too():
    model = helpers.Subclassed()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, tf_prune.GradualPruning("snip", tf_prune.Linear(0.8), data=helpers.batch()))
    assert tf_prune.masks_of(model).sparsity == 0.8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tf_prune.GradualPruning("snip", tf_prune.Cubic(0.6), begin=0.5), "but data is None"),
        (lambda: tf_prune.GradualPruning("snip", tf_prune.Cubic(0.6), begin=0.5, data=iter([])), "data is empty"),
        (
            lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.4), begin=0.5, structure="2:4"),
            "Ask for 0.5 or more",
        ),
    ],
)
def test_what_a_later_pruning_needs_is_checked_before_the_first_step(make, message):
    model = helpers.build("mlp")
    before = helpers.state(model)
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        fit(model, make(), watch)
    assert not watch.kept
    helpers.assert_same_state(before, model)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.6), structure="2:4", scope="layerwise"),
        lambda: tf_prune.PruneAndTrain("magnitude", 0.6, 3, structure="2:4", scope="layerwise"),
    ],
)
def test_a_structure_starts_where_the_schedule_reaches_what_it_removes_at_least(make):
    model = helpers.build("mlp")
    callback = make()
    fit(model, callback)
    assert all(mask.mean() <= 0.4 for mask in callback.report.masks.values())


def test_a_criterion_is_traced_once_for_all_prunings_of_a_run():
    traces = []

    def loss(y, outputs):
        traces.append(1)
        return keras.losses.sparse_categorical_crossentropy(y, outputs, from_logits=True)

    model = helpers.build("mlp")
    callback = tf_prune.GradualPruning("snip", tf_prune.Linear(0.9), frequency=2, data=helpers.batch(), loss=loss)
    fit(model, callback)
    assert len(traces) <= 2  # on the way without a mask, and with masks


def test_rounds_have_no_times_of_their_own():
    with pytest.raises(TypeError, match="begin"):
        tf_prune.PruneAndTrain("magnitude", 0.9, 2, begin=0.5)


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_schedule_that_never_fired_is_an_error(epochs):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    model = helpers.build("mlp")
    gradual = tf_prune.GradualPruning("magnitude", tf_prune.Linear(0.9), begin=0.9, end=1.0)
    with pytest.raises(RuntimeError, match="never pruned"):
        fit(model, gradual, Stop(), epochs=epochs)
    tf_prune.prune(model, "magnitude", 0.9)
    fit(model, gradual, epochs=3, initial_epoch=3)  # a run that was over before


def test_frozen_sparsity_keeps_the_zeros_of_any_model_and_trains_the_rest():
    model = helpers.build("mlp", optimizer="adam")
    kernel = model.get_layer("hidden").kernel
    zeros = np.random.default_rng(0).random(kernel.shape) < 0.7
    kernel.assign(np.where(zeros, 0 * np.asarray(kernel), np.asarray(kernel)))  # 0.0 and -0.0, as by a product
    fit(model, tf_prune.FreezeSparsity())
    np.testing.assert_array_equal(np.asarray(kernel) == 0, zeros)
    tf_prune.remove_masks(model)
    fit(model, tf_prune.FreezeSparsity(filters="hidden"))
    np.testing.assert_array_equal(np.asarray(kernel) == 0, zeros)


def test_frozen_sparsity_says_when_there_is_none_or_nothing_else():
    model = helpers.build("mlp")
    with pytest.raises(ValueError, match="found no weight that is zero"):
        fit(model, tf_prune.FreezeSparsity())
    model.get_layer("head").kernel.assign(np.zeros((16, 4)))
    with pytest.warns(UserWarning, match="All weights of .*head/kernel are zero"):
        fit(model, tf_prune.FreezeSparsity())


def test_the_batches_of_a_generator_serve_every_pruning():
    data = [helpers.batch(seed=i) for i in range(2)]
    masks = []
    for given in (data, (batch for batch in data)):
        callback = tf_prune.GradualPruning("grasp", tf_prune.Cubic(0.8), 0.0, 0.75, 2, given)
        helpers.build("mlp").fit(
            *helpers.batch(32), batch_size=8, epochs=2, callbacks=[callback], verbose=0, shuffle=False
        )
        masks.append(callback.report.masks)
    assert masks[0] == masks[1]
