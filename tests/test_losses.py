"""The loss that is scored is the loss that `fit` minimizes, but for weight regularizers; several batches are one."""

import functools
import itertools
import logging

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, losses, ops

import tf_prune
from tests import helpers
from tf_prune.terms import SUM as SUM_OF
from tf_prune.terms import Mean

GENERATOR = np.random.default_rng(0)
X = GENERATOR.standard_normal((12, 5)).astype(np.float32)
LABELS = GENERATOR.integers(0, 4, 12)
ONE_HOT = np.eye(4, dtype=np.float32)[LABELS]
BITS = GENERATOR.integers(0, 2, (12, 4)).astype(np.float32)
REAL = GENERATOR.random((12, 4)).astype(np.float32)
WEIGHT = GENERATOR.random(12).astype(np.float32)
COLD = tf_prune.GraSP(temperature=1.0)


def slow(*values, id=None):
    return pytest.param(*values, marks=pytest.mark.slow, id=id)


class Weighted(losses.SparseCategoricalCrossentropy):
    """A subclass with an argument of its own, which its config does not have."""

    def __init__(self, weights=(1.0, 1.0, 1.0, 1.0), **options):
        super().__init__(**options)
        self.weights = np.float32(weights)

    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred) * ops.take(self.weights, ops.cast(y_true, "int32"))


class Power(losses.Loss):
    def __init__(self, power, **options):
        super().__init__(**options)
        self.power = power

    def call(self, y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred) ** self.power, -1)


class Penalty(layers.Layer):
    """Adds a mean over the examples to the loss."""

    def __init__(self):
        super().__init__()
        self.supports_masking = True

    def call(self, z):
        self.add_loss(0.3 * ops.mean(ops.square(z)))
        return z


def square(y_true, y_pred):
    return ops.mean(ops.square(y_true - y_pred), -1)


class Callable:
    def __call__(self, y_true, y_pred):
        return square(y_true, y_pred)


def probabilities(logits):
    e = ops.exp(logits)
    return e / ops.sum(e, -1, keepdims=True)


HEADS = {
    "logits": lambda r: [layers.Dense(4, kernel_regularizer=r)],
    "softmax": lambda r: [layers.Dense(4, "softmax", kernel_regularizer=r)],
    "activation": lambda r: [layers.Dense(4, kernel_regularizer=r), layers.Activation("softmax")],
    "lambda": lambda r: [layers.Dense(4, kernel_regularizer=r), layers.Lambda(lambda z: tf.nn.softmax(z))],
    "hidden": lambda r: [layers.Dense(4, kernel_regularizer=r), layers.Lambda(probabilities)],
    "sigmoid": lambda r: [layers.Dense(4, "sigmoid", kernel_regularizer=r)],
    "positive": lambda r: [layers.Dense(4, "softplus", kernel_regularizer=r)],
    "one": lambda r: [layers.Dense(1, "sigmoid", kernel_regularizer=r)],
}
REDUCTIONS = ("sum_over_batch_size", "sum", "mean_with_sample_weight", None)
REGRESSION = (
    *("MeanSquaredError", "MeanAbsoluteError", "MeanAbsolutePercentageError", "MeanSquaredLogarithmicError", "Huber"),
    *("CosineSimilarity", "LogCosh", "Poisson", "KLDivergence", "Hinge", "SquaredHinge", "CategoricalHinge", "Dice"),
    *("Tversky",),
)
CROSS_ENTROPIES = {
    "CategoricalCrossentropy": ONE_HOT,
    "CategoricalFocalCrossentropy": ONE_HOT,
    "SparseCategoricalCrossentropy": LABELS,
    "BinaryCrossentropy": BITS,
    "BinaryFocalCrossentropy": BITS,
}
FUNCTIONS = {
    "lambda": lambda y, z: ops.mean(ops.square(y - z), -1),
    "partial": functools.partial(losses.huber, delta=0.3),
    "callable": Callable(),
    "scalar": lambda y, z: ops.mean(ops.square(y - z)),
    "keras": losses.mean_absolute_error,
}


