"""A comparison that cannot be fooled: dishonest files by dtype and kind of head, and honest ones."""

import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers

import tf_prune
from tf_prune import parity
from tf_prune.batches import Batches
from tf_prune.conversion import convert
from tf_prune.litert import LiteRTModel
from tf_prune.sources import KerasSource

N = 48
DTYPES = list(parity.TOLERANCES)
generator = np.random.default_rng


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def normal(*shape, seed=0):
    return generator(seed).standard_normal((N, *shape))


def boxes(seed):
    """Corners around anchors: far more from place to place than from image to image."""
    anchors = generator(99).uniform(0, 300, (1, 20, 4))
    return anchors + normal(20, 4, seed=seed)


HEADS = {
    "logits": lambda seed: 3 * normal(10, seed=seed),
    "logits with an offset": lambda seed: normal(10, seed=seed) + generator(seed).normal(0, 20, 10),
    **{
        f"{kind} softmax of {classes}": lambda seed, classes=classes, scale=scale: softmax(
            scale * normal(classes, seed=seed)
        )
        for classes in (2, 10, 1000)
        for kind, scale in (("sharp", 8.0), ("flat", 0.01))
    },
    "sigmoid": lambda seed: 1 / (1 + np.exp(-normal(1, seed=seed))),
    **{f"regression of {scale:g}": lambda seed, s=scale: s * normal(3, seed=seed) for scale in (1e-6, 1e-3, 1e3, 1e6)},
    "regression with a large offset": lambda seed: 1e3 + normal(2, seed=seed),
    "one number": lambda seed: normal(seed=seed),
    "boxes": boxes,
    "segmentation": lambda seed: softmax(4 * normal(6, 6, 5, seed=seed)),
    "a map without channels": lambda seed: normal(6, 7, seed=seed),
    "sequence": lambda seed: normal(9, 8, seed=seed),
    "unit embeddings": lambda seed: (lambda e: e / np.linalg.norm(e, axis=-1, keepdims=True))(normal(16, seed=seed)),
    "channels of many scales": lambda seed: normal(6, seed=seed) * 10.0 ** np.arange(-3, 3),
}


def one_channel(change):
    def changed(output):
        wrong = output.copy()
        wrong[..., 1] = change(output)
        return wrong

    return changed


DISHONEST = {
    "zeros": np.zeros_like,
    "a constant": lambda o: np.full_like(o, o.mean()),
    "the best constant": lambda o: np.broadcast_to(o.mean(tuple(range(max(1, o.ndim - 1)))), o.shape),
    "the best constant of each place": lambda o: np.broadcast_to(o.mean(0), o.shape),
    "other examples": lambda o: np.roll(o, 1, 0),
    "shuffled examples": lambda o: generator(5).permutation(o, axis=0),
    "a shift": lambda o: o + np.maximum(o.std(0), abs(o).max() * 0.01),
    "other channels": lambda o: np.roll(o, 1, -1),
    "a channel of zeros": one_channel(lambda o: 0 * o[..., 1]),
    "a channel of its mean": one_channel(lambda o: o[..., 1].mean(0)),
    "a negated channel": one_channel(lambda o: -o[..., 1]),
    "a channel twice": one_channel(lambda o: o[..., 0]),
    "another model": None,
}


