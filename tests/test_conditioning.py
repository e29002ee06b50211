import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers
from scipy.optimize import approx_fprime

import tf_prune
from tests import helpers
from tests.test_initializers import circular_convolution
from tf_prune.isometry import MaskedIsometry
from tf_prune.structures import Layout


def dense_layout(*shape):
    return Layout("dense", shape, shape, (0,), (1,))


def convolution_layout(*shape):
    return Layout("convolution", shape, shape, (len(shape) - 2,), (len(shape) - 1,))


def gap_of(matrix):
    """Of a dense matrix, without its dead rows and columns."""
    alive = matrix[matrix.any(1)][:, matrix.any(0)]
    values = np.linalg.svd(alive, compute_uv=False)
    return np.sqrt(np.mean((values**2 - 1) ** 2))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 2**31))
def test_the_gap_of_a_dense_kernel_is_that_of_its_singular_values(rows, columns, seed):
    generator = np.random.default_rng(seed)
    mask = generator.random((rows, columns)) < 0.6
    mask[0, 0] = True
    kernel = generator.standard_normal(mask.shape) * mask
    problem = MaskedIsometry(dense_layout(rows, columns), mask, (), 1.0)
    assert problem.gap(kernel[mask]) == pytest.approx(gap_of(kernel), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("window", [(3, 3), (2, 4)])
def test_the_gap_of_a_convolution_is_that_of_its_circular_matrix(strides, window):
    generator = np.random.default_rng(0)
    kernel = generator.standard_normal((*window, 2, 3))
    size = 12  # divisible by the strides, and longer than two windows
    rows = []
    for one in np.eye(size * size * 2):
        y = circular_convolution(one.reshape(size, size, 2), kernel)
        rows.append(y[:: strides[0], :: strides[1]].ravel())
    values = np.linalg.svd(np.stack(rows), compute_uv=False)
    mask = np.ones(kernel.shape, bool)
    problem = MaskedIsometry(convolution_layout(*kernel.shape), mask, strides, 1.0)
    assert problem.gap(kernel.ravel()) == pytest.approx(np.sqrt(np.mean((values**2 - 1) ** 2)), rel=1e-6)


@pytest.mark.parametrize("name", helpers.MODELS)
def test_the_gradient_agrees_with_finite_differences_for_every_kernel(name):
    model = helpers.build(name)
    survey = tf_prune.find_prunable(model)
    generator = np.random.default_rng(0)
    for path, layout in survey.layouts.items():
        mask = generator.random(layout.shape) < 0.3
        strides = tuple(getattr(survey.layers[path], "strides", ()))
        problem = MaskedIsometry(layout, mask, strides, 1.3)
        weights = generator.standard_normal(mask.sum())
        expected = approx_fprime(weights, lambda w, problem=problem: problem._value(w)[0], 1e-6)
        value = problem._value(weights)[1]
        np.testing.assert_allclose(value, expected, atol=1e-5 * np.abs(expected).max(), err_msg=path)


@pytest.mark.parametrize("strides", [(2, 2), (3, 2)])
def test_the_gradient_of_a_strided_convolution_agrees_with_finite_differences(strides):
    generator = np.random.default_rng(0)
    mask = generator.random((5, 3, 2, 4)) < 0.4
    problem = MaskedIsometry(convolution_layout(*mask.shape), mask, strides, 1.0)
    weights = generator.standard_normal(mask.sum())
    expected = approx_fprime(weights, lambda w: problem._value(w)[0], 1e-6)
    np.testing.assert_allclose(problem._value(weights)[1], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", helpers.MODELS)
def test_kernels_are_cut_into_matrices_and_put_together_again(name):
    survey = tf_prune.find_prunable(helpers.build(name))
    for path, layout in survey.layouts.items():
        kernel = np.random.default_rng(0).standard_normal(layout.shape)
        matrices = layout.to_matrices(kernel)
        assert matrices.size == kernel.size
        np.testing.assert_array_equal(layout.from_matrices(matrices), kernel, err_msg=path)


@pytest.mark.parametrize("name", ["mlp", "conv_bn", "recurrent", "attention", "separable"])
def test_every_gap_shrinks_no_mask_changes_and_training_keeps_them(name):
    model = helpers.build(name)
    data = helpers.batch()
    masks = tf_prune.prune(model, "random", 0.4, scope="layerwise", verbose=0).masks
    others = {v.path: np.asarray(v).copy() for v in model.variables if v.path not in masks}
    report = tf_prune.condition(model, verbose=0)
    assert list(report) == list(masks)
    for path, layer in report.items():
        assert layer.floor - 1e-6 <= layer.after <= layer.before, path
    assert np.mean([layer.gain for layer in report.values()]) > 3
    assert tf_prune.masks_of(model) == masks
    helpers.assert_pruned_is_zero(model, masks)
    for variable in model.variables:
        if variable.path in others:
            np.testing.assert_array_equal(variable, others[variable.path])
    model.fit(*data, verbose=0)
    helpers.assert_pruned_is_zero(model, masks)
    assert tf_prune.masks_of(model) == masks


def test_a_mask_that_is_a_permutation_becomes_exactly_one():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(6, name="dense")], name="m")
    mask = np.eye(6, dtype=bool)[np.random.default_rng(0).permutation(6)]
    report = tf_prune.condition(model, {"m/dense/kernel": mask}, gain=1.5, verbose=0)
    kernel = np.asarray(model.layers[0].kernel)
    np.testing.assert_allclose(np.abs(kernel[mask]), 1.5, rtol=1e-5)
    assert report["m/dense/kernel"].after < 1e-5