def all_losses():
    """Loss, its targets, sample weights."""
    for name in REGRESSION:
        for reduction in REDUCTIONS:
            yield f"{name}-{reduction}", getattr(losses, name)(reduction=reduction), REAL, None
            yield f"{name}-{reduction}-weighted", getattr(losses, name)(reduction=reduction), REAL, WEIGHT
    for name, y in CROSS_ENTROPIES.items():
        option = {"ignore_class": 1} if "Sparse" in name else {"label_smoothing": 0.1}
        for from_logits in (False, True):
            for reduction in REDUCTIONS[:2]:
                loss = getattr(losses, name)(from_logits=from_logits, reduction=reduction, **option)
                yield f"{name}-{from_logits}-{reduction}", loss, y, WEIGHT
    for name, y in {
        "mse": REAL,
        "log_cosh": REAL,
        "kl_divergence": REAL,
        "crossentropy": ONE_HOT,
        "categorical_crossentropy": ONE_HOT,
        "sparse_categorical_crossentropy": LABELS,
        "binary_focal_crossentropy": BITS,
        "CategoricalCrossentropy": ONE_HOT,
    }.items():
        yield name, name, y, None
    for name, function in FUNCTIONS.items():
        yield name, function, REAL, None
    yield "weighted", Weighted([0.1, 10.0, 1.0, 0.01], from_logits=True), LABELS, None
    yield "weighted-probabilities", Weighted([0.1, 10.0, 1.0, 0.01]), LABELS, WEIGHT
    yield "power", Power(1.5, reduction="sum"), REAL, None


def grid():
    """All pairs, of which few are quick. Of one unit, losses between several have no gradient."""
    between = ("Cosine", "Categorical", "Sparse", "categorical", "sparse", "crossentropy", "weighted")
    pairs = [(head, *row) for head in HEADS for row in all_losses() if head != "one" or not row[0].startswith(between)]
    for i, (head, name, *row) in enumerate(pairs):
        marks = () if i % 53 == 0 else pytest.mark.slow
        yield pytest.param(head, *row, marks=marks, id=f"{head}-{name}")


def build(head, loss, regularizer=None, activity=None):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    hidden = layers.Dense(6, "tanh", kernel_regularizer=regularizer, activity_regularizer=activity)
    model = keras.Sequential([keras.Input((5,)), hidden, *HEADS[head](regularizer)])
    model.compile("sgd", loss)
    return model


def tensors(data):
    return keras.tree.map_structure(lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), data)


def gradient_of_fit(model, x, y, sample_weight=None):
    """|w * dL/dw| by Keras's own `compute_loss`, in a graph as in `fit`."""
    variables = tf_prune.find_prunable(model).prunable

    @tf.function(autograph=False)
    def gradients(x, y, sample_weight):
        with tf.GradientTape() as tape:
            value = model.compute_loss(x=x, y=y, y_pred=model(x, training=True), sample_weight=sample_weight)
        found = tape.gradient(value, [v.value for v in variables.values()], unconnected_gradients="zero")
        return [tf.convert_to_tensor(gradient) for gradient in found]

    found = gradients(*tensors((x, y, sample_weight)))
    return {path: np.abs(np.asarray(v) * g) for (path, v), g in zip(variables.items(), found, strict=True)}


def assert_same(scores, expected, tolerance=1e-5):
    largest = max(np.abs(value).max() for value in expected.values())
    assert largest > 0
    assert scores.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(scores[path], value, rtol=0, atol=tolerance * largest, err_msg=path)


def cut(data, *places):
    """A batch in parts of unequal length."""
    bounds = [0, *places, len(keras.tree.flatten(data)[0])]
    return [
        keras.tree.map_structure(lambda leaf, a=a, b=b: None if leaf is None else leaf[a:b], data)
        for a, b in itertools.pairwise(bounds)
    ]


# -- one batch -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*received `from_logits=True`, but")  # Keras, of a loss that fits no softmax
@pytest.mark.parametrize(("head", "loss", "y", "sample_weight"), list(grid()))
def test_scores_are_the_gradient_of_what_fit_minimizes_without_weight_regularizers(head, loss, y, sample_weight):
    y = y[:, :1] if head == "one" and y.ndim == 2 else y
    data = (X, y, sample_weight)
    try:
        expected = gradient_of_fit(build(head, loss), *data)
    except (ValueError, tf.errors.OpError):
        pytest.skip("fit does not take it either")
    if not all(np.isfinite(value).all() for value in expected.values()):
        with pytest.raises(ValueError, match="not finite"):
            tf_prune.score(build(head, loss, "l2"), "snip", data)
        return
    if not any(value.any() for value in expected.values()):
        pytest.skip("it has no gradient")
    assert_same(tf_prune.score(build(head, loss, "l2"), "snip", data), expected)


