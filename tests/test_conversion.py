import os
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from tensorflow.lite.python import schema_py_generated as schema

from tf_prune.conversion import ConversionError, convert
from tf_prune.litert import LiteRTModel
from tf_prune.loops import loops_of
from tf_prune.quiet import quiet
from tf_prune.saved_model import write_saved_model
from tf_prune.scales import ScaleError, repaired


class Computing(layers.Layer):
    """A layer of the user's own."""

    def __init__(self, function, **rest):
        super().__init__(**rest)
        self.function = function

    def call(self, x):
        return self.function(x)


def sequence(shape, *rest):
    return keras.Sequential([keras.Input(shape), *rest])


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def named(model):
    return {layer.name: type(layer).__name__ for layer in model._flatten_layers(include_self=False)}


def converted(model, x, folder, dtype="float32", batch_size=1, **rest):
    """The file, and what it computes."""
    (name,) = write_saved_model(model, x, folder, [(batch_size, *x.shape[1:])])
    ones = [{name: x[i : i + 1]} for i in range(len(x))] if dtype == "int8" else None
    content = convert(folder, dtype=dtype, representative=ones, layers=named(model), **rest)
    return content, LiteRTModel(content).outputs({name: x})["output_0"]


def doubled_forever(x):
    return ops.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 1.5 + x), (0, x))[1]


LOOPS = {
    "'backward_lstm' (LSTM), 'forward_lstm' (LSTM)": lambda: [layers.Bidirectional(layers.LSTM(3))],
    "'inside' (GRU)": lambda: [keras.Sequential([layers.GRU(3, name="inside")], name="outside")],
    "'mine' (Computing)": lambda: [Computing(doubled_forever, name="mine"), layers.Dense(2)],
}


@pytest.mark.parametrize("where", LOOPS)
def test_int8_of_a_loop_is_refused_with_its_layer_and_not_tried(where, tmp_path):
    with pytest.raises(ConversionError, match=r"loops, as in .*unroll=True.*dtype='dynamic_int8'") as error:
        converted(sequence((4, 3), *LOOPS[where]()), random(2, 4, 3), tmp_path, "int8")
    assert where in str(error.value)


def test_what_the_refusal_advises_works(tmp_path):
    x = random(16, 4, 3)
    keras.utils.set_random_seed(0)
    loop = sequence((4, 3), layers.GRU(5), layers.Dense(2))
    unrolled = sequence((4, 3), layers.GRU(5, unroll=True), layers.Dense(2))
    unrolled.set_weights(loop.get_weights())
    expected = np.asarray(loop(x))
    for model, dtype in ((unrolled, "int8"), (loop, "dynamic_int8")):
        _, outputs = converted(model, x, tmp_path / dtype, dtype)
        np.testing.assert_allclose(outputs, expected, atol=0.03 * np.ptp(expected))


def test_only_loops_that_a_signature_reaches_count_and_they_are_named_without_keras(tmp_path):
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, 4), tf.float32, "x")])
        def mapped(self, x):
            return tf.map_fn(lambda row: 2 * row, x, name="over_rows")

        @tf.function(input_signature=[tf.TensorSpec((1, 4), tf.float32, "x")])
        def straight(self, x):
            return tf.cond(tf.reduce_sum(x) > 0, lambda: 2 * x, lambda: 3 * x) + 1

    module = Module()
    tf.saved_model.save(module, str(tmp_path), signatures={"a": module.mapped, "b": module.straight})
    assert [name.split("/")[0] for name in loops_of(tmp_path, "a")] == ["over_rows"]
    assert loops_of(tmp_path, "b") == []
    with pytest.raises(ConversionError, match="node 'over_rows/while'"):
        convert(tmp_path, dtype="int8", representative=[{"x": random(1, 4)}], signature="a")
    assert convert(tmp_path, dtype="int8", representative=[{"x": random(1, 4)}], signature="b")


RECURRENT = {
    "lstm": lambda: [layers.LSTM(40), layers.Dense(3)],
    "gru": lambda: [layers.GRU(40), layers.Dense(3)],
    "bidirectional": lambda: [layers.Bidirectional(layers.LSTM(40, return_sequences=True)), layers.GRU(24)],
    "masked": lambda: [layers.Masking(), layers.LSTM(40), layers.Dense(3)],
    "convolutional": lambda: [layers.Reshape((6, 4, 4, 2)), layers.ConvLSTM2D(12, 3), layers.Flatten()],
}