def compare(expected, got, dtype="float32", steps=None, parts=1):
    """As functions of inputs, batch by batch."""
    expected, got = (o if isinstance(o, dict) else {"y": o} for o in (expected, got))
    count = len(next(iter(expected.values())))
    batches = [{"i": part} for part in np.array_split(np.arange(count), parts)]
    take = [lambda i, o=o: {name: array[i["i"]] for name, array in o.items()} for o in (expected, got)]
    return parity.compare(take[0], take[1], batches, parity.TOLERANCES[dtype], steps=steps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_no_dishonest_file_is_accepted(head, dtype):
    output = HEADS[head](0).astype(np.float32)
    for name, change in DISHONEST.items():
        if "channel" in name and (output.ndim == 1 or output.shape[-1] == 1):
            continue
        wrong = HEADS[head](1).astype(np.float32) if change is None else change(output).astype(np.float32)
        with pytest.raises(tf_prune.ExportError, match=r"Nothing was written"):
            pytest.fail(f"{name}: {compare(output, wrong, dtype)}")
        # Neither among others that are right.
        with pytest.raises(tf_prune.ExportError, match="'wrong'"):
            compare({"right": output, "wrong": output}, {"right": output, "wrong": wrong}, dtype)


# What real files of each kind are wrong by, and twice that: the float ones of their size, the others of their spread.
ERRORS = {"float32": 2e-6, "float16": 2e-3, "dynamic_int8": 0.1, "int8": 0.2}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_honest_files_are_accepted(head, dtype):
    output = HEADS[head](0)
    noise = ERRORS[dtype] * output.std(0) * generator(7).standard_normal(output.shape)
    # In several batches, in float32.
    report = compare(output.astype(np.float32), (output + noise).astype(np.float32), dtype, parts=3)
    assert report.undecided == ()
    assert report.count == N
    assert report.largest_difference == pytest.approx(abs(noise).max(), rel=0.1, abs=1e-6 * abs(output).max())
    assert compare(output, output, dtype).largest_difference == 0


@pytest.mark.parametrize("head", ["logits", "sharp softmax of 10", "boxes", "sequence", "one number"])
def test_the_statistics_are_those_of_numpy_in_whatever_batches_they_come(head):
    expected, got = HEADS[head](0), HEADS[head](0) + 0.01 * HEADS[head](3)
    places = expected if expected.ndim > 1 else expected[:, None]
    error = np.sqrt(((got - expected) ** 2).reshape(-1, places.shape[-1]).mean(0))
    spread = np.sqrt(places.var(0).reshape(-1, places.shape[-1]).mean(0))
    worst = float((error / spread).max())
    for parts in (1, 7, N):
        for tolerance in (1.05 * worst, 0.95 * worst):
            batches = [{"i": part} for part in np.array_split(np.arange(N), parts)]
            arguments = (lambda i: {"y": expected[i["i"]]}, lambda i: {"y": got[i["i"]]}, batches, tolerance)
            if tolerance > worst:
                assert parity.compare(*arguments).count == N
            else:
                with pytest.raises(tf_prune.ExportError, match="root mean square"):
                    parity.compare(*arguments)


def test_outputs_of_less_than_ten_steps_are_not_told_and_never_accepted_in_silence():
    flat = HEADS["flat softmax of 10"](0).astype(np.float32)
    step = 1 / 256
    rounded = np.round(flat / step) * step
    report = compare(flat, rounded, "int8", {"y": step})
    (sentence,) = report.undecided
    assert "The data do not tell whether output 'y' is right: it varies by less than 10 of the file's steps" in sentence
    assert compare(flat, flat, "int8", {"y": step}).undecided  # nor if it is the same by chance
    with pytest.raises(tf_prune.ExportError):
        compare(flat, 0 * flat, "int8", {"y": step})
    sharp = HEADS["sharp softmax of 10"](0).astype(np.float32)
    assert compare(sharp, np.round(sharp / step) * step, "int8", {"y": step}).undecided == ()
    for factor, told in ((9, False), (11, True)):
        ramp = np.linspace(0, factor * 0.1, N).astype(np.float32)
        assert (compare(ramp, ramp, "int8", {"y": 0.1}).undecided == ()) == told


def test_some_channels_that_are_not_told_are_said():
    output = HEADS["logits"](0)
    output[:, :3] *= 1e-3
    wrong = output.copy()
    wrong[:, 1] = 0
    (sentence,) = compare(output, wrong, "int8", {"y": 0.1}).undecided
    assert "1 of its 10 channels vary by less than" in sentence
    with pytest.raises(tf_prune.ExportError):
        compare(output, wrong, "int8")
    output[:, :3] *= 1e-6  # beside the others less than their last digits
    wrong[:, :3] = output[:, :3] + 1e-7
    assert "3 of its 10 channels" in compare(output, wrong).undecided[0]
    assert compare(output, output).undecided == ()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one example", "examples alike", "a constant model", "zeros"])
def test_data_that_cannot_tell_are_said_and_what_is_far_off_is_an_error(kind, dtype):
    output = HEADS["logits"](0)
    output = {"one example": output[:1], "examples alike": np.repeat(output[:1], N, 0), "zeros": 0 * output}.get(
        kind, np.full_like(output, 5)
    )
    (sentence,) = compare(output, output, dtype).undecided
    assert "The data do not tell" in sentence
    assert "always the same" in sentence
    if kind != "zeros":
        for wrong in (0 * output, -output, 2 * output):
            with pytest.raises(tf_prune.ExportError):
                compare(output, wrong, dtype)
    else:
        with pytest.raises(tf_prune.ExportError):
            compare(output, output + 1, dtype)


def test_dead_channels_are_no_reason_to_refuse():
    output = HEADS["logits"](0).astype(np.float32)
    output[:, 4], output[:, 5] = 0, 7 + 1e-9 * output[:, 5]
    got = output + 1e-7 * HEADS["logits"](1).astype(np.float32)
    got[:, 4] = 0
    assert compare(output, got).undecided == ()
    for channel, value in ((4, 0.1), (5, 0), (5, -7)):
        wrong = got.copy()
        wrong[:, channel] = value
        with pytest.raises(tf_prune.ExportError, match=f"in channel {channel} of 10"):
            compare(output, wrong)


def test_predictions_agree_wherever_the_margin_is_larger_than_rounding():
    output = np.concatenate([softmax(8 * normal(10, seed=seed)) for seed in range(30)])
    output[77] = [0.82, 0.12, *[0.0075] * 8]
    wrong = output.copy()
    wrong[77, :2] = wrong[77, 1::-1]
    with pytest.raises(tf_prune.ExportError, match=r"other classes than the model's in 1 of 1,440 .*: 1 for 0, by a"):
        compare(output, wrong, "dynamic_int8")
    output = output[:N]
    unsure = output + 0
    unsure[0] = 0.1
    unsure[0, 2] += 1e-3
    turned = unsure.copy()
    turned[0, 3] += 2e-3
    report = compare(unsure, turned, "int8")
    assert report.agreement == pytest.approx(47 / 48)
    assert compare(output[:, :1], output[:, :1]).agreement is None


def test_agreement_and_difference_are_of_all_batches_and_outputs():
    generator = np.random.default_rng(0)
    wide, number = generator.standard_normal((60, 5)), generator.standard_normal((60, 1))
    noise = 0.05 * generator.standard_normal((60, 5))
    expected = {"wide": wide, "number": number, "fine": 7 * wide}
    got = {"wide": wide + noise, "number": number + 0.01, "fine": 7 * wide}
    batches = [{"x": np.arange(60)[i : i + 25]} for i in (0, 25, 50)]

    def of(outputs):
        return lambda inputs: {name: array[inputs["x"]] for name, array in outputs.items()}

    result = parity.compare(of(expected), of(got), batches, parity.TOLERANCES["dynamic_int8"])
    same = (wide.argmax(1) == (wide + noise).argmax(1)).sum()
    assert 50 <= same < 60
    # The single number predicts no class; both others count.
    assert result.agreement == (same + 60) / 120
    assert result.largest_difference == pytest.approx(np.abs(noise).max())
    assert result.count == 60


def test_one_wrong_example_among_many_is_seen_in_float32():
    output = np.concatenate([HEADS["logits"](seed) for seed in range(40)])
    wrong = output.copy()
    wrong[77] += 0.1 * output.std(0)
    with pytest.raises(tf_prune.ExportError, match="root mean square"):
        compare(output, wrong)


def test_infinities_are_equal_where_both_have_them_and_the_rest_is_compared():
    output = HEADS["logits"](0)
    masked = np.where(output > 0, output, -np.inf)
    report = compare(masked, np.where(output > 0, output * (1 + 1e-6), -np.inf))
    assert 0 < report.largest_difference < 1e-4
    for wrong in (
        np.where(output > 0, 0, -np.inf),
        np.where(output > 0, output[::-1], -np.inf),
        np.where(output > 0, output, np.inf),
        np.where(output > 0, output, 0),
        np.full_like(output, -np.inf),
        output,
        np.where(output[::-1] > 0, output, -np.inf),
    ):
        with pytest.raises(tf_prune.ExportError):
            compare(masked, wrong)
    # One at the threshold.
    at = masked.copy()
    at[0, 0] = -np.inf if np.isfinite(at[0, 0]) else 1e-3
    assert compare(masked, at).count == N
    with pytest.raises(tf_prune.ExportError, match="none of its numbers is finite"):
        compare(np.full_like(output, np.inf), np.full_like(output, np.inf))


@pytest.mark.parametrize("mask", [-1e4, -1e9, -1e30, np.finfo(np.float32).min])
def test_masks_of_large_numbers_hide_nothing(mask):
    output = HEADS["logits"](0)
    open_ = generator(3).random(output.shape) < 0.7
    masked = np.where(open_, output, mask).astype(np.float32)
    assert compare(masked, np.where(open_, output * (1 + 1e-6), mask).astype(np.float32)).largest_difference < 1e-4
    for wrong in (np.where(open_, 0, mask), np.where(open_, HEADS["logits"](1), mask), np.where(open_, output, 0)):
        with pytest.raises(tf_prune.ExportError):
            compare(masked, wrong.astype(np.float32), "int8")
    alone = np.where(open_, 0, mask)
    assert compare(alone, alone).undecided == ()
    with pytest.raises(tf_prune.ExportError, match="by being infinite there or not"):
        compare(alone, alone[::-1], "int8")


def test_what_is_no_number_says_which_model_has_it():
    output = HEADS["logits"](0)
    broken = output.copy()
    broken[3, 2:5] = np.nan
    with pytest.raises(tf_prune.ExportError, match=r"3 of the model's 480 numbers are nan"):
        compare(broken, broken)
    with pytest.raises(tf_prune.ExportError, match=r"3 of the TF-Lite model's 480 numbers are nan"):
        compare(output, broken)


@pytest.mark.parametrize("dtype", DTYPES)
def test_truth_values_may_differ_at_a_threshold_alone(dtype):
    values = normal(6)
    truth = values > 1
    assert compare(truth, truth, dtype) == parity.Parity(N, None, None)
    at = truth.copy()
    at[0, 0] = ~at[0, 0]
    assert compare(truth, at, dtype).count == N
    for wrong in (truth & False, truth | True, ~truth, truth[::-1], np.roll(truth, 1, -1), values > -1):
        with pytest.raises(tf_prune.ExportError, match=r"differs from the model's in .* places"):
            compare(truth, wrong, dtype)
    one = truth.copy()
    one[:, 2] = False
    with pytest.raises(tf_prune.ExportError, match="in channel 2"):
        compare(truth, one, dtype)
    assert "the same in all examples" in compare(truth & False, truth & False, dtype).undecided[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("integers", [np.uint8, np.int32, np.int64])
def test_whole_numbers_are_classes_or_counts_and_never_wrap_around(dtype, integers):
    classes = generator(0).integers(0, 10, N * 4).astype(integers)
    near = classes.copy()
    near[5] = (near[5] + 1) % 10
    assert compare(classes, near, dtype).count == 4 * N
    counts = np.abs(60 * normal(3) + 120).round().clip(0, 250).astype(integers)
    assert compare(counts, np.where(counts > 0, counts - 1, 0).astype(integers), "int8").largest_difference == 1
    for output in (classes, counts):
        for wrong in (0 * output, np.full_like(output, output.mean()), output[::-1].copy(), np.roll(output, 1, 0)):
            with pytest.raises(tf_prune.ExportError):
                compare(output, wrong, dtype)
    assert compare(0 * classes, 0 * classes, dtype).undecided


def test_texts_are_equal():
    words = np.array([[f"w{i % 5}".encode(), b"a"] for i in range(N)], object)
    same = np.array([[f"w{i % 5}", "a"] for i in range(N)], object)
    assert compare(words, same) == parity.Parity(N, None, None)
    other = words.copy()
    other[7, 0] = b"w"
    for dtype in DTYPES:
        with pytest.raises(tf_prune.ExportError, match="in 1 of 96 places"):
            compare(words, other, dtype)
    with pytest.raises(tf_prune.ExportError, match=r"is float64, the model's object"):
        compare(words, normal(2))
    assert compare(words[:, 1:], words[:, 1:]).undecided


def test_complex_outputs_are_compared_in_both_parts():
    output = normal(3) + 1j * normal(3, seed=1)
    assert compare(output, output).undecided == ()
    for wrong in (output.real + 0j, output.conj(), 1j * output):
        with pytest.raises(tf_prune.ExportError):
            compare(output, wrong, "int8")
    with pytest.raises(tf_prune.ExportError, match="is float64, the model's complex128"):
        compare(output, output.real)


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_reference_may_have_other_digits(kind):
    output = HEADS["logits"](0).astype(kind)
    assert compare(output, output.astype(np.float32)).undecided == ()
    with pytest.raises(tf_prune.ExportError):
        compare(output, HEADS["logits"](1).astype(np.float32), "int8")


def test_other_names_numbers_and_shapes_are_errors_in_words():
    output = normal(4)
    for got, message in (
        ({"z": output}, r"has the outputs z; the model has y\."),
        ({"y": output, "z": output}, r"has the outputs y, z; the model has y\."),
        ({"y": output[:, :1]}, r"is of shape \(48, 1\), the model's of \(48, 4\)"),
        ({"y": output[0]}, r"is of shape \(4,\), the model's of \(48, 4\)"),
        ({"y": output > 0}, None),
    ):
        with pytest.raises(tf_prune.ExportError, match=message):
            parity.compare(lambda _: {"y": output}, lambda _, got=got: got, [{"x": output}], 0.3)
    with pytest.raises(tf_prune.ExportError, match=r"is float64, the model's bool"):
        compare(output > 0, output)


def test_outputs_that_are_empty_or_not_of_each_example_are_taken_as_they_are():
    empty = np.zeros((N, 0, 4))
    assert "it is empty" in compare(empty, empty).undecided[0]
    with pytest.raises(tf_prune.ExportError, match="of shape"):
        compare(empty, np.zeros((N, 1, 4)))
    numbers = generator(0).standard_normal(20)
    batches = [{"x": np.zeros((4, 2)), "i": np.array(i)} for i in range(20)]

    def scalar(inputs, factor=1.0):
        return {"loss": factor * numbers[inputs["i"]], "table": factor * numbers[inputs["i"]] * np.ones((3, 5))}

    report = parity.compare(scalar, scalar, batches, 1e-3)
    assert (report.count, report.undecided) == (80, ())
    with pytest.raises(tf_prune.ExportError, match="'loss'"):
        parity.compare(scalar, lambda inputs: scalar(inputs, 0.0), batches, 0.3)
    assert parity.compare(scalar, scalar, batches[:1], 1e-3).undecided
    assert parity.compare(scalar, scalar, [], 1e-3).undecided == ("No example was compared.",)


def test_a_rank_that_changes_from_batch_to_batch_is_an_error_in_words():
    table = normal(5)[:4]
    batches = [{"x": normal(2)[:count]} for count in (3, 4)]
    with pytest.raises(tf_prune.ExportError, match=r"another number of axes from batch to batch, now \(4, 5\)"):
        parity.compare(lambda _: {"y": table}, lambda _: {"y": table}, batches, 0.3)


def test_batches_of_several_lengths_are_one_comparison():
    lengths = [3, 9, 5, 9, 4, 3]
    batches = [{"x": generator(i).standard_normal((4, length, 6))} for i, length in enumerate(lengths)]
    assert parity.compare(lambda i: {"y": i["x"]}, lambda i: {"y": i["x"] + 1e-6}, batches, 1e-3).undecided == ()
    positions = generator(0).standard_normal((1, 9, 6))
    for wrong in (
        lambda x: 0 * x,
        lambda x: x[::-1],
        lambda x: np.roll(x, 1, 1),
        lambda x: positions[:, : x.shape[1]] + 0 * x,
    ):
        with pytest.raises(tf_prune.ExportError):
            parity.compare(
                lambda i: {"y": i["x"] + positions[:, : i["x"].shape[1]]},
                lambda i, wrong=wrong: {"y": wrong(i["x"] + positions[:, : i["x"].shape[1]])},
                batches,
                0.3,
            )
    # Scores of attention, whose last axis is open too; one example each.
    squares = [{"x": generator(i).standard_normal((1, n, n))} for i, n in enumerate([3, 5, 4, 3, 5, 2])]
    assert parity.compare(lambda i: {"y": i["x"]}, lambda i: {"y": i["x"]}, squares, 1e-3).undecided == ()
    with pytest.raises(tf_prune.ExportError):
        parity.compare(lambda i: {"y": i["x"]}, lambda i: {"y": 0 * i["x"]}, squares, 0.3)


def dense(x):
    return layers.Dense(64, "relu")(layers.Dense(64, "relu")(x))


def convolutional(x):
    for filters in (16, 32, 64):
        x = layers.Conv2D(filters, 3, 2, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.5)(x))
    return layers.GlobalAveragePooling2D()(x)


def mobilenet(x):
    body = keras.applications.MobileNetV2(x.shape[1:], 0.35, include_top=False, weights=None, pooling="avg")
    for layer in body.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.5
    return body(x)


def attention(x):
    x = layers.Dense(32)(x)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(4, 8)(x, x))
    x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, "gelu")(x)))
    return layers.GlobalAveragePooling1D()(x)