@pytest.mark.parametrize("loss", ["mse", Power(2, reduction="sum")], ids=["mean", "sum"])
def test_activity_regularizers_and_add_loss_count(loss):
    def network(regularizer):
        model = build("logits", loss, regularizer, activity="l1")
        model = keras.Sequential([keras.Input((5,)), *model.layers, Penalty()])
        model.compile("sgd", loss)
        return model

    assert_same(tf_prune.score(network("l2"), "snip", (X, REAL)), gradient_of_fit(network(None), X, REAL))


def test_a_network_that_brings_its_loss_along_needs_no_other():
    def network():
        model = build("logits", None, activity="l2")
        assert model.loss is None
        return model

    with pytest.warns(UserWarning, match="does not depend on .*dense_1/kernel"):
        scores = tf_prune.score(network(), "snip", (X, None))
    assert_same(scores, gradient_of_fit(network(), X, None))


class OwnLoss(keras.Model):
    """Its loss is no sum of what is compiled."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        compiled = super().compute_loss(x, y, y_pred, sample_weight)
        return compiled**2 + ops.mean(ops.square(y_pred[0])) + sum(self.losses)


def two_heads(loss, weights=None, kind=keras.Model, regularizer=None, penalty=False, as_dict=False):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5,))
    hidden = layers.Dense(6, "tanh", kernel_regularizer=regularizer, name="body")(inputs)
    hidden = Penalty()(hidden) if penalty else hidden
    main, aux = (layers.Dense(units, name=name)(hidden) for units, name in ((3, "main"), (2, "aux")))
    model = kind(inputs, {"main": main, "aux": aux} if as_dict else [main, aux])
    model.compile("sgd", loss, loss_weights=weights)
    return model


TWO = [REAL[:, :3], REAL[:, 2:]]
TWO_LABELS = [LABELS % 3, LABELS % 2]
TABLE = {"main": TWO[0], "aux": TWO[1]}
SUM = losses.MeanSquaredError(reduction="sum")


@pytest.mark.parametrize("criterion", ["snip", COLD], ids=["gradient", "hessian_gradient"])
def test_a_compute_loss_of_ones_own_counts_with_all_that_is_in_it(criterion):
    data = (X, TWO)
    own = two_heads("mse", kind=OwnLoss, regularizer="l2", penalty=True)
    plain = two_heads("mse", kind=OwnLoss, penalty=True)
    scores = tf_prune.score(own, criterion, data)
    if criterion == "snip":
        assert_same(scores, gradient_of_fit(plain, *data))
        return
    variables = tf_prune.find_prunable(plain).prunable
    weights = [v.value for v in variables.values()]
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            value = plain.compute_loss(X, tensors(TWO), plain(X, training=True))
        gradients = inner.gradient(value, weights)
        dot = tf.add_n([tf.reduce_sum(g * tf.stop_gradient(g)) for g in gradients])
    products = outer.gradient(dot, weights)
    assert_same(scores, {p: np.asarray(v) * h for (p, v), h in zip(variables.items(), products, strict=True)})


def test_a_loss_that_is_given_takes_the_place_of_a_compute_loss_of_ones_own():
    own, plain = two_heads("mse", kind=OwnLoss), two_heads("mae")
    assert_same(tf_prune.score(own, "snip", (X, TWO), "mae"), gradient_of_fit(plain, X, TWO))


@pytest.mark.parametrize(
    ("loss", "weights", "as_dict", "y"),
    [
        ("mse", None, False, TWO),
        (["mse", "mae"], [0.3, 2.0], False, TABLE),
        slow([SUM, "mae"], None, False, TABLE),
        ({"main": "mse", "aux": SUM}, {"main": 0.3, "aux": 2.0}, True, TABLE),
        slow(losses.MeanSquaredError(reduction="none"), None, False, TWO),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_losses_of_several_outputs(loss, weights, as_dict, y, given):
    if given and weights:
        pytest.skip("weights are part of what is compiled")
    plain = two_heads(loss, weights, as_dict=as_dict)
    model = two_heads("logcosh" if given else loss, None if given else weights, regularizer="l2", as_dict=as_dict)
    assert_same(tf_prune.score(model, "snip", (X, y), loss if given else None), gradient_of_fit(plain, X, y))


@pytest.mark.parametrize(
    ("loss", "as_dict", "y"),
    [
        ({"aux": "mae"}, True, {"aux": TWO[1]}),
        ({"aux": "mae"}, False, TWO),
        ({"aux": "mae"}, False, {"aux": TWO[1]}),
        ([None, "mae"], False, TWO),
        ([None, "mae"], False, TWO[1]),
    ],
)
def test_an_output_without_a_loss_scores_0_and_is_named_once(loss, as_dict, y):
    model = two_heads(loss, as_dict=as_dict)
    with pytest.warns(UserWarning, match=r"does not depend on main/kernel\. .*filters=") as caught:
        scores = tf_prune.score(model, tf_prune.FORCE(num_steps=3), (X, y))
    assert len(caught) == 1
    assert not scores["main/kernel"].any()
    plain = two_heads([None, "mae"])
    assert_same(scores, gradient_of_fit(plain, X, TWO))


def test_tables_that_leave_out_an_output_go_by_names():
    def three_heads(loss):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        inputs = keras.Input((5,))
        heads = [layers.Dense(units, name=name)(inputs) for units, name in ((3, "main"), (2, "aux"), (4, "rest"))]
        model = keras.Model(inputs, heads)
        model.compile("sgd", loss)
        return model

    with pytest.warns(UserWarning, match="does not depend on rest/kernel"):
        scores = tf_prune.score(three_heads({"main": "mse", "aux": "mae"}), "snip", (X, TABLE))
    assert_same(scores, gradient_of_fit(three_heads(["mse", "mae", None]), X, [*TWO, REAL]))


def test_a_loss_that_reads_no_kernel_is_an_error():
    model = build("logits", "mse")
    with pytest.raises(ValueError, match=r"gives no gradient to any kernel.*dense_1/kernel"):
        tf_prune.score(model, "snip", (X, REAL), lambda y, z: ops.sum(y))


# -- functions that fit does not take --------------------------------------------------------------


def activity(_, outputs):
    return ops.mean(ops.square(outputs), -1)


def temporal_difference(target, values):
    action, reward = target
    assert "int" in str(action.dtype)
    return ops.square(reward - ops.sum(values * ops.one_hot(action, 4), -1))


@pytest.mark.parametrize(
    ("loss", "y", "of_outputs"),
    [
        (activity, None, lambda z: tf.reduce_mean(z**2, -1)),
        (
            temporal_difference,
            (LABELS, REAL[:, 0]),
            lambda z: (REAL[:, 0] - tf.reduce_sum(z * ONE_HOT, -1)) ** 2,
        ),
    ],
    ids=["no targets", "structured targets"],
)
@pytest.mark.parametrize("sample_weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_a_function_gets_targets_that_are_not_one_for_each_output_as_they_are(loss, y, of_outputs, sample_weight):
    model = build("logits", "mse")
    variables = tf_prune.find_prunable(model).prunable
    with tf.GradientTape() as tape:
        value = tf.reduce_mean(of_outputs(model(X)) * (1.0 if sample_weight is None else sample_weight))
    found = tape.gradient(value, [v.value for v in variables.values()])
    expected = {p: np.abs(np.asarray(v) * g) for (p, v), g in zip(variables.items(), found, strict=True)}
    assert_same(tf_prune.score(model, "snip", (X, y, sample_weight), loss), expected)


def test_a_function_gets_all_outputs_where_targets_are_not_theirs():
    def first(_, outputs):
        return ops.mean(ops.square(outputs[0]), -1)

    model, plain = two_heads("mse"), two_heads([losses.MeanSquaredError(), None])
    with pytest.warns(UserWarning, match="does not depend on aux/kernel"):
        scores = tf_prune.score(model, "snip", (X, None), first)
    assert_same(scores, gradient_of_fit(plain, X, [0 * TWO[0], TWO[1]]))


@pytest.mark.parametrize("loss", [FUNCTIONS["lambda"], Power(2, name="my loss!")], ids=["lambda", "name"])
def test_a_name_that_is_no_scope_leaves_nothing_in_the_paths_of_later_variables(loss):
    name = getattr(loss, "name", None)
    tf_prune.score(build("logits", "mse"), "snip", (X, REAL), loss)
    assert keras.Variable(0.0, name="next").path == "next"
    assert getattr(loss, "name", None) == name


# -- several batches -------------------------------------------------------------------------------

TOKENS = np.array([[1, 2, 3, 4, 5, 6], [4, 1, 0, 0, 0, 0], [2, 2, 2, 0, 0, 0], [3, 0, 0, 0, 0, 0]])
NEXT = (TOKENS * 7) % 5
STEP_WEIGHT = GENERATOR.random((4, 6)).astype(np.float32)


def cross_entropy(**options):
    return losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def tagger(loss, penalty=False, steps=6):
    keras.utils.clear_session()
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((steps,)),
            layers.Embedding(7, 4, mask_zero=True),
            layers.SimpleRNN(4, return_sequences=True),
            *([Penalty()] if penalty else []),
            layers.Dense(5),
        ]
    )
    model.compile("sgd", loss)
    return model


@pytest.mark.parametrize(
    ("loss", "penalty", "sample_weight"),
    [
        (cross_entropy(), False, None),
        (cross_entropy(), True, STEP_WEIGHT),
        (cross_entropy(reduction="sum"), True, None),
        (cross_entropy(reduction="mean_with_sample_weight"), True, STEP_WEIGHT),
        slow(cross_entropy(reduction="mean_with_sample_weight"), False, None),
        slow(cross_entropy(reduction="none"), False, None),
        (cross_entropy(ignore_class=2), False, None),
    ],
)
def test_padding_does_not_count_and_unequal_batches_of_it_are_one(loss, penalty, sample_weight):
    data = (TOKENS, NEXT, sample_weight)
    expected = gradient_of_fit(tagger(loss, penalty), *data)
    assert_same(tf_prune.score(tagger(loss, penalty), "snip", data), expected)
    assert_same(tf_prune.score(tagger(loss, penalty), "snip", cut(data, 1, 3)), expected)


def test_batches_of_sequences_of_other_lengths_are_one():
    one = tf_prune.score(tagger(cross_entropy(), steps=None), "snip", (TOKENS, NEXT))
    short = [(TOKENS[:1], NEXT[:1]), (TOKENS[1:3, :3], NEXT[1:3, :3]), (TOKENS[3:, :2], NEXT[3:, :2])]
    assert_same(tf_prune.score(tagger(cross_entropy(), steps=None), "snip", short), one)


class Chain(keras.Model):
    """Does not say which outputs it has."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts
        self(X[None, :, :3])

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize("kind", [lambda parts: keras.Sequential([keras.Input((None, 3)), *parts]), Chain])
def test_elements_weigh_the_same_in_batches_of_any_shape(kind):
    def network():
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = kind([layers.Dense(4, "tanh"), layers.Dense(2)])
        model.compile("sgd", "mse")
        return model

    long, short = ((X[:10].reshape(2, 5, 5)[..., :3], REAL[:10].reshape(2, 5, 4)[..., :2]) for _ in range(2))
    short = tuple(part[:, :2] for part in short)
    flat = tuple(
        np.concatenate([a.reshape(1, -1, a.shape[-1]) for a in parts], 1) for parts in zip(long, short, strict=True)
    )
    assert_same(tf_prune.score(network(), "snip", [long, short]), gradient_of_fit(network(), *flat))


