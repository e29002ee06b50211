import dataclasses
import importlib
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

import tf_prune
from experiments import common, compare_methods, datasets
from tests import helpers
from tests.test_legacy_keras import assert_same_outputs, chain, inputs_of, randomize
from tf_prune import legacy_keras, tfmot

TOOLKIT = tfmot.import_tfmot()


def some_slow(names, *quick):
    """Parametrizes by name; all but the quick ones are left to `pytest -m slow`."""
    rows = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", rows)


@some_slow([name for name in helpers.MODELS if name != "subclassed"], "attention", "separable")
def test_a_model_comes_back_as_it_was(name):
    model = helpers.build(name)
    masks = tf_prune.prune(model, "random", 0.7).masks
    randomize_kept(model)
    legacy = tfmot.to_tf_keras(model)
    assert_same_outputs(model, legacy)
    zeros = sum(int((weight.numpy() == 0).sum()) for weight in legacy.weights)
    assert zeros >= masks.num_weights - masks.num_kept
    assert not any((np.signbit(w.numpy()) & (w.numpy() == 0)).any() for w in legacy.weights)
    back, masks_back = tfmot.from_tfmot(legacy)
    assert_same_outputs(model, back)
    assert [mask.tolist() for mask in masks_back.values()] == [mask.tolist() for mask in masks.values()]
    assert [type(layer) for layer in back.layers] == [type(layer) for layer in model.layers]
    for a, b in zip(model.get_weights(), back.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def randomize_kept(model):
    """Moves all weights; the pruned ones stay zero, and biases and statistics are no longer 0 or 1."""
    masks = tf_prune.masks_of(model)
    randomize(model, seed=2)
    tf_prune.apply_masks(model, masks)


def fit_with_tfmot(legacy, steps=6, **options):
    """Prunes for a few steps; returns the wrapped model."""
    schedule = TOOLKIT.sparsity.keras.PolynomialDecay(0.2, 0.8, 1, 5, frequency=2)
    pruned = TOOLKIT.sparsity.keras.prune_low_magnitude(legacy, schedule, **options)
    pruned.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = helpers.batch(8 * steps)
    pruned.fit(x, y, batch_size=8, callbacks=[TOOLKIT.sparsity.keras.UpdatePruningStep()], verbose=0)
    return pruned


def masks_in(pruned):
    """The mask variables of tfmot's wrappers, in the order of the model's layers."""
    masks = []
    for layer in pruned.layers:
        if hasattr(layer, "layers"):
            masks += masks_in(layer)
        else:
            masks += [mask.numpy() for _, mask, _ in getattr(layer, "pruning_vars", ())]
    return masks


@some_slow(["conv_bn", "residual", "nested", "recurrent"], "nested")
def test_what_tfmot_pruned_comes_back_with_its_masks_bit_for_bit(name):
    pruned = fit_with_tfmot(tfmot.to_tf_keras(helpers.build(name)))
    kernel, mask, _ = next(layer.pruning_vars[0] for layer in pruned.submodules if getattr(layer, "pruning_vars", ()))
    kept = tuple(np.argwhere(mask.numpy())[0])
    dense = kernel.numpy()
    dense[kept] = 0  # a kept weight that happens to be 0
    kernel.assign(dense)
    model, masks = tfmot.from_tfmot(pruned)
    expected = masks_in(pruned)
    assert len(masks) == len(expected) > 1
    for mask, one in zip(masks.values(), expected, strict=True):
        np.testing.assert_array_equal(mask, one.astype(bool))
    assert 0.6 < masks.sparsity < 0.85
    assert tf_prune.masks_of(model) == masks
    helpers.assert_pruned_is_zero(model, masks)
    assert_same_outputs(model, pruned)
    x, y = helpers.batch()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, epochs=2, verbose=0)
    helpers.assert_masks_hold(model, masks)  # the kept weight that was 0 has been trained


def test_of_a_model_that_tfmot_prunes_in_part_only_those_layers_have_masks():
    legacy = tf_keras.Sequential(
        [
            tf_keras.Input((4,)),
            TOOLKIT.sparsity.keras.prune_low_magnitude(tf_keras.layers.Dense(3, name="first")),
            tf_keras.layers.Dense(2, name="second"),
        ]
    )
    model, masks = tfmot.from_tfmot(legacy)
    assert [path.split("/")[-2] for path in masks] == ["first"]
    assert [layer.name for layer in model.layers] == ["first", "second"]
    assert_same_outputs(legacy, model)


