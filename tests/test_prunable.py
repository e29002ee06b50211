import inspect

import keras
import numpy as np
import pytest
from keras import layers

import tf_prune
from tests import helpers
from tf_prune.prunable import find_prunable


def every_layer():
    x = inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.SeparableConv2D(4, 3, padding="same", name="separable")(x)
    x = layers.Conv2DTranspose(4, 2, name="transpose")(x)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.Reshape((25, 4))(x)
    x = layers.Bidirectional(layers.GRU(3, return_sequences=True), name="both")(x)
    x = layers.TimeDistributed(layers.Dense(4, name="timed"))(x)
    x = layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = layers.EinsumDense("abc,cd->abd", (25, 6), name="einsum")(x)
    x = layers.LSTM(3, name="lstm")(x)
    return keras.Model(inputs, layers.Dense(2, name="head")(x))


def test_every_weight_is_prunable_or_has_a_reason():
    model = every_layer()
    survey = find_prunable(model)
    assert len(survey.prunable) + len(survey.skipped) == len(model.weights)
    assert all(survey.skipped.values())
    kernels = [v for v in model.weights if "kernel" in v.name]
    assert list(map(id, survey.prunable.values())) == list(map(id, kernels))
    assert len(kernels) == 18


def two_inputs(layer):
    x = keras.Input((6, 4))
    return keras.Model(x, layer(x, x))


def sequence(layer, *shape):
    return keras.Sequential([keras.Input(shape), layer])


# Every layer of Keras that makes trainable weights of two and more axes, and the names of those that are kernels.
KERAS_LAYERS = {
    "Bidirectional": (lambda: sequence(layers.Bidirectional(layers.LSTM(3)), 6, 4), "kernel recurrent_kernel"),
    "Conv1D": (lambda: sequence(layers.Conv1D(3, 2), 6, 4), "kernel"),
    "Conv1DTranspose": (lambda: sequence(layers.Conv1DTranspose(3, 2), 6, 4), "kernel"),
    "Conv2D": (lambda: sequence(layers.Conv2D(3, 2), 6, 6, 4), "kernel"),
    "Conv2DTranspose": (lambda: sequence(layers.Conv2DTranspose(3, 2), 6, 6, 4), "kernel"),
    "Conv3D": (lambda: sequence(layers.Conv3D(3, 2), 4, 4, 4, 2), "kernel"),
    "Conv3DTranspose": (lambda: sequence(layers.Conv3DTranspose(3, 2), 4, 4, 4, 2), "kernel"),
    "ConvLSTM1D": (lambda: sequence(layers.ConvLSTM1D(3, 2), 3, 6, 4), "kernel recurrent_kernel"),
    "ConvLSTM2D": (lambda: sequence(layers.ConvLSTM2D(3, 2), 3, 6, 6, 4), "kernel recurrent_kernel"),
    "ConvLSTM3D": (lambda: sequence(layers.ConvLSTM3D(3, 2), 3, 4, 4, 4, 2), "kernel recurrent_kernel"),
    "Dense": (lambda: sequence(layers.Dense(3), 4), "kernel"),
    "DepthwiseConv1D": (lambda: sequence(layers.DepthwiseConv1D(2), 6, 4), "kernel"),
    "DepthwiseConv2D": (lambda: sequence(layers.DepthwiseConv2D(2), 6, 6, 4), "kernel"),
    "EinsumDense": (lambda: sequence(layers.EinsumDense("abc,cd->abd", (6, 3), bias_axes="bd"), 6, 4), "kernel"),
    "Embedding": (lambda: sequence(layers.Embedding(7, 3), 6), ""),
    "GRU": (lambda: sequence(layers.GRU(3), 6, 4), "kernel recurrent_kernel"),
    "GroupQueryAttention": (lambda: two_inputs(layers.GroupQueryAttention(3, 4, 2)), "kernel"),
    "LSTM": (lambda: sequence(layers.LSTM(3), 6, 4), "kernel recurrent_kernel"),
    "LayerNormalization": (lambda: sequence(layers.LayerNormalization(axis=(1, 2)), 6, 4), ""),
    "MultiHeadAttention": (lambda: two_inputs(layers.MultiHeadAttention(2, 3)), "kernel"),
    "PReLU": (lambda: sequence(layers.PReLU(), 6, 4), ""),
    "RMSNormalization": (lambda: sequence(layers.RMSNormalization(), 6, 4), ""),
    "RNN": (lambda: sequence(layers.RNN([layers.GRUCell(3), layers.LSTMCell(3)]), 6, 4), "kernel recurrent_kernel"),
    "ReversibleEmbedding": (lambda: reversible(tie_weights=False), "reverse_embeddings"),
    "STFTSpectrogram": (lambda: sequence(layers.STFTSpectrogram(frame_length=8), 64, 1), ""),
    "SeparableConv1D": (lambda: sequence(layers.SeparableConv1D(3, 2), 6, 4), "depthwise_kernel pointwise_kernel"),
    "SeparableConv2D": (lambda: sequence(layers.SeparableConv2D(3, 2), 6, 6, 4), "depthwise_kernel pointwise_kernel"),
    "SimpleRNN": (lambda: sequence(layers.SimpleRNN(3), 6, 4), "kernel recurrent_kernel"),
    "SpectralNormalization": (lambda: sequence(layers.SpectralNormalization(layers.Dense(3)), 4), "kernel"),
    "TimeDistributed": (lambda: sequence(layers.TimeDistributed(layers.Dense(3)), 6, 4), "kernel"),
}
# Those of one axis at most, or none of their own; and what wraps models of other libraries, whose weights are unknown.
WITHOUT = (
    *("AdditiveAttention", "Attention", "BatchNormalization", "GroupNormalization", "Normalization"),
    *("FlaxLayer", "JaxLayer", "TFSMLayer", "TorchModuleWrapper"),
    *("GRUCell", "LSTMCell", "SimpleRNNCell"),  # in the layers above
)