BODIES = {
    "dense": ((64,), dense),
    "convolutional": ((16, 16, 3), convolutional),
    "mobilenet": ((32, 32, 3), mobilenet),
    "recurrent": ((12, 16), layers.GRU(32)),
    "attention": ((12, 16), attention),
}
OUTPUTS = {
    "logits": lambda x: layers.Dense(10)(x),
    "softmax": lambda x: layers.Dense(10, "softmax")(x),
    "offset": lambda x: layers.Dense(10, bias_initializer=keras.initializers.Constant(1e3))(x),
}


def network(body, head, epochs=0, sparsity=0.0, seed=0):
    """A model, and examples in ten classes as it was trained on."""
    keras.utils.set_random_seed(seed)
    shape, layer = BODIES[body]
    inputs = keras.Input(shape, name="x")
    model = keras.Model(inputs, OUTPUTS[head](layer(inputs)))
    y = generator(0).integers(0, 10, 320)
    x = (generator(1).standard_normal((10, *shape))[y] + generator(2).standard_normal((320, *shape))).astype(np.float32)
    if sparsity:
        tf_prune.prune(model, "magnitude", sparsity, scope="layerwise", verbose=0)
    if epochs:
        losses = keras.losses.SparseCategoricalCrossentropy(from_logits=head == "logits")
        model.compile(keras.optimizers.Adam(3e-3), "mse" if head == "offset" else losses)
        model.fit(x, 1e3 + np.eye(10)[y] if head == "offset" else y, epochs=epochs, verbose=0)
    return model, x[:N]


