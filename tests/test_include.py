"""Kernels of layers of one's own: a twin whose layers Keras knows says what each verb must give."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import tf_prune
from tests import helpers
from tf_prune.prunable import find_prunable


@keras.saving.register_keras_serializable("tests")
class Mixing(layers.Layer):
    """What `Dense(units, "tanh", use_bias=False)` does, twice: a sum of two maps, with a bias."""

    def __init__(self, units=16, **options):
        super().__init__(**options)
        self.units = units

    def build(self, shape):
        self.one = self.add_weight(shape=(shape[-1], self.units), name="mixing")
        self.other = self.add_weight(shape=(shape[-1], self.units), name="mixing_of_neighbours")
        self.offset = self.add_weight(shape=(self.units,), initializer="zeros", name="offset")

    def call(self, x):
        return ops.tanh(x @ self.one + x[..., ::-1] @ self.other + self.offset)

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.units)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class Reversed(layers.Layer):
    def call(self, x):
        return x[..., ::-1]


@keras.saving.register_keras_serializable("tests")
class Cell(layers.Layer):
    """What `SimpleRNNCell(units, use_bias=False)` does."""

    def __init__(self, units=8, **options):
        super().__init__(**options)
        self.units = self.state_size = units

    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], self.units), name="kernel")
        self.recurrent_kernel = self.add_weight(shape=(self.units, self.units), name="recurrent_kernel")

    def call(self, x, states):
        state = ops.tanh(x @ self.kernel + states[0] @ self.recurrent_kernel)
        return state, [state]

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable("tests")
class Experts(layers.Layer):
    def build(self, shape):
        self.experts = self.add_weight(shape=(3, shape[-1], 8), name="experts")

    def call(self, x):
        return ops.sum(ops.tanh(ops.einsum("bi,eio->beo", x, self.experts)), 1)


@keras.saving.register_keras_serializable("tests")
class Gated(layers.Dense):
    def build(self, shape):
        self.gate = self.add_weight(shape=(shape[-1], self.units), name="gate")
        super().build(shape)

    def call(self, x):
        return super().call(x) * ops.sigmoid(x @ self.gate)


def compiled(model):
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def owner(*inner, shape=(8,)):
    keras.utils.set_random_seed(0)
    return compiled(keras.Sequential([keras.Input(shape), *inner, layers.Dense(4, name="head")]))


def batch(*shape):
    generator = np.random.default_rng(0)
    return generator.standard_normal((16, *shape)).astype(np.float32), generator.integers(0, 4, 16)


def mixing_and_its_twin():
    own = owner(Mixing(name="own"))
    inputs = keras.Input((8,))
    one, other = (layers.Dense(16, use_bias=is_first, name=f"map_{is_first}") for is_first in (True, False))
    hidden = layers.Activation("tanh")(layers.Add()([one(layers.Identity()(inputs)), other(Reversed()(inputs))]))
    twin = compiled(keras.Model(inputs, layers.Dense(4, name="head")(hidden)))
    layer = own.get_layer("own")
    for variable, value in zip(
        (one.kernel, other.kernel, *twin.get_layer("head").weights),
        (layer.one, layer.other, *own.get_layer("head").weights),
        strict=True,
    ):
        variable.assign(value)
    return own, twin, batch(8)


def cell_and_its_twin():
    own = owner(layers.RNN(Cell(name="cell"), name="rnn"), shape=(5, 8))
    twin = owner(layers.SimpleRNN(8, use_bias=False), shape=(5, 8))
    twin.set_weights(own.get_weights())
    return own, twin, batch(5, 8)


PREDICATE = pytest.param(lambda layer, variable: isinstance(layer, (Mixing, Cell)), id="a predicate")
TWINS = {"mixing": mixing_and_its_twin, "kernel": cell_and_its_twin}


# One of each kind of derivative.
@pytest.mark.parametrize("method", ["snip", "grasp", "force", "synflow", "magnitude"])
@pytest.mark.parametrize("pattern", TWINS)
@pytest.mark.filterwarnings("ignore:.*(left no weight in|no longer depend on its input)")
def test_what_is_included_is_pruned_as_the_same_map_of_a_known_layer(pattern, method):
    own, twin, data = TWINS[pattern]()
    reports = [
        tf_prune.prune(model, helpers.METHODS[method], 0.5, data, include=include, verbose=0)
        for model, include in ((own, pattern), (twin, ()))
    ]
    masks, expected = ([*report.masks.values()] for report in reports)
    for mask, other in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask, other)
    own.fit(*data, verbose=0)
    weights = {variable.path: np.asarray(variable) for variable in own.weights}
    for path, mask in reports[0].masks.items():
        assert not weights[path][~mask].any()
        assert weights[path][mask].all()


@pytest.mark.parametrize("structure", ["2:4", "1x4", "4_outputs", "output_channels", "input_channels", "hybrid"])
@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_a_matrix_of_ones_own_has_inputs_and_outputs_like_a_dense_one(structure):
    own, twin, _ = mixing_and_its_twin()
    masks = [
        tf_prune.prune(model, "magnitude", 0.5, structure=structure, include=include).masks.values()
        for model, include in ((own, "mixing"), (twin, ()))
    ]
    for mask, expected in zip(*masks, strict=True):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("include", ["mixing|kernel", ["mixing", "kernel"], PREDICATE])
@pytest.mark.parametrize("pattern", TWINS)
def test_every_form_of_inclusion_chooses_the_kernels_and_no_bias(pattern, include):
    if isinstance(include, list):
        include = [part for part in include if part == pattern]
    own, twin, data = TWINS[pattern]()
    survey = find_prunable(own, include=include)
    assert [v.shape for v in survey.prunable.values()] == [v.shape for v in find_prunable(twin).prunable.values()]
    assert not survey.unknown
    scores = tf_prune.score(own, "snip", data, include=include)
    for score, expected in zip(scores.values(), tf_prune.score(twin, "snip", data).values(), strict=True):
        np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-8)


def test_filters_choose_among_what_is_included():
    own, _, _ = mixing_and_its_twin()
    skipped = find_prunable(own, filters="head", include="mixing").skipped
    assert skipped[own.get_layer("own").one.path] == "not chosen by filters"


def test_a_single_table_of_embeddings_is_included_by_its_path():
    inputs = keras.Input((5,), dtype="int32")
    tables = layers.Add()([layers.Embedding(7, 8, name=name)(inputs) for name in ("words", "places")])
    model = keras.Model(inputs, layers.Dense(4, name="head")(layers.Flatten()(tables)))
    assert list(find_prunable(model, include="words/").prunable) == ["words/embeddings", "head/kernel"]


WRONG = {
    "found nowhere": ("mixture", "is no group, and found in the path of no weight"),
    "one of a list": (["mixing", "mixture"], "include='mixture' is no group"),
    "a bias": ("offset", "chooses nothing that can be pruned, only .*own/offset .a bias"),
    "nothing": (lambda layer, variable: False, "chooses no weight of the model"),
    "no pattern": ("mix(ing", "is no regular expression: missing"),
    "another object": ([3], "a regular expression that is searched in the paths .* got 3"),
}


@pytest.mark.parametrize(("include", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_asks_for_nothing_is_refused_with_what_there_is(include, message):
    own, _, data = mixing_and_its_twin()
    before = helpers.state(own)
    calls = [
        lambda: find_prunable(own, include=include),
        lambda: tf_prune.prune(own, "snip", 0.5, data, include=include),
        lambda: tf_prune.score(own, "snip", data, include=include),
        lambda: tf_prune.reinitialize(own, "orthogonal", include=include),
        lambda: tf_prune.wrap(own, include),
        lambda: own.fit(*data, callbacks=[tf_prune.MagnitudePruning(0.5, include=include)], verbose=0),
        lambda: own.fit(*data, callbacks=[tf_prune.FreezeSparsity(include=include)], verbose=0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"(?s){message}") as error:
            call()
        if include != [3] and include != "mix(ing":
            assert "'embeddings', 'quirk_biases'" in str(error.value)
            assert "own/mixing, " in str(error.value)
    helpers.assert_same_state(before, own)


def test_gradual_pruning_and_frozen_sparsity_hold_what_is_included():
    own, _, data = mixing_and_its_twin()
    gradual = tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.75), frequency=1, include="mixing")
    own.fit(*data, epochs=4, batch_size=8, callbacks=[gradual], verbose=0)
    kernels = [v for v in own.trainable_variables if len(v.shape) == 2]
    sizes = sum(np.size(v) for v in kernels)
    assert sum((np.asarray(v) == 0).sum() for v in kernels) == np.ceil(0.75 * sizes)
    zeros = [np.asarray(v) == 0 for v in kernels]
    again, _, _ = mixing_and_its_twin()
    again.set_weights(own.get_weights())
    again.fit(*data, epochs=2, callbacks=[tf_prune.FreezeSparsity(include="mixing")], verbose=0)
    for variable, zero in zip((v for v in again.trainable_variables if len(v.shape) == 2), zeros, strict=True):
        np.testing.assert_array_equal(np.asarray(variable) == 0, zero)


def test_own_kernels_are_drawn_anew_and_made_isometric():
    own, _, _ = mixing_and_its_twin()
    head = np.asarray(own.get_layer("head").kernel).copy()
    tf_prune.reinitialize(own, "orthogonal", filters="own", include="mixing")
    for kernel in (own.get_layer("own").one, own.get_layer("own").other):
        np.testing.assert_allclose(np.asarray(kernel) @ np.asarray(kernel).T, np.eye(8), atol=1e-5)
    np.testing.assert_array_equal(own.get_layer("head").kernel, head)
    tf_prune.prune(own, "random", 0.5, include="mixing")
    report = tf_prune.condition(own, include="mixing$", verbose=0)
    assert [path.rsplit("/", 1)[1] for path in report] == ["mixing", "kernel"]
    kernel = np.asarray(own.get_layer("own").one)
    np.testing.assert_allclose(kernel @ kernel.T, np.eye(8), atol=1e-3)


def test_the_spectra_of_the_layers_of_a_chain_are_those_of_their_matrices():
    model = owner(Mixing(name="own"))
    x = np.zeros((1, 8), np.float32)  # where tanh has the slope 1
    spectra = tf_prune.layerwise_spectra(model, x, include="mixing", verbose=0)
    assert list(spectra) == ["own", "head"]
    one, other = np.asarray(model.get_layer("own").one), np.asarray(model.get_layer("own").other)
    expected = np.linalg.svd(one + other[::-1], compute_uv=False)
    np.testing.assert_allclose(spectra["own"].values[0], expected, rtol=1e-5)


@pytest.mark.parametrize("include", ["mixing", PREDICATE])
def test_a_wrapped_layer_of_ones_own_keeps_its_masks_in_a_file(include, tmp_path):
    own, _, data = mixing_and_its_twin()
    wrapped = compiled(tf_prune.wrap(own, include))
    masks = tf_prune.prune(wrapped, "snip", 0.5, data, include=include).masks
    wrapped.fit(*data, verbose=0)
    wrapped.save(tmp_path / "wrapped.keras")
    for again in (keras.models.load_model(tmp_path / "wrapped.keras"), keras.models.clone_model(wrapped)):
        names = [mask.name for mask in again.get_layer("own").masks]
        assert names == ["mixing_mask", "mixing_of_neighbours_mask"]
    loaded = keras.models.load_model(tmp_path / "wrapped.keras")
    loaded.fit(*data, verbose=0)
    stripped = tf_prune.strip(loaded)
    for model in (loaded, stripped):
        kernels = [np.asarray(v) for v in model.trainable_variables if len(v.shape) == 2]
        for kernel, mask in zip(kernels, masks.values(), strict=True):
            np.testing.assert_array_equal(kernel != 0, mask)


def test_what_has_a_mask_is_wrapped_with_it():
    own, _, _ = mixing_and_its_twin()
    masks = tf_prune.prune(own, "magnitude", 0.5, include="mixing").masks
    wrapped = tf_prune.wrap(own)
    found = [np.asarray(mask) != 0 for layer in wrapped.layers for mask in layer.masks]
    for mask, expected in zip(found, masks.values(), strict=True):
        np.testing.assert_array_equal(mask, expected)


@pytest.mark.filterwarnings("ignore:.*trained")
def test_masks_of_own_kernels_reach_the_ready_model_and_the_file(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = layers.GlobalAveragePooling2D()(layers.Conv2D(8, 1, name="conv")(inputs))
    model = compiled(keras.Model(inputs, layers.Dense(4, name="head")(Mixing(name="own")(x))))
    masks = tf_prune.prune(model, "magnitude", 0.5, include="mixing").masks
    ready, _ = tf_prune.make_ready(model)
    for mask, expected in zip(tf_prune.masks_of(ready).values(), masks.values(), strict=True):
        np.testing.assert_array_equal(mask.ravel(), expected.ravel())
    report = tf_prune.export(model, tmp_path / "own")
    assert report.sparsity == pytest.approx(0.5, abs=1e-6)
    assert any("mixing" in line for line in str(report).splitlines())


def test_a_wrapper_around_a_layer_without_known_kernels_asks_for_them():
    with pytest.raises(ValueError, match="include='mixture' is no group"):
        owner(tf_prune.Masked(Mixing(name="own"), include="mixture"))
    with pytest.raises(ValueError, match=r"say with include=.*own/mixing, .*own/mixing_of_neighbours"):
        owner(tf_prune.Masked(Mixing(name="own")))


def test_a_wrapped_layer_with_fewer_weights_than_it_was_saved_with_is_refused():
    config = tf_prune.Masked(Mixing(name="own"), positions=[0, 7]).get_config()
    with pytest.raises(ValueError, match="has only 3 weights now"):
        owner(tf_prune.Masked.from_config(config))


def own_models():
    yield "cell", owner(layers.Bidirectional(layers.RNN(Cell(), name="rnn")), shape=(5, 8)), batch(5, 8)
    yield "timed", owner(layers.TimeDistributed(Mixing()), layers.Flatten(), shape=(5, 8)), batch(5, 8)
    yield "stacked", owner(layers.RNN([layers.LSTMCell(8), Cell(8)]), shape=(5, 8)), batch(5, 8)
    yield "experts", owner(Experts()), batch(8)
    yield "gated", owner(Gated(8)), batch(8)


def test_own_kernels_are_found_at_any_depth_and_pruned():
    for name, model, data in own_models():
        report = tf_prune.prune(model, "snip", 0.5, data, include=lambda layer, variable: True)
        kernels = {v.path: v for v in model.trainable_variables if len(v.shape) > 1}
        assert list(report.masks) == list(kernels), name
        assert "prunable weights removed" in str(report)
        model.fit(*data, verbose=0)
        zeros = sum((np.asarray(v) == 0).sum() for v in kernels.values())
        assert zeros / sum(np.size(v) for v in kernels.values()) == pytest.approx(0.5, abs=0.01), name


def test_of_a_kernel_with_more_axes_the_last_two_are_a_map_and_channels_are_refused():
    model = owner(Experts())
    for structure, shape in (("2:4", (3, 8, 8)), ("1x4", (3, 2, 8)), ("4_outputs", (3, 8, 2)), ("hybrid", (3, 8, 8))):
        report = tf_prune.prune(model, "magnitude", 0.5, structure=structure, include="experts")
        assert next(iter(report.groups.values())).shape == shape
        tf_prune.remove_masks(model)
    before = helpers.state(model)
    for structure in ("output_channels", "input_channels"):
        with pytest.raises(ValueError, match=r"experts \(3, 8, 8\): which of its 3 axes count .* is not known"):
            tf_prune.prune(model, "magnitude", 0.5, structure=structure, include="experts")
    helpers.assert_same_state(before, model)


def test_the_last_layer_of_ones_own_makes_the_models_outputs():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    model = keras.Model(inputs, Mixing(4, name="own")(layers.Dense(8, name="body")(inputs)))
    layouts = find_prunable(model, include="mixing").layouts
    assert {path: layout.is_last for path, layout in layouts.items()} == {
        "body/kernel": False,
        "own/mixing": True,
        "own/mixing_of_neighbours": True,
    }


# -- what is said where nothing was included ------------------------------------------------------------


def test_a_noticeable_share_that_is_skipped_is_said_once_a_call():
    own, _, data = mixing_and_its_twin()
    said = r"80% of the weights that may connect units are left dense: .*own/mixing, .*Mixing layer.*include=.*'/mixing"
    gradual = tf_prune.GradualPruning("magnitude", tf_prune.Cubic(0.75), frequency=1)
    for call in (
        lambda: tf_prune.prune(own, "magnitude", 0.5),
        lambda: tf_prune.score(own, "magnitude"),
        lambda: own.fit(*data, epochs=3, callbacks=[gradual], verbose=0),
        lambda: own.fit(*data, epochs=3, callbacks=[tf_prune.FreezeSparsity()], verbose=0),
    ):
        with pytest.warns(UserWarning, match=said) as caught:
            call()
        assert sum("may connect units" in str(warning.message) for warning in caught) == 1


def quiet_models():
    yield "a small share", owner(Mixing(2), layers.Dense(96, name="wide")), {}
    yield "left out by filters", mixing_and_its_twin()[0], {"filters": "head"}
    frozen = owner(Mixing())
    frozen.layers[0].trainable = False
    yield "frozen", frozen, {}
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(500, 8)(inputs)
    y = layers.MultiHeadAttention(2, 4)(x, x)
    x = layers.LayerNormalization(axis=(1, 2))(layers.Add()([x, y]))
    x = layers.SpectralNormalization(layers.Dense(8))(layers.PReLU()(x))
    yield "a transformer", compiled(keras.Model(inputs, layers.Dense(4)(layers.Flatten()(x)))), {}
    masked = mixing_and_its_twin()[0]
    tf_prune.prune(masked, "magnitude", 0.5, include="mixing")
    yield "masked before", masked, {}
    lora = owner(layers.Dense(8, name="adapted"))
    lora.get_layer("adapted").enable_lora(4)
    yield "LoRA", lora, {}


def test_there_is_no_warning_where_nothing_to_speak_of_is_skipped():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _, model, options in quiet_models():
            tf_prune.prune(model, "magnitude", 0.6, scope="layerwise", **options)
    assert not [str(one.message) for one in said]


def test_the_headline_says_what_its_sparsity_is_of():
    model = helpers.build("conv_bn")
    report = tf_prune.prune(model, "magnitude", 0.5, filters="head")
    kernel = np.size(model.get_layer("head").kernel)
    headline = str(report).splitlines()[0]
    assert headline == (
        f"Magnitude, global: 50.0000% of {kernel} prunable weights removed ({kernel / model.count_params():.1%} of the "
        f"model's {model.count_params()} are prunable)"
    )
    wrapped = tf_prune.wrap(model)
    assert find_prunable(wrapped).num_weights == model.count_params()


def test_a_model_of_which_keras_built_a_part_is_refused():
    class Shapeless(layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 4), name="kernel")

        def call(self, x):
            return x @ self.kernel

    model = owner(layers.TimeDistributed(Shapeless()), layers.Flatten(), shape=(5, 8))
    with pytest.raises(ValueError, match=r"built only a part of .*: flatten, head have no weights yet"):
        tf_prune.prune(model, "magnitude", 0.5, include="kernel")
    model(np.zeros((1, 5, 8), np.float32))
    assert len(find_prunable(model, include="kernel").prunable) == 2