def reversible(**options):
    inputs, embedding = keras.Input((6,), dtype="int32"), layers.ReversibleEmbedding(7, 3, **options)
    return keras.Model(inputs, embedding(embedding(inputs), reverse=True))


@pytest.mark.parametrize("name", KERAS_LAYERS)
def test_of_every_layer_of_keras_the_kernels_are_known_and_the_rest_has_another_reason(name):
    make, kernels = KERAS_LAYERS[name]
    model = make()
    names = set(kernels.split())
    if names:
        survey = find_prunable(model)
        assert {variable.name for variable in survey.prunable.values()} == names
        reasons = survey.skipped.values()
        assert not survey.unknown
    else:
        with pytest.raises(ValueError, match="nothing to prune") as error:
            find_prunable(model)
        reasons = [str(error.value)]
    assert not any("no known kernel" in reason for reason in reasons)


def test_no_layer_of_keras_is_missing_from_that_list():
    classes = {one for one in vars(layers).values() if isinstance(one, type) and issubclass(one, keras.Layer)}
    parents = {one: [p for p in one.__mro__ if p is not layers.Layer and ".layers." in p.__module__] for one in classes}
    with_weights = {
        one.__name__ for one in classes if any("add_weight(" in inspect.getsource(parent) for parent in parents[one])
    }
    assert "Dense" in with_weights
    assert with_weights - {*KERAS_LAYERS, *WITHOUT} == set()


def test_the_untied_way_back_of_an_embedding_is_a_dense_kernel_and_the_tied_one_is_the_table():
    untied, tied = reversible(tie_weights=False), reversible()
    ((_, layout),) = find_prunable(untied).layouts.items()
    assert (layout.kind, layout.inputs, layout.outputs, layout.is_last) == ("dense", (0,), (1,), True)
    assert [v.shape for v in find_prunable(untied, include="embeddings").prunable.values()] == [(7, 3), (3, 7)]
    assert [v.shape for v in find_prunable(tied, include="embeddings").prunable.values()] == [(7, 3)]


def test_a_fourier_transform_is_pruned_only_where_it_is_named():
    model = keras.Sequential([keras.Input((64, 1)), layers.STFTSpectrogram(frame_length=8), layers.Dense(2)])
    assert [v.name for v in find_prunable(model).prunable.values()] == ["kernel"]
    assert 'a Fourier transform: pruned only with include=["real_kernel"]' in find_prunable(model).skipped.values()
    names = [v.name for v in find_prunable(model, include=["real_kernel"]).prunable.values()]
    assert names == ["real_kernel", "kernel"]


def test_the_factors_of_lora_are_left_alone():
    model = helpers.build("mlp")
    model.get_layer("hidden").enable_lora(2)
    survey = find_prunable(model)
    assert list(survey.skipped.values()).count("a factor of LoRA: its product is added to the kernel") == 2
    assert not survey.unknown


def test_an_embedding_is_left_alone():
    model = keras.Sequential([keras.Input((5,)), layers.Embedding(7, 3), layers.Flatten(), layers.Dense(2)])
    survey = find_prunable(model)
    assert [v.name for v in survey.prunable.values()] == ["kernel"]
    assert "an embedding table" in " ".join(survey.skipped.values())


def test_a_frozen_layer_is_left_alone():
    model = helpers.build("mlp")
    model.get_layer("hidden").trainable = False
    survey = find_prunable(model)
    assert list(survey.prunable) == ["mlp/head/kernel"] or list(survey.prunable) == ["head/kernel"]
    assert "frozen" in survey.skipped[model.get_layer("hidden").kernel.path]


