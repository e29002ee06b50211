"""Exports of models whose inputs are of any size: at every size the files are the model, or refuse."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras import layers

import tf_prune
from tf_prune import open_sizes


def one(shape, *stack, **options):
    """A functional model of one input."""
    x = inputs = keras.Input(shape, **options)
    for layer in stack:
        x = layer(x)
    return keras.Model(inputs, x)


def attention():
    x = inputs = keras.Input((None, 8))
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(2, 4)(x, x))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalMaxPooling1D()(x)))


def encoder_and_decoder():
    a, b = keras.Input((None, 4), name="a"), keras.Input((None, 8), name="b")
    keys = layers.Conv1D(8, 3, padding="causal", dilation_rate=2)(a)
    return keras.Model({"a": a, "b": b}, layers.Dense(2)(layers.Attention()([b, keys])))


def u_net():
    inputs = keras.Input((None, None, 3))
    down = layers.Conv2D(4, 3, strides=2, padding="same", activation="relu")(inputs)
    up = layers.Conv2DTranspose(3, 3, strides=2, padding="same")(down)
    return keras.Model(inputs, layers.Concatenate()([up, inputs]))


# Name -> model, shape of an example, and whether recurrent layers need a batch of fixed size.
OPEN = {
    "gru": (lambda: one((None, 3), layers.GRU(8), layers.Dense(2)), (10, 3), True),
    "lstm of both directions": (
        lambda: one((None, 3), layers.Bidirectional(layers.LSTM(6, return_sequences=True)), layers.Dense(2)),
        (10, 3),
        True,
    ),
    "rnn of stacked cells": (lambda: one((None, 3), layers.RNN([layers.GRUCell(4), layers.LSTMCell(5)])), (8, 3), True),
    "masked steps": (
        lambda: one((None,), layers.Embedding(30, 6, mask_zero=True), layers.GRU(5), dtype="int32"),
        (10,),
        True,
    ),
    "conv lstm": (lambda: one((None, 6, 5, 2), layers.ConvLSTM2D(3, 3)), (4, 6, 5, 2), True),
    "attention": (attention, (6, 8), False),
    "convolution": (
        lambda: one(
            (None, None, 3),
            layers.Conv2D(4, 3, padding="same", activation="relu"),
            layers.DepthwiseConv2D(3, strides=2, padding="same"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3),
        ),
        (10, 12, 3),
        False,
    ),
    "convolution in time": (
        lambda: one((None, 3), layers.Conv1D(4, 3, padding="causal", dilation_rate=2)),
        (9, 3),
        False,
    ),
    "convolution in space": (
        lambda: one((None, None, None, 2), layers.Conv3D(3, 2), layers.GlobalMaxPooling3D()),
        (4, 5, 6, 2),
        False,
    ),
    "embedding": (
        lambda: one((None,), layers.Embedding(30, 6), layers.GlobalAveragePooling1D(), dtype="int32"),
        (7,),
        False,
    ),
    "u-net": (u_net, (8, 12, 3), False),
    "resizing": (lambda: one((None, None, 3), layers.Resizing(8, 9), layers.Conv2D(2, 3)), (10, 12, 3), False),
    "upsampling": (
        lambda: one((None, None, 3), layers.Conv2D(2, 1), layers.UpSampling2D(2)),
        (6, 5, 3),
        False,
    ),
    "cropping": (
        lambda: one((None, 3), layers.ZeroPadding1D(2), layers.Cropping1D(1), layers.Dense(2), layers.Permute((2, 1))),
        (9, 3),
        False,
    ),
    "reshaping": (lambda: one((None, 8), layers.Reshape((-1, 4)), layers.Dense(3)), (6, 8), False),
}
QUICK = {("gru", "float32"), ("attention", "float16"), ("convolution", "dynamic_int8"), ("u-net", "float32")}
SLOW = [
    pytest.param(kind, dtype, marks=() if (kind, dtype) in QUICK else pytest.mark.slow)
    for kind in OPEN
    for dtype in ("float32", "float16", "dynamic_int8", "int8")
    if dtype != "int8" or not OPEN[kind][2]  # TF-Lite has no int8 of loops
]


def inputs(model, shape, count, change=lambda n: n):
    """Random inputs of a size; the channels, which come last, stay."""
    generator = np.random.default_rng(0)
    fixed = shape if len(shape) == 1 else shape[-1:]
    sizes = [change(n) for n in shape[: len(shape) - len(fixed)]] if len(shape) > 1 else [change(shape[0])]
    stated = model.inputs[0].shape[1:]
    sizes = [given if open_ is None else open_ for given, open_ in zip([*sizes, *fixed], stated, strict=False)]
    if model.inputs[0].dtype == "int32":
        return generator.integers(1, 30, (count, *sizes)).astype("int32")
    return generator.standard_normal((count, *sizes)).astype("float32")


def served(folder, x):
    function = tf.saved_model.load(str(folder / "saved_model")).signatures["serving_default"]
    names = list(function.structured_input_signature[1])
    return next(iter(function(**{names[0]: tf.constant(x)}).values())).numpy()


def in_tf_lite(folder, x):
    runner = Interpreter(str(folder / "model.tflite")).get_signature_runner()
    ((name, takes),), ((_, gives),) = runner.get_input_details().items(), runner.get_output_details().items()
    scale, zero = takes["quantization"]
    x = np.clip(np.round(x / scale) + zero, -128, 127).astype("int8") if scale and x.dtype == "float32" else x
    output = next(iter(runner(**{name: x}).values()))
    scale, zero = gives["quantization"]
    return (output.astype("float32") - zero) * scale if scale else output


@pytest.mark.parametrize(("kind", "dtype"), SLOW)
def test_files_are_the_model_at_every_size(kind, dtype, tmp_path):
    build, shape, needs_batch = OPEN[kind]
    model = build()
    options = {"batch_size": 2} if needs_batch else {}
    x = inputs(model, shape, 40)  # as many as int8 takes its ranges from
    report = tf_prune.export(model, tmp_path, x, dtype=dtype, **options)
    assert report.notes == ()
    assert (report.shapes[0][1] is None) == (dtype != "int8")
    bound = {"float32": 1e-5, "float16": 2e-2, "dynamic_int8": 0.15, "int8": 0.15}[dtype]
    for change in (lambda n: n, lambda n: 2 * n, lambda n: n + 4, lambda n: n - 2):
        for count in (2,) if needs_batch else (1, 5):
            x = inputs(model, shape, count, change)
            expected = np.asarray(model(x))
            scale = np.abs(expected).max()
            np.testing.assert_allclose(served(tmp_path, x), expected, atol=1e-5 * max(1, scale))
            if dtype != "int8" or x.shape[1:] == report.shapes[0][1:]:
                np.testing.assert_allclose(in_tf_lite(tmp_path, x), expected, atol=bound * max(1, scale))


def test_the_saved_model_is_open_where_the_tf_lite_file_is_fixed(tmp_path):
    model = OPEN["convolution"][0]()
    x = inputs(model, (10, 12, 3), 6)
    for options, shape in (
        ({"dtype": "int8"}, (-1, 10, 12, 3)),
        ({"input_shape": (10, 12, 3), "batch_size": 1}, (1, 10, 12, 3)),
        ({"batch_size": 2}, (2, -1, -1, 3)),
    ):
        report = tf_prune.export(model, tmp_path, x, **options)
        (micro,) = [found for found in report.explanations if found.target == "microcontroller"]
        assert ("sizes" in [obstacle.kind for obstacle in micro.obstacles]) == (shape[1] == -1)
        (details,) = Interpreter(str(tmp_path / "model.tflite")).get_input_details()
        assert tuple(details["shape_signature"]) == shape
        assert report.shapes == (tuple(None if n == -1 else n for n in shape),)
        larger = inputs(model, (10, 12, 3), 3, lambda n: 2 * n)
        np.testing.assert_allclose(served(tmp_path, larger), np.asarray(model(larger)), atol=1e-5)


def test_what_tf_lite_cannot_do_with_open_sizes_is_fixed_and_that_is_said(tmp_path):
    x = keras.Input((None, 8))
    tensor = layers.MultiHeadAttention(2, 4)(x, x, use_causal_mask=True)
    model = keras.Model(x, layers.Dense(2)(tensor))
    x = inputs(model, (6, 8), 4)
    with pytest.warns(UserWarning, match=r"takes examples of shape \(6, 8\) alone\. .*StridedSlice"):
        report = tf_prune.export(model, tmp_path, x)
    assert report.shapes == ((None, 6, 8),)
    longer = inputs(model, (6, 8), 3, lambda n: 3 * n)
    np.testing.assert_allclose(served(tmp_path, longer), np.asarray(model(longer)), atol=1e-5)
    np.testing.assert_allclose(in_tf_lite(tmp_path, x), np.asarray(model(x)), atol=1e-5)


def test_a_graph_that_is_not_the_model_at_other_sizes_is_not_written(tmp_path):
    class Graphs(layers.Layer):
        """Computes otherwise where the number of steps is not known, as some layers do in a graph."""

        def call(self, x):
            return keras.ops.mean(x, 1) if x.shape[1] is not None else keras.ops.sum(x, 1) / 6

    model = one((None, 3), layers.Dense(4), Graphs())
    x = inputs(model, (6, 3), 4)
    with pytest.raises(tf_prune.ExportError, match=r"On inputs of shape \(4, 12, 3\) .*Input\(shape\) of fixed sizes"):
        tf_prune.export(model, tmp_path / "out", x)
    assert not (tmp_path / "out").exists()


def test_several_inputs_of_open_lengths(tmp_path):
    model = encoder_and_decoder()
    a, b = (np.random.default_rng(0).standard_normal((3, 5, n)).astype("float32") for n in (4, 8))
    report = tf_prune.export(model, tmp_path, ({"a": a, "b": b}, None))
    assert report.shapes == ((None, None, 4), (None, None, 8))
    report = tf_prune.export(model, tmp_path, input_shape={"a": (6, 4), "b": (5, 8)})
    assert report.inputs == "32 random examples"
    assert report.shapes == ((None, 6, 4), (None, 5, 8))


def test_data_of_several_lengths_is_compared_at_each(tmp_path):
    model = OPEN["convolution in time"][0]()
    data = [(inputs(model, (9, 3), 4, lambda n, k=k: n + k), None) for k in (0, 5, -2)]
    assert tf_prune.export(model, tmp_path, data).inputs == "12 given examples"
    with pytest.raises(ValueError, match=r"inputs of shape \(4, 14, 3\), but the TF-Lite file takes .* just one shape"):
        tf_prune.export(model, tmp_path / "refused", data, dtype="int8")
    with pytest.raises(ValueError, match=r"inputs of shape \(4, 9, 3\), but the TF-Lite file takes .*\(14, 3\)"):
        tf_prune.export(model, tmp_path / "refused", data, input_shape=(14, 3))
    with pytest.raises(
        ValueError, match=r"input_shape is the shape of one example.* got \[?\(14, 4\)\]?, .* takes \(None, 3\)"
    ):
        tf_prune.export(model, tmp_path / "refused", data, input_shape=(14, 4))
    assert not (tmp_path / "refused").exists()


class Mean(keras.Model):
    """Says nothing of its inputs, and is open in the second axis alone."""

    def __init__(self, counts=False):
        super().__init__()
        self.first, self.second, self.counts = layers.Conv1D(4, 3, padding="same"), layers.Dense(2), counts

    def call(self, x):
        x = self.first(x)
        steps = [x[:, i] for i in range(x.shape[1])] if self.counts else None
        return self.second(keras.ops.mean(x, 1) if steps is None else sum(steps))


def test_of_a_model_that_says_nothing_each_size_is_tried(tmp_path):
    model = Mean()
    x = np.random.default_rng(0).standard_normal((4, 6, 3)).astype("float32")
    model(x)
    report = tf_prune.export(model, tmp_path, x)
    assert report.shapes == ((None, None, 3),)
    longer = np.concatenate([x, x[:, ::-1], x], 1)
    np.testing.assert_allclose(served(tmp_path, longer), np.asarray(model(longer)), atol=1e-5)
    np.testing.assert_allclose(in_tf_lite(tmp_path, longer), np.asarray(model(longer)), atol=1e-5)


def test_a_model_whose_code_counts_steps_is_exported_for_their_number(tmp_path):
    model = Mean(counts=True)
    x = np.random.default_rng(0).standard_normal((4, 6, 3)).astype("float32")
    model(x)
    with pytest.warns(UserWarning, match=r"The SavedModel takes examples of shape \(6, 3\) alone"):
        report = tf_prune.export(model, tmp_path, x)
    assert report.shapes == ((None, 6, 3),)
    np.testing.assert_allclose(served(tmp_path, x), np.asarray(model(x)), atol=1e-5)


def test_a_sequential_model_is_open_wherever_it_runs_though_its_first_call_had_a_shape(tmp_path):
    model = keras.Sequential([layers.GRU(5), layers.Dense(2)])
    x = np.random.default_rng(0).standard_normal((4, 6, 3)).astype("float32")
    model(x[:2])
    tf_prune.export(model, tmp_path, x)
    longer = np.concatenate([x, x[:, ::-1]], 1)
    np.testing.assert_allclose(served(tmp_path, longer), np.asarray(model(longer)), atol=1e-5)


def test_a_file_that_is_wrong_at_other_sizes_is_fixed_to_the_datas_and_that_is_said(tmp_path, monkeypatch):
    model = OPEN["convolution in time"][0]()
    x = inputs(model, (9, 3), 4)
    honest = tf_prune.candidates.compare
    monkeypatch.setattr(
        tf_prune.candidates, "compare", lambda *args, **options: refuse_others(honest, *args, **options)
    )

    def refuse_others(honest, reference, candidate, batches, tolerance, **options):
        batches = list(batches)
        if next(iter(batches[0].values())).shape[1] != 9:
            raise tf_prune.ExportError("It differs. Nothing was written.")
        return honest(reference, candidate, batches, tolerance, **options)

    with pytest.warns(UserWarning, match=r"takes examples of shape \(9, 3\) alone\. .*inputs of shape .*: It differs"):
        report = tf_prune.export(model, tmp_path, x)
    assert report.shapes == ((None, 9, 3),)
    assert report.notes[0] in (tmp_path / "report.md").read_text()
    assert "takes (any, 9, 3)" in (tmp_path / "report.md").read_text()


def test_other_sizes_are_those_that_the_model_takes():
    x = np.arange(12).reshape(2, 6)

    def at_most_7(x):
        if x.shape[1] > 7:
            raise ValueError("too long")

    assert [other.shape for other in open_sizes.at_other_sizes(at_most_7, x, [(2, None)])] == [(2, 7), (2, 3)]
    np.testing.assert_array_equal(next(open_sizes.at_other_sizes(len, x, [(2, None)])), np.concatenate([x, x], 1))
    assert list(open_sizes.at_other_sizes(len, x, [(2, 6)])) == []
