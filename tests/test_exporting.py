import gzip
import json
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter

import tf_prune
from tests import helpers
from tf_prune import candidates, exporting, placing, sources, sweep, tflite


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
    honest = sources.write_saved_model
    monkeypatch.setattr(sources, "write_saved_model", lambda _, *rest: honest(other, *rest))
    with pytest.raises(tf_prune.ExportError, match=r"differs from the model's by up to .* Nothing was written"):
        tf_prune.export(model, tmp_path / "new" / "out", helpers.batch())
    assert os.listdir(tmp_path) == []


def test_weights_and_outputs_that_are_not_finite_are_refused(tmp_path):
    model = helpers.build("mlp")
    model.get_layer("head").bias.assign([np.nan, 0, 0, 0])
    with pytest.raises(ValueError, match=r"head/bias' holds NaN or infinity.*Train with a smaller learning rate"):
        tf_prune.export(model, tmp_path / "out")
    model.get_layer("head").bias.assign([3e38, 0, 0, 0])
    model.get_layer("head").kernel.assign(np.full((16, 4), 3e38))
    with pytest.raises(tf_prune.ExportError, match="none of its numbers is finite"):
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
        patch.setattr(exporting, "compare", lambda *_, **__: 1 / 0)
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


def quantizable(kind):
    """Kernels of more than 1,024 weights, which the converter quantizes."""
    keras.utils.set_random_seed(0)
    layers = {
        "dense": [keras.Input((64,)), keras.layers.Dense(64, "relu")],
        "convolution": [keras.Input((6, 6, 16)), keras.layers.Conv2D(32, 3, activation="relu")],
        "1x1 convolution": [keras.Input((6, 6, 16)), keras.layers.Conv2D(96, 1, activation="relu")],
        "depthwise": [keras.Input((6, 6, 128)), keras.layers.DepthwiseConv2D(3)],
        "transposed": [keras.Input((6, 6, 16)), keras.layers.Conv2DTranspose(16, 3)],
        "recurrent": [keras.Input((5, 16)), keras.layers.GRU(24)],
    }[kind]
    pool = [keras.layers.GlobalAveragePooling2D()] if len(layers[0].shape) == 4 else []
    return keras.Sequential([*layers, *pool, keras.layers.Dense(5)])


def examples_of(model, count=40):
    x = np.random.default_rng(3).standard_normal((count, *model.input_shape[1:])).astype(np.float32)
    return x, np.zeros(count)


GRID = [
    pytest.param(kind, dtype, sparsity, marks=[] if quick else [pytest.mark.slow])
    for kind in ("dense", "convolution", "1x1 convolution", "depthwise", "transposed", "recurrent")
    for dtype in ("float32", "float16", "dynamic_int8", "int8")
    for sparsity in (0.0, 0.25, 0.5, 0.75, 0.9, 0.99)
    if (kind, dtype) != ("recurrent", "int8")  # TF-Lite has no loop of int8 kernels alone
    for quick in [(kind, dtype, sparsity) in {("dense", "int8", 0.5), ("convolution", "dynamic_int8", 0.9)}]
]