def test_a_quantized_kernel_is_left_alone():
    model = helpers.build("mlp")
    model.quantize("int8", filters="hidden")
    survey = find_prunable(model)
    assert len(survey.prunable) == 1
    assert "quantized to int8" in survey.skipped.values()


def test_a_shared_layer_counts_once():
    shared = layers.Dense(4, name="shared")
    inputs = keras.Input((4,))
    model = keras.Model(inputs, shared(shared(inputs)))
    assert [v.path for v in find_prunable(model).prunable.values()] == ["shared/kernel"]


def test_two_variables_with_one_path_get_two_keys_in_model_order():
    towers = [keras.Sequential([keras.Input((4,)), layers.Dense(3, name="same")], name="tower") for _ in range(2)]
    inputs = keras.Input((4,))
    merged = layers.Add()([towers[0](inputs), towers[1](inputs)])
    towers[1].name = "other"
    model = keras.Model(inputs, merged)
    prunable = find_prunable(model).prunable
    path = towers[0].layers[0].kernel.path
    assert list(prunable) == [path, f"{path}@2"]
    assert prunable[path] is towers[0].layers[0].kernel
    assert prunable[f"{path}@2"] is towers[1].layers[0].kernel


def test_a_subclass_of_a_known_layer_is_prunable_and_a_layer_of_ones_own_is_named():
    class Mine(layers.Dense):
        pass

    class Strange(keras.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(shape[-1], 2), name="kernel")

        def call(self, x):
            return x @ self.kernel

    model = keras.Sequential([keras.Input((4,)), Mine(3, name="mine"), Strange(name="strange")])
    survey = find_prunable(model)
    assert [v.path.split("/")[-2] for v in survey.prunable.values()] == ["mine"]
    assert "no known kernel of a Strange layer" in survey.skipped.values()


@pytest.mark.parametrize("filters", ["^head$", ["nothing", "hea"], lambda layer: layer.name == "head"])
def test_filters_choose_layers_as_quantize_does(filters):
    model = helpers.build("mlp")
    survey = find_prunable(model, filters)
    assert [v is model.get_layer("head").kernel for v in survey.prunable.values()] == [True]
    assert survey.skipped[model.get_layer("hidden").kernel.path] == "not chosen by filters"


def test_a_model_with_nothing_prunable_lists_why():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"nothing to prune.*\n  .*gamma: a bias, scale"):
        find_prunable(model)


def test_an_unbuilt_model_says_how_to_build_it():
    with pytest.raises(ValueError, match=r"has no weights yet.*model\.build"):
        find_prunable(keras.Sequential([layers.Dense(3)]))


def test_another_object_is_named_with_its_module():
    with pytest.raises(TypeError, match=r"Expected a keras\.Model .* received numpy\.ndarray"):
        find_prunable(np.ones(3))


