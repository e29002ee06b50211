import keras
import numpy as np
import pytest
from keras import layers

import tf_prune
from tests import helpers

ORTHOGONAL = ("orthogonal", "delta_orthogonal", "convolution_orthogonal")


def circular_convolution(image, kernel):
    """By plain sums over the taps: y[p, o] = sum over taps t and inputs i of x[p + t, i] k[t, i, o]."""
    window = kernel.shape[:-2]
    result = np.zeros((*image.shape[:-1], kernel.shape[-1]))
    for tap in np.ndindex(*window):
        shifted = np.roll(image, [-t for t in tap], tuple(range(len(window))))
        result += shifted @ kernel[tap]
    return result


def circular_matrix(kernel, size):
    """The matrix of the circular convolution of images of this size."""
    shape = (*[size] * (kernel.ndim - 2), kernel.shape[-2])
    return np.stack([circular_convolution(one.reshape(shape), kernel).ravel() for one in np.eye(int(np.prod(shape)))])


@pytest.mark.parametrize("name", ORTHOGONAL)
@pytest.mark.parametrize("shape", [(40, 40), (40, 10), (10, 40), (1, 5), (5, 1)])
def test_dense_kernels_have_all_singular_values_equal_to_the_gain(name, shape):
    kernel = np.asarray(tf_prune.INITIALIZERS[name](gain=1.5, seed=0)(shape), np.float64)
    np.testing.assert_allclose(np.linalg.svd(kernel, compute_uv=False), 1.5, rtol=1e-6)


@pytest.mark.parametrize("name", ["delta_orthogonal", "convolution_orthogonal"])
@pytest.mark.parametrize(
    "shape", [(3, 3, 4, 4), (3, 3, 2, 5), (2, 2, 3, 3), (5, 3, 2, 2), (1, 1, 3, 4), (3, 2, 6), (2, 3, 2, 2, 2)]
)
def test_convolutions_keep_the_norm_of_every_image(name, shape):
    kernel = np.asarray(tf_prune.INITIALIZERS[name](seed=1)(shape), np.float64)
    image = np.random.default_rng(0).standard_normal((*[6] * (len(shape) - 2), shape[-2]))
    assert np.linalg.norm(circular_convolution(image, kernel)) == pytest.approx(np.linalg.norm(image), rel=1e-5)


@pytest.mark.parametrize("name", ["delta_orthogonal", "convolution_orthogonal"])
def test_convolutions_with_more_inputs_than_outputs_have_an_isometry_for_a_transpose(name):
    kernel = np.asarray(tf_prune.INITIALIZERS[name](seed=1)((3, 3, 5, 2)), np.float64)
    values = np.linalg.svd(circular_matrix(kernel, 5), compute_uv=False)
    np.testing.assert_allclose(values, 1, rtol=1e-5)


def test_the_two_dimensional_kernel_fills_its_window_and_the_delta_does_not():
    taps = {
        name: np.asarray(tf_prune.INITIALIZERS[name](seed=0)((3, 3, 8, 8))).any((2, 3)).sum() for name in ORTHOGONAL
    }
    assert taps == {"orthogonal": 9, "delta_orthogonal": 1, "convolution_orthogonal": 9}


def test_the_reshaped_kind_maps_patches_isometrically_and_images_not():
    kernel = np.asarray(tf_prune.Orthogonal(seed=0)((3, 3, 4, 6)), np.float64)
    np.testing.assert_allclose(kernel.reshape(36, 6).T @ kernel.reshape(36, 6), np.eye(6), atol=1e-6)
    assert np.linalg.cond(circular_matrix(kernel, 5)) > 2