@pytest.mark.filterwarnings("ignore:.*outputs no longer depend")
@pytest.mark.parametrize(("kind", "dtype", "sparsity"), GRID)
def test_the_kept_file_is_never_larger_than_the_plain_one_and_does_what_the_model_does(kind, dtype, sparsity, tmp_path):
    model = quantizable(kind)
    if sparsity:
        tf_prune.prune(model, "random", sparsity, scope="layerwise", filters=model.layers[0].name, verbose=0)
    x, y = examples_of(model)
    report = tf_prune.export(model, tmp_path, (x, y), dtype=dtype, batch_size=40 if kind == "recurrent" else None)
    content = (tmp_path / "model.tflite").read_bytes()
    assert len(content) == report.bytes[report.encoding]["raw"] <= report.bytes["dense"]["raw"]
    if report.encoding == "dense":
        assert "sparse" in report.refused or len(content) <= report.bytes["sparse"]["raw"]
    # Run here once more, by the interpreter's plainer interface.
    interpreter = Interpreter(model_content=content)
    (takes,), (gives,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(takes["index"], x.shape)
    interpreter.allocate_tensors()
    scale, zero = takes["quantization"]
    fed = np.clip(np.round(x / scale) + zero, -128, 127).astype(np.int8) if scale else x
    interpreter.set_tensor(takes["index"], fed)
    interpreter.invoke()
    outputs = interpreter.get_tensor(gives["index"]).astype(np.float32)
    scale, zero = gives["quantization"]
    outputs = (outputs - zero) * scale if scale else outputs
    expected = np.asarray(model(x))
    bound = {"float32": 1e-5, "float16": 1e-2}.get(dtype, 0.1)
    np.testing.assert_allclose(outputs, expected, atol=bound * np.abs(expected).max())
    assert report.largest_difference == pytest.approx(np.abs(outputs - expected).max(), rel=1e-3, abs=1e-6)
    for row in report.layers:
        # Rounding makes small weights zero, and never a pruned one not.
        assert row.tflite_sparsity >= row.sparsity - 1e-9
        assert row.tflite_sparsity <= row.sparsity + (0.05 if "int8" in dtype else 1e-3)


@pytest.mark.parametrize(("structure", "dtype"), [("1x4", "float32"), ("1x16", "int8")])
def test_blocks_reach_the_sparse_dense_kernels(structure, dtype, tmp_path):
    model = quantizable("dense")
    tf_prune.prune(model, "magnitude", 0.9, structure=structure, filters=model.layers[0].name, verbose=0)
    report = tf_prune.export(model, tmp_path, examples_of(model), dtype=dtype)
    graph = tflite.read((tmp_path / "model.tflite").read_bytes())[0]
    assert report.encoding == "sparse"
    assert [operator.kind for operator in graph.operators] == ["FULLY_CONNECTED", "FULLY_CONNECTED"]
    assert structure in [tensor.encoding for tensor in graph.tensors]
    (x86,) = [explanation for explanation in report.explanations if explanation.target == "x86"]
    assert next(kernel.encoding for kernel in x86.kernels if kernel.runs_sparse) == structure


def test_an_encoding_that_litert_fails_on_is_not_kept_and_the_report_says_why(tmp_path):
    model = quantizable("dense")
    tf_prune.prune(model, "random", 0.9, scope="layerwise", verbose=0)
    data = examples_of(model)
    report = tf_prune.export(model, tmp_path / "out", data, dtype="int8")
    assert report.bytes["sparse"]["raw"] < report.bytes["dense"]["raw"]
    assert report.encoding == "dense"
    assert "failed to delegate" in report.refused["sparse"]
    assert "failed to delegate" in (tmp_path / "out" / "report.md").read_text()
    assert list(report.latency) == ["dense"]
    with pytest.raises(tf_prune.ExportError, match=r"The sparse encoding cannot be used\. LiteRT does not run it"):
        tf_prune.export(model, tmp_path / "forced", data, dtype="int8", encoding="sparse")
    assert not (tmp_path / "forced").exists()


def test_what_is_known_to_be_wrong_on_other_devices_is_not_kept(tmp_path):
    # In blocks of 1x16, weights of int8 alone give wrong outputs or a crash; the crash must not be tried.
    model = quantizable("dense")
    tf_prune.prune(model, "magnitude", 0.9, structure="1x16", filters=model.layers[0].name, verbose=0)
    report = tf_prune.export(model, tmp_path, examples_of(model), dtype="dynamic_int8")
    assert report.encoding == "dense"
    assert "wrong outputs for dense layers" in report.refused["sparse"]
    # A chain that ends in the axes of an image is computed wrongly on ARM, and rightly here.
    x = inputs = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(8, 3, 2)(keras.layers.ZeroPadding2D(1)(x))
    x = keras.layers.GlobalAveragePooling2D(keepdims=True)(keras.layers.Conv2D(64, 1, name="wide")(x))
    model = keras.Model(inputs, keras.layers.Flatten()(keras.layers.Conv2D(4, 1, name="head")(x)))
    tf_prune.prune(model, "random", 0.9, scope="layerwise", filters="wide", verbose=0)
    report = tf_prune.export(model, tmp_path)
    assert "On ARM XNNPACK computes wrong outputs" in report.refused["sparse"]
    ready, _ = tf_prune.make_ready(model)
    report = tf_prune.export(ready, tmp_path)
    assert (report.encoding, report.refused) == ("sparse", {})


def test_the_encoding_can_be_chosen(tmp_path):
    model = pruned("mlp", 0.9)
    for encoding in ("dense", "sparse"):
        report = tf_prune.export(model, tmp_path, encoding=encoding)
        graph = tflite.read((tmp_path / "model.tflite").read_bytes())[0]
        assert report.encoding == encoding
        assert (encoding == "sparse") == any(t.encoding not in (None, "dense") for t in graph.tensors)
    assert set(report.bytes) == {"dense", "sparse", "SavedModel"}


def test_a_fixed_batch_size_is_the_files_and_the_saved_model_serves_any(tmp_path):
    model = pruned("mlp")
    x, y = helpers.batch(20)
    report = tf_prune.export(model, tmp_path, (x, y), batch_size=8)
    (details,) = Interpreter(str(tmp_path / "model.tflite")).get_input_details()
    assert details["shape_signature"][0] == 8
    # The last 4 examples fill a part of a batch.
    assert report.inputs == "20 given examples"
    assert report.largest_difference < 1e-5
    served = tf.saved_model.load(tmp_path / "saved_model").signatures["serving_default"](tf.constant(x))
    np.testing.assert_allclose(next(iter(served.values())), np.asarray(model(x)), atol=1e-5)


def test_a_saved_model_is_exported_by_its_signature(tmp_path):
    class Module(tf.Module):
        def __init__(self):
            self.kernel = tf.Variable(np.eye(6, dtype=np.float32), name="kernel")

        @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, "rows")])
        def twice(self, rows):
            return {"doubled": 2 * rows @ self.kernel}

        @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, "rows")])
        def thrice(self, rows):
            return {"tripled": 3 * rows @ self.kernel}

    module = Module()
    signatures = {"serving_default": module.twice, "other": module.thrice}
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=signatures)
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    for signature, key, factor in (("serving_default", "doubled", 2), ("other", "tripled", 3)):
        report = tf_prune.export(tmp_path / "saved", tmp_path / "out", (x, x), signature=signature)
        runner = Interpreter(str(tmp_path / "out" / "model.tflite")).get_signature_runner()
        np.testing.assert_allclose(runner(rows=x)[key], factor * x, rtol=1e-6)
        assert report.inputs == "5 given examples"
        assert report.sparsity == pytest.approx(30 / 36)
    assert tf_prune.export(tmp_path / "saved", tmp_path / "out").inputs == "32 random examples"
    for options, message in (
        ({"signature": "third"}, r"has no signature 'third'\. It has: other, serving_default"),
        ({"batch_size": 2}, r"sweep= and tflite=False need the Keras model"),
        ({"data": (x[:, :5], x)}, r"data has inputs of shape \(5, 5\), the signature expects \(None, 6\)"),
        ({"dtype": "int8"}, r"dtype='int8' takes the ranges of activations from real inputs"),
    ):
        with pytest.raises(ValueError, match=message):
            tf_prune.export(tmp_path / "saved", tmp_path / "refused", **options)
    assert not (tmp_path / "refused").exists()