def tokens():
    model = keras.Sequential(
        [keras.Input((5,), dtype="int32"), layers.Embedding(7, 8, name="table"), layers.Flatten(), layers.Dense(4)]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    generator = np.random.default_rng(0)
    return model, (generator.integers(0, 7, (12, 5)), generator.integers(0, 4, 12))


@pytest.mark.parametrize("method", helpers.METHODS)
@pytest.mark.parametrize("structure", [None, "output_channels", "input_channels"])
@pytest.mark.filterwarnings("ignore:.*(left no weight in|no longer depend on its input)")
def test_an_embedding_is_pruned_where_it_is_asked_for_and_stays_pruned(method, structure):
    model, data = tokens()
    options = {"structure": structure, "include": ["embeddings"], "verbose": 0}
    report = tf_prune.prune(model, helpers.METHODS[method], 0.5, data, **options)
    (path,) = (path for path in report.masks if "table" in path)
    model.fit(*data, epochs=2, verbose=0)
    assert not np.asarray(model.get_layer("table").embeddings)[~report.masks[path]].any()
    assert report.groups.sparsity == pytest.approx(0.5, abs=1 / report.groups.num_weights)


def test_biases_are_pruned_only_as_the_quirk_that_they_are():
    model = helpers.build("separable")
    data = helpers.batch()
    report = tf_prune.prune(model, "snip", 0.5, data, include=["quirk_biases"])
    names = {path.split("/")[-1] for path in report.masks}
    assert names == {"kernel", "bias"}
    assert not any("norm/" in path for path in report.masks)
    # Biases start at 0, so all of them have the score 0, and go: as measured of the release.
    assert not any(mask.any() for path, mask in report.masks.items() if path.endswith("bias"))
    model.fit(*data, verbose=0)
    assert not np.asarray(model.get_layer("head").bias).any()
    report = tf_prune.prune(helpers.build("mlp"), "snip", 0.5, data, include=["quirk_biases"], structure="1x4")
    assert "a bias has no inputs" in str(report)


@pytest.mark.parametrize("include", [(), ["embeddings"], ["quirk_biases"], ["embeddings", "quirk_biases"]])
def test_masks_of_a_model_with_embeddings_fit_the_same_model_built_again(include):
    model, data = tokens()
    masks = tf_prune.prune(model, "snip", 0.5, data, include=include).masks
    again = keras.Sequential.from_config(model.get_config() | {"name": "again"})
    again.build((None, 5))
    tf_prune.apply_masks(again, masks)
    for one, other in zip(tf_prune.masks_of(again).values(), masks.values(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_report_has_a_reason_for_every_kind_of_layer_that_it_leaves():
    model = every_layer()
    reasons = set(find_prunable(model).skipped.values())
    assert reasons == {"a bias, scale, statistic or state: not a connection between units"}
    chosen = ["depthwise", "separable", "transpose", "query"]
    report = str(tf_prune.prune(model, "magnitude", 0.5, structure="1x4", filters=chosen))
    assert "a depthwise kernel connects each input to its own outputs" in report
    assert "not chosen by filters" in report


# A table is keyed by layer objects: a layer, a wrapper, a whole inner model.
def test_a_table_of_layers_gives_each_its_sparsity_and_the_others_the_default():
    model = helpers.build("nested")
    inner = next(layer for layer in model.layers if isinstance(layer, keras.Sequential))
    report = tf_prune.prune(model, "magnitude", 0.5, scope={inner: 0.75})
    kept = {path.split("/")[-2]: int(mask.sum()) for path, mask in report.masks.items()}
    assert kept == {"body": 36 * 12 // 4, "head": 12 * 4 // 2}
    assert "Magnitude, table: " in str(report)


def test_a_table_of_names_says_what_a_table_of_layers_does():
    model = helpers.build("nested")
    inner = next(layer for layer in model.layers if isinstance(layer, keras.Sequential))
    for layer in (inner, inner.get_layer("body"), model.get_layer("head")):
        by_layer = tf_prune.prune(helpers.build("nested"), "magnitude", 0.5, scope={layer.name: 0.75}).masks
        again = helpers.build("nested")
        (same,) = (la for la in again._flatten_layers() if la.name == layer.name)
        assert by_layer == tf_prune.prune(again, "magnitude", 0.5, scope={same: 0.75}).masks


def test_a_table_of_names_holds_for_wrapped_layers():
    masks = [
        tf_prune.prune(model, "magnitude", 0.5, scope={"head": 0.75}).masks
        for model in (helpers.build("mlp"), tf_prune.wrap(helpers.build("mlp")))
    ]
    for plain, wrapped in zip(masks[0].values(), masks[1].values(), strict=True):
        np.testing.assert_array_equal(plain, wrapped)


def test_two_layers_of_one_name_are_told_apart_by_their_paths():
    parts = [keras.Sequential([layers.Dense(4, name="same")], name=name) for name in ("left", "right")]
    model = keras.Sequential([keras.Input((4,)), *parts])
    with pytest.raises(ValueError, match=r"as 2 layers are called: \S*left/same, \S*right/same\. Use a path"):
        tf_prune.prune(model, "magnitude", 0.5, scope={"same": 0.75})
    report = tf_prune.prune(model, "magnitude", 0.5, scope={"right/same": 0.75})
    assert [int(mask.sum()) for mask in report.masks.values()] == [8, 4]


@pytest.mark.parametrize("method", ["force", "iterative_snip"])
def test_a_table_is_reached_step_by_step(method):
    model = helpers.build("mlp")
    table = {model.get_layer("head"): 0.25}
    report = tf_prune.prune(model, method, 0.875, helpers.batch(), scope=table, verbose=0)
    assert [int(mask.sum()) for mask in report.masks.values()] == [72, 48]


def test_a_wrong_table_says_what_it_names():
    model = helpers.build("nested")
    inner = next(layer for layer in model.layers if isinstance(layer, keras.Sequential))
    body = inner.get_layer("body")
    cases = [
        ({3: 0.5}, "keyed by layers or their names, got 3"),
        ({"stranger": 0.5}, "names the layer 'stranger', which is not in the model.*that are: body, head"),
        (
            {layers.Dense(3, name="stranger"): 0.5},
            "names the layer 'stranger', which is not in the model.*that are: body, head",
        ),
        ({inner: 0.5, body: 0.5}, "twice: by a layer, and by a model that contains it"),
        ({body: 95}, r"Did you mean 0\.95"),
    ]
    before = helpers.state(model)
    for table, message in cases:
        with pytest.raises(ValueError, match=message):
            tf_prune.prune(model, "magnitude", 0.5, scope=table)
    helpers.assert_same_state(before, model)
