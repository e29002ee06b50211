import keras
import numpy as np
import pytest
from keras import layers

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