def test_the_page_and_the_plot_say_what_the_report_says(tmp_path):
    model = pruned("mlp", 0.9)
    before = helpers.state(model)
    report = tf_prune.export(model, tmp_path, sweep=(0.0, 0.5))
    helpers.assert_same_state(before, model)
    assert [point.sparsity for point in report.points] == pytest.approx([report.sparsity] * 2 + [0.0] * 2 + [0.5] * 2)
    assert [point.encoding for point in report.points] == ["dense", "sparse"] * 3
    assert report.points[0].bytes == report.bytes["dense"]["raw"]
    sparse = {point.sparsity: point.bytes for point in report.points if point.encoding == "sparse"}
    assert sparse[report.sparsity] < sparse[0.5] < sparse[0.0]
    page = (tmp_path / "report.md").read_text()
    assert "![Size and latency against sparsity](report.png)" in page
    assert all(explanation.verdict in page for explanation in report.explanations)
    assert all(row.path in page for row in report.layers)
    assert f"{report.bytes['sparse']['raw']:,}" in page
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
    loaded = json.loads((tmp_path / "report.json").read_text())
    assert set(loaded["explanations"]) == set(tf_prune.TARGETS)
    assert loaded["explanations"]["arm64"]["verdict"] == report.explanations[0].verdict


