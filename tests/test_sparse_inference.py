import keras
import numpy as np
import pytest
from keras import layers

import tf_prune
from benchmarks import image_nets
from tests import helpers
from tf_prune import conversion, saved_model, tflite


def prune_pointwise(model, sparsity=0.9):
    """Zeroes this fraction of each 1x1 kernel, chosen at random."""
    generator = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D) and layer.kernel_size == (1, 1):
            kernel = np.asarray(layer.kernel).copy().ravel()
            kernel[generator.permutation(kernel.size)[: round(sparsity * kernel.size)]] = 0
            layer.kernel.assign(kernel.reshape(layer.kernel.shape))
    return model


def small(sparsity=0.0):
    """A chain that XNNPACK takes; 1x1 kernels of 12 x 30 and 30 x 10 weights."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            layers.ZeroPadding2D(1),
            layers.Conv2D(12, 3, 2, name="stem"),
            layers.Conv2D(30, 1, activation="relu", name="expand"),
            layers.DepthwiseConv2D(3, padding="same", name="depthwise"),
            layers.Conv2D(10, 1, name="project"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, name="head"),
        ]
    )
    return prune_pointwise(model, sparsity) if sparsity else model


def content(model, dtype="float32", encoding="sparse", folder=None):
    x = np.random.default_rng(0).standard_normal((8, *model.input_shape[1:])).astype("float32")
    (name,) = saved_model.write_saved_model(model, x, folder)
    examples = [{name: example[None]} for example in x] if dtype == "int8" else None
    return conversion.convert(folder, dtype=dtype, encoding=encoding, representative=examples)


QUICK = (
    "squeeze and excite",
    "convolution as head",
    "reshaped head",
    "stem same",
    "concatenation",
    "a constant",
    "image as output",
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in image_nets.NETS]
)
def test_verdicts_on_arm_are_those_that_were_measured(name):
    build, engages, operator = image_nets.NETS[name]
    explanation = tf_prune.explain(prune_pointwise(build()), "arm64")
    assert explanation.runs_sparse == explanation.ready == engages, str(explanation)
    operators = [obstacle.operator for obstacle in explanation.obstacles]
    assert (operator in operators) if operator else operators == []
    sparse = [kernel for kernel in explanation.kernels if kernel.runs_sparse]
    assert bool(sparse) == engages
    assert all(kernel.operator == "CONV_2D" and kernel.shape[1:3] == (1, 1) for kernel in sparse)


def test_all_obstacles_are_named_with_their_layers_and_fixes():
    x = inputs = keras.Input((32, 32, 3))
    x = layers.Conv2D(8, 3, 2, "same", name="stem")(x)
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Conv2D(64, 1, name="wide")(x)
    x = layers.DepthwiseConv2D(3, 2, "same", name="strided")(x)
    x = layers.Conv2D(64, 3, name="ordinary")(x)
    x = layers.GlobalAveragePooling2D()(x)
    explanation = tf_prune.explain(keras.Model(inputs, layers.Dense(4, name="head")(x)))
    found = [(o.kind, o.where, o.operator) for o in explanation.obstacles]
    assert found == [
        ("operator", "stem", "CONV_2D"),
        ("operator", "pool", "MAX_POOL_2D"),
        ("operator", "strided", "DEPTHWISE_CONV_2D"),
        ("operator", "ordinary", "CONV_2D"),
        ("sparsity", "the model", ""),
    ]
    assert all(o.reason and o.fix for o in explanation.obstacles)
    assert not explanation.ready
    text = str(explanation)
    assert all(name in text for name in ("stem", "pool", "strided", "ordinary", "ZeroPadding2D(1)"))
    # The converter names the last operator by the model's output, and older ones keep no trace of its layer.
    assert [k.where for k in explanation.kernels[:-1]] == ["stem", "wide", "strided", "ordinary"]


def test_as_many_zeros_as_are_missing_are_just_enough():
    model = small(0.5)
    explanation = tf_prune.explain(model)
    assert explanation.ready
    assert not explanation.runs_sparse
    total = 12 * 30 + 30 * 10
    assert explanation.zeros_missing == total * 2 // 3 + 1 - total // 2
    kernel = np.asarray(model.get_layer("expand").kernel).copy()
    nonzero = np.flatnonzero(kernel.ravel())
    for count, enough in ((explanation.zeros_missing - 1, False), (explanation.zeros_missing, True)):
        fewer = kernel.ravel().copy()
        fewer[nonzero[:count]] = 0
        model.get_layer("expand").kernel.assign(fewer.reshape(kernel.shape))
        assert tf_prune.explain(model).runs_sparse == enough
    assert tf_prune.explain(model).zeros_missing == 0


def test_parts_are_judged_by_their_own_zeros():
    model = image_nets.NETS["two towers"][0]()
    first, second = (
        [la for la in model.layers if isinstance(la, layers.Conv2D) and la.kernel_size == (1, 1)][i::2] for i in (0, 1)
    )
    generator = np.random.default_rng(0)
    for convolutions, sparsity in ((first, 0.95), (second, 0.5)):
        for layer in convolutions:
            kernel = np.asarray(layer.kernel).copy()
            layer.kernel.assign(np.where(generator.random(kernel.shape) < sparsity, 0, kernel))
    explanation = tf_prune.explain(model)
    running = {kernel.where for kernel in explanation.kernels if kernel.runs_sparse}
    assert running == {layer.name for layer in first}
    assert [obstacle.kind for obstacle in explanation.obstacles] == ["sparsity"]
    sizes = sum(int(np.prod(layer.kernel.shape)) for layer in second)
    zeros = sum(int((np.asarray(layer.kernel) == 0).sum()) for layer in second)
    assert explanation.zeros_missing == 2 * sizes // 3 + 1 - zeros


def test_a_part_that_runs_sparse_before_a_break_is_said_to_be_wrong():
    broken = prune_pointwise(image_nets.NETS["max pooling"][0]())
    explanation = tf_prune.explain(broken)
    assert {(o.kind, o.operator) for o in explanation.obstacles} >= {
        ("operator", "MAX_POOL_2D"),
        ("correctness", "CONV_2D"),
    }
    assert not explanation.runs_sparse
    # What XNNPACK does not take splits the graph: the part before it has no end, and is right.
    split = prune_pointwise(image_nets.NETS["sign"][0]())
    assert {o.kind for o in tf_prune.explain(split).obstacles} == {"operator"}


@pytest.mark.parametrize("content", [b"xxxxTFL3", b"\0\0\0\0TFL3" + bytes(64)])
def test_damaged_files_are_said_to_be_damaged(content):
    with pytest.raises(ValueError, match="is damaged"):
        tf_prune.explain(content)


def test_recurrent_models_are_explained_too():
    explanation = tf_prune.explain(helpers.build("recurrent"), "x86")
    assert {kernel.operator for kernel in explanation.kernels} == {"FULLY_CONNECTED"}


def test_a_model_its_saved_model_and_its_file_get_the_same_verdict_and_the_model_stays(tmp_path):
    model = small(0.9)
    before = helpers.state(model)
    of_model = tf_prune.explain(model)
    helpers.assert_same_state(before, model)
    file = tmp_path / "model.tflite"
    file.write_bytes(content(model, folder=tmp_path / "saved"))
    others = [tf_prune.explain(file), tf_prune.explain(file.read_bytes()), tf_prune.explain(str(tmp_path / "saved"))]
    for explanation in others:
        assert explanation.verdict == of_model.verdict == "Sparse kernels run on arm64: 2 of 5."
        assert [k.sparsity for k in explanation.kernels] == [k.sparsity for k in of_model.kernels]
    assert of_model.sparsity == pytest.approx(
        np.mean(np.concatenate([np.asarray(v).ravel() == 0 for v in model.weights if v.path.endswith("kernel")]))
    )


@pytest.mark.parametrize(
    ("dtype", "encoding", "runs", "kind"),
    [
        ("float32", "dense", False, "encoding"),
        ("float16", "sparse", True, None),
        ("dynamic_int8", "sparse", False, "dtype"),
        ("int8", "sparse", False, "dtype"),
    ],
)
def test_dtype_and_encoding_of_a_file_count(tmp_path, dtype, encoding, runs, kind):
    # From 1,024 weights on, a kernel is quantized.
    model = prune_pointwise(image_nets.network())
    explanation = tf_prune.explain(content(model, dtype, encoding, tmp_path))
    assert explanation.runs_sparse == runs
    assert ([o.kind for o in explanation.obstacles if o.operator == ""] == [kind]) if kind else True


def test_on_x86_dense_layers_run_sparse_in_blocks_and_convolutions_never():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, "relu", name="blocks"),
            layers.Dense(64, "relu", name="single"),
            layers.Dense(64, name="unpruned"),
        ]
    )
    tf_prune.prune(model, "magnitude", 0.9, structure="1x4", scope="layerwise", filters="blocks", verbose=0)
    single = np.asarray(model.get_layer("single").kernel).copy()
    single[np.random.default_rng(0).random(single.shape) < 0.8] = 0
    model.get_layer("single").kernel.assign(single)
    explanation = tf_prune.explain(model, "x86")
    assert {k.where: (k.encoding, k.runs_sparse) for k in explanation.kernels} == {
        "blocks": ("1x4", True),
        "single": ("random", False),
        "unpruned": ("dense", False),
    }
    assert [(o.kind, o.where) for o in explanation.obstacles] == [("blocks", "single")]
    assert "structure='1x4'" in explanation.obstacles[0].fix
    of_convolutions = tf_prune.explain(small(0.9), "x86")
    assert not of_convolutions.runs_sparse
    assert of_convolutions.obstacles[0].kind == "target"
    assert of_convolutions.verdict == "No kernel runs sparse on x86: it is as fast as a dense model."


def test_microcontrollers_run_nothing_sparse_and_cannot_read_the_encoding(tmp_path):
    explanation = tf_prune.explain(small(0.9), "microcontroller")
    assert [o.kind for o in explanation.obstacles] == ["target", "encoding"]
    assert "TensorFlow Lite for Microcontrollers" in explanation.unreadable_by
    half = tf_prune.explain(content(small(0.9), "float16", "dense", tmp_path), "microcontroller")
    assert [o.kind for o in half.obstacles] == ["target", "dtype"]
    assert half.unreadable_by == ()


def test_output_blocks_are_seen_and_warned_of_where_they_are_slow():
    model = small()
    tf_prune.prune(model, "random", 0.75, structure="2_outputs", scope="layerwise", filters="expand", verbose=0)
    blocks = {k.where: k.output_block for k in tf_prune.explain(model).kernels}
    # A dense kernel is full in all blocks.
    assert blocks == {"stem": 4, "expand": 2, "depthwise": 1, "project": 4, "head": 2}
    kernel = np.asarray(model.get_layer("project").kernel).copy()
    kernel[:] = 0
    kernel[..., 0, :8] = 1
    model.get_layer("project").kernel.assign(kernel)
    assert tf_prune.explain(model, "arm64").advice == ()
    (advice,) = tf_prune.explain(model, "wasm").advice
    assert "expand" in advice
    assert "on wasm single weights are faster" in advice


def test_a_large_dense_head_that_newer_runtimes_may_count_is_an_advice():
    model = small(0.9)
    wide = layers.Dense(5000, name="wide")(model.layers[-2].output)
    explanation = tf_prune.explain(keras.Model(model.inputs, wide))
    assert explanation.runs_sparse
    assert any("wide" in line and "two thirds" in line for line in explanation.advice)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing.tflite", r"no file or folder missing\.tflite"),
        (b"no flatbuffer", r"Not a TF-Lite file"),
        (3, r"model must be a Keras 3 model, or the path of .*; got <class 'int'>"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        tf_prune.explain(model)


def test_a_folder_that_is_no_saved_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected a SavedModel"):
        tf_prune.explain(tmp_path)


def test_an_unknown_target_and_a_model_of_unknown_shape_are_refused():
    with pytest.raises(ValueError, match=r"Unknown target 'gpu'\. Expected one of arm64, arm32, x86, wasm, microcontr"):
        tf_prune.explain(small(), "gpu")
    open_size = keras.Sequential([keras.Input((None, None, 3)), layers.Conv2D(4, 1), layers.GlobalAveragePooling2D()])
    with pytest.raises(ValueError, match=r"does not say of what shape its inputs are\. Build it with keras\.Input"):
        tf_prune.explain(open_size)


def test_constants_that_are_computed_have_no_values(tmp_path):
    graph = tflite.read(content(small(), folder=tmp_path))[0]
    with pytest.raises(ValueError, match="is computed while the model runs"):
        _ = graph.tensors[graph.outputs[0]].values