@pytest.mark.parametrize("criterion", ["snip", COLD, tf_prune.OptimalBrainDamage(2)], ids=["g", "Hg", "diagonal"])
@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (SUM, TWO),
        ([SUM, losses.MeanSquaredError(reduction="mean_with_sample_weight")], TWO),
        slow([cross_entropy(), cross_entropy(reduction="sum", ignore_class=1)], TWO_LABELS),
    ],
)
def test_sums_means_and_penalties_of_unequal_batches_are_those_of_one(criterion, loss, y):
    data = (X, y, [WEIGHT, X[:, 0] ** 2])
    one, many = (tf_prune.score(two_heads(loss, penalty=True), criterion, d) for d in (data, cut(data, 5, 6)))
    assert_same(many, one)
    if criterion == "snip":
        assert_same(one, gradient_of_fit(two_heads(loss, penalty=True), *data))


def test_the_means_of_several_workers_added_up_are_the_mean_of_all_batches():
    parts = [{"steps": (float(n), [X[n], REAL[n]]), SUM_OF: (1.0, [X[n] ** 2, REAL[n] ** 2])} for n in range(1, 7)]
    whole, workers = Mean(), [Mean(), Mean(), Mean()]
    for i, part in enumerate(parts):
        whole.add(part)
        workers[i % 3].add(part)
    sums = [worker.as_sums() for worker in workers]
    total = {
        group: (
            sum(one[group][0] for one in sums),
            [sum(v) for v in zip(*(one[group][1] for one in sums), strict=True)],
        )
        for group in sums[0]
    }
    weighed = [sum(n * data[n] for n in range(1, 7)) / 21 + sum(data[1:7] ** 2) for data in (X, REAL)]
    for value, other, expected in zip(Mean.of_sums(total).result(), whole.result(), weighed, strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(other, expected, rtol=1e-5)


@pytest.mark.parametrize("axis", [None, -1])  # what it does not sum, Keras averages, whatever it says
def test_a_foreign_loss_that_says_it_sums_is_added_up_where_it_does(axis):
    class Foreign:
        reduction = "sum"

        def __call__(self, y_true, y_pred):
            return tf.reduce_sum(tf.square(y_true - y_pred), axis)

    data = (X, REAL)
    expected = gradient_of_fit(build("logits", Foreign()), *data)
    assert_same(tf_prune.score(build("logits", Foreign()), "snip", cut(data, 5, 6)), expected)


# Without weights the second is a mean over the elements.
@pytest.mark.parametrize("reduction", ["none", "mean_with_sample_weight"])
def test_what_is_not_reduced_is_added_up_and_a_mean_over_weights_needs_none(reduction):
    loss = losses.MeanSquaredError(reduction=reduction)
    expected = gradient_of_fit(build("logits", loss), X, REAL)
    assert_same(tf_prune.score(build("logits", loss), "snip", cut((X, REAL), 5, 6)), expected)


def test_a_function_that_gives_one_number_is_a_mean_over_the_examples():
    def one_number(y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred))

    expected = gradient_of_fit(build("logits", one_number), X, REAL)
    assert_same(tf_prune.score(build("logits", one_number), "snip", cut((X, REAL), 5, 6)), expected)