def test_without_wrappers_the_zeros_of_the_kernels_are_the_masks():
    inputs = tf_keras.Input((5,), dtype="int32")
    x = tf_keras.layers.Flatten()(tf_keras.layers.Embedding(7, 4)(inputs))
    legacy = tf_keras.Model(inputs, tf_keras.layers.Dense(3, bias_initializer="zeros")(x))
    randomize(legacy)
    pruned = TOOLKIT.sparsity.keras.prune_low_magnitude(
        legacy, TOOLKIT.sparsity.keras.ConstantSparsity(0.5, 1, frequency=1)
    )
    pruned.compile("sgd", "mse")
    pruned.fit(np.zeros((4, 5)), np.zeros((4, 3)), callbacks=[TOOLKIT.sparsity.keras.UpdatePruningStep()], verbose=0)
    wrapped, masks = tfmot.from_tfmot(pruned)
    stripped, same = tfmot.from_tfmot(TOOLKIT.sparsity.keras.strip_pruning(pruned))
    assert [mask.tolist() for mask in same.values()] == [mask.tolist() for mask in masks.values()]
    assert len(masks) == 2  # the table of the embedding, which tfmot prunes too
    assert masks.sparsity == 0.5
    assert_same_outputs(wrapped, stripped)
    # A table without zeros was not pruned.
    dense = tf_keras.Sequential([tf_keras.Input((5,)), tf_keras.layers.Embedding(7, 4), tf_keras.layers.Dense(2)])
    randomize(dense)
    assert [path.split("/")[-1] for path in tfmot.from_tfmot(dense)[1]] == ["kernel"]


def test_the_wrong_kind_of_model_is_refused_and_told_where_to_go():
    model, legacy = chain(keras), chain(tf_keras)
    with pytest.raises(TypeError, match="needs no bridge"):
        tfmot.from_tfmot(model)
    with pytest.raises(TypeError, match=r"Expected a keras\.Model"):
        tfmot.to_tf_keras(legacy)
    with pytest.raises(TypeError, match=r"Expected a keras\.Model"):
        tfmot.quantize_aware(legacy)
    with pytest.raises(TypeError, match=r"written by tf_prune\.export"):
        tfmot.save_quantized(model, "unused")


def small_network():
    """With a model inside, a shortcut, a separable and a depthwise convolution, and two outputs."""
    layers = keras.layers
    inside = keras.Input((6, 6, 1))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(8, 3, use_bias=False, name="conv")(inside))
    body = keras.Model(inside, layers.ReLU(name="relu")(x), name="body")
    inputs = keras.Input((6, 6, 1), name="image")
    x = body(inputs)
    x = x + layers.SeparableConv2D(8, 3, padding="same", name="separable")(x)
    x = layers.DepthwiseConv2D(3, name="depthwise")(x)
    x = layers.GlobalAveragePooling2D()(x)
    x = keras.Sequential([keras.Input((8,)), layers.Dense(16, "relu", name="conv")], name="top")(x)
    return keras.Model(inputs, [layers.Dense(4, name="logits")(x), layers.Dense(2, "softmax", name="odds")(x)])


def int8_kernels(content):
    """The constant int8 tensors of a `.tflite` file that are no vectors; int8 0 is the number 0 in each."""
    model = schema.Model.GetRootAs(content)
    graph, kernels = model.Subgraphs(0), []
    for tensor in map(graph.Tensors, range(graph.TensorsLength())):
        data = model.Buffers(tensor.Buffer()).DataAsNumpy()
        if tensor.Type() == schema.TensorType.INT8 and tensor.ShapeLength() > 1 and isinstance(data, np.ndarray):
            assert not tensor.Quantization().ZeroPointAsNumpy().any()
            kernels.append(data.view(np.int8).reshape(tensor.ShapeAsNumpy()))
    return kernels


