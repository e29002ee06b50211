import math

import keras
import numpy as np
import pytest

import tf_prune

FIRST_MOMENTS = {  # E[phi(x)^2] and E[phi'(x)^2] for x ~ N(0, q), in closed form
    "linear": (lambda q: q, lambda q: 1.0),
    "relu": (lambda q: q / 2, lambda q: 0.5),
    keras.ops.erf: (
        lambda q: 2 / math.pi * math.asin(2 * q / (1 + 2 * q)),
        lambda q: 4 / math.pi / math.sqrt(1 + 4 * q),
    ),
    "hard_tanh": (
        lambda q: (
            q * math.erf(1 / math.sqrt(2 * q))
            - 2 * math.sqrt(q / (2 * math.pi)) * math.exp(-1 / (2 * q))
            + math.erfc(1 / math.sqrt(2 * q))
        ),
        lambda q: math.erf(1 / math.sqrt(2 * q)),
    ),
}


@pytest.mark.parametrize("activation", FIRST_MOMENTS)
@pytest.mark.parametrize("q", [0.01, 0.7, 20.0])
def test_recursion_and_gain_agree_with_closed_forms(activation, q):
    value, slope = FIRST_MOMENTS[activation]
    assert tf_prune.next_variance(activation, q, 3.0, 0.5) == pytest.approx(3 * value(q) + 0.5, rel=1e-4)
    assert tf_prune.mean_field_gain(activation, q) == pytest.approx(slope(q) ** -0.5, rel=1e-4)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "gelu", "elu"])
def test_recursion_and_gain_agree_with_samples(activation):
    x = math.sqrt(1.5) * np.random.default_rng(0).standard_normal(200_000)
    function = keras.activations.get(activation)
    values = np.asarray(function(keras.ops.convert_to_tensor(x, "float64")))
    after = np.asarray(function(keras.ops.convert_to_tensor(x + 1e-5, "float64")))
    assert tf_prune.next_variance(activation, 1.5, 1.0) == pytest.approx(np.mean(values**2), rel=0.01)
    slope = np.mean(((after - values) / 1e-5) ** 2)
    assert tf_prune.mean_field_gain(activation, 1.5) == pytest.approx(slope**-0.5, rel=0.01)


def test_the_gain_of_tanh_tends_to_1_and_that_of_relu_is_the_root_of_2():
    gains = [tf_prune.mean_field_gain("tanh", q) for q in (1.0, 1e-2, 1e-4, 1e-8)]
    assert gains == sorted(gains, reverse=True)
    assert gains[-1] == pytest.approx(1, abs=1e-7)
    for q in (1e-3, 1.0, 123.0):
        assert tf_prune.mean_field_gain("relu", q) == pytest.approx(math.sqrt(2), rel=1e-14)


@pytest.mark.parametrize("bias_variance", [0.001, 0.05, 1.0])
@pytest.mark.parametrize("activation", ["tanh", "sigmoid", "hard_tanh", keras.ops.erf])
def test_a_critical_point_is_a_fixed_point_that_keeps_gradients(activation, bias_variance):
    point = tf_prune.critical_point(activation, bias_variance)
    q, weights = point.variance, point.weight_variance
    assert tf_prune.next_variance(activation, q, weights, bias_variance) == pytest.approx(q, rel=1e-6)
    assert tf_prune.mean_field_gain(activation, q) == pytest.approx(point.gain, rel=1e-9)
    for disturbed in (0.9 * q, 1.1 * q):  # and what is disturbed comes back
        after = tf_prune.next_variance(activation, disturbed, weights, bias_variance)
        assert abs(after - q) < abs(disturbed - q)


def test_a_layer_counts_as_its_function():
    name = tf_prune.mean_field_gain("elu", 1.0)
    assert tf_prune.mean_field_gain(keras.layers.ELU(), 1.0) == pytest.approx(name, rel=1e-9)


def test_without_biases_tanh_is_linear_and_every_variance_is_a_fixed_point_of_relu():
    assert tf_prune.critical_point("tanh") == tf_prune.CriticalPoint(0.0, pytest.approx(1, rel=1e-9), 0.0)
    assert tf_prune.critical_point("relu") == tf_prune.CriticalPoint(None, pytest.approx(2, rel=1e-12), 0.0)
    assert tf_prune.critical_point("linear").gain == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("activation", ["tanh", "hard_tanh", keras.ops.erf, "sigmoid"])
def test_a_network_of_100_layers_keeps_the_variance_of_its_pre_activations(activation):
    point = tf_prune.critical_point(activation, bias_variance=0.05)
    function = keras.activations.get(activation)
    generator = np.random.default_rng(0)
    h = math.sqrt(point.variance) * generator.standard_normal((16, 400))
    for _ in range(100):
        x = np.asarray(function(keras.ops.convert_to_tensor(h, "float64")))
        h = x @ (generator.standard_normal((400, 400)) * math.sqrt(point.weight_variance / 400))
        h += math.sqrt(point.bias_variance) * generator.standard_normal(400)
    assert np.mean(h**2) == pytest.approx(point.variance, rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tf_prune.mean_field_gain("softmax", 1.0), "'softmax' has no mean-field gain"),
        (lambda: tf_prune.mean_field_gain("tanh", 0.0), "variance must be a positive number, got 0.0"),
        (lambda: tf_prune.critical_point("relu", 1.0), "'relu' has no stable critical point with a bias variance of 1"),
        (lambda: tf_prune.critical_point("tanh", -1.0), "bias_variance must be a non-negative number, got -1.0"),
        (lambda: tf_prune.next_variance("tanh", 1.0, math.inf), "weight_variance must be a non-negative number"),
        (lambda: tf_prune.mean_field_gain(keras.ops.sum, 1.0), "'sum' has no mean-field gain"),
        (lambda: tf_prune.mean_field_gain(keras.ops.sign, 1.0), "no finite slope"),
        (lambda: tf_prune.critical_point("tanh_shrink"), "no stable critical point"),
    ],
)
@pytest.mark.filterwarnings("ignore:You are using a softmax over axis")
def test_what_has_no_mean_field_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