def test_padding_does_not_count_where_there_are_no_targets():
    def square_of_outputs(y_true, y_pred):
        return ops.mean(ops.square(y_pred), -1)

    expected = gradient_of_fit(tagger(square_of_outputs), TOKENS, NEXT)
    assert_same(tf_prune.score(tagger(square_of_outputs), "snip", (TOKENS, None)), expected)


class Mixed(keras.Model):
    """Calls the compiled loss twice, as mixing of labels does."""

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None):
        compiled = super().compute_loss
        return compiled(x, y, y_pred, sample_weight) + 0.5 * compiled(x, [3 * one for one in y], y_pred, sample_weight)


@pytest.mark.parametrize(
    "loss", [SUM, losses.MeanSquaredError(reduction="mean_with_sample_weight")], ids=["sum", "mean"]
)
def test_a_compute_loss_that_calls_the_compiled_one_twice_is_of_all_batches(loss):
    data = (X, TWO, [WEIGHT, X[:, 0] ** 2])
    expected = gradient_of_fit(two_heads(loss, kind=Mixed), *data)
    assert_same(tf_prune.score(two_heads(loss, kind=Mixed), "snip", cut(data, 5, 6)), expected)


# -- logits, temperature, precision ----------------------------------------------------------------


@pytest.mark.parametrize("name", CROSS_ENTROPIES)
def test_a_temperature_divides_logits_wherever_they_are(name):
    y = CROSS_ENTROPIES[name]
    heads = ("logits", "softmax", "hidden") if "Categorical" in name else ("logits", "sigmoid")
    method = tf_prune.GraSP(temperature=20.0)
    known, *others = (
        tf_prune.score(build(head, getattr(losses, name)(from_logits=head == "logits")), method, (X, y))
        for head in heads
    )
    for scores in others:
        assert_same(scores, known, 1e-4)