def as_in_tflite(path, kernel):
    """TF-Lite has the output channels first, and a depthwise kernel's channels last."""
    if "depthwise" in path:
        return kernel.reshape(1, *kernel.shape[:2], -1)
    return np.moveaxis(kernel, -1, 0)


@pytest.mark.filterwarnings("ignore:.*left no weight in")
def test_a_model_that_trains_quantized_has_the_zeros_of_the_masks_in_int8(tmp_path):
    model = small_network()
    masks = tf_prune.prune(model, "magnitude", 0.6, scope="layerwise").masks
    quantized = tfmot.quantize_aware(model)
    loss = tf_keras.losses.SparseCategoricalCrossentropy
    quantized.compile(tf_keras.optimizers.Adam(0.01), [loss(from_logits=True), loss()])
    x, y = helpers.batch(256)
    before = [weight.numpy() for weight in quantized.trainable_weights]
    quantized.fit(x, [y, y % 2], epochs=2, verbose=0)
    assert not any(np.array_equal(a, b.numpy()) for a, b in zip(before, quantized.trainable_weights, strict=True))
    tfmot.save_quantized(quantized, tmp_path / "saved")

    loaded = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    assert loaded.structured_input_signature[1]["image"].shape.as_list() == [None, 6, 6, 1]
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "saved"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    content = converter.convert()
    kernels = int8_kernels(content)
    assert len(kernels) == len(masks) == 7
    for path, mask in masks.items():
        kept = as_in_tflite(path, mask)
        matching = [i for i, kernel in enumerate(kernels) if kernel.shape == kept.shape and not kernel[~kept].any()]
        assert len(matching) == 1, path
        # int8 rounds some kept weights to 0 as well, and few of them.
        assert np.count_nonzero(kernels[matching[0]][kept] == 0) <= 0.2 * kept.sum()

    runner = Interpreter(model_content=content).get_signature_runner()
    outputs = quantized(x, training=False)
    for i, output in enumerate(outputs):
        got = runner(image=x)[f"output_{i}"]
        assert np.abs(got - output.numpy()).mean() < 0.02 * np.abs(output).max()
        assert (got.argmax(-1) == output.numpy().argmax(-1)).mean() > 0.9


def test_a_chain_of_models_trains_quantized_as_one_model():
    layers = keras.layers
    inside = keras.Input((4,))
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.Model(inside, layers.Dense(4, "relu", name="first")(inside)),
            keras.Sequential([keras.Input((4,)), layers.Dense(3, name="second")]),
        ]
    )
    quantized = tfmot.quantize_aware(model)
    assert [layer.name for layer in quantized.layers[-2:]] == ["quant_first", "quant_second"]
    x = inputs_of(model)
    np.testing.assert_allclose(tfmot.to_tf_keras(model, flat=True)(x), model(x), atol=1e-6)


def test_a_saved_model_takes_inputs_by_their_names_and_any_size_of_batch(tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    joined = keras.layers.Concatenate()([keras.layers.Dense(2)(a), keras.layers.Dense(2)(b)])
    legacy = tfmot.to_tf_keras(keras.Model({"b": b, "a": a}, {"sum": keras.layers.Dense(1)(joined)}))
    tfmot.save_quantized(legacy, tmp_path)
    signature = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    for size in (1, 5):
        x = inputs_of(legacy, size=size)
        got = signature(**{name: tf.constant(value) for name, value in x.items()})
        np.testing.assert_allclose(got["sum"], legacy(x)["sum"], atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            lambda: [
                keras.layers.Reshape((2, 2)),
                keras.layers.Conv1D(2, 1, name="one"),
                keras.layers.GRU(2, name="two"),
            ],
            r"(?s)tfmot cannot quantize these layers.*one \(Conv1D\).*two \(GRU\).*export\(model, directory, dtype=",
        ),
        (lambda: [keras.layers.Dense(2, "elu", name="one")], r"one \(Dense\): activation 'elu' is not one of gelu"),
        (
            lambda: [keras.layers.ReLU(), keras.layers.BatchNormalization(name="alone")],
            "(?s)alone.*a BatchNormalization right after one",
        ),
        (
            lambda: [keras.layers.BatchNormalization(name="half", dtype="mixed_float16")],
            r"half \(BatchNormalization\): computes in float16, and only float32 can be quantized",
        ),
    ],
)
def test_what_tfmot_cannot_quantize_is_refused_by_name(layers, message):
    with pytest.raises(ValueError, match=message):
        tfmot.quantize_aware(chain(keras, *layers()))