def test_a_sweep_keeps_the_pattern_of_blocks(tmp_path):
    model = quantizable("dense")
    tf_prune.prune(model, "magnitude", 0.75, structure="1x4", filters=model.layers[0].name, verbose=0)
    variables = {"kernel": model.layers[0].kernel}
    before = np.asarray(model.layers[0].kernel).copy()
    with sweep.at_sparsity(variables, 0.5):
        blocks = np.asarray(model.layers[0].kernel).reshape(-1, 4, 64) != 0
        assert (blocks == 0).mean() == 0.5
        assert (blocks.any(1) == blocks.all(1)).mean() > 0.99
    np.testing.assert_array_equal(np.asarray(model.layers[0].kernel), before)


class Determinant(keras.layers.Layer):
    def call(self, x):
        return tf.linalg.det(tf.reshape(x, (-1, 2, 2)))[:, None]


@pytest.mark.filterwarnings("ignore:Not compared with the model")
def test_operators_that_tf_lite_lacks_are_named_and_flex_is_offered(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4), Determinant()])
    with pytest.raises(tf_prune.ConversionError, match=r"MatrixDeterminant of .*\(Determinant\)\..*flex=True"):
        tf_prune.export(model, tmp_path / "out")
    assert os.listdir(tmp_path) == []
    report = tf_prune.export(model, tmp_path / "out", flex=True)
    assert report.largest_difference is None or report.largest_difference < 1e-4
    assert report.largest_difference is not None or "Not compared with the model" in str(report)
    assert "FlexMatrixDeterminant" in [
        o.kind for o in tflite.read((tmp_path / "out/model.tflite").read_bytes())[0].operators
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, r"Unknown dtype 'bfloat16'\. Expected one of float32, float16, dynamic_int8, int8"),
        ({"encoding": "smallest"}, r"Unknown encoding 'smallest'"),
        ({"batch_size": 0}, r"batch_size must be a positive integer, or None for any; got 0"),
        ({"sweep": (0.5, 1.0)}, r"1\.0"),
        ({"dtype": "int8"}, r"Pass data=\(x, y\) with some hundred examples"),
        ({"data": (np.zeros((4, 5, 6, 1)), np.zeros(4)), "dtype": "int8"}, r"shape \(4, 5, 6, 1\), but 'mlp' takes"),
        (
            {"data": (np.zeros((4, 6, 6)), np.zeros(4))},
            r"inputs of shape \(4, 6, 6\), but 'mlp' takes \(batch, 6, 6, 1\)",
        ),
    ],
)
def test_options_that_cannot_be_met_are_refused_before_anything_is_written(options, message, tmp_path):
    model = helpers.build("mlp")
    before = helpers.state(model)
    with pytest.raises(ValueError, match=message):
        tf_prune.export(model, tmp_path / "out", **options)
    helpers.assert_same_state(before, model)
    assert os.listdir(tmp_path) == []


def test_what_the_data_do_not_tell_is_a_warning_and_in_the_report(tmp_path):
    dead = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, kernel_initializer="zeros", bias_initializer="ones")]
    )
    with pytest.warns(UserWarning, match="do not tell whether output 'output_0' is right: it is always the same"):
        report = tf_prune.export(dead, tmp_path / "out")
    (sentence,) = report.undecided
    assert sentence in (tmp_path / "out" / "report.md").read_text()
    assert sentence.split(":")[0] in " ".join(str(report).split())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["undecided"] == [sentence]
    flat = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(10, "softmax", kernel_initializer=keras.initializers.RandomNormal(0, 1e-3)),
        ]
    )
    with pytest.warns(UserWarning, match=r"varies by less than 10 of the file's steps of 0\.00391"):
        tf_prune.export(flat, tmp_path / "out", examples_of(flat), dtype="int8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="do not tell"):
            tf_prune.export(dead, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "dynamic_int8", "int8"])