@pytest.mark.parametrize(
    ("kind", "dtype", "batch_size"),
    [
        pytest.param(kind, dtype, size, marks=[] if quick else [pytest.mark.slow])
        for kind in RECURRENT
        for dtype in ("float32", "float16", "dynamic_int8")
        for size in (1, 3)
        for quick in [(kind, dtype, size) in {("bidirectional", "float16", 3), ("convolutional", "float16", 1)}]
    ],
)
def test_recurrent_layers_compute_the_same_in_every_dtype_and_batch_size(kind, dtype, batch_size, tmp_path):
    x = random(7, 6, 32)
    x[:, 4:] = 0
    model = sequence((6, 32), *RECURRENT[kind]())
    expected = np.asarray(model(x))
    _, outputs = converted(model, x, tmp_path, dtype, batch_size)
    bound = {"float32": 1e-5, "float16": 1e-2, "dynamic_int8": 0.05}[dtype]
    np.testing.assert_allclose(outputs, expected, atol=bound * np.abs(expected).max())


def test_a_tensor_without_numbers_is_refused_before_it_ends_the_process(tmp_path):
    with pytest.raises(ConversionError, match=r"has the shape \(0, 3\): it holds no number"):
        converted(sequence((0,), layers.Dense(3)), np.zeros((2, 0), np.float32), tmp_path, encoding="sparse")


def residual():
    x = inputs = keras.Input((6, 6, 3))
    x = layers.Conv2D(8, 3, padding="same", name="stem")(x)
    y = layers.Conv2D(8, 3, padding="same", name="branch")(x)
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(layers.Add(name="sum")([x, y])))
    return keras.Model(inputs, layers.Dense(4, name="head")(x))


def without_weights(model, *names, bias=0.0):
    for name in names:
        kernel, *rest = model.get_layer(name).weights
        kernel.assign(np.zeros(kernel.shape))
        for one in rest:
            one.assign(np.full(one.shape, bias))
    return model


def small(*activations):
    hidden = [layers.Dense(16, activation, name=f"dense_{i}") for i, activation in enumerate(activations)]
    return sequence((12,), *hidden[:-1], layers.Dense(4, activations[-1], name="head"))


DEAD = {
    "before a softmax": ("head", lambda: without_weights(small("relu", "softmax"), "head")),
    "before a tanh": ("dense_0", lambda: without_weights(small("tanh", "relu", None), "dense_0")),
    "all": ("dense_0", lambda: without_weights(small("relu", "relu", None), "dense_0", "dense_1", "head")),
    "sum": ("sum", lambda: without_weights(residual(), "branch", bias=-100)),
    "layer by layer": ("sum", lambda: without_weights(residual(), "stem", "branch", "head", bias=-30)),
    "stem": ("stem", lambda: without_weights(residual(), "stem")),
}


@pytest.mark.parametrize("kind", DEAD)
def test_activations_that_are_always_0_get_scales_that_runtimes_take(kind, tmp_path):
    keras.utils.set_random_seed(0)
    where, make = DEAD[kind]
    model = make()
    if kind not in ("sum", "layer by layer"):
        model.get_layer("head").bias.assign([-0.4, 0.1, 0.2, 0.3] if kind in ("before a tanh", "stem") else [0.0] * 4)
    x = random(16, *model.input_shape[1:])
    with pytest.warns(UserWarning, match=f"'{where}' .*0 for all data given.*computes the same"):
        content, outputs = converted(model, x, tmp_path, "int8")
    expected = np.asarray(model(x))
    np.testing.assert_allclose(outputs, expected, atol=0.01 * max(1e-6, np.abs(expected).max()))
    assert_scales_hold(content)
    assert repaired(content, {}) == content


def test_biases_behind_an_activation_that_is_always_0_are_kept(tmp_path):
    keras.utils.set_random_seed(0)
    model = without_weights(small("tanh", "relu", None), "dense_0")
    bias = np.array([-40.0, 0.001, 0.2, 30.0], np.float32)
    model.get_layer("head").bias.assign(bias)
    with pytest.warns(UserWarning, match="dense_0"):
        content, outputs = converted(model, random(4, 12), tmp_path, "int8")
    np.testing.assert_allclose(outputs, np.tile(bias, (4, 1)), atol=0.51 * 70 / 255)
    assert_scales_hold(content)


