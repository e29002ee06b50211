"""`export` takes data as people have it, and models that TF-Lite cannot express."""

import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import tf_prune
from tests import helpers

TEXT = np.array([["a good film"], ["a bad film"], ["good good"], ["film"]])


def served(folder, x):
    function = tf.saved_model.load(str(folder / "saved_model")).signatures["serving_default"]
    (name,) = function.structured_input_signature[1]
    return next(iter(function(**{name: tf.constant(x)}).values())).numpy()


def of_text(kind="vectorization"):
    inputs = keras.Input((1,), dtype="string")
    if kind == "vectorization":
        words = layers.TextVectorization(max_tokens=20, output_sequence_length=6)
        words.adapt(["a good film", "a bad film"])
    elif kind == "lookup":
        words = layers.StringLookup(vocabulary=["a good film", "a bad film"])
    else:
        words = layers.Hashing(20)
    x = layers.GlobalAveragePooling1D()(layers.Embedding(20, 8)(words(inputs)))
    return keras.Model(inputs, layers.Dense(3)(x))


@pytest.mark.parametrize("kind", ["vectorization", "lookup", "hashing"])
@pytest.mark.parametrize("as_given", [np.asarray, tf.constant, lambda x: x.astype(object), lambda x: x.astype("S")])
def test_a_model_of_text_is_written_as_a_saved_model_alone(kind, as_given, tmp_path):
    model = of_text(kind)
    tf_prune.prune(model, "magnitude", 0.5, verbose=0)
    report = tf_prune.export(model, tmp_path, as_given(TEXT), tflite=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.json", "report.md", "saved_model"]
    np.testing.assert_allclose(served(tmp_path, TEXT), np.asarray(model(TEXT)), atol=1e-6)
    assert report.encoding is None
    assert report.inputs == "4 given examples"
    assert report.sparsity == pytest.approx(0.5, abs=0.02)
    assert "The model and the SavedModel on 4 given examples" in str(report)
    assert "kernels" in (tmp_path / "report.md").read_text()
    assert "tflite" not in (tmp_path / "report.md").read_text().replace("the .tflite", "")


def test_text_in_tf_lite_is_refused_in_words(tmp_path):
    with pytest.raises(tf_prune.ConversionError, match="tflite=False"):
        tf_prune.export(of_text(), tmp_path / "out", TEXT)
    with pytest.raises(ValueError, match=r"takes strings\. Pass data="):
        tf_prune.export(of_text(), tmp_path / "out", tflite=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int8"},
        {"encoding": "dense"},
        {"batch_size": 1},
        {"input_shape": (6, 6, 1)},
        {"sweep": (0.5,)},
        {"flex": True},
    ],
)
def test_what_is_of_the_tf_lite_file_is_refused_without_one(options, tmp_path):
    with pytest.raises(ValueError, match="are of the TF-Lite file"):
        tf_prune.export(helpers.build("mlp"), tmp_path, helpers.batch(), tflite=False, **options)


def test_a_generator_is_read_once_and_whole(tmp_path):
    x, y = helpers.batch(16)
    read = []

    def generator():
        for i in range(4):
            read.append(i)
            yield x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]

    report = tf_prune.export(helpers.build("mlp"), tmp_path, generator(), dtype="int8")
    assert read == [0, 1, 2, 3]
    assert report.inputs == "16 given examples"


def test_endless_data_is_read_as_far_as_is_asked_for(tmp_path):
    x, y = helpers.batch(4)
    model = helpers.build("mlp")
    endless = tf.data.Dataset.from_tensors((x, y)).repeat()
    with pytest.raises(ValueError, match="endless"):
        tf_prune.export(model, tmp_path / "out", endless)
    with pytest.raises(ValueError, match=r"has given 200 batches .* num_batches="):
        tf_prune.export(model, tmp_path / "out", ((x, y) for _ in itertools.count()))
    assert not (tmp_path / "out").exists()
    for wrong in (0, True, 2.0):
        with pytest.raises(ValueError, match="num_batches must be a positive integer"):
            tf_prune.export(model, tmp_path / "out", endless, num_batches=wrong)
    assert (
        tf_prune.export(model, tmp_path / "out", ((x, y) for _ in range(2)), num_batches=3).inputs == "8 given examples"
    )
    for data in (endless, ((x, y) for _ in itertools.count()), [(x, y)] * 5):
        assert tf_prune.export(model, tmp_path / "out", data, num_batches=3).inputs == "12 given examples"


@pytest.mark.parametrize(
    "as_given", [np.asarray, tf.constant, lambda x: x.astype("float64"), lambda x: [(x[:5],), (x[5:],)]]
)
def test_x_alone_is_data(as_given, tmp_path):
    x, _ = helpers.batch(9)
    assert tf_prune.export(helpers.build("mlp"), tmp_path, as_given(x)).inputs == "9 given examples"


def test_a_whole_test_set_is_run_in_parts(tmp_path):
    x, _ = helpers.batch(300)
    model = helpers.build("mlp")
    most = []

    class Counting(layers.Layer):
        def call(self, x):
            if isinstance(x, tf.__internal__.EagerTensor):
                most.append(int(x.shape[0]))
            return x

    counted = keras.Sequential([keras.Input((6, 6, 1)), Counting(), *model.layers])
    assert tf_prune.export(counted, tmp_path, x).inputs == "300 given examples"
    assert max(most) == 128


def test_data_that_does_not_fill_batches_of_a_fixed_size_counts_what_was_compared(tmp_path):
    inputs = keras.Input((5,), batch_size=4)
    model = keras.Model(inputs, layers.Dense(3)(inputs))
    x = np.random.default_rng(0).standard_normal((10, 5)).astype("float32")
    assert tf_prune.export(model, tmp_path, x).inputs == "8 given examples"
    with pytest.raises(ValueError, match=r"takes batches of 4 examples, and data has fewer"):
        tf_prune.export(model, tmp_path, x[:3])