def files_of(model, x, dtypes, folder, batch_size=None):
    source = KerasSource(model, Batches((x, None)))
    source.write(folder, batch_size)
    (inputs,) = source.inputs()
    ones = [{name: array[i : i + 1] for name, array in inputs.items()} for i in range(len(x))]
    files = {d: LiteRTModel(convert(folder, dtype=d, representative=ones if d == "int8" else None)) for d in dtypes}
    return source.outputs, inputs, files


@pytest.mark.filterwarnings("ignore:.*left no weight in", "ignore:.*outputs no longer depend")
@pytest.mark.parametrize(
    ("body", "head", "epochs", "sparsity"),
    [
        pytest.param(body, head, epochs, sparsity, marks=[] if quick else [pytest.mark.slow])
        for body in BODIES
        for head in OUTPUTS
        for epochs in (0, 2)
        for sparsity in (0.0, 0.5, 0.9, 0.99)
        for quick in [(body, head, epochs, sparsity) == ("convolutional", "softmax", 2, 0.5)]
    ],
)
def test_real_files_are_accepted_and_those_of_another_model_are_not(body, head, epochs, sparsity, tmp_path):
    dtypes = [dtype for dtype in DTYPES if (body, dtype) != ("recurrent", "int8")]
    fixed = N if body == "recurrent" else None
    model, x = network(body, head, epochs, sparsity)
    reference, inputs, files = files_of(model, x, dtypes, tmp_path / "model", fixed)
    other, _ = network(body, head, epochs, sparsity, seed=1)
    _, _, others = files_of(other, x, dtypes, tmp_path / "other", fixed)
    for dtype in dtypes:
        tolerance, steps = parity.TOLERANCES[dtype], files[dtype].steps
        report = parity.compare(reference, files[dtype].outputs, [inputs], tolerance, steps=steps)
        if head != "offset" and (epochs, sparsity) in [(2, 0.0), (2, 0.5)]:
            assert report.undecided == ()
            assert report.agreement > (0.9 if dtype == "int8" else 0.95)
        try:
            wrong = parity.compare(reference, others[dtype].outputs, [inputs], tolerance, steps=others[dtype].steps)
        except tf_prune.ExportError:
            continue
        assert wrong.undecided