def assert_scales_hold(content):
    """By the file format: activations in steps that runtimes can tell from 0, biases in those of what they join."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    for graph in model.subgraphs:
        for tensor in graph.tensors:
            if tensor.type == schema.TensorType.INT8 and model.buffers[tensor.buffer].data is None:
                assert tensor.quantization.scale[0] > 1e-7
        for operator in graph.operators:
            if len(operator.inputs) == 3 and operator.inputs[2] >= 0:
                x, kernel, bias = (graph.tensors[t] for t in operator.inputs)
                if bias.type == schema.TensorType.INT32 and bias.quantization.scale is not None:
                    product = x.quantization.scale[0] * kernel.quantization.scale
                    np.testing.assert_allclose(bias.quantization.scale, product, rtol=1e-6)


@pytest.mark.parametrize("factor", [1.0, 1e-6])
def test_a_file_that_is_alive_stays_as_it_is_also_with_outputs_of_a_millionth(factor, tmp_path, monkeypatch):
    model = small("relu", None)
    head = model.get_layer("head").kernel
    head.assign(np.asarray(head) * factor)
    monkeypatch.setattr("tf_prune.conversion.repaired", lambda content, layers: content)
    content, _ = converted(model, random(16, 12), tmp_path, "int8")
    assert repaired(content, {}) == content


def test_a_sum_on_which_runtimes_abort_is_refused(tmp_path):
    content, _ = converted(residual(), random(16, 6, 6, 3), tmp_path, "int8")
    file = bytearray(content)
    graph = schema.Model.GetRootAs(file, 0).Subgraphs(0)
    (output,) = [
        graph.Operators(i).Outputs(0)
        for i in range(graph.OperatorsLength())
        if b"sum" in graph.Tensors(graph.Operators(i).Outputs(0)).Name()
    ]
    # 2 * 0.01 / (2**20 * 1e-9) is 19: LiteRT checks that it is below 1.
    graph.Tensors(output).Quantization().ScaleAsNumpy()[:] = 1e-9
    with pytest.raises(ScaleError, match=r"abort on the int8 scales of ADD in 'sum' \(Add\)"):
        repaired(bytes(file), {"sum": "Add"})


def test_a_softmax_of_what_hardly_varies_is_refused_with_its_layer(tmp_path):
    model = sequence((4,), layers.Dense(3, name="head"), Computing(lambda x: ops.softmax(x * 1e-9), name="mine"))
    with pytest.raises(ConversionError, match=r"abort on the int8 scales of SOFTMAX in 'mine' \(Computing\)"):
        converted(model, random(8, 4), tmp_path, "int8")


FAILING = {
    "Complex of 'mine' (Computing), FFT of 'mine' (Computing)": (lambda x: ops.fft((x, x))[0], True),
    "MatrixDeterminant of 'mine' (Computing)": (lambda x: tf.linalg.det(x[:, None, None, 0]), True),
    "PyFunc of 'mine' (Computing)": (lambda x: tf.reshape(tf.numpy_function(np.sin, [x], tf.float32), (1, 4)), False),
}


@pytest.mark.parametrize("operators", FAILING)
def test_an_operator_that_tflite_does_not_have_is_named_with_its_layer(operators, tmp_path):
    function, flex = FAILING[operators]
    inner = sequence((4,), layers.Dense(4), Computing(function, name="mine"))
    with pytest.raises(ConversionError) as error:
        converted(sequence((4,), inner), random(1, 4), tmp_path, batch_size=None)
    message = str(error.value)
    assert f"TF-Lite has no operator {operators}. " in message
    assert "tflite=False" in message
    assert ("flex=True" in message) == flex
    assert "loc(" not in message
    assert "callsite" not in message


def test_an_open_batch_of_a_recurrent_layer_names_it(tmp_path):
    with pytest.raises(ConversionError, match=r"'my_gru' \(GRU\)\) needs a batch of fixed size in TF-Lite"):
        converted(sequence((4, 3), layers.GRU(3, name="my_gru")), random(1, 4, 3), tmp_path, batch_size=None)


def test_without_keras_the_node_is_named(tmp_path):
    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((1, 2, 2), tf.float32, "x")])
        def __call__(self, x):
            with tf.name_scope("volume"):
                return tf.linalg.det(x)

    tf.saved_model.save(Module(), str(tmp_path))
    with pytest.raises(ConversionError, match="MatrixDeterminant of node 'volume/MatrixDeterminant'"):
        convert(tmp_path)


def test_int8_takes_its_ranges_from_several_inputs_of_ints_and_bools(tmp_path):
    words = keras.Input((None,), dtype="int32", name="words")
    flag = keras.Input((1,), dtype="bool", name="flag")
    number = keras.Input((4,), name="number")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(words))
    x = layers.Concatenate()([x, number, ops.cast(flag, "float32")])
    model = keras.Model([words, flag, number], layers.Dense(3)(x))
    generator = np.random.default_rng(0)

    def example():
        ids = generator.integers(0, 20, (1, 5)).astype(np.int32)
        return [ids, generator.random((1, 1)) > 0.5, generator.standard_normal((1, 4)).astype(np.float32)]

    folder = tmp_path / "saved"
    names = write_saved_model(model, example(), folder)
    ones = [dict(zip(names, example(), strict=True)) for _ in range(16)]
    file = LiteRTModel(convert(folder, dtype="int8", representative=iter(ones)))
    expected = np.concatenate([np.asarray(model([one[name] for name in names])) for one in ones])
    got = np.concatenate([file.outputs(one)["output_0"] for one in ones])
    np.testing.assert_allclose(got, expected, atol=0.05 * np.ptp(expected))
    with pytest.raises(ValueError, match="representative is empty"):
        convert(folder, dtype="int8", representative=[])


def test_lines_of_tensorflow_are_held_back_and_all_others_come_afterwards(capfd):
    with quiet() as heard:
        os.write(1, b"fully_quantize: 0, inference_type: 6\nmine\n")
        os.write(2, b"W0000 00:00:1795628093.735088    3215 tf.cc:364] Ignored.\nINFO: Created TensorFlow Lite\n")
        os.write(1, b"epoch 1")
        assert capfd.readouterr() == ("", "")
    assert capfd.readouterr() == ("mine\nepoch 1", "")
    assert "fully_quantize" in heard.text
    assert "Ignored" in heard.text
    os.write(1, b"fully_quantize\n")
    assert capfd.readouterr().out == "fully_quantize\n"


def test_threads_that_are_quiet_at_a_time_restore_what_was_there(capfd):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with quiet():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other, daemon=True)
    with quiet() as heard:
        thread.start()
        inside.wait()
        os.write(2, b"error: one\n")
    assert heard.text == "error: one\n"
    os.write(2, b"error: two\n")
    leave.set()
    thread.join()
    os.write(2, b"error: three\n")
    assert capfd.readouterr() == ("", "error: three\n")


def test_an_exception_leaves_nothing_redirected(capfd):
    with pytest.raises(ZeroDivisionError), quiet():
        _ = 1 / 0
    os.write(2, b"error: seen\n")
    assert capfd.readouterr().err == "error: seen\n"


SCRIPT = """
import os, sys, tempfile
import keras, numpy as np, tensorflow as tf
import tf_prune
from keras import layers
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((6, 6, 3)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)])
model(np.zeros((1, 6, 6, 3), np.float32))
det = keras.Sequential([keras.Input((2, 2)), layers.Dense(2), layers.Lambda(tf.linalg.det, name="det")])
x = np.random.default_rng(0).standard_normal((8, 6, 6, 3)).astype(np.float32)
print("start", flush=True)
print("start", file=sys.stderr, flush=True)
for dtype in sys.argv[1:]:
    tf_prune.export(model, tempfile.mkdtemp(), (x, None), dtype=dtype)
tf_prune.explain(model)
os.close(1)
try:
    tf_prune.export(det, tempfile.mkdtemp())
except tf_prune.ConversionError as error:
    print(error, file=sys.stderr)
"""


@pytest.mark.parametrize(
    "dtypes", [["int8"], pytest.param(["float32", "float16", "dynamic_int8"], marks=pytest.mark.slow)]
)
def test_exports_print_nothing_and_failed_ones_their_error_alone(dtypes):
    environment = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    command = [sys.executable, "-c", SCRIPT, *dtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split("start\n")[1] == ""
    (line,) = done.stderr.split("start\n")[1].splitlines()
    assert line.startswith("TF-Lite has no operator MatrixDeterminant of 'det' (Lambda). ")
