import gzip
import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import tf_prune
from tests import helpers
from tf_prune import exporting, tflite


def pruned(name="conv_bn", sparsity=0.7, method="snip"):
    model = helpers.build(name, optimizer=keras.optimizers.Adam(0.01))
    tf_prune.prune(model, method, sparsity, helpers.batch(), verbose=0)
    x, y = helpers.batch(32)
    model.fit(x, y, epochs=1, verbose=0)
    return model


def files(directory):
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file())


@pytest.mark.parametrize("name", ["mlp", "mlp_softmax", "conv_bn", "residual", "nested", "subclassed"])
def test_the_files_do_what_the_model_does_and_the_model_stays(name, tmp_path):
    model = pruned(name)
    before = helpers.state(model)
    x, y = helpers.batch(20, seed=9)
    report = tf_prune.export(model, tmp_path / "out", (x, y))
    helpers.assert_same_state(before, model)
    expected = np.asarray(model(x, training=False))
    loaded = tf.saved_model.load(tmp_path / "out" / "saved_model")
    np.testing.assert_allclose(loaded.serve(x), expected, atol=1e-5)
    runner = Interpreter(str(tmp_path / "out" / "model.tflite")).get_signature_runner()
    (name_of_input,) = runner.get_input_details()
    outputs = runner(**{name_of_input: x})["output_0"]
    np.testing.assert_allclose(outputs, expected, atol=1e-4)
    assert report.largest_difference == pytest.approx(np.abs(outputs - expected).max())
    assert report.agreement == (outputs.argmax(1) == expected.argmax(1)).mean()
    assert report.inputs == "20 given examples"


def test_the_saved_model_holds_each_weight_once_no_mask_no_optimizer_and_exact_zeros(tmp_path):
    model = pruned()
    masks = tf_prune.masks_of(model)
    tf_prune.export(model, tmp_path)
    prefix = str(tmp_path / "saved_model" / "variables" / "variables")
    arrays = [
        tf.train.load_variable(prefix, n) for n, shape in tf.train.list_variables(prefix) if "VARIABLE_VALUE" in n
    ]
    weights = [v for v in model.weights if "seed" not in v.path]
    assert sorted(a.shape for a in arrays) == sorted(tuple(v.shape) for v in weights)
    for path, variable in tf_prune.find_prunable(model).prunable.items():
        (array,) = [a for a in arrays if a.shape == tuple(variable.shape)]
        np.testing.assert_array_equal(array != 0, masks[path])


def test_the_saved_model_loads_where_tf_prune_was_never_imported(tmp_path):
    model = pruned("mlp")
    x, _ = helpers.batch(4)
    tf_prune.export(model, tmp_path / "out")
    np.save(tmp_path / "x.npy", x)
    code = (
        "import sys, numpy as np, tensorflow as tf;"
        "m = tf.saved_model.load('out/saved_model');"
        "y = m.signatures['serving_default'](tf.constant(np.load('x.npy')));"
        "assert 'tf_prune' not in sys.modules;"
        "np.save('y.npy', list(y.values())[0])"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), np.asarray(model(x)), atol=1e-5)


@pytest.mark.parametrize(("sparsity", "encoding"), [(0.0, "dense"), (0.9, "sparse")])
def test_the_smaller_encoding_is_kept_and_sizes_are_those_of_the_files(tmp_path, sparsity, encoding):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(128, "relu"), keras.layers.Dense(8)])
    tf_prune.prune(model, "random", sparsity)
    report = tf_prune.export(model, tmp_path)
    content = (tmp_path / "model.tflite").read_bytes()
    assert report.encoding == encoding
    assert report.bytes[encoding]["raw"] == len(content) == min(report.bytes[e]["raw"] for e in ("dense", "sparse"))
    assert report.bytes[encoding]["gzip"] == len(gzip.compress(content, mtime=0))
    assert report.bytes["SavedModel"]["raw"] == sum(
        (tmp_path / name).stat().st_size for name in files(tmp_path) if name.startswith("saved_model")
    )


def test_zeros_are_counted_again_in_the_file(tmp_path):
    model = pruned("conv_bn", 0.7)
    masks = tf_prune.masks_of(model)
    report = tf_prune.export(model, tmp_path)
    assert [row.path for row in report.layers] == list(masks)
    for row in report.layers:
        assert row.num_weights == masks[row.path].size
        assert row.sparsity == pytest.approx(1 - masks[row.path].mean())
        assert row.tflite_sparsity == pytest.approx(row.sparsity)
    assert report.sparsity == pytest.approx(masks.sparsity)


