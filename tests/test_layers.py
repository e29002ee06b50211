import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tests import helpers

NAMES = [name for name in helpers.MODELS if name != "subclassed"]


def wrapped(name, optimizer="adam"):
    model = helpers.build(name)
    new = tf_prune.wrap(model)
    new.compile(optimizer, model.loss)
    return model, new


def mask_variables(model):
    return [v for layer in model._flatten_layers() if isinstance(layer, tf_prune.Masked) for v in layer.masks]


def fit(model, **options):
    x, y = helpers.batch(48)
    model.fit(x, y, batch_size=16, verbose=0, **options)


@pytest.mark.parametrize(
    ("name", "method"),
    [*((name, "snip") for name in NAMES), ("recurrent", "grasp"), ("nested", "force"), ("separable", "synflow")],
)
@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_scores_and_masks_are_those_of_the_plain_model(name, method):
    plain, new = wrapped(name)
    method = helpers.METHODS[method]
    data = helpers.batch()
    scores, expected = tf_prune.score(new, method, data), tf_prune.score(plain, method, data)
    assert list(scores) == list(expected)
    for path in scores:
        np.testing.assert_array_equal(scores[path], expected[path])
    assert (
        tf_prune.prune(new, method, 0.6, data, verbose=0).masks
        == tf_prune.prune(plain, method, 0.6, data, verbose=0).masks
    )


@pytest.mark.parametrize("name", NAMES)
def test_masks_hold_and_come_back_with_the_file_and_hold_again(name, tmp_path):
    _, model = wrapped(name)
    masks = tf_prune.prune(model, "snip", 0.6, helpers.batch()).masks
    fit(model)
    helpers.assert_masks_hold(model, masks)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    again = tf_prune.masks_of(loaded)
    assert all(np.array_equal(a, b) for a, b in zip(again.values(), masks.values(), strict=True))
    fit(loaded)
    helpers.assert_masks_hold(loaded, again)
    x, _ = helpers.batch()
    plain = tf_prune.strip(loaded)
    assert not mask_variables(plain)
    np.testing.assert_array_equal(plain(x), loaded(x))
    for mask, expected in zip(tf_prune.masks_of(plain).values(), again.values(), strict=True):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sparsity", [None, 0.7])
