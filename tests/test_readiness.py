import keras
import numpy as np
import pytest
from keras import layers

import tf_prune
from benchmarks import applications
from tests import helpers
from tf_prune.precision import computing_in

# As small as they are made. All but V2B0, whose first blocks are of 3x3 convolutions, become ready.
APPLICATIONS = {
    "MobileNet": {"alpha": 0.25},
    "MobileNetV2": {"alpha": 0.35},
    "MobileNetV3Small": {},
    "MobileNetV3Large": {},
    "EfficientNetB0": {},
    "EfficientNetV2B0": {},
}


def application(name):
    return getattr(keras.applications, name)(
        weights=None, input_shape=(64, 64, 3), classes=10, **APPLICATIONS.get(name, {})
    )


def block(strided, **options):
    return [
        keras.Input((16, 16, 3)),
        *strided,
        layers.Conv2D(6, 1, name="pointwise"),
        layers.GlobalAveragePooling2D(name="pool", **options),
        layers.Dense(2, name="head"),
    ]


def x_of(model, count=3):
    return np.random.default_rng(1).standard_normal((count, *model.input_shape[1:])).astype("float32")


def assert_trains_and_predicts(ready, x, from_logits):
    """In graphs, which TensorFlow optimizes, as where each operation runs by itself; and a step moves the kernels."""
    np.testing.assert_allclose(ready.predict(x, verbose=0), np.asarray(ready(x)), rtol=1e-4, atol=1e-6)
    kernels = [weight for weight in ready.trainable_weights if len(weight.shape) > 1]
    before = [np.asarray(kernel).copy() for kernel in kernels]
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=from_logits)
    ready.compile(keras.optimizers.SGD(0.1, clipnorm=1.0), loss)
    history = ready.fit(x, np.arange(len(x)), verbose=0).history
    assert np.isfinite(history["loss"]).all()
    moved = [(old != np.asarray(new)).any() for old, new in zip(before, kernels, strict=True)]
    assert np.mean(moved) > 0.9


@pytest.mark.parametrize("name", APPLICATIONS)
def test_the_mobile_nets_of_keras_are_made_ready_with_their_shapes_names_and_weights_and_train(name):
    model = application(name)
    before = helpers.state(model)
    ready, report = tf_prune.make_ready(model)
    helpers.assert_same_state(before, model)
    assert report.is_ready == (name != "EfficientNetV2B0"), str(report)
    assert ready.output_shape == model.output_shape
    assert [v.path for v in ready.weights] == [v.path for v in model.weights]
    for old, new in zip(model.get_weights(), ready.get_weights(), strict=True):
        np.testing.assert_array_equal(old.ravel(), new.ravel())
    changed = {change.where for change in report.changes}
    assert changed
    assert all(name in str(report) for name in changed)
    assert not all(change.is_exact for change in report.changes)  # each has uneven paddings
    assert not report.is_trained
    assert_trains_and_predicts(ready, x_of(model, 2), from_logits=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", applications.constructors())
def test_what_is_made_ready_of_keras_applications_trains_and_predicts(name):
    model = applications.build(name)
    x = x_of(model, 2)
    ready, report = tf_prune.make_ready(model)
    if all(change.is_exact for change in report.changes):  # in float64: the signal of deep ones fades in float32
        with computing_in(model, "float64"), computing_in(ready, "float64"):
            expected = np.asarray(model(x))
            np.testing.assert_allclose(np.asarray(ready(x)), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    del model
    assert_trains_and_predicts(ready, x, from_logits=True)


def test_a_mobile_net_is_told_to_be_ready_only_when_it_is():
    model = application("MobileNet")
    assert not tf_prune.explain(model).ready
    ready, _ = tf_prune.make_ready(model)
    assert tf_prune.explain(ready).ready
    _, second = tf_prune.make_ready(ready)
    assert second.changes == ()


def test_images_of_one_pixel_are_explained():
    # The squeezed image has no axes left of more than one pixel, and neither has what is added to it.
    x = inputs = keras.Input((2, 2, 3))
    x = layers.Conv2D(8, 3, 2, "same", name="stem")(x)
    x = layers.Flatten()(x) + 3.0
    _, report = tf_prune.make_ready(keras.Model(inputs, layers.Conv2D(2, 1)(layers.Reshape((1, 1, 8))(x))))
    assert not report.is_ready


def test_even_padding_sees_the_image_shifted_by_one_pixel():
    # A window of one tap, in its first corner: `same` reads pixel 2i, padding on each side pixel 2i - 1.
    model = keras.Sequential(block([layers.Conv2D(3, 3, 2, "same", use_bias=False, name="stem")]))
    kernel = np.zeros((3, 3, 3, 3), "float32")
    kernel[0, 0] = np.eye(3)
    model.get_layer("stem").kernel.assign(kernel)
    x = x_of(model)
    ready, report = tf_prune.make_ready(model)
    of_stem = keras.Model(ready.inputs[0], ready.get_layer("stem").output)
    shifted = np.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))[:, :16:2, :16:2]
    np.testing.assert_array_equal(np.asarray(of_stem(x)), shifted)
    (change,) = report.changes
    assert (change.where, change.is_exact) == ("stem", False)