SCHEDULES = {
    "polynomial": lambda: TOOLKIT.sparsity.keras.PolynomialDecay(0.1, 0.83, 2, 17, power=2.5, frequency=4),
    "cubic": lambda: TOOLKIT.sparsity.keras.PolynomialDecay(0.0, 0.9, 4, 16, frequency=3),
    "constant": lambda: TOOLKIT.sparsity.keras.ConstantSparsity(0.7, 5, frequency=2),
}


@some_slow(SCHEDULES, "cubic", "constant")
def test_a_schedule_of_tfmot_prunes_to_its_own_sparsity_at_each_of_its_steps(name):
    schedule = SCHEDULES[name]()
    asked = []

    class Watched(tf_prune.GradualPruning):
        def _prune_after(self, step):
            before = self._last
            super()._prune_after(step)
            if self._last != before:
                asked.append((step, tf_prune.masks_of(self.model)))

    model = helpers.build("mlp")
    callback = Watched("magnitude", schedule, scope="layerwise")
    x, y = helpers.batch(16 * 20)
    model.fit(x, y, batch_size=16, callbacks=[callback], verbose=0)
    steps = [step for step in range(21) if bool(schedule(step)[0])]
    # Here a constant is reached at once, and the target always; tfmot may stop short of its target.
    steps = steps[:1] if name == "constant" else sorted({*steps, schedule.end_step})
    assert [step for step, _ in asked] == steps
    for step, masks in asked:
        for mask in masks.values():
            too_many = np.count_nonzero(~mask) - float(schedule(step)[1]) * mask.size
            assert -1e-6 * mask.size <= too_many < 1 + 1e-6 * mask.size