def test_strip_of_wrap_is_the_identity(name, sparsity):
    model = helpers.build(name)
    if sparsity:
        tf_prune.prune(model, "magnitude", sparsity)
    again = tf_prune.strip(tf_prune.wrap(model))
    assert again.get_config() == model.get_config()
    assert [v.path.split("/")[-2:] for v in again.weights] == [v.path.split("/")[-2:] for v in model.weights]
    for a, b in zip(again.weights, model.weights, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(tf_prune.masks_of(again).values(), tf_prune.masks_of(model).values(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_by_the_masks_is_the_connection_sensitivity(name):
    plain, model = wrapped(name)
    x, y = helpers.batch()
    masks = {id(v): tf.convert_to_tensor(v.value) for v in mask_variables(model)}
    with tf.GradientTape() as tape:
        tape.watch(list(masks.values()))
        outputs, _ = model.stateless_call(
            [v.value for v in model.trainable_variables],
            [masks.get(id(v), v.value) for v in model.non_trainable_variables],
            x,
            training=False,
        )
        loss = plain.loss(y, outputs)
    scores = tf_prune.score(plain, tf_prune.SNIP(training=False), (x, y))
    for expected, gradient in zip(scores.values(), tape.gradient(loss, list(masks.values())), strict=True):
        np.testing.assert_allclose(np.abs(gradient), expected, rtol=2e-4, atol=1e-7)


def test_masks_that_are_substituted_gate_the_kernels_and_leave_the_model_alone():
    plain, model = wrapped("conv_bn")
    x, _ = helpers.batch()
    gates = {id(v): np.random.default_rng(0).random(v.shape).astype("float32") for v in mask_variables(model)}
    before = helpers.state(model)
    non_trainable = [gates.get(id(v), v.value) for v in model.non_trainable_variables]
    outputs, updated = model.stateless_call(
        [v.value for v in model.trainable_variables], non_trainable, x, training=True
    )
    helpers.assert_same_state(before, model)
    for variable, gate in zip(tf_prune.find_prunable(plain).prunable.values(), gates.values(), strict=True):
        variable.assign(variable * gate)
    plain.get_layer("dropout").seed_generator.state.assign(
        next(v for v in model.variables if "seed_generator_state" in v.path)
    )
    np.testing.assert_allclose(outputs, plain(x, training=True), rtol=1e-5, atol=1e-6)
    moved = {v.name: u for v, u in zip(model.non_trainable_variables, updated, strict=True)}
    np.testing.assert_allclose(moved["moving_mean"], plain.get_layer("norm").moving_mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_the_forward_pass_runs_the_same_operations(name):
    x, _ = helpers.batch()

    def operations(model):
        graph = tf.function(lambda x: model(x, training=False)).get_concrete_function(tf.constant(x)).graph
        return sorted(operation.type for operation in graph.get_operations())

    plain, model = wrapped(name)
    assert operations(model) == operations(plain)


def test_weights_files_config_and_clones_carry_the_masks(tmp_path):
    _, model = wrapped("recurrent")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    model.optimizer.build(model.trainable_variables)
    model.save_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    clone.compile("adam", model.loss)
    clone.optimizer.build(clone.trainable_variables)
    assert tf_prune.masks_of(clone).num_kept == masks.num_weights
    clone.load_weights(tmp_path / "model.weights.h5")
    assert tf_prune.masks_of(clone).num_kept == masks.num_kept
    rebuilt = keras.Sequential.from_config(model.get_config())
    rebuilt.set_weights(model.get_weights())
    assert tf_prune.masks_of(rebuilt).num_kept == masks.num_kept
    fit(clone)
    helpers.assert_masks_hold(clone, tf_prune.masks_of(clone))


def test_a_mask_takes_a_bit_a_weight_in_the_file(tmp_path):
    sizes = []
    for make in (lambda layer: layer, tf_prune.Masked):
        model = keras.Sequential([keras.Input((256,)), make(keras.layers.Dense(256))])
        model.save(tmp_path / "model.keras")
        sizes.append((tmp_path / "model.keras").stat().st_size)
    assert 256 * 256 / 8 <= sizes[1] - sizes[0] < 256 * 256 / 8 + 6000


def test_a_file_without_masks_is_an_error_that_says_so(tmp_path):
    plain, model = wrapped("mlp")
    for one in (plain, model):
        one.optimizer.build(one.trainable_variables)
    plain.save_weights(tmp_path / "plain.weights.h5")
    with pytest.raises(ValueError, match="not wrapped"):
        model.load_weights(tmp_path / "plain.weights.h5")


def test_removed_masks_are_ones_and_can_be_set_again():
    _, model = wrapped("mlp")
    masks = tf_prune.prune(model, "magnitude", 0.7).masks
    tf_prune.remove_masks(model)
    assert tf_prune.masks_of(model).num_kept == masks.num_weights
    fit(model)
    assert all(np.count_nonzero(v) == np.size(v) for v in tf_prune.find_prunable(model).prunable.values())
    tf_prune.apply_masks(model, masks)
    assert np.count_nonzero(mask_variables(model)[0]) == next(iter(masks.values())).sum()
    fit(model)
    helpers.assert_masks_hold(model, masks)


def test_wrapping_keeps_the_users_constraint_inside():
    model = keras.Sequential([keras.Input((6, 6, 1)), keras.layers.Flatten()])
    model.add(tf_prune.Masked(keras.layers.Dense(4, kernel_constraint="non_neg")))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    masks = tf_prune.prune(model, "random", 0.5).masks
    fit(model)
    kernel = np.asarray(model.layers[1].layer.kernel)
    assert (kernel >= 0).all()
    assert not kernel[~next(iter(masks.values()))].any()


@pytest.mark.parametrize("policy", ["mixed_float16", "float64"])
def test_wrapped_layers_compute_in_the_layers_own_precision(policy):
    keras.config.set_dtype_policy(policy)
    plain, model = wrapped("conv_bn")
    keras.config.set_dtype_policy("float32")
    x, _ = helpers.batch()
    assert model(x).dtype == plain(x).dtype
    np.testing.assert_array_equal(model(x), plain(x))


def test_a_mask_of_time_steps_passes_through():
    inputs = keras.Input((5,), dtype="int32")
    x = keras.layers.Embedding(10, 4, mask_zero=True)(inputs)
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.GRU(3)(x)))
    tokens = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 7]])
    np.testing.assert_array_equal(tf_prune.wrap(model)(tokens), model(tokens))


