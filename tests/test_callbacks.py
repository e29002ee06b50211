import copy
import itertools
import pickle

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tests import helpers

DATA = [helpers.batch(seed=i) for i in range(2)]
CALLBACKS = {
    "snip": lambda **o: tf_prune.SnipPruning(0.8, DATA, **o),
    "grasp": lambda **o: tf_prune.GraspPruning(0.8, DATA, **o),
    "force": lambda **o: tf_prune.ForcePruning(0.8, DATA, num_steps=3, verbose=0, **o),
    "iterative_snip": lambda **o: tf_prune.IterativeSnipPruning(0.8, DATA, num_steps=3, verbose=0, **o),
    "synflow": lambda **o: tf_prune.SynflowPruning(0.8, num_steps=3, verbose=0, **o),
    "magnitude": lambda **o: tf_prune.MagnitudePruning(0.8, **o),
    "random": lambda **o: tf_prune.RandomPruning(0.8, **o),
}


def fit(model, *callbacks, epochs=1):
    x, y = helpers.batch(32)
    return model.fit(x, y, batch_size=16, epochs=epochs, callbacks=list(callbacks), verbose=0)


@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS.keys())
@pytest.mark.parametrize(
    "name", ["conv_bn", "subclassed", *(pytest.param(n, marks=pytest.mark.slow) for n in ("residual", "nested"))]
)
@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_fit_prunes_a_plain_model_and_keeps_it_pruned(make, name):
    if name == "subclassed" and make is CALLBACKS["synflow"]:
        pytest.skip("a subclassed model does not say its input's shape; the callback without data cannot either")
    model = helpers.build(name, optimizer=keras.optimizers.Adam(0.01))
    callback = make()
    fit(model, callback, epochs=2)
    total = callback.report.masks.num_weights
    assert callback.report.masks.num_kept == tf_prune.masks_of(model).num_kept == total - -(-8 * total // 10)
    helpers.assert_masks_hold(model, callback.report.masks)


@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_a_callback_prunes_as_the_function_of_its_name(name):
    method = {
        "force": tf_prune.FORCE(num_steps=3),
        "iterative_snip": tf_prune.IterativeSNIP(num_steps=3),
        "synflow": tf_prune.SynFlow(num_steps=3),
    }.get(name, name)
    report = tf_prune.prune(helpers.build("mlp"), method, 0.8, DATA, verbose=0)
    callback = CALLBACKS[name]()
    fit(helpers.build("mlp"), callback)
    assert callback.report.masks == report.masks


def test_a_model_that_only_fit_builds_is_pruned_too():
    model = helpers.Subclassed()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    callback = tf_prune.SnipPruning(0.8, DATA)
    fit(model, callback)
    helpers.assert_masks_hold(model, callback.report.masks)


@pytest.mark.parametrize("data", [DATA, iter([helpers.batch(seed=0)])], ids=["list", "generator of one batch"])
def test_building_for_the_pruning_takes_nothing_from_the_data(data):
    model = helpers.Subclassed()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model, tf_prune.ForcePruning(0.8, data, num_steps=1, verbose=0))
    assert tf_prune.masks_of(model).num_kept == 128


def test_another_model_is_pruned_by_the_same_callback_too():
    callback = tf_prune.SnipPruning(0.8, DATA)
    for seed in (0, 1):
        model = helpers.build("mlp", seed=seed)
        fit(model, callback)
        helpers.assert_masks_hold(model, callback.report.masks)
        assert tf_prune.masks_of(model).num_kept == 128


@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS.keys())
def test_a_model_that_has_its_masks_back_keeps_them(make):
    first = helpers.build("mlp")
    masks = tf_prune.prune(first, tf_prune.FORCE(), 0.8, DATA, verbose=0).masks
    fit(first)
    again = helpers.build("mlp", seed=3)
    again.set_weights(first.get_weights())
    tf_prune.apply_masks(again, masks)
    fit(again, make())
    assert tf_prune.masks_of(again) == masks