def test_padding_of_odd_images_was_even_already_and_cannot_be_written():
    inputs = keras.Input((17, 17, 3))
    x = layers.Conv2D(4, 3, 2, "same", name="stem")(inputs)
    x = layers.DepthwiseConv2D(5, 2, padding="same", name="depthwise")(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(6, 1)(x)))
    ready, report = tf_prune.make_ready(model)
    assert report.changes == ()
    np.testing.assert_array_equal(np.asarray(ready(x_of(model))), np.asarray(model(x_of(model))))
    assert [row.where for row in report.remaining] == ["stem", "depthwise"]
    assert all("odd size" in row.reason and "multiple of 32" in row.fix for row in report.remaining)


def test_uneven_padding_layers_are_replaced_where_sizes_stay():
    pads = [layers.ZeroPadding2D(((0, 1), (0, 1))), layers.Conv2D(4, 3, 2, name="stem")]
    model = keras.Sequential(block(pads))
    ready, report = tf_prune.make_ready(model)
    assert report.is_ready
    (change,) = report.changes
    assert (change.where, change.is_exact) == ("stem", False)
    assert "in the place of ZeroPadding2D(((0, 1), (0, 1)))" in change.what
    assert report.largest_difference > 0.01
    assert ready.get_layer("stem").output.shape == model.get_layer("stem").output.shape
    other = keras.Sequential(block([layers.ZeroPadding2D(((2, 3), (2, 3))), layers.Conv2D(4, 3, 2, name="stem")]))
    _, report = tf_prune.make_ready(other)
    assert report.changes == ()
    assert [row.where for row in report.remaining] == ["stem"]


def squeeze_and_excite(hard_sigmoid):
    x = inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(8, 3, 2, name="stem")(layers.ZeroPadding2D(1)(x))
    s = layers.GlobalAveragePooling2D(name="squeeze")(x)
    s = layers.Reshape((1, 1, 8))(s)
    s = hard_sigmoid(layers.Conv2D(8, 1, name="excite")(s))
    x = layers.Conv2D(6, 1)(layers.Multiply()([x, s]))
    x = layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)
    x = layers.Conv2D(5, 1, name="logits")(x)
    return keras.Model(inputs, layers.Flatten()(x))