def test_a_subclassed_model_uses_masked_layers_of_its_own(tmp_path):
    class Own(keras.Model):
        def __init__(self, **options):
            super().__init__(**options)
            self.hidden = tf_prune.Masked(keras.layers.Dense(16, "relu"))
            self.head = tf_prune.Masked(keras.layers.Dense(4))

        def call(self, x):
            return self.head(self.hidden(keras.ops.reshape(x, (-1, 36))))

    model = Own()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    fit(model)
    masks = tf_prune.prune(model, "snip", 0.7, helpers.batch()).masks
    fit(model)
    helpers.assert_masks_hold(model, masks)
    model.save(tmp_path / "own.keras")
    loaded = keras.models.load_model(tmp_path / "own.keras", custom_objects={"Own": Own})
    assert len(mask_variables(loaded)) == 2
    assert tf_prune.masks_of(loaded).num_kept == masks.num_kept
    x, _ = helpers.batch()
    np.testing.assert_array_equal(loaded(x), model(x))
    fit(loaded)
    helpers.assert_masks_hold(loaded, tf_prune.masks_of(loaded))
    for call in (tf_prune.wrap, tf_prune.strip):
        with pytest.raises(ValueError, match=r"write Masked\(layer\) where it makes its layers"):
            call(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tf_prune.Masked(tf_prune.Masked(keras.layers.Dense(2))), "masked already"),
        (lambda: tf_prune.Masked("dense"), "isn't a supported layer type"),
        (
            lambda: keras.Sequential([keras.Input((3,)), tf_prune.Masked(keras.layers.ReLU())]),
            "has no kernel that could be masked",
        ),
    ],
)
def test_what_cannot_be_masked_is_an_error(make, message):
    with pytest.raises(ValueError, match=message):
        make()


class OwnClass(keras.Model):
    def __init__(self):
        inputs = keras.Input((36,))
        super().__init__(inputs, keras.layers.Dense(4)(inputs))

    def train_step(self, data):
        raise AssertionError


def test_a_class_of_ones_own_is_not_lost_silently():
    for call in (tf_prune.wrap, tf_prune.strip):
        with pytest.raises(ValueError, match="a class of its own would be lost"):
            call(OwnClass())


@pytest.mark.filterwarnings("ignore:.*does not have a `quantize` method")
def test_a_wrapped_model_that_was_quantized_can_be_loaded(tmp_path):
    model = tf_prune.wrap(helpers.build("mlp"))
    model.quantize("int8")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    x, _ = helpers.batch()
    np.testing.assert_array_equal(loaded(x), model(x))


def test_the_layers_own_losses_are_kept_where_masks_are_substituted():
    inputs = keras.Input((4,))
    layer = keras.layers.Dense(3, activity_regularizer="l2", kernel_regularizer="l2")
    model = keras.Model(inputs, tf_prune.Masked(layer)(inputs))
    x = np.ones((2, 4), "float32")
    found = []
    for factor in (None, 1.0):
        values = [v.value if factor is None else v.value * factor for v in model.non_trainable_variables]
        trainable = [v.value for v in model.trainable_variables]
        _, _, losses = model.stateless_call(trainable, values, x, return_losses=True)
        found.append(sorted(float(loss) for loss in losses))
    assert len(found[1]) == 2
    np.testing.assert_allclose(found[0], found[1], rtol=1e-6)


def test_a_model_that_was_compiled_with_a_loss_of_ones_own_is_wrapped_and_the_copy_is_not_compiled():
    model = helpers.build("mlp")
    model.compile("sgd", lambda y, z: keras.ops.mean(z**2))
    wrapped = tf_prune.wrap(model)
    assert (model.compiled, wrapped.compiled, tf_prune.strip(wrapped).compiled) == (True, False, False)