def test_a_delta_kernel_is_the_same_map_at_each_pixel_under_keras_padding():
    x = np.random.default_rng(0).standard_normal((2, 7, 6, 3)).astype(np.float32)
    for window in (2, 3, 4):
        kernel = tf_prune.DeltaOrthogonal(seed=0)((window, window, 3, 3))
        y = np.asarray(keras.ops.conv(x, kernel, padding="same"))
        np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "variance"),
    [("lecun_normal", 1 / 1800), ("glorot_normal", 2 / 2700), ("he_normal", 2 / 1800)],
)
def test_variance_scaling_counts_the_window_and_is_not_truncated(name, variance):
    values = np.asarray(tf_prune.INITIALIZERS[name](seed=0)((3, 3, 200, 100)), np.float64).ravel()
    assert values.var() == pytest.approx(variance, rel=0.02)
    # Of a normal distribution 4.55 % are beyond two standard deviations; truncated there, none.
    assert (np.abs(values) > 2 * np.sqrt(variance)).mean() == pytest.approx(0.0455, rel=0.03)


def test_gamma_is_the_variance_whatever_the_shape():
    for shape in ((10, 4000), (4000, 10)):
        assert np.asarray(tf_prune.ScaledGaussian(0.04, seed=0)(shape)).var() == pytest.approx(0.04, rel=0.03)
    assert not np.asarray(tf_prune.ScaledGaussian(0.0)((3, 3))).any()


@pytest.mark.parametrize("name", tf_prune.INITIALIZERS)
def test_initializers_travel_in_a_models_file(name, tmp_path):
    initializer = tf_prune.INITIALIZERS[name](seed=5)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, kernel_initializer=initializer)])
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").layers[0].kernel_initializer
    assert type(again) is type(initializer)
    assert again.get_config() == initializer.get_config()
    np.testing.assert_array_equal(again((4, 3)), np.asarray(model.layers[0].kernel))


@pytest.mark.parametrize("name", tf_prune.INITIALIZERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_initializers_give_the_type_and_shape_that_is_asked_for(name, dtype):
    kernel = tf_prune.INITIALIZERS[name](seed=0)([3, 3, 2, 4], dtype)
    assert (tuple(kernel.shape), keras.backend.standardize_dtype(kernel.dtype)) == ((3, 3, 2, 4), dtype)


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_no_seed_and_other_seeds_give_other_kernels(name):
    initializer = tf_prune.INITIALIZERS[name]
    assert not np.array_equal(initializer(seed=0)((4, 4)), initializer(seed=1)((4, 4)))
    generator = initializer(seed=keras.random.SeedGenerator(0))
    assert not np.array_equal(generator((4, 4)), generator((4, 4)))


@pytest.mark.parametrize("name", ORTHOGONAL)
def test_orthogonal_matrices_are_as_likely_as_their_negatives(name):
    corners = [float(np.asarray(tf_prune.INITIALIZERS[name](seed=seed)((3, 3)))[0, 0]) for seed in range(200)]
    assert abs(np.mean(corners)) < 4 * np.std(corners) / np.sqrt(200)
    assert np.mean(np.square(corners)) == pytest.approx(1 / 3, rel=0.3)


def test_a_deep_linear_network_of_orthogonal_layers_is_an_isometry():
    keras.utils.set_random_seed(0)
    deep = [layers.Dense(32, kernel_initializer="zeros") for _ in range(50)]
    model = keras.Sequential([keras.Input((32,)), *deep])
    tf_prune.reinitialize(model, "orthogonal")
    spectrum = tf_prune.jacobian_spectrum(model, np.ones((3, 32)), verbose=0)
    np.testing.assert_allclose(spectrum.values, 1, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tf_prune.Orthogonal(gain=0), "gain must be a positive number, got 0"),
        (lambda: tf_prune.DeltaOrthogonal(gain=float("nan")), "gain must be a positive number, got nan"),
        (lambda: tf_prune.Orthogonal()((3,)), r"at least two axes, inputs and outputs; got the shape \(3,\)"),
        (lambda: tf_prune.ScaledGaussian(-1.0), "gamma is a variance and cannot be negative, got -1.0"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -- reinitialize ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", helpers.MODELS)
def test_every_kernel_of_every_model_is_drawn_anew_and_nothing_else(name):
    model = helpers.build(name)
    survey = tf_prune.find_prunable(model)
    before = {id(v): np.asarray(v).copy() for v in model.variables}
    tf_prune.reinitialize(model, tf_prune.ScaledGaussian(0.25, seed=0))
    kernels = {id(v) for v in survey.prunable.values()}
    for variable in model.variables:
        assert np.array_equal(variable, before[id(variable)]) != (id(variable) in kernels), variable.path
    values = np.concatenate([np.asarray(v).ravel() for v in survey.prunable.values()])
    assert values.std() == pytest.approx(0.5, rel=0.15)
    assert len(np.unique(values)) == values.size  # no kernel, gate or group repeats another one


@pytest.mark.parametrize("name", helpers.MODELS)
def test_each_gate_group_and_channel_becomes_an_isometry_of_its_own(name):
    model = helpers.build(name)
    tf_prune.reinitialize(model, tf_prune.Orthogonal(seed=3))
    survey = tf_prune.find_prunable(model)
    for path, variable in survey.prunable.items():
        matrices = survey.layouts[path].to_matrices(np.asarray(variable, np.float64))
        for matrix in matrices.reshape(len(matrices), -1, matrices.shape[-1]):
            np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False), 1, atol=1e-5, err_msg=path)


