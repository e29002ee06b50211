"""Files as functions of named arrays, whatever their inputs and outputs are."""

import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tf_prune import litert, parity
from tf_prune.conversion import convert

X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)


def spec(shape, name, dtype=tf.float32):
    return tf.TensorSpec(shape, dtype, name)


def file_of(folder, function, *specs):
    module = tf.Module()
    module.serve = tf.function(function, input_signature=specs)
    tf.saved_model.save(module, str(folder), signatures=module.serve)
    return convert(folder)


def test_a_fixed_batch_size_takes_any_number_of_examples_beside_inputs_that_are_not_of_each(tmp_path):
    def serve(a, table, rate):
        return {"y": rate * (a @ table)}

    specs = spec((4, 3), "a"), spec((3, 2), "table"), spec((), "rate")
    inputs = {"a": X, "table": np.ones((3, 2), np.float32), "rate": np.float32(2)}
    model = litert.LiteRTModel(file_of(tmp_path, serve, *specs))
    np.testing.assert_allclose(model.outputs(inputs)["y"], 2 * X @ inputs["table"], rtol=1e-5)
    assert model.seconds(inputs) > 0
    assert model.steps == {"y": 0.0}
    one = parity.rows(inputs, 0, 1)
    assert [array.shape for array in one.values()] == [(1, 3), (3, 2), ()]
    assert set(litert.latencies({"a file": model}, one)) == {"a file"}
    assert parity.num_examples(inputs) == 6


def test_outputs_of_a_whole_batch_are_taken_as_they_are_or_refused(tmp_path):
    def serve(a):
        return {"y": 2 * a, "mean": tf.reduce_mean(a), "of each channel": tf.reduce_mean(a, 0)}

    open_ = litert.LiteRTModel(file_of(tmp_path / "open", serve, spec((None, 3), "a")))
    outputs = open_.outputs({"a": X})
    np.testing.assert_allclose(outputs["mean"], X.mean(), rtol=1e-5)
    np.testing.assert_allclose(outputs["of each channel"], X.mean(0), rtol=1e-5)
    fixed = litert.LiteRTModel(file_of(tmp_path / "fixed", serve, spec((2, 3), "a")))
    np.testing.assert_allclose(fixed.outputs({"a": X[:2]})["mean"], X[:2].mean(), rtol=1e-5)
    with pytest.raises(tf_prune.ExportError, match=r"takes 2 examples at a time.*Pass data in batches of 2"):
        fixed.outputs({"a": X})


def test_other_sizes_than_the_file_fixes_are_refused_and_open_ones_taken(tmp_path):
    inner = litert.LiteRTModel(file_of(tmp_path / "inner", lambda a: {"y": 2 * a}, spec((None, 4, 3), "a")))
    with pytest.raises(tf_prune.ExportError, match=r"takes 'a' of shape \(any, 4, 3\), and the data has \(2, 5, 3\)"):
        inner.outputs({"a": np.zeros((2, 5, 3), np.float32)})
    lengths = litert.LiteRTModel(
        file_of(tmp_path / "open", lambda a: {"y": tf.cumsum(a, 1)}, spec((None, None, 3), "a"))
    )
    for shape in ((2, 5, 3), (4, 3, 3), (1, 9, 3)):
        a = np.ones(shape, np.float32)
        np.testing.assert_allclose(lengths.outputs({"a": a})["y"], a.cumsum(1))
    two = file_of(tmp_path / "two", lambda a, b: {"y": tf.concat([a, b], 0)}, spec((1, 3), "a"), spec((2, 3), "b"))
    assert litert.LiteRTModel(two).outputs({"a": X[:1], "b": X[:2]})["y"].shape == (3, 3)
    with pytest.raises(tf_prune.ExportError, match=r"takes 'a' of shape \(1, 3\)"):
        litert.LiteRTModel(two).outputs({"a": X, "b": X})


def test_texts_go_through(tmp_path):
    words = np.array([b"a", b"bcd", b"", b"x", b"y", "\u00e9".encode()], object)
    content = file_of(tmp_path, lambda a, s: {"y": 2 * a, "s": s}, spec((None, 3), "a"), spec((None,), "s", tf.string))
    outputs = litert.LiteRTModel(content).outputs({"a": X, "s": words})
    assert outputs["s"].tolist() == words.tolist()


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize("dtype", [tf.uint8, tf.int8])
def test_quantized_inputs_and_outputs_are_floats_outside(dtype, tmp_path):
    file_of(tmp_path, lambda a: {"y": tf.nn.relu(a @ tf.ones((3, 4)))}, spec((None, 3), "a"))
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ({"a": X[i : i + 1]} for i in range(6))
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = dtype
    model = litert.LiteRTModel(converter.convert())
    expected = np.maximum(X.sum(1, keepdims=True), 0) * np.ones((1, 4))
    assert model.steps["y"] == pytest.approx(expected.max() / 255, rel=0.05)
    np.testing.assert_allclose(model.outputs({"a": X})["y"], expected, atol=4 * model.steps["y"])