def test_a_loss_object_that_takes_logits_can_have_a_temperature():
    assert_same(
        tf_prune.score(build("logits", Weighted(from_logits=True)), "grasp", (X, LABELS)),
        tf_prune.score(build("logits", cross_entropy()), "grasp", (X, LABELS)),
    )


@pytest.mark.parametrize("loss", [losses.CategoricalCrossentropy, losses.CategoricalFocalCrossentropy])
def test_a_temperature_divides_logits_along_the_axis_of_the_loss(loss):
    def network(activation, **options):
        keras.utils.clear_session()
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), layers.Dense(12), layers.Reshape((4, 3)), activation])
        model.compile("sgd", loss(axis=1, **options))
        return model

    data = (X, np.repeat(ONE_HOT[:, :, None], 3, 2))
    one, other = (
        tf_prune.score(model, tf_prune.GraSP(temperature=2.0), data)
        for model in (network(layers.Softmax(axis=1)), network(layers.Identity(), from_logits=True))
    )
    assert_same(one, other)


def test_a_temperature_divides_the_logits_of_a_function_of_keras():
    one, other = (
        tf_prune.score(model, tf_prune.GraSP(temperature=2.0), (X, ONE_HOT))
        for model in (
            build("softmax", losses.categorical_focal_crossentropy),
            build("logits", losses.CategoricalFocalCrossentropy(from_logits=True)),
        )
    )
    assert_same(one, other)


