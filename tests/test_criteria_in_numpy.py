"""Every criterion against its formula, derived by hand in NumPy and float64: nothing of the package but the results."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tf_prune
from tests import helpers
from tf_prune.batches import Batches
from tf_prune.gradients import Derivatives
from tf_prune.structures import cut_into_groups

SHAPES = [(5, 7), (7, 3)]  # of helpers.float64_mlp: tanh, then logits, biases in both


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def one_hot(z, y):
    return np.eye(3)[y]


def tempered(temperature):
    return lambda z, y: (softmax(z / temperature) - one_hot(z, y)) / temperature


# Derivative of the loss of one example by its logits.
ERRORS = {
    None: lambda z, y: softmax(z) - one_hot(z, y),
    "uniform": lambda z, y: softmax(z) - 1 / 3,
    "prediction": lambda z, y: softmax(z) - softmax(z).mean(0),
    "prediction_raw": lambda z, y: softmax(z) - softmax(z.mean(0)),
    "quirk_raw_logit": lambda z, y: -one_hot(z, y),
}


class Net:
    """The network of `helpers.float64_mlp`, in NumPy: theta are the two kernels in one vector."""

    def __init__(self):
        self.model = helpers.float64_mlp(units=(5, 7, 3))
        generator = np.random.default_rng(1)
        w1, b1, w2, b2 = self.model.get_weights()
        b1, b2 = 0.3 * generator.standard_normal(7), 0.3 * generator.standard_normal(3)
        self.model.set_weights([w1, b1, w2, b2])
        self.biases = b1, b2
        self.theta = np.concatenate([w1.ravel(), w2.ravel()])
        self.x, self.y = generator.standard_normal((12, 5)), generator.integers(0, 3, 12)

    def gradient(self, theta, error=ERRORS[None]):
        w1, w2 = (part.reshape(shape) for part, shape in zip(np.split(theta, [35]), SHAPES, strict=True))
        h = np.tanh(self.x @ w1 + self.biases[0])
        e = error(h @ w2 + self.biases[1], self.y) / len(self.x)
        return np.concatenate([(self.x.T @ (e @ w2.T * (1 - h**2))).ravel(), (h.T @ e).ravel()])

    def hessian(self, theta, error=ERRORS[None]):
        steps = 1e-5 * np.eye(theta.size)
        return np.array([(self.gradient(theta + s, error) - self.gradient(theta - s, error)) / 2e-5 for s in steps])


def product(net, error=ERRORS[None]):
    return net.theta * (net.hessian(net.theta, error) @ net.gradient(net.theta, error))


@pytest.fixture(scope="module")
def net():
    return Net()


# criterion, the contributions of single weights, how a group's score comes from them
GOLDEN = [
    (tf_prune.SNIP(), lambda n: abs(n.theta * n.gradient(n.theta)), np.sum),
    (tf_prune.LossPreservation(0), lambda n: n.theta * n.gradient(n.theta), lambda v: abs(v.sum())),
    (tf_prune.LossPreservation(1), lambda n: n.theta**2 * abs(n.gradient(n.theta)), np.sum),
    (tf_prune.METHODS["squared_gradient"](), lambda n: n.gradient(n.theta) ** 2, np.sum),
    (tf_prune.GraSP(), lambda n: product(n, tempered(200)), np.sum),
    (tf_prune.GraSP(temperature=1), product, np.sum),
    (tf_prune.GradientNormPreservation(), product, lambda v: abs(v.sum())),
    (tf_prune.Magnitude(1), lambda n: abs(n.theta), np.sum),
    (tf_prune.Magnitude(2), lambda n: abs(n.theta), np.linalg.norm),
    (tf_prune.Magnitude(np.inf), lambda n: abs(n.theta), np.max),
    (tf_prune.Magnitude(-np.inf), lambda n: abs(n.theta), np.min),
]


def assert_close(scores, expected):
    values = np.concatenate([score.ravel() for score in scores.values()])
    np.testing.assert_allclose(values, expected, rtol=2e-5, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize(("criterion", "contributions", "of_group"), GOLDEN, ids=[str(row[0]) for row in GOLDEN])
def test_scores_of_single_weights_and_of_groups_are_the_formula(net, criterion, contributions, of_group):
    values = contributions(net)
    scores = tf_prune.score(net.model, criterion, (net.x, net.y))
    assert_close(scores, [of_group(value[None]) for value in values])
    survey = tf_prune.find_prunable(net.model)
    groups, _ = cut_into_groups("input_channels", survey.layouts)
    scores = criterion.scores(Derivatives(net.model, survey.prunable), Batches((net.x, net.y)), None, groups)
    parts = [part.reshape(shape) for part, shape in zip(np.split(values, [35]), SHAPES, strict=True)]
    assert_close(scores, np.array([of_group(row) for part in parts for row in part]))


@pytest.mark.parametrize("loss", ERRORS)
@pytest.mark.parametrize("last", ["logits", "softmax"])
def test_losses_without_labels_and_the_quirk_are_their_formula(net, loss, last):
    data = (net.x, net.y if loss in (None, "quirk_raw_logit") else None)
    model = net.model
    if last == "softmax":
        model = helpers.float64_mlp(units=(5, 7, 3))
        model.layers[-1].activation = keras.activations.softmax
        model.set_weights(net.model.get_weights())
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(dtype="float64"))
    assert_close(tf_prune.score(model, "snip", data, loss), abs(net.theta * net.gradient(net.theta, ERRORS[loss])))
    hessian_gradient = tf_prune.score(model, tf_prune.GraSP(temperature=1), data, loss)
    assert_close(hessian_gradient, product(net, ERRORS[loss] if "prediction" not in str(loss) else frozen(net, loss)))


def frozen(net, loss):
    """The target of "prediction" does not move with the weights."""
    w1, w2 = (part.reshape(shape) for part, shape in zip(np.split(net.theta, [35]), SHAPES, strict=True))
    z = np.tanh(net.x @ w1 + net.biases[0]) @ w2 + net.biases[1]
    target = softmax(z).mean(0) if loss == "prediction" else softmax(z.mean(0))
    return lambda z, y: softmax(z) - target


@pytest.mark.parametrize("loss", ["uniform", "prediction", "prediction_raw"])
def test_one_logit_of_two_classes_is_two_logits_of_which_one_is_zero(loss):
    def build(units, activation=None):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation, name="head")])
        model.compile("sgd", "binary_crossentropy" if activation else "mse")
        return model

    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    single, sigmoid, double = build(1), build(1, "sigmoid"), build(2)
    kernel, _ = single.get_weights()
    double.set_weights([np.concatenate([0 * kernel, kernel], 1), np.zeros(2)])
    scores = [*(tf_prune.score(m, "snip", (x, None), loss).popitem()[1] for m in (single, sigmoid, double))]
    assert scores[0].max() > 0
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-5)
    np.testing.assert_allclose(scores[2][:, 1:], scores[0], rtol=1e-5)


class OwnBinary(keras.losses.BinaryCrossentropy):
    """Counts as its parent."""


@pytest.mark.parametrize("compiled", ["binary_crossentropy", OwnBinary()], ids=["by name", "a subclass"])
@pytest.mark.parametrize("loss", ["uniform", "prediction", "quirk_raw_logit"])
def test_several_binary_labels_are_each_two_classes(loss, compiled):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "sigmoid")])
    model.compile("sgd", compiled)
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((8, 4)).astype(np.float32), generator.integers(0, 2, (8, 3))
    kernel = np.asarray(model.layers[0].kernel, np.float64)
    p = 1 / (1 + np.exp(-x @ kernel))
    error = {"uniform": p - 0.5, "prediction": p - p.mean(0), "quirk_raw_logit": -y.astype(float)}[loss]
    scores = tf_prune.score(model, "snip", (x, y), loss).popitem()[1]
    np.testing.assert_allclose(scores, abs(kernel * (x.T @ error) / 24), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("units", [1, 3])
def test_labels_are_taken_with_and_without_an_axis(units):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units)])
    x, y = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32), np.arange(6) % max(units, 2)
    one, other = (
        tf_prune.score(model, "snip", (x, labels), "quirk_raw_logit").popitem()[1] for labels in (y, y[:, None])
    )
    np.testing.assert_array_equal(one, other)
    targets = y[:, None] if units == 1 else np.eye(3)[y]
    np.testing.assert_allclose(one, abs(np.asarray(model.layers[0].kernel) * (x.T @ targets) / 6), rtol=1e-5)


@pytest.mark.parametrize(
    ("units", "end", "compiled"),
    [(1, tf.sigmoid, "mse"), (3, tf.sigmoid, "binary_crossentropy"), (3, tf.nn.softmax, "categorical_crossentropy")],
)
def test_probabilities_without_a_trace_of_their_logits_are_taken_back(units, end, compiled):
    def build(activation, loss):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, activation)])
        model.compile("sgd", loss)
        return model

    x = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    is_binary = compiled == "binary_crossentropy"
    of_logits = build(None, keras.losses.BinaryCrossentropy(from_logits=True) if is_binary else "mse")
    of_probabilities = build(end, "binary_crossentropy" if units == 1 else compiled)
    scores = [tf_prune.score(m, "snip", (x, None), "uniform").popitem()[1] for m in (of_logits, of_probabilities)]
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-4)


def test_a_loss_that_only_scoring_knows_is_for_one_output():
    x = keras.Input((4,))
    model = keras.Model(x, [keras.layers.Dense(2)(x), keras.layers.Dense(3)(x)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"loss='uniform' is for a model of one output, and '.*' has 2"):
        tf_prune.score(model, "snip", (np.ones((2, 4), np.float32), None), "uniform")


def test_optimal_brain_damage_is_unbiased_with_the_variance_that_it_says(net):
    num_probes = 400
    hessian = net.hessian(net.theta)
    scores = tf_prune.score(net.model, tf_prune.OptimalBrainDamage(num_probes), (net.x, net.y))
    values = np.concatenate([score.ravel() for score in scores.values()])
    sigma = 0.5 * net.theta**2 * np.sqrt(((hessian - np.diag(np.diag(hessian))) ** 2).sum(1) / num_probes)
    deviations = (values - 0.5 * np.diag(hessian) * net.theta**2) / sigma
    assert np.abs(deviations).max() < 5
    assert 0.7 < np.sqrt((deviations**2).mean()) < 1.3


@pytest.mark.parametrize(
    ("method", "revive", "score"),
    [
        (tf_prune.FORCE, True, lambda theta, g: abs(theta * g)),
        (tf_prune.IterativeSNIP, False, lambda theta, g: abs(theta * g)),
        (tf_prune.GraSPIt, False, lambda theta, g: g**2),
    ],
    ids=["FORCE", "IterativeSNIP", "GraSPIt"],
)
@pytest.mark.parametrize("schedule", ["linear", "exponential"])
def test_iterative_methods_are_their_algorithm(net, method, revive, score, schedule):
    steps, sparsity = 6, 0.8
    mask = np.ones(net.theta.size, bool)
    for t in range(1, steps + 1):
        scores = score(net.theta, net.gradient(mask * net.theta))
        density = 1 - sparsity * t / steps if schedule == "linear" else (1 - sparsity) ** (t / steps)
        if not revive:
            scores = np.where(mask, scores, -np.inf)
        mask = np.zeros(net.theta.size, bool)
        mask[np.argsort(-scores, kind="stable")[: int(net.theta.size * density + 1e-9)]] = True
    model = keras.models.clone_model(net.model)
    model.set_weights(net.model.get_weights())
    model.compile("sgd", net.model.loss)
    report = tf_prune.prune(model, method(steps, schedule), sparsity, (net.x, net.y), verbose=0)
    np.testing.assert_array_equal(np.concatenate([m.ravel() for m in report.masks.values()]), mask)


def test_synaptic_flow_of_a_rectifier_network_is_its_closed_form():
    model = helpers.build("mlp")
    model.get_layer("hidden").bias.assign(np.linspace(-1, 1, 16))
    w1, b1, w2, _ = (abs(w).astype(np.float64) for w in model.get_weights())
    first, second = tf_prune.score(model, "synflow").values()
    np.testing.assert_allclose(first, w1 * w2.sum(1), rtol=1e-5)
    np.testing.assert_allclose(second, w2 * (w1.sum(0) + b1)[:, None], rtol=1e-5)


def test_half_batches_are_the_sum_over_the_two_halves(net):
    # (H1 + H2)(g1 + g2) of the paper's release, for a batch of even size, is 4 times that of the mean.
    x, y = net.x, net.y
    halves = [Net() for _ in range(2)]
    for half, part in zip(halves, (slice(0, 6), slice(6, 12)), strict=True):
        half.x, half.y = x[part], y[part]
    error = tempered(200)
    g = sum(half.gradient(net.theta, error) for half in halves)
    expected = net.theta * sum(half.hessian(net.theta, error) @ g for half in halves)
    scores = tf_prune.score(net.model, tf_prune.GraSP(quirk_half_batches=True), (x, y))
    assert_close({path: 4 * score for path, score in scores.items()}, expected)