@pytest.mark.parametrize(
    "hard_sigmoid",
    [
        lambda x: layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0),
        lambda x: (1.0 / 6.0) * keras.ops.relu6(3.0 + x),
        layers.Activation("hard_sigmoid"),
    ],
    ids=["keras.applications", "from the left", "activation"],
)
def test_squeezing_and_the_last_pooling_change_their_axes_and_no_output(hard_sigmoid, tmp_path):
    model = squeeze_and_excite(hard_sigmoid)
    assert {row.kind for row in tf_prune.explain(model).obstacles} == {"operator", "correctness", "sparsity"}
    ready, report = tf_prune.make_ready(model)
    assert report.is_ready, str(report)
    assert all(change.is_exact for change in report.changes)
    assert {"squeeze", "pool", "logits"} < {change.where for change in report.changes}
    x = x_of(model)
    np.testing.assert_allclose(np.asarray(ready(x)), np.asarray(model(x)), atol=1e-6)
    np.testing.assert_allclose(ready.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    ready.save(tmp_path / "ready.keras")
    loaded = keras.models.load_model(tmp_path / "ready.keras")
    np.testing.assert_array_equal(np.asarray(loaded(x_of(model))), np.asarray(ready(x_of(model))))


def test_a_model_that_is_ready_stays_as_it_is():
    model = keras.Sequential(block([layers.ZeroPadding2D(1), layers.Conv2D(4, 3, 2, name="stem")]))
    ready, report = tf_prune.make_ready(model)
    assert (report.changes, report.remaining, report.largest_difference) == ((), (), 0.0)
    assert ready is not model


def test_masks_and_compile_are_carried_over_and_hold():
    model = keras.Sequential(block([layers.Conv2D(4, 3, 2, "same", name="stem")]))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    tf_prune.prune(model, "magnitude", 0.5, verbose=0)
    ready, _ = tf_prune.make_ready(model)
    pairs = zip(tf_prune.masks_of(ready).values(), tf_prune.masks_of(model).values(), strict=True)
    assert all((new == old).all() and not new.all() for new, old in pairs)
    ready.fit(x_of(model, 8), np.zeros(8), verbose=0)
    for path, mask in tf_prune.masks_of(ready).items():
        (variable,) = [v for v in ready.weights if v.path == path]
        assert not np.asarray(variable)[~mask].any()


class OfOnesOwn(keras.losses.Loss):
    """A loss that Keras cannot find by its name."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_pred), -1)


@pytest.mark.parametrize("loss", [OfOnesOwn(), lambda y, z: keras.ops.mean(z**2)], ids=["class", "lambda"])
def test_losses_of_ones_own_are_carried_over_themselves(loss):
    model = keras.Sequential(block([layers.Conv2D(4, 3, 2, "same", name="stem")]))
    optimizer = keras.optimizers.SGD(0.25, momentum=0.5)
    model.compile(optimizer, loss, metrics=["mae"], jit_compile=False, steps_per_execution=2)
    model.fit(x_of(model, 8), np.zeros((8, 2)), batch_size=2, verbose=0)
    with pytest.warns(UserWarning, match="are trained"):
        ready, _ = tf_prune.make_ready(model)
    assert ready.loss is loss
    assert ready.optimizer is not optimizer
    assert ready.optimizer.get_config() == optimizer.get_config()
    assert (ready.jit_compile, ready.steps_per_execution) == (False, 2)
    assert model.compiled
    assert int(ready.optimizer.iterations) == 0
    assert set(ready.fit(x_of(model, 8), np.zeros((8, 2)), verbose=0).history) == {"loss", "mae"}


def test_what_cannot_be_compiled_again_is_said():
    class Odd(keras.optimizers.SGD):
        def __init__(self, secret):
            super().__init__()

    model = keras.Sequential(block([layers.Conv2D(4, 3, 2, "same", name="stem")]))
    model.compile(Odd("secret"), "mse")
    with pytest.warns(UserWarning, match=r"The new model is not compiled: .*Odd.*Compile it before you train it"):
        ready, _ = tf_prune.make_ready(model)
    assert not ready.compiled


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_constants_beside_squeezed_images_are_of_the_type_that_is_computed_in(policy):
    keras.config.set_dtype_policy(policy)
    model = squeeze_and_excite(lambda x: layers.ReLU(6.0)(x + 3.0) * (1.0 / 6.0))
    ready, report = tf_prune.make_ready(model)
    assert all(change.is_exact for change in report.changes)
    assert {tensor.dtype for layer in ready.layers[1:] for tensor in keras.tree.flatten(layer.output)} == {policy[6:]}
    x = x_of(model)
    np.testing.assert_allclose(ready.predict(x, verbose=0), model.predict(x, verbose=0), rtol=0.02, atol=0.02)


def test_nested_and_shared_layers_are_rebuilt_once():
    shared = layers.Conv2D(4, 1, name="shared")
    inner = keras.Sequential([keras.Input((8, 8, 4)), layers.DepthwiseConv2D(3, 2, "same", name="inner")])
    inputs = keras.Input((16, 16, 3))
    x = layers.Conv2D(4, 3, 2, "same", name="stem")(inputs)
    x = inner(shared(shared(x)))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(x))
    ready, report = tf_prune.make_ready(model)
    assert {change.where for change in report.changes} == {"stem", "inner"}
    assert len(ready.weights) == len(model.weights)
    assert report.is_ready


def test_layers_called_by_keyword_or_twice_and_lambdas_are_rebuilt():
    inputs = keras.Input((16, 16, 3))
    stem = layers.Conv2D(4, 3, 2, "same", name="stem")
    x = layers.Add()([stem(inputs=inputs), stem(layers.Lambda(lambda t: -t)(inputs))])
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(x)))
    ready, report = tf_prune.make_ready(model)
    assert report.is_ready, str(report)
    assert len(ready.weights) == len(model.weights)


def test_wrapped_models_are_to_be_stripped_first():
    wrapped = tf_prune.wrap(keras.Sequential(block([layers.Conv2D(4, 3, 2, "same", name="stem")])))
    with pytest.raises(ValueError, match=r"Layers are wrapped \(.*Call tf_prune\.strip\(model\) first"):
        tf_prune.make_ready(wrapped)


def test_trained_weights_are_said_to_be_trained():
    model = keras.Sequential(block([layers.Conv2D(4, 3, 2, "same"), layers.BatchNormalization()]))
    model.compile("sgd", "mse")
    model.fit(x_of(model, 8), np.zeros((8, 2)), verbose=0)
    with pytest.warns(
        UserWarning, match=r"are trained, and paddings changed: outputs differ by up to .* Train the new"
    ):
        _, report = tf_prune.make_ready(model)
    assert report.is_trained
    assert report.largest_difference > 0
    assert "Train the new model further" in str(report)


def test_what_cannot_be_changed_is_listed_whole():
    inputs = keras.Input((32, 32, 1))
    x = layers.Conv2D(8, 7, 2, "same", name="seven")(inputs)
    x = layers.MaxPooling2D(name="pool")(x)
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(layers.Conv2D(8, 1)(x)))
    _, report = tf_prune.make_ready(model)
    assert not report.is_ready
    assert [row.where for row in report.remaining] == ["seven", "pool"]
    assert "What could not be changed" in str(report)
    assert "make_ready" not in str(report)


def test_models_without_a_graph_or_a_size_are_refused():
    with pytest.raises(ValueError, match=r"'subclassed' is a Subclassed, whose operators are in its code"):
        tf_prune.make_ready(helpers.build("subclassed"))
    open_size = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 1), layers.GlobalAveragePooling2D()])
    with pytest.raises(ValueError, match="does not fix the size of its inputs"):
        tf_prune.make_ready(open_size)