def test_the_floor_is_what_a_largest_matching_leaves():
    mask = np.zeros((4, 4), bool)
    mask[:, 0] = True  # four inputs of one output, and one more
    mask[0, 1] = True
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="dense")], name="m")
    layer = tf_prune.condition(model, {"m/dense/kernel": mask}, verbose=0)["m/dense/kernel"]
    assert (layer.size, layer.dead_inputs, layer.dead_outputs, layer.floor) == (2, 0, 2, 0.0)
    tf_prune.reinitialize(model, "orthogonal")
    tf_prune.remove_masks(model)
    tf_prune.reinitialize(model, "orthogonal")
    mask = np.zeros((4, 4), bool)
    mask[:2, 0] = mask[2:, 1] = mask[2:, 2] = True
    mask[3, 3] = True
    layer = tf_prune.condition(model, {"m/dense/kernel": mask}, verbose=0)["m/dense/kernel"]
    assert layer.floor == pytest.approx(np.sqrt(1 - 3 / 4))  # inputs 0 and 1 have a single output between them
    assert layer.after == pytest.approx(layer.floor, rel=1e-3)


def test_weights_that_are_not_finite_are_an_error():
    model = helpers.build("mlp")
    masks = tf_prune.prune(model, "random", 0.5, verbose=0).masks
    model.get_layer("head").kernel.assign(np.where(masks["mlp/head/kernel"], np.nan, 0.0))
    with pytest.raises(ValueError, match="The kept weights of mlp/head/kernel are not finite"):
        tf_prune.condition(model, verbose=0)


def test_masks_of_the_same_model_built_again_fit():
    masks = tf_prune.prune(helpers.build("mlp"), "random", 0.5, verbose=0).masks
    renamed = tf_prune.Masks({path.replace("mlp", "other"): mask for path, mask in masks.items()})
    assert tf_prune.condition(helpers.build("mlp"), renamed, verbose=0).keys() == masks.keys()


def test_dead_channels_are_counted_where_they_are():
    up = layers.Conv2DTranspose(4, 3, 2, name="up")
    down = layers.Conv2D(3, 3, 2, name="down")
    model = keras.Sequential([keras.Input((3, 3, 5)), up, down], name="m")
    masks = {"m/up/kernel": np.ones((3, 3, 4, 5), bool), "m/down/kernel": np.ones((3, 3, 4, 3), bool)}
    masks["m/up/kernel"][:, :, 1:3] = False  # two outputs
    masks["m/down/kernel"][:, :, 0] = False  # one input
    report = tf_prune.condition(model, masks, max_iterations=2, verbose=0)
    assert [(layer.dead_inputs, layer.dead_outputs) for layer in report.values()] == [(0, 2), (1, 0)]


def test_a_transposed_convolution_has_its_stride_on_its_outputs():
    keras.utils.set_random_seed(0)
    transposed = layers.Conv2DTranspose(4, 2, 2, name="up")
    model = keras.Sequential([keras.Input((3, 3, 2)), transposed], name="m")
    masks = {"m/up/kernel": np.random.default_rng(0).random((2, 2, 4, 2)) < 0.6}
    assert tf_prune.condition(model, masks, verbose=0)["m/up/kernel"].after < 1e-4
    # Without overlaps the layer is a plain matrix, whose Jacobian is an isometry of what it reads.
    np.testing.assert_allclose(tf_prune.jacobian_spectrum(model, np.ones((1, 3, 3, 2)), verbose=0).values, 1, atol=1e-3)


def test_conditioned_networks_have_smaller_condition_numbers():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((60,)), *[layers.Dense(40, "tanh") for _ in range(4)], layers.Dense(10)])
    tf_prune.reinitialize(model, "glorot_normal")
    x = np.random.default_rng(0).standard_normal((20, 60))
    tf_prune.prune(model, "random", 0.8, scope="layerwise", verbose=0)
    before = tf_prune.jacobian_spectrum(model, x, verbose=0)
    tf_prune.condition(model, verbose=0)
    after = tf_prune.jacobian_spectrum(model, x, verbose=0)
    assert after.mean_condition_number < before.mean_condition_number / 2
    assert after.isometry_gap < before.isometry_gap


def test_the_report_shows_every_kernel():
    model = helpers.build("mlp")
    tf_prune.prune(model, "random", 0.5, verbose=0)
    text = str(tf_prune.condition(model, verbose=0))
    for word in ("hidden", "head", "before", "after", "floor", "dead in"):
        assert word in text