def block_mask(shape, block, density):
    generator = np.random.default_rng(0)
    return np.repeat(generator.random((shape[0] // block, shape[1])) < density, block, axis=0)


@pytest.mark.parametrize(
    "mask", [block_mask((64, 48), 4, 0.08), block_mask((64, 48), 1, 0.1)], ids=["1x4 blocks", "scattered"]
)
def test_sparse_tensors_are_decoded_to_the_kernel_they_were(tmp_path, mask):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(48, use_bias=False)])
    tf_prune.apply_masks(model, {model.layers[0].kernel.path: mask})
    tf_prune.export(model, tmp_path)
    content = (tmp_path / "model.tflite").read_bytes()
    (kernel,) = [array for array in tflite.constants(content) if array.ndim == 2]
    np.testing.assert_array_equal(kernel, np.asarray(model.layers[0].kernel).T)


def test_the_report_is_json_and_a_table(tmp_path):
    report = tf_prune.export(pruned("mlp"), tmp_path)
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert loaded["bytes"] == report.bytes
    assert loaded["sparsity"] == report.sparsity
    assert loaded["layers"][0]["tflite_sparsity"] == report.layers[0].tflite_sparsity
    text = str(report)
    assert "kept as model.tflite" in text
    assert "32 random examples" in text
    assert all(row.path in text for row in report.layers)


def test_models_with_several_inputs_and_outputs_are_compared_by_name(tmp_path):
    a, b = keras.Input((4,), name="first"), keras.Input((3,), name="second")
    both = keras.layers.Concatenate()([a, b])
    outputs = {"wide": keras.layers.Dense(12)(both), "a_number": keras.layers.Dense(1)(a)}
    listed = keras.Model([b, a], [keras.layers.Dense(3)(both) for _ in range(11)])
    assert tf_prune.export(listed, tmp_path / "listed").largest_difference < 1e-5
    generator = np.random.default_rng(0)
    x = {name: generator.standard_normal((6, n)).astype(np.float32) for name, n in (("first", 4), ("second", 3))}
    named = keras.Model({"first": a, "second": b}, outputs)
    assert tf_prune.export(named, tmp_path / "named", (x, np.zeros(6))).largest_difference < 1e-5


@pytest.mark.parametrize("name", ["mlp", "subclassed"])
def test_the_file_takes_the_models_dtype_and_not_that_of_the_data(name, tmp_path):
    x, y = helpers.batch()
    tf_prune.export(helpers.build(name), tmp_path, (x.astype(np.float64), y))
    (details,) = Interpreter(str(tmp_path / "model.tflite")).get_input_details()
    assert details["dtype"] == np.float32


def test_outputs_that_disagree_raise_and_leave_nothing(tmp_path, monkeypatch):
    model = pruned("mlp")
    other = helpers.build("mlp", seed=5)
    honest = exporting._write_saved_model
    monkeypatch.setattr(exporting, "_write_saved_model", lambda _, *rest: honest(other, *rest))
    with pytest.raises(tf_prune.ExportError, match=r"differs from Keras's by up to .* Nothing was written"):
        tf_prune.export(model, tmp_path / "new" / "out", helpers.batch())
    assert os.listdir(tmp_path) == []


def test_outputs_that_are_not_finite_are_refused(tmp_path):
    model = helpers.build("mlp")
    model.get_layer("head").bias.assign([np.nan, 0, 0, 0])
    with pytest.raises(tf_prune.ExportError, match="differs from Keras's by up to nan"):
        tf_prune.export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_an_export_that_fails_while_files_are_put_in_place_brings_the_old_ones_back(tmp_path, monkeypatch):
    tf_prune.export(pruned("mlp"), tmp_path / "out")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    honest, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 4:
            raise OSError("no space left")
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no space"):
            tf_prune.export(pruned("conv_bn"), tmp_path / "out")
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_kernels_whose_axes_change_in_conversion_are_found(tmp_path):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), name="an image"),
            keras.layers.DepthwiseConv2D(3, depth_multiplier=2),
            keras.layers.Conv2D(4, 1),
            keras.layers.Reshape((36, 4)),
            keras.layers.Conv1D(5, 3),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    tf_prune.prune(model, "random", 0.5, scope="layerwise")
    report = tf_prune.export(model, tmp_path)
    assert [row.tflite_sparsity for row in report.layers] == pytest.approx([row.sparsity for row in report.layers])


def test_a_frozen_model_and_one_without_kernels_are_exported_too(tmp_path):
    model = pruned("mlp")
    model.trainable = False
    assert tf_prune.export(model, tmp_path / "frozen").sparsity == pytest.approx(0.7, abs=0.01)
    plain = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    assert tf_prune.export(plain, tmp_path / "plain").sparsity == 0.0


def test_an_earlier_export_survives_a_failed_one_and_is_replaced_by_a_good_one(tmp_path, monkeypatch):
    tf_prune.export(pruned("mlp"), tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_compare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tf_prune.export(pruned("conv_bn"), tmp_path / "out")
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before
    tf_prune.export(pruned("conv_bn"), tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "model.tflite").read_bytes() != before["out/model.tflite"]


def test_pruned_weights_that_came_back_are_refused(tmp_path):
    model = helpers.build("mlp")
    dense = model.get_weights()
    tf_prune.prune(model, "magnitude", 0.5)
    model.set_weights(dense)
    with pytest.raises(ValueError, match=r"Pruned weights of .*hidden/kernel.* are not zero.*apply_masks"):
        tf_prune.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_unknown_input_shape_asks_for_data(tmp_path):
    with pytest.raises(ValueError, match=r"does not say of what shape its inputs are\. Pass data="):
        tf_prune.export(helpers.build("subclassed"), tmp_path / "out")


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ValueError, match="is a file"):
        tf_prune.export(helpers.build("mlp"), tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


def test_without_litert_the_way_to_install_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(ImportError, match=r"pip install 'tf_prune\[litert\]'"):
        tf_prune.export(helpers.build("mlp"), tmp_path / "out")
    assert os.listdir(tmp_path) == []