def test_gates_of_recurrent_kernels_are_matrices_in_keras_order():
    model = helpers.build("recurrent")
    tf_prune.reinitialize(model, "orthogonal")
    cell = model.get_layer("gru").cell
    for kernel in (cell.kernel, cell.recurrent_kernel):
        for gate in np.split(np.asarray(kernel, np.float64), 3, axis=1):
            np.testing.assert_allclose(np.linalg.svd(gate, compute_uv=False), 1, atol=1e-5)


def test_a_seed_gives_the_same_model_again_and_layers_that_differ():
    models = [
        keras.Sequential([keras.Input((8,)), layers.Dense(8, name="a"), layers.Dense(8, name="b")]) for _ in range(2)
    ]
    for model in models:
        tf_prune.reinitialize(model, tf_prune.Orthogonal(seed=7))
    for one, other in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(models[0].layers[0].kernel, models[0].layers[1].kernel)


def test_masks_stay_and_pruned_weights_are_zero_after_reinitializing_and_training():
    model = helpers.build("mlp")
    data = helpers.batch()
    masks = tf_prune.prune(model, "snip", 0.8, data, verbose=0).masks
    tf_prune.reinitialize(model, "glorot_normal")
    helpers.assert_masks_hold(model, masks)
    model.fit(*data, verbose=0)
    helpers.assert_masks_hold(model, masks)
    assert tf_prune.masks_of(model) == masks


def test_filters_choose_what_is_drawn_anew():
    model = helpers.build("mlp")
    before = model.get_weights()
    tf_prune.reinitialize(model, "he_normal", filters="head")
    changed = [not np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True)]
    assert changed == [False, False, True, False]


def test_an_initializer_of_keras_that_draws_nothing_is_taken_as_it_is():
    model = helpers.build("mlp")
    tf_prune.reinitialize(model, keras.initializers.Constant(2.0))
    assert (np.asarray(model.get_layer("head").kernel) == 2).all()


@pytest.mark.parametrize(
    ("initializer", "message"),
    [
        ("orthogonl", "Unknown initializer 'orthogonl'. Expected one of Keras, or of 'orthogonal'"),
        (keras.initializers.Constant(np.nan), "values that are not finite for .*hidden/kernel"),
    ],
)
def test_a_wrong_initializer_leaves_the_model_as_it_was(initializer, message):
    model = helpers.build("mlp")
    before = helpers.state(model)
    with pytest.raises(ValueError, match=message):
        tf_prune.reinitialize(model, initializer)
    helpers.assert_same_state(before, model)