def fitted(callbacks, epochs=1, seed=0, **options):
    model = helpers.build("mlp", seed=seed)
    model.fit(*helpers.batch(), epochs=epochs, callbacks=callbacks, verbose=0, **options)
    return model


def test_the_callback_conditions_what_was_pruned_before_it():
    callback = tf_prune.ConditionBeforeTraining(verbose=0)
    pruning = tf_prune.SnipPruning(0.7, data=helpers.batch(), verbose=0)
    model = fitted([pruning, callback], epochs=2)
    assert list(callback.report) == list(pruning.report.masks)
    assert tf_prune.masks_of(model) == pruning.report.masks
    by_hand = helpers.build("mlp")
    tf_prune.prune(by_hand, "snip", 0.7, helpers.batch(), verbose=0)
    tf_prune.condition(by_hand, verbose=0)
    by_hand.fit(*helpers.batch(), epochs=2, verbose=0)
    for one, other in zip(model.get_weights(), by_hand.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_callback_leaves_a_model_that_was_trained(tmp_path):
    def callbacks(conditioning):
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
        return [tf_prune.SnipPruning(0.7, data=helpers.batch(), verbose=0), conditioning, backup]

    first, second = (tf_prune.ConditionBeforeTraining(verbose=0) for _ in range(2))
    fitted(callbacks(first), epochs=1)
    fitted(callbacks(second), epochs=2, seed=1)
    assert first.report is not None
    assert second.report is None


def test_the_callback_says_where_it_belongs():
    with pytest.raises(ValueError, match="Put it behind the callback that prunes"):
        fitted([tf_prune.ConditionBeforeTraining(), tf_prune.SnipPruning(0.7, data=helpers.batch())])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no masks, so there is nothing to condition: prune it before"),
        ({"masks": {"nowhere": np.ones((2, 2), bool)}}, "The masks name 'nowhere', which is not a prunable variable"),
        ({"masks": {"mlp/head/kernel": np.ones((2, 2), bool)}}, r"\(2, 2\)"),
        ({"gain": -1.0}, "gain must be a positive number, got -1.0"),
        ({"max_iterations": 0}, "max_iterations must be a positive integer, got 0"),
    ],
)
def test_wrong_arguments_leave_the_model_as_it_was(options, message):
    model = helpers.build("mlp")
    before = helpers.state(model)
    with pytest.raises(ValueError, match=message):
        tf_prune.condition(model, verbose=0, **options)
    helpers.assert_same_state(before, model)


def test_kept_weights_that_are_all_zero_are_an_error():
    model = helpers.build("mlp")
    model.get_layer("head").kernel.assign(np.zeros((16, 4)))
    with pytest.raises(ValueError, match=r"The kept weights of mlp/head/kernel are zero. Begin with reinitialize"):
        tf_prune.condition(model, {"mlp/head/kernel": np.ones((16, 4), bool)}, verbose=0)


def test_a_kernel_that_pruning_emptied_is_left_out():
    model = helpers.build("mlp")
    mask = np.random.default_rng(0).random((36, 16)) < 0.5
    masks = {"mlp/hidden/kernel": mask, "mlp/head/kernel": np.zeros((16, 4), bool)}
    assert list(tf_prune.condition(model, masks, verbose=0)) == ["mlp/hidden/kernel"]
    assert not np.asarray(model.get_layer("head").kernel).any()


def test_each_expert_is_drawn_and_conditioned_by_itself():
    model = keras.Sequential([keras.Input((3, 8)), layers.EinsumDense("bgi,gio->bgo", (3, 4), name="experts")])
    tf_prune.reinitialize(model, "orthogonal")
    kernel = model.get_layer("experts").kernel
    for expert in np.asarray(kernel):
        np.testing.assert_allclose(expert.T @ expert, np.eye(4), atol=1e-5)
    masks = tf_prune.prune(model, "random", 0.5).masks
    ((_, layer),) = tf_prune.condition(model, verbose=0).items()
    (mask,) = masks.values()
    alive = [min(one.any(0).sum(), one.any(1).sum()) for one in mask]
    assert layer.size == sum(alive)
    gaps = [gap_of(one.astype(np.float64)) ** 2 * n for one, n in zip(np.asarray(kernel), alive, strict=True)]
    assert layer.after == pytest.approx(np.sqrt(sum(gaps) / sum(alive)), abs=1e-4)


def test_what_reads_the_state_of_a_convolutional_lstm_has_no_stride():
    model = keras.Sequential([keras.Input((2, 8, 8, 2)), layers.ConvLSTM2D(2, 3, strides=2, padding="same")])
    masks = tf_prune.prune(model, "random", 0.3, scope="layerwise").masks
    report = tf_prune.condition(model, max_iterations=20, verbose=0)
    survey = tf_prune.find_prunable(model)
    for (path, layer), strides in zip(report.items(), [(2, 2), (1, 1)], strict=True):
        problem = MaskedIsometry(survey.layouts[path], masks[path], strides, 1.0)
        kernel = np.asarray(survey.prunable[path], np.float64)
        assert layer.after == pytest.approx(problem.gap(kernel[masks[path]]), rel=1e-3)