def test_a_temperature_divides_the_logits_of_a_loss_that_only_scoring_knows_once():
    criterion = tf_prune.GraSP(temperature=2.0)
    model = build("logits", losses.CategoricalCrossentropy(from_logits=True))
    expected = tf_prune.score(model, criterion, (X, np.full((12, 4), 0.25, np.float32)))
    assert_same(tf_prune.score(model, criterion, (X, None), "uniform"), expected)


def test_a_temperature_for_each_of_several_outputs():
    by_name = {"main": cross_entropy(), "aux": cross_entropy()}
    one, other = (tf_prune.score(two_heads(loss), "grasp", (X, TWO_LABELS)) for loss in (cross_entropy(), by_name))
    assert_same(one, other)
    with pytest.warns(UserWarning, match="does not depend on main/kernel"):  # no loss needs no logits
        assert tf_prune.score(two_heads([None, cross_entropy()]), "grasp", (X, TWO_LABELS))["aux/kernel"].any()


@pytest.mark.parametrize(
    ("loss", "kind", "name"),
    [
        (Weighted(), keras.Model, "'sparse_categorical_crossentropy'"),
        ("mse", keras.Model, "'mse'"),
        ([cross_entropy(), "mse"], keras.Model, "'sparse_categorical_crossentropy', 'mse'"),
        (cross_entropy(), OwnLoss, "the model's own compute_loss"),
    ],
    ids=["a subclass", "no cross-entropy", "one of two", "a compute_loss of its own"],
)
def test_a_temperature_of_another_loss_is_refused(loss, kind, name):
    message = rf"A temperature of 200 divides the logits of a cross-entropy, but the loss is {name}\."
    with pytest.raises(ValueError, match=message):
        tf_prune.score(two_heads(loss, kind=kind), "grasp", (X, TWO_LABELS))


def test_what_a_temperature_does_not_divide_is_said():
    model = build("logits", cross_entropy(), activity="l2")
    with pytest.warns(UserWarning, match="not what add_loss and activity regularizers add"):
        tf_prune.score(model, "grasp", (X, LABELS))


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize(
    ("head", "loss", "y"),
    [
        ("softmax", losses.SparseCategoricalCrossentropy, LABELS),
        ("sigmoid", losses.BinaryCrossentropy, BITS),
        ("activation", losses.CategoricalFocalCrossentropy, ONE_HOT),
    ],
)
def test_in_mixed_precision_the_cast_does_not_hide_the_logits(policy, head, loss, y):
    keras.config.set_dtype_policy(policy)
    plain = build("logits", loss(from_logits=True))
    assert_same(tf_prune.score(build(head, loss()), "snip", (X, y)), tf_prune.score(plain, "snip", (X, y)), 1e-3)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", slow("mixed_float16")])