def test_a_polynomial_of_tfmot_is_the_same_function_here():
    for initial, power, begin, end in ((0.0, 3, 0, 1000), (0.3, 1, 7, 93), (0.5, 4.5, 10, 11)):
        theirs = TOOLKIT.sparsity.keras.PolynomialDecay(initial, 0.95, begin, end, power=power)
        ours = tf_prune.GradualPruning("magnitude", theirs)
        assert isinstance(ours.schedule, tf_prune.Polynomial)
        assert (ours.begin, ours.end, ours.frequency) == (begin, end, 100)
        for step in range(begin, end + 1, max(1, (end - begin) // 50)):
            assert ours.schedule((step - begin) / (end - begin)) == pytest.approx(float(theirs(step)[1]), abs=1e-6)


def test_a_schedule_of_tfmot_has_its_own_steps():
    theirs = TOOLKIT.sparsity.keras.ConstantSparsity(0.5, 3)
    with pytest.raises(ValueError, match="ConstantSparsity has its own steps, and begin=2"):
        tf_prune.GradualPruning("magnitude", theirs, begin=2)
    with pytest.raises(ValueError, match="starts at most at its target"):
        tf_prune.GradualPruning("magnitude", TOOLKIT.sparsity.keras.PolynomialDecay(0.9, 0.5, 0, 10))
    with pytest.raises(ValueError, match="power must be above 0"):
        tf_prune.Polynomial(0.9, power=0)


@pytest.mark.slow
def test_tfmot_prunes_as_a_step_begins_and_counts_from_one():
    # What GradualPruning's docstring says of it.
    seen = {}
    for begin in (0, 1):
        legacy = tf_keras.Sequential([tf_keras.Input((4,)), tf_keras.layers.Dense(10, use_bias=False)])
        schedule = TOOLKIT.sparsity.keras.PolynomialDecay(0.2, 0.8, begin, begin + 3, frequency=2)
        pruned = TOOLKIT.sparsity.keras.prune_low_magnitude(legacy, schedule)
        pruned.compile("sgd", "mse")
        sparsities = []

        class Watch(tf_keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None, pruned=pruned, sparsities=sparsities):
                sparsities.append(round(1 - float(pruned.layers[0].pruning_vars[0][1].numpy().mean()), 3))

        callbacks = [TOOLKIT.sparsity.keras.UpdatePruningStep(), Watch()]
        pruned.fit(np.ones((6, 4)), np.ones((6, 10)), batch_size=1, callbacks=callbacks, verbose=0)
        seen[begin] = sparsities
    assert seen[1][0] == 0.2  # before the first update is over
    assert seen[0][0] == 0.0  # a step 0 never comes
    assert max(seen[0]) < 0.8  # step 2 is the last that is reached from 0 by 2, and the end is 3


ORDERS = {
    "the bridge first": """
import tf_prune.tfmot
use()
import tensorflow as tf
""",
    "tensorflow first, and its Keras not used yet": """
import tensorflow as tf
import tf_prune.tfmot
use()
""",
}


@some_slow(ORDERS, "tensorflow first, and its Keras not used yet")
def test_the_bridge_leaves_the_process_and_its_children_as_they_were(name):
    code = f"""
import os, subprocess, sys
before = dict(os.environ)

def use():
    import keras, tf_keras
    toolkit = tf_prune.tfmot.import_tfmot()
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    legacy = toolkit.sparsity.keras.prune_low_magnitude(tf_prune.tfmot.to_tf_keras(model))
    assert isinstance(legacy, tf_keras.Model)
    tf_prune.tfmot.from_tfmot(legacy)
    tf_prune.tfmot.quantize_aware(model)

{ORDERS[name]}
import keras
import tensorflow_model_optimization
assert dict(os.environ) == before, set(os.environ.items()) ^ set(before.items())
child = "import os; print('TF_USE_LEGACY_KERAS' in os.environ)"
assert subprocess.check_output([sys.executable, "-c", child], text=True) == "False\\n"
assert tf.keras.__version__ == keras.__version__ and keras.__version__.startswith("3."), tf.keras
assert tf.keras.layers.Dense is keras.layers.Dense
assert tf.compat.v2.keras.layers.Dense is keras.layers.Dense
assert sys.modules["tensorflow_model_optimization.python.core.keras.compat"].keras.__name__ == "tf_keras"
"""
    environment = {key: value for key, value in os.environ.items() if key != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("missing", ["tf_keras", "tensorflow_model_optimization"])
def test_a_missing_package_is_an_error_that_says_what_to_install(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in (tfmot, legacy_keras):
        monkeypatch.setattr(tf_prune, module.__name__.split(".")[1], module)  # so that it is put back
        monkeypatch.delitem(sys.modules, module.__name__)
    environment = dict(os.environ)
    with pytest.raises(ImportError, match=r"pip install 'tf_prune\[tfmot\]'"):
        importlib.import_module("tf_prune.tfmot").import_tfmot()
    assert dict(os.environ) == environment


@pytest.mark.slow
def test_the_baseline_without_pruning_is_the_dense_run():
    data = datasets.load("digits")
    config = common.Config(model="lenet_300_100", epochs=2, sparsity=0.0, method="tfmot")
    dense, expected = common.train(dataclasses.replace(config, method="dense"), data)
    model, results = common.train(config, data)
    for name in ("accuracy", "loss", "train_loss", "sparsity"):
        assert results[name] == pytest.approx(expected[name], abs=1e-5)
    for a, b in zip(dense.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tfmot_is_a_baseline_of_the_experiments(tmp_path):
    config = common.Config(model="lenet_300_100", epochs=1)
    (_, result) = compare_methods.run(config, ["tfmot"], [0.9], [0], None, tmp_path)
    assert result["config"]["method"] == "tfmot"
    assert result["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert result["accuracy"] > 0.5
    assert result["train_loss"] > 0


def test_the_baseline_says_what_it_cannot_do():
    data = datasets.load("digits")
    for options in ({"epochs": 0}, {"structure": "2:4"}, {"filters": "conv"}, {"condition_gain": 1.0}):
        with pytest.raises(ValueError, match="--method=tfmot prunes single weights of all layers while it trains"):
            common.train(common.Config(method="tfmot", **options), data)
    with pytest.raises(ValueError, match="no pruned network before"):
        common.pruning(common.Config(method="tfmot"), data)