def test_a_converter_that_writes_another_models_file_is_refused(dtype, tmp_path, monkeypatch):
    model, other = quantizable("dense"), quantizable("dense")
    other.set_weights([np.random.default_rng(1).normal(0, 0.1, w.shape) for w in model.get_weights()])
    honest = sources.write_saved_model
    monkeypatch.setattr(sources, "write_saved_model", lambda _, *rest: honest(other, *rest))
    with pytest.raises(tf_prune.ExportError, match=r"differs from the model's by up to .* Nothing was written"):
        tf_prune.export(model, tmp_path / "out", examples_of(model), dtype=dtype)
    assert os.listdir(tmp_path) == []


def test_a_recurrent_layer_asks_for_a_batch_size(tmp_path):
    with pytest.raises(
        tf_prune.ConversionError, match=r"'gru' \(GRU\)\) needs a batch of fixed size in TF-Lite\. Pass batch_size=1"
    ):
        tf_prune.export(helpers.build("recurrent"), tmp_path / "out")
    assert tf_prune.export(helpers.build("recurrent"), tmp_path / "out", batch_size=4).largest_difference < 1e-5


def test_a_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    def refusing(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(placing.tempfile, "mkdtemp", refusing)
    with pytest.raises(PermissionError, match=r"Cannot write into .*: Permission denied\. Choose another directory"):
        tf_prune.export(helpers.build("mlp"), tmp_path / "out")


def two_inputs(folder):
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 3), tf.float32, name) for name in ("a", "b")])
        def minus(self, a, b):
            return {"difference": a - 2 * b}

    tf.saved_model.save(Module(), str(folder))


def test_several_inputs_of_a_saved_model_are_taken_by_name_alone(tmp_path):
    two_inputs(tmp_path / "saved")
    a, b = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    report = tf_prune.export(tmp_path / "saved", tmp_path / "out", ({"b": b, "a": a}, a))
    assert report.largest_difference < 1e-6
    with pytest.raises(ValueError, match=r"the signature's inputs a, b; got no names"):
        tf_prune.export(tmp_path / "saved", tmp_path / "refused", ([a, b], a))
    with pytest.raises(ValueError, match=r"the signature's inputs a, b; got a, c"):
        tf_prune.export(tmp_path / "saved", tmp_path / "refused", ({"a": a, "c": b}, a))


@pytest.mark.filterwarnings("ignore:Not compared with the model")
def test_what_is_known_to_be_wrong_is_not_kept_where_flex_operators_cannot_be_compared(tmp_path):
    layers = [keras.layers.Dense(64, "relu"), keras.layers.Dense(4), Determinant()]
    model = keras.Sequential([keras.Input((64,)), *layers])
    tf_prune.prune(model, "magnitude", 0.9, structure="1x16", filters=layers[0].name, verbose=0)
    options = {"dtype": "dynamic_int8", "flex": True}
    report = tf_prune.export(model, tmp_path, **options, sweep=(0.5,))
    assert report.encoding == "dense"
    assert list(report.refused) == ["sparse"]
    assert [point.encoding for point in report.points] == ["dense", "sparse"] * 2
    if report.largest_difference is None:
        assert [point.latency for point in report.points] == [None] * 4
        assert report.latency == {}
    with pytest.raises(tf_prune.ExportError, match=r"The sparse encoding cannot be used\. XNNPACK computes wrong"):
        tf_prune.export(model, tmp_path, **options, encoding="sparse")


def test_every_kernel_of_attention_is_found(tmp_path):
    model = helpers.build("attention")
    tf_prune.prune(model, "random", 0.5, scope="layerwise", verbose=0)
    report = tf_prune.export(model, tmp_path)
    assert [row.tflite_sparsity for row in report.layers] == pytest.approx([row.sparsity for row in report.layers])


