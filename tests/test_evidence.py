"""What masks a model is said to have is what its layers multiply by; what nobody can tell is said once."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_prune
from tests import helpers

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
X = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 4, 64)


def mlp(optimizer="sgd", **options):
    model = keras.Sequential(
        [keras.Input((8,)), layers.Dense(16, "tanh", name="a", **options), layers.Dense(4, name="b")]
    )
    model.compile(optimizer, LOSS)
    return model


def quantize(model, mode):
    model.quantize(mode, filters=lambda layer: isinstance(layer, layers.Dense))


def fit(model, epochs=1, **options):
    return model.fit(X, Y, epochs=epochs, batch_size=32, verbose=0, **options).history


def zeros(model):
    kernels = [np.asarray(layer.kernel) for layer in model.layers]
    return sum((kernel == 0).sum() for kernel in kernels) / sum(kernel.size for kernel in kernels)


def assert_same_masks(masks, expected):
    """Under whatever names."""
    for mask, other in zip(masks.values(), expected.values(), strict=True):
        np.testing.assert_array_equal(mask, other)


def test_a_status_says_what_the_masks_are(tmp_path):
    model = mlp()
    assert tf_prune.masks_of(model).status == ""
    tf_prune.prune(model, "magnitude", 0.75, verbose=0)
    assert tf_prune.masks_of(model).status == "holding"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert tf_prune.masks_of(loaded).status == "told"
    model.set_weights([np.ones_like(w) for w in model.get_weights()])
    with pytest.warns(UserWarning, match=r"do not hold.*rewind"):
        assert tf_prune.masks_of(model).status == "not holding"
    tf_prune.masks_of(model)  # said once


def test_kernels_of_which_nothing_was_pruned_are_told_to_have_masks_too(tmp_path):
    model = mlp()
    masks = tf_prune.prune(model, "magnitude", 0.75, scope={"b": 0.0}, verbose=0).masks
    assert masks["sequential/b/kernel"].all()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same_masks(tf_prune.masks_of(loaded), masks)
    # But what has zeros of either sign is nobody's to tell, and a model with masks has those that it has.
    loaded.layers[1].kernel.assign(loaded.layers[1].kernel * (ops.arange(4.0) > 1.0) * ops.ones((16, 1)))
    loaded.layers[1].kernel.assign(loaded.layers[1].kernel * (np.random.default_rng(0).random((16, 4)) > 0.5))
    with pytest.warns(UserWarning, match="exact zeros in .*b/kernel of which nobody can tell"):
        assert [mask.shape for mask in tf_prune.masks_of(loaded).values()] == [(8, 16)]
    parts = keras.Sequential([keras.Input((8,)), *(layers.Dense(8, name=name) for name in "abc")])
    tf_prune.prune(parts, "magnitude", 0.75, filters="a", verbose=0)
    assert list(tf_prune.masks_of(parts)) == [parts.layers[0].kernel.path]
    parts.layers[1].kernel.assign(np.where(np.eye(8), parts.layers[1].kernel, -0.0))
    assert [path[-8] for path in tf_prune.masks_of(parts)] == ["a", "b"]
    # Masks that do not hold are worse than zeros that nobody can tell.
    parts.layers[2].kernel.assign(parts.layers[2].kernel * (np.random.default_rng(0).random((8, 8)) > 0.5))
    parts.layers[0].kernel.assign(np.ones((8, 8)))
    with pytest.warns(UserWarning, match="do not hold"), pytest.warns(UserWarning, match="nobody can tell"):
        assert tf_prune.masks_of(parts).status == "not holding"


@pytest.mark.parametrize(
    "constraint",
    [
        lambda w: w * ops.cast(w >= 0, w.dtype),
        lambda w: ops.sign(w) * ops.maximum(ops.abs(w) - 0.05, 0.0),
        lambda w: w * (ops.abs(w) > 0.2),
    ],
)
def test_zeros_of_a_constraint_are_no_masks_and_are_said_once(constraint):
    model = mlp(kernel_constraint=constraint)
    fit(model, 2)
    assert zeros(model) > 0.05
    with pytest.warns(UserWarning, match="exact zeros in .*a/kernel of which nobody can tell"):
        masks = tf_prune.masks_of(model)
    assert not masks
    assert masks.status == "ambiguous"
    assert not tf_prune.masks_of(model)


def test_masks_under_a_constraint_that_makes_zeros_are_told_after_loading(tmp_path):
    model = mlp(kernel_constraint="non_neg")
    masks = tf_prune.prune(model, "random", 0.75, verbose=0).masks
    fit(model)
    model.save(tmp_path / "model.keras")
    assert_same_masks(tf_prune.masks_of(keras.models.load_model(tmp_path / "model.keras")), masks)


def test_negative_zeros_of_a_fourier_transform_are_no_masks():
    model = keras.Sequential(
        [keras.Input((800, 1)), layers.STFTSpectrogram(frame_length=200, frame_step=100, fft_length=256)]
    )
    assert any((np.signbit(w) & (w == 0)).any() for w in model.get_weights())
    assert not tf_prune.masks_of(model)


def test_products_with_a_mask_are_ambiguous_and_can_be_taken_for_pruned():
    model = mlp()
    keep = np.random.default_rng(0).random((8, 16)) < 0.3
    model.layers[0].kernel.assign(model.layers[0].kernel * keep.astype("float32"))
    with pytest.warns(UserWarning, match="from_zeros=True"):
        assert not tf_prune.masks_of(model)
    assert np.array_equal(tf_prune.masks_of(model, from_zeros=True)["sequential/a/kernel"], keep)


@pytest.mark.filterwarnings("ignore:.*no longer depend on its input")
def test_regrown_weights_and_zero_kernels_raise_no_doubt():
    model = mlp(kernel_initializer="zeros")
    masks = tf_prune.prune(model, "random", 0.5, scope="layerwise", verbose=0).masks
    head = model.layers[1].kernel
    weights = np.asarray(head).copy()
    weights[np.nonzero(weights)[0][:3], np.nonzero(weights)[1][:3]] = 0.0  # kept zeros
    again = mlp(kernel_initializer="zeros")
    again.set_weights([model.get_weights()[0], model.get_weights()[1], weights, model.get_weights()[3]])
    assert_same_masks(tf_prune.masks_of(again), masks)


def test_zeros_of_an_average_are_said_before_they_are_pruned_a_second_time():
    model = mlp()
    tf_prune.prune(model, "magnitude", 0.75, verbose=0)
    snapshots = []
    for _ in range(3):
        fit(model)
        snapshots.append(model.get_weights())
    average = mlp()
    average.set_weights([sum(weights) / 3 for weights in zip(*snapshots, strict=True)])
    with pytest.warns(UserWarning, match="exactly zero already.*from_zeros=True"):
        tf_prune.prune(average, "random", 0.75, verbose=0)
    again = mlp()
    again.set_weights([sum(weights) / 3 for weights in zip(*snapshots, strict=True)])
    with pytest.warns(UserWarning, match="75% of the prunable weights"):  # before training fills them
        fit(again, 2, callbacks=[tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.8))])
    other = mlp()
    other.set_weights([sum(weights) / 3 for weights in zip(*snapshots, strict=True)])
    tf_prune.apply_masks(other, tf_prune.masks_of(other, from_zeros=True))
    tf_prune.prune(other, "random", 0.75, verbose=0)
    assert zeros(other) == 0.75


@pytest.mark.filterwarnings("ignore:.*no longer depend on its input")
@pytest.mark.parametrize(
    "initializer", ["zeros", "identity", tf_prune.DeltaOrthogonal()], ids=["zeros", "identity", "delta"]
)
def test_zeros_of_initializers_are_no_surprise(initializer):
    model = keras.Sequential(
        [
            keras.Input((5, 5, 4)),
            layers.Conv2D(4, 3, kernel_initializer=initializer if initializer != "identity" else "zeros"),
            layers.Flatten(),
            layers.Dense(36, kernel_initializer=initializer if isinstance(initializer, str) else "zeros"),
        ]
    )
    tf_prune.prune(model, "random", 0.5, verbose=0)
    assert tf_prune.masks_of(model).sparsity == 0.5


def test_zeros_of_a_constraint_are_no_surprise_either():
    model = mlp(kernel_constraint="non_neg")
    fit(model)
    assert zeros(model) > 0.1
    tf_prune.prune(model, "magnitude", 0.75, verbose=0)
    assert tf_prune.masks_of(model).sparsity == 0.75


def test_a_step_that_an_outer_model_traced_before_is_said():
    body = mlp()
    inputs = keras.Input((8,))
    outer = keras.Model(inputs, body(inputs))
    outer.compile("adam", LOSS)
    fit(outer)
    tf_prune.prune(body, "magnitude", 0.9, verbose=0)
    fit(outer)
    with pytest.warns(UserWarning, match="traced before"):
        assert tf_prune.masks_of(body).status == "not holding"
    outer.compile("adam", LOSS)
    tf_prune.rewind(body, body.get_weights())
    fit(outer)
    assert tf_prune.masks_of(body).status == "holding"
    assert zeros(body) == pytest.approx(0.9, abs=0.01)


def test_a_constraint_in_the_place_of_the_mask_is_said():
    model = mlp()
    tf_prune.prune(model, "magnitude", 0.75, verbose=0)
    model.layers[0].kernel.constraint = keras.constraints.MaxNorm(2.0)
    fit(model)
    with pytest.warns(UserWarning, match=r"do not hold: weights that they prune are not zero in sequential/a/kernel\."):
        assert tf_prune.masks_of(model).status == "not holding"


def test_masks_of_embeddings_hold_without_a_word():
    model = keras.Sequential([keras.Input((5,)), layers.Embedding(20, 8), layers.Flatten(), layers.Dense(4)])
    model.compile(keras.optimizers.Adam(0.01, clipnorm=0.1), LOSS)
    masks = tf_prune.prune(model, "random", 0.5, include=["embeddings"], verbose=0).masks
    model.fit(np.random.default_rng(0).integers(0, 20, (64, 5)), Y, verbose=0)
    assert tf_prune.masks_of(model) == masks
    assert tf_prune.masks_of(model).status == "holding"


def test_lora_over_a_pruned_kernel_is_said_and_the_log_tells_what_the_layers_multiply_by():
    model = mlp()
    tf_prune.prune(model, "magnitude", 0.75, verbose=0)
    model.layers[0].enable_lora(2)
    model.compile("adam", LOSS)
    with pytest.warns(UserWarning, match="LoRA adds a dense product"):
        history = fit(model, 2, callbacks=[tf_prune.FreezeSparsity()])
    kernels = [np.asarray(layer.kernel) for layer in model.layers]
    pruned = [~mask for mask in tf_prune.masks_of(model).values()]
    real = [np.count_nonzero(k[m] == 0) for k, m in zip(kernels, pruned, strict=True)]
    assert history["sparsity/sequential/a/kernel"][-1] == real[0] / kernels[0].size < 0.3
    assert history["sparsity/sequential/b/kernel"][-1] == real[1] / kernels[1].size > 0.5


def test_the_log_is_of_all_kernels_of_the_model():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16, "tanh", name="a"), layers.Dense(4, name="b")])
    model.compile("sgd", LOSS)
    history = fit(model, callbacks=[tf_prune.MagnitudePruning(0.5, filters="b")])
    assert history["sparsity/sequential/b/kernel"] == [0.5]
    assert history["sparsity"] == [32 / 192]
    assert history["sparsity"][0] == zeros(model)


@pytest.mark.parametrize("mode", ["int8", "int4", "float8"])
def test_masks_survive_quantization(mode, tmp_path):
    model = mlp()
    masks = tf_prune.prune(model, "magnitude", 0.75, verbose=0).masks
    quantize(model, mode)
    told = tf_prune.masks_of(model)
    assert told == masks
    assert told.status == "holding"
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        again = tf_prune.masks_of(loaded)
    said = [one for one in said if one.category is UserWarning]
    # What was rounded to zero cannot be told from what was pruned.
    assert all((kept | ~mask).all() for kept, mask in zip(masks.values(), again.values(), strict=True))
    assert again.sparsity >= 0.75
    assert (again.status, len(said)) == (("told", 0) if mode == "float8" else ("ambiguous", 1))


@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_network_that_nobody_pruned_has_no_masks(mode):
    model = mlp()
    quantize(model, mode)
    assert not tf_prune.masks_of(model)


def test_a_restored_denser_epoch_is_said():
    class Restore(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 0:
                self.weights = self.model.get_weights()

        def on_train_end(self, logs=None):
            self.model.set_weights(self.weights)

    model = mlp()
    gradual = tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.9), begin=1, end=6, frequency=1)
    with pytest.warns(UserWarning, match="less sparse were restored"):
        fit(model, 5, callbacks=[gradual, Restore()])
    assert zeros(model) == pytest.approx(0.9, abs=0.01)


def test_weights_that_a_callback_writes_are_masked_before_the_next_one_sees_them():
    class Write(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.set_weights(dense)

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(zeros(self.model))

    model, seen = mlp(), []
    dense = model.get_weights()
    with pytest.warns(UserWarning, match="were set to zero"):
        fit(model, callbacks=[Write(), tf_prune.MagnitudePruning(0.5, verbose=0), Look()])
    assert seen == [0.5]


def test_weights_that_the_masks_forbid_are_not_measured():
    model = mlp()
    dense = model.get_weights()
    masks = tf_prune.prune(model, "magnitude", 0.75, verbose=0).masks
    model.set_weights(dense)
    for measure in (
        lambda: tf_prune.score(model, "snip", (X, Y)),
        lambda: tf_prune.jacobian_spectrum(model, X, verbose=0),
        lambda: tf_prune.layerwise_spectra(model, X, verbose=0),
        lambda: tf_prune.explain(model),
    ):
        with pytest.raises(ValueError, match="rewind"):
            measure()
    tf_prune.rewind(model, dense)
    assert tf_prune.masks_of(model) == masks
    for weights, initial, mask in zip(model.get_weights()[::2], dense[::2], masks.values(), strict=True):
        np.testing.assert_array_equal(weights, np.where(mask, initial, 0))


def test_rewinding_refuses_what_does_not_fit_and_changes_nothing():
    model = mlp()
    with pytest.raises(ValueError, match="no masks attached"):
        tf_prune.rewind(model, model.get_weights())
    tf_prune.prune(model, "magnitude", 0.75, verbose=0)
    before = helpers.state(model)
    with pytest.raises(ValueError, match="expected 4 arrays"):
        tf_prune.rewind(model, model.get_weights()[:3])
    helpers.assert_same_state(before, model)


def test_a_wrapped_network_keeps_its_masks_when_it_is_rewound():
    model = tf_prune.wrap(mlp())
    initial = model.get_weights()
    masks = tf_prune.prune(model, "magnitude", 0.75, verbose=0).masks
    tf_prune.rewind(model, initial)
    assert tf_prune.masks_of(model) == masks


def net(names):
    inputs = keras.Input((8,))
    parts = {name: layers.Dense(8, name=name)(inputs) for name in names}
    return keras.Model(inputs, layers.Add()([parts[name] for name in names]))


def test_masks_match_by_names_before_positions():
    few, all_ = np.arange(64).reshape(8, 8) < 6, np.ones((8, 8), bool)
    model = net(["right", "left"])
    tf_prune.apply_masks(model, {"net/left/kernel": few, "net/right/kernel": all_})
    assert {path: mask.sum() for path, mask in tf_prune.masks_of(model).items()} == {
        "right/kernel": 64,
        "left/kernel": 6,
    }
    with pytest.raises(ValueError, match="Names that were given to layers must agree"):
        tf_prune.apply_masks(net(["up", "down"]), {"left/kernel": few, "right/kernel": all_})


def test_submodels_match_by_their_names():
    def autoencoder(names):
        parts = {n: keras.Sequential([keras.Input((8,)), layers.Dense(8)], name=n) for n in names}
        inputs = outputs = keras.Input((8,))
        for name in ("encoder", "decoder"):
            outputs = parts[name](outputs)
        return keras.Model(inputs, outputs)

    first = autoencoder(["encoder", "decoder"])
    masks = tf_prune.prune(first, "random", 0.5, verbose=0).masks
    second = autoencoder(["decoder", "encoder"])
    tf_prune.apply_masks(second, masks)
    of_second = tf_prune.masks_of(second)
    for name in ("encoder", "decoder"):
        (one,), (other,) = ([m for p, m in of.items() if name in p] for of in (masks, of_second))
        assert np.array_equal(one, other)


def test_any_weights_of_a_model_can_have_a_mask(tmp_path):
    class Mixing(layers.Layer):
        def build(self, shape):
            self.mixing = self.add_weight(shape=(shape[-1], 16), name="mixing")

        def call(self, x):
            return x @ self.mixing

    model = keras.Sequential([keras.Input((8,)), Mixing(), layers.Dense(4)])
    model.compile("adam", LOSS)
    variable = model.layers[0].mixing
    mask = np.random.default_rng(0).random((8, 16)) < 0.3
    tf_prune.apply_masks(model, {variable.path: mask})
    fit(model)
    assert not np.asarray(variable)[~mask].any()
    model.save_weights(tmp_path / "model.weights.h5")
    again = keras.Sequential([keras.Input((8,)), Mixing(), layers.Dense(4)])
    again.load_weights(tmp_path / "model.weights.h5")
    assert np.array_equal(next(iter(tf_prune.masks_of(again).values())), mask)
    tf_prune.remove_masks(model)
    assert not tf_prune.masks_of(model)


@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_what_cannot_be_done_with_quantized_layers_is_said(mode, tmp_path):
    model = mlp()
    quantize(model, mode)
    for do in (
        lambda: tf_prune.export(model, tmp_path / "out", data=(X, Y)),
        lambda: tf_prune.explain(model),
        lambda: tf_prune.jacobian_spectrum(model, X),
    ):
        with pytest.raises(ValueError, match=rf"a \({mode}\), b \({mode}\)\. .* before model.quantize"):
            do()
    assert not list(tmp_path.iterdir())


def test_a_mask_that_prunes_integers_of_a_quantized_kernel_is_refused():
    model = mlp()
    quantize(model, "int8")
    path = model.layers[0]._kernel.path
    with pytest.raises(ValueError, match="quantized to int8"):
        tf_prune.apply_masks(model, {path: np.zeros((8, 16), bool)})


def test_a_callback_that_is_used_again_prunes_what_was_frozen_the_first_time():
    model = mlp()
    model.layers[0].trainable = False
    model.compile("sgd", LOSS)
    callback = tf_prune.MagnitudePruning(0.5)
    fit(model, callbacks=[callback])
    assert np.count_nonzero(np.asarray(model.layers[0].kernel)) == 128
    report = callback.report
    model.layers[1].kernel.trainable = False
    model.compile("sgd", LOSS)
    fit(model, callbacks=[callback])
    assert callback.report is report  # nothing new
    model.layers[0].trainable = model.layers[1].kernel.trainable = True
    model.compile("sgd", LOSS)
    fit(model, callbacks=[callback])
    assert zeros(model) == 0.5


def test_nothing_of_a_callback_stays_in_the_history():
    model = mlp()
    history = model.fit(X, Y, callbacks=[tf_prune.MagnitudePruning(0.5, verbose=0)], verbose=0)
    assert "on_train_end" not in vars(history)