def test_in_mixed_precision_padding_does_not_count(policy):
    keras.config.set_dtype_policy(policy)
    masked = tagger(losses.SparseCategoricalCrossentropy())
    masked.layers[-1].activation = keras.activations.softmax
    other = np.where(TOKENS > 0, NEXT, 3)
    one, same = (tf_prune.score(masked, "snip", (TOKENS, y)) for y in (NEXT, other))
    assert_same(same, one)


def test_a_loss_that_only_scoring_knows_keeps_padding_out_and_counts_alone():
    plain, penalty = (tagger(cross_entropy(), penalty) for penalty in (False, True))
    longer = np.pad(TOKENS, ((0, 0), (0, 3)))
    one = tf_prune.score(plain, "snip", (TOKENS, None), "uniform")
    assert_same(tf_prune.score(penalty, "snip", (TOKENS, None), "uniform"), one)
    assert_same(tf_prune.score(tagger(cross_entropy(), steps=9), "snip", (longer, None), "uniform"), one)


# -- what stays as it was --------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_the_compiled_loss_and_the_regularizers_stay_as_they_were(fails):
    loss = Power(2)
    model = two_heads([loss, loss], [1.0, 2.0], regularizer="l2", penalty=True)
    compiled, regularizer = model._compile_loss, model.layers[1].kernel.regularizer
    model(X)
    if fails:
        with pytest.raises(ValueError, match="cannot be computed"):
            tf_prune.score(model, "snip", (X, [TWO[0], TWO[0]]))
    else:
        tf_prune.score(model, "snip", (X, TWO))
    assert model._compile_loss is compiled
    assert not compiled.built
    assert "call" not in vars(loss)
    assert model.layers[1].kernel.regularizer is regularizer is not None
    model.fit(X, TWO, verbose=0)


def test_a_call_that_somebody_put_on_a_loss_counts_and_stays():
    loss = Power(1)
    own = loss.call = lambda y_true, y_pred: ops.mean((y_true - y_pred) ** 2, -1)
    assert_same(
        tf_prune.score(build("logits", loss), "snip", (X, REAL)), gradient_of_fit(build("logits", loss), X, REAL)
    )
    assert vars(loss)["call"] is own


def test_many_models_are_scored_without_a_word_of_retracing(caplog):
    tf.get_logger().propagate = True
    with caplog.at_level(logging.WARNING):
        for seed in range(8):
            tf_prune.prune(build("logits", "mse"), "snip" if seed % 2 else "synflow", 0.5, (X, REAL), verbose=0)
    assert not [record.message for record in caplog.records if "retracing" in record.message]


def test_sums_and_means_on_two_devices_are_those_of_one():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    loss = [SUM, "mse"]
    one = two_heads(loss, penalty=True)
    with strategy.scope():
        two = two_heads(loss, penalty=True)
    data = cut((X, TWO), 3, 7, 10)
    assert_same(tf_prune.score(two, "snip", data), tf_prune.score(one, "snip", data))
    assert_same(tf_prune.score(one, "snip", data), gradient_of_fit(one, X, TWO))


def test_what_goes_wrong_in_a_loss_of_ones_own_is_said_with_the_data():
    def wrong(y_true, y_pred):
        return y_pred.no_such_thing

    with pytest.raises(ValueError, match=r"x is float32\[12, 5\].*the loss is 'wrong'.*no_such_thing"):
        tf_prune.score(build("logits", wrong), "snip", (X, REAL))

    def wordy(y_true, y_pred):
        raise RuntimeError("first\nthe very cause\n  \n")

    with pytest.raises(ValueError, match=r"The cause: the very cause$"):
        tf_prune.score(build("logits", wordy), "snip", (X, REAL))


def test_helpers_models_score_as_fit_would():
    for name in ("subclassed", "residual"):
        model = helpers.build(name)
        data = helpers.batch()
        assert_same(tf_prune.score(model, "snip", data), gradient_of_fit(helpers.build(name), *data))