def test_a_batch_size_that_the_model_fixes_is_that_of_the_files(tmp_path):
    model = keras.Sequential([keras.Input((5, 3), batch_size=4), keras.layers.GRU(8), keras.layers.Dense(2)])
    report = tf_prune.export(model, tmp_path / "out")
    assert report.inputs == "4 random examples"
    (details,) = Interpreter(str(tmp_path / "out" / "model.tflite")).get_input_details()
    assert details["shape_signature"][0] == 4


def test_stateful_layers_and_strings_without_data_are_refused_in_words(tmp_path):
    stateful = keras.Sequential([keras.Input((5, 3), batch_size=4), keras.layers.GRU(8, stateful=True, name="gru")])
    with pytest.raises(ValueError, match=r"'gru' is stateful: .*stateful=False"):
        tf_prune.export(stateful, tmp_path / "out")
    words = keras.Sequential([keras.Input((1,), dtype="string"), keras.layers.Hashing(8), keras.layers.Embedding(8, 2)])
    with pytest.raises(ValueError, match=r"takes strings\. Pass data=\(x, y\)"):
        tf_prune.export(words, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_directory_that_cannot_be_made_is_refused_before_the_conversion(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "convert", lambda *_, **__: 1 / 0)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        tf_prune.export(helpers.build("mlp"), tmp_path / "file" / "new" / "out")
    with pytest.raises(OSError, match=r"Cannot write into .*: File name too long\. Choose another directory"):
        tf_prune.export(helpers.build("mlp"), tmp_path / "new" / ("n" * 300))
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_as_long_as_can_be_is_written_to_and_a_failed_export_leaves_no_directory(tmp_path, monkeypatch):
    def failing(source, target):
        if "report.md" in str(source):
            raise OSError("no space left")
        honest(source, target)

    honest = os.replace
    model = helpers.build("mlp")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="no space"):
            tf_prune.export(model, tmp_path / "new" / "out")
    assert os.listdir(tmp_path) == []
    tf_prune.export(model, tmp_path / ("n" * 255))
    assert "model.tflite" in files(tmp_path / ("n" * 255))


def test_weights_come_back_from_a_sweep_whatever_is_interrupted(monkeypatch):
    model = helpers.build("mlp")
    before = helpers.state(model)
    variables = tf_prune.find_prunable(model).prunable
    calls = []

    def interrupted(self, value):
        calls.append(self)
        if len(calls) in (4, 5):
            raise KeyboardInterrupt
        honest(self, value)

    honest = keras.Variable.assign
    with monkeypatch.context() as patch:
        patch.setattr(keras.Variable, "assign", interrupted)
        with pytest.raises(KeyboardInterrupt), sweep.at_sparsity(variables, 0.5):
            pass
    assert len(calls) >= 6
    helpers.assert_same_state(before, model)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_that_trains_in_mixed_precision_is_served_in_float32(policy, tmp_path):
    default = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        mixed = helpers.MODELS["mlp"]()
    finally:
        keras.config.set_dtype_policy(default)
    plain = helpers.build("mlp")
    plain.set_weights(mixed.get_weights())
    x, y = helpers.batch(8)
    before = helpers.state(mixed)
    report = tf_prune.export(mixed, tmp_path, (x, y))
    helpers.assert_same_state(before, mixed)
    assert {layer.dtype_policy.name for layer in mixed.layers} == {policy}
    assert report.largest_difference < 1e-5
    loaded = tf.saved_model.load(tmp_path / "saved_model")
    served = loaded.serve(x)
    assert served.dtype == tf.float32
    np.testing.assert_allclose(served, plain(x), atol=1e-5)


def test_entries_of_an_earlier_export_that_the_new_one_has_not_go(tmp_path, monkeypatch):
    tf_prune.export(helpers.build("mlp"), tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    assert (tmp_path / "report.png").exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    tf_prune.export(helpers.build("mlp"), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.tflite", "notes.txt", "report.json", "report.md", "saved_model"]


def test_a_saved_model_is_exported_into_its_own_folder(tmp_path):
    two_inputs(tmp_path)
    before = files(tmp_path)
    tf_prune.export(tmp_path, tmp_path)
    assert files(tmp_path / "saved_model") == before
    assert set(files(tmp_path)) >= {*before, "model.tflite", "report.json"}