def test_a_second_fit_keeps_the_masks_and_prunes_no_more():
    model = helpers.build("mlp")
    callback = tf_prune.SnipPruning(0.8, DATA)
    fit(model, callback)
    masks = callback.report.masks
    fit(model, callback)
    fit(model)
    assert tf_prune.masks_of(model) == masks
    helpers.assert_masks_hold(model, masks)


def test_the_moving_average_that_fit_writes_back_is_pruned():
    model = helpers.build("mlp", optimizer=keras.optimizers.Adam(0.01, use_ema=True))
    fit(model)
    callback = tf_prune.SnipPruning(0.8, DATA)
    fit(model, callback)
    helpers.assert_masks_hold(model, callback.report.masks)


def test_swapped_in_averages_are_pruned():
    model = helpers.build("mlp", optimizer=keras.optimizers.Adam(0.01, use_ema=True))
    callback = tf_prune.SnipPruning(0.8, DATA)
    fit(model, callback, keras.callbacks.SwapEMAWeights(swap_on_epoch=True))
    helpers.assert_masks_hold(model, callback.report.masks)


def test_every_checkpoint_is_sparse(tmp_path):
    model = helpers.build("mlp", optimizer=keras.optimizers.Adam(0.01))
    callback = tf_prune.SnipPruning(0.8, DATA)
    file = str(tmp_path / "{epoch}.weights.h5")
    fit(model, callback, keras.callbacks.ModelCheckpoint(file, save_weights_only=True), epochs=2)
    for epoch in (1, 2):
        fresh = helpers.build("mlp", optimizer=keras.optimizers.Adam(0.01))
        fresh.optimizer.build(fresh.trainable_variables)
        fresh.load_weights(tmp_path / f"{epoch}.weights.h5")
        helpers.assert_masks_hold(fresh, callback.report.masks)


def test_options_reach_the_pruning():
    callback = tf_prune.MagnitudePruning(0.5, scope="layerwise", filters="hidden")
    fit(helpers.build("mlp"), callback)
    assert [int(mask.sum()) for mask in callback.report.masks.values()] == [288]


@pytest.mark.parametrize("sparsity", [95, -0.1, float("nan")])
def test_a_wrong_sparsity_is_an_error_when_the_callback_is_made(sparsity):
    with pytest.raises(ValueError, match="sparsity must be in"):
        tf_prune.ForcePruning(sparsity, DATA)


def test_an_error_in_scoring_ends_fit_before_the_first_step():
    model = helpers.build("mlp")
    before = helpers.state(model)
    with pytest.raises(ValueError, match="data is None"):
        fit(model, tf_prune.SnipPruning(0.8, None))
    for a, b in zip(before, helpers.state(model), strict=False):
        np.testing.assert_array_equal(a, b)


def test_a_callback_takes_every_option_of_prune():
    model = helpers.build("separable")
    callback = tf_prune.SnipPruning(
        0.5,
        helpers.batch(),
        loss="uniform",
        scope="erk",
        structure="output_channels",
        filters=["stem", "grouped"],
        dropout=True,
        verbose=0,
    )
    model.fit(*helpers.batch(), callbacks=[callback], verbose=0)
    assert callback.report.groups.num_kept == 8
    assert callback.report.scope == "erk"
    helpers.assert_masks_hold(model, callback.report.masks)


def test_a_fit_without_epochs_prunes_too():
    model = helpers.build("mlp")
    callback = tf_prune.SnipPruning(0.8, DATA)
    fit(model, callback, epochs=0)
    assert callback.report.masks == tf_prune.masks_of(model)
    assert tf_prune.masks_of(model).num_kept == 128


def endless():
    yield from itertools.cycle(DATA)


class EndlessSequence(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return DATA[index % 2]


ENDLESS = {
    "generator": endless,
    "itertools": lambda: itertools.cycle(DATA),
    "dataset": lambda: from_generator().repeat(),
    "unknown dataset": lambda: from_generator(),
    "sequence": EndlessSequence,
}


def from_generator():
    specs = (tf.TensorSpec((None, 6, 6, 1)), tf.TensorSpec((None,), tf.int64))
    return tf.data.Dataset.from_generator(endless, output_signature=specs)


@pytest.mark.parametrize("make", ENDLESS.values(), ids=ENDLESS.keys())
def test_of_endless_data_an_epoch_of_batches_is_read(make):
    callback = tf_prune.GraspPruning(0.8, make(), verbose=0)  # which reads them twice
    fit(helpers.build("mlp"), callback)  # of 2 steps
    assert callback.report.masks == tf_prune.prune(helpers.build("mlp"), "grasp", 0.8, DATA, verbose=0).masks


def test_a_callback_reads_as_many_batches_as_it_is_told():
    callback = tf_prune.SnipPruning(0.8, endless(), num_batches=1)
    fit(helpers.build("mlp"), callback)
    assert callback.report.masks == tf_prune.prune(helpers.build("mlp"), "snip", 0.8, DATA[0]).masks


def test_a_generator_can_be_both_what_is_trained_on_and_what_is_scored():
    data = endless()
    model = helpers.build("mlp")
    callback = tf_prune.SnipPruning(0.8, data, verbose=0)
    model.fit(data, steps_per_epoch=2, callbacks=[callback], verbose=0, shuffle=False)
    assert tf_prune.masks_of(model).num_kept == 128


DATA_OF_TUNERS = {
    "arrays": helpers.batch(32),
    "dataset": tf.data.Dataset.from_tensor_slices(helpers.batch(32)).batch(16),
}


@pytest.mark.parametrize("data", DATA_OF_TUNERS.values(), ids=DATA_OF_TUNERS.keys())
@pytest.mark.parametrize("used_before", [False, True])
def test_a_copy_prunes_as_the_callback_itself(data, used_before):
    callback = tf_prune.SnipPruning(0.8, data, verbose=0)
    if used_before:
        fit(helpers.build("mlp", seed=1), callback)
    copied = copy.deepcopy(callback)
    for each in (callback, copied):
        fit(helpers.build("mlp"), each)
    assert copied.report.masks == callback.report.masks
    assert copied.data is data


@pytest.mark.parametrize("name", ["snip", "force", "random"])
@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_a_pickled_callback_prunes_as_the_callback_itself(name):
    callback = CALLBACKS[name]()
    fit(helpers.build("mlp"), callback)
    again = pickle.loads(pickle.dumps(callback))
    fit(helpers.build("mlp"), again)
    assert again.report.masks == callback.report.masks


@pytest.mark.parametrize("make", [copy.deepcopy, lambda callback: callback], ids=["copy", "itself"])
def test_a_table_of_layers_stays_with_its_model_and_one_of_names_goes_along(make):
    first, other = helpers.build("mlp"), helpers.build("mlp")
    callback = make(tf_prune.MagnitudePruning(0.5, scope={first.get_layer("head"): 0.9}))
    with pytest.raises(ValueError, match=r"goes with their model alone; .* use their names"):
        fit(other, callback)
    by_name = make(tf_prune.MagnitudePruning(0.5, scope={"head": 0.9}))
    fit(other, by_name)
    assert by_name.report.masks == tf_prune.prune(first, "magnitude", 0.5, scope={first.get_layer("head"): 0.9}).masks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of KerasTuner, about threads
@pytest.mark.parametrize("data", DATA_OF_TUNERS.values(), ids=DATA_OF_TUNERS.keys())
def test_a_tuner_prunes_every_trial(tmp_path, data):
    keras_tuner = pytest.importorskip("keras_tuner")
    sparsities = []

    def build(hyperparameters):
        hyperparameters.Float("unused", 0.0, 1.0)
        return helpers.build("mlp")

    class Search(keras_tuner.RandomSearch):
        def _configure_tensorboard_dir(self, *args):
            """TensorBoard is not among what TensorFlow installs."""

    class Record(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            sparsities.append(tf_prune.masks_of(self.model).sparsity)

        def __deepcopy__(self, memo):
            return self

    tuner = Search(build, "loss", max_trials=2, directory=tmp_path, overwrite=True)
    tuner.search(
        *helpers.batch(32), epochs=1, verbose=0, callbacks=[tf_prune.SnipPruning(0.8, data, verbose=0), Record()]
    )
    np.testing.assert_allclose(sparsities, 0.8, atol=1e-3)
    assert len(sparsities) == 2
